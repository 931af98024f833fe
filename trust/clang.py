"""The package built by clang, with LLVM's OpenMP: the bits of gcc's build, and the tests."""

import os
import subprocess
import sys
import time

from pyx_xent import _dispatch

from . import build, compare
from .races import CLANG

# Of processes, files and other libraries, which tell nothing about a compiler; PyTorch brings gcc's OpenMP along.
NOT_OF_A_COMPILER = [f"--ignore-glob=tests/test_{name}*.py" for name in ("benchmarks", "build", "docs", "torch", "trust")]


def check(folder, seed):
    """[(what was done, what was found), ...]"""
    build.copy(folder)
    build.build(folder, CC=CLANG)
    version = subprocess.check_output([CLANG, "-dumpversion"], text=True).strip()
    lines = [bits(folder, seed, isa, version) for isa in _dispatch.supported]
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", *NOT_OF_A_COMPILER],
        cwd=folder, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"tests of clang's build ended with {result.returncode}:\n{result.stdout[-3000:]}")
    print(f"tests of clang's build: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return [*lines, (f"clang {version}: the tests", result.stdout.splitlines()[-1].strip("= "))]


def bits(folder, seed, isa, version):
    """gcc's build is the one that this process has imported."""
    environment = {**os.environ, "PYX_XENT_ISA": isa}
    by_gcc = compare.results(folder / "gcc.pickle", seed, environment=environment)
    by_clang = compare.results(folder / "clang.pickle", seed, folder=folder, environment=environment)
    same = compare.check(f"{isa} kernels of clang beside gcc's", by_clang, by_gcc)
    return f"clang {version}: results of {isa} kernels beside gcc's", same
