"""PyTorch's cross-entropy on the CPU, computed by pyx_xent: change the import, keep the rest. Imported on request only.

cross_entropy, nll_loss     the functions of torch.nn.functional, and their modules
      │
      ├── _Loss             eager, plain CPU tensors: the gradient is made together with the loss
      └── torch.ops.pyx_xent.*   under torch.compile, tracing and dispatch modes; derivatives of the gradient
patch()                     routes torch.nn.functional here

Memory is shared with the tensors, never copied. What makes a call unusual is looked for in `_is_plain`: such a call goes
through PyTorch's dispatcher, which knows the rules for it. torch.func and forward-mode derivatives get PyTorch's own loss.
"""

import functools
import threading
import types
import weakref

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction

from . import _arguments, _dispatch

__all__ = ["CrossEntropyLoss", "NLLLoss", "cross_entropy", "nll_loss", "patch", "reuse_gradients", "unpatch"]

_CPU = torch.device("cpu")
_PLAIN = (Tensor, torch.nn.Parameter)
_HALVES = (torch.bfloat16, torch.float16)
_SERIAL = 1 << 16  # elements: smaller calls have one thread anyway
_theirs = {"cross_entropy": torch.nn.functional.cross_entropy, "nll_loss": torch.nn.functional.nll_loss}


# Memory


def _array(tensor):
    """The memory of a tensor as an array for _arguments."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if tensor.dtype is torch.bfloat16:  # unknown to NumPy
        return _array(tensor.view(torch.int16)).view(_arguments.bfloat16_bits)
    try:
        return tensor.numpy()
    except RuntimeError:
        if not tensor.is_neg():
            raise
        return tensor.resolve_neg().numpy()


def _tensor(array):
    """The other way round."""
    if array.dtype == _arguments.bfloat16_bits:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class _Memory:
    """Memory for large gradients: in huge pages, as NumPy asks for it, and that of the last one again when it is free.

    What is new to the process costs more than computing it: the system clears each page when it is first touched.
    """

    LARGE = 1 << 22  # bytes: from here on NumPy asks for huge pages

    def __init__(self):
        self.limit = 512 << 20
        self._last = []  # of at most one (buffer, weak reference to the array that tensors hold)

    def forget(self):
        self._last = []

    def array(self, count, dtype):
        """(count,) that nobody else holds."""
        size = count * dtype.itemsize
        try:
            buffer, held = self._last.pop()  # by one thread only
        except IndexError:
            buffer = None
        if buffer is None or buffer.nbytes != size or held() is not None:
            buffer = np.empty(size, np.uint8)
        array = buffer.view(np.int16 if dtype is _arguments.bfloat16_bits else dtype)
        self._last = [(buffer, weakref.ref(array))] if size <= self.limit else []
        return array  # the very object that the storage of a tensor keeps: the buffer is free when it is gone


_memory = _Memory()


def reuse_gradients(max_bytes):
    """Keep the memory of the last large gradient for the next one of the same size, up to a limit.

    A gradient's memory is used again only when nothing refers to it any more: no tensor, view or NumPy array. In a training
    loop that saves the system from clearing as much memory in each step.

    Parameters
    ----------
    max_bytes : int
        Larger gradients are not kept; 0 keeps none, and gives back what is kept now. 512 MiB when nothing was set. Gradients
        below 4 MiB are never kept.

    Examples
    --------
    >>> import pyx_xent.torch
    >>> pyx_xent.torch.reuse_gradients(0)
    >>> pyx_xent.torch.reuse_gradients(512 << 20)
    """
    if not isinstance(max_bytes, int) or max_bytes < 0:
        raise ValueError(f"max_bytes must be an int and not negative, got {max_bytes!r}")
    _memory.limit = max_bytes
    _memory.forget()


_ARRAY_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: _arguments.bfloat16_bits,
}


def _large_gradient(input):
    """A tensor like `input` in memory of our own; None if it is small or of another dtype."""
    dtype = _ARRAY_DTYPES.get(input.dtype)
    if dtype is None or input.numel() * dtype.itemsize < _Memory.LARGE:
        return None
    strides = torch.empty_like(input, device="meta").stride()
    return torch.from_numpy(_memory.array(input.numel(), dtype)).view(input.dtype).as_strided(input.shape, strides)


def _gradient_like(input):
    """A tensor with the strides of torch.empty_like."""
    large = _large_gradient(input)
    return torch.empty_like(input) if large is None else large


# One call of the kernels


def _call(input, target, weight, options, grad_output=None, grad_out=None, want_gradient=False, keep_state=False, state=None):
    """Checked and computed; the last five as for _arguments.cross_entropy."""
    reduction, ignore_index, label_smoothing, log_probs = options
    if weight is not None:
        weight = _array(weight.float() if weight.dtype is torch.bfloat16 else weight)
    call = _arguments.cross_entropy(
        _array(input), _array(target), weight, ignore_index, reduction, label_smoothing, None, None, None, 0.0, "nan", None,
        None if input.numel() < _SERIAL else torch.get_num_threads(),
        grad_output, grad_out, want_gradient, keep_state, state, log_probs,
    )  # fmt: skip
    _dispatch.kernels.run(call)
    return call


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
    if grad_output.dim() and options[0] != "none":
        raise ValueError(f"grad_output must be a scalar for reduction={options[0]!r}, got shape {tuple(grad_output.shape)}")
    upstream = _array(grad_output.double()) if grad_output.dim() else float(grad_output)
    _call(input, target, weight, options, upstream, _array(out), want_gradient=True, state=state).gradient()
    return out


# Through the dispatcher: torch.compile, and whatever is differentiated more than once


@torch.library.custom_op("pyx_xent::cross_entropy", mutates_args=(), device_types="cpu")
def _cross_entropy_op(
    input: Tensor, target: Tensor, weight: Tensor | None,
    reduction: str, ignore_index: int, label_smoothing: float, log_probs: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, what the gradient needs of each row)"""
    call = _call(input, target, weight, (reduction, ignore_index, label_smoothing, log_probs), keep_state=True)
    return _loss(call, _loss_dtype(input, target, weight)), torch.from_numpy(call.row_state())


@torch.library.custom_op("pyx_xent::cross_entropy_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    grad_output: Tensor, input: Tensor, target: Tensor,
    weight: Tensor | None, state: Tensor | None,
    reduction: str, ignore_index: int, label_smoothing: float, log_probs: bool,
) -> Tensor:  # fmt: skip
    options = reduction, ignore_index, label_smoothing, log_probs
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
    reduction, _, smoothing, _ = options
    axis = _class_axis(input)
    dtype = torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32)
    g = grad_output.to(dtype)
    if reduction == "mean":
        g = g / (input.numel() / input.shape[axis])
    gradient = -(1 - smoothing) * (g.unsqueeze(axis) if g.dim() else g) * input.to(dtype).log_softmax(axis)
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
    ctx.options = tuple(options)


def _op_backward(ctx, grad_output, _):
    input, target, weight, state = ctx.saved_tensors
    needed = ctx.needs_input_grad
    return *_gradients(grad_output, input, target, weight, state, ctx.options, needed), None, None, None, None, None


def _backward_setup(ctx, inputs, output):
    grad_output, input, target, weight, _, *options = inputs
    ctx.save_for_backward(grad_output, input, target, weight)
    ctx.options = tuple(options)


def _backward_backward(ctx, cotangent):
    grad_output, input, target, weight = ctx.saved_tensors
    found = _differentiable(grad_output, input, target, weight, ctx.options, cotangent)
    return *found, None, None, None, None, None, None


_cross_entropy_op.register_autograd(_op_backward, setup_context=_op_setup)
_backward_op.register_autograd(_backward_backward, setup_context=_backward_setup)


# Eager

_made_early = True  # whether gradients are made with the loss: while the upstream gradients are 1, as of loss.backward()


class _Made:
    """What a pass over the logits has made, and what their gradient needs beside them."""

    __slots__ = ("gradient", "inplace", "loss", "options", "read", "state")

    def __init__(self, input, target, weight, options, dtype, inplace):
        self.options, self.inplace = options, inplace
        self.gradient = []  # or, for an upstream gradient of 1, [it], until it is given away
        self.state = None
        early = (
            _made_early and options[0] != "none" and not inplace and input.requires_grad
            # Hooks may give saved tensors away until they are needed; a gradient would keep as much memory.
            and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        )  # fmt: skip
        if early:
            large = _large_gradient(input)
            call = _call(input, target, weight, options, None, None if large is None else _array(large), want_gradient=True)
            gradient = call.gradient()
            self.gradient = [_tensor(gradient) if large is None else large]
        else:
            call = _call(input, target, weight, options, keep_state=True)
            self.state = call.row_state()
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
            is_for_one = made.options[0] != "none" and grad_output.item() == 1
            if made.options[0] != "none":
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


def _compute(name, input, target, weight, options, inplace):
    """The loss: options are reduction, ignore_index, label_smoothing, log_probs."""
    compiling = torch.compiler.is_compiling()
    if not compiling and _is_transformed():
        smoothing = {} if options[3] else {"label_smoothing": options[2]}
        return _theirs[name](input, target, weight, reduction=options[0], ignore_index=options[1], **smoothing)
    plain = not compiling and _is_plain(input, target, weight)
    if not (plain or compiling):
        for what, tensor in (("input", input), ("target", target), ("weight", weight)):
            if not isinstance(tensor, Tensor) and not (what == "weight" and tensor is None):
                raise TypeError(f"{what} must be a torch.Tensor, got {type(tensor).__name__}")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("the derivative for 'weight' is not implemented: pass weight.detach()")
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
    return _loss(_call(input, target, weight, options), dtype)


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
    options = (reduction, ignore_index, label_smoothing, False)
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
    return _compute("nll_loss", input, target, weight, (reduction, ignore_index, 0.0, True), False)


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
        options = (self.reduction, self.ignore_index, self.label_smoothing, False)
        return _compute("cross_entropy", input, target, self.weight, options, self.inplace_backward)


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
        return _compute("nll_loss", input, target, self.weight, (self.reduction, self.ignore_index, 0.0, True), False)


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
