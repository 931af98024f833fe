"""A linear layer and its loss, whichever way it goes; eager, the gradients are made in the same pass."""

import torch

from . import _calls, _linear_logits, _linear_operators, _linear_products, _private, _pytorch, _routes
from ._arguments import refuse_gradient
from ._habits import Expectation
from ._options import LinearTensors, with_number
from ._tensors import FLOATS


class _LinearLoss(torch.autograd.Function):
    """The loss of plain tensors; a reduced one makes its gradients at once, for the upstream gradient that is expected."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, others, options, dtype):
        # others: what is not differentiated
        tensors = others._replace(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
        ctx.options, ctx.normalizer = options, others.normalizer
        ctx.save_for_backward(*tensors[:-1])
        ctx.made = []  # or, until they are given away, [gradients]
        ctx.expectation = factor = None
        if options.loss.reduction != "none":
            ctx.expectation = Expectation(options, input.dtype, len(linear_weight))
            factor = ctx.expectation.factor
        if factor is None or _private.saved_tensors_are_hooked():
            call = _linear_products.with_loss(tensors, options)
        else:
            call, found = _linear_products.with_gradients(tensors, options, factor, ctx.needs_input_grad[:3])
            ctx.made.append(found)
        return _calls.loss_of(call, dtype)

    @staticmethod
    def backward(ctx, grad_output):
        tensors, needed = LinearTensors(*ctx.saved_tensors, ctx.normalizer), ctx.needs_input_grad[:3]
        try:
            found = ctx.made.pop()  # by one thread only
        except IndexError:
            found = None
        if _private.is_batched(grad_output):
            return *_linear_logits.gradients(tensors, ctx.options, grad_output, needed, _pytorch.loss), None, None, None
        if torch.is_grad_enabled():
            return *_linear_logits.gradients(tensors, ctx.options, grad_output, needed), None, None, None
        upstream = _calls.upstream_of(grad_output)
        if ctx.expectation is not None:
            ctx.expectation.learn(upstream)
            found = found if upstream == ctx.expectation.factor else None
        if found is None:
            found = _linear_products.with_gradients(tensors, ctx.options, upstream, needed)[1]
        return *_linear_products.rounded(found, tensors.layer), None, None, None


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
    if torch.is_autocast_enabled("cpu"):
        tensors = _autocast(tensors)
    input, linear_weight, linear_bias = tensors.layer
    way = _routes.way_of(tensors)
    alike = linear_weight.dtype is input.dtype and (linear_bias is None or linear_bias.dtype is input.dtype)
    computed = way is _routes.EAGER or (way is _routes.OPERATOR and torch.compiler.is_compiling())  # modes see the products
    if not computed or not alike or linear_weight.dim() > 2 or tensors.target.requires_grad or input.dtype not in FLOATS:
        return _linear_logits.loss(tensors, options)
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors.layer]
    if way is _routes.OPERATOR:
        return _linear_operators.loss(tensors, options, [False] * 3 if options.loss.reduction == "none" else needed)
    tensors = with_number(tensors)
    dtype = _calls.dtype_of_loss(tensors.of_loss, options.loss)
    if any(needed):
        return _LinearLoss.apply(*tensors.layer, tensors, options, dtype)
    return _calls.loss_of(_linear_products.with_loss(tensors, options), dtype)
