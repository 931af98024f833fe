"""A linear layer's loss by way of logits: for what is differentiated twice or transformed, and several outputs a class."""

import torch

from ._derivatives import gradients_by_autograd
from ._loss import compute
from ._options import Tensors


def loss(tensors, options, of_logits=compute):
    """The loss, in operations that PyTorch differentiates and transforms; of_logits: the loss of logits."""
    input, linear_weight, target, linear_bias, weight, sample_weight, normalizer = tensors
    several = linear_weight.shape[1:-1]
    logits = torch.nn.functional.linear(
        input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten()
    )
    if options.logit_scale != 1:
        logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if options.shift:
        logits, target = logits[..., :-1, :], target[..., 1:]
    rows = logits.shape[:-1]
    if several:
        logits = logits.unflatten(-1, linear_weight.shape[:-1])
    elif logits.dim() > 2:
        logits, target = logits.flatten(0, -2), target.flatten(0, len(rows) - 1)
        sample_weight = None if sample_weight is None else sample_weight.flatten()
    result = of_logits(Tensors(logits, target, weight, sample_weight, normalizer), options.loss)
    return result.reshape(rows) if options.loss.reduction == "none" and not several else result


def gradients(tensors, options, grad_output, needed, of_logits=compute):
    """(of input, linear_weight and linear_bias), such that they can be differentiated again; None where not needed."""
    return gradients_by_autograd(lambda: loss(tensors, options, of_logits), tensors.layer, grad_output, needed)
