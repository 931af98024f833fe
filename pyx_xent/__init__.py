"""Cross-entropy, softmax and their gradients on CPUs.

functional.py ── _call.pyx           one entry an operation: every argument checked, then a Problem: plain memory
      │            _call_checks.pxi      one argument each, the Options of a loss
      │            _call_labels.pxi      labels copied and checked; which rows count
      │            _call_memory.pxi      strides, overlap, outputs, pointers
      │            _plan.pxi             which kernel, how many rows together, threads, scratch
      │              └── _memory.pyx     large outputs, in memory that nobody holds any more
      │
      └───────── _dispatch.py ────── _kernels/{baseline, avx2, avx512, neon}_{float, double}
                                       batch.pxi              rows handed to threads
                                         tile.pxi               few classes: LANES rows, one in each lane
                                         row.pxi                many classes: a row at a time
                                           loss.pxi               what happens once a row, for LANES rows at once
                                           steps.pxi copy.pxi     loops over vectors; strides and half types
                                             exp.pxi                one vector
                                               vectors.h              what a vector is on this processor
linear.py       a linear layer and its loss, some rows at a time
losses.py       objects with the constructors of torch.nn
torch/          the functions and modules of PyTorch; imported on request
reference.py    the same in float64 NumPy, formula by formula: what the tests compare with
"""

from ._config import show_config
from ._dispatch import active as isa
from ._memory import reuse_gradients
from ._threads import get_num_threads, set_num_threads
from ._version import __version__
from .functional import (
    cross_entropy,
    cross_entropy_grad_hess,
    cross_entropy_with_grad,
    log_softmax,
    log_softmax_backward,
    nll_loss,
    nll_loss_with_grad,
    softmax,
    softmax_backward,
)
from .linear import linear_cross_entropy, linear_cross_entropy_with_grad
from .losses import CrossEntropyLoss, LogSoftmax, NLLLoss, Softmax

__all__ = [
    "CrossEntropyLoss",
    "LogSoftmax",
    "NLLLoss",
    "Softmax",
    "__version__",
    "cross_entropy",
    "cross_entropy_grad_hess",
    "cross_entropy_with_grad",
    "get_num_threads",
    "isa",
    "linear_cross_entropy",
    "linear_cross_entropy_with_grad",
    "log_softmax",
    "log_softmax_backward",
    "nll_loss",
    "nll_loss_with_grad",
    "reuse_gradients",
    "set_num_threads",
    "show_config",
    "softmax",
    "softmax_backward",
]


def __getattr__(name):
    if name != "torch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        return importlib.import_module(".torch", __name__)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise AttributeError(str(error)) from None  # so that hasattr() says no


def __dir__():
    from importlib.util import find_spec

    return [*globals(), *(["torch"] if find_spec("torch") else [])]
