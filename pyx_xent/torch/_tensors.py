"""Tensors as the arrays that _call reads and writes, and the memory of gradients.

A tensor's memory is read where it is. Not by Tensor.numpy(), after which its storage cannot be resized any more: FSDP frees the
memory of parameters in that way between two uses.
"""

import contextlib
import math
import os
import threading
from typing import NamedTuple

import numpy as np
import torch

from .. import _call, _memory
from . import _private

HALVES = (torch.bfloat16, torch.float16)
FLOATS = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: _call.bfloat16_bits,
}
_DTYPES = FLOATS | {
    getattr(torch, name): np.dtype(name)
    for name in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128")
}


def wide_dtype(dtype):
    """The dtype in which numbers of `dtype` are computed, and their products added up."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def array_of(tensor):
    """The memory of a tensor as an array."""
    if tensor.is_neg():  # it shows other numbers than are in its memory
        tensor = tensor.resolve_neg()
    address = tensor.data_ptr()
    if not address and tensor._is_zerotensor():  # PyTorch's zeros without memory, of forward-mode derivatives
        return np.zeros(tensor.shape, _DTYPES[tensor.dtype])
    try:
        dtype = _DTYPES[tensor.dtype]
    except KeyError:
        raise TypeError(f"{tensor.dtype} is not supported, use float32, float64, float16, bfloat16, or integers") from None
    return _memory.array_at(
        address, tensor.storage_offset(), tensor.untyped_storage().nbytes(), tensor.shape, tensor.stride(), dtype, tensor
    )


def tensor_of(array):
    """An array's memory as a tensor, the other way round."""
    if array.dtype == _call.bfloat16_bits:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


# Memory of gradients. The system clears new memory as it is first touched, which costs more than computing the gradient, and
# large memory goes back to it at once. So it is remembered here, and used again when nobody else holds it any more.


class _Memory(NamedTuple):
    """Of a gradient: a tensor of bytes, and what it has for holders while it is idle."""

    tensor: torch.Tensor
    alone: tuple

    def is_idle(self):
        return _private.holders_of(self.tensor) == self.alone


_MOST_MEMORIES = 32
_memories = []  # the last used last; whoever takes one out has it alone
_lock = threading.Lock()


def gradient_like(input):
    """An ordinary tensor for the gradient of `input`, strided as by torch.empty_like: a large one in memory used before."""
    if not _is_reused(input.numel() * input.element_size()):
        return torch.empty_like(input)
    return _empty(input.dtype, input.shape, torch.empty_like(input, device="meta").stride())


def contiguous_gradient(shape, dtype):
    """Likewise, contiguous."""
    if not _is_reused(math.prod(shape) * dtype.itemsize):
        return torch.empty(shape, dtype=dtype, device="cpu")
    return _empty(dtype, shape, torch.empty(shape, device="meta").stride())


def _is_reused(size):
    return size >= _memory.LARGE and _memory.budget_bytes() > 0 and _private.knows_holders


def _empty(dtype, shape, strides):
    size = math.prod(shape) * dtype.itemsize
    memory = _unused(size)
    if memory is None:
        tensor = torch.empty(size, dtype=torch.uint8, device="cpu")
        _private.holders_of(tensor)  # the first storage object stays
        memory = _Memory(tensor, _private.holders_of(tensor))
    gradient = torch.empty(0, dtype=dtype, device="cpu").set_(memory.tensor.untyped_storage(), 0, shape, strides)
    _remember(memory)
    trim()
    return gradient


@contextlib.contextmanager
def _to_all():
    """The memories that nobody else is at, or none: what is done with them may be interrupted by a signal's handler or a
    finalizer that comes here again, and must not wait for what it has interrupted.
    """
    lock = _lock
    if not lock.acquire(blocking=False):
        yield []
        return
    try:
        yield _memories
    finally:
        lock.release()


def _remember(memory):
    with _to_all() as memories:
        memories.append(memory)


def _unused(size):
    with _to_all() as memories:
        for k in range(len(memories) - 1, -1, -1):
            tensor = memories[k].tensor
            if size <= tensor.numel() <= size + size // 4 and memories[k].is_idle() and _is_whole(tensor):
                return memories.pop(k)
    return None


def _is_whole(tensor):
    """Whether whoever had the gradient left its memory as it was: not resized, nor shared with another process."""
    storage = tensor.untyped_storage()
    return storage.nbytes() == tensor.numel() and storage.resizable() and not storage.is_shared()


def trim():
    """Forget what is over the budget of reuse_gradients, the oldest first, and what others have changed."""
    with _to_all() as memories:
        rest, idle = _memory.budget_bytes() - _memory.kept_bytes(), 0
        for k in range(len(memories) - 1, -1, -1):
            if memories[k].is_idle():
                idle += memories[k].tensor.numel()
            if idle > rest or len(memories) - k > _MOST_MEMORIES or not _is_whole(memories[k].tensor):
                del memories[k]


def _forget_after_fork():
    global _lock
    _lock = threading.Lock()
    _memories.clear()


_memory.also_when_shrunk(trim)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
