"""Logits of a linear layer that are made only if somebody looks at them.

LazyLogits is a tensor of the right shape, strides and dtype, and autograd knows it as the layer's output; but instead of
numbers it has the layer's input, weight and bias (Source), and what was done to the logits since (Steps): rows selected, axes
moved, a wider dtype, a factor, a cap by tanh. A cross-entropy of it is that of the linear layer, without logits. Whatever else
is asked of it makes the numbers, as the layer would have, once.

Two places see what is done with it. __torch_function__ sees the losses. __torch_dispatch__, below autograd, sees all the rest;
so gradients of what is made after all are autograd's own.
"""

import math
import weakref

import torch
from torch import Tensor

from . import _private
from ._lazy_steps import OPERATORS, SELECTING, Steps
from ._private import tree_map_only

losses = {}  # of _lazy_losses.py: by a function's name, what computes it of lazy logits


class Source:
    """A layer's call: what its logits are made of, and what has become of them."""

    def __init__(self, head, hidden, linear_weight, linear_bias, dtype):
        self.head, self.dtype = head, dtype  # of the products
        self.layer = hidden, linear_weight, linear_bias
        self.versions, self.history = _versions(self.layer), _history(self.layer)
        self.node = None  # autograd's, of the layer's call
        self.relatives = []  # weak references to every LazyLogits that comes of it
        self.watched = self.exposed = False  # somebody waits for the logits' gradient; somebody may write to the numbers
        self.fused = False  # a loss went by without the logits

    def check(self):
        """RuntimeError if the memory of the layer's tensors is gone, or has changed since its call."""
        for tensor in self.layer:
            if tensor is not None and tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise RuntimeError(
                    "the memory of the weight of a fused head was freed (resharded?) between the layer's call and the first "
                    "use of its logits"
                )
        if _versions(self.layer) != self.versions:
            raise RuntimeError(
                "the input, weight or bias of a fused head was modified by an inplace operation (an optimizer's step?) between "
                "its call and the first use of its logits: look at logits, for the accuracy say, before"
            )

    def has_its_history(self):
        """Whether autograd still knows of the layer's tensors what it knew at its call."""
        return all(before is now for before, now in zip(self.history, _history(self.layer), strict=True))

    def converted(self):
        """Input, weight and bias in the dtype of the products."""
        return tuple(None if tensor is None else tensor.to(self.dtype) for tensor in self.layer)

    def logits(self):
        """The numbers."""
        self.check()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return torch.nn.functional.linear(*self.converted()).contiguous()

    def living(self):
        """The relatives that somebody still has."""
        return [lazy for lazy in (relative() for relative in self.relatives) if lazy is not None]

    def expose(self):
        """Make all numbers, before somebody else can write to some of them."""
        self.exposed = True
        for lazy in self.living():
            lazy.numbers()

    def count_change(self):
        """Tell autograd, which does not see what happens below it, that the numbers have changed."""
        for lazy in self.living():
            if lazy.made is not None:
                torch.autograd.graph.increment_version(lazy.made)


def _versions(tensors):
    return [None if tensor is None else (tensor._version, tensor.data_ptr()) for tensor in tensors]


def _history(tensors):
    """Of each tensor, what stands for it in autograd's graph."""
    return [None if tensor is None else tensor.grad_fn or tensor.requires_grad for tensor in tensors]


class LazyLogits(Tensor):
    """See the module."""

    @staticmethod
    def __new__(cls, source, steps, like, parent=None, step=None):
        # like: a tensor on the meta device; step: what makes the numbers of those of `parent`
        lazy = _private.wrapper_of(cls, like)
        lazy.source, lazy.steps, lazy.like, lazy.parent, lazy.step, lazy.made = source, steps, like, parent, step, None
        source.relatives.append(weakref.ref(lazy))
        return lazy

    def numbers(self, asked=None):
        """The logits as an ordinary tensor that autograd knows nothing of; asked: the name of who asks for them."""
        if self.made is None:
            if self.parent is None:
                if asked is not None:
                    self.source.head.made[asked] += 1
                self.made = self.source.logits()
            else:
                numbers = self.parent.numbers(asked)
                with torch.no_grad():
                    self.made = self.step(numbers)
                if self.made.stride() != self.like.stride():  # of a copy: views have their base's
                    self.made = torch.empty_strided(self.like.shape, self.like.stride(), dtype=self.like.dtype).copy_(self.made)
        return self.made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in losses:
            return losses[name](func, args, kwargs)
        if name in _WATCHING or func == Tensor.grad_fn.__get__:
            args[0].source.watched = True
            if name == "retain_grad" and args[0].source.fused:
                raise RuntimeError("a loss of these logits is computed already, without them: call retain_grad() before it")
        elif name in _OF_MEMORY:
            args[0].source.expose()
            args = (plain(args[0], name), *args[1:])
        elif func == Tensor.data.__get__:
            return args[0].detach()
        elif func == Tensor.data.__set__:
            raise RuntimeError("the logits of a fused head have no .data to set")
        with _private.as_tensors():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        taken = OPERATORS.get(func)
        if taken is not None and type(args[0]) is cls:
            found = taken(args[0].steps, args[0], *args[1:], **kwargs)
            if found is not None:
                return _derived(args[0], found, func, args, kwargs)
        name = str(func).removeprefix("aten.").partition(".")[0]
        if torch.Tag.inplace_view in func.tags and func is not torch.ops.aten.detach_.default:
            raise RuntimeError(
                f"{name}: logits of a fused head do not change their shape in place; it works without the underscore"
            )
        owners = {}

        def numbers(lazy):
            made = lazy.numbers(name)
            owners[id(made)] = lazy
            return made

        given, named = tree_map_only(cls, numbers, (args, kwargs))
        if _gives_memory_away(func):
            for lazy in owners.values():
                lazy.source.expose()
        result = func(*given, **named)
        if func._schema.is_mutable:
            for lazy in owners.values():
                lazy.source.count_change()
                if lazy.made.shape != lazy.like.shape:
                    raise RuntimeError(f"{name}: an output has another shape than the logits of a fused head it was to replace")
        # What an operator changes in place is what it gives back.
        return tree_map_only(Tensor, lambda tensor: owners.get(id(tensor), tensor), result)


# Tensor's methods after which somebody waits for the logits' own gradient, and those that read memory which is not there.
_WATCHING = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}
_OF_MEMORY = {
    "__array__", "__deepcopy__", "__dlpack__", "__format__", "__reduce_ex__", "__repr__", "apply_", "data_ptr", "map_", "map2_",
    "numpy", "share_memory_", "storage", "tolist", "untyped_storage",
}  # fmt: skip


def _gives_memory_away(func):
    """Whether an operator writes to an argument, or gives back a view, to which others may write."""
    return func._schema.is_mutable or any(given.alias_info is not None for given in func._schema.returns)


def _derived(lazy, found, func, args, kwargs):
    """LazyLogits for what an operator makes of one; found: its steps, or a list of them."""
    others = tree_map_only(Tensor, torch.clone, args[1:])  # which may change until the numbers are made

    def numbers_of(k):
        def step(numbers):
            result = func(numbers, *others, **kwargs)
            return result if k is None else result[k]

        return step

    if func in SELECTING:
        like = torch.empty((*found.rows.shape, lazy.like.shape[-1]), dtype=lazy.like.dtype, device="meta")
    else:
        like = func(lazy.like, *args[1:], **{name: value for name, value in kwargs.items() if name != "device"})
    if isinstance(found, list):
        each = enumerate(zip(found, like, strict=True))
        return [_new(lazy, steps, one, numbers_of(k)) for k, (steps, one) in each]
    return _new(lazy, found, like, numbers_of(None))


def _new(parent, steps, like, step):
    lazy = LazyLogits(parent.source, steps, like, parent, step)
    if parent.source.exposed:  # a later change of the numbers may not be seen
        lazy.numbers()
    return lazy


# Autograd's view of both ways.


class _Layer(torch.autograd.Function):
    """The layer, whose logits nobody has made yet."""

    @staticmethod
    def forward(ctx, hidden, linear_weight, linear_bias, source):
        ctx.save_for_backward(hidden, linear_weight)
        ctx.source_dtype = source.dtype
        shape = *hidden.shape[:-1], len(linear_weight)
        rows = torch.arange(math.prod(shape[:-1]), device="cpu").reshape(shape[:-1])
        return LazyLogits(source, Steps(rows, len(shape) - 1), torch.empty(shape, dtype=source.dtype, device="meta"))

    @staticmethod
    def backward(ctx, grad_output):
        hidden, linear_weight = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        with torch.autocast("cpu", enabled=False):
            count = math.prod(hidden.shape[:-1])
            gradient = grad_output.to(ctx.source_dtype).reshape(count, len(linear_weight))
            rows = hidden.reshape(count, hidden.shape[-1]).to(ctx.source_dtype)
            return (
                (gradient @ linear_weight.to(ctx.source_dtype)).reshape(hidden.shape).to(hidden.dtype) if of_hidden else None,
                (gradient.T @ rows).to(linear_weight.dtype) if of_weight else None,
                gradient.sum(0).to(linear_weight.dtype) if of_bias else None,
                None,
            )


class _Numbers(torch.autograd.Function):
    """Lazy logits as an ordinary tensor."""

    @staticmethod
    def forward(ctx, lazy, asked):
        return lazy.numbers(asked).detach()

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.view_as(tangent)


def plain(lazy, asked):
    """Lazy logits as an ordinary tensor that autograd knows; asked: the name of who asks for it."""
    return _Numbers.apply(lazy, asked)


def lazy_logits(source):
    """The output of a layer's call."""
    lazy = _Layer.apply(*source.layer, source)
    with _private.as_tensors():
        source.node = lazy.grad_fn
    return lazy
