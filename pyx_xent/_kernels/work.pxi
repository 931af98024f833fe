# Sums and results of one Work: whole rows made of the strips and segments of lanes.pxi.

from cython.parallel cimport prange

cdef enum Sum:                    # over the classes of a row; each has two numbers
    MAX_SUM                       # maximum, and sum of the exponentials
    CLASS_TERM                    # sums of w q' (maximum - x) and of w q'
    DOT                           # nothing, and sum of x * other
    SUM_OTHER                     # nothing, and sum of other


cdef inline Py_ssize_t segments_of(Py_ssize_t classes) noexcept nogil:
    # What follows the last whole strip belongs to the last segment.
    return max(<Py_ssize_t>1, (classes - classes % LANES + SEGMENT - 1) // SEGMENT)


cdef inline Py_ssize_t segment_size(Py_ssize_t classes, Py_ssize_t segment) noexcept nogil:
    return <Py_ssize_t>SEGMENT if segment < segments_of(classes) - 1 else classes - segment * SEGMENT


cdef inline void combine(
    Sum kind, double part, double part_2, double* first, double* second, double* lost, floating compute
) noexcept nogil:
    # The next segment into the numbers of the row.
    if kind == MAX_SUM:
        first[0] = part if part > first[0] else first[0]
    else:
        first[0] += part
    accumulate(second, lost, part_2, compute)


cdef void row_segment(
    const Work* work, Sum kind, Py_ssize_t segment,
    double* first, double* second,            # out  (LANES,)  to be folded
    floating compute,
) noexcept nogil:
    cdef Py_ssize_t start = segment * SEGMENT
    cdef Py_ssize_t size = segment_size(work.classes, segment)
    cdef Py_ssize_t strips = size // LANES, at = size - LANES
    cdef int tail = <int>(size % LANES), skip = LANES - tail
    cdef const floating* x = <const floating*>work.x + start
    cdef const floating* other
    if kind == MAX_SUM:
        row_max_sum(
            x, strips, tail, work.pending, <floating>work.low[0], <floating>work.round_by[0], <Py_ssize_t>work.left_out[0] - start,
            <floating*>work.kept + start if work.kept != NULL else NULL, first, second,
        )
        return
    fill[double](first, 0)
    fill[double](second, 0)
    if kind == CLASS_TERM:
        class_term[floating](work, start, 1, strips, 0, first, second, 0)
        if tail > 0:
            class_term[floating](work, start + at, 1, 1, skip, first, second, 0)
    else:
        other = <const floating*>work.other + start
        if kind == SUM_OTHER:
            x = NULL
        lanes_dot(other, LANES, strips, 0, x, LANES, second)
        if tail > 0:
            lanes_dot(other + at, LANES, 1, skip, x + at if x != NULL else NULL, LANES, second)


cdef const floating* coefficients_of(
    const Work* work, Py_ssize_t first, Py_ssize_t step, Py_ssize_t count, floating* buffer
) noexcept nogil:
    # Of strips from class `first` on (across: of every step-th class); NULL if they are all 1.
    cdef const floating* weight = <const floating*>work.weight
    cdef const floating* soft = <const floating*>work.other
    if weight == NULL and soft == NULL:
        return NULL
    if weight != NULL:
        weight += first
    if work.across:
        if soft != NULL:
            soft += first * work.other_stride
        lanes_coefficients(weight, step, True, soft, step * work.other_stride, work.keep, work.spread, count, buffer)
    else:
        if soft != NULL:
            soft += first
            if weight == NULL and work.keep == 1 and work.spread == 0:
                return soft                   # as they are
        lanes_coefficients(weight, LANES, False, soft, LANES, work.keep, work.spread, count, buffer)
    return buffer


cdef void class_term(
    const Work* work, Py_ssize_t first, Py_ssize_t step, Py_ssize_t count, int skip,   # see coefficients_of, lanes_class_term
    double* term, double* mass,               # in/out   (LANES,)
    floating compute,
) noexcept nogil:
    cdef floating buffer[PIECE * LANES]
    cdef const floating* x = <const floating*>work.x + (first * work.stride if work.across else first)
    cdef const floating* coefficients
    cdef Py_ssize_t stride = step * work.stride if work.across else LANES
    cdef Py_ssize_t classes = step if work.across else LANES       # from one strip to the next
    cdef Py_ssize_t done = 0, piece
    while done < count:
        piece = min(<Py_ssize_t>PIECE, count - done)
        coefficients = coefficients_of(work, first + done * classes, step, piece, buffer)
        if work.other != NULL:
            lanes_soft_term(x + done * stride, stride, piece, coefficients, skip, work.reference, term, mass)
        else:
            lanes_class_term(x + done * stride, stride, piece, coefficients, skip, work.reference, term, mass)
        done += piece


cdef void tile_segment(
    const Work* work, Sum kind, Py_ssize_t segment,
    double* first, double* second,            # out  (LANES,)
    floating compute,
) noexcept nogil:
    cdef Py_ssize_t start = segment * SEGMENT, c, group
    cdef Py_ssize_t size = segment_size(work.classes, segment)
    cdef Py_ssize_t strips = size // LANES, whole = strips * LANES
    cdef int tail = <int>(size % LANES), offset = LANES - tail if strips > 0 else 0, residues = LANES if strips > 0 else tail
    cdef int l, j, count
    cdef const floating* x = <const floating*>work.x + start * work.stride
    cdef floating* kept = <floating*>work.kept + start * LANES if work.kept != NULL else NULL
    cdef floating low[LANES]
    cdef floating round_by[LANES]
    cdef floating left_out[LANES]
    cdef floating left_out_logit[LANES]
    cdef floating maximum[LANES]
    cdef floating buffer[GROUP * LANES * LANES]
    cdef floating* exponentials
    cdef double a[LANES * LANES]
    cdef double b[LANES * LANES]
    if kind == MAX_SUM:
        rounded(work.low, low)
        rounded(work.round_by, round_by)
        fill[floating](maximum, -INFINITY)
        fill[floating](left_out_logit, -INFINITY)
        for group in range(-1 if tail > 0 else 0, (strips + GROUP - 1) // GROUP):
            c = group * GROUP * LANES if group >= 0 else whole                    # what is after the whole strips is first
            count = <int>min(<Py_ssize_t>(GROUP * LANES), whole - c) if group >= 0 else tail
            for l in range(LANES):
                left_out[l] = <floating>(work.left_out[l] - <double>(start + c))
            exponentials = kept + c * LANES if kept != NULL else buffer
            tile_exponentials(x + c * work.stride, work.stride, count, low, round_by, left_out, exponentials, maximum, left_out_logit)
            # After the tail the first residues are still without a sum.
            j = offset * LANES if group < 0 else 0
            tile_add(exponentials, count, LANES if group < 0 else (offset if tail > 0 else LANES) if group == 0 else 0, b + j, a + j)
        for l in range(LANES):
            first[l] = maximum[l]
        for l in range(LANES):
            if start <= work.left_out[l] < start + size:
                work.left_out_logit[l] = left_out_logit[l]
        fold_tile[floating](b, residues, second, 0)
        return
    memset(a, 0, residues * LANES * sizeof(double))
    memset(b, 0, residues * LANES * sizeof(double))
    for j in range(LANES if strips > 0 else 0):
        tile_residue[floating](work, kind, start + j, strips, a + j * LANES, b + j * LANES, 0)
    for j in range(tail):
        l = (offset + j) * LANES
        tile_residue[floating](work, kind, start + whole + j, 1, a + l, b + l, 0)
    fold_tile[floating](a, residues, first, 0)
    fold_tile[floating](b, residues, second, 0)


cdef inline void tile_residue(
    const Work* work, Sum kind, Py_ssize_t c, Py_ssize_t count,    # in   every LANES-th class from c on
    double* first, double* second,            # in/out   (LANES,)
    floating compute,
) noexcept nogil:
    cdef const floating* x = <const floating*>work.x + c * work.stride
    if kind == CLASS_TERM:
        class_term[floating](work, c, LANES, count, 0, first, second, 0)
    else:
        lanes_dot(
            <const floating*>work.other + c * work.other_stride, LANES * work.other_stride, count, 0,
            x if kind == DOT else NULL, LANES * work.stride, second,
        )


cdef inline void fold_segment(Sum kind, double* first, double* second, floating compute) noexcept nogil:
    # in   (LANES,)   out  (1,)
    first[0] = fold_max(first) if kind == MAX_SUM else fold_sum[floating](first, 0)
    second[0] = fold_sum[floating](second, 0)


cdef struct RowSum:
    double first
    double second
    double lost
    double last_first[LANES]      # of the last segment, not yet folded
    double last_second[LANES]


cdef void row_sum(const Work* work, Sum kind, const Problem* p, RowSum* row, floating compute) noexcept nogil:
    # The last segment is folded by fold_row, when the other rows of the block have been summed, too: meanwhile the processor
    # need not wait for the last exponentials of this one.
    cdef Py_ssize_t last = segments_of(work.classes) - 1, segment
    cdef double first[LANES]
    cdef double second[LANES]
    row.first = -INFINITY if kind == MAX_SUM else 0.0
    row.second = 0.0
    row.lost = 0.0
    if p.shared:
        for segment in prange(last + 1, num_threads=p.num_threads, schedule="static"):
            shared_segment[floating](work, kind, segment, p.parts + 2 * segment, row, 0)
        for segment in range(last):
            combine[floating](kind, p.parts[2 * segment], p.parts[2 * segment + 1], &row.first, &row.second, &row.lost, 0)
        return
    for segment in range(last):
        row_segment[floating](work, kind, segment, first, second, 0)
        fold_segment[floating](kind, first, second, 0)
        combine[floating](kind, first[0], second[0], &row.first, &row.second, &row.lost, 0)
    row_segment[floating](work, kind, last, row.last_first, row.last_second, 0)


cdef void shared_segment(
    const Work* work, Sum kind, Py_ssize_t segment, double* part, RowSum* row, floating compute
) noexcept nogil:
    # On any thread, so in an environment of its own, like what follows.
    cdef Environment environment = enter_environment()
    cdef double first[LANES]
    cdef double second[LANES]
    if segment == segments_of(work.classes) - 1:
        row_segment[floating](work, kind, segment, row.last_first, row.last_second, 0)
    else:
        row_segment[floating](work, kind, segment, first, second, 0)
        fold_segment[floating](kind, first, second, 0)
        part[0], part[1] = first[0], second[0]
    leave_environment(environment, NULL)


cdef void shared_segment_entries(const Work* work, Operation operation, Py_ssize_t segment, floating compute) noexcept nogil:
    cdef Environment environment = enter_environment()
    row_segment_entries[floating](work, operation, segment, 0)
    leave_environment(environment, NULL)


cdef inline void fold_row(Sum kind, RowSum* row, double* first, double* second, floating compute) noexcept nogil:
    fold_segment[floating](kind, row.last_first, row.last_second, 0)
    combine[floating](kind, row.last_first[0], row.last_second[0], &row.first, &row.second, &row.lost, 0)
    first[0] = row.first
    second[0] = row.second


cdef void tile_sum(const Work* work, Sum kind, double* first, double* second, floating compute) noexcept nogil:
    cdef double part[LANES]
    cdef double part_2[LANES]
    cdef double lost[LANES]
    cdef Py_ssize_t segment
    cdef int l
    if segments_of(work.classes) == 1:
        tile_segment[floating](work, kind, 0, first, second, 0)
        return
    fill[double](first, -INFINITY if kind == MAX_SUM else 0.0)
    fill[double](second, 0)
    fill[double](lost, 0)
    for segment in range(segments_of(work.classes)):
        tile_segment[floating](work, kind, segment, part, part_2, 0)
        for l in range(LANES):
            combine[floating](kind, part[l], part_2[l], first + l, second + l, lost + l, 0)


# Results


cdef void gradient(
    const Work* work, Py_ssize_t first, Py_ssize_t count, floating* grad, Py_ssize_t grad_stride
) noexcept nogil:
    # scale * e^(x - maximum) - unit * w q': strips from the class `first` on (across: classes)
    cdef Py_ssize_t done = 0, piece, at, classes = 1 if work.across else LANES, to_stride = LANES if work.across else grad_stride
    cdef bint as_kept = work.across and work.kept != NULL and not work.has_class_term      # nothing between kept and finished
    cdef double one[LANES]
    cdef floating coefficients[PIECE * LANES]
    cdef floating buffer[PIECE * LANES]
    cdef floating finished[PIECE * LANES]
    cdef floating* to
    fill[double](one, 1)
    while done < count:
        piece = min(<Py_ssize_t>PIECE, count - done)
        at = first + done * classes
        to = &buffer[0] if work.across else grad + done * grad_stride
        if as_kept:
            to = <floating*>work.kept + at * LANES
        elif work.kept != NULL:
            lanes_scaled(<const floating*>work.kept + (at * LANES if work.across else at), piece, work.scale, to, to_stride)
        else:
            lanes_exponentials(
                <const floating*>work.x + (at * work.stride if work.across else at), work.stride if work.across else LANES,
                piece, work.low, work.round_by, work.scale, to, to_stride,
            )
        if work.has_class_term:
            lanes_minus(coefficients_of(work, at, 1, piece, coefficients), piece, work.unit, to, to_stride)
        if work.across:
            tile_finished(
                to, piece, work.scale if as_kept else one, work.dead, at, work.excluded, work.at_excluded, finished
            )
            tile_put(finished, piece, grad + done * grad_stride, grad_stride, work.stream)
        done += piece


cdef inline void entries(
    const Work* work, Operation operation, Py_ssize_t first, Py_ssize_t count, floating* out, Py_ssize_t out_stride
) noexcept nogil:
    if operation == CROSS_ENTROPY or operation == SOFTMAX:
        gradient(work, first, count, out, out_stride)
    elif operation == LOG_SOFTMAX:
        lanes_log_softmax(work, first, count, out, out_stride)
    elif operation == SOFTMAX_BACKWARD:
        lanes_softmax_backward(work, first, count, out, out_stride)
    else:
        lanes_log_softmax_backward(work, first, count, out, out_stride)


cdef void row_segment_entries(
    const Work* work, Operation operation, Py_ssize_t segment, floating compute
) noexcept nogil:
    cdef Py_ssize_t first = segment * SEGMENT
    cdef Py_ssize_t size = segment_size(work.classes, segment), head = 0, tail, done, count
    cdef floating* out = <floating*>work.out + first
    cdef floating* to
    cdef floating begin[LANES]
    cdef floating end[LANES]
    cdef floating piece[PIECE * LANES]
    if work.stream:                           # from where a line of memory begins
        head = bytes_to_line(out) // <Py_ssize_t>sizeof(floating)
    tail = (size - head) % LANES
    # Both ends before the rest, because `out` may be `x` or `kept`.
    if head > 0:
        entries(work, operation, first, 1, begin, LANES)
    if tail > 0:
        entries(work, operation, first + size - LANES, 1, end, LANES)
    done = head
    while done < size - tail:
        count = min(<Py_ssize_t>(PIECE * LANES), size - tail - done)
        if work.next != NULL:
            prefetch_lines(<const char*>work.next + (first + done) * sizeof(floating), count * sizeof(floating))
        to = &piece[0] if work.stream else out + done
        entries(work, operation, first + done, count // LANES, to, LANES)
        if work.stream:
            stream_out(out + done, to, count * sizeof(floating))
        done += count
    memcpy(out, begin, head * sizeof(floating))
    memcpy(out + size - tail, end + LANES - tail, tail * sizeof(floating))


cdef void row_entries(const Work* work, Operation operation, const Problem* p, floating compute) noexcept nogil:
    cdef Py_ssize_t segments = segments_of(work.classes), segment
    if p.shared:
        for segment in prange(segments, num_threads=p.num_threads, schedule="static"):
            shared_segment_entries[floating](work, operation, segment, 0)
    else:
        for segment in range(segments):
            row_segment_entries[floating](work, operation, segment, 0)
