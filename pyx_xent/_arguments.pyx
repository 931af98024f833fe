# cython: wraparound=True
"""Turns what callers pass into a Problem that a kernel can trust, or raises before anything is written.

Every index, shape, stride, alignment, overlap and thread count is settled here: the kernels check nothing. Labels are copied
once, the copy is checked, and only the copy is used, so another thread that changes them meanwhile does no harm.
"""

import operator

import numpy as np

from . import _threads

cimport numpy as cnp
from libc.math cimport INFINITY, NAN
from libc.stdint cimport int64_t
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
    Problem,
    Storage,
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
cdef object LARGEST_INT64 = np.uint64(2**63 - 1)

# A gradient of this size will not be found in a cache: it is stored past them.
cdef Py_ssize_t STREAM_BYTES = 1 << 25
# So many classes of a row are worth waking threads for.
cdef Py_ssize_t CLASSES_WORTH_SHARING = 4 * SEGMENT


cdef cnp.ndarray new_array(Py_ssize_t size, int kind):
    cdef cnp.npy_intp length = size
    return cnp.PyArray_SimpleNew(1, &length, kind)


# One argument

cdef cnp.ndarray as_array(object value, str name):
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
    return -1


cdef cnp.ndarray as_floating(object value, str name):
    cdef cnp.ndarray array = as_array(value, name)
    if storage_of(array) < 0:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {array.dtype.name}")
    return array


cdef cnp.ndarray as_real(object value, str name):
    cdef cnp.ndarray array = as_array(value, name)
    if array.dtype.kind not in "fiub" and storage_of(array) != BFLOAT16:
        raise TypeError(f"{name} must be real numbers, got {array.dtype.name}")
    return array


cdef cnp.ndarray as_doubles(object value, str name):
    # Native, aligned and C-contiguous, whatever real dtype came.
    return np.require(as_real(value, name), float64, ["C", "A"])


cdef double as_double(object value, str name) except? -1.0:
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


cdef object checked_weight(object weight, Py_ssize_t classes):
    cdef cnp.ndarray array = as_real(weight, "weight")
    if array.ndim != 1 or cnp.PyArray_DIM(array, 0) != classes:
        raise ValueError(
            f"weight tensor should be defined either for all {classes} classes or no classes "
            f"but got weight tensor of shape: {(<object>array).shape}"
        )
    return array


cdef int threads_for(object num_threads, Py_ssize_t elements) except -1:
    if num_threads is None and elements < 2 * <Py_ssize_t>_threads.ELEMENTS_WORTH_A_THREAD:
        return 1  # what _threads would say, without asking
    return _threads.for_work(num_threads, elements)


# Targets

cdef tuple shape_without(tuple shape, int axis):
    return shape[:axis] + shape[axis + 1:]


cdef int check_target_shape(tuple shape, tuple logits_shape, int axis, bint axis_given) except -1:
    cdef tuple expected = shape_without(logits_shape, axis)
    if shape == expected or (len(logits_shape) == 1 and shape == (1,)):
        return 0
    if not axis_given and shape == logits_shape[:-1]:
        raise ValueError(f"Expected target size {expected}, got {shape}: class axis is 1; pass axis=-1 if it is the last")
    if not axis_given and expected and shape and shape[0] != expected[0]:
        raise ValueError(f"Expected input batch_size ({expected[0]}) to match target batch_size ({shape[0]}).")
    raise ValueError(f"Expected target size {expected}, got {shape}")


cdef class Labels:
    """A private copy of the class indices, checked; ignored ones are -1."""
    cdef cnp.ndarray array
    cdef Py_ssize_t live


cdef int64_t checked_ignore_index(object ignore_index) except? -1:
    try:
        return ignore_index if type(ignore_index) is int else operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}") from None
    except OverflowError:
        raise ValueError(f"ignore_index must fit into 64 bits, got {ignore_index}") from None


cdef Labels checked_labels(cnp.ndarray target, Py_ssize_t classes, int64_t ignored):
    # in   target      any shape, any integer dtype; read exactly once
    cdef Labels labels = Labels()
    cdef cnp.ndarray original = target, flat
    cdef int64_t* label
    cdef Py_ssize_t n, i, bad = -1
    if not cnp.PyTypeNum_ISINTEGER(cnp.PyArray_TYPE(target)):
        raise TypeError(f"Expected an integer dtype for target with class indices, got {target.dtype.name}")
    if cnp.PyTypeNum_ISUNSIGNED(cnp.PyArray_TYPE(target)) and cnp.PyArray_ITEMSIZE(target) == 8:
        original = np.array(target, uint64, order="C")
        flat = original.astype(int64).reshape(-1)
        # What int64 cannot hold is neither valid nor ignore_index; a label that is neither stands in for it.
        flat[original.reshape(-1) > LARGEST_INT64] = classes if ignored != classes else classes + 1
    elif cnp.PyArray_TYPE(target) == cnp.NPY_INT64 and cnp.PyArray_ISCARRAY_RO(target):
        flat = original = new_array(cnp.PyArray_SIZE(target), cnp.NPY_INT64)
        memcpy(cnp.PyArray_DATA(flat), cnp.PyArray_DATA(target), cnp.PyArray_NBYTES(target))
    else:
        flat = original = np.array(target, int64, order="C").reshape(-1)
    n = cnp.PyArray_SIZE(flat)
    label = <int64_t*>cnp.PyArray_DATA(flat)
    for i in range(n):
        if label[i] == ignored:
            label[i] = -1
        elif 0 <= label[i] < classes:
            labels.live += 1
        else:
            bad = i
            break
    if bad >= 0:
        indices = ", ".join(str(k) for k in np.unravel_index(bad, (<object>target).shape)) if target.ndim else None
        where = "target" if indices is None else f"target[{indices}]"
        raise IndexError(
            f"Target {int(original.reshape(-1)[bad])} is out of bounds. ({where}; "
            f"valid range is [0, {classes}) or ignore_index={ignored})"
        )
    labels.array = flat
    return labels


# Memory

cdef bint describe(cnp.ndarray array, int axis, ClassArray* description) except -1:
    # Sees the array as (outer, classes, inner) with one stride each; False if its strides do not allow it.
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(array)
    cdef Py_ssize_t stride, expected
    cdef int k, part, first, last
    cdef Py_ssize_t found[2]
    if not cnp.PyArray_ISBEHAVED_RO(array):
        return False
    for part in range(2):
        first, last = (0, axis) if part == 0 else (axis + 1, cnp.PyArray_NDIM(array))
        found[part] = 0
        expected = 0
        for k in range(last - 1, first - 1, -1):
            if cnp.PyArray_DIM(array, k) == 1:
                continue
            stride = cnp.PyArray_STRIDE(array, k)
            if stride % itemsize != 0:
                return False
            if expected == 0 and found[part] == 0:
                found[part] = stride // itemsize
            elif stride != expected:
                return False
            expected = stride * cnp.PyArray_DIM(array, k)
            if expected == 0 and k > first:      # broadcast along this dimension: no stride fits the next
                return False
    if cnp.PyArray_STRIDE(array, axis) % itemsize != 0:
        return False
    description.data = cnp.PyArray_DATA(array)
    description.storage = <Storage>storage_of(array)
    description.outer = found[0]
    description.classes = cnp.PyArray_STRIDE(array, axis) // itemsize
    description.inner = found[1]
    return True


cdef cnp.ndarray readable(cnp.ndarray array, int axis, ClassArray* description):
    """`array`, or a copy of it in C order, described."""
    if describe(array, axis, description):
        return array
    array = np.array(array, native_dtype(array), order="C", subok=False)
    describe(array, axis, description)
    return array


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
    cdef char* a_data = <char*>cnp.PyArray_DATA(a)
    cdef char* b_data = <char*>cnp.PyArray_DATA(b)
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


cdef cnp.ndarray checked_output(object out, str name, tuple shape, object dtype, dict inputs, object in_place):
    # in_place   the input that `out` may be, all of it; or None
    if not isinstance(out, np.ndarray) or isinstance(out, (np.ma.MaskedArray, np.matrix)):
        raise TypeError(f"{name} must be a numpy.ndarray, got {type(out).__name__}")
    cdef cnp.ndarray array = out
    if out.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {out.shape}")
    if array.dtype != dtype or not array.dtype.isnative:
        raise ValueError(f"{name} must have dtype {dtype}, got {array.dtype}")
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name} is read-only")
    if overlaps_itself(array):
        raise ValueError(f"{name} has elements that overlap each other in memory: strides {out.strides} for shape {shape}")
    for other_name, other in inputs.items():
        if other is not None and isinstance(other, np.ndarray):
            if other_name == in_place and same_elements(array, other):
                continue
            if share_memory(array, other):
                raise ValueError(f"{name} overlaps {other_name} in memory")
    return array


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


cdef object rounded_scalar(double value, object dtype):
    cdef float single = <float>value
    if dtype is float32:
        return PyArray_Scalar(&single, dtype, NULL)
    if dtype is float64:
        return PyArray_Scalar(&value, dtype, NULL)
    with np.errstate(all="ignore"):
        return np.float64(value).astype(dtype)


# The call

cdef class Call:
    """A checked call: run it with a kernel module's `run`, then take `loss()` and `gradient()`."""

    def loss(self):
        """The reduced loss: a NumPy scalar, an array for reduction "none", or `out`."""
        cdef const double* loss = <const double*>cnp.PyArray_DATA(self.loss_array)
        cdef Py_ssize_t n = cnp.PyArray_SIZE(self.loss_array), i
        cdef double sums[8]
        cdef double total
        if self.reduction == NONE:
            result = rounded(self.loss_array, self.loss_dtype).reshape(self.loss_shape)
            if self.loss_out is not None:
                np.copyto(self.loss_out, result)
                return self.loss_out
            return result[()]
        # Eight sums in a fixed order: as fast as memory, and the same whatever the threads and the layout were.
        for i in range(8):
            sums[i] = 0.0
        for i in range(n):
            sums[i & 7] += loss[i]
        total = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))
        if self.reduction == MEAN:
            total = self.empty_value if self.nothing_to_average else total / self.divisor
        result = rounded_scalar(total, self.loss_dtype)
        if self.loss_out is not None:
            self.loss_out[...] = result
            return self.loss_out
        return result

    def gradient(self):
        """The array that the kernels have filled: a gradient, or the result of softmax and log_softmax."""
        output, self.output = self.output, None
        if self.computed is not None:
            np.copyto(output, self.computed)
            self.computed = None
        return output

    def prepare_backward(self, grad_output):
        """Make this call, which has been run with keep_state, compute the gradient."""
        set_grad_output(self, grad_output)
        # Described anew: settle() sees arrays as they are in memory.
        describe(self.read_logits, self.axis, &self.problem.logits)
        if self.read_soft is not None:
            describe(self.read_soft, self.axis, &self.problem.soft)
        set_gradient(self, None)
        self.problem.have_state = True
        self.problem.loss = NULL


cdef int set_grad_output(Call call, object grad_output) except -1:
    cdef cnp.ndarray array
    call.problem.grad_output = NULL
    call.problem.grad_scale = 1.0
    if grad_output is not None:
        array = as_doubles(grad_output, "grad_output")
        if array.ndim == 0:
            call.problem.grad_scale = array.item()
        elif call.reduction != NONE:
            raise ValueError(f"grad_output must be a scalar unless reduction='none', got shape {(<object>array).shape}")
        elif (<object>array).shape != call.loss_shape:
            raise ValueError(f"grad_output must have shape {call.loss_shape}, got {(<object>array).shape}")
        else:
            call.problem.grad_output = <const double*>cnp.PyArray_DATA(array)
            call.grad_output = array
    if call.reduction == MEAN:
        call.problem.grad_scale = call.problem.grad_scale / call.divisor
    return 0


cdef int set_gradient(Call call, object grad_out) except -1:
    # Decides where the gradient is written: grad_out, a fresh array laid out like the logits, or by way of a temporary.
    cdef Problem* p = &call.problem
    cdef cnp.ndarray output, computed
    if grad_out is None:
        output = call.logits
        if cnp.PyArray_ISCARRAY_RO(output):
            grad_out = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(output), cnp.PyArray_DIMS(output), cnp.PyArray_TYPE(output), 0)
        else:
            grad_out = np.empty_like(output, dtype=native_dtype(output), subok=False)
    output = grad_out
    call.output = output
    call.computed = None
    if not describe(output, call.axis, &p.grad):
        computed = np.empty((<object>output).shape, output.dtype)
        describe(computed, call.axis, &p.grad)
        call.computed = computed
    return settle(call)


cdef int settle(Call call) except -1:
    # Last step of every call: the shape (outer, classes, inner), and a scratch where the kernels need one.
    cdef Problem* p = &call.problem
    cdef ClassArray* arrays[3]
    cdef bint one_stride = True, across = True
    cdef int k
    cdef Py_ssize_t size
    cdef tuple shape = (<object>call.logits).shape
    cdef cnp.ndarray scratch, parts
    arrays[0], arrays[1], arrays[2] = &p.logits, &p.soft, &p.grad
    p.outer = p.inner = 1
    for k in range(len(shape)):
        if k < call.axis:
            p.outer *= shape[k]
        elif k > call.axis:
            p.inner *= shape[k]
    p.classes = shape[call.axis]
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
    p.rows_together = max(<Py_ssize_t>1, min(<Py_ssize_t>ROWS, BLOCK // max(p.classes, 1)))
    if across:
        p.rows_together = max(<Py_ssize_t>LANES, p.rows_together // LANES * LANES)
    size = p.classes * p.rows_together            # what these take in a scratch
    p.keep = p.grad.data != NULL and (not across or size <= 4 * BLOCK)
    p.stream = (
        p.grad.data != NULL and p.grad.data != p.logits.data
        and p.outer * p.inner * p.classes * cnp.PyArray_ITEMSIZE(call.logits) >= STREAM_BYTES
    )
    p.shared = (
        p.num_threads > 1 and not across and p.outer * p.inner < min(4 * p.num_threads, <int>LANES)
        and p.classes >= CLASSES_WORTH_SHARING
    )
    # Pages that the kernels do not come to use are never touched.
    scratch = new_array((1 if p.shared else p.num_threads) * 3 * size, cnp.NPY_FLOAT64 if p.is_double else cnp.NPY_FLOAT32)
    p.scratch = cnp.PyArray_DATA(scratch)
    p.scratch_size = size
    call.scratch = scratch
    if p.shared:
        parts = new_array(2 * (p.classes // SEGMENT + 1), cnp.NPY_FLOAT64)
        p.parts = <double*>cnp.PyArray_DATA(parts)
        call.parts = parts
    return 0


def cross_entropy(
    logits, target, weight, ignore_index, reduction, label_smoothing, axis, sample_weight, normalizer, z_loss, empty, out,
    num_threads, *, grad_output=None, grad_out=None, want_gradient=False, keep_state=False, bint nll=False,
):
    """Check the arguments of pyx_xent.cross_entropy and cross_entropy_with_grad; -> Call.

    nll=True: those of nll_loss, `logits` being log-probabilities.
    """
    cdef Call call = Call()
    cdef Problem* p = &call.problem
    cdef str logits_name = "log_probs" if nll else "logits"
    cdef cnp.ndarray x = as_floating(logits, logits_name)
    cdef cnp.ndarray y = as_array(target, "target")
    cdef cnp.ndarray array
    cdef tuple shape = (<object>x).shape, target_shape = (<object>y).shape
    cdef Py_ssize_t classes, positions, live, i
    cdef Labels labels
    cdef int64_t ignored
    cdef bint soft
    cdef object dtype = native_dtype(x)
    cdef object weights = None, samples = None

    p.operation = NLL if nll else CROSS_ENTROPY
    call.axis = class_axis(axis, x.ndim, logits_name)
    classes = shape[call.axis]
    call.reduction = checked_reduction(reduction)
    p.label_smoothing = checked_smoothing(label_smoothing)
    p.z_loss = as_double(z_loss, "z_loss")
    if not 0.0 <= p.z_loss < INFINITY:
        raise ValueError(f"z_loss must be finite and not negative, got {z_loss}")
    if empty not in ("nan", "zero", "raise"):
        raise ValueError(f"empty must be 'nan', 'zero' or 'raise', got {empty!r}")
    if normalizer is not None and call.reduction != MEAN:
        raise ValueError(f"normalizer replaces the divisor of reduction='mean', got reduction={reduction!r}")
    if weight is not None:
        weights = checked_weight(weight, classes)
    ignored = checked_ignore_index(ignore_index)

    soft = target_shape == shape and not nll
    call.loss_dtype = dtype
    if soft:
        if y.dtype.kind != "f" and storage_of(y) != BFLOAT16:
            raise TypeError(f"Expected floating point type for target with class probabilities, got {y.dtype.name}")
        if ignored >= 0:
            raise ValueError("ignore_index is not supported for floating point target")
        call.loss_shape = shape_without(shape, call.axis)
        for other in (y,) if weights is None or weights.dtype.kind in "iub" else (y, weights):
            if storage_of(other) < 0:
                raise TypeError(f"logits, target and weight must promote to float32 or float64, got {other.dtype}")
            call.loss_dtype = promoted(call.loss_dtype, native_dtype(other))
    else:
        check_target_shape(target_shape, shape, call.axis, axis is not None)
        call.loss_shape = shape_without(shape, call.axis)

    positions = 1
    for i in range(x.ndim):
        if i != call.axis:
            positions *= cnp.PyArray_DIM(x, i)
    if sample_weight is not None:
        samples = as_doubles(sample_weight, "sample_weight")
        if samples.shape != call.loss_shape and (soft or samples.shape != target_shape):
            raise ValueError(f"sample_weight must have shape {call.loss_shape}, got {samples.shape}")

    if soft:
        live = positions if classes else 0
    else:
        labels = checked_labels(y, classes, ignored)
        live = labels.live
        call.target = labels.array
        p.target = <const int64_t*>cnp.PyArray_DATA(labels.array)

    if out is not None or grad_out is not None:
        inputs = {
            logits_name: x, "target": y, "weight": weight, "sample_weight": sample_weight, "grad_output": grad_output,
        }
        if out is not None:
            call.loss_out = checked_output(
                out, "out", call.loss_shape if call.reduction == NONE else (), call.loss_dtype, inputs, None
            )
            inputs["out"] = out
        if grad_out is not None:
            checked_output(grad_out, "grad_out", shape, dtype, inputs, logits_name)

    p.is_double = call.loss_dtype is float64
    if weights is not None:
        array = np.array(weights, float64 if p.is_double else float32, order="C")
        p.weight = cnp.PyArray_DATA(array)
        weights = array
    if samples is not None:
        p.sample_weight = <const double*>cnp.PyArray_DATA(samples)
    call.divisor = 1.0
    if call.reduction == MEAN:
        call.divisor = as_double(normalizer, "normalizer") if normalizer is not None else counted(p, positions, live)
        call.nothing_to_average = live == 0 and normalizer is None
        call.empty_value = 0.0 if empty == "zero" else NAN
        if call.nothing_to_average and empty == "raise":
            raise ValueError("no row to average: the batch is empty or all its targets are ignore_index")

    p.num_threads = threads_for(num_threads, positions * classes)
    call.logits = x
    call.loss_array = new_array(positions, cnp.NPY_FLOAT64) if classes else np.zeros(positions)
    p.loss = <double*>cnp.PyArray_DATA(call.loss_array)
    call.read_logits = readable(x, call.axis, &p.logits)
    if soft:
        call.read_soft = readable(y, call.axis, &p.soft)
    call.memory = (weights, samples)
    if keep_state:
        array = np.empty((2, positions))
        p.row_max = <double*>cnp.PyArray_DATA(array)
        p.row_others = p.row_max + positions
        call.memory += (array,)
    set_grad_output(call, grad_output)
    if want_gradient:
        set_gradient(call, grad_out)
    else:
        settle(call)
    return call


cdef double counted(const Problem* p, Py_ssize_t positions, Py_ssize_t live):
    # The divisor D of SPEC S15, S16, S23.
    cdef double total = 0.0, one
    cdef Py_ssize_t i
    if p.sample_weight == NULL and (p.weight == NULL or p.target == NULL):
        return live
    for i in range(positions):
        if p.target != NULL and p.target[i] < 0:
            continue
        one = p.sample_weight[i] if p.sample_weight != NULL else 1.0
        if p.weight != NULL and p.target != NULL:
            one *= (<const double*>p.weight)[p.target[i]] if p.is_double else (<const float*>p.weight)[p.target[i]]
        total += one
    return total


def softmax(x, axis, out, num_threads, bint logarithm):
    """Check the arguments of pyx_xent.softmax and log_softmax; -> Call."""
    cdef Call call = Call()
    cdef Problem* p = &call.problem
    cdef cnp.ndarray array = as_floating(x, "x")
    cdef object dtype = native_dtype(array)
    p.operation = LOG_SOFTMAX if logarithm else SOFTMAX
    call.axis = checked_axis(axis, array.ndim)
    if out is not None:
        checked_output(out, "out", (<object>array).shape, dtype, {"x": array}, None)
    p.is_double = dtype is float64
    p.num_threads = threads_for(num_threads, cnp.PyArray_SIZE(array))
    call.logits = array
    call.read_logits = readable(array, call.axis, &p.logits)
    set_gradient(call, out)
    return call


def softmax_backward(grad_output, output, axis, out, num_threads, bint logarithm):
    """Check the arguments of pyx_xent.softmax_backward and log_softmax_backward; -> Call."""
    cdef Call call = Call()
    cdef Problem* p = &call.problem
    cdef cnp.ndarray array = as_floating(output, "output")
    cdef cnp.ndarray g = as_floating(grad_output, "grad_output")
    cdef object dtype = native_dtype(array)
    if (<object>g).shape != (<object>array).shape:
        raise ValueError(f"grad_output must have the shape of output, {(<object>array).shape}, got {(<object>g).shape}")
    if native_dtype(g) != dtype:
        raise TypeError(f"grad_output must have the dtype of output, {dtype.name}, got {g.dtype.name}")
    p.operation = LOG_SOFTMAX_BACKWARD if logarithm else SOFTMAX_BACKWARD
    call.axis = checked_axis(axis, array.ndim)
    if out is not None:
        checked_output(out, "out", (<object>array).shape, dtype, {"output": array, "grad_output": g}, None)
    p.is_double = dtype is float64
    p.num_threads = threads_for(num_threads, cnp.PyArray_SIZE(array))
    call.logits = array
    call.read_logits = readable(array, call.axis, &p.logits)
    call.read_soft = readable(g, call.axis, &p.soft)
    set_gradient(call, out)
    return call
