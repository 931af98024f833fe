"""PyTorch's cross-entropy on the CPU, computed by pyx_xent: change the import, keep the rest. Imported on request only.

functional.py   cross_entropy, nll_loss, linear_cross_entropy
modules.py      CrossEntropyLoss, NLLLoss, LinearCrossEntropyLoss
patching.py     patch(): torch.nn.functional's, for models that call them
fused_head.py   fuse_head(): models that train without making their logits, by _lazy_logits.py
  │
  ├── _loss.py, _linear.py ── _routes.py    which way a call goes
  │     ├── _eager.py, _linear_eager.py         plain CPU tensors: gradients are made together with the loss
  │     │     └── _habits.py                      for the upstream gradient that is expected
  │     ├── _operators.py, _linear_operators.py torch.ops.pyx_xent.*: torch.compile, dispatch modes
  │     │     └── _derivatives.py                 what is differentiated twice
  │     ├── _linear_logits.py                   a linear layer's loss by way of logits
  │     └── _pytorch.py                         PyTorch's own functions, for what neither can do
  │
  ├── _arguments.py                         what arguments have to be, before a way is chosen
  ├── _calls.py, _linear_products.py        one call of the kernels
  │     ├── _matmul.py                        which BLAS multiplies
  │     ├── _tensors.py                       tensors as arrays; memory of gradients
  │     └── _options.py                       what a loss reads and is asked for
  └── _private.py                           what PyTorch does not promise

Logits are read, and gradients written, in the tensors' own memory.
"""

try:
    import torch as _torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "pyx_xent.torch needs PyTorch: pip install torch, its CPU build from https://download.pytorch.org/whl/cpu",
        name=error.name,
    ) from None

from .._memory import reuse_gradients
from ._matmul import set_matmul
from .functional import cross_entropy, linear_cross_entropy, nll_loss
from .fused_head import fuse_head
from .modules import CrossEntropyLoss, NLLLoss
from .patching import patch, unpatch

__all__ = [
    "CrossEntropyLoss",
    "NLLLoss",
    "cross_entropy",
    "fuse_head",
    "linear_cross_entropy",
    "nll_loss",
    "patch",
    "reuse_gradients",
    "set_matmul",
    "unpatch",
]

if hasattr(_torch.nn, "LinearCrossEntropyLoss"):
    from .modules import LinearCrossEntropyLoss

    __all__ += ["LinearCrossEntropyLoss"]
