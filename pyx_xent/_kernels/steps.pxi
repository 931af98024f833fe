# The straight lines: loops over the vectors of one tile, or of one row or a segment of it. Both kernels are made of these.
#
# To a step, numbers are `size` reals side by side, a vec at a time; what it does in a lane it does in all. In a tile, vector c
# holds class c of LANES rows, and lanes never meet. In a row, vector i holds LANES neighbouring classes; the last one may be
# partial, and the caller folds the lanes of a result. So the constants of a row (scale, units, ...) come as a vec as well: one
# for each lane of a tile, or the same in all.
#
# Of floats a sum adds GROUP vectors as a tree, and the groups in double; of doubles two, and then keeps what the sum of these
# rounds away, because 50,000 classes would cost 3 ULP; of few classes one. The order depends on nothing but the number of
# classes (SPEC S36).

cdef enum:
    GROUP = 8                     # vectors


cdef struct Sum:
    doubles total
    doubles lost                  # what the additions have rounded away; of double only


cdef inline Sum nothing() noexcept nogil:
    cdef Sum sum
    sum.total = sum.lost = d_set(0.0)
    return sum


cdef inline void add(Sum* sum, doubles part) noexcept nogil:
    # Knuth's: what is lost is known exactly, whichever of the two is larger.
    cdef doubles before = sum.total, moved
    sum.total = d_add(before, part)
    if IS_DOUBLE:
        moved = d_sub(sum.total, before)
        sum.lost = d_add(sum.lost, d_add(d_sub(before, d_sub(sum.total, moved)), d_sub(part, moved)))


cdef inline doubles settled(const Sum* sum) noexcept nogil:
    # Rounded once. Of an infinite sum nothing is lost: what has been computed as such is NaN.
    if IS_DOUBLE:
        return d_add(sum.total, d_select(d_equal(sum.lost, sum.lost), sum.lost, d_set(0.0)))
    return sum.total


# The same of one row:


cdef struct RowSum:
    double total
    double lost


cdef inline void add_to_row(RowSum* sum, double part) noexcept nogil:
    cdef double before = sum.total, moved
    sum.total = before + part
    if IS_DOUBLE:
        moved = sum.total - before
        sum.lost += (before - (sum.total - moved)) + (part - moved)


cdef inline double settled_row(RowSum sum) noexcept nogil:
    if IS_DOUBLE:
        return sum.total + (sum.lost if sum.lost == sum.lost else 0.0)
    return sum.total


cdef inline RowSum fold(Sum sum) noexcept nogil:
    # The sum of the lanes, as a tree
    cdef RowSum lanes[LANES]
    cdef double all[LANES]
    cdef int l, half = LANES // 2
    if not IS_DOUBLE:
        lanes[0].total = d_fold_add(sum.total)
        lanes[0].lost = 0
        return lanes[0]
    d_store(all, sum.total)
    for l in range(LANES):
        lanes[l].total = all[l]
    d_store(all, sum.lost)
    for l in range(LANES):
        lanes[l].lost = all[l]
    while half > 0:
        for l in range(half):
            lanes[l].lost += lanes[l + half].lost
            add_to_row(&lanes[l], lanes[l + half].total)
        half = half // 2
    return lanes[0]


cdef inline double sum_of_lanes(Sum sum) noexcept nogil:
    return settled_row(fold(sum))


cdef Sum fold_each(Sum* lanes) noexcept nogil:
    # The same for LANES of them at once; lanes[l] holds lane l of each.
    cdef int l, half = LANES // 2
    while half > 0:
        for l in range(half):
            if IS_DOUBLE:
                lanes[l].lost = d_add(lanes[l].lost, lanes[l + half].lost)
            add(&lanes[l], lanes[l + half].total)
        half = half // 2
    return lanes[0]


cdef inline vec at(const real* x, Py_ssize_t i, Py_ssize_t size, real rest) noexcept nogil:
    # The vector from x[i] on; from `size` on there is `rest`.
    return v_load(x + i) if i + LANES <= size else v_load_first(x + i, <int>(size - i), rest)


cdef vec maximum(const real* x, Py_ssize_t size) noexcept nogil:
    # -> of each lane; NaN is passed over
    cdef vec a = v_set(-INFINITY), b = a, c = a, d = a
    cdef Py_ssize_t i = 0
    while i + 4 * LANES <= size:
        a = v_max(a, v_load(x + i))
        b = v_max(b, v_load(x + i + LANES))
        c = v_max(c, v_load(x + i + 2 * LANES))
        d = v_max(d, v_load(x + i + 3 * LANES))
        i += 4 * LANES
    while i < size:
        a = v_max(a, at(x, i, size, -INFINITY))
        i += LANES
    return v_max(v_max(a, b), v_max(c, d))


cdef vec exponentials(
    const real* x, Py_ssize_t size,           # in
    Units units,                              # in   of the row or rows
    real* cached,                             # out  whole vectors, +0 from `size` on; may be x
    bint with_maximum,                        # in
    bint ask_ahead,                           # in   for what comes next, while memory is idle. Not of a thread's own memory:
) noexcept nogil:                             #      what comes next there is another thread's
    # -> the maximum of x in each lane, as `maximum` has it, if that is asked for
    cdef vec m = v_set(-INFINITY), logits
    cdef Py_ssize_t i = 0
    while i + LANES <= size:
        if ask_ahead:
            v_prefetch(x + i + SEGMENT)
        logits = v_load(x + i)
        if with_maximum:
            m = v_max(m, logits)
        v_store(cached + i, exp_in(units, logits))
        i += LANES
    if i < size:
        logits = v_load_first(x + i, <int>(size - i), -INFINITY)
        m = v_max(m, logits)
        v_store(cached + i, exp_in(units, logits))
    return m


cdef void exponentials_without(
    const real* x, Py_ssize_t size,           # in   whole vectors
    Units units,                              # in
    vec largest,                              # in   of x, in each lane
    real* cached,                             # out  the exponentials; may be x
    real* summed,                             # out  the same, but 0 for the first of the largest; may be `cached`, which is lost then
) noexcept nogil:
    # A rounding of the sum beside the largest would cost the others 2 ULP, and the logarithm of a sum near it all its digits.
    cdef vec logits, value
    cdef mask found
    cdef Py_ssize_t i
    for i from 0 <= i < size by LANES:
        logits = v_load(x + i)
        value = exp_in(units, logits)
        found = v_equal(logits, largest)
        largest = v_select(found, v_set(NAN), largest)         # which nothing is equal to
        v_store(cached + i, value)
        v_store(summed + i, v_select(found, v_set(0), value))


cdef inline vec tree(const real* x, Py_ssize_t step) noexcept nogil:
    cdef vec a = v_add(v_load(x), v_load(x + step))
    cdef vec b = v_add(v_load(x + 2 * step), v_load(x + 3 * step))
    cdef vec c = v_add(v_load(x + 4 * step), v_load(x + 5 * step))
    cdef vec d = v_add(v_load(x + 6 * step), v_load(x + 7 * step))
    return v_add(v_add(a, b), v_add(c, d))


cdef inline Sum total_of_steps(const real* x, Py_ssize_t groups, Py_ssize_t size, Py_ssize_t step) noexcept nogil:
    # -> the sum in each lane of the vectors at x, x + step, ...: so many whole groups of them, and what is left
    cdef Sum sum = nothing()
    cdef vec group
    cdef Py_ssize_t i = 0, k
    while groups > 0:
        if IS_DOUBLE:
            for k in range(0, GROUP, 2):
                add(&sum, v_to_doubles(v_add(v_load(x + i + k * step), v_load(x + i + (k + 1) * step))))
        else:
            add(&sum, v_to_doubles(tree(x + i, step)))
        i += GROUP * step
        groups -= 1
    if IS_DOUBLE:
        while i < size:
            add(&sum, v_to_doubles(at(x, i, size, 0)))
            i += step
    elif i < size:
        group = at(x, i, size, 0)
        i += step
        while i < size:
            group = v_add(group, at(x, i, size, 0))
            i += step
        add(&sum, v_to_doubles(group))
    return sum


cdef inline Sum total_of(const real* x, Py_ssize_t size) noexcept nogil:
    # -> the sum in each lane
    return total_of_steps(x, size // (GROUP * LANES), size, LANES)


cdef inline Sum few_exponentials(
    const real* x, Py_ssize_t classes,        # in
    Units units,                              # in
    bint without, vec largest,                # in   is all but one term of the largest left out?
    real* cached,                             # out  may be x; NULL: nobody needs them again
) noexcept nogil:
    # -> the sum in each lane of a tile, in double from the start: a few roundings of one row do not average out, and would cost
    # its loss half a ULP. In one loop, because what has just been stored is read back late.
    cdef Sum sum = nothing()
    cdef vec count = v_set(0), value
    cdef mask found
    cdef Py_ssize_t c
    for c in range(classes):
        value = exp_in(units, v_load(x + c * LANES))
        if cached != NULL:
            v_store(cached + c * LANES, value)
        if without:
            found = v_equal(value, largest)
            count = v_add(count, v_select(found, v_set(1), v_set(0)))
            value = v_select(found, v_set(0), value)
        add(&sum, v_to_doubles(value))
    if without:                               # all but one of those that were left out
        add(&sum, d_mul(d_sub(v_to_doubles(count), d_set(1.0)), v_to_doubles(largest)))
    return sum


cdef Sum total_of_tile(const real* x, Py_ssize_t classes) noexcept nogil:
    # -> the sum in each lane of a tile, added as a row's: each class in the lane that it would have there. The last vector of that
    # is whole, too: beyond the classes there are zeros.
    cdef Sum lanes[LANES]
    cdef Py_ssize_t step = LANES * LANES, size = (classes + LANES - 1) // LANES * step
    cdef int l
    for l in range(LANES):
        lanes[l] = total_of_steps(x + l * LANES, classes // (GROUP * LANES), size - l * LANES, step)
    return fold_each(lanes)


cdef Sum dot(const real* x, const real* y, Py_ssize_t size) noexcept nogil:
    # -> the sum of products in each lane
    cdef Sum sum = nothing()
    cdef vec group
    cdef Py_ssize_t i = 0, end
    while i + GROUP * LANES <= size:
        group = v_mul(v_load(x + i), v_load(y + i))
        end = i + GROUP * LANES
        i += LANES
        while i < end:
            group = v_fma(v_load(x + i), v_load(y + i), group)
            i += LANES
        add(&sum, v_to_doubles(group))
    if i < size:
        group = v_mul(at(x, i, size, 0), at(y, i, size, 0))
        i += LANES
        while i < size:
            group = v_fma(at(x, i, size, 0), at(y, i, size, 0), group)
            i += LANES
        add(&sum, v_to_doubles(group))
    return sum


cdef inline Sum total_backward(const Problem* p, const real* output, const real* upstream, Py_ssize_t size) noexcept nogil:
    # -> what the gradient of softmax or log_softmax needs, in each lane
    return dot(output, upstream, size) if p.operation == SOFTMAX_BACKWARD else total_of(upstream, size)


# The class term of SPEC S16, S31: w_c q'_c, with q' = keep * q + spread; index targets have q' = 1 here, see loss.pxi.


cdef struct Coefficients:
    const real* weight            # NULL: 1
    const real* probabilities     # NULL: q' = 1
    double keep, spread
    const real* given             # w q' where it is in memory as it is; NULL: it has to be computed


cdef Coefficients coefficients_of(const Problem* p, const real* weight, const real* probabilities) noexcept nogil:
    cdef Coefficients k
    k.weight = weight
    k.probabilities = probabilities
    k.keep = 1.0 - p.options.label_smoothing
    k.spread = p.options.label_smoothing / p.classes
    k.given = NULL
    if probabilities == NULL:
        k.given = weight
    elif weight == NULL and p.options.label_smoothing == 0:
        k.given = probabilities
    return k


cdef inline vec coefficient(Coefficients k, Py_ssize_t i, Py_ssize_t size) noexcept nogil:
    # Rounded once, and in one place, so that sum and gradient round alike. What is from `size` on means nothing.
    cdef doubles q
    if k.given != NULL:
        return at(k.given, i, size, 0)
    q = d_fma(d_set(k.keep), v_to_doubles(at(k.probabilities, i, size, 0)), d_set(k.spread))
    if k.weight != NULL:
        q = d_mul(v_to_doubles(at(k.weight, i, size, 0)), q)
    return v_from_doubles(q)


cdef Sum distances(const real* x, const real* weight, Py_ssize_t size, real m, vec lanes_m) noexcept nogil:
    # -> the sum of w (m - x) in each lane; weight NULL: 1. m stands for what is beyond `size` (of a row, whose lanes are alike)
    cdef Sum sum = nothing()
    cdef vec group
    cdef Py_ssize_t i = 0, end
    while i < size:
        group = v_set(0)
        end = min(i + GROUP * LANES, size)
        if weight != NULL:
            while i + LANES <= end:
                group = v_fma(v_load(weight + i), v_sub(lanes_m, v_load(x + i)), group)
                i += LANES
            if i < end:
                group = v_fma(at(weight, i, size, 0), v_sub(lanes_m, at(x, i, size, m)), group)
                i += LANES
        else:
            while i + 2 * LANES <= end:       # in pairs, because each addition to the sum waits for the one before
                group = v_add(group, v_add(v_sub(lanes_m, v_load(x + i)), v_sub(lanes_m, v_load(x + i + LANES))))
                i += 2 * LANES
            if i + LANES <= end:
                group = v_add(group, v_sub(lanes_m, v_load(x + i)))
                i += LANES
            if i < end:
                group = v_add(group, v_sub(lanes_m, at(x, i, size, m)))
                i += LANES
        add(&sum, v_to_doubles(group))
    return sum


cdef struct Term:
    Sum term                      # the sum of w q' (m - x)
    Sum mass                      # the sum of w q'


cdef inline void add_class_term(Term* sums, doubles mass, doubles x, doubles m) noexcept nogil:
    # In double from the start: one probability near 1 must not cost the others their digits. 0 * inf is 0 here: 0 log 0 = 0.
    cdef doubles term = d_mul(mass, d_sub(m, x))
    term = d_select(d_equal(mass, d_set(0.0)), mass, term)
    add(&sums.term, term)
    add(&sums.mass, mass)


cdef Term class_term(
    const real* x, Coefficients k, Py_ssize_t size, vec m,
    Py_ssize_t target,                        # in   of a row: the class that is left out; -1: none
    bint ask_ahead,                           # in   for probabilities, see exponentials
) noexcept nogil:
    cdef Term sums
    cdef doubles wide_m = v_to_doubles(m)
    cdef real left[LANES]
    cdef Py_ssize_t i = 0, l, end
    sums.term = sums.mass = nothing()
    while i < size:
        # Up to the target's vector, and then from there on.
        end = target // LANES * LANES if i <= target else size // LANES * LANES
        while i < end:
            if ask_ahead:
                v_prefetch(k.probabilities + i + SEGMENT)
            if k.given != NULL:
                add_class_term(&sums, d_load_reals(k.given + i), d_load_reals(x + i), wide_m)
            else:
                add_class_term(&sums, v_to_doubles(coefficient(k, i, size)), d_load_reals(x + i), wide_m)
            i += LANES
        if i < size:
            v_store(left, coefficient(k, i, size))
            for l in range(LANES):
                if i + l == target or i + l >= size:
                    left[l] = 0
            add_class_term(&sums, d_load_reals(left), v_to_doubles(at(x, i, size, 0)), wide_m)
            i += LANES
    return sums


# Entries: one result for each class. With stream, what begins where a line of memory does is stored past the caches.


cdef inline int to_line(const real* out, Py_ssize_t size) noexcept nogil:
    # How many reals until a line of memory begins.
    return <int>min(size, <Py_ssize_t>(-<uintptr_t>out % 64 // sizeof(real)))


cdef void scaled(const real* cached, Py_ssize_t size, vec scale, real* out, bint stream) noexcept nogil:
    # out = scale * e; may be `cached`
    cdef Py_ssize_t i = to_line(out, size) if stream else 0
    if i > 0:
        v_store_first(out, v_mul(scale, at(cached, 0, size, 0)), <int>i)
    if stream:
        while i + LANES <= size:
            v_stream(out + i, v_mul(scale, v_load(cached + i)))
            i += LANES
    else:
        while i + LANES <= size:
            v_store(out + i, v_mul(scale, v_load(cached + i)))
            i += LANES
    if i < size:
        v_store_first(out + i, v_mul(scale, at(cached, i, size, 0)), <int>(size - i))


cdef void curvatures(const real* cached, Py_ssize_t size, vec inverse, vec scale, real* out) noexcept nogil:
    # out = scale * p (1 - p), p being the exponentials times `inverse`
    cdef Py_ssize_t i
    cdef vec p
    for i from 0 <= i < size by LANES:
        p = v_mul(inverse, at(cached, i, size, 0))
        p = v_mul(scale, v_fma(v_sub(v_set(0), p), p, p))
        if i + LANES <= size:
            v_store(out + i, p)
        else:
            v_store_first(out + i, p, <int>(size - i))


cdef struct Entries:
    # CROSS_ENTROPY:          scale * x - unit * w q',  x being the exponentials
    # LOG_SOFTMAX:            (x - unit) - scale,       unit being the maximum, scale the log of the sum less that
    # SOFTMAX_BACKWARD:       x * (y - unit),           x being the output, y the upstream gradient, unit the sum of x y
    # LOG_SOFTMAX_BACKWARD:   y - scale * e^x           likewise
    Operation operation
    const real* x
    const real* y
    Coefficients coefficients
    Units units
    vec scale
    vec unit


cdef inline vec entry(Operation operation, const Entries* e, Py_ssize_t i, Py_ssize_t size) noexcept nogil:
    cdef vec x = at(e.x, i, size, 0), unit = e.unit
    if operation == CROSS_ENTROPY:
        if e.coefficients.given != NULL or e.coefficients.probabilities != NULL:
            unit = v_mul(unit, coefficient(e.coefficients, i, size))
        return v_fma(e.scale, x, v_sub(v_set(0), unit))
    if operation == LOG_SOFTMAX:
        return v_sub(v_sub(x, unit), e.scale)
    if operation == SOFTMAX_BACKWARD:
        return v_mul(x, v_sub(at(e.y, i, size, 0), unit))
    # Of NaN in x the numbers of the row know nothing, so here it becomes the one NaN (see `finished`).
    x = v_fma(v_sub(v_set(0), e.scale), exp_in(e.units, x), at(e.y, i, size, 0))
    return v_select(v_equal(x, x), x, v_set(NAN))


cdef inline void entries_of(Operation operation, const Entries* e, Py_ssize_t size, real* out, bint stream) noexcept nogil:
    cdef Py_ssize_t i = to_line(out, size) if stream else 0
    if i > 0:
        v_store_first(out, entry(operation, e, 0, size), <int>i)
    if stream:
        while i + LANES <= size:
            v_stream(out + i, entry(operation, e, i, size))
            i += LANES
    else:
        while i + LANES <= size:
            v_store(out + i, entry(operation, e, i, size))
            i += LANES
    if i < size:
        v_store_first(out + i, entry(operation, e, i, size), <int>(size - i))


cdef void entries(const Entries* e, Py_ssize_t size, real* out, bint stream) noexcept nogil:
    # out may be e.x or e.y. A loop for each operation, which then is a constant there.
    if e.operation == CROSS_ENTROPY:
        entries_of(CROSS_ENTROPY, e, size, out, stream)
    elif e.operation == LOG_SOFTMAX:
        entries_of(LOG_SOFTMAX, e, size, out, stream)
    elif e.operation == SOFTMAX_BACKWARD:
        entries_of(SOFTMAX_BACKWARD, e, size, out, stream)
    else:
        entries_of(LOG_SOFTMAX_BACKWARD, e, size, out, stream)


cdef void multiplied(real* x, Py_ssize_t size, real factor) noexcept nogil:
    # in/out   whole vectors
    cdef Py_ssize_t i
    for i from 0 <= i < size by LANES:
        v_store(x + i, v_mul(v_load(x + i), v_set(factor)))


cdef void moved(const real* x, Py_ssize_t size, vec base, real* to) noexcept nogil:
    # to = x - base; exact for each logit that counts
    cdef Py_ssize_t i
    for i from 0 <= i < size by LANES:
        v_store(to + i, v_sub(at(x, i, size, 0), base))


cdef void finished(real* out, Py_ssize_t size, vec live) noexcept nogil:
    # in   live   0 in the lanes of ignored rows, which get 0, whatever was computed from what they hold
    # Any NaN becomes the one NaN: its sign is not the same on every processor.
    cdef Py_ssize_t i
    cdef vec value, zero = v_set(0)
    cdef mask dead = v_equal(live, zero)
    for i from 0 <= i < size by LANES:
        value = at(out, i, size, 0)
        value = v_select(v_equal(value, value), value, v_set(NAN))
        value = v_select(dead, zero, value)
        if i + LANES <= size:
            v_store(out + i, value)
        else:
            v_store_first(out + i, value, <int>(size - i))
