"""Cross-entropy, softmax and their gradients on CPUs.

functional.py ── _arguments.pyx      every argument checked, then a Problem: plain memory
      │            └── _memory.pyx         large outputs, in memory that nobody holds any more
      │
      └───────── _dispatch.py ────── _kernels/{baseline, avx2, avx512}
                                       batch.pxi              rows handed to threads
                                         operations.pxi         what is computed of a block of rows
                                           blocks.pxi work.pxi    maximum and sum, gradient of up to ROWS rows; of one
                                             lanes.pxi              LANES columns or rows
                                               exp.pxi                one number
linear.py       a linear layer and its loss, some rows at a time
losses.py       objects with the constructors of torch.nn
torch.py        the functions and modules of PyTorch; imported on request
reference.py    the same in float64 NumPy, formula by formula: what the tests compare with
"""

from ._config import VERSION as __version__
from ._config import show_config
from ._dispatch import active as isa
from ._memory import reuse_gradients
from ._threads import get_num_threads, set_num_threads
from .functional import (
    cross_entropy,
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
