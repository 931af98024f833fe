"""One loss, whichever way it goes."""

import torch

from . import _calls, _eager, _operators, _pytorch, _routes
from ._arguments import check_tensors, refuse_gradient
from ._options import with_number
from ._tensors import HALVES


def compute(tensors, options, inplace=False):
    """The loss: cross-entropy, or negative log-likelihood."""
    if _routes.is_plain(*tensors):
        return _eager.loss(tensors, options, inplace)
    check_tensors(tensors)
    refuse_gradient(weight=tensors.weight, sample_weight=tensors.sample_weight, normalizer=tensors.normalizer)
    way = _routes.way_of(tensors)
    if way is _routes.PYTORCH:
        return _pytorch.loss(tensors, options)
    if way is _routes.EAGER:
        return _eager.loss(with_number(tensors), options, inplace)
    if tensors.input.dtype in HALVES and _calls.dtype_of_loss(tensors, options) is torch.float32 and options.loss_dtype is None:
        tensors = tensors._replace(input=tensors.input.float())  # autocast, or wide probabilities
    return _operators.loss(tensors, options)
