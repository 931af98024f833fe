"""The loss of plain tensors: the pass over the logits makes its gradient, too, for the upstream gradient that is expected."""

import torch

from . import _calls, _private, _pytorch
from ._derivatives import class_axis, gradient_of_target
from ._habits import Expectation
from ._operators import differentiable_gradients
from ._options import Tensors
from ._tensors import gradient_like


class _Made:
    """What a pass over the logits has made, and what their gradient needs beside them."""

    __slots__ = ("expectation", "gradient", "inplace", "loss", "normalizer", "options", "read", "state")

    def __init__(self, tensors, options, dtype, inplace):
        self.options, self.inplace, self.normalizer = options, inplace, tensors.normalizer
        self.gradient = []  # or, for the expected upstream gradient, [it], until it is given away
        self.expectation = self.state = factor = None
        if options.reduction != "none" and not inplace and tensors.input.requires_grad:
            shape = tensors.input.shape
            classes = shape[class_axis(tensors.input)] if shape else 0
            self.expectation = Expectation(options, tensors.input.dtype, classes)
            factor = self.expectation.factor
        # Not under hooks: they may give saved tensors away until they are needed; gradients would keep as much memory.
        if factor is not None and not _private.saved_tensors_are_hooked():
            out = gradient_like(tensors.input)
            call = _calls.with_gradient(tensors, options, None if factor == 1 else factor, out)
            self.gradient = [out]
        else:
            call, self.state = _calls.with_state(tensors, options)
        self.loss = _calls.loss_of(call, dtype)
        self.read = ()  # in forward: (what was read beside the logits, its version) of each

    def check_versions(self):
        """RuntimeError if target or weights were changed in place. The logits may be, whose gradient is there."""
        for tensor, version in self.read:
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: target, "
                    f"weight or sample_weight {tuple(tensor.shape)} is at version {tensor._version}; expected version {version}"
                )


class _Loss(torch.autograd.Function):
    """The loss, whose backward hands the gradient over, if it is the one that was expected."""

    @staticmethod
    def forward(ctx, input, probabilities, tensors, made):
        # probabilities: the target if it requires grad, else None
        ctx.made = made
        ctx.save_for_backward(input, *tensors.beside)
        made.read = [(t, t._version) for t in tensors.beside if t is not None and not t.is_inference()]
        loss, made.loss = made.loss, None
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        made = ctx.made
        needed = ctx.needs_input_grad
        if _private.is_transformed_upstream(grad_output):
            tensors = Tensors(*ctx.saved_tensors, made.normalizer)
            return *_pytorch.gradients(grad_output, tensors, made.options, needed), None, None
        if torch.is_grad_enabled():
            made.gradient.clear()
            return *_gradients_of_operators(ctx, made, grad_output), None, None
        grad_input = grad_target = None
        if needed[1]:
            grad_target = gradient_of_target(grad_output, Tensors(*ctx.saved_tensors, made.normalizer), made.options)
        if needed[0]:
            grad_input = _gradient_now(ctx, made, grad_output)
        made.read = ()  # from here on autograd alone has them, as long as they are needed
        return grad_input, grad_target, None, None


def _gradient_now(ctx, made, grad_output):
    try:
        memory = made.gradient.pop()  # by one thread only
    except IndexError:
        memory = None
    if made.expectation is not None:
        factor = grad_output.item()
        made.expectation.learn(factor)
        if memory is not None and factor == made.expectation.factor:
            made.check_versions()
            return memory
    input, *others = ctx.saved_tensors
    tensors = Tensors(input, *others, made.normalizer)
    if not made.inplace:
        return _calls.gradient(grad_output, tensors, made.state, made.options, memory)
    gradient = _calls.gradient(grad_output, tensors, made.state, made.options, input.detach())
    torch.autograd.graph.increment_version(input)  # whoever has saved the logits finds that they have changed
    return gradient


def _gradients_of_operators(ctx, made, grad_output):
    if made.inplace:
        raise RuntimeError("inplace_backward=True overwrites the logits, which create_graph=True and vmap still need")
    state = None if made.state is None else torch.from_numpy(made.state)
    tensors = Tensors(*ctx.saved_tensors, made.normalizer)
    return differentiable_gradients(grad_output, state, tensors, made.options, ctx.needs_input_grad)


_apply = _private.apply_of(_Loss)


def loss(tensors, options, inplace):
    """The loss of plain tensors."""
    input, target = tensors.input, tensors.target
    dtype = _calls.dtype_of_loss(tensors, options)
    if not (torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)):
        return _calls.loss_of(_calls.with_loss(tensors, options), dtype)
    inplace = inplace and not input.is_neg()  # whose memory holds other numbers than it shows
    if inplace and input.requires_grad:
        refuse_to_overwrite(input)
    return _apply(input, target if target.requires_grad else None, tensors, _Made(tensors, options, dtype, inplace))


def refuse_to_overwrite(input):
    """RuntimeError if the memory is that of a leaf that requires grad, as PyTorch has it for any operation in place."""
    if input.is_leaf or (input._is_view() and input._base.is_leaf and input._base.requires_grad):
        what = "a view of a leaf" if input._is_view() else "a leaf"
        raise RuntimeError(f"inplace_backward=True would overwrite {what} tensor that requires grad")
