# LANES neighbouring rows at once, a row in each lane: few classes, and the (N, C, d1..dk) layout without a transposed copy.
#
# Each function has its single-row twin in rows.pxi and adds in the same order, so that a row's bits are the same here.


cdef inline void tile_max_sum(
    const floating* x, Py_ssize_t stride, Py_ssize_t classes,
    const Py_ssize_t* excluded,               # in   (LANES,)  the class that is not added, or -1
    const Shift* shift,                       # in   (LANES,)
    floating* maximum, double* total,         # out  (LANES,)
) noexcept nogil:
    cdef floating offset[LANES]
    cdef floating low[LANES]
    cdef floating round_by[LANES]
    cdef floating left_out[LANES]
    cdef double excluded_class[LANES]
    cdef floating s[LANES]
    cdef double sums[LANES * LANES]
    cdef Py_ssize_t chunk, count, first, residues = min(classes, <Py_ssize_t>LANES)
    cdef int l, j
    for l in range(LANES):
        offset[l] = <floating>shift[l].offset
        low[l] = <floating>lowest[floating](shift[l], headroom[floating](0), 0)
        round_by[l] = <floating>rounder[floating](shift[l], headroom[floating](0), 0)
        excluded_class[l] = <double>excluded[l]
    fill[floating](maximum, -INFINITY)
    for j in range(residues):
        fill[double](sums + j * LANES, 0)
        count = (classes - j + LANES - 1) // LANES
        for chunk in range((count + CHUNK - 1) // CHUNK):
            first = chunk * CHUNK
            for l in range(LANES):
                left_out[l] = <floating>(excluded_class[l] - <double>(first * LANES + j))
            fill[floating](s, 0)
            lanes_max_sum(
                x + (first * LANES + j) * stride, LANES * stride, <int>min(<Py_ssize_t>CHUNK, count - first),
                offset, low, round_by, left_out, maximum, s,
            )
            add_lanes(sums + j * LANES, s)
    fold_tile(sums, residues, total)


cdef inline void fold_tile(
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


cdef inline void tile_state(
    const floating* x, Py_ssize_t stride, Py_ssize_t classes,
    Py_ssize_t* excluded,                     # in/out  (LANES,)  see row_state
    bint keep_digits,
    double* maximum, double* others,          # out  (LANES,)
) noexcept nogil:
    cdef floating reference[LANES]
    cdef floating m[LANES]
    cdef double total[LANES]
    cdef double of_max[LANES]
    cdef Py_ssize_t without[LANES]
    cdef Shift shift[LANES]
    cdef floating v
    cdef bint again = False
    cdef int l
    fill[floating](reference, -INFINITY)
    lanes_max(x, stride, min(classes, <Py_ssize_t>LANES), reference)
    for l in range(LANES):
        if excluded[l] >= 0:
            v = x[excluded[l] * stride + l]
            reference[l] = v if v > reference[l] else reference[l]
        shift[l] = shift_for[floating](reference[l], 0)
    tile_max_sum(x, stride, classes, excluded, shift, m, total)
    for l in range(LANES):
        if misses[floating](m[l], reference[l], 0):
            shift[l] = shift_for[floating](m[l], 0)
            again = True
    if again:
        tile_max_sum(x, stride, classes, excluded, shift, m, total)
    again = False
    for l in range(LANES):
        maximum[l] = m[l]
        of_max[l] = exp_of_shifted(m[l], shift[l], headroom[floating](0))
        others[l] = total[l] / of_max[l]
    for l in range(LANES):
        without[l] = -1
        if excluded[l] < 0:
            others[l] = others[l] - 1.0
            if keep_digits and others[l] < confident_below[floating](0):
                without[l] = position_of(x + l, classes, stride, m[l])
                again = True
    if again:
        tile_max_sum(x, stride, classes, without, shift, m, total)
        for l in range(LANES):
            if without[l] >= 0:
                others[l] = total[l] / of_max[l]
                excluded[l] = without[l]


cdef inline void tile_class_term(
    const floating* x, Py_ssize_t stride, Py_ssize_t classes, const double* maximum,
    const floating* weight, const floating* soft, Py_ssize_t soft_stride, floating keep, floating spread,
    double* term, double* mass,               # out  (LANES,)
) noexcept nogil:
    cdef floating reference[LANES]
    cdef floating t[LANES]
    cdef floating s[LANES]
    cdef double terms[LANES * LANES]
    cdef double masses[LANES * LANES]
    cdef Py_ssize_t chunk, count, first, at, residues = min(classes, <Py_ssize_t>LANES)
    cdef int l, j
    for l in range(LANES):
        reference[l] = <floating>maximum[l]
    for j in range(residues):
        fill[double](terms + j * LANES, 0)
        fill[double](masses + j * LANES, 0)
        count = (classes - j + LANES - 1) // LANES
        for chunk in range((count + CHUNK - 1) // CHUNK):
            first = chunk * CHUNK
            at = first * LANES + j
            fill[floating](t, 0)
            fill[floating](s, 0)
            lanes_class_term(
                x + at * stride, LANES * stride, <int>min(<Py_ssize_t>CHUNK, count - first), reference,
                weight + at if weight != NULL else NULL, LANES, True,
                soft + at * soft_stride if soft != NULL else NULL, LANES * soft_stride, keep, spread, t, s,
            )
            add_lanes(terms + j * LANES, t)
            add_lanes(masses + j * LANES, s)
    fold_tile(terms, residues, term)
    fold_tile(masses, residues, mass)


cdef inline void tile_gradient(
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
    cdef double room
    cdef Shift shift
    cdef int l
    for l in range(LANES):
        room = gradient_room[floating](scale[l], 0)
        shift = shift_for[floating](maximum[l], 0)
        offset[l] = <floating>shift.offset
        low[l] = <floating>lowest[floating](shift, room, 0)
        round_by[l] = <floating>rounder[floating](shift, room, 0)
        scales[l] = <floating>(scale[l] / exp_of_shifted(maximum[l], shift, room))
        units[l] = <floating>unit[l] if unit != NULL else 0
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
    cdef floating dead[LANES]
    cdef Py_ssize_t excluded[LANES]
    cdef double maximum[LANES]
    cdef double others[LANES]
    cdef double excluded_exp[LANES]
    cdef double log_total[LANES]
    cdef double term[LANES]
    cdef double mass[LANES]
    cdef double scale[LANES]
    cdef double unit[LANES]
    cdef double at_excluded[LANES]
    cdef double excluded_mass, nll
    cdef RowLoss row
    cdef Py_ssize_t c
    cdef int l, live = 0
    for l in range(LANES):
        excluded[l] = p.target[position + l] if p.target != NULL and l < rows else -1
        dead[l] = 1 if l >= rows or (p.target != NULL and excluded[l] < 0) else 0
        live += dead[l] == 0
    if live == 0:
        for l in range(rows):
            ignore_row(p, position + l)
        if grad != NULL:
            for c in range(classes):
                fill[floating](grad + c * grad_stride, 0)
        return
    if p.have_state:
        for l in range(LANES):
            maximum[l] = p.row_max[position + l] if l < rows else 0
            others[l] = p.row_others[position + l] if l < rows else 0
            if dead[l] == 0 and excluded[l] < 0 and others[l] < confident_below[floating](0):
                excluded[l] = position_of(x + l, classes, stride, <floating>maximum[l])
    else:
        tile_state(x, stride, classes, excluded, p.target == NULL, maximum, others)
        if p.row_max != NULL:
            for l in range(rows):
                if dead[l] == 0:
                    p.row_max[position + l] = maximum[l]
                    p.row_others[position + l] = others[l]
    for l in range(LANES):
        excluded_exp[l] = x[excluded[l] * stride + l] - maximum[l] if excluded[l] >= 0 else 0
    for l in range(LANES):
        excluded_exp[l] = exp_below_zero(excluded_exp[l])
        log_total[l] = log1p_of_sum(others[l] + (excluded_exp[l] - 1.0))
    fill[double](term, 0)
    fill[double](mass, 0)
    if has_class_term:
        tile_class_term(x, stride, classes, maximum, weight, soft, soft_stride, keep, spread, term, mass)
    for l in range(LANES):
        if dead[l] != 0:
            scale[l] = 0
            unit[l] = 0
            if l < rows:
                ignore_row(p, position + l)
            continue
        excluded_mass = 1.0
        nll = 0.0
        if excluded[l] >= 0:
            if weight != NULL:
                excluded_mass = weight[excluded[l]]
            if soft != NULL:
                excluded_mass = class_coefficient(
                    <floating>excluded_mass, soft[excluded[l] * soft_stride + l], keep, spread
                )
            nll = (maximum[l] - x[excluded[l] * stride + l]) + log_total[l]
        row = loss_of_row(
            p, position + l, maximum[l], others[l], excluded_exp[l], log_total[l], nll, excluded_mass,
            term[l], mass[l], excluded_mass,
        )
        if p.loss != NULL:
            p.loss[position + l] = row.loss
        scale[l] = row.scale
        unit[l] = row.unit
        at_excluded[l] = row.at_excluded
    if grad != NULL:
        tile_gradient(
            x, stride, classes, maximum, scale, unit if has_class_term else NULL, dead,
            weight, soft, soft_stride, keep, spread, grad, grad_stride,
        )
        for l in range(rows):
            if dead[l] == 0 and excluded[l] >= 0:
                grad[excluded[l] * grad_stride + l] = <floating>at_excluded[l]


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
    cdef Py_ssize_t excluded[LANES]
    cdef double maximum[LANES]
    cdef double others[LANES]
    cdef double scale[LANES]
    cdef int l
    for l in range(LANES):
        excluded[l] = -1
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
    cdef floating s[LANES]
    cdef double sums[LANES * LANES]
    cdef double total[LANES]
    cdef Shift shift
    cdef Py_ssize_t chunk, count, first, at, residues = min(p.classes, <Py_ssize_t>LANES)
    cdef bint weighted = p.operation == SOFTMAX_BACKWARD
    cdef int l, j
    for j in range(residues):
        fill[double](sums + j * LANES, 0)
        count = (p.classes - j + LANES - 1) // LANES
        for chunk in range((count + CHUNK - 1) // CHUNK):
            first = chunk * CHUNK
            at = first * LANES + j
            fill[floating](s, 0)
            lanes_dot(
                grad_output + at * grad_output_stride, LANES * grad_output_stride,
                output + at * stride if weighted else NULL, LANES * stride, <int>min(<Py_ssize_t>CHUNK, count - first), s,
            )
            add_lanes(sums + j * LANES, s)
    fold_tile(sums, residues, total)
    if weighted:
        for l in range(LANES):
            k[l] = <floating>total[l]
        lanes_softmax_backward(output, stride, grad_output, grad_output_stride, p.classes, k, grad, grad_stride)
        return
    fill[floating](m, -INFINITY)
    lanes_max(output, stride, p.classes, m)
    for l in range(LANES):
        shift = shift_for[floating](m[l], 0)
        offset[l] = <floating>shift.offset
        low[l] = <floating>lowest[floating](shift, headroom[floating](0), 0)
        round_by[l] = <floating>rounder[floating](shift, headroom[floating](0), 0)
        k[l] = <floating>exp_scale_of_log_probs[floating](m[l], shift, total[l], 0)
    lanes_log_softmax_backward(
        output, stride, grad_output, grad_output_stride, p.classes, offset, low, round_by, k, grad, grad_stride
    )
