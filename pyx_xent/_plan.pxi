# How to compute what the Problem describes: how rows and classes lie for the kernels, how many rows together, threads, scratch,
# stores past the caches. Every tuning constant of a call is here.

# A gradient of this size will not be found in a cache: it is stored past them.
cdef Py_ssize_t STREAM_BYTES = 1 << 25
# The exponentials of longer rows are computed twice, rather than kept in memory as large as the row.
cdef Py_ssize_t KEPT_CLASSES = 1 << 20
# So many classes of a row are worth waking threads for.
cdef Py_ssize_t CLASSES_WORTH_SHARING = 4 * SEGMENT


cdef int threads_for(object num_threads, Py_ssize_t elements) except -1:
    # in   num_threads   from _threads.checked
    if num_threads is None and elements < 2 * <Py_ssize_t>_threads.ELEMENTS_WORTH_A_THREAD:
        return 1  # what _threads would say, without asking
    return _threads.for_work(num_threads, elements)


cdef bint is_read_in_place(const Problem* p, const ClassArray* array) noexcept:
    # Or written; an absent one needs no scratch, either.
    return array.data == NULL or (array.classes == 1 and array.storage == (FLOAT64 if p.is_double else FLOAT32))


cdef int plan(
    Call call,                                    # in/out  its problem has threads, pointers and shape (outer, classes, inner)
    Py_ssize_t itemsize,                          # of a logit
) except -1:
    # Last step of every call. It allocates arrays without Python code: see set_pointers.
    cdef Problem* p = &call.problem
    cdef ClassArray* arrays[3]
    cdef bint one_stride = True, across = True
    cdef int k
    cdef Py_ssize_t size, rows
    cdef cnp.ndarray scratch, parts
    arrays[0], arrays[1], arrays[2] = &p.logits, &p.soft, &p.grad
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
        and p.outer * p.inner * p.classes * itemsize >= STREAM_BYTES
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
