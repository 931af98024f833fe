"""The linear layer's loss through PyTorch's dispatcher: torch.ops.pyx_xent.linear_cross_entropy, for torch.compile."""

import torch

from . import _calls, _linear_logits, _linear_products
from ._operators import tell_watchers
from ._options import LinearOptions, LinearTensors, Options, schema_of, with_number, with_tensor
from ._tensors import wide_dtype

_TENSORS, _OF_LOSS = len(LinearTensors._fields), len(Options._fields)
_ARGUMENTS = f"{schema_of(LinearTensors)}, {schema_of(LinearOptions)}, bool[] needed"


def _split(arguments):
    *arguments, needed = arguments
    options = arguments[_TENSORS:]
    return LinearTensors(*arguments[:_TENSORS]), LinearOptions(Options(*options[:_OF_LOSS]), *options[_OF_LOSS:]), needed


def loss(tensors, options, needed):
    """The loss, of the operator; needed: of which of input, linear_weight, linear_bias gradients are made at once."""
    return _loss_op(*with_tensor(tensors), *options.loss, *options[1:], needed)[0]


def _given(gradients, input):
    # An operator's results are tensors: an empty one stands for None.
    return tuple(input.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _compute_loss(*arguments):
    """(loss, gradients for an upstream gradient of 1, empty where not needed)"""
    tensors, options, needed = _split(arguments)
    tensors = with_number(tensors)
    if any(needed):
        call, found = _linear_products.with_gradients(tensors, options, None, needed)
    else:
        call, found = _linear_products.with_loss(tensors, options), (None, None, None)
    result = _calls.loss_of(call, _calls.dtype_of_loss(tensors.of_loss, options.loss))
    tell_watchers()
    return result, *_given(found, tensors.input)


def _compute_gradients(grad_output, *arguments):
    tensors, options, needed = _split(arguments)
    upstream = _calls.upstream_of(grad_output)
    found = _linear_products.with_gradients(with_number(tensors), options, upstream, needed)[1]
    return _given(_linear_products.rounded(found, tensors.layer), tensors.input)


_loss_op = torch.library.custom_op(
    "pyx_xent::linear_cross_entropy", _compute_loss, mutates_args=(), device_types="cpu",
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
_gradients_op = torch.library.custom_op(
    "pyx_xent::linear_cross_entropy_backward", _compute_gradients, mutates_args=(), device_types="cpu",
    schema=f"(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


def _fake_gradients(tensors, needed, dtype):
    layer = zip(tensors.layer, needed, strict=True)
    return _given([t.new_empty(t.shape, dtype=dtype) if is_needed else None for t, is_needed in layer], tensors.input)


@_loss_op.register_fake
def _(*arguments):
    tensors, options, needed = _split(arguments)
    input = tensors.input
    rows = list(input.shape[:-1])
    if options.shift:
        rows[-1] = rows[-1] - 1
    loss = input.new_empty(
        rows if options.loss.reduction == "none" else (), dtype=_calls.dtype_of_loss(tensors.of_loss, options.loss)
    )
    return loss, *_fake_gradients(tensors, needed, wide_dtype(input.dtype))


@_gradients_op.register_fake
def _(grad_output, *arguments):
    tensors, _, needed = _split(arguments)
    return _fake_gradients(tensors, needed, tensors.input.dtype)


def _loss_setup(ctx, inputs, output):
    tensors, ctx.options, needed = _split(inputs)
    ctx.made = any(needed)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as linear_weight


def _loss_backward(ctx, grad_output, *_):
    tensors, made = LinearTensors(*ctx.saved_tensors[:_TENSORS]), ctx.saved_tensors[_TENSORS:]
    needed = [ctx.needs_input_grad[k] for k in (0, 1, 3)]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = _linear_logits.gradients(tensors, ctx.options, grad_output, needed)
    elif ctx.made:
        found = [gradient * grad_output if is_needed else None for gradient, is_needed in zip(made, needed, strict=True)]
        found = _linear_products.rounded(found, tensors.layer)
    else:
        found = _gradients_op(grad_output, *tensors, *ctx.options.loss, *ctx.options[1:], needed)
        found = [gradient if is_needed else None for gradient, is_needed in zip(found, needed, strict=True)]
    return found[0], found[1], None, found[2], *[None] * (len(ctx.needs_input_grad) - 4)


_loss_op.register_autograd(_loss_backward, setup_context=_loss_setup)
