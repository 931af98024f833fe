"""What a loss is asked for, in the order in which operators and kernels take it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """What a loss reads."""

    input: Tensor
    target: Tensor
    weight: Tensor | None = None
    sample_weight: Tensor | None = None
    normalizer: Tensor | float | None = None

    @property
    def beside(self):
        """Tensors that are read beside the logits."""
        return self.target, self.weight, self.sample_weight


class Options(NamedTuple):
    """Options of a loss."""

    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    empty: str = "nan"
    focal_gamma: float = 0.0
    loss_dtype: torch.dtype | None = None
    log_probs: bool = False  # nll_loss


class LinearTensors(NamedTuple):
    """What a linear layer and its loss read."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None = None
    weight: Tensor | None = None
    sample_weight: Tensor | None = None
    normalizer: Tensor | float | None = None

    @property
    def layer(self):
        """What has a gradient, in the order of linear.GRADIENTS."""
        return self.input, self.linear_weight, self.linear_bias

    @property
    def of_loss(self):
        """What the loss reads, with hidden states in the place of logits."""
        return Tensors(self.input, self.target, self.weight, self.sample_weight, self.normalizer)


class LinearOptions(NamedTuple):
    """Options of a linear layer and its loss."""

    loss: Options
    logit_scale: float = 1.0
    softcap: float | None = None
    shift: bool = False
    chunk_bytes: int | None = None


# What PyTorch's own losses do not have, and what it is by default.
OURS_ALONE = {
    name: default
    for name, default in (Tensors._field_defaults | Options._field_defaults).items()
    if name not in ("weight", "reduction", "ignore_index", "label_smoothing", "log_probs")
}


def with_number(tensors):
    """With the normalizer as the kernels take it: a number."""
    if not isinstance(tensors.normalizer, Tensor):
        return tensors
    return tensors._replace(normalizer=float(tensors.normalizer))


def with_tensor(tensors):
    """With the normalizer as the dispatcher takes it: a tensor."""
    if tensors.normalizer is None or isinstance(tensors.normalizer, Tensor):
        return tensors
    return tensors._replace(normalizer=torch.tensor(tensors.normalizer, dtype=torch.float64, device="cpu"))


_IN_SCHEMAS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Tensor | float | None: "Tensor?",
    torch.dtype | None: "ScalarType?",
    str: "str",
    bool: "bool",
    int: "int",
    int | None: "int?",
    float: "float",
    float | None: "float?",
}


def schema_of(arguments):
    """A named tuple's fields, as an operator's schema declares arguments; Options in it as its own fields."""
    return ", ".join(
        schema_of(Options) if kind is Options else f"{_IN_SCHEMAS[kind]} {name}"
        for name, kind in arguments.__annotations__.items()
    )
