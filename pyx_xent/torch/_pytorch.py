"""PyTorch's own functions, as they were when this was imported, for calls that are not ours to compute."""

import torch

from ._derivatives import gradients_by_autograd
from ._options import OURS_ALONE

_cross_entropy, _nll_loss = torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss


def loss(tensors, options):
    """The loss; RuntimeError if it is asked for what PyTorch's function does not have."""
    for argument, default in OURS_ALONE.items():
        value = getattr(tensors if argument in tensors._fields else options, argument)
        if value is not default and value != default:
            raise RuntimeError(
                f"{argument} needs ordinary CPU tensors, eager or compiled: under torch.func, forward-mode derivatives, "
                "tracing and export, for batches of upstream gradients and on other devices, PyTorch's own loss is computed, "
                "which does not have it"
            )
    numbers = {"ignore_index": options.ignore_index, "reduction": options.reduction}
    if options.log_probs:
        return _nll_loss(tensors.input, tensors.target, tensors.weight, **numbers)
    return _cross_entropy(tensors.input, tensors.target, tensors.weight, label_smoothing=options.label_smoothing, **numbers)


def gradients(grad_output, tensors, options, needed):
    """(of the logits, of class probabilities), None where not needed: also for a batch of upstream gradients."""
    differentiated = tensors.input, tensors.target
    return gradients_by_autograd(lambda: loss(tensors, options), differentiated, grad_output, needed[:2])
