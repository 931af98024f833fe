"""The public modules: torch.nn's, with their arguments, buffers, parameters and state_dict."""

import torch

from . import functional
from ._options import OURS_ALONE

# Of the constructors; sample_weight and normalizer belong to each call.
_OURS_ALONE = {name: OURS_ALONE[name] for name in ("z_loss", "empty", "loss_dtype")} | {"inplace_backward": False}


class _Scriptable:
    """What torch.jit.script gets in the place of one of these modules, of which PyTorch's compiler understands nothing."""

    _theirs = None  # PyTorch's module, a class

    def __prepare_scriptable__(self):
        for name, default in _OURS_ALONE.items():
            if getattr(self, name, default) != default:
                raise RuntimeError(f"torch.jit.script compiles PyTorch's own loss, which has no {name}")
        module = self._theirs(weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction)
        if hasattr(self, "label_smoothing"):
            module.label_smoothing = self.label_smoothing
        return module.train(self.training)

    def extra_repr(self):
        """What differs from a module of PyTorch's."""
        told = {name: getattr(self, name, default) for name, default in _OURS_ALONE.items()}
        return ", ".join(f"{name}={value!r}" for name, value in told.items() if value != _OURS_ALONE[name])


class CrossEntropyLoss(_Scriptable, torch.nn.CrossEntropyLoss):
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

    _theirs = torch.nn.CrossEntropyLoss

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
        self.z_loss, self.empty, self.loss_dtype, self.inplace_backward = z_loss, empty, loss_dtype, inplace_backward

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


class NLLLoss(_Scriptable, torch.nn.NLLLoss):
    """``torch.nn.NLLLoss`` by `nll_loss`; a subclass, with its arguments, buffers and state_dict.

    Under torch.jit.script it is PyTorch's own module.

    Examples
    --------
    >>> import torch
    >>> from pyx_xent.torch import NLLLoss
    >>> NLLLoss(reduction="sum")(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1]))
    tensor(0.2877)
    """

    _theirs = torch.nn.NLLLoss

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
        self.empty, self.loss_dtype = empty, loss_dtype

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

    class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
        """``torch.nn.LinearCrossEntropyLoss`` by `linear_cross_entropy`; a subclass, with its arguments and state_dict.

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
            self.z_loss, self.empty, self.loss_dtype = z_loss, empty, loss_dtype
            self.logit_scale, self.softcap, self.shift, self.chunk_bytes = logit_scale, softcap, shift, chunk_bytes

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
