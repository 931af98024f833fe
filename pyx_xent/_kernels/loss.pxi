# What happens once a row happens for LANES rows at once: from a row's maximum, sum and target to its loss and to the numbers
# that its gradient is made of. No loop over classes; every option of SPEC sections 4 to 7 is here and nowhere else.
#
# Each row has a target, whose exponential is left out of the sum, so that a row whose target has nearly all the probability
# keeps the digits of the others: loss = log1p(total / its own), entry = -total / all. With class indices it is the labelled
# class; with class probabilities, and for softmax, it is the first of the largest.

cdef struct Rows:
    # in   of LANES rows, all in the units of the row (exp.pxi)
    bint all_live
    bint live[LANES]              # not an ignored row, and not beyond the last one
    Py_ssize_t target[LANES]      # -1: none
    real maximum[LANES]
    real base[LANES]              # already subtracted from the logits; 0 but for very large ones
    real target_logit[LANES]      # -inf if there is no target
    double total[LANES]           # the sum of the exponentials without the target's
    double term[LANES]            # Σ w q' (maximum - x), class probabilities without the target
    double mass[LANES]            # Σ w q', likewise
    double target_mass[LANES]     # w q' of the target
    # out
    real scale[LANES]             # of the exponentials in the gradient: A of SPEC S31 over the sum of all of them
    real unit[LANES]              # of w q' in the gradient
    real at_target[LANES]         # the target's entry
    real damp[LANES]              # only if has_small: multiplies the exponentials before the scale does
    bint has_small                # a scale would be no normal number
    bint has_irregular            # a row's entries may hold NaN


cdef int start_rows(const Problem* p, Rows* r, Py_ssize_t position, int rows) noexcept nogil:
    # Which rows are computed, and their class indices. -> how many
    # Many short loops without a branch, here and below: few classes cost no more than some of them.
    cdef int l, live = 0
    if rows == LANES and p.target != NULL:
        memcpy(r.target, p.target + position, sizeof(r.target))
        for l in range(LANES):
            r.live[l] = r.target[l] >= 0
    else:
        for l in range(LANES):
            r.target[l] = p.target[position + l] if l < rows and p.target != NULL else -1
            r.live[l] = l < rows and (p.target == NULL or r.target[l] >= 0)
    if p.options.sample_weight != NULL:
        for l in range(rows):
            r.live[l] = r.live[l] and p.options.sample_weight[position + l] != 0
    for l in range(LANES):
        live += r.live[l]
    r.all_live = live == LANES
    return live


cdef inline doubles d_abs(doubles x) noexcept nogil:
    return d_max(x, d_sub(d_set(0.0), x))


cdef inline doubles without_nan_sign(doubles x) noexcept nogil:
    return d_select(d_equal(x, x), x, d_set(NAN))


cdef void put_scale(Rows* r, doubles scale, doubles unit, doubles at_target) noexcept nogil:
    cdef doubles tiny = d_set(1e-307 if IS_DOUBLE else 1e-37), power, zero = d_set(0.0), check
    cdef dmask small = d_greater(tiny, d_abs(scale))
    cdef vec rounded
    scale = without_nan_sign(scale)
    unit = without_nan_sign(unit)
    r.has_small = d_any(d_greater(d_select(small, d_abs(scale), zero), zero))
    if r.has_small:                           # the power of two goes to the exponentials, which is exact
        power = d_set(2.0 ** -300 if IS_DOUBLE else 2.0 ** -64)
        v_store(r.damp, v_from_doubles(d_select(small, power, d_set(1.0))))
        scale = d_select(small, d_div(scale, power), scale)
    rounded = v_from_doubles(scale)
    v_store(r.scale, rounded)
    v_store(r.unit, v_from_doubles(unit))
    v_store(r.at_target, v_from_doubles(without_nan_sign(at_target)))
    check = v_to_doubles(rounded)
    check = d_add(d_sub(check, check), d_sub(unit, unit))
    r.has_irregular = d_any(d_unequal(check, zero))


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


cdef inline doubles log_of_sum(doubles total, doubles of_target, vec maximum, doubles exponent, doubles inverse) noexcept nogil:
    # log of the sum of e^(x - maximum): log1p(total / of_max) where the maximum is the target, without losing a digit
    cdef doubles of_max = exp_in_double(maximum, exponent)
    cdef doubles rest = d_sub(d_div(of_target, of_max), d_set(1.0))
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


cdef void loss_of_rows(const Problem* p, Py_ssize_t position, int rows, Rows* r) noexcept nogil:
    # SPEC S14, S16, S23, S24, S31: every option becomes a row scale, a class term and the target's entry.
    cdef bint soft = p.target == NULL, class_term = has_class_term(p), has_z = p.options.z_loss != 0
    cdef vec m = v_load(r.maximum), k = exponent_of(m), y = v_load(r.target_logit)
    cdef doubles exponent = v_to_doubles(k), one = d_set(1.0), zero = d_set(0.0)
    cdef doubles total = d_load(r.total), of_target = exp_in_double(y, exponent)
    cdef doubles every = d_add(total, of_target), inverse = d_div(one, every), share = d_mul(total, inverse)
    cdef doubles above = d_sub(v_to_doubles(y), v_to_doubles(m)), near_zero = d_set(-600.0)
    cdef doubles log_total = zero, loss = zero, rest = zero, lse, sample, g, a, at_target, hard, weight, spread, scale
    # so far below the maximum that the exponential may be no normal number
    cdef bint far = not soft and d_any(d_equal(d_select(d_greater(above, near_zero), one, zero), zero))
    sample = of_positions(p.options.sample_weight, position, rows)
    if class_term or has_z or far:
        log_total = log_of_sum(total, of_target, m, exponent, inverse)
    hard = zero
    weight = zero
    if not soft:
        weight = target_weights(p, r)
        hard = d_mul(d_set(1.0 - p.options.label_smoothing), weight)
        loss = log1p_of(d_div(total, of_target), d_mul(of_target, inverse))
        if far:
            loss = d_select(d_greater(above, near_zero), loss, d_sub(log_total, above))
        loss = d_mul(hard, loss)
    at_target = hard
    spread = zero
    if class_term:
        if soft:
            spread, weight, rest = one, d_load(r.target_mass), d_load(r.mass)
            a = d_add(rest, weight)
        else:
            spread, a = d_set(p.options.label_smoothing / p.classes), d_set(p.options.weight_sum)
            rest = d_sub(a, weight)
        loss = d_fma(spread, d_fma(a, log_total, d_load(r.term)), loss)
        rest = d_mul(spread, rest)
        at_target = d_fma(spread, weight, at_target)
    if has_z:
        lse = d_add(d_add(v_to_doubles(m), v_to_doubles(v_load(r.base))), log_total)
        loss = d_fma(d_set(p.options.z_loss), d_mul(lse, lse), loss)
        rest = d_fma(d_set(2.0 * p.options.z_loss), lse, rest)
    if p.loss != NULL:
        put_numbers(r, rows, without_nan_sign(d_mul(sample, loss)), p.loss + position)
    if p.row_max != NULL and not p.have_state:
        put_numbers(r, rows, d_add(v_to_doubles(m), v_to_doubles(v_load(r.base))), p.row_max + position)
        put_numbers(r, rows, total, p.row_total + position)
    if p.out.data == NULL:
        return
    # The upstream gradient with all its factors.
    g = d_mul(d_mul(d_set(p.options.grad_scale), sample), of_positions(p.options.grad_output, position, rows))
    # a p - (the target's own part), from the others' share where p is near 1
    a = d_add(at_target, rest)
    at_target = d_select(
        d_greater(share, d_set(0.5)), d_sub(d_mul(a, d_mul(of_target, inverse)), at_target), d_sub(rest, d_mul(a, share))
    )
    scale = d_div(d_mul(g, a), every) if IS_DOUBLE else d_mul(d_mul(g, a), inverse)
    put_scale(r, scale, d_mul(g, spread), d_mul(g, at_target))


cdef void softmax_of_rows(const Problem* p, Rows* r) noexcept nogil:
    cdef vec m = v_load(r.maximum), k = exponent_of(m)
    cdef doubles exponent = v_to_doubles(k), total = d_load(r.total)
    cdef doubles of_target = exp_in_double(v_load(r.target_logit), exponent), zero = d_set(0.0)
    cdef doubles inverse = d_div(d_set(1.0), d_add(total, of_target))
    if p.operation == LOG_SOFTMAX:
        inverse = log_of_sum(total, of_target, m, exponent, inverse)
        put_scale(r, inverse, v_to_doubles(m), d_sub(zero, inverse))
        r.has_small = False
        v_store(r.scale, v_from_doubles(without_nan_sign(inverse)))
    else:
        put_scale(r, inverse, zero, d_mul(of_target, inverse))


cdef void backward_of_rows(const Problem* p, Rows* r) noexcept nogil:
    # Of softmax: unit is the sum of products. Of log_softmax: the sum of the upstream gradient, times e^output in the units of
    # the output's maximum, a power of two apart.
    cdef double exponent[LANES]
    cdef int l
    d_store(exponent, v_to_doubles(exponent_of(v_load(r.maximum))))
    for l in range(LANES):
        exponent[l] = r.total[l] * power_of_two(exponent[l])
    put_scale(r, d_load(exponent), d_load(r.total), d_set(0.0))
    r.has_small = False
    v_store(r.scale, v_from_doubles(d_load(exponent)))
