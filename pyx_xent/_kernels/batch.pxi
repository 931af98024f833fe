# Rows handed to threads: every parallel region, and the only function that _call knows.
#
# A row's result depends on nothing but the row, so any split among threads gives the same bits.

from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport parallel, prange, threadid


cdef struct Scratch:
    # What a thread has for itself, each at a multiple of 64 bytes; threads that share a row share its segments and areas.
    Rows* rows                    # of a panel's tiles
    Segment* segments             # of two batches, (2, plan.segments)
    real* discarded               # (plan.discarded,)
    real* weight                  # (FEW_CLASSES, LANES)
    # Rows or tiles, (plan.area[k],): the exponentials, or the logits before them · class probabilities, upstream gradient ·
    # logits that are moved by their maximum · the exponentials of the next row · the Hessian
    real* area[5]
    real* staged[2]               # (classes, plan.staged)  planes, copied side by side


cdef void ignore_row(const Problem* p, Py_ssize_t position) noexcept nogil:
    cdef Py_ssize_t outer = position // p.inner
    if p.loss != NULL:
        p.loss[position] = 0
    if p.row_max != NULL and not p.have_state:
        p.row_max[position] = 0
        p.row_total[position] = 0
    if p.out.data != NULL:
        zeros_out(&p.out, outer, position - outer * p.inner, p.classes, p.plan.stream)
    if p.hessian.data != NULL:
        zeros_out(&p.hessian, outer, position - outer * p.inner, p.classes, False)


cdef inline char* taken(char** free, Py_ssize_t size) noexcept nogil:
    cdef char* start = free[0]
    free[0] += (size + 63) // 64 * 64
    return start


cdef void carve(const Problem* p, int thread, Scratch* s) noexcept nogil:
    cdef char* free = <char*>p.plan.scratch + thread * p.plan.scratch_size
    cdef int k
    s.rows = <Rows*>taken(&free, (p.plan.rows + LANES - 1) // LANES * ROWS_BYTES)
    s.discarded = <real*>taken(&free, p.plan.discarded * sizeof(real))
    s.weight = <real*>taken(&free, p.plan.weights * sizeof(real))
    if p.plan.shared:                         # the threads work on one row
        thread = 0
    free = <char*>p.plan.scratch + p.plan.num_threads * p.plan.scratch_size
    s.segments = <Segment*>free + thread * 2 * p.plan.segments
    free = <char*>p.plan.areas + thread * p.plan.areas_size
    for k in range(5):
        s.area[k] = <real*>taken(&free, p.plan.area[k] * sizeof(real))
    s.staged[0] = <real*>taken(&free, p.classes * p.plan.staged * sizeof(real))
    s.staged[1] = <real*>free


# NLL: one row, any stride from class to class


cdef void do_nll(const Problem* p, Py_ssize_t position) noexcept nogil:
    cdef Py_ssize_t outer = position // p.inner, inner = position - outer * p.inner, target = p.target[position]
    cdef double weight = 1.0, sample = 1.0, loss, g = p.options.grad_scale
    if p.options.sample_weight != NULL:
        sample = p.options.sample_weight[position]
    if target < 0 or sample == 0:
        ignore_row(p, position)
        return
    if p.options.weight != NULL:
        weight = (<const real*>p.options.weight)[target]
    # Read before the row is filled with zeros, which may be the same memory.
    loss = sample * (weight * -<double>number(element(&p.logits, outer, inner), target * p.logits.classes, p.logits.storage))
    ignore_row(p, position)
    if p.loss != NULL:
        p.loss[position] = loss if loss == loss else NAN
    if p.out.data != NULL:
        if p.options.grad_output != NULL:
            g *= p.options.grad_output[position]
        g *= -weight * sample
        put_number(element(&p.out, outer, inner), target * p.out.classes, p.out.storage, <real>(g if g == g else NAN))


cdef Py_ssize_t rows_together(const Problem* p, Py_ssize_t position, Py_ssize_t rows) noexcept nogil:
    # Of planes that are stored past the caches: up to where a line of memory begins, from there on whole lines of one plane.
    cdef Py_ssize_t outer = position // p.inner, inner = position - outer * p.inner
    cdef int head
    if not p.plan.stream or p.out.inner != 1 or p.out.classes == 1 or p.out.storage != own_storage():
        return rows
    rows = min(rows, p.inner - inner)
    head = to_line(<const real*>element(&p.out, outer, inner), rows)
    if head > 0:
        return head
    return rows - rows % LANES if rows > LANES else rows


cdef void do_slice(const Problem* p, Py_ssize_t position, Py_ssize_t end, int thread) noexcept nogil:
    cdef Scratch scratch
    cdef Panel panel
    cdef Batch batches[2]
    cdef Py_ssize_t rows
    cdef int now = 0
    if p.operation == NLL:
        while position < end:
            do_nll(p, position)
            position += 1
        return
    carve(p, thread, &scratch)
    if p.plan.staged > 0:
        do_staged(p, position, end, thread, &scratch)
        return
    if p.plan.tile_classes > 0:
        panel.rows = scratch.rows
        panel.x = scratch.area[0]
        panel.other = scratch.area[1] if p.plan.area[1] > 0 else NULL
        panel.hessian = scratch.area[4]
        spread_weight(p, &panel, scratch.weight)
        zero_beyond_classes(p, &panel)
        while position < end:
            rows = rows_together(p, position, min(p.plan.rows, end - position))
            do_panel(p, &panel, position, rows)
            position += rows
        return
    batches[0].count = batches[1].count = 0
    batches[0].segments = scratch.segments
    batches[1].segments = scratch.segments + p.plan.segments
    batches[0].discarded = batches[1].discarded = scratch.discarded
    while position < end:
        batches[now].position = position
        batches[now].outer = position // p.inner
        batches[now].inner = position - batches[now].outer * p.inner
        batches[now].count = <int>min(p.plan.rows, min(end - position, p.inner - batches[now].inner))
        position += batches[now].count
        if p.plan.shared:
            do_shared(p, batches, scratch.area[0], scratch.area[1], scratch.area[2], scratch.area[4])
        else:
            do_rows(
                p, &batches[now], &batches[1 - now], scratch.area[3 * now if p.plan.defer else 0], scratch.area[1],
                scratch.area[2], scratch.area[4],
            )
        if batches[now].count > 0:
            now = 1 - now
    write_waiting(p, &batches[1 - now])


cdef void staged_in(
    const Strided* array, const Problem* p, Py_ssize_t outer, Py_ssize_t inner, Py_ssize_t rows, real* to, Strided* staged
) noexcept nogil:
    runs_in(element(array, outer, inner), array.storage, array.classes, p.classes, rows, to, p.plan.staged)
    staged.data = to
    staged.storage = own_storage()
    staged.outer = 0
    staged.classes = p.plan.staged
    staged.inner = 1


cdef void do_staged(const Problem* p, Py_ssize_t position, Py_ssize_t end, int thread, const Scratch* scratch) noexcept nogil:
    # Far planes of many classes: a run of each is copied first, and the rows are computed from there, as a problem of their own.
    # Rows that jump from plane to plane would find every line of memory in the same set of the cache.
    cdef Problem q = p[0]
    cdef Py_ssize_t outer, inner, rows
    q.plan.staged = 0
    q.plan.stream = False
    q.outer = 1
    while position < end:
        outer = position // p.inner
        inner = position - outer * p.inner
        rows = rows_together(p, position, min(p.plan.staged, min(end - position, p.inner - inner)))
        staged_in(&p.logits, p, outer, inner, rows, scratch.staged[0], &q.logits)
        if p.other.data != NULL:
            staged_in(&p.other, p, outer, inner, rows, scratch.staged[1], &q.other)
        if p.out.data != NULL:                # whose columns are those of logits that have been read
            q.out = q.logits
        q.inner = rows
        q.target = p.target + position if p.target != NULL else NULL
        q.options.sample_weight = p.options.sample_weight + position if p.options.sample_weight != NULL else NULL
        q.options.grad_output = p.options.grad_output + position if p.options.grad_output != NULL else NULL
        q.loss = p.loss + position if p.loss != NULL else NULL
        q.row_max = p.row_max + position if p.row_max != NULL else NULL
        q.row_total = p.row_total + position if p.row_total != NULL else NULL
        do_slice(&q, 0, rows, thread)
        if p.out.data != NULL:
            runs_out(
                scratch.staged[0], p.plan.staged, p.classes, rows, element(&p.out, outer, inner), p.out.storage, p.out.classes,
                p.plan.stream,
            )
        position += rows


cdef void write_waiting(const Problem* p, Batch* b) noexcept nogil:
    cdef Py_ssize_t segment
    if b.count > 0:
        for segment in range(segments_of(p.classes)):
            row_entries(p, b, 0, segment, b.discarded)
        finish_row(p, b, 0)


# Rows that threads share


cdef void shared_sum(const Problem* p, const Batch* b, Py_ssize_t segment, int thread) noexcept nogil:
    # On any thread, so in an environment of its own, like what follows.
    cdef Environment environment = enter_environment()
    cdef Scratch scratch
    carve(p, thread, &scratch)
    if is_backward(p):
        sum_segment_backward(p, b, 0, segment)
    else:
        sum_segment(p, b, 0, segment, scratch.discarded)
    leave_environment(environment, NULL)


cdef void shared_entries(const Problem* p, const Batch* b, Py_ssize_t segment, int thread) noexcept nogil:
    cdef Environment environment = enter_environment()
    cdef Scratch scratch
    carve(p, thread, &scratch)
    row_entries(p, b, 0, segment, scratch.discarded)
    if p.plan.stream:
        v_fence()
    leave_environment(environment, NULL)


cdef void sum_shared_row(const Problem* p, Batch* b) noexcept nogil:
    cdef Py_ssize_t segment
    for segment in prange(segments_of(p.classes), num_threads=p.plan.num_threads, schedule="static"):
        shared_sum(p, b, segment, threadid())
    combine_segments(p, b, 0)


cdef void do_shared(const Problem* p, Batch* b, real* cached, real* other, real* moved_to, real* hessian) noexcept nogil:
    # do_rows for one row.
    cdef Py_ssize_t segment
    if start_rows(p, &b.rows, b.position, 1) == 0:
        ignore_row(p, b.position)
        b.count = 0
        return
    place_rows(p, b, cached, other, hessian)
    neutral_lanes(&b.rows)
    if b.rows.target[0] >= 0:
        b.rows.target_logit[0] = b.x[0][b.rows.target[0]]
    if p.have_state:
        take_state(p, b, 0)
        move_row(p, b, 0, moved_to)
        state_of_row(p, b, 0)
    else:
        sum_shared_row(p, b)
        if not is_backward(p) and move_row(p, b, 0, moved_to):
            sum_shared_row(p, b)
    row_numbers(p, b)
    if p.out.data != NULL:
        for segment in prange(segments_of(p.classes), num_threads=p.plan.num_threads, schedule="static"):
            shared_entries(p, b, segment, threadid())
        finish_row(p, b, 0)
        if not lies_as_rows(&p.out):
            rows_out(cached, 0, 1, p.classes, &p.out, b.outer, b.inner)
        if not lies_as_rows(&p.hessian):
            rows_out(hessian, 0, 1, p.classes, &p.hessian, b.outer, b.inner)
    b.count = 0


cdef extern from *:
    """
    #if defined(_MSC_VER) && !defined(__clang__)
    #include <intrin.h>
    #define next_part(taken) _InterlockedExchangeAdd64(taken, 1)
    #else
    #define next_part(taken) __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)
    #endif
    """
    int64_t next_part(int64_t* taken) noexcept nogil       # a number that no other thread gets


cdef void do_positions(const Problem* p, Py_ssize_t first, Py_ssize_t end, int64_t* taken, int thread) noexcept nogil:
    # in/out   taken   how many parts the threads that share these rows have taken; NULL: there are no others
    cdef Environment environment = enter_environment()
    cdef Py_ssize_t start
    if taken == NULL:
        do_slice(p, first, end, thread)
    else:
        start = first + next_part(taken) * p.plan.part
        while start < end:
            do_slice(p, start, min(start + p.plan.part, end), thread)
            start = first + next_part(taken) * p.plan.part
    if p.plan.stream:
        v_fence()
    leave_environment(environment, NULL)


cdef void do_in_parallel(const Problem* p, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    # Not a prange, which would make an environment for each part rather than for each thread.
    cdef int64_t taken = 0
    cdef int64_t* counter = &taken            # what is assigned to in here would be each thread's own
    with parallel(num_threads=p.plan.num_threads):
        do_positions(p, first, end, counter, threadid())


cdef int run_problem(const Problem* p) except -1:
    # Only KeyboardInterrupt can come of it, with part of the outputs written.
    cdef Py_ssize_t positions = p.outer * p.inner, first, end
    if positions == 0 or p.classes == 0:
        return 0
    if p.plan.quick:
        do_positions(p, 0, positions, NULL, 0)
        return 0
    for first from 0 <= first < positions by p.plan.between_signals:
        end = min(first + p.plan.between_signals, positions)
        with nogil:
            if p.plan.num_threads == 1 or p.plan.shared:
                do_positions(p, first, end, NULL, 0)
            else:
                do_in_parallel(p, first, end)
        PyErr_CheckSignals()
    return 0


if sizeof(Rows) > ROWS_BYTES or sizeof(Segment) > SEGMENT_BYTES:      # which _call sets aside for them
    raise ImportError("the kernels' structs are larger than _problem.pxd says")

run = PyCapsule_New(<void*>run_problem, "pyx_xent.run_problem", NULL)      # for _call.use_kernels


# What is asked of exp.pxi alone: by trust/ and the tests, of every number there is.


def exponentials_alone(const real[::1] x, real[::1] out):
    """out (n,) = exp(x (n,)) for numbers from -87 to 88 (double: -708 to 709), as the kernels compute it. Nothing is checked."""
    cdef Units units = units_of(v_set(0), 0)
    cdef Py_ssize_t i
    for i from 0 <= i < x.shape[0] by LANES:
        if i + LANES <= x.shape[0]:
            v_store(&out[i], exp_in(units, v_load(&x[i])))
        else:
            v_store_first(&out[i], exp_in(units, v_load_first(&x[i], <int>(x.shape[0] - i), 0)), <int>(x.shape[0] - i))
