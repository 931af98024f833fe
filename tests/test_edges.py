"""Empty batches, ignored rows, and logits that are not finite: SPEC sections 5 and 6."""

import warnings

import numpy as np
import pytest
from conftest import GRAD_TOLERANCE, LOSS_TOLERANCE, assert_close, same_bits

import pyx_xent as px
from pyx_xent import reference

INF, NAN = np.inf, np.nan
LAYOUTS = ["few classes", "many classes", "class axis inside"]


def widened(row, layout, dtype):
    """The three-class row with as many -inf classes behind it as the layout's kernel path wants."""
    row = np.asarray(row, dtype)
    return row if layout == "few classes" else np.concatenate([row, np.full(120, -INF, dtype)])


def run(row, target, layout, **options):
    """Loss and gradient of the row, computed in the middle of others, in that layout."""
    rows = np.zeros((20, row.size), row.dtype)
    rows[7] = row
    targets = np.zeros(20, int) if np.ndim(target) == 0 else np.zeros_like(rows)
    if np.ndim(target):
        targets[:, 0] = 1
    targets[7] = target
    if layout == "class axis inside":
        targets = np.ascontiguousarray(targets.T)[None] if np.ndim(target) else targets[None]
        loss, grad = px.cross_entropy_with_grad(np.ascontiguousarray(rows.T)[None], targets, reduction="none", **options)
        return loss[0, 7], grad[0, :, 7]
    loss, grad = px.cross_entropy_with_grad(rows, targets, reduction="none", **options)
    return loss[7], grad[7]


@pytest.mark.spec("S29", "S30")
@pytest.mark.parametrize("layout", LAYOUTS)
class TestSection6:
    def soft(self, row):
        return np.eye(row.size, dtype=row.dtype)[1]

    def test_a_forbidden_class_beside_the_target(self, isa, dtype, layout):
        row = widened([0, 1, -INF], layout, dtype)
        loss, grad = run(row, 1, layout)
        assert loss == pytest.approx(np.log1p(np.exp(-1)), rel=1e-6)
        assert np.isfinite(grad).all()
        assert not grad[2:].any()
        smoothed, smoothed_grad = run(row, 1, layout, label_smoothing=0.1)
        assert smoothed == INF
        assert np.isfinite(smoothed_grad).all()
        soft, soft_grad = run(row, self.soft(row), layout)
        assert soft == pytest.approx(loss, rel=1e-6)
        assert np.isfinite(soft_grad).all()

    def test_a_forbidden_target(self, isa, dtype, layout):
        row = widened([0, -INF, 1], layout, dtype)
        loss, grad = run(row, 1, layout)
        assert loss == INF
        np.testing.assert_allclose(grad[:3], [0.26894142, -1, 0.73105858], rtol=1e-6)
        smoothed, smoothed_grad = run(row, 1, layout, label_smoothing=0.1)
        assert smoothed == INF
        assert np.isfinite(smoothed_grad).all()
        assert run(row, self.soft(row), layout)[0] == INF
        for gamma in (0.5, 2.0):
            focal, focal_grad = run(row, 1, layout, focal_gamma=gamma)
            assert focal == INF
            np.testing.assert_allclose(focal_grad, grad, rtol=1e-14)

    @pytest.mark.parametrize(
        "bad", [[-INF] * 3, [0, INF, 1], [INF, 0, 1], [INF, INF, 0], [NAN, 0, 1], [0, NAN, 1], [0, 1, NAN]]
    )
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_rows_without_a_distribution_are_nan_everywhere(self, isa, dtype, layout, bad, smoothing):
        row = widened(bad, layout, dtype)
        for target in (1, self.soft(row)):
            focal = {"focal_gamma": 1.5} if np.ndim(target) == 0 and not smoothing else {}
            for options in ({}, focal):
                loss, grad = run(row, target, layout, label_smoothing=smoothing, **options)
                assert np.isnan(loss)
                assert np.isnan(grad).all()
        assert np.isnan(px.softmax(row)).all()
        assert np.isnan(px.log_softmax(row)).all()

    def test_large_logits_do_not_overflow(self, isa, dtype, layout):
        row = widened([1000, -1000, 0], layout, dtype)
        loss, grad = run(row, 1, layout)
        assert loss == 2000
        np.testing.assert_array_equal(grad[:3], [1, -1, 0])
        assert np.isfinite(run(np.asarray([1000, -1000, 0], dtype), 1, "few classes", label_smoothing=0.1)[0])
        assert run(row, self.soft(row), layout)[0] == 2000
        largest = np.finfo(dtype).max
        assert run(widened([largest, largest, 0], layout, dtype), 1, layout)[0] == pytest.approx(np.log(2), rel=1e-6)
        assert run(widened([-largest, -largest, -INF], layout, dtype), 1, layout)[0] == pytest.approx(np.log(2), rel=1e-6)

    def test_class_weight_0_times_infinity_is_nan(self, isa, dtype, layout):
        row = widened([0, -INF, 1], layout, dtype)
        weight = np.ones(row.size)
        weight[1] = 0
        assert np.isnan(run(row, 1, layout, weight=weight)[0])


@pytest.mark.spec("S46")
@pytest.mark.parametrize("gamma", [0.25, 1.0, 3.0, 1e300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_focal_loss_where_the_target_has_everything_or_nothing(isa, dtype, layout, gamma):
    sure = widened([0, 5000, 1], layout, dtype)
    loss, grad = run(sure, 1, layout, focal_gamma=gamma)
    assert loss == 0
    assert not grad.any()
    loss, grad = run(sure, 0, layout, focal_gamma=gamma)
    if gamma < 10:  # (1 - p)^gamma is 1, as long as 1 - p is
        assert loss == 5000
    np.testing.assert_array_equal(grad[:3], [-1, 1, 0])
    assert px.cross_entropy(np.zeros((4, 1), dtype), np.zeros(4, int), focal_gamma=gamma) == 0


@pytest.mark.spec("S29")
@pytest.mark.parametrize("classes", [1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 300])
def test_nan_at_any_position_makes_the_loss_nan(isa, dtype, rng, classes):
    logits = rng.normal(size=(classes + 2, classes)).astype(dtype)
    target = rng.integers(0, classes, classes + 2)
    clean = px.cross_entropy_with_grad(logits, target, reduction="none")
    poisoned = logits.copy()
    poisoned[np.arange(classes), np.arange(classes)] = NAN
    for values in (poisoned, np.asfortranarray(poisoned)):
        loss, grad = px.cross_entropy_with_grad(values, target, reduction="none")
        assert np.isnan(loss[:classes]).all()
        assert np.isnan(grad[:classes]).all()
        assert same_bits(loss[classes:], clean[0][classes:])
        assert same_bits(grad[classes:], clean[1][classes:])


@pytest.mark.spec("S28")
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e-310])
@pytest.mark.parametrize("classes", [3, 20, 64, 65, 1000])
@pytest.mark.parametrize("order", ["C", "F"])
def test_ignored_rows_are_inert(isa, dtype, rng, poison, classes, order):
    logits = rng.normal(size=(40, classes)).astype(dtype)
    target = rng.integers(0, classes, 40)
    target[::3] = -1
    weight = rng.random(classes)
    options = {"weight": weight, "ignore_index": -1, "label_smoothing": 0.1, "z_loss": 0.1}
    expected = px.cross_entropy_with_grad(logits, target, **options)
    poisoned = np.array(logits, order=order)
    poisoned[::3] = poison
    loss, grad = px.cross_entropy_with_grad(poisoned, target, **options)
    assert same_bits(loss, expected[0])
    assert same_bits(np.ascontiguousarray(grad), expected[1])
    assert not grad[::3].any()
    assert not np.signbit(grad[::3]).any()
    assert not px.cross_entropy(poisoned, target, reduction="none", ignore_index=-1)[::3].any()


@pytest.mark.spec("S26", "S24")
@pytest.mark.parametrize("classes", [3, 100])
def test_all_ignored(isa, dtype, classes):
    logits, target = np.full((5, classes), NAN, dtype), np.full(5, -100)
    loss, grad = px.cross_entropy_with_grad(logits, target)
    assert np.isnan(loss)
    assert same_bits(grad, np.zeros_like(logits))
    assert px.cross_entropy(logits, target, reduction="sum") == 0
    assert same_bits(px.cross_entropy(logits, target, reduction="none"), np.zeros(5, dtype))
    assert px.cross_entropy(logits, target, empty="zero") == 0
    assert px.cross_entropy(logits, target, normalizer=8.0) == 0
    with pytest.raises(ValueError, match="no row to average"):
        px.cross_entropy(logits, target, empty="raise")
    assert np.isnan(px.nll_loss(logits, target))
    assert same_bits(px.nll_loss_with_grad(logits, target)[1], np.zeros_like(logits))


@pytest.mark.spec("S28")
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("classes", [3, 65, 1000])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_rows_without_sample_weight_are_inert(isa, dtype, rng, poison, classes, soft):
    logits, sample_weight = rng.normal(size=(40, classes)).astype(dtype), rng.random(40)
    sample_weight[::3] = 0
    target = rng.random((40, classes)).astype(dtype) if soft else rng.integers(0, classes, 40)
    options = {"sample_weight": sample_weight, "label_smoothing": 0.1, "z_loss": 0.1}
    expected = px.cross_entropy_with_grad(logits, target, **options)
    poisoned = logits.copy()
    poisoned[::3] = poison
    loss, grad = px.cross_entropy_with_grad(poisoned, target, **options)
    assert same_bits(loss, expected[0])
    assert same_bits(grad, expected[1])
    assert same_bits(grad[::3], np.zeros_like(grad[::3]))
    if not soft:
        target[0] = classes  # of such a row, too, the label is checked
        with pytest.raises(IndexError, match="out of bounds"):
            px.cross_entropy(poisoned, target, **options)


@pytest.mark.spec("S24")
@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize(("soft", "of"), [(False, "sample_weight"), (False, "weight"), (True, "sample_weight")])
def test_a_batch_in_which_every_weight_is_zero_counts_nothing(isa, dtype, rng, classes, soft, of):
    logits, weight = rng.normal(size=(5, classes)).astype(dtype), {"sample_weight": np.zeros(5)}
    target = rng.random((5, classes)).astype(dtype) if soft else np.array([0, 1, 1, -100, 0])
    if of == "weight":
        weight = {"weight": np.r_[0.0, -0.0, np.ones(classes - 2)]}
    assert np.isnan(px.cross_entropy(logits, target, **weight))
    loss, grad = px.cross_entropy_with_grad(logits, target, empty="zero", **weight)
    assert loss == 0
    assert same_bits(grad, np.zeros_like(logits))
    expected = reference.cross_entropy_with_grad(logits, target, empty="zero", **weight)
    assert expected[0] == 0
    assert not expected[1].any()
    with pytest.raises(ValueError, match=r"no row to average: .* a weight of 0"):
        px.cross_entropy(logits, target, empty="raise", **weight)
    for empty in ("nan", "zero", "raise"):
        assert px.cross_entropy(logits, target, normalizer=8.0, empty=empty, **weight) == 0


@pytest.mark.spec("S26")
@pytest.mark.parametrize("shape", [(0, 3), (0, 40), (0, 3, 7), (2, 3, 0)])
def test_no_rows(isa, dtype, shape):
    rows = shape[:1] + shape[2:]
    for target in (np.zeros(rows, int), np.zeros(shape, dtype)):
        loss, grad = px.cross_entropy_with_grad(np.zeros(shape, dtype), target)
        assert np.isnan(loss)
        assert grad.shape == shape
        assert px.cross_entropy(np.zeros(shape, dtype), target, reduction="sum") == 0
        assert px.cross_entropy(np.zeros(shape, dtype), target, reduction="none").shape == rows


@pytest.mark.spec("S27")
def test_no_classes_and_one_class(isa, dtype):
    with pytest.raises(IndexError):
        px.cross_entropy(np.zeros((2, 0), dtype), [0, 0])
    assert px.cross_entropy(np.zeros((2, 0), dtype), [-100, -100], reduction="sum") == 0
    for options in ({}, {"label_smoothing": 0.1}, {"weight": [0.3]}, {"weight": [0.3], "label_smoothing": 0.7}):
        for target in ([0, 0], np.array([[0.3], [1.0]], dtype)):
            loss, grad = px.cross_entropy_with_grad(np.array([[3.7], [-2.0]], dtype), target, **options)
            assert loss == 0
            assert not grad.any()


def test_no_warning_is_raised_whatever_the_values(rng):
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for value in (NAN, INF, -INF, 1e300, 1e-310):
            px.cross_entropy_with_grad(np.full((3, 5), value), [0, 1, 2], label_smoothing=0.1)
            px.softmax(np.full((3, 5), value))


# Logits so large that few of their digits, or none, are behind the point

AROUND = {np.float32: [1e6, 3e6, 1e30], np.float64: [1e6, 3e6, 1e16, 1e300]}


def row_around(rng, center, classes, dtype):
    """Neighbouring numbers: a few apart from each other, or where they are rarer than that, the next ones."""
    step = max(1.0, float(np.spacing(dtype(abs(center)))))
    return (center + step * np.round(3 * rng.normal(size=classes))).astype(dtype)


def huge_rows(rng, classes, dtype):
    """(what it is, row, target)"""
    for center in AROUND[dtype]:
        for sign in (1, -1):
            row = row_around(rng, sign * center, classes, dtype)
            yield f"around {sign * center}", row, row.argmax()
            yield f"around {sign * center}, target not the largest", row, row.argmin()
        yield f"all {center}", np.full(classes, center, dtype), classes - 1
    huge = AROUND[dtype][-1]
    for first, second, third in ((huge, 0, -huge), (0, -huge, huge), (-huge, huge, 0), (-huge, 0, -huge), (0, -huge, 0)):
        row = np.resize(np.array([first, second, third], dtype), classes)
        for target in (0, 1, classes - 1):
            yield f"{first} {second} {third}", row, target
    one = np.zeros(classes, dtype)
    for position in (0, classes // 2, classes - 1):
        for value in (huge, -huge):
            row = one.copy()
            row[position] = value
            yield f"0 but for {value} at {position}", row, 1
            yield f"-inf but for {value} at {position}", np.where(row == value, row, -INF).astype(dtype), position
            yield f"-inf but for {value} at {position}, another target", np.where(row == value, row, -INF).astype(dtype), 1
    row = one.copy()
    row[classes - 1], row[0] = huge, INF
    yield "+inf and huge", row, classes - 1


@pytest.mark.spec("S29", "S34")
@pytest.mark.parametrize("classes", [3, 33, 300])
@pytest.mark.parametrize("order", ["C", "F"])
def test_very_large_logits_agree_with_the_reference(isa, dtype, rng, classes, order):
    names, huge, labels = zip(*huge_rows(rng, classes, dtype), strict=True)
    # Between ordinary rows, so that one tile has both.
    logits = rng.normal(size=(2 * len(huge), classes)).astype(dtype)
    target = rng.integers(0, classes, len(logits))
    logits[::2], target[::2] = huge, labels
    names = [name for row in names for name in (row, "ordinary")]
    logits = np.array(logits, order=order)
    onehot = np.zeros(logits.shape, dtype)
    onehot[np.arange(len(target)), target] = 1
    for y in (target, onehot):
        for smoothing in (0.0, 0.1):
            options = {"reduction": "none", "label_smoothing": smoothing}
            loss, grad = px.cross_entropy_with_grad(logits, y, **options)
            expected, expected_grad = reference.cross_entropy_with_grad(logits, y, **options)
            for i, name in enumerate(names):
                try:
                    assert_close(loss[i], expected[i], LOSS_TOLERANCE[dtype])
                    assert_close(grad[i], expected_grad[i], GRAD_TOLERANCE[dtype])
                except AssertionError as error:
                    raise AssertionError(f"{name}, target {target[i]}") from error
            criterion = px.CrossEntropyLoss(**options)
            assert same_bits(criterion(logits, y), loss)
            assert same_bits(criterion.backward(), grad)
    for operation in ("softmax", "log_softmax"):
        output, exact = getattr(px, operation)(logits), getattr(reference, operation)(logits)
        np.testing.assert_allclose(output, exact, rtol=LOSS_TOLERANCE[dtype], atol=np.finfo(dtype).tiny)


def test_a_sum_beyond_float32_is_infinite_without_a_warning(isa):
    logits = np.array([[3e38, 0, 0], [3e38, 0, 0]], np.float32)
    assert px.cross_entropy(logits, [1, 1], reduction="sum") == INF


@pytest.mark.spec("S35")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_loss_beyond_its_dtype_raises_nothing_after_the_gradient_is_written(isa, reduction):
    # Rows of 5e38 and 1e-44: the one overflows in float32, the other is subnormal.
    logits = np.array([[2.5e38, -2.5e38, 0], [102, 0, 0]], np.float32)
    grad_out, out = np.full_like(logits, NAN), np.zeros(2 if reduction == "none" else (), np.float32)
    with np.errstate(all="raise"):
        fresh, _ = px.cross_entropy_with_grad(logits, [1, 0], reduction=reduction)
        loss, grad = px.cross_entropy_with_grad(logits, [1, 0], reduction=reduction, out=out, grad_out=grad_out)
    assert loss is out
    assert grad is grad_out
    assert same_bits(fresh[()], out[()])
    assert out.flat[0] == INF
    assert np.isfinite(grad).all()
    if reduction == "none":
        assert 0 < out[1] < np.finfo(np.float32).tiny


@pytest.mark.spec("S26")
@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 0, 3), -1), ((0, 2, 3), -1), ((2, 3, 0), 1), ((2, 3, 4, 0), 1), ((2, 3, 0, 4), 1)]
)
def test_no_rows_along_any_axis(dtype, shape, axis):
    rows = list(shape)
    del rows[axis]
    loss, grad = px.cross_entropy_with_grad(np.zeros(shape, dtype), np.zeros(rows, int), axis=axis, reduction="none")
    assert loss.shape == tuple(rows)
    assert grad.shape == shape
    assert np.isnan(px.cross_entropy(np.zeros(shape, dtype), np.zeros(rows, int), axis=axis))


@pytest.mark.spec("S29", "S36")
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("classes", [1, 3, 20, 100, 3000])
def test_any_nan_is_the_one_nan(isa, dtype, bad, classes):
    """Processors differ in the sign of a NaN that they make, and in whose they pass on."""
    target = np.arange(48) % classes
    logits = np.linspace(-1, 1, 48 * classes).reshape(48, classes).astype(dtype)
    logits[::2, classes // 2] = bad
    upstream = np.ones_like(logits)
    upstream[:, classes // 2 :] *= -1
    even = upstream - upstream.mean(axis=1, keepdims=True)
    found = [
        px.cross_entropy(logits, target, reduction="none"),
        px.cross_entropy_with_grad(logits, target)[1],
        px.cross_entropy_with_grad(logits, target, label_smoothing=0.1)[1],
        px.cross_entropy_with_grad(logits, np.full_like(logits, 1 / classes))[1],
        px.softmax(logits),
        px.log_softmax(logits),
        *(backward(y, x) for backward in (px.softmax_backward, px.log_softmax_backward)
          for y, x in ((upstream, logits), (even, logits), (logits, upstream))),
    ]  # fmt: skip
    assert any(np.isnan(result).any() for result in found)
    for k, result in enumerate(found):
        assert not np.signbit(result[np.isnan(result)]).any(), k
