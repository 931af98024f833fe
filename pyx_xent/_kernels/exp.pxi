# One number: exp and log1p, written so that the compiler vectorises a loop of them.
#
# exp(x) is computed as e^x * 2^(HEADROOM - exponent), with the exponent chosen for a whole row: close to log2 of its largest
# term. The power of two costs nothing, because the same addition that rounds x/ln2 to an integer n also adds the row's
# exponent to n, and it is exact. So x is never replaced by a rounded x - max, and a row of logits between -30 and 20 keeps the
# last digit of each exponential.
#
# Coefficients: tools/minimax.py. Largest error over all float32 in [-87, 87]: 0.91 ULP with FMA, 1.18 without; of float64, over
# five million numbers, 0.80.

from libc.math cimport INFINITY, copysign, exp, fabs
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #include <math.h>
    /* Exact on every processor that has the instruction, so the AVX2 and AVX-512 builds give the same bits. x86-64's
       baseline has none: fma() would be a library call there, and two roundings keep the same error bound. */
    #if defined(__FMA__) || defined(__AVX2__) || defined(__ARM_FEATURE_FMA)
    #define pyx_xent_fmaf(a, b, c) fmaf(a, b, c)
    #define pyx_xent_fma(a, b, c) fma(a, b, c)
    #define PYX_XENT_FMA 1
    #else
    #define pyx_xent_fmaf(a, b, c) ((a) * (b) + (c))
    #define pyx_xent_fma(a, b, c) ((a) * (b) + (c))
    #define PYX_XENT_FMA 0
    #endif
    """
    float fma32 "pyx_xent_fmaf"(float a, float b, float c) noexcept nogil
    double fma64 "pyx_xent_fma"(double a, double b, double c) noexcept nogil
    bint HAS_FMA "PYX_XENT_FMA"

ctypedef fused floating:
    float
    double

# Adding it to a number below 2^51 rounds that number to an integer, which then stands in the lowest bits.
cdef double ROUNDER = 6755399441055744.0        # 1.5 * 2^52
cdef double ROUNDER_32 = 12582912.0             # 1.5 * 2^23
cdef double LN2 = 0.69314718055994530942
cdef double LOG2_E = 1.4426950408889634074
cdef double LN2_ERROR_32 = -1.723944452561e-13  # ln2 less the two floats that stand for it in exp_parts


cdef inline double headroom(floating compute) noexcept nogil:
    # Powers of two left between a row's reference and 1: terms stay normal numbers 2^-(126 + 40) below it (2^-1322).
    if floating is float:
        return 40.0
    else:
        return 300.0


cdef inline double window(floating compute) noexcept nogil:
    # How far a logit may lie above the reference of the sum: e^40 * 2^40 * 2^28 classes < 2^127, likewise for double.
    if floating is float:
        return 40.0
    else:
        return 300.0


cdef inline double largest_logit(floating compute) noexcept nogil:
    # Up to here n fits beside the rounding constant, and without FMA n times the first part of ln2 into a number. Rows beyond
    # are moved by their maximum first, which is exact for each x that counts, by Sterbenz's lemma: x is within a factor of
    # two.
    if floating is float:
        return 1048576.0 if HAS_FMA else 256.0             # 2^20
    else:
        return 562949953421312.0 if HAS_FMA else 1048576.0     # 2^49


cdef inline double exponent_of(double reference) noexcept nogil:
    # in   reference   the row's largest logit or close below it; -inf and NaN allowed
    return ((0.0 if reference == -INFINITY else reference) * LOG2_E + ROUNDER) - ROUNDER


cdef inline double rounder(double exponent, double room, floating compute) noexcept nogil:
    # The constant whose addition rounds x/ln2 and leaves the biased exponent of the result in the lowest bits.
    if floating is float:
        return ROUNDER_32 + (127.0 + room - exponent)
    else:
        return ROUNDER + (1023.0 + room - exponent)


cdef inline double lowest(double exponent, double room, floating compute) noexcept nogil:
    # The x at which that biased exponent reaches 0, which is the number +0: everything below is +0, too.
    if floating is float:
        return (exponent - room - 127.0) * LN2
    else:
        return (exponent - room - 1023.0) * LN2


cdef inline float two_to_lowest_bits_32(float sum_with_rounder) noexcept nogil:
    cdef uint32_t bits
    cdef float power
    memcpy(&bits, &sum_with_rounder, 4)
    bits = bits << 23
    memcpy(&power, &bits, 4)
    return power


cdef inline double two_to_lowest_bits_64(double sum_with_rounder) noexcept nogil:
    cdef uint64_t bits
    cdef double power
    memcpy(&bits, &sum_with_rounder, 8)
    bits = bits << 52
    memcpy(&power, &bits, 8)
    return power


cdef inline double power_of_two(double exponent) noexcept nogil:
    # in   exponent   a whole number in (-1023, 1023), or NaN, which gives anything
    return two_to_lowest_bits_64(ROUNDER + (1023.0 + exponent))


cdef inline floating exp_parts(floating x, floating low, floating round_by, floating* power) noexcept nogil:
    # in   low, round_by   of the row: lowest(), rounder()
    # out  power           of two, or 0; the exponential is the returned significand, in [0.7, 1.42], times this
    # NaN stays NaN: "low > x" is false for it. Far above the window the result is garbage; the caller looks at the maximum.
    cdef floating t, n, r, p
    x = low if low > x else x
    if floating is float:
        t = fma32(x, <float>1.4426950408889634, round_by)
        n = t - round_by
        r = fma32(-n, <float>0.69317626953125, x)                 # 14 bits: exact
        r = fma32(-n, <float>-0.000029088971304690583, r)
        p = <float>0.0013814467059326511
        p = fma32(p, r, <float>0.0083687804111805337)
        p = fma32(p, r, <float>0.041668394210893869)
        p = fma32(p, r, <float>0.16666520107819589)
        p = fma32(p, r, <float>0.49999993412501566)
        p = fma32(p, r, <float>1.0)
        p = fma32(p, r, <float>1.0)
        power[0] = two_to_lowest_bits_32(t)
    else:
        t = fma64(x, 1.4426950408889634, round_by)
        n = t - round_by
        r = fma64(-n, 0.69314718060195446014, x)                  # 32 bits: exact
        r = fma64(-n, -4.2009150726810847e-11, r)
        p = 2.4999965343255923e-8
        p = fma64(p, r, 2.7630378620805180e-7)
        p = fma64(p, r, 2.7557587342203818e-6)
        p = fma64(p, r, 2.4801492762795647e-5)
        p = fma64(p, r, 1.9841269504765356e-4)
        p = fma64(p, r, 1.3888888943922640e-3)
        p = fma64(p, r, 8.3333333334956238e-3)
        p = fma64(p, r, 4.1666666666529189e-2)
        p = fma64(p, r, 1.6666666666666410e-1)
        p = fma64(p, r, 0.50000000000000107)
        n = 1.0 + r                            # 1 + r + r^2 p, with what the sum 1 + r has lost
        p = n + fma64(r * r, p, r - (n - 1.0))
        power[0] = two_to_lowest_bits_64(t)
    return p


cdef inline floating exp_shifted(floating x, floating low, floating round_by) noexcept nogil:
    cdef floating power
    cdef floating significand = exp_parts(x, low, round_by, &power)
    return significand * power


cdef inline floating plus_product(floating total, floating a, floating b) noexcept nogil:
    if floating is float:
        return fma32(a, b, total)
    else:
        return fma64(a, b, total)


cdef inline double exp_in_double(double x, double exponent, double room, floating compute) noexcept nogil:
    # The row's exponential of x in double. The float one takes n times a rounded ln2 away, nearly the same n in a whole row.
    if floating is float:
        x = x + exponent_of(x) * LN2_ERROR_32
    return exp_shifted[double](x, lowest[double](exponent, room, 0.0), rounder[double](exponent, room, 0.0))


cdef inline double log1p_of_sum(double u) noexcept nogil:
    # in   u   finite and >= 0, or NaN
    # z = 1 + u in [sqrt(1/2), sqrt(2)) * 2^k, and log(1 + f) from s = f / (2 + f), as in fdlibm's log; what rounding 1 + u
    # lost comes back as a correction, so that log1p(1e-30) is 1e-30.
    cdef double z = 1.0 + u
    cdef double lost = (u - (z - 1.0)) / z
    cdef uint64_t bits, mantissa_bits
    cdef double k, f, s, w, half_square, tail
    memcpy(&bits, &z, 8)
    bits = bits + (<uint64_t>0x3ff0000000000000 - <uint64_t>0x3fe6a09e667f3bcd)
    mantissa_bits = (bits & <uint64_t>0x000fffffffffffff) + <uint64_t>0x3fe6a09e667f3bcd
    bits = (bits >> 52) | <uint64_t>0x4330000000000000           # the integer as a double, plus 2^52
    memcpy(&k, &bits, 8)
    k = k - (4503599627370496.0 + 1023.0)
    memcpy(&f, &mantissa_bits, 8)
    f = f - 1.0
    s = f / (2.0 + f)
    w = s * s
    half_square = 0.5 * f * f
    tail = 0.1479350928984409592
    tail = fma64(tail, w, 0.15314331657541134429)
    tail = fma64(tail, w, 0.18183551575610412651)
    tail = fma64(tail, w, 0.22222198861321990511)
    tail = fma64(tail, w, 0.28571428739023533528)
    tail = fma64(tail, w, 0.39999999999433429717)
    tail = fma64(tail, w, 0.66666666666667306744)
    tail = tail * w
    return k * 0.69314718060195446014 - ((half_square - (s * (half_square + tail) + (k * -4.2009150726810847e-11 + lost))) - f)
