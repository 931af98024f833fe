"""Fixtures that run a test for every instruction set and element type of this machine, on real threads."""

import sys

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


@pytest.fixture
def generator():
    """PyTorch's, from a fixed seed."""
    import torch

    return torch.Generator().manual_seed(20261125)


@pytest.fixture(autouse=True)
def _torch_as_new():
    """What pyx_xent.torch has patched and found out is forgotten after each test."""
    yield
    patching, habits = (sys.modules.get(f"pyx_xent.torch.{name}") for name in ("patching", "_habits"))
    if patching is not None:
        patching.unpatch()
        habits.forget()


@pytest.fixture
def calls(monkeypatch):
    """The names of the entries of _call that pyx_xent.torch has called."""
    import pyx_xent.torch._calls
    from pyx_xent import _call

    found = []

    class Recording:
        def __getattr__(self, name):
            entry = getattr(_call, name)
            if not name.startswith(("cross_entropy", "nll")):
                return entry
            return lambda *a, **k: found.append(name) or entry(*a, **k)

    monkeypatch.setattr(pyx_xent.torch._calls, "_call", Recording())
    return found
