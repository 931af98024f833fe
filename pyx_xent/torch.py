"""PyTorch's cross-entropy on the CPU, computed by pyx_xent: change the import, keep the rest. Imported on request only.

cross_entropy, nll_loss     the functions of torch.nn.functional, and their modules
      │
      ├── _Loss             eager, plain CPU tensors: the gradient is made together with the loss
      └── torch.ops.pyx_xent.*   under torch.compile, tracing and dispatch modes; derivatives of the gradient
linear_cross_entropy        likewise: _LinearLoss, torch.ops.pyx_xent.linear_*; from logits where neither will do
patch()                     routes torch.nn.functional here

Memory is shared with the tensors, never copied. What makes a call unusual is looked for in `_is_plain`: such a call goes
through PyTorch's dispatcher, which knows the rules for it. torch.func and forward-mode derivatives get PyTorch's own loss.
"""

import functools
import threading
import types
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction

from . import _call, _memory, linear
from ._memory import reuse_gradients

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "NLLLoss",
    "cross_entropy",
    "linear_cross_entropy",
    "nll_loss",
    "patch",
    "reuse_gradients",
    "unpatch",
]

_CPU = torch.device("cpu")
_PLAIN = (Tensor, torch.nn.Parameter)
_HALVES = (torch.bfloat16, torch.float16)
_SERIAL = 1 << 16  # elements: smaller calls have one thread anyway
_theirs = {"cross_entropy": torch.nn.functional.cross_entropy, "nll_loss": torch.nn.functional.nll_loss}


# Memory


def _array(tensor):
    """The memory of a tensor as an array for _call."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if tensor.dtype is torch.bfloat16:  # unknown to NumPy
        return _array(tensor.view(torch.int16)).view(_call.bfloat16_bits)
    try:
        return tensor.numpy()
    except RuntimeError:
        if not tensor.is_neg():
            raise
        return tensor.resolve_neg().numpy()


def _tensor(array):
    """The other way round."""
    if array.dtype == _call.bfloat16_bits:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


_ARRAY_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: _call.bfloat16_bits,
}


# Bytes. Smaller gradients are found again by PyTorch's allocator, and their storage can be resized.
_LARGE = 1 << 22
_BYTE = np.dtype(np.uint8)


def _large_gradient(input):
    """A tensor like `input` in memory of ours; None if it is small or of another dtype."""
    size = input.numel() * input.element_size()
    if input.dtype not in _ARRAY_DTYPES or size < _LARGE:
        return None
    strides = torch.empty_like(input, device="meta").stride()
    storage = torch.from_numpy(_memory.empty((size,), _BYTE)).untyped_storage()  # which holds the array
    return torch.empty(0, dtype=input.dtype, device=_CPU).set_(storage, 0, input.shape, strides)


def _gradient_like(input):
    """A tensor with the strides of torch.empty_like."""
    large = _large_gradient(input)
    return torch.empty_like(input) if large is None else large


# One call of the kernels


class _Options(NamedTuple):
    """What a loss is asked for besides tensors, as the operators take it."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    log_probs: bool  # nll_loss


class _LinearOptions(NamedTuple):
    """Likewise, of a linear layer and its loss."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float | None
    shift: bool
    chunk_bytes: int | None


def _weight_array(weight):
    """Of class weights, which may be absent; they are cast in any case, so bfloat16 ones here."""
    return None if weight is None else _array(weight.float() if weight.dtype is torch.bfloat16 else weight)


def _upstream(grad_output):
    """A number, or one for each row."""
    return _array(grad_output.double()) if grad_output.dim() else float(grad_output)


def _arguments(input, target, weight, options):
    """Of an entry of _call: (logits, target, options)"""
    converted = _call.options(_weight_array(weight), options.ignore_index, options.reduction, options.label_smoothing)
    return _array(input), _array(target), converted


def _threads(input):
    return None if input.numel() < _SERIAL else torch.get_num_threads()


def _ran(call):
    call.run()
    return call


def _with_loss(input, target, weight, options):
    entry = _call.nll if options.log_probs else _call.cross_entropy
    return _ran(entry(*_arguments(input, target, weight, options), num_threads=_threads(input)))


def _with_state(input, target, weight, options):
    """The call that has the loss, and what _gradient takes: an array, (2, rows) float64. None of log-probabilities."""
    if options.log_probs:
        return _with_loss(input, target, weight, options), None
    call = _ran(_call.cross_entropy_with_state(*_arguments(input, target, weight, options), num_threads=_threads(input)))
    return call, call.row_state()


def _with_gradient(input, target, weight, options, grad_output=None, grad_out=None):
    entry = _call.nll_with_grad if options.log_probs else _call.cross_entropy_with_grad
    return _ran(
        entry(
            *_arguments(input, target, weight, options), num_threads=_threads(input), grad_output=grad_output, grad_out=grad_out
        )
    )


def _loss_dtype(input, target, weight):
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    return torch.float32 if dtype in _HALVES and torch.is_autocast_enabled("cpu") else dtype


def _loss(call, dtype):
    loss = call.loss_in_double()
    if type(loss) is float:
        return torch.scalar_tensor(loss, dtype=dtype, device=_CPU)
    return torch.from_numpy(loss).to(dtype)


def _gradient(grad_output, input, target, weight, state, options, out):
    """The gradient with respect to the logits, written into the tensor `out`; faster from the state that the loss has left."""
    if grad_output.dim() and options.reduction != "none":
        raise ValueError(
            f"grad_output must be a scalar for reduction={options.reduction!r}, got shape {tuple(grad_output.shape)}"
        )
    if state is None or options.log_probs:
        call = _with_gradient(input, target, weight, options, _upstream(grad_output), _array(out))
    else:
        call = _ran(
            _call.cross_entropy_gradient(
                *_arguments(input, target, weight, options), state, num_threads=_threads(input),
                grad_output=_upstream(grad_output), grad_out=_array(out),
            )
        )  # fmt: skip
    call.gradient()
    return out


# Through the dispatcher: torch.compile, and whatever is differentiated more than once


@torch.library.custom_op("pyx_xent::cross_entropy", mutates_args=(), device_types="cpu")
def _cross_entropy_op(
    input: Tensor, target: Tensor, weight: Tensor | None,
    reduction: str, ignore_index: int, label_smoothing: float, log_probs: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, what the gradient needs of each row)"""
    call, state = _with_state(input, target, weight, _Options(reduction, ignore_index, label_smoothing, log_probs))
    loss = _loss(call, _loss_dtype(input, target, weight))
    rows = input.numel() // max(1, input.shape[_class_axis(input)])
    return loss, torch.zeros(2, rows, dtype=torch.float64) if state is None else torch.from_numpy(state)


@torch.library.custom_op("pyx_xent::cross_entropy_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    grad_output: Tensor, input: Tensor, target: Tensor,
    weight: Tensor | None, state: Tensor | None,
    reduction: str, ignore_index: int, label_smoothing: float, log_probs: bool,
) -> Tensor:  # fmt: skip
    options = _Options(reduction, ignore_index, label_smoothing, log_probs)
    state = None if state is None else state.numpy()
    return _gradient(grad_output, input, target, weight, state, options, _gradient_like(input))


def _class_axis(input):
    return 0 if input.dim() == 1 else 1


def _is_soft(input, target, log_probs):
    return not log_probs and target.shape == input.shape


@_cross_entropy_op.register_fake
def _(input, target, weight, reduction, ignore_index, label_smoothing, log_probs):
    rows = list(input.shape)
    del rows[_class_axis(input)]
    loss = input.new_empty(rows if reduction == "none" else (), dtype=_loss_dtype(input, target, weight))
    count = 1
    for size in rows:
        count = count * size
    return loss, input.new_empty((2, count), dtype=torch.float64)


@_backward_op.register_fake
def _(grad_output, input, target, weight, state, reduction, ignore_index, label_smoothing, log_probs):
    return torch.empty_like(input)


def _differentiable(grad_output, input, target, weight, options, cotangent):
    """SPEC S33: derivatives of Σ cotangent · gradient(grad_output, input, target), in operations that PyTorch differentiates.

    -> of grad_output, of input, of target (None with class indices)
    """
    reduction, ignore_index, smoothing, log_probs = options
    axis, soft = _class_axis(input), _is_soft(input, target, log_probs)
    classes = input.shape[axis]
    dtype = torch.float32 if input.dtype in _HALVES else input.dtype
    dtype = torch.promote_types(dtype, target.dtype) if soft else dtype
    x, v, g = input.to(dtype), cotangent.to(dtype), grad_output.to(dtype)
    w = torch.ones(classes, dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    of_class = w.view([-1] + [1] * (x.dim() - axis - 1))
    # A gradient is h (mass p - own): see SPEC S31.
    if soft:
        own = of_class * ((1 - smoothing) * target.to(dtype) + smoothing / classes)
        live = torch.ones((), dtype=torch.bool, device=x.device)
        mass, own_v = own.sum(axis), (own * v).sum(axis)
        divisor = x.numel() / classes
    else:
        y = target.reshape(v.sum(axis).shape).long()
        live = y != ignore_index
        y = torch.where(live, y, 0)
        w_y = torch.where(live, w[y], 0)
        v_y = v.gather(axis, y.unsqueeze(axis)).squeeze(axis)
        mass = (1 - smoothing) * w_y + smoothing / classes * w.sum()
        own_v = (1 - smoothing) * w_y * v_y + smoothing / classes * (of_class * v).sum(axis)
        divisor = live.sum() if weight is None else w_y.sum()
    h = g / divisor if reduction == "mean" else g
    if log_probs:
        of_input = None
        of_row = -own_v
    else:
        p = torch.where(live.unsqueeze(axis) if live.dim() else live, x, 0).softmax(axis)
        p_v = (p * v).sum(axis)
        of_row = mass * p_v - own_v
        a = torch.where(live, h * mass, 0)
        of_input = (a.unsqueeze(axis) * p * (v - p_v.unsqueeze(axis))).to(input.dtype)
    of_row = torch.where(live, of_row / divisor if reduction == "mean" else of_row, 0)
    of_grad_output = (of_row if reduction == "none" else of_row.sum()).to(grad_output.dtype)
    of_target = None
    if soft:
        h = h.unsqueeze(axis) if h.dim() else h
        of_target = ((1 - smoothing) * h * of_class * (p_v.unsqueeze(axis) - v)).to(target.dtype)
    return of_grad_output, of_input, of_target


def _gradient_of_target(grad_output, input, target, weight, options):
    """SPEC S31, of class probabilities: (1-ε) g w_c (-ℓ_c). In PyTorch's operations: seldom asked for."""
    axis = _class_axis(input)
    dtype = torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32)
    g = grad_output.to(dtype)
    if options.reduction == "mean":
        g = g / (input.numel() / input.shape[axis])
    gradient = -(1 - options.label_smoothing) * (g.unsqueeze(axis) if g.dim() else g) * input.to(dtype).log_softmax(axis)
    if weight is not None:
        gradient = gradient * weight.to(dtype).view([-1] + [1] * (input.dim() - axis - 1))
    return gradient.to(target.dtype)


def _gradients(grad_output, input, target, weight, state, options, needed):
    """(of the logits, of class probabilities), such that they can be differentiated again; None where not needed."""
    return (
        _backward_op(grad_output, input, target, weight, state, *options) if needed[0] else None,
        _gradient_of_target(grad_output, input, target, weight, options) if needed[1] else None,
    )


def _op_setup(ctx, inputs, output):
    input, target, weight, *options = inputs
    ctx.save_for_backward(input, target, weight, output[1])
    ctx.options = _Options(*options)


def _op_backward(ctx, grad_output, _):
    input, target, weight, state = ctx.saved_tensors
    needed = ctx.needs_input_grad
    return *_gradients(grad_output, input, target, weight, state, ctx.options, needed), None, None, None, None, None


def _backward_setup(ctx, inputs, output):
    grad_output, input, target, weight, _, *options = inputs
    ctx.save_for_backward(grad_output, input, target, weight)
    ctx.options = _Options(*options)


def _backward_backward(ctx, cotangent):
    grad_output, input, target, weight = ctx.saved_tensors
    found = _differentiable(grad_output, input, target, weight, ctx.options, cotangent)
    return *found, None, None, None, None, None, None


_cross_entropy_op.register_autograd(_op_backward, setup_context=_op_setup)
_backward_op.register_autograd(_backward_backward, setup_context=_backward_setup)


# Eager

_made_early = True  # whether gradients are made with the loss: while the upstream gradients are 1, as of loss.backward()


def _may_keep_gradients():
    """Not under hooks: they may give saved tensors away until they are needed; gradients would keep as much memory."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


class _Made:
    """What a pass over the logits has made, and what their gradient needs beside them."""

    __slots__ = ("gradient", "inplace", "loss", "options", "read", "state")

    def __init__(self, input, target, weight, options, dtype, inplace):
        self.options, self.inplace = options, inplace
        self.gradient = []  # or, for an upstream gradient of 1, [it], until it is given away
        self.state = None
        early = _made_early and options.reduction != "none" and not inplace and input.requires_grad and _may_keep_gradients()
        if early:
            large = _large_gradient(input)
            call = _with_gradient(input, target, weight, options, grad_out=None if large is None else _array(large))
            gradient = call.gradient()
            self.gradient = [_tensor(gradient) if large is None else large]
        else:
            call, self.state = _with_state(input, target, weight, options)
        self.loss = _loss(call, dtype)
        self.read = [(target, target._version)]
        if weight is not None:
            self.read.append((weight, weight._version))

    def check_versions(self):
        """What reading saved tensors would notice of the logits, too, which a gradient that is there does not need."""
        for tensor, version in self.read:
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"target or weight {tuple(tensor.shape)} is at version {tensor._version}; expected version {version}"
                )


class _Loss(torch.autograd.Function):
    """Loss of plain tensors. Its gradient, for an upstream gradient of 1, is made in the same pass over the logits."""

    @staticmethod
    def forward(ctx, input, probabilities, weight, made):
        # probabilities: the target if it requires grad, else None
        ctx.made = made
        ctx.save_for_backward(input, made.read[0][0], weight)
        loss, made.loss = made.loss, None
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        global _made_early
        made = ctx.made
        if torch.is_grad_enabled():
            return _Loss._twice_differentiable(ctx, made, grad_output)
        grad_input = grad_target = None
        if ctx.needs_input_grad[1]:
            grad_target = _gradient_of_target(grad_output, *ctx.saved_tensors, made.options)
        if ctx.needs_input_grad[0]:
            try:
                grad_input = made.gradient.pop()  # by one thread only
            except IndexError:
                grad_input = None
            is_for_one = made.options.reduction != "none" and grad_output.item() == 1
            if made.options.reduction != "none":
                _made_early = is_for_one
            if grad_input is None or not is_for_one:
                grad_input = _Loss._now(ctx, made, grad_output, grad_input)
            else:
                made.check_versions()
        made.read = ()  # from here on autograd alone has them, as long as they are needed
        return grad_input, grad_target, None, None

    @staticmethod
    def _now(ctx, made, grad_output, out):
        input, target, weight = ctx.saved_tensors
        if not made.inplace:
            out = _gradient_like(input) if out is None else out
            return _gradient(grad_output, input, target, weight, made.state, made.options, out)
        gradient = _gradient(grad_output, input, target, weight, made.state, made.options, input.detach())
        torch.autograd.graph.increment_version(input)  # whoever has saved the logits finds that they have changed
        return gradient

    @staticmethod
    def _twice_differentiable(ctx, made, grad_output):
        made.gradient.clear()
        if made.inplace:
            raise RuntimeError("inplace_backward=True overwrites the logits, which create_graph=True still needs")
        state = None if made.state is None else torch.from_numpy(made.state)
        return *_gradients(grad_output, *ctx.saved_tensors, state, made.options, ctx.needs_input_grad), None, None


_apply = super(torch.autograd.Function, _Loss).apply  # that of Function also looks after torch.func, which is never here


def _is_plain(input, target, weight):
    """Whether these are ordinary tensors in the memory of the CPU, and nothing watches what is done with them."""
    return (
        type(input) in _PLAIN and input.is_cpu
        and type(target) in _PLAIN and target.is_cpu
        and (weight is None or (type(weight) in _PLAIN and weight.is_cpu))
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )  # fmt: skip


def _is_transformed():
    """Whether torch.func or forward-mode derivatives are at work, which operators of Python's know little of."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _refuse_gradient(weight):
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("the derivative for 'weight' is not implemented: pass weight.detach()")


def _compute(name, input, target, weight, options, inplace):
    """The loss."""
    compiling = torch.compiler.is_compiling()
    if not compiling and _is_transformed():
        smoothing = {} if options.log_probs else {"label_smoothing": options.label_smoothing}
        return _theirs[name](input, target, weight, reduction=options.reduction, ignore_index=options.ignore_index, **smoothing)
    plain = not compiling and _is_plain(input, target, weight)
    if not (plain or compiling):
        for what, tensor in (("input", input), ("target", target), ("weight", weight)):
            if not isinstance(tensor, Tensor) and not (what == "weight" and tensor is None):
                raise TypeError(f"{what} must be a torch.Tensor, got {type(tensor).__name__}")
    _refuse_gradient(weight)
    dtype = _loss_dtype(input, target, weight)
    if not plain:
        if input.dtype in _HALVES and dtype is torch.float32:  # autocast, or wide probabilities
            input = input.float()
        return _cross_entropy_op(input, target, weight, *options)[0]
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        if inplace and input.requires_grad and input.is_leaf:
            raise RuntimeError("inplace_backward=True would overwrite a leaf tensor that requires grad")
        inplace = inplace and not input.is_neg()  # whose memory holds other numbers than it shows
        made = _Made(input, target, weight, options, dtype, inplace)
        return _apply(input, target if target.requires_grad else None, weight, made)
    return _loss(_with_loss(input, target, weight, options), dtype)


# A linear layer and its loss


class _Products(linear.Products):
    """PyTorch's products, on OpenMP's threads, as the loss; bfloat16 ones where oneDNN has them, else in float32."""

    on_python_threads = False
    CLASSES_AT_ONCE = 512  # of the logits: MKL is faster in such parts than for all classes

    def __init__(self, linear_weight):
        super().__init__(linear_weight)
        self.tensor = _tensor(linear_weight)
        self.wide_dtype = torch.float64 if self.dtype == np.float64 else torch.float32
        self.multiplied = self.wide_dtype
        if self.tensor.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.multiplied = torch.bfloat16
            self.buffer_dtype = linear_weight.dtype
        if self.tensor.dtype is self.multiplied:
            self.converted = [slice(None)]

    def of_classes(self, some):
        return self.tensor[some].to(self.multiplied)

    def wide(self, array):
        return _tensor(array).to(self.wide_dtype).numpy()

    def store(self, values, out, places):
        out = _tensor(out)
        out[places] = torch.from_numpy(values).to(out.dtype)

    def logits(self, hidden, out):
        hidden, out = _tensor(hidden).to(self.multiplied), _tensor(out)
        size = len(self.tensor) if self.multiplied is torch.bfloat16 else self.CLASSES_AT_ONCE
        for first in range(0, len(self.tensor), max(1, size)):
            some = slice(first, first + size)
            torch.mm(hidden, self.of_classes(some).T, out=out[:, some])

    def grad_hidden(self, gradient):
        gradient = _tensor(gradient)
        return sum(torch.mm(gradient[:, some], self.of_classes(some)).to(self.wide_dtype) for some in self.converted).numpy()

    def add_grad_weight(self, gradient, hidden, total, first):
        gradient, hidden, total = _tensor(gradient).T, _tensor(hidden).to(self.multiplied), _tensor(total)
        if total.dtype is self.multiplied:
            torch.addmm(total, gradient, hidden, beta=0 if first else 1, out=total)
            return
        for some in self.parts:
            part = torch.mm(gradient[some], hidden)
            if first:
                total[some] = part
            else:
                total[some] += part

    def sums_of_classes(self, gradient):
        return _tensor(gradient).sum(0, dtype=self.wide_dtype).numpy()


def _linear_problem(input, linear_weight, target, linear_bias, weight, options, grad_output=None):
    converted = _call.options(_weight_array(weight), options.ignore_index, options.reduction, options.label_smoothing, axis=-1)
    return linear.Problem(
        _array(input), _array(linear_weight), _array(target), converted,
        linear_bias=None if linear_bias is None else _array(linear_bias), logit_scale=options.logit_scale,
        softcap=options.softcap, shift=options.shift, num_threads=torch.get_num_threads(), chunk_bytes=options.chunk_bytes,
        grad_output=grad_output, products=_Products,
    )  # fmt: skip


@torch.no_grad()
def _linear_with_gradients(tensors, options, grad_output, needed):
    """(call, gradients of input, linear_weight and linear_bias), None where not needed; those of half types are in float32."""
    input, linear_weight, target, linear_bias, weight = tensors
    upstream = None if grad_output is None else _upstream(grad_output)
    problem = _linear_problem(input, linear_weight, target, linear_bias, weight, options, upstream)
    wanted = [name for name, is_needed in zip(linear.GRADIENTS, needed, strict=True) if is_needed]
    call, found = linear.run_with_gradients(problem, (None,) * 3, wanted, problem.products.dtype)
    return call, [None if gradient is None else torch.from_numpy(gradient) for gradient in found]


def _rounded(gradients, dtype):
    return [None if gradient is None else gradient.to(dtype) for gradient in gradients]


def _from_logits(input, linear_weight, target, linear_bias, weight, options):
    """The loss by way of logits: for whatever is differentiated twice or transformed, and for several outputs a class."""
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
        logits, target = logits.flatten(0, -2), target.flatten()
    of_loss = _Options(options.reduction, options.ignore_index, options.label_smoothing, log_probs=False)
    loss = _compute("cross_entropy", logits, target, weight, of_loss, False)
    return loss.reshape(rows) if options.reduction == "none" and not several else loss


def _gradients_from_logits(tensors, options, grad_output, needed):
    """(of input, linear_weight and linear_bias), such that they can be differentiated again; None where not needed."""
    asked = [tensor for tensor, is_needed in zip((*tensors[:2], tensors[3]), needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(_from_logits(*tensors, options), asked, grad_output, create_graph=True))
    return [next(found) if is_needed else None for is_needed in needed]


@torch.library.custom_op("pyx_xent::linear_cross_entropy", mutates_args=(), device_types="cpu")
def _linear_op(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    reduction: str, ignore_index: int, label_smoothing: float, logit_scale: float, softcap: float | None, shift: bool,
    chunk_bytes: int | None, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, gradients for an upstream gradient of 1, empty where not needed)"""
    tensors = input, linear_weight, target, linear_bias, weight
    options = _LinearOptions(reduction, ignore_index, label_smoothing, logit_scale, softcap, shift, chunk_bytes)
    if any(needed):
        call, found = _linear_with_gradients(tensors, options, None, needed)
    else:
        call, found = linear.run(_linear_problem(*tensors, options)), (None, None, None)
    return _loss(call, _loss_dtype(input, target, weight)), *(input.new_empty(0) if g is None else g for g in found)


@torch.library.custom_op("pyx_xent::linear_cross_entropy_backward", mutates_args=(), device_types="cpu")
def _linear_backward_op(
    grad_output: Tensor, input: Tensor, linear_weight: Tensor, target: Tensor,
    linear_bias: Tensor | None, weight: Tensor | None,
    reduction: str, ignore_index: int, label_smoothing: float, logit_scale: float, softcap: float | None, shift: bool,
    chunk_bytes: int | None, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = _LinearOptions(reduction, ignore_index, label_smoothing, logit_scale, softcap, shift, chunk_bytes)
    found = _linear_with_gradients((input, linear_weight, target, linear_bias, weight), options, grad_output, needed)[1]
    found = _rounded(found, input.dtype)
    return tuple(input.new_empty(0) if gradient is None else gradient for gradient in found)


def _fake_gradients(input, linear_weight, linear_bias, needed, dtype):
    tensors = zip((input, linear_weight, linear_bias), needed, strict=True)
    return tuple(t.new_empty(t.shape, dtype=dtype) if is_needed else input.new_empty(0) for t, is_needed in tensors)


@_linear_op.register_fake
def _(input, linear_weight, target, linear_bias, weight, *arguments):
    *options, needed = arguments
    options = _LinearOptions(*options)
    rows = list(input.shape[:-1])
    if options.shift:
        rows[-1] = rows[-1] - 1
    loss = input.new_empty(rows if options.reduction == "none" else (), dtype=_loss_dtype(input, target, weight))
    wide = torch.float32 if input.dtype in _HALVES else input.dtype
    return loss, *_fake_gradients(input, linear_weight, linear_bias, needed, wide)


@_linear_backward_op.register_fake
def _(grad_output, input, linear_weight, target, linear_bias, weight, *arguments):
    *_, needed = arguments
    return _fake_gradients(input, linear_weight, linear_bias, needed, input.dtype)


def _linear_op_setup(ctx, inputs, output):
    input, linear_weight, target, linear_bias, weight, *options, needed = inputs
    tensors = input, linear_weight, target, linear_bias, weight
    ctx.options = _LinearOptions(*options)
    ctx.made = any(needed)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as linear_weight


def _linear_op_backward(ctx, grad_output, *_):
    *tensors, of_input, of_weight, of_bias = ctx.saved_tensors
    needed = [ctx.needs_input_grad[k] for k in (0, 1, 3)]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = _gradients_from_logits(tensors, ctx.options, grad_output, needed)
    elif ctx.made:
        made = (of_input, of_weight, of_bias)
        found = [gradient * grad_output if is_needed else None for gradient, is_needed in zip(made, needed, strict=True)]
        found = _rounded(found, tensors[0].dtype)
    else:
        found = _linear_backward_op(grad_output, *tensors, *ctx.options, needed)
        found = [gradient if is_needed else None for gradient, is_needed in zip(found, needed, strict=True)]
    return found[0], found[1], None, found[2], *[None] * 9


_linear_op.register_autograd(_linear_op_backward, setup_context=_linear_op_setup)


class _LinearLoss(torch.autograd.Function):
    """Loss of plain tensors; a reduced one makes its gradients in the same pass, for an upstream gradient of 1."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, options, dtype):
        tensors = input, linear_weight, target, linear_bias, weight
        ctx.options = options
        ctx.save_for_backward(*tensors)
        ctx.made = []  # or, until they are given away, [gradients]
        if options.reduction == "none" or not _may_keep_gradients():
            call = linear.run(_linear_problem(*tensors, options))
        else:
            call, found = _linear_with_gradients(tensors, options, None, ctx.needs_input_grad[:3])
            ctx.made.append(found)
        return _loss(call, dtype)

    @staticmethod
    def backward(ctx, grad_output):
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
        try:
            found = ctx.made.pop()  # by one thread only
        except IndexError:
            found = None
        reduced = ctx.options.reduction != "none"
        if torch.is_grad_enabled():
            found = _gradients_from_logits(tensors, ctx.options, grad_output, needed)
        else:
            if found is None:
                found = _linear_with_gradients(tensors, ctx.options, None if reduced else grad_output, needed)[1]
            if reduced and grad_output.item() != 1:
                for gradient in found:
                    if gradient is not None:
                        gradient.mul_(grad_output)
        return *_rounded(found, tensors[0].dtype), None, None, None, None


def _linear(input, linear_weight, target, linear_bias, weight, options):
    """The loss."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    compiling = torch.compiler.is_compiling()
    tensors = input, linear_weight, target, linear_bias, weight
    plain = compiling or all(tensor is None or _is_plain(tensor, target, weight) for tensor in tensors)
    alike = linear_weight.dtype is input.dtype and (linear_bias is None or linear_bias.dtype is input.dtype)
    if (
        not plain or not alike or linear_weight.dim() > 2 or target.requires_grad or input.dtype not in _ARRAY_DTYPES
        or (not compiling and _is_transformed())
    ):  # fmt: skip
        return _from_logits(*tensors, options)
    _refuse_gradient(weight)
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)]
    if compiling:
        return _linear_op(*tensors, *options, [False] * 3 if options.reduction == "none" else needed)[0]
    dtype = _loss_dtype(input, target, weight)
    if any(needed):
        return _LinearLoss.apply(input, linear_weight, linear_bias, target, weight, options, dtype)
    return _loss(linear.run(_linear_problem(*tensors, options)), dtype)


# The public functions and modules


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    *,
    inplace_backward=False,
):
    """Cross-entropy of CPU tensors: ``torch.nn.functional.cross_entropy``, computed by `pyx_xent.cross_entropy`.

    Where the logits require grad, the pass that computes a reduced loss also makes its gradient, so that forward and backward
    together allocate one tensor of the size of the logits, and `backward` only hands it over.

    Parameters
    ----------
    input : Tensor of float32, float64, bfloat16 or float16, shape (C,), (N, C) or (N, C, d1, ..., dk)
        The logits. Any strides.
    target : Tensor
        Class indices of any integer dtype, or class probabilities with the shape of `input`.
    weight : Tensor, shape (C,), optional
        Weight of each class. It must not require grad.
    size_average, reduce : bool, optional
        Deprecated in PyTorch; they override `reduction`.
    ignore_index, reduction, label_smoothing
        As for `pyx_xent.cross_entropy`.
    inplace_backward : bool
        Write the gradient over the logits, in `backward`: no tensor of their size is allocated. The logits then count as
        modified in place, so that autograd raises where something else has saved them. Not for leaf tensors, nor with
        create_graph=True. Without effect under torch.compile.

    Returns
    -------
    Tensor
        Shape and dtype as PyTorch gives them; under autocast float32.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `pyx_xent.cross_entropy`.
    RuntimeError
        `weight` requires grad, or `inplace_backward` is given for a leaf.

    Examples
    --------
    >>> import torch
    >>> from pyx_xent.torch import cross_entropy
    >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 3.0, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([0, 1]))
    >>> loss.backward()
    >>> logits.grad
    tensor([[-0.1072,  0.0876,  0.0196],
            [ 0.0226, -0.0453,  0.0226]])
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    options = _Options(reduction, ignore_index, label_smoothing, log_probs=False)
    return _compute("cross_entropy", input, target, weight, options, inplace_backward)


def nll_loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
    """Negative log-likelihood of CPU tensors: ``torch.nn.functional.nll_loss``, computed by `pyx_xent.nll_loss`.

    Parameters
    ----------
    input : Tensor of float32, float64, bfloat16 or float16, shape (C,), (N, C) or (N, C, d1, ..., dk)
        Log-probabilities.
    target, weight, size_average, ignore_index, reduce, reduction
        As for `cross_entropy`, class indices only.

    Returns
    -------
    Tensor

    Raises
    ------
    IndexError, ValueError, TypeError, RuntimeError
        As `cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from pyx_xent.torch import nll_loss
    >>> nll_loss(torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log(), torch.tensor([1, 0]))
    tensor(0.4904)
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    return _compute("nll_loss", input, target, weight, _Options(reduction, ignore_index, 0.0, log_probs=True), False)


def linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=0.0,
    options=None,
    logit_scale=1.0,
    softcap=None,
    shift=False,
    chunk_bytes=None,
):
    """A linear layer and its cross-entropy without the logits: ``torch.nn.functional.linear_cross_entropy``.

    Computed by `pyx_xent.linear_cross_entropy`, with PyTorch's matrix products. A reduced loss makes its gradients in the same
    pass, with three products in all; those of "none", and of a second backward, are made when they are asked for, with one
    more. Differentiated twice, in torch.func and with forward-mode derivatives, there are logits after all.

    Parameters
    ----------
    input : Tensor of float32, float64, bfloat16 or float16, shape (H,) or (N, H); with `shift` (..., T, H)
        What the linear layer reads.
    linear_weight : Tensor, shape (C, H)
        Of the dtype of `input`. With more axes, (C, d1, ..., dk, H), the loss is that of their logits, which are made.
    target : Tensor
        Class indices of any integer dtype, or class probabilities.
    linear_bias : Tensor, shape (C,), optional
    weight : Tensor, shape (C,), optional
        Weight of each class. It must not require grad.
    reduction, ignore_index, label_smoothing
        As for `cross_entropy`; ignore_index=None stands for -100, or for none with class probabilities.
    options : torch.nn.LinearCrossEntropyOptions, optional
        Without effect: the logits are never one array, and every option works with that. See `chunk_bytes`.
    logit_scale, softcap, shift, chunk_bytes
        As for `pyx_xent.linear_cross_entropy`.

    Returns
    -------
    Tensor
        Shape and dtype as PyTorch gives them; under autocast float32.

    Raises
    ------
    IndexError, ValueError, TypeError, RuntimeError
        As `cross_entropy`, and where PyTorch raises RuntimeError for shapes.

    Examples
    --------
    >>> import torch
    >>> from pyx_xent.torch import linear_cross_entropy
    >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    >>> linear_weight = torch.tensor([[2.0, 0.0], [0.0, 1.5], [-1.0, 0.0]], requires_grad=True)
    >>> loss = linear_cross_entropy(hidden, linear_weight, torch.tensor([0, 1]))
    >>> loss.backward()
    >>> hidden.grad
    tensor([[-0.1772,  0.0856],
            [ 0.0226, -0.0679]])
    """
    if input.dim() < 1 or (input.dim() > 2 and not shift):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    outputs = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and linear_bias.shape != outputs:
        raise RuntimeError(f"expected linear_bias shape {outputs}, got {tuple(linear_bias.shape)}")
    if len(outputs) > 1 and (input.dim() == 1 or shift):
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got {'shift=True and' if shift else 'unbatched'} input with shape {tuple(input.shape)}"
        )
    if shift and target.shape != input.shape[:-1]:
        raise ValueError(
            f"shift=True needs input (..., T, H) and target (..., T), got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    if ignore_index is not None and target.shape == (*input.shape[:-1], *outputs):
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if ignore_index is None:
        ignore_index = -100
    return _linear(
        input, linear_weight, target, linear_bias, weight,
        _LinearOptions(reduction, ignore_index, label_smoothing, float(logit_scale), softcap, shift, chunk_bytes),
    )  # fmt: skip


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` by `cross_entropy`; a subclass, with its arguments, buffers and state_dict.

    Examples
    --------
    >>> import torch
    >>> from pyx_xent.torch import CrossEntropyLoss
    >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
    >>> criterion(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0]))
    tensor(0.3913)
    """

    def __init__(
        self,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
        *,
        inplace_backward=False,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace_backward = inplace_backward

    def forward(self, input, target):
        """The loss; see `cross_entropy`."""
        options = _Options(self.reduction, self.ignore_index, self.label_smoothing, log_probs=False)
        return _compute("cross_entropy", input, target, self.weight, options, self.inplace_backward)


class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
    """``torch.nn.LinearCrossEntropyLoss`` by `linear_cross_entropy`; a subclass, with its arguments, parameters and state_dict.

    Examples
    --------
    >>> import torch
    >>> from pyx_xent.torch import LinearCrossEntropyLoss
    >>> criterion = LinearCrossEntropyLoss(in_features=4, num_classes=3, softcap=30.0)
    >>> criterion(torch.zeros(2, 4), torch.tensor([0, 2]))
    tensor(1.0986, grad_fn=<_LinearLossBackward>)
    """

    def __init__(
        self,
        in_features,
        num_classes,
        *,
        out_features=(),
        bias=False,
        device=None,
        dtype=None,
        reduction="mean",
        weight=None,
        ignore_index=None,
        label_smoothing=0.0,
        options=None,
        logit_scale=1.0,
        softcap=None,
        shift=False,
        chunk_bytes=None,
    ):
        super().__init__(
            in_features, num_classes, out_features=out_features, bias=bias, device=device, dtype=dtype, reduction=reduction,
            weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
        )  # fmt: skip
        self.logit_scale, self.softcap, self.shift, self.chunk_bytes = logit_scale, softcap, shift, chunk_bytes

    def forward(self, input, target):
        """The loss; see `linear_cross_entropy`."""
        outputs = (self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape((*outputs, self.linear.in_features)),
            target,
            linear_bias=None if self.linear.bias is None else self.linear.bias.reshape(outputs),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            shift=self.shift,
            chunk_bytes=self.chunk_bytes,
        )


class NLLLoss(torch.nn.NLLLoss):
    """``torch.nn.NLLLoss`` by `nll_loss`; a subclass, with its arguments, buffers and state_dict.

    Examples
    --------
    >>> import torch
    >>> from pyx_xent.torch import NLLLoss
    >>> NLLLoss(reduction="sum")(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1]))
    tensor(0.2877)
    """

    def forward(self, input, target):
        """The loss; see `nll_loss`."""
        return _compute(
            "nll_loss", input, target, self.weight, _Options(self.reduction, self.ignore_index, 0.0, log_probs=True), False
        )


# Routing torch.nn.functional here

_lock = threading.Lock()
_patches = set()  # those that are active


def _is_ours(input, target, weight):
    """What `patch` takes over: plain CPU tensors of a dtype that we compute, outside of all tracing."""
    return (
        not torch.compiler.is_compiling()
        and len(_patches) > 0
        and _is_plain(input, target, weight)
        and input.dtype in _ARRAY_DTYPES
        and not _is_transformed()
        and not (weight is not None and weight.requires_grad)
    )


def _routed(ours, theirs, is_ours):
    def routed(input, target, weight=None, *args, **options):
        return (ours if is_ours(input, target, weight) else theirs)(input, target, weight, *args, **options)

    # With the globals of the original, whose source torch.jit.script compiles in its place.
    routed = types.FunctionType(routed.__code__, theirs.__globals__, theirs.__name__, routed.__defaults__, routed.__closure__)
    return functools.wraps(theirs)(routed)


_routes = {name: _routed(globals()[name], theirs, _is_ours) for name, theirs in _theirs.items()}


class _Patch:
    """What `patch` returns: leaving it as a context manager takes this patch back."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with _lock:
            _patches.discard(self)
            _install()

    def __repr__(self):
        state = "active" if self in _patches else "taken back"
        routed = [f"torch.nn.functional.{n}" for n, r in _routes.items() if getattr(torch.nn.functional, n) is r]
        return f"<pyx_xent.torch.patch, {state}; routed to pyx_xent: {', '.join(routed) or 'nothing'}>"


def _install():
    for name, route in _routes.items():
        now = getattr(torch.nn.functional, name)
        if _patches and now is _theirs[name]:
            setattr(torch.nn.functional, name, route)
        elif not _patches and now is route:  # if it was wrapped by others meanwhile, it stays, and passes on
            setattr(torch.nn.functional, name, _theirs[name])


def patch():
    """Route ``torch.nn.functional.cross_entropy`` and ``nll_loss`` to pyx_xent, and so the modules and models that call them.

    Calls with other devices, dtypes, subclasses of Tensor, or under torch.compile, torch.func and tracing go to PyTorch, as
    before. A function that was imported by name beforehand is not routed. Works until `unpatch`, or to the end of a `with`
    block; may be called again and from any thread: PyTorch is back when all patches are taken back.

    Returns
    -------
    context manager
        Its repr says what is active.

    Examples
    --------
    >>> import torch
    >>> import pyx_xent.torch
    >>> with pyx_xent.torch.patch() as patch:
    ...     print(patch)
    <pyx_xent.torch.patch, active; routed to pyx_xent: torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss>
    """
    new = _Patch()
    with _lock:
        _patches.add(new)
        _install()
    return new


def unpatch():
    """Take all patches back; without one, do nothing.

    Examples
    --------
    >>> import pyx_xent.torch
    >>> pyx_xent.torch.unpatch()
    """
    with _lock:
        _patches.clear()
        _install()
