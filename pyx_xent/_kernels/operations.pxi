# What is computed of a block of rows: SPEC sections 4 to 8.


cdef struct RowLoss:
    double loss
    double scale                  # of the exponentials in the gradient: A of SPEC S31 over the sum of all of them
    double unit                   # of w_c q'_c in the gradient
    double at_excluded            # the gradient of the class left out


cdef inline RowLoss loss_of_row(
    double maximum, double total, double of_excluded,   # in   of the row, see Block
    double log_total,                         # in   log of the sum of e^(x - maximum)
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
    cdef double per_all = 1.0 / (total + of_excluded)
    cdef double share = total * per_all
    cdef double lse = maximum + log_total
    cdef double a = (hard + spread * mass) + (2.0 * z_loss * lse if z_loss != 0 else 0.0)
    cdef double at_excluded = hard + spread * excluded_mass
    cdef double loss = hard * nll + (spread * (term + mass * log_total) if spread != 0 else 0.0)
    # A p - K for the class left out; from the others' share where p is near 1.
    cdef double small = a * (of_excluded * per_all) - at_excluded
    cdef double large = (a - at_excluded) - a * share
    row.loss = sample * (loss + (z_loss * lse * lse if z_loss != 0 else 0.0))
    row.at_excluded = g * (small if share > 0.5 else large)
    row.scale = g * a / (total + of_excluded)      # not with per_all: all entries would have its rounding, too
    row.unit = g * spread
    return row


cdef inline double log_total_of(const Block* b, int l) noexcept nogil:
    # log of the sum of e^(x - maximum): log1p(total / of_max) where the maximum is left out, without losing a digit.
    return log1p_of_sum(b.total[l] / b.of_max[l] + (b.of_excluded[l] / b.of_max[l] - 1.0))


cdef void block_loss(
    Block* b,
    const double* hard, const double* excluded_mass, const double* sample, const double* g,
) noexcept nogil:
    # loss_of_row for each lane, in loops that the compiler vectorises.
    cdef const Problem* p = b.problem
    cdef double spread = p.label_smoothing / p.classes if p.target != NULL else 1.0
    cdef double z_loss = p.z_loss
    cdef double log_total[ROWS]
    cdef double nll[ROWS]
    cdef RowLoss row
    cdef int l
    for l in range(b.lanes):
        log_total[l] = 0
        nll[l] = 0
    if b.have_log_total:
        for l in range(b.lanes):
            log_total[l] = log_total_of(b, l)
    if p.target != NULL:
        for l in range(b.lanes):
            nll[l] = log1p_of_sum(b.total[l] / b.of_excluded[l])
            nll[l] = log_total[l] - b.above_maximum[l] if is_far(b.above_maximum[l]) else nll[l]
    for l in range(b.lanes):
        row = loss_of_row(
            b.maximum[l] + b.base[l], b.total[l], b.of_excluded[l], log_total[l], hard[l], nll[l], spread,
            b.term[l], b.mass[l], excluded_mass[l], z_loss, sample[l], g[l],
        )
        b.loss[l] = row.loss
        b.scale[l] = row.scale
        b.unit[l] = row.unit
        b.at_excluded[l] = row.at_excluded


cdef void block_cross_entropy(Block* b, floating compute) noexcept nogil:
    cdef const Problem* p = b.problem
    cdef const floating* weight = <const floating*>p.weight
    cdef bint soft = p.target == NULL
    cdef double excluded_mass[ROWS]
    cdef double hard[ROWS]
    cdef double sample[ROWS]
    cdef double g[ROWS]
    cdef Py_ssize_t c
    cdef int l
    b.work.weight = weight
    b.work.keep = 1.0 - p.label_smoothing
    b.work.spread = p.label_smoothing / p.classes if soft else 0.0
    b.work.has_class_term = soft or p.label_smoothing != 0
    b.want_log_total = b.work.has_class_term or p.z_loss != 0
    if p.have_state:
        take_state[floating](b, 0)
    else:
        block_state[floating](b, 2.0 if soft else 0.0, 0)
        if p.row_max != NULL:
            give_state(b)
    for l in range(b.lanes):
        sample[l] = 1
        excluded_mass[l] = 1
        b.term[l] = 0
        b.mass[l] = 0
    if p.sample_weight != NULL:
        for l in range(b.rows):
            sample[l] = p.sample_weight[b.position + l]
    for l in range(b.lanes):
        g[l] = p.grad_scale * sample[l]
    if p.grad_output != NULL:
        for l in range(b.rows):
            g[l] *= p.grad_output[b.position + l]
    if weight != NULL:
        for l in range(b.rows):
            if b.excluded[l] >= 0:
                excluded_mass[l] = weight[<Py_ssize_t>b.excluded[l]]
    if soft:
        for l in range(b.rows):
            if b.excluded[l] >= 0:
                c = <Py_ssize_t>b.excluded[l]
                excluded_mass[l] = class_coefficient(
                    <floating>excluded_mass[l],
                    entry[floating](b, b.other, b.next_other, b.work.other_stride, l, c, 0)[0],
                    b.work.keep, b.work.spread,
                )
    for l in range(b.lanes):
        hard[l] = 0.0 if soft else (1.0 - p.label_smoothing) * excluded_mass[l]
    if b.work.has_class_term:
        block_sum[floating](b, CLASS_TERM, b.excluded, b.dead, False, b.term, b.mass, 0)
    block_loss(b, hard, excluded_mass, sample, g)
    if p.loss != NULL:
        for l in range(b.rows):
            p.loss[b.position + l] = 0.0 if b.dead[l] != 0 else b.loss[l]
    if p.grad.data == NULL:
        return
    block_gradient[floating](b, CROSS_ENTROPY, 0)
    put_excluded[floating](b, 0)


cdef void put_excluded(Block* b, floating compute) noexcept nogil:
    # The entry of the class left out, now or with the pending ones; across, tile_finished has put it.
    cdef int l
    if b.work.pending != NULL and b.work.pending.classes > 0:
        b.work.pending.excluded = <Py_ssize_t>b.excluded[0]
        b.work.pending.at_excluded = b.at_excluded[0]
    elif not b.work.across:
        for l in range(b.rows):
            if b.dead[l] == 0 and b.excluded[l] >= 0:
                (<floating*>b.out[l])[<Py_ssize_t>b.excluded[l]] = <floating>b.at_excluded[l]


cdef void block_softmax(Block* b, floating compute) noexcept nogil:
    cdef bint logarithm = b.problem.operation == LOG_SOFTMAX
    # A probability has lost digits only beside one near 1, and of few classes none that matter.
    cdef double confident = 2.0 if logarithm else 1.125 if b.work.classes > FEW_CLASSES else 0.0
    cdef int l
    b.work.has_class_term = False
    b.want_log_total = confident > 0
    b.work.weight = NULL
    block_state[floating](b, confident, 0)
    for l in range(b.lanes):
        b.scale[l] = 1.0 / (b.total[l] + b.of_excluded[l])
        b.unit[l] = 0
        b.at_excluded[l] = b.of_excluded[l] * b.scale[l]
    if logarithm:
        for l in range(b.lanes):
            b.unit[l] = log_total_of(b, l)
        block_entries[floating](b, LOG_SOFTMAX, b.scale, b.unit, 0)
    else:
        block_gradient[floating](b, SOFTMAX, 0)
        put_excluded[floating](b, 0)


cdef void block_backward(Block* b, floating compute) noexcept nogil:
    # Of softmax and log_softmax; x is their output, other the upstream gradient.
    cdef Operation operation = b.problem.operation
    cdef double room = headroom[floating](0)
    cdef double nothing[ROWS]
    cdef int l
    b.work.weight = NULL
    for l in range(b.lanes):
        b.exponent[l] = 0
        b.maximum[l] = 0
        b.total[l] = 0
    if operation == SOFTMAX_BACKWARD:
        block_sum[floating](b, DOT, b.excluded, b.dead, False, nothing, b.total, 0)
    else:
        block_sum[floating](b, SUM_OTHER, b.excluded, b.dead, False, nothing, b.total, 0)
        block_largest[floating](b, b.work.classes, b.maximum, 0)
    for l in range(b.lanes):
        # total * e^x = scale * (the shifted exponential of x)
        b.exponent[l] = exponent_of(b.maximum[l])
        b.low[l] = lowest[floating](b.exponent[l], room, 0)
        b.round_by[l] = rounder[floating](b.exponent[l], room, 0)
        b.scale[l] = 0.0
        if b.maximum[l] != -INFINITY:
            b.scale[l] = b.total[l] * (exp(b.maximum[l]) / exp_in_double[floating](b.maximum[l], b.exponent[l], room, 0))
    block_entries[floating](b, operation, b.scale, b.total, 0)


cdef void do_block(Block* b, floating compute) noexcept nogil:
    cdef Operation operation = b.problem.operation
    if operation == CROSS_ENTROPY:
        block_cross_entropy[floating](b, 0)
    elif operation == SOFTMAX or operation == LOG_SOFTMAX:
        block_softmax[floating](b, 0)
    else:
        block_backward[floating](b, 0)


cdef void do_nll(const Problem* p, Py_ssize_t position, const void* x, void* grad, floating compute) noexcept nogil:
    # One row, any stride from class to class.
    cdef Py_ssize_t target = p.target[position]
    cdef double factor = 1.0, loss = 0.0, g
    cdef floating value
    if target >= 0:
        if p.weight != NULL:
            factor = (<const floating*>p.weight)[target]
        load(
            <const char*>x + target * p.logits.classes * size_of(p.logits.storage), p.logits.storage, 1, 1, &value, 1
        )
        loss = factor * -value
    if p.loss != NULL:
        p.loss[position] = loss
    if grad == NULL:
        return
    store_zeros(grad, p.grad.storage, p.grad.classes, p.classes, p.stream)
    if target >= 0:
        g = p.grad_scale * (p.grad_output[position] if p.grad_output != NULL else 1.0)
        value = <floating>(-factor * g)
        store(
            &value, 1, 1, <char*>grad + target * p.grad.classes * size_of(p.grad.storage), p.grad.storage, 1
        )
