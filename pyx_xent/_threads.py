"""How many threads a call gets, and why.

Never more than: what the caller asked for, the CPUs this process may run on, those that OpenMP binds its threads to, the
cgroup's CPU quota, what OpenMP would use (OMP_NUM_THREADS, threadpoolctl), and what the work is worth. A forked child computes
on one thread: GNU OpenMP's threads do not survive fork, and using them there hangs (gcc bug 60035).
"""

import functools
import math
import operator
import os
from pathlib import Path

from . import _runtime

# What a thread has to save: waking one takes about a microsecond while it still spins, some more when it sleeps.
NANOSECONDS_WORTH_A_THREAD = 2000.0

# Why there are so many CPUs, as show_config says it.
OF_PROCESS = "CPUs this process may run on"
OF_START = "CPUs this process could use when OpenMP was loaded"  # and bound the thread to some of them
OF_PLACES = "CPUs that OpenMP binds threads to (OMP_PLACES, GOMP_CPU_AFFINITY or the like)"
OF_ONE_PLACE = "CPUs of one OpenMP place: all threads stay there (OMP_PROC_BIND=primary or master)"

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


@functools.cache  # read at the first call that asks, not at import: a dozen small files
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


_places = functools.cache(_runtime.openmp_places)  # a runtime decides once


def _cpus():
    """(CPUs for the threads of the calling thread, reason).

    The affinity of a thread is what its process may use, until OpenMP binds the thread to one of its places, a part of that:
    GNU's when the library is loaded and in a thread's first parallel region, LLVM's when it is first asked for anything.
    The places were made from the affinity as it was before. So a thread in its place has the CPUs of all places, for there
    the others will run. A thread with another affinity was given it by the program, and keeps to it.

    Of two OpenMP runtimes in a process (scikit-learn's wheel has one of its own) the second sees what the first has left of
    the affinity and really binds all its threads to that, so one CPU is the true answer there.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1, "CPUs"
    affinity = os.sched_getaffinity(0)
    places = _places()
    if affinity in places:
        own = places[_runtime.openmp_place()]
        if os.sched_getaffinity(0) != affinity:  # asking has bound the thread
            os.sched_setaffinity(0, affinity)
        if affinity == own and _runtime.openmp_keeps_one_place():
            return len(own), OF_ONE_PLACE
        if affinity == own:
            cpus, at_start = len(frozenset().union(*places)), _runtime.openmp_cpus()
            # GOMP_CPU_AFFINITY may list CPUs that do not exist, or that the process may not use.
            return (cpus, OF_PLACES) if cpus < at_start else (at_start, OF_START)
    return len(affinity), OF_PROCESS


def available():
    """(threads, reason): the most that a call may use now, and what limits it."""
    if not _runtime.OPENMP:
        return 1, "built without OpenMP"
    if _forked:
        return 1, "forked child: OpenMP's threads do not survive fork"
    openmp = _runtime.openmp_max_threads()  # before the CPUs: with this question LLVM's runtime binds the thread
    cpus, reason = _cpus()
    # Of equal limits the first is the reason, and OpenMP's default is the number of CPUs.
    limits = {reason: cpus, "OpenMP (OMP_NUM_THREADS or its default)": openmp}
    quota = _cgroup_cpus()
    if quota is not None:
        limits["cgroup CPU quota"] = quota
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


def limited(asked, nanoseconds):
    """Threads for work that takes one thread so long; the caller allows `asked`, or any number if that is None."""
    worth = int(nanoseconds / NANOSECONDS_WORTH_A_THREAD)
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
