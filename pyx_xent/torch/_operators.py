"""The loss through PyTorch's dispatcher: torch.ops.pyx_xent.cross_entropy, for torch.compile and second derivatives."""

import math

import torch

from . import _calls
from ._derivatives import class_axis, derivatives_of_gradient, gradient_of_target
from ._options import Options, Tensors, schema_of, with_number, with_tensor

_COUNT = len(Tensors._fields)
_ARGUMENTS = f"{schema_of(Tensors)}, {schema_of(Options)}"
watchers = []  # functions that are called when an operator has computed a loss: of patch(), which counts


def _split(arguments):
    return Tensors(*arguments[:_COUNT]), Options(*arguments[_COUNT:])


def tell_watchers():
    """An operator has computed a loss."""
    for watcher in watchers:
        watcher()


def loss(tensors, options):
    """The loss, of the operator."""
    return _loss_op(*with_tensor(tensors), *options)[0]


def _compute_loss(*arguments):
    tensors, options = _split(arguments)
    call, state = _calls.with_state(with_number(tensors), options)
    result = _calls.loss_of(call, _calls.dtype_of_loss(tensors, options))
    tell_watchers()
    if state is None:
        return result, torch.empty(0, dtype=torch.float64, device="cpu")
    return result, torch.from_numpy(state)


def _compute_gradient(grad_output, state, *arguments):
    tensors, options = _split(arguments)
    state = None if options.log_probs or state is None else state.numpy()
    return _calls.gradient(grad_output, with_number(tensors), state, options)


_loss_op = torch.library.custom_op(
    "pyx_xent::cross_entropy", _compute_loss, mutates_args=(), device_types="cpu",
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
)  # fmt: skip
_gradient_op = torch.library.custom_op(
    "pyx_xent::cross_entropy_backward", _compute_gradient, mutates_args=(), device_types="cpu",
    schema=f"(Tensor grad_output, Tensor? state, {_ARGUMENTS}) -> Tensor",
)  # fmt: skip


@_loss_op.register_fake
def _(*arguments):
    tensors, options = _split(arguments)
    input = tensors.input
    rows = list(input.shape)
    del rows[class_axis(input)]
    loss = input.new_empty(rows if options.reduction == "none" else (), dtype=_calls.dtype_of_loss(tensors, options))
    if options.log_probs:
        return loss, input.new_empty(0, dtype=torch.float64)
    return loss, input.new_empty((2, math.prod(rows)), dtype=torch.float64)


@_gradient_op.register_fake
def _(grad_output, state, *arguments):
    return torch.empty_like(arguments[0])


def differentiable_gradients(grad_output, state, tensors, options, needed):
    """(of the logits, of class probabilities), such that they can be differentiated again; None where not needed."""
    tensors = with_tensor(tensors)
    return (
        _gradient_op(grad_output, state, *tensors, *options) if needed[0] else None,
        gradient_of_target(grad_output, tensors, options) if needed[1] else None,
    )


def _loss_setup(ctx, inputs, output):
    tensors, ctx.options = _split(inputs)
    ctx.save_for_backward(*tensors, output[1])


def _loss_backward(ctx, grad_output, _):
    *tensors, state = ctx.saved_tensors
    found = differentiable_gradients(grad_output, state, Tensors(*tensors), ctx.options, ctx.needs_input_grad)
    return *found, *[None] * (len(ctx.needs_input_grad) - 2)


def _gradient_setup(ctx, inputs, output):
    grad_output, _, *arguments = inputs
    tensors, ctx.options = _split(arguments)
    ctx.save_for_backward(grad_output, *tensors)


def _gradient_backward(ctx, cotangent):
    grad_output, *tensors = ctx.saved_tensors
    of_grad_output, of_input, of_target = derivatives_of_gradient(grad_output, Tensors(*tensors), ctx.options, cotangent)
    return of_grad_output, None, of_input, of_target, *[None] * (len(ctx.needs_input_grad) - 4)


_loss_op.register_autograd(_loss_backward, setup_context=_loss_setup)
_gradient_op.register_autograd(_gradient_backward, setup_context=_gradient_setup)
