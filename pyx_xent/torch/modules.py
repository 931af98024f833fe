"""The public modules: torch.nn's, with their arguments, buffers, parameters and state_dict."""

from typing import ClassVar

import torch

from . import functional
from ._options import OURS_ALONE, LinearOptions, Options


class _Criterion:
    """What the modules have in common beside PyTorch's."""

    _defaults: ClassVar[dict] = {}  # of the options that PyTorch's module does not have
    _shared = ()  # of those that it has, too
    _shown = ()  # of these, what it does not show

    def __getattr__(self, name):
        # A module that was pickled before there was such an option has not got it.
        return self._defaults[name] if name in self._defaults else super().__getattr__(name)

    def _set(self, given):
        for name in self._defaults:
            setattr(self, name, given[name])

    def _options(self):
        """Those of the function, but for weight and what is given to each call."""
        return {name: getattr(self, name) for name in (*self._shared, *self._defaults)}

    def _differing(self):
        return {name: getattr(self, name) for name, default in self._defaults.items() if getattr(self, name) != default}

    def extra_repr(self):
        """The options that are not what they are by default."""
        defaults = Options._field_defaults
        told = {name: getattr(self, name) for name in self._shown if getattr(self, name) != defaults[name]} | self._differing()
        mine = ", ".join(f"{name}={value!r}" for name, value in told.items())
        return ", ".join(filter(None, (super().extra_repr(), mine)))

    def __prepare_scriptable__(self):
        """What torch.jit.script compiles instead: PyTorch's module."""
        for name in self._differing():
            raise RuntimeError(f"torch.jit.script compiles PyTorch's own loss, which has no {name}")
        return self._theirs().train(self.training)


_OURS = {name: default for name, default in OURS_ALONE.items() if name in Options._fields}


class CrossEntropyLoss(_Criterion, torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` by `cross_entropy`; a subclass, with its arguments, buffers and state_dict.

    Under torch.jit.script it is PyTorch's own module.

    Examples
    --------
    >>> import torch
    >>> from pyx_xent.torch import CrossEntropyLoss
    >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
    >>> criterion(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0]))
    tensor(0.3913)
    """

    _defaults: ClassVar[dict] = _OURS | {"inplace_backward": False}
    _shared = _shown = ("reduction", "ignore_index", "label_smoothing")

    def __init__(
        self,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
        *,
        z_loss=0.0,
        empty="nan",
        focal_gamma=0.0,
        loss_dtype=None,
        inplace_backward=False,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self._set(locals())

    def _theirs(self):
        return torch.nn.CrossEntropyLoss(self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing)

    def forward(self, input, target, *, sample_weight=None, normalizer=None):
        """The loss; see `cross_entropy`."""
        return functional.cross_entropy(
            input, target, self.weight, sample_weight=sample_weight, normalizer=normalizer, **self._options()
        )


class NLLLoss(_Criterion, torch.nn.NLLLoss):
    """``torch.nn.NLLLoss`` by `nll_loss`; a subclass, with its arguments, buffers and state_dict.

    Under torch.jit.script it is PyTorch's own module.

    Examples
    --------
    >>> import torch
    >>> from pyx_xent.torch import NLLLoss
    >>> NLLLoss(reduction="sum")(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1]))
    tensor(0.2877)
    """

    _defaults: ClassVar[dict] = {name: _OURS[name] for name in ("empty", "loss_dtype")}
    _shared = _shown = ("reduction", "ignore_index")

    def __init__(
        self,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        *,
        empty="nan",
        loss_dtype=None,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction)
        self._set(locals())

    def _theirs(self):
        return torch.nn.NLLLoss(self.weight, None, self.ignore_index, None, self.reduction)

    def forward(self, input, target, *, sample_weight=None, normalizer=None):
        """The loss; see `nll_loss`."""
        return functional.nll_loss(
            input, target, self.weight, sample_weight=sample_weight, normalizer=normalizer, **self._options()
        )


if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # from PyTorch 2.13 on

    class LinearCrossEntropyLoss(_Criterion, torch.nn.LinearCrossEntropyLoss):
        """``torch.nn.LinearCrossEntropyLoss`` by `linear_cross_entropy`; a subclass, with its arguments and state_dict.

        Examples
        --------
        >>> import torch
        >>> from pyx_xent.torch import LinearCrossEntropyLoss
        >>> criterion = LinearCrossEntropyLoss(in_features=4, num_classes=3, softcap=30.0)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 2]))
        tensor(1.0986, grad_fn=<_LinearLossBackward>)
        """

        _defaults: ClassVar[dict] = _OURS | LinearOptions._field_defaults
        _shared = CrossEntropyLoss._shared

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
            z_loss=0.0,
            empty="nan",
            focal_gamma=0.0,
            loss_dtype=None,
            logit_scale=1.0,
            softcap=None,
            shift=False,
            chunk_bytes=None,
        ):
            super().__init__(
                in_features, num_classes, out_features=out_features, bias=bias, device=device, dtype=dtype, reduction=reduction,
                weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
            )  # fmt: skip
            self._set(locals())

        def __prepare_scriptable__(self):
            raise RuntimeError(
                "torch.jit.script compiles no linear_cross_entropy: use a linear layer and nn.CrossEntropyLoss, under patch()"
            )

        def forward(self, input, target, *, sample_weight=None, normalizer=None):
            """The loss; see `linear_cross_entropy`."""
            outputs = (self.num_classes, *self.out_features)
            return functional.linear_cross_entropy(
                input,
                self.linear.weight.reshape((*outputs, self.linear.in_features)),
                target,
                linear_bias=None if self.linear.bias is None else self.linear.bias.reshape(outputs),
                weight=self.weight,
                sample_weight=sample_weight,
                normalizer=normalizer,
                **self._options(),
            )
