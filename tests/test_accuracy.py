"""How far, in units in the last place, each number lies from its formula. SPEC sections 4 and 7.

The formulas are those of pyx_xent/reference.py: in float64 for float32, in long double for float64. Logits are rounded to
their dtype before either side sees them. Only what is a normal number counts.
"""

import functools
import zlib

import numpy as np
import pytest

import pyx_xent as px
from pyx_xent import _dispatch, reference

LOSS_ULP = {np.float32: 2, np.float64: 3}
ENTRY_ULP = {np.float32: 4, np.float64: 5}
CLASSES = [2, 10, 33, 100, 1000, 50257]
ROWS = ["spread 1", "spread 5", "spread 20", "offset 1e4", "gap 25", "gap 60", "p_max 0.94", "p_max 0.6"]
TARGETS = {
    "index": {},
    "weighted": {"weight": True},
    "smoothed": {"label_smoothing": 0.1},
    "smoothed and weighted": {"label_smoothing": 0.1, "weight": True},
    "soft": {},
    "nearly one-hot": {},
    "soft, smoothed and weighted": {"label_smoothing": 0.1, "weight": True},
}

long_double_is_short = np.finfo(np.longdouble).nmant < 63


def wider(dtype):
    if dtype is np.float64 and long_double_is_short:
        pytest.skip("long double is not longer than double here")
    return np.float64 if dtype is np.float32 else np.longdouble


@functools.cache
def problem(kind, classes, dtype):
    """Rows of that kind, and for each the class that stands out where one does: (rows, classes), (rows,)."""
    rng = np.random.default_rng(zlib.crc32(f"{kind} {classes}".encode()))
    rows = 2 if classes > 10_000 else 18
    name, amount = kind.split()
    spread = float(amount) if name == "spread" else 5.0 if name == "offset" else 1.0
    logits = spread * rng.normal(size=(rows, classes)) + (1e4 if name == "offset" else 0.0)
    own = rng.integers(0, classes, rows)
    for i in range(rows):
        others = np.delete(logits[i], own[i])
        if name == "gap":
            logits[i, own[i]] = others.max() + float(amount)
        elif name == "p_max":
            logits[i, own[i]] = np.log(np.exp(others).sum()) + np.log(float(amount) / (1 - float(amount)))
    return logits.astype(dtype), own


@functools.cache
def target_of(name, kind, classes, dtype):
    """(target, options)"""
    rng = np.random.default_rng(zlib.crc32(f"{name} {kind} {classes}".encode()))
    logits, own = problem(kind, classes, dtype)
    options = dict(TARGETS[name])
    if "weight" in options:
        options["weight"] = (0.1 + rng.random(classes)).astype(dtype)
    if name.startswith("soft"):
        q = rng.random(logits.shape) * (rng.random(logits.shape) < 0.7)
        q[:, 0] += 0.01
        return (q / q.sum(1, keepdims=True)).astype(dtype), options
    if name == "nearly one-hot":
        q = np.full(logits.shape, 1e-3 / classes)
        q[np.arange(len(own)), own] += 0.999
        return q.astype(dtype), options
    # Every third row has its target anywhere.
    return np.where(np.arange(len(own)) % 3 == 2, rng.integers(0, classes, len(own)), own), options


def log_softmax(x, wide):
    """reference.log_softmax in `wide`."""
    if wide is np.float64:
        return reference.log_softmax(x)
    x = x.astype(wide)
    largest = x.max(-1, keepdims=True)
    exponentials = np.exp(x - largest)
    np.put_along_axis(exponentials, x.argmax(-1)[:, None], 0, -1)
    return (x - largest) - np.log1p(exponentials.sum(-1, keepdims=True))


@functools.cache
def log_probabilities(kind, classes, dtype):
    return log_softmax(problem(kind, classes, dtype)[0], wider(dtype))


@functools.cache
def expected_loss_and_gradient(name, kind, classes, dtype):
    """Loss, gradient, and the number in whose last place an entry of the gradient is measured."""
    wide = wider(dtype)
    (logits, _), (target, options) = problem(kind, classes, dtype), target_of(name, kind, classes, dtype)
    ell = log_probabilities(kind, classes, dtype)
    p = np.exp(ell)
    # SPEC S31: A p - own, where A = Σ own.
    eps = wide(options.get("label_smoothing", 0.0))
    w = options.get("weight", np.ones(classes)).astype(wide)
    if target.ndim == 2:
        own = w * ((1 - eps) * target.astype(wide) + eps / classes)
    else:
        own = (1 - eps) * w[target][:, None] * (np.arange(classes) == target[:, None]) + eps / classes * w
    a = own.sum(-1, keepdims=True) if target.ndim == 2 else (1 - eps) * w[target][:, None] + eps / classes * w.sum()
    if wide is np.float64:
        loss, grad = reference.cross_entropy_with_grad(logits, target, reduction="none", **options)
    else:
        loss = -(own * ell).sum(-1)
        grad = np.where(p > 0.5, a * np.expm1(ell) + (a - own), a * p - own)
    plain = target.ndim == 1 and not eps
    return loss, grad, np.abs(grad) if plain else np.maximum(a * p, own)


def ulps(actual, expected, measured_at=None):
    """The largest |actual - expected| in units in the last place of `measured_at`, by default `expected`."""
    dtype = actual.dtype
    measured_at = np.abs(expected if measured_at is None else measured_at)
    normal = measured_at >= np.finfo(dtype).tiny
    error = np.abs(actual.astype(expected.dtype) - expected)[normal]
    return float((error / np.spacing(measured_at[normal].astype(dtype))).max(initial=0.0))


@pytest.mark.spec("S13", "S14", "S16", "S31", "S34")
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", TARGETS)
def test_loss_and_gradient_are_right_to_the_last_places(isa, dtype, name, kind, classes):
    logits, _ = problem(kind, classes, dtype)
    target, options = target_of(name, kind, classes, dtype)
    expected, expected_grad, measured_at = expected_loss_and_gradient(name, kind, classes, dtype)
    loss = px.cross_entropy(logits, target, reduction="none", **options)
    _, grad = px.cross_entropy_with_grad(logits, target, reduction="sum", **options)
    assert ulps(loss, expected) <= LOSS_ULP[dtype]
    assert ulps(grad, expected_grad, measured_at) <= ENTRY_ULP[dtype]


@pytest.mark.spec("S34", "S46")
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_loss_keeps_the_digits_of_confident_rows(isa, dtype, gamma, kind, classes):
    """A rounding of 1 - p counts gamma times; where gamma is no whole number, that of its logarithm as it is large."""
    logits, _ = problem(kind, classes, dtype)
    target, _ = target_of("index", kind, classes, dtype)
    ell, own = log_probabilities(kind, classes, dtype), np.arange(classes) == target[:, None]
    p = np.exp(ell)
    others, log_p = np.where(own, 0, p).sum(-1), ell[own]
    factor = others**gamma * (1 - gamma * p[own] * log_p / others)
    grad = factor[:, None] * np.where(own, -others[:, None], p)
    loss, found = px.cross_entropy_with_grad(logits, target, reduction="none", focal_gamma=gamma)
    slack = 0 if gamma % 1 == 0 or dtype is np.float32 else 64
    assert ulps(loss, others**gamma * -log_p) <= LOSS_ULP[dtype] * (1 + gamma) + slack
    assert ulps(found, grad) <= ENTRY_ULP[dtype] + LOSS_ULP[dtype] * gamma + slack


@pytest.mark.spec("S13", "S34")
@pytest.mark.parametrize("label_smoothing", [0, 0.1])
@pytest.mark.parametrize("classes", [2, 10, 37, 100])
@pytest.mark.parametrize("kind", ["spread 20", "offset 1e4", "gap 60"])
def test_none_of_many_short_rows_loses_a_place(isa, rng, kind, classes, label_smoothing):
    """Of a few rows, none may have the roundings that add up."""
    logits = {"spread": 20, "offset": 5, "gap": 1}[kind.split()[0]] * rng.normal(size=(20_000, classes))
    target = rng.integers(0, classes, len(logits))
    own = np.arange(len(logits)), target
    if kind == "gap 60":
        logits[own] = logits.max(axis=1) + 60
    logits = (logits + (1e4 if kind == "offset 1e4" else 0)).astype(np.float32)
    wide = logits.astype(np.float64)
    others = np.exp(wide - wide[own][:, None])
    others[own] = 0
    loss = np.log1p(others.sum(axis=1))
    below = loss[:, None] + wide[own][:, None] - wide  # lse - x
    expected = (1 - label_smoothing) * loss + label_smoothing * below.mean(axis=1)
    found = px.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    assert ulps(found, expected) <= LOSS_ULP[np.float32]


@pytest.mark.spec("S34", "S37")
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", ROWS)
def test_softmax_and_log_softmax_are_right_to_the_last_places(isa, dtype, kind, classes):
    logits, _ = problem(kind, classes, dtype)
    ell = log_probabilities(kind, classes, dtype)
    assert ulps(px.log_softmax(logits), ell) <= ENTRY_ULP[dtype]
    assert ulps(px.softmax(logits), np.exp(ell)) <= ENTRY_ULP[dtype]


@pytest.mark.spec("S34")
@pytest.mark.parametrize("classes", [1000, 5000])
def test_probabilities_beside_one_near_1_keep_their_digits(isa, dtype, rng, classes):
    logits = rng.normal(size=(100, classes))
    logits[:, classes // 2] = logits.max(axis=1) + 12
    logits = logits.astype(dtype)
    assert ulps(px.softmax(logits), np.exp(log_softmax(logits, wider(dtype)))) <= ENTRY_ULP[dtype]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_exponentials(isa, rng, kind):
    """trust/exp.py looks at every float32."""
    from trust import exp

    x = np.concatenate([rng.uniform(-87, 88, 200_000), rng.normal(size=100_000), [0.0, -0.0, 1e-30, -87.0, 88.0]]).astype(kind)
    out = np.empty_like(x)
    _dispatch.exponentials(isa, x, out)
    exact = np.exp(x.astype(np.longdouble))
    error = exp.units_in_the_last_place(out, exact)
    assert error.max() <= exp.PROMISED[isa]
    assert error.max() > 0.5
