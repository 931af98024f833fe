"""What may be done to lazy logits without making them: each operator's effect on what is remembered of them (Steps)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._tensors import wide_dtype

aten = torch.ops.aten
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Steps(NamedTuple):
    """What was done to a layer's logits: they are cap · tanh(scale · logits) of `rows`, or scale · logits without a cap."""

    rows: Tensor  # numbers of the rows, in the shape of the logits without the class axis
    axis: int  # the classes'
    scale: float = 1.0
    cap: float | None = None

    def times(self, factor):
        if self.cap is None:
            return self._replace(scale=self.scale * factor)
        return self._replace(cap=self.cap * factor)

    def options(self, dtype):
        """logit_scale and softcap of linear_cross_entropy; None if it has no such thing, or not in the dtype that computes."""
        scale = self.scale if self.cap is None else self.scale * self.cap
        limits = torch.finfo(wide_dtype(dtype))
        if not abs(scale) <= limits.max or (self.cap is not None and not limits.tiny <= self.cap <= limits.max):
            return None
        return {"logit_scale": scale, "softcap": self.cap}


# Operators that leave logits lazy: (steps, lazy, the operator's other arguments) -> the steps of its result, a list of them, or
# None if the numbers have to be made.


def _positive(dim, dims):
    return dim + dims if dim < 0 else dim


def _same(steps, lazy, *_, **__):
    return steps


def _view(steps, lazy, shape):
    classes = lazy.shape[-1] if lazy.dim() else 0
    if steps.axis != lazy.dim() - 1 or not shape or classes == 0:
        return None
    rows = steps.rows.numel()
    shape = [rows * classes // max(1, -math.prod(shape)) if size == -1 else size for size in shape]
    if shape[-1] != classes or math.prod(shape[:-1]) != rows:
        return None
    return steps._replace(rows=steps.rows.reshape(shape[:-1]), axis=len(shape) - 1)


def _of_rows(operator, drops=False):
    """An operator on one axis, which it drops or keeps: if that is not the classes', it is done with the numbers of rows."""

    def taken(steps, lazy, *others, **named):
        dim, others = _axis_of(operator, others, named)
        dim = _positive(dim, lazy.dim())
        if dim == steps.axis:
            return None
        rows = operator(steps.rows, dim=dim - (dim > steps.axis), **others)
        axis = steps.axis - (drops and dim < steps.axis)
        if isinstance(rows, tuple | list):
            return [steps._replace(rows=some, axis=axis) for some in rows]
        return steps._replace(rows=rows, axis=axis)

    return taken


def _axis_of(operator, others, named):
    """(dim, the other arguments by name)"""
    names = [argument.name for argument in operator._schema.arguments][1:]
    given = dict(zip(names, others, strict=False)) | named
    return given.pop("dim", 0), given


def _unsqueeze(steps, lazy, dim):
    dim = _positive(dim, lazy.dim() + 1)
    before = dim <= steps.axis
    return steps._replace(rows=steps.rows.unsqueeze(dim if before else dim - 1), axis=steps.axis + before)


def _squeeze(steps, lazy, dims=None):
    every = range(lazy.dim())
    dims = every if dims is None else [_positive(dim, lazy.dim()) for dim in ([dims] if isinstance(dims, int) else dims)]
    gone = [dim for dim in dims if lazy.shape[dim] == 1]
    if steps.axis in gone:
        return None
    kept = [dim for dim in every if dim not in gone]
    rows = steps.rows.reshape([lazy.shape[dim] for dim in kept if dim != steps.axis])
    return steps._replace(rows=rows, axis=kept.index(steps.axis))


def _permute(steps, lazy, dims):
    dims = [_positive(dim, lazy.dim()) for dim in dims]
    rows = steps.rows.permute([dim - (dim > steps.axis) for dim in dims if dim != steps.axis])
    return steps._replace(rows=rows, axis=dims.index(steps.axis))


def _transpose(steps, lazy, first, second):
    dims = list(range(lazy.dim()))
    first, second = _positive(first, lazy.dim()), _positive(second, lazy.dim())
    dims[first], dims[second] = second, first
    return _permute(steps, lazy, dims)


def _index(steps, lazy, indices):
    covered = sum(index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1 for index in indices)
    if covered > steps.axis or steps.axis != lazy.dim() - 1 or any(index is None for index in indices):
        return None
    rows = steps.rows[tuple(indices)]
    return steps._replace(rows=rows, axis=rows.dim())


def _index_select(steps, lazy, dim, index):
    return None if steps.axis != lazy.dim() - 1 else _of_rows(aten.index_select.default)(steps, lazy, dim, index)


def _cast(steps, lazy, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    on_cpu = device is None or torch.device(device).type == "cpu"
    if not on_cpu or layout not in (None, torch.strided) or pin_memory or dtype not in (None, *_DTYPES):
        return None
    widened = dtype is None or dtype is lazy.dtype or _DTYPES.index(dtype) > max(1, _DTYPES.index(lazy.dtype))
    return steps if widened else None


def _number(factor):
    # A tensor of one number may be one that torch makes of Python's.
    if isinstance(factor, Tensor):
        is_number = type(factor) is Tensor and factor.dim() == 0 and factor.is_cpu and not factor.requires_grad
        factor = factor.item() if is_number else None
    return float(factor) if isinstance(factor, int | float) and not isinstance(factor, bool) else None


def _multiplied(steps, lazy, factor):
    factor = _number(factor)
    return None if factor is None else steps.times(factor)


def _divided(steps, lazy, divisor):
    divisor = _number(divisor)
    return steps.times(1 / divisor) if divisor else None


def _tanh(steps, lazy):
    return steps._replace(cap=1.0) if steps.cap is None else None


SELECTING = (aten.index.Tensor, aten.index_select.default)  # what they give is a copy, of the strides of a new tensor
OPERATORS = {
    aten.detach.default: _same, aten.alias.default: _same, aten.clone.default: _same, aten.view.default: _view,
    aten._unsafe_view.default: _view, aten.slice.Tensor: _of_rows(aten.slice.Tensor),
    aten.select.int: _of_rows(aten.select.int, drops=True), aten.unbind.int: _of_rows(aten.unbind.int, drops=True),
    aten.split.Tensor: _of_rows(aten.split.Tensor), aten.split_with_sizes.default: _of_rows(aten.split_with_sizes.default),
    aten.index.Tensor: _index, aten.index_select.default: _index_select, aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze, aten.squeeze.dim: _squeeze, aten.squeeze.dims: _squeeze, aten.permute.default: _permute,
    aten.transpose.int: _transpose, aten._to_copy.default: _cast, aten.mul.Tensor: _multiplied, aten.mul.Scalar: _multiplied,
    aten.div.Tensor: _divided, aten.div.Scalar: _divided, aten.tanh.default: _tanh,
}  # fmt: skip
