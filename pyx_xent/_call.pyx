# cython: wraparound=True
"""Turns what callers pass into a Problem that a kernel can trust, or raises before anything is written. One entry an operation.

Every index, shape, stride, alignment, overlap and thread count is settled here: the kernels check nothing. An entry has three
parts. It converts its arguments: this alone runs code of the caller's. It checks them, copies labels, and allocates. It takes
all pointers at once, and plans how to compute. Labels are copied once, the copy is checked, and only the copy is used, so another
thread that changes them meanwhile does no harm.

_call_checks.pxi   one argument each, and the Options of a loss
_call_labels.pxi   labels: shape, copy, check, which rows count
_call_memory.pxi   strides, overlap, outputs, pointers, and results in their dtype
_plan.pxi          which kernel, how many rows together, threads, scratch
"""

import operator

import numpy as np

from . import _memory, _threads

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from pyx_xent._problem cimport (
    BFLOAT16,
    CROSS_ENTROPY,
    DOUBLE_LANES,
    FEW_CLASSES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FLOAT_LANES,
    LOG_SOFTMAX,
    LOG_SOFTMAX_BACKWARD,
    NLL,
    ROWS_BYTES,
    SEGMENT,
    SEGMENT_BYTES,
    SHORT_CLASSES,
    SOFTMAX,
    SOFTMAX_BACKWARD,
    Environment,
    Operation,
    Options as KernelOptions,
    Plan,
    Problem,
    Storage,
    Strided,
    enter_environment,
    leave_environment,
)

cdef extern from "numpy/arrayobject.h":
    object PyArray_Scalar(void* data, cnp.dtype dtype, void* base)

cnp.import_array()

ctypedef int (*Kernels)(const Problem*) except -1

cdef Kernels float_kernels = NULL, double_kernels = NULL
cdef double nanoseconds_of_number = 1


def use_kernels(in_float, in_double, str isa):
    """What Call.run computes with from now on: `run` of a kernel module of each precision, and their instruction set."""
    global float_kernels, double_kernels, nanoseconds_of_number
    float_kernels = <Kernels>PyCapsule_GetPointer(in_float, "pyx_xent.run_problem")
    double_kernels = <Kernels>PyCapsule_GetPointer(in_double, "pyx_xent.run_problem")
    nanoseconds_of_number = NANOSECONDS[isa]


include "_call_checks.pxi"
include "_call_labels.pxi"
include "_call_memory.pxi"
include "_plan.pxi"


@cython.final
@cython.freelist(4)
@cython.no_gc                                     # arrays refer to no Call
cdef class Call:
    """A checked call: `run()` it, then take `loss()` and `gradient()`."""

    def run(self):
        """Compute it."""
        if self.problem.is_double:
            double_kernels(&self.problem)
        else:
            float_kernels(&self.problem)

    def loss_in_double(self):
        """The reduced loss before it is rounded to its dtype: a float, or for reduction "none" a float64 array."""
        return self.losses.reshape(loss_shape(self)) if self.reduction == NONE else reduced(self)

    def loss(self):
        """The reduced loss: a NumPy scalar, an array for reduction "none", or `out`."""
        cdef Environment environment = enter_environment()
        try:
            if self.reduction != NONE:
                result = rounded_scalar(reduced(self), self.loss_dtype)
            else:
                result = rounded(self.losses, self.loss_dtype)
                if cnp.PyArray_NDIM(self.logits) != 2:
                    result = result.reshape(loss_shape(self))[()]
        finally:
            leave_environment(environment, NULL)
        if self.out is None:
            return result
        self.out[...] = result
        return self.loss_result

    def gradient(self):
        """The array that the kernels have filled: a gradient, or the result of softmax and log_softmax."""
        return copied_back(self.computed, self.grad_out, self.gradient_result)

    def hessian(self):
        """The array that the kernels have filled with the diagonal of the Hessian."""
        return copied_back(self.computed_hessian, self.hess_out, self.hessian_result)

    def row_state(self):
        """The (2, rows) float64 array that cross_entropy_with_state has filled, for cross_entropy_gradient."""
        return self.state

    def backward(self, grad_output):
        """A call for the gradient, after this one has computed the loss; of cross_entropy, with the state that it has kept.

        It is another object, so that threads may call this at once.
        """
        cdef Call call = Call.__new__(Call)
        if grad_output is not None:
            call.grad_output = as_real(grad_output, "grad_output")
        call.problem = self.problem
        call.problem.have_state = True
        call.problem.loss = NULL
        call.logits, call.read_logits, call.read_soft = self.logits, self.read_logits, self.read_soft
        call.of_rows, call.class_weight, call.row_weight = self.of_rows, self.class_weight, self.row_weight
        call.state = self.state
        call.axis, call.rows, call.classes, call.reduction = self.axis, self.rows, self.classes, self.reduction
        call.divisor = self.divisor
        set_grad_output(call)
        set_gradient_of_loss(call)
        return finished(call)

    # For linear.py, which computes the losses of a call from rows_of_linear

    def labels(self):
        """(rows,) int64: the class indices, -1 where a row is inert; None with class probabilities."""
        return None if self.problem.target == NULL else self.of_rows[: self.rows]

    def class_weights(self):
        """(C,) float32 or float64, a copy that nobody else has, or None."""
        return self.class_weight

    def sample_weights(self):
        """(rows,) float64, or None."""
        return None if self.row_weight is None else self.row_weight.reshape(-1)

    def grad_scale(self):
        """The upstream gradient over the divisor of the mean: a float, or an array, (rows,) float64."""
        scale = self.problem.options.grad_scale
        return scale if self.row_grad_output is None else self.row_grad_output.reshape(-1) * scale

    def write_loss_to(self, cnp.ndarray out, result, tuple names, tuple inputs):
        """out: the memory of `result`, an array of NumPy's own class; it must not overlap the inputs, likewise, or None."""
        check_output(out, "out", loss_shape(self) if self.reduction == NONE else (), self.loss_dtype, names, inputs, False)
        self.out, self.loss_result = out, result

    def reduce(self, cnp.ndarray losses):
        """The loss, as from loss(), of the losses of the rows: (rows,) float64."""
        self.losses = losses
        self.problem.loss = <double*>doubles(losses, self.rows)
        return self


cdef double reduced(Call call) noexcept:
    # The sum or mean, not rounded.
    cdef Environment environment = enter_environment()
    cdef double total = call.empty_value
    if not call.nothing_to_average:
        total = sum_in_order(call.problem.loss, call.rows)
        if call.reduction == MEAN:
            total /= call.divisor
    leave_environment(environment, &total)
    return total


cdef tuple loss_shape(Call call):
    return shape_without((<object>call.logits).shape, call.axis)


# The steps of a loss

cdef Call new_loss(Operation operation, object logits, object target, Options o, object num_threads):
    # Converts what every loss has.
    cdef Call call = Call.__new__(Call)
    call.problem.operation = operation
    call.logits = as_array(logits, o.name)
    call.target = as_array(target, "target")
    if storage_of(call.logits) < 0:
        swapped = storage_of(call.target) >= 0 and call.logits.dtype.kind in "iu"
        raise_not_floating(call.logits, o.name, ": was target given first?" if swapped else "")
    call.num_threads = num_threads if num_threads is None else _threads.checked(num_threads)
    return call


cdef int write_loss_to(Call call, object out) except -1:
    if out is not None:
        call.out = as_output(out, "out")
        call.loss_result = out
    return 0


cdef int want_gradient(Call call, object grad_output, object grad_out) except -1:
    if grad_output is not None:
        call.grad_output = as_real(grad_output, "grad_output")
    if grad_out is not None:
        call.grad_out = as_output(grad_out, "grad_out")
        call.gradient_result = grad_out
    return 0


cdef int check_loss(Call call, Options o) except -1:
    # All arguments have been converted. Checks them and sets what does not change any more: memory of our own, and numbers.
    cdef Problem* p = &call.problem
    cdef cnp.ndarray x = call.logits, y = call.target
    cdef object loss_dtype = native_dtype(x)
    cdef bint soft = cnp.PyArray_SAMESHAPE(x, y) and p.operation != NLL
    cdef int64_t* label = NULL
    cdef Py_ssize_t live
    p.options = o.numbers
    call.reduction = o.reduction
    call.axis = class_axis(o.axis, cnp.PyArray_NDIM(x), o.name)
    call.classes = cnp.PyArray_DIM(x, call.axis)
    call.rows = rows_of(x, call.axis)
    if o.weight is not None:
        check_weight(o.weight, call.classes)
        call.weight = o.weight
    if soft:
        loss_dtype = dtype_with_probabilities(loss_dtype, y, o)
        if o.numbers.focal_gamma != 0:
            raise ValueError(f"focal_gamma needs class indices for target, got class probabilities {(<object>y).shape}")
    else:
        check_target_shape(y, x, call.axis, o.axis is not None, o.if_last)
    p.is_double = loss_dtype is float64
    call.loss_dtype = loss_dtype if o.loss_dtype is None else checked_loss_dtype(o.loss_dtype, loss_dtype)
    if o.sample_weight is not None:
        set_sample_weight(call, o.sample_weight, soft)
    set_grad_output(call)
    if soft:
        live = call.rows if call.classes else 0
    else:
        call.of_rows = new_array(call.rows if call.reduction == NONE else 2 * call.rows, cnp.NPY_INT64)
        label = <int64_t*>cnp.PyArray_DATA(call.of_rows)
        live = set_labels(call, label, o.ignore_index)
    if call.row_weight is not None and live:
        live = set_unweighted(call, label)
    if call.out is not None or call.grad_out is not None or call.hess_out is not None:
        check_outputs(call)
    p.options.weight_sum = call.classes
    if call.weight is not None:
        set_class_weight(call)
    if call.reduction == MEAN:
        set_divisor(call, o, label, live)
    p.target = label
    return 0


cdef str hint_for(cnp.ndarray target, Options o):
    # of integers with the shape of the logits
    if cnp.PyArray_NDIM(target) == 1:
        return f": {o.name} of shape (C,) are one row of C classes. Binary logits x are rows of two, {o.if_binary}"
    return ": one-hot labels are of a floating dtype, or indices, target.argmax(1)"


cdef object dtype_with_probabilities(object dtype, cnp.ndarray target, Options o):
    # SPEC S11, S21
    cdef cnp.ndarray array
    if target.dtype.kind != "f" and storage_of(target) != BFLOAT16:
        raise TypeError(
            f"Expected floating point type for target with class probabilities, got {target.dtype.name}{hint_for(target, o)}"
        )
    if o.ignore_index >= 0:
        raise ValueError("ignore_index is not supported for floating point target")
    for array in (target,) if o.weight is None or o.weight.dtype.kind in "iub" else (target, o.weight):
        if storage_of(array) < 0:
            raise TypeError(f"{o.name}, target and weight must promote to float32 or float64, got {array.dtype}")
        dtype = promoted(dtype, native_dtype(array))
    return dtype


cdef int set_sample_weight(Call call, cnp.ndarray weight, bint soft) except -1:
    call.sample_weight = weight
    if not is_one_per_row(weight, call.logits, call.axis) and (soft or not cnp.PyArray_SAMESHAPE(weight, call.target)):
        raise ValueError(f"sample_weight must have shape {loss_shape(call)}, got {(<object>weight).shape}")
    call.row_weight = as_doubles(weight)
    return 0


cdef int set_grad_output(Call call) except -1:
    # The divisor of the mean is not in grad_scale yet.
    cdef cnp.ndarray array = call.grad_output
    call.problem.options.grad_output = NULL
    call.problem.options.grad_scale = 1.0
    if array is None:
        return 0
    if cnp.PyArray_NDIM(array) == 0:
        array = as_doubles(array)
        call.problem.options.grad_scale = doubles(array, 1)[0]
    elif call.reduction != NONE:
        raise ValueError(f"grad_output must be a scalar unless reduction='none', got shape {(<object>array).shape}")
    elif not is_one_per_row(array, call.logits, call.axis):
        raise ValueError(f"grad_output must have shape {loss_shape(call)}, got {(<object>array).shape}")
    else:
        call.row_grad_output = as_doubles(array)
    return 0


cdef tuple INPUTS = ("logits", "target", "weight", "sample_weight", "grad_output", "out", "grad_out")
cdef tuple NLL_INPUTS = ("log_probs", *INPUTS[1:])


cdef int check_outputs(Call call) except -1:
    cdef tuple names = NLL_INPUTS if call.problem.operation == NLL else INPUTS
    cdef tuple inputs = (call.logits, call.target, call.weight, call.sample_weight, call.grad_output)
    cdef tuple shape = (<object>call.logits).shape
    cdef object dtype = native_dtype(call.logits)
    if call.out is not None:
        check_output(call.out, "out", loss_shape(call) if call.reduction == NONE else (), call.loss_dtype, names, inputs, False)
    inputs += (call.out,)
    if call.grad_out is not None:
        check_output(call.grad_out, "grad_out", shape, dtype, names, inputs, True)
    inputs += (call.grad_out,)
    if call.hess_out is not None:
        check_output(call.hess_out, "hess_out", shape, dtype, names, inputs, False)
    return 0


cdef int set_class_weight(Call call) except -1:
    cdef Environment environment = enter_environment()
    try:
        call.class_weight = np.array(call.weight, float64 if call.problem.is_double else float32, order="C")
        check_weight(call.class_weight, call.classes)     # again: now nobody else has it
        call.problem.options.weight_sum = np.sum(call.class_weight, dtype=float64)
    finally:
        leave_environment(environment, NULL)
    call.problem.options.weight = cnp.PyArray_DATA(call.class_weight)
    return 0


cdef int set_divisor(
    Call call, Options o,
    int64_t* label,                               # in/out  of each row, -1 where inert; NULL: class probabilities
    Py_ssize_t live,                              # in   rows that are not inert
) except -1:
    # Of the mean, SPEC S15, S16, S23, S24, S26.
    cdef bint nothing = live == 0 and not o.has_normalizer
    call.divisor = o.normalizer if o.has_normalizer else counted(call, label, live)
    if o.empty != EMPTY_NAN and not (nothing or o.has_normalizer or label == NULL or call.class_weight is None):
        nothing = every_class_weighs_nothing(&call.problem, label, call.rows)
        if nothing:                               # D is 0, and the gradient shall not be 0/0
            memset(label, 0xff, call.rows * sizeof(int64_t))
    if nothing and o.empty == EMPTY_RAISE:
        raise ValueError("no row to average: there is none, or each has ignore_index for a target or a weight of 0")
    call.nothing_to_average = nothing
    call.empty_value = 0.0 if o.empty == EMPTY_ZERO else NAN
    return 0


cdef int set_losses(Call call) except -1:
    # Memory for the loss of each row: behind the labels, or an array of its own.
    cdef Problem* p = &call.problem
    cdef cnp.ndarray losses
    if p.target != NULL and call.reduction != NONE:
        p.loss = <double*>(p.target + call.rows)
    else:
        losses = new_array(call.rows, cnp.NPY_FLOAT64)
        p.loss = <double*>cnp.PyArray_DATA(losses)
        call.losses = losses
    if call.classes == 0:                         # then no kernel runs
        memset(p.loss, 0, call.rows * sizeof(double))
    return 0


cdef int set_gradient_of_loss(Call call) except -1:
    divide_by_divisor(call)
    return set_gradient(call)


cdef int divide_by_divisor(Call call) except -1:
    cdef Environment environment
    if call.reduction == MEAN:
        environment = enter_environment()
        call.problem.options.grad_scale /= call.divisor
        leave_environment(environment, NULL)
    return 0


cdef int set_read(Call call, object other) except -1:
    # in   other         class probabilities, grad_output of a softmax, or None
    call.read_logits = readable(call.logits, call.axis)
    if other is not None:
        call.read_soft = readable(other, call.axis)
    call.problem.plan.num_threads = threads_for(call)
    return 0


cdef Call finished(Call call):
    # Everything has been checked and allocated.
    set_pointers(call)
    plan(call)
    return call


cdef Call finished_loss(Call call):
    set_read(call, call.target if call.problem.target == NULL else None)
    return finished(call)


cdef Call loss_alone(Operation operation, logits, target, Options options, out, num_threads):
    cdef Call call = new_loss(operation, logits, target, options, num_threads)
    write_loss_to(call, out)
    check_loss(call, options)
    set_losses(call)
    return finished_loss(call)


cdef Call loss_with_gradient(
    Operation operation, logits, target, Options options, out, num_threads, grad_output, grad_out
):
    cdef Call call = new_loss(operation, logits, target, options, num_threads)
    write_loss_to(call, out)
    want_gradient(call, grad_output, grad_out)
    check_loss(call, options)
    set_losses(call)
    set_gradient_of_loss(call)
    return finished_loss(call)


# The losses. -> Call, of which logits, target, options (from options()) are checked, and class indices copied

def cross_entropy(logits, target, Options options not None, out=None, num_threads=None):
    """The loss alone."""
    return loss_alone(CROSS_ENTROPY, logits, target, options, out, num_threads)


def cross_entropy_with_grad(
    logits, target, Options options not None, out=None, num_threads=None, grad_output=None, grad_out=None
):
    """The loss and its gradient."""
    return loss_with_gradient(CROSS_ENTROPY, logits, target, options, out, num_threads, grad_output, grad_out)


def cross_entropy_grad_hess(
    logits, target, Options options not None, hess_scale=1.0, num_threads=None, grad_out=None, hess_out=None
):
    """The gradient and the diagonal of the Hessian, of which the latter is multiplied with hess_scale."""
    cdef Call call = new_loss(CROSS_ENTROPY, logits, target, options, num_threads)
    want_gradient(call, None, grad_out)
    if hess_out is not None:
        call.hess_out = as_output(hess_out, "hess_out")
        call.hessian_result = hess_out
    hess_scale = as_double(hess_scale, "hess_scale")
    check_loss(call, options)
    call.problem.options.hessian_scale = hess_scale
    set_gradient_of_loss(call)
    set_hessian(call)
    return finished_loss(call)


def cross_entropy_with_state(logits, target, Options options not None, num_threads=None):
    """The loss, and what its gradient needs of each row: see Call.row_state and Call.backward."""
    cdef Call call = new_loss(CROSS_ENTROPY, logits, target, options, num_threads)
    check_loss(call, options)
    set_losses(call)
    call.state = np.zeros((2, call.rows))
    return finished_loss(call)


def cross_entropy_gradient(
    logits, target, Options options not None, state, num_threads=None, grad_output=None, grad_out=None
):
    """The gradient alone, from Call.row_state() of cross_entropy_with_state for the same logits, target and options."""
    cdef Call call = new_loss(CROSS_ENTROPY, logits, target, options, num_threads)
    want_gradient(call, grad_output, grad_out)
    check_loss(call, options)
    if not cnp.PyArray_CheckExact(state) or not is_doubles(state) or not has_shape(state, (2, call.rows)):
        raise ValueError(f"state must be a C-contiguous float64 array of shape {(2, call.rows)}")
    call.state = state
    call.problem.have_state = True
    set_gradient_of_loss(call)
    return finished_loss(call)


def rounded_losses(cnp.ndarray losses not None, dtype):
    """Losses in double, (n,), rounded once: dtype float32, float64, float16, or bfloat16_bits, which come as uint16."""
    cdef Environment environment
    if not is_doubles(losses) or cnp.PyArray_NDIM(losses) != 1:
        raise ValueError(f"losses must be a C-contiguous float64 array (n,), got {losses.dtype}, {(<object>losses).shape}")
    environment = enter_environment()
    try:
        return rounded(losses, dtype)
    finally:
        leave_environment(environment, NULL)


def nll(log_probs, target, Options options not None, out=None, num_threads=None):
    """The negative log-likelihood alone; of the options, label_smoothing, z_loss and focal_gamma are not looked at."""
    return loss_alone(NLL, log_probs, target, options, out, num_threads)


def nll_with_grad(log_probs, target, Options options not None, out=None, num_threads=None, grad_output=None, grad_out=None):
    """The negative log-likelihood and its gradient."""
    return loss_with_gradient(NLL, log_probs, target, options, out, num_threads, grad_output, grad_out)


def rows_of_linear(tuple rows, Py_ssize_t classes, dtype, target, Options options not None, grad_output=None, shifted=False):
    """All of a call but its logits, for linear.py: it computes some rows of them at a time, and not by this call.

    rows: the shape of the unreduced loss. shifted: target is the caller's from the second position of the last axis on. See
    Call.labels, class_weights, sample_weights, grad_scale, and reduce, which takes what came of it.
    """
    stand_in = np.broadcast_to(np.zeros((), dtype), (*rows, classes))     # takes no memory
    cdef Call call = new_loss(CROSS_ENTROPY, stand_in, target, options, None)
    call.shifted = shifted
    want_gradient(call, grad_output, None)
    check_loss(call, options)
    divide_by_divisor(call)
    return call


# Softmax. -> Call, whose gradient() is the result

cdef Call new_softmax(Operation operation, object x, str name, object axis, object out, object num_threads):
    # Converts what all of them have.
    cdef Call call = Call.__new__(Call)
    call.problem.operation = operation
    call.logits = as_floating(x, name)
    axis = int(operator.index(axis))
    call.num_threads = num_threads if num_threads is None else _threads.checked(num_threads)
    want_gradient(call, None, out)
    if cnp.PyArray_NDIM(call.logits) > 0 or axis not in (0, -1):      # of a number, too, there is a softmax: SPEC S37
        call.axis = checked_axis(axis, cnp.PyArray_NDIM(call.logits))
    return call


cdef Call finished_softmax(
    Call call,
    tuple names,                                  # in   of the inputs
    cnp.ndarray other,                            # in   grad_output of a backward, or None
):
    cdef cnp.ndarray x = call.logits
    cdef object dtype = native_dtype(x)
    cdef bint is_number = cnp.PyArray_NDIM(x) == 0
    call.problem.is_double = dtype is float64
    if call.grad_out is not None:
        check_output(call.grad_out, "out", (<object>x).shape, dtype, names, (x, other), False)
    if is_number:                                 # views with a class axis
        call.logits = x = (<object>x).reshape(1)
        other = None if other is None else (<object>other).reshape(1)
        call.grad_out = None if call.grad_out is None else call.grad_out.reshape(1)
    call.classes = cnp.PyArray_DIM(x, call.axis)
    call.rows = rows_of(x, call.axis)
    set_gradient(call)
    if is_number and cnp.PyArray_CheckExact(call.gradient_result) and cnp.PyArray_NDIM(call.gradient_result) == 1:
        call.gradient_result = call.grad_out.reshape(())
    set_read(call, other)
    return finished(call)


cdef Call new_softmax_backward(
    Operation operation, object grad_output, object output, object axis, object out, object num_threads
):
    cdef cnp.ndarray g = as_floating(grad_output, "grad_output")
    cdef Call call = new_softmax(operation, output, "output", axis, out, num_threads)
    cdef object dtype = native_dtype(call.logits)
    if not cnp.PyArray_SAMESHAPE(g, call.logits):
        raise ValueError(f"grad_output must have the shape of output, {call.logits.shape}, got {(<object>g).shape}")
    if native_dtype(g) != dtype:
        raise TypeError(f"grad_output must have the dtype of output, {dtype.name}, got {g.dtype.name}")
    return finished_softmax(call, ("output", "grad_output"), g)


def softmax(x, axis, out=None, num_threads=None):
    return finished_softmax(new_softmax(SOFTMAX, x, "x", axis, out, num_threads), ("x",), None)


def log_softmax(x, axis, out=None, num_threads=None):
    return finished_softmax(new_softmax(LOG_SOFTMAX, x, "x", axis, out, num_threads), ("x",), None)


def softmax_backward(grad_output, output, axis, out=None, num_threads=None):
    return new_softmax_backward(SOFTMAX_BACKWARD, grad_output, output, axis, out, num_threads)


def log_softmax_backward(grad_output, output, axis, out=None, num_threads=None):
    return new_softmax_backward(LOG_SOFTMAX_BACKWARD, grad_output, output, axis, out, num_threads)
