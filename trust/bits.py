"""The same bits, whatever does not belong to the question: threads, splits, memory, instruction set, the caller's environment.

Inputs are made by arithmetic that rounds alike on every processor, so that bits can be compared between processors, too.
"""

import hashlib
import threading
from collections import Counter

import numpy as np

import pyx_xent as px
from pyx_xent import _dispatch

from . import environment
from .fuzz import FLOATS, flattened, many_threads, place

MOST_THREADS = 64
SHAPES = [(64, 10), (300, 10), (7, 33), (40, 300), (3, 1000), (20, 4100), (1, 9000), (2, 50257), (1, 200_000)]
NATIVE = sorted({dtype for dtype in FLOATS if dtype.isnative}, key=str)
RESULTS = (  # of `results`, in this order
    "loss alone", "loss", "gradient", "smoothed loss", "smoothed gradient", "loss of probabilities",
    "gradient of probabilities", "NLL", "gradient of NLL", "softmax", "log_softmax", "softmax_backward", "log_softmax_backward",
)  # fmt: skip
REDUCED = ("mean", "sum", "mean of probabilities", "sum of probabilities")  # of `scalars`


def problem(rng, shape, dtype):
    """{name: array} of rows with their classes last."""
    rows, classes = shape

    def uniform(low, high, size=shape):
        return low + (high - low) * rng.random(size)

    target = rng.integers(0, classes, rows)
    target[::5] = -100
    spread = float(rng.choice([1.0, 10.0, 90.0]))
    arrays = {
        "logits": uniform(-spread, spread),
        "target": target,
        "soft": uniform(0, 2 / classes),
        "weight": uniform(0.5, 1.5, classes),
        "upstream": uniform(-1, 1),
    }
    return {
        name: array if array is target else array.astype(np.float32 if name == "weight" and dtype.itemsize == 2 else dtype)
        for name, array in arrays.items()
    }


def results(arrays, threads=1):
    """Of every function, for each row: arrays whose first axis is that of the rows."""
    logits, target, soft, weight, upstream = arrays.values()
    options = {"num_threads": threads}
    each = {"reduction": "none", **options}
    probabilities = px.softmax(logits, **options)
    return flattened(
        (
            px.cross_entropy(logits, target, **each),
            px.cross_entropy_with_grad(logits, target, **each),
            px.cross_entropy_with_grad(logits, target, weight, label_smoothing=0.1, z_loss=0.01, **each),
            px.cross_entropy_with_grad(logits, soft, weight, label_smoothing=0.1, **each),
            px.nll_loss_with_grad(logits, target, weight, **each),
            probabilities,
            px.log_softmax(logits, **options),
            px.softmax_backward(upstream, probabilities, **options),
            px.log_softmax_backward(upstream, logits, **options),
        )
    )


def scalars(arrays, threads=1):
    """The reduced losses."""
    logits, target, soft, *_ = arrays.values()
    found = [px.cross_entropy(logits, t, reduction=how, num_threads=threads) for t in (target, soft) for how in ("mean", "sum")]
    return [np.asarray(loss) for loss in found]


def with_outputs(arrays, in_place):
    """Loss and gradient written where the caller says, and softmax."""
    logits, target, *_ = arrays.values()
    own = logits.copy() if in_place else np.full_like(logits, np.nan, order="C")
    x = own if in_place else logits
    loss, gradient = px.cross_entropy_with_grad(x, target, reduction="none", grad_out=own)
    return [loss, gradient, px.softmax(logits, out=np.full_like(logits, np.nan, order="C"))]


def split(arrays, at):
    """Rows before and from `at` on; the class weights are of all."""
    for part in (slice(None, at), slice(at, None)):
        yield {name: array if name == "weight" else array[part] for name, array in arrays.items()}


def in_another_thread(function, *arguments):
    found = []
    thread = threading.Thread(target=lambda: found.extend(function(*arguments)))
    thread.start()
    thread.join()
    return found


def bits(arrays):
    return [array.tobytes() for array in arrays]


def check(seed):
    """Compare everything on one random problem: {what: comparisons}; AssertionError at the first difference."""
    rng = np.random.default_rng(seed)
    shape, dtype = SHAPES[rng.integers(len(SHAPES))], NATIVE[rng.integers(len(NATIVE))]
    arrays = problem(rng, shape, dtype)
    found = Counter()

    def same(what, one, other):
        assert bits(one) == bits(other), f"{what}: other bits for {dtype} {shape}, seed {seed}"
        found[what] += len(one)

    with many_threads(MOST_THREADS):
        for isa in _dispatch.supported:
            with _dispatch.use(isa):
                expected, reduced = results(arrays), scalars(arrays)
                for threads in {2, 3, 4, MOST_THREADS, *rng.integers(5, MOST_THREADS, 3).tolist()}:
                    same("1 to 64 threads", results(arrays, threads) + scalars(arrays, threads), expected + reduced)
                if shape[0] > 1:
                    parts = [results(part) for part in split(arrays, int(rng.integers(1, shape[0])))]
                    same("batch in two parts", [np.concatenate(pair) for pair in zip(*parts, strict=True)], expected)
                for _ in range(3):
                    placed = {name: place(rng, array)[0] for name, array in arrays.items()}
                    moved = results(placed, int(rng.integers(1, 5)))
                    same("other strides, order, alignment", [np.ascontiguousarray(array) for array in moved], expected)
                own = [expected[RESULTS.index(name)] for name in ("loss", "gradient", "softmax")]
                for in_place in (False, True):
                    same("outputs given, in place", with_outputs(arrays, in_place), own)
                same("in another thread", in_another_thread(results, arrays, 4), expected)
                if environment.AVAILABLE:
                    for mode in environment.MODES.values():
                        with environment.Environment().under(mode):
                            other = results(arrays, 4) + scalars(arrays, 4)
                        same("rounding modes, flushing to zero", other, expected + reduced)
                if isa == "avx2":
                    of_avx2 = expected + reduced
                elif isa == "avx512":
                    same("AVX2 and AVX-512", expected + reduced, of_avx2)
    return found


def digests(seed):
    """{dtype and shape: of all results}, to be compared between processors; no NaN, whose bits processors choose."""
    found = {}
    with many_threads():
        for dtype in NATIVE:
            for shape in SHAPES[:-1]:
                arrays = problem(np.random.default_rng(seed), shape, dtype)
                together = hashlib.sha256()
                for array in [*arrays.values(), *results(arrays, 4), *scalars(arrays)]:
                    together.update(array.tobytes())
                found[f"{dtype} {shape}"] = together.hexdigest()
    return found


def changed_logits(kind, logits):
    """Logits of one `kind`, made of those between -1 and 1 by arithmetic that rounds alike everywhere."""
    what, _, amount = kind.partition(" ")
    if what == "spread":
        return logits * float(amount)
    if what == "offset":
        return logits + float(amount)
    middle = logits.shape[1] // 2
    if what == "gap":
        logits[:, middle] += float(amount)
        return logits
    for row, (value, where) in enumerate(
        [
            (np.nan, middle), (-np.nan, 0), (np.inf, middle), (-np.inf, middle), (3e38, 0), (-3e38, middle),
            (np.inf, slice(None)), (-np.inf, slice(None)), (-np.inf, slice(1, None)), (3e38, slice(None)), (1e-42, slice(None)),
        ]
    ):  # fmt: skip
        logits[row::13, where] = value
    logits[11::13, 0], logits[11::13, -1] = np.inf, 3e38
    logits[12::13, 0], logits[12::13, -1] = np.inf, np.nan
    return logits


KINDS = ("spread 1", "spread 10", "spread 90", "offset 1e4", "gap 30", "NaN and infinities")


def examples(seed):
    """{dtype, classes, kind, layout and result: (its dtype, its bytes)} of small problems, to be compared one by one."""
    found = {}
    for dtype in NATIVE:
        for classes in (1, 2, 3, 10, 37, 100, 1000):
            for kind in KINDS:
                rng = np.random.default_rng((seed, classes))
                arrays = problem(rng, (33, classes), dtype)
                logits = changed_logits(kind, 2 * rng.random((33, classes)) - 1)
                with np.errstate(over="ignore", invalid="ignore"):
                    arrays["logits"] = logits.astype(dtype)
                for layout in "C", "F":
                    arrays["logits"] = np.asarray(arrays["logits"], order=layout)
                    named = {
                        **{f"input {name}": array for name, array in arrays.items()},
                        **dict(zip(RESULTS, results(arrays), strict=True)),
                        **dict(zip(REDUCED, scalars(arrays), strict=True)),
                    }
                    for name, array in named.items():
                        key = f"{dtype}, {classes} classes, {kind}, order {layout}, {name}"
                        found[key] = str(array.dtype), np.ascontiguousarray(array).tobytes()
    return found
