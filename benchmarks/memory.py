"""Peak memory of each peer beyond its inputs: one call in a process of its own, started afresh."""

import sys
from pathlib import Path

from .cases import Case, Problem
from .peers import PEERS
from .worker import in_a_process


def resident(field):
    """Bytes: "VmRSS" now, or "VmHWM", the most since the mark was reset. None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":")), None)


def reset_mark():
    """Let VmHWM start again from what is resident now; elsewhere the mark is of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def high_mark():
    found = resident("VmHWM")
    if found is None:
        import resource

        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found


def one_call(case, operation, name, threads):
    """Bytes by which one call raises the memory of this process, with its results, without its inputs."""
    small = Problem(Case((2, 33000), "to load libraries and start threads"))
    PEERS[name].make(small, operation, threads)()
    problem = Problem(case)
    compute = PEERS[name].make(problem, operation, threads)
    before = resident("VmRSS") if reset_mark() else high_mark()
    compute()  # compiles, where anything is compiled
    reset_mark()
    result = compute()
    after = high_mark()
    del result
    return max(0, after - before)


def measure(case, operation, name, threads):
    huge = name.endswith("THP_MEM_ALLOC_ENABLE=1")
    return in_a_process(one_call, case, operation, "torch eager" if huge else name, threads, huge_pages=huge)
