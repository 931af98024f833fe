"""fuse_head(): the usual results, and no logits where only a loss asks for them."""

import copy
import io
import pickle

import pytest
from helpers_torch import F, ours, torch

from pyx_xent.torch._lazy_logits import LazyLogits

WIDTH, CLASSES = 6, 11


def pair(bias=True, dtype=torch.float32):
    """Two layers alike, the second of them fused, and what `fuse_head` gave."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)
    fused = copy.deepcopy(plain)
    return plain, fused, ours.fuse_head(fused)


def inputs(shape=(2, 5), dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*shape, WIDTH, generator=generator).to(dtype)
    target = torch.randint(CLASSES, shape, generator=generator)
    if target.numel() > 2:
        target.view(-1)[2] = -100
    return hidden, target


def both_layers(step, shape=(2, 5), bias=True, dtype=torch.float32):
    """[(step(layer, hidden, target), gradients of hidden and the parameters)] of the plain and the fused layer; the handle"""
    plain, fused, handle = pair(bias, dtype)
    found = []
    for layer in (plain, fused):
        hidden, target = inputs(shape, dtype)
        hidden.requires_grad_()
        result = step(layer, hidden, target)
        result.sum().backward()
        found.append((result.detach(), [hidden.grad, *(parameter.grad for parameter in layer.parameters())]))
    return found, handle


def both(function, **options):
    """The same for function(logits, target)."""
    return both_layers(lambda layer, hidden, target: function(layer(hidden), target), **options)


def assert_alike(found, rtol=1e-5, atol=1e-6):
    (result, gradients), (other, other_gradients) = found
    torch.testing.assert_close(other, result, rtol=rtol, atol=atol)
    for one, another in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(another, one, rtol=rtol, atol=atol)


def flat(logits, target):
    return logits.view(-1, CLASSES), target.view(-1)


FUSED = {
    "flat": lambda x, t: F.cross_entropy(*flat(x, t)),
    "sum": lambda x, t: F.cross_entropy(*flat(x, t), reduction="sum") / 7,
    "none": lambda x, t: F.cross_entropy(*flat(x, t), reduction="none"),
    "float": lambda x, t: F.cross_entropy(*flat(x.float(), t)),
    "double": lambda x, t: F.cross_entropy(*flat(x.double(), t)),
    "shifted": lambda x, t: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, CLASSES), t[..., 1:].reshape(-1)),
    "last": lambda x, t: F.cross_entropy(x[:, -1], t[:, -1]),
    "one": lambda x, t: F.cross_entropy(x[1, 3], t[1, 3]),
    "rows": lambda x, t: F.cross_entropy(*(z[t.view(-1) > 3] for z in flat(x, t))),
    "places": lambda x, t: F.cross_entropy(x.flatten(0, 1).index_select(0, torch.tensor([7, 0, 3])), t.view(-1)[[7, 0, 3]]),
    "planes": lambda x, t: F.cross_entropy(x.transpose(1, 2), t),
    "permuted": lambda x, t: F.cross_entropy(x.permute(1, 2, 0), t.T),
    "mT": lambda x, t: F.cross_entropy(x.mT, t),
    "unsqueezed": lambda x, t: F.cross_entropy(x.unsqueeze(0).squeeze(0).flatten(0, 1), t.flatten()),
    "halves": lambda x, t: sum(
        F.cross_entropy(*flat(a.contiguous(), b.contiguous())) for a, b in zip(x.chunk(2), t.chunk(2), strict=True)
    ),
    "unbound": lambda x, t: sum(F.cross_entropy(a, b) for a, b in zip(x.unbind(0), t.unbind(0), strict=True)),
    "scaled": lambda x, t: F.cross_entropy(*flat(x * 0.5 / 3, t)),
    "capped": lambda x, t: F.cross_entropy(*flat(torch.tanh(x / 2.0) * 2.0, t)),
    "capped, then scaled": lambda x, t: F.cross_entropy(*flat((x / 2.0).tanh() * 2.0 * 0.25, t)),
    "options": lambda x, t: F.cross_entropy(
        *flat(x, t.clamp(min=0)), weight=torch.linspace(0.5, 2, CLASSES), ignore_index=3, label_smoothing=0.2
    ),
    "probabilities": lambda x, t: F.cross_entropy(x.transpose(1, 2), F.one_hot(t.clamp(min=0), CLASSES).float().mT),
    "probabilities of another dtype": lambda x, t: F.cross_entropy(
        x.flatten(0, 1), F.one_hot(t.view(-1).clamp(min=0), CLASSES).double()
    ),
    "module": lambda x, t: torch.nn.CrossEntropyLoss(reduction="sum")(*flat(x, t)),
    "ours": lambda x, t: ours.cross_entropy(*flat(x, t), z_loss=1e-2, sample_weight=torch.linspace(0, 1, t.numel())),
    "focal": lambda x, t: ours.cross_entropy(*flat(x, t), focal_gamma=2.0),
    "our module": lambda x, t: ours.CrossEntropyLoss(label_smoothing=0.1)(*flat(x, t)),
    "deprecated": lambda x, t: F.cross_entropy(*flat(x, t), size_average=False),
    "of what is detached": lambda x, t: F.cross_entropy(*flat(x, t)) + F.cross_entropy(*flat(x.detach(), t)),
}


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("bias", [False, True])
def test_losses_are_the_usual_ones_without_logits(name, bias):
    found, handle = both(FUSED[name], bias=bias)
    assert_alike(found)
    assert handle.fused >= 1, handle
    assert not handle.made, handle


def _add(x, t):
    x += 1
    return F.cross_entropy(*flat(x, t))


def _fill_a_view(x, t):
    rows = x.view(-1, CLASSES)
    x[..., 4] = -5.0
    return F.cross_entropy(rows, t.view(-1))


def _fill_after_a_copy(x, t):
    copied = x.double()
    with torch.no_grad():
        x[..., 4] = 1e4
    return F.cross_entropy(*flat(copied, t)) + F.cross_entropy(*flat(x, t)) * 0


def _masked(x, t):
    return F.cross_entropy(*flat(x.masked_fill(torch.arange(CLASSES) == 1, -1e9), t))


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


TEMPERATURE = torch.tensor(0.5, requires_grad=True)
MADE = {
    "added to in place": _add,
    "a view filled": _fill_a_view,
    "filled after a copy": _fill_after_a_copy,
    "masked": _masked,
    "own loss": lambda x, t: x.logsumexp(-1).mean() - x.softmax(-1)[..., 0].mean(),
    "log_softmax": lambda x, t: F.nll_loss(F.log_softmax(x, -1).flatten(0, 1), t.view(-1)),
    "made before": lambda x, t: F.cross_entropy(*flat(x, t)) + 0 * x.argmax(-1).sum() + F.cross_entropy(*flat(x, t)),
    "an autograd.Function": lambda x, t: F.cross_entropy(*flat(_Twice.apply(x), t)),
    "a learned temperature": lambda x, t: F.cross_entropy(*flat(x * TEMPERATURE, t)),
    "half the classes": lambda x, t: F.cross_entropy(x[..., :8].flatten(0, 1), t.view(-1).clamp(max=7)),
    "classes elsewhere": lambda x, t: F.cross_entropy(x.reshape(2, 5 * CLASSES), t[:, 0]),
    "tanh twice": lambda x, t: F.cross_entropy(*flat(x.tanh().tanh(), t)),
    "a negative cap": lambda x, t: F.cross_entropy(*flat(x.tanh() * -1.5, t)),
    "narrower": lambda x, t: F.cross_entropy(*flat(x.half().float(), t)),
    "both": lambda x, t: F.cross_entropy(x.flatten(0, 1), x.detach().softmax(-1).flatten(0, 1)),
}


@pytest.mark.parametrize("name", MADE)
def test_whatever_else_is_asked_makes_the_logits_and_is_the_usual_result(name):
    TEMPERATURE.grad = None
    found, handle = both(MADE[name])
    assert_alike(found)
    assert handle.made.total() >= 1, handle
    if name == "a learned temperature":
        assert TEMPERATURE.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(dtype):
    found, handle = both(FUSED["float" if dtype is not torch.float64 else "flat"], dtype=dtype)
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert_alike(found, tolerance, tolerance)
    assert found[1][0].dtype is found[0][0].dtype
    assert handle.fused == 1


def test_half_logits_give_a_half_loss_as_pytorch_does():
    found, _ = both(FUSED["flat"], dtype=torch.bfloat16)
    assert found[1][0].dtype is found[0][0].dtype is torch.bfloat16


@pytest.mark.parametrize("loss_inside", [True, False])
def test_autocast(loss_inside):
    def step(layer, hidden, target):
        with torch.autocast("cpu", torch.bfloat16):
            logits = layer(hidden)
            assert logits.dtype is torch.bfloat16
            if loss_inside:
                return F.cross_entropy(*flat(logits, target))
        return F.cross_entropy(*flat(logits.float(), target))

    found, _ = both_layers(step)
    assert found[1][0].dtype is torch.float32
    assert_alike(found, 3e-2, 3e-3)


def test_the_logits_look_like_the_usual_ones():
    plain, fused, _ = pair()
    hidden, _ = inputs()
    expected, logits = plain(hidden), fused(hidden)
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == expected.shape
    assert logits.stride() == expected.stride()
    assert (logits.dtype, logits.device, logits.requires_grad, logits.is_leaf) == (torch.float32, expected.device, True, False)
    assert repr(logits.detach()) == repr(expected.detach())
    assert torch.equal(torch.from_numpy(logits.detach().numpy()), expected.detach())
    assert logits.tolist() == expected.tolist()
    assert torch.equal(copy.deepcopy(logits.detach()), expected)
    assert torch.equal(copy.copy(logits.detach()), expected)
    buffer = io.BytesIO()
    torch.save(logits.detach(), buffer)
    buffer.seek(0)
    assert type(torch.load(buffer)) is torch.Tensor
    assert torch.equal(pickle.loads(pickle.dumps(logits.detach())), expected)
    assert torch.equal(logits.data, expected)
    assert len(list(logits)) == 2
    assert torch.equal(torch.cat([logits, logits]), torch.cat([expected, expected]))


def test_numbers_that_somebody_has_are_the_ones_that_count():
    """What is written into the array of the logits is in the loss."""
    plain, fused, handle = pair()
    hidden, target = inputs()
    losses = []
    for layer in (plain, fused):
        logits = layer(hidden)
        logits.detach().numpy()[..., 2] = 3.0
        losses.append(F.cross_entropy(*flat(logits, target)))
    torch.testing.assert_close(losses[1], losses[0])
    assert handle.fused == 0


def test_hooks_and_retained_gradients_of_the_logits():
    found = []
    for layer in pair()[:2]:
        hidden, target = inputs()
        logits = layer(hidden)
        seen = []
        logits.register_hook(lambda gradient, seen=seen: seen.append(gradient.clone()))
        logits.retain_grad()
        F.cross_entropy(*flat(logits, target)).backward()
        found.append((logits.grad, seen[0]))
    torch.testing.assert_close(found[1], found[0])


def test_hooks_on_the_layer():
    found = []
    for layer in pair()[:2]:
        hidden, target = inputs()
        seen = []
        layer.register_forward_hook(lambda module, given, logits: logits * 2)
        layer.register_full_backward_hook(lambda module, given, gradients, seen=seen: seen.append(gradients[0]))
        loss = F.cross_entropy(*flat(layer(hidden.requires_grad_()), target))
        loss.backward()
        found.append((loss.detach(), seen))
    torch.testing.assert_close(found[1], found[0])


def test_weights_that_change_before_the_loss_are_an_error():
    for use in (lambda x, t: F.cross_entropy(*flat(x, t)), lambda x, t: x.sum()):
        _, fused, _ = pair()
        hidden, target = inputs()
        logits = fused(hidden)
        with torch.no_grad():
            fused.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            use(logits, target)


def test_weights_that_change_before_backward_are_autograds_error():
    _, fused, _ = pair()
    hidden, _ = inputs()
    loss = fused(hidden.requires_grad_()).sum()
    with torch.no_grad():
        fused.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_that_was_freed_is_not_read():
    _, fused, _ = pair()
    hidden, target = inputs()
    logits = fused(hidden)
    fused.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="was freed"):
        F.cross_entropy(*flat(logits, target))


def test_evaluation_and_generation_are_untouched_unless_asked_for():
    _, fused, handle = pair()
    hidden, target = inputs()
    with torch.no_grad():
        assert type(fused(hidden)) is torch.Tensor
    fused.eval()
    assert type(fused(hidden)) is torch.Tensor
    assert repr(handle).endswith("0 losses fused, 0 times logits made>")
    handle.undo()
    with ours.fuse_head(fused, evaluation=True) as handle:
        for context, of_class in ((torch.no_grad, LazyLogits), (torch.inference_mode, torch.Tensor)):
            with context():
                logits = fused(hidden + 0)
                assert type(logits) is of_class
                loss = F.cross_entropy(*flat(logits, target))
                expected = F.cross_entropy(*flat(F.linear(hidden, fused.weight, fused.bias), target))
                torch.testing.assert_close(loss, expected)
        assert handle.fused == 1
    assert type(fused(hidden)) is torch.Tensor


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    def step(layer, hidden, target):
        return checkpoint(lambda h: F.cross_entropy(*flat(layer(h), target)), hidden, use_reentrant=use_reentrant)

    found, _ = both_layers(step)
    assert_alike(found)


def test_compiled_models_give_the_usual_result():
    def step(layer, hidden, target):
        compiled = torch.compile(lambda h, t: F.cross_entropy(*flat(layer(h), t)), backend="aot_eager", fullgraph=True)
        return compiled(hidden, target)

    found, _ = both_layers(step)
    assert_alike(found)


def test_transformations_and_second_derivatives():
    plain, fused, _ = pair(dtype=torch.float64)
    hidden, target = inputs(dtype=torch.float64)
    of = [lambda h, layer=layer: F.cross_entropy(*flat(layer(h), target)) for layer in (plain, fused)]
    torch.testing.assert_close(torch.func.grad(of[1])(hidden), torch.func.grad(of[0])(hidden))
    hidden.requires_grad_()
    assert torch.autograd.gradgradcheck(of[1], hidden)
    assert torch.autograd.gradgradcheck(lambda h: fused(h).tanh().pow(2).sum(), hidden)


def test_copies_of_a_model_are_fused_on_their_own():
    _, fused, handle = pair()
    hidden, target = inputs()
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        copied.weight.zero_()
    loss = F.cross_entropy(*flat(copied(hidden), target))
    expected = F.cross_entropy(*flat(F.linear(hidden, copied.weight, copied.bias), target))
    torch.testing.assert_close(loss, expected)
    assert handle.fused == 0
    again = pickle.loads(pickle.dumps(fused))
    torch.testing.assert_close(F.cross_entropy(*flat(again(hidden), target)), F.cross_entropy(*flat(fused(hidden), target)))
    assert fused.state_dict().keys() == {"weight", "bias"}


def test_a_handle_counts_and_undoes():
    _, fused, handle = pair()
    hidden, target = inputs()
    logits = fused(hidden)
    F.cross_entropy(*flat(logits, target))
    logits.argmax(-1)
    logits.argmax(-1)
    assert handle.fused == 1
    assert dict(handle.made) == {"argmax": 1}
    assert repr(handle) == (
        "<FusedHead of Linear(in_features=6, out_features=11, bias=True): 1 loss fused, 1 times logits made; 1: argmax>"
    )
    with pytest.raises(ValueError, match="fused already"):
        ours.fuse_head(fused)
    handle.undo()
    handle.undo()
    assert type(fused(hidden)) is torch.Tensor
    assert ", undone:" in repr(handle)


class _WithHead(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def get_output_embeddings(self):
        return self.head


class _OtherLinear(torch.nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_model_is_asked_for_its_output_layer_and_others_are_refused():
    layer = torch.nn.Linear(WIDTH, CLASSES)
    with ours.fuse_head(_WithHead(layer)):
        assert type(layer(torch.ones(WIDTH))) is LazyLogits
    with pytest.raises(TypeError, match="Sequential does not say by get_output_embeddings"):
        ours.fuse_head(torch.nn.Sequential(layer))
    with pytest.raises(TypeError, match=r"plain torch.nn.Linear, got Conv1d"):
        ours.fuse_head(_WithHead(torch.nn.Conv1d(2, 2, 1)))
    with pytest.raises(TypeError, match=r"plain torch.nn.Linear, got _OtherLinear"):
        ours.fuse_head(_WithHead(_OtherLinear(2, 2)))
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got int"):
        ours.fuse_head(3)
    layer.forward = lambda input: input
    with pytest.raises(TypeError, match="replaced by somebody else"):
        ours.fuse_head(layer)


def test_bad_labels_and_shapes_are_the_usual_errors():
    _, fused, _ = pair()
    hidden, target = inputs()
    bad = target.clone()
    bad[1, 1] = CLASSES
    with pytest.raises(IndexError, match="Target 11 is out of bounds"):
        F.cross_entropy(*flat(fused(hidden), bad))
    with pytest.raises(ValueError, match="Expected input batch_size"):
        F.cross_entropy(fused(hidden).view(-1, CLASSES), target.view(-1)[:3])
    with pytest.raises(RuntimeError, match="shape"):
        fused(hidden).view(-1, 7)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fused(torch.ones(2, WIDTH + 1))


def test_no_rows():
    _, fused, handle = pair()
    loss = F.cross_entropy(fused(torch.empty(0, WIDTH)), torch.empty(0, dtype=torch.int64), reduction="sum")
    assert loss == 0
    assert handle.fused == 1


def test_patched_losses_arrive_too():
    _, fused, handle = pair()
    hidden, target = inputs()
    with ours.patch():
        loss = F.cross_entropy(*flat(fused(hidden), target))
    torch.testing.assert_close(loss, F.cross_entropy(*flat(F.linear(hidden, fused.weight, fused.bias), target)))
    assert handle.fused == 1


def test_no_logits_are_made(monkeypatch):
    """A loss of 4,096 rows of 30,000 classes would need 490 MB of logits: peak memory of the process."""
    import resource

    head = torch.nn.Linear(16, 30_000)
    ours.fuse_head(head)
    hidden, target = torch.randn(4096, 16), torch.randint(30_000, (4096,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    F.cross_entropy(head(hidden).float(), target).backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def alike(function, **options):
    """Run function(layer, hidden, target) with the plain layer and the fused one, and compare what it returns."""
    found = []
    for layer in pair(**options)[:2]:
        hidden, target = inputs()
        found.append(function(layer, hidden.requires_grad_(), target))
    torch.testing.assert_close(found[1], found[0])


def _detached_leaf(layer, hidden, target):
    leaf = layer(hidden)[0].detach().requires_grad_()
    F.cross_entropy(leaf, target[0]).backward()
    return leaf.grad, layer.weight.grad, hidden.grad


def _parameter(layer, hidden, target):
    leaf = torch.nn.Parameter(layer(hidden)[0].detach())
    F.cross_entropy(leaf, target[0]).backward()
    return leaf.grad, layer.weight.grad


def _jacobian(layer, hidden, target):
    return torch.autograd.functional.jacobian(lambda z: F.cross_entropy(z, target[0]), layer(hidden)[0].detach())


def _frozen_until_the_logits(layer, hidden, target):
    layer.requires_grad_(False)
    logits = layer(hidden.detach())[0].requires_grad_()
    F.cross_entropy(logits, target[0]).backward()
    return logits.grad


def _detached_in_place(layer, hidden, target):
    read = hidden * 1
    logits = layer(read)
    read.detach_()
    F.cross_entropy(*flat(logits, target)).backward()
    return hidden.grad, layer.weight.grad


def _frozen_and_thawed(layer, hidden, target):
    layer.requires_grad_(False)
    logits = layer(hidden)
    layer.requires_grad_(True)
    F.cross_entropy(*flat(logits, target)).backward()
    return hidden.grad, layer.weight.grad


def _copy_before_a_write_through_numpy(layer, hidden, target):
    logits = layer(hidden)
    array = logits.detach().numpy()
    copied, view = logits * 2, logits.detach()[..., :3]
    other = logits.clone()
    array[:] = 0
    view.fill_(-9)
    return F.cross_entropy(*flat(copied, target)), F.cross_entropy(*flat(other, target)), logits.sum()


def _parametrized(layer, hidden, target):
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Dropout(0.5))
    torch.manual_seed(3)
    return F.cross_entropy(*flat(layer(hidden), target))


def _tangents(layer, hidden, target):
    logits = layer(hidden).detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits).cumsum(-1))
        return torch.autograd.forward_ad.unpack_dual(F.cross_entropy(*flat(dual, target)))


def _too_large_a_factor(layer, hidden, target):
    return F.cross_entropy(*flat(layer(hidden) / 1e-39, target)).isnan()


def _apply_in_place(layer, hidden, target):
    return layer(hidden).detach().apply_(lambda x: x + 1)


def _other_default_device(layer, hidden, target):
    with torch.device("meta"):
        logits = layer(hidden)
    return F.cross_entropy(*flat(logits, target))


LIKE_THE_PLAIN_LAYER = [
    _detached_leaf, _parameter, _jacobian, _frozen_until_the_logits, _detached_in_place, _frozen_and_thawed,
    _copy_before_a_write_through_numpy, _parametrized, _tangents, _too_large_a_factor, _apply_in_place, _other_default_device,
]  # fmt: skip


@pytest.mark.parametrize("function", LIKE_THE_PLAIN_LAYER)
def test_a_fused_layer_is_like_the_plain_one(function):
    alike(function)


def test_numbers_that_change_after_a_loss_of_them_are_autograds_error():
    _, fused, _ = pair()
    hidden, target = inputs()
    logits = fused(hidden)[0]
    logits.argmax()
    loss = ours.cross_entropy(logits, target[0], reduction="none")
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_a_weight_that_is_exchanged_before_the_loss_is_an_error():
    _, fused, _ = pair()
    hidden, target = inputs()
    logits = fused(hidden)
    fused.weight.data = torch.zeros_like(fused.weight.data)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.cross_entropy(*flat(logits, target))


def test_a_gradient_that_is_asked_for_too_late_is_an_error():
    _, fused, _ = pair()
    hidden, target = inputs()
    logits = fused(hidden)
    F.cross_entropy(*flat(logits, target))
    with pytest.raises(RuntimeError, match=r"call retain_grad\(\) before it"):
        logits.retain_grad()


def test_sample_weights_of_another_shape_are_the_usual_error():
    _, fused, _ = pair()
    hidden, target = inputs()
    for shape in ((5, 2), (10,)):
        with pytest.raises(ValueError, match="sample_weight must have shape"):
            ours.cross_entropy(fused(hidden).transpose(1, 2), target, sample_weight=torch.ones(shape))


def test_shapes_do_not_change_in_place():
    _, fused, _ = pair()
    hidden, _ = inputs()
    for change in (lambda x: x.unsqueeze_(0), lambda x: x.squeeze_(), lambda x: x.transpose_(0, 1), lambda x: x.resize_(3, 4)):
        with pytest.raises(RuntimeError, match="do not change their shape in place"):
            change(fused(hidden).detach())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_classes():
    layer = torch.nn.Linear(6, 0)
    ours.fuse_head(layer)
    layer(torch.ones(2, 6)).sum().backward()
    assert layer.weight.grad.shape == (0, 6)
