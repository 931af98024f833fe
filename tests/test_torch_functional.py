"""pyx_xent.torch's functions against PyTorch's: its own samples, values, dtypes, errors. Skipped without torch."""

import itertools
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from helpers_torch import DTYPES, HALVES, F, FlopCounterMode, assert_equal, both, operator, ours, problem  # noqa: E402


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


@pytest.mark.parametrize("dtype", [getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)])
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


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    "name", ["reduction", "label_smoothing", "ignore_index", "z_loss", "empty", "loss_dtype", "normalizer"]
)
def test_lists_are_no_options(name, requires_grad):
    logits, target = torch.randn(3, 5, requires_grad=requires_grad), torch.tensor([0, 1, 2])
    with pytest.raises((TypeError, ValueError), match=rf"{name}.*\[\]|\[\].*{name}|{name}.*list"):
        ours.cross_entropy(logits, target, **{name: []})


@pytest.mark.parametrize(("name", "value"), [("label_smoothing", 0.1), ("z_loss", 0.1), ("ignore_index", 1)])
def test_arrays_of_one_number_are_options(name, value):
    found = []
    for given in (value, np.array(value)):
        logits = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        loss = ours.cross_entropy(logits, torch.tensor([0, 1, 2]), **{name: given})
        loss.backward()
        found.append((loss.detach(), logits.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)


LOGITS, LABELS = torch.zeros(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(("arguments", "options", "message"), [
    ((LOGITS.long(), LABELS), {}, "input must be float32, float64, float16 or bfloat16, got int64"),
    ((LABELS, LOGITS), {}, "input must be float32, float64, float16 or bfloat16, got int64: was target given first?"),
    ((LOGITS.to(torch.float8_e5m2), LABELS), {}, "torch.float8_e5m2 is not supported, use float32, float64"),
    ((LOGITS[0], torch.tensor([0, 1, 0])), {}, "Binary logits x are rows of two, torch.stack([0 * x, x], 1)"),
    ((LOGITS, LOGITS[:, 0] * torch.nan), {}, "got float32: target[0] is nan"),
    ((LOGITS, F.one_hot(LABELS, 3)), {}, "one-hot labels are of a floating dtype, or indices, target.argmax(1)"),
    ((LOGITS, LABELS[:, None]), {}, "Expected target size (2,), got (2, 1): target.squeeze(-1) has it"),
    ((torch.zeros(2, 5, 3), torch.zeros(2, 5).long()), {}, "class axis is 1; input.movedim(-1, 1), if it is the last"),
    ((LOGITS, LABELS), {"weight": [1, 2, 3]}, "weight must be a torch.Tensor, got list"),
    ((LOGITS, LABELS), {"sample_weight": np.ones(2)}, "sample_weight must be a torch.Tensor, got ndarray"),
])  # fmt: skip
@pytest.mark.parametrize("requires_grad", [False, True])
def test_common_mistakes_are_named(arguments, options, message, requires_grad):
    if requires_grad and arguments[0].is_floating_point():
        arguments = (arguments[0].clone().requires_grad_(), arguments[1])
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        ours.cross_entropy(*arguments, **options)


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
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        ours.cross_entropy(torch.randn(3, 5).to_sparse(), target)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        assert ours.cross_entropy(logits, target, size_average=False) == ours.cross_entropy(logits, target, reduction="sum")
    assert logits.grad is None
