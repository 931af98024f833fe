"""The modules of pyx_xent.torch. Skipped without torch."""

import copy
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
from helpers_torch import ours  # noqa: E402


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss"])
def test_modules_are_pytorchs(name):
    theirs = getattr(torch.nn, name)(torch.tensor([1.0, 2.0, 3.0]), ignore_index=1, reduction="sum")
    module = getattr(ours, name)(torch.tensor([1.0, 2.0, 3.0]), ignore_index=1, reduction="sum")
    assert isinstance(module, getattr(torch.nn, name))
    assert repr(module) == f"{name}(reduction='sum', ignore_index=1)"
    assert module.state_dict().keys() == theirs.state_dict().keys() == {"weight"}
    module.load_state_dict({"weight": torch.tensor([3.0, 2.0, 1.0])})
    log_probs, target = torch.randn(4, 3).log_softmax(1), torch.tensor([0, 1, 2, 2])
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(copied(log_probs, target), module(log_probs, target))
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(log_probs, target), theirs(log_probs, target))
    assert module.double().weight.dtype == torch.float64


def in_a_new_process(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import torch\n" + code], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_pytorch_without_a_linear_loss_has_the_rest():
    """As PyTorch was before 2.13."""
    found = in_a_new_process("""
for space, name in ((torch.nn, "LinearCrossEntropyLoss"), (torch.nn.functional, "linear_cross_entropy")):
    if hasattr(space, name):
        delattr(space, name)
import pyx_xent.torch as ours
print("LinearCrossEntropyLoss" in ours.__all__, hasattr(ours, "LinearCrossEntropyLoss"))
hidden, layer, target = torch.eye(3), torch.eye(3, requires_grad=True), torch.tensor([0, 1, 2])
ours.linear_cross_entropy(hidden, layer, target).backward()
print(torch.allclose(layer.grad, torch.autograd.grad(torch.nn.functional.cross_entropy(hidden @ layer.T, target), layer)[0]))
with ours.patch() as patch:
    torch.nn.CrossEntropyLoss()(hidden, target)
print(patch.computed)""")
    assert found == ["False False", "True", "1"]


def test_a_private_name_that_is_gone_is_named():
    found = in_a_new_process("""
del torch._C._len_torch_dispatch_stack
try:
    import pyx_xent.torch
except ImportError as error:
    print(error)""")
    assert found[0].startswith(
        f"pyx_xent.torch needs torch._C._len_torch_dispatch_stack, which PyTorch {torch.__version__} does not"
    )


def test_what_cannot_be_scripted_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"nn.CrossEntropyLoss, under patch\(\)"):
        torch.jit.script(ours.LinearCrossEntropyLoss(3, 2))
    with pytest.raises(RuntimeError, match="has no z_loss"):
        torch.jit.script(ours.CrossEntropyLoss(z_loss=0.1))
    scripted = torch.jit.script(ours.CrossEntropyLoss(torch.ones(3), reduction="sum", label_smoothing=0.1))
    expected = ours.cross_entropy(torch.eye(3), torch.tensor([0, 1, 2]), torch.ones(3), reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(scripted(torch.eye(3), torch.tensor([0, 1, 2])), expected)
