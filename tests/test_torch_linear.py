"""pyx_xent.torch.linear_cross_entropy against PyTorch's linear layer and cross-entropy. Skipped without torch."""

import gc
import importlib
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ours = importlib.import_module("pyx_xent.torch")
from helpers_torch import DTYPES, F, FlopCounterMode, assert_equal, both, operator  # noqa: E402

from pyx_xent.torch._options import Options  # noqa: E402

CLASSES, WIDTH, ROWS = 37, 5, 12
SMALL = 4 * CLASSES * 8  # bytes: chunks of some rows


def problem(generator, dtype=torch.float64, rows=(ROWS,), soft=False, bias=True):
    """input, linear_weight, linear_bias, all of which require grad, and the target"""

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden, linear_weight, linear_bias = normal(*rows, WIDTH), normal(CLASSES, WIDTH), normal(CLASSES) if bias else None
    if soft:
        return (
            hidden,
            linear_weight,
            linear_bias,
            torch.rand((*rows, CLASSES), generator=generator, dtype=torch.float64).to(dtype),
        )
    target = torch.randint(CLASSES, rows, generator=generator)
    if target.numel() > 2:
        target.view(-1)[1] = -100
    return hidden, linear_weight, linear_bias, target


def explicit(hidden, linear_weight, linear_bias, target, logit_scale=1.0, softcap=None, shift=False, **options):
    """By PyTorch, from logits."""
    logits = F.linear(hidden, linear_weight, linear_bias) * logit_scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if shift:
        logits, target = logits[..., :-1, :], target[..., 1:]
    if logits.dim() > 2:
        logits = logits.movedim(-1, 1)
    return F.cross_entropy(logits, target, **options)


def fused(hidden, linear_weight, linear_bias, target, **options):
    return ours.linear_cross_entropy(hidden, linear_weight, target, linear_bias=linear_bias, **{"chunk_bytes": SMALL} | options)


# PyTorch's own samples


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["", "chunked", "chunked_none"])
@pytest.mark.filterwarnings("ignore")  # of PyTorch's: options without effect
def test_samples_of_the_operator_database(dtype, variant):
    op, count = operator("linear_cross_entropy", variant), 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        weight, target = sample.args
        target = target.detach()
        kwargs = {k: v.detach() if k == "weight" else v for k, v in sample.kwargs.items()}
        bias = kwargs.pop("linear_bias", None)

        def call(f, kwargs=kwargs, target=target):
            return lambda x, w, b: f(x, w, target, linear_bias=b, **kwargs)

        found = both(call(ours.linear_cross_entropy), call(F.linear_cross_entropy), [sample.input, weight, bias])
        # With its options, PyTorch multiplies halves in float32.
        assert_equal(found, **({"rtol": 0.1, "atol": 0.1} if dtype.itemsize == 2 else {}))
        count += 1
    assert count == {"": 119, "chunked": 133, "chunked_none": 77}[variant] or dtype.itemsize == 2


def test_error_samples_of_the_operator_database():
    samples = list(operator("linear_cross_entropy").error_inputs("cpu"))
    assert len(samples) == 6
    for error in samples:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            ours.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.filterwarnings("ignore")
def test_samples_of_the_module_database():
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import module_db

    module, count = next(m for m in module_db if m.name == "nn.LinearCrossEntropyLoss"), 0
    for sample in module.module_inputs_func(module, "cpu", torch.float64, requires_grad=True, training=True):
        arguments, inputs = sample.constructor_input, sample.forward_input
        criterion = ours.LinearCrossEntropyLoss(*arguments.args, **arguments.kwargs)
        theirs = torch.nn.LinearCrossEntropyLoss(*arguments.args, **arguments.kwargs)
        theirs.load_state_dict(criterion.state_dict())
        torch.testing.assert_close(criterion(*inputs.args), theirs(*inputs.args))
        count += 1
    assert count > 5


# Values and gradients


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_option_gives_what_logits_give(generator, dtype, soft, reduction):
    class_weight = torch.rand(CLASSES, generator=generator, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for bias, weighted, smoothing, capped in itertools.product([False, True], repeat=4):
        inputs = problem(generator, dtype, soft=soft, bias=bias)
        options = {
            "reduction": reduction, "weight": class_weight if weighted else None, "label_smoothing": 0.2 * smoothing,
        } | ({"logit_scale": 0.7, "softcap": 3.0} if capped else {})  # fmt: skip
        found = both(lambda *a, o=options: fused(*a, **o), lambda *a, o=options: explicit(*a, **o), inputs)
        assert_equal(found, **tolerance)


@pytest.mark.parametrize("rows", [(3, 6), (6,), (2, 2, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_shifted_targets(generator, rows, reduction):
    inputs = problem(generator, rows=rows)
    options = {"shift": True, "reduction": reduction}
    assert_equal(both(lambda *a: fused(*a, **options), lambda *a: explicit(*a, **options), inputs))
    with pytest.raises(ValueError, match="shift=True needs"):
        fused(*inputs[:3], inputs[3][..., 1:], shift=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_hardly_farther_off_than_pytorchs(generator, dtype):
    # A product of bfloat16 comes rounded, and is rounded again after the sum of the chunks and the upstream gradient.
    hidden = torch.randn(300, 64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(1000, 64, generator=generator).mul(0.2).to(dtype).requires_grad_()
    target = torch.randint(1000, (300,), generator=generator)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = F.cross_entropy(F.linear(*wide), target)
    exact.backward()
    for chunk_bytes in (100 * 1000 * 2, 1 << 26):
        (out, gradients), (other, other_gradients) = both(
            lambda h, w, size=chunk_bytes: ours.linear_cross_entropy(h, w, target, chunk_bytes=size),
            lambda h, w: F.cross_entropy(F.linear(h, w), target),
            [hidden, weight],
        )
        assert out.dtype == dtype
        assert abs(out.double() - exact) <= abs(other.double() - exact)
        g = torch.rand((), generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype).double()
        for gradient, other_gradient, reference in zip(gradients, other_gradients, wide, strict=True):
            error, other_error = [(v.double() - g * reference.grad).norm() for v in (gradient, other_gradient)]
            assert error <= (1.5 if dtype is torch.bfloat16 else 1.0) * other_error


def test_memory_layouts(generator):
    inputs = problem(generator)
    expected = both(fused, explicit, inputs)
    for layout in (lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], -1)[..., 0]):
        changed = [layout(t.detach()).requires_grad_() if t.dim() == 2 else t for t in inputs]
        out = fused(*changed)
        gradients = torch.autograd.grad(
            out, changed[:3], torch.rand((), generator=torch.Generator().manual_seed(3), dtype=out.dtype)
        )
        torch.testing.assert_close((out, *gradients), (expected[0][0], *expected[0][1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(generator, dtype):
    inputs = [t.float().detach().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in problem(generator)]
    with torch.autocast("cpu", torch.bfloat16 if dtype in DTYPES[:2] else dtype):
        found = both(fused, explicit, inputs)
    assert found[0][0].dtype == found[1][0].dtype == torch.float32
    assert [g.dtype for g in found[0][1]] == [torch.float32] * 3
    assert_equal(found, rtol=2e-2, atol=2e-2)


# Autograd


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_gradcheck_and_gradgradcheck(generator, reduction, soft):
    hidden, linear_weight, linear_bias, target = problem(generator, rows=(3,), soft=soft)
    target = target[:3]

    def f(*tensors):
        return fused(*tensors, target, reduction=reduction, softcap=2.0, label_smoothing=0.1)

    assert torch.autograd.gradcheck(f, (hidden, linear_weight, linear_bias))
    assert torch.autograd.gradgradcheck(f, (hidden, linear_weight, linear_bias))


@pytest.mark.parametrize("options", [{"softcap": 1e39}, {"softcap": -1.0}, {"logit_scale": 1e39}, {"chunk_bytes": 0}], ids=str)
@pytest.mark.parametrize("way", ["fused", "logits", "torch.func"])
def test_options_are_checked_whichever_way_is_taken(options, way):
    hidden, layer = torch.randn(3, 5), torch.randn(4, 5)
    target = torch.rand(3, 4).requires_grad_() if way == "logits" else torch.tensor([0, 1, 2])

    def loss(x):
        return ours.linear_cross_entropy(x, layer, target, **options)

    with pytest.raises(ValueError, match=next(iter(options))):
        torch.func.grad(loss)(hidden) if way == "torch.func" else loss(hidden)


@pytest.mark.parametrize(("changed", "message"), [
    ({"input": np.zeros((3, 5))}, "input must be a torch.Tensor, got ndarray"),
    ({"linear_weight": None}, "linear_weight must be a torch.Tensor, got NoneType"),
    ({"target": [0, 1, 2]}, "target must be a torch.Tensor, got list"),
    ({"linear_bias": [0.0] * 4}, "linear_bias must be a torch.Tensor, got list"),
    ({"weight": np.ones(4)}, "weight must be a torch.Tensor, got ndarray"),
])  # fmt: skip
def test_what_is_no_tensor_is_named(changed, message):
    arguments = {"input": torch.zeros(3, 5), "linear_weight": torch.zeros(4, 5), "target": torch.tensor([0, 1, 2])} | changed
    with pytest.raises(TypeError, match=message):
        ours.linear_cross_entropy(**arguments)


def test_probabilities_that_require_grad(generator):
    inputs = problem(generator, soft=True)
    inputs[3].requires_grad_()
    assert_equal(both(fused, explicit, inputs))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_second_backward_gives_the_same_gradients(generator, reduction):
    hidden, weight, bias, target = problem(generator)
    out = fused(hidden, weight, bias, target, reduction=reduction)
    g = torch.ones_like(out)
    first, second = [torch.autograd.grad(out, (hidden, weight, bias), g, retain_graph=True) for _ in range(2)]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.autograd.grad(out, (hidden, weight, bias), g)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, (hidden, weight, bias), g)


def test_changing_factors_scale_the_gradients(generator):
    inputs = problem(generator)
    for factor in (1.0, 1.0, 0.25, 0.25, -3.0, 0.0, 1e-3):
        found = both(
            lambda *a, k=factor: k * fused(*a, reduction="sum"), lambda *a, k=factor: k * explicit(*a, reduction="sum"), inputs
        )
        assert_equal(found)


def test_gradients_of_scaled_float16_do_not_vanish(generator):
    hidden, weight, _, target = problem(generator, torch.float16)
    scale, tiny = 2.0**16, 1e-9
    for _ in range(2):
        (fused(hidden, weight, None, target).float() * tiny * scale).backward()
        expected = torch.autograd.grad(explicit(hidden.float(), weight.float(), None, target) * tiny * scale, (hidden, weight))
        torch.testing.assert_close(hidden.grad, expected[0], rtol=2e-2, atol=1e-6)
        assert hidden.grad.count_nonzero() > 40
        hidden.grad = weight.grad = None


def test_only_what_requires_grad_is_computed(generator, monkeypatch):
    from pyx_xent import linear

    wanted = []
    finished = linear.Gradients.finished
    monkeypatch.setattr(linear.Gradients, "finished", lambda self: (wanted.append(set(self.arrays)), finished(self))[1])
    tensors = problem(generator)
    names = dict(zip(linear.GRADIENTS, tensors[:3], strict=True))
    for kept in (set(names), {"hidden"}, {"linear_weight"}, {"linear_bias", "hidden"}):
        for name, tensor in names.items():
            tensor.requires_grad_(name in kept)
        fused(*tensors).backward()
        assert wanted.pop() == kept
    with torch.no_grad():
        fused(*tensors)
    assert not wanted


def test_changed_tensors_raise(generator):
    for k in range(4):
        tensors = problem(generator)
        out = fused(*tensors)
        with torch.no_grad():
            tensors[k].add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_class_weights_that_require_grad_are_refused(generator):
    with pytest.raises(RuntimeError, match="derivative for 'weight'"):
        fused(*problem(generator), weight=torch.ones(CLASSES, dtype=torch.float64, requires_grad=True))


def test_a_kept_loss_keeps_no_gradients(generator):
    tensors = problem(generator, bias=False)
    loss = fused(*tensors)
    loss.backward()
    shapes = {tuple(t.shape) for t in tensors[:2]}
    for tensor in tensors[:2]:
        tensor.grad = None
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and tuple(o.shape) in shapes and not o.requires_grad]
    assert not alive
    assert loss.item() > 0


def test_saved_tensor_hooks(generator):
    inputs, stored = problem(generator), []

    def hooked(*tensors):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: stored.append(t.clone()) or len(stored) - 1, lambda k: stored[k]
        ):
            return fused(*tensors)

    assert_equal(both(hooked, explicit, inputs))
    assert stored
    assert_equal(both(lambda *a: torch.utils.checkpoint.checkpoint(fused, *a, use_reentrant=False), explicit, inputs))


# Several outputs, torch.func, modes, torch.compile


def test_several_outputs_a_class(generator):
    hidden, _, _, _ = problem(generator)
    weight = torch.randn(CLASSES, 2, 3, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(CLASSES, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(CLASSES, (ROWS, 2, 3), generator=generator)
    for reduction in ("none", "mean"):
        call = [
            lambda h, w, b, f=f, r=reduction: f(h, w, target, linear_bias=b, reduction=r)
            for f in (ours.linear_cross_entropy, F.linear_cross_entropy)
        ]
        assert_equal(both(*call, [hidden, weight, bias]))


def test_torch_func_and_forward_mode(generator):
    hidden, weight, bias, target = (t.detach() for t in problem(generator))
    for transform in (torch.func.grad, torch.func.jacfwd):
        torch.testing.assert_close(
            transform(lambda w: fused(hidden, w, bias, target))(weight),
            transform(lambda w: explicit(hidden, w, bias, target))(weight),
        )


def test_modes_see_the_products(generator):
    tensors = problem(generator, bias=False)
    with FlopCounterMode(display=False) as found:
        fused(*tensors)
    with FlopCounterMode(display=False) as expected:
        explicit(*tensors)
    assert found.get_total_flops() == expected.get_total_flops()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_function(generator, dtype, reduction):
    torch._dynamo.reset()
    inputs = problem(generator, dtype)

    def f(*tensors):
        return fused(*tensors, reduction=reduction, softcap=5.0) * 2

    found = both(torch.compile(f, fullgraph=True, backend="aot_eager"), f, inputs)
    assert_equal(found, **({"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}))


def test_operators_keep_pytorchs_rules(generator):
    hidden, weight, bias, target = problem(generator)
    options = (*Options(label_smoothing=0.1), 0.5, 3.0, False, SMALL)
    others = None, None, None
    torch.library.opcheck(
        torch.ops.pyx_xent.linear_cross_entropy, (hidden, weight, target, bias, *others, *options, [True] * 3)
    )
    torch.library.opcheck(
        torch.ops.pyx_xent.linear_cross_entropy, (hidden, weight, target, bias, *others, "none", *options[1:], [False] * 3)
    )
    backward = (
        torch.ones((), dtype=torch.float64),
        *(t.detach() for t in (hidden, weight, target, bias)),
        *others,
        *options,
        [True] * 3,
    )
    torch.library.opcheck(torch.ops.pyx_xent.linear_cross_entropy_backward, backward)


def test_double_backward_of_the_operator_is_not_missing_a_term(generator):
    hidden, weight, bias, target = problem(generator)
    options = (*Options(), 1.0, None, False, SMALL)
    out = torch.ops.pyx_xent.linear_cross_entropy(hidden, weight, target, bias, None, None, None, *options, [True] * 3)[0]
    expected = explicit(hidden, weight, bias, target)
    found = []
    for loss in (out, expected):
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (hidden, weight)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_classes_and_no_features(dtype):
    for rows, width, classes in ((3, 4, 0), (3, 0, 5), (0, 4, 5)):
        hidden, weight = (torch.zeros(n, width, dtype=dtype, requires_grad=True) for n in (rows, classes))
        target = torch.zeros(rows, classes, dtype=dtype)
        assert_equal(both(fused, explicit, [hidden, weight, None, target]))


def test_large_gradients_of_the_weight_add_up(generator):
    """Above 4 MiB their memory is used again, but not while a parameter's .grad is in it."""
    weight = torch.randn(5000, 256, generator=generator).requires_grad_()
    target = torch.randint(5000, (40,), generator=generator)
    batches = [torch.randn(40, 256, generator=generator) for _ in range(3)]
    for hidden in batches:
        ours.linear_cross_entropy(hidden, weight, target).backward()
    found, weight.grad = weight.grad, None
    for hidden in batches:
        torch.nn.functional.cross_entropy(hidden @ weight.T, target).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_under_autocast_the_loss_is_float32(reduction):
    hidden, layer, target = torch.randn(16, 8), torch.randn(50, 8), torch.randint(50, (16,))

    def loss(hidden):
        return ours.linear_cross_entropy(hidden, layer, target, reduction=reduction)

    with torch.autocast("cpu", torch.bfloat16):
        found, expected = torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden), loss(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_autocast_of_the_cpu_leaves_other_devices_alone():
    with torch.autocast("cpu", torch.bfloat16):
        found = ours.linear_cross_entropy(
            torch.empty(4, 3, device="meta"), torch.empty(5, 3, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
        )
    assert found.dtype == torch.float32


def test_float16_autocast_does_not_reach_the_products():
    hidden, layer, target = torch.randn(64, 32), torch.randn(500, 32), torch.randint(500, (64,))
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = ours.linear_cross_entropy(hidden, layer, target)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{"softcap": 0.0}, {"softcap": 1e39}, {"softcap": -1.0}, {"logit_scale": float("inf")}], ids=str
)
def test_compiled_code_by_way_of_logits_checks_its_numbers(options):
    """Several outputs a class have logits, which PyTorch's own operations cap."""
    weight, target = torch.randn(5, 2, 3), torch.randint(5, (4, 2))
    compiled = torch.compile(lambda h: ours.linear_cross_entropy(h, weight, target, **options), backend="eager")
    with pytest.raises(ValueError, match=next(iter(options))):
        compiled(torch.randn(4, 3))
