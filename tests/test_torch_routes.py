"""Whatever is done with a loss of pyx_xent.torch: the answer is PyTorch's, or an error that says so. Skipped without torch."""

import copy
import importlib
import itertools
import pickle

import pytest

torch = pytest.importorskip("torch")
ours = importlib.import_module("pyx_xent.torch")
F = torch.nn.functional
ROWS, CLASSES, WIDTH = 4, 5, 3
TARGET = torch.tensor([0, -100, 4, 2])


def numbers(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


LAYER = numbers(CLASSES, WIDTH)


def _patched(logits, **options):
    with ours.patch():
        return F.cross_entropy(logits, TARGET, **options)


def _patched_linear(x, **options):
    with ours.patch():
        return F.linear_cross_entropy(x, LAYER, TARGET, **options)


# name: (ours, PyTorch's), functions of x, (ROWS, WIDTH)
LOSSES = {
    "cross_entropy": (
        lambda x, **options: ours.cross_entropy(x @ LAYER.T, TARGET, **options),
        lambda x, **options: F.cross_entropy(x @ LAYER.T, TARGET, **options),
    ),
    "cross_entropy, patched": (
        lambda x, **options: _patched(x @ LAYER.T, **options),
        lambda x, **options: F.cross_entropy(x @ LAYER.T, TARGET, **options),
    ),
    "nll_loss": (
        lambda x, **options: ours.nll_loss((x @ LAYER.T).log_softmax(1), TARGET, **options),
        lambda x, **options: F.nll_loss((x @ LAYER.T).log_softmax(1), TARGET, **options),
    ),
    "linear_cross_entropy": (
        lambda x, **options: ours.linear_cross_entropy(x, LAYER, TARGET, **options),
        lambda x, **options: F.cross_entropy(x @ LAYER.T, TARGET, **options),
    ),
    "linear_cross_entropy, patched": (
        lambda x, **options: _patched_linear(x, **options),
        lambda x, **options: F.cross_entropy(x @ LAYER.T, TARGET, **options),
    ),
}

# name: function of a loss and x
TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "jacrev": lambda f, x: torch.func.jacrev(lambda z: f(z, reduction="none"))(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(lambda z: f(z, reduction="none"))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}
EAGER_ONLY = {
    "jacobian(vectorize=True)": lambda f, x: torch.autograd.functional.jacobian(
        lambda z: f(z, reduction="none"), x, vectorize=True
    ),
    "jacobian(vectorize=True) of a mean": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "hessian(vectorize=True)": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
    "is_grads_batched": lambda f, x: torch.autograd.grad(
        f(x.requires_grad_(), reduction="none"), x, torch.eye(ROWS, dtype=x.dtype), is_grads_batched=True
    )[0],
    "dual numbers": lambda f, x: _tangent(f, x),
}


def _tangent(f, x):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", [*TRANSFORMS, *EAGER_ONLY])
@pytest.mark.parametrize("loss", LOSSES)
def test_transformed(loss, transform):
    found, expected = (
        (TRANSFORMS | EAGER_ONLY)[transform](function, numbers(ROWS, WIDTH).clone()).detach() for function in LOSSES[loss]
    )
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss", "linear_cross_entropy"])
@pytest.mark.parametrize("inside", [True, False], ids=["compiled transform", "transform of the compiled"])
def test_compiled_and_transformed(loss, transform, inside):
    ours_alone, theirs = LOSSES[loss]
    expected = TRANSFORMS[transform](theirs, numbers(ROWS, WIDTH))
    if inside:
        found = torch.compile(lambda x: TRANSFORMS[transform](ours_alone, x), backend="aot_eager", fullgraph=True)(
            numbers(ROWS, WIDTH)
        )
    else:
        found = TRANSFORMS[transform](torch.compile(ours_alone, backend="aot_eager"), numbers(ROWS, WIDTH))
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected)


def test_what_pytorch_lacks_is_refused_where_pytorch_computes():
    x = numbers(ROWS, CLASSES)
    for name, value in {"sample_weight": torch.ones(ROWS), "normalizer": 3.0, "z_loss": 0.1, "empty": "zero"}.items():
        with pytest.raises(RuntimeError, match=f"{name} needs ordinary CPU tensors"):
            torch.func.grad(lambda z, n=name, v=value: ours.cross_entropy(z, TARGET, **{n: v}))(x)


@pytest.mark.filterwarnings("ignore")
def test_traced_and_exported_programs_hold_pytorchs_operators():
    x = numbers(ROWS, CLASSES)
    traced = torch.jit.trace(lambda z: ours.cross_entropy(z, TARGET), x, check_trace=False)
    assert "pyx_xent" not in str(traced.graph)
    torch.testing.assert_close(traced(2 * x), F.cross_entropy(2 * x, TARGET))

    class Training(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = ours.CrossEntropyLoss(label_smoothing=0.1)

        def forward(self, logits, target):
            return self.criterion(logits, target)

    for strict in (False, True):
        program = torch.export.export(Training(), (x, TARGET), strict=strict)
        assert "pyx_xent" not in str(program.graph)
        torch.testing.assert_close(program.module()(2 * x, TARGET), F.cross_entropy(2 * x, TARGET, label_smoothing=0.1))


@pytest.mark.filterwarnings("ignore")
def test_script_and_fx():
    x = numbers(ROWS, CLASSES)
    for criterion in (
        ours.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"),
        ours.NLLLoss(weight=torch.ones(CLASSES).double()),
    ):
        scripted = torch.jit.script(criterion)
        torch.testing.assert_close(scripted(x, TARGET), criterion(x, TARGET))
    with pytest.raises(RuntimeError, match="z_loss"):
        torch.jit.script(ours.CrossEntropyLoss(z_loss=0.1))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = ours.CrossEntropyLoss(ignore_index=2)

        def forward(self, logits, target):
            return self.criterion(2 * logits, target)

    graph = torch.fx.symbolic_trace(Model())
    found = graph(x, torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(found, F.cross_entropy(2 * x, torch.tensor([0, 1, 2, 3]), ignore_index=2))


# Devices


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss", "linear_cross_entropy"])
def test_what_is_not_on_the_cpu(loss, place, compiled):
    x, target, weight, layer = numbers(ROWS, CLASSES), TARGET, torch.ones(CLASSES).double(), numbers(CLASSES, CLASSES)
    tensors = [x, target, weight, layer]
    if place == 3 and loss != "linear_cross_entropy":
        pytest.skip("there is no such tensor")
    tensors[place] = tensors[place].to("meta")

    def call(x, target, weight, layer):
        if loss == "linear_cross_entropy":
            return ours.linear_cross_entropy(x, layer, target, weight=weight)
        return getattr(ours, loss)(x, target, weight)

    call = torch.compile(call, backend="eager") if compiled else call
    torch._dynamo.reset()
    with pytest.raises(Exception, match="same device, but found cpu and meta"):
        call(*tensors)


def test_modules_built_under_another_device():
    x = numbers(ROWS, CLASSES).requires_grad_()
    with torch.device("meta"):
        criterion = ours.CrossEntropyLoss(weight=torch.ones(CLASSES))
        assert ours.CrossEntropyLoss()(x, TARGET).device.type == "cpu"
        assert torch.autograd.grad(ours.cross_entropy(x, TARGET), x)[0].device.type == "cpu"
        assert ours.cross_entropy(x, TARGET, reduction="none").device.type == "cpu"
        large = torch.zeros(1000, 1000, device="cpu", requires_grad=True)
        ours.cross_entropy(large, torch.zeros(1000, dtype=torch.int64, device="cpu")).backward()
        assert large.grad.device.type == "cpu"
    with pytest.raises(RuntimeError, match="device"):
        criterion(x, TARGET)
    assert ours.cross_entropy(x.to("meta"), TARGET.to("meta")).device.type == "meta"


# Tensors that are more, or less, than memory


class Mask(torch.Tensor):
    """As torchvision's: results of functions are plain tensors."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Named(torch.Tensor):
    """As fastai's: results keep the class."""


class Duck:
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function.__name__


@pytest.mark.parametrize("patched", [False, True], ids=["", "patched"])
def test_subclasses_that_are_labels(patched, calls):
    x, target = numbers(ROWS, CLASSES).requires_grad_(), TARGET
    for logits_class, target_class in itertools.product([torch.Tensor, Mask, Named], repeat=2):
        x.grad = None
        logits, labels = x.as_subclass(logits_class), target.as_subclass(target_class)
        with ours.patch() if patched else torch.enable_grad():
            loss = (F.cross_entropy if patched else ours.cross_entropy)(logits, labels)
        loss.backward()
        expected = torch.autograd.grad(F.cross_entropy(x, target), x)[0]
        assert type(loss) is type(F.cross_entropy(logits, labels))
        torch.testing.assert_close(x.grad, expected)
        assert calls.pop() == "cross_entropy_with_grad"  # at full speed


def test_torch_function_of_others_is_asked():
    for name in ("cross_entropy", "nll_loss"):
        assert getattr(ours, name)(Duck(), TARGET) == name
        assert getattr(ours, name)(numbers(ROWS, CLASSES), TARGET, weight=Duck()) == name
    assert ours.linear_cross_entropy(Duck(), LAYER, TARGET) == "linear_cross_entropy"


def test_zeros_without_memory_and_freed_memory():
    zeros = torch._efficientzerotensor((ROWS, CLASSES))
    torch.testing.assert_close(ours.cross_entropy(zeros, TARGET), F.cross_entropy(torch.zeros(ROWS, CLASSES), TARGET))
    freed = torch.zeros(ROWS, CLASSES)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed"):
        ours.cross_entropy(freed, TARGET)
    with pytest.raises((RuntimeError, NotImplementedError)):
        ours.cross_entropy(torch.zeros(ROWS, CLASSES).to_sparse(), TARGET)


def test_memory_stays_resizable():
    hidden, layer = numbers(ROWS, WIDTH, dtype=torch.float32).requires_grad_(), LAYER.float().requires_grad_()
    logits, target = (hidden @ layer.T).detach().requires_grad_(), TARGET.clone()
    for loss in (ours.linear_cross_entropy(hidden, layer, target), ours.cross_entropy(logits, target)):
        loss.backward()
    for tensor in (hidden, layer, logits, target, hidden.grad, layer.grad, logits.grad):
        assert tensor.untyped_storage().resizable()


# Numbers


def test_tensors_that_require_grad_are_refused_where_a_number_is_taken():
    hidden = numbers(ROWS, WIDTH).requires_grad_()
    for name, value in {
        "logit_scale": torch.tensor(2.0), "softcap": torch.tensor(5.0), "label_smoothing": torch.tensor(0.1),
        "z_loss": torch.tensor(0.1), "normalizer": torch.tensor(3.0), "weight": torch.ones(CLASSES).double(),
        "sample_weight": torch.ones(ROWS),
    }.items():  # fmt: skip
        found = ours.linear_cross_entropy(hidden, LAYER, TARGET, **{name: value})
        assert found == ours.linear_cross_entropy(
            hidden, LAYER, TARGET, **{name: value.tolist() if value.dim() == 0 else value}
        )
        with pytest.raises(RuntimeError, match=f"derivative for '{name}' is not implemented: pass {name}.detach"):
            ours.linear_cross_entropy(hidden, LAYER, TARGET, **{name: value.clone().requires_grad_()})
        if name not in ("logit_scale", "softcap"):
            with pytest.raises(RuntimeError, match=f"derivative for '{name}'"):
                ours.cross_entropy(hidden @ LAYER.T, TARGET, **{name: value.clone().requires_grad_()})
        if name in ("normalizer", "weight", "sample_weight"):
            with pytest.raises(RuntimeError, match=f"derivative for '{name}'"):
                ours.nll_loss(hidden @ LAYER.T, TARGET, **{name: value.clone().requires_grad_()})


@pytest.mark.spec("S25")
def test_compiled_calls_name_the_position_of_a_bad_label():
    torch._dynamo.reset()  # of what other tests have compiled, or not
    target = torch.tensor([[0, 1, 2], [3, 9, 1]])
    compiled = torch.compile(ours.cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(IndexError, match=r"Target 9 is out of bounds. \(target\[1, 1\]"):
        compiled(torch.zeros(2, 5, 3), target)
    compiled = torch.compile(ours.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(IndexError, match=r"target\[1, 1\]"):
        compiled(torch.zeros(2, 3, WIDTH), torch.zeros(5, WIDTH), target, shift=True)
    torch._dynamo.reset()


def test_autocast_leaves_float64_alone():
    hidden = numbers(ROWS, WIDTH)
    with torch.autocast("cpu"):
        found = ours.linear_cross_entropy(hidden, LAYER, TARGET)
        assert found.dtype == F.linear_cross_entropy(hidden, LAYER, TARGET).dtype == torch.float64
    torch.testing.assert_close(found, F.cross_entropy(hidden @ LAYER.T, TARGET))
    with pytest.raises(ValueError, match="softcap must be finite in float32"):
        ours.linear_cross_entropy(hidden.float(), LAYER.float(), TARGET, softcap=1e39)


def test_positions_under_shift_are_the_callers():
    target = torch.zeros(2, 6, dtype=torch.int64)
    target[0, 0] = 99  # no target
    hidden = numbers(2, 6, WIDTH)
    ours.linear_cross_entropy(hidden, LAYER, target, shift=True)
    target[1, 4] = 99
    with pytest.raises(IndexError, match=r"target\[1, 4\]"):
        ours.linear_cross_entropy(hidden, LAYER, target, shift=True)


def test_modules_survive_copies():
    criterion = ours.CrossEntropyLoss()
    criterion.z_loss, criterion.reduction = 0.1, "sum"
    x = numbers(ROWS, CLASSES)
    assert repr(criterion) == "CrossEntropyLoss(reduction='sum', z_loss=0.1)"
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert repr(copied) == repr(criterion)
        assert copied(x, TARGET) == criterion(x, TARGET)
    linear = ours.LinearCrossEntropyLoss(WIDTH, CLASSES, softcap=30.0, dtype=torch.float64)
    linear.z_loss = 0.1
    assert "z_loss=0.1, softcap=30.0" in repr(linear)
    assert list(linear.state_dict()) == list(torch.nn.LinearCrossEntropyLoss(WIDTH, CLASSES).state_dict())
    for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert repr(copied) == repr(linear)
        assert copied(numbers(ROWS, WIDTH), TARGET) == linear(numbers(ROWS, WIDTH), TARGET)
    del criterion.__dict__["z_loss"]  # as pickled before there was such an option
    assert criterion(x, TARGET) == ours.cross_entropy(x, TARGET, reduction="sum")
