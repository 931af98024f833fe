"""Losses of lazy logits: of the linear layer, or of the logits after all."""

import inspect

import torch
from torch import Tensor

from . import _calls, _private, functional
from ._lazy_logits import LazyLogits, losses, plain
from ._options import Options, Tensors

_SIGNATURE = inspect.signature(functional.cross_entropy)


def _cross_entropy(func, args, kwargs):
    """torch.nn.functional.cross_entropy, or pyx_xent.torch's."""
    given = _SIGNATURE.bind(*args, **kwargs)
    lazy = given.arguments["input"]
    reason = _why_not(given.arguments) if isinstance(lazy, LazyLogits) else "target or weight"
    if reason is None:
        lazy.source.head.fused += 1
        return _fused_loss(lazy, given)
    for name, value in given.arguments.items():
        if isinstance(value, LazyLogits):
            given.arguments[name] = plain(value, f"cross_entropy ({reason})")
    return func(*given.args, **given.kwargs)


def _why_not(arguments):
    """Why a loss needs the logits after all; None if it does not."""
    lazy, target = arguments["input"], arguments["target"]
    if lazy.source.exposed:
        return "somebody may have changed the logits"
    if lazy.source.watched:
        return "its gradient is asked for"
    if lazy.made is not None:
        return "made before"
    for name in ("target", "weight"):
        tensor = arguments.get(name)
        if isinstance(tensor, LazyLogits) or (isinstance(tensor, Tensor) and tensor.requires_grad):
            return f"gradient of {name}"
    if not isinstance(target, Tensor):
        return "target"
    if _private.is_transformed():
        return "torch.func or forward-mode derivatives"
    steps, sample_weight = lazy.steps, arguments.get("sample_weight")
    if isinstance(sample_weight, Tensor) and sample_weight.shape != steps.rows.shape:
        return "shapes"
    if steps.axis != min(1, lazy.dim() - 1) or target.shape not in (steps.rows.shape, lazy.shape):
        return "shapes"
    if target.shape == lazy.shape != steps.rows.shape and not target.is_floating_point():
        return "shapes"
    if steps.options(lazy.source.dtype) is None:
        return "its factors"
    if not lazy.source.has_its_history():
        return "what the layer read, or its parameters, have another gradient now"
    return None if _is_straight(lazy) else "an autograd.Function in between"


def _is_straight(lazy):
    """Whether all that autograd knows between the layer and these logits are operators of PyTorch's, one after the other."""
    with _private.as_tensors():
        node, is_known = lazy.grad_fn, lazy.requires_grad
    while is_known and node is not lazy.source.node:
        before = [] if node is None else [one for one, _ in node.next_functions if one is not None]
        if len(before) != 1 or _private.is_of_a_function(node):
            return False
        node = before[0]
    return not is_known or node is not None


def _fused_loss(lazy, given):
    source, steps = lazy.source, lazy.steps
    source.check()
    source.fused = True
    given.apply_defaults()
    options = dict(given.arguments)
    del options["input"], options["inplace_backward"]
    target, reduction = options.pop("target"), options["reduction"]
    size_average, reduce = options.pop("size_average"), options.pop("reduce")
    if size_average is not None or reduce is not None:
        options["reduction"] = reduction = _private.reduction_of(size_average, reduce)
    tensors = Tensors(lazy, target, options["weight"])
    loss_dtype = _calls.dtype_of_loss(tensors, Options(loss_dtype=options.pop("loss_dtype")))
    shape = steps.rows.shape
    if target.shape == shape:
        target = target.reshape(-1)
    else:  # class probabilities
        options["ignore_index"] = None
        target = target.movedim(steps.axis, -1).reshape(-1, lazy.shape[steps.axis])
    if options["sample_weight"] is not None:
        options["sample_weight"] = options["sample_weight"].reshape(-1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and lazy.requires_grad), torch.autocast("cpu", enabled=False):
        hidden, linear_weight, linear_bias = source.converted()
        hidden = _selected(hidden.reshape(-1, hidden.shape[-1]), steps.rows.reshape(-1))
        options |= {"linear_bias": linear_bias, "loss_dtype": None if loss_dtype is hidden.dtype else loss_dtype}
        loss = functional.linear_cross_entropy(hidden, linear_weight, target, **options, **steps.options(source.dtype))
    return loss.reshape(shape) if reduction == "none" else loss


def _selected(hidden, rows):
    """Some rows of the layer's input: where they are neighbours, without a copy."""
    if len(rows) == 0:
        return hidden[:0]
    first = int(rows[0])
    if torch.equal(rows, torch.arange(first, first + len(rows), device="cpu")):
        return hidden[first : first + len(rows)]
    return hidden[rows]


losses["cross_entropy"] = _cross_entropy
