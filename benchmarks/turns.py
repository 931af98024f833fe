"""Several functions by turns in one process: what the machine does meanwhile happens to all of them.

Memory bandwidth drifts by a factor of two within minutes on a shared machine, so a ratio of times means something only where
both were taken within the same seconds.
"""

import math
import resource
import statistics
import time
from dataclasses import dataclass

from . import targets
from .results import duration

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
    def remarks(self):
        """What a table remarks: nothing where the figures can be trusted."""
        if self.steady:
            return []
        if self.spread > UNSTEADY:
            return [f"unsteady: {self.spread:.1f}"]
        return [f"unsteady: preempted {self.preempted:.0f} times a second"]


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


def timed(function, count):
    """Seconds of `count` calls; a function in another process has its own clock."""
    if hasattr(function, "seconds"):
        return function.seconds(count)
    start = time.perf_counter()
    function(count)
    return time.perf_counter() - start


def by_turns(functions, budget=1.0, rounds=ROUNDS, tries=3):
    """Turns of {name: function of a number of calls}: at least `rounds`, and until each function has had `budget` seconds.

    A group that is not steady is measured again, `tries` times in all; the steadiest is returned.
    """
    counts, once = {}, {}
    for name, function in functions.items():
        function(1)
        once[name] = timed(function, 1)
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
            seconds[name].append(timed(functions[name], counts[name]) / counts[name])
    return seconds


# --- records: a figure is the time of `numerator` over that of `denominator`


def record(target, case, operation, numerator, denominator, turns, less=0.0, remarks=()):
    """A record of two functions that had turns. less: seconds that do not count in the denominator."""
    seconds = [turns.medians[name] for name in (numerator, denominator)]
    return {
        **target._asdict(), "case": str(case), "operation": operation, "numerator": numerator, "denominator": denominator,
        "seconds": seconds, "figure": seconds[0] / (seconds[1] - less), "remarks": [*remarks, *turns.remarks],
    }  # fmt: skip


def identity(record):
    return tuple(record[key] for key in ("row", "case", "operation", "numerator", "denominator"))


def margin(record):
    """Below 1: missed. Infinite where nothing was asked for."""
    if record["wanted"] is None:
        return math.inf
    margin = record["figure"] / record["wanted"]
    return margin if record["sign"] == "≥" else 1 / margin


def written(figure):
    return f"{figure:.2f}"


HEADINGS = ("case", "", "time of", "", "over that of", "", "figure", "target", "")


def table(records):
    """Cells of each record, the worst first."""
    for one in sorted(records, key=margin):
        times = [*map(duration, one["seconds"]), ""]  # of an import there is one time
        missed = ["missed"] if margin(one) < 1 else []
        yield (
            one["case"], one["operation"], one["numerator"], times[0], one["denominator"], times[1],
            written(one["figure"]), wanted(one), ", ".join([*missed, *one["remarks"]]),
        )  # fmt: skip


def wanted(record):
    return "" if record["wanted"] is None else f"{record['sign']} {record['wanted']:.2f}"


def rows(records):
    """{row: its records}, in the order of `targets`."""
    found = {}
    for one in records:
        found.setdefault(one["row"], []).append(one)
    return dict(sorted(found.items(), key=lambda item: targets.ROWS.index(item[0])))


SUMMARY_HEADINGS = ("row", "met", "unsteady", "median", "worst", "figure", "target")


def unsteady(record):
    return any(remark.startswith("unsteady") for remark in record["remarks"])


def summary(records):
    """Cells of each row of figures: how many are as wanted, how many are unsteady and so show nothing, and the worst."""
    for row, some in rows(records).items():
        steady = [one for one in some if not unsteady(one)]
        worst = min(steady or some, key=margin)
        name = ", ".join(filter(None, (worst["case"], worst["operation"], worst["numerator"])))
        yield (
            row, f"{sum(margin(one) >= 1 for one in steady)} of {len(some)}", str(len(some) - len(steady)),
            written(statistics.median(one["figure"] for one in steady or some)), name, written(worst["figure"]), wanted(worst),
        )  # fmt: skip
