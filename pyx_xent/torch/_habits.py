"""What backward finds out, so that the next loss can make its gradient early: the upstream gradient.

It is kept for losses of the same options, dtype and classes. A step may have several of them (auxiliary heads), which are told
apart by their place: how many were computed since the last backward. An upstream gradient that changes from step to step (a
loss divided by that step's number of tokens) is not to be guessed: then gradients are made in backward.
"""

_MOST = 256
_PLACES = 8
_MISSES = 2  # so many in a row, and no gradient is made early

_habits = {}


class _Habit:
    __slots__ = ("computed", "factors", "misses")

    def __init__(self):
        self.computed = 0
        self.factors = [1.0] * _PLACES
        self.misses = [0] * _PLACES


class Expectation:
    """Of one loss: `factor` is the upstream gradient that is expected, None if it is not to be guessed."""

    __slots__ = ("_habit", "_place", "factor")

    def __init__(self, *key):
        try:
            habit = _habits.get(key)
        except TypeError:  # an option that is no key, as a NumPy array of one number: nothing is learned from this loss
            habit = _Habit()
        if habit is None:
            if len(_habits) >= _MOST:
                _habits.clear()
            habit = _habits[key] = _Habit()
        self._habit = habit
        self._place = place = min(habit.computed, _PLACES - 1)
        habit.computed = place + 1
        self.factor = habit.factors[place] if habit.misses[place] < _MISSES else None

    def learn(self, factor):
        """The upstream gradient is here."""
        habit, place = self._habit, self._place
        habit.computed = 0
        habit.misses[place] = 0 if factor == habit.factors[place] else habit.misses[place] + 1
        habit.factors[place] = factor


def forget():
    """As if nothing had been computed yet."""
    _habits.clear()
