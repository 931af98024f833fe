# Loops over LANES columns at a time: where the time goes. Everything above only arranges calls of these.
#
# A lane is either a column of one row (its classes lie side by side: class c is in lane c % LANES) or a row of its own (LANES
# neighbouring rows, a stride from one class to the next). Both add the terms of a row in the same order, so a row has the
# same bits whichever way it is computed: strips of LANES classes; class c to partial sum c % LANES, float terms GROUP at a
# time and the groups in double, double terms one by one with compensation; the classes after the last whole strip come first,
# as a group of their own, and go to the last partial sums, because a row reads them as the end of its last LANES classes.
# After SEGMENT classes the LANES partial sums are added as a binary tree and go to the row's total. Segments depend on nothing
# but the row, so threads may share one.
#
# The LANES local arrays live in vector registers: one of AVX-512, two of AVX2. Results are computed there before anything is
# stored, so that in-place work needs no slower version of the loop.

from pyx_xent._problem cimport (
    BFLOAT16,
    CROSS_ENTROPY,
    FEW_CLASSES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LANES,
    LOG_SOFTMAX,
    LOG_SOFTMAX_BACKWARD,
    NLL,
    ROWS,
    SEGMENT,
    SOFTMAX,
    SOFTMAX_BACKWARD,
    ClassArray,
    Environment,
    Operation,
    Problem,
    Storage,
    enter_environment,
    leave_environment,
)

cdef enum:
    GROUP = 8                     # terms that a lane adds in float before they go to its double
    AHEAD_BYTES = 16384           # between what is computed and what is asked from memory
    AHEAD_ACROSS_BYTES = 1024     # likewise: many classes at once, which must not drive each other out of the cache
    TURN = 64                     # strips that are summed before as many of the row before are written; whole groups
    PIECE = 64                    # strips of a quantity on its way from one loop to the next, in a buffer


cdef struct Pending:
    # The gradient of the row before, written while the next one is summed: so memory is not idle during the exponentials, nor
    # the arithmetic while stores wait for memory.
    const void* kept              # in   (classes,)  the exponentials
    void* out                     # out  (classes,)
    double scale
    bint has_class_term
    double unit                   # of w
    const void* weight            # in   (classes,)  NULL: 1
    bint stream
    Py_ssize_t classes            # 0: nothing is pending
    Py_ssize_t done
    Py_ssize_t excluded           # the class with an entry of its own, or -1
    double at_excluded


cdef struct Work:
    # One row, or LANES rows side by side (across): what the loops read, write and multiply with.
    bint across
    Py_ssize_t classes
    const void* x                 # in   (classes,), or (classes, LANES) with `stride`
    Py_ssize_t stride
    const void* other             # in   likewise: class probabilities or grad_output; NULL: none
    Py_ssize_t other_stride
    const void* weight            # in   (classes,)  NULL: 1
    double keep, spread           # see class_coefficient
    void* kept                    # out, then in   the exponentials, (classes,) or (classes, LANES); +0 for the class left out
    void* out                     # out  like x, may be x itself or kept
    Py_ssize_t out_stride
    bint stream                   # store `out` past the caches; across: its strips are whole lines of memory
    const void* next              # the memory that is read after this row; NULL: not known
    Pending* pending              # NULL: none
    # (LANES,)  one for each lane. Not across: all the same, but for the sum of exponentials, which reads the first.
    const double* low             # see exp_parts
    const double* round_by
    const double* left_out        # the class that is not added, or -1
    const double* reference       # the maximum
    const double* scale           # of the exponentials
    const double* unit            # of w q'
    bint has_class_term           # unit is not 0
    # Across:
    double* left_out_logit        # out  that of the class that is not added, if there is one
    const double* dead            # not 0: an ignored row, its gradient is 0
    const double* excluded        # the class with an entry of its own, or -1
    const double* at_excluded


cdef inline void prefetch_strip(const floating* strip, Py_ssize_t ahead) noexcept nogil:
    prefetch(<const char*>strip + ahead)
    if floating is double:                    # 128 bytes, two lines of memory
        prefetch(<const char*>strip + ahead + 64)


cdef void fill(floating* lanes, floating value) noexcept nogil:
    cdef int l
    for l in range(LANES):
        lanes[l] = value


cdef inline void rounded(const double* values, floating* lanes) noexcept nogil:
    cdef int l
    for l in range(LANES):
        lanes[l] = <floating>values[l]


cdef inline void add_to(double* total, double part, double* lost, floating compute) noexcept nogil:
    # Sums of doubles keep what the addition rounds away.
    cdef double before = total[0], of_part
    total[0] = before + part
    if floating is double:
        of_part = total[0] - before
        lost[0] += (before - (total[0] - of_part)) + (part - of_part)


cdef inline double finite_sum(double total, double lost) noexcept nogil:
    # Beyond infinity nothing is lost, and what has been computed as such is NaN.
    return total + (lost if lost == lost else 0.0)


cdef double fold_sum(double* lanes, floating compute) noexcept nogil:
    # in   lanes (LANES,)  overwritten
    cdef int l
    cdef double lost[8]
    for l in range(8):
        lost[l] = 0
    for l in range(8):
        add_to[floating](&lanes[l], lanes[l + 8], &lost[l], 0)
    for l in range(4):
        lost[l] += lost[l + 4]
        add_to[floating](&lanes[l], lanes[l + 4], &lost[l], 0)
    for l in range(2):
        lost[l] += lost[l + 2]
        add_to[floating](&lanes[l], lanes[l + 2], &lost[l], 0)
    lost[0] += lost[1]
    add_to[floating](&lanes[0], lanes[1], &lost[0], 0)
    return finite_sum(lanes[0], lost[0])


cdef void fold_tile(
    double* sums,                             # in   (residues, LANES) of (LANES, LANES)  overwritten
    int residues, double* total,              # out  (LANES,)
    floating compute,
) noexcept nogil:
    # The binary tree of fold_sum, in which residues that no class has would add +0.
    cdef int j, l, half = LANES // 2
    cdef double lost[LANES * LANES]
    if floating is double:
        memset(lost, 0, sizeof(lost))
        while half > 0:
            for j in range(min(half, residues - half)):
                for l in range(LANES):
                    lost[j * LANES + l] += lost[(j + half) * LANES + l]
                    add_to[floating](&sums[j * LANES + l], sums[(j + half) * LANES + l], &lost[j * LANES + l], 0)
            half = half // 2
        for l in range(LANES):
            total[l] = finite_sum(sums[l], lost[l])
    else:                                      # two levels at a time: half as often to memory and back
        memset(sums + residues * LANES, 0, (LANES - residues) * LANES * sizeof(double))
        for j in range(4 * LANES):
            sums[j] = (sums[j] + sums[j + 8 * LANES]) + (sums[j + 4 * LANES] + sums[j + 12 * LANES])
        for l in range(LANES):
            total[l] = (sums[l] + sums[l + 2 * LANES]) + (sums[l + LANES] + sums[l + 3 * LANES])


cdef floating fold_max(const floating* lanes) noexcept nogil:
    # NaN is passed over: it becomes -inf.
    cdef int l
    cdef floating m[LANES]
    for l in range(LANES):
        m[l] = lanes[l] if lanes[l] > -INFINITY else -INFINITY
    for l in range(8):
        m[l] = m[l + 8] if m[l + 8] > m[l] else m[l]
    for l in range(4):
        m[l] = m[l + 4] if m[l + 4] > m[l] else m[l]
    m[0] = m[2] if m[2] > m[0] else m[0]
    m[1] = m[3] if m[3] > m[1] else m[1]
    return m[1] if m[1] > m[0] else m[0]


cdef void lanes_max(
    const floating* x, Py_ssize_t stride, Py_ssize_t count,   # in   (count, LANES)
    floating* maximum,                                        # out  (LANES,)  NaN is passed over
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    cdef floating m[LANES]
    cdef floating v[LANES]
    for l in range(LANES):
        m[l] = -INFINITY
    for i in range(count):
        for l in range(LANES):
            v[l] = x[i * stride + l]
        for l in range(LANES):
            m[l] = v[l] if v[l] > m[l] else m[l]
    for l in range(LANES):
        maximum[l] = m[l]


# Sums over the classes of a segment


cdef inline void accumulate(double* total, double* lost, double part, floating compute) noexcept nogil:
    cdef double before = total[0], corrected
    if floating is float:
        total[0] = before + part
    else:                                      # Kahan's: 50,000 classes would cost 3 ULP
        corrected = part - lost[0]
        total[0] = before + corrected
        lost[0] = (total[0] - before) - corrected


cdef inline void accumulate_any(double* total, double* lost, double part, floating compute) noexcept nogil:
    # The same where a part may be infinite, which must not become NaN.
    accumulate(total, lost, part, compute)
    lost[0] = lost[0] if lost[0] == lost[0] else 0.0


cdef void add_group(const floating* group, double* sums, double* lost) noexcept nogil:
    # In arrays of its own: gcc cannot know that the three do not overlap.
    cdef int l
    cdef floating s[LANES]
    cdef double d[LANES]
    cdef double k[LANES]
    memcpy(s, group, sizeof(s))
    memcpy(d, sums, sizeof(d))
    memcpy(k, lost, sizeof(k))
    for l in range(LANES):
        accumulate_any[floating](&d[l], &k[l], s[l], 0)
    memcpy(sums, d, sizeof(d))
    memcpy(lost, k, sizeof(k))


cdef void groups_max_sum(
    const floating* x, Py_ssize_t strips,                     # in   (strips, LANES)
    const floating* tail, Py_ssize_t tail_at,                 # in   (LANES,) what comes before, NULL: nothing; where it is kept
    const floating* instead, Py_ssize_t special,              # in   (GROUP, LANES) in place of this group; -1: of none
    floating low, floating round_by,                          # in   of the row, see exp_parts
    floating* kept,                                           # out  NULL: not wanted
    floating* maximum,                                        # in/out   (LANES,)
    double* sums,                             # in/out   in memory: a local array gcc takes apart into scalars
    floating* lost,                           # in/out (double only)   see accumulate
) noexcept nogil:
    # Every row takes the same branches, whatever its target.
    cdef const floating* source
    cdef floating* to
    cdef bint keep = kept != NULL
    cdef Py_ssize_t groups = (strips + GROUP - 1) // GROUP, group, i, count
    cdef int l
    cdef floating v, power, significand
    cdef floating b[LANES]
    cdef floating r[LANES]
    cdef floating m[LANES]
    cdef floating s[LANES]
    cdef floating c[LANES]
    cdef floating e[LANES]
    for l in range(LANES):
        b[l] = low
        r[l] = round_by
        m[l] = maximum[l]
    if floating is double:
        memcpy(s, sums, sizeof(s))
        memcpy(c, lost, sizeof(c))
    for group in range(-1 if tail != NULL else 0, groups):
        i = group * (GROUP * LANES)
        source = instead if group == special else x + i
        to = kept + i if keep else NULL
        count = min(<Py_ssize_t>GROUP, strips - group * GROUP)
        if group < 0:
            source, to, count = tail, kept + tail_at if keep else NULL, 1
        if floating is float:
            for l in range(LANES):
                s[l] = 0
        for i in range(count):
            prefetch_strip(source + i * LANES, AHEAD_BYTES)
            for l in range(LANES):
                v = source[i * LANES + l]
                m[l] = v if v > m[l] else m[l]
                significand = exp_parts(v, b[l], r[l], &power)
                e[l] = significand * power
                if floating is float:
                    s[l] = plus_product(s[l], significand, power)      # as s + e, the power of two rounds nothing
                else:
                    v = e[l] - c[l]            # accumulate(), which would keep s and c in memory
                    power = s[l] + v
                    c[l] = (power - s[l]) - v
                    s[l] = power
            if keep:
                for l in range(LANES):
                    to[i * LANES + l] = e[l]
        if floating is float:
            for l in range(LANES):
                sums[l] += s[l]
    if floating is double:
        memcpy(sums, s, sizeof(s))
        memcpy(lost, c, sizeof(c))
    memcpy(maximum, m, sizeof(m))


cdef void row_max_sum(
    const floating* x, Py_ssize_t strips, int tail,           # in   (strips * LANES + tail,); a tail has LANES classes before its end
    Pending* pending,
    floating low, floating round_by,
    Py_ssize_t left_out,                                      # in   the class that is not added; not in the segment: none
    floating* kept,                                           # out  the exponentials, +0 for the class left out; NULL: not wanted
    double* maximum, double* sums,                            # out  (LANES,)  NaN is passed over by the maximum: the sums have it
) noexcept nogil:
    # What does not count is copied as -inf, whose exponential is +0.
    cdef Py_ssize_t whole = strips * LANES, end_at = whole + tail - LANES, special = -1, at, size
    cdef floating end[LANES]
    cdef floating group[GROUP * LANES]
    cdef floating m[LANES]
    cdef floating lost[LANES]
    cdef int l
    if tail > 0:                               # first, because it keeps +0 where the last strip will keep what there is
        for l in range(LANES):
            end[l] = x[end_at + l] if l >= LANES - tail and end_at + l != left_out else -INFINITY
    if 0 <= left_out < whole:
        special = left_out // (GROUP * LANES)
        at = special * (GROUP * LANES)
        size = min(<Py_ssize_t>(GROUP * LANES), whole - at)
        memcpy(group, x + at, size * sizeof(floating))
        group[left_out - at] = -INFINITY
    for l in range(LANES):
        m[l] = -INFINITY
        sums[l] = 0
        lost[l] = 0
    if pending == NULL or pending.classes == 0:
        groups_max_sum(x, strips, end if tail > 0 else NULL, end_at, group, special, low, round_by, kept, m, sums, lost)
    else:
        at = 0
        while at < strips:
            groups_max_sum(
                x + at * LANES, min(<Py_ssize_t>TURN, strips - at), end if tail > 0 and at == 0 else NULL, end_at, group,
                special - at // GROUP if special >= at // GROUP else -1, low, round_by,
                kept + at * LANES if kept != NULL else NULL, m, sums, lost,
            )
            write_pending[floating](pending, TURN * LANES, 0)
            at += TURN
    for l in range(LANES):
        maximum[l] = m[l]
    if 0 <= left_out < whole + tail and x[left_out] > maximum[0]:
        maximum[0] = x[left_out]


cdef inline floating pending_entry(floating kept, floating scale, bint has_class_term, floating unit, floating weight) noexcept nogil:
    cdef floating value = kept * scale
    return plus_product(value, -unit, weight) if has_class_term else value


cdef void stream_scaled(const floating* kept, Py_ssize_t count, floating scale, floating* out) noexcept nogil:
    # From the registers past the caches. in   (count, LANES)   out  likewise, from where a line of memory begins
    cdef Py_ssize_t i
    cdef int l
    cdef floating v[LANES]
    for i in range(count):
        for l in range(LANES):
            v[l] = kept[i * LANES + l] * scale
        stream_line(out + i * LANES, v)
        if floating is double:
            stream_line(out + i * LANES + LANES // 2, v + LANES // 2)


cdef void write_pending(Pending* pending, Py_ssize_t count, floating compute) noexcept nogil:
    # in   count   at most PIECE * LANES; what is before the first line of memory, or after the last strip, comes with them
    cdef const floating* kept = <const floating*>pending.kept + pending.done
    cdef floating* out = <floating*>pending.out + pending.done
    cdef const floating* weight = <const floating*>pending.weight
    cdef floating scale = <floating>pending.scale, unit = <floating>pending.unit
    cdef floating piece[PIECE * LANES]
    cdef floating* to
    cdef Py_ssize_t left = pending.classes - pending.done, single = 0, i
    if pending.classes == 0:
        return
    if left < LANES:
        single = left
    elif pending.done == 0:                   # so that the strips begin where lines of memory do
        single = bytes_to_line(out) // <Py_ssize_t>sizeof(floating)
    if weight != NULL:
        weight += pending.done
    for i in range(single):
        out[i] = pending_entry(kept[i], scale, pending.has_class_term, unit, weight[i] if weight != NULL else <floating>1)
    kept += single
    out += single
    count = min(count, left - single) // LANES * LANES
    if pending.stream and not pending.has_class_term:
        stream_scaled(kept, count // LANES, scale, out)
    else:
        to = &piece[0] if pending.stream else out
        for i in range(count):
            to[i] = kept[i] * scale
        if pending.has_class_term and weight == NULL:
            for i in range(count):
                to[i] -= unit
        elif pending.has_class_term:
            for i in range(count):
                to[i] = plus_product(to[i], -unit, weight[single + i])
        if pending.stream:
            stream_out(out, to, count * sizeof(floating))
    pending.done += single + count
    if pending.done == pending.classes:
        if pending.excluded >= 0:
            (<floating*>pending.out)[pending.excluded] = <floating>pending.at_excluded
        pending.classes = 0


cdef void finish_pending(Pending* pending, floating compute) noexcept nogil:
    while pending.classes > 0:
        write_pending[floating](pending, PIECE * LANES, 0)


cdef void tile_exponentials(
    const floating* x, Py_ssize_t stride, int count,          # in   (count, LANES)
    const floating* low, const floating* round_by,
    const floating* left_out,                                 # in   of each lane: a class, counted from the first of these
    floating* exponentials,                                   # out  (count, LANES)  +0 for the class left out
    floating* maximum, floating* left_out_logit,              # in/out   the latter as it was if its class is not here
) noexcept nogil:
    cdef int i, l
    cdef floating v
    cdef floating b[LANES]
    cdef floating r[LANES]
    cdef floating m[LANES]
    cdef floating out[LANES]
    cdef floating y[LANES]
    cdef floating e[LANES]
    memcpy(y, left_out_logit, sizeof(y))
    memcpy(b, low, sizeof(b))
    memcpy(r, round_by, sizeof(r))
    memcpy(m, maximum, sizeof(m))
    memcpy(out, left_out, sizeof(out))
    for i in range(count):
        prefetch_strip(x + i * stride, AHEAD_ACROSS_BYTES)
        for l in range(LANES):
            v = x[i * stride + l]
            m[l] = v if v > m[l] else m[l]
            y[l] = v if out[l] == 0 else y[l]
            v = exp_shifted(v, b[l], r[l])
            e[l] = 0 if out[l] == 0 else v
            out[l] -= 1
        for l in range(LANES):
            exponentials[i * LANES + l] = e[l]
    memcpy(maximum, m, sizeof(m))
    memcpy(left_out_logit, y, sizeof(y))


cdef void tile_add(
    const floating* exponentials, int count,                  # in   (count, LANES), count <= GROUP * LANES
    int fresh,                                                # in   to so many of the sums nothing has been added before
    double* sums, double* lost,                               # in/out   (min(count, LANES), LANES)
) noexcept nogil:
    # One group of each partial sum.
    cdef int j, i, l
    cdef floating s[LANES]
    cdef double d[LANES]
    cdef double c[LANES]
    for j in range(min(count, <int>LANES)):
        if floating is float:
            memcpy(s, exponentials + j * LANES, sizeof(s))
            for i from j + LANES <= i < count by LANES:
                for l in range(LANES):
                    s[l] += exponentials[i * LANES + l]
            if j < fresh:
                for l in range(LANES):
                    d[l] = s[l]
            else:
                memcpy(d, sums + j * LANES, sizeof(d))
                for l in range(LANES):
                    d[l] += s[l]
        else:
            if j < fresh:
                memset(d, 0, sizeof(d))
                memset(c, 0, sizeof(c))
            else:
                memcpy(d, sums + j * LANES, sizeof(d))
                memcpy(c, lost + j * LANES, sizeof(c))
            for i from j <= i < count by LANES:
                for l in range(LANES):
                    accumulate[floating](&d[l], &c[l], exponentials[i * LANES + l], 0)
            memcpy(lost + j * LANES, c, sizeof(c))
        memcpy(sums + j * LANES, d, sizeof(d))


cdef inline floating class_coefficient(floating w, floating q, double keep, double spread) noexcept nogil:
    # w_c q'_c of SPEC S16 with q' = keep * q + spread, rounded once. One place, so that sum and gradient round alike.
    return <floating>(w * (keep * q + spread))


cdef void lanes_coefficients(
    const floating* weight, Py_ssize_t weight_stride, bint weight_across,  # in   NULL: 1. across: one class for all lanes
    const floating* soft, Py_ssize_t soft_stride,             # in   NULL: q' = 1
    double keep, double spread,
    Py_ssize_t count,
    floating* coefficients,                                   # out  (count, LANES)  w q'
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    cdef floating w
    if soft == NULL and weight_across:
        for i in range(count):
            for l in range(LANES):
                coefficients[i * LANES + l] = weight[i * weight_stride]
    elif soft == NULL:
        for i in range(count):
            for l in range(LANES):
                coefficients[i * LANES + l] = weight[i * weight_stride + l]
    elif weight == NULL:
        for i in range(count):
            prefetch_strip(soft + i * soft_stride, AHEAD_BYTES)
            for l in range(LANES):
                coefficients[i * LANES + l] = class_coefficient(<floating>1, soft[i * soft_stride + l], keep, spread)
    elif weight_across:
        for i in range(count):
            w = weight[i * weight_stride]
            for l in range(LANES):
                coefficients[i * LANES + l] = class_coefficient(w, soft[i * soft_stride + l], keep, spread)
    else:
        for i in range(count):
            for l in range(LANES):
                coefficients[i * LANES + l] = class_coefficient(
                    weight[i * weight_stride + l], soft[i * soft_stride + l], keep, spread
                )


cdef void lanes_class_term(
    const floating* x, Py_ssize_t stride, Py_ssize_t count,   # in   (count, LANES), whole groups but for the last
    const floating* coefficients,                             # in   (count, LANES)  NULL: 1
    int skip,                                                 # in   so many lanes count for nothing; 0 unless count is 1
    const double* reference,                                  # in   the maximum of each lane's row
    double* term,                                             # in/out   sum of w q' (reference - x)
    double* mass,                                             # in/out   sum of w q'
) noexcept nogil:
    cdef Py_ssize_t i = 0, end
    cdef int l
    cdef floating m[LANES]
    cdef floating t[LANES]
    cdef floating s[LANES]
    cdef double lost_term[LANES]
    cdef double lost_mass[LANES]
    for l in range(LANES):
        m[l] = <floating>reference[l]
    if floating is double:
        memset(lost_term, 0, sizeof(lost_term))
        memset(lost_mass, 0, sizeof(lost_mass))
    while i < count:
        end = min(i + <Py_ssize_t>GROUP, count)
        for l in range(LANES):
            t[l] = 0
            s[l] = 0
        if coefficients == NULL:              # two at a time, because each addition to t waits for the one before
            while i + 1 < end:
                for l in range(LANES):
                    t[l] += (m[l] - x[i * stride + l]) + (m[l] - x[(i + 1) * stride + l])
                i += 2
            while i < end:
                for l in range(LANES):
                    t[l] += m[l] - x[i * stride + l]
                i += 1
        else:
            while i < end:
                for l in range(LANES):
                    t[l] += coefficients[i * LANES + l] * (m[l] - x[i * stride + l])
                    s[l] += coefficients[i * LANES + l]
                i += 1
        for l in range(skip):
            t[l] = 0
            s[l] = 0
        if floating is double:
            add_group(t, term, lost_term)
            add_group(s, mass, lost_mass)
        else:
            for l in range(LANES):
                term[l] += t[l]
            if coefficients != NULL:
                for l in range(LANES):
                    mass[l] += s[l]
    if coefficients == NULL:
        for l in range(skip, LANES):
            mass[l] += count


cdef void lanes_soft_term(
    const floating* x, Py_ssize_t stride, Py_ssize_t count, const floating* coefficients, int skip,
    const double* reference, double* term, double* mass,      # as above, for class probabilities: 0 log 0 = 0
) noexcept nogil:
    # In double from the start: one probability near 1 must not cost the others their digits.
    cdef Py_ssize_t i
    cdef int l
    cdef double v, product
    cdef double m[LANES]
    cdef double t[LANES]
    cdef double s[LANES]
    cdef double lost_term[LANES]
    cdef double lost_mass[LANES]
    for l in range(LANES):
        m[l] = reference[l]
        t[l] = term[l]
        s[l] = mass[l]
        lost_term[l] = 0
        lost_mass[l] = 0
    for i in range(count):
        prefetch_strip(coefficients + i * LANES, AHEAD_BYTES)      # nothing new if they are in a buffer
        for l in range(LANES):
            v = coefficients[i * LANES + l] if l >= skip else 0.0
            product = v * (m[l] - x[i * stride + l])
            product = 0.0 if v == 0 else product
            accumulate_any[floating](&t[l], &lost_term[l], product, 0)
            accumulate_any[floating](&s[l], &lost_mass[l], v, 0)
    memcpy(term, t, sizeof(t))
    memcpy(mass, s, sizeof(s))


cdef void lanes_dot(
    const floating* a, Py_ssize_t a_stride, Py_ssize_t count,  # in   (count, LANES)
    int skip,                                                 # in   as above
    const floating* b, Py_ssize_t b_stride,                   # in   NULL: 1
    double* total,                                            # in/out
) noexcept nogil:
    cdef Py_ssize_t i = 0, end
    cdef int l
    cdef floating s[LANES]
    cdef double d[LANES]
    memcpy(d, total, sizeof(d))
    while i < count:
        end = min(i + <Py_ssize_t>GROUP, count)
        for l in range(LANES):
            s[l] = 0
        while i < end:
            for l in range(LANES):
                s[l] += a[i * a_stride + l] * b[i * b_stride + l] if b != NULL else a[i * a_stride + l]
            i += 1
        for l in range(skip):
            s[l] = 0
        for l in range(LANES):
            d[l] += s[l]
    memcpy(total, d, sizeof(d))


# Entries: one result for each class


cdef void lanes_scaled(
    const floating* kept, Py_ssize_t count,                   # in   (count, LANES)
    const double* scale,
    floating* grad, Py_ssize_t grad_stride,                   # out  (count, LANES), may be `kept`
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    cdef floating k[LANES]
    cdef floating v[LANES]
    rounded(scale, k)
    for i in range(count):
        for l in range(LANES):
            v[l] = kept[i * LANES + l] * k[l]
        for l in range(LANES):
            grad[i * grad_stride + l] = v[l]


cdef void lanes_exponentials(
    const floating* x, Py_ssize_t stride, Py_ssize_t count,   # in   (count, LANES)
    const double* low, const double* round_by, const double* scale,
    floating* grad, Py_ssize_t grad_stride,                   # out  (count, LANES), may be `x`
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    cdef floating b[LANES]
    cdef floating r[LANES]
    cdef floating k[LANES]
    cdef floating v[LANES]
    rounded(low, b)
    rounded(round_by, r)
    rounded(scale, k)
    for i in range(count):
        for l in range(LANES):
            v[l] = exp_shifted(x[i * stride + l], b[l], r[l]) * k[l]
        for l in range(LANES):
            grad[i * grad_stride + l] = v[l]


cdef void lanes_minus(
    const floating* coefficients, Py_ssize_t count,           # in   (count, LANES)  NULL: 1
    const double* unit,
    floating* grad, Py_ssize_t grad_stride,                   # in/out   (count, LANES)
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    cdef floating u[LANES]
    rounded(unit, u)
    if coefficients == NULL:
        for i in range(count):
            for l in range(LANES):
                grad[i * grad_stride + l] -= u[l]
    else:
        for i in range(count):
            for l in range(LANES):
                grad[i * grad_stride + l] = plus_product(grad[i * grad_stride + l], -u[l], coefficients[i * LANES + l])


cdef void tile_finished(
    const floating* values, Py_ssize_t count,                 # in   (count, LANES)
    const double* scale,
    const double* dead,                                       # in   not 0: 0 instead
    Py_ssize_t first,                                         # in   the class of the first of these
    const double* excluded, const double* at_excluded,        # in   of each lane: a class, or -1, and its entry
    floating* finished,                                       # out  (count or, if that is odd, one more, LANES)
) noexcept nogil:
    # Two strips at a time: a loop of 16 so short as this gcc takes apart into scalars.
    cdef Py_ssize_t i
    cdef int l
    cdef const floating* source
    cdef floating k[2 * LANES]
    cdef floating y[2 * LANES]
    cdef floating at_y[2 * LANES]
    cdef floating zero[2 * LANES]
    cdef floating last[2 * LANES]
    for l in range(LANES):
        k[l] = k[l + LANES] = <floating>scale[l]
        y[l] = <floating>(excluded[l] - <double>first)
        y[l + LANES] = y[l] - 1
        at_y[l] = at_y[l + LANES] = <floating>at_excluded[l]
        zero[l] = zero[l + LANES] = <floating>dead[l]
    for i from 0 <= i < count by 2:
        source = values + i * LANES
        if i + 1 == count:
            memset(last, 0, sizeof(last))
            memcpy(last, source, LANES * sizeof(floating))
            source = last
        for l in range(2 * LANES):
            finished[i * LANES + l] = source[l] * k[l]
            finished[i * LANES + l] = at_y[l] if y[l] == <floating>i else finished[i * LANES + l]
            finished[i * LANES + l] = finished[i * LANES + l] if zero[l] == 0 else 0


cdef void tile_put(
    const floating* values, Py_ssize_t count,                 # in   (count, LANES)
    floating* out, Py_ssize_t out_stride,                     # out  (count, LANES)
    bint stream,                                              # in   past the caches: each strip begins where a line of memory does
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    if stream:
        for i in range(count):
            stream_line(out + i * out_stride, values + i * LANES)
            if floating is double:
                stream_line(out + i * out_stride + LANES // 2, values + i * LANES + LANES // 2)
    else:
        for i in range(count):
            for l in range(LANES):
                out[i * out_stride + l] = values[i * LANES + l]


cdef void lanes_log_softmax(
    const Work* work, Py_ssize_t first, Py_ssize_t count, floating* out, Py_ssize_t out_stride
) noexcept nogil:
    # (x - reference) - unit, the lse being reference + unit
    cdef Py_ssize_t stride = work.stride if work.across else LANES
    cdef const floating* x = <const floating*>work.x + first * (stride if work.across else 1)
    cdef Py_ssize_t i
    cdef int l
    cdef floating m[LANES]
    cdef floating t[LANES]
    cdef floating v[LANES]
    rounded(work.reference, m)
    rounded(work.unit, t)
    for i in range(count):
        for l in range(LANES):
            v[l] = (x[i * stride + l] - m[l]) - t[l]
        for l in range(LANES):
            out[i * out_stride + l] = v[l]


cdef void lanes_softmax_backward(
    const Work* work, Py_ssize_t first, Py_ssize_t count, floating* grad, Py_ssize_t grad_stride
) noexcept nogil:
    # output * (grad_output - unit), unit being the sum of grad_output * output
    cdef Py_ssize_t stride = work.stride if work.across else LANES
    cdef Py_ssize_t other_stride = work.other_stride if work.across else LANES
    cdef const floating* output = <const floating*>work.x + first * (stride if work.across else 1)
    cdef const floating* grad_output = <const floating*>work.other + first * (other_stride if work.across else 1)
    cdef Py_ssize_t i
    cdef int l
    cdef floating d[LANES]
    cdef floating v[LANES]
    rounded(work.unit, d)
    for i in range(count):
        for l in range(LANES):
            v[l] = output[i * stride + l] * (grad_output[i * other_stride + l] - d[l])
        for l in range(LANES):
            grad[i * grad_stride + l] = v[l]


cdef void lanes_log_softmax_backward(
    const Work* work, Py_ssize_t first, Py_ssize_t count, floating* grad, Py_ssize_t grad_stride
) noexcept nogil:
    # grad_output - scale * e^output
    cdef Py_ssize_t stride = work.stride if work.across else LANES
    cdef Py_ssize_t other_stride = work.other_stride if work.across else LANES
    cdef const floating* output = <const floating*>work.x + first * (stride if work.across else 1)
    cdef const floating* grad_output = <const floating*>work.other + first * (other_stride if work.across else 1)
    cdef Py_ssize_t i
    cdef int l
    cdef floating b[LANES]
    cdef floating r[LANES]
    cdef floating k[LANES]
    cdef floating v[LANES]
    rounded(work.low, b)
    rounded(work.round_by, r)
    rounded(work.scale, k)
    for i in range(count):
        for l in range(LANES):
            v[l] = grad_output[i * other_stride + l] - exp_shifted(output[i * stride + l], b[l], r[l]) * k[l]
        for l in range(LANES):
            grad[i * grad_stride + l] = v[l]
