"""torch.ops.pyx_xent, torch.compile and tracing. Skipped without torch."""

import itertools
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from helpers_torch import DTYPES, assert_equal, both, ours, problem  # noqa: E402

from pyx_xent.torch import _operators  # noqa: E402
from pyx_xent.torch._options import Options  # noqa: E402


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of opcheck's own
def test_operators_keep_pytorchs_rules(generator):
    for kind, reduction, shape in itertools.product(["index", "soft"], ["none", "mean"], [(4, 5), (2, 5, 3)]):
        logits, target, weight = problem(generator, kind, True, shape, torch.float32)
        rows = torch.rand(logits.sum(1).shape, generator=generator)
        for extras in ((None, None), (rows, torch.tensor(3.0) if reduction == "mean" else None)):
            arguments = (logits, target, weight, *extras, *Options(reduction, label_smoothing=0.1, z_loss=0.01))
            torch.library.opcheck(_operators._loss_op, arguments)
            loss, state = _operators._loss_op(*arguments)
            torch.library.opcheck(_operators._gradient_op, (torch.rand_like(loss), state, *arguments))


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


def test_traced_function_has_pytorchs_operators(generator):
    logits, target, _ = problem(generator, "index", False, (4, 5))
    traced = torch.jit.trace(lambda x: ours.cross_entropy(x, target), logits.detach(), check_trace=False)
    assert "pyx_xent" not in str(traced.graph)  # a traced program may run where pyx_xent is not
    torch.testing.assert_close(traced(2 * logits.detach()), ours.cross_entropy(2 * logits.detach(), target))
