# Up to LANES rows on their way from logits to loss and gradient.
#
# What leaves a row is (maximum, others): others = sum of e^(x_c - maximum) over all classes but one, the target. So where the
# target has nearly all the probability, its loss log1p(others) and its gradient -others / total keep their digits.
#
# The rows of a block lie across the lanes (a row in each), or each of them has its classes side by side. Only the functions
# at the top of this file know which; the rest is arithmetic on LANES numbers, which the compiler vectorises.

# A row without an index target is summed again without its largest class when the others come to less than this.
cdef double CONFIDENT_BELOW = 1.0


cdef struct Block:
    const Problem* problem
    Py_ssize_t position           # of the first row
    int rows
    Work work                     # across: of all rows; else of the one that is being worked on
    void* x[LANES]                # of each row, unless across
    void* other[LANES]
    void* kept[LANES]
    void* out[LANES]
    void* moved                   # scratch for rows whose logits are too large: (LANES, classes); across: (classes, LANES)
    double dead[LANES]            # not 0: an ignored row, or none
    int live
    double excluded[LANES]        # the class left out of `others`, or -1: as double, to be vectorised
    double base[LANES]            # already subtracted from the logits; 0 but for very large ones
    double reference[LANES]       # less base, as all that follows
    double exponent[LANES]
    double maximum[LANES]
    double total[LANES]           # sum of the exponentials, 2^(headroom - exponent) times too large
    double of_max[LANES]          # the exponential of the maximum, likewise
    double others[LANES]
    double term[LANES]
    double mass[LANES]
    double scale[LANES]           # of e^(x - maximum) in the gradient
    double unit[LANES]            # of w_c q'_c in the gradient
    double at_excluded[LANES]     # the gradient of the class left out
    double loss[LANES]


# Whether rows lie across the lanes or side by side


cdef inline void select_row(Block* b, int l) noexcept nogil:
    b.work.x, b.work.other, b.work.kept, b.work.out = b.x[l], b.other[l], b.kept[l], b.out[l]


cdef inline floating* logit(const Block* b, int l, Py_ssize_t c, floating compute) noexcept nogil:
    if b.work.across:
        return <floating*>b.work.x + c * b.work.stride + l
    return <floating*>b.x[l] + c


cdef inline floating* other_of(const Block* b, int l, Py_ssize_t c, floating compute) noexcept nogil:
    if b.work.across:
        return <floating*>b.work.other + c * b.work.other_stride + l
    return <floating*>b.other[l] + c


cdef inline floating* out_of(const Block* b, int l, Py_ssize_t c, floating compute) noexcept nogil:
    if b.work.across:
        return <floating*>b.work.out + c * b.work.out_stride + l
    return <floating*>b.out[l] + c


cdef inline Py_ssize_t position_of(const Block* b, int l, floating value) noexcept nogil:
    # The last class, should the caller's memory have changed meanwhile.
    cdef Py_ssize_t c = 0
    while c < b.work.classes - 1 and logit[floating](b, l, c, 0)[0] != value:
        c += 1
    return c


cdef void block_largest(Block* b, Py_ssize_t classes, double* largest, floating compute) noexcept nogil:
    # Of the first `classes` classes; NaN is passed over.
    cdef const floating* x
    cdef floating m[LANES]
    cdef int l
    if b.work.across:
        lanes_max(<const floating*>b.work.x, b.work.stride, classes, m)
        for l in range(LANES):
            largest[l] = m[l]
        return
    for l in range(b.rows):
        if b.dead[l] == 0:
            x = <const floating*>b.x[l]
            largest[l] = fold_max(x)
            if classes > LANES:
                lanes_max(x, LANES, classes // LANES, m)
                largest[l] = max(fold_max(m), fold_max(x + classes - LANES))


cdef void block_sum(
    Block* b, Sum kind,
    const double* left_out,                   # in   of each row, for MAX_SUM
    const double* skip,                       # in   not 0: a row that need not be summed
    bint keep,                                # in   the exponentials, for MAX_SUM
    double* first, double* second,            # out
    floating compute,
) noexcept nogil:
    cdef RowSum rows[LANES]
    cdef void* kept = b.work.kept
    cdef int l
    cdef double room = headroom[floating](0)
    if b.work.across:
        for l in range(LANES):
            b.work.low[l] = lowest[floating](b.exponent[l], room, 0)
            b.work.round_by[l] = rounder[floating](b.exponent[l], room, 0)
            b.work.left_out[l] = left_out[l]
            b.work.reference[l] = b.maximum[l]
        b.work.kept = kept if keep else NULL
        tile_sum[floating](&b.work, kind, first, second, 0)
        b.work.kept = kept
        return
    for l in range(b.rows):
        if skip[l] == 0:
            select_row(b, l)
            b.work.kept = b.kept[l] if keep else NULL
            b.work.low[0] = lowest[floating](b.exponent[l], room, 0)
            b.work.round_by[0] = rounder[floating](b.exponent[l], room, 0)
            b.work.left_out[0] = left_out[l]
            if kind == CLASS_TERM:
                fill(b.work.reference, b.maximum[l])
            row_sum[floating](&b.work, kind, b.problem, rows + l, 0)
    for l in range(b.rows):
        if skip[l] == 0:
            fold_row[floating](kind, rows + l, first + l, second + l, 0)


cdef void block_entries(
    Block* b, Operation operation, const double* low, const double* round_by, const double* reference,
    const double* scale, const double* unit, floating compute,
) noexcept nogil:
    cdef int l
    if b.work.across:
        for l in range(LANES):
            b.work.low[l] = low[l]
            b.work.round_by[l] = round_by[l]
            b.work.reference[l] = reference[l]
            b.work.scale[l] = scale[l]
            b.work.unit[l] = unit[l]
            b.work.dead[l] = b.dead[l]
        b.work.has_dead = b.live < LANES
        entries[floating](
            &b.work, operation, 0, b.work.classes, <floating*>b.work.out, b.work.out_stride
        )
        return
    fill[double](b.work.dead, 0)
    b.work.has_dead = False
    for l in range(b.rows):
        if b.dead[l] == 0:
            select_row(b, l)
            fill(b.work.low, low[l])
            fill(b.work.round_by, round_by[l])
            fill(b.work.reference, reference[l])
            fill(b.work.scale, scale[l])
            fill(b.work.unit, unit[l])
            row_entries[floating](&b.work, operation, b.problem, 0)


cdef void block_move(Block* b, const double* base, floating compute) noexcept nogil:
    # Subtract base from the logits, on the way to the scratch. Exact for each logit that counts.
    cdef floating* to = <floating*>b.moved
    cdef const floating* x
    cdef Py_ssize_t c
    cdef floating m[LANES]
    cdef int l
    if b.work.across:
        x = <const floating*>b.work.x
        rounded(base, m)
        for c in range(b.work.classes):
            for l in range(LANES):
                to[c * LANES + l] = x[c * b.work.stride + l] - m[l]
        b.work.x = to
        b.work.stride = LANES
    else:
        for l in range(b.rows):
            x = <const floating*>b.x[l]
            if b.dead[l] == 0 and base[l] != 0:
                for c in range(b.work.classes):
                    to[l * b.work.classes + c] = x[c] - <floating>base[l]
                b.x[l] = to + l * b.work.classes
    for l in range(LANES):
        b.base[l] += base[l]


# The state of a row


cdef inline bint too_large(double reference, floating compute) noexcept nogil:
    return reference != -INFINITY and fabs(reference) >= largest_logit(compute)


cdef inline bint misses(double maximum, double reference, floating compute) noexcept nogil:
    # Was the row summed with a reference too far from its maximum?
    reference = 0.0 if reference == -INFINITY else reference
    return maximum > reference + window(compute) or -INFINITY < maximum < reference


cdef void settle_reference(Block* b, floating compute) noexcept nogil:
    # The exponent that goes with each reference. Rows beyond largest_logit are moved by their maximum first.
    cdef double base[LANES]
    cdef double largest[LANES]
    cdef int l, large = 0
    for l in range(LANES):
        large |= too_large[floating](b.reference[l], 0)
    if large:
        block_largest[floating](b, b.work.classes, largest, 0)
        for l in range(LANES):
            base[l] = 0.0
            if l < b.rows and b.dead[l] == 0 and too_large[floating](b.reference[l], 0):
                b.reference[l] = largest[l]
                if too_large[floating](largest[l], 0):
                    base[l] = largest[l]
                    b.reference[l] = 0.0
        block_move[floating](b, base, 0)
    for l in range(LANES):
        b.exponent[l] = exponent_of(b.reference[l])


cdef void block_state(
    Block* b,
    bint keep_digits,                         # in   a confident row without excluded class leaves out its largest
    floating compute,
) noexcept nogil:
    # maximum and others. One pass over memory, with a reference guessed from the row's start and its target; a second one is
    # rare.
    cdef double without[LANES]
    cdef double room = headroom[floating](0)
    cdef double skip[LANES]
    cdef double x
    cdef int l, missed = 0, confident = 0
    for l in range(LANES):
        b.reference[l] = 0
        b.maximum[l] = 0
        b.total[l] = 1
    block_largest[floating](b, min(b.work.classes, <Py_ssize_t>LANES), b.reference, 0)
    for l in range(b.rows):
        if b.dead[l] == 0 and b.excluded[l] >= LANES:
            x = logit[floating](b, l, <Py_ssize_t>b.excluded[l], 0)[0]
            b.reference[l] = x if x > b.reference[l] else b.reference[l]
    settle_reference[floating](b, 0)
    block_sum[floating](b, MAX_SUM, b.excluded, b.dead, True, b.maximum, b.total, 0)
    for l in range(LANES):
        missed |= b.dead[l] == 0 and misses[floating](b.maximum[l], b.reference[l], 0)
    if missed:
        for l in range(LANES):
            skip[l] = 1
            if b.dead[l] == 0 and misses[floating](b.maximum[l], b.reference[l], 0):
                b.reference[l] = b.maximum[l]
                skip[l] = 0
        settle_reference[floating](b, 0)
        block_sum[floating](b, MAX_SUM, b.excluded, skip, True, b.maximum, b.total, 0)
    for l in range(LANES):
        b.of_max[l] = exp_in_double[floating](b.maximum[l], b.exponent[l], room, 0)
    for l in range(LANES):
        b.others[l] = b.total[l] / b.of_max[l] - (1.0 if b.excluded[l] < 0 else 0.0)
    if not keep_digits:
        return
    for l in range(LANES):
        without[l] = -1.0
        skip[l] = 1
        if b.dead[l] == 0 and b.excluded[l] < 0 and b.others[l] < CONFIDENT_BELOW:
            without[l] = position_of[floating](b, l, <floating>b.maximum[l])
            skip[l] = 0
            confident = 1
    if confident:
        block_sum[floating](b, MAX_SUM, without, skip, False, b.maximum, b.total, 0)
        for l in range(LANES):
            if skip[l] == 0:
                b.others[l] = b.total[l] / b.of_max[l]


cdef void take_state(Block* b, floating compute) noexcept nogil:
    # From an earlier call: see give_state.
    cdef const Problem* p = b.problem
    cdef int l
    for l in range(LANES):
        b.reference[l] = p.row_max[b.position + l] if l < b.rows and b.dead[l] == 0 else 0.0
        b.others[l] = p.row_others[b.position + l] if l < b.rows and b.dead[l] == 0 else 0.0
        b.of_max[l] = 1.0
        b.maximum[l] = b.reference[l]
    settle_reference[floating](b, 0)
    for l in range(LANES):
        b.maximum[l] -= b.base[l]
        b.work.kept = NULL
        b.kept[l] = NULL


cdef void give_state(const Block* b) noexcept nogil:
    cdef const Problem* p = b.problem
    cdef int l
    for l in range(b.rows):
        p.row_max[b.position + l] = 0.0 if b.dead[l] else b.maximum[l] + b.base[l]
        p.row_others[b.position + l] = 0.0 if b.dead[l] else b.others[l]


# From scales to gradients


cdef inline double gradient_room(double scale, floating compute) noexcept nogil:
    # The exponentials may be scaled up as far as their scale, divided by as much, stays a normal number.
    if floating is float:
        return headroom(compute) if fabs(scale) > 1e-24 else 0.0
    else:
        return headroom(compute) if fabs(scale) > 1e-210 else 0.0


cdef inline bint stays_normal(double scale, floating compute) noexcept nogil:
    if floating is float:
        return fabs(scale) > 1e-37 or scale == 0
    else:
        return fabs(scale) > 1e-307 or scale == 0


cdef void block_gradient(Block* b, Operation operation, floating compute) noexcept nogil:
    # scale * e^(x - maximum) - unit * w q': from the exponentials that the sum has kept, or from those computed again. Both
    # have the same bits, a power of two apart, as long as it leaves the scale a normal number.
    cdef double low[LANES]
    cdef double round_by[LANES]
    cdef double scale[LANES]
    cdef double room[LANES]
    cdef double exponent[LANES]
    cdef double of_max[LANES]
    cdef int l
    cdef bint kept = b.problem.keep and not b.problem.have_state
    for l in range(LANES):
        scale[l] = b.scale[l] / b.of_max[l]
    for l in range(b.rows):
        kept = kept and (b.dead[l] != 0 or stays_normal[floating](scale[l], 0))
    if not kept:
        b.work.kept = NULL
        for l in range(LANES):
            b.kept[l] = NULL
            exponent[l] = exponent_of(b.maximum[l])
            room[l] = gradient_room[floating](b.scale[l], 0)
            low[l] = lowest[floating](exponent[l], room[l], 0)
            round_by[l] = rounder[floating](exponent[l], room[l], 0)
            of_max[l] = exp_in_double[floating](b.maximum[l], exponent[l], room[l], 0)
            scale[l] = b.scale[l] / of_max[l]
    block_entries[floating](b, operation, low, round_by, b.maximum, scale, b.unit, 0)
