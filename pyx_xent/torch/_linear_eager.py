"""The loss of a linear layer of plain tensors: the pass that computes it makes its gradients, too."""

import torch

from . import _calls, _linear_logits, _linear_products, _private, _pytorch
from ._habits import Expectation
from ._options import LinearTensors, with_number


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
        if _private.is_transformed_upstream(grad_output):
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


def loss(tensors, options, needed):
    """The loss; needed: whether any of its layer's tensors requires grad."""
    tensors = with_number(tensors)
    dtype = _calls.dtype_of_loss(tensors.of_loss, options.loss)
    if needed:
        return _LinearLoss.apply(*tensors.layer, tensors, options, dtype)
    return _calls.loss_of(_linear_products.with_loss(tensors, options), dtype)
