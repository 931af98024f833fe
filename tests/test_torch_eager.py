"""pyx_xent.torch and autograd: every way to a gradient, when it is made, second derivatives. Skipped without torch."""

import weakref

import numpy as np
import pytest

import pyx_xent as px

torch = pytest.importorskip("torch")
from helpers_torch import DTYPES, GRID, HALVES, F, ours, problem  # noqa: E402

from pyx_xent.torch import _habits, _tensors  # noqa: E402


@pytest.mark.spec("S31", "S33")
@pytest.mark.parametrize(("kind", "reduction", "weighted", "smoothing", "shape"), GRID, ids=str)
def test_gradcheck_and_gradgradcheck(generator, kind, reduction, weighted, smoothing, shape):
    logits, target, weight = problem(generator, kind, weighted, shape)
    inputs = [logits]
    if kind == "soft":
        inputs.append(target.requires_grad_())

    def loss(x, t=target):
        return ours.cross_entropy(x, t, weight, reduction=reduction, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.spec("S38")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck_of_nll_loss(generator, reduction):
    logits, target, weight = problem(generator, "index", True, (2, 5, 3))
    assert torch.autograd.gradcheck(lambda x: ours.nll_loss(x, target, weight, reduction=reduction), [logits])
    # Its gradient does not depend on the log-probabilities: only the derivative by grad_output is left.
    assert torch.autograd.gradgradcheck(lambda x: ours.nll_loss(x, target, weight, reduction=reduction), [logits])


def test_third_derivatives(generator):
    logits, target, _ = problem(generator, "index", False, (2, 4))
    expected = torch.autograd.functional.hessian(
        lambda x: torch.autograd.grad(F.cross_entropy(x, target), x, create_graph=True)[0].pow(3).sum(), logits.detach()
        .requires_grad_()
    )  # fmt: skip
    found = torch.autograd.functional.hessian(
        lambda x: torch.autograd.grad(ours.cross_entropy(x, target), x, create_graph=True)[0].pow(3).sum(), logits.detach()
        .requires_grad_()
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_all_ignored_rows_have_no_second_derivative(generator):
    logits, _, _ = problem(generator, "index", False, (3, 4))
    target = torch.full((3,), -100)
    (gradient,) = torch.autograd.grad(ours.cross_entropy(logits, target), logits, create_graph=True)
    assert not gradient.any()
    (second,) = torch.autograd.grad(gradient.sum(), logits)
    assert not second.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(64, 50), (16, 3000), (2, 21, 40, 40)], ids=str)
def test_every_way_to_a_gradient_has_the_bits_of_numpys(generator, dtype, kind, reduction, shape):
    """Made with the loss, made from its state for another upstream gradient, and made again."""
    logits, target, weight = problem(generator, kind, True, shape, dtype)

    def numpy(tensor):
        return _tensors.array_of(tensor)

    for upstream in (1.0, 0.25, 0.25, 3.7, 0.25, 1.0):  # expected, not expected, learned; not to be guessed
        loss = ours.cross_entropy(logits, target, weight, reduction=reduction)
        g = torch.full(loss.shape, upstream, dtype=loss.dtype)
        first, second = (torch.autograd.grad(loss, logits, g, retain_graph=True)[0] for _ in range(2))
        expected, expected_gradient = px.cross_entropy_with_grad(
            numpy(logits),
            numpy(target),
            numpy(weight.float() if dtype in HALVES else weight),
            reduction=reduction,
            grad_output=numpy(g.double()),
        )
        assert first.data_ptr() != second.data_ptr()
        if dtype not in HALVES:
            assert loss.detach().numpy().tobytes() == np.asarray(expected).tobytes()
        for gradient in (first, second):
            assert numpy(gradient).tobytes() == expected_gradient.tobytes()


def test_gradients_are_made_early_for_the_upstream_gradient_that_was_there_before(calls):
    logits, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])

    def step(factor):
        calls.clear()
        (ours.cross_entropy(logits, target) * factor).backward()
        return [name.removeprefix("cross_entropy_") for name in calls]

    assert step(1) == ["with_grad"]
    assert step(0.5) == ["with_grad", "with_grad"]
    assert step(0.5) == ["with_grad"]  # it has learned
    assert step(0.25) == ["with_grad", "with_grad"]
    assert step(0.125) == ["with_grad", "with_grad"]
    assert step(0.3) == ["with_state", "gradient"]  # it is not to be guessed
    assert step(0.3) == ["with_state", "gradient"]
    assert step(0.3) == ["with_grad"]


def test_losses_of_one_step_are_told_apart(calls):
    target = torch.tensor([0, 1, 2])
    heads = [torch.randn(rows, 5, requires_grad=True) for rows in (3, 3, 3)]

    def step(rows):
        calls.clear()
        losses = [ours.cross_entropy(head[:rows], target[:rows]) for head in heads]
        (losses[0] + 0.4 * losses[1] + 0.25 * losses[2]).backward()
        return calls.count("cross_entropy_with_grad")

    assert step(3) == 3 + 2
    assert [step(rows) for rows in (3, 2, 1)] == [3, 3, 3]


def test_scaled_halves_do_not_vanish():
    """What loss scaling is for: a gradient made for 1 would be 0 before it is scaled."""
    logits, target = torch.zeros(4096, 4, dtype=torch.float16, requires_grad=True), torch.zeros(4096, dtype=torch.int64)
    logits.data[:, 1:] = -12
    (ours.cross_entropy(logits, target) * 65536).backward()
    assert logits.grad.abs().min() > 0


def test_changed_tensors_raise(generator):
    for changed in ("target", "weight"):
        for scale in (1.0, 2.0):
            logits, target, weight = problem(generator, "index", True, (4, 5))
            for function in (ours.cross_entropy, F.cross_entropy):
                loss = function(logits, target, weight) * scale
                {"target": target, "weight": weight}[changed].add_(0)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
    _habits.forget()
    # Logits may change when their gradient is there, as in PyTorch; not when it is still to be made.
    logits, target, _ = problem(generator, "index", False, (4, 5))
    x = logits * 1
    loss = ours.cross_entropy(x, target)
    with torch.no_grad():
        x.zero_()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, torch.autograd.grad(F.cross_entropy(logits, target), logits)[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_backward_needs_the_graph(generator):
    logits, target, _ = problem(generator, "index", False, (4, 5))
    loss = ours.cross_entropy(logits, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


def test_a_kept_loss_does_not_keep_logits_or_gradient(generator):
    x, target, _ = problem(generator, "index", False, (4, 5))
    logits = x * 1
    gone = weakref.ref(logits)
    loss = ours.cross_entropy(logits, target)
    del logits
    assert gone() is not None
    loss.backward()
    assert gone() is None
    assert loss.grad_fn is not None
    assert loss.grad_fn.made.gradient == []
    assert not loss.grad_fn.made.read


def test_saved_tensor_hooks_and_checkpoints(generator):
    from torch.utils.checkpoint import checkpoint

    logits, target, _ = problem(generator, "index", False, (4, 5))
    (expected,) = torch.autograd.grad(ours.cross_entropy(logits, target), logits)
    with torch.autograd.graph.save_on_cpu():
        loss = ours.cross_entropy(logits, target)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], expected)
    for reentrant in (True, False):
        loss = checkpoint(lambda x: ours.cross_entropy(x * 1, target), logits, use_reentrant=reentrant)
        assert torch.equal(torch.autograd.grad(loss, logits)[0] if not reentrant else backward(loss, logits), expected)


def backward(loss, x):
    x.grad = None
    loss.backward()
    return x.grad


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=str)
def test_forward_mode_derivatives(generator, options):
    logits, target, _ = problem(generator, "index", False, (4, 5))
    v = torch.randn(4, 5, generator=generator, dtype=torch.float64)

    def tangent(function):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(logits.detach(), v)
            return torch.autograd.forward_ad.unpack_dual(function(dual, target, **options)).tangent

    torch.testing.assert_close(tangent(ours.cross_entropy), tangent(F.cross_entropy))
    assert torch.func.jvp(lambda x: ours.cross_entropy(x, target, **options), (logits.detach(),), (v,))[1].shape == (
        tangent(F.cross_entropy).shape
    )


@pytest.mark.parametrize("kind", ["index", "soft"])
def test_torch_func(generator, kind):
    logits, target, weight = problem(generator, kind, True, (4, 5))
    x = logits.detach()
    for options in ({}, {"reduction": "sum"}, {"label_smoothing": 0.2}):
        losses = [lambda x, t, f=f, options=options: f(x, t, weight, **options) for f in (ours.cross_entropy, F.cross_entropy)]
        torch.testing.assert_close(*(torch.func.grad(f)(x, target) for f in losses))
        torch.testing.assert_close(*(torch.func.jacrev(torch.func.grad(f))(x, target) for f in losses))
        if options.get("label_smoothing") and kind == "index":
            continue  # PyTorch's own cannot be mapped, and says so
        batches = x.expand(3, 4, 5) + torch.arange(3.0)[:, None, None] * x, target.expand(3, *target.shape)
        torch.testing.assert_close(*(torch.func.vmap(f)(*batches) for f in losses))
        gradients = [torch.func.vmap(torch.func.grad(f), in_dims=(0, None)) for f in losses]
        torch.testing.assert_close(*(g(batches[0], target) for g in gradients))


@pytest.mark.parametrize("argument", ["target", "weight"])
def test_inference_tensors_are_not_saved(argument):
    with torch.inference_mode():
        arguments = {"target": torch.tensor([0, 1]), "weight": torch.ones(3)}
    arguments = {"target": torch.tensor([0, 1])} | {argument: arguments[argument]}
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ours.cross_entropy(torch.randn(2, 3, requires_grad=True), **arguments)


def test_no_classes_have_no_gradient():
    logits, probabilities = (torch.zeros(3, 0, requires_grad=True) for _ in range(2))
    for target, options in ((probabilities, {}), (torch.full((3,), -100), {"label_smoothing": 0.1})):
        loss = ours.cross_entropy(logits, target, **options)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        assert gradient.shape == torch.autograd.grad(gradient.sum(), logits)[0].shape == (3, 0)
    ours.cross_entropy(logits, probabilities).backward()
    assert probabilities.grad.shape == (3, 0)
    with pytest.raises(ValueError, match="input must have a class axis"):
        ours.cross_entropy(torch.zeros((), requires_grad=True), torch.tensor(0))


@pytest.mark.parametrize("weights", [[0.0, 0, 1], [1.0, -1, 2]])
def test_second_derivatives_are_not_finite_where_the_first_are_not(weights):
    logits = torch.tensor([[0.0, 1, 2], [2, 1, 0]], dtype=torch.float64, requires_grad=True)
    loss = ours.cross_entropy(logits, torch.tensor([0, 1]), weight=torch.tensor(weights, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert not gradient[0].isfinite().any()
    assert not torch.autograd.grad(gradient[0, 0], logits)[0][0].isfinite().any()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("linear", [False, True])
def test_a_dual_upstream_gradient_keeps_its_tangent(linear, reduction):
    forward_ad, found = torch.autograd.forward_ad, []
    for space in (ours, F):
        x, target = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_(), torch.tensor([0, 1, 2, 0])
        if linear:
            loss = space.linear_cross_entropy(x, torch.linspace(-1, 1, 15).view(5, 3), target, reduction=reduction)
        else:
            loss = space.cross_entropy(x, target, reduction=reduction)
        with forward_ad.dual_level():
            upstream = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 2.0))
            found.append(forward_ad.unpack_dual(torch.autograd.grad(loss, x, upstream)[0]))
    torch.testing.assert_close(*found)
