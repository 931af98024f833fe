"""What arguments have to be, before a way is chosen: tensors, numbers, shapes, nothing whose gradient would be lost."""

import torch
from torch import Tensor

from .. import linear
from ._tensors import FLOATS, wide_dtype


def check_tensors(tensors):
    """TypeError that names what is no tensor, of a named tuple of them; None is left to the caller where it is allowed."""
    for name, tensor in tensors._asdict().items():
        if name == "normalizer" or isinstance(tensor, Tensor):
            continue
        if tensor is not None or name not in tensors._field_defaults:
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def refuse_gradient(**tensors):
    """RuntimeError that names a tensor whose gradient would be lost."""
    for name, tensor in tensors.items():
        if loses_gradient(tensor):
            raise RuntimeError(f"the derivative for {name!r} is not implemented: pass {name}.detach()")


def loses_gradient(tensor):
    """Whether something is a tensor that requires grad, here and now."""
    return isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()


def number(value, name):
    """A number that an option is; a tensor that requires grad is refused, because its gradient would be lost."""
    if type(value) is float:
        return value
    refuse_gradient(**{name: value})
    return value.item() if isinstance(value, Tensor) else value


def checked_linear(options, dtype):
    """LinearOptions for the way by logits, its numbers finite in the dtype that multiplies."""
    if torch.compiler.is_compiling():  # in words that it understands
        largest = torch.finfo(wide_dtype(dtype)).max
        if not abs(options.logit_scale) <= largest or not (options.softcap is None or 0 < options.softcap <= largest):
            raise ValueError(f"logit_scale must be finite and softcap positive and finite where {dtype} is multiplied")
        return options
    dtype = linear.computed_dtype(FLOATS.get(dtype))
    checked = linear.checked_options(dtype, options.logit_scale, options.softcap, options.chunk_bytes)
    return options._replace(**dict(zip(("logit_scale", "softcap", "chunk_bytes"), checked, strict=True)))


def check_linear_shapes(tensors, ignore_index, shift):
    """RuntimeError or ValueError for shapes that do not belong together, in PyTorch's words where it has some."""
    input, linear_weight, target, linear_bias = tensors.input, tensors.linear_weight, tensors.target, tensors.linear_bias
    if input.dim() < 1 or (input.dim() > 2 and not shift):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    outputs = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and linear_bias.shape != outputs:
        raise RuntimeError(f"expected linear_bias shape {outputs}, got {tuple(linear_bias.shape)}")
    if len(outputs) > 1 and (input.dim() == 1 or shift):
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got {'shift=True and' if shift else 'unbatched'} input with shape {tuple(input.shape)}"
        )
    if shift and target.shape != input.shape[:-1]:
        raise ValueError(
            f"shift=True needs input (..., T, H) and target (..., T), got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    if ignore_index is not None and target.shape == (*input.shape[:-1], *outputs):
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
