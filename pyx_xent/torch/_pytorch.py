"""PyTorch's own functions, as they were when this was imported, for calls that are not ours to compute."""

import torch

_cross_entropy, _nll_loss = torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss
_OURS_ALONE = {"sample_weight": None, "normalizer": None, "z_loss": 0.0, "empty": "nan", "loss_dtype": None}


def loss(tensors, options):
    """The loss; RuntimeError if it is asked for what PyTorch's function does not have."""
    for argument, default in _OURS_ALONE.items():
        value = getattr(tensors if argument in tensors._fields else options, argument)
        if value is not default and value != default:
            raise RuntimeError(
                f"{argument} needs ordinary CPU tensors, eager or compiled: under torch.func, forward-mode derivatives, "
                "tracing and export, and on other devices, PyTorch's own loss is computed, which does not have it"
            )
    numbers = {"ignore_index": options.ignore_index, "reduction": options.reduction}
    if options.log_probs:
        return _nll_loss(tensors.input, tensors.target, tensors.weight, **numbers)
    return _cross_entropy(tensors.input, tensors.target, tensors.weight, label_smoothing=options.label_smoothing, **numbers)


def gradients(grad_output, tensors, options, needed):
    """(of the logits, of class probabilities), None where not needed: also for a batch of upstream gradients."""
    asked = [tensor for tensor, is_needed in zip(tensors[:2], needed[:2], strict=True) if is_needed]
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        found = iter(torch.autograd.grad(loss(tensors, options), asked, grad_output, create_graph=twice))
    return [next(found) if is_needed else None for is_needed in needed[:2]]
