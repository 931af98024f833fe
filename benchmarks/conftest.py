"""Options of a run, what it was measured on, and a table for each group: time, bytes and the share of the machine's limit."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import pytest

import pyx_xent

from . import results, roofline

LIBRARIES = ("pyx_xent", "numpy", "torch", "scikit-learn", "numba", "jax", "optax")


def pytest_addoption(parser):
    group = parser.getgroup("cross-entropy benchmarks")
    group.addoption("--bench-threads", type=int, default=pyx_xent.get_num_threads(), help="threads of every peer")
    group.addoption("--bench-seconds", type=float, default=0.3, help="about how long each is timed")


def pytest_configure(config):
    threads = config.getoption("bench_threads")
    if not 1 <= threads <= pyx_xent.get_num_threads():
        raise pytest.UsageError(f"--bench-threads={threads}: there are {pyx_xent.get_num_threads()} ({threads_reason()})")
    pyx_xent.set_num_threads(threads)


def threads_reason():
    return pyx_xent.show_config()["num_threads_reason"]


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions():
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    return found


def pytest_benchmark_update_machine_info(config, machine_info):
    """Saved with the times: enough to say in a report what they were measured on."""
    machine_info["xent"] = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": config.getoption("bench_threads"),
        "last_level_cache": roofline.last_level_cache(),
        "versions": versions(),
        "config": pyx_xent.show_config(),
        "limits": roofline.why_not() or "measured in each group",
    }


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(config, machine_info, compared_benchmark):
    """Times of two machines say nothing about a change of the code."""
    now, before = machine_info["xent"], compared_benchmark["machine_info"].get("xent", {})
    for key in ("cpu", "cpus", "threads"):
        if now[key] != before.get(key):
            raise pytest.UsageError(f"the saved times are of another machine: {key} was {before.get(key)}, is {now[key]}")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [b.as_dict(include_data=False) for b in getattr(session, "benchmarks", []) if b]
    if not benchmarks:
        return
    terminalreporter.section("cross-entropy")
    terminalreporter.write_line(
        f"{cpu_name()}, {config.getoption('bench_threads')} threads, {pyx_xent.isa}, "
        + ", ".join(f"{library} {number}" for library, number in versions().items() if number)
    )
    for group, rows in results.groups(benchmarks).items():
        terminalreporter.write_line("")
        terminalreporter.write_line(group)
        for line in results.text_table([results.HEADINGS, *(row.cells() for row in rows)]):
            terminalreporter.write_line("    " + line)
