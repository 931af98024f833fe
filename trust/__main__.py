"""python -m trust NAME: how hard pyx_xent was tried to be broken. `python -m trust report` makes TRUST.md of what was found."""

import argparse
import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from pyx_xent import _dispatch

from . import (
    aarch64,
    accuracy,
    bits,
    build,
    callers,
    clang,
    emulation,
    exp,
    free_threaded,
    fuzz,
    interrupts,
    memcheck,
    plant,
    processes,
    races,
    results,
    sizes,
)
from .results import Check, Finding

AT_ONCE = 500  # calls of a job
FOLDER = Path("build/trust")
# Tests that start processes or load libraries that are not built for a sanitizer, and one that its memory would fail.
NOT_SANITIZED = [
    f"--ignore-glob=tests/test_{name}*.py" for name in ("build", "benchmarks", "docs", "environment", "torch", "trust")
]
NOT_SANITIZED += [
    "--deselect=tests/test_linear.py::test_logits_are_never_one_array",
    # AddressSanitizer needs memory of its own: under a limit it ends, and then hangs.
    "--deselect=tests/test_memory.py::test_blocks_that_are_kept_do_not_make_a_call_fail",
]


def parallel(function, jobs, arguments, about):
    """Results of `function` for each job. In new processes, which may die of what they find."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, context) as pool:  # a Pool would wait for the dead
        yield from tqdm(pool.map(function, jobs), total=len(jobs), desc=about, leave=False)


# 1. Accuracy


def run_accuracy(arguments):
    jobs = accuracy.jobs(arguments.seed)
    measured = dict(zip(jobs, parallel(accuracy.measure, jobs, arguments, "rows against Arb"), strict=True))
    return Finding([accuracy.summary(measured, dtype) for dtype in accuracy.DTYPES], accuracy.table(measured), accuracy.NOTE)


def run_exp(arguments):
    blocks, lines = list(exp.blocks()), []
    doubles = [(arguments.seed, k) for k in range(-(-arguments.doubles // exp.AT_ONCE))]
    for isa in _dispatch.supported:
        for what, function, jobs in (
            (f"float32 from {exp.LOWEST:.0f} to {exp.HIGHEST:.0f}, all", exp.worst, [(isa, *block) for block in blocks]),
            (f"float64 from {-exp.WIDEST:.0f} to {exp.WIDEST:.0f}", exp.worst_double, [(isa, seed) for seed in doubles]),
        ):
            found = list(parallel(function, jobs, arguments, f"{isa}, {what}"))
            _, error, where = max(found, key=lambda one: one[1])
            if error > exp.PROMISED[isa]:
                raise SystemExit(f"{isa}, {what}: {error} ULP at {where!r}, promised {exp.PROMISED[isa]}")
            lines.append((f"exp of {sum(count for count, _, _ in found):,} {what}: {isa}", f"{error:.3f} ULP, at {where!r}"))
        for name, (count, error) in (exp.table(isa) or {}).items():
            lines.append((f"exp of the {count:,} {name} of NumPy's test table: {isa}", f"{error:.3f} ULP"))
    return Finding(lines)


# 2. Bits


def run_bits(arguments):
    jobs = [(arguments.seed, k) for k in range(arguments.problems)]
    found = sum(parallel(bits.check, jobs, arguments, "problems"), Counter())
    return Finding([(f"{what}, {arguments.problems:,} random problems", f"{count:,} arrays, no other bit")
                    for what, count in found.items()])  # fmt: skip


def run_clang(arguments):
    return Finding(clang.check(FOLDER / "clang", arguments.seed))


# 3. Memory


def run_fuzz(arguments):
    firsts = range(0, arguments.calls, AT_ONCE)
    jobs = [(min(AT_ONCE, arguments.calls - first), (arguments.seed, first)) for first in firsts]
    found = sum(map(Counter, parallel(fuzz.job, jobs, arguments, f"{AT_ONCE} calls each")), Counter())
    for name, count in sorted(found.items()):
        print(f"    {name:34}{count:10,}")
    made = arguments.calls - found["skipped"]
    return Finding([(f"{made:,} random calls, {found['raised']:,} of them with a mistake", "each right, or the right error")])


def run_sanitize(arguments):
    folder = FOLDER / "sanitized"
    build.copy(folder)
    build.build_with_sanitizers(folder)

    def sanitized(*command):
        result = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=build.under_sanitizers(),
                                stdout=subprocess.PIPE, text=True, check=False)  # fmt: skip
        print(result.stdout[-1500:])
        if result.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {result.returncode} under the sanitizers")
        return result.stdout.splitlines()

    calls = ["--calls", str(arguments.calls), "--seed", str(arguments.seed), "--jobs", str(arguments.jobs)]
    fuzz_line = sanitized("trust", "fuzz", *calls)[-1]
    callers_line = sanitized("trust", "callers", "--seconds", str(arguments.seconds))[0]
    tests_line = sanitized("pytest", "-q", "-s", "-p", "no:cacheprovider", "tests", *NOT_SANITIZED)[-1]
    return Finding([
        (f"AddressSanitizer and UndefinedBehaviorSanitizer of gcc: {fuzz_line.partition(':')[0]}", "no report"),
        (f"the same: the tests, {tests_line.strip('= ')}", "no report"),
        (f"the same: {callers_line}", "no report"),
    ])  # fmt: skip


def run_plant(arguments):
    found = plant.run(FOLDER / "planted", arguments.calls)
    missed = [what for what, said in found.items() if said is None]
    if missed:
        raise SystemExit(f"missed: {'; '.join(missed)}")
    return Finding([("bugs planted in the kernels and checks, which the fuzzer must find", f"{len(found)} of {len(found)}")])


def run_valgrind(arguments):
    each = -(-arguments.calls // (2 * arguments.jobs))
    jobs = [(each, (arguments.seed, k)) for k in range(2 * arguments.jobs)]
    reports = list(itertools.chain.from_iterable(parallel(memcheck.job, jobs, arguments, "under valgrind")))
    if reports:
        raise SystemExit("\n".join(reports[:20]))
    return Finding([(f"valgrind, AVX2 and baseline kernels, {each * len(jobs):,} random calls", "no uninitialised read")])


def run_races(arguments):
    folder = FOLDER / "races"
    races.prepare(folder)
    races.build_with_sanitizer(folder)
    reports, told, errors = races.run(folder, arguments.seconds)
    if reports:
        raise SystemExit(errors[:10_000])
    planted = races.planted(folder, arguments.seconds)
    if not all(planted.values()):
        raise SystemExit(f"planted races that were not seen: {[what for what, seen in planted.items() if not seen]}")
    return Finding([
        (f"ThreadSanitizer of clang with LLVM's OpenMP: {told}", "no report"),
        ("races planted, which it must see", f"{len(planted)} of {len(planted)}"),
    ])  # fmt: skip


# 4. and 5. Many callers, Ctrl-C, processes


def run_callers(arguments):
    counts, samples = callers.run(arguments.callers, arguments.seconds)
    calls = callers.told(counts)
    memory, tasks = zip(*samples, strict=True)
    half = len(memory) // 2
    before, after = max(memory[:half]), max(memory[half:])
    if arguments.seconds >= 30 and after > 1.05 * before + 20:
        raise SystemExit(f"memory grows: {before:.0f} MB, then {after:.0f} MB")
    return Finding([
        (f"{arguments.callers} Python threads for {arguments.seconds} s: {calls}", "each with the bits of a single caller"),
        ("their memory, largest of the first and of the second half", f"{before:.0f} MB, {after:.0f} MB"),
        ("their threads, OpenMP's included", f"{min(tasks)} to {max(tasks)}"),
    ])  # fmt: skip


def run_interrupts(arguments):
    lines, slow = [], []
    for what in tqdm(interrupts.CASES, leave=False):
        found = interrupts.latencies(what, arguments.times, arguments.seed)
        lines.append((f"Ctrl-C during {what}, {arguments.times} times", f"{max(found):.2f} s at most"))
        slow += [what] if max(found) > interrupts.PROMISED else []
    if slow:
        raise SystemExit(f"more than {interrupts.PROMISED} s: {slow}; {lines}")
    return Finding(lines)


def run_forks(arguments):
    found = processes.in_new_process(f"print(json.dumps(processes.forks({arguments.children})))")
    if any(children != right for children, right in found.values()):
        raise SystemExit(f"children, and those that computed: {found}")
    return Finding([(f"children after parallel calls: {what}", f"{right:,} of {children:,} computed the same bits")
                    for what, (children, right) in found.items()])  # fmt: skip


def run_limits(arguments):
    return Finding([
        (what, "could not be tried: " + reason if threads is None else f"threads: {threads} ({reason}), same bits")
        for what, (threads, reason) in processes.limits().items()
    ])  # fmt: skip


def run_imports(arguments):
    orders = processes.import_orders()
    list(parallel(processes.check_order, orders, arguments, "orders"))
    names = ", ".join(sorted(orders[0]))
    return Finding([(f"imported in any order, then all called, twice: {names}", f"{len(orders)} of {len(orders)} orders work")])


# 6. to 9.


def run_emulate(arguments):
    lines = []
    for processor in tqdm(emulation.PROCESSORS, leave=False):
        isa, digests, calls = emulation.check(processor, arguments.calls, arguments.seed)
        told = (
            f"{isa} kernels, ImportError for faster ones; {digests} digests as on this processor; {calls:,} random calls right"
        )
        lines.append((f"emulated {processor}", told))
    return Finding(lines + aarch64.check(arguments.aarch64, arguments.seed, arguments.jobs))


def run_sizes(arguments):
    lines = []
    for what in tqdm(sizes.CHECKS, leave=False):
        elements, left_out = processes.in_new_process(
            f"from trust import sizes; print(json.dumps(sizes.check({what!r})))", timeout=3000
        )
        lines.append((what, left_out or f"{elements:,} elements, right"))
    return Finding(lines)


def run_free_threaded(arguments):
    if not arguments.python:
        return Finding([("a free-threaded Python", "not given (--python), so untested")])
    return Finding(free_threaded.check(FOLDER / "free-threaded", arguments.python, arguments.callers, arguments.seconds))


def run_memory(arguments):
    found = processes.in_new_process(
        f"from trust import faults; print(json.dumps(faults.sweep({arguments.steps}, {arguments.step_mb} << 20)))"
    )
    told = f"{found['MemoryError']} raised MemoryError and wrote nothing, {found['worked']} worked with the usual results"
    return Finding([(f"calls with 0 to {arguments.steps * arguments.step_mb} MB of memory to be had", told)])


CHECKS = [
    Check("accuracy", 1, run_accuracy, "errors of losses, softmax and gradients, beside other libraries"),
    Check("exp", 1, run_exp, "the largest error of the kernels' exponential", {"doubles": 100_000_000}),
    Check("bits", 2, run_bits, "the same bits, whatever does not matter", {"problems": 1000}),
    Check("clang", 2, run_clang, "clang's build: the same bits as gcc's, and the tests"),
    Check("fuzz", 3, run_fuzz, "random calls of the public functions", {"calls": 100_000}),
    Check("sanitize", 3, run_sanitize, "random calls, many callers and the tests under gcc's sanitizers",
          {"calls": 1_100_000, "seconds": 60}),
    Check("plant", 3, run_plant, "whether the fuzzer finds bugs that are planted", {"calls": 5_000}),
    Check("valgrind", 3, run_valgrind, "random calls under valgrind", {"calls": 4_000}),
    Check("races", 4, run_races, "many callers under clang's ThreadSanitizer", {"seconds": 60}),
    Check("interrupts", 4, run_interrupts, "how long Ctrl-C takes", {"times": 10}),
    Check("forks", 5, run_forks, "children that compute after their parent has", {"children": 250}),
    Check("callers", 5, run_callers, "Python threads that call at once", {"callers": 8, "seconds": 60}),
    Check("limits", 5, run_limits, "what limits threads"),
    Check("imports", 5, run_imports, "every order of importing this and other libraries"),
    Check("emulate", 6, run_emulate, "older processors and aarch64, emulated by qemu; FOLDER: see trust/aarch64.py",
          {"calls": 1000, "aarch64": ""}),
    Check("sizes", 7, run_sizes, "more elements than 32 bits count"),
    Check("free-threaded", 8, run_free_threaded, "a Python without a global lock", {"python": "", "callers": 8, "seconds": 30}),
    Check("memory", 9, run_memory, "calls without the memory they need", {"steps": 40, "step_mb": 4}),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(prog="python -m trust", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for check in CHECKS:
        command = commands.add_parser(check.name, help=check.about, description=check.about)
        for name, default in {**check.options, "seed": 0, "jobs": os.cpu_count()}.items():
            command.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
        command.set_defaults(run=functools.partial(results.run, check))
    report = commands.add_parser("report", help="write TRUST.md from what the checks have found")
    report.set_defaults(run=lambda arguments: results.write(CHECKS))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
