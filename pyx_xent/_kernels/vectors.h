/* Vectors by name: what LANES numbers are in the registers of each target, so that nothing hangs on a compiler's vectoriser.

   A `vec` is 64 bytes, one cache line: 16 floats or 8 doubles, as PYX_XENT_DOUBLE says. `doubles` are LANES doubles: the same
   as `vec` where that is double. Both are structs of native registers: one of AVX-512, two of AVX2, four of SSE2 and NEON, or
   plain numbers where a compiler has no vector types (or PYX_XENT_PLAIN_C asks for it). Members have names because gcc 12 keeps
   named members in registers and takes arrays of registers apart, which is 2 to 4 times slower. Maximum and fused multiply-add
   are intrinsics, because gcc 12 turns the portable forms into scalars.

   Every operation rounds as IEEE 754 says and has the same bits on every target that has a fused multiply-add; SSE2 and plain
   C without one round twice. What a function does is in its name; F(m, i) below is one register of its result, the i-th. */
#ifndef PYX_XENT_VECTORS_H
#define PYX_XENT_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if PYX_XENT_DOUBLE
typedef double v_real;
typedef int64_t v_int;
typedef uint64_t v_uint;
#define LANES 8
#define SIGNIFICAND_BITS 52
#else
typedef float v_real;
typedef int32_t v_int;
typedef uint32_t v_uint;
#define LANES 16
#define SIGNIFICAND_BITS 23
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define INLINE static __forceinline
#define PYX_XENT_PLAIN_C 1
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#if defined(__AVX__) && !PYX_XENT_PLAIN_C
#include <immintrin.h>
#elif defined(__SSE2__) && !PYX_XENT_PLAIN_C
#include <emmintrin.h>
#elif defined(__aarch64__) && !PYX_XENT_PLAIN_C
#include <arm_neon.h>
#elif !PYX_XENT_PLAIN_C
#define PYX_XENT_PLAIN_C 1
#endif

/* The members of a struct of 1, 2, 4, 8 registers, or LANES numbers; their pairs; and the tree of a sum or maximum over them:
   lane l with l + LANES / 2, then with l + LANES / 4, ..., whatever the registers are. */
#define MEMBERS_1 a
#define MEMBERS_2 a, b
#define MEMBERS_4 a, b, c, d
#define MEMBERS_8 a, b, c, d, e, f, g, h
#define EACH_1(F) F(a, 0)
#define EACH_2(F) F(a, 0), F(b, 1)
#define EACH_4(F) F(a, 0), F(b, 1), F(c, 2), F(d, 3)
#define EACH_8(F) EACH_4(F), F(e, 4), F(f, 5), F(g, 6), F(h, 7)
#define PAIRS_1(F) F(a, b)
#define PAIRS_2(F) F(a, b), F(c, d)
#define PAIRS_4(F) F(a, b), F(c, d), F(e, f), F(g, h)
#define TREE_1(F, x) x.a
#define TREE_2(F, x) F(x.a, x.b)
#define TREE_4(F, x) F(F(x.a, x.c), F(x.b, x.d))
#define TREE_8(F, x) F(F(F(x.a, x.e), F(x.c, x.g)), F(F(x.b, x.f), F(x.d, x.h)))
#define EACH_NUMBER_8(F) F(v[0], 0), F(v[1], 1), F(v[2], 2), F(v[3], 3), F(v[4], 4), F(v[5], 5), F(v[6], 6), F(v[7], 7)
#define EACH_NUMBER_16(F)                                                                                                  \
  EACH_NUMBER_8(F), F(v[8], 8), F(v[9], 9), F(v[10], 10), F(v[11], 11), F(v[12], 12), F(v[13], 13), F(v[14], 14), F(v[15], 15)
#define PASTE(a, b) a##b
#define CHOOSE(name, count) PASTE(name, count)

#if PYX_XENT_PLAIN_C
#define REGISTER_BYTES sizeof(v_real)
#define DOUBLE_REGISTER_BYTES sizeof(double)
typedef v_real v_reg, v_reg_u;
typedef v_int v_ireg;
typedef double d_reg, d_reg_u;
typedef int64_t d_ireg;
typedef struct { v_reg v[LANES]; } vec;
typedef struct { v_ireg v[LANES]; } mask;
#define V_EACH CHOOSE(EACH_NUMBER_, LANES)
#define D_EACH CHOOSE(EACH_NUMBER_, LANES)
#if PYX_XENT_DOUBLE
typedef vec doubles;
typedef mask dmask;
#else
typedef struct { d_reg v[LANES]; } doubles;
typedef struct { d_ireg v[LANES]; } dmask;
#endif

#else /* registers */
#if defined(__AVX512F__)
#define REGISTER_BYTES 64
#define V_COUNT 1
#elif defined(__AVX__)
#define REGISTER_BYTES 32
#define V_COUNT 2
#else
#define REGISTER_BYTES 16
#define V_COUNT 4
#endif
#define DOUBLE_REGISTER_BYTES REGISTER_BYTES
#define REGISTER __attribute__((vector_size(REGISTER_BYTES)))
#define UNALIGNED(type) __attribute__((vector_size(REGISTER_BYTES), aligned(sizeof(type)), may_alias))
typedef v_real v_reg REGISTER;
typedef v_real v_reg_u UNALIGNED(v_real);
typedef v_int v_ireg REGISTER;
typedef v_uint v_ureg REGISTER;
typedef double d_reg REGISTER;
typedef double d_reg_u UNALIGNED(double);
typedef int64_t d_ireg REGISTER;
typedef uint64_t d_ureg REGISTER;
#if PYX_XENT_DOUBLE
#define D_COUNT V_COUNT
#elif V_COUNT == 1
#define D_COUNT 2
#elif V_COUNT == 2
#define D_COUNT 4
#else
#define D_COUNT 8
#endif
#define V_EACH CHOOSE(EACH_, V_COUNT)
#define D_EACH CHOOSE(EACH_, D_COUNT)
#define V_TREE CHOOSE(TREE_, V_COUNT)
#define D_TREE CHOOSE(TREE_, D_COUNT)
typedef struct { v_reg CHOOSE(MEMBERS_, V_COUNT); } vec;
typedef struct { v_ireg CHOOSE(MEMBERS_, V_COUNT); } mask;
#if PYX_XENT_DOUBLE
typedef vec doubles;
typedef mask dmask;
#else
typedef struct { d_reg CHOOSE(MEMBERS_, D_COUNT); } doubles;
typedef struct { d_ireg CHOOSE(MEMBERS_, D_COUNT); } dmask;
#endif
#endif

/* What the portable forms lack, for each target. MAX(a, b) is b if b > a, else a: a NaN in b is passed over. */
#if PYX_XENT_PLAIN_C
#define D_MAX(a, b) ((b) > (a) ? (b) : (a))
#define MAX D_MAX
#define FMA_PORTABLE 1
#define STREAM(p, x) (*(p) = (x))
#elif defined(__AVX512F__)
#if PYX_XENT_DOUBLE
#define STREAM(p, x) _mm512_stream_pd(p, (__m512d)(x))
#else
#define MAX(a, b) ((v_reg)_mm512_max_ps((__m512)(b), (__m512)(a)))
#define V_FMA(a, b, c) ((v_reg)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define LOW(x) ((d_reg)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)(x))))
#define WIDE(p) ((d_reg)_mm512_cvtps_pd(_mm256_loadu_ps(p)))
#define HIGH(x) ((d_reg)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)(x), 1)))
#define JOIN(low, high)                                                                                                    \
  ((v_reg)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)(low))), _mm512_cvtpd_ps((__m512d)(high)), 1))
#define STREAM(p, x) _mm512_stream_ps(p, (__m512)(x))
#endif
#define D_MAX(a, b) ((d_reg)_mm512_max_pd((__m512d)(b), (__m512d)(a)))
#define D_FMA(a, b, c) ((d_reg)_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#define ANY(x) (_mm512_test_epi64_mask((__m512i)(x), (__m512i)(x)) != 0)
#elif defined(__AVX__)
#if PYX_XENT_DOUBLE
#define STREAM(p, x) _mm256_stream_pd(p, (__m256d)(x))
#else
#define MAX(a, b) ((v_reg)_mm256_max_ps((__m256)(b), (__m256)(a)))
#define V_FMA(a, b, c) ((v_reg)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define LOW(x) ((d_reg)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)(x))))
#define WIDE(p) ((d_reg)_mm256_cvtps_pd(_mm_loadu_ps(p)))
#define HIGH(x) ((d_reg)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)(x), 1)))
#define JOIN(low, high)                                                                                                    \
  ((v_reg)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)(low))), _mm256_cvtpd_ps((__m256d)(high)), 1))
#define STREAM(p, x) _mm256_stream_ps(p, (__m256)(x))
#endif
#define D_MAX(a, b) ((d_reg)_mm256_max_pd((__m256d)(b), (__m256d)(a)))
#define D_FMA(a, b, c) ((d_reg)_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define ANY(x) (_mm256_movemask_epi8((__m256i)(x)) != 0)
#elif defined(__SSE2__)
#if PYX_XENT_DOUBLE
#define STREAM(p, x) _mm_stream_pd(p, (__m128d)(x))
#else
#define MAX(a, b) ((v_reg)_mm_max_ps((__m128)(b), (__m128)(a)))
#define LOW(x) ((d_reg)_mm_cvtps_pd((__m128)(x)))
#define WIDE(p) ((d_reg)_mm_cvtps_pd(_mm_loadl_pi(_mm_setzero_ps(), (const __m64 *)(p))))
#define HIGH(x) ((d_reg)_mm_cvtps_pd(_mm_movehl_ps((__m128)(x), (__m128)(x))))
#define JOIN(low, high) ((v_reg)_mm_movelh_ps(_mm_cvtpd_ps((__m128d)(low)), _mm_cvtpd_ps((__m128d)(high))))
#define STREAM(p, x) _mm_stream_ps(p, (__m128)(x))
#endif
#define D_MAX(a, b) ((d_reg)_mm_max_pd((__m128d)(b), (__m128d)(a)))
#define FMA_PORTABLE 1
#define ANY(x) (_mm_movemask_epi8((__m128i)(x)) != 0)
#else /* NEON: fmaxnm would not pass over a NaN in b alone, so compare and select */
#if !PYX_XENT_DOUBLE
#define MAX(a, b) ((v_reg)vbslq_f32(vcgtq_f32((float32x4_t)(b), (float32x4_t)(a)), (float32x4_t)(b), (float32x4_t)(a)))
#define V_FMA(a, b, c) ((v_reg)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define LOW(x) ((d_reg)vcvt_f64_f32(vget_low_f32((float32x4_t)(x))))
#define WIDE(p) ((d_reg)vcvt_f64_f32(vld1_f32(p)))
#define HIGH(x) ((d_reg)vcvt_high_f64_f32((float32x4_t)(x)))
#define JOIN(low, high) ((v_reg)vcvt_high_f32_f64(vcvt_f32_f64((float64x2_t)(low)), (float64x2_t)(high)))
#endif
#define D_MAX(a, b) ((d_reg)vbslq_f64(vcgtq_f64((float64x2_t)(b), (float64x2_t)(a)), (float64x2_t)(b), (float64x2_t)(a)))
#define D_FMA(a, b, c) ((d_reg)vfmaq_f64((float64x2_t)(c), (float64x2_t)(a), (float64x2_t)(b)))
#define STREAM(p, x) (*(v_reg_u *)(p) = (x))
#define ANY(x) ((((d_ireg)(x))[0] | ((d_ireg)(x))[1]) != 0)
#endif

#if FMA_PORTABLE && (defined(__FMA__) || defined(__ARM_FEATURE_FMA))
#define V_FMA(a, b, c) (sizeof(v_real) == 4 ? fmaf(a, b, c) : fma(a, b, c))
#define D_FMA(a, b, c) fma(a, b, c)
#define HAS_FMA 1
#elif FMA_PORTABLE
#define V_FMA(a, b, c) ((a) * (b) + (c))
#define D_FMA(a, b, c) ((a) * (b) + (c))
#define HAS_FMA 0
#else
#define HAS_FMA 1
#if PYX_XENT_DOUBLE
#define V_FMA(a, b, c) D_FMA(a, b, c)
#endif
#endif

#if PYX_XENT_DOUBLE && !PYX_XENT_PLAIN_C
#define MAX D_MAX
#endif

/* Bits of numbers */
#if PYX_XENT_PLAIN_C
INLINE v_uint v_bits(v_real x) { v_uint bits; memcpy(&bits, &x, sizeof(x)); return bits; }
INLINE v_real v_number(v_uint bits) { v_real x; memcpy(&x, &bits, sizeof(x)); return x; }
INLINE uint64_t d_bits(double x) { uint64_t bits; memcpy(&bits, &x, sizeof(x)); return bits; }
INLINE double d_number(uint64_t bits) { double x; memcpy(&x, &bits, sizeof(x)); return x; }
#define SELECT(k, x, y) ((k) ? (x) : (y))
#define D_SELECT SELECT
#else
#define v_bits(x) ((v_ureg)(x))
#define v_number(x) ((v_reg)(x))
#define d_bits(x) ((d_ureg)(x))
#define d_number(x) ((d_reg)(x))
#define SELECT(k, x, y) ((v_reg)(((k) & (v_ireg)(x)) | (~(k) & (v_ireg)(y))))
#define D_SELECT(k, x, y) ((d_reg)(((k) & (d_ireg)(x)) | (~(k) & (d_ireg)(y))))
#endif

/* Arithmetic */
#if PYX_XENT_PLAIN_C
#define V_SET(m, i) x
#define D_SET V_SET
#else
#define V_SET(m, i) x - (v_reg){0} /* not + 0, which would lose the sign of -0 */
#define D_SET(m, i) x - (d_reg){0}
#endif
#define ADD(m, i) x.m + y.m
#define SUB(m, i) x.m - y.m
#define MUL(m, i) x.m * y.m
#define DIV(m, i) x.m / y.m
#define V_MULADD(m, i) V_FMA(x.m, y.m, z.m)
#define D_MULADD(m, i) D_FMA(x.m, y.m, z.m)
#define V_MAXIMUM(m, i) MAX(x.m, y.m)
#define D_MAXIMUM(m, i) D_MAX(x.m, y.m)
#define V_POWER(m, i) v_number(v_bits(x.m) << SIGNIFICAND_BITS)
#define D_POWER(m, i) d_number(d_bits(x.m) << 52)
INLINE vec v_set(v_real x) { return (vec){V_EACH(V_SET)}; }
INLINE vec v_add(vec x, vec y) { return (vec){V_EACH(ADD)}; }
INLINE vec v_sub(vec x, vec y) { return (vec){V_EACH(SUB)}; }
INLINE vec v_mul(vec x, vec y) { return (vec){V_EACH(MUL)}; }
INLINE vec v_max(vec x, vec y) { return (vec){V_EACH(V_MAXIMUM)}; }
INLINE vec v_fma(vec x, vec y, vec z) { return (vec){V_EACH(V_MULADD)}; }
INLINE vec v_power(vec x) { return (vec){V_EACH(V_POWER)}; }
INLINE doubles d_set(double x) { return (doubles){D_EACH(D_SET)}; }
INLINE doubles d_add(doubles x, doubles y) { return (doubles){D_EACH(ADD)}; }
INLINE doubles d_sub(doubles x, doubles y) { return (doubles){D_EACH(SUB)}; }
INLINE doubles d_mul(doubles x, doubles y) { return (doubles){D_EACH(MUL)}; }
INLINE doubles d_div(doubles x, doubles y) { return (doubles){D_EACH(DIV)}; }
INLINE doubles d_max(doubles x, doubles y) { return (doubles){D_EACH(D_MAXIMUM)}; }
INLINE doubles d_fma(doubles x, doubles y, doubles z) { return (doubles){D_EACH(D_MULADD)}; }
INLINE doubles d_power(doubles x) { return (doubles){D_EACH(D_POWER)}; }

/* A positive normal number is significand * 2^exponent, the significand in [sqrt(1/2), sqrt(2)). */
#define SQRT_HALF 0x3fe6a09e667f3bcdu
#define MOVED(x) (d_bits(x) + (0x3ff0000000000000u - SQRT_HALF))
#define D_EXPONENT(m, i) d_number((MOVED(x.m) >> 52) | 0x4330000000000000u) - (4503599627370496.0 + 1023.0)
#define D_SIGNIFICAND(m, i) d_number((MOVED(x.m) & 0x000fffffffffffffu) + SQRT_HALF)
INLINE doubles d_exponent(doubles x) { return (doubles){D_EACH(D_EXPONENT)}; }
INLINE doubles d_significand(doubles x) { return (doubles){D_EACH(D_SIGNIFICAND)}; }

/* Comparisons and choices */
#if PYX_XENT_PLAIN_C
#define AS_MASK
#define AS_DMASK
#else
#define AS_MASK (v_ireg)
#define AS_DMASK (d_ireg)
#endif
#define V_EQUAL(m, i) AS_MASK(x.m == y.m)
#define D_EQUAL(m, i) AS_DMASK(x.m == y.m)
#define D_UNEQUAL(m, i) AS_DMASK(x.m != y.m)
#define D_GREATER(m, i) AS_DMASK(x.m > y.m)
#define V_CHOSEN(m, i) SELECT(k.m, x.m, y.m)
#define D_CHOSEN(m, i) D_SELECT(k.m, x.m, y.m)
INLINE mask v_equal(vec x, vec y) { return (mask){V_EACH(V_EQUAL)}; }
INLINE vec v_select(mask k, vec x, vec y) { return (vec){V_EACH(V_CHOSEN)}; }
INLINE dmask d_equal(doubles x, doubles y) { return (dmask){D_EACH(D_EQUAL)}; }
INLINE dmask d_unequal(doubles x, doubles y) { return (dmask){D_EACH(D_UNEQUAL)}; }
INLINE dmask d_greater(doubles x, doubles y) { return (dmask){D_EACH(D_GREATER)}; }
INLINE doubles d_select(dmask k, doubles x, doubles y) { return (doubles){D_EACH(D_CHOSEN)}; }
#if PYX_XENT_PLAIN_C
INLINE int d_any(dmask k) { int l, found = 0; for (l = 0; l < LANES; l++) found |= k.v[l] != 0; return found; }
INLINE int v_any(mask k) { int l, found = 0; for (l = 0; l < LANES; l++) found |= k.v[l] != 0; return found; }
#else
#define OR(x, y) ((x) | (y))
INLINE int d_any(dmask k) { return ANY(D_TREE(OR, k)); }
INLINE int v_any(mask k) { return ANY(V_TREE(OR, k)); }
#endif

/* Between vec and doubles */
#if PYX_XENT_DOUBLE
INLINE doubles v_to_doubles(vec x) { return x; }
INLINE vec v_from_doubles(doubles x) { return x; }
#elif PYX_XENT_PLAIN_C
#define WIDENED(m, i) x.m
#define NARROWED(m, i) (float)x.m
INLINE doubles v_to_doubles(vec x) { return (doubles){V_EACH(WIDENED)}; }
INLINE vec v_from_doubles(doubles x) { return (vec){V_EACH(NARROWED)}; }
#else
#define WIDENED(m, i) LOW(x.m), HIGH(x.m)
#define NARROWED(m, n) JOIN(x.m, x.n)
INLINE doubles v_to_doubles(vec x) { return (doubles){V_EACH(WIDENED)}; }
INLINE vec v_from_doubles(doubles x) { return (vec){CHOOSE(PAIRS_, V_COUNT)(NARROWED)}; }
#endif

/* Memory. Addresses need the alignment of a number only, but v_stream's, which is 64 bytes. */
#define V_AT(p, i) ((p) + (i) * (REGISTER_BYTES / sizeof(v_real)))
#define D_AT(p, i) ((p) + (i) * (DOUBLE_REGISTER_BYTES / sizeof(double)))
#define V_LOADED(m, i) *(const v_reg_u *)V_AT(p, i)
#define D_LOADED(m, i) *(const d_reg_u *)D_AT(p, i)
#define V_STORED(m, i) *(v_reg_u *)V_AT(p, i) = x.m
#define D_STORED(m, i) *(d_reg_u *)D_AT(p, i) = x.m
#define V_STREAMED(m, i) STREAM(V_AT(p, i), x.m)
INLINE vec v_load(const v_real *p) { return (vec){V_EACH(V_LOADED)}; }
INLINE doubles d_load(const double *p) { return (doubles){D_EACH(D_LOADED)}; }
/* d_load_reals(p) is v_to_doubles(v_load(p)), for which registers would be taken apart. */
#if PYX_XENT_DOUBLE || PYX_XENT_PLAIN_C
INLINE doubles d_load_reals(const v_real *p) { return v_to_doubles(v_load(p)); }
#else
#define D_WIDENED(m, i) WIDE(D_AT(p, i))
INLINE doubles d_load_reals(const v_real *p) { return (doubles){D_EACH(D_WIDENED)}; }
#endif
INLINE void v_store(v_real *p, vec x) { V_EACH(V_STORED); }
INLINE void d_store(double *p, doubles x) { D_EACH(D_STORED); }
/* A non-temporal store, for results that nobody reads soon: it saves reading the lines that will be overwritten. */
INLINE void v_stream(v_real *p, vec x) { V_EACH(V_STREAMED); }

/* The first `count` lanes, 0 < count <= LANES; the others are `rest`, or not written. */
#if defined(__AVX512F__) && !PYX_XENT_PLAIN_C && PYX_XENT_DOUBLE
INLINE vec v_load_first(const v_real *p, int count, v_real rest) {
  return (vec){(v_reg)_mm512_mask_loadu_pd(_mm512_set1_pd(rest), (__mmask8)((1u << count) - 1), p)};
}
INLINE void v_store_first(v_real *p, vec x, int count) { _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)x.a); }
#elif defined(__AVX512F__) && !PYX_XENT_PLAIN_C
INLINE vec v_load_first(const v_real *p, int count, v_real rest) {
  return (vec){(v_reg)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), (__mmask16)((1u << count) - 1), p)};
}
INLINE void v_store_first(v_real *p, vec x, int count) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)x.a); }
#elif defined(__AVX2__) && !PYX_XENT_PLAIN_C
#if PYX_XENT_DOUBLE
#define IOTA ((v_ireg){0, 1, 2, 3})
#define LOAD_MASKED(p, k) ((v_reg)_mm256_maskload_pd(p, (__m256i)(k)))
#define STORE_MASKED(p, k, x) _mm256_maskstore_pd(p, (__m256i)(k), (__m256d)(x))
#else
#define IOTA ((v_ireg){0, 1, 2, 3, 4, 5, 6, 7})
#define LOAD_MASKED(p, k) ((v_reg)_mm256_maskload_ps(p, (__m256i)(k)))
#define STORE_MASKED(p, k, x) _mm256_maskstore_ps(p, (__m256i)(k), (__m256)(x))
#endif
#define BELOW(i) ((v_ireg)(IOTA < (v_int)(count - (i) * (int)(REGISTER_BYTES / sizeof(v_real)))))
#define V_LOADED_FIRST(m, i) SELECT(BELOW(i), LOAD_MASKED(V_AT(p, i), BELOW(i)), rest - (v_reg){0})
#define V_STORED_FIRST(m, i) STORE_MASKED(V_AT(p, i), BELOW(i), x.m)
INLINE vec v_load_first(const v_real *p, int count, v_real rest) { return (vec){V_EACH(V_LOADED_FIRST)}; }
INLINE void v_store_first(v_real *p, vec x, int count) { V_EACH(V_STORED_FIRST); }
#else
INLINE vec v_load_first(const v_real *p, int count, v_real rest) {
  v_real all[LANES];
  int l;
  for (l = 0; l < LANES; l++) all[l] = l < count ? p[l] : rest;
  return v_load(all);
}
INLINE void v_store_first(v_real *p, vec x, int count) {
  v_real all[LANES];
  int l;
  v_store(all, x);
  for (l = 0; l < count; l++) p[l] = all[l];
}
#endif

/* Over the lanes of one vector, in the order of the trees above */
INLINE v_real v_fold_max(vec x) {
#if defined(__AVX512F__) && !PYX_XENT_PLAIN_C && PYX_XENT_DOUBLE
  return _mm512_reduce_max_pd((__m512d)x.a);
#elif defined(__AVX512F__) && !PYX_XENT_PLAIN_C
  return _mm512_reduce_max_ps((__m512)x.a);
#else
  v_real lanes[LANES];
  int l, half = LANES / 2;
#if PYX_XENT_PLAIN_C
  memcpy(lanes, &x, sizeof(x));
#else
  const v_reg together = V_TREE(MAX, x);
  half = REGISTER_BYTES / sizeof(v_real) / 2;
  *(v_reg_u *)lanes = together;
#endif
  for (; half > 0; half /= 2)
    for (l = 0; l < half; l++) lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
  return lanes[0];
#endif
}
/* The first lane that is chosen; LANES: none. */
INLINE int v_first(mask k) {
  static const v_real lanes_from_there_on[] = {
#if !PYX_XENT_DOUBLE
    16, 15, 14, 13, 12, 11, 10, 9,
#endif
    8, 7, 6, 5, 4, 3, 2, 1};
  return LANES - (int)v_fold_max(v_select(k, v_load(lanes_from_there_on), v_set(0)));
}
INLINE double d_fold_add(doubles x) {
  double lanes[LANES];
  int l, half = LANES / 2;
#if PYX_XENT_PLAIN_C
  memcpy(lanes, &x, sizeof(x));
#else
#define SUM(x, y) ((x) + (y))
  const d_reg together = D_TREE(SUM, x);
  half = DOUBLE_REGISTER_BYTES / sizeof(double) / 2;
  *(d_reg_u *)lanes = together;
#endif
  for (; half > 0; half /= 2)
    for (l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

/* Rows of memory to and from columns: column c holds number c of LANES rows that are `stride` numbers apart. It goes by UNIT rows
   and columns, which are UNIT pieces of 128 bits (4 floats or 2 doubles): these become the same 128 bits of a register each, and
   are transposed there. `width`, of the rows: at most UNIT; no memory is touched beyond. */
enum { UNIT = 16 / sizeof(v_real) };
#if PYX_XENT_PLAIN_C
INLINE void v_load_columns(const v_real *x, ptrdiff_t stride, int width, vec *columns) {
  int l, c;
  for (l = 0; l < LANES; l++)
    for (c = 0; c < UNIT; c++) columns[c].v[l] = c < width ? x[l * stride + c] : 0;
}
INLINE void v_store_columns(v_real *x, ptrdiff_t stride, int width, const vec *columns) {
  int l, c;
  for (l = 0; l < LANES; l++)
    for (c = 0; c < width; c++) x[l * stride + c] = columns[c].v[l];
}
#else
typedef v_real v_unit __attribute__((vector_size(16)));
typedef v_real v_unit_u __attribute__((vector_size(16), aligned(sizeof(v_real)), may_alias));
INLINE v_unit load_unit(const v_real *x, int width) {
  if (width == UNIT) return *(const v_unit_u *)x;
#if defined(__AVX512VL__) && PYX_XENT_DOUBLE
  return (v_unit)_mm_maskz_loadu_pd((__mmask8)((1 << width) - 1), x);
#elif defined(__AVX512VL__)
  return (v_unit)_mm_maskz_loadu_ps((__mmask8)((1 << width) - 1), x);
#elif PYX_XENT_DOUBLE
  return (v_unit){x[0], 0};
#else
  return width == 1 ? (v_unit){x[0], 0, 0, 0} : (v_unit){x[0], x[1], width == 3 ? x[2] : 0, 0};
#endif
}
INLINE void store_unit(v_real *x, int width, v_unit unit) {
  if (width == UNIT) {
    *(v_unit_u *)x = unit;
    return;
  }
#if defined(__AVX512VL__) && PYX_XENT_DOUBLE
  _mm_mask_storeu_pd(x, (__mmask8)((1 << width) - 1), (__m128d)unit);
#elif defined(__AVX512VL__)
  _mm_mask_storeu_ps(x, (__mmask8)((1 << width) - 1), (__m128)unit);
#else
  x[0] = unit[0];
#if !PYX_XENT_DOUBLE
  if (width > 1) x[1] = unit[1];
  if (width > 2) x[2] = unit[2];
#endif
#endif
}
/* One register: piece u is of row UNIT u. */
#if defined(__AVX512F__)
#define PS(x) ((__m512)(x))
#define PD(x) ((__m512d)(x))
#define ZIP_1_LOW(x, y) ((v_reg)_mm512_unpacklo_ps(PS(x), PS(y)))
#define ZIP_1_HIGH(x, y) ((v_reg)_mm512_unpackhi_ps(PS(x), PS(y)))
#define ZIP_2_LOW(x, y) ((v_reg)_mm512_unpacklo_pd(PD(x), PD(y)))
#define ZIP_2_HIGH(x, y) ((v_reg)_mm512_unpackhi_pd(PD(x), PD(y)))
INLINE v_reg load_units(const v_real *x, ptrdiff_t stride, int width) {
  __m512 r = _mm512_castps128_ps512((__m128)load_unit(x, width));
  r = _mm512_insertf32x4(r, (__m128)load_unit(x + UNIT * stride, width), 1);
  r = _mm512_insertf32x4(r, (__m128)load_unit(x + 2 * UNIT * stride, width), 2);
  return (v_reg)_mm512_insertf32x4(r, (__m128)load_unit(x + 3 * UNIT * stride, width), 3);
}
INLINE void store_units(v_real *x, ptrdiff_t stride, int width, v_reg r) {
  store_unit(x, width, (v_unit)_mm512_castps512_ps128((__m512)r));
  store_unit(x + UNIT * stride, width, (v_unit)_mm512_extractf32x4_ps((__m512)r, 1));
  store_unit(x + 2 * UNIT * stride, width, (v_unit)_mm512_extractf32x4_ps((__m512)r, 2));
  store_unit(x + 3 * UNIT * stride, width, (v_unit)_mm512_extractf32x4_ps((__m512)r, 3));
}
#elif defined(__AVX__)
#define PS(x) ((__m256)(x))
#define PD(x) ((__m256d)(x))
#define ZIP_1_LOW(x, y) ((v_reg)_mm256_unpacklo_ps(PS(x), PS(y)))
#define ZIP_1_HIGH(x, y) ((v_reg)_mm256_unpackhi_ps(PS(x), PS(y)))
#define ZIP_2_LOW(x, y) ((v_reg)_mm256_unpacklo_pd(PD(x), PD(y)))
#define ZIP_2_HIGH(x, y) ((v_reg)_mm256_unpackhi_pd(PD(x), PD(y)))
INLINE v_reg load_units(const v_real *x, ptrdiff_t stride, int width) {
  const __m256 r = _mm256_castps128_ps256((__m128)load_unit(x, width));
  return (v_reg)_mm256_insertf128_ps(r, (__m128)load_unit(x + UNIT * stride, width), 1);
}
INLINE void store_units(v_real *x, ptrdiff_t stride, int width, v_reg r) {
  store_unit(x, width, (v_unit)_mm256_castps256_ps128((__m256)r));
  store_unit(x + UNIT * stride, width, (v_unit)_mm256_extractf128_ps((__m256)r, 1));
}
#else
#if defined(__SSE2__)
#define PS(x) ((__m128)(x))
#define PD(x) ((__m128d)(x))
#define ZIP_1_LOW(x, y) ((v_reg)_mm_unpacklo_ps(PS(x), PS(y)))
#define ZIP_1_HIGH(x, y) ((v_reg)_mm_unpackhi_ps(PS(x), PS(y)))
#define ZIP_2_LOW(x, y) ((v_reg)_mm_unpacklo_pd(PD(x), PD(y)))
#define ZIP_2_HIGH(x, y) ((v_reg)_mm_unpackhi_pd(PD(x), PD(y)))
#else
#define PS(x) ((float32x4_t)(x))
#define PD(x) ((float64x2_t)(x))
#define ZIP_1_LOW(x, y) ((v_reg)vzip1q_f32(PS(x), PS(y)))
#define ZIP_1_HIGH(x, y) ((v_reg)vzip2q_f32(PS(x), PS(y)))
#define ZIP_2_LOW(x, y) ((v_reg)vzip1q_f64(PD(x), PD(y)))
#define ZIP_2_HIGH(x, y) ((v_reg)vzip2q_f64(PD(x), PD(y)))
#endif
#define load_units(x, stride, width) ((v_reg)load_unit(x, width))
#define store_units(x, stride, width, r) store_unit(x, width, (v_unit)(r))
#endif
INLINE void transpose_units(v_reg *r) { /* (UNIT,) */
#if PYX_XENT_DOUBLE
  const v_reg first = r[0];
  r[0] = ZIP_2_LOW(first, r[1]);
  r[1] = ZIP_2_HIGH(first, r[1]);
#else
  const v_reg a = ZIP_1_LOW(r[0], r[1]), b = ZIP_1_HIGH(r[0], r[1]), c = ZIP_1_LOW(r[2], r[3]), d = ZIP_1_HIGH(r[2], r[3]);
  r[0] = ZIP_2_LOW(a, c), r[1] = ZIP_2_HIGH(a, c), r[2] = ZIP_2_LOW(b, d), r[3] = ZIP_2_HIGH(b, d);
#endif
}
INLINE void v_load_columns(const v_real *x, ptrdiff_t stride, int width, vec *columns) {
  const ptrdiff_t rows = REGISTER_BYTES / sizeof(v_real);
  v_reg r[UNIT];
  int i, c;
  for (i = 0; i < V_COUNT; i++) {
    for (c = 0; c < UNIT; c++) r[c] = load_units(x + (i * rows + c) * stride, stride, width);
    transpose_units(r);
    for (c = 0; c < UNIT; c++) ((v_reg *)(columns + c))[i] = r[c];
  }
}
INLINE void v_store_columns(v_real *x, ptrdiff_t stride, int width, const vec *columns) {
  const ptrdiff_t rows = REGISTER_BYTES / sizeof(v_real);
  v_reg r[UNIT];
  int i, c;
  for (i = 0; i < V_COUNT; i++) {
    for (c = 0; c < UNIT; c++) r[c] = ((const v_reg *)(columns + c))[i];
    transpose_units(r);
    for (c = 0; c < UNIT; c++) store_units(x + (i * rows + c) * stride, stride, width, r[c]);
  }
}
#endif

/* Half types, by integer arithmetic where the processor has no instruction. To nearest, ties to even. */
INLINE float v_half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float single;
  if (magnitude >= 0x7c00u) {
    bits += 0x70000000u; /* infinity or NaN */
    memcpy(&single, &bits, 4);
  } else {
    memcpy(&single, &bits, 4);
    single *= 5192296858534827628530496329220096.0f; /* 2^112: right for subnormal numbers, too */
  }
  memcpy(&bits, &single, 4);
  bits |= sign;
  memcpy(&single, &bits, 4);
  return single;
}
INLINE uint16_t v_float_to_half(float single) {
  uint32_t bits, sign;
  float magnitude;
  memcpy(&bits, &single, 4);
  sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (bits >= 0x47800000u) return (uint16_t)(sign | 0x7c00u); /* 65536 and more */
  if (bits < 0x38800000u) { /* subnormal: adding 2^-1 rounds it to a multiple of 2^-24 */
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return (uint16_t)(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u); /* may become infinity */
  return (uint16_t)(sign | ((bits - 0x38000000u) >> 13));
}
INLINE float v_bfloat_to_float(uint16_t bfloat) {
  const uint32_t bits = (uint32_t)bfloat << 16;
  float single;
  memcpy(&single, &bits, 4);
  return single;
}
INLINE uint16_t v_float_to_bfloat(float single) {
  uint32_t bits;
  memcpy(&bits, &single, 4);
  return single != single ? (uint16_t)0x7fc0u : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#if !PYX_XENT_DOUBLE && defined(__AVX512F__) && !PYX_XENT_PLAIN_C
INLINE vec v_load_bfloat16(const uint16_t *p) {
  return (vec){(v_reg)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16)};
}
INLINE void v_store_bfloat16(uint16_t *p, vec x) {
  const __m512i bits = (__m512i)x.a, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x.a, (__m512)x.a, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc0))));
}
INLINE vec v_load_float16(const uint16_t *p) { return (vec){(v_reg)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))}; }
INLINE void v_store_float16(uint16_t *p, vec x) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif !PYX_XENT_DOUBLE && defined(__AVX2__) && !PYX_XENT_PLAIN_C
INLINE v_reg widen_bfloat16(const uint16_t *p) {
  return (v_reg)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
INLINE __m256i round_bfloat16(v_reg x) { /* in the lower half of each number's bits */
  const __m256i bits = (__m256i)x, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd)), 16);
  return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), (__m256i)_mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q));
}
INLINE vec v_load_bfloat16(const uint16_t *p) { return (vec){widen_bfloat16(p), widen_bfloat16(p + 8)}; }
INLINE void v_store_bfloat16(uint16_t *p, vec x) {
  const __m256i both = _mm256_packus_epi32(round_bfloat16(x.a), round_bfloat16(x.b));
  _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(both, 0xd8));
}
INLINE vec v_load_float16(const uint16_t *p) {
  return (vec){(v_reg)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
               (v_reg)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE void v_store_float16(uint16_t *p, vec x) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph((__m256)x.b, _MM_FROUND_TO_NEAREST_INT));
}
#else
#define HALF_LOOPS(type, to_float, to_half)                                                                                \
  INLINE vec v_load_##type(const uint16_t *p) {                                                                            \
    v_real all[LANES];                                                                                                     \
    int l;                                                                                                                 \
    for (l = 0; l < LANES; l++) all[l] = to_float(p[l]);                                                                   \
    return v_load(all);                                                                                                    \
  }                                                                                                                        \
  INLINE void v_store_##type(uint16_t *p, vec x) {                                                                         \
    v_real all[LANES];                                                                                                     \
    int l;                                                                                                                 \
    v_store(all, x);                                                                                                       \
    for (l = 0; l < LANES; l++) p[l] = to_half((float)all[l]);                                                             \
  }
HALF_LOOPS(bfloat16, v_bfloat_to_float, v_float_to_bfloat)
HALF_LOOPS(float16, v_half_to_float, v_float_to_half)
#endif

/* A hint, allowed for any address. */
#if defined(__GNUC__) || defined(__clang__)
#define v_prefetch(address) __builtin_prefetch((address), 0, 3)
#else
#define v_prefetch(address) ((void)(address))
#endif
#if defined(__SSE2__) && !PYX_XENT_PLAIN_C
#define v_fence() _mm_sfence() /* v_stream's stores become visible before what comes after */
#else
#define v_fence() ((void)0)
#endif

#endif
