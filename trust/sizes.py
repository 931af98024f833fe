"""Arrays whose sizes no 32-bit index holds, of pages that no memory is behind: reading those costs little.

Where something is written beside zeros, it is at the far end, and results there are compared with the formula.
"""

import math
import mmap

import numpy as np

import pyx_xent as px

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's value; Python has a name for it since 3.13


def zeros(shape, dtype):
    """Like np.zeros, also where there is less memory than that."""
    memory = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return np.frombuffer(memory, dtype).reshape(shape)


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1e-6)


def long_rows(rows, classes):
    """The last class of the last row is the likely one."""
    x = zeros((rows, classes), np.float32)
    x[-1, -1] = 30
    lse = math.log(classes - 1 + math.exp(30))
    loss = px.cross_entropy(x, [0] * (rows - 1) + [classes - 1], reduction="none")
    close(loss, [math.log(classes)] * (rows - 1) + [math.log1p((classes - 1) * math.exp(-30))])
    close(px.cross_entropy(x, [classes - 1] * (rows - 1) + [0], reduction="none"), [math.log(classes)] * (rows - 1) + [lse])
    close(px.cross_entropy(x, [0] * (rows - 1) + [classes - 1], label_smoothing=0.5, reduction="none")[-1],
          lse - 0.5 * 30 - 0.5 * 30 / classes)  # fmt: skip
    return x.size


def label_beyond_the_last(rows, classes):
    x = zeros((rows, classes), np.float32)
    for wrong in (classes, classes + 1, 2**32, -1, -classes):
        try:
            px.cross_entropy(x, [wrong] * rows)
        except IndexError:
            continue
        raise AssertionError(f"label {wrong} of {classes} classes was taken")
    return x.size


def class_axis_first(classes, rows):
    """Neighbouring rows, whose classes are far apart."""
    x = zeros((classes, rows), np.float32)
    x[-1, -1] = 30
    target = np.zeros(rows, np.int8)
    target[-1] = classes - 1
    loss = px.cross_entropy(x, target, axis=0, reduction="none")
    close(loss[[0, -1]], [math.log(classes), math.log1p((classes - 1) * math.exp(-30))])
    assert (loss[:-1] == loss[0]).all()
    return x.size


def gradient_in_place(rows, classes):
    """Written, so of real memory: 2^31 and some half-precision numbers."""
    x = np.zeros((rows, classes), np.float16)
    loss, gradient = px.cross_entropy_with_grad(x, [classes - 1] * rows, grad_out=x, reduction="sum")
    np.testing.assert_allclose(float(loss), rows * math.log(classes), rtol=1e-3)
    close(gradient[:, -1], -1)
    assert not gradient[:, :-1].any()  # 1 / classes is 0 in float16
    return x.size


def many_rows(rows):
    """One class each, float16: a probability of 1."""
    x = zeros((rows, 1), np.float16)
    x[-1] = np.nan
    out = px.softmax(x)
    assert np.isnan(out[-1, 0])
    for first in range(0, rows - 1, 1 << 28):
        assert (out[first : min(first + (1 << 28), rows - 1)] == 1).all()
    return x.size


def many_rows_broadcast(rows, classes):
    """One row in memory, and probabilities for each: only the loss has as many numbers, 8 bytes each."""
    logits = np.broadcast_to(np.arange(classes, dtype=np.float32), (rows, classes))
    soft = np.broadcast_to(np.full(classes, 1 / classes, np.float32), (rows, classes))
    loss = px.cross_entropy(logits, soft, reduction="sum")
    lse = math.log(sum(math.exp(c) for c in range(classes)))
    close(loss, rows * (lse - (classes - 1) / 2))
    return logits.size


CHECKS = {  # what: (function, its arguments, GB of memory)
    "2 rows of 2^30 + 64 classes": (long_rows, (2, 2**30 + 64), 1),
    "8 rows of 2^30 classes": (long_rows, (8, 2**30), 1),
    "2^32 classes, labels beyond them": (label_beyond_the_last, (1, 2**32), 1),
    "4 classes first, 2^29 + 5 rows": (class_axis_first, (4, 2**29 + 5), 12),
    "2 rows of 2^30 + 64 classes, gradient in place": (gradient_in_place, (2, 2**30 + 64), 5),
    "2^31 + 5 rows, softmax": (many_rows, (2**31 + 5,), 13),
    "2^31 + 5 rows of 4 classes, probabilities": (many_rows_broadcast, (2**31 + 5, 4), 19),
}


def memory_available():
    """GB, as Linux tells."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) / 1e6 for line in file if line.startswith("MemAvailable"))


def check(what):
    """(elements, None), or (0, why it was left out)"""
    function, arguments, needed = CHECKS[what]
    if memory_available() < needed:
        return 0, f"left out: needs {needed} GB of memory"
    return function(*arguments), None
