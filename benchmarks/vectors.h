/* What roofline.c and handwritten.c share: vectors of the processor that they are compiled for, and the exponential. */
#ifndef VECTORS_H
#define VECTORS_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTORS 1
typedef __m512 Floats;
typedef __m512d Doubles;
typedef __m512i Bits;
#define OP(name, suffix) _mm512_##name##_##suffix
#define load_bits(p) _mm512_loadu_si512((const void *)(p))
#define store_bits(p, v) _mm512_store_si512((void *)(p), v)
#define stream_bits(p, v) _mm512_stream_si512((void *)(p), v)
#define either(a, b) _mm512_or_si512(a, b)
#define zero_bits() _mm512_setzero_si512()
#define flip(a, b) _mm512_xor_si512(a, b)
static inline Floats nearest_ps(Floats a) { return _mm512_roundscale_ps(a, 8); }
static inline Doubles nearest_pd(Doubles a) { return _mm512_roundscale_pd(a, 8); }
static inline Floats times_power_of_two_ps(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
static inline Doubles times_power_of_two_pd(Doubles a, Doubles n) { return _mm512_scalef_pd(a, n); }
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VECTORS 1
typedef __m256 Floats;
typedef __m256d Doubles;
typedef __m256i Bits;
#define OP(name, suffix) _mm256_##name##_##suffix
#define load_bits(p) _mm256_loadu_si256((const __m256i *)(p))
#define store_bits(p, v) _mm256_store_si256((__m256i *)(p), v)
#define stream_bits(p, v) _mm256_stream_si256((__m256i *)(p), v)
#define either(a, b) _mm256_or_si256(a, b)
#define zero_bits() _mm256_setzero_si256()
#define flip(a, b) _mm256_xor_si256(a, b)
static inline Floats nearest_ps(Floats a) { return _mm256_round_ps(a, 8); }
static inline Doubles nearest_pd(Doubles a) { return _mm256_round_pd(a, 8); }
static inline Floats times_power_of_two_ps(Floats a, Floats n) {
  Bits exponent = _mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-126.0f)));
  return a * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}
static inline Doubles times_power_of_two_pd(Doubles a, Doubles n) {
  Doubles biased = _mm256_max_pd(n, _mm256_set1_pd(-1022.0)) + _mm256_set1_pd(0x1.8p52 + 1023); /* an integer in the low bits */
  return a * _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(biased), 52));
}
#else
#define VECTORS 0
typedef struct {
  unsigned long long part[8];
} Bits;
static inline Bits load_bits(const char *p) {
  Bits v;
  memcpy(&v, p, sizeof v);
  return v;
}
#define store_bits(p, v) memcpy(p, &(v), sizeof(Bits))
#define stream_bits(p, v) memcpy(p, &(v), sizeof(Bits))
static inline Bits either(Bits a, Bits b) {
  for (int i = 0; i < 8; i++) a.part[i] |= b.part[i];
  return a;
}
static inline Bits flip(Bits a, Bits b) {
  for (int i = 0; i < 8; i++) a.part[i] ^= b.part[i];
  return a;
}
static inline Bits zero_bits(void) {
  Bits v;
  memset(&v, 0, sizeof v);
  return v;
}
#endif

#if VECTORS
/* n = round(x / ln 2), r = x - n ln 2 in two steps, a polynomial in Horner's form, 2^n. */
#define DEFINE_EXPONENTIAL(REAL, VECTOR, suffix, LN2_HIGH, LN2_LOW, ...)                                  \
  static inline VECTOR exponential_##suffix(VECTOR x) {                                                   \
    static const REAL coefficient[] = {__VA_ARGS__};                                                      \
    VECTOR n = nearest_##suffix(x * OP(set1, suffix)((REAL)1.4426950408889634));                          \
    VECTOR r = OP(fmadd, suffix)(n, OP(set1, suffix)(-(REAL)(LN2_HIGH)), x);                              \
    VECTOR p = OP(set1, suffix)(coefficient[0]);                                                          \
    r = OP(fmadd, suffix)(n, OP(set1, suffix)(-(REAL)(LN2_LOW)), r);                                      \
    _Pragma("GCC unroll 16") for (size_t i = 1; i < sizeof coefficient / sizeof *coefficient; i++)        \
        p = OP(fmadd, suffix)(p, r, OP(set1, suffix)(coefficient[i]));                                    \
    return times_power_of_two_##suffix(p, n);                                                             \
  }
/* To about 1e-7 (a minimax polynomial of degree 6) and 1e-14 (Taylor's, of degree 11). */
DEFINE_EXPONENTIAL(float, Floats, ps, 0.693145752f, 1.42860677e-6f, 0.00138145988f, 0.00836871658f, 0.041668389f, 0.166665211f,
                   0.49999994f, 1.0f, 1.0f)
DEFINE_EXPONENTIAL(double, Doubles, pd, 0x1.62e42fefa3800p-1, 0x1.ef35793c76730p-45, 1. / 39916800, 1. / 3628800, 1. / 362880,
                   1. / 40320, 1. / 5040, 1. / 720, 1. / 120, 1. / 24, 1. / 6, 0.5, 1.0, 1.0)
#endif
#endif
