"""Many callers under clang's ThreadSanitizer, and whether it sees races that are planted.

gcc's OpenMP runtime is invisible to the sanitizer; LLVM's tells it, through Archer, what its threads wait for. The kernels are
those of the baseline, because the sanitizer does not look at accesses of 32 and 64 bytes.
"""

import os
import subprocess
import sys
from pathlib import Path

from . import build

CLANG = "clang-19"
SANITIZE = "-fsanitize=thread -shared-libsan"
BATCH = "pyx_xent/_kernels/batch.pxi"
PLANTED = {  # what is wrong: (where, the right code, the wrong code) for each change
    "all threads share a scratch": [
        (BATCH, "do_positions(p, first, end, counter, threadid())", "do_positions(p, first, end, counter, 0)")
    ],
    "threads that share a row discard in one place": [
        (BATCH, "shared_sum(p, b, segment, threadid())", "shared_sum(p, b, segment, 0)")
    ],
    "segments write into the first one": [
        (BATCH, "shared_entries(p, b, segment, threadid())", "shared_entries(p, b, 0, threadid())")
    ],
    "segments of a row share a sum": [(BATCH, "shared_sum(p, b, segment, threadid())", "shared_sum(p, b, 0, threadid())")],
}

CODE = """
import sys
from pyx_xent import _runtime
from trust import callers
assert _runtime.OPENMP and _runtime.openmp_max_threads() == 4  # which wakes OpenMP
maps = open("/proc/self/maps").read()
assert all(name in maps for name in ("libomp.so", "libarcher.so", "clang_rt.tsan")) and "libgomp" not in maps
print("4 Python threads:", callers.told(callers.run(4, float(sys.argv[1]))[0]))
"""


def path_of(library):
    found = Path(subprocess.check_output([CLANG, f"-print-file-name={library}"], text=True).strip())
    if not found.is_absolute():
        raise SystemExit(f"{library} of {CLANG} is not installed")
    return found


def build_with_sanitizer(folder):
    build.build(
        folder, CC=CLANG, LDSHARED=f"{CLANG} -shared {SANITIZE}", CFLAGS=f"-g1 -fno-omit-frame-pointer {SANITIZE}",
        LDFLAGS=SANITIZE,
    )  # fmt: skip


def run(folder, seconds, stop_at_first=False):
    """(how many reports, which calls were made, the reports)"""
    suppressions = folder / "suppressions.txt"
    suppressions.write_text("called_from_lib:libomp.so\n")  # what it does with memory of its own
    options = f"suppressions={suppressions.resolve()} exitcode=0 halt_on_error={int(stop_at_first)}"
    archer = path_of("libarcher.so")
    environment = {
        **os.environ, "LD_PRELOAD": str(path_of("libclang_rt.tsan-x86_64.so")), "TSAN_OPTIONS": options,
        "OMP_TOOL_LIBRARIES": str(archer), "OMP_NUM_THREADS": "4", "KMP_BLOCKTIME": "0", "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": ".",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(seconds)], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=1500, check=False,
    )  # fmt: skip
    reports = result.stderr.count("WARNING: ThreadSanitizer")
    if not reports and result.returncode:
        raise SystemExit(f"callers under ThreadSanitizer ended with {result.returncode}:\n{result.stderr[-3000:]}")
    return reports, result.stdout.strip(), result.stderr


def prepare(folder):
    build.copy(folder)
    build.only(folder, "baseline")


def planted(folder, seconds):
    """{what is wrong: whether it was seen}"""
    found = {}
    for what, changes in PLANTED.items():
        before = {name: (folder / name).read_bytes() for name, _, _ in changes}
        for name, right, wrong in changes:
            build.replace(folder / name, right, wrong)
        try:
            build_with_sanitizer(folder)
            found[what] = run(folder, seconds, stop_at_first=True)[0] > 0
        finally:
            for name, text in before.items():
                (folder / name).write_bytes(text)
    return found
