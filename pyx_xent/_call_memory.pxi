# Memory: copies, strides, what may be written, the pointers of a Problem, and results in their dtype.

cdef Py_ssize_t LARGE = _memory.LARGE
cdef enum:
    COPIED_AT_ONCE = 1 << 24      # elements that are copied before Ctrl-C is heard


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


cdef bint is_doubles(cnp.ndarray array) noexcept:
    return cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64 and cnp.PyArray_ISCARRAY_RO(array)


cdef cnp.ndarray as_doubles(cnp.ndarray array):
    # The array, or a copy: native, aligned and C-contiguous. A longdouble is rounded to the nearest, whatever the caller's mode.
    cdef Environment environment
    if is_doubles(array):
        return array
    environment = enter_environment()
    try:
        return copied(array, float64)
    finally:
        leave_environment(environment, NULL)


cdef const double* doubles(object array, Py_ssize_t size) except NULL:
    # The memory of an array from as_doubles, which others may have changed since.
    if not is_doubles(array) or cnp.PyArray_SIZE(array) != size:
        raise_changed()
    return <const double*>cnp.PyArray_DATA(array)


cdef int raise_changed() except -1:
    raise ValueError("the shape of an array has changed since it was checked")


cdef bint has_shape(cnp.ndarray array, tuple shape) except -1:
    cdef Py_ssize_t k
    if cnp.PyArray_NDIM(array) != len(shape):
        return False
    for k in range(len(shape)):
        if cnp.PyArray_DIM(array, k) != <Py_ssize_t>shape[k]:
            return False
    return True


# Strides

cdef bint describe(cnp.ndarray array, int axis, Strided* description) except -1:
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
    cdef Strided description
    if describe(array, axis, &description):
        return array
    return copied(array, native_dtype(array))


# Outputs

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


cdef int check_output(
    cnp.ndarray out, str name, tuple shape, object dtype,
    tuple names, tuple inputs,                # in   arrays that it must not overlap, or None
    bint in_place,                            # in   `out` may be the first of them, all of it
) except -1:
    cdef Py_ssize_t k
    if not has_shape(out, shape):
        raise ValueError(f"{name} must have shape {shape}, got {(<object>out).shape}")
    if out.dtype is not dtype and (out.dtype != dtype or not out.dtype.isnative):
        raise ValueError(f"{name} must have dtype {dtype}, got {out.dtype}")
    if not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError(f"{name} is read-only")
    if overlaps_itself(out):
        raise ValueError(
            f"{name} has elements that overlap each other in memory: strides {(<object>out).strides} for shape {shape}"
        )
    for k in range(len(inputs)):
        if inputs[k] is None or (in_place and k == 0 and same_elements(out, inputs[k])):
            continue
        if share_memory(out, inputs[k]):
            raise ValueError(f"{name} overlaps {names[k]} in memory")
    return 0


def checked_output(out, str name, tuple shape, dtype, tuple names, tuple inputs):
    """`out` as an array of NumPy's own class; an error unless it has this shape and dtype, can be written, and overlaps no input.

    inputs: arrays of NumPy's own class, or None.
    """
    cdef cnp.ndarray array = as_output(out, name)
    check_output(array, name, shape, dtype, names, inputs, False)
    return array


cdef object laid_out_like(cnp.ndarray x):
    if cnp.PyArray_NBYTES(x) >= LARGE:
        return _memory.empty_like(x, native_dtype(x))
    if cnp.PyArray_ISCARRAY_RO(x) and cnp.PyArray_TYPE(x) != cnp.NPY_UINT16:         # bfloat16_bits is more than its type
        return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)
    return np.empty_like(x, dtype=native_dtype(x), subok=False)


cdef object written_for(cnp.ndarray out, int axis):
    # `out`, or a temporary in its place, where the kernels cannot write to its memory.
    cdef Strided description
    return out if describe(out, axis, &description) else _memory.empty((<object>out).shape, out.dtype)


cdef object copied_back(object computed, object out, object result):
    # in   computed   from written_for
    # -> `result`, which is `out` as the caller gave it
    if computed is not out:
        np.copyto(out, computed)
    return result


cdef int set_gradient(Call call) except -1:
    # Decides where the gradient is written: grad_out, or a fresh array laid out like the logits.
    if call.grad_out is None:
        call.grad_out = call.gradient_result = laid_out_like(call.logits)
    call.computed = written_for(call.grad_out, call.axis)
    return 0


cdef int set_hessian(Call call) except -1:
    if call.hess_out is None:
        call.hess_out = call.hessian_result = laid_out_like(call.logits)
    call.computed_hessian = written_for(call.hess_out, call.axis)
    return 0


# The Problem's pointers

cdef bint describe_output(object out, cnp.ndarray x, int axis, Strided* description) except -1:
    # Of None, which is not wanted, nothing is described.
    if out is None:
        return True
    return describe(out, axis, description) and cnp.PyArray_SAMESHAPE(out, x) and cnp.PyArray_ISWRITEABLE(out)


cdef int set_pointers(Call call) except -1:
    # Takes the address, the strides and the shape of every array, all at once: from here to the end of the kernel no Python
    # runs in this thread. What another one did to a shape since it was checked, or a signal handler, is noticed.
    cdef Problem* p = &call.problem
    cdef cnp.ndarray x = call.read_logits
    cdef bint fits = describe(x, call.axis, &p.logits)
    cdef int k
    if call.read_soft is not None:
        fits = fits and describe(call.read_soft, call.axis, &p.other) and cnp.PyArray_SAMESHAPE(call.read_soft, x)
    fits = fits and describe_output(call.computed, x, call.axis, &p.out)
    fits = fits and describe_output(call.computed_hessian, x, call.axis, &p.hessian)
    if not fits or cnp.PyArray_DIM(x, call.axis) != call.classes or rows_of(x, call.axis) != call.rows:
        raise_changed()
    if call.row_weight is not None:
        p.options.sample_weight = doubles(call.row_weight, call.rows)
    if call.row_grad_output is not None:
        p.options.grad_output = doubles(call.row_grad_output, call.rows)
    if call.state is not None:
        p.row_max = <double*>doubles(call.state, 2 * call.rows)
        p.row_total = p.row_max + call.rows
    p.classes = call.classes
    p.outer = p.inner = 1
    for k in range(cnp.PyArray_NDIM(x)):
        if k < call.axis:
            p.outer *= cnp.PyArray_DIM(x, k)
        elif k > call.axis:
            p.inner *= cnp.PyArray_DIM(x, k)
    settle_shape(p)
    return 0


# Results. NumPy's own casts would warn of a loss beyond the range of its dtype, or raise, when the gradient is written already;
# and ml_dtypes rounds a double to bfloat16 by way of float32, so twice.

cdef uint16_t rounded_to_bfloat16(double value) noexcept nogil:
    # To the nearest, ties to even. The float between is rounded to odd: no digit that decides is lost.
    cdef float single = <float>value
    cdef uint32_t bits
    memcpy(&bits, &single, sizeof(float))
    if value != value:
        return <uint16_t>(bits >> 16) | 0x40      # quiet, and no infinity
    if <double>single != value:
        bits = (bits - 1 if fabs(<double>single) > fabs(value) else bits) | 1
    return <uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)


cdef cnp.ndarray rounded(cnp.ndarray values, object dtype):
    # in   values (n,)   float64
    cdef const double* value = <const double*>cnp.PyArray_DATA(values)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(values), first, end, i
    cdef bint is_single = dtype is float32, is_float16 = dtype.kind == "f" and not is_single
    cdef cnp.ndarray result
    cdef void* to
    if dtype is float64:
        return values
    result = new_array(n, cnp.NPY_FLOAT32 if is_single else cnp.NPY_FLOAT16 if is_float16 else cnp.NPY_UINT16)
    to = cnp.PyArray_DATA(result)
    for first from 0 <= first < n by COPIED_AT_ONCE:
        end = min(first + COPIED_AT_ONCE, n)
        if is_single:
            for i in range(first, end):
                (<float*>to)[i] = <float>value[i]
        elif is_float16:
            with np.errstate(all="ignore"):
                result[first:end] = values[first:end]
        else:
            for i in range(first, end):
                (<uint16_t*>to)[i] = rounded_to_bfloat16(value[i])
        if n > COPIED_AT_ONCE:
            PyErr_CheckSignals()
    return result if is_single or is_float16 else (<object>result).view(dtype)


cdef object rounded_scalar(double value, object dtype):
    cdef float single
    cdef cnp.ndarray one
    if dtype is float32:
        single = <float>value
        return PyArray_Scalar(&single, dtype, NULL)
    if dtype is float64:
        return PyArray_Scalar(&value, dtype, NULL)
    one = new_array(1, cnp.NPY_FLOAT64)
    (<double*>cnp.PyArray_DATA(one))[0] = value
    return (<object>rounded(one, dtype))[0]


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
