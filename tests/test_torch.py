"""pyx_xent.torch against PyTorch: values, autograd, torch.compile, torch.func, memory, patching. Skipped without torch."""

import copy
import importlib
import itertools
import pickle
import shutil
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

import pyx_xent as px
from pyx_xent import _memory, _threads

torch = pytest.importorskip("torch")
ours = importlib.import_module("pyx_xent.torch")
FlopCounterMode = importlib.import_module("torch.utils.flop_counter").FlopCounterMode
F = torch.nn.functional
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
GRID = list(itertools.product(["index", "soft"], ["none", "mean", "sum"], [False, True], [0.0, 0.3], [(5,), (4, 5), (2, 5, 3)]))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20261125)


@pytest.fixture(autouse=True)
def _as_new():
    yield
    ours.unpatch()
    ours._made_early = True


def problem(generator, kind, weighted, shape, dtype=torch.float64):
    """logits that require grad, target, weight"""
    rows = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    classes = shape[0] if len(shape) == 1 else shape[1]
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    if kind == "soft":
        target = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    else:
        target = torch.randint(classes, rows, generator=generator)
        if target.numel() > 2:
            target.view(-1)[1] = -100
    weight = (0.5 + torch.rand(classes, generator=generator, dtype=torch.float64)).to(dtype) if weighted else None
    return logits, target, weight


def both(function, theirs, inputs, *, seed=3):
    """[(output, gradients of what requires grad), ...] of the two functions for copies of the inputs."""
    found = []
    for f in (function, theirs):
        mine = [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs]
        out = f(*mine)
        wanted = [t for t in mine if isinstance(t, torch.Tensor) and t.requires_grad]
        g = torch.rand(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
        found.append((out.detach(), torch.autograd.grad(out, wanted, g) if out.requires_grad else ()))
    return found


def assert_equal(found, **tolerance):
    (out, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(out, expected, equal_nan=True, **tolerance)
    assert len(gradients) == len(expected_gradients)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, equal_nan=True, **tolerance)


# PyTorch's own samples


def operator(name, variant=""):
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    return next(op for op in op_db if op.name == f"nn.functional.{name}" and op.variant_test_name == variant)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.filterwarnings("ignore")  # of the samples: legacy arguments
def test_samples_of_the_operator_database(name, dtype, contiguous):
    op, count = operator(name), 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        sample = sample if contiguous else sample.noncontiguous()
        target, *others = sample.args
        weight = sample.kwargs.get("weight")
        theirs = {"weight": None if weight is None else weight.detach()}
        kwargs = {**sample.kwargs, **theirs}
        call = [lambda x, f=f, t=target, o=others, k=kwargs: f(x, t, *o, **k) for f in (getattr(ours, name), getattr(F, name))]
        found = both(*call, [sample.input])
        assert_equal(found, **({"rtol": 2e-2, "atol": 2e-2} if dtype in HALVES else {}))
        count += 1
    assert count > 20


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_samples_of_the_module_database(name, dtype):
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import module_db

    module, count = next(m for m in module_db if m.name == f"nn.{name}"), 0
    for sample in module.module_inputs_func(module, "cpu", dtype, requires_grad=True, training=True):
        arguments, inputs = sample.constructor_input, sample.forward_input
        criteria = [getattr(space, name)(*arguments.args, **arguments.kwargs) for space in (ours, torch.nn)]
        assert_equal(both(*[lambda x, t, c=c: c(x, t) for c in criteria], list(inputs.args)))
        count += 1
    assert count > 5


def test_halves_are_not_farther_off_than_pytorchs(generator):
    for dtype, kind, weighted in itertools.product(HALVES, ["index", "soft"], [False, True]):
        logits, target, weight = problem(generator, kind, weighted, (64, 1000), dtype)
        options = [logits, target, weight]
        (out, (gradient,)), (other, (other_gradient,)) = both(ours.cross_entropy, F.cross_entropy, options)
        wide = [t if t is None or not t.is_floating_point() else t.detach().double() for t in options]
        wide[0].requires_grad_()
        exact = F.cross_entropy(*wide)
        g = torch.rand((), generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
        exact.backward(g.double())
        assert out.dtype == other.dtype
        assert abs(out.double() - exact) <= abs(other.double() - exact)
        error, other_error = [(v.double() - wide[0].grad).abs().max() for v in (gradient, other_gradient)]
        assert error <= other_error


# Values and dtypes


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.uint64])
def test_targets_of_every_integer_dtype(dtype):
    logits = torch.randn(3, 5)
    expected = F.cross_entropy(logits, torch.tensor([4, 0, 2]))
    torch.testing.assert_close(ours.cross_entropy(logits, torch.tensor([4, 0, 2]).to(dtype)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_memory_layouts_and_modes_do_not_change_a_bit(generator, dtype, kind):
    logits, target, _ = problem(generator, kind, False, (4, 5, 3, 2), dtype)
    expected = ours.cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(expected, logits)
    layouts = {
        "channels last": logits.detach().contiguous(memory_format=torch.channels_last),
        "transposed": logits.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "every other": torch.stack([logits.detach()] * 2, -1)[..., 1],
        "Parameter": torch.nn.Parameter(logits.detach().clone()),
    }
    for name, layout in layouts.items():
        x = layout.requires_grad_()
        loss = ours.cross_entropy(x, target)
        (found,) = torch.autograd.grad(loss, x)
        assert loss == expected, name
        assert torch.equal(found, gradient), name
        if name in ("channels last", "transposed"):
            assert found.stride() == x.stride()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = ours.cross_entropy(logits, target)
            assert loss == expected
            assert not loss.requires_grad
            assert ours.cross_entropy(logits * 1, target) == expected


def test_weights_that_require_grad_are_refused_however_the_call_comes():
    logits, target, weight = torch.randn(3, 5, requires_grad=True), torch.rand(3, 5), torch.ones(5, requires_grad=True)
    with FlopCounterMode(display=False), pytest.raises(RuntimeError, match="derivative for 'weight'"):
        ours.cross_entropy(logits, target, weight)
    with pytest.raises(Exception, match="derivative for 'weight'"):
        torch.compile(ours.cross_entropy, fullgraph=True, backend="aot_eager")(logits, target, weight)


def test_in_place_with_the_negative_bit():
    z = torch.randn(3, 5, dtype=torch.complex64, requires_grad=True)
    x, target = torch.imag(torch.conj(z)), torch.tensor([0, 1, 2])
    assert x.is_neg()
    expected = torch.autograd.grad(F.cross_entropy(x, target), z, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours.cross_entropy(x, target, inplace_backward=True), z), expected)


def test_negative_bit():
    x = torch.imag(torch.conj(torch.randn(3, 5, dtype=torch.complex64)))
    assert x.is_neg()
    torch.testing.assert_close(ours.cross_entropy(x, torch.tensor([0, 1, 2])), F.cross_entropy(x, torch.tensor([0, 1, 2])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_what_pytorch_gives(generator, dtype):
    logits, target, _ = problem(generator, "index", False, (8, 5), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = both(ours.cross_entropy, F.cross_entropy, [logits, target])
        log_probs = logits.detach().float().log_softmax(1).to(dtype).requires_grad_()
        of_log_probs = both(ours.nll_loss, F.nll_loss, [log_probs, target])
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype in HALVES else {}
    assert_equal(found, **tolerance)
    assert_equal(of_log_probs, **tolerance)


def test_errors_come_before_anything_else():
    logits, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds. \(target\[1\]"):
        ours.cross_entropy(logits, torch.tensor([0, 5, 2]))
    with pytest.raises(TypeError, match=r"input must be a torch.Tensor, got ndarray"):
        ours.cross_entropy(np.zeros((3, 5)), target)
    with pytest.raises(TypeError, match=r"target must be a torch.Tensor, got list"):
        ours.cross_entropy(logits, [0, 1, 2])
    with pytest.raises(RuntimeError, match="the derivative for 'weight' is not implemented"):
        ours.cross_entropy(logits, target, torch.ones(5, requires_grad=True))
    with pytest.raises(ValueError, match="foo is not a valid value for reduction"):
        ours.cross_entropy(logits, target, reduction="foo")
    with pytest.raises(TypeError, match="Sparse layout"):
        ours.cross_entropy(torch.randn(3, 5).to_sparse(), target)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        assert ours.cross_entropy(logits, target, size_average=False) == ours.cross_entropy(logits, target, reduction="sum")
    assert logits.grad is None


# Autograd


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
    assert torch.autograd.gradgradcheck(lambda x: ours.nll_loss(x * x, target, weight, reduction=reduction), [logits])


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
def test_every_way_to_a_gradient_has_the_bits_of_numpys(generator, monkeypatch, dtype, kind, reduction, shape):
    """Made with the loss, made from its state for another upstream gradient, and made again."""
    logits, target, weight = problem(generator, kind, True, shape, dtype)

    def numpy(tensor):
        return ours._array(tensor.detach())

    for early, upstream in itertools.product([True, False], [1.0, 0.25, 3.7]):
        monkeypatch.setattr(ours, "_made_early", early)
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


@pytest.fixture
def calls(monkeypatch):
    """The names of the entries of _call that were called."""
    found = []
    entries = ours._call

    class Recording:
        def __getattr__(self, name):
            entry = getattr(entries, name)
            if not name.startswith(("cross_entropy", "nll")):
                return entry
            return lambda *a, **k: found.append(name) or entry(*a, **k)

    monkeypatch.setattr(ours, "_call", Recording())
    return found


def test_gradients_are_made_early_while_the_upstream_gradient_is_one(calls):
    logits, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])

    def step(factor):
        calls.clear()
        (ours.cross_entropy(logits, target) * factor).backward()
        return [name.removeprefix("cross_entropy_") for name in calls]

    assert step(1) == ["with_grad"]
    assert step(0.5) == ["with_grad", "with_grad"]
    assert step(0.5) == ["with_state", "gradient"]  # it has learned
    assert step(1) == ["with_state", "gradient"]
    assert step(1) == ["with_grad"]


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
    ours._made_early = True
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
    assert loss.grad_fn.made.read == ()


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


# torch.compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of opcheck's own
def test_operators_keep_pytorchs_rules(generator):
    for kind, reduction, shape in itertools.product(["index", "soft"], ["none", "mean"], [(4, 5), (2, 5, 3)]):
        logits, target, weight = problem(generator, kind, True, shape, torch.float32)
        options = (reduction, -100, 0.1, False)
        torch.library.opcheck(ours._cross_entropy_op, (logits, target, weight, *options))
        loss, state = ours._cross_entropy_op(logits, target, weight, *options)
        g = torch.rand_like(loss)
        torch.library.opcheck(ours._backward_op, (g, logits, target, weight, state, *options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_function(generator, dtype):
    logits, target, weight = problem(generator, "index", True, (4, 5), dtype)

    def loss(x, t):
        return ours.cross_entropy(x * 2, t, weight, label_smoothing=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_equal(both(compiled, loss, [logits, target]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(logits, target).dtype == loss(logits, target).dtype


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_model_trains(generator):
    images = torch.randn(64, 20, generator=generator)
    target = images[:, :10].argmax(1)
    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        criterion = ours.CrossEntropyLoss()

        def loss_of(x, t, model=model, criterion=criterion):
            return criterion(model(x), t)

        step = torch.compile(loss_of, fullgraph=True) if compiled else loss_of
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = step(images, target)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses[compiled] = curve
    assert losses[True][-1] < losses[True][0] / 2
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-4)


def test_traced_function_calls_the_operator(generator):
    logits, target, _ = problem(generator, "index", False, (4, 5))
    traced = torch.jit.trace(lambda x: ours.cross_entropy(x, target), logits.detach(), check_trace=False)
    assert "pyx_xent::cross_entropy" in str(traced.graph)
    assert traced(2 * logits.detach()) == ours.cross_entropy(2 * logits, target)


# Memory


def test_inplace_backward(generator):
    target = torch.randint(50, (8,), generator=generator)
    x = torch.randn(8, 20, generator=generator, requires_grad=True)
    w = torch.randn(20, 50, generator=generator, requires_grad=True)
    expected = torch.autograd.grad(ours.cross_entropy(x @ w, target), [x, w])
    logits = x @ w
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss = ours.cross_entropy(logits, target, inplace_backward=True)
    found = torch.autograd.grad(loss, [x, w], retain_graph=True)
    assert all(map(torch.equal, found, expected))
    assert seen == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, [x, w])
    soft = torch.rand(8, 50, generator=generator, requires_grad=True)
    expected_soft = torch.autograd.grad(ours.cross_entropy(x @ w, soft), [x, w, soft])
    loss = ours.cross_entropy(x @ w, soft, inplace_backward=True)
    assert all(map(torch.equal, torch.autograd.grad(loss, [x, w, soft]), expected_soft))
    criterion = ours.CrossEntropyLoss(inplace_backward=True)
    assert all(map(torch.equal, torch.autograd.grad(criterion(x @ w, target), [x, w]), expected))


def test_inplace_backward_raises_where_the_logits_are_needed(generator):
    target = torch.randint(50, (8,), generator=generator)
    x = torch.randn(8, 50, generator=generator, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        ours.cross_entropy(x, target, inplace_backward=True)
    loss = ours.cross_entropy(x.tanh(), target, inplace_backward=True)  # tanh's derivative needs its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = ours.cross_entropy(x * 1, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, x, create_graph=True)
    one_row = torch.randn(1, 50, requires_grad=True)
    loss = ours.cross_entropy(one_row.expand(8, 50), target, inplace_backward=True)
    with pytest.raises(ValueError, match="overlap"):
        loss.backward()


def test_memory_of_large_gradients_is_used_again_when_free(generator):
    target = torch.randint(30000, (64,), generator=generator)
    logits = torch.randn(64, 30000, generator=generator, requires_grad=True)

    def gradient():
        return torch.autograd.grad(ours.cross_entropy(logits, target), logits)[0]

    first = gradient()
    place, kept = first.data_ptr(), first.clone()
    second = gradient()
    assert second.data_ptr() != place  # the first is still there
    assert torch.equal(first, kept)
    kept = second[3:5].clone()
    view = second[3:5].numpy()
    place = second.data_ptr()
    del second
    assert gradient().data_ptr() != place  # a view is
    assert np.array_equal(view, kept.numpy())
    third = gradient()
    place = third.data_ptr()
    del third
    assert gradient().data_ptr() == place
    try:
        ours.reuse_gradients(0)
        assert _memory.kept_bytes() == 0
        gradient()
        assert _memory.kept_bytes() == 0
    finally:
        ours.reuse_gradients(512 << 20)
    for wrong in (-1, 1.5, None):
        with pytest.raises(ValueError, match="max_bytes"):
            ours.reuse_gradients(wrong)


def test_large_gradients_are_laid_out_like_the_logits(generator):
    logits = torch.randn(4, 21, 128, 128, generator=generator).contiguous(memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(21, (4, 128, 128), generator=generator)
    (gradient,) = torch.autograd.grad(ours.cross_entropy(logits, target), logits)
    assert gradient.stride() == logits.stride()
    torch.testing.assert_close(gradient, torch.autograd.grad(F.cross_entropy(logits, target), logits)[0])


def test_forward_and_backward_allocate_one_gradient():
    pytest.importorskip("pytest_benchmark")
    from benchmarks import cases, memory, peers

    if memory.resident("VmHWM") is None:
        pytest.skip("the system does not tell how much memory a process has")
    case = cases.Case((2048, 20000), "a gradient of 164 MB: what a process takes otherwise is less than 1 % of it")
    found = memory.measure(case, cases.GRADIENT, peers.TORCH_OURS, 1)
    assert 0.8 * case.logits_bytes < found <= 1.02 * case.logits_bytes  # less where something is used again


# Threads


def test_threads_follow_pytorchs(monkeypatch):
    asked = []
    monkeypatch.setattr(_threads, "limited", lambda num_threads, nanoseconds: asked.append(num_threads) or 1)
    logits, target = torch.zeros(100, 1000), torch.zeros(100, dtype=torch.int64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours.cross_entropy(logits, target)
    finally:
        torch.set_num_threads(before)
    assert asked == [2]  # where one is allowed, there is nothing to ask


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("first", ["torch", "pyx_xent"])
def test_one_openmp_runtime_for_both(first):
    if px.show_config()["openmp"] == 0:
        pytest.skip("built without OpenMP")
    code = (
        f"import {first}, torch, pyx_xent.torch\n"
        "torch.set_num_threads(2)\n"
        "pyx_xent.torch.cross_entropy(torch.zeros(512, 1000), torch.zeros(512, dtype=torch.int64))\n"
        "torch.mm(torch.ones(500, 500), torch.ones(500, 500))\n"
        "print(pyx_xent.show_config()['openmp_library'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.count("libgomp") == 1, result.stdout


def test_many_threads_at_once(generator):
    logits = [torch.randn(64, 500, generator=generator, requires_grad=True) for _ in range(4)]
    target = torch.randint(500, (64,), generator=generator)
    expected = [torch.autograd.grad(ours.cross_entropy(x, target), x)[0] for x in logits]
    failed = []

    def work(k):
        for _ in range(50):
            if not torch.equal(torch.autograd.grad(ours.cross_entropy(logits[k], target), logits[k])[0], expected[k]):
                failed.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# Modules


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss"])
def test_modules_are_pytorchs(name):
    theirs = getattr(torch.nn, name)(torch.tensor([1.0, 2.0, 3.0]), ignore_index=1, reduction="sum")
    module = getattr(ours, name)(torch.tensor([1.0, 2.0, 3.0]), ignore_index=1, reduction="sum")
    assert isinstance(module, getattr(torch.nn, name))
    assert repr(module) == repr(theirs)
    assert module.state_dict().keys() == theirs.state_dict().keys() == {"weight"}
    module.load_state_dict({"weight": torch.tensor([3.0, 2.0, 1.0])})
    log_probs, target = torch.randn(4, 3).log_softmax(1), torch.tensor([0, 1, 2, 2])
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(copied(log_probs, target), module(log_probs, target))
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(log_probs, target), theirs(log_probs, target))
    assert module.double().weight.dtype == torch.float64


# Patching


def test_patch_routes_functions_modules_and_gives_them_back(calls):
    theirs = F.cross_entropy, F.nll_loss
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    expected = [F.cross_entropy(logits, target), F.nll_loss(logits, target)]
    assert calls == []
    patch = ours.patch()
    assert "active" in repr(patch)
    assert "torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss" in repr(patch)
    found = [torch.nn.CrossEntropyLoss()(logits, target), torch.nn.NLLLoss()(logits, target)]
    assert len(calls) == 2
    torch.testing.assert_close(found, expected)
    ours.patch()
    ours.unpatch()
    ours.unpatch()
    assert (F.cross_entropy, F.nll_loss) == theirs
    assert "taken back; routed to pyx_xent: nothing" in repr(patch)
    with pytest.raises(IndexError), ours.patch():
        F.cross_entropy(logits, target + 3)
    assert (F.cross_entropy, F.nll_loss) == theirs


def test_patches_of_threads_overlap():
    theirs = F.cross_entropy
    first, second = ours.patch(), ours.patch()
    with first:
        pass
    assert F.cross_entropy is not theirs
    with second:
        pass
    assert F.cross_entropy is theirs


def test_patch_leaves_to_pytorch_what_is_not_plain(calls):
    class Sub(torch.Tensor):
        pass

    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with ours.patch():
        assert isinstance(F.cross_entropy(logits.as_subclass(Sub), target), Sub)
        assert F.cross_entropy(torch.empty(3, 5, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")).is_meta
        torch.func.grad(lambda x: F.cross_entropy(x, target))(logits)
        torch.func.vmap(lambda x: F.cross_entropy(x, target))(logits.expand(2, 3, 5))
        torch.compile(F.cross_entropy, fullgraph=True, backend="aot_eager")(logits, target)
        torch.jit.trace(lambda x: F.cross_entropy(x, target), logits, check_trace=False)
        torch.jit.script(torch.nn.CrossEntropyLoss())(logits, target)
        with torch.autograd.forward_ad.dual_level():
            F.cross_entropy(torch.autograd.forward_ad.make_dual(logits, logits), target)
        F.cross_entropy(logits, logits.softmax(1), torch.ones(5, requires_grad=True)).backward()
        with FlopCounterMode(display=False):
            F.cross_entropy(logits, target)
        assert calls == []
        F.cross_entropy(logits, target)
        assert len(calls) == 1


def test_patched_functions_pass_positional_and_legacy_arguments(calls):
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    expected = F.cross_entropy(logits, target, None, None, 1, None, "sum", 0.1)
    with ours.patch():
        torch.testing.assert_close(F.cross_entropy(logits, target, None, None, 1, None, "sum", 0.1), expected)
        torch.testing.assert_close(
            F.cross_entropy(input=logits, target=target, ignore_index=1, reduction="sum", label_smoothing=0.1), expected
        )
    assert len(calls) == 2
