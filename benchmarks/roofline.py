"""The machine's own limits, measured beside the peers on the same arrays, each the slowest of what nobody can do without:

read, read + write, in place   the bytes moved once, nothing computed
max, exp; max, exp, scale      one maximum and one exponential an element, in cache
by hand                        the whole loss and gradient as vector code by hand has them: short rows, few classes, planes

The loops are C, compiled for this very processor when they are first asked for. Without a compiler there are no limits, and
`why_not` says so. Some limits can be reached in more than one way (past the caches or not, with threads or serially): after
" / " in their names. The fastest way counts.
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

from .cases import CHANNELS_LAST, FORWARD, GRADIENT

READ, WRITE_ELSEWHERE, WRITE_IN_PLACE, WRITE_CACHED = range(4)  # as in roofline.c
ROWS, ROWS_BFLOAT16, PLANES = range(3)  # as in handwritten.c, and so are these three:
LANES, FEW, MANY = 16, 64, 1024
ONE_THREAD = ", 1 thread"
WAY, SERIAL, CACHED = " / ", "serial", "plain stores"
MEMORY = {"limit: read": READ, "limit: read + write": WRITE_ELSEWHERE, "limit: in place": WRITE_IN_PLACE}
BY_HAND = "limit: by hand"
IN_CACHE = 1 << 18  # elements, with their gradients 2 MB
SOURCES = [Path(__file__).with_name(name) for name in ("roofline.c", "handwritten.c")]


@cache
def _compiled():
    """(library, None) or (None, why not)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "roofline.so")
        command = [*shlex.split(os.environ.get("CC", "cc")), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        try:
            subprocess.run([*command, *map(str, SOURCES), "-o", str(file), "-lm"], check=True, capture_output=True, text=True)
            library = ctypes.CDLL(str(file))
        except (OSError, subprocess.CalledProcessError) as error:
            return None, f"roofline.c does not compile here: {getattr(error, 'stderr', None) or error}"
    pointer, size, number, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double, ctypes.c_int
    library.memory_limit.argtypes = [integer, pointer, pointer, pointer, size, number, integer]
    library.memory_limit.restype = None
    if library.has_arithmetic_limit():
        for function in (library.arithmetic_limit_ps, library.arithmetic_limit_pd):
            function.argtypes = [pointer, pointer, size, size, integer]
            function.restype = None
    library.handwritten.argtypes = [integer, *[pointer] * 4, size, size, size, number, *[integer] * 3]
    return library, None


def why_not():
    """None if the limits can be measured here."""
    return _compiled()[1]


@cache
def last_level_cache():
    """Bytes of the largest cache of the first CPU; 32 MB where the system does not tell."""
    sizes = [file.read_text() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.strip().removesuffix("K")) << 10 for size in sizes), default=32 << 20)


@cache
def own_cache():
    """Bytes that arrays may have to stay in cache: a virtual machine reports 300 MB that it shares with its neighbours."""
    return min(last_level_cache(), 32 << 20)


def in_cache(case, arrays=2):
    """Whether so many arrays as large as the logits stay in the last-level cache from call to call: arithmetic is the limit.

    Two are logits and gradient; one is both, in place.
    """
    return arrays * case.logits_bytes <= own_cache()


def by_hand_kind(case):
    """Which loop of handwritten.c a case is for, or None."""
    library, _ = _compiled()
    if case.option or not (library and library.has_handwritten()):
        return None
    planes = len(case.shape) > 2 and case.layout != CHANNELS_LAST
    if planes:
        fits = case.dtype == "float32" and case.classes <= FEW and case.rows // case.shape[0] % LANES == 0
        return PLANES if fits else None
    if case.classes > MANY or case.rows % LANES:
        return None
    return {"float32": ROWS, "bfloat16": ROWS_BFLOAT16}.get(case.dtype)


def names(case, operation):
    """The limits that belong to a case, the one for most programs first."""
    library, _ = _compiled()
    found = []
    if not in_cache(case):
        if operation == FORWARD:
            found += ["limit: read"]
        else:
            found += ["limit: read + write", "limit: read + write" + WAY + CACHED, "limit: in place"]
    kind = by_hand_kind(case)
    if kind is not None:
        found += [BY_HAND]
        if kind == PLANES and operation == GRADIENT:
            found += [BY_HAND + WAY + CACHED]
    elif not (library and not library.has_arithmetic_limit()):
        # Also where memory is read: exponentials may take longer. Half precision is computed in float32.
        found += ["limit: max, exp"] if operation == FORWARD else ["limit: max, exp, scale"]
    alone = [name + ONE_THREAD for name in found] if case.variants else []
    if kind is not None and case.elements < IN_CACHE:
        found += [BY_HAND + WAY + SERIAL]  # below some 100 microseconds threads may cost more than they gain
    return found + alone


def binding(medians):
    """(name, seconds) of the limit that counts, of {name: seconds}: of each limit the fastest way, of these the slowest."""
    fastest = {}
    for name, seconds in medians.items():
        limit = name.removesuffix(ONE_THREAD).partition(WAY)[0]
        if seconds < fastest.get(limit, ("", math.inf))[1]:
            fastest[limit] = name, seconds
    return max(fastest.values(), key=lambda found: found[1])


def aligned(bytes_, fill=1):
    """Memory that is there (each page was written), as NumPy allocates it, from a multiple of 64 bytes on."""
    whole = np.empty(bytes_ + 64, np.uint8)
    part = whole[-whole.ctypes.data % 64 :][:bytes_]
    part[:] = fill
    return part


def touched_like(array):
    """Memory for a gradient, with the huge pages that NumPy asks for: written once, so that its pages are there."""
    gradient = np.empty_like(array)
    gradient[...] = 0
    return gradient


def memory_limit(kind, array, threads, live=1.0, second=None, out=None):
    """A function that moves the bytes of `array` from (and to) memory `count` times; reads as many from `second`, too."""
    library, _ = _compiled()
    addresses = [None if a is None else a.ctypes.data for a in (array, second, out)]

    def move(count=1):
        for _ in range(count):
            library.memory_limit(kind, *addresses, array.nbytes, live, threads)
        return array, second, out  # which also keeps them alive

    return move


def arithmetic_limit(x, threads, out=None, total=None):
    """A function that takes the maximum and the exponentials of `total` elements (all of x), stores them scaled in `out`.

    Of arrays too large for the cache the first elements are taken again and again: memory is not in this limit.
    """
    library, _ = _compiled()
    total, elements = total or x.size, x.size
    if 2 * x.nbytes > own_cache():
        elements = IN_CACHE
    function = {4: library.arithmetic_limit_ps, 8: library.arithmetic_limit_pd}[x.itemsize]
    # A team of threads costs microseconds: below this one thread is faster.
    arguments = [x.ctypes.data, None if out is None else out.ctypes.data, elements, total, 1 if total < 65536 else threads]

    def compute(count=1):
        for _ in range(count):
            function(*arguments)
        return x, out

    return compute


def by_hand(problem, threads, gradient=None, plain_stores=False):
    """A function that computes the loss of each row and, if `gradient` is an array, that of their mean, `count` times."""
    library, _ = _compiled()
    case, kind = problem.case, by_hand_kind(problem.case)
    images, pixels = (case.shape[0], case.rows // case.shape[0]) if kind == PLANES else (case.rows, 1)
    loss = np.zeros(case.rows)
    addresses = [a.ctypes.data for a in (problem.logits, problem.target, loss)]
    addresses.append(None if gradient is None else gradient.ctypes.data)
    numbers = images, case.classes, pixels, 1 / case.rows, not plain_stores, threads

    def compute(count=1):
        if library.handwritten(kind, *addresses, *numbers, count):
            raise ValueError(f"handwritten.c has no loop for {case}")
        return loss.mean() if count == 1 else None, gradient

    return compute


def make(name, problem, operation, threads, gradient=None):
    """A function of a count (1) that takes the least time that `operation` on `problem` can take; it writes to `gradient`."""
    case, x = problem.case, problem.logits
    limit, _, way = name.removesuffix(ONE_THREAD).partition(WAY)
    if operation == GRADIENT and gradient is None and limit != "limit: in place":
        gradient = touched_like(x)
    if limit == BY_HAND:
        return by_hand(problem, 1 if way == SERIAL else threads, gradient, way == CACHED)
    if limit in MEMORY:
        kind = WRITE_CACHED if way == CACHED else MEMORY[limit]
        second = problem.target if case.option == "soft" else None
        if kind == WRITE_IN_PLACE:  # a copy, because others are measured with these logits afterwards
            x = x.copy(order="K")
        return memory_limit(kind, x, threads, case.live, second, gradient)
    if x.itemsize == 2:  # is computed in float32
        x = 3 * np.random.default_rng(0).standard_normal(min(case.elements, IN_CACHE), np.float32)
        gradient = None if gradient is None else touched_like(x)
    return arithmetic_limit(x, threads, gradient, case.elements)
