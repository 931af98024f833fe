# cython: wraparound=True
"""Turns what callers pass into a Problem that a kernel can trust, or raises before anything is written.

Every index, shape, stride, alignment, overlap and thread count is settled here: the kernels check nothing. Labels are copied
once, the copy is checked, and only the copy is used, so another thread that changes them meanwhile does no harm.
"""

import operator

import numpy as np

from . import _memory, _threads

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from libc.math cimport INFINITY, NAN
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from pyx_xent._problem cimport (
    BFLOAT16,
    BLOCK,
    CROSS_ENTROPY,
    FEW_CLASSES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LANES,
    LOG_SOFTMAX,
    LOG_SOFTMAX_BACKWARD,
    NLL,
    ROWS,
    SEGMENT,
    SOFTMAX,
    SOFTMAX_BACKWARD,
    ClassArray,
    Environment,
    Problem,
    Storage,
    enter_environment,
    leave_environment,
)

cdef extern from "numpy/arrayobject.h":
    object PyArray_Scalar(void* data, cnp.dtype dtype, void* base)

cnp.import_array()

cdef int NONE = 0, MEAN = 1, SUM = 2
cdef dict REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
cdef object float32 = np.dtype(np.float32)
cdef object float64 = np.dtype(np.float64)
cdef object int64 = np.dtype(np.int64)
cdef object uint64 = np.dtype(np.uint64)
# How pyx_xent.torch passes bfloat16, which NumPy lacks, without ml_dtypes.
bfloat16_bits = np.dtype(np.uint16, metadata={"pyx_xent": "bfloat16"})

cdef Py_ssize_t LARGE = _memory.LARGE             # bytes
# A gradient of this size will not be found in a cache: it is stored past them.
cdef Py_ssize_t STREAM_BYTES = 1 << 25
# The exponentials of longer rows are computed twice, rather than kept in memory as large as the row.
cdef Py_ssize_t KEPT_CLASSES = 1 << 20
# So many classes of a row are worth waking threads for.
cdef Py_ssize_t CLASSES_WORTH_SHARING = 4 * SEGMENT
cdef Py_ssize_t LABELS_AT_ONCE = 512
# Elements that are copied before Ctrl-C is heard.
cdef Py_ssize_t COPIED_AT_ONCE = 1 << 24


cdef cnp.ndarray new_array(Py_ssize_t size, int kind):
    cdef cnp.npy_intp length = size
    return cnp.PyArray_SimpleNew(1, &length, kind)


cdef cnp.ndarray copied(cnp.ndarray array, object dtype):
    """In C order, in `dtype`, which holds all its values or their bits."""
    cdef Py_ssize_t total = cnp.PyArray_SIZE(array), first, size
    if total <= COPIED_AT_ONCE:
        return np.array(array, dtype, order="C", subok=False)
    result = np.empty((<object>array).shape, dtype)
    axis = int(np.argmax((<object>array).shape))
    to, read = np.moveaxis(result, axis, 0), np.moveaxis(array, axis, 0)
    size = max(<Py_ssize_t>1, COPIED_AT_ONCE // (total // <Py_ssize_t>len(to)))
    for first in range(0, len(to), size):
        to[first : first + size] = read[first : first + size]
        PyErr_CheckSignals()
    return result


# One argument

cpdef cnp.ndarray as_array(object value, str name):
    if cnp.PyArray_CheckExact(value):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost: pass an array without mask")
    if isinstance(value, np.matrix):
        raise TypeError(f"{name} is a numpy.matrix: pass an array, numpy.asarray({name})")
    return np.asarray(value)


cdef int storage_of(cnp.ndarray array) noexcept:
    # A Storage, or -1. ml_dtypes registers bfloat16 with NumPy; an array of it exists only where that is installed.
    cdef int kind = cnp.PyArray_TYPE(array)
    if kind == cnp.NPY_FLOAT32:
        return FLOAT32
    if kind == cnp.NPY_FLOAT64:
        return FLOAT64
    if kind == cnp.NPY_FLOAT16:
        return FLOAT16
    if cnp.PyTypeNum_ISUSERDEF(kind) and array.dtype.name == "bfloat16":
        return BFLOAT16
    if kind == cnp.NPY_UINT16 and array.dtype.metadata is not None and "pyx_xent" in array.dtype.metadata:
        return BFLOAT16
    return -1


cdef cnp.ndarray as_floating(object value, str name):
    cdef cnp.ndarray array = as_array(value, name)
    if storage_of(array) < 0:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {array.dtype.name}")
    return array


def floating(value, str name):
    """An array of float32, float64, float16 or bfloat16 in the byte order of the machine; TypeError if `value` is none."""
    cdef cnp.ndarray array = as_floating(value, name)
    return array if array.dtype.isnative else copied(array, native_dtype(array))


cdef cnp.ndarray as_real(object value, str name):
    cdef cnp.ndarray array = as_array(value, name)
    if array.dtype.kind not in "fiub" and storage_of(array) != BFLOAT16:
        raise TypeError(f"{name} must be real numbers, got {array.dtype.name}")
    return array


cdef cnp.ndarray as_doubles(object value, str name):
    # Native, aligned and C-contiguous, whatever real dtype came.
    return np.require(as_real(value, name), float64, ["C", "A"])


cpdef double as_double(object value, str name) except? -1.0:
    if type(value) is float:
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


cdef int class_axis(object axis, int ndim, str name) except -1:
    if ndim == 0:
        raise ValueError(f"{name} must have a class axis, got an array of shape ()")
    if axis is None:
        return 0 if ndim == 1 else 1
    return checked_axis(axis, ndim)


cdef int checked_axis(object axis, int ndim) except -1:
    return np.lib.array_utils.normalize_axis_index(operator.index(axis), ndim)


cdef object native_dtype(cnp.ndarray array):
    cdef int kind = cnp.PyArray_TYPE(array)
    if kind == cnp.NPY_FLOAT32:
        return float32
    if kind == cnp.NPY_UINT16:
        return bfloat16_bits
    return float64 if kind == cnp.NPY_FLOAT64 else array.dtype.newbyteorder("=")


cdef object promoted(object first, object second):
    # As PyTorch promotes: to the larger floating dtype, and float16 with bfloat16 to float32. Native dtypes only.
    if first == second:
        return first
    return float64 if first is float64 or second is float64 else float32


cdef int checked_reduction(object reduction) except -1:
    cdef object found = REDUCTIONS.get(reduction) if type(reduction) is str else None
    if found is None:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return found


cdef double checked_smoothing(object label_smoothing) except -1.0:
    cdef double smoothing = as_double(label_smoothing, "label_smoothing")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    return smoothing


cdef int check_weight(cnp.ndarray weight, Py_ssize_t classes) except -1:
    if cnp.PyArray_NDIM(weight) != 1 or cnp.PyArray_DIM(weight, 0) != classes:
        raise ValueError(
            f"weight tensor should be defined either for all {classes} classes or no classes "
            f"but got weight tensor of shape: {(<object>weight).shape}"
        )
    return 0


cdef int threads_for(object num_threads, Py_ssize_t elements) except -1:
    if num_threads is None and elements < 2 * <Py_ssize_t>_threads.ELEMENTS_WORTH_A_THREAD:
        return 1  # what _threads would say, without asking
    return _threads.for_work(num_threads, elements)


# Targets

cdef bint has_shape(cnp.ndarray array, tuple shape) except -1:
    cdef Py_ssize_t k
    if cnp.PyArray_NDIM(array) != len(shape):
        return False
    for k in range(len(shape)):
        if cnp.PyArray_DIM(array, k) != <Py_ssize_t>shape[k]:
            return False
    return True


cdef tuple shape_without(tuple shape, int axis):
    return shape[:axis] + shape[axis + 1:]


cdef Py_ssize_t rows_of(cnp.ndarray array, int axis) noexcept:
    cdef Py_ssize_t rows = 1
    cdef int k
    for k in range(cnp.PyArray_NDIM(array)):
        if k != axis:
            rows *= cnp.PyArray_DIM(array, k)
    return rows


cdef bint is_one_per_row(cnp.ndarray array, cnp.ndarray logits, int axis) noexcept:
    # Has it the shape of the logits without the class axis?
    cdef int k
    if cnp.PyArray_NDIM(array) != cnp.PyArray_NDIM(logits) - 1:
        return False
    for k in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, k) != cnp.PyArray_DIM(logits, k + 1 if k >= axis else k):
            return False
    return True


cdef int check_target_shape(cnp.ndarray target, cnp.ndarray logits, int axis, bint axis_given) except -1:
    cdef tuple shape, logits_shape, expected
    if is_one_per_row(target, logits, axis):
        return 0
    shape, logits_shape = (<object>target).shape, (<object>logits).shape
    if len(logits_shape) == 1 and shape == (1,):
        return 0
    expected = shape_without(logits_shape, axis)
    if not axis_given and shape == logits_shape[:-1]:
        raise ValueError(f"Expected target size {expected}, got {shape}: class axis is 1; pass axis=-1 if it is the last")
    if not axis_given and expected and shape and shape[0] != expected[0]:
        raise ValueError(f"Expected input batch_size ({expected[0]}) to match target batch_size ({shape[0]}).")
    raise ValueError(f"Expected target size {expected}, got {shape}")


cdef int64_t checked_ignore_index(object ignore_index) except? -1:
    try:
        return ignore_index if type(ignore_index) is int else operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}") from None
    except OverflowError:
        raise ValueError(f"ignore_index must fit into 64 bits, got {ignore_index}") from None


cdef inline uint64_t is_not(uint64_t a, uint64_t b) noexcept nogil:
    # 1 or 0, without a branch
    return ((a ^ b) | (0 - (a ^ b))) >> 63


cdef Py_ssize_t copy_labels(
    const int64_t* target, Py_ssize_t n, Py_ssize_t classes, int64_t ignored,
    int64_t* label,                           # out  (n,)  the copy; may be `target`
    Py_ssize_t* live,                         # in/out   how many are neither ignored nor bad
) noexcept nogil:
    # -> how many are bad. Without a branch, so in vectors: on uint64, where a difference wraps and its top bit is its sign.
    cdef uint64_t y, valid, other, lives = 0, others = 0
    cdef Py_ssize_t first, i, size
    for first from 0 <= first < n by LABELS_AT_ONCE:         # checked while they are in the nearest cache
        size = min(LABELS_AT_ONCE, n - first)
        if label != target:
            memcpy(label + first, target + first, size * sizeof(int64_t))
        for i in range(first, first + size):
            y = <uint64_t>label[i]
            valid = (~y & (y - <uint64_t>classes)) >> 63     # 1 if 0 <= y < classes
            other = is_not(y, <uint64_t>ignored)
            lives += valid & other
            others += other
    live[0] += <Py_ssize_t>lives
    return <Py_ssize_t>(others - lives)


cdef Py_ssize_t checked_labels(Call call, cnp.ndarray target, Py_ssize_t classes, int64_t ignored) except -1:
    # Puts a private copy of the class indices, checked, into `call`; -> how many are not ignored.
    # in   target      any shape, any integer dtype; read exactly once
    cdef cnp.ndarray flat
    cdef const int64_t* read
    cdef int64_t* label
    cdef Py_ssize_t n = cnp.PyArray_SIZE(target), first, size, i, live = 0, bad = 0
    cdef bint is_uint64 = cnp.PyTypeNum_ISUNSIGNED(cnp.PyArray_TYPE(target)) and cnp.PyArray_ITEMSIZE(target) == 8
    if not cnp.PyTypeNum_ISINTEGER(cnp.PyArray_TYPE(target)):
        raise TypeError(f"Expected an integer dtype for target with class indices, got {target.dtype.name}")
    if cnp.PyArray_TYPE(target) == cnp.NPY_INT64 and cnp.PyArray_ISCARRAY_RO(target):
        flat = new_array(n, cnp.NPY_INT64)
        read = <const int64_t*>cnp.PyArray_DATA(target)
    else:
        flat = copied(target, int64).reshape(-1)
        read = <const int64_t*>cnp.PyArray_DATA(flat)
    n = cnp.PyArray_SIZE(flat)
    if n != call.rows:                            # another thread has set the dtype of `target` since
        raise ValueError(f"target has changed since its shape was checked: expected {call.rows} labels, got {n}")
    label = <int64_t*>cnp.PyArray_DATA(flat)
    for first from 0 <= first < n by COPIED_AT_ONCE:
        size = min(COPIED_AT_ONCE, n - first)
        bad += copy_labels(read + first, size, classes, ignored, label + first, &live)
        if n > COPIED_AT_ONCE:
            PyErr_CheckSignals()
    if is_uint64:
        for i in range(n):                        # what int64 cannot hold is negative now, and may look like ignore_index
            bad += label[i] < 0
    if bad > 0:
        for i in range(n):
            if (label[i] != ignored or (is_uint64 and label[i] < 0)) and not 0 <= label[i] < classes:
                break
        indices = ", ".join(str(k) for k in np.unravel_index(i, (<object>target).shape)) if target.ndim else None
        where = "target" if indices is None else f"target[{indices}]"
        raise IndexError(
            f"Target {(<object>flat).view(uint64 if is_uint64 else int64)[i]} is out of bounds. ({where}; "
            f"valid range is [0, {classes}) or ignore_index={ignored})"
        )
    if live < n:
        for i in range(n):
            label[i] = <int64_t>(<uint64_t>label[i] | (is_not(<uint64_t>label[i], <uint64_t>ignored) - 1))
    call.target = flat
    call.problem.target = label
    return live


# Memory

cdef bint describe(cnp.ndarray array, int axis, ClassArray* description) except -1:
    # Sees the array as (outer, classes, inner) with one stride each; False if its memory does not allow it.
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(array)
    cdef Py_ssize_t stride, expected
    cdef int k, part, first, last
    cdef Py_ssize_t found[2]
    cdef int storage = storage_of(array)
    cdef bint started, empty = cnp.PyArray_SIZE(array) == 0        # of nothing, any strides will do
    if axis >= cnp.PyArray_NDIM(array) or storage < 0 or not cnp.PyArray_ISBEHAVED_RO(array):
        return False
    for part in range(2):
        first, last = (0, axis) if part == 0 else (axis + 1, cnp.PyArray_NDIM(array))
        found[part] = 0
        started = False
        expected = 0
        for k in range(last - 1, first - 1, -1):
            if cnp.PyArray_DIM(array, k) == 1 or empty:
                continue
            stride = cnp.PyArray_STRIDE(array, k)
            if stride % itemsize != 0:
                return False
            if not started:
                found[part] = stride // itemsize
                started = True
            elif stride != expected:
                return False
            expected = stride * cnp.PyArray_DIM(array, k)
    if cnp.PyArray_STRIDE(array, axis) % itemsize != 0:
        return False
    description.data = cnp.PyArray_DATA(array)
    description.storage = <Storage>storage
    description.outer = found[0]
    description.classes = cnp.PyArray_STRIDE(array, axis) // itemsize
    description.inner = found[1]
    return True


cdef cnp.ndarray readable(cnp.ndarray array, int axis):
    """`array`, or a copy of it in C order: what describe() accepts."""
    cdef ClassArray description
    if describe(array, axis, &description):
        return array
    return copied(array, native_dtype(array))


cdef bint overlaps_itself(cnp.ndarray array):
    # Sufficient, not necessary: each stride must reach past everything the smaller strides cover.
    cdef Py_ssize_t covered = cnp.PyArray_ITEMSIZE(array)
    if cnp.PyArray_ISCARRAY_RO(array) or cnp.PyArray_SIZE(array) == 0:
        return False
    for stride, size in sorted((abs(s), n) for s, n in zip((<object>array).strides, (<object>array).shape) if n > 1):
        if stride < covered:
            return True
        covered += stride * (size - 1)
    return False


cdef bint share_memory(cnp.ndarray a, cnp.ndarray b):
    cdef const char* a_data = <const char*>cnp.PyArray_DATA(a)
    cdef const char* b_data = <const char*>cnp.PyArray_DATA(b)
    if cnp.PyArray_ISCARRAY_RO(a) and cnp.PyArray_ISCARRAY_RO(b):   # most calls: two ranges of bytes
        return a_data < b_data + cnp.PyArray_NBYTES(b) and b_data < a_data + cnp.PyArray_NBYTES(a)
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except Exception as error:
        if type(error).__name__ != "TooHardError":
            raise
        return True  # not settled: better refused than wrong


cdef bint same_elements(cnp.ndarray a, cnp.ndarray b):
    return (
        cnp.PyArray_DATA(a) == cnp.PyArray_DATA(b)
        and a.dtype == b.dtype
        and (<object>a).shape == (<object>b).shape
        and (<object>a).strides == (<object>b).strides
    )


cdef tuple CROSS_ENTROPY_INPUTS = ("logits", "target", "weight", "sample_weight", "grad_output", "out")
cdef tuple NLL_INPUTS = ("log_probs", *CROSS_ENTROPY_INPUTS[1:])


cdef cnp.ndarray checked_output(object out, str name, tuple shape, object dtype, tuple inputs, tuple names, bint in_place):
    # in_place   `out` may be the first input, all of it
    cdef Py_ssize_t k
    if not cnp.PyArray_CheckExact(out) and (
        not isinstance(out, np.ndarray) or isinstance(out, (np.ma.MaskedArray, np.matrix))
    ):
        raise TypeError(f"{name} must be a numpy.ndarray, got {type(out).__name__}")
    cdef cnp.ndarray array = out
    if not has_shape(array, shape):
        raise ValueError(f"{name} must have shape {shape}, got {out.shape}")
    if array.dtype is not dtype and (array.dtype != dtype or not array.dtype.isnative):
        raise ValueError(f"{name} must have dtype {dtype}, got {array.dtype}")
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name} is read-only")
    if overlaps_itself(array):
        raise ValueError(f"{name} has elements that overlap each other in memory: strides {out.strides} for shape {shape}")
    for k in range(len(inputs)):
        if not cnp.PyArray_Check(inputs[k]) or (in_place and k == 0 and same_elements(array, inputs[k])):
            continue
        if share_memory(array, inputs[k]):
            raise ValueError(f"{name} overlaps {names[k]} in memory")
    return array


def check_output(out, str name, tuple shape, dtype, tuple inputs, tuple names):
    """Raise unless `out` is an array of this shape and dtype that can be written and overlaps none of the inputs."""
    checked_output(out, name, shape, dtype, inputs, names, False)


# Results. NumPy's own casts would warn of a loss beyond the range of its dtype, or raise, when the gradient is written already.

cdef cnp.ndarray rounded(cnp.ndarray values, object dtype):
    # in   values (n,)   float64
    cdef const double* value = <const double*>cnp.PyArray_DATA(values)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(values), i
    cdef cnp.ndarray result
    cdef float* single
    if dtype is float64:
        return values
    if dtype is float32:
        result = new_array(n, cnp.NPY_FLOAT32)
        single = <float*>cnp.PyArray_DATA(result)
        for i in range(n):
            single[i] = <float>value[i]
        return result
    with np.errstate(all="ignore"):
        return values.astype(dtype)


cdef double sum_in_order(const double* values, Py_ssize_t n) noexcept nogil:
    # Eight sums in a fixed order: as fast as memory, and the same whatever the threads and the layout were.
    cdef double sums[8]
    cdef Py_ssize_t first, k, full = n - n % 8
    for k in range(8):
        sums[k] = 0.0
    for first from 0 <= first < full by 8:
        for k in range(8):
            sums[k] += values[first + k]
    for k in range(n - full):
        sums[k] += values[full + k]
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))


cdef object rounded_scalar(double value, object dtype):
    cdef float single = <float>value
    if dtype is float32:
        return PyArray_Scalar(&single, dtype, NULL)
    if dtype is float64:
        return PyArray_Scalar(&value, dtype, NULL)
    if -65504.0 <= value <= 65504.0:              # float16's largest: no half overflows
        return dtype.type(value)
    with np.errstate(all="ignore"):
        return np.float64(value).astype(dtype)


# The call

cdef double reduced(Call call):
    # The sum or mean, not rounded.
    cdef Environment environment = enter_environment()
    cdef double total = sum_in_order(<const double*>call.problem.loss, cnp.PyArray_SIZE(call.loss_array))
    if call.reduction == MEAN:
        total = call.empty_value if call.nothing_to_average else total / call.divisor
    leave_environment(environment, &total)
    return total


cdef class Call:
    """A checked call: run it with a kernel module's `run`, then take `loss()` and `gradient()`."""

    def loss_in_double(self):
        """The reduced loss before it is rounded to its dtype: a float, or for reduction "none" a float64 array."""
        return self.loss_array.reshape(loss_shape(self)) if self.reduction == NONE else reduced(self)

    def loss(self):
        """The reduced loss: a NumPy scalar, an array for reduction "none", or `out`."""
        cdef Environment environment = enter_environment()
        try:
            if self.reduction == NONE:
                result = rounded(self.loss_array, self.loss_dtype).reshape(loss_shape(self))[()]
            else:
                result = rounded_scalar(reduced(self), self.loss_dtype)
        finally:
            leave_environment(environment, NULL)
        if self.loss_out is None:
            return result
        self.loss_out[...] = result
        return self.loss_out

    def row_state(self):
        """The (2, rows) float64 array that keep_state has filled: the argument `state` of a later call for the gradient."""
        return self.state

    def of_rows(self):
        """(class indices, sample weights, factors of the gradient): what linear.py takes from a call that it does not run.

        Class indices are checked, -1 where ignored; they and sample weights are None where there are none. A factor is the upstream
        gradient over the divisor of the mean, for all rows or for each.
        """
        factor = self.problem.grad_scale if self.grad_output is None else self.grad_output.reshape(-1) * self.problem.grad_scale
        return self.target, None if self.sample_weight is None else self.sample_weight.reshape(-1), factor

    def take(self, cnp.ndarray losses):
        """The losses of the rows, (rows,) float64, instead of running the call."""
        if losses.dtype is not float64 or not cnp.PyArray_ISCARRAY_RO(losses) or not has_shape(losses, (self.rows,)):
            raise ValueError(f"losses must be a C-contiguous float64 array of shape {(self.rows,)}")
        self.loss_array = losses
        self.problem.loss = <double*>cnp.PyArray_DATA(losses)

    def gradient(self):
        """The array that the kernels have filled: a gradient, or the result of softmax and log_softmax."""
        if self.computed is not self.output:
            np.copyto(self.output, self.computed)
        return self.output

    def backward(self, grad_output):
        """A call for the gradient, from the state that this one left when it was run with keep_state.

        It is another object, so that threads may call this at once.
        """
        cdef Call call = Call.__new__(Call)
        call.problem = self.problem
        call.problem.have_state = True
        call.problem.loss = NULL
        call.logits, call.read_logits, call.read_soft = self.logits, self.read_logits, self.read_soft
        call.target, call.weight, call.sample_weight = self.target, self.weight, self.sample_weight
        call.state = self.state
        call.axis, call.rows, call.classes, call.reduction = self.axis, self.rows, self.classes, self.reduction
        set_grad_output(call, None if grad_output is None else as_doubles(grad_output, "grad_output"))
        call.divisor = self.divisor
        if call.reduction == MEAN:
            divide_by_divisor(call)
        set_gradient(call, None)
        settle(call)
        return call


cdef tuple loss_shape(Call call):
    return shape_without((<object>call.logits).shape, call.axis)


cdef int set_grad_output(Call call, cnp.ndarray array) except -1:
    # in   array         grad_output as doubles, or None
    # The divisor of the mean is not in grad_scale yet.
    call.problem.grad_output = NULL
    call.problem.grad_scale = 1.0
    if array is not None:
        if cnp.PyArray_NDIM(array) == 0:
            call.problem.grad_scale = (<const double*>cnp.PyArray_DATA(array))[0]
        elif call.reduction != NONE:
            raise ValueError(f"grad_output must be a scalar unless reduction='none', got shape {(<object>array).shape}")
        elif not is_one_per_row(array, call.logits, call.axis):
            raise ValueError(f"grad_output must have shape {loss_shape(call)}, got {(<object>array).shape}")
        else:
            call.problem.grad_output = <const double*>cnp.PyArray_DATA(array)
            call.grad_output = array
    return 0


cdef int set_gradient(Call call, cnp.ndarray grad_out) except -1:
    # Decides where the gradient is written: grad_out, a fresh array laid out like the logits, or by way of a temporary.
    cdef cnp.ndarray x = call.logits
    cdef ClassArray description
    if grad_out is not None:
        call.output = grad_out
    elif cnp.PyArray_NBYTES(x) >= LARGE:
        call.output = _memory.empty_like(x, native_dtype(x))
    elif cnp.PyArray_ISCARRAY_RO(x) and cnp.PyArray_TYPE(x) != cnp.NPY_UINT16:     # bfloat16_bits is more than its type
        call.output = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)
    else:
        call.output = np.empty_like(x, dtype=native_dtype(x), subok=False)
    call.computed = call.output
    if not describe(call.output, call.axis, &description):
        call.computed = _memory.empty((<object>call.output).shape, call.output.dtype)
    return 0


cdef bint is_read_in_place(const Problem* p, const ClassArray* array) noexcept:
    # Or written; an absent one needs no scratch, either.
    return array.data == NULL or (array.classes == 1 and array.storage == (FLOAT64 if p.is_double else FLOAT32))


cdef int settle(Call call) except -1:
    # Last step of every call: the arrays as they now are in memory, the shape (outer, classes, inner), and a scratch where
    # the kernels need one. From here on no code of the caller's runs; what it did to a shape until now is noticed.
    cdef Problem* p = &call.problem
    cdef ClassArray* arrays[3]
    cdef cnp.ndarray x = call.read_logits
    cdef bint one_stride = True, across = True, fits = describe(x, call.axis, &p.logits)
    cdef int k
    cdef Py_ssize_t size, rows
    cdef cnp.ndarray scratch, parts
    arrays[0], arrays[1], arrays[2] = &p.logits, &p.soft, &p.grad
    if call.read_soft is not None:
        fits = fits and describe(call.read_soft, call.axis, &p.soft) and cnp.PyArray_SAMESHAPE(call.read_soft, x)
    if call.computed is not None:
        fits = fits and describe(call.computed, call.axis, &p.grad) and cnp.PyArray_SAMESHAPE(call.computed, x)
    if not fits or cnp.PyArray_DIM(x, call.axis) != call.classes or rows_of(x, call.axis) != call.rows:
        raise ValueError("the shape of an array has changed since it was checked")
    p.classes = call.classes
    p.outer = p.inner = 1
    for k in range(cnp.PyArray_NDIM(x)):
        if k < call.axis:
            p.outer *= cnp.PyArray_DIM(x, k)
        elif k > call.axis:
            p.inner *= cnp.PyArray_DIM(x, k)
    if p.inner == 1:
        # A batch of rows is (1, classes, rows): so a tile can hold LANES of them.
        p.inner = p.outer
        p.outer = 1
        for k in range(3):
            arrays[k].inner = arrays[k].outer
            arrays[k].outer = 0
    for k in range(3):
        if arrays[k].data != NULL:
            one_stride = one_stride and arrays[k].outer == arrays[k].inner * p.inner
            across = across and arrays[k].inner == 1
    if one_stride and p.outer > 1:
        p.inner *= p.outer
        p.outer = 1
    across = (across and p.inner >= LANES) or p.classes <= FEW_CLASSES
    p.across = across
    rows = max(<Py_ssize_t>1, min(<Py_ssize_t>ROWS, BLOCK // max(p.classes, 1)))
    if across:
        rows = max(<Py_ssize_t>LANES, rows // LANES * LANES)
    p.rows_together = rows
    p.keep = p.grad.data != NULL and p.classes <= KEPT_CLASSES and (not across or p.classes * rows <= 4 * BLOCK)
    p.stream = (
        p.grad.data != NULL and p.grad.data != p.logits.data
        and p.outer * p.inner * p.classes * cnp.PyArray_ITEMSIZE(x) >= STREAM_BYTES
    )
    p.shared = (
        p.num_threads > 1 and not across and p.outer * p.inner < min(4 * p.num_threads, <int>LANES)
        and p.classes >= CLASSES_WORTH_SHARING
    )
    rows = min(rows, (p.inner + LANES - 1) // LANES * LANES if across else p.inner)
    p.scratch_size = p.classes * rows             # what these take in a scratch
    size = (1 if p.shared else p.num_threads) * 3 * p.scratch_size
    if not across and p.soft.data == NULL and not p.keep and is_read_in_place(p, &p.logits) and is_read_in_place(p, &p.grad):
        size -= 2 * p.scratch_size                # only for logits, and only where they are too large to be computed with
    if p.num_threads == 1 and size <= SMALL_SCRATCH:
        p.scratch = NULL                          # run() has one
    else:
        # Pages that the kernels do not come to use are never touched.
        scratch = new_array(size, cnp.NPY_FLOAT64 if p.is_double else cnp.NPY_FLOAT32)
        p.scratch = cnp.PyArray_DATA(scratch)
        call.scratch = scratch
    if p.shared:
        parts = new_array(2 * (p.classes // SEGMENT + 1), cnp.NPY_FLOAT64)
        p.parts = <double*>cnp.PyArray_DATA(parts)
        call.parts = parts
    return 0


def cross_entropy(
    logits, target, weight, ignore_index, reduction, label_smoothing, axis, sample_weight, normalizer, z_loss, empty, out,
    num_threads, grad_output=None, grad_out=None, bint want_gradient=False, bint keep_state=False, state=None, bint nll=False,
):
    """Check the arguments of pyx_xent.cross_entropy and cross_entropy_with_grad; -> Call.

    keep_state: for a later gradient. state: row_state() of an earlier call for the same arguments; the loss is not computed.
    nll=True: the arguments of nll_loss, `logits` being log-probabilities.
    """
    cdef Call call = Call.__new__(Call)
    cdef Problem* p = &call.problem
    cdef str logits_name = "log_probs" if nll else "logits"
    cdef cnp.ndarray x = as_floating(logits, logits_name)
    cdef cnp.ndarray y = as_array(target, "target")
    cdef cnp.ndarray weights = None, samples = None, upstream = None, array
    cdef Py_ssize_t live
    cdef int64_t ignored
    cdef bint soft
    cdef object dtype = native_dtype(x)
    cdef tuple inputs
    cdef Environment environment

    # First what runs code of the caller's: __array__, __index__, __float__. Shapes are looked at when it can change none.
    if weight is not None:
        weights = as_real(weight, "weight")
    if sample_weight is not None:
        samples = as_doubles(sample_weight, "sample_weight")
    if grad_output is not None:
        upstream = as_doubles(grad_output, "grad_output")
    p.operation = NLL if nll else CROSS_ENTROPY
    call.axis = class_axis(axis, x.ndim, logits_name)
    call.reduction = checked_reduction(reduction)
    p.label_smoothing = checked_smoothing(label_smoothing)
    p.z_loss = as_double(z_loss, "z_loss")
    if not 0.0 <= p.z_loss < INFINITY:
        raise ValueError(f"z_loss must be finite and not negative, got {z_loss}")
    if empty not in ("nan", "zero", "raise"):
        raise ValueError(f"empty must be 'nan', 'zero' or 'raise', got {empty!r}")
    call.divisor = 1.0
    if normalizer is not None:
        if call.reduction != MEAN:
            raise ValueError(f"normalizer replaces the divisor of reduction='mean', got reduction={reduction!r}")
        call.divisor = as_double(normalizer, "normalizer")
    ignored = checked_ignore_index(ignore_index)

    call.logits = x
    call.loss_dtype = dtype
    call.classes = cnp.PyArray_DIM(x, call.axis)
    call.rows = rows_of(x, call.axis)
    if weights is not None:
        check_weight(weights, call.classes)
    soft = cnp.PyArray_SAMESHAPE(x, y) and not nll
    if soft:
        if y.dtype.kind != "f" and storage_of(y) != BFLOAT16:
            raise TypeError(f"Expected floating point type for target with class probabilities, got {y.dtype.name}")
        if ignored >= 0:
            raise ValueError("ignore_index is not supported for floating point target")
        for array in (y,) if weights is None or weights.dtype.kind in "iub" else (y, weights):
            if storage_of(array) < 0:
                raise TypeError(f"logits, target and weight must promote to float32 or float64, got {array.dtype}")
            call.loss_dtype = promoted(call.loss_dtype, native_dtype(array))
    else:
        check_target_shape(y, x, call.axis, axis is not None)
    if samples is not None:
        if not is_one_per_row(samples, x, call.axis) and (soft or not cnp.PyArray_SAMESHAPE(samples, y)):
            raise ValueError(f"sample_weight must have shape {loss_shape(call)}, got {(<object>samples).shape}")
        p.sample_weight = <const double*>cnp.PyArray_DATA(samples)
        call.sample_weight = samples
    set_grad_output(call, upstream)
    if soft:
        live = call.rows if call.classes else 0
    else:
        live = checked_labels(call, y, call.classes, ignored)

    if out is not None or grad_out is not None:       # an array of a class of the caller's runs code of the caller's here
        inputs = (x, y, weight, sample_weight, grad_output)
        names = NLL_INPUTS if nll else CROSS_ENTROPY_INPUTS
        if out is not None:
            call.loss_out = checked_output(
                out, "out", loss_shape(call) if call.reduction == NONE else (), call.loss_dtype, inputs, names, False
            )
            inputs += (out,)
        if grad_out is not None:
            checked_output(grad_out, "grad_out", (<object>x).shape, dtype, inputs, names, True)

    p.is_double = call.loss_dtype is float64
    if weights is not None:
        environment = enter_environment()
        try:
            weights = np.array(weights, float64 if p.is_double else float32, order="C")
        finally:
            leave_environment(environment, NULL)
        check_weight(weights, call.classes)       # again: now nobody else has it
        p.weight = cnp.PyArray_DATA(weights)
        call.weight = weights
    if call.reduction == MEAN:
        if normalizer is None:
            call.divisor = counted(p, call.rows, live)
            call.nothing_to_average = live == 0
        call.empty_value = 0.0 if empty == "zero" else NAN
        if call.nothing_to_average and empty == "raise":
            raise ValueError("no row to average: the batch is empty or all its targets are ignore_index")
        divide_by_divisor(call)

    p.num_threads = threads_for(num_threads, call.rows * call.classes)
    if state is None:
        array = new_array(call.rows, cnp.NPY_FLOAT64) if call.classes else np.zeros(call.rows)
        p.loss = <double*>cnp.PyArray_DATA(array)
        call.loss_array = array
    if keep_state or state is not None:
        p.have_state = state is not None
        array = np.zeros((2, call.rows)) if state is None else checked_state(state, call.rows)
        call.state = array
        p.row_max = <double*>cnp.PyArray_DATA(array)
        p.row_total = p.row_max + call.rows
    call.read_logits = readable(x, call.axis)
    if soft:
        call.read_soft = readable(y, call.axis)
    if want_gradient:
        set_gradient(call, grad_out)
    settle(call)
    return call


cdef cnp.ndarray checked_state(object state, Py_ssize_t rows):
    if not cnp.PyArray_CheckExact(state) or not cnp.PyArray_ISCARRAY_RO(state) or (
        cnp.PyArray_TYPE(state) != cnp.NPY_FLOAT64 or not has_shape(state, (2, rows))
    ):
        raise ValueError(f"state must be a C-contiguous float64 array of shape {(2, rows)}")
    return state


cdef void divide_by_divisor(Call call) noexcept:
    cdef Environment environment = enter_environment()
    call.problem.grad_scale /= call.divisor
    leave_environment(environment, NULL)


cdef double counted(const Problem* p, Py_ssize_t positions, Py_ssize_t live) noexcept:
    # The divisor D of SPEC S15, S16, S23.
    cdef Environment environment
    cdef double total = 0.0, one
    cdef Py_ssize_t i
    if p.sample_weight == NULL and (p.weight == NULL or p.target == NULL):
        return live
    environment = enter_environment()
    for i in range(positions):
        if p.target != NULL and p.target[i] < 0:
            continue
        one = p.sample_weight[i] if p.sample_weight != NULL else 1.0
        if p.weight != NULL and p.target != NULL:
            one *= (<const double*>p.weight)[p.target[i]] if p.is_double else (<const float*>p.weight)[p.target[i]]
        total += one
    leave_environment(environment, &total)
    return total


def softmax(x, axis, out, num_threads, bint logarithm):
    """Check the arguments of pyx_xent.softmax and log_softmax; -> Call."""
    cdef Call call = Call.__new__(Call)
    cdef Problem* p = &call.problem
    cdef cnp.ndarray array = as_floating(x, "x")
    cdef object dtype = native_dtype(array)
    p.operation = LOG_SOFTMAX if logarithm else SOFTMAX
    call.axis = checked_axis(axis, array.ndim)
    if out is not None:
        checked_output(out, "out", (<object>array).shape, dtype, (array,), ("x",), False)
    p.is_double = dtype is float64
    p.num_threads = threads_for(num_threads, cnp.PyArray_SIZE(array))
    call.logits = array
    call.classes = cnp.PyArray_DIM(array, call.axis)
    call.rows = rows_of(array, call.axis)
    call.read_logits = readable(array, call.axis)
    set_gradient(call, out)
    settle(call)
    return call


def softmax_backward(grad_output, output, axis, out, num_threads, bint logarithm):
    """Check the arguments of pyx_xent.softmax_backward and log_softmax_backward; -> Call."""
    cdef Call call = Call.__new__(Call)
    cdef Problem* p = &call.problem
    cdef cnp.ndarray array = as_floating(output, "output")
    cdef cnp.ndarray g = as_floating(grad_output, "grad_output")
    cdef object dtype = native_dtype(array)
    if not cnp.PyArray_SAMESHAPE(g, array):
        raise ValueError(f"grad_output must have the shape of output, {(<object>array).shape}, got {(<object>g).shape}")
    if native_dtype(g) != dtype:
        raise TypeError(f"grad_output must have the dtype of output, {dtype.name}, got {g.dtype.name}")
    p.operation = LOG_SOFTMAX_BACKWARD if logarithm else SOFTMAX_BACKWARD
    call.axis = checked_axis(axis, array.ndim)
    if out is not None:
        checked_output(out, "out", (<object>array).shape, dtype, (array, g), ("output", "grad_output"), False)
    p.is_double = dtype is float64
    p.num_threads = threads_for(num_threads, cnp.PyArray_SIZE(array))
    call.logits = array
    call.classes = cnp.PyArray_DIM(array, call.axis)
    call.rows = rows_of(array, call.axis)
    call.read_logits = readable(array, call.axis)
    call.read_soft = readable(g, call.axis)
    set_gradient(call, out)
    settle(call)
    return call
