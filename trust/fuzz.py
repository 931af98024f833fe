"""Random calls of the public functions: strange ones that must work, wrong ones that must raise and write nothing.

A strange call has arrays anywhere in memory, in any order, with any steps, at any byte, broadcast or in a read-only map. It
must give the bits of the same call on plain arrays, be close to the float64 reference, and change nothing but its outputs:
neither its inputs nor what lies around.
A wrong call has one thing wrong with it and must raise the error that belongs to that, with its outputs untouched.

What lies around an array are NaN and wild labels, or the end of the allocation, which a sanitizer watches.
"""

import math
import mmap
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

import pyx_xent as px
from pyx_xent import _dispatch, _threads, reference

try:
    import ml_dtypes

    BFLOAT16 = [np.dtype(ml_dtypes.bfloat16)]
except ImportError:
    BFLOAT16 = []

FLOATS = [np.dtype(kind) for kind in ("f4", "f4", "f4", "f8", "f2", ">f4", ">f8")] + BFLOAT16
INTEGERS = [np.dtype(kind) for kind in ("i8", "i8", "i4", "i2", "i1", "u1", "u2", "u4", "u8", ">i8", ">i4")]
CLASSES = [1, 2, 3, 5, 10, 15, 16, 17, 31, 33, 64, 65, 100, 130, 257, 1000, 2050]
MOST = 3000  # elements of most calls: many calls find more than large ones
TOLERANCE = {"float32": 2e-6, "float64": 2e-13, "float16": 1e-3, "bfloat16": 8e-3}  # of the largest entry
GUARD = 0xFF  # bytes: NaN in every floating dtype, -1 in signed ones, the largest in unsigned ones
ERRORS = (ValueError, TypeError, IndexError)  # AxisError is two of them


# Memory


def place(rng, values):
    """(an array of these values somewhere in memory, that memory); what is broadcast stays so."""
    if values.size and 0 in values.strides:
        array, memory = place(rng, values[tuple(slice(None if stride else 1) for stride in values.strides)].copy())
        return np.broadcast_to(array, values.shape), memory
    order = rng.permutation(values.ndim) if rng.random() < 0.5 else np.arange(values.ndim)
    wild = rng.random() < 0.5
    steps = [int(rng.choice([1, 1, 1, 2, 3])) if wild else 1 for _ in range(values.ndim)]
    itemsize = values.dtype.itemsize
    strides, covered = [0] * values.ndim, itemsize
    for axis in reversed(order):
        strides[axis] = covered * steps[axis]
        covered = strides[axis] * max(1, values.shape[axis])
    before = int(rng.integers(0, 64)) if rng.random() < 0.4 else 64
    last = sum(stride * (size - 1) for stride, size in zip(strides, values.shape, strict=True) if size) if values.size else 0
    after = 0 if rng.random() < 0.5 else 64
    memory = np.full(before + (last + itemsize if values.size else 0) + after, GUARD, np.uint8)
    backwards = [size > 1 and values.size and wild and rng.random() < 0.3 for size in values.shape]
    begin = before
    for axis, is_backwards in enumerate(backwards):
        if is_backwards:
            begin += strides[axis] * (values.shape[axis] - 1)
            strides[axis] = -strides[axis]
    array = np.ndarray(values.shape, values.dtype, memory, begin, strides)
    array[...] = values
    return array, memory


def offset(array, memory):
    """Where its first element is, in bytes."""
    return array.__array_interface__["data"][0] - memory.__array_interface__["data"][0]


def mapped(array, memory):
    """The same in a file's pages, which nothing may write."""
    with tempfile.TemporaryFile() as file:
        file.write(memory)
        file.flush()
        pages = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return np.ndarray(array.shape, array.dtype, pages, offset(array, memory), array.strides), pages


@dataclass
class Placed:
    """An array of a call, and what its memory was before."""

    array: np.ndarray
    memory: np.ndarray
    before: np.ndarray = None

    def __post_init__(self):
        self.before = self.memory.copy()

    def unchanged(self):
        return np.array_equal(self.memory, self.before)

    def unchanged_around(self):
        begin = offset(self.array, self.memory)
        memories = self.memory.copy(), self.before.copy()
        for memory in memories:
            np.ndarray(self.array.shape, self.array.dtype, memory, begin, self.array.strides)[...] = 0
        return np.array_equal(*memories)


# Calls


@dataclass
class Call:
    name: str
    inputs: dict
    options: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)  # name: (shape, dtype)
    exact: bool = True  # the same bits for any memory
    error: tuple = ()  # what it must raise

    def run(self, arrays):
        result = getattr(px, self.name)(**arrays, **self.options)
        return flattened(result)

    def expected(self):
        """In float64, from `inputs`; None where the reference has no such function."""
        inputs = {k: v.astype(np.float64) if v.dtype.kind not in "iu" else v for k, v in self.inputs.items()}
        options = {k: v for k, v in self.options.items() if k not in ("num_threads", "chunk_bytes")}
        if self.name.startswith("linear"):
            return linear_expected(inputs, options)
        function = getattr(reference, self.name + "_with_grad" if self.name in ("cross_entropy", "nll_loss") else self.name)
        found = flattened(function(**inputs, **options))
        return found[:1] if self.name in ("cross_entropy", "nll_loss") else found


def flattened(result):
    if isinstance(result, tuple):
        return [array for item in result for array in flattened(item)]
    return [] if result is None else [result]


def linear_expected(inputs, options):
    hidden, weight = inputs.pop("hidden"), inputs.pop("linear_weight")
    flat, target = hidden.reshape(-1, hidden.shape[-1]), inputs.pop("target").reshape(-1)
    loss, grad = reference.cross_entropy_with_grad(flat @ weight.T, target, inputs.get("weight"), **options)
    return [loss, (grad @ weight).reshape(hidden.shape), grad.T @ flat]


def is_soft(rng):
    return rng.random() < 0.25


def shape_of(rng):
    """(shape, class axis)"""
    classes = int(rng.choice(CLASSES))
    rows = []
    for _ in range(int(rng.choice([0, 1, 1, 1, 2, 2, 3]))):
        room = max(1, MOST // (classes * max(1, math.prod(rows))))
        rows.append(0 if rng.random() < 0.01 else int(rng.integers(1, 1 + min(room, 40))))
    axis = int(rng.integers(0, len(rows) + 1))
    return (*rows[:axis], classes, *rows[axis:]), axis


def labels(rng, shape, classes, ignore_index):
    dtype = INTEGERS[rng.integers(len(INTEGERS))]
    largest = min(classes, int(np.iinfo(dtype).max) + 1)
    target = rng.integers(0, largest, shape).astype(dtype)
    if np.iinfo(dtype).min <= ignore_index <= np.iinfo(dtype).max:
        target = np.where(rng.random(shape) < rng.choice([0.0, 0.2, 1.0]), ignore_index, target).astype(dtype)
    return target


def make(rng):
    """A call in which nothing is wrong."""
    kind = rng.choice(["loss", "loss", "loss", "nll", "softmax", "linear"])
    if kind == "linear":
        return make_linear(rng)
    shape, axis = shape_of(rng)
    dtype = FLOATS[rng.integers(len(FLOATS))]
    native = dtype.newbyteorder("=")
    rows, classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    spread = float(rng.choice([0.1, 3.0, 20.0]))
    logits = spread * rng.standard_normal(shape) + (rng.choice([0.0, 200.0]) if dtype.itemsize > 2 else 0.0)
    logits = (-np.abs(logits) if kind == "nll" else logits).astype(dtype)  # log-probabilities: no sum of losses cancels
    options = {} if axis == (0 if len(shape) == 1 else 1) and rng.random() < 0.5 else {"axis": axis}
    if rng.random() < 0.5:
        options["num_threads"] = int(rng.choice([1, 2, 3, 64, 2**31]))
    if kind == "softmax":
        name = str(rng.choice(["softmax", "log_softmax", "softmax_backward", "log_softmax_backward"]))
        options["axis"] = axis
        inputs = {"x": logits}
        if name.endswith("backward"):
            output = getattr(px, name.removesuffix("_backward"))(logits, axis)
            inputs = {"grad_output": rng.standard_normal(shape).astype(dtype), "output": output.astype(dtype)}
        return Call(name, inputs, options, {"out": (shape, native)})
    options["reduction"] = str(rng.choice(["none", "mean", "sum"]))
    ignore_index = int(rng.choice([-100, -1, 0, 7, 255, 2**40]))
    nll = kind == "nll"
    inputs = {"log_probs" if nll else "logits": logits}
    loss_dtype = native
    if not nll and is_soft(rng) and 0 not in shape:
        inputs["target"] = rng.dirichlet(np.ones(classes), rows).astype(dtype)
        inputs["target"] = np.ascontiguousarray(np.moveaxis(inputs["target"], -1, axis))
    else:
        inputs["target"] = labels(rng, rows, classes, ignore_index)
        options["ignore_index"] = ignore_index
        if inputs["target"].shape == shape:  # no rows and one class
            return make(rng)
    if rng.random() < 0.4:
        inputs["weight"] = (0.5 + rng.random(classes)).astype(np.float32 if dtype.itemsize == 2 else dtype)
        if inputs["target"].shape == shape:
            loss_dtype = inputs["weight"].dtype.newbyteorder("=")
    if not nll:
        options["label_smoothing"] = float(rng.choice([0.0, 0.0, 0.1, 1.0]))
        options["z_loss"] = float(rng.choice([0.0, 0.0, 0.01]))
        if inputs["target"].shape != shape and options["label_smoothing"] == 0:
            options["focal_gamma"] = float(rng.choice([0.0, 0.0, 0.5, 2.0]))
        if rng.random() < 0.3:
            inputs["sample_weight"] = rng.random(rows)
        if options["reduction"] == "mean" and rng.random() < 0.2:
            options["normalizer"] = 3.5
    outputs = {"out": (rows if options["reduction"] == "none" else (), loss_dtype)}
    name = "nll_loss" if nll else "cross_entropy"
    if rng.random() < 0.7:
        name += "_with_grad"
        outputs["grad_out"] = shape, native
        if options["reduction"] == "none" and rng.random() < 0.5:
            inputs["grad_output"] = rng.standard_normal(rows)
    return Call(name, inputs, options, outputs)


def make_linear(rng):
    dtype = FLOATS[rng.integers(len(FLOATS))]
    rows, width, classes = int(rng.integers(1, 20)), int(rng.integers(1, 9)), int(rng.choice(CLASSES[:12]))
    inputs = {
        "hidden": rng.standard_normal((rows, width)).astype(dtype),
        "linear_weight": rng.standard_normal((classes, width)).astype(dtype),
        "target": labels(rng, (rows,), classes, -100),
    }
    options = {"reduction": str(rng.choice(["none", "mean", "sum"])), "chunk_bytes": int(rng.choice([1, 500, 1 << 20]))}
    return Call("linear_cross_entropy_with_grad", inputs, options, exact=False)


def broadcast(rng, call):
    """Let one input be the same along one of its axes, as a view of less memory."""
    name = rng.choice(list(call.inputs))
    values = call.inputs[name]
    if values.ndim and values.size:
        call.inputs[name] = np.broadcast_to(values.take([0], int(rng.integers(values.ndim))), values.shape)


# What can be wrong


def bad_label(rng, call):
    target = call.inputs.get("target")
    if target is None or target.dtype.kind not in "iu" or target.size == 0:
        return None
    logits = call.inputs.get("logits", call.inputs.get("log_probs"))
    if logits is None:
        classes, ignored = len(call.inputs["linear_weight"]), -100
    else:
        axis = call.options.get("axis", 0 if logits.ndim == 1 else 1)
        classes, ignored = logits.shape[axis], call.options["ignore_index"]
    info = np.iinfo(target.dtype)
    wrong = [info.min, info.max, -1, classes, classes + 1, 2**31, 2**32, -(2**31), info.max - 99]
    wrong = [v for v in wrong if info.min <= v <= info.max and not 0 <= v < classes and v != ignored]
    if not wrong:
        return None
    call.inputs["target"] = target.copy()
    call.inputs["target"].reshape(-1)[rng.integers(target.size)] = wrong[rng.integers(len(wrong))]
    return IndexError


def other_shape(rng, call):
    """One axis of one argument is one longer or shorter."""
    names = [name for name, array in call.inputs.items() if array.ndim and name not in ("logits", "log_probs", "x", "hidden")]
    names += [name for name, (shape, _) in call.outputs.items() if shape]
    if not names:
        return None
    name = names[rng.integers(len(names))]
    shape = list(call.inputs[name].shape if name in call.inputs else call.outputs[name][0])
    axis = int(rng.integers(len(shape)))
    shape[axis] = max(0, shape[axis] + int(rng.choice([-1, 1])))
    if name in call.outputs:
        if tuple(shape) == call.outputs[name][0]:
            return None
        call.outputs[name] = tuple(shape), call.outputs[name][1]
        call.options["all_outputs"] = True
    else:
        if tuple(shape) == call.inputs[name].shape or (name == "target" and call.name.startswith("linear")):
            return None
        call.inputs[name] = np.resize(call.inputs[name], shape)
        if name == "linear_weight" and axis == 0:  # other classes are as good
            return None
        logits = call.inputs.get("logits", call.inputs.get("log_probs"))
        if name == "target" and logits is not None and tuple(shape) == logits.shape:
            return None
    return (ValueError, TypeError)  # probabilities of another shape look like class indices of a wrong dtype


def other_dtype(rng, call):
    name = next(iter(call.inputs)) if rng.random() < 0.5 else "target"
    if name not in call.inputs:
        return None
    wrong = np.dtype(str(rng.choice(["?", "c8", "S1", "O", "m8[s]"])))
    if name == "target" and wrong.kind == "c" and call.inputs[name].dtype.kind in "iu":
        wrong = np.dtype("f4")
    call.inputs[name] = np.zeros(call.inputs[name].shape, wrong)
    return TypeError


def other_option(rng, call):
    wrong = [("num_threads", 0, ValueError), ("num_threads", -5, ValueError), ("num_threads", 1.5, TypeError)]
    if "reduction" in call.options:
        wrong += [("reduction", "average", ValueError), ("reduction", None, ValueError), ("ignore_index", 0.5, TypeError),
                  ("ignore_index", 2**70, ValueError)]  # fmt: skip
    if call.name.startswith(("cross_entropy", "linear")):
        wrong += [("label_smoothing", 1.5, ValueError), ("label_smoothing", float("nan"), ValueError),
                  ("label_smoothing", "x", TypeError), ("z_loss", -1.0, ValueError), ("z_loss", float("inf"), ValueError),
                  ("focal_gamma", -1.0, ValueError), ("empty", "none", ValueError)]  # fmt: skip
    if call.name.startswith("linear"):
        wrong += [("chunk_bytes", 0, ValueError), ("softcap", -1.0, ValueError), ("logit_scale", float("inf"), ValueError)]
    else:
        wrong += [("axis", 9, ValueError), ("axis", -9, ValueError), ("axis", 0.5, TypeError)]
    name, value, error = wrong[rng.integers(len(wrong))]
    call.options[name] = value
    return error


def bad_output(rng, call):
    """Read-only, of another dtype, overlapping itself or an input: made by `arrays_of`."""
    if not call.outputs:
        return None
    call.options["bad_output"] = str(rng.choice(["read-only", "dtype", "itself", "input"]))
    return ValueError


MISTAKES = [bad_label, bad_label, other_shape, other_shape, other_dtype, other_option, bad_output]


# One call after the other


def can_be_output(array):
    return array.dtype.isnative and array.flags.writeable


def arrays_of(rng, call):
    """{name: Placed}, with some of the outputs."""
    placed = {}
    for name, values in call.inputs.items():
        if values.dtype.kind != "O":
            array, memory = place(rng, values)
            if memory.size and rng.random() < 0.05:
                array, memory = mapped(array, memory)
            placed[name] = Placed(array, memory)
    wanted, bad = call.options.pop("all_outputs", False), call.options.pop("bad_output", None)
    first = next(iter(call.inputs))
    for name, (shape, dtype) in call.outputs.items():
        if not (wanted or bad or rng.random() < 0.5):
            continue
        if name == "grad_out" and not call.error and rng.random() < 0.2 and can_be_output(placed[first].array):
            placed[name] = placed[first]  # in place
            continue
        size = math.prod(shape)
        if bad == "dtype":
            dtype = np.dtype(np.int32)
        placed[name] = Placed(*place(rng, np.full(shape, 7, dtype)))
        if bad == "read-only":
            placed[name].array.flags.writeable = False
        elif bad == "itself" and size > 1:
            placed[name].array = np.broadcast_to(placed[name].array.reshape(-1)[:1].copy(), shape)
            placed[name].array.flags.writeable = True
        elif bad in ("itself", "input"):
            owner = placed[first]
            begin = offset(owner.array, owner.memory)
            if call.inputs[first].size == 0 or size == 0 or begin == 0:
                return None
            memory = np.concatenate([owner.memory, np.full(size * dtype.itemsize + 64, GUARD, np.uint8)])
            array = np.ndarray(owner.array.shape, owner.array.dtype, memory, begin, owner.array.strides)
            placed[first] = Placed(array, memory)
            # From one byte before the last element of the input on: shifted, so never the input itself.
            end = max(begin + sum(s * (n - 1) for s, n in zip(array.strides, array.shape, strict=True) if s > 0), 1)
            placed[name] = Placed(np.ndarray(shape, dtype, memory, end - 1), memory)
        if bad:
            break
    return placed


def check(rng, seed):
    """Make and check one call; AssertionError if anything is not as it should be."""
    call = make(rng)
    if rng.random() < 0.1:
        broadcast(rng, call)
    isa = _dispatch.supported[rng.integers(len(_dispatch.supported))]
    if rng.random() < 0.4:
        mistake = MISTAKES[rng.integers(len(MISTAKES))]
        call.error = mistake(rng, call) or ()
        if not call.error:
            return "skipped"
    placed = arrays_of(rng, call)
    if placed is None:
        return "skipped"
    arrays = {name: one.array for name, one in placed.items()} | {
        name: values for name, values in call.inputs.items() if name not in placed
    }
    with _dispatch.use(isa):
        if call.error:
            try:
                call.run(arrays)
            except call.error:
                pass
            except Exception as error:
                raise AssertionError(f"{describe(seed, isa, call)}: {type(error).__name__} instead: {error}") from error
            else:
                raise AssertionError(f"{describe(seed, isa, call)}: no error")
            for name, one in placed.items():
                assert one.unchanged(), f"{describe(seed, isa, call)}: {name} has changed"
            return "raised"
        found = [np.array(array) for array in call.run(arrays)]
        outputs = [one for name, one in placed.items() if name in call.outputs]
        for name, one in placed.items():
            assert one.unchanged_around() if any(one is other for other in outputs) else one.unchanged(), (
                f"{describe(seed, isa, call)}: memory of {name} has changed"
            )
        plain = [np.array(array) for array in call.run({k: v.copy() for k, v in call.inputs.items()})] if call.exact else found
    compare(found, plain, call, f"{describe(seed, isa, call)}")
    return call.name


def compare(found, plain, call, text):
    expected = call.expected()
    tolerance = TOLERANCE[next(iter(call.inputs.values())).dtype.name] * (1 if call.exact else 10)  # of products
    # What cancels to less than its terms has their errors: upstream gradients, and the pull of classes with the same weights.
    same_classes = not call.exact and call.inputs["linear_weight"].strides[0] == 0
    least = 1 if call.name.endswith("backward") or same_classes else 0.05
    for one, other, exact in zip(found, plain, expected, strict=True):
        assert one.dtype == other.dtype, text
        assert one.tobytes() == other.tobytes(), f"{text}: other bits than with plain arrays"
        exact = np.asarray(exact)
        assert one.shape == exact.shape, text
        error = np.abs(one.astype(np.float64) - exact)
        same = (error <= tolerance * max(np.abs(exact).max(initial=0), least)) | (np.isnan(one) & np.isnan(exact))
        assert same.all(), f"{text}: off by {error.max()} of {np.abs(exact).max()}"


def describe(seed, isa, call):
    inputs = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in call.inputs.items())
    return f"seed {seed}, {isa}: {call.name}({inputs}, {call.options}, into {call.outputs}) must {call.error or 'work'}"


@contextmanager
def many_threads(most=4):
    """Small calls get up to so many threads, too, however few processors there are."""
    before = _threads.NANOSECONDS_WORTH_A_THREAD, _threads.available
    _threads.NANOSECONDS_WORTH_A_THREAD, _threads.available = 10.0, lambda: (most, "trust")
    try:
        yield
    finally:
        _threads.NANOSECONDS_WORTH_A_THREAD, _threads.available = before


def run(count, seed):
    """Check `count` calls, each from a seed of its own; -> {what was called or raised: how often}"""
    found = {}
    with np.errstate(all="ignore"), many_threads():
        for k in range(count):
            what = check(np.random.default_rng((*seed, k)), (*seed, k))
            found[what] = found.get(what, 0) + 1
    return found


def job(arguments):
    return run(*arguments)
