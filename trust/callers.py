"""Several Python threads that call at once, on inputs that they share; each result must have the bits of a single caller's.

Meanwhile another thread writes labels that do not exist into an array of targets: calls on it either work or raise IndexError.
"""

import os
import threading
import time
from pathlib import Path

import numpy as np

import pyx_xent as px

from .fuzz import flattened, many_threads

SHAPES = [(4096, 10), (64, 1000), (2, 200_000)]  # few classes; rows of their own; long rows that threads share
DTYPES = ("f4", "f8")
BAD_LABEL = 10**12


def arrays(dtype, shape):
    rng = np.random.default_rng(1)
    (rows, classes), x = shape, rng.standard_normal(shape).astype(dtype)
    target = rng.integers(0, classes, rows)
    target[:: max(7, rows)] = -100
    strided = np.repeat(x, 2, axis=1)[:, ::2]  # this, Fortran order and half precision go through a scratch
    hidden, weight = (rng.standard_normal((size, 8)).astype(dtype) for size in shape)
    found = [target, x, strided, np.asfortranarray(x), x.astype("f2"), hidden, weight, px.softmax(x, num_threads=1)]
    for array in found:
        array.flags.writeable = False
    return found


def calls(inputs, flipped, counts):
    """Yields results, but for those on targets that change."""
    target, *kinds, hidden, weight, soft = inputs
    threads = {"num_threads": 4}
    for x in kinds:
        yield px.cross_entropy(x, target, **threads)
        yield px.cross_entropy(x, target, reduction="none", label_smoothing=0.1, z_loss=1e-3, **threads)
        yield px.cross_entropy_with_grad(x, target, grad_out=np.empty_like(x), **threads)
        yield px.cross_entropy_with_grad(x, soft, weight=np.ones(x.shape[1], x.dtype), **threads)
        yield px.softmax(x, out=np.empty_like(x), **threads)
        yield px.softmax(x, num_threads=1)
        yield px.log_softmax(x, **threads)
        yield px.softmax_backward(x, x, **threads)
        yield px.nll_loss_with_grad(x, target, **threads)
    own = kinds[0].copy()
    yield px.cross_entropy_with_grad(own, target, grad_out=own, **threads)
    yield px.linear_cross_entropy_with_grad(hidden, weight, target, softcap=30.0, chunk_bytes=1 << 20, **threads)
    for changing in flipped:
        try:
            px.cross_entropy_with_grad(kinds[0], changing, **threads)
            counts["worked on changing labels"] += 1
        except IndexError:
            counts["IndexError on changing labels"] += 1


def bits(result):
    return b"".join(np.asarray(array).tobytes() for array in flattened(result))


def usage():
    """(resident MB, threads) of this process"""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/task"))


def told(counts):
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def run(callers, seconds):
    """{what: how often}, and [(MB, threads), ...] over the time; AssertionError where bits differ."""
    data = {(dtype, shape): arrays(dtype, shape) for dtype in DTYPES for shape in SHAPES}
    flipped = {rows: [np.zeros(rows, "i8"), np.zeros(rows, "i4")] for rows, _ in SHAPES}
    counts = {"calls": 0, "worked on changing labels": 0, "IndexError on changing labels": 0}
    wrong, samples = [], []
    with many_threads():
        expected = {key: [bits(result) for result in calls(inputs, (), counts)] for key, inputs in data.items()}
        until = time.monotonic() + seconds

        def call_all(first):
            keys = list(data)
            mine = dict.fromkeys(counts, 0)
            while time.monotonic() < until and not wrong:
                for key in keys[first:] + keys[:first]:
                    for k, result in enumerate(calls(data[key], flipped[key[1][0]], mine)):
                        mine["calls"] += 1
                        if bits(result) != expected[key][k]:
                            wrong.append(f"call {k} on {key}: other bits than alone")
                        if time.monotonic() > until:
                            break
            for name, count in mine.items():
                counts[name] += count

        def flip():
            while time.monotonic() < until:
                for value in (BAD_LABEL, 0):
                    for wide, narrow in flipped.values():
                        wide[len(wide) // 2], narrow[len(wide) // 2] = value, min(value, 10**9)
                    time.sleep(0.005)

        def guarded(function, *arguments):
            try:
                function(*arguments)
            except BaseException as error:
                wrong.append(repr(error))

        work = [(call_all, k % len(data)) for k in range(callers)] + [(flip,)]
        threads = [threading.Thread(target=guarded, args=one) for one in work]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 4)  # until each has its memory and its OpenMP threads
        while time.monotonic() < until:
            samples.append(usage())
            time.sleep(seconds / 40)
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
    return counts, samples
