"""The public modules: torch.nn's, with their arguments, buffers, parameters and state_dict."""

from typing import ClassVar

import torch

from . import functional
from ._options import LinearOptions, Options


class _Criterion:
    """What the modules have in common beside PyTorch's."""

    _defaults: ClassVar[dict] = {}  # of the options that PyTorch's module does not have
    _shown = ()  # of those that it has and does not show

    def __getattr__(self, name):
        # A module that was pickled before there was such an option has not got it.
        return self._defaults[name] if name in self._defaults else super().__getattr__(name)

    def _set(self, **options):
        for name in self._defaults:
            setattr(self, name, options[name])

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


_OURS = ("z_loss", "empty", "loss_dtype")


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

    _defaults: ClassVar[dict] = {name: Options._field_defaults[name] for name in _OURS} | {"inplace_backward": False}
    _shown = ("reduction", "ignore_index", "label_smoothing")

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
        loss_dtype=None,
        inplace_backward=False,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self._set(z_loss=z_loss, empty=empty, loss_dtype=loss_dtype, inplace_backward=inplace_backward)

    def _theirs(self):
        return torch.nn.CrossEntropyLoss(self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing)

    def forward(self, input, target, *, sample_weight=None, normalizer=None):
        """The loss; see `cross_entropy`."""
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            z_loss=self.z_loss,
            empty=self.empty,
            loss_dtype=self.loss_dtype,
            inplace_backward=self.inplace_backward,
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

    _defaults: ClassVar[dict] = {name: Options._field_defaults[name] for name in ("empty", "loss_dtype")}
    _shown = ("reduction", "ignore_index")

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
        self._set(empty=empty, loss_dtype=loss_dtype)

    def _theirs(self):
        return torch.nn.NLLLoss(self.weight, None, self.ignore_index, None, self.reduction)

    def forward(self, input, target, *, sample_weight=None, normalizer=None):
        """The loss; see `nll_loss`."""
        return functional.nll_loss(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            sample_weight=sample_weight,
            normalizer=normalizer,
            empty=self.empty,
            loss_dtype=self.loss_dtype,
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

        _defaults: ClassVar[dict] = {name: Options._field_defaults[name] for name in _OURS} | LinearOptions._field_defaults

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
            self._set(
                z_loss=z_loss, empty=empty, loss_dtype=loss_dtype, logit_scale=logit_scale, softcap=softcap, shift=shift,
                chunk_bytes=chunk_bytes,
            )  # fmt: skip

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
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                sample_weight=sample_weight,
                normalizer=normalizer,
                z_loss=self.z_loss,
                empty=self.empty,
                loss_dtype=self.loss_dtype,
                logit_scale=self.logit_scale,
                softcap=self.softcap,
                shift=self.shift,
                chunk_bytes=self.chunk_bytes,
            )
