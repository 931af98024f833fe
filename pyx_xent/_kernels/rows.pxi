# One row whose classes lie side by side. Long rows are read from memory once: sum and gradient find them in cache.
#
# What leaves a row is (maximum, others): others = sum of e^(x_c - maximum) over all classes but one, the target. So where the
# target has nearly all the probability, its loss log1p(others) and its gradient -others / total keep their digits.


cdef struct RowLoss:
    double loss
    double scale          # of e^(x - maximum) in the gradient: A of SPEC S31 over the total
    double unit           # of w_c q'_c in the gradient
    double at_excluded    # the gradient of the class left out of `others`


# A row without an index target is summed again without its largest class when the others come to less than this.
cdef double CONFIDENT_BELOW = 0.0625


cdef inline RowLoss loss_of_row(
    double maximum, double others,            # in   of the row
    double excluded_exp,                      # in   e^(x - maximum) of the class left out
    double log_total,                         # in   log(others + excluded_exp)
    double hard, double nll,                  # in   (1 - label_smoothing) w_y, and lse - target logit; soft targets: 0, 0
    double spread,                            # in   label_smoothing / classes; soft targets: 1
    double term, double mass,                 # in   sums of w q' (maximum - x) and of w q'
    double excluded_mass,                     # in   w q' of the class left out
    double z_loss,
    double sample, double g,                  # in   sample weight, and upstream gradient with all its factors
) noexcept nogil:
    # SPEC S14, S16, S23, S24, S31: every option becomes a row scale, a class term and the entry of one class. No branches,
    # so that a loop over rows is vectorised.
    cdef RowLoss row
    cdef double per_total = 1.0 / (others + excluded_exp)
    cdef double share = others * per_total
    cdef double lse = maximum + log_total
    cdef double a = (hard + spread * mass) + (2.0 * z_loss * lse if z_loss != 0 else 0.0)
    cdef double at_excluded = hard + spread * excluded_mass
    cdef double loss = hard * nll + (spread * (term + mass * log_total) if spread != 0 else 0.0)
    # A p - K for the class left out; from the others' share where p is near 1.
    cdef double small = a * (excluded_exp * per_total) - at_excluded
    cdef double large = (a - at_excluded) - a * share
    row.loss = sample * (loss + (z_loss * lse * lse if z_loss != 0 else 0.0))
    row.at_excluded = g * (small if share > 0.5 else large)
    row.scale = g * a * per_total
    row.unit = g * spread
    return row


cdef inline double sample_of(const Problem* p, Py_ssize_t position) noexcept nogil:
    return p.sample_weight[position] if p.sample_weight != NULL else 1.0


cdef inline double upstream(const Problem* p, Py_ssize_t position) noexcept nogil:
    return p.grad_scale * sample_of(p, position) * (p.grad_output[position] if p.grad_output != NULL else 1.0)


cdef inline void shift_lanes(
    Shift shift, double room,
    floating* offset, floating* low, floating* round_by,       # out  (LANES,)
) noexcept nogil:
    fill(offset, <floating>shift.offset)
    fill(low, <floating>lowest[floating](shift, room, 0))
    fill(round_by, <floating>rounder[floating](shift, room, 0))


cdef inline double gradient_room(double scale, floating kind) noexcept nogil:
    # The exponentials may be scaled up as far as their scale, divided by as much, stays a normal number.
    if floating is float:
        return headroom(kind) if fabs(scale) > 1e-24 else 0.0
    else:
        return headroom(kind) if fabs(scale) > 1e-210 else 0.0


cdef inline void padded(const floating* values, Py_ssize_t count, floating padding, floating* strip) noexcept nogil:
    cdef Py_ssize_t l
    fill(strip, padding)
    for l in range(count):
        strip[l] = values[l]


cdef inline double row_max_sum(
    const floating* x, Py_ssize_t classes,
    Py_ssize_t excluded,                      # in   the class that is not added, or -1
    Shift shift,
    floating* maximum,                        # out
) noexcept nogil:
    cdef floating offset[LANES]
    cdef floating low[LANES]
    cdef floating round_by[LANES]
    cdef floating left_out[LANES]
    cdef floating m[LANES]
    cdef floating strip[LANES]
    cdef double sums[LANES]
    cdef Py_ssize_t first = 0, size
    cdef int l
    shift_lanes(shift, headroom[floating](0), offset, low, round_by)
    fill[floating](m, -INFINITY)
    fill[double](sums, 0)
    while first < classes:
        size = chunk_size(first, classes)
        for l in range(LANES):
            left_out[l] = <floating>(excluded - first - l)
        if size >= LANES:
            lanes_max_sum(x + first, 1, size, 1, offset, low, round_by, left_out, m, sums)
        else:
            padded(x + first, size, <floating>-INFINITY, strip)
            lanes_max_sum(strip, 1, LANES, 1, offset, low, round_by, left_out, m, sums)
        first += size
    maximum[0] = fold_max(m)
    return fold_sum(sums)


cdef inline Py_ssize_t position_of(
    const floating* x, Py_ssize_t classes, Py_ssize_t stride, floating value
) noexcept nogil:
    # The last class, should the caller's memory have changed meanwhile.
    cdef Py_ssize_t c = 0
    while c < classes - 1 and x[c * stride] != value:
        c += 1
    return c


cdef inline bint misses(double maximum, double reference, floating kind) noexcept nogil:
    # Was the row summed with a reference too far from its maximum?
    reference = 0.0 if reference == -INFINITY else reference
    return maximum > reference + window(kind) or -INFINITY < maximum < reference


cdef inline void row_state(
    const floating* x, Py_ssize_t classes,
    Py_ssize_t excluded,                      # in   the target; -1: none, then a confident row leaves out its largest
    bint keep_digits,                         # in   do that
    double* maximum, double* others,          # out  without a target and not confident: all classes, less 1
) noexcept nogil:
    # One pass over memory, with a reference guessed from the row's start and its target; a second one is rare.
    cdef floating m
    cdef floating strip[LANES]
    cdef double reference, total, of_max
    cdef Shift shift
    if classes >= LANES:
        reference = fold_max(x)
    else:
        padded(x, classes, <floating>-INFINITY, strip)
        reference = fold_max(strip)
    if excluded >= 0 and x[excluded] > reference:
        reference = x[excluded]
    shift = shift_for[floating](reference, 0)
    total = row_max_sum(x, classes, excluded, shift, &m)
    if misses[floating](m, reference, 0):
        shift = shift_for[floating](m, 0)
        total = row_max_sum(x, classes, excluded, shift, &m)
    of_max = exp_of_shifted(m, shift, headroom[floating](0))
    maximum[0] = m
    if excluded >= 0:
        others[0] = total / of_max
        return
    others[0] = total / of_max - 1.0
    if keep_digits and others[0] < CONFIDENT_BELOW:
        others[0] = row_max_sum(x, classes, position_of(x, classes, 1, m), shift, &m) / of_max


cdef inline void row_class_term(
    const floating* x, Py_ssize_t classes, double maximum,
    const floating* weight, const floating* soft, floating keep, floating spread,
    double* term, double* mass,               # out
) noexcept nogil:
    cdef floating reference[LANES]
    cdef floating strip[LANES]
    cdef floating weight_strip[LANES]
    cdef floating soft_strip[LANES]
    cdef floating ones[LANES]
    cdef double terms[LANES]
    cdef double masses[LANES]
    cdef Py_ssize_t first = 0, size
    fill(reference, <floating>maximum)
    fill[floating](ones, 1)
    fill[double](terms, 0)
    fill[double](masses, 0)
    while first < classes:
        size = chunk_size(first, classes)
        if size >= LANES:
            lanes_class_term(
                x + first, LANES, <int>(size // LANES), reference,
                weight + first if weight != NULL else NULL, LANES, False,
                soft + first if soft != NULL else NULL, LANES, keep, spread, terms, masses,
            )
        else:
            padded(x + first, size, <floating>maximum, strip)
            if weight != NULL:
                padded(weight + first, size, <floating>0, weight_strip)
            else:
                padded(ones, size, <floating>0, weight_strip)
            if soft != NULL:
                padded(soft + first, size, <floating>0, soft_strip)
            lanes_class_term(
                strip, LANES, 1, reference, weight_strip, LANES, False,
                soft_strip if soft != NULL else NULL, LANES, keep, spread, terms, masses,
            )
        first += size
    term[0] = fold_sum(terms)
    mass[0] = fold_sum(masses)


cdef inline void row_gradient(
    const floating* x, Py_ssize_t classes,
    double maximum, double scale,             # in   gradient = scale * e^(x - maximum) - unit * w_c q'_c
    bint has_class_term, double unit,
    const floating* weight, const floating* soft, floating keep, floating spread,
    floating* grad,
) noexcept nogil:
    cdef floating offset[LANES]
    cdef floating low[LANES]
    cdef floating round_by[LANES]
    cdef floating scales[LANES]
    cdef floating units[LANES]
    cdef floating strip[LANES]
    cdef floating weight_strip[LANES]
    cdef floating soft_strip[LANES]
    cdef double room = gradient_room[floating](scale, 0)
    cdef Shift shift = shift_for[floating](maximum, 0)
    cdef Py_ssize_t whole = classes // LANES
    cdef Py_ssize_t at = whole * LANES, c
    shift_lanes(shift, room, offset, low, round_by)
    fill(scales, <floating>(scale / exp_of_shifted(maximum, shift, room)))
    fill(units, <floating>unit)
    lanes_gradient(
        x, LANES, whole, offset, low, round_by, scales, NULL, units if has_class_term else NULL,
        weight, LANES, False, soft, LANES, keep, spread, grad, LANES,
    )
    if at < classes:
        padded(x + at, classes - at, <floating>-INFINITY, strip)
        if weight != NULL:
            padded(weight + at, classes - at, <floating>0, weight_strip)
        if soft != NULL:
            padded(soft + at, classes - at, <floating>0, soft_strip)
        lanes_gradient(
            strip, LANES, 1, offset, low, round_by, scales, NULL, units if has_class_term else NULL,
            weight_strip if weight != NULL else NULL, LANES, False,
            soft_strip if soft != NULL else NULL, LANES, keep, spread, strip, LANES,
        )
        for c in range(at, classes):
            grad[c] = strip[c - at]


cdef inline void row_cross_entropy(
    const Problem* p, Py_ssize_t position,
    const floating* x, const floating* soft, floating* grad,   # in, in, out   (classes,)
) noexcept nogil:
    cdef const floating* weight = <const floating*>p.weight
    cdef Py_ssize_t classes = p.classes
    cdef Py_ssize_t excluded = p.target[position] if p.target != NULL else -1
    cdef floating keep = <floating>(1.0 - p.label_smoothing)
    cdef floating spread = <floating>(p.label_smoothing / classes) if p.target == NULL else 0
    cdef bint has_class_term = p.target == NULL or p.label_smoothing != 0
    cdef double maximum, others, term = 0.0, mass = 0.0, excluded_mass = 1.0
    cdef double hard = 0.0, nll = 0.0, excluded_exp = 1.0, log_total
    cdef RowLoss row
    if p.have_state:
        maximum = p.row_max[position]
        others = p.row_others[position]
    else:
        row_state(x, classes, excluded, True, &maximum, &others)
        if p.row_max != NULL:
            p.row_max[position] = maximum
            p.row_others[position] = others
    if excluded < 0 and others < CONFIDENT_BELOW:
        excluded = position_of(x, classes, 1, <floating>maximum)
    if excluded >= 0:
        excluded_exp = exp_below_zero(x[excluded] - maximum)
        if weight != NULL:
            excluded_mass = weight[excluded]
        if soft != NULL:
            excluded_mass = class_coefficient(<floating>excluded_mass, soft[excluded], keep, spread)
    log_total = log1p_of_sum(others + (excluded_exp - 1.0))
    if p.target != NULL:
        nll = log_total - (x[excluded] - maximum)
        hard = (1.0 - p.label_smoothing) * excluded_mass
    if has_class_term:
        row_class_term(x, classes, maximum, weight, soft, keep, spread, &term, &mass)
    row = loss_of_row(
        maximum, others, excluded_exp, log_total, hard, nll, p.label_smoothing / classes if p.target != NULL else 1.0,
        term, mass, excluded_mass, p.z_loss, sample_of(p, position), upstream(p, position),
    )
    if p.loss != NULL:
        p.loss[position] = row.loss
    if grad != NULL:
        row_gradient(x, classes, maximum, row.scale, has_class_term, row.unit, weight, soft, keep, spread, grad)
        if excluded >= 0:
            grad[excluded] = <floating>row.at_excluded


cdef inline void row_softmax(const floating* x, Py_ssize_t classes, floating* out) noexcept nogil:
    cdef double maximum, others
    row_state(x, classes, -1, False, &maximum, &others)
    row_gradient(x, classes, maximum, 1.0 / (1.0 + others), False, 0.0, <const floating*>NULL, <const floating*>NULL, 0, 0, out)


cdef inline void row_log_softmax(const floating* x, Py_ssize_t classes, floating* out) noexcept nogil:
    cdef floating m[LANES]
    cdef floating t[LANES]
    cdef floating strip[LANES]
    cdef double maximum, others
    cdef Py_ssize_t whole = classes // LANES
    cdef Py_ssize_t at = whole * LANES, c
    row_state(x, classes, -1, True, &maximum, &others)
    fill(m, <floating>maximum)
    fill(t, <floating>log1p_of_sum(others))
    lanes_log_softmax(x, LANES, whole, m, t, out, LANES)
    if at < classes:
        padded(x + at, classes - at, <floating>0, strip)
        lanes_log_softmax(strip, LANES, 1, m, t, strip, LANES)
        for c in range(at, classes):
            out[c] = strip[c - at]


cdef inline double row_dot(const floating* a, const floating* b, Py_ssize_t classes) noexcept nogil:
    # b may be NULL: the sum of a
    cdef floating strip_a[LANES]
    cdef floating strip_b[LANES]
    cdef double sums[LANES]
    cdef Py_ssize_t first = 0, size
    fill[double](sums, 0)
    while first < classes:
        size = chunk_size(first, classes)
        if size >= LANES:
            lanes_dot(a + first, LANES, b + first if b != NULL else NULL, LANES, <int>(size // LANES), sums)
        else:
            padded(a + first, size, <floating>0, strip_a)
            if b != NULL:
                padded(b + first, size, <floating>0, strip_b)
            lanes_dot(strip_a, LANES, strip_b if b != NULL else NULL, LANES, 1, sums)
        first += size
    return fold_sum(sums)


cdef inline double exp_scale_of_log_probs(double largest, Shift shift, double total, floating kind) noexcept nogil:
    # total * e^x = (this) * (the shifted exponential of x)
    if largest == -INFINITY:
        return 0.0
    return total * (exp(largest) / exp_of_shifted(largest, shift, headroom(kind)))


cdef inline void row_backward(
    Operation operation,
    const floating* output, const floating* grad_output, Py_ssize_t classes,
    floating* grad,
) noexcept nogil:
    cdef floating offset[LANES]
    cdef floating low[LANES]
    cdef floating round_by[LANES]
    cdef floating k[LANES]
    cdef floating m[LANES]
    cdef floating strip[LANES]
    cdef floating grad_strip[LANES]
    cdef double largest
    cdef Shift shift
    cdef Py_ssize_t whole = classes // LANES
    cdef Py_ssize_t at = whole * LANES, c
    if operation == SOFTMAX_BACKWARD:
        fill(k, <floating>row_dot(grad_output, output, classes))
    else:
        fill[floating](m, -INFINITY)
        lanes_max(output, LANES, whole, m)
        padded(output + at, classes - at, <floating>-INFINITY, strip)
        lanes_max(strip, LANES, 1, m)
        largest = fold_max(m)
        shift = shift_for[floating](largest, 0)
        shift_lanes(shift, headroom[floating](0), offset, low, round_by)
        fill(k, <floating>exp_scale_of_log_probs[floating](
            largest, shift, row_dot(grad_output, <const floating*>NULL, classes), 0
        ))
    padded(output + at, classes - at, <floating>0, strip)
    padded(grad_output + at, classes - at, <floating>0, grad_strip)
    if operation == SOFTMAX_BACKWARD:
        lanes_softmax_backward(output, LANES, grad_output, LANES, whole, k, grad, LANES)
        lanes_softmax_backward(strip, LANES, grad_strip, LANES, 1, k, strip, LANES)
    else:
        lanes_log_softmax_backward(output, LANES, grad_output, LANES, whole, offset, low, round_by, k, grad, LANES)
        lanes_log_softmax_backward(strip, LANES, grad_strip, LANES, 1, offset, low, round_by, k, strip, LANES)
    for c in range(at, classes):
        grad[c] = strip[c - at]


cdef inline void row_nll(
    const Problem* p, Py_ssize_t position, const floating* x, floating* grad,   # any stride from class to class
) noexcept nogil:
    cdef Py_ssize_t target = p.target[position], c
    cdef double factor = 1.0, loss = 0.0
    if target >= 0:
        if p.weight != NULL:
            factor = (<const floating*>p.weight)[target]
        loss = factor * -x[target * p.logits.classes]
    if p.loss != NULL:
        p.loss[position] = loss
    if grad == NULL:
        return
    for c in range(p.classes):
        grad[c * p.grad.classes] = 0
    if target >= 0:
        grad[target * p.grad.classes] = <floating>(-factor * upstream(p, position))
