"""fuse_head(): a language model that trains without making its logits."""

import collections

import torch
from torch import Tensor

from . import _lazy_losses as _lazy_losses  # the losses of lazy logits are known from here on
from . import _routes
from ._lazy_logits import Source, lazy_logits
from ._tensors import FLOATS


def fuse_head(module, *, evaluation=False):
    """Make a model's output layer and its cross-entropy one computation, without logits, while the model trains.

    The layer then returns *lazy logits*: a tensor that knows the layer's input, weight and bias, and what has been done with
    the logits since: reshaped, rows selected, converted to a wider dtype, scaled, capped by tanh. When they arrive at
    ``torch.nn.functional.cross_entropy`` or `pyx_xent.torch.cross_entropy`, directly or in a module, `linear_cross_entropy`
    computes loss and gradients. Whatever else is asked of them makes the logits as usual, with the weights that the layer had:
    after the optimizer's step, say for the accuracy, it is too late, which is an error.

    Parameters
    ----------
    module : torch.nn.Module
        A ``torch.nn.Linear``, or a model whose ``get_output_embeddings()`` is one, as of Hugging Face's language models.
    evaluation : bool
        Also when the layer is not in training mode, or gradients are off.

    Returns
    -------
    FusedHead
        Takes it back by ``undo()`` or as a context manager, and counts what was fused.

    Raises
    ------
    TypeError
        `module` is no such thing; the reason is in the message.
    ValueError
        It is fused already.

    Examples
    --------
    >>> import torch
    >>> from pyx_xent.torch import fuse_head
    >>> head = torch.nn.Linear(8, 100)
    >>> fused = fuse_head(head)
    >>> loss = torch.nn.functional.cross_entropy(head(torch.randn(5, 8)), torch.arange(5))
    >>> loss.backward()
    >>> fused
    <FusedHead of Linear(in_features=8, out_features=100, bias=True): 1 loss fused, 0 times logits made>
    >>> fused.undo()
    """
    layer = _output_layer(module)
    if isinstance(layer.__dict__.get("forward"), FusedHead):
        raise ValueError("this output layer is fused already: undo() takes it back")
    if "forward" in layer.__dict__:
        raise TypeError("forward of the output layer was replaced by somebody else, and what it does is not known")
    layer.forward = head = FusedHead(layer, evaluation)
    return head


def _output_layer(module):
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.nn.Linear):
        layer = module
    else:
        ask = getattr(module, "get_output_embeddings", None)
        layer = ask() if callable(ask) else None
        if layer is None:
            raise TypeError(
                f"{type(module).__name__} does not say by get_output_embeddings() which layer makes its logits: "
                "pass that layer, a torch.nn.Linear"
            )
    if not isinstance(layer, torch.nn.Linear) or type(layer).forward is not torch.nn.Linear.forward:
        raise TypeError(f"the output layer must be a plain torch.nn.Linear, got {type(layer).__name__}")
    return layer


class FusedHead:
    """What `fuse_head` returns, and what the layer calls instead of its own forward.

    Attributes
    ----------
    fused : int
        Losses computed without logits.
    made : Counter
        How often logits were made after all, by the name of the function that asked for them, or the reason.
    """

    def __init__(self, layer, evaluation):
        self.layer, self.evaluation = layer, evaluation
        self.fused, self.made = 0, collections.Counter()

    def __call__(self, input):
        layer = self.layer
        if torch.compiler.is_compiling() or not (self.evaluation or (layer.training and torch.is_grad_enabled())):
            return type(layer).forward(layer, input)  # what a compiled program's loss reads, or what nobody expects to be lazy
        weight, bias = layer.weight, layer.bias  # once: parametrizations compute them
        reason = self._why_not_lazy(input, weight, bias)
        if reason is not None:
            self.made[reason] += 1
            return torch.nn.functional.linear(input, weight, bias)
        is_cast = torch.is_autocast_enabled("cpu") and weight.dtype is not torch.float64
        dtype = torch.get_autocast_dtype("cpu") if is_cast else weight.dtype
        return lazy_logits(Source(self, input, weight, bias, dtype))

    def _why_not_lazy(self, input, weight, bias):
        """Why the layer makes its logits at once; None if it does not."""
        layer, tensors = self.layer, [input, weight] + ([] if bias is None else [bias])
        if not all(isinstance(tensor, Tensor) for tensor in tensors) or _routes.way_of(tensors) is not _routes.EAGER:
            return "no ordinary CPU tensors"
        if any(tensor.is_inference() for tensor in tensors):
            return "inference tensors, whose changes nobody counts"
        if weight.dtype not in FLOATS or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
            return "dtype or shape"
        if any(tensor.dtype is not weight.dtype for tensor in tensors) and not torch.is_autocast_enabled("cpu"):
            return "dtype or shape"
        if layer._backward_hooks or layer._backward_pre_hooks:
            return "backward hooks on the layer"
        if hasattr(layer, "unshard"):
            return "FSDP frees this layer's weight after its call"
        return None

    def undo(self):
        """Give the layer its own forward back."""
        if self.layer.__dict__.get("forward") is self:
            del self.layer.forward

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()

    def __repr__(self):
        losses = f"{self.fused} loss{'' if self.fused == 1 else 'es'} fused"
        asked = "".join(f"; {count}: {name}" for name, count in self.made.most_common())
        undone = "" if self.layer.__dict__.get("forward") is self else ", undone"
        return f"<FusedHead of {self.layer}{undone}: {losses}, {self.made.total()} times logits made{asked}>"
