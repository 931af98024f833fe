"""Losses and gradients against the float64 reference and against relations that any cross-entropy keeps."""

import itertools

import numpy as np
import pytest
from conftest import GRAD_TOLERANCE, LOSS_TOLERANCE, assert_close, same_bits

import pyx_xent as px
from pyx_xent import reference

# Rows of one lane, of one strip and a bit, few and many classes by both paths, several chunks; grids with a class axis inside.
SHAPES = [
    (1,), (5,), (40,), (0, 3), (1, 1), (7, 2), (7, 3), (17, 10), (5, 15), (5, 16), (5, 17), (6, 31), (33, 32), (6, 33),
    (6, 64), (6, 65),
    (4, 100), (3, 1000), (2, 2047), (2, 2049), (2, 50257),
    (3, 5, 4), (2, 40, 33), (2, 21, 5, 7), (2, 3, 2, 2, 3), (2, 100, 16), (2, 65, 33), (1, 2100, 17),
]  # fmt: skip


def labels(rng, shape, classes, ignored=0.2, ignore_index=-100):
    return np.where(rng.random(shape) < ignored, ignore_index, rng.integers(0, max(classes, 1), shape))


def without_class_axis(shape):
    return () if len(shape) == 1 else shape[:1] + shape[2:]


def classes_of(shape):
    return shape[0] if len(shape) == 1 else shape[1]


@pytest.mark.spec("S1", "S3", "S6", "S8", "S14", "S15", "S31")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_index_targets_agree_with_the_reference(isa, dtype, rng, shape, smoothing):
    classes = classes_of(shape)
    logits = (4 * rng.normal(size=shape)).astype(dtype)
    target = labels(rng, without_class_axis(shape), classes)
    weight = rng.random(classes).astype(dtype)
    for reduction, w in itertools.product(("none", "mean", "sum"), (None, weight)):
        g = rng.random(target.shape) if reduction == "none" else 0.7
        options = {"reduction": reduction, "label_smoothing": smoothing}
        loss, grad = px.cross_entropy_with_grad(logits, target, w, grad_output=g, **options)
        expected, expected_grad = reference.cross_entropy_with_grad(logits, target, w, grad_output=g, **options)
        assert loss.dtype == grad.dtype == dtype
        assert_close(loss, expected, LOSS_TOLERANCE[dtype])
        assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])
        assert same_bits(px.cross_entropy(logits, target, w, **options), loss)


@pytest.mark.spec("S2", "S6", "S16", "S31")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_agree_with_the_reference(isa, dtype, rng, shape, smoothing):
    logits = (4 * rng.normal(size=shape)).astype(dtype)
    target = (rng.random(shape) * (rng.random(shape) < 0.5)).astype(dtype)  # not normalised, with zeros
    weight = rng.random(classes_of(shape)).astype(dtype)
    for reduction, w in itertools.product(("none", "mean", "sum"), (None, weight)):
        g = rng.random(without_class_axis(shape)) if reduction == "none" else 0.7
        options = {"reduction": reduction, "label_smoothing": smoothing}
        loss, grad = px.cross_entropy_with_grad(logits, target, w, grad_output=g, **options)
        expected, expected_grad = reference.cross_entropy_with_grad(logits, target, w, grad_output=g, **options)
        assert_close(loss, expected, LOSS_TOLERANCE[dtype])
        assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])


@pytest.mark.spec("S23", "S24")
@pytest.mark.parametrize("shape", [(5,), (17, 10), (6, 33), (2, 21, 5, 7), (2, 40, 33)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_sample_weight_normalizer_and_z_loss(isa, dtype, rng, shape, soft):
    logits = (4 * rng.normal(size=shape)).astype(dtype)
    rows = without_class_axis(shape)
    target = rng.random(shape).astype(dtype) if soft else labels(rng, rows, classes_of(shape))
    weight = rng.random(classes_of(shape)).astype(dtype)
    for reduction, normalizer, z, smoothing in itertools.product(("none", "mean", "sum"), (None, 3.5), (0.0, 0.01), (0.0, 0.1)):
        if normalizer and reduction != "mean":
            continue
        options = {
            "reduction": reduction, "sample_weight": rng.random(rows), "normalizer": normalizer, "z_loss": z,
            "label_smoothing": smoothing,
        }  # fmt: skip
        loss, grad = px.cross_entropy_with_grad(logits, target, weight, **options)
        expected, expected_grad = reference.cross_entropy_with_grad(logits, target, weight, **options)
        assert_close(loss, expected, LOSS_TOLERANCE[dtype])
        assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])


@pytest.mark.spec("S46")
@pytest.mark.parametrize("shape", [(5,), (17, 10), (6, 33), (2, 21, 5, 7), (2, 130, 33), (3, 5000)], ids=str)
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 2.25, 7.0])
def test_focal_loss(isa, dtype, rng, shape, gamma):
    logits = (4 * rng.normal(size=shape)).astype(dtype)
    rows = without_class_axis(shape)
    target = labels(rng, rows, classes_of(shape))
    weight = rng.random(classes_of(shape)).astype(dtype)
    for reduction, z, sampled in itertools.product(("none", "mean", "sum"), (0.0, 0.01), (False, True)):
        options = {"reduction": reduction, "z_loss": z, "focal_gamma": gamma}
        if sampled:
            options["sample_weight"] = rng.random(rows)
        loss, grad = px.cross_entropy_with_grad(logits, target, weight, **options)
        expected, expected_grad = reference.cross_entropy_with_grad(logits, target, weight, **options)
        assert_close(loss, expected, LOSS_TOLERANCE[dtype])
        assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])


@pytest.mark.spec("S46")
@pytest.mark.parametrize("classes", [10, 100, 3000])
def test_focal_loss_of_gamma_0_has_the_bits_of_plain(isa, dtype, rng, classes):
    logits, target = rng.normal(size=(40, classes)).astype(dtype), rng.integers(0, classes, 40)
    for plain, focal in zip(
        px.cross_entropy_with_grad(logits, target), px.cross_entropy_with_grad(logits, target, focal_gamma=0), strict=True
    ):
        assert same_bits(plain, focal)


@pytest.mark.spec("S31", "S46")
@pytest.mark.parametrize("kind", ["index", "soft", "focal", "focal, gamma below 1"])
def test_gradient_is_the_central_difference_of_the_loss(isa, rng, kind):
    logits = rng.normal(size=(3, 7))
    target = rng.random((3, 7)) if kind == "soft" else np.array([1, -100, 6])
    options = {"weight": rng.random(7), "sample_weight": rng.random(3), "z_loss": 0.1}
    if kind.startswith("focal"):
        options["focal_gamma"] = 2.0 if kind == "focal" else 0.3
    else:
        options["label_smoothing"] = 0.2
    _, grad = px.cross_entropy_with_grad(logits, target, **options)
    step = 1e-5
    for position in np.ndindex(*logits.shape):
        up, down = logits.copy(), logits.copy()
        up[position] += step
        down[position] -= step
        slope = (px.cross_entropy(up, target, **options) - px.cross_entropy(down, target, **options)) / (2 * step)
        assert grad[position] == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.spec("S31")
@pytest.mark.parametrize("classes", [2, 10, 33, 1000, 50257])
def test_gradient_rows_sum_to_zero(isa, dtype, rng, classes):
    logits = (5 * rng.normal(size=(5, classes))).astype(dtype)
    _, grad = px.cross_entropy_with_grad(logits, rng.integers(0, classes, 5), reduction="sum")
    assert np.abs(grad.astype(np.float64).sum(1)).max() < (1e-6 if dtype is np.float32 else 1e-13)


@pytest.mark.parametrize("offset", [-1000.0, -100.0, 100.0, 255.0, 257.0, 4096.0])
@pytest.mark.parametrize("classes", [10, 33, 3000])
def test_adding_a_constant_to_a_row_changes_nothing(isa, dtype, rng, classes, offset):
    # Multiples of 1/512, so that the sums are exact in float32.
    logits = (rng.integers(-2048, 2048, (4, classes)) / 512).astype(dtype)
    target = rng.integers(0, classes, 4)
    loss, grad = px.cross_entropy_with_grad(logits, target, reduction="none")
    shifted_loss, shifted_grad = px.cross_entropy_with_grad(logits + dtype(offset), target, reduction="none")
    assert_close(shifted_loss, loss, LOSS_TOLERANCE[dtype] / 4)
    assert_close(shifted_grad, grad, GRAD_TOLERANCE[dtype] / 2)


@pytest.mark.parametrize("spread", [1, 5, 20, 100])
@pytest.mark.parametrize("classes", [10, 33, 5000])
def test_wide_logits_keep_their_digits_in_softmax(isa, dtype, rng, classes, spread):
    if np.finfo(np.longdouble).nmant < np.finfo(dtype).nmant + 8:
        pytest.skip("long double is not longer than double here")
    x = (spread * rng.normal(size=(8, classes))).astype(dtype)
    exponentials = np.exp(x.astype(np.longdouble) - x.max(1, keepdims=True))
    expected = exponentials / exponentials.sum(1, keepdims=True)
    ulp = np.spacing(np.maximum(expected, np.finfo(dtype).tiny).astype(dtype))
    assert (np.abs(px.softmax(x) - expected) / ulp).max() <= (4 if dtype is np.float32 else 6)


@pytest.mark.parametrize("high", [39.0, 41.0, 200.0, 300.0, 2000.0])
@pytest.mark.parametrize("classes", [20, 33, 5000])
def test_one_huge_logit_anywhere_is_found(isa, dtype, rng, classes, high):
    logits = rng.normal(size=(6, classes)).astype(dtype)
    for row, c in enumerate((0, 1, 15, 16, classes // 2, classes - 1)):
        logits[row, min(c, classes - 1)] = high
    target = rng.integers(0, classes, 6)
    loss, grad = px.cross_entropy_with_grad(logits, target, reduction="none")
    expected, expected_grad = reference.cross_entropy_with_grad(logits, target, reduction="none")
    assert_close(loss, expected, LOSS_TOLERANCE[dtype])
    assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])


@pytest.mark.spec("S34")
@pytest.mark.parametrize("classes", [2, 10, 33, 64, 65, 1000, 50257])
@pytest.mark.parametrize("gap", [12, 25, 60, 90])
def test_confident_rows_keep_their_digits(isa, dtype, rng, classes, gap):
    logits = rng.normal(size=(classes,)).astype(dtype)
    target = classes // 2
    logits[target] = 0
    logits[target] = logits.max() + dtype(gap)
    loss, grad = px.cross_entropy_with_grad(logits, target)
    x = logits.astype(np.float64)
    others = np.exp(np.delete(x, target) - x[target]).sum()
    tolerance = 4 * float(np.finfo(dtype).eps)
    assert float(loss) == pytest.approx(np.log1p(others), rel=tolerance)
    assert float(grad[target]) == pytest.approx(-others / (1 + others), rel=tolerance)
    assert float(px.log_softmax(logits)[target]) == pytest.approx(-np.log1p(others), rel=tolerance)
    onehot = np.zeros_like(logits)
    onehot[target] = 1
    soft_loss, soft_grad = px.cross_entropy_with_grad(logits, onehot)
    assert float(soft_loss) == pytest.approx(np.log1p(others), rel=tolerance)
    assert float(soft_grad[target]) == pytest.approx(-others / (1 + others), rel=tolerance)


@pytest.mark.spec("S13")
def test_sums_do_not_stop_at_float32_counters(isa):
    # 2^24 + 2 equal terms: a float32 counter stops at 2^24, and a float32 mean of losses drifts.
    rows = 40_000
    loss = px.cross_entropy(np.zeros((rows, 7), np.float32), np.zeros(rows, int))
    assert loss == np.float32(np.log(7))
    assert px.cross_entropy(np.zeros(2**24 + 2, np.float32), 0) == np.float32(np.log(2**24 + 2))


@pytest.mark.spec("S11")
@pytest.mark.parametrize("target_dtype", [np.float16, np.float32, np.float64])
def test_soft_targets_promote_the_loss_but_not_the_gradient(isa, dtype, rng, target_dtype):
    logits, target = rng.normal(size=(3, 5)).astype(dtype), rng.random((3, 5)).astype(target_dtype)
    loss, grad = px.cross_entropy_with_grad(logits, target)
    promoted = np.promote_types(dtype, target_dtype)
    assert loss.dtype == promoted
    assert grad.dtype == dtype
    expected, expected_grad = reference.cross_entropy_with_grad(logits, target)
    assert_close(loss, expected, LOSS_TOLERANCE[promoted.type])
    assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])
    assert px.cross_entropy(logits, target, np.ones(5, np.float64)).dtype == np.float64
    assert px.cross_entropy(logits, [0, 1, 2], np.ones(5, np.float64)).dtype == dtype


@pytest.mark.spec("S12")
@pytest.mark.parametrize("weight_dtype", [bool, np.int8, np.uint64, np.float16, np.float32, np.float64])
def test_weights_of_any_real_dtype_are_cast(dtype, rng, weight_dtype):
    logits, weight = rng.normal(size=(3, 4)).astype(dtype), np.array([1, 0, 1, 1]).astype(weight_dtype)
    assert same_bits(px.cross_entropy(logits, [0, 3, 2], weight), px.cross_entropy(logits, [0, 3, 2], weight.astype(dtype)))


@pytest.mark.spec("S20")
def test_weights_that_cancel_divide_by_zero_as_ieee_says(isa, dtype):
    logits = np.array([[0.0, 0.0], [0.0, 1.0]], dtype)
    loss, grad = px.cross_entropy_with_grad(logits, [0, 1], [1.0, -1.0])
    assert np.isinf(loss)
    assert np.isinf(grad).all()
    loss, grad = px.cross_entropy_with_grad(logits, [0, 0], [0.0, 1.0])
    assert np.isnan(loss)
    assert np.isnan(grad).all()
    negative, _ = px.cross_entropy_with_grad(logits, [0, 1], [-1.0, -2.0], reduction="sum")
    assert_close(negative, reference.cross_entropy_with_grad(logits, [0, 1], [-1.0, -2.0], reduction="sum")[0], 2e-6)


@pytest.mark.spec("S22")
def test_an_ignored_class_still_takes_part_in_the_softmax(isa, dtype, rng):
    logits = rng.normal(size=(4, 3)).astype(dtype)
    target = np.array([0, 1, 2, 1])
    loss, grad = px.cross_entropy_with_grad(logits, target, ignore_index=1)
    live = [0, 2]
    expected, expected_grad = px.cross_entropy_with_grad(logits[live], target[live])
    assert loss == expected
    assert same_bits(grad[live], expected_grad)
    assert not grad[[1, 3]].any()


@pytest.mark.parametrize("operation", ["softmax", "log_softmax"])
@pytest.mark.spec("S37")
@pytest.mark.parametrize(("shape", "axis"), [((5,), -1), ((3, 10), 1), ((3, 10), 0), ((2, 40, 33), 1), ((2, 3, 5), 2),
                                             ((2, 0), 1), ((0, 4), -1), ((2, 1000), -1), ((1, 1), 0)])  # fmt: skip
def test_softmax_and_its_backward_agree_with_the_reference(isa, dtype, rng, operation, shape, axis):
    x = (4 * rng.normal(size=shape)).astype(dtype)
    output = getattr(px, operation)(x, axis)
    assert output.dtype == dtype
    assert_close(output, getattr(reference, operation)(x, axis), 4 * np.finfo(dtype).eps)
    g = rng.normal(size=shape).astype(dtype)
    backward = getattr(px, operation + "_backward")(g, output, axis)
    expected = getattr(reference, operation + "_backward")(g, output, axis)
    # g - Σ g y cancels: the error is relative to g.
    assert np.abs(backward - expected).max(initial=0.0) <= 32 * np.finfo(dtype).eps * np.abs(g).max(initial=0.0)


@pytest.mark.spec("S38")
@pytest.mark.parametrize("shape", [(5,), (7, 3), (6, 33), (2, 21, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nll_loss_agrees_with_the_reference_and_with_cross_entropy(isa, dtype, rng, shape, reduction):
    logits = rng.normal(size=shape).astype(dtype)
    axis = 0 if logits.ndim == 1 else 1
    log_probs = px.log_softmax(logits, axis)
    target = labels(rng, without_class_axis(shape), classes_of(shape))
    weight = rng.random(classes_of(shape)).astype(dtype)
    g = rng.random(target.shape) if reduction == "none" else 0.7
    loss, grad = px.nll_loss_with_grad(log_probs, target, weight, reduction=reduction, grad_output=g)
    expected, expected_grad = reference.nll_loss_with_grad(log_probs, target, weight, reduction=reduction, grad_output=g)
    assert_close(loss, expected, LOSS_TOLERANCE[dtype])
    assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])
    assert same_bits(px.nll_loss(log_probs, target, weight, reduction=reduction), loss)
    assert_close(px.cross_entropy(logits, target, weight, reduction=reduction), loss, 4 * LOSS_TOLERANCE[dtype])
    chained = px.log_softmax_backward(grad, log_probs, axis)
    fused = px.cross_entropy_with_grad(logits, target, weight, reduction=reduction, grad_output=g)[1]
    assert_close(chained, fused, 4 * GRAD_TOLERANCE[dtype])


@pytest.mark.spec("S37")
@pytest.mark.parametrize("axis", [0, -1])
def test_softmax_of_a_number_is_one(isa, dtype, axis):
    number, out = np.array(3, dtype), np.zeros((), dtype)
    assert same_bits(px.softmax(number, axis), np.ones((), dtype))
    assert same_bits(px.log_softmax(number, axis), np.zeros((), dtype))
    assert px.softmax(number, axis, out=out) is out
    assert out == 1
    assert px.softmax_backward(number, np.ones((), dtype), axis) == 0
    assert px.log_softmax_backward(number, np.zeros((), dtype), axis) == 0
    with pytest.raises(np.exceptions.AxisError):
        px.softmax(number, 1)


@pytest.mark.spec("S40")
@pytest.mark.parametrize("given", ["float16", "float32"])
@pytest.mark.parametrize("asked", [np.float32, np.float64, "float64", None])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_loss_of_a_wider_dtype_is_the_double_that_was_there(isa, rng, given, asked, reduction):
    logits, target = rng.normal(size=(9, 30)).astype(given), rng.integers(0, 30, 9)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    wide = px.cross_entropy(logits, target, loss_dtype=np.float64, **options)
    loss, grad = px.cross_entropy_with_grad(logits, target, loss_dtype=asked, **options)
    dtype = np.dtype(asked or given)
    assert wide.dtype == np.float64
    assert same_bits(loss, wide.astype(dtype))  # rounded once
    assert same_bits(grad, px.cross_entropy_with_grad(logits, target, **options)[1])
    out = np.empty(loss.shape, dtype)
    assert px.cross_entropy(logits, target, loss_dtype=asked, out=out, **options) is out
    assert same_bits(out, loss)
    log_probs = px.log_softmax(logits)
    wide = px.nll_loss(log_probs, target, reduction=reduction, loss_dtype=np.float64)
    assert same_bits(px.nll_loss(log_probs, target, reduction=reduction, loss_dtype=asked), wide.astype(dtype))
    hidden, weight = rng.normal(size=(9, 4)).astype(given), rng.normal(size=(30, 4)).astype(given)
    wide = px.linear_cross_entropy(hidden, weight, target, loss_dtype=np.float64, **options)
    assert same_bits(px.linear_cross_entropy(hidden, weight, target, loss_dtype=asked, **options), wide.astype(dtype))


@pytest.mark.spec("S40")
def test_a_loss_is_not_narrowed():
    logits = np.zeros((3, 5))
    with pytest.raises(ValueError, match=r"loss_dtype must be None or float64 .* got float32"):
        px.cross_entropy(logits, [0, 1, 2], loss_dtype=np.float32)
    for wrong in (np.float16, np.int64, "bool", object()):
        with pytest.raises(TypeError, match="loss_dtype must be None, float32 or float64, got"):
            px.cross_entropy(logits, [0, 1, 2], loss_dtype=wrong)
    with pytest.raises(ValueError, match="out must have dtype float64, got float32"):
        px.cross_entropy(logits, [0, 1, 2], reduction="none", out=np.zeros(3, np.float32))
