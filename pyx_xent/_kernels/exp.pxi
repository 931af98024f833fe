# One number: exp and log1p, written so that the compiler vectorises a loop of them.
#
# exp(x) is computed as e^(x - offset) * 2^(HEADROOM - exponent), with offset and exponent chosen for a whole row (struct
# Shift). The power of two costs nothing, because the same addition that rounds x/ln2 to an integer n also adds the row's
# exponent to n, and it is exact. So x is never replaced by a rounded x - max: offset is 0 unless the row's logits are so
# large that x - offset is exact anyway. A row of logits between -30 and 20 keeps the last digit of each exponential.
#
# Coefficients: tools/minimax.py. Largest error over all float32 in [-87, 87]: 0.91 ULP with FMA, 1.18 without.

from libc.math cimport INFINITY, exp, fabs
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
    #else
    #define pyx_xent_fmaf(a, b, c) ((a) * (b) + (c))
    #define pyx_xent_fma(a, b, c) ((a) * (b) + (c))
    #endif
    """
    float fma32 "pyx_xent_fmaf"(float a, float b, float c) noexcept nogil
    double fma64 "pyx_xent_fma"(double a, double b, double c) noexcept nogil

ctypedef fused floating:
    float
    double

cdef struct Shift:
    double offset      # subtracted from x before the exponential: 0, or a logit so large that the difference is exact
    double exponent    # of two, divided out

# Adding it to a number below 2^51 rounds that number to an integer, which then stands in the lowest bits.
cdef double ROUNDER = 6755399441055744.0        # 1.5 * 2^52
cdef double ROUNDER_32 = 12582912.0             # 1.5 * 2^23
cdef double LN2 = 0.69314718055994530942
cdef double LOG2_E = 1.4426950408889634074


cdef inline double headroom(floating kind) noexcept nogil:
    # Powers of two left between a row's reference and 1: terms stay normal numbers 2^-(126 + 40) below it (2^-1322).
    if floating is float:
        return 40.0
    else:
        return 300.0


cdef inline double window(floating kind) noexcept nogil:
    # How far a logit may lie above the reference of the sum: e^40 * 2^40 * 2^28 classes < 2^127, likewise for double.
    if floating is float:
        return 40.0
    else:
        return 300.0


cdef inline Shift shift_for(double reference, floating kind) noexcept nogil:
    # in   reference   the row's largest logit or close below it; -inf and NaN allowed
    # Beyond 256 (2048) x - reference is exact for each x that counts, by Sterbenz's lemma: x is within a factor of two.
    cdef Shift shift
    cdef double exact_beyond
    if floating is float:
        exact_beyond = 256.0
    else:
        exact_beyond = 2048.0
    reference = 0.0 if reference == -INFINITY else reference
    shift.offset = 0.0 if fabs(reference) < exact_beyond else reference
    shift.exponent = ((reference - shift.offset) * LOG2_E + ROUNDER) - ROUNDER
    return shift


cdef inline double rounder(Shift shift, double room, floating kind) noexcept nogil:
    # The constant whose addition rounds x/ln2 and leaves the biased exponent of the result in the lowest bits.
    if floating is float:
        return ROUNDER_32 + (127.0 + room - shift.exponent)
    else:
        return ROUNDER + (1023.0 + room - shift.exponent)


cdef inline double lowest(Shift shift, double room, floating kind) noexcept nogil:
    # The x - offset at which that biased exponent reaches 0, which is the number +0: everything below is +0, too.
    if floating is float:
        return (shift.exponent - room - 127.0) * LN2
    else:
        return (shift.exponent - room - 1023.0) * LN2


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


cdef inline floating exp_shifted(floating x, floating offset, floating low, floating round_by) noexcept nogil:
    # in   offset, low, round_by   of the row: Shift.offset, lowest(), rounder()
    # NaN stays NaN: "low > d" is false for it. Far above the window the result is garbage; the caller looks at the maximum.
    cdef floating d = x - offset, t, n, r, p
    d = low if low > d else d
    if floating is float:
        t = fma32(d, <float>1.4426950408889634, round_by)
        n = t - round_by
        r = fma32(-n, <float>0.69317626953125, d)                 # 14 bits: n times it is exact
        r = fma32(-n, <float>-0.000029088971304690583, r)
        p = <float>0.0013814467059326511
        p = fma32(p, r, <float>0.0083687804111805337)
        p = fma32(p, r, <float>0.041668394210893869)
        p = fma32(p, r, <float>0.16666520107819589)
        p = fma32(p, r, <float>0.49999993412501566)
        p = fma32(p, r, <float>1.0)
        p = fma32(p, r, <float>1.0)
        return p * two_to_lowest_bits_32(t)
    else:
        t = fma64(d, 1.4426950408889634, round_by)
        n = t - round_by
        r = fma64(-n, 0.69314718060195446014, d)                  # 32 bits: n times it is exact
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
        p = fma64(p, r, 1.0)
        p = fma64(p, r, 1.0)
        return p * two_to_lowest_bits_64(t)


cdef inline double exp_of_shifted(double x, Shift shift, double room) noexcept nogil:
    # The same exponential as the row's, in double.
    return exp_shifted[double](x, shift.offset, lowest[double](shift, room, 0.0), rounder[double](shift, room, 0.0))


cdef inline double exp_below_zero(double x) noexcept nogil:
    # e^x for x <= 0; +0 below -708.
    return exp_shifted[double](x, 0.0, -1023.0 * LN2, ROUNDER + 1023.0)


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
