"""The functions: NumPy in, NumPy out. Each checks its arguments, runs a kernel, and returns what was asked for."""

from . import _call

__all__ = [
    "cross_entropy",
    "cross_entropy_grad_hess",
    "cross_entropy_with_grad",
    "log_softmax",
    "log_softmax_backward",
    "nll_loss",
    "nll_loss_with_grad",
    "softmax",
    "softmax_backward",
]


def cross_entropy(
    logits,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    axis=None,
    sample_weight=None,
    normalizer=None,
    z_loss=0.0,
    empty="nan",
    focal_gamma=0.0,
    loss_dtype=None,
    out=None,
    num_threads=None,
):
    """Cross-entropy between logits and class indices or class probabilities, as ``torch.nn.functional.cross_entropy``.

    With lse = log Σ_c exp(x_c), weights w, label smoothing ε, and C classes, a row x with class index y costs ::

        L = (1-ε) w_y (lse - x_y) + ε/C Σ_c w_c (lse - x_c)              + z_loss lse²

    and a row with class probabilities q, q' = (1-ε) q + ε/C ::

        L = Σ_c w_c q'_c (lse - x_c)                                     + z_loss lse²

    Focal loss, with p_y = exp(x_y - lse), multiplies the first of these, less z_loss lse², with (1 - p_y)^focal_gamma.

    Nothing of the size of the logits is allocated or written.

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (C,), (N, C) or (N, C, d1, ..., dk)
        Unnormalised log-probabilities x. Any strides and memory order.
    target : array_like
        Class indices of any integer dtype, shape (), (N,) or (N, d1, ..., dk). Or class probabilities of a floating dtype,
        with the shape of `logits`; they are used as they are, whatever their sum.
    weight : array_like, shape (C,), optional
        Weight w of each class.
    ignore_index : int
        Rows with this target cost 0, and their logits are not looked at. Not with class probabilities.
    reduction : {"mean", "sum", "none"}
        "mean" divides Σ L by the number of rows that are not ignored; with `weight` and class indices by Σ w_y.
    label_smoothing : float in [0, 1]
        ε.
    axis : int, optional
        The class axis; by default 0 for one-dimensional logits and otherwise 1.
    sample_weight : array_like, optional
        Multiplies L, and counts in the divisor of "mean". Shape of the unreduced loss. A row of weight 0 is not looked
        at, like an ignored one.
    normalizer : float, optional
        Divisor of "mean", in place of the above: for a batch that is a part of a larger one.
    z_loss : float
        Weight of lse², which keeps the logits near 0.
    empty : {"nan", "zero", "raise"}
        What "mean" gives when nothing counts: no row, all ignored, or all that would count have a sample weight or class weight
        of 0 (which `normalizer` makes a mean like any other). With "zero" the gradient is 0, too; "raise" is a ValueError.
    focal_gamma : float
        γ of the focal loss of Lin et al. (2017, arXiv:1708.02002), which counts rows less whose class has a high probability
        already. Only with class indices and without label smoothing; their α is `weight`. The divisor of "mean" is the same.
    loss_dtype : float32 or float64, optional
        Dtype of the loss, which is computed in float64: at least as wide as the one below.
    out : ndarray, optional
        Array for the loss, of its shape and dtype.
    num_threads : int, optional
        At most so many threads. The result does not depend on it.

    Returns
    -------
    loss : scalar or ndarray
        A scalar for "mean" and "sum"; for "none" an array with the shape of `logits` without its class axis. Its dtype is
        `loss_dtype`, or that of `logits`; with class probabilities the one to which logits, target and weight promote.

    Raises
    ------
    IndexError
        A class index is neither in [0, C) nor `ignore_index`.
    ValueError, TypeError
        A shape, dtype or option does not fit; the message says what was expected.
    numpy.exceptions.AxisError
        `logits` has no such axis.

    All of them before anything is written.

    See Also
    --------
    cross_entropy_with_grad : the gradient in the same pass

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[2.0, 0.5, -1.0], [0.0, 3.0, 0.0]])
    >>> float(cross_entropy(logits, [0, 1]).round(4))
    0.1681
    >>> cross_entropy(logits, [0, -100], reduction="none").round(4)
    array([0.2413, 0.    ])
    """
    options = _call.options(
        weight, ignore_index, reduction, label_smoothing, axis, sample_weight, normalizer, z_loss, empty, focal_gamma,
        loss_dtype,
    )  # fmt: skip
    call = _call.cross_entropy(logits, target, options, out, num_threads)
    call.run()
    return call.loss()


def cross_entropy_with_grad(
    logits,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    axis=None,
    sample_weight=None,
    normalizer=None,
    z_loss=0.0,
    empty="nan",
    focal_gamma=0.0,
    loss_dtype=None,
    out=None,
    num_threads=None,
    grad_output=None,
    grad_out=None,
):
    """Cross-entropy and its gradient with respect to the logits, in one pass.

    For class indices, with p = softmax(x), upstream gradient g and sample weight s, divided by the divisor of "mean" ::

        ∂/∂x_c = g s [(1-ε) w_y (p_c - δ_cy) + ε/C (p_c Σ_k w_k - w_c) + 2 z_loss lse p_c]

    and for focal loss, with γ = focal_gamma, ::

        ∂/∂x_c = g s [w_y (p_c - δ_cy) ((1-p_y)^γ - γ p_y (1-p_y)^(γ-1) log p_y) + 2 z_loss lse p_c]

    Parameters
    ----------
    logits, target, weight, ignore_index, reduction, label_smoothing, axis, sample_weight, normalizer, z_loss, empty, \
focal_gamma, loss_dtype, out, num_threads
        As for `cross_entropy`.
    grad_output : float or array_like, optional
        Upstream gradient g: a scalar, or for reduction "none" also an array with the shape of the loss. 1 by default.
    grad_out : ndarray, optional
        Array for the gradient, of the shape and dtype of `logits`. It may be `logits` itself, which is then overwritten.

    Returns
    -------
    loss : scalar or ndarray
        As from `cross_entropy`, bit for bit.
    grad_logits : ndarray
        `grad_out`, or a new array laid out like `logits`. Exactly 0 in ignored rows.

    Raises
    ------
    IndexError, ValueError, TypeError, numpy.exceptions.AxisError
        As `cross_entropy`, also when an output overlaps an input or itself, or is read-only; before anything is written.

    Examples
    --------
    >>> import numpy as np
    >>> logits = np.array([[2.0, 0.5, -1.0], [0.0, 3.0, 0.0]])
    >>> loss, grad = cross_entropy_with_grad(logits, [0, 1])
    >>> grad.round(4)
    array([[-0.1072,  0.0876,  0.0196],
           [ 0.0226, -0.0453,  0.0226]])
    """
    options = _call.options(
        weight, ignore_index, reduction, label_smoothing, axis, sample_weight, normalizer, z_loss, empty, focal_gamma,
        loss_dtype,
    )  # fmt: skip
    call = _call.cross_entropy_with_grad(logits, target, options, out, num_threads, grad_output, grad_out)
    call.run()
    return call.loss(), call.gradient()


def cross_entropy_grad_hess(
    logits,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    axis=None,
    sample_weight=None,
    normalizer=None,
    empty="nan",
    focal_gamma=0.0,
    hess_scale=1.0,
    grad_out=None,
    hess_out=None,
    num_threads=None,
):
    """Gradient of the cross-entropy with respect to the logits, and the diagonal of its Hessian, in one pass.

    With p = softmax(x), sample weight s, divided by the divisor of "mean", the Hessian has ::

        ∂²/∂x_c² = hess_scale s a p_c (1 - p_c)

    with a = (1-ε) w_y + ε/C Σ_k w_k for class indices and a = Σ_k w_k q'_k for class probabilities. Of focal loss it is an
    approximation that is never negative: a = w_y (1 - p_y)^focal_gamma.

    Parameters
    ----------
    logits, target, weight, ignore_index, reduction, label_smoothing, axis, sample_weight, normalizer, empty, focal_gamma, \
num_threads
        As for `cross_entropy`. Reductions "none" and "sum" are alike here.
    hess_scale : float
        Multiplies the Hessian alone.
    grad_out, hess_out : ndarray, optional
        Arrays for the results, of the shape and dtype of `logits`. `grad_out` may be `logits` itself.

    Returns
    -------
    grad, hess : ndarray
        `grad_out` and `hess_out`, or new arrays laid out like `logits`. Exactly 0 in ignored rows. Where the target has nearly
        all the probability, its 1 - p keeps all digits; of another class that has it, 1 - p is as exact as p is.

    Raises
    ------
    IndexError, ValueError, TypeError, numpy.exceptions.AxisError
        As `cross_entropy_with_grad`, before anything is written.

    Examples
    --------
    >>> import numpy as np
    >>> grad, hess = cross_entropy_grad_hess(np.array([[2.0, 0.5, -1.0], [0.0, 3.0, 0.0]]), [0, 1], reduction="sum")
    >>> hess.round(4)
    array([[0.1684, 0.1446, 0.0376],
           [0.0432, 0.0824, 0.0432]])
    """
    options = _call.options(
        weight, ignore_index, reduction, label_smoothing, axis, sample_weight, normalizer, empty=empty, focal_gamma=focal_gamma
    )
    call = _call.cross_entropy_grad_hess(logits, target, options, hess_scale, num_threads, grad_out, hess_out)
    call.run()
    return call.gradient(), call.hessian()


def nll_loss(
    log_probs,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    axis=None,
    sample_weight=None,
    normalizer=None,
    empty="nan",
    loss_dtype=None,
    out=None,
    num_threads=None,
):
    """Negative log-likelihood of class indices under given log-probabilities, as ``torch.nn.functional.nll_loss``.

    A row ℓ with class index y costs -w_y ℓ_y.

    Parameters
    ----------
    log_probs : array_like of float32, float64, float16 or bfloat16, shape (C,), (N, C) or (N, C, d1, ..., dk)
        Log-probabilities ℓ, used as they are.
    target, weight, ignore_index, reduction, axis, sample_weight, normalizer, empty, loss_dtype, out, num_threads
        As for `cross_entropy`, class indices only.

    Returns
    -------
    loss : scalar or ndarray
        As from `cross_entropy`.

    Raises
    ------
    IndexError, ValueError, TypeError, numpy.exceptions.AxisError
        As `cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> float(nll_loss(np.log([[0.25, 0.75], [0.5, 0.5]]), [1, 0]).round(4))
    0.4904
    """
    options = _call.options(
        weight, ignore_index, reduction, axis=axis, sample_weight=sample_weight, normalizer=normalizer, empty=empty,
        loss_dtype=loss_dtype, name="log_probs",
    )  # fmt: skip
    call = _call.nll(log_probs, target, options, out, num_threads)
    call.run()
    return call.loss()


def nll_loss_with_grad(
    log_probs,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    axis=None,
    sample_weight=None,
    normalizer=None,
    empty="nan",
    loss_dtype=None,
    out=None,
    num_threads=None,
    grad_output=None,
    grad_out=None,
):
    """Negative log-likelihood and its gradient: -g w_y at the target, divided by the divisor of "mean", and 0 elsewhere.

    Parameters
    ----------
    log_probs, target, weight, ignore_index, reduction, axis, sample_weight, normalizer, empty, loss_dtype, out, num_threads
        As for `nll_loss`.
    grad_output, grad_out
        As for `cross_entropy_with_grad`.

    Returns
    -------
    loss : scalar or ndarray
    grad_log_probs : ndarray
        Of the shape and dtype of `log_probs`.

    Raises
    ------
    IndexError, ValueError, TypeError, numpy.exceptions.AxisError
        As `cross_entropy_with_grad`.

    Examples
    --------
    >>> import numpy as np
    >>> loss, grad = nll_loss_with_grad(np.log([[0.25, 0.75], [0.5, 0.5]]), [1, 0])
    >>> grad
    array([[ 0. , -0.5],
           [-0.5,  0. ]])
    """
    options = _call.options(
        weight, ignore_index, reduction, axis=axis, sample_weight=sample_weight, normalizer=normalizer, empty=empty,
        loss_dtype=loss_dtype, name="log_probs",
    )  # fmt: skip
    call = _call.nll_with_grad(log_probs, target, options, out, num_threads, grad_output, grad_out)
    call.run()
    return call.loss(), call.gradient()


def softmax(x, axis=-1, *, out=None, num_threads=None):
    """Softmax along an axis: exp(x_c) / Σ_k exp(x_k), without overflow.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16 (that of ml_dtypes)
        Any shape, strides and memory order.
    axis : int
        The axis whose entries sum to 1.
    out : ndarray, optional
        Array for the result, of the shape and dtype of `x`, not overlapping it.
    num_threads : int, optional
        At most so many threads. The result does not depend on it.

    Returns
    -------
    ndarray
        Of the shape and dtype of `x`; rows with NaN or +inf, or nothing but -inf, are NaN.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Wrong dtype, output or axis; before anything is written.

    Examples
    --------
    >>> import numpy as np
    >>> softmax(np.array([0.0, np.log(3.0)]))
    array([0.25, 0.75])
    """
    call = _call.softmax(x, axis, out, num_threads)
    call.run()
    return call.gradient()


def log_softmax(x, axis=-1, *, out=None, num_threads=None):
    """Logarithm of softmax along an axis: x_c - log Σ_k exp(x_k), with its digits kept where it is close to 0.

    Parameters, results and errors are those of `softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> float(log_softmax(np.array([40.0, 0.0]))[0])
    -4.248354255291589e-18
    """
    call = _call.log_softmax(x, axis, out, num_threads)
    call.run()
    return call.gradient()


def softmax_backward(grad_output, output, axis=-1, *, out=None, num_threads=None):
    """Gradient of a loss with respect to x, from its gradient g with respect to y = softmax(x): y (g - Σ g y).

    Parameters
    ----------
    grad_output, output : array_like of float32, float64, float16 or bfloat16
        g and y, of the same shape and dtype.
    axis, out, num_threads
        As for `softmax`.

    Returns
    -------
    ndarray
        Of the shape and dtype of `output`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Wrong dtype, shape, output or axis; before anything is written.

    Examples
    --------
    >>> import numpy as np
    >>> softmax_backward(np.array([1.0, 0.0]), np.array([0.25, 0.75]))
    array([ 0.1875, -0.1875])
    """
    call = _call.softmax_backward(grad_output, output, axis, out, num_threads)
    call.run()
    return call.gradient()


def log_softmax_backward(grad_output, output, axis=-1, *, out=None, num_threads=None):
    """Gradient of a loss with respect to x, from its gradient g with respect to ℓ = log_softmax(x): g - exp(ℓ) Σ g.

    Parameters, results and errors are those of `softmax_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> log_softmax_backward(np.array([1.0, 0.0]), np.log([0.25, 0.75]))
    array([ 0.75, -0.75])
    """
    call = _call.log_softmax_backward(grad_output, output, axis, out, num_threads)
    call.run()
    return call.gradient()
