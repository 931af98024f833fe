"""SPEC S40, S41: what pyx_xent.torch has beside PyTorch's arguments, against NumPy's functions. Skipped without torch."""

import importlib
import itertools

import numpy as np
import pytest

import pyx_xent as px

torch = pytest.importorskip("torch")
ours = importlib.import_module("pyx_xent.torch")
ROWS, CLASSES, WIDTH = 6, 5, 4
EXTRAS = [
    {"z_loss": 0.1},
    {"normalizer": 3.0},
    {"sample_weight": [1.0, 0.5, 2.0, 0.0, 1.0, 0.25]},
    {"sample_weight": [1.0, 0.5, 2.0, 0.0, 1.0, 0.25], "normalizer": 3.0, "z_loss": 0.01, "label_smoothing": 0.1},
    {"loss_dtype": "float64", "empty": "zero"},
    {"focal_gamma": 2.0},
    {"focal_gamma": 1.5, "z_loss": 0.1, "sample_weight": [1.0, 0.5, 2.0, 0.0, 1.0, 0.25]},
]


def with_extras(*kinds):
    """Of a test, each kind of call with the extras that it has."""
    cases = {
        f"{kind}-{'-'.join(extras)}": (kind, extras)
        for kind, extras in itertools.product(kinds, EXTRAS)
        if not (kind == "soft" and "focal_gamma" in extras)
    }
    return pytest.mark.parametrize(("kind", "extras"), cases.values(), ids=cases)


def problem(kind, dtype=torch.float64):
    generator = torch.Generator().manual_seed(20261129)
    logits = (3 * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    if kind == "soft":
        return logits, torch.rand(ROWS, CLASSES, generator=generator, dtype=torch.float64).to(dtype)
    return logits, torch.tensor([0, 4, -100, 2, 1, 3])


def as_torch(extras):
    found = dict(extras)
    if "sample_weight" in found:
        found["sample_weight"] = torch.tensor(found["sample_weight"])
    if "loss_dtype" in found:
        found["loss_dtype"] = getattr(torch, found["loss_dtype"])
    return found


def as_numpy(extras):
    return {name: np.array(value) if name == "sample_weight" else value for name, value in extras.items()}


@pytest.mark.spec("S40", "S41")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@with_extras("index", "soft", "log_probs", "linear")
@pytest.mark.filterwarnings("ignore")
def test_extras_give_what_numpys_functions_give(kind, extras, compiled):
    nll = kind == "log_probs"
    extras = {n: v for n, v in extras.items() if not (nll and n in ("z_loss", "label_smoothing", "focal_gamma"))}
    for dtype, upstream in itertools.product((torch.float32, torch.float64), (1.0, 0.25)):
        logits, target = problem(kind, dtype)
        layer = torch.eye(CLASSES, dtype=dtype)
        function = {
            "log_probs": lambda x, target: ours.nll_loss(x, target, **as_torch(extras)),
            "linear": lambda x, target, layer=layer: ours.linear_cross_entropy(x, layer, target, **as_torch(extras)),
        }.get(kind, lambda x, target: ours.cross_entropy(x, target, **as_torch(extras)))
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        loss = function(logits, target)
        (loss * upstream).backward()
        theirs = px.nll_loss_with_grad if nll else px.cross_entropy_with_grad
        expected, gradient = theirs(logits.detach().numpy(), target.numpy(), grad_output=upstream, **as_numpy(extras))
        assert loss.dtype == (torch.float64 if "loss_dtype" in extras else dtype)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {}
        torch.testing.assert_close(loss.detach(), torch.tensor(expected), **tolerance)
        torch.testing.assert_close(logits.grad, torch.from_numpy(gradient), **tolerance)


@pytest.mark.spec("S41")
@with_extras("index", "soft")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_extras_are_differentiated_twice(kind, reduction, extras):
    if reduction != "mean":
        extras = {name: value for name, value in extras.items() if name != "normalizer"}
    logits, target = problem(kind)
    inputs = (logits, target.requires_grad_()) if kind == "soft" and not extras.get("z_loss") else (logits,)

    def loss(x, y=target):
        return ours.cross_entropy(
            x, y, weight=torch.arange(1.0, 6.0, dtype=torch.float64), reduction=reduction, **as_torch(extras)
        )

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.spec("S24", "S28")
@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_rows_that_do_not_count_have_gradients_of_zero(kind, empty):
    logits, target = problem(kind)
    inputs = [logits] if kind == "index" else [logits, target.requires_grad_()]
    loss = ours.cross_entropy(logits, target, sample_weight=torch.zeros(ROWS), empty=empty)
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    again = torch.autograd.grad(sum(g.sum() for g in gradients), inputs, allow_unused=True)
    assert not any(g.any() for g in (*gradients, *again) if g is not None)


@pytest.mark.spec("S40")
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_losses_of_half_types_are_rounded_once(dtype, bits, reduction):
    exact = 1 + 2.0**-bits + 2.0**-40  # halfway, and a bit that float32 has not
    extras = {"normalizer": 1 / exact} if reduction == "mean" else {"sample_weight": torch.tensor([exact], dtype=torch.float64)}
    loss = ours.nll_loss(torch.full((1, 2), -1.0, dtype=dtype), torch.tensor([0]), reduction=reduction, **extras)
    assert loss.dtype == dtype
    assert loss.item() == 1 + 2.0 ** (1 - bits)


@pytest.mark.spec("S41")
def test_modules_take_extras():
    logits, target = problem("index", torch.float32)
    of_call = {"sample_weight": torch.rand(ROWS), "normalizer": torch.tensor(3.0)}
    for module, function, options in (
        (ours.CrossEntropyLoss, ours.cross_entropy, {"z_loss": 0.1, "empty": "zero", "loss_dtype": torch.float64}),
        (ours.NLLLoss, ours.nll_loss, {"empty": "zero", "loss_dtype": torch.float64}),
    ):
        assert module(**options)(logits, target, **of_call) == function(logits, target, **options, **of_call)
        ignored = torch.full_like(target, -100)
        assert module(**options)(logits, ignored) == 0
        assert function(logits, ignored).isnan()
        with pytest.raises(ValueError, match="no row to average"):
            function(logits, ignored, empty="raise")
    linear = ours.LinearCrossEntropyLoss(CLASSES, CLASSES, z_loss=0.1, empty="zero", loss_dtype=torch.float64)
    found = linear(logits, target, **of_call)
    expected = ours.linear_cross_entropy(
        logits, linear.linear.weight, target, z_loss=0.1, empty="zero", loss_dtype=torch.float64, **of_call
    )
    assert found == expected
    assert found.dtype is torch.float64
    found.backward()
    assert linear.linear.weight.grad.dtype is torch.float32


@pytest.mark.spec("S40")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_loss_dtype(dtype):
    logits, target = problem("index", dtype)
    for wide in (torch.float32, torch.float64):
        loss = ours.cross_entropy(logits, target, loss_dtype=wide, reduction="none")
        assert loss.dtype is wide
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.to(wide), target, reduction="none"))
    with pytest.raises(ValueError, match="may not narrow"):
        ours.cross_entropy(logits.double(), target, loss_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"loss_dtype must be None, torch\.float32 or torch\.float64"):
        ours.cross_entropy(logits, target, loss_dtype=torch.int64)
