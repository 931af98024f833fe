"""python -m trust {fuzz,sanitize,plant,exp}: how hard pyx_xent was tried to be broken."""

import argparse
import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from pyx_xent import _dispatch

from . import build, exp, fuzz, plant

AT_ONCE = 500  # calls of a job
FOLDER = Path("build/trust")


def run_fuzz(arguments):
    jobs = [(min(AT_ONCE, arguments.calls - first), (arguments.seed, first)) for first in range(0, arguments.calls, AT_ONCE)]
    found = Counter()
    context = multiprocessing.get_context("spawn")
    # Of processes that may die of what they find: a multiprocessing.Pool would wait for them for ever.
    with (
        concurrent.futures.ProcessPoolExecutor(arguments.jobs, context) as pool,
        tqdm(total=arguments.calls, unit=" calls") as progress,
    ):
        for counts in pool.map(fuzz.run, *zip(*jobs, strict=True)):
            found.update(counts)
            progress.update(sum(counts.values()))
    print(f"{arguments.calls:,} calls from seed {arguments.seed}: nothing found")
    for name, count in sorted(found.items()):
        print(f"    {name:34}{count:10,}")


def run_sanitize(arguments):
    folder = FOLDER / "sanitized"
    build.copy(folder)
    build.build_with_sanitizers(folder)
    # Without the tests that start processes or load libraries that are not built for this.
    left_out = [f"--ignore-glob=tests/test_{name}*.py" for name in ("build", "benchmarks", "docs", "environment", "torch")]
    left_out.append("--deselect=tests/test_linear.py::test_logits_are_never_one_array")  # the sanitizer's memory counts there
    calls = ["--calls", str(arguments.calls), "--seed", str(arguments.seed), "--jobs", str(arguments.jobs)]
    for command in (["trust", "fuzz", *calls], ["pytest", "-q", "-s", "-p", "no:cacheprovider", "tests", *left_out]):
        subprocess.run([sys.executable, "-m", *command], cwd=folder, env=build.under_sanitizers(), check=True)


def run_plant(arguments):
    found = plant.run(FOLDER / "planted", arguments.calls)
    missed = [what for what, said in found.items() if said is None]
    print(f"{len(found) - len(missed)} of {len(found)} planted bugs were caught")
    if missed:
        raise SystemExit(f"missed: {'; '.join(missed)}")


def run_exp(arguments):
    blocks = list(exp.blocks())
    context = multiprocessing.get_context("spawn")
    for isa in _dispatch.supported:
        with concurrent.futures.ProcessPoolExecutor(arguments.jobs, context) as pool:
            jobs = [(isa, *block) for block in blocks]
            found = list(tqdm(pool.map(exp.worst_of, jobs), total=len(jobs), desc=isa, leave=False))
        _, error, where = max(found, key=lambda one: one[1])
        print(f"{isa}: exp of all {sum(count for count, _, _ in found):,} float32 from {exp.LOWEST} to {exp.HIGHEST}: "
              f"at most {error:.3f} ULP, at {where!r}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(prog="python -m trust", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, function, calls, text in (
        ("fuzz", run_fuzz, 100_000, "random calls of the public functions"),
        (
            "sanitize",
            run_sanitize,
            100_000,
            "the same and the tests under AddressSanitizer and UndefinedBehaviorSanitizer of gcc",
        ),
        ("plant", run_plant, 5_000, "whether the fuzzer finds bugs that are planted"),
        ("exp", run_exp, None, "the largest error of the kernels' exponential, over all float32"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        if calls is not None:
            command.add_argument("--calls", type=int, default=calls)
            command.add_argument("--seed", type=int, default=0)
        command.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
        command.set_defaults(run=function)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
