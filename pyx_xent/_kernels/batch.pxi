# Rows handed to threads, and the only function that Python sees. (The other prange, of threads that share a long row, is in
# work.pxi.)
#
# A row's result depends on nothing but the row, so any split among threads gives the same bits. By what lies side by side in
# memory, rows are computed across the lanes (few classes, or rows next to each other), or one after the other.
# Rows that a kernel cannot read or write where they are (strides, half precision, few classes) go through a scratch.

from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport threadid

from pyx_xent._call cimport SMALL_SCRATCH, Call

cdef enum:
    WORTH_ALIGNING = 1024         # rows side by side, of which a few are worth a tile of their own
    QUICK = 1024                  # so few elements are computed sooner than the GIL is given away and taken back
    BETWEEN_SIGNALS = 1 << 27     # elements, some tenths of a second: then Ctrl-C is heard


cdef inline Storage computed_in(floating compute) noexcept nogil:
    if floating is float:
        return FLOAT32
    else:
        return FLOAT64


cdef inline bint is_direct(const ClassArray* array, Py_ssize_t stride, floating compute) noexcept nogil:
    # Can a kernel work on it where it is? stride: of what has to lie side by side. Absent arrays are like that.
    return array.data == NULL or (stride == 1 and array.storage == computed_in(compute))


cdef void gather(
    const ClassArray* array, const void* data, Py_ssize_t classes, int rows,
    floating* tile,                           # out  (classes, LANES)  what is beyond `rows` is 0
) noexcept nogil:
    cdef Py_ssize_t c, size = size_of(array.storage), row_stride = array.inner
    cdef const floating* x = <const floating*>data
    cdef int l
    if rows == LANES and array.storage == computed_in[floating](0):      # nearly always
        for c in range(classes):
            for l in range(LANES):
                tile[c * LANES + l] = x[l * row_stride]
            x += array.classes
        return
    if rows < LANES:
        memset(tile, 0, classes * LANES * sizeof(floating))
    if array.inner == 1:
        for c in range(classes):
            load(<const char*>data + c * array.classes * size, array.storage, 1, rows, tile + c * LANES, 1)
    else:
        for l in range(rows):
            load(<const char*>data + l * array.inner * size, array.storage, array.classes, classes, tile + l, LANES)


cdef void scatter(
    const floating* tile, const ClassArray* array, void* data, Py_ssize_t classes, int rows
) noexcept nogil:
    cdef Py_ssize_t c, size = size_of(array.storage), row_stride = array.inner
    cdef floating* to = <floating*>data
    cdef int l
    if rows == LANES and array.storage == computed_in[floating](0):
        for c in range(classes):
            for l in range(LANES):
                to[l * row_stride] = tile[c * LANES + l]
            to += array.classes
        return
    if array.inner == 1:
        for c in range(classes):
            store(tile + c * LANES, 1, rows, <char*>data + c * array.classes * size, array.storage, 1)
    else:
        for l in range(rows):
            store(tile + l, LANES, classes, <char*>data + l * array.inner * size, array.storage, array.classes)


cdef void do_across(
    Block* b, Py_ssize_t outer, Py_ssize_t inner, bint direct, floating* scratch
) noexcept nogil:
    cdef const Problem* p = b.problem
    cdef void* x = element(&p.logits, outer, inner)
    cdef void* other = element(&p.soft, outer, inner)
    cdef void* out = element(&p.grad, outer, inner)
    cdef floating* third = scratch + 2 * p.scratch_size
    cdef Py_ssize_t tile = p.classes * LANES, c
    cdef int l
    b.work.across = True
    b.work.stream = False
    b.moved = scratch
    if b.live == 0:
        if out != NULL:
            for c in range(p.classes):
                store_zeros(
                    <char*>out + c * p.grad.classes * size_of(p.grad.storage), p.grad.storage, p.grad.inner, b.rows, False
                )
        return
    b.kept[0] = third if p.keep else NULL
    if direct:
        b.x[0], b.other[0], b.out[0] = x, other, out
        b.next_x = b.next_other = b.next_out = LANES
        b.work.stride, b.work.other_stride, b.work.out_stride = p.logits.classes, p.soft.classes, p.grad.classes
        b.work.stream = p.stream and begins_lines(out, p.grad.classes * size_of(p.grad.storage))
        do_block[floating](b, 0)
        return
    b.x[0], b.other[0], b.out[0] = scratch, NULL, NULL
    b.next_x = b.next_other = b.next_out = tile
    b.work.stride = b.work.other_stride = b.work.out_stride = LANES
    if other != NULL:
        b.other[0] = scratch + p.scratch_size
    if out != NULL:
        b.out[0] = third
    for l from 0 <= l < b.rows by LANES:
        gather(&p.logits, element(&p.logits, outer, inner + l), p.classes, min(b.rows - l, <int>LANES), scratch + l // LANES * tile)
        if other != NULL:
            gather(
                &p.soft, element(&p.soft, outer, inner + l), p.classes, min(b.rows - l, <int>LANES),
                scratch + p.scratch_size + l // LANES * tile,
            )
    do_block[floating](b, 0)
    if out != NULL:
        for l from 0 <= l < b.rows by LANES:
            scatter(
                third + l // LANES * tile, &p.grad, element(&p.grad, outer, inner + l), p.classes, min(b.rows - l, <int>LANES)
            )


cdef void do_along(Block* b, Py_ssize_t outer, Py_ssize_t inner, floating* scratch) noexcept nogil:
    cdef const Problem* p = b.problem
    cdef bint direct_x = is_direct[floating](&p.logits, p.logits.classes, 0)
    cdef bint direct_other = is_direct[floating](&p.soft, p.soft.classes, 0)
    cdef bint direct_out = is_direct[floating](&p.grad, p.grad.classes, 0)
    cdef void* x
    cdef void* other
    cdef void* out
    cdef floating* row
    cdef int l
    b.work.across = False
    b.moved = scratch
    b.work.stream = p.stream and direct_out
    b.work.next = NULL
    for l in range(b.rows):
        x = element(&p.logits, outer, inner + l)
        other = element(&p.soft, outer, inner + l)
        out = element(&p.grad, outer, inner + l)
        row = scratch + l * p.classes
        if b.dead[l] != 0:
            if out != NULL:
                store_zeros(out, p.grad.storage, p.grad.classes, p.classes, p.stream)
            continue
        b.x[l], b.other[l], b.out[l] = x, other, out
        if not direct_x:
            load(x, p.logits.storage, p.logits.classes, p.classes, row, 1)
            b.x[l] = row
        elif b.rows == 1 and p.logits.inner == p.classes:
            b.work.next = <const char*>x + p.classes * sizeof(floating)
        if not direct_other:
            load(other, p.soft.storage, p.soft.classes, p.classes, row + p.scratch_size, 1)
            b.other[l] = row + p.scratch_size
        row += 2 * p.scratch_size
        if not direct_out:
            b.out[l] = row
        # The exponentials wait where the gradient will be, unless the logits are still needed there.
        b.kept[l] = NULL
        if p.keep:
            b.kept[l] = row if b.work.stream or x == out else b.out[l]
        if b.work.pending != NULL:            # those of the row before are in one of two places, by turns
            b.kept[l] = row - p.scratch_size if b.work.pending.kept == row else row
    if b.live > 0:
        do_block[floating](b, 0)
    if not direct_out:
        for l in range(b.rows):
            if b.dead[l] == 0:
                store(<const floating*>b.out[l], 1, p.classes, element(&p.grad, outer, inner + l), p.grad.storage, p.grad.classes)


cdef inline Py_ssize_t rows_to_line(const Problem* p, Py_ssize_t outer, Py_ssize_t inner, floating compute) noexcept nogil:
    # So many that the next tile begins where a line of memory does; a whole block if this one does.
    cdef void* start = element(&p.grad if p.grad.data != NULL else &p.logits, outer, inner)
    cdef Py_ssize_t head = bytes_to_line(start) // <Py_ssize_t>sizeof(floating)
    return head if head > 0 else <Py_ssize_t>ROWS


cdef void do_slice(
    const Problem* p, Py_ssize_t position, Py_ssize_t end,     # in   these positions
    floating* scratch,                        # (3, scratch_size)
) noexcept nogil:
    cdef bint direct = (
        is_direct[floating](&p.logits, p.logits.inner, 0) and is_direct[floating](&p.soft, p.soft.inner, 0)
        and is_direct[floating](&p.grad, p.grad.inner, 0)
    )
    cdef bint across
    cdef Py_ssize_t outer, inner, rows
    cdef Block block
    cdef Pending pending
    cdef int l
    block.problem = p
    block.work.classes = p.classes
    # The gradient of a long row waits for the next row; of doubles in place, which wait for nothing, it need not.
    block.work.pending = NULL
    pending.classes = 0
    pending.kept = NULL
    if (
        p.rows_together == 1 and p.keep and not p.have_state and (p.stream or not p.is_double) and not p.across and not p.shared
        and p.soft.data == NULL
        and is_direct[floating](&p.logits, p.logits.classes, 0) and is_direct[floating](&p.grad, p.grad.classes, 0)
    ):
        block.work.pending = &pending
    while position < end:
        outer = position // p.inner
        inner = position - outer * p.inner
        if p.operation == NLL:
            do_nll[floating](p, position, element(&p.logits, outer, inner), element(&p.grad, outer, inner), 0)
            position += 1
            continue
        rows = min(p.inner - inner, end - position)
        across = p.classes <= FEW_CLASSES or (p.across and rows >= LANES)
        rows = min(rows, p.rows_together)
        if across and rows > LANES:
            rows -= rows % LANES
            if direct and p.inner >= WORTH_ALIGNING:
                rows = min(rows, rows_to_line[floating](p, outer, inner, 0))
        block.position = position
        block.rows = <int>rows
        block.lanes = <int>(rows + LANES - 1) // LANES * LANES
        for l in range(block.lanes):
            block.base[l] = 0
            block.excluded[l] = -1
            block.dead[l] = 1
        if p.target != NULL:
            for l in range(block.rows):
                block.excluded[l] = p.target[position + l]
                block.dead[l] = 1.0 if p.target[position + l] < 0 else 0.0
        else:
            for l in range(block.rows):           # labels of rows without weight are -1; probabilities have no such mark
                block.dead[l] = 1.0 if p.sample_weight != NULL and p.sample_weight[position + l] == 0 else 0.0
        block.live = 0
        for l in range(block.rows):
            block.live += block.dead[l] == 0
        if block.live == 0 and p.operation == CROSS_ENTROPY:
            ignore_rows(&block)
        if across:
            do_across[floating](&block, outer, inner, direct and rows % LANES == 0, scratch)
        else:
            do_along[floating](&block, outer, inner, scratch)
        position += rows
    finish_pending[floating](&pending, 0)


cdef inline void ignore_rows(const Block* b) noexcept nogil:
    cdef const Problem* p = b.problem
    cdef int l
    if p.loss != NULL:
        for l in range(b.rows):
            p.loss[b.position + l] = 0
    if p.row_max != NULL and not p.have_state:
        give_state(b)


cdef void do_positions(const Problem* p, Py_ssize_t first, Py_ssize_t end, int thread) noexcept nogil:
    cdef Environment environment = enter_environment()
    if p.is_double:
        do_slice[double](p, first, end, <double*>p.scratch + 3 * thread * p.scratch_size)
    else:
        do_slice[float](p, first, end, <float*>p.scratch + 3 * thread * p.scratch_size)
    if p.stream:
        stream_fence()
    leave_environment(environment, NULL)


cdef void do_in_parallel(const Problem* p, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    # Eight slices a thread even out ignored rows and a busy core; whole tiles but for the last.
    cdef Py_ssize_t size = (end - first + 8 * p.num_threads - 1) // (8 * p.num_threads)
    cdef Py_ssize_t number
    if size > LANES:
        size = (size + LANES - 1) // LANES * LANES
    for number in prange((end - first + size - 1) // size, num_threads=p.num_threads, schedule="dynamic", chunksize=1):
        do_positions(p, first + number * size, min(first + (number + 1) * size, end), threadid())


def run(Call call):
    """Compute what `call` describes. Only KeyboardInterrupt can come of it, with part of the outputs written."""
    cdef Problem problem = call.problem           # a copy, for a scratch that is gone afterwards
    cdef const Problem* p = &problem
    cdef double small[SMALL_SCRATCH + 8]
    cdef Py_ssize_t positions = p.outer * p.inner, first, size
    if positions == 0 or p.classes == 0:
        return
    if problem.scratch == NULL:
        problem.scratch = <void*>((<size_t>small + 63) // 64 * 64)
    if p.num_threads == 1 and positions * p.classes <= QUICK:
        do_positions(p, 0, positions, 0)
        return
    size = max(<Py_ssize_t>1, BETWEEN_SIGNALS // p.classes // LANES * LANES)
    for first from 0 <= first < positions by size:
        with nogil:
            if p.num_threads == 1 or p.shared:
                do_positions(p, first, min(first + size, positions), 0)
            else:
                do_in_parallel(p, first, min(first + size, positions))
        PyErr_CheckSignals()
