"""The objects: constructors of torch.nn, and a gradient that is the fused one bit for bit."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import same_bits

import pyx_xent as px


@pytest.mark.parametrize("classes", [3, 10, 64, 65, 1000])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_backward_gives_the_fused_gradient(isa, dtype, rng, classes, soft, order):
    logits = np.array(5 * rng.normal(size=(37, classes)), dtype, order=order)
    logits[3, 1] = 60
    target = (
        rng.random((37, classes)).astype(dtype) if soft else np.where(rng.random(37) < 0.3, -100, rng.integers(0, classes, 37))
    )
    if soft:
        target[3] = np.arange(classes) == 1
    else:
        target[3] = 1
    weight = rng.random(classes)
    for reduction in ("none", "mean", "sum"):
        options = {"reduction": reduction, "label_smoothing": 0.1}
        criterion = px.CrossEntropyLoss(weight, **options)
        loss = criterion(logits, target)
        upstream = rng.random(37) if reduction == "none" else 0.3
        for g in (upstream, 1.0, upstream):  # again and again
            expected, expected_grad = px.cross_entropy_with_grad(logits, target, weight, grad_output=g, **options)
            assert same_bits(loss, expected)
            assert same_bits(criterion.backward(g), expected_grad)


def test_nll_loss_object(rng):
    log_probs, target = px.log_softmax(rng.normal(size=(5, 4))), np.array([0, 1, -100, 3, 2])
    criterion = px.NLLLoss(reduction="sum")
    expected, expected_grad = px.nll_loss_with_grad(log_probs, target, reduction="sum", grad_output=2.0)
    assert same_bits(criterion(log_probs, target), expected)
    assert same_bits(criterion.backward(2.0), expected_grad)


def test_softmax_objects(rng):
    x, g = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4, 5))
    for layer, forward, backward in (
        (px.Softmax(dim=1), px.softmax, px.softmax_backward),
        (px.LogSoftmax(dim=1), px.log_softmax, px.log_softmax_backward),
    ):
        output = layer(x)
        assert same_bits(output, forward(x, 1))
        assert same_bits(layer.backward(g), backward(g, output, 1))


def test_backward_before_a_call_or_after_a_failed_one():
    for criterion in (px.CrossEntropyLoss(), px.NLLLoss(), px.Softmax(), px.LogSoftmax()):
        with pytest.raises(RuntimeError, match="needs a call first"):
            criterion.backward(1.0)
    criterion = px.CrossEntropyLoss()
    criterion(np.zeros((1, 2)), [0])
    with pytest.raises(IndexError):
        criterion(np.zeros((1, 2)), [2])
    with pytest.raises(RuntimeError, match="needs a call first"):
        criterion.backward()


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.parametrize("shape", [(640,), (10, 64), (1, 640, 1), (640, 1)], ids=str)
def test_backward_notices_that_the_logits_have_another_shape(isa, rng, shape):
    logits = rng.normal(size=(64, 10))
    for target in (rng.integers(0, 10, 64), rng.random((64, 10))):
        criterion = px.CrossEntropyLoss()
        criterion(logits, target)
        expected = criterion.backward()
        logits.shape = shape
        with pytest.raises(ValueError, match="the shape of an array has changed since it was checked"):
            criterion.backward()
        logits.shape = (64, 10)
        assert same_bits(criterion.backward(), expected)


def test_backward_of_one_object_in_several_threads(isa, rng):
    logits, target = rng.normal(size=(400, 1000)).astype(np.float32), rng.integers(0, 1000, 400)
    criterion = px.CrossEntropyLoss()
    criterion(logits, target)
    upstream = [1.0, 2.0, 4.0, 8.0]
    expected = [criterion.backward(g) for g in upstream]
    with ThreadPoolExecutor(len(upstream)) as pool:
        for _ in range(20):
            for result, alone in zip(pool.map(criterion.backward, upstream), expected, strict=True):
                assert same_bits(result, alone)


def test_options_are_attributes_and_survive_copies():
    logits, target = np.arange(6.0).reshape(2, 3), np.array([0, 1])
    for criterion, later in (
        (px.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1), {"label_smoothing": 0.2, "z_loss": 0.1, "axis": 1}),
        (px.NLLLoss(reduction="sum"), {"reduction": "none", "loss_dtype": np.float64}),
        (px.Softmax(), {"dim": 0}),
    ):
        arguments = (logits,) if isinstance(criterion, px.Softmax) else (logits, target)
        criterion(*arguments)
        for name, value in later.items():
            setattr(criterion, name, value)
            assert f"{name}={value!r}" in repr(criterion)
        for again in (copy.copy(criterion), copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
            assert repr(again) == repr(criterion)
            assert same_bits(again(*arguments), criterion(*arguments))
        with pytest.raises(AttributeError, match="no attribute 'epsilon'"):
            _ = criterion.epsilon


def test_objects_take_what_functions_take(rng):
    logits, target = rng.normal(size=(4, 5)).astype(np.float32), np.array([0, 1, -100, 4])
    of_call = {"sample_weight": np.array([1.0, 0.5, 2.0, 0.25]), "normalizer": 3.0}
    for criterion, function, options in (
        (
            px.CrossEntropyLoss,
            px.cross_entropy_with_grad,
            {"axis": -1, "z_loss": 0.1, "empty": "zero", "loss_dtype": np.float64},
        ),
        (px.NLLLoss, px.nll_loss_with_grad, {"axis": -1, "empty": "zero", "loss_dtype": np.float64}),
    ):
        made = criterion(**options)
        loss, gradient = function(logits, target, **options, **of_call)
        assert same_bits(made(logits, target, **of_call), loss)
        assert same_bits(made.backward(), gradient)


@pytest.mark.spec("S32")
def test_upstream_gradient_scales_rows(rng):
    logits, target, g = rng.normal(size=(4, 6)), np.array([0, 1, 2, 3]), rng.normal(size=4)
    loss, grad = px.cross_entropy_with_grad(logits, target, reduction="none", grad_output=g)
    _, plain = px.cross_entropy_with_grad(logits, target, reduction="none")
    np.testing.assert_allclose(grad, g[:, None] * plain, rtol=1e-13, atol=1e-16)
    assert loss.shape == (4,)
