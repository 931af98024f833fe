# What happens once a row happens for LANES rows at once: from a row's maximum, sum and target to its loss and to the numbers
# that its gradient is made of. No loop over classes; every option of SPEC sections 4 to 7 is here and nowhere else.
#
# Each row of a loss has a target, whose exponential is left out of the sum, so that a row whose target has nearly all the
# probability keeps the digits of the others: loss = log1p(total / its own), entry = -total / all. With class indices it is the
# labelled class; with class probabilities it is the first of the largest. For log_softmax one of the largest is left out.

cdef struct Rows:
    # Of LANES rows. Each vector begins where a line of memory does: one that has just been stored across two lines is read back
    # late, some 20 ns on Zen 4.
    # in   all in the units of the row (exp.pxi)
    Py_ssize_t target[LANES]      # -1: none
    double total[LANES]           # the sum of the exponentials without the target's; for softmax of all
    double term[LANES]            # Σ w q' (maximum - x), class probabilities without the target
    double mass[LANES]            # Σ w q', likewise
    double target_mass[LANES]     # w q' of the target
    real index[LANES]             # the target as a real, to compare few classes with; -1: none
    real maximum[LANES]
    real base[LANES]              # already subtracted from the logits; 0 but for very large ones
    real target_logit[LANES]      # -inf if there is no target
    # out
    real scale[LANES]             # of the exponentials in the gradient: A of SPEC S31 over the sum of all of them
    real unit[LANES]              # of w q' in the gradient
    real at_target[LANES]         # the target's entry
    real damp[LANES]              # only if has_small: multiplies the exponentials before the scale does
    real inverse[LANES]           # of the Hessian: 1 over the sum of all exponentials
    real curvature[LANES]         # of p (1 - p) in it
    real curvature_at_target[LANES]   # the target's entry
    bint has_small                # a scale would be no normal number
    bint has_irregular            # a row's entries may hold NaN
    # in
    bint all_live
    bint live[LANES]              # not an ignored row, and not beyond the last one
    char to_line[116 - 4 * LANES] # so that the next begins there, too


cdef int start_rows(const Problem* p, Rows* r, Py_ssize_t position, int rows) noexcept nogil:
    # Which rows are computed, and their class indices. -> how many
    # Many short loops without a branch, here and below: few classes cost no more than some of them.
    cdef int l, live = 0
    if p.target == NULL:
        for l in range(LANES):
            r.target[l] = -1
            r.index[l] = -1
            r.live[l] = l < rows
    elif rows == LANES:
        for l in range(LANES):
            r.target[l] = p.target[position + l]
            r.index[l] = <real>p.target[position + l]
            r.live[l] = p.target[position + l] >= 0
    else:
        for l in range(LANES):
            r.target[l] = p.target[position + l] if l < rows else -1
            r.index[l] = <real>r.target[l]
            r.live[l] = r.target[l] >= 0
    if p.options.sample_weight != NULL:
        for l in range(rows):
            if p.options.sample_weight[position + l] == 0:
                r.live[l] = False
                r.index[l] = -1
    if rows == LANES and p.options.sample_weight == NULL:       # all of them, as a rule, which is seen at once
        r.all_live = p.target == NULL or not v_any(v_equal(v_load(r.index), v_set(-1)))
        if r.all_live:
            return LANES
    for l in range(LANES):
        live += r.live[l]
    r.all_live = live == LANES
    return live


cdef inline doubles d_abs(doubles x) noexcept nogil:
    return d_max(x, d_sub(d_set(0.0), x))


cdef inline doubles without_nan_sign(doubles x) noexcept nogil:
    return d_select(d_equal(x, x), x, d_set(NAN))


cdef void put_numbers_of_entries(Rows* r, doubles scale, doubles unit) noexcept nogil:
    cdef vec rounded = v_from_doubles(without_nan_sign(scale))
    cdef doubles check = v_to_doubles(rounded)
    unit = without_nan_sign(unit)
    v_store(r.scale, rounded)
    v_store(r.unit, v_from_doubles(unit))
    r.has_small = False
    check = d_add(d_sub(check, check), d_sub(unit, unit))
    r.has_irregular = d_any(d_unequal(check, d_set(0.0)))


cdef void put_numbers(const Rows* r, int rows, doubles numbers, double* out) noexcept nogil:
    # 0 for ignored rows
    cdef double all[LANES]
    cdef int l
    if r.all_live:
        d_store(out, numbers)
        return
    d_store(all, numbers)
    for l in range(rows):
        out[l] = all[l] if r.live[l] else 0.0


cdef struct Left:
    # Of the term that is left out of the sum
    doubles odds                  # the sum over it
    doubles share                 # what it is of all
    doubles inverse               # 1 / (the sum and it)
    doubles every                 # the sum and it; of double only
    doubles beyond                # how far its logit lies further below the maximum than odds can tell


cdef inline Left left_out(doubles total, doubles y, doubles m, doubles exponent) noexcept nogil:
    # in   y, m   its logit, and the maximum
    cdef Left left
    cdef doubles near = d_max(y, d_sub(m, d_set(600.0))), zero = d_set(0.0), one = d_set(1.0), own, others
    left.beyond = d_sub(near, y)
    if IS_DOUBLE:
        own = exp_once(y, exponent, ROOM)
        left.every = d_add(total, own)
        left.inverse = d_div(one, left.every)
        others = d_mul(total, left.inverse)
        left.share = d_select(d_greater(others, d_set(0.5)), d_mul(own, left.inverse), d_sub(one, others))      # 1 is exactly 1
        if d_any(d_unequal(left.beyond, zero)):
            own = exp_once(near, exponent, ROOM)
        left.odds = d_div(total, own)
    else:
        own = exp_once(d_sub(zero, near), d_sub(zero, exponent), -ROOM)
        left.odds = d_mul(total, own)
        left.share = d_div(one, d_add(one, left.odds))
        left.inverse = left.every = d_mul(own, left.share)
    return left


cdef inline doubles over_all(doubles numbers, const Left* left) noexcept nogil:
    return d_div(numbers, left.every) if IS_DOUBLE else d_mul(numbers, left.inverse)


cdef void put_scale(Rows* r, doubles mass, const Left* left, doubles unit, doubles at_target) noexcept nogil:
    # in   mass   the scale times the sum of all exponentials
    cdef doubles scale = over_all(mass, left), tiny = d_set(1e-307 if IS_DOUBLE else 1e-37), power, zero = d_set(0.0)
    cdef dmask small = d_greater(tiny, d_abs(scale))
    cdef bint has_small = d_any(d_greater(d_select(small, d_abs(mass), zero), zero))
    if has_small:                             # the power of two goes to the exponentials, which is exact
        power = d_set(2.0 ** -300 if IS_DOUBLE else 2.0 ** -64)
        v_store(r.damp, v_from_doubles(d_select(small, power, d_set(1.0))))
        scale = d_select(small, over_all(d_div(mass, power), left), scale)
    put_numbers_of_entries(r, scale, unit)
    v_store(r.at_target, v_from_doubles(without_nan_sign(at_target)))
    r.has_small = has_small


cdef inline doubles log_of_sum(doubles total, doubles y, doubles m, doubles exponent, doubles inverse) noexcept nogil:
    # log of the sum of e^(x - m): log1p(total / of_max) where the maximum m is the target, without losing a digit
    cdef doubles of_max = exp_once(m, exponent, ROOM)
    cdef doubles rest = d_sub(d_div(exp_once(y, exponent, ROOM), of_max), d_set(1.0))
    return log1p_of(d_add(d_div(total, of_max), rest), d_mul(of_max, inverse))


cdef inline doubles target_weights(const Problem* p, const Rows* r) noexcept nogil:
    cdef double weight[LANES]
    cdef int l
    if p.options.weight == NULL:
        return d_set(1.0)
    for l in range(LANES):
        weight[l] = (<const real*>p.options.weight)[r.target[l]] if r.live[l] else 1.0
    return d_load(weight)


cdef inline doubles of_positions(const double* numbers, Py_ssize_t position, int rows) noexcept nogil:
    # NULL: 1
    cdef double all[LANES]
    if numbers == NULL:
        return d_set(1.0)
    if rows == LANES:
        return d_load(numbers + position)
    d_store(all, d_set(1.0))
    memcpy(all, numbers + position, rows * sizeof(double))
    return d_load(all)


cdef inline bint has_class_term(const Problem* p) noexcept nogil:
    return p.operation == CROSS_ENTROPY and (p.target == NULL or p.options.label_smoothing != 0)


cdef struct Focal:
    # Of a row whose target has the probability p
    doubles loss                  # (1 - p)^gamma, its loss over the plain one
    doubles gradient              # that + gamma p (1 - p)^(gamma - 1) (-log p), its gradient over the plain one: SPEC S46


cdef inline doubles to_the_whole(doubles base, int64_t exponent) noexcept nogil:
    cdef doubles power = d_set(1.0)
    while exponent > 0:
        if exponent & 1:
            power = d_mul(power, base)
        base = d_mul(base, base)
        exponent >>= 1
    return power


cdef Focal focal_of(double gamma, const Left* left, doubles others, doubles loss) noexcept nogil:
    # in   others   1 - p
    # in   loss     -log p, without left.beyond: where that is more than 0, p is nothing beside 1
    # A whole gamma takes multiplications alone. Of the rest, log(1 - p) is -log1p(p / (1 - p)).
    cdef int64_t whole = <int64_t>min(gamma, 2.0 ** 62)
    cdef doubles odds = d_div(d_set(1.0), d_max(left.odds, d_set(1e-300))), zero = d_set(0.0), logarithm
    cdef Focal focal
    odds = d_select(d_greater(left.beyond, zero), zero, odds)
    focal.loss = to_the_whole(others, whole)
    if gamma != whole and gamma < 2.0 ** 62:
        logarithm = d_mul(d_set(whole - gamma), log1p_of(odds, others))
        focal.loss = d_mul(focal.loss, exp_once(logarithm, zero, 0.0))
    focal.gradient = d_fma(d_mul(focal.loss, d_set(gamma)), d_mul(odds, loss), focal.loss)
    return focal


cdef void put_curvature(Rows* r, doubles mass, const Left* left, doubles others) noexcept nogil:
    # in   mass     a of SPEC S44
    # in   others   1 - p of the target, which keeps its digits where p is near 1
    v_store(r.inverse, v_from_doubles(left.inverse))
    v_store(r.curvature, v_from_doubles(without_nan_sign(mass)))
    v_store(r.curvature_at_target, v_from_doubles(without_nan_sign(d_mul(mass, d_mul(left.share, others)))))


cdef void loss_of_rows(const Problem* p, Py_ssize_t position, int rows, Rows* r) noexcept nogil:
    # SPEC S14, S16, S23, S24, S31: every option becomes a row scale, a class term and the target's entry.
    cdef bint soft = p.target == NULL, class_term = has_class_term(p), has_z = p.options.z_loss != 0
    cdef vec maximum = v_load(r.maximum)
    cdef doubles m = v_to_doubles(maximum), exponent = v_to_doubles(exponent_of(maximum)), zero = d_set(0.0)
    cdef doubles total = d_load(r.total), y = v_to_doubles(v_load(r.target_logit)), rest = zero, weight = zero, spread = zero
    cdef doubles log_total = zero, loss, lse, sample, g, a, at_target, hard = zero, share, curvature = zero
    cdef Left left = left_out(total, y, m, exponent)
    cdef Focal focal
    sample = of_positions(p.options.sample_weight, position, rows)
    loss = log1p_of(left.odds, left.share)
    if soft:
        log_total = loss
    else:
        if class_term or has_z:
            log_total = log_of_sum(total, y, m, exponent, left.inverse)
        weight = target_weights(p, r)
        hard = d_mul(d_set(1.0 - p.options.label_smoothing), weight)
    share = d_mul(total, left.inverse)
    if p.options.focal_gamma != 0:
        focal = focal_of(p.options.focal_gamma, &left, share, loss)
        loss = d_mul(focal.loss, d_mul(hard, d_add(loss, left.beyond)))
        curvature = d_mul(focal.loss, hard)
        hard = d_mul(focal.gradient, hard)
    else:
        loss = d_mul(hard, d_add(loss, left.beyond))
    at_target = hard
    if class_term:
        if soft:
            spread, weight, rest = d_set(1.0), d_load(r.target_mass), d_load(r.mass)
            a = d_add(rest, weight)
        else:
            spread, a = d_set(p.options.label_smoothing / p.classes), d_set(p.options.weight_sum)
            rest = d_sub(a, weight)
        loss = d_fma(spread, d_fma(a, log_total, d_load(r.term)), loss)
        rest = d_mul(spread, rest)
        at_target = d_fma(spread, weight, at_target)
    if has_z:
        lse = d_add(d_add(m, v_to_doubles(v_load(r.base))), log_total)
        loss = d_fma(d_set(p.options.z_loss), d_mul(lse, lse), loss)
        rest = d_fma(d_set(2.0 * p.options.z_loss), lse, rest)
    if p.loss != NULL:
        put_numbers(r, rows, without_nan_sign(d_mul(sample, loss)), p.loss + position)
    if p.row_max != NULL and not p.have_state:
        put_numbers(r, rows, d_add(m, v_to_doubles(v_load(r.base))), p.row_max + position)
        put_numbers(r, rows, total, p.row_total + position)
    if p.out.data == NULL:
        return
    # The upstream gradient with all its factors.
    g = d_mul(d_mul(d_set(p.options.grad_scale), sample), of_positions(p.options.grad_output, position, rows))
    # a p - (the target's own part), from the others' share where p is near 1
    a = d_add(at_target, rest)
    at_target = d_select(
        d_greater(share, d_set(0.5)), d_sub(d_mul(a, left.share), at_target), d_sub(rest, d_mul(a, share))
    )
    put_scale(r, d_mul(g, a), &left, d_mul(g, spread), d_mul(g, at_target))
    if p.hessian.data != NULL:
        if p.options.focal_gamma == 0:
            curvature = a
        put_curvature(r, d_mul(d_set(p.options.hessian_scale), d_mul(g, curvature)), &left, share)


cdef void softmax_of_rows(const Problem* p, Rows* r) noexcept nogil:
    # Of log_softmax: scale is the log of the sum of e^(x - unit).
    cdef vec maximum = v_load(r.maximum)
    cdef doubles m = v_to_doubles(maximum), total = d_load(r.total)
    cdef Left left
    if p.operation == SOFTMAX:
        put_numbers_of_entries(r, d_div(d_set(1.0), total), d_set(0.0))
        return
    left = left_out(total, m, m, v_to_doubles(exponent_of(maximum)))
    put_numbers_of_entries(r, log1p_of(left.odds, left.share), m)


cdef void backward_of_rows(Rows* r) noexcept nogil:
    # unit is the sum of products for softmax, scale that of the upstream gradient for log_softmax.
    cdef doubles total = d_load(r.total)
    put_numbers_of_entries(r, total, total)
