"""Bad input: the error says what is wrong, and nothing has been written. Odd but good input works."""

import re
import threading

import numpy as np
import pytest
from conftest import same_bits

import pyx_xent as px

INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
ENTRIES = {
    "cross_entropy": lambda x, t, **o: px.cross_entropy(
        x, t, out=o.pop("out", None), **{k: v for k, v in o.items() if k != "grad_out"}
    ),
    "cross_entropy_with_grad": px.cross_entropy_with_grad,
    "nll_loss": lambda x, t, **o: px.nll_loss(x, t, out=o.pop("out", None), **{k: v for k, v in o.items() if k != "grad_out"}),
    "nll_loss_with_grad": px.nll_loss_with_grad,
}


def raises(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.spec("S25", "S35")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("bad", [5, -1, -100, 2**31, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**63, 2**64 - 100, 2**64 - 1])
def test_a_bad_label_is_an_index_error_before_anything_is_written(entry, reduction, bad):
    for dtype in INTEGERS:
        if not np.iinfo(dtype).min <= bad <= np.iinfo(dtype).max:
            continue
        target = np.zeros((3, 8), dtype)
        target[2, 7] = bad
        out = np.full((3, 8) if reduction == "none" else (), -7.25)
        grad_out = np.full((3, 5, 8), -7.25)
        options = {"ignore_index": -2, "reduction": reduction, "out": out, "grad_out": grad_out}
        message = f"Target {bad} is out of bounds. (target[2, 7]; valid range is [0, 5) or ignore_index=-2)"
        with raises(IndexError, message):
            ENTRIES[entry](np.zeros((3, 5, 8)), target, **options)
        assert (out == -7.25).all()
        assert (grad_out == -7.25).all()


@pytest.mark.spec("S25")
def test_the_lowest_bad_position_is_named(many_threads):
    target = np.zeros(1000, int)
    target[[17, 500, 999]] = 9, -3, 10
    with raises(IndexError, "Target 9 is out of bounds. (target[17]; valid range is [0, 5) or ignore_index=-100)"):
        px.cross_entropy(np.zeros((1000, 5)), target, num_threads=4)
    with raises(IndexError, "Target 7 is out of bounds. (target;"):
        px.cross_entropy(np.zeros(5), 7)


@pytest.mark.spec("S10", "S25", "S26")
@pytest.mark.parametrize("rows", [1, 7, 511, 512, 513, 1500])
@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 5, 2**63 - 1, -(2**63)])
def test_labels_are_valid_ignored_or_bad(rng, rows, ignore_index):
    classes = 5
    allowed = np.unique([*range(classes), ignore_index])
    edges = np.array([-1, -2, -100, classes, classes + 1, 2**31, 2**63 - 1, 2**63 - 2, -(2**63), -(2**63) + 1])
    for density in (0.0, 0.0, 1 / rows, 0.3):
        target = np.where(rng.random(rows) < density, rng.choice(edges, rows), rng.choice(allowed, rows))
        bad = (target != ignore_index) & ((target < 0) | (target >= classes))
        for labels in (target, np.repeat(target, 2)[::2]):  # copied as they are, or by NumPy
            if bad.any():
                first = bad.argmax()
                with raises(IndexError, f"Target {target[first]} is out of bounds. (target[{first}]"):
                    px.cross_entropy(np.zeros((rows, classes)), labels, ignore_index=ignore_index)
            else:
                loss = px.cross_entropy(np.zeros((rows, classes)), labels, ignore_index=ignore_index, reduction="sum")
                np.testing.assert_allclose(loss, (target != ignore_index).sum() * np.log(classes), rtol=1e-13)


@pytest.mark.spec("S9", "S10")
@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_dtype_of_labels(dtype, rng):
    logits = rng.normal(size=(6, 5))
    target = np.array([0, 4, 2, 3, 1, 2])
    expected = px.cross_entropy(logits, target, ignore_index=3)
    for order in "<>":
        assert px.cross_entropy(logits, target.astype(np.dtype(dtype).newbyteorder(order)), ignore_index=3) == expected
    assert px.cross_entropy(logits, target.astype(dtype)[::-1][::-1], ignore_index=3) == expected
    assert px.cross_entropy(logits, list(target), ignore_index=np.int8(3)) == expected


@pytest.mark.spec("S9", "S10", "S25")
def test_a_large_unsigned_label_is_never_wrapped():
    with raises(IndexError, f"Target {2**64 - 100} is out of bounds. (target[1]"):
        px.cross_entropy(np.zeros((2, 5)), np.array([0, 2**64 - 100], np.uint64))
    with raises(IndexError, f"Target {2**64 - 1} is out of bounds. (target[0]"):
        px.cross_entropy(np.zeros((2, 5)), np.array([2**64 - 1, 0], np.uint64), ignore_index=5)
    assert px.cross_entropy(np.zeros((1, 5)), np.array([200], np.uint8), ignore_index=200, reduction="sum") == 0


@pytest.mark.spec("S9", "S10")
@pytest.mark.parametrize("target", [np.array([True, False]), np.array([0.0, 1.0]), np.array([0, 1], object), np.array([0j, 1])])
def test_labels_that_are_no_integers(target):
    with raises(TypeError, f"Expected an integer dtype for target with class indices, got {target.dtype.name}"):
        px.cross_entropy(np.zeros((2, 5)), target)


@pytest.mark.spec("S10")
def test_ignore_index_must_be_an_int():
    for value in (1.0, "1", None, np.float64(2)):
        with raises(TypeError, "ignore_index must be an int, got "):
            px.cross_entropy(np.zeros((2, 5)), [0, 1], ignore_index=value)
    with raises(TypeError, "ignore_index must be an int, got float"):
        px.cross_entropy(np.zeros((2, 5)), np.zeros((2, 5)), ignore_index=-1.0)
    with raises(ValueError, "ignore_index must fit into 64 bits"):
        px.cross_entropy(np.zeros((2, 5)), [0, 1], ignore_index=2**63)


@pytest.mark.spec("S8")
@pytest.mark.parametrize("dtype", [np.int64, bool, complex, np.longdouble, object, "U1"])
def test_logits_of_another_dtype(dtype):
    array = np.zeros((2, 3), dtype)
    for call in (lambda: px.cross_entropy(array, [0, 1]), lambda: px.nll_loss(array, [0, 1]), lambda: px.softmax(array),
                 lambda: px.log_softmax_backward(array, array)):  # fmt: skip
        with raises(TypeError, f"must be float32, float64, float16 or bfloat16, got {array.dtype.name}"):
            call()


@pytest.mark.spec("S2", "S5")
@pytest.mark.parametrize(("logits", "target", "message"), [
    ((4, 5), (3,), "Expected input batch_size (4) to match target batch_size (3)."),
    ((2, 5, 3), (2, 4), "Expected target size (2, 3), got (2, 4)"),
    ((2, 5, 3), (2,), "Expected target size (2, 3), got (2,)"),
    ((2, 5, 3), (2, 5), "Expected target size (2, 3), got (2, 5): class axis is 1; pass axis=-1"),
    ((5,), (3,), "Expected target size (), got (3,)"),
    ((2, 5), (), "Expected target size (2,), got ()"),
    ((2, 5), (2, 1), "Expected target size (2,), got (2, 1)"),
    ((), (), "logits must have a class axis, got an array of shape ()"),
])  # fmt: skip
def test_shapes_that_do_not_fit(logits, target, message):
    with raises(ValueError, message):
        px.cross_entropy(np.zeros(logits), np.zeros(target, int))


@pytest.mark.spec("S2")
@pytest.mark.parametrize("dtype", [np.int64, bool, complex])
def test_a_target_of_the_logits_shape_must_be_floating(dtype):
    name = np.dtype(dtype).name
    with raises(TypeError, f"Expected floating point type for target with class probabilities, got {name}"):
        px.cross_entropy(np.zeros((2, 3)), np.zeros((2, 3), dtype))


LOGITS, LABELS = np.zeros((3, 4), np.float32), np.array([0, 1, 3])


class TensorWithGrad:
    requires_grad = True

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


@pytest.mark.parametrize(("arguments", "message"), [
    ((LOGITS, LABELS[:, None]), "Expected target size (3,), got (3, 1): target.squeeze(-1) has it"),
    ((LABELS, LOGITS), "logits must be float32, float64, float16 or bfloat16, got int64: was target given first?"),
    ((LOGITS, np.eye(3, 4, dtype=int)), "one-hot labels are of a floating dtype, or indices, target.argmax(1)"),
    ((LOGITS[:, 0], LABELS), "Binary logits x are rows of two, numpy.stack([0 * x, x], 1)"),
    ((LOGITS, [0.0, np.nan, 1.5]), "got float64: target[1] is nan"),
    ((LOGITS, [0.0, 1.0, 1.5]), "got float64: target[2] is 1.5"),
    ((LOGITS, [0.0, 1.0, 2.0]), "Expected an integer dtype for target with class indices, got float64"),
    ((LOGITS, ["cat", "dog", "cat"]), "numpy.unique(target, return_inverse=True)[1] numbers the classes"),
    ((LOGITS, np.array(["cat", "dog", "cat"], object)), "numpy.unique(target, return_inverse=True)[1] numbers the classes"),
    ((TensorWithGrad(), LABELS), "logits is a tensor that requires grad, and NumPy would lose the gradient: use pyx_xent"),
])  # fmt: skip
def test_common_mistakes_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        px.cross_entropy(*arguments)


@pytest.mark.spec("S38")
def test_nll_loss_has_no_soft_targets():
    with raises(ValueError, "Expected target size (2,), got (2, 3)"):
        px.nll_loss(np.zeros((2, 3)), np.zeros((2, 3)))


@pytest.mark.spec("S17", "S18", "S23", "S24")
@pytest.mark.parametrize(("options", "error", "message"), [
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0.0 and 1.0. Got: 1.5"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be between 0.0 and 1.0. Got: -0.1"),
    ({"label_smoothing": np.nan}, ValueError, "label_smoothing must be between 0.0 and 1.0. Got: nan"),
    ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number, got 'a'"),
    ({"reduction": "foo"}, ValueError, "foo is not a valid value for reduction"),
    ({"reduction": None}, ValueError, "None is not a valid value for reduction"),
    ({"z_loss": -1.0}, ValueError, "z_loss must be finite and not negative, got -1.0"),
    ({"z_loss": np.inf}, ValueError, "z_loss must be finite and not negative, got inf"),
    ({"focal_gamma": -1.0}, ValueError, "focal_gamma must be finite and not negative, got -1.0"),
    ({"focal_gamma": np.nan}, ValueError, "focal_gamma must be finite and not negative, got nan"),
    ({"focal_gamma": "a"}, TypeError, "focal_gamma must be a number, got 'a'"),
    (
        {"focal_gamma": 2.0, "label_smoothing": 0.1}, ValueError,
        "focal_gamma does not go together with label_smoothing, got 2.0 and 0.1",
    ),
    ({"empty": "none"}, ValueError, "empty must be 'nan', 'zero' or 'raise', got 'none'"),
    ({"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer replaces the divisor of reduction='mean'"),
    ({"normalizer": "a"}, TypeError, "normalizer must be a number, got 'a'"),
    ({"sample_weight": np.ones(3)}, ValueError, "sample_weight must have shape (2,), got (3,)"),
    ({"sample_weight": np.ones(2, complex)}, TypeError, "sample_weight must be real numbers, got complex128"),
    ({"num_threads": 0}, ValueError, "num_threads must be at least 1, got 0"),
    ({"num_threads": -1}, ValueError, "num_threads must be at least 1, got -1"),
    ({"num_threads": 1.0}, TypeError, "num_threads must be an int or None, got float"),
    ({"grad_output": np.ones(2)}, ValueError, "grad_output must be a scalar unless reduction='none', got shape (2,)"),
    ({"grad_output": np.ones(3), "reduction": "none"}, ValueError, "grad_output must have shape (2,), got (3,)"),
    ({"axis": 2}, np.exceptions.AxisError, "axis 2 is out of bounds for array of dimension 2"),
    ({"axis": 0.5}, TypeError, "float"),
])  # fmt: skip
def test_options_out_of_range(options, error, message):
    with raises(error, message):
        px.cross_entropy_with_grad(np.zeros((2, 5)), [0, 1], **options)


@pytest.mark.spec("S12", "S19")
def test_weights_that_do_not_fit():
    message = "weight tensor should be defined either for all 5 classes or no classes but got weight tensor of shape: (4,)"
    with raises(ValueError, message):
        px.cross_entropy(np.zeros((2, 5)), [0, 1], np.ones(4))
    with raises(ValueError, "shape: (1, 5)"):
        px.cross_entropy(np.zeros((2, 5)), [0, 1], np.ones((1, 5)))
    with raises(TypeError, "weight must be real numbers, got complex128"):
        px.cross_entropy(np.zeros((2, 5)), [0, 1], np.ones(5, complex))


@pytest.mark.spec("S21")
def test_soft_targets_and_ignore_index():
    logits, target = np.zeros((2, 3)), np.full((2, 3), 1 / 3)
    for ignored in (0, 7):
        with raises(ValueError, "ignore_index is not supported for floating point target"):
            px.cross_entropy(logits, target, ignore_index=ignored)
    assert px.cross_entropy(logits, target, ignore_index=-1) == pytest.approx(np.log(3))


@pytest.mark.spec("S46")
def test_focal_loss_needs_class_indices():
    with raises(ValueError, "focal_gamma needs class indices for target, got class probabilities (2, 3)"):
        px.cross_entropy(np.zeros((2, 3)), np.full((2, 3), 1 / 3), focal_gamma=2.0)
    with pytest.raises(TypeError, match="focal_gamma"):
        px.nll_loss(np.zeros((2, 3)), [0, 1], focal_gamma=2.0)


@pytest.mark.spec("S35")
class TestOutputs:
    def check(self, message, logits, **options):
        before = [np.array(a, copy=True) for a in options.values() if isinstance(a, np.ndarray)]
        with raises(ValueError, message):
            px.cross_entropy_with_grad(logits, np.array([0, 1, 2]), **options)
        after = [a for a in options.values() if isinstance(a, np.ndarray)]
        for a, b in zip(before, after, strict=True):
            assert same_bits(a, np.array(b))

    def test_wrong_shape_dtype_or_read_only(self):
        logits = np.zeros((3, 5))
        read_only = np.zeros((3, 5))
        read_only.flags.writeable = False
        self.check("grad_out must have shape (3, 5), got (5, 3)", logits, grad_out=np.zeros((5, 3)))
        self.check("grad_out must have dtype float64, got float32", logits, grad_out=np.zeros((3, 5), np.float32))
        self.check("grad_out is read-only", logits, grad_out=read_only)
        self.check("out must have shape (), got (3,)", logits, out=np.zeros(3))
        self.check("out must have shape (3,), got ()", logits, out=np.zeros(()), reduction="none")
        with raises(TypeError, "grad_out must be a numpy.ndarray, got list"):
            px.cross_entropy_with_grad(logits, [0, 1, 2], grad_out=[[0.0] * 5] * 3)

    def test_overlap(self):
        memory = np.zeros(200)
        logits = memory[10:25].reshape(3, 5)
        for name, other in {
            "shifted by an element": memory[11:26].reshape(3, 5), "by a row": memory[15:30].reshape(3, 5),
            "reversed": logits[::-1], "transposed": np.lib.stride_tricks.as_strided(logits, (3, 5), (8, 24)),
            "every other": memory[10:40:2].reshape(3, 5),
        }.items():  # fmt: skip
            assert name
            self.check("grad_out overlaps logits in memory", logits, grad_out=other)
        self.check("out overlaps logits in memory", logits, out=logits[:, 0], reduction="none")
        row = np.zeros((1, 5))
        repeated = np.lib.stride_tricks.as_strided(row, (3, 5), (0, 8))
        self.check("grad_out has elements that overlap each other", logits, grad_out=repeated)
        self.check(
            "grad_out overlaps out in memory", logits, grad_out=memory[100:115].reshape(3, 5), out=memory[102:103].reshape(())
        )
        weight = memory[50:55]
        self.check("grad_out overlaps weight in memory", logits, weight=weight, grad_out=memory[45:60].reshape(3, 5))
        target = np.zeros(3, np.int64)
        with raises(ValueError, "out overlaps target in memory"):
            px.cross_entropy(logits, target, out=target.view(np.float64), reduction="none")
        soft = np.zeros((3, 5))
        with raises(ValueError, "grad_out overlaps target in memory"):
            px.cross_entropy_with_grad(logits, soft, grad_out=soft)
        with raises(ValueError, "out overlaps x in memory"):
            px.softmax(logits, out=logits)

    def test_interleaved_arrays_do_not_overlap(self, rng):
        memory = rng.normal(size=(3, 10))
        expected = px.cross_entropy_with_grad(memory[:, ::2].copy(), [0, 1, 2])[1]
        px.cross_entropy_with_grad(memory[:, ::2], [0, 1, 2], grad_out=memory[:, 1::2])
        assert same_bits(memory[:, 1::2], expected)


@pytest.mark.spec("S7", "S35")
def test_memory_maps_are_inputs_and_outputs(rng, tmp_path):
    logits = rng.normal(size=(4, 40))
    np.save(tmp_path / "logits.npy", logits)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    grad_out = np.lib.format.open_memmap(tmp_path / "grad.npy", "w+", np.float64, (4, 40))
    loss, grad = px.cross_entropy_with_grad(mapped, [0, 1, 2, 3], grad_out=grad_out)
    expected, expected_grad = px.cross_entropy_with_grad(logits, [0, 1, 2, 3])
    assert grad is grad_out
    assert loss == expected
    assert same_bits(np.load(tmp_path / "grad.npy"), expected_grad)
    with raises(ValueError, "grad_out is read-only"):
        px.cross_entropy_with_grad(logits, [0, 1, 2, 3], grad_out=mapped)


@pytest.mark.spec("S35")
def test_inputs_are_not_written(rng):
    arguments = [rng.normal(size=(4, 40)), rng.integers(0, 40, 4), rng.random(40)]
    copies = [a.copy() for a in arguments]
    px.cross_entropy_with_grad(*arguments, ignore_index=int(arguments[1][0]), sample_weight=np.ones(4))
    for a, b in zip(arguments, copies, strict=True):
        assert same_bits(a, b)
        a.flags.writeable = False
    px.cross_entropy_with_grad(*arguments)


@pytest.mark.spec("S7")
def test_array_likes_and_arrays_that_would_lose_something():
    assert px.cross_entropy([[0.0, 1.0]], [1]) == px.cross_entropy(np.array([[0.0, 1.0]]), np.array([1]))
    masked = np.ma.masked_array(np.zeros((2, 3)), mask=True)
    with raises(TypeError, "logits is a masked array"):
        px.cross_entropy(masked, [0, 1])
    with raises(TypeError, "target is a masked array"):
        px.cross_entropy(np.zeros((2, 3)), np.ma.masked_array([0, 1]))


@pytest.mark.spec("S7")
def test_broadcast_logits_are_read_where_they_are(rng):
    row = rng.normal(size=40).astype(np.float32)
    many = np.broadcast_to(row, (500, 40))
    loss, grad = px.cross_entropy_with_grad(many, np.arange(500) % 40, reduction="none")
    expected, expected_grad = px.cross_entropy_with_grad(np.ascontiguousarray(many), np.arange(500) % 40, reduction="none")
    assert same_bits(loss, expected)
    assert same_bits(grad, expected_grad)


@pytest.mark.spec("S1", "S3")
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2])
def test_any_axis_may_hold_the_classes(rng, axis):
    logits = rng.normal(size=(3, 4, 5, 6))
    moved = np.moveaxis(logits, axis, 1)
    rows = moved.shape[:1] + moved.shape[2:]
    target = rng.integers(0, moved.shape[1], rows)
    loss, grad = px.cross_entropy_with_grad(logits, target, axis=axis)
    expected, expected_grad = px.cross_entropy_with_grad(np.ascontiguousarray(moved), target)
    assert loss == expected
    assert same_bits(np.ascontiguousarray(np.moveaxis(grad, axis, 1)), expected_grad)


@pytest.mark.spec("S37")
def test_softmax_arguments():
    with pytest.raises(np.exceptions.AxisError):
        px.softmax(np.zeros((2, 3)), axis=2)
    with raises(ValueError, "grad_output must have the shape of output, (2, 3), got (3, 2)"):
        px.softmax_backward(np.zeros((3, 2)), np.zeros((2, 3)))
    with raises(TypeError, "grad_output must have the dtype of output, float64, got float32"):
        px.softmax_backward(np.zeros((2, 3), np.float32), np.zeros((2, 3)))
    out = np.empty((2, 3))
    assert px.softmax(np.zeros((2, 3)), out=out) is out
    np.testing.assert_array_equal(out, px.softmax(np.zeros((2, 3))))


@pytest.mark.spec("S25")
def test_labels_that_another_thread_changes_meanwhile(many_threads):
    """Each call sees the labels of one moment: it computes or raises IndexError, and reads nothing else."""
    logits, target = np.zeros((2000, 10), np.float32), np.zeros(2000, np.int64)
    stop = threading.Event()

    def flip():
        while not stop.is_set():
            target[:] = 10**12
            target[:] = 3

    other = threading.Thread(target=flip)
    other.start()
    try:
        outcomes = set()
        for _ in range(2000):
            try:
                outcomes.add(float(px.cross_entropy(logits, target, num_threads=2)))
            except IndexError:
                outcomes.add("IndexError")
        assert outcomes <= {float(np.float32(np.log(10))), "IndexError"}
    finally:
        stop.set()
        other.join()


class Reshaping:
    """An argument whose conversion changes the shape of an array."""

    def __init__(self, array, shape, value):
        self.array, self.shape, self.value = array, shape, value

    def convert(self, *args, **kwargs):
        self.array.shape = self.shape
        return self.value

    __float__ = __index__ = __array__ = convert


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("z_loss", 0.5),
        ("label_smoothing", 0.1),
        ("normalizer", 2.0),
        ("ignore_index", -100),
        ("axis", 1),
        ("num_threads", 1),
        ("weight", np.ones(10)),
        ("sample_weight", np.ones(64)),
        ("grad_output", np.ones(())),
    ],
)
@pytest.mark.parametrize("which", ["logits", "target", "grad_out"])
@pytest.mark.parametrize("shape", [(640,), (10, 64), (1, 10, 64), (64, 2, 5), (64, 10, 1)], ids=str)
def test_an_argument_that_changes_a_shape_cannot_lead_outside_an_array(rng, name, value, which, shape):
    arrays = {"logits": rng.normal(size=(64, 10)), "target": np.full((64, 10), 0.1), "grad_out": np.zeros((64, 10))}
    changed = arrays[which]
    with pytest.raises((ValueError, TypeError, np.exceptions.AxisError)):
        px.cross_entropy_with_grad(**arrays, **{name: Reshaping(changed, shape, value)})
    changed.shape = (64, 10)
    assert not arrays["grad_out"].any()


def test_no_code_of_the_class_of_an_array_runs(rng):
    class Array(np.ndarray):
        def __array_function__(self, *args, **kwargs):
            raise AssertionError("code of the class of an array has run")

        __array_ufunc__ = __setitem__ = __getitem__ = __array_function__

    logits, target = rng.normal(size=(4, 6)).astype(np.float32), np.array([0, 1, 4, 5])
    arrays = {"weight": rng.random(6), "sample_weight": rng.random(4), "grad_output": rng.random(4)}
    expected, expected_grad = px.cross_entropy_with_grad(logits, target, reduction="none", **arrays)
    out, grad_out = np.zeros(8, np.float32)[::2].view(Array), np.zeros((6, 4), np.float32).T.view(Array)
    arrays = {name: array.view(Array) for name, array in arrays.items()}
    loss, grad = px.cross_entropy_with_grad(
        logits.view(Array), target.view(Array), reduction="none", out=out, grad_out=grad_out, **arrays
    )
    assert loss is out
    assert grad is grad_out
    assert same_bits(out.view(np.ndarray), expected)
    assert same_bits(np.ascontiguousarray(grad_out.view(np.ndarray)), expected_grad)
    with raises(ValueError, "grad_out overlaps logits in memory"):
        px.cross_entropy_with_grad(logits.view(Array), target, grad_out=logits[::-1].view(Array))


class Shortening:
    """An argument whose conversion makes an array shorter, with less memory: what was known of it is no longer true."""

    def __init__(self, array, value):
        self.array, self.value = array, value

    def convert(self, *args, **kwargs):
        self.array.resize(1, refcheck=False)
        return self.value

    __float__ = __index__ = __array__ = convert


@pytest.mark.parametrize("victim", ["logits", "target", "weight", "sample_weight", "grad_output", "out", "grad_out"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("z_loss", 0.5),
        ("label_smoothing", 0.1),
        ("ignore_index", -100),
        ("axis", 1),
        ("num_threads", 1),
        ("logits", np.zeros((700, 10))),
        ("target", np.zeros(700, np.int64)),
        ("weight", np.ones(10)),
        ("sample_weight", np.ones(700)),
        ("grad_output", np.ones(700)),
    ],
)
def test_every_argument_is_converted_before_any_is_looked_at(name, value, victim):
    """So that the array that has become shorter is refused for its shape, and no memory that it had is read or written."""
    if name == victim:
        return
    arrays = {
        "logits": np.zeros((700, 10)), "target": np.zeros(700, np.int64), "weight": np.ones(10), "sample_weight": np.ones(700),
        "grad_output": np.ones(700), "out": np.zeros(700), "grad_out": np.zeros((700, 10)),
    }  # fmt: skip
    shortened = arrays[victim]
    with pytest.raises(ValueError, match=r"shape|axis|size|overlap"):
        px.cross_entropy_with_grad(**{**arrays, "reduction": "none", name: Shortening(shortened, value)})
    assert not any(arrays[output].any() for output in ("out", "grad_out"))


@pytest.mark.parametrize(
    "name", ["linear_weight", "target", "logit_scale", "softcap", "num_threads", "chunk_bytes", "grad_output"]
)
@pytest.mark.parametrize("victim", ["hidden", "linear_weight", "target", "linear_bias", "sample_weight", "out"])
def test_every_argument_of_a_linear_layer_is_converted_before_any_is_looked_at(name, victim):
    if name == victim:
        return
    values = {
        "hidden": np.zeros((700, 4)), "linear_weight": np.zeros((10, 4)), "target": np.zeros(700, np.int64),
        "linear_bias": np.zeros(10), "logit_scale": 2.0, "softcap": 3.0, "num_threads": 1, "chunk_bytes": 10_000,
        "grad_output": np.ones(700), "sample_weight": np.ones(700), "out": np.zeros(700),
    }  # fmt: skip
    shortened = values[victim]
    with pytest.raises(ValueError, match=r"shape|axis|size"):
        px.linear_cross_entropy_with_grad(**{**values, "reduction": "none", name: Shortening(shortened, values[name])})
    assert not values["out"].any()


@pytest.mark.parametrize("function", [px.softmax, px.log_softmax])
@pytest.mark.parametrize("name", ["axis", "num_threads"])
def test_every_argument_of_softmax_is_converted_before_any_is_looked_at(function, name):
    x, out = np.zeros((700, 10)), np.zeros((700, 10))
    for victim in (x, out):
        with pytest.raises(ValueError, match=r"axis|shape"):
            function(x, **{"axis": 1, "out": out, name: Shortening(victim, 1)})
        victim.resize((700, 10), refcheck=False)
    assert not out.any()


def test_an_int_of_a_class_that_compares_in_its_own_way_is_taken_for_its_value():
    class Odd(int):
        def __lt__(self, other):
            raise AssertionError("a comparison of the caller's has run")

        __le__ = __gt__ = __ge__ = __eq__ = __neg__ = __add__ = __radd__ = __lt__
        __hash__ = int.__hash__

    expected = px.cross_entropy(np.zeros((3, 5)), [0, 1, 2], axis=1)
    options = {"axis": Odd(1), "num_threads": Odd(2), "ignore_index": Odd(-100)}
    assert px.cross_entropy(np.zeros((3, 5)), [0, 1, 2], **options) == expected
    assert px.softmax(np.zeros((3, 5)), axis=Odd(1), num_threads=Odd(1)).shape == (3, 5)


def test_a_target_whose_dtype_changes_during_the_call_cannot_be_too_short(monkeypatch):
    target, copy = np.zeros(4, np.int32), np.array

    def another_thread_first(value, *args, **kwargs):
        if value is target:
            target.dtype = np.int64
        return copy(value, *args, **kwargs)

    monkeypatch.setattr(np, "array", another_thread_first)
    with pytest.raises(ValueError, match="target has changed since its shape was checked: expected 4 labels, got 2"):
        px.cross_entropy(np.zeros((4, 3), np.float32), target)
