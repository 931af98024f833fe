"""Time per element of our kernels as arrays grow from 4 KB to 8 GB: straight lines, or a cliff that the cases step over."""

import statistics

import numpy as np
from tqdm import tqdm

import pyx_xent

from . import roofline
from .timing import times

CLASSES = (10, 1000, 32000, None)  # None: a single row
LARGEST = 8 << 30


def measure(largest=LARGEST, budget=0.2, threads=None):
    """[{classes, rows, operation, seconds, bytes}, ...], float32; with a gradient elsewhere up to half of `largest`."""
    threads = threads or pyx_xent.get_num_threads()
    rng = np.random.default_rng(0)
    pattern = 3 * rng.standard_normal(1 << 20, np.float32)
    memory = roofline.aligned(largest).view(np.float32)
    found = []
    sizes = [4096 << k for k in range(0, (largest // 4096).bit_length(), 2)]
    if sizes[-1] != largest:
        sizes.append(largest)
    with tqdm(total=len(sizes) * len(CLASSES), unit=" shapes") as progress:
        for bytes_ in sizes:
            for classes in CLASSES:
                elements = bytes_ // 4
                progress.update()
                rows = elements // (classes or elements)
                if rows == 0:
                    continue
                elements = rows * (classes or elements)
                logits = memory[:elements].reshape(rows, -1)
                target = rng.integers(0, logits.shape[1], rows)
                for start in range(0, elements, pattern.size):
                    memory[start : min(start + pattern.size, elements)] = pattern[: min(pattern.size, elements - start)]
                options = {"num_threads": threads}
                operations = {"forward": lambda o=options, x=logits, t=target: pyx_xent.cross_entropy(x, t, **o)}
                if 2 * elements * 4 <= largest:
                    elsewhere = memory[-elements:].reshape(logits.shape)
                    operations["loss + gradient"] = lambda o=options, x=logits, t=target, g=elsewhere: (
                        pyx_xent.cross_entropy_with_grad(x, t, grad_out=g, **o)
                    )
                operations["loss + gradient in place"] = lambda o=options, x=logits, t=target: pyx_xent.cross_entropy_with_grad(
                    x, t, grad_out=x, **o
                )
                for operation, function in operations.items():
                    function()
                    seconds = statistics.median(times(function, budget))
                    found.append(
                        {"classes": logits.shape[1], "rows": rows, "single_row": classes is None, "operation": operation,
                         "seconds": seconds, "elements": elements, "bytes": 4 * elements, "threads": threads}
                    )  # fmt: skip
    return found
