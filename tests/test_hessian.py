"""SPEC S44: gradient and diagonal of the Hessian in one pass."""

import itertools

import numpy as np
import pytest
from conftest import GRAD_TOLERANCE, assert_close, same_bits

import pyx_xent as px
from pyx_xent import reference

pytestmark = pytest.mark.spec("S44")

INDEX = {
    "plain": {},
    "focal": {"focal_gamma": 2.0},
    "focal, gamma below 1": {"focal_gamma": 0.5},
    "smoothed": {"label_smoothing": 0.1},
}
CLASSES = [1, 2, 3, 10, 16, 17, 64, 65, 300, 513, 2050, 5000]


def problem(rng, dtype, rows, classes, soft=False):
    logits = (4 * rng.normal(size=(rows, classes))).astype(dtype)
    if soft:
        return logits, rng.random((rows, classes)).astype(dtype)
    target = rng.integers(0, classes, rows)
    target[rows // 2] = -100
    return logits, target


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_it_is_the_formula(isa, dtype, rng, classes, soft):
    logits, target = problem(rng, dtype, 37, classes, soft)
    weight, samples = rng.random(classes), rng.random(37)
    samples[5] = 0
    for options, reduction in itertools.product(({}, {"label_smoothing": 0.1}) if soft else INDEX.values(), ("mean", "sum")):
        every = {"weight": weight, "sample_weight": samples, "reduction": reduction, **options}
        grad, hess = px.cross_entropy_grad_hess(logits, target, **every)
        assert_close(hess, reference.cross_entropy_derivatives(logits, target, **every)[2], GRAD_TOLERANCE[dtype])
        assert same_bits(grad, px.cross_entropy_with_grad(logits, target, **every)[1])
        assert hess.min() >= 0


@pytest.mark.parametrize("name", ["plain", "smoothed"])
def test_it_is_the_central_difference_of_the_gradient(isa, rng, name):
    logits, target = problem(rng, np.float64, 5, 7)
    _, hess = px.cross_entropy_grad_hess(logits, target, **INDEX[name])
    step = 1e-5
    for i, c in np.ndindex(*logits.shape):
        up, down = logits.copy(), logits.copy()
        up[i, c] += step
        down[i, c] -= step
        slopes = [px.cross_entropy_with_grad(x, target, **INDEX[name])[1][i, c] for x in (up, down)]
        assert hess[i, c] == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("classes", [2, 10, 64, 65, 300, 5000, 40_000])
def test_bits_do_not_depend_on_layout_threads_or_outputs(isa, dtype, rng, many_threads, classes):
    logits, target = problem(rng, dtype, 6 if classes > 10_000 else 60, classes)
    expected = px.cross_entropy_grad_hess(logits, target, num_threads=1)
    inside = np.ascontiguousarray(logits.T)[None]
    for threads in (2, 4):
        for found in (
            px.cross_entropy_grad_hess(logits, target, num_threads=threads),
            px.cross_entropy_grad_hess(np.asfortranarray(logits), target, num_threads=threads),
            [a[0].T for a in px.cross_entropy_grad_hess(inside, target[None], num_threads=threads)],
        ):
            for one, wanted in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, wanted)
    spaced = np.zeros((len(logits), 2 * classes), dtype)[:, ::2]
    grad, hess = px.cross_entropy_grad_hess(logits, target, hess_out=spaced)
    assert hess is spaced
    np.testing.assert_array_equal(spaced, expected[1])
    for order in "CF":
        found = px.cross_entropy_grad_hess(np.array(logits, order=order), target)
        assert all(a.flags[f"{order}_CONTIGUOUS"] for a in found)
    memory, to = logits.copy(), np.full_like(logits, np.nan)
    grad, hess = px.cross_entropy_grad_hess(memory, target, grad_out=memory, hess_out=to)
    assert grad is memory
    assert hess is to
    assert same_bits(grad, expected[0])
    assert same_bits(hess, expected[1])
    _, doubled = px.cross_entropy_grad_hess(logits, target, hess_scale=2.0)
    np.testing.assert_array_equal(doubled, 2 * expected[1])


@pytest.mark.parametrize("classes", [3, 64, 100, 3000])
def test_a_confident_row_keeps_the_digits_of_its_target(isa, dtype, rng, classes):
    logits, target = problem(rng, dtype, 20, classes)
    target[target < 0] = 0
    own = np.arange(20), target
    logits[own] = logits.max(1) + 30
    others = np.exp(np.float64(logits) - np.float64(logits[own])[:, None])
    others[own] = 0
    _, hess = px.cross_entropy_grad_hess(logits, target, reduction="sum")
    u = others.sum(1)
    # The expected value has the rounding of x - y, of some 30, in double.
    np.testing.assert_allclose(hess[own], u / (1 + u) ** 2, rtol=4 * np.finfo(dtype).eps + 64 * np.finfo(np.float64).eps)


def test_ignored_rows_are_inert_and_others_with_nan_are_nan(isa, dtype, rng):
    for classes in (3, 100, 3000):
        logits, target = problem(rng, dtype, 20, classes)
        logits[[4, 10]] = np.nan
        assert target[10] == -100
        for array in (logits, np.asfortranarray(logits)):
            grad, hess = px.cross_entropy_grad_hess(array, target)
            assert not grad[10].any()
            assert not hess[10].any()
            assert np.isnan(hess[4]).all()
            assert np.isfinite(np.delete(hess, 4, 0)).all()


def test_half_types_are_rounded_once(isa, rng):
    logits, target = problem(rng, np.float16, 30, 21)
    _, hess = px.cross_entropy_grad_hess(logits, target, reduction="sum")
    assert hess.dtype == np.float16
    _, _, exact = reference.cross_entropy_derivatives(logits, target, reduction="sum")
    np.testing.assert_allclose(hess, exact, rtol=2**-11 + 2**-20, atol=2**-25 + 2**-40)


def test_what_it_refuses():
    logits = np.zeros((3, 5))
    with pytest.raises(TypeError, match="z_loss"):
        px.cross_entropy_grad_hess(logits, [0, 1, 2], z_loss=0.1)
    with pytest.raises(TypeError, match="hess_scale must be a number, got 'a'"):
        px.cross_entropy_grad_hess(logits, [0, 1, 2], hess_scale="a")
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        px.cross_entropy_grad_hess(logits, [0, 1, 5])
    for wrong, message in (
        (np.zeros((5, 3)), r"hess_out must have shape \(3, 5\), got \(5, 3\)"),
        (np.zeros((3, 5), np.float32), "hess_out must have dtype float64, got float32"),
        (logits, "hess_out overlaps logits in memory"),
    ):
        with pytest.raises(ValueError, match=message):
            px.cross_entropy_grad_hess(logits, [0, 1, 2], hess_out=wrong)
    memory = np.zeros((3, 5))
    with pytest.raises(ValueError, match="hess_out overlaps grad_out in memory"):
        px.cross_entropy_grad_hess(logits, [0, 1, 2], grad_out=memory, hess_out=memory)
    assert not memory.any()
