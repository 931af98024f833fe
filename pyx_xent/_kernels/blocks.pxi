# Up to ROWS rows on their way from logits to loss and gradient.
#
# What leaves a row is its maximum and `total`: the sum of the exponentials of all classes but one, the target. So where the
# target has nearly all the probability, its loss log1p(total / its own) and its gradient -total / all keep their digits.
#
# The rows of a block lie across the lanes (tiles of LANES rows, a row in each), or each of them has its classes side by side.
# Only the functions at the top of this file know which; the rest is arithmetic on as many numbers as there are rows, which the
# compiler vectorises. Many rows at once, so that the processor need not wait for one before it starts with the next.

cdef struct Block:
    const Problem* problem
    Py_ssize_t position           # of the first row
    int rows
    int lanes                     # rows, rounded up to whole tiles: what is computed for all, in vectors
    Work work                     # of the row or tile that is being worked on
    Py_ssize_t next_x             # across: elements from one tile to the next
    Py_ssize_t next_other
    Py_ssize_t next_out
    void* x[ROWS]                 # of each row; across: [0] is that of the first tile
    void* other[ROWS]
    void* kept[ROWS]
    void* out[ROWS]
    void* moved                   # scratch for rows whose logits are too large: (rows, classes); across: (tiles, classes, LANES)
    double dead[ROWS]            # not 0: an ignored row, or none
    int live
    bint want_log_total           # of each row; else only where a row `is_far`
    bint have_log_total
    double excluded[ROWS]         # the class left out of `total`, or -1: as double, to be vectorised
    double base[ROWS]            # already subtracted from the logits; 0 but for very large ones
    double reference[ROWS]       # less base, as all that follows
    double exponent[ROWS]
    double low[ROWS]              # see exp_parts
    double round_by[ROWS]
    double maximum[ROWS]
    # Exponentials, all 2^(headroom - exponent_of(maximum)) times too large:
    double total[ROWS]            # the sum of all classes but the one that is left out
    double of_max[ROWS]           # of the maximum; only if have_log_total
    double of_excluded[ROWS]      # of the class left out, or 0
    double to_maximum[ROWS]       # those that the sum has kept, times this power of two
    double term[ROWS]
    double mass[ROWS]
    double scale[ROWS]           # of e^(x - maximum) in the gradient
    double unit[ROWS]            # of w_c q'_c in the gradient
    double excluded_logit[ROWS]   # of the class left out; -inf if there is none
    double above_maximum[ROWS]    # the same, less the maximum
    double at_excluded[ROWS]      # the gradient of that class
    double of_row[5 * LANES]      # numbers of one row, each repeated for the lanes
    double loss[ROWS]


# Whether rows lie across the lanes or side by side


cdef inline void select_row(Block* b, int l) noexcept nogil:
    b.work.x, b.work.other, b.work.kept, b.work.out = b.x[l], b.other[l], b.kept[l], b.out[l]


cdef inline void select_tile(Block* b, int tile, floating compute) noexcept nogil:
    b.work.x = <floating*>b.x[0] + tile * b.next_x
    b.work.other = <floating*>b.other[0] + tile * b.next_other if b.other[0] != NULL else NULL
    b.work.out = <floating*>b.out[0] + tile * b.next_out if b.out[0] != NULL else NULL
    b.work.kept = <floating*>b.kept[0] + tile * b.work.classes * LANES if b.kept[0] != NULL else NULL


cdef inline floating* entry(
    const Block* b, void* const* array, Py_ssize_t next_tile, Py_ssize_t stride, int l, Py_ssize_t c, floating compute
) noexcept nogil:
    # Class c of row l in x, other or out, with their next_ and stride.
    if b.work.across:
        return <floating*>array[0] + l // LANES * next_tile + c * stride + l % LANES
    return <floating*>array[l] + c


cdef inline Py_ssize_t position_of(const Block* b, int l, floating value) noexcept nogil:
    # The last class, should the caller's memory have changed meanwhile.
    cdef Py_ssize_t c = 0
    while c < b.work.classes - 1 and entry[floating](b, b.x, b.next_x, b.work.stride, l, c, 0)[0] != value:
        c += 1
    return c


cdef void block_largest(Block* b, Py_ssize_t classes, double* largest, floating compute) noexcept nogil:
    # Of the first `classes` classes; NaN is passed over.
    cdef const floating* x
    cdef floating m[LANES]
    cdef int l, k
    if b.work.across:
        for l in range(b.lanes // LANES):
            select_tile[floating](b, l, 0)
            lanes_max(<const floating*>b.work.x, b.work.stride, classes, m)
            for k in range(LANES):
                largest[l * LANES + k] = m[k]
        return
    for l in range(b.rows):
        if b.dead[l] == 0:
            x = <const floating*>b.x[l]
            largest[l] = fold_max(x)
            if classes > LANES:
                lanes_max(x, LANES, classes // LANES, m)
                largest[l] = max(fold_max(m), fold_max(x + classes - LANES))


cdef void sum_across(
    Block* b, Sum kind, const double* left_out, const double* skip, bint keep, double* first, double* second, floating compute
) noexcept nogil:
    cdef double tile_first[ROWS]
    cdef double tile_second[ROWS]
    cdef int l
    for l from 0 <= l < b.lanes by LANES:
        select_tile[floating](b, l // LANES, 0)
        if not keep:
            b.work.kept = NULL
        b.work.low, b.work.round_by = b.low + l, b.round_by + l
        b.work.left_out, b.work.reference = left_out + l, b.maximum + l
        b.work.left_out_logit = b.excluded_logit + l
        tile_sum[floating](&b.work, kind, tile_first + l, tile_second + l, 0)
    for l in range(b.lanes):
        first[l] = tile_first[l] if skip[l] == 0 else first[l]
        second[l] = tile_second[l] if skip[l] == 0 else second[l]


cdef void sum_along(
    Block* b, Sum kind, const double* left_out, const double* skip, bint keep, double* first, double* second, floating compute
) noexcept nogil:
    cdef RowSum rows[ROWS]
    cdef int l
    b.work.reference = b.of_row
    for l in range(b.rows):
        if skip[l] == 0:
            select_row(b, l)
            if not keep:
                b.work.kept = NULL
            b.work.low, b.work.round_by, b.work.left_out = b.low + l, b.round_by + l, left_out + l
            if kind == CLASS_TERM:
                fill(b.of_row, b.maximum[l])
            row_sum[floating](&b.work, kind, b.problem, rows + l, 0)
    for l in range(b.rows):
        if skip[l] == 0:
            fold_row[floating](kind, rows + l, first + l, second + l, 0)


cdef inline void block_sum(
    Block* b, Sum kind,
    const double* left_out,                   # in   of each row, for MAX_SUM
    const double* skip,                       # in   not 0: a row that is not summed, its results stay
    bint keep,                                # in   the exponentials, for MAX_SUM
    double* first, double* second,            # out
    floating compute,
) noexcept nogil:
    # Two functions, because a thread's stack may be as small as 64 KB.
    if b.work.across:
        sum_across[floating](b, kind, left_out, skip, keep, first, second, 0)
    else:
        sum_along[floating](b, kind, left_out, skip, keep, first, second, 0)


cdef void block_entries(
    Block* b, Operation operation, const double* scale, const double* unit, floating compute
) noexcept nogil:
    cdef double* lanes = b.of_row
    cdef int l
    if b.work.across:
        for l from 0 <= l < b.lanes by LANES:
            select_tile[floating](b, l // LANES, 0)
            b.work.low, b.work.round_by, b.work.reference = b.low + l, b.round_by + l, b.maximum + l
            b.work.scale, b.work.unit = scale + l, unit + l
            b.work.dead, b.work.excluded, b.work.at_excluded = b.dead + l, b.excluded + l, b.at_excluded + l
            entries[floating](&b.work, operation, 0, b.work.classes, <floating*>b.work.out, b.work.out_stride)
        return
    b.work.low, b.work.round_by, b.work.reference = lanes, lanes + LANES, lanes + 2 * LANES
    b.work.scale, b.work.unit = lanes + 3 * LANES, lanes + 4 * LANES
    for l in range(b.rows):
        if b.dead[l] == 0:
            select_row(b, l)
            fill(lanes, b.low[l])
            fill(lanes + LANES, b.round_by[l])
            fill(lanes + 2 * LANES, b.maximum[l])
            fill(lanes + 3 * LANES, scale[l])
            fill(lanes + 4 * LANES, unit[l])
            row_entries[floating](&b.work, operation, b.problem, 0)


cdef void block_move(Block* b, const double* base, floating compute) noexcept nogil:
    # Subtract base from the logits, on the way to the scratch. Exact for each logit that counts.
    cdef floating* to = <floating*>b.moved
    cdef const floating* x
    cdef Py_ssize_t c
    cdef floating m[LANES]
    cdef int l, k
    if b.work.across:
        for l from 0 <= l < b.lanes by LANES:
            select_tile[floating](b, l // LANES, 0)
            x = <const floating*>b.work.x
            rounded(base + l, m)
            for c in range(b.work.classes):
                for k in range(LANES):
                    to[(l * b.work.classes) + c * LANES + k] = x[c * b.work.stride + k] - m[k]
        b.x[0] = to
        b.next_x = b.work.classes * LANES
        b.work.stride = LANES
    else:
        for l in range(b.rows):
            x = <const floating*>b.x[l]
            if b.dead[l] == 0 and base[l] != 0:
                for c in range(b.work.classes):
                    to[l * b.work.classes + c] = x[c] - <floating>base[l]
                b.x[l] = to + l * b.work.classes
    for l in range(b.lanes):
        b.base[l] += base[l]


# The state of a row


cdef inline bint too_large(double reference, floating compute) noexcept nogil:
    return reference != -INFINITY and fabs(reference) >= largest_logit(compute)


cdef inline double hits(double maximum, double reference, floating compute) noexcept nogil:
    # 1, or 0 if the row was summed with a reference too far from its maximum, or not moved although that is too large. No
    # branches, to be vectorised.
    cdef double near = 0.0 if reference == -INFINITY else reference
    cdef double below = 0.0 if maximum > near + window(compute) else 1.0
    cdef double above = 0.0 if maximum < near else 1.0
    cdef double small = 0.0 if fabs(maximum) >= largest_logit(compute) else 1.0
    return 1.0 if maximum == -INFINITY else below * above * small


cdef inline bint any_zero(const double* flags, int count) noexcept nogil:
    cdef int l
    cdef int64_t found = 0
    for l in range(count):
        found |= flags[l] == 0
    return found != 0


cdef void settle_reference(Block* b, floating compute) noexcept nogil:
    # The exponent that goes with each reference. Rows beyond largest_logit are moved by their maximum first.
    cdef double base[ROWS]
    cdef double largest[ROWS]
    cdef double room = headroom[floating](0)
    cdef int l
    for l in range(b.lanes):
        base[l] = 0.0 if too_large[floating](b.reference[l], 0) else 1.0
    if any_zero(base, b.lanes):
        block_largest[floating](b, b.work.classes, largest, 0)
        for l in range(b.lanes):
            base[l] = 0.0
            if l < b.rows and b.dead[l] == 0 and too_large[floating](b.reference[l], 0):
                b.reference[l] = largest[l]
                if too_large[floating](largest[l], 0):
                    base[l] = largest[l]
                    b.reference[l] = 0.0
        block_move[floating](b, base, 0)
    for l in range(b.lanes):
        b.exponent[l] = exponent_of(b.reference[l])
        b.low[l] = lowest[floating](b.exponent[l], room, 0)
        b.round_by[l] = rounder[floating](b.exponent[l], room, 0)


cdef void guess_reference(Block* b, floating compute) noexcept nogil:
    # Close below the row's maximum: one of its first logits or the target's; across the lanes one of four.
    cdef const floating* x
    cdef Py_ssize_t quarter = b.work.classes // 4 * b.work.stride
    cdef double logit_of_target
    cdef floating m[LANES]
    cdef int l, k
    if b.work.across:
        for l from 0 <= l < b.lanes by LANES:
            x = <const floating*>b.x[0] + l // LANES * b.next_x
            for k in range(LANES):
                m[k] = x[k]
                m[k] = x[quarter + k] if x[quarter + k] > m[k] else m[k]
                m[k] = x[2 * quarter + k] if x[2 * quarter + k] > m[k] else m[k]
                m[k] = x[3 * quarter + k] if x[3 * quarter + k] > m[k] else m[k]
            for k in range(LANES):
                b.reference[l + k] = m[k]
        return
    block_largest[floating](b, LANES, b.reference, 0)
    for l in range(b.rows):
        if b.excluded[l] >= LANES:
            logit_of_target = (<const floating*>b.x[l])[<Py_ssize_t>b.excluded[l]]
            b.reference[l] = logit_of_target if logit_of_target > b.reference[l] else b.reference[l]


cdef void block_state(
    Block* b,
    double confident,                         # in   a row without excluded class whose sum is below this times its largest
    floating compute,                         #      term leaves that one out: the others keep their digits; 0: no row does
) noexcept nogil:
    # maximum and total. One pass over memory, with a reference guessed from the row's start and its target; a second one is
    # rare.
    cdef double without[ROWS]
    cdef double room = headroom[floating](0)
    cdef double skip[ROWS]
    cdef int l, again = 0
    for l in range(b.lanes):
        b.reference[l] = 0
        b.maximum[l] = 0
        b.total[l] = 1
        b.excluded_logit[l] = -INFINITY       # across, the sum finds it
    guess_reference[floating](b, 0)
    settle_reference[floating](b, 0)
    block_sum[floating](b, MAX_SUM, b.excluded, b.dead, True, b.maximum, b.total, 0)
    for l in range(b.lanes):
        skip[l] = 1.0 if b.dead[l] != 0 else hits[floating](b.maximum[l], b.reference[l], 0)
    if any_zero(skip, b.lanes):
        for l in range(b.lanes):
            b.reference[l] = b.maximum[l] if skip[l] == 0 else b.reference[l]
            b.excluded_logit[l] = -INFINITY
        settle_reference[floating](b, 0)
        block_sum[floating](b, MAX_SUM, b.excluded, skip, True, b.maximum, b.total, 0)
    for l in range(b.lanes):
        # The units of the reference, guessed or not, become those of the maximum: a power of two, which is exact.
        b.to_maximum[l] = power_of_two(b.exponent[l] - exponent_of(b.maximum[l]))
        b.total[l] *= b.to_maximum[l]
    if not b.work.across:
        find_excluded_logits[floating](b, 0)
    exponentials_of_state[floating](b, 0)
    if confident == 0:
        return
    for l in range(b.lanes):
        without[l] = -1.0
        skip[l] = 1
        if b.dead[l] == 0 and b.excluded[l] < 0 and b.total[l] < confident * b.of_max[l]:
            without[l] = position_of[floating](b, l, <floating>b.maximum[l])
            skip[l] = 0
            again = 1
    if again:
        block_sum[floating](b, MAX_SUM, without, skip, False, b.maximum, b.total, 0)
        for l in range(b.lanes):
            if skip[l] == 0:
                b.total[l] *= b.to_maximum[l]
                b.excluded[l] = without[l]
                b.excluded_logit[l] = b.maximum[l]
        exponentials_of_state[floating](b, 0)


cdef void find_excluded_logits(Block* b, floating compute) noexcept nogil:
    cdef int l
    for l in range(b.lanes):
        b.excluded_logit[l] = -INFINITY
    for l in range(b.rows):
        if b.excluded[l] >= 0:
            b.excluded_logit[l] = entry[floating](b, b.x, b.next_x, b.work.stride, l, <Py_ssize_t>b.excluded[l], 0)[0]


cdef inline bint is_far(double above_maximum) noexcept nogil:
    # So small beside the maximum that its exponential may be no normal number.
    return not above_maximum > -600.0


cdef void exponentials_of_state(Block* b, floating compute) noexcept nogil:
    cdef double room = headroom[floating](0)
    cdef double near[ROWS]
    cdef int l
    for l in range(b.lanes):
        b.above_maximum[l] = b.excluded_logit[l] - b.maximum[l]
        b.of_excluded[l] = exp_in_double[floating](b.excluded_logit[l], exponent_of(b.maximum[l]), room, 0)
        near[l] = 0.0 if b.excluded[l] >= 0 and is_far(b.above_maximum[l]) else 1.0
    b.have_log_total = b.want_log_total or any_zero(near, b.lanes)
    if b.have_log_total:
        for l in range(b.lanes):
            b.of_max[l] = exp_in_double[floating](b.maximum[l], exponent_of(b.maximum[l]), room, 0)


cdef void take_state(Block* b, floating compute) noexcept nogil:
    # From an earlier call: see give_state.
    cdef const Problem* p = b.problem
    cdef int l
    for l in range(b.lanes):
        b.reference[l] = p.row_max[b.position + l] if l < b.rows and b.dead[l] == 0 else 0.0
        b.total[l] = p.row_total[b.position + l] if l < b.rows and b.dead[l] == 0 else 0.0
        b.maximum[l] = b.reference[l]
        b.to_maximum[l] = 1.0
    settle_reference[floating](b, 0)
    for l in range(b.lanes):
        b.maximum[l] -= b.base[l]
    if p.target == NULL:
        for l in range(b.rows):
            if b.dead[l] == 0 and b.total[l] <= 0 and copysign(1.0, b.total[l]) < 0:      # see give_state
                b.total[l] = -b.total[l]
                b.excluded[l] = position_of[floating](b, l, <floating>b.maximum[l])
    find_excluded_logits[floating](b, 0)
    exponentials_of_state[floating](b, 0)


cdef void give_state(const Block* b) noexcept nogil:
    cdef const Problem* p = b.problem
    cdef int l
    for l in range(b.rows):
        p.row_max[b.position + l] = 0.0 if b.dead[l] else b.maximum[l] + b.base[l]
        # Without index targets the sign tells whether the largest class is left out.
        p.row_total[b.position + l] = 0.0 if b.dead[l] else -b.total[l] if p.target == NULL and b.excluded[l] >= 0 else b.total[l]


# From scales to gradients


cdef inline bint stays_normal(double scale, floating compute) noexcept nogil:
    if floating is float:
        return fabs(scale) > 1e-37 or scale == 0
    else:
        return fabs(scale) > 1e-307 or scale == 0


cdef void block_gradient(Block* b, Operation operation, floating compute) noexcept nogil:
    # scale * e^(x - maximum) - unit * w q': from the exponentials that the sum has kept, or from those computed again. Both
    # have the same bits, a power of two apart, as long as it leaves the scale a normal number.
    cdef double scale[ROWS]
    cdef double room[ROWS]
    cdef int l
    cdef bint kept = b.problem.keep and not b.problem.have_state
    if b.work.pending != NULL:                # what the sum of this row has left of the one before: from here on it is ours
        finish_pending[floating](b.work.pending, 0)
    for l in range(b.lanes):
        scale[l] = b.scale[l] * b.to_maximum[l]
    for l in range(b.rows):
        kept = kept and (b.dead[l] != 0 or stays_normal[floating](scale[l], 0))
    if not kept:
        for l in range(b.lanes):
            b.kept[l] = NULL
            b.exponent[l] = exponent_of(b.maximum[l])
            room[l] = headroom[floating](0) if stays_normal[floating](b.scale[l], 0) else 0.0
            b.low[l] = lowest[floating](b.exponent[l], room[l], 0)
            b.round_by[l] = rounder[floating](b.exponent[l], room[l], 0)
            scale[l] = b.scale[l] * power_of_two(headroom[floating](0) - room[l])
    elif b.work.pending != NULL:
        b.work.pending.has_class_term, b.work.pending.unit = b.work.has_class_term, b.unit[0]
        b.work.pending.weight = b.work.weight
        b.work.pending.kept, b.work.pending.out, b.work.pending.scale = b.kept[0], b.out[0], scale[0]
        b.work.pending.stream, b.work.pending.classes, b.work.pending.done = b.work.stream, b.work.classes, 0
        b.work.pending.excluded = -1
        return
    block_entries[floating](b, operation, scale, b.unit, 0)
