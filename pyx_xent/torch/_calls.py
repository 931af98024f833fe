"""One call of the kernels, for tensors: what eager losses and operators have in common."""

import functools

import numpy as np
import torch

from .. import _call
from ._options import Options, Tensors
from ._tensors import FLOATS, HALVES, array_of, gradient_like

_NUMPYS = {None: None, torch.float32: np.float32, torch.float64: np.float64}


def _real_array(tensor):
    """Of weights, which may be absent; they are cast in any case, so bfloat16 ones here."""
    return None if tensor is None else array_of(tensor.float() if tensor.dtype is torch.bfloat16 else tensor)


def converted_options(tensors, options, axis=None):
    """Options and the tensors that belong to them, as _call takes them."""
    if tensors.weight is None and tensors.sample_weight is None and tensors.normalizer is None and axis is None:
        try:
            return _converted_alone(*options)
        except TypeError:
            pass  # one of them is no key: what is wrong with it is said below
    return _convert(tensors, options, axis)


@functools.lru_cache(maxsize=256, typed=True)  # typed: 1 and 1.0 are equal, but no float is an ignore_index
def _converted_alone(*options):
    return _convert(Tensors(None, None), Options(*options), None)


def _convert(tensors, options, axis):
    if options.loss_dtype not in tuple(_NUMPYS):
        raise TypeError(f"loss_dtype must be None, torch.float32 or torch.float64, got {options.loss_dtype}")
    of_both = options._asdict() | {"loss_dtype": _NUMPYS[options.loss_dtype]}
    del of_both["log_probs"]
    return _call.options(
        weight=_real_array(tensors.weight), sample_weight=_real_array(tensors.sample_weight), normalizer=tensors.normalizer,
        axis=axis, **of_both,
        name="input", if_last="input.movedim(-1, 1), if it is the last", if_binary="torch.stack([0 * x, x], 1)",
    )  # fmt: skip


def upstream_of(grad_output):
    """A number, or one for each row."""
    return array_of(grad_output.double()) if grad_output.dim() else float(grad_output)


def _arguments(tensors, options):
    """Of an entry of _call: (logits, target, options)"""
    return array_of(tensors.input), array_of(tensors.target), converted_options(tensors, options)


def with_loss(tensors, options):
    """The call that has the loss."""
    entry = _call.nll if options.log_probs else _call.cross_entropy
    call = entry(*_arguments(tensors, options), None, torch.get_num_threads())
    call.run()
    return call


def with_state(tensors, options):
    """The call that has the loss, and what `gradient` takes: an array, (2, rows) float64. None of log-probabilities."""
    if options.log_probs:
        return with_loss(tensors, options), None
    call = _call.cross_entropy_with_state(*_arguments(tensors, options), torch.get_num_threads())
    call.run()
    return call, call.row_state()


def with_gradient(tensors, options, upstream, out):
    """The call that has the loss; the gradient, for an upstream number or array, goes into the tensor `out`."""
    entry = _call.nll_with_grad if options.log_probs else _call.cross_entropy_with_grad
    call = entry(*_arguments(tensors, options), None, torch.get_num_threads(), upstream, array_of(out))
    call.run()
    call.gradient()
    return call


def gradient(grad_output, tensors, state, options, out=None):
    """The gradient with respect to the logits, in `out` or a new tensor; faster from the state that the loss has left."""
    if grad_output.dim() and options.reduction != "none":
        raise ValueError(
            f"grad_output must be a scalar for reduction={options.reduction!r}, got shape {tuple(grad_output.shape)}"
        )
    out = gradient_like(tensors.input) if out is None else out
    if state is None:
        with_gradient(tensors, options, upstream_of(grad_output), out)
        return out
    call = _call.cross_entropy_gradient(
        *_arguments(tensors, options), state, torch.get_num_threads(), upstream_of(grad_output), array_of(out)
    )
    call.run()
    call.gradient()
    return out


def dtype_of_loss(tensors, options):
    """SPEC S11, S40; of half types, under autocast, float32, as PyTorch's loss is."""
    input, target, weight = tensors.input, tensors.target, tensors.weight
    if options.loss_dtype is not None:
        return options.loss_dtype
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    return torch.float32 if dtype in HALVES and torch.is_autocast_enabled("cpu") else dtype


def loss_of(call, dtype):
    """The loss of a call, rounded once."""
    loss = call.loss_in_double()
    if dtype in HALVES:  # which PyTorch would round to float32 first
        losses = np.array(loss)
        rounded = _call.rounded_losses(losses.ravel(), FLOATS[dtype]).reshape(losses.shape)
        return torch.from_numpy(rounded.view(np.int16)).view(dtype).clone()
    if type(loss) is float:
        return torch.scalar_tensor(loss, dtype=dtype, device="cpu")
    result = torch.empty(loss.shape, dtype=dtype, device="cpu")
    return result.copy_(torch.from_numpy(loss))
