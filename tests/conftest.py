"""Fixtures that run a test for every instruction set and element type of this machine, on real threads."""

import numpy as np
import pytest

from pyx_xent import _dispatch, _threads

# Relative to the loss; relative to the largest entry of a gradient (SPEC section 10).
LOSS_TOLERANCE = {np.float32: 2e-6, np.float64: 1e-12}
GRAD_TOLERANCE = {np.float32: 1e-6, np.float64: 1e-12}


@pytest.fixture(params=_dispatch.supported)
def isa(request):
    with _dispatch.use(request.param):
        yield request.param


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(20261123)


@pytest.fixture
def many_threads(monkeypatch):
    """Let num_threads=4 start four threads, however small the arrays and the machine are."""
    monkeypatch.setattr(_threads, "NANOSECONDS_WORTH_A_THREAD", 0.01)
    monkeypatch.setattr(_threads, "available", lambda: (4, "test"))


def assert_close(actual, expected, tolerance):
    """|actual - expected| <= tolerance * largest finite |expected|; NaN and infinities in the same places."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_array_equal(actual[np.isinf(expected)], expected[np.isinf(expected)])
    scale = np.abs(expected[finite]).max(initial=0.0)
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=tolerance, atol=tolerance * scale)


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
