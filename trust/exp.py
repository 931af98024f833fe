"""The exponential of the kernels against the double one, for every float32 from -87 to 88."""

import numpy as np

from pyx_xent import _dispatch

LOWEST, HIGHEST = -87.0, 88.0
AT_ONCE = 1 << 22


def blocks():
    """(first, end) of bit patterns: positive numbers, then negative ones."""
    for sign, limit in ((0, HIGHEST), (1 << 31, -LOWEST)):
        end = int(np.float32(limit).view(np.uint32)) + 1
        for first in range(0, end, AT_ONCE):
            yield sign + first, sign + min(first + AT_ONCE, end)


def units_in_the_last_place(found, exact):
    """Errors in units of the spacing of found's dtype at the exact result."""
    _, exponent = np.frexp(exact)
    return np.abs(found.astype(exact.dtype) - exact) / np.ldexp(exact.dtype.type(1), exponent - np.finfo(found.dtype).nmant - 1)


def worst(isa, first, end):
    """(numbers, largest error in ULP, where)"""
    x = np.arange(first, end, dtype=np.uint32).view(np.float32)
    out = np.empty_like(x)
    _dispatch.load(isa).exponentials(x, out)
    error = units_in_the_last_place(out, np.exp(x.astype(np.float64)))
    return len(x), float(error.max()), float(x[error.argmax()])


def worst_of(job):
    return worst(*job)
