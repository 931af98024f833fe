# Loops over LANES columns at a time: where the time goes. Everything above only arranges calls of these.
#
# A lane is either a column of one long row (rows.pxi: class c is in lane c % LANES) or a row of its own (tiles.pxi: LANES
# neighbouring rows, a stride from one class to the next). Rows and tiles add the terms of a row in the same order, so a row
# has the same bits whichever way it is computed: class c to partial sum c % LANES, GROUP terms at a time in the logits'
# dtype, the groups in double (the strip that the row does not fill is a group of its own); at last the LANES partial sums
# as a binary tree.
#
# The LANES local arrays live in vector registers: one of AVX-512, two of AVX2. Results are computed there before anything is
# stored, so that in-place work needs no slower version of the loop.

from pyx_xent._problem cimport (
    CROSS_ENTROPY,
    FEW_CLASSES,
    LANES,
    LOG_SOFTMAX,
    NLL,
    SOFTMAX,
    SOFTMAX_BACKWARD,
    ClassArray,
    Operation,
    Problem,
)

cdef enum:
    GROUP = 8                     # terms that a lane adds in float before they go to its double
    CHUNK = 8192                  # strips of LANES classes in one call: their numbers are exact in float


cdef inline Py_ssize_t chunk_size(Py_ssize_t first, Py_ssize_t classes) noexcept nogil:
    # Classes from `first` on for one call: whole strips of LANES, or the incomplete one at the row's end.
    cdef Py_ssize_t whole = classes - classes % LANES
    return min(<Py_ssize_t>(CHUNK * LANES), whole - first) if first < whole else classes - first


cdef void fill(floating* lanes, floating value) noexcept nogil:
    cdef int l
    for l in range(LANES):
        lanes[l] = value


cdef void lanes_max(
    const floating* x, Py_ssize_t stride, Py_ssize_t count,   # in   (count, LANES)
    floating* maximum,                                        # in/out   NaN is passed over
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    cdef floating v
    cdef floating m[LANES]
    memcpy(m, maximum, sizeof(m))
    for i in range(count):
        for l in range(LANES):
            v = x[i * stride + l]
            m[l] = v if v > m[l] else m[l]
    memcpy(maximum, m, sizeof(m))


cdef void lanes_max_sum(
    const floating* x, Py_ssize_t stride,                     # in   class c of lane l is x[c * stride + l]
    Py_ssize_t classes, int residues,                         # in   classes <= CHUNK * LANES; see below
    const floating* offset, const floating* low, const floating* round_by,  # in   of each lane, see exp_shifted
    const floating* left_out,                                 # in   the class that is not added, or a negative number
    floating* maximum,                                        # in/out   NaN is passed over: sums have it
    double* sums,                                             # in/out   (residues, LANES)  sums of the exponentials
) noexcept nogil:
    # Class c goes to sums[c % LANES]. A row side by side in memory is its own LANES residues: stride 1 and residues 1.
    cdef int i, j, l, end, count
    cdef floating v, e
    cdef floating o[LANES]
    cdef floating b[LANES]
    cdef floating r[LANES]
    cdef floating out[LANES]
    cdef floating m[LANES]
    cdef floating s[LANES]
    cdef double d[LANES]
    cdef double lost[LANES]
    cdef double before, part
    memcpy(o, offset, sizeof(o))
    memcpy(b, low, sizeof(b))
    memcpy(r, round_by, sizeof(r))
    memcpy(out, left_out, sizeof(out))
    memcpy(m, maximum, sizeof(m))
    for j in range(residues):
        count = <int>((classes - j + LANES - 1) // LANES)
        memcpy(d, sums + j * LANES, sizeof(d))
        memset(lost, 0, sizeof(lost))
        i = 0
        while i < count:
            end = min(i + <int>GROUP, count)
            for l in range(LANES):
                s[l] = 0
            while i < end:
                for l in range(LANES):
                    v = x[(i * LANES + j) * stride + l]
                    m[l] = v if v > m[l] else m[l]
                    e = exp_shifted(v, o[l], b[l], r[l])
                    s[l] += 0 if <floating>(i * LANES + j) == out[l] else e
                i += 1
            for l in range(LANES):
                if floating is float:
                    d[l] += s[l]
                else:                          # Kahan's: 50,000 classes would cost 3 ULP
                    before = d[l]
                    part = s[l] - lost[l]
                    d[l] = before + part
                    lost[l] = (d[l] - before) - part
        memcpy(sums + j * LANES, d, sizeof(d))
    memcpy(maximum, m, sizeof(m))


cdef inline floating class_coefficient(floating w, floating q, floating keep, floating spread) noexcept nogil:
    # w_c q'_c of SPEC S16 with q' = keep * q + spread. One place, so that sum and gradient round alike.
    return w * (keep * q + spread)


cdef void lanes_class_term(
    const floating* x, Py_ssize_t stride, int count,          # in   (count, LANES), count <= CHUNK
    const floating* reference,                                # in   the maximum of each lane's row
    const floating* weight, Py_ssize_t weight_stride, bint weight_across,  # in   NULL: 1. across: one class for all lanes
    const floating* soft, Py_ssize_t soft_stride,             # in   NULL: q' = 1
    floating keep, floating spread,
    double* term,                                             # in/out   sum of w q' (reference - x)
    double* mass,                                             # in/out   sum of w q'
) noexcept nogil:
    cdef int i, l, end
    cdef floating v
    cdef floating m[LANES]
    cdef floating k[LANES]
    cdef floating t[LANES]
    cdef floating s[LANES]
    cdef double terms[LANES]
    cdef double masses[LANES]
    memcpy(m, reference, sizeof(m))
    memcpy(terms, term, sizeof(terms))
    memcpy(masses, mass, sizeof(masses))
    fill[floating](k, 1)
    i = 0
    while i < count:
        end = min(i + <int>GROUP, count)
        for l in range(LANES):
            t[l] = 0
            s[l] = 0
        while i < end:
            if weight != NULL:
                for l in range(LANES):
                    k[l] = weight[i * weight_stride] if weight_across else weight[i * weight_stride + l]
            if soft != NULL:
                for l in range(LANES):
                    v = class_coefficient(k[l], soft[i * soft_stride + l], keep, spread)
                    t[l] += 0 if v == 0 else v * (m[l] - x[i * stride + l])        # 0 log 0 = 0
                    s[l] += v
            else:
                for l in range(LANES):
                    t[l] += k[l] * (m[l] - x[i * stride + l])
                    s[l] += k[l]
            i += 1
        for l in range(LANES):
            terms[l] += t[l]
            masses[l] += s[l]
    memcpy(term, terms, sizeof(terms))
    memcpy(mass, masses, sizeof(masses))


cdef void lanes_gradient(
    const floating* x, Py_ssize_t stride, Py_ssize_t count,   # in   (count, LANES)
    const floating* offset, const floating* low, const floating* round_by,
    const floating* scale,                                    # in   of the exponentials
    const floating* dead,                                     # in   not 0: an ignored row, its gradient is 0; NULL: none
    const floating* unit,                                     # in   of w q'; NULL: no class term
    const floating* weight, Py_ssize_t weight_stride, bint weight_across,
    const floating* soft, Py_ssize_t soft_stride,
    floating keep, floating spread,
    floating* grad, Py_ssize_t grad_stride,                   # out  (count, LANES), may be x itself
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    cdef floating o[LANES]
    cdef floating b[LANES]
    cdef floating r[LANES]
    cdef floating k[LANES]
    cdef floating z[LANES]
    cdef floating u[LANES]
    cdef floating w[LANES]
    cdef floating v[LANES]
    memcpy(o, offset, sizeof(o))
    memcpy(b, low, sizeof(b))
    memcpy(r, round_by, sizeof(r))
    memcpy(k, scale, sizeof(k))
    fill[floating](z, 0)
    fill[floating](u, 0)
    fill[floating](w, 1)
    if dead != NULL:
        memcpy(z, dead, sizeof(z))
    if unit != NULL:
        memcpy(u, unit, sizeof(u))
    for i in range(count):
        for l in range(LANES):
            v[l] = exp_shifted(x[i * stride + l], o[l], b[l], r[l]) * k[l]
        if unit != NULL:
            if weight != NULL:
                for l in range(LANES):
                    w[l] = weight[i * weight_stride] if weight_across else weight[i * weight_stride + l]
            if soft != NULL:
                for l in range(LANES):
                    v[l] -= u[l] * class_coefficient(w[l], soft[i * soft_stride + l], keep, spread)
            else:
                for l in range(LANES):
                    v[l] -= u[l] * w[l]
        if dead != NULL:
            for l in range(LANES):
                v[l] = 0 if z[l] != 0 else v[l]
        for l in range(LANES):
            grad[i * grad_stride + l] = v[l]


cdef void lanes_dot(
    const floating* a, Py_ssize_t a_stride,                   # in   (count, LANES), count <= CHUNK
    const floating* b, Py_ssize_t b_stride,                   # in   NULL: 1
    int count,
    double* total,                                            # in/out
) noexcept nogil:
    cdef int i, l, end
    cdef floating s[LANES]
    cdef double d[LANES]
    memcpy(d, total, sizeof(d))
    i = 0
    while i < count:
        end = min(i + <int>GROUP, count)
        for l in range(LANES):
            s[l] = 0
        while i < end:
            for l in range(LANES):
                s[l] += a[i * a_stride + l] * b[i * b_stride + l] if b != NULL else a[i * a_stride + l]
            i += 1
        for l in range(LANES):
            d[l] += s[l]
    memcpy(total, d, sizeof(d))


cdef double fold_sum(double* lanes) noexcept nogil:
    # in   lanes (LANES,)  overwritten
    cdef int l
    for l in range(8):
        lanes[l] += lanes[l + 8]
    for l in range(4):
        lanes[l] += lanes[l + 4]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


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


cdef void lanes_log_softmax(
    const floating* x, Py_ssize_t stride, Py_ssize_t count,   # in   (count, LANES)
    const floating* maximum, const floating* log_total,       # in   of each lane's row; lse = maximum + log_total
    floating* out, Py_ssize_t out_stride,                     # out  (count, LANES), may be x itself
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    cdef floating m[LANES]
    cdef floating t[LANES]
    cdef floating v[LANES]
    memcpy(m, maximum, sizeof(m))
    memcpy(t, log_total, sizeof(t))
    for i in range(count):
        for l in range(LANES):
            v[l] = (x[i * stride + l] - m[l]) - t[l]
        for l in range(LANES):
            out[i * out_stride + l] = v[l]


cdef void lanes_softmax_backward(
    const floating* output, Py_ssize_t stride,                # in   (count, LANES)
    const floating* grad_output, Py_ssize_t grad_output_stride,  # in   (count, LANES)
    Py_ssize_t count,
    const floating* dot,                                      # in   sum of grad_output * output of each lane's row
    floating* grad, Py_ssize_t grad_stride,                   # out  (count, LANES)
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    cdef floating d[LANES]
    cdef floating v[LANES]
    memcpy(d, dot, sizeof(d))
    for i in range(count):
        for l in range(LANES):
            v[l] = output[i * stride + l] * (grad_output[i * grad_output_stride + l] - d[l])
        for l in range(LANES):
            grad[i * grad_stride + l] = v[l]


cdef void lanes_log_softmax_backward(
    const floating* output, Py_ssize_t stride,                # in   (count, LANES)
    const floating* grad_output, Py_ssize_t grad_output_stride,  # in   (count, LANES)
    Py_ssize_t count,
    const floating* offset, const floating* low, const floating* round_by,
    const floating* scale,                                    # in   of the exponentials: sum of grad_output
    floating* grad, Py_ssize_t grad_stride,                   # out  (count, LANES)
) noexcept nogil:
    cdef Py_ssize_t i
    cdef int l
    cdef floating o[LANES]
    cdef floating b[LANES]
    cdef floating r[LANES]
    cdef floating k[LANES]
    cdef floating v[LANES]
    memcpy(o, offset, sizeof(o))
    memcpy(b, low, sizeof(b))
    memcpy(r, round_by, sizeof(r))
    memcpy(k, scale, sizeof(k))
    for i in range(count):
        for l in range(LANES):
            v[l] = grad_output[i * grad_output_stride + l] - exp_shifted(output[i * stride + l], o[l], b[l], r[l]) * k[l]
        for l in range(LANES):
            grad[i * grad_stride + l] = v[l]
