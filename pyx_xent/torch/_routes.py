"""Which way a call goes.

EAGER      ordinary CPU tensors, and nothing watches what is done with them: straight to the kernels
OPERATOR   torch.compile, dispatch modes, fake tensors: torch.ops.pyx_xent.*, and PyTorch's dispatcher, which knows the rules
PYTORCH    what neither can do: other devices and layouts, torch.func, forward-mode derivatives, tracing, export, tensors with a
           __torch_dispatch__ of their own (DTensor). PyTorch's own function computes it, or says what is wrong
"""

import torch
from torch import Tensor

from . import _private

EAGER, OPERATOR, PYTORCH = "eager", "operator", "pytorch"
_PLAIN = (Tensor, torch.nn.Parameter)


def _is_cpu_strided(tensor):
    return tensor.is_cpu and tensor.layout is torch.strided


def _is_memory(tensor):
    """Whether a tensor is numbers in the CPU's memory, whatever its class is called."""
    return _is_cpu_strided(tensor) and (type(tensor) in _PLAIN or type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__)


def is_plain(input, target, weight, sample_weight, normalizer):
    """A short test for most calls: is the way EAGER, and does no weight require grad? If it says no, check, and ask way_of."""
    if type(input) not in _PLAIN or type(target) not in _PLAIN or _private.is_anything_at_work():
        return False
    for tensor in (weight, sample_weight):
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.requires_grad or not _is_cpu_strided(tensor)):
            return False
    if normalizer is not None and type(normalizer) is not float:
        return False
    return _is_cpu_strided(input) and _is_cpu_strided(target)


def way_of(tensors):
    """The way of a call with such tensors, of which some may be None or numbers."""
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if not all(tensor.is_cpu for tensor in tensors):
        _check_devices(tensors)
        return PYTORCH
    if _private.is_transformed():
        return PYTORCH
    if torch.compiler.is_compiling():
        return OPERATOR if all(_is_cpu_strided(tensor) for tensor in tensors) and not _private.is_exporting() else PYTORCH
    if _private.is_traced():
        return PYTORCH
    if all(_is_memory(tensor) for tensor in tensors):
        return OPERATOR if _private.is_watched() else EAGER
    return OPERATOR if all(_is_memory(tensor) or _private.is_fake(tensor) for tensor in tensors) else PYTORCH


def reason_of(tensors):
    """Why the way is PYTORCH."""
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"device {tensor.device.type}"
    if _private.is_transformed():
        return "torch.func or forward-mode derivatives"
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            return f"layout {tensor.layout}"
    if _private.is_traced():
        return "torch.jit.trace"
    if torch.compiler.is_compiling():
        return "torch.export"
    return f"tensor class {next(type(tensor).__name__ for tensor in tensors if not _is_memory(tensor))}"


def _check_devices(tensors):
    # PyTorch does not always say so: F.linear of a weight on the meta device is uninitialised memory.
    devices = {str(tensor.device) for tensor in tensors if tensor.dim()}
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {' and '.join(sorted(devices))}")
