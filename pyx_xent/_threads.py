"""How many threads a call gets, and why.

Never more than: what the caller asked for, the CPUs this process may run on, its cgroup's CPU quota, what OpenMP would use
(OMP_NUM_THREADS, threadpoolctl), and what the work is worth. A forked child computes on one thread: GNU OpenMP's threads do
not survive fork, and using them there hangs (gcc bug 60035).
"""

import math
import operator
import os
from pathlib import Path

from . import _runtime

# Below this many elements a thread more costs more than it saves: waking one takes some microseconds.
ELEMENTS_WORTH_A_THREAD = 32768

_chosen = None  # by set_num_threads
_forked = False


def _in_child():
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _quota(folder):
    """CPUs that a cgroup may use, rounded up, by version 2 or 1; None if it sets no limit."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            return max(1, math.ceil(int(quota) / int(period)))
    return None


def _cgroup_cpus(groups=Path("/proc/self/cgroup"), mounted=Path("/sys/fs/cgroup")):
    """The smallest CPU quota of this process's cgroups and of those above them; None if there is none."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = mounted / controllers / path.lstrip("/")
        found += [_quota(level) for level in (folder, *folder.parents) if level.is_relative_to(mounted)]
    return min((cpus for cpus in found if cpus), default=None)


_CGROUP_CPUS = _cgroup_cpus()


def available():
    """(threads, reason): the most that a call may use now, and what limits it."""
    if not _runtime.OPENMP:
        return 1, "built without OpenMP"
    if _forked:
        return 1, "forked child: OpenMP's threads do not survive fork"
    limits = {"OpenMP (OMP_NUM_THREADS or its default)": _runtime.openmp_max_threads()}
    if hasattr(os, "sched_getaffinity"):
        limits["CPUs this process may run on"] = len(os.sched_getaffinity(0))
    else:
        limits["CPUs"] = os.cpu_count() or 1
    if _CGROUP_CPUS is not None:
        limits["cgroup CPU quota"] = _CGROUP_CPUS
    chosen = _chosen  # read once: another thread may set it
    if chosen is not None:
        limits["set_num_threads"] = chosen
    reason = min(limits, key=limits.get)
    return limits[reason], reason


def checked(num_threads):
    """`num_threads` as an int of at least 1, or None as it is; TypeError or ValueError otherwise."""
    if num_threads is None:
        return None
    try:
        number = int(operator.index(num_threads))  # int: not of a class that compares in its own way
    except TypeError:
        raise TypeError(f"num_threads must be an int or None, got {type(num_threads).__name__}") from None
    if number < 1:
        raise ValueError(f"num_threads must be at least 1, got {number}")
    return number


def for_work(num_threads, elements):
    """Threads for a call on `elements` array elements; `num_threads` is the caller's argument, an upper limit."""
    asked = checked(num_threads)
    worth = elements // ELEMENTS_WORTH_A_THREAD
    if worth < 2 or asked == 1:
        return 1
    threads = min(worth, available()[0])
    return threads if asked is None else min(threads, asked)


def get_num_threads():
    """The most threads that a call uses now.

    Examples
    --------
    >>> import pyx_xent
    >>> pyx_xent.get_num_threads() >= 1
    True
    """
    return available()[0]


def set_num_threads(num_threads):
    """Limit the threads of later calls in this process.

    Parameters
    ----------
    num_threads : int or None
        At least 1; None takes the limit away. The other limits stay (see `python -m pyx_xent`).

    Raises
    ------
    TypeError, ValueError
        If it is not an int, or below 1.

    Examples
    --------
    >>> import pyx_xent
    >>> pyx_xent.set_num_threads(1)
    >>> pyx_xent.get_num_threads()
    1
    >>> pyx_xent.set_num_threads(None)
    """
    global _chosen
    _chosen = checked(num_threads)
