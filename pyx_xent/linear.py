"""A linear layer and its cross-entropy without the logits: some rows at a time, loss and gradients before the next ones.

Problem         the checked arguments, and what is done between the products: bias, softcap, the loss and its gradient in place
Gradients       what the rows add up to
Products        the three matrix products by NumPy's BLAS; pyx_xent.torch has PyTorch's in their place

Memory of its own is a buffer of `chunk_bytes` for logits, and PART_BYTES a thread beside it; for half types the float32 sums
of the gradient with respect to linear_weight, too. Like the gradients it comes from _memory: the next call uses it again.
"""

import _thread
import math
import operator

import numpy as np

from . import _call, _gemm, _memory, _threads

__all__ = ["linear_cross_entropy", "linear_cross_entropy_with_grad"]

CHUNK_BYTES = 72 << 20
NANOSECONDS_OF_A_LOGIT = 0.005  # between two products, over what a thread of Python costs more than one of OpenMP's
WORTHWHILE_ROWS = 256  # with fewer of them at once, BLAS becomes slow
# BLAS multiplies, but NumPy's matmul does not add to what is there: so much of a product is made, and added, at once.
PART_BYTES = 6 << 20
# Rows of as many logits as a near cache holds go through bias, softcap and loss together.
LOGITS_AT_ONCE = 1 << 18
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
    focal_gamma=0.0,
    loss_dtype=None,
    logit_scale=1.0,
    softcap=None,
    shift=False,
    out=None,
    num_threads=None,
    chunk_bytes=None,
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
    weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, z_loss, empty, focal_gamma, loss_dtype, out, \
num_threads
        As for `cross_entropy`. `num_threads` is of the loss; the products have those of NumPy's BLAS.
    logit_scale : float
        Multiplies the logits, before `softcap`.
    softcap : float, optional
        Replaces logits x by softcap · tanh(x / softcap), as in Gemma 2.
    shift : bool
        The target of position t of the last axis but one is that of t + 1, as for a causal language model: `hidden` (..., T, H)
        and `target` (..., T) come as they are, the loss has T - 1 positions, and `sample_weight` too.
    chunk_bytes : int, optional
        The most that the buffer for logits may take: at least one row. By default 72 MiB, or what 256 rows take, if that is
        more: with fewer of them BLAS is slow.

    Returns
    -------
    loss : scalar or ndarray
        As from `cross_entropy`, of the dtype of `hidden` or `loss_dtype`.

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
    options = _call.options(
        weight, ignore_index, reduction, label_smoothing, -1, sample_weight, normalizer, z_loss, empty, focal_gamma, loss_dtype
    )
    problem = Problem(
        hidden, linear_weight, target, options, linear_bias=linear_bias, logit_scale=logit_scale, softcap=softcap, shift=shift,
        out=out, num_threads=num_threads, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    return run(problem).loss()


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
    focal_gamma=0.0,
    loss_dtype=None,
    logit_scale=1.0,
    softcap=None,
    shift=False,
    out=None,
    num_threads=None,
    chunk_bytes=None,
    grad_output=None,
    grad_out=(None, None, None),
    wanted=GRADIENTS,
):
    """The loss of `linear_cross_entropy`, and its gradients with respect to hidden, linear_weight and linear_bias.

    Parameters
    ----------
    hidden, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing, sample_weight, normalizer, \
z_loss, empty, focal_gamma, loss_dtype, logit_scale, softcap, shift, out, num_threads, chunk_bytes
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
    options = _call.options(
        weight, ignore_index, reduction, label_smoothing, -1, sample_weight, normalizer, z_loss, empty, focal_gamma, loss_dtype
    )
    problem = Problem(
        hidden, linear_weight, target, options, linear_bias=linear_bias, logit_scale=logit_scale, softcap=softcap, shift=shift,
        out=out, num_threads=num_threads, chunk_bytes=chunk_bytes, grad_output=grad_output,
    )  # fmt: skip
    call, gradients = run_with_gradients(problem, grad_out, wanted)
    return call.loss(), gradients


@np.errstate(all="ignore")
def run(problem):
    """-> the call that has the losses"""
    for rows in problem.chunks:
        problem.run(rows, want_gradient=False)
    return problem.call()


@np.errstate(all="ignore")
def run_with_gradients(problem, grad_out, wanted, dtype=None):
    """-> (the call that has the losses, the gradients, of the dtype of hidden if no other is named)"""
    gradients = Gradients(problem, grad_out, wanted, problem.hidden.dtype if dtype is None else dtype)
    for rows in problem.chunks:
        gradients.add(rows, *problem.run(rows, want_gradient=True))
    return problem.call(), gradients.finished()


class Products:
    """The products of some rows with linear_weight by NumPy's BLAS, in float32 or float64; half types are converted for it.

    That BLAS has threads of its own, and OpenMP's wait for work in a loop which takes the cores from them: what is done between
    products goes to threads of Python's instead. With `threads` > 1 the products do, too, each for some of the classes: for a
    BLAS that has been told to use one thread a product, so that none of its own waits in a loop for more, either.
    """

    on_python_threads = True

    def __init__(self, linear_weight, threads=1):
        self.linear_weight, self.threads = linear_weight, threads
        self.dtype = computed_dtype(linear_weight.dtype)
        self.buffer_dtype = self.dtype  # of logits and their gradient
        classes, width = linear_weight.shape
        self.size = max(1, PART_BYTES // max(1, width * self.dtype.itemsize))
        self.everything = slice(0, classes)
        self.shares = list(split(self.everything, max(1, -(-classes // threads))))  # of the classes, one a thread
        self._converts = linear_weight.dtype != self.dtype
        self._part = [None] * len(self.shares)

    def parts(self, classes):
        """Some classes in parts of PART_BYTES of linear_weight, or of the gradient with respect to it."""
        return split(classes, self.size)

    def converted(self, classes):
        """Some classes in the parts that are converted at once."""
        return self.parts(classes) if self._converts else [classes]

    def wide(self, array):
        """The array in the dtype that is computed in."""
        return array.astype(self.dtype, copy=False)

    def store(self, values, out, places):
        """out[places] = values, rounded"""
        out[places] = values

    def logits(self, hidden, out):
        """out (rows, C) = hidden @ linear_weight.T"""
        hidden = self.wide(hidden)

        def multiply(some):
            np.matmul(hidden, self.wide(self.linear_weight[some]).T, out=out[:, some])

        # A product of one thread is faster in such parts; one of all the BLAS's threads for all classes at once.
        in_parts = self.converted if self.threads == 1 else self.parts
        _on_threads(multiply, [some for share in self.shares for some in in_parts(share)], self.threads)

    def grad_hidden(self, gradient):
        """gradient @ linear_weight, (rows, H)"""
        found = [0] * len(self.shares)

        def multiply(k):
            found[k] = sum(gradient[:, some] @ self.wide(self.linear_weight[some]) for some in self.converted(self.shares[k]))

        _on_threads(multiply, range(len(self.shares)), self.threads)
        return sum(found)

    def add_grad_weight(self, gradient, hidden, total, first):
        """total (C, H) += gradient.T @ hidden; = for the first rows"""
        hidden = self.wide(hidden)

        def multiply(k):
            share = self.shares[k]
            if _gemm.add_product(gradient[:, share], hidden, total[share], first):
                return
            if first and total.dtype == self.dtype:
                np.matmul(gradient[:, share].T, hidden, out=total[share])
                return
            for some in self.parts(share):
                if self._part[k] is None:
                    self._part[k] = _memory.empty((some.stop - some.start, hidden.shape[1]), self.dtype)
                part = np.matmul(gradient[:, some].T, hidden, out=self._part[k][: some.stop - some.start])
                if first:
                    self.store(part, total, some)
                else:
                    total[some] += part

        _on_threads(multiply, range(len(self.shares)), self.threads)

    def sums_of_classes(self, gradient):
        """(C,)"""
        return np.ones(len(gradient), gradient.dtype) @ gradient


def split(some, size):
    """A slice as slices of `size`; the last may be shorter."""
    return (slice(first, min(first + size, some.stop)) for first in range(some.start, max(some.start + 1, some.stop), size))


def computed_dtype(dtype):
    """The dtype that numbers of `dtype` are computed in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _finite(value, name, dtype):
    """A number that is finite in the dtype that computes with it."""
    value = _call.as_double(value, name)
    if not np.isfinite(_rounded(value, dtype)):
        raise ValueError(f"{name} must be finite in {dtype}, got {value}")
    return value


def checked_options(dtype, logit_scale, softcap, chunk_bytes):
    """The options that the loss of logits does not have, converted; dtype: that of the products."""
    logit_scale = _finite(logit_scale, "logit_scale", dtype)
    if softcap is not None:
        softcap = _finite(softcap, "softcap", dtype)
        if not _rounded(softcap, dtype) > 0:
            raise ValueError(f"softcap must be positive in {dtype}, got {softcap}")
    if chunk_bytes is not None:
        chunk_bytes = int(operator.index(chunk_bytes))
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    return logit_scale, softcap, chunk_bytes


@np.errstate(all="ignore")
def _rounded(value, dtype):
    return dtype.type(value)


def _neighbours(places):
    """Ascending places, as a slice if they are neighbours: what is there need not be copied then."""
    return slice(places[0], places[-1] + 1) if places[-1] - places[0] + 1 == len(places) else places


def _on_threads(function, parts, threads):
    """function(part) for each part, on up to `threads` threads. This one waits only for what another has begun.

    A thread for which there is no memory may be started and yet run nothing; threading.Thread.start() would wait for it for
    ever, and so would an executor.
    """
    errors = [None] * len(parts)
    waiting = list(range(len(parts)))
    locks = [_thread.allocate_lock() for _ in range(min(threads, len(parts)) - 1)]

    def work():
        while True:
            try:
                k = waiting.pop()
            except IndexError:
                return
            try:
                function(parts[k])
            except BaseException as error:
                errors[k] = error
                waiting.clear()

    def help_out(lock):
        with lock:
            work()

    try:
        for lock in locks:
            _thread.start_new_thread(help_out, (lock,))
    except (RuntimeError, MemoryError):
        pass  # without it
    try:
        work()
    finally:
        waiting.clear()  # a helper that begins only now finds nothing to do
        for lock in locks:
            with lock:  # held by a helper as long as it works
                pass
    for error in errors:
        if error is not None:
            raise error


class Problem:
    """The checked arguments, and what is done with some rows between the products."""

    def __init__(
        self, hidden, linear_weight, target, options, *, linear_bias=None, logit_scale=1.0, softcap=None, shift=False, out=None,
        num_threads=None, chunk_bytes=None, grad_output=None, products=Products,
    ):  # fmt: skip
        # First what runs code of the caller's; afterwards arrays are looked at.
        hidden = _call.floating(hidden, "hidden")
        linear_weight = _call.floating(linear_weight, "linear_weight")
        bias = None if linear_bias is None else _call.floating(linear_bias, "linear_bias")
        given = target = _call.as_array(target, "target")
        grad_output = None if grad_output is None else _call.as_real(grad_output, "grad_output")
        dtype = computed_dtype(hidden.dtype)
        self.logit_scale, self.softcap, chunk_bytes = checked_options(dtype, logit_scale, softcap, chunk_bytes)
        num_threads = _threads.checked(num_threads)
        shift = bool(shift)
        loss_memory = None if out is None else _call.as_output(out, "out")

        if linear_weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != linear_weight.shape[1]:
            raise ValueError(
                f"hidden must have shape (..., H) and linear_weight (C, H), got {hidden.shape} and {linear_weight.shape}"
            )
        classes = len(linear_weight)
        for name, array in (("linear_weight", linear_weight), ("linear_bias", bias)):
            if array is not None and array.dtype != hidden.dtype:
                raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {array.dtype}")
        if bias is not None and bias.shape != (classes,):
            raise ValueError(f"linear_bias must have shape ({classes},), got {bias.shape}")
        rows = hidden.shape[:-1]
        self.shape = hidden.shape
        self.hidden = hidden.reshape(math.prod(rows), hidden.shape[-1])
        self.places = np.arange(len(self.hidden))  # of the rows in hidden
        if shift:
            if hidden.ndim < 2 or target.shape != rows:
                raise ValueError(
                    f"shift=True needs hidden (..., T, H) and target (..., T), got {hidden.shape} and {target.shape}"
                )
            self.places = self.places.reshape(rows)[..., :-1].ravel()
            rows, target = (*rows[:-1], max(0, rows[-1] - 1)), target[..., 1:]
        self.checked = _call.rows_of_linear(rows, classes, hidden.dtype, target, options, grad_output, shifted=shift)
        self.names = ("hidden", "linear_weight", "target", "linear_bias", "weight", "sample_weight", "grad_output")
        self.inputs = (hidden, linear_weight, given, bias, options.weight, options.sample_weight, grad_output)
        if out is not None:
            self.checked.write_loss_to(loss_memory, out, self.names, self.inputs)
            self.inputs, self.names = (*self.inputs, loss_memory), (*self.names, "out")
        self.labels, self.samples, self.factor = self.checked.labels(), self.checked.sample_weights(), self.checked.grad_scale()
        self.class_weights = self.checked.class_weights()
        self.probabilities = target.reshape(len(self.places), classes) if self.labels is None else None
        self.options = options
        self.losses = np.zeros(len(self.places))
        live = np.arange(len(self.places))
        if self.labels is not None:
            live = np.flatnonzero(self.labels >= 0)
        elif self.samples is not None:
            live = np.flatnonzero(self.samples)  # SPEC S28
        self.products = products(linear_weight)
        self.bias = None if bias is None else self.products.wide(bias) * self.products.dtype.type(self.logit_scale)
        row_bytes = max(1, classes * self.products.buffer_dtype.itemsize)
        most = max(WORTHWHILE_ROWS, CHUNK_BYTES // row_bytes) if chunk_bytes is None else max(1, chunk_bytes // row_bytes)
        count = -(-len(live) // most)
        size = -(-len(live) // max(1, count))  # alike, so that no chunk is left with a few rows
        self.chunks = [live[first : first + size] for first in range(0, len(live), max(1, size))]
        self.buffer = _memory.empty((size, classes), self.products.buffer_dtype)
        if self.products.on_python_threads:
            self.parts, self.threads_of_part = _threads.limited(num_threads, self.buffer.size * NANOSECONDS_OF_A_LOGIT), 1
        else:
            self.parts, self.threads_of_part = 1, num_threads

    def hidden_of(self, rows):
        hidden = self.hidden[_neighbours(self.places[rows])]
        return hidden if self.logit_scale == 1 else self.products.wide(hidden) * self.products.dtype.type(self.logit_scale)

    def run(self, rows, want_gradient):
        """Compute the losses of some rows; -> their hidden, as multiplied, and the gradient of the product, (rows, C)."""
        hidden, logits = self.hidden_of(rows), self.buffer[: len(rows)]
        self.products.logits(hidden, logits)
        parts = list(split(slice(0, len(rows)), -(-len(rows) // self.parts)))

        def finish(part):
            self._finish(rows[part], logits[part], want_gradient)

        _on_threads(finish, parts, self.parts)
        return hidden, logits

    @np.errstate(all="ignore")
    def _finish(self, rows, products, want_gradient):
        """From products with linear_weight to losses and, in place, the gradient."""
        if self.bias is None and self.softcap is None:
            self._losses(rows, products, want_gradient)
            return
        size = max(1, LOGITS_AT_ONCE // products.shape[1])
        for some in split(slice(0, len(rows)), size):
            logits = self.products.wide(products[some])
            if self.bias is not None:
                logits += self.bias
            if self.softcap is not None:
                logits /= self.softcap
                np.tanh(logits, out=logits)
                slope = 1 - np.square(logits)
                logits *= self.softcap
            self._losses(rows[some], logits, want_gradient)
            if want_gradient:
                if self.softcap is not None:
                    logits *= slope
                self.products.store(logits, products, some)

    def _losses(self, rows, logits, want_gradient):
        target = self.labels[rows] if self.probabilities is None else self.probabilities[_neighbours(rows)]
        options = self.options.of_rows(self.class_weights, None if self.samples is None else self.samples[rows])
        if want_gradient:
            factor = self.factor if np.ndim(self.factor) == 0 else self.factor[rows]
            call = _call.cross_entropy_with_grad(
                logits, target, options, num_threads=self.threads_of_part, grad_output=factor, grad_out=logits
            )
        else:
            call = _call.cross_entropy(logits, target, options, num_threads=self.threads_of_part)
        call.run()
        if want_gradient:
            call.gradient()
        self.losses[rows] = call.loss_in_double()

    def call(self):
        return self.checked.reduce(self.losses)


class Gradients:
    """What some rows after the others add up to."""

    def __init__(self, problem, grad_out, wanted, dtype):
        unknown = set(wanted) - set(GRADIENTS)
        if unknown:
            raise ValueError(f"wanted must be of {GRADIENTS}, got {sorted(unknown)}")
        if len(grad_out) != 3:
            raise ValueError(f"grad_out must have three entries, for {GRADIENTS}, got {len(grad_out)}")
        linear_weight = problem.inputs[1]
        self.problem, self.products = problem, problem.products
        self.arrays = {}
        inputs, names = problem.inputs, problem.names
        shapes = (problem.shape, linear_weight.shape, linear_weight.shape[:1])
        for k, (name, shape, given) in enumerate(zip(GRADIENTS, shapes, grad_out, strict=True)):
            if given is not None:
                title = f"grad_out[{k}]"
                memory = _call.checked_output(given, title, shape, dtype, names, inputs)
                if not memory.flags.c_contiguous:
                    raise ValueError(f"{title} must be C-contiguous")
                inputs, names = (*inputs, memory), (*names, title)
            if name in wanted and not (name == "linear_bias" and problem.bias is None):
                self.arrays[name] = _memory.empty(shape, dtype) if given is None else given
        if "hidden" in self.arrays and sum(map(len, problem.chunks)) < len(problem.hidden):
            self.arrays["hidden"].fill(0)
        self.weight = self.arrays.get("linear_weight")
        if self.weight is not None:
            if not problem.chunks:
                self.weight.fill(0)
            elif len(problem.chunks) > 1 and dtype != self.products.dtype:
                self.weight = _memory.empty(self.weight.shape, self.products.dtype)
        self.bias = np.zeros(len(linear_weight))

    def add(self, rows, hidden, gradient):
        """hidden (rows, H) and gradient (rows, C) of the products"""
        problem, products = self.problem, self.products
        if "hidden" in self.arrays:
            found = products.grad_hidden(gradient)
            if problem.logit_scale != 1:
                found *= problem.logit_scale
            products.store(found, self.arrays["hidden"].reshape(problem.hidden.shape), _neighbours(problem.places[rows]))
        if self.weight is not None:
            products.add_grad_weight(gradient, hidden, self.weight, first=rows is problem.chunks[0])
        if "linear_bias" in self.arrays:
            self.bias += products.sums_of_classes(gradient)

    def finished(self):
        if self.weight is not self.arrays.get("linear_weight"):
            self.products.store(self.weight, self.arrays["linear_weight"], slice(None))
        if "linear_bias" in self.arrays:
            self.products.store(
                self.products.wide(self.bias * self.problem.logit_scale), self.arrays["linear_bias"], slice(None)
            )
        return tuple(self.arrays.get(name) for name in GRADIENTS)
