"""Several functions by turns in one process: what the machine does meanwhile happens to all of them.

Memory bandwidth drifts by a factor of two within minutes on a shared machine, so a ratio of times means something only where
both were taken within the same seconds.
"""

import math
import resource
import statistics
import time
from dataclasses import dataclass

ROUNDS = 7  # at least
MOST = 200
TURN = 1e-3  # seconds of one function's turn, at least: enough for the clock, and for threads that have to wake up
UNSTEADY = 1.3  # median over minimum
# How often a second other programs may take the processor from our threads. Where every call waits for a thread that does not
# run, all take some 12 ms, steadily, and say nothing. Beside busy programs on 2 CPUs, 2 threads were stopped 160 to 190 times.
PREEMPTED = 100


def spread(seconds):
    return statistics.median(seconds) / min(seconds)


@dataclass
class Turns:
    seconds: dict  # of one call of each function, by name: a list with an entry for each round
    preempted: float = 0.0  # times a second

    @property
    def medians(self):
        return {name: statistics.median(found) for name, found in self.seconds.items()}

    @property
    def spread(self):
        """The largest median over its minimum."""
        return max(map(spread, self.seconds.values()))

    @property
    def steady(self):
        return self.spread <= UNSTEADY and self.preempted <= PREEMPTED

    @property
    def quality(self):
        """For a record: how far the figures can be trusted."""
        return {"spread": self.spread, "preempted": self.preempted, "steady": self.steady}


def remark(record):
    """What a table says of a record's `quality`: nothing where it is steady."""
    if record["steady"]:
        return []
    if record["spread"] > UNSTEADY:
        return [f"unsteady: {record['spread']:.1f}"]
    return [f"unsteady: preempted {record['preempted']:.0f} times a second"]


def switches():
    """How often threads of this process had to yield their processor to another program."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def repeated(function):
    """A function of a count, as by_turns takes it. What a call returns is held during the next call, as in a training loop."""

    def calls(count):
        held = None
        for _ in range(count):
            held = function()
        return held

    return calls


def by_turns(functions, budget=1.0, rounds=ROUNDS, tries=3):
    """Turns of {name: function of a number of calls}: at least `rounds`, and until each function has had `budget` seconds.

    A group that is not steady is measured again, `tries` times in all; the steadiest is returned.
    """
    counts, once = {}, {}
    for name, function in functions.items():
        function(1)
        start = time.perf_counter()
        function(1)
        once[name] = time.perf_counter() - start
        counts[name] = max(1, math.ceil(TURN / once[name]))
    slowest = max(once[name] * counts[name] for name in functions)
    rounds = max(rounds, min(MOST, math.ceil(budget / slowest)))
    best = None
    for _ in range(tries):
        before, start = switches(), time.perf_counter()
        seconds = _one_group(functions, counts, rounds)
        found = Turns(seconds, (switches() - before) / (time.perf_counter() - start))
        if best is None or (not found.steady, found.spread) < (not best.steady, best.spread):
            best = found
        if best.steady:
            break
    return best


def _one_group(functions, counts, rounds):
    seconds = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions) if number % 2 == 0 else reversed(functions):
            if counts[name] > 1:
                functions[name](1)  # brings its data into the caches and wakes its threads
            start = time.perf_counter()
            functions[name](counts[name])
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return seconds
