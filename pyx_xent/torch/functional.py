"""The public functions: torch.nn.functional's, with what pyx_xent has beside."""

from torch.overrides import handle_torch_function, has_torch_function

from . import _linear, _loss, _private
from ._arguments import check_linear_shapes, check_tensors, number
from ._options import LinearOptions, LinearTensors, Options, Tensors


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
    sample_weight=None,
    normalizer=None,
    z_loss=0.0,
    empty="nan",
    focal_gamma=0.0,
    loss_dtype=None,
    inplace_backward=False,
):
    """Cross-entropy of CPU tensors: ``torch.nn.functional.cross_entropy``, computed by `pyx_xent.cross_entropy`.

    Where the logits require grad, the pass that computes a reduced loss also makes its gradient, so that forward and backward
    together allocate one tensor of the size of the logits, and `backward` only hands it over: also of a loss that is divided or
    scaled before, from the second step on. On other devices, in torch.func, with forward-mode derivatives, and in programs that
    torch.export or torch.jit.trace make, it is PyTorch's own function that computes.

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
    sample_weight, normalizer, z_loss, empty, focal_gamma, loss_dtype
        As for `pyx_xent.cross_entropy`: a tensor of the shape of the unreduced loss, a number or tensor of one number, a
        number, "nan", "zero" or "raise", a number, torch.float32 or torch.float64. The tensors must not require grad.
    inplace_backward : bool
        Write the gradient over the logits, in `backward`: no tensor of their size is allocated. The logits then count as
        modified in place, so that autograd raises where something else has saved them. Not for leaf tensors and their views,
        nor with create_graph=True. Without effect under torch.compile.

    Returns
    -------
    Tensor
        Shape and dtype as PyTorch gives them, or of `loss_dtype`; of half types, under autocast, float32.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `pyx_xent.cross_entropy`.
    RuntimeError
        `weight`, `sample_weight` or `normalizer` requires grad; `inplace_backward` is given for a leaf or a view of one.

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
    tensors = Tensors(input, target, weight, sample_weight, normalizer)
    if has_torch_function(tensors):
        return _overridden(cross_entropy, **locals())
    if size_average is not None or reduce is not None:
        reduction = _private.reduction_of(size_average, reduce)
    options = Options(
        reduction, ignore_index, number(label_smoothing, "label_smoothing"), number(z_loss, "z_loss"), empty,
        number(focal_gamma, "focal_gamma"), loss_dtype,
    )  # fmt: skip
    return _loss.compute(tensors, options, inplace_backward)


def nll_loss(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    *,
    sample_weight=None,
    normalizer=None,
    empty="nan",
    loss_dtype=None,
):
    """Negative log-likelihood of CPU tensors: ``torch.nn.functional.nll_loss``, computed by `pyx_xent.nll_loss`.

    Parameters
    ----------
    input : Tensor of float32, float64, bfloat16 or float16, shape (C,), (N, C) or (N, C, d1, ..., dk)
        Log-probabilities.
    target, weight, size_average, ignore_index, reduce, reduction
        As for `cross_entropy`, class indices only.
    sample_weight, normalizer, empty, loss_dtype
        As for `cross_entropy`.

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
    tensors = Tensors(input, target, weight, sample_weight, normalizer)
    if has_torch_function(tensors):
        return _overridden(nll_loss, **locals())
    if size_average is not None or reduce is not None:
        reduction = _private.reduction_of(size_average, reduce)
    return _loss.compute(tensors, Options(reduction, ignore_index, empty=empty, loss_dtype=loss_dtype, log_probs=True))


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
    sample_weight=None,
    normalizer=None,
    z_loss=0.0,
    empty="nan",
    focal_gamma=0.0,
    loss_dtype=None,
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
    reduction, ignore_index, label_smoothing, sample_weight, normalizer, z_loss, empty, focal_gamma, loss_dtype
        As for `cross_entropy`; ignore_index=None stands for -100, or for none with class probabilities.
    options : torch.nn.LinearCrossEntropyOptions, optional
        Without effect: the logits are never one array, and every option works with that. See `chunk_bytes`.
    logit_scale, softcap, shift, chunk_bytes
        As for `pyx_xent.linear_cross_entropy`.

    Returns
    -------
    Tensor
        Shape and dtype as PyTorch gives them, or of `loss_dtype`; of half types, under autocast, float32.

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
    tensors = LinearTensors(input, linear_weight, target, linear_bias, weight, sample_weight, normalizer)
    if has_torch_function(tensors):
        return _overridden(linear_cross_entropy, **locals())
    check_tensors(tensors)
    check_linear_shapes(tensors, ignore_index, shift)
    of_loss = Options(
        reduction, -100 if ignore_index is None else ignore_index, number(label_smoothing, "label_smoothing"),
        number(z_loss, "z_loss"), empty, number(focal_gamma, "focal_gamma"), loss_dtype,
    )  # fmt: skip
    scale, softcap = number(logit_scale, "logit_scale"), number(softcap, "softcap")
    return _linear.compute(tensors, LinearOptions(of_loss, scale, softcap, shift, chunk_bytes))


def _overridden(function, tensors, **arguments):
    """What a tensor's __torch_function__ makes of a call."""
    positional = [arguments.pop(name) for name in ("input", "linear_weight", "target") if name in arguments]
    return handle_torch_function(function, tensors, *positional, **arguments)
