"""Memory and threads of pyx_xent.torch. Skipped without torch."""

import subprocess
import sys
import threading

import numpy as np
import pytest

import pyx_xent as px
from pyx_xent import _memory, _threads

torch = pytest.importorskip("torch")
from helpers_torch import F, ours  # noqa: E402

from pyx_xent.torch import _calls, _linear_products, _tensors  # noqa: E402


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
    for view in (x.view(8, 5, 10).view(8, 50), x[:], x.expand(8, 50)):
        with pytest.raises(RuntimeError, match="a view of a leaf"):
            ours.cross_entropy(view, target, inplace_backward=True)
    one_row = torch.randn(1, 50, requires_grad=True)
    loss = ours.cross_entropy((one_row * 1).expand(8, 50), target, inplace_backward=True)
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


def test_memory_that_another_process_shares_is_not_used_again():
    logits, target = torch.randn(400, 700, requires_grad=True), torch.zeros(400, dtype=torch.int64)
    ours.cross_entropy(logits, target).backward()
    shared = logits.grad.share_memory_()
    address = shared.data_ptr()
    logits.grad = None
    del shared  # another process still has it
    for _ in range(3):
        (ours.cross_entropy(logits, target) * 9).backward()
        assert not logits.grad.is_shared()
        assert logits.grad.data_ptr() != address
        logits.grad = None


def test_whoever_interrupts_the_memory_of_gradients_does_without_it():
    """As the handler of a signal does, or a finalizer: it must not wait for what it has interrupted."""
    logits, target = torch.randn(400, 700, requires_grad=True), torch.zeros(400, dtype=torch.int64)
    expected = torch.autograd.grad(ours.cross_entropy(logits, target), logits)[0]
    with _tensors._lock:
        ours.reuse_gradients(512 << 20)
        assert torch.equal(torch.autograd.grad(ours.cross_entropy(logits, target), logits)[0], expected)


def test_memory_of_several_gradients_of_changing_lengths_is_used_again():
    """Auxiliary heads: two gradients live at once; sequences: from step to step they have other lengths."""
    target, seen = torch.zeros(500, dtype=torch.int64), []
    for step in range(12):
        rows = 400 + 7 * (step % 4)
        heads = [torch.randn(rows, 700, requires_grad=True) for _ in range(2)]
        sum(ours.cross_entropy(x, target[:rows]) for x in heads).backward()
        seen.append({x.grad.untyped_storage().data_ptr() for x in heads})
        assert len(seen[-1]) == 2
    assert set().union(*seen[4:]) <= set().union(*seen[:4])


@pytest.mark.parametrize("loss", ["cross_entropy", "linear_cross_entropy"])
def test_backward_computes_nothing_from_the_second_step_with_a_factor_on(loss, monkeypatch):
    layer, target, computed = torch.randn(5, 3), torch.tensor([0, 1, 2, 3]), []
    for space, name in ((_calls, "gradient"), (_linear_products, "with_gradients")):
        function = getattr(space, name)
        monkeypatch.setattr(space, name, lambda *given, f=function: (computed.append(1), f(*given))[1])
    for factor, expected in ((1.0, 0), (0.25, 1), (0.25, 0), (0.25, 0), (3.0, 1), (3.0, 0)):
        if loss == "linear_cross_entropy":
            x = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
            result = ours.linear_cross_entropy(x, layer, target)
        else:
            x = torch.linspace(-1, 1, 20).view(4, 5).requires_grad_()
            result = ours.cross_entropy(x, target)
        computed.clear()
        (result * factor).backward()
        assert len(computed) == expected
