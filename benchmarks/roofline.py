"""The machine's own limits, measured beside the peers: how long it takes only to move the bytes, or only to take exponentials.

The loops are C (roofline.c), compiled for this very processor when they are first asked for. Without a compiler there are no
limits, and `why_not` says so.
"""

import ctypes
import math
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from .cases import FORWARD, GRADIENT

READ, WRITE_ELSEWHERE, WRITE_IN_PLACE = range(3)  # as in roofline.c
ONE_THREAD = ", 1 thread"
IN_CACHE = 1 << 18  # elements, with their gradients 2 MB
SOURCE = Path(__file__).with_name("roofline.c")


@cache
def _compiled():
    """(library, None) or (None, why not)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "roofline.so")
        command = [*shlex.split(os.environ.get("CC", "cc")), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        try:
            subprocess.run([*command, str(SOURCE), "-o", str(file), "-lm"], check=True, capture_output=True, text=True)
            library = ctypes.CDLL(str(file))
        except (OSError, subprocess.CalledProcessError) as error:
            return None, f"roofline.c does not compile here: {getattr(error, 'stderr', None) or error}"
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.memory_limit.argtypes = [ctypes.c_int, pointer, pointer, pointer, size, ctypes.c_double, ctypes.c_int]
    library.memory_limit.restype = None
    if library.has_arithmetic_limit():
        library.arithmetic_limit.argtypes = [pointer, pointer, size, ctypes.c_int]
        library.arithmetic_limit.restype = None
    return library, None


def why_not():
    """None if the limits can be measured here."""
    return _compiled()[1]


@cache
def last_level_cache():
    """Bytes of the largest cache of the first CPU; 32 MB where the system does not tell."""
    sizes = [file.read_text() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.strip().removesuffix("K")) << 10 for size in sizes), default=32 << 20)


def in_cache(case):
    """Whether logits and gradient stay in the last-level cache from call to call, so that arithmetic is the limit."""
    return 2 * case.logits_bytes <= last_level_cache() and case.dtype == "float32" and not case.option


def names(case, operation):
    """The limits that belong to a case, the one for most programs first."""
    library, _ = _compiled()
    found = []
    if not in_cache(case):
        found += ["limit: read"] if operation == FORWARD else ["limit: read + write", "limit: in place"]
    # Also where memory is read: exponentials may take longer. Half precision is computed in float32, float64 has other loops.
    if case.dtype != "float64" and not (library and not library.has_arithmetic_limit()):
        found += ["limit: max, exp"] if operation == FORWARD else ["limit: max, exp, scale"]
    return found + ([name + ONE_THREAD for name in found] if case.variants else [])


def aligned(bytes_, fill=1):
    """Memory that is there (each page was written), as NumPy allocates it, from a multiple of 64 bytes on."""
    whole = np.empty(bytes_ + 64, np.uint8)
    part = whole[-whole.ctypes.data % 64 :][:bytes_]
    part[:] = fill
    return part


def memory_limit(kind, bytes_, threads, live=1.0, second=False, array=None):
    """A function that moves `bytes_` from (and to) memory once; `second`: reads as many from another array."""
    library, _ = _compiled()
    array = aligned(bytes_) if array is None else array
    other = aligned(bytes_) if second else None
    out = aligned(bytes_) if kind == WRITE_ELSEWHERE else None
    addresses = [None if a is None else a.ctypes.data for a in (array, other, out)]

    def move():
        library.memory_limit(kind, *addresses, bytes_, live, threads)
        return array, other, out  # which also keeps them alive

    return move


def arithmetic_limit(elements, threads, gradient):
    """A function that takes the maximum and the exponentials of float32 elements; with `gradient` stores them scaled.

    Arrays too large for the cache are replaced by the same few elements again and again: memory is not in this limit.
    """
    library, _ = _compiled()
    times = math.ceil(elements / IN_CACHE) if 8 * elements > last_level_cache() else 1
    elements //= times
    x = aligned(4 * elements).view(np.float32)
    x[:] = 3 * np.random.default_rng(0).standard_normal(elements, np.float32)
    out = aligned(4 * elements).view(np.float32) if gradient else None
    # A team of threads costs microseconds: below this one thread is faster.
    threads = 1 if elements < 65536 else threads
    arguments = [x.ctypes.data, None if out is None else out.ctypes.data, elements, threads]

    def compute():
        for _ in range(times):
            library.arithmetic_limit(*arguments)
        return x, out

    return compute


def make(name, case, operation, threads):
    """A function that takes the least time that `operation` on `case` can take."""
    name = name.removesuffix(ONE_THREAD)
    if "exp" in name:
        return arithmetic_limit(case.elements, threads, operation == GRADIENT)
    kind = {"limit: read": READ, "limit: read + write": WRITE_ELSEWHERE, "limit: in place": WRITE_IN_PLACE}[name]
    return memory_limit(kind, case.logits_bytes, threads, case.live, case.option == "soft")
