"""The modules of pyx_xent.torch. Skipped without torch."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
from helpers_torch import ours  # noqa: E402


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
