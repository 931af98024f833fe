"""A linear layer and its cross-entropy without the logits: some rows at a time, loss and gradients before the next ones.

The products are NumPy's, whatever BLAS that has; what is between them is `cross_entropy_with_grad`, in place. Memory of its own
is a buffer of `chunk_bytes` for logits, and as much again where `softcap` needs them beside their gradient.
"""

import operator

import numpy as np

from . import _arguments, _dispatch

__all__ = ["linear_cross_entropy", "linear_cross_entropy_with_grad"]

CHUNK_BYTES = 64 << 20
# Classes whose weights' gradient is computed at once, before it is added to that of other rows: BLAS multiplies, but does not
# add, and a temporary of all classes would be as large as the gradient.
CLASSES_AT_ONCE = 8192
GRADIENTS = ("hidden", "linear_weight", "linear_bias")


def linear_cross_entropy(
    hidden,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    sample_weight=None,
    normalizer=None,
    z_loss=0.0,
    empty="nan",
    logit_scale=1.0,
    softcap=None,
    shift=False,
    out=None,
    num_threads=None,
    chunk_bytes=CHUNK_BYTES,
):
    """Cross-entropy of ``hidden @ linear_weight.T + linear_bias``, without these logits as one array.

    Parameters
    ----------
    hidden : array_like of float32 or float64, shape (H,) or (..., H)
        What the linear layer reads.
    linear_weight : array_like, shape (C, H)
        Of the dtype of `hidden`.
    target : array_like
        Class indices of any integer dtype, with the shape of `hidden` without its last axis; rows with `ignore_index` are left
        out of the products. Or class probabilities, with C for the last axis.
    linear_bias : array_like, shape (C,), optional
        Of the dtype of `hidden`.
    weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, z_loss, empty, out, num_threads
        As for `cross_entropy`. `num_threads` is of the loss; the products have those of NumPy's BLAS.
    logit_scale : float
        Multiplies the logits, before `softcap`.
    softcap : float, optional
        Replaces logits x by softcap · tanh(x / softcap), as in Gemma 2.
    shift : bool
        The target of position t of the last axis but one is that of t + 1, as for a causal language model: `hidden` (..., T, H)
        and `target` (..., T) come as they are, the loss has T - 1 positions, and `sample_weight` too.
    chunk_bytes : int
        About as large as the buffer for logits may be. Larger ones make better use of BLAS, up to some hundred rows.

    Returns
    -------
    loss : scalar or ndarray
        As from `cross_entropy`, of the dtype of `hidden`.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `cross_entropy`, before anything is written.

    Examples
    --------
    >>> import numpy as np
    >>> hidden = np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> linear_weight = np.array([[2.0, 0.0], [0.0, 1.5], [-1.0, 0.0]])
    >>> float(linear_cross_entropy(hidden, linear_weight, [0, 1]).round(4))
    0.1324
    """
    problem = _Problem(
        hidden, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer,
        z_loss, empty, logit_scale, softcap, shift, out, num_threads, chunk_bytes,
    )  # fmt: skip
    for rows in problem.chunks():
        problem.loss_of(rows)
    return problem.loss()


def linear_cross_entropy_with_grad(
    hidden,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    sample_weight=None,
    normalizer=None,
    z_loss=0.0,
    empty="nan",
    logit_scale=1.0,
    softcap=None,
    shift=False,
    out=None,
    num_threads=None,
    chunk_bytes=CHUNK_BYTES,
    grad_output=None,
    grad_out=(None, None, None),
    wanted=GRADIENTS,
):
    """The loss of `linear_cross_entropy`, and its gradients with respect to hidden, linear_weight and linear_bias.

    Parameters
    ----------
    hidden, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, \
z_loss, empty, logit_scale, softcap, shift, out, num_threads, chunk_bytes
        As for `linear_cross_entropy`.
    grad_output : float or array_like, optional
        Upstream gradient: a scalar, or for reduction "none" also an array with the shape of the loss. 1 by default.
    grad_out : tuple of three ndarrays or None
        C-contiguous arrays for the gradients, which are overwritten; None: a new one.
    wanted : collection of "hidden", "linear_weight", "linear_bias"
        Only these are computed; None stands for the others.

    Returns
    -------
    loss : scalar or ndarray
    gradients : tuple (grad_hidden, grad_linear_weight, grad_linear_bias or None)
        Of the shapes and dtype of the arguments. Exactly 0 in ignored rows of `hidden`.

    Raises
    ------
    IndexError, ValueError, TypeError
        As `cross_entropy_with_grad`, before anything is written.

    Examples
    --------
    >>> import numpy as np
    >>> hidden = np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> linear_weight = np.array([[2.0, 0.0], [0.0, 1.5], [-1.0, 0.0]])
    >>> loss, (grad_hidden, grad_weight, grad_bias) = linear_cross_entropy_with_grad(hidden, linear_weight, [0, 1])
    >>> grad_hidden.round(4)
    array([[-0.1772,  0.0856],
           [ 0.0226, -0.0679]])
    >>> grad_bias is None
    True
    """
    problem = _Problem(
        hidden, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer,
        z_loss, empty, logit_scale, softcap, shift, out, num_threads, chunk_bytes, grad_output,
    )  # fmt: skip
    gradients = _Gradients(problem, grad_out, wanted)
    for rows in problem.chunks():
        gradients.add(rows, problem.gradient_of(rows))
    return problem.loss(), gradients.finished()


def _number(value, name, positive=False):
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not np.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''}, got {value}")
    return value


class _Problem:
    """The checked arguments, and what is computed of some rows."""

    def __init__(
        self, hidden, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing, sample_weight,
        normalizer, z_loss, empty, logit_scale, softcap, shift, out, num_threads, chunk_bytes, grad_output=None,
    ):  # fmt: skip
        hidden, linear_weight = np.asarray(hidden), np.asarray(linear_weight)
        if hidden.dtype not in (np.float32, np.float64):
            raise TypeError(f"hidden must be float32 or float64, got {hidden.dtype}")
        if linear_weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != linear_weight.shape[1]:
            raise ValueError(
                f"hidden must have shape (..., H) and linear_weight (C, H), got {hidden.shape} and {linear_weight.shape}"
            )
        classes = len(linear_weight)
        self.bias = None if linear_bias is None else np.asarray(linear_bias)
        for name, array in (("linear_weight", linear_weight), ("linear_bias", self.bias)):
            if array is not None and array.dtype != hidden.dtype:
                raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {array.dtype}")
        if self.bias is not None and self.bias.shape != (classes,):
            raise ValueError(f"linear_bias must have shape ({classes},), got {self.bias.shape}")
        self.logit_scale = _number(logit_scale, "logit_scale")
        self.softcap = None if softcap is None else _number(softcap, "softcap", positive=True)
        chunk_bytes = operator.index(chunk_bytes)
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
        given = target = np.asarray(target)
        rows = hidden.shape[:-1]
        self.shape = hidden.shape
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.places = np.arange(len(self.hidden))  # of the rows in hidden
        if shift:
            if hidden.ndim < 2 or target.shape != rows:
                raise ValueError(
                    f"shift=True needs hidden (..., T, H) and target (..., T), got {hidden.shape} and {target.shape}"
                )
            self.places = self.places.reshape(rows)[..., :-1].ravel()
            rows, target = (*rows[:-1], max(0, rows[-1] - 1)), target[..., 1:]
        # Everything that cross_entropy would check, on a stand-in for the logits that takes no memory.
        stand_in = np.broadcast_to(np.zeros((), hidden.dtype), (*rows, classes))
        self.inputs = (hidden, linear_weight, given, self.bias, weight, sample_weight, grad_output)
        self.names = ("hidden", "linear_weight", "target", "linear_bias", "weight", "sample_weight", "grad_output")
        if out is not None:
            shape = rows if reduction == "none" else ()
            _arguments.check_output(out, "out", shape, np.asarray(out).dtype, self.inputs, self.names)
            self.inputs, self.names = (*self.inputs, out), (*self.names, "out")
        self.checked = _arguments.cross_entropy(
            stand_in, target, weight, ignore_index, reduction, label_smoothing, -1, sample_weight, normalizer, z_loss, empty,
            out, num_threads, grad_output,
        )  # fmt: skip
        self.labels, self.samples, self.factor = self.checked.of_rows()
        self.probabilities = target.reshape(-1, classes) if self.labels is None else None
        self.live = np.arange(len(self.places)) if self.labels is None else np.flatnonzero(self.labels >= 0)
        self.weight, self.label_smoothing, self.z_loss, self.num_threads = weight, label_smoothing, z_loss, num_threads
        self.linear_weight = linear_weight
        self.losses = np.zeros(len(self.places))
        most = max(1, chunk_bytes // max(1, classes * hidden.itemsize))
        chunks = -(-len(self.live) // most)
        self.rows_at_once = -(-len(self.live) // max(1, chunks))  # alike, so that none is left with a few rows
        self.buffers = {}

    def chunks(self):
        """Rows that are not ignored, some at a time; Ctrl-C is heard between them."""
        for start in range(0, len(self.live), max(1, self.rows_at_once)):
            yield self.live[start : start + self.rows_at_once]

    def buffer(self, name, rows):
        """(rows, C), the same memory each time"""
        if name not in self.buffers:
            self.buffers[name] = np.empty((self.rows_at_once, len(self.linear_weight)), self.hidden.dtype)
        return self.buffers[name][:rows]

    def hidden_of(self, rows):
        places = self.places[rows]
        if places[-1] - places[0] + 1 == len(places):  # neighbours: no copy
            return self.hidden[places[0] : places[-1] + 1]
        return self.hidden[places]

    def _call(self, rows, want_gradient):
        """(the call for the loss of some rows, their logits as they came, with softcap)"""
        logits = np.matmul(self.hidden_of(rows), self.linear_weight.T, out=self.buffer("logits", len(rows)))
        if self.bias is not None:
            logits += self.bias
        if self.logit_scale != 1:
            logits *= self.logit_scale
        capped, gradient = None, logits
        if self.softcap is not None:
            logits /= self.softcap
            capped = np.tanh(logits, out=logits)
            gradient = self.buffer("gradient", len(rows)) if want_gradient else None
            logits = np.multiply(capped, self.softcap, out=gradient)
        target = self.labels[rows] if self.probabilities is None else self.probabilities[rows]
        factor = self.factor if np.ndim(self.factor) == 0 else self.factor[rows]
        more = (factor, gradient, True) if want_gradient else ()
        call = _arguments.cross_entropy(
            logits, target, self.weight, -100, "none", self.label_smoothing, -1,
            None if self.samples is None else self.samples[rows], None, self.z_loss, "nan", None, self.num_threads, *more,
        )  # fmt: skip
        _dispatch.kernels.run(call)
        self.losses[rows] = call.loss_in_double()
        return call, capped

    def loss_of(self, rows):
        self._call(rows, False)

    def gradient_of(self, rows):
        """Of the products: (rows, C)"""
        call, capped = self._call(rows, True)
        gradient = call.gradient()
        if capped is not None:
            gradient *= 1 - np.square(capped, out=capped)
        if self.logit_scale != 1:
            gradient *= self.logit_scale
        return gradient

    def loss(self):
        return self.checked.loss_of(self.losses)


class _Gradients:
    """What some rows after the others add up to."""

    def __init__(self, problem, grad_out, wanted):
        unknown = set(wanted) - set(GRADIENTS)
        if unknown:
            raise ValueError(f"wanted must be of {GRADIENTS}, got {sorted(unknown)}")
        if len(grad_out) != 3:
            raise ValueError(f"grad_out must have three entries, for {GRADIENTS}, got {len(grad_out)}")
        classes, width = problem.linear_weight.shape
        self.problem = problem
        self.arrays = {}
        inputs, names = problem.inputs, problem.names
        for name, form, given in zip(GRADIENTS, (problem.shape, (classes, width), (classes,)), grad_out, strict=True):
            if given is not None:
                title = f"grad_out[{GRADIENTS.index(name)}]"
                _arguments.check_output(given, title, form, problem.hidden.dtype, inputs, names)
                if not given.flags.c_contiguous:
                    raise ValueError(f"{title} must be C-contiguous")
                inputs, names = (*inputs, given), (*names, title)
            if name in wanted and not (name == "linear_bias" and problem.bias is None):
                self.arrays[name] = np.empty(form, problem.hidden.dtype) if given is None else given
        for array in self.arrays.values():
            array.fill(0)
        self.bias = np.zeros(classes)

    def add(self, rows, gradient):
        """gradient (rows, C): of the logits"""
        problem, hidden = self.problem, self.problem.hidden_of(rows)
        if "hidden" in self.arrays:
            flat = self.arrays["hidden"].reshape(problem.hidden.shape)
            flat[problem.places[rows]] = gradient @ problem.linear_weight
        if "linear_weight" in self.arrays:
            total = self.arrays["linear_weight"]
            for first in range(0, len(total), CLASSES_AT_ONCE):
                some = slice(first, first + CLASSES_AT_ONCE)
                total[some] += gradient[:, some].T @ hidden
        if "linear_bias" in self.arrays:
            self.bias += gradient.sum(axis=0, dtype=np.float64)

    def finished(self):
        if "linear_bias" in self.arrays:
            self.arrays["linear_bias"][...] = self.bias
        return tuple(self.arrays.get(name) for name in GRADIENTS)
