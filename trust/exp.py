"""The kernels' exponential against a wider one: of every float32 from -87 to 88, of many doubles, of NumPy's own test table."""

from pathlib import Path

import numpy as np

from pyx_xent import _dispatch

LOWEST, HIGHEST = -87.0, 88.0
WIDEST = 700.0  # of doubles, on either side
AT_ONCE = 1 << 22
PROMISED = {"baseline": 1.2, "avx2": 1.0, "avx512": 1.0, "neon": 1.0}  # ULP; the baseline has no FMA
TABLE = Path(np.__file__).parent / "_core/tests/data/umath-validation-set-exp.csv"


def blocks():
    """(first, end) of bit patterns: positive numbers, then negative ones."""
    for sign, limit in ((0, HIGHEST), (1 << 31, -LOWEST)):
        end = int(np.float32(limit).view(np.uint32)) + 1
        for first in range(0, end, AT_ONCE):
            yield sign + first, sign + min(first + AT_ONCE, end)


def unit_in_the_last_place(exact, dtype):
    """The spacing of the dtype's numbers there."""
    _, exponent = np.frexp(exact)
    return np.ldexp(exact.dtype.type(1), exponent - np.finfo(dtype).nmant - 1)


def units_in_the_last_place(found, exact):
    """Errors in units of that of the exact result."""
    return np.abs(found.astype(exact.dtype) - exact) / unit_in_the_last_place(exact, found.dtype)


def of(isa, x):
    out = np.empty_like(x)
    _dispatch.exponentials(isa, x, out)
    return out


def worst_of(isa, x):
    """(numbers, largest error in ULP, where)"""
    wide = np.float64 if x.dtype == np.float32 else np.longdouble
    error = units_in_the_last_place(of(isa, x), np.exp(x.astype(wide)))
    return len(x), float(error.max()), float(x[error.argmax()])


def worst(job):
    """Of a block of bit patterns of float32."""
    isa, first, end = job
    return worst_of(isa, np.arange(first, end, dtype=np.uint32).view(np.float32))


def worst_double(job):
    """Of as many doubles, half of them anywhere, half where logits are."""
    isa, seed = job
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.uniform(-WIDEST, WIDEST, AT_ONCE // 2), 10 * rng.standard_normal(AT_ONCE // 2)])
    return worst_of(isa, x)


def table(isa):
    """The same of the numbers of NumPy's table, against its results; None where NumPy comes without it."""
    if not TABLE.exists():
        return None
    found = {}
    for name, bits, limits in (("float32", np.uint32, (LOWEST, HIGHEST)), ("float64", np.uint64, (-WIDEST, WIDEST))):
        lines = [line.split(",") for line in TABLE.read_text().splitlines() if line.startswith(f"np.{name},")]
        x, expected = (np.array([int(line[k], 16) for line in lines], bits).view(name) for k in (1, 2))
        inside = (x >= limits[0]) & (x <= limits[1])
        error = units_in_the_last_place(of(isa, x[inside]), expected[inside].astype(np.longdouble))
        found[name] = int(inside.sum()), float(error.max())
    return found
