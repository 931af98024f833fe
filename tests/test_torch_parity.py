"""The same values, gradients, shapes and dtypes as PyTorch, over a grid of options. Skipped where torch is absent."""

import itertools

import numpy as np
import pytest
from conftest import GRAD_TOLERANCE, LOSS_TOLERANCE, assert_close

import pyx_xent as px

torch = pytest.importorskip("torch")
F = torch.nn.functional

SHAPES = [(5,), (6, 5), (0, 5), (4, 40), (3, 5, 4), (2, 40, 3), (2, 5, 3, 4), (2, 3, 2, 3, 2), (1, 1)]


def torch_result(logits, target, weight, dtype, g, **options):
    """Loss and gradient of torch, computed in `dtype`."""
    x = torch.tensor(logits, dtype=dtype, requires_grad=True)
    t = torch.tensor(target)
    t = t.to(dtype) if t.is_floating_point() else t
    loss = F.cross_entropy(x, t, None if weight is None else torch.tensor(weight, dtype=dtype), **options)
    loss.backward(torch.tensor(g, dtype=loss.dtype).expand(loss.shape))
    return loss.detach().numpy(), x.grad.numpy()


@pytest.mark.spec("S1", "S2", "S3", "S6", "S11", "S14", "S15", "S16", "S22", "S31", "S32")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_grid_of_options(isa, dtype, rng, shape, kind):
    classes = shape[0] if len(shape) == 1 else shape[1]
    rows = () if len(shape) == 1 else shape[:1] + shape[2:]
    logits = (3 * rng.normal(size=shape)).astype(dtype)
    weights = (None, rng.random(classes).astype(dtype))
    ignores = (-100, 0, -1) if kind == "index" else (-100,)
    for reduction, weight, smoothing, ignore in itertools.product(("none", "mean", "sum"), weights, (0.0, 0.1, 1.0), ignores):
        if kind == "index":
            target = np.where(rng.random(rows) < 0.3, ignore, rng.integers(0, classes, rows))
        else:
            target = rng.random(shape).astype(dtype)
        g = rng.random(rows) if reduction == "none" else 0.7
        options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore}
        expected, expected_grad = torch_result(logits, target, weight, torch.float64, g, **options)
        theirs, _ = torch_result(logits, target, weight, torch.from_numpy(logits).dtype, g, **options)
        loss, grad = px.cross_entropy_with_grad(logits, target, weight, grad_output=g, **options)
        assert loss.dtype == theirs.dtype
        assert loss.shape == theirs.shape
        assert grad.shape == logits.shape
        assert_close(loss, expected, LOSS_TOLERANCE[dtype])
        assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])


@pytest.mark.spec("S4")
def test_one_row_may_have_a_target_of_one_element(dtype):
    logits = np.array([0.5, -1.0, 2.0], dtype)
    expected = F.cross_entropy(torch.tensor(logits), torch.tensor([2]), reduction="none")  # its backward raises
    loss = px.cross_entropy(logits, [2], reduction="none")
    assert loss.shape == expected.shape == ()
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert px.cross_entropy(logits, [2], label_smoothing=0.1) == px.cross_entropy(logits, 2, label_smoothing=0.1)


@pytest.mark.spec("S26")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("logits", "target"), [
    (np.zeros((0, 3)), np.zeros(0, int)), (np.zeros((2, 0)), np.zeros((2, 0))),
    (np.zeros((2, 3)), np.array([-100, -100])), (np.zeros((0, 3)), np.zeros((0, 3))),
])  # fmt: skip
def test_empty_and_ignored_batches(logits, target, reduction):
    expected, expected_grad = torch_result(logits, target, None, torch.float64, 1.0, reduction=reduction)
    loss, grad = px.cross_entropy_with_grad(logits, target, reduction=reduction)
    assert_close(loss, expected, 0)
    if target.size:  # for all-ignored rows the gradient is 0, for no rows there is none
        assert not grad.any()
        assert not expected_grad.any()


@pytest.mark.spec("S20")
@pytest.mark.parametrize("weight", [[1.0, -1.0, 1.0], [0.0, 0.0, 1.0], [-1.0, -2.0, 0.5]])  # the first two divide by 0
def test_strange_weights(dtype, weight):
    logits, target = np.array([[0.1, 0.2, 0.3], [0.3, -0.5, 1.0]], dtype), np.array([0, 1])
    expected, expected_grad = torch_result(logits, target, weight, torch.float64, 1.0)
    loss, grad = px.cross_entropy_with_grad(logits, target, weight)
    assert_close(loss, expected, LOSS_TOLERANCE[dtype])
    if sum(weight[:2]) == 0:
        # inf * (p - 1) is -inf, as the formula says; torch forms inf * p - inf at the target, which is nan.
        expected_grad = np.where(np.isnan(expected_grad), grad, expected_grad)
        assert not np.isfinite(grad).any()
    assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])


@pytest.mark.spec("S29", "S30")
@pytest.mark.parametrize(
    "row", [[0, 1, -np.inf], [0, -np.inf, 1], [-np.inf] * 3, [0, np.inf, 1], [0, np.nan, 1], [1000, -1000, 0]]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, [1.0, 0.0, 2.0]])
def test_rows_that_are_not_finite(isa, dtype, row, smoothing, weight):
    logits = np.array([row, [0, 1, 2]], dtype)
    options = {"reduction": "none", "label_smoothing": smoothing}
    expected, expected_grad = torch_result(logits, np.array([1, 2]), weight, torch.float64, 1.0, **options)
    loss, grad = px.cross_entropy_with_grad(logits, [1, 2], weight, **options)
    assert_close(loss, expected, LOSS_TOLERANCE[dtype])
    assert_close(grad, expected_grad, GRAD_TOLERANCE[dtype])


@pytest.mark.spec("S37")
@pytest.mark.parametrize("shape", [(5,), (3, 10), (2, 40, 3), (0, 3), (2, 0)])
def test_softmax_and_log_softmax(isa, dtype, rng, shape):
    x = (3 * rng.normal(size=shape)).astype(dtype)
    for axis in range(-len(shape), len(shape)):
        for name in ("softmax", "log_softmax"):
            t = torch.tensor(x.astype(np.float64), requires_grad=True)
            output = getattr(torch, name)(t, axis)
            g = rng.normal(size=shape)
            output.backward(torch.tensor(g))
            ours = getattr(px, name)(x, axis)
            assert_close(ours, output.detach().numpy(), 4 * np.finfo(dtype).eps)
            grad = getattr(px, name + "_backward")(g.astype(dtype), ours, axis)
            assert np.abs(grad - t.grad.numpy()).max(initial=0) < 64 * np.finfo(dtype).eps


@pytest.mark.spec("S38")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 5, 3, 4)])
def test_nll_loss(dtype, rng, shape, reduction):
    rows = () if len(shape) == 1 else shape[:1] + shape[2:]
    log_probs, weight = rng.normal(size=shape).astype(dtype), rng.random(5).astype(dtype)
    target = np.where(rng.random(rows) < 0.3, -100, rng.integers(0, 5, rows))
    x = torch.tensor(log_probs.astype(np.float64), requires_grad=True)
    expected = F.nll_loss(x, torch.tensor(target), torch.tensor(weight.astype(np.float64)), reduction=reduction)
    expected.backward(torch.ones_like(expected))
    loss, grad = px.nll_loss_with_grad(log_probs, target, weight, reduction=reduction)
    assert_close(loss, expected.detach().numpy(), LOSS_TOLERANCE[dtype])
    assert_close(grad, x.grad.numpy(), GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize(("call", "error"), [
    (lambda f, a: f(a((4, 5)), a(3, int)), "Expected input batch_size (4) to match target batch_size (3)."),
    (lambda f, a: f(a((3, 5)), a((3, 5)), ignore_index=1), "ignore_index is not supported for floating point target"),
    (lambda f, a: f(a((3, 5)), a((3, 5), int)), "Expected floating point type for target with class probabilities, got"),
    (lambda f, a: f(a((3, 5)), a(3, int), a(4)), "weight tensor should be defined either for all 5 classes or no classes but"),
    (lambda f, a: f(a((3, 5)), a(3, int), reduction="foo"), "foo is not a valid value for reduction"),
    (lambda f, a: f(a((3, 5)), a(3, int), label_smoothing=1.5), "label_smoothing must be between 0.0 and 1.0. Got: 1.5"),
])  # fmt: skip
@pytest.mark.spec("S17", "S18", "S19", "S21")
def test_errors_read_as_torchs(call, error):
    """The message that SPEC quotes is the one torch prints, too."""
    with pytest.raises((ValueError, TypeError)) as ours:
        call(px.cross_entropy, lambda shape, dtype=float: np.zeros(shape, dtype))
    assert error in str(ours.value)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as theirs:
        call(
            F.cross_entropy, lambda shape, dtype=float: torch.zeros(shape, dtype=torch.int64 if dtype is int else torch.float64)
        )
    assert error.split(", got")[0].split(" but")[0].split(". Got")[0] in str(theirs.value)
