"""Which BLAS multiplies a linear layer's tensors: PyTorch's, or NumPy's where that is faster.

PyTorch's wheels multiply by MKL, which has its fastest kernels for Intel's processors only; NumPy's by OpenBLAS, which has them
for all. `auto` takes NumPy's where these facts say that it may be faster, and a measurement that it is.
"""

import contextlib
import functools
import os
import threading
import time
from pathlib import Path

import torch

from .. import linear

AUTO, NUMPY, TORCH = CHOICES = ("auto", "numpy", "torch")
VARIABLE = "PYX_XENT_MATMUL"
WORTH_CHANGING = 1.3  # times as fast, or PyTorch's it stays
WORTH_MEASURING = 4e9  # floating-point operations of a call: the measurement takes some fifty milliseconds, once
MEASURED = 256, 512, 4096  # rows, width and classes of the product that is timed
ROUNDS = 4

_chosen = None


def set_matmul(library):
    """Choose who multiplies for `linear_cross_entropy` and `LinearCrossEntropyLoss`, in the whole process.

    Parameters
    ----------
    library : "auto", "numpy" or "torch"
        "torch": PyTorch's matrix products, of MKL and oneDNN. "numpy": those of NumPy's BLAS, in float32 for half types, with
        as many threads as PyTorch may use (needs threadpoolctl). "auto", the default: NumPy's where the processor is AMD's,
        PyTorch multiplies by MKL, NumPy by OpenBLAS, and one measurement in each process finds it at least 1.3 times as fast;
        PyTorch's everywhere else, for bfloat16 that oneDNN multiplies, and for small layers.

    The environment variable ``PYX_XENT_MATMUL`` says it for a process from its start. After
    ``torch.use_deterministic_algorithms(True)`` it is "torch". `pyx_xent.show_config()` says what multiplies.

    Raises
    ------
    ValueError
        For another word.
    ImportError
        For "numpy" without threadpoolctl.

    Examples
    --------
    >>> from pyx_xent.torch import set_matmul
    >>> set_matmul("torch")
    >>> set_matmul("auto")
    """
    global _chosen
    _chosen = _checked(library, "library")


def _checked(library, name):
    if library not in CHOICES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES))}, got {library!r}")
    if library == NUMPY and numpy_blas() is None:
        raise ImportError(f"{name}={NUMPY!r} needs threadpoolctl, which bounds that BLAS's threads: pip install threadpoolctl")
    return library


def setting():
    """What the user has chosen."""
    global _chosen
    if _chosen is None:
        _chosen = _checked(os.environ.get(VARIABLE) or AUTO, VARIABLE)
    return _chosen


def multiplies(dtype, operations):
    """NUMPY or TORCH, for products of so many floating-point operations in `dtype`."""
    if torch.are_deterministic_algorithms_enabled():
        return TORCH
    library = setting()
    if library != AUTO:
        return library
    if operations < WORTH_MEASURING or why_not_numpy(dtype):
        return TORCH
    return _faster(gain(dtype, torch.get_num_threads()))


def _faster(gain):
    return NUMPY if gain >= WORTH_CHANGING else TORCH


def description():
    """Who multiplies and why, as show_config() says it."""
    library = setting()
    if torch.are_deterministic_algorithms_enabled():
        return f"{TORCH} (torch.use_deterministic_algorithms)"
    if library != AUTO:
        return f"{library} (set_matmul or {VARIABLE})"
    why = why_not_numpy(torch.float32)
    if why:
        return f"{TORCH} ({why})"
    found = [
        f"{dtype} with {threads} threads by {_faster(gain)}: numpy is {gain:.2f} times as fast as torch"
        for (dtype, threads), gain in sorted(_gains.items(), key=str)
    ]
    return "; ".join(found) or "torch; measured when a layer is large"


def why_not_numpy(dtype):
    """The fact for which NumPy's BLAS is not even tried; "" if there is none."""
    if dtype not in (torch.float32, torch.float64):
        return f"oneDNN multiplies {dtype}"
    blas = numpy_blas()
    if blas is None:
        return "threadpoolctl is not installed"
    if not torch.backends.mkl.is_available():
        return "PyTorch does not multiply by MKL"
    if blas.internal_api != "openblas":
        return "NumPy does not multiply by OpenBLAS"
    if vendor() != "AuthenticAMD":
        return f"the processor's vendor is {vendor()}, for whose processors MKL is fast"
    return ""


@functools.cache
def vendor():
    """The processor's vendor as it calls itself; "unknown" where no file says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "unknown")


@functools.cache
def numpy_blas():
    """threadpoolctl's controller of the BLAS that NumPy multiplies by; None without threadpoolctl, or if it knows none."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    found = [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]
    return next((library for library in found if "numpy" in library.filepath), found[0] if found else None)


class _ThreadsOfBlas:
    """NumPy's BLAS with one thread a product, while anybody here multiplies by it on threads of ours.

    Its own threads would look out for more work for some 25 ms after each call, on the cores that PyTorch's next operation
    needs.
    """

    def __init__(self):
        self.lock, self.users, self.before = threading.Lock(), 0, None

    @contextlib.contextmanager
    def one(self):
        """-> how many of our threads may multiply: as many as PyTorch has, and that BLAS had."""
        blas = numpy_blas()
        with self.lock:
            if self.users == 0:
                self.before = blas.get_num_threads()
                blas.set_num_threads(1)
            self.users += 1
            threads = min(self.before, torch.get_num_threads())
        try:
            yield threads
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    blas.set_num_threads(self.before)


_threads = _ThreadsOfBlas()
one_thread_a_product = _threads.one
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.__init__)  # whoever held the lock is not in the child


_gains = {}  # (dtype, threads): what was measured


def gain(dtype, threads):
    """PyTorch's time over NumPy's for one product, measured once."""
    if (dtype, threads) not in _gains:
        _gains[dtype, threads] = _measured_gain(dtype)
    return _gains[dtype, threads]


def _measured_gain(dtype):
    rows, width, classes = MEASURED
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, dtype=dtype, generator=generator)
    weight = torch.randn(classes, width, dtype=dtype, generator=generator)
    out = torch.empty(rows, classes, dtype=dtype)
    arrays = hidden.numpy(), out.numpy()
    of_torch = _best_time(lambda: torch.mm(hidden, weight.T, out=out))
    with one_thread_a_product() as threads:
        products = linear.Products(weight.numpy(), threads)
        of_numpy = _best_time(lambda: products.logits(*arrays))
    return of_torch / of_numpy


def _best_time(product):
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)
