# Few classes: LANES rows at once, one in each lane. Planes of up to SHORT_CLASSES go the same way where nothing but the sum adds
# over classes, because that may be added as a row adds it: so they need not be transposed.
#
# A panel of some tiles goes through each step before the next step begins, so that what single rows do to single numbers
# (reading the target's logit, taking it out of the sum, writing its entry) has long reached the cache when vectors read it.

cdef struct Panel:
    Rows* rows                    # (tiles,)
    real* x                       # (tiles, classes, LANES)  logits, then exponentials, then the gradient
    real* other                   # likewise: class probabilities, then w q'; without them a place for exponentials
    real* hessian                 # likewise, if it is wanted
    const real* weight            # (classes, LANES)  the weight of a class in all lanes; NULL: 1


cdef void spread_weight(const Problem* p, Panel* panel, real* to) noexcept nogil:
    cdef Py_ssize_t c
    panel.weight = NULL
    if p.options.weight != NULL and has_class_term(p):
        panel.weight = to
        for c in range(p.classes):
            v_store(to + c * LANES, v_set((<const real*>p.options.weight)[c]))


cdef void zero_beyond_classes(const Problem* p, Panel* panel) noexcept nogil:
    # Once: no step writes there.
    cdef Py_ssize_t beyond = (p.plan.tile_classes - p.classes) * LANES * sizeof(real), t
    for t in range((p.plan.rows + LANES - 1) // LANES):
        memset(panel.x + (t * p.plan.tile_classes + p.classes) * LANES, 0, beyond)
        if panel.other != NULL:
            memset(panel.other + (t * p.plan.tile_classes + p.classes) * LANES, 0, beyond)


cdef void tile_maximum(const Problem* p, real* x, Rows* r, Py_ssize_t position) noexcept nogil:
    # From the tile, or from the state of an earlier call; then the tile is moved if that is too large.
    cdef Py_ssize_t size = p.classes * LANES
    cdef vec m = v_set(0), zero = m, size_of_m
    cdef int l
    if p.have_state:
        for l in range(LANES):
            r.maximum[l] = <real>p.row_max[position + l] if r.live[l] else 0
            r.total[l] = p.row_total[position + l] if r.live[l] else 1
        m = v_load(r.maximum)
    else:
        m = maximum(x, size)
        v_store(r.maximum, m)
    v_store(r.base, zero)
    size_of_m = v_max(m, v_sub(zero, m))
    if v_any(v_equal(v_max(v_set(largest_logit()), size_of_m), size_of_m)):
        for l in range(LANES):
            r.base[l] = r.maximum[l] if r.live[l] and too_large(r.maximum[l]) else 0
        for l in range(p.classes):
            v_store(x + l * LANES, v_sub(v_load(x + l * LANES), v_load(r.base)))
        v_store(r.maximum, v_sub(v_load(r.maximum), v_load(r.base)))


cdef void tile_largest(const real* x, Py_ssize_t classes, Rows* r) noexcept nogil:
    # The target is the first of the largest; -1 where there is none, beside NaN.
    cdef vec found = v_set(-1), m = v_load(r.maximum)
    cdef real largest[LANES]
    cdef Py_ssize_t c
    cdef int l
    for c in range(classes - 1, -1, -1):
        found = v_select(v_equal(v_load(x + c * LANES), m), v_set(<real>c), found)
    v_store(largest, found)
    for l in range(LANES):
        r.target[l] = <Py_ssize_t>largest[l]
        r.index[l] = largest[l] if r.live[l] else -1


cdef enum:
    COMPARED_CLASSES = 16         # to compare each of so few with the target takes less time than finding one number in each lane


cdef inline vec tile_chosen(const real* x, Py_ssize_t classes, vec index) noexcept nogil:
    # -> the target's number in each lane; -inf where there is no target
    cdef vec found = v_set(-INFINITY)
    cdef Py_ssize_t c
    for c in range(classes):
        found = v_select(v_equal(index, v_set(<real>c)), v_load(x + c * LANES), found)
    return found


cdef inline void tile_replace(const Problem* p, const Rows* r, vec by, real* x) noexcept nogil:
    # in/out   x   the target's number in each lane
    cdef real numbers[LANES]
    cdef vec index
    cdef Py_ssize_t c
    cdef int l
    if p.classes <= COMPARED_CLASSES:
        index = v_load(r.index)
        for c in range(p.classes):
            v_store(x + c * LANES, v_select(v_equal(index, v_set(<real>c)), by, v_load(x + c * LANES)))
        return
    v_store(numbers, by)
    for l in range(LANES):
        if r.all_live and p.target != NULL or r.live[l] and r.target[l] >= 0:
            x[r.target[l] * LANES + l] = numbers[l]


cdef void tile_target(const Problem* p, const real* x, Rows* r) noexcept nogil:
    cdef int l
    if p.operation != CROSS_ENTROPY:
        if not r.all_live:
            for l in range(LANES):
                r.maximum[l] = r.maximum[l] if r.live[l] else 0
        return
    if p.target == NULL:
        tile_largest(x, p.classes, r)
    if p.classes <= COMPARED_CLASSES:
        v_store(r.target_logit, tile_chosen(x, p.classes, v_load(r.index)))
        if r.all_live:
            return
    elif r.all_live and p.target != NULL:
        for l in range(LANES):
            r.target_logit[l] = x[r.target[l] * LANES + l]
        return
    for l in range(LANES):
        if r.live[l]:
            r.target_logit[l] = x[r.target[l] * LANES + l] if r.target[l] >= 0 else -INFINITY
        else:                                     # numbers that nothing comes of
            r.maximum[l] = 0
            r.base[l] = 0
            r.target_logit[l] = 0


cdef void tile_class_term(const Problem* p, const Panel* panel, const real* x, real* other, Rows* r) noexcept nogil:
    cdef Py_ssize_t size = p.classes * LANES, c
    cdef Coefficients k
    cdef Term sums
    cdef vec m = v_load(r.maximum)
    cdef int l
    if p.target != NULL:
        sums.term = distances(x, panel.weight, size, 0, m)
        d_store(r.term, settled(&sums.term))
        return
    k = coefficients_of(p, panel.weight, other)
    if k.given == NULL:
        for c from 0 <= c < size by LANES:
            v_store(other + c, coefficient(k, c, size))
    for l in range(LANES):
        r.target_mass[l] = 0
        if r.live[l] and r.target[l] >= 0:
            r.target_mass[l] = other[r.target[l] * LANES + l]
            other[r.target[l] * LANES + l] = 0
    k.given = other
    sums = class_term(x, k, size, m, -1, False)
    d_store(r.term, settled(&sums.term))
    d_store(r.mass, settled(&sums.mass))


cdef void tile_sum(const Problem* p, real* x, real* cached, Rows* r) noexcept nogil:
    # in/out   x        the logits; then the exponentials, where somebody needs them again
    # out      cached   of more than FEW_CLASSES without a target: memory for them without the largest
    # The largest is left out of the sum where no target is, but of few floats for softmax, whose rounding counts for less.
    cdef Py_ssize_t size = p.classes * LANES
    cdef bint few = p.classes <= FEW_CLASSES, logarithm = p.operation == LOG_SOFTMAX
    cdef bint without = logarithm or (p.operation == SOFTMAX and (IS_DOUBLE or not few))
    cdef int l
    cdef vec m = v_load(r.maximum), largest = m
    cdef Units units = units_of(exponent_of(m), ROOM)
    cdef Sum sum
    if without:
        largest = exp_in(units, m)
    if few and without:
        sum = few_exponentials(x, p.classes, units, True, largest, NULL if logarithm else x)
    elif few:
        sum = few_exponentials(x, p.classes, units, False, largest, x if p.out.data != NULL else NULL)
    elif without:
        exponentials_without(x, size, units, m, cached if logarithm else x, cached)
        sum = total_of_tile(cached, p.classes)
    else:
        exponentials(x, size, units, x, False, False)
        sum = total_of_tile(x, p.classes)
    if p.have_state:
        return
    if without and not logarithm:
        add(&sum, v_to_doubles(largest))
    d_store(r.total, settled(&sum))
    if not r.all_live:
        for l in range(LANES):
            r.total[l] = r.total[l] if r.live[l] else 1.0


cdef void tile_gradient(const Problem* p, const Panel* panel, real* x, const real* other, Rows* r) noexcept nogil:
    # in/out   x   the exponentials become the gradient; of LOG_SOFTMAX the logits the result
    cdef Py_ssize_t size = p.classes * LANES, c
    cdef Entries e
    if r.has_small and p.operation != LOG_SOFTMAX:
        for c from 0 <= c < size by LANES:
            v_store(x + c, v_mul(v_load(x + c), v_load(r.damp)))
    if has_class_term(p) or p.operation == LOG_SOFTMAX:
        e.operation = p.operation
        e.x = x
        e.y = NULL
        e.coefficients.given = panel.weight if p.target != NULL else other
        e.coefficients.probabilities = NULL
        e.scale = v_load(r.scale)
        e.unit = v_load(r.unit)
        entries(&e, size, x, False)
    else:
        scaled(x, size, v_load(r.scale), x, False)


cdef void tile_finished(const Problem* p, real* x, const Rows* r) noexcept nogil:
    cdef real live[LANES]
    cdef int l
    if r.has_irregular or not r.all_live:
        for l in range(LANES):
            live[l] = r.live[l]
        finished(x, p.classes * LANES, v_load(live))


cdef void panel_forward(const Problem* p, Panel* panel, Py_ssize_t position, Py_ssize_t rows) noexcept nogil:
    # cross_entropy, softmax, log_softmax
    cdef Py_ssize_t tiles = (rows + LANES - 1) // LANES, size = p.plan.tile_classes * LANES, t
    cdef bint has_term = has_class_term(p)
    cdef Rows* r
    cdef real* x
    cdef real* other
    for t in range(tiles):
        r = panel.rows + t
        x = panel.x + t * size
        tile_maximum(p, x, r, position + t * LANES)
        tile_target(p, x, r)
        if has_term:
            tile_class_term(p, panel, x, panel.other + t * size if panel.other != NULL else NULL, r)
    for t in range(tiles if p.operation == CROSS_ENTROPY else 0):
        tile_replace(p, panel.rows + t, v_set(-INFINITY), panel.x + t * size)
    for t in range(tiles):
        r = panel.rows + t
        x = panel.x + t * size
        other = panel.other + t * size if panel.other != NULL else NULL
        tile_sum(p, x, other, r)
        if p.operation == CROSS_ENTROPY:
            loss_of_rows(p, position + t * LANES, <int>min(<Py_ssize_t>LANES, rows - t * LANES), r)
        else:
            softmax_of_rows(p, r)
        if p.hessian.data != NULL:
            curvatures(x, p.classes * LANES, v_load(r.inverse), v_load(r.curvature), panel.hessian + t * size)
            tile_finished(p, panel.hessian + t * size, r)
        if p.out.data != NULL:
            tile_gradient(p, panel, x, other, r)
            tile_finished(p, x, r)
    if p.out.data == NULL or p.operation != CROSS_ENTROPY:
        return
    for t in range(tiles):
        tile_replace(p, panel.rows + t, v_load(panel.rows[t].at_target), panel.x + t * size)
    for t in range(tiles if p.hessian.data != NULL else 0):
        tile_replace(p, panel.rows + t, v_load(panel.rows[t].curvature_at_target), panel.hessian + t * size)


cdef void panel_backward(const Problem* p, Panel* panel, Py_ssize_t rows) noexcept nogil:
    # Of softmax and log_softmax; x is their output, other the upstream gradient.
    cdef Py_ssize_t tiles = (rows + LANES - 1) // LANES, size = p.plan.tile_classes * LANES, t
    cdef Rows* r
    cdef Sum sum
    cdef Entries e
    e.operation = p.operation
    e.units = units_of(v_set(0), 0)
    for t in range(tiles):
        r = panel.rows + t
        e.x = panel.x + t * size
        e.y = panel.other + t * size
        sum = total_backward(p, e.x, e.y, size)
        d_store(r.total, settled(&sum))
        backward_of_rows(r)
        e.scale = v_load(r.scale)
        e.unit = v_load(r.unit)
        entries(&e, size, panel.x + t * size, False)
        tile_finished(p, panel.x + t * size, r)


cdef void do_panel(const Problem* p, Panel* panel, Py_ssize_t position, Py_ssize_t rows) noexcept nogil:
    cdef Py_ssize_t k, live = 0
    for k from 0 <= k < rows by LANES:
        live += start_rows(p, panel.rows + k // LANES, position + k, <int>min(<Py_ssize_t>LANES, rows - k))
    if live == 0:
        for k in range(position, position + rows):
            ignore_row(p, k)
        return
    panel_in(&p.logits, p, position, rows, panel.x)
    if p.other.data != NULL:
        panel_in(&p.other, p, position, rows, panel.other)
    if p.operation == SOFTMAX_BACKWARD or p.operation == LOG_SOFTMAX_BACKWARD:
        panel_backward(p, panel, rows)
    else:
        panel_forward(p, panel, position, rows)
    if p.out.data != NULL:
        panel_out(panel.x, &p.out, p, position, rows)
    if p.hessian.data != NULL:
        panel_out(panel.hessian, &p.hessian, p, position, rows)
