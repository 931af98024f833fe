# LANES neighbouring rows at once, a row in each lane: few classes, and the (N, C, d1..dk) layout without a transposed copy.
#
# Each function has its single-row twin in rows.pxi and adds in the same order, so that a row's bits are the same here.


cdef struct TileShift:        # Shift of each lane
    double offset[LANES]
    double exponent[LANES]


cdef inline Shift shift_of_lane(const TileShift* shift, int lane) noexcept nogil:
    cdef Shift one
    one.offset = shift.offset[lane]
    one.exponent = shift.exponent[lane]
    return one


cdef void shift_tile(const double* reference, TileShift* shift, floating kind) noexcept nogil:
    cdef int l
    cdef Shift one
    for l in range(LANES):
        one = shift_for[floating](reference[l], 0)
        shift.offset[l] = one.offset
        shift.exponent[l] = one.exponent


cdef void tile_constants(
    const TileShift* shift, const double* room,
    floating* offset, floating* low, floating* round_by,      # out  (LANES,)  see exp_shifted
) noexcept nogil:
    cdef int l
    cdef Shift one
    for l in range(LANES):
        one = shift_of_lane(shift, l)
        offset[l] = <floating>one.offset
        low[l] = <floating>lowest[floating](one, room[l], 0)
        round_by[l] = <floating>rounder[floating](one, room[l], 0)


cdef void tile_exp_shifted(const double* x, const TileShift* shift, const double* room, double* result) noexcept nogil:
    cdef int l
    for l in range(LANES):
        result[l] = exp_of_shifted(x[l], shift_of_lane(shift, l), room[l])


cdef void tile_max_sum(
    const floating* x, Py_ssize_t stride, Py_ssize_t classes,
    const double* excluded,                   # in   (LANES,)  the class that is not added, or -1
    const TileShift* shift, const double* room,
    double* maximum, double* total,           # out  (LANES,)
) noexcept nogil:
    cdef floating offset[LANES]
    cdef floating low[LANES]
    cdef floating round_by[LANES]
    cdef floating left_out[LANES]
    cdef floating m[LANES]
    cdef double sums[LANES * LANES]
    cdef Py_ssize_t first = 0, size, residues = min(classes, <Py_ssize_t>LANES)
    cdef int l
    tile_constants(shift, room, offset, low, round_by)
    fill[floating](m, -INFINITY)
    memset(sums, 0, sizeof(sums))
    while first < classes:
        size = chunk_size(first, classes)
        for l in range(LANES):
            left_out[l] = <floating>(excluded[l] - <double>first)
        lanes_max_sum(
            x + first * stride, stride, size, <int>min(<Py_ssize_t>LANES, size), offset, low, round_by, left_out, m, sums
        )
        first += size
    fold_tile(sums, residues, total)
    for l in range(LANES):
        maximum[l] = m[l]


cdef void fold_tile(
    double* sums,                             # in   (residues, LANES)  overwritten
    Py_ssize_t residues, double* total,       # out  (LANES,)
) noexcept nogil:
    # The binary tree of fold_sum, in which residues that no class has would add +0.
    cdef Py_ssize_t j, half = LANES // 2
    cdef int l
    while half > 0:
        for j in range(min(half, residues - half)):
            for l in range(LANES):
                sums[j * LANES + l] += sums[(j + half) * LANES + l]
        half = half // 2
    memcpy(total, sums, LANES * sizeof(double))


cdef void tile_state(
    const floating* x, Py_ssize_t stride, Py_ssize_t classes,
    const double* excluded,                   # in   (LANES,)  see row_state
    bint keep_digits,
    double* maximum, double* others,          # out  (LANES,)
) noexcept nogil:
    cdef floating largest[LANES]
    cdef double reference[LANES]
    cdef double total[LANES]
    cdef double of_max[LANES]
    cdef double room[LANES]
    cdef double without[LANES]
    cdef TileShift shift
    cdef int l, missed = 0, confident = 0
    fill[floating](largest, -INFINITY)
    lanes_max(x, stride, min(classes, <Py_ssize_t>LANES), largest)
    if classes > LANES:                       # else the target is among them
        for l in range(LANES):
            if excluded[l] >= 0 and x[<Py_ssize_t>excluded[l] * stride + l] > largest[l]:
                largest[l] = x[<Py_ssize_t>excluded[l] * stride + l]
    for l in range(LANES):
        reference[l] = largest[l]
    fill(room, headroom[floating](0))
    shift_tile[floating](reference, &shift, 0)
    tile_max_sum(x, stride, classes, excluded, &shift, room, maximum, total)
    for l in range(LANES):
        missed |= misses[floating](maximum[l], reference[l], 0)
    if missed:
        for l in range(LANES):
            if misses[floating](maximum[l], reference[l], 0):
                reference[l] = maximum[l]
        shift_tile[floating](reference, &shift, 0)
        tile_max_sum(x, stride, classes, excluded, &shift, room, maximum, total)
    tile_exp_shifted(maximum, &shift, room, of_max)
    for l in range(LANES):
        others[l] = total[l] / of_max[l] - (1.0 if excluded[l] < 0 else 0.0)
    if not keep_digits:
        return
    for l in range(LANES):
        without[l] = -1.0
        if excluded[l] < 0 and others[l] < CONFIDENT_BELOW:
            without[l] = position_of(x + l, classes, stride, <floating>maximum[l])
            confident = 1
    if confident:
        tile_max_sum(x, stride, classes, without, &shift, room, maximum, total)
        for l in range(LANES):
            if without[l] >= 0:
                others[l] = total[l] / of_max[l]


cdef void tile_class_term(
    const floating* x, Py_ssize_t stride, Py_ssize_t classes, const double* maximum,
    const floating* weight, const floating* soft, Py_ssize_t soft_stride, floating keep, floating spread,
    double* term, double* mass,               # out  (LANES,)
) noexcept nogil:
    cdef floating reference[LANES]
    cdef double terms[LANES * LANES]
    cdef double masses[LANES * LANES]
    cdef Py_ssize_t first = 0, size, at, residues = min(classes, <Py_ssize_t>LANES)
    cdef int l, j
    for l in range(LANES):
        reference[l] = <floating>maximum[l]
    memset(terms, 0, sizeof(terms))
    memset(masses, 0, sizeof(masses))
    while first < classes:
        size = chunk_size(first, classes)
        for j in range(min(<Py_ssize_t>LANES, size)):
            at = first + j
            lanes_class_term(
                x + at * stride, LANES * stride, <int>((size - j + LANES - 1) // LANES), reference,
                weight + at if weight != NULL else NULL, LANES, True,
                soft + at * soft_stride if soft != NULL else NULL, LANES * soft_stride, keep, spread,
                terms + j * LANES, masses + j * LANES,
            )
        first += size
    fold_tile(terms, residues, term)
    fold_tile(masses, residues, mass)


cdef void tile_gradient(
    const floating* x, Py_ssize_t stride, Py_ssize_t classes,
    const double* maximum, const double* scale, const double* unit,  # in   (LANES,)  see row_gradient; unit NULL: 0
    const floating* dead,                     # in   (LANES,) or NULL
    const floating* weight, const floating* soft, Py_ssize_t soft_stride, floating keep, floating spread,
    floating* grad, Py_ssize_t grad_stride,
) noexcept nogil:
    cdef floating offset[LANES]
    cdef floating low[LANES]
    cdef floating round_by[LANES]
    cdef floating scales[LANES]
    cdef floating units[LANES]
    cdef double room[LANES]
    cdef double of_max[LANES]
    cdef TileShift shift
    cdef int l
    for l in range(LANES):
        room[l] = gradient_room[floating](scale[l], 0)
        units[l] = <floating>unit[l] if unit != NULL else 0
    shift_tile[floating](maximum, &shift, 0)
    tile_constants(&shift, room, offset, low, round_by)
    tile_exp_shifted(maximum, &shift, room, of_max)
    for l in range(LANES):
        scales[l] = <floating>(scale[l] / of_max[l])
    lanes_gradient(
        x, stride, classes, offset, low, round_by, scales, dead, units if unit != NULL else NULL,
        weight, 1, True, soft, soft_stride, keep, spread, grad, grad_stride,
    )


cdef inline void tile_cross_entropy(
    const Problem* p, Py_ssize_t position, int rows,           # in   the first of `rows` <= LANES positions
    const floating* x, Py_ssize_t stride,
    const floating* soft, Py_ssize_t soft_stride,
    floating* grad, Py_ssize_t grad_stride,
) noexcept nogil:
    cdef const floating* weight = <const floating*>p.weight
    cdef Py_ssize_t classes = p.classes
    cdef floating keep = <floating>(1.0 - p.label_smoothing)
    cdef floating spread = <floating>(p.label_smoothing / classes) if p.target == NULL else 0
    cdef bint has_class_term = p.target == NULL or p.label_smoothing != 0
    cdef double smoothing = p.label_smoothing / classes if p.target != NULL else 1.0
    cdef floating dead[LANES]
    cdef double excluded[LANES]               # a class, or -1: as double, to be vectorised
    cdef double at_excluded_logit[LANES]      # that logit less the maximum
    cdef double excluded_mass[LANES]
    cdef double maximum[LANES]
    cdef double others[LANES]
    cdef double term[LANES]
    cdef double mass[LANES]
    cdef double hard[LANES]
    cdef double sample[LANES]
    cdef double g[LANES]
    cdef double loss[LANES]
    cdef double scale[LANES]
    cdef double unit[LANES]
    cdef double at_excluded[LANES]
    cdef Py_ssize_t c
    cdef int l, live = 0
    for l in range(LANES):
        excluded[l] = p.target[position + l] if p.target != NULL and l < rows else -1
        dead[l] = 1 if l >= rows or (p.target != NULL and excluded[l] < 0) else 0
        live += dead[l] == 0
    for l in range(rows):
        if dead[l] != 0:
            ignore_row(p, position + l)
    if live == 0:
        if grad != NULL:
            for c in range(classes):
                fill[floating](grad + c * grad_stride, 0)
        return
    if p.have_state:
        for l in range(LANES):
            maximum[l] = p.row_max[position + l] if l < rows else 0
            others[l] = p.row_others[position + l] if l < rows else 0
    else:
        tile_state(x, stride, classes, excluded, p.target == NULL, maximum, others)
        if p.row_max != NULL:
            for l in range(rows):
                if dead[l] == 0:
                    p.row_max[position + l] = maximum[l]
                    p.row_others[position + l] = others[l]
    for l in range(LANES):
        if dead[l] == 0 and excluded[l] < 0 and others[l] < CONFIDENT_BELOW:
            excluded[l] = position_of(x + l, classes, stride, <floating>maximum[l])
        at_excluded_logit[l] = 0
        excluded_mass[l] = 1
        sample[l] = sample_of(p, position + l) if l < rows else 0
        g[l] = upstream(p, position + l) if l < rows else 0
        if excluded[l] >= 0:
            c = <Py_ssize_t>excluded[l]
            at_excluded_logit[l] = x[c * stride + l] - maximum[l]
            if weight != NULL:
                excluded_mass[l] = weight[c]
            if soft != NULL:
                excluded_mass[l] = class_coefficient(<floating>excluded_mass[l], soft[c * soft_stride + l], keep, spread)
        hard[l] = (1.0 - p.label_smoothing) * excluded_mass[l] if p.target != NULL else 0.0
    fill[double](term, 0)
    fill[double](mass, 0)
    if has_class_term:
        tile_class_term(x, stride, classes, maximum, weight, soft, soft_stride, keep, spread, term, mass)
    tile_loss(
        maximum, others, at_excluded_logit, hard, smoothing, term, mass, excluded_mass, p.z_loss, sample, g,
        p.target != NULL, loss, scale, unit, at_excluded,
    )
    if p.loss != NULL:
        for l in range(rows):
            if dead[l] == 0:
                p.loss[position + l] = loss[l]
    if grad != NULL:
        tile_gradient(
            x, stride, classes, maximum, scale, unit if has_class_term else NULL, dead if live < LANES else NULL,
            weight, soft, soft_stride, keep, spread, grad, grad_stride,
        )
        for l in range(rows):
            if dead[l] == 0 and excluded[l] >= 0:
                grad[<Py_ssize_t>excluded[l] * grad_stride + l] = <floating>at_excluded[l]


cdef void tile_loss(
    const double* maximum, const double* others, const double* at_excluded_logit, const double* hard, double spread,
    const double* term, const double* mass, const double* excluded_mass, double z_loss,
    const double* sample, const double* g, bint has_target,
    double* loss, double* scale, double* unit, double* at_excluded,    # out  (LANES,)
) noexcept nogil:
    # loss_of_row for each lane, in loops that gcc vectorises.
    cdef double excluded_exp[LANES]
    cdef double log_total[LANES]
    cdef RowLoss row
    cdef int l
    for l in range(LANES):
        excluded_exp[l] = exp_below_zero(at_excluded_logit[l])
    for l in range(LANES):
        log_total[l] = log1p_of_sum(others[l] + (excluded_exp[l] - 1.0))
    for l in range(LANES):
        row = loss_of_row(
            maximum[l], others[l], excluded_exp[l], log_total[l], hard[l],
            log_total[l] - at_excluded_logit[l] if has_target else 0.0, spread,
            term[l], mass[l], excluded_mass[l], z_loss, sample[l], g[l],
        )
        loss[l] = row.loss
        scale[l] = row.scale
        unit[l] = row.unit
        at_excluded[l] = row.at_excluded


cdef inline void ignore_row(const Problem* p, Py_ssize_t position) noexcept nogil:
    if p.loss != NULL:
        p.loss[position] = 0
    if p.row_max != NULL and not p.have_state:
        p.row_max[position] = 0
        p.row_others[position] = 0


cdef inline void tile_softmax(
    const Problem* p, const floating* x, Py_ssize_t stride, floating* out, Py_ssize_t out_stride,
) noexcept nogil:
    cdef floating m[LANES]
    cdef floating t[LANES]
    cdef double excluded[LANES]
    cdef double maximum[LANES]
    cdef double others[LANES]
    cdef double scale[LANES]
    cdef int l
    for l in range(LANES):
        excluded[l] = -1.0
    tile_state(x, stride, p.classes, excluded, p.operation == LOG_SOFTMAX, maximum, others)
    if p.operation == LOG_SOFTMAX:
        for l in range(LANES):
            m[l] = <floating>maximum[l]
            t[l] = <floating>log1p_of_sum(others[l])
        lanes_log_softmax(x, stride, p.classes, m, t, out, out_stride)
        return
    for l in range(LANES):
        scale[l] = 1.0 / (1.0 + others[l])
    tile_gradient(
        x, stride, p.classes, maximum, scale, NULL, NULL,
        <const floating*>NULL, <const floating*>NULL, 0, 0, 0, out, out_stride,
    )


cdef inline void tile_backward(
    const Problem* p, const floating* output, Py_ssize_t stride,
    const floating* grad_output, Py_ssize_t grad_output_stride,
    floating* grad, Py_ssize_t grad_stride,
) noexcept nogil:
    cdef floating offset[LANES]
    cdef floating low[LANES]
    cdef floating round_by[LANES]
    cdef floating k[LANES]
    cdef floating m[LANES]
    cdef double sums[LANES * LANES]
    cdef double total[LANES]
    cdef double largest[LANES]
    cdef double room[LANES]
    cdef TileShift shift
    cdef Py_ssize_t first = 0, size, at, residues = min(p.classes, <Py_ssize_t>LANES)
    cdef bint weighted = p.operation == SOFTMAX_BACKWARD
    cdef int l, j
    memset(sums, 0, sizeof(sums))
    while first < p.classes:
        size = chunk_size(first, p.classes)
        for j in range(min(<Py_ssize_t>LANES, size)):
            at = first + j
            lanes_dot(
                grad_output + at * grad_output_stride, LANES * grad_output_stride,
                output + at * stride if weighted else NULL, LANES * stride, <int>((size - j + LANES - 1) // LANES),
                sums + j * LANES,
            )
        first += size
    fold_tile(sums, residues, total)
    if weighted:
        for l in range(LANES):
            k[l] = <floating>total[l]
        lanes_softmax_backward(output, stride, grad_output, grad_output_stride, p.classes, k, grad, grad_stride)
        return
    fill[floating](m, -INFINITY)
    lanes_max(output, stride, p.classes, m)
    for l in range(LANES):
        largest[l] = m[l]
    fill(room, headroom[floating](0))
    shift_tile[floating](largest, &shift, 0)
    tile_constants(&shift, room, offset, low, round_by)
    for l in range(LANES):
        k[l] = <floating>exp_scale_of_log_probs[floating](largest[l], shift_of_lane(&shift, l), total[l], 0)
    lanes_log_softmax_backward(
        output, stride, grad_output, grad_output_stride, p.classes, offset, low, round_by, k, grad, grad_stride
    )
