"""pyx_xent.torch.patch(): what it routes, leaves alone, and counts. Skipped without torch."""

import functools
import importlib
import pickle

import pytest

torch = pytest.importorskip("torch")
ours = importlib.import_module("pyx_xent.torch")
F = torch.nn.functional
FlopCounterMode = importlib.import_module("torch.utils.flop_counter").FlopCounterMode


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
    assert "taken back: nothing; 2 calls computed here, 0 passed on" in repr(patch)
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


@pytest.mark.filterwarnings("ignore")
def test_patch_passes_on_what_it_does_not_compute_and_says_why(calls):
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with ours.patch() as patch:
        assert F.cross_entropy(torch.empty(3, 5, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")).is_meta
        assert patch.passed_on.pop("device meta") == 1
        torch.func.grad(lambda x: F.cross_entropy(x, target))(logits)
        torch.func.vmap(lambda x: F.cross_entropy(x, target))(logits.expand(2, 3, 5))
        with torch.autograd.forward_ad.dual_level():
            F.cross_entropy(torch.autograd.forward_ad.make_dual(logits, logits), target)
        assert patch.passed_on.pop("torch.func or forward-mode derivatives") == 3
        torch.jit.trace(lambda x: F.cross_entropy(x, target), logits, check_trace=False)
        assert patch.passed_on.pop("torch.jit.trace") == 1
        torch.jit.script(torch.nn.CrossEntropyLoss())(logits, target)
        F.cross_entropy(logits, logits.softmax(1), torch.ones(5, requires_grad=True)).backward()
        assert patch.passed_on.pop("weight requires grad") == 1
        with pytest.raises((RuntimeError, NotImplementedError)):
            F.cross_entropy(logits.to(torch.int64), target)
        assert patch.passed_on.pop("dtype torch.int64") == 1
        assert calls == []
        with pytest.raises(IndexError):
            F.cross_entropy(logits, target + 5)
        calls.clear()
        assert (patch.computed, patch.passed_on.total()) == (0, 0)
        F.cross_entropy(logits, target)
        with FlopCounterMode(display=False):
            F.cross_entropy(logits, target)
        assert len(calls) == patch.computed == 2


@pytest.mark.filterwarnings("ignore")
def test_compiled_calls_are_routed_and_count_when_they_run(calls):
    target = torch.tensor([0, 1, 2])
    model = torch.nn.Linear(4, 5)

    def step(x):
        return torch.nn.CrossEntropyLoss()(model(x), target) + F.linear_cross_entropy(x, model.weight, target)

    x = torch.randn(3, 4)
    expected = step(x)
    with ours.patch() as patch:
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for k in range(1, 4):
            torch.testing.assert_close(compiled(x), expected)
            assert patch.computed == 2 * k
        compiled(x).backward()
        assert patch.passed_on.total() == 0
    torch.testing.assert_close(compiled(x), expected)  # compiled again, for PyTorch's own functions
    assert patch.computed == 8
    assert "8 calls computed here, 0 passed on" in repr(patch)
    torch._dynamo.reset()


def test_linear_cross_entropy_is_routed():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this PyTorch has none")
    theirs = F.linear_cross_entropy
    hidden, layer, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    arguments = {"linear_bias": torch.randn(5), "weight": torch.rand(5), "reduction": "sum", "label_smoothing": 0.1}
    expected = theirs(hidden, layer, target, **arguments)
    with ours.patch() as patch:
        torch.testing.assert_close(F.linear_cross_entropy(hidden, layer, target, **arguments), expected)
        assert patch.computed == 1
    assert F.linear_cross_entropy is theirs


def test_a_function_that_others_have_wrapped_is_wrapped(monkeypatch, calls):
    seen = []
    theirs = F.cross_entropy

    @functools.wraps(theirs)
    def wrapper(*args, **kwargs):
        seen.append("theirs")
        return theirs(*args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", wrapper)
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with ours.patch() as patch:
        F.cross_entropy(logits, target)
        assert seen == []  # computed here
        torch.func.grad(lambda x: F.cross_entropy(x, target))(logits)
        assert seen == ["theirs"]
        assert (patch.computed, patch.passed_on.total(), len(calls)) == (1, 1, 1)
    assert F.cross_entropy is wrapper
    first = ours.patch()
    routed = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: routed(*args, **kwargs))  # wraps what is patched
    ours.unpatch()
    del first
    torch.testing.assert_close(F.cross_entropy(logits, target), theirs(logits, target))  # passes on
    assert seen == ["theirs", "theirs"]


def test_patched_functions_pass_positional_and_legacy_arguments(calls):
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    expected = F.cross_entropy(logits, target, None, None, 1, None, "sum", 0.1)
    with ours.patch():
        torch.testing.assert_close(F.cross_entropy(logits, target, None, None, 1, None, "sum", 0.1), expected)
        torch.testing.assert_close(
            F.cross_entropy(input=logits, target=target, ignore_index=1, reduction="sum", label_smoothing=0.1), expected
        )
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_class_finds_its_own_implementation():
    implementations = {F.cross_entropy: lambda *arguments, **options: "mine"}

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            if function in implementations:
                return implementations[function](*arguments, **(options or {}))
            return super().__torch_function__(function, types, arguments, options or {})

    logits, target = torch.randn(2, 3).as_subclass(Own), torch.tensor([0, 1])
    with ours.patch() as patch:
        assert torch.nn.CrossEntropyLoss()(logits, target) == "mine"
        assert patch.computed == 0
        assert isinstance(F.nll_loss(logits, target), Own)
        assert patch.computed == 1


def test_what_fx_traces_is_pytorchs_function_and_computes_either_way():
    class Step(torch.nn.Module):
        def forward(self, logits, target):
            return F.cross_entropy(logits, target)

    theirs, (logits, target) = F.cross_entropy, (torch.randn(2, 3), torch.tensor([0, 1]))
    expected = F.cross_entropy(logits, target)
    with ours.patch() as patch:
        traced = torch.fx.symbolic_trace(Step())
        assert any(node.target == theirs for node in traced.graph.nodes)
        torch.testing.assert_close(traced(logits, target), expected)
        copied = pickle.loads(pickle.dumps(traced))
        torch.testing.assert_close(copied(logits, target), expected)
        assert patch.computed == 2
    assert torch.equal(traced(logits, target), expected)
    assert torch.equal(copied(logits, target), expected)
    assert patch.computed == 2


def test_each_call_counts_once_however_often_it_is_wrapped(monkeypatch):
    logits, target = torch.randn(2, 3), torch.tensor([0, 1])
    with ours.patch() as first:
        patched = F.cross_entropy
        monkeypatch.setattr(F, "cross_entropy", lambda *arguments, **options: patched(*arguments, **options))
        with ours.patch() as second:
            F.cross_entropy(logits.to("meta"), target.to("meta"))
            F.cross_entropy(logits, target)
        assert (second.computed, second.passed_on.total()) == (first.computed, first.passed_on.total()) == (1, 1)
    monkeypatch.undo()
    ours.unpatch()
