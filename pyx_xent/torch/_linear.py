"""A linear layer and its loss, whichever way it goes."""

import torch

from . import _linear_eager, _linear_logits, _linear_operators, _routes
from ._arguments import checked_linear, refuse_gradient
from ._tensors import FLOATS, HALVES


def _autocast(tensors):
    """Under autocast the layer's tensors are of its dtype, but float64 ones stay."""
    dtype = torch.get_autocast_dtype("cpu")

    def cast(tensor):
        return (
            tensor.to(dtype)
            if tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
            else tensor
        )

    return tensors._replace(
        input=cast(tensors.input), linear_weight=cast(tensors.linear_weight), linear_bias=cast(tensors.linear_bias)
    )


def compute(tensors, options):
    """The loss."""
    refuse_gradient(weight=tensors.weight, sample_weight=tensors.sample_weight, normalizer=tensors.normalizer)
    if torch.is_autocast_enabled("cpu") and tensors.input.is_cpu:
        tensors = _autocast(tensors)
    input, linear_weight, linear_bias = tensors.layer
    way = _routes.way_of(tensors)
    alike = linear_weight.dtype is input.dtype and (linear_bias is None or linear_bias.dtype is input.dtype)
    computed = way is _routes.EAGER or (way is _routes.OPERATOR and torch.compiler.is_compiling())  # modes see the products
    if not computed or not alike or linear_weight.dim() > 2 or tensors.target.requires_grad or input.dtype not in FLOATS:
        return _linear_logits.loss(tensors, checked_linear(options, input.dtype))
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors.layer]
    if way is _routes.OPERATOR:
        if options.loss.loss_dtype is None and input.dtype in HALVES and torch.is_autocast_enabled("cpu"):
            # When the operator runs, autocast is over.
            options = options._replace(loss=options.loss._replace(loss_dtype=torch.float32))
        return _linear_operators.loss(tensors, options, [False] * 3 if options.loss.reduction == "none" else needed)
    return _linear_eager.loss(tensors, options, any(needed))
