# One vector: exp and log1p.
#
# exp(x) is computed as e^x * 2^(room - exponent), with the exponent chosen for a whole row: log2 of its largest term, rounded.
# The power of two costs nothing, because the same addition that rounds x/ln2 to an integer n also adds the row's exponent to n,
# and it is exact. So x is never replaced by a rounded x - max, and a row of logits between -30 and 20 keeps the last digit of
# each exponential. These are the row's *units*.
#
# Coefficients: tools/minimax.py. Largest error over all float32 in [-87, 87]: 0.91 ULP with FMA, 1.18 without; of float64, over
# a hundred million numbers, 0.71 with FMA, 0.73 without.

cdef extern from *:
    """
    /* Powers of two between a row's largest term and 1: terms stay normal numbers down to 2^-190 (2^-1322) of the largest, and
       the sum of eight of the largest is still far from the end of the range. */
    #define ROOM (PYX_XENT_DOUBLE ? 300 : 64)
    #define BIAS (PYX_XENT_DOUBLE ? 1023 : 127)
    #define LOG2_E 1.4426950408889634074
    #define LN2 0.69314718055994530942
    /* ln2 in two parts: few bits, so that a whole number times them is exact, and the rest. For doubles 32 bits, for floats 14. */
    #define LN2_HIGH 0.69314718060195446014
    #define LN2_LOW -4.2009150726810847e-11
    #define LN2_HIGH_32 0.69317626953125
    #define LN2_LOW_32 (double)-0.000029088971304690583f
    /* Adding it to a number below 2^51 (2^22) rounds that number to an integer, which then stands in the lowest bits. */
    #define ROUNDER_64 6755399441055744.0 /* 1.5 * 2^52 */
    #define ROUNDER (PYX_XENT_DOUBLE ? ROUNDER_64 : 12582912.0)
    """
    const int ROOM
    const int BIAS
    const double LOG2_E
    const double LN2
    const double LN2_HIGH
    const double LN2_LOW
    const double LN2_HIGH_32
    const double LN2_LOW_32
    const double ROUNDER_64
    const double ROUNDER


cdef inline real largest_logit() noexcept nogil:
    # Up to here n fits beside the rounding constant, and without FMA n times the first part of ln2 into a number. Rows beyond
    # are moved by their maximum first, which is exact for each x that counts, by Sterbenz's lemma: x is within a factor of two.
    if IS_DOUBLE:
        return 562949953421312.0 if HAS_FMA else 1048576.0     # 2^49
    return 1048576.0 if HAS_FMA else 256.0                     # 2^20


cdef inline bint too_large(real maximum) noexcept nogil:
    return fabs(maximum) >= largest_logit() and fabs(maximum) != INFINITY


cdef struct Units:
    vec low                       # x at which the biased exponent of the result reaches 0, which is the number +0
    vec round_by                  # its addition rounds x/ln2 and leaves that biased exponent in the lowest bits


cdef inline vec exponent_of(vec maximum) noexcept nogil:
    # -inf, and what is too large, has to fit beside the rounding constant, too.
    cdef vec reference = v_max(maximum, v_set(-largest_logit()))
    return v_sub(v_fma(reference, v_set(<real>LOG2_E), v_set(<real>ROUNDER)), v_set(<real>ROUNDER))


cdef inline Units units_of(vec exponent, real room) noexcept nogil:
    cdef Units units
    units.low = v_mul(v_sub(exponent, v_set(<real>(room + BIAS))), v_set(<real>LN2))
    units.round_by = v_add(v_set(<real>ROUNDER), v_sub(v_set(<real>(room + BIAS)), exponent))
    return units


cdef inline doubles exp_of_doubles(doubles x, doubles low, doubles round_by) noexcept nogil:
    cdef doubles t, n, high, r, p, above, lost
    x = d_max(x, low)
    t = d_fma(x, d_set(LOG2_E), round_by)
    n = d_sub(t, round_by)
    high = d_fma(n, d_set(-LN2_HIGH), x)
    r = d_fma(n, d_set(-LN2_LOW), high)
    p = d_set(2.4999965343255923e-8)
    p = d_fma(p, r, d_set(2.7630378620805180e-7))
    p = d_fma(p, r, d_set(2.7557587342203818e-6))
    p = d_fma(p, r, d_set(2.4801492762795647e-5))
    p = d_fma(p, r, d_set(1.9841269504765356e-4))
    p = d_fma(p, r, d_set(1.3888888943922640e-3))
    p = d_fma(p, r, d_set(8.3333333334956238e-3))
    p = d_fma(p, r, d_set(4.1666666666529189e-2))
    p = d_fma(p, r, d_set(1.6666666666666410e-1))
    p = d_fma(p, r, d_set(0.50000000000000107))
    # 1 + r + r^2 p, with what rounding r and 1 + high would lose
    above = d_add(d_set(1.0), high)
    lost = d_fma(n, d_set(-LN2_LOW), d_sub(high, d_sub(above, d_set(1.0))))
    p = d_add(above, d_fma(d_mul(r, r), p, lost))
    return d_mul(p, d_power(t))


cdef inline vec exp_in(Units units, vec x) noexcept nogil:
    # NaN stays NaN.
    cdef vec t, n, r, p
    if IS_DOUBLE:
        return v_from_doubles(exp_of_doubles(v_to_doubles(x), v_to_doubles(units.low), v_to_doubles(units.round_by)))
    x = v_max(x, units.low)
    t = v_fma(x, v_set(<real>LOG2_E), units.round_by)
    n = v_sub(t, units.round_by)
    r = v_fma(n, v_set(<real>-LN2_HIGH_32), x)
    r = v_fma(n, v_set(<real>-LN2_LOW_32), r)
    p = v_set(<real>0.0013814467059326511)
    p = v_fma(p, r, v_set(<real>0.0083687804111805337))
    p = v_fma(p, r, v_set(<real>0.041668394210893869))
    p = v_fma(p, r, v_set(<real>0.16666520107819589))
    p = v_fma(p, r, v_set(<real>0.49999993412501566))
    p = v_fma(p, r, v_set(<real>1.0))
    p = v_fma(p, r, v_set(<real>1.0))
    return v_mul(p, v_power(t))


# What a row needs once, in double, is exact to 2^-34 where numbers are float.


cdef inline doubles exp_once(doubles x, doubles exponent, double room) noexcept nogil:
    # e^x * 2^(room - exponent), of a row's logit and in its units; or 1 over that, of all three with the other sign.
    cdef doubles low = d_mul(d_sub(exponent, d_set(room + 1023.0)), d_set(LN2))
    cdef doubles round_by = d_add(d_set(ROUNDER_64), d_sub(d_set(room + 1023.0), exponent)), t, r, p
    if IS_DOUBLE:
        return exp_of_doubles(x, low, round_by)
    x = d_max(x, low)
    t = d_fma(x, d_set(LOG2_E), round_by)
    # exp_in, too, takes n times this away, so that the others' terms do not differ.
    r = d_fma(d_sub(t, round_by), d_set(-(LN2_HIGH_32 + LN2_LOW_32)), x)
    p = d_set(1.9790243073201050e-4)
    p = d_fma(p, r, d_set(1.3944758551431730e-3))
    p = d_fma(p, r, d_set(8.3334976752916861e-3))
    p = d_fma(p, r, d_set(4.1666293635566478e-2))
    p = d_fma(p, r, d_set(1.6666665864588830e-1))
    p = d_fma(p, r, d_set(0.50000000680369499))
    p = d_fma(p, r, d_set(1.0))
    p = d_fma(p, r, d_set(1.0))
    return d_mul(p, d_power(t))


cdef inline doubles log1p_of(doubles u, doubles inverse) noexcept nogil:
    # in   u        finite and >= 0, or NaN
    # in   inverse  1 / (1 + u), roughly: it multiplies what rounding 1 + u has lost, so that log1p(1e-30) is 1e-30; of double only,
    #               because where numbers are float what is lost of more than 2 does not count
    # z = 1 + u = (1 + f) 2^k, and log(1 + f) = 2 artanh(s) with s = f / (2 + f); in double with the terms as in fdlibm's log.
    cdef doubles z = d_add(d_set(1.0), u)
    cdef doubles lost = d_sub(u, d_sub(z, d_set(1.0)))
    cdef doubles k = d_exponent(z), f = d_sub(d_significand(z), d_set(1.0))
    cdef doubles s = d_div(f, d_add(d_set(2.0), f)), w = d_mul(s, s)
    cdef doubles half_square, tail
    if not IS_DOUBLE:
        lost = d_select(d_greater(z, d_set(2.0)), d_set(0.0), lost)
        tail = d_set(0.23580530184007355)
        tail = d_fma(tail, w, d_set(0.28537422584230747))
        tail = d_fma(tail, w, d_set(0.40000332740461967))
        tail = d_fma(tail, w, d_set(0.66666665661118125))
        tail = d_fma(tail, w, d_set(2.0))
        return d_fma(k, d_set(LN2), d_fma(s, tail, lost))
    lost = d_mul(lost, inverse)
    half_square = d_mul(d_mul(d_set(0.5), f), f)
    tail = d_set(0.1479350928984409592)
    tail = d_fma(tail, w, d_set(0.15314331657541134429))
    tail = d_fma(tail, w, d_set(0.18183551575610412651))
    tail = d_fma(tail, w, d_set(0.22222198861321990511))
    tail = d_fma(tail, w, d_set(0.28571428739023533528))
    tail = d_fma(tail, w, d_set(0.39999999999433429717))
    tail = d_fma(tail, w, d_set(0.66666666666667306744))
    tail = d_mul(tail, w)
    lost = d_fma(k, d_set(LN2_LOW), lost)
    lost = d_fma(s, d_add(half_square, tail), lost)
    return d_fma(k, d_set(LN2_HIGH), d_sub(f, d_sub(half_square, lost)))


cdef inline double power_of_two(double exponent) noexcept nogil:
    # in   exponent   a whole number; 0 below the normal numbers, and for NaN
    cdef int64_t bits
    cdef double power
    if not exponent >= -1022:
        return 0.0
    bits = <int64_t>(1023 + min(exponent, 1024.0)) << 52
    memcpy(&power, &bits, 8)
    return power
