"""Copies of the source tree that are built in another way: with sanitizers, with bugs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZERS = "-fsanitize=address,undefined"


def only(folder, isa):
    """Kernels of one instruction set: a third of the time."""
    replace(folder / "setup.py", 'isas = _isas["of_machine"]()', f'isas = ("{isa}",)')


def copy(folder):
    """The sources alone, in a new folder."""

    def unwanted(_, names):
        return [n for n in names if n.startswith(".") or n == "build" or n.endswith((".so", ".c", ".egg-info"))]

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT, folder, ignore=unwanted)
    for file in (ROOT / "benchmarks").glob("*.c"):
        shutil.copy(file, folder / "benchmarks")


def replace(file, old, new):
    """Change one place of a file."""
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"{file}: {text.count(old)} times {old!r}, expected once")
    file.write_text(text.replace(old, new), encoding="utf-8")


def build(folder, **variables):
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", f"-j{os.cpu_count()}"],
        cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"the build in {folder} failed:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")


def build_with_sanitizers(folder):
    build(
        folder, CFLAGS=f"-g1 -fno-omit-frame-pointer {SANITIZERS} -fno-sanitize-recover=undefined", LDFLAGS=SANITIZERS
    )  # fmt: skip


def under_sanitizers():
    """Environment for a Python that loads what `build_with_sanitizers` has made; gcc's runtimes come first."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        compiler = os.environ.get("CC", "gcc")
        libraries.append(subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip())
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # Python itself keeps much to the end; longer stacks for each of its allocations would take most of the time.
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=4",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": ".",
    }
