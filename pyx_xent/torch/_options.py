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


class Options(NamedTuple):
    """What it is asked for besides."""

    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    empty: str = "nan"
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


class LinearOptions(NamedTuple):
    """What they are asked for besides."""

    loss: Options
    logit_scale: float = 1.0
    softcap: float | None = None
    shift: bool = False
    chunk_bytes: int | None = None


# The same as schemas of operators. A dtype is a number there, as torch.library has it.
TENSORS = "Tensor input, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? normalizer"
OPTIONS = (
    "str reduction, int ignore_index, float label_smoothing, float z_loss, str empty, ScalarType? loss_dtype, bool log_probs"
)
LINEAR_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, Tensor? sample_weight, "
    "Tensor? normalizer"
)
LINEAR_OPTIONS = f"{OPTIONS}, float logit_scale, float? softcap, bool shift, int? chunk_bytes"
