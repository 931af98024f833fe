"""What is timed: each shape, element type and option with its reason, its arrays, and the answer that everybody must give."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from pyx_xent import reference

FORWARD, GRADIENT = "forward", "loss + gradient"
BLOCK = 1 << 20  # elements that are made and checked at a time, so that no float64 array of the logits' size arises
CHANNELS_LAST = "channels_last"
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # known without ml_dtypes
SAMPLE = 8 << 20  # gradient elements that are compared with the reference: 64 MB of float64

OPTIONS = {  # as they are written in names of cases
    "soft": "class probabilities as targets",
    "smoothing": "label_smoothing=0.1",
    "weights": "class weights",
    "ignored15": "15 % of the rows ignored: padding",
    "ignored50": "50 % of the rows ignored: a prompt that does not count",
}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]  # (N, C) or (N, C, height, width), whatever the layout
    reason: str
    dtype: str = "float32"
    option: str = ""
    layout: str = ""  # or CHANNELS_LAST: the classes of a pixel side by side, as PyTorch's memory format of that name
    forward: bool = False  # timed without the gradient, too
    variants: bool = False  # timed with the slower kernels and on one thread, too
    quick: bool = False

    def __str__(self):
        parts = ["x".join(map(str, self.shape)), self.layout, "" if self.dtype == "float32" else self.dtype, self.option]
        return "-".join(filter(None, parts))

    @property
    def elements(self):
        return prod(self.shape)

    @property
    def classes(self):
        return self.shape[1]

    @property
    def rows(self):
        return self.elements // self.classes

    @property
    def operations(self):
        return (FORWARD, GRADIENT) if self.forward else (GRADIENT,)

    @property
    def live(self):
        """Fraction of the rows whose logits have to be read."""
        return {"ignored15": 0.85, "ignored50": 0.5}.get(self.option, 1.0)

    @property
    def logits_bytes(self):
        return self.elements * ITEMSIZE[self.dtype]

    def bytes_needed(self, operation):
        """What no program can avoid: logits that count are read once, class probabilities too; the gradient is written."""
        reads = self.live + (self.option == "soft")
        return int((reads + (operation == GRADIENT)) * self.logits_bytes)


def numpy_dtype(name):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class Problem:
    """The arrays of a case, the same each time, and the reference's answer."""

    def __init__(self, case):
        self.case = case
        rng = np.random.default_rng(0)
        if case.layout == CHANNELS_LAST:
            self.logits = np.moveaxis(np.empty((case.shape[0], *case.shape[2:], case.classes), numpy_dtype(case.dtype)), -1, 1)
        else:
            self.logits = np.empty(case.shape, numpy_dtype(case.dtype))
        for part in self.blocks():
            self.logits[part] = self._normal(rng, part, 3)
        self.target = rng.integers(0, case.classes, (case.shape[0], *case.shape[2:]))
        self.options = {}
        if case.option == "soft":
            self.target = np.empty_like(self.logits)
            for part in self.blocks():
                exponentials = np.exp(self._normal(rng, part, 1))
                self.target[part] = exponentials / exponentials.sum(axis=1, keepdims=True)
        elif case.option == "smoothing":
            self.options["label_smoothing"] = 0.1
        elif case.option == "weights":
            self.options["weight"] = rng.uniform(0.5, 2, case.shape[1]).astype(self.logits.dtype)
        elif case.option:
            self.target[rng.permutation(len(self.target))[: round((1 - case.live) * len(self.target))]] = -100

    def _normal(self, rng, part, sigma):
        shape = (part.stop - part.start, *self.case.shape[1:])
        return sigma * rng.standard_normal(shape, np.float64 if self.case.dtype == "float64" else np.float32)

    def blocks(self):
        rows = self.case.shape[0]
        step = max(1, BLOCK * rows // self.case.elements)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    @cached_property
    def divisor(self):
        """D of SPEC S15 and S16."""
        if self.case.option == "soft":
            return self.logits.size / self.case.shape[1]
        counted = self.target[self.target != -100]
        return self.options["weight"].astype(np.float64)[counted].sum() if "weight" in self.options else counted.size

    @cached_property
    def sample(self):
        """Entries of the first axis whose gradients are compared: all, or of large cases some drawn at random."""
        count = self.case.shape[0]
        drawn = max(1, min(count, SAMPLE * count // self.case.elements))
        return np.sort(np.random.default_rng(1).permutation(count)[:drawn])

    @cached_property
    def expected(self):
        """(mean loss of all rows, gradient[sample]) of the float64 reference, block by block."""
        total, gradients = 0.0, []
        for part in self.blocks():
            loss, gradient = reference.cross_entropy_with_grad(
                self.logits[part], self.target[part], reduction="none", grad_output=1 / self.divisor, **self.options
            )
            total += loss.sum()
            chosen = self.sample[(self.sample >= part.start) & (self.sample < part.stop)]
            gradients.append(gradient[chosen - part.start])
        return total / self.divisor, np.concatenate(gradients)


LARGEST_VOCABULARY = "a 128k vocabulary"
CASES = [
    Case((64, 10), "a mini-batch of digits: the cost of the call itself", forward=True, variants=True, quick=True),
    Case((65536, 10), "all digits at once: few classes, many rows", forward=True, variants=True),
    Case((65536, 20), "20 newsgroups at once: few classes, five quarters of a vector", forward=True),
    Case((128, 20), "a mini-batch of 20 classes: few of them, and a call of a few microseconds", forward=True),
    Case((4096, 50), "tags of words, 50 kinds: the most classes that fit a tile well", forward=True),
    Case((8192, 64), "64 classes: whole vectors, between tile and row", forward=True),
    Case((128, 100), "a mini-batch of 100 kinds of pictures: short rows", forward=True, quick=True),
    Case((512, 100), "CIFAR-100 in large batches: enough work for a second thread", forward=True),
    Case((4096, 100), "many short rows, with a rest of 4 beyond whole vectors", forward=True),
    Case((1024, 256), "bytes as tokens: rows of whole vectors", forward=True),
    Case((256, 1000), "ImageNet: in cache", forward=True, variants=True, quick=True),
    Case((256, 21841), "ImageNet-21k: as large as the last-level cache"),
    Case((2048, 32000), "a language model's head: memory", forward=True, variants=True, quick=True),
    Case((2048, 50257), "GPT-2's vocabulary: rows are never aligned"),
    Case((1024, 50257), "half as many rows of it"),
    Case((512, 128256), LARGEST_VOCABULARY),
    Case((1024, 262144), "the largest vocabulary in use: 1 GB of logits"),
    Case((1, 128256), "scoring one token: a single row for all threads", forward=True, variants=True, quick=True),
    Case((16, 128256), "scoring a few tokens", forward=True),
    Case((8, 21, 256, 256), "segmentation, Pascal VOC: classes are not innermost", forward=True, variants=True, quick=True),
    Case((2, 19, 512, 1024), "segmentation, Cityscapes: few large planes", forward=True),
    Case((16, 2, 64, 64), "binary masks: two classes, planes in cache", forward=True),
    Case((2, 150, 256, 256), "segmentation, ADE20K: more planes than a tile has room for", forward=True),
    Case((8, 21, 256, 256), "Pascal VOC with the classes of a pixel side by side", forward=True, layout=CHANNELS_LAST),
    Case((512, 32000), "double precision", "float64", forward=True, variants=True),
    Case((512, 50257), "double precision, rows never aligned to a cache line", "float64"),
    Case((512, 128256), LARGEST_VOCABULARY, "float64"),
    Case((256, 1000), "ImageNet in half precision: conversions beside exponentials", "bfloat16", forward=True, quick=True),
    Case((4096, 100), "short rows in half precision", "bfloat16", forward=True),
    *(
        case
        for dtype in ("float16", "bfloat16")
        for case in (
            Case((1024, 32000), "half the bytes: arithmetic becomes the limit", dtype, forward=True, variants=True),
            Case((2048, 32000), "twice as many rows", dtype),
            Case((1024, 50257), "half the bytes, rows never aligned", dtype),
            Case((512, 128256), LARGEST_VOCABULARY, dtype),
        )
    ),
    Case((1024, 32000), "what the options that follow are compared with"),
    *(Case((1024, 32000), reason, option=option) for option, reason in OPTIONS.items()),
]
# One of each kind: what `python -m benchmarks turns --quick` measures, in a minute or two.
QUICK = ["64x10", "128x100", "256x1000-bfloat16", "16x2x64x64", "512x32000-float64", "1024x32000-soft", "2x150x256x256"]
QUICK += ["2048x32000", "1024x32000-smoothing", "200x3", "128x100-bfloat16", "8x21x256x256-channels_last"]
QUICK += ["1024x32000-bfloat16"]
