"""The package built for a Python without a global lock: it stays off, the tests pass, and callers do not disturb each other."""

import os
import subprocess

from . import build

PACKAGES = [
    "numpy",
    "cython>=3.1",
    "setuptools>=77",
    "pytest",
    "pytest-benchmark",
    "hypothesis",
    "threadpoolctl",
    "tqdm",
    "ml_dtypes",
]
TESTS = ["arguments", "edges", "half", "linear", "losses", "memory", "values"]
NO_LOCK = """
import sys
from pyx_xent import _dispatch
for isa in _dispatch.supported:
    _dispatch.load(isa)
assert not sys._is_gil_enabled()
print(sys.version)
"""
CALLERS = """
import sys
from trust import callers
counts, _ = callers.run({callers}, {seconds})
assert not sys._is_gil_enabled()
print(callers.told(counts))
"""


def check(folder, interpreter, callers, seconds):
    """[(what was done, what was found), ...]"""
    build.copy(folder)
    python = str((folder / ".venv/bin/python").absolute())

    def run(*command):
        result = subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise SystemExit(
                f"{' '.join(command)[:200]} ended with {result.returncode}:\n{(result.stdout + result.stderr)[-3000:]}"
            )
        return result.stdout.strip().splitlines()

    run(interpreter, "-m", "venv", ".venv")
    run(python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *PACKAGES)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ".")
    version = run(python, "-W", "error", "-c", NO_LOCK)[-1]
    tests = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in TESTS))[-1]
    made = run(python, "-c", CALLERS.format(callers=callers, seconds=seconds))[-1]
    return [
        (f"Python {version}", "importing any module leaves the global lock off"),
        (f"there: the tests of {', '.join(TESTS)}", tests.strip("= ")),
        (f"there: {callers} Python threads for {seconds} s: {made}", "each with the bits of a single caller"),
    ]
