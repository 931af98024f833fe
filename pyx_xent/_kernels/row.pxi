# Many classes: a row at a time, LANES classes in a vector, SEGMENT of them from maximum to sum while they are in the nearest
# cache. Each segment has units of its own, a power of two from those of the row, so one pass is enough; and segments depend on
# nothing but the row, so threads may share one (batch.pxi).
#
# Rows of one segment come LANES at a time, for what happens once a row; short ones go through each step together, too, because
# a step waits for the one before it, and of a short row it would wait longer than it computes. Of long rows the gradient waits
# for the next row, and is written while that is summed: so memory is not idle during the exponentials, nor the arithmetic while
# stores wait for memory.

cdef struct RowTerm:
    double term                   # see Rows, and of the target alone
    double mass
    double target_mass


cdef struct Segment:
    real maximum
    real exponent                 # of its units
    double total                  # the sum of its exponentials without the target's
    double own                    # the exponential that is left out; 0: none, or the class index
    Py_ssize_t target             # of which class, counted from the row's first; -1: none
    RowTerm row


cdef struct Batch:
    # Rows of one outer, side by side
    Py_ssize_t outer
    Py_ssize_t inner
    Py_ssize_t position           # of the first
    int count                     # 0: nothing waits
    Rows rows
    const real* x[LANES]
    const real* other[LANES]
    real* cached[LANES]           # the exponentials; x itself if that is a copy
    real* summed[LANES]           # of short rows: where they are summed; cached, unless nobody needs them again
    real* out[LANES]              # may be `cached`
    real* hessian[LANES]          # NULL: not wanted
    Segment* segments             # (rows, segments)
    real* discarded               # (plan.discarded,)  exponentials that nobody needs again


cdef inline Py_ssize_t segments_of(Py_ssize_t classes) noexcept nogil:
    return (classes + SEGMENT - 1) // SEGMENT


cdef inline Py_ssize_t segment_size(Py_ssize_t classes, Py_ssize_t segment) noexcept nogil:
    return min(<Py_ssize_t>SEGMENT, classes - segment * SEGMENT)


cdef inline bint is_backward(const Problem* p) noexcept nogil:
    return p.operation == SOFTMAX_BACKWARD or p.operation == LOG_SOFTMAX_BACKWARD


cdef inline bint is_cached(const Problem* p) noexcept nogil:
    return p.plan.keep and not p.have_state


cdef inline vec finite(vec m) noexcept nogil:
    # What distances are measured from, where all logits may be -inf.
    return v_max(m, v_set(-largest_logit()))


cdef inline real one_of(vec lanes) noexcept nogil:
    cdef real all[LANES]
    v_store(all, lanes)
    return all[0]


cdef Py_ssize_t position_of(const real* x, Py_ssize_t size, real value) noexcept nogil:
    # The first; -1: none
    cdef Py_ssize_t i
    cdef vec wanted = v_set(value)
    cdef mask found
    for i from 0 <= i < size by LANES:
        found = v_equal(at(x, i, size, NAN), wanted)
        if v_any(found):
            return i + v_first(found)
    return -1


cdef Coefficients coefficients_from(const Problem* p, const real* other, Py_ssize_t start) noexcept nogil:
    # Of the classes from `start` on.
    return coefficients_of(
        p, <const real*>p.options.weight + start if p.options.weight != NULL else NULL, other + start if p.target == NULL else NULL
    )


cdef RowTerm row_class_term(
    const Problem* p, const Batch* b, int l, Py_ssize_t start, Py_ssize_t size,
    real maximum, Py_ssize_t target,          # in   of these classes; the target, counted from the row's first, or -1
) noexcept nogil:
    cdef Coefficients k = coefficients_from(p, b.other[l], start)
    cdef vec m = finite(v_set(maximum))
    cdef Term sums
    cdef RowTerm row
    row.target_mass = 0
    if p.target != NULL:
        row.term = sum_of_lanes(distances(b.x[l] + start, k.weight, size, one_of(m), m))
        row.mass = size
        if k.weight != NULL and segments_of(p.classes) > 1:
            row.mass = sum_of_lanes(total_of(k.weight, size))
        return row
    sums = class_term(b.x[l] + start, k, size, m, target - start if target >= 0 else -1, lies_as_rows(&p.other))
    row.term = sum_of_lanes(sums.term)
    row.mass = sum_of_lanes(sums.mass)
    if target >= 0:
        start = target - target % LANES            # the same vector, hence the same bits, as in the sum and in the gradient
        k = coefficients_from(p, b.other[l], start)
        row.target_mass = lane_of(coefficient(k, 0, p.classes - start), target - start)
    return row


cdef inline real lane_of(vec lanes, Py_ssize_t lane) noexcept nogil:
    cdef real all[LANES]
    v_store(all, lanes)
    return all[lane]


cdef enum:
    GUESSED_FROM = LANES          # logits at the start of a segment
    GUESS_IS_NEAR = 40            # powers of two; the sum of 2048 numbers that are so much larger than ROOM allows for is finite


cdef bint segment_units(const Problem* p, const real* x, Py_ssize_t size, real* cached, Segment* s) noexcept nogil:
    # Maximum and units: guessed from the segment's start, so that the exponentials need no pass of their own; from the maximum
    # where the guess is far too low. Bits do not depend on the layout, though exponentials that are to take the place of the
    # logits have to wait. -> are they computed already?
    cdef vec guess = exponent_of(v_set(v_fold_max(maximum(x, min(size, <Py_ssize_t>GUESSED_FROM)))))
    if x != cached:
        s.maximum = v_fold_max(exponentials(x, size, units_of(guess, ROOM), cached, True, lies_as_rows(&p.logits)))
    else:
        s.maximum = v_fold_max(maximum(x, size))
    s.exponent = one_of(exponent_of(v_set(s.maximum)))
    if s.exponent - one_of(guess) <= GUESS_IS_NEAR:
        s.exponent = one_of(guess)
        return x != cached
    return False


cdef void sum_segment(const Problem* p, const Batch* b, int l, Py_ssize_t segment, real* discarded) noexcept nogil:
    # maximum · class term · exponentials · their sum
    cdef Py_ssize_t start = segment * SEGMENT, size = segment_size(p.classes, segment), target = -1
    cdef Segment* s = b.segments + l * segments_of(p.classes) + segment
    cdef const real* x = b.x[l] + start
    cdef real* cached = b.cached[l] + start if is_cached(p) else discarded
    cdef bint done
    s.target = -1
    s.own = 0
    done = segment_units(p, x, size, cached, s)
    if p.target == NULL:
        target = position_of(x, size, s.maximum)
        s.target = target + start if target >= 0 else -1
    elif <size_t>(b.rows.target[l] - start) < <size_t>size:
        target = b.rows.target[l] - start
    if has_class_term(p):
        s.row = row_class_term(p, b, l, start, size, s.maximum, s.target)
    if not done:
        exponentials(x, size, units_of(v_set(s.exponent), ROOM), cached, False, lies_as_rows(&p.logits))
    if target >= 0:
        s.own = cached[target] if p.target == NULL else 0.0
        cached[target] = 0
    s.total = sum_of_lanes(total_of(cached, size))
    if p.target == NULL and target >= 0:
        cached[target] = <real>s.own              # of softmax, and of a segment that is not the row's largest, it is an entry


cdef void sum_segment_backward(const Problem* p, const Batch* b, int l, Py_ssize_t segment) noexcept nogil:
    cdef Py_ssize_t start = segment * SEGMENT
    b.segments[l * segments_of(p.classes) + segment].total = sum_of_lanes(
        total_backward(p, b.x[l] + start, b.other[l] + start, segment_size(p.classes, segment))
    )


cdef void combine_segments(const Problem* p, Batch* b, int l) noexcept nogil:
    # The segments' numbers become the row's.
    cdef Py_ssize_t count = segments_of(p.classes), i
    cdef Segment* s = b.segments + l * count
    cdef Rows* r = &b.rows
    cdef Segment* largest = s
    cdef RowSum total = RowSum(0, 0), term = total, mass = total
    cdef double power, below
    cdef real exponent
    if is_backward(p):
        for i in range(count):
            add_to_row(&total, s[i].total)
        r.total[l] = settled_row(total)
        return
    for i in range(1, count):
        if s[i].maximum > largest.maximum:
            largest = s + i
    r.maximum[l] = largest.maximum
    exponent = one_of(exponent_of(v_set(largest.maximum)))
    for i in range(count):
        power = power_of_two(<double>s[i].exponent - <double>exponent) if s[i].exponent != exponent else 1.0
        add_to_row(&total, s[i].total * power)
        if s + i != largest or p.operation == SOFTMAX:
            add_to_row(&total, s[i].own * power)
    r.total[l] = settled_row(total)
    if p.target == NULL:
        r.target[l] = largest.target
        r.target_logit[l] = largest.maximum if largest.target >= 0 else -INFINITY
    if not has_class_term(p):
        return
    for i in range(count):
        below = <double>one_of(finite(v_set(largest.maximum))) - <double>one_of(finite(v_set(s[i].maximum)))
        add_to_row(&term, s[i].row.term)
        add_to_row(&mass, s[i].row.mass)
        if s + i != largest and p.target == NULL:
            add_to_row(&mass, s[i].row.target_mass)
            add_to_row(&term, below * (s[i].row.mass + s[i].row.target_mass) if s[i].row.mass + s[i].row.target_mass != 0 else 0)
        elif s + i != largest:
            add_to_row(&term, below * s[i].row.mass)
    r.term[l] = settled_row(term)
    r.mass[l] = settled_row(mass)
    r.target_mass[l] = largest.row.target_mass


cdef void sum_short_rows_backward(const Problem* p, Batch* b) noexcept nogil:
    cdef int l
    for l in range(b.count):
        b.rows.total[l] = sum_of_lanes(total_backward(p, b.x[l], b.other[l], p.classes))


cdef void sum_short_rows(const Problem* p, Batch* b, real* moved_to) noexcept nogil:
    # Maximum, class term, exponentials and their sum, as in a tile. The state of an earlier call stands for maximum and sum.
    cdef Rows* r = &b.rows
    cdef Py_ssize_t classes = p.classes, stride = (classes + LANES - 1) // LANES * LANES
    cdef bint soft = p.target == NULL
    cdef real maxima[LANES * LANES]           # (rows, LANES)
    cdef vec column[UNIT]
    cdef vec m = v_set(0)
    cdef Units units
    cdef real low[LANES]
    cdef real round_by[LANES]
    cdef real own[LANES]
    cdef RowTerm row
    cdef RowSum sum
    cdef int l, c
    for l in range(LANES):
        m = v_set(0)
        if r.live[l] and p.have_state:
            take_state(p, b, l)
            m = v_set(r.maximum[l])
        elif r.live[l]:
            m = maximum(b.x[l], classes)
        v_store(maxima + l * LANES, m)
    for l from 0 <= l < LANES by UNIT:
        v_load_columns(maxima + l, LANES, UNIT, column)
        for c in range(UNIT):
            m = column[c] if l + c == 0 else v_max(m, column[c])
    v_store(r.maximum, m)
    m = v_max(m, v_sub(v_set(0), m))
    if v_any(v_equal(v_max(v_set(largest_logit()), m), m)):
        for l in range(b.count):
            if r.live[l]:
                move_row(p, b, l, moved_to + l * stride)
    if soft:
        for l in range(b.count):
            r.target[l] = position_of(b.x[l], classes, r.maximum[l]) if r.live[l] else -1
            if r.live[l]:
                r.target_logit[l] = r.maximum[l] if r.target[l] >= 0 else -INFINITY
    if has_class_term(p):
        for l in range(b.count):
            if r.live[l]:
                row = row_class_term(p, b, l, 0, classes, r.maximum[l], r.target[l])
                r.term[l], r.mass[l], r.target_mass[l] = row.term, row.mass, row.target_mass
    if p.have_state:
        return
    units = units_of(exponent_of(v_load(r.maximum)), ROOM)
    v_store(low, units.low)
    v_store(round_by, units.round_by)
    for l in range(b.count):
        if r.live[l]:
            units.low = v_set(low[l])
            units.round_by = v_set(round_by[l])
            exponentials(b.x[l], classes, units, b.summed[l], False, lies_as_rows(&p.logits))
            if r.target[l] >= 0:
                own[l] = b.summed[l][r.target[l]]
                b.summed[l][r.target[l]] = 0
    for l in range(b.count):
        if r.live[l]:
            sum = fold(total_of(b.summed[l], classes))
            if p.operation == SOFTMAX and r.target[l] >= 0:
                add_to_row(&sum, own[l])
                b.summed[l][r.target[l]] = own[l]
            r.total[l] = settled_row(sum)


cdef bint move_row(const Problem* p, Batch* b, int l, real* to) noexcept nogil:
    # A row whose logits are too large is copied and moved by its maximum. -> was it?
    cdef real base = b.rows.maximum[l]
    if not too_large(base):
        return False
    if lies_as_rows(&p.logits):
        moved(b.x[l], p.classes, v_set(base), to)
    else:
        rows_in(&p.logits, b.outer, b.inner + l, 1, p.classes, to, 0)
        moved(to, p.classes, v_set(base), to)
    b.x[l] = to
    b.rows.base[l] = base
    b.rows.maximum[l] = 0
    if b.rows.target[l] >= 0:
        b.rows.target_logit[l] = to[b.rows.target[l]]
    return True


cdef void other_entries(const Problem* p, const Batch* b, int l, Py_ssize_t start, Py_ssize_t size, bint stream) noexcept nogil:
    # Of log_softmax and the backward operations, from the logits.
    cdef const Rows* r = &b.rows
    cdef Entries e
    e.operation = p.operation
    e.x = b.x[l] + start
    e.y = b.other[l] + start if b.other[l] != NULL else NULL
    e.scale = v_set(r.scale[l])
    e.unit = v_set(r.unit[l])
    e.units = units_of(v_set(0), 0)
    entries(&e, size, b.out[l] + start, stream)


cdef void class_term_entries(
    const real* cached, Coefficients coefficients, Py_ssize_t size, real scale, real unit, real* out, bint stream
) noexcept nogil:
    cdef Entries e
    e.operation = CROSS_ENTROPY
    e.x = cached
    e.y = NULL
    e.coefficients = coefficients
    e.scale = v_set(scale)
    e.unit = v_set(unit)
    entries(&e, size, out, stream)


cdef void row_entries(const Problem* p, const Batch* b, int l, Py_ssize_t segment, real* discarded) noexcept nogil:
    # The last step, of one segment: from the cached exponentials, or from those computed again. Both have the same bits, a power
    # of two apart, as long as it leaves the scale a normal number.
    cdef Py_ssize_t start = segment * SEGMENT, size = segment_size(p.classes, segment)
    cdef const Segment* s = b.segments + l * segments_of(p.classes) + segment
    cdef const Rows* r = &b.rows
    cdef real* out = b.out[l] + start
    cdef real* cached = discarded
    cdef bint stream = p.plan.stream and lies_as_rows(&p.out)
    cdef double scale = r.scale[l], inverse = 1, power = 1, tiny = 1e-300 if IS_DOUBLE else 1e-37
    cdef Units units
    if is_backward(p) or p.operation == LOG_SOFTMAX:
        other_entries(p, b, l, start, size, stream)
        return
    if b.hessian[l] != NULL:
        inverse = r.inverse[l]
    if is_cached(p):
        cached = b.cached[l] + start
        if p.classes > SHORT_CLASSES:
            power = power_of_two(<double>s.exponent - <double>one_of(exponent_of(v_set(r.maximum[l]))))
            if fabs(scale * power) > tiny and (b.hessian[l] == NULL or inverse * power > tiny):
                scale *= power
                inverse *= power
                power = 1
    else:
        units = units_of(exponent_of(v_set(r.maximum[l])), ROOM)
        exponentials(b.x[l] + start, size, units, cached, False, lies_as_rows(&p.logits))
    if b.hessian[l] != NULL:
        if power != 1:
            multiplied(cached, size, <real>power)
            power = 1
        curvatures(cached, size, v_set(<real>inverse), v_set(r.curvature[l]), b.hessian[l] + start)
    if r.has_small:
        power *= r.damp[l]
    if power != 1:
        multiplied(cached, size, <real>power)
    if has_class_term(p):
        class_term_entries(cached, coefficients_from(p, b.other[l], start), size, <real>scale, r.unit[l], out, stream)
    else:
        scaled(cached, size, v_set(<real>scale), out, stream)


cdef void finish_row(const Problem* p, const Batch* b, int l) noexcept nogil:
    if b.rows.has_irregular:
        finished(b.out[l], p.classes, v_set(1))
    if p.operation == CROSS_ENTROPY and b.rows.target[l] >= 0:
        b.out[l][b.rows.target[l]] = b.rows.at_target[l]
    if b.hessian[l] != NULL:
        if b.rows.has_irregular:
            finished(b.hessian[l], p.classes, v_set(1))
        if b.rows.target[l] >= 0:
            b.hessian[l][b.rows.target[l]] = b.rows.curvature_at_target[l]


cdef void place_rows(const Problem* p, Batch* b, real* cached, real* other, real* hessian) noexcept nogil:
    # Where the rows are read and written: in place, or where they are copied to.
    cdef bint direct = lies_as_rows(&p.logits), direct_other = lies_as_rows(&p.other), direct_out = lies_as_rows(&p.out)
    cdef Py_ssize_t stride = (p.classes + LANES - 1) // LANES * LANES
    cdef int l
    if not direct:
        rows_in(&p.logits, b.outer, b.inner, b.count, p.classes, cached, stride)
    if not direct_other:
        rows_in(&p.other, b.outer, b.inner, b.count, p.classes, other, stride)
    for l in range(b.count):
        b.cached[l] = cached + l * stride
        b.summed[l] = b.cached[l] if is_cached(p) else b.discarded + (l * stride if p.classes <= SHORT_CLASSES else 0)
        b.x[l] = <real*>element(&p.logits, b.outer, b.inner + l) if direct else b.cached[l]
        b.out[l] = <real*>element(&p.out, b.outer, b.inner + l) if direct_out else b.cached[l]
        b.other[l] = NULL
        if p.other.data != NULL:
            b.other[l] = <real*>element(&p.other, b.outer, b.inner + l) if direct_other else other + l * stride
        b.hessian[l] = NULL
        if p.hessian.data != NULL:
            b.hessian[l] = <real*>element(&p.hessian, b.outer, b.inner + l) if lies_as_rows(&p.hessian) else hessian + l * stride


cdef void sum_row(const Problem* p, Batch* b, int l, Batch* before) noexcept nogil:
    # Between the segments, those of the row `before` are written.
    cdef Py_ssize_t segment
    for segment in range(segments_of(p.classes)):
        if is_backward(p):
            sum_segment_backward(p, b, l, segment)
        else:
            sum_segment(p, b, l, segment, b.discarded)
        if before.count > 0:
            row_entries(p, before, 0, segment, before.discarded)
    combine_segments(p, b, l)
    if before.count > 0:
        finish_row(p, before, 0)
        before.count = 0


cdef void take_state(const Problem* p, Batch* b, int l) noexcept nogil:
    b.rows.maximum[l] = <real>p.row_max[b.position + l]
    b.rows.total[l] = p.row_total[b.position + l]


cdef void row_numbers(const Problem* p, Batch* b) noexcept nogil:
    # From sums to what the entries are made of.
    if is_backward(p):
        backward_of_rows(&b.rows)
    elif p.operation == CROSS_ENTROPY:
        loss_of_rows(p, b.position, b.count, &b.rows)
    else:
        softmax_of_rows(p, &b.rows)


cdef void neutral_lanes(Rows* r) noexcept nogil:
    # Numbers that nothing comes of, in lanes without a row to compute.
    cdef int l
    for l in range(LANES):
        r.base[l] = 0
        r.maximum[l] = 0
        r.target_logit[l] = 0
        r.total[l] = 1
        r.term[l] = 0
        r.mass[l] = 0
        r.target_mass[l] = 0


cdef void zero_row(const Problem* p, const Batch* b, int l, const Strided* array, real* copy) noexcept nogil:
    # in   copy   of the row, where it does not lie as one
    if not lies_as_rows(array):
        memset(copy, 0, p.classes * sizeof(real))
    elif array.data != NULL:
        zeros_out(array, b.outer, b.inner + l, p.classes, p.plan.stream)


cdef void do_rows(
    const Problem* p, Batch* b, Batch* before, real* cached, real* other, real* moved_to, real* hessian
) noexcept nogil:
    # in   b        outer, inner, position, count, segments, discarded
    # in   before   a row whose gradient waits; afterwards b is such a row if the plan is to defer them, else nothing waits
    cdef Py_ssize_t stride = (p.classes + LANES - 1) // LANES * LANES, segment
    cdef bint defer = p.plan.defer, summed = False
    cdef int l, live = start_rows(p, &b.rows, b.position, b.count)
    if live == 0:
        for l in range(b.count):
            ignore_row(p, b.position + l)
        b.count = 0
        return
    place_rows(p, b, cached, other, hessian)
    neutral_lanes(&b.rows)
    for l in range(b.count):
        if b.rows.live[l] and b.rows.target[l] >= 0:
            b.rows.target_logit[l] = b.x[l][b.rows.target[l]]
    if p.classes <= SHORT_CLASSES:
        summed = True
        if is_backward(p):
            sum_short_rows_backward(p, b)
        else:
            sum_short_rows(p, b, moved_to)
    for l in range(b.count):
        if summed or not b.rows.live[l]:
            continue
        if p.have_state:
            take_state(p, b, l)
            move_row(p, b, l, moved_to + l * stride)
            state_of_row(p, b, l)
        else:
            sum_row(p, b, l, before)
            if not is_backward(p) and move_row(p, b, l, moved_to + l * stride):
                sum_row(p, b, l, before)
    row_numbers(p, b)
    if p.out.data == NULL:
        b.count = 0
        return
    if defer:
        return
    for l in range(b.count):
        if b.rows.live[l]:
            for segment in range(segments_of(p.classes)):
                row_entries(p, b, l, segment, b.discarded)
            finish_row(p, b, l)
        else:
            zero_row(p, b, l, &p.out, b.out[l])
            zero_row(p, b, l, &p.hessian, b.hessian[l])
    if not lies_as_rows(&p.out):
        rows_out(cached, stride, b.count, p.classes, &p.out, b.outer, b.inner)
    if not lies_as_rows(&p.hessian):
        rows_out(hessian, stride, b.count, p.classes, &p.hessian, b.outer, b.inner)
    b.count = 0


cdef void state_of_row(const Problem* p, Batch* b, int l) noexcept nogil:
    # What the state of an earlier call does not hold: class probabilities' target and mass.
    cdef Py_ssize_t segment, start, size, count = segments_of(p.classes)
    cdef Segment* s = b.segments + l * count
    cdef double total = b.rows.total[l]
    if p.target != NULL:
        return
    for segment in range(count):
        start, size = segment * SEGMENT, segment_size(p.classes, segment)
        s[segment].maximum = v_fold_max(maximum(b.x[l] + start, size))
        s[segment].exponent = one_of(exponent_of(v_set(s[segment].maximum)))
        s[segment].target = position_of(b.x[l] + start, size, s[segment].maximum)
        s[segment].target += start if s[segment].target >= 0 else 0
        s[segment].total = s[segment].own = 0
        s[segment].row = row_class_term(p, b, l, start, size, s[segment].maximum, s[segment].target)
    combine_segments(p, b, l)
    b.rows.total[l] = total
