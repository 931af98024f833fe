# Rows handed to threads: the only place with prange, and the only functions that Python sees.
#
# A row's result depends on nothing but the row, so any split among threads gives the same bits. Four ways to reach a row,
# by what lies side by side in memory: the classes (rows.pxi), the rows (tiles.pxi), or neither, or few classes: then rows
# go through a small scratch.

from cython.parallel cimport prange, threadid

from pyx_xent._arguments cimport Call


cdef inline void do_row(
    const Problem* p, Py_ssize_t position, const floating* x, const floating* soft, floating* grad
) noexcept nogil:
    if p.operation == CROSS_ENTROPY:
        row_cross_entropy(p, position, x, soft, grad)
    elif p.operation == SOFTMAX:
        row_softmax(x, p.classes, grad)
    elif p.operation == LOG_SOFTMAX:
        row_log_softmax(x, p.classes, grad)
    else:
        row_backward(p.operation, x, soft, p.classes, grad)


cdef inline void do_tile(
    const Problem* p, Py_ssize_t position, int rows,
    const floating* x, Py_ssize_t stride,
    const floating* soft, Py_ssize_t soft_stride,
    floating* grad, Py_ssize_t grad_stride,
) noexcept nogil:
    if p.operation == CROSS_ENTROPY:
        tile_cross_entropy(p, position, rows, x, stride, soft, soft_stride, grad, grad_stride)
    elif p.operation == SOFTMAX or p.operation == LOG_SOFTMAX:
        tile_softmax(p, x, stride, grad, grad_stride)
    else:
        tile_backward(p, x, stride, soft, soft_stride, grad, grad_stride)


cdef inline floating* at(const ClassArray* array, Py_ssize_t outer, Py_ssize_t inner, floating kind) noexcept nogil:
    if array.data == NULL:
        return NULL
    return <floating*>array.data + outer * array.outer + inner * array.inner


cdef inline bint lies_along(const ClassArray* array, bint classes) noexcept nogil:
    # Are the classes (else: the rows) next to each other? An absent array agrees with anything.
    return array.data == NULL or (array.classes if classes else array.inner) == 1


cdef inline void gather(
    const floating* array, Py_ssize_t class_stride, Py_ssize_t row_stride, Py_ssize_t classes, int rows, int width,
    floating* scratch,                        # out  (classes, width), width >= rows: the rest is 0
) noexcept nogil:
    cdef Py_ssize_t c
    cdef int l
    for c in range(classes):
        for l in range(rows):
            scratch[c * width + l] = array[c * class_stride + l * row_stride]
        for l in range(rows, width):
            scratch[c * width + l] = 0


cdef inline void scatter(
    const floating* scratch, Py_ssize_t classes, int rows, int width,
    floating* array, Py_ssize_t class_stride, Py_ssize_t row_stride,
) noexcept nogil:
    cdef Py_ssize_t c
    cdef int l
    for l in range(rows):
        for c in range(classes):
            array[c * class_stride + l * row_stride] = scratch[c * width + l]


cdef void do_slice(
    const Problem* p, Py_ssize_t position, Py_ssize_t end,     # in   these positions
    floating* scratch,                        # (3 * max(classes, LANES * FEW_CLASSES),) or NULL if never needed
) noexcept nogil:
    cdef bint along_classes = lies_along(&p.logits, True) and lies_along(&p.soft, True) and lies_along(&p.grad, True)
    cdef bint along_rows = lies_along(&p.logits, False) and lies_along(&p.soft, False) and lies_along(&p.grad, False)
    cdef bint few = p.classes <= FEW_CLASSES
    cdef Py_ssize_t third = p.scratch_size // 3, outer, inner, c
    cdef floating* x
    cdef floating* soft
    cdef floating* grad
    cdef floating* soft_scratch
    cdef floating* grad_scratch
    cdef int rows, width
    while position < end:
        outer = position // p.inner
        inner = position - outer * p.inner
        x = at[floating](&p.logits, outer, inner, 0)
        soft = at[floating](&p.soft, outer, inner, 0)
        grad = at[floating](&p.grad, outer, inner, 0)
        if p.operation == NLL:
            row_nll(p, position, x, grad)
            position += 1
            continue
        rows = <int>min(<Py_ssize_t>LANES, p.inner - inner, end - position)
        if along_rows and rows == LANES:
            do_tile(p, position, rows, x, p.logits.classes, soft, p.soft.classes, grad, p.grad.classes)
            position += rows
            continue
        if not few:
            rows = 1
            if p.operation == CROSS_ENTROPY and p.target != NULL and p.target[position] < 0:
                ignore_row(p, position)
                if grad != NULL:
                    for c in range(p.classes):
                        grad[c * p.grad.classes] = 0
                position += 1
                continue
            if along_classes:
                do_row(p, position, x, soft, grad)
                position += 1
                continue
        width = LANES if few else 1
        soft_scratch = scratch + third if soft != NULL else NULL
        grad_scratch = scratch + 2 * third if grad != NULL else NULL
        gather(x, p.logits.classes, p.logits.inner, p.classes, rows, width, scratch)
        if soft != NULL:
            gather(soft, p.soft.classes, p.soft.inner, p.classes, rows, width, soft_scratch)
        if few:
            do_tile(p, position, rows, scratch, LANES, soft_scratch, LANES, grad_scratch, LANES)
        else:
            do_row(p, position, scratch, soft_scratch, grad_scratch)
        if grad != NULL:
            scatter(grad_scratch, p.classes, rows, width, grad, p.grad.classes, p.grad.inner)
        position += rows


cdef void do_numbered_slice(const Problem* p, Py_ssize_t slice_size, Py_ssize_t number, int thread) noexcept nogil:
    cdef Py_ssize_t first = number * slice_size
    cdef Py_ssize_t end = min(first + slice_size, p.outer * p.inner)
    if p.is_double:
        do_slice[double](p, first, end, <double*>p.scratch + thread * p.scratch_size)
    else:
        do_slice[float](p, first, end, <float*>p.scratch + thread * p.scratch_size)


def run(Call call):
    """Compute what `call` describes; nothing can fail any more."""
    cdef const Problem* p = &call.problem
    cdef Py_ssize_t positions = p.outer * p.inner
    # Eight slices a thread even out ignored rows and a busy core; whole tiles but for the last.
    cdef Py_ssize_t slice_size = (positions + 8 * p.num_threads - 1) // (8 * p.num_threads)
    cdef Py_ssize_t slices, number
    if positions == 0 or p.classes == 0:
        return
    if p.num_threads == 1:
        with nogil:
            do_numbered_slice(p, positions, 0, 0)
        return
    if slice_size > LANES:
        slice_size = (slice_size + LANES - 1) // LANES * LANES
    slices = (positions + slice_size - 1) // slice_size
    for number in prange(slices, nogil=True, num_threads=p.num_threads, schedule="dynamic", chunksize=1):
        do_numbered_slice(p, slice_size, number, threadid())
