# Class indices: their shape, the private copy that is checked and computed with, and which rows count.

cdef enum:
    LABELS_AT_ONCE = 512          # checked while they are in the nearest cache


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


cdef int check_target_shape(cnp.ndarray target, cnp.ndarray logits, int axis, bint axis_given, str if_last) except -1:
    cdef tuple shape, logits_shape, expected
    if is_one_per_row(target, logits, axis):
        return 0
    shape, logits_shape = (<object>target).shape, (<object>logits).shape
    if len(logits_shape) == 1 and shape == (1,):
        return 0
    expected = shape_without(logits_shape, axis)
    if shape == (*expected, 1):
        raise ValueError(f"Expected target size {expected}, got {shape}: target.squeeze(-1) has it")
    if not axis_given and shape == logits_shape[:-1]:
        raise ValueError(f"Expected target size {expected}, got {shape}: class axis is 1; {if_last}")
    if not axis_given and expected and shape and shape[0] != expected[0]:
        raise ValueError(f"Expected input batch_size ({expected[0]}) to match target batch_size ({shape[0]}).")
    raise ValueError(f"Expected target size {expected}, got {shape}")


cdef inline uint64_t is_not(uint64_t a, uint64_t b) noexcept nogil:
    # 1 or 0, without a branch
    return ((a ^ b) | (0 - (a ^ b))) >> 63


cdef Py_ssize_t copy_labels(
    const int64_t* target, Py_ssize_t n, Py_ssize_t classes, int64_t ignored,
    int64_t* label,                           # out  (n,)  the copy
    Py_ssize_t* live,                         # in/out   how many are neither ignored nor bad
) noexcept nogil:
    # -> how many are bad. Without a branch, so in vectors: on uint64, where a difference wraps and its top bit is its sign. Mostly
    # all are classes, which takes half as long to find out as how many are not.
    cdef uint64_t y, valid, other, all_valid, lives = 0, others = 0
    cdef Py_ssize_t first, i, size
    cdef bint ignores_a_class = 0 <= ignored < classes
    for first from 0 <= first < n by LABELS_AT_ONCE:
        size = min(LABELS_AT_ONCE, n - first)
        memcpy(label + first, target + first, size * sizeof(int64_t))
        all_valid = ~<uint64_t>0
        for i in range(first, first + size):
            y = <uint64_t>label[i]
            all_valid &= ~y & (y - <uint64_t>classes)
        if all_valid >> 63 and not ignores_a_class:
            lives += size
            others += size
            continue
        for i in range(first, first + size):
            y = <uint64_t>label[i]
            valid = (~y & (y - <uint64_t>classes)) >> 63     # 1 if 0 <= y < classes
            other = is_not(y, <uint64_t>ignored)
            lives += valid & other
            others += other
    live[0] += <Py_ssize_t>lives
    return <Py_ssize_t>(others - lives)


cdef Py_ssize_t set_labels(
    Call call,
    int64_t* label,                           # out  (rows,)  memory of our own: the labels, -1 where ignored
    int64_t ignored,
) except -1:
    # -> how many are not ignored. Each label of call.target, of any shape and integer dtype, is read exactly once.
    cdef cnp.ndarray target = call.target, flat = target
    cdef Py_ssize_t n = call.rows, first, i = 0, live = 0, bad = 0
    cdef bint is_uint64 = cnp.PyTypeNum_ISUNSIGNED(cnp.PyArray_TYPE(target)) and cnp.PyArray_ITEMSIZE(target) == 8
    if not cnp.PyTypeNum_ISINTEGER(cnp.PyArray_TYPE(target)):
        raise_no_integers(target)
    if cnp.PyArray_TYPE(target) != cnp.NPY_INT64 or not cnp.PyArray_ISCARRAY_RO(target):
        flat = copied(target, int64)
    for first from 0 <= first <= n by COPIED_AT_ONCE:
        if cnp.PyArray_TYPE(flat) != cnp.NPY_INT64 or not cnp.PyArray_ISCARRAY_RO(flat) or cnp.PyArray_SIZE(flat) != n:
            # Another thread, or a signal handler, has set its dtype or shape.
            raise ValueError(
                f"target has changed since its shape was checked: expected {n} labels, got {cnp.PyArray_SIZE(flat)}"
            )
        bad += copy_labels(
            <const int64_t*>cnp.PyArray_DATA(flat) + first, min(<Py_ssize_t>COPIED_AT_ONCE, n - first), call.classes, ignored,
            label + first, &live,
        )
        if n > COPIED_AT_ONCE:
            PyErr_CheckSignals()
    if is_uint64:
        for i in range(n):                        # what int64 cannot hold is negative now, and may look like ignore_index
            bad += label[i] < 0
    if bad > 0:
        for i in range(n):
            if (label[i] != ignored or (is_uint64 and label[i] < 0)) and not 0 <= label[i] < call.classes:
                break
        raise_bad_label(call, i, <object><uint64_t>label[i] if is_uint64 else <object>label[i], ignored)
    if live < n:
        for i in range(n):
            label[i] = <int64_t>(<uint64_t>label[i] | (is_not(<uint64_t>label[i], <uint64_t>ignored) - 1))
    return live


cdef int raise_no_integers(cnp.ndarray target) except -1:
    cdef str hint = ""
    if target.dtype.kind == "f":
        bad = np.flatnonzero(~(target == np.floor(target)))
        if bad.size:
            hint = f": {position_in(target, bad[0], False)} is {target.reshape(-1)[bad[0]]}"
    elif target.dtype.kind in "OSU":
        hint = ": numpy.unique(target, return_inverse=True)[1] numbers the classes"
    raise TypeError(f"Expected an integer dtype for target with class indices, got {target.dtype.name}{hint}")


cdef str position_in(cnp.ndarray target, Py_ssize_t i, bint shifted):
    # shifted: SPEC S25, where it is in the caller's array
    cdef tuple shape = (<object>target).shape
    cdef list position = [int(k) for k in np.unravel_index(i, shape)] if shape else []
    if shifted:
        position[-1] += 1
    return f"target[{', '.join(str(k) for k in position)}]" if shape else "target"


cdef int raise_bad_label(Call call, Py_ssize_t i, object label, int64_t ignored) except -1:
    where = position_in(call.target, i, call.shifted)
    raise IndexError(
        f"Target {label} is out of bounds. ({where}; valid range is [0, {call.classes}) or ignore_index={ignored})"
    )


cdef Py_ssize_t set_unweighted(
    Call call,
    int64_t* label,                           # in/out  (rows,)  -1 where inert, now also where the sample weight is 0; NULL: none
) except -1:
    # SPEC S28. -> how many rows are not inert.
    cdef const double* weight = doubles(call.row_weight, call.rows)
    cdef Py_ssize_t i, live = 0
    for i in range(call.rows):
        if label == NULL:
            live += weight[i] != 0
        else:
            label[i] = -1 if weight[i] == 0 else label[i]
            live += label[i] >= 0
    return live


cdef inline double weight_of(const Problem* p, int64_t label) noexcept nogil:
    return (<const double*>p.options.weight)[label] if p.is_double else (<const float*>p.options.weight)[label]


cdef bint every_class_weighs_nothing(const Problem* p, const int64_t* label, Py_ssize_t rows) noexcept nogil:
    # SPEC S24: is the class weight of every row that is not inert exactly 0?
    cdef Py_ssize_t i
    for i in range(rows):
        if label[i] >= 0 and weight_of(p, label[i]) != 0:
            return False
    return True


cdef double counted(Call call, const int64_t* label, Py_ssize_t live) except? -1.0:
    # The divisor D of SPEC S15, S16, S23.
    cdef const Problem* p = &call.problem
    cdef bint of_classes = p.options.weight != NULL and label != NULL
    cdef const double* sample_weight = NULL
    cdef Environment environment
    cdef double total = 0.0, one
    cdef Py_ssize_t i
    if call.row_weight is None and not of_classes:
        return live
    if call.row_weight is not None:
        sample_weight = doubles(call.row_weight, call.rows)
    environment = enter_environment()
    for i in range(call.rows):
        if label == NULL or label[i] >= 0:
            one = sample_weight[i] if sample_weight != NULL else 1.0
            total += one * weight_of(p, label[i]) if of_classes else one
    leave_environment(environment, &total)
    return total
