/* The machine's limits for cross-entropy: loops that do only what no program can avoid. Loaded by roofline.py.
 *
 * memory_limit      each byte is moved once, nothing is computed
 * arithmetic_limit  one maximum and one exponential an element, as vector code by hand does them; for arrays in cache
 *
 * Both are upper bounds of speed, not cross-entropy: no targets, no checks, no options.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTORS 1
enum { LANES = 16 };
typedef __m512 Floats;
typedef __m512i Bits;
#define all(x) _mm512_set1_ps(x)
#define load(p) _mm512_loadu_ps(p)
#define store(p, v) _mm512_storeu_ps(p, v)
#define larger(a, b) _mm512_max_ps(a, b)
#define fused(a, b, c) _mm512_fmadd_ps(a, b, c)
#define nearest(a) _mm512_roundscale_ps(a, 8)
#define load_bits(p) _mm512_load_si512((const void *)(p))
#define store_bits(p, v) _mm512_store_si512((void *)(p), v)
#define stream_bits(p, v) _mm512_stream_si512((void *)(p), v)
#define either(a, b) _mm512_or_si512(a, b)
#define zero_bits() _mm512_setzero_si512()
#define flip(a, b) _mm512_xor_si512(a, b)
static inline Floats times_power_of_two(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VECTORS 1
enum { LANES = 8 };
typedef __m256 Floats;
typedef __m256i Bits;
#define all(x) _mm256_set1_ps(x)
#define load(p) _mm256_loadu_ps(p)
#define store(p, v) _mm256_storeu_ps(p, v)
#define larger(a, b) _mm256_max_ps(a, b)
#define fused(a, b, c) _mm256_fmadd_ps(a, b, c)
#define nearest(a) _mm256_round_ps(a, 8)
#define load_bits(p) _mm256_load_si256((const __m256i *)(p))
#define store_bits(p, v) _mm256_store_si256((__m256i *)(p), v)
#define stream_bits(p, v) _mm256_stream_si256((__m256i *)(p), v)
#define either(a, b) _mm256_or_si256(a, b)
#define zero_bits() _mm256_setzero_si256()
#define flip(a, b) _mm256_xor_si256(a, b)
static inline Floats times_power_of_two(Floats a, Floats n) {
  Bits exponent = _mm256_cvtps_epi32(_mm256_max_ps(n, all(-126.0f)));
  return a * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
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

static volatile float sink; /* what is read must be used, or the compiler drops the loop */

enum { READ = 0, WRITE_ELSEWHERE = 1, WRITE_IN_PLACE = 2 };

/* array, second, out: aligned to 64 bytes. second (NULL if there is none) is read, too. The last `bytes - live` bytes of each
 * thread's share are not read, only set to zero, as the gradients of ignored rows are. Bits are moved, not numbers: arithmetic
 * on whatever is there could meet subnormals, which are slow. */
void memory_limit(int kind, char *array, const char *second, char *out, size_t bytes, double live, int threads) {
  size_t step = 4 * sizeof(Bits), steps = bytes / step;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; t++) {
    size_t begin = steps * (size_t)t / (size_t)threads * step, end = steps * (size_t)(t + 1) / (size_t)threads * step;
    size_t read_end = begin + (size_t)((double)((end - begin) / step) * live) * step;
    Bits seen[4] = {zero_bits(), zero_bits(), zero_bits(), zero_bits()}, zero = zero_bits(), v;
    size_t i = begin;
    if (kind == READ)
      for (; i < read_end; i += step)
        for (int k = 0; k < 4; k++) {
          seen[k] = either(seen[k], load_bits(array + i + (size_t)k * sizeof(Bits)));
          if (second) seen[k] = either(seen[k], load_bits(second + i + (size_t)k * sizeof(Bits)));
        }
    else {
      char *to = kind == WRITE_ELSEWHERE ? out : array;
      for (; i < read_end; i += sizeof(Bits)) {
        v = load_bits(array + i);
        if (second) v = flip(v, load_bits(second + i));
        if (kind == WRITE_ELSEWHERE)
          stream_bits(to + i, v);
        else {
          v = flip(v, seen[0]);
          store_bits(to + i, v);
        }
      }
      for (; i < end; i += sizeof(Bits)) stream_bits(to + i, zero);
#if VECTORS
      _mm_sfence();
#endif
    }
    char bits[sizeof(Bits)];
    v = either(either(seen[0], seen[1]), either(seen[2], seen[3]));
    memcpy(bits, &v, sizeof v);
    sink = (float)bits[0];
  }
}

#if VECTORS
/* n = round(x / ln 2), r = x - n ln 2 in two steps, a polynomial of degree 5, 2^n: to about 3e-7. */
static inline Floats exponential(Floats x) {
  Floats n = nearest(x * all(1.44269504f)), r = fused(n, all(-0.693145752f), x), p = all(8.3334519e-3f);
  r = fused(n, all(-1.42860677e-6f), r);
  p = fused(p, r, all(4.16657959e-2f));
  p = fused(p, r, all(1.66666655e-1f));
  p = fused(p, r, all(0.5f));
  p = fused(p, r, all(1.0f));
  p = fused(p, r, all(1.0f));
  return times_power_of_two(p, n);
}

static float folded(Floats v, int maximum) {
  float lane[LANES], result;
  store(lane, v);
  result = lane[0];
  for (int i = 1; i < LANES; i++) result = maximum ? (lane[i] > result ? lane[i] : result) : result + lane[i];
  return result;
}

/* gradient: NULL, or where exp(x - max) goes first and exp(x - max) / sum at last; count is a multiple of 4 * LANES. */
static float row(const float *x, float *gradient, size_t count) {
  Floats m[4], s[4];
  for (int k = 0; k < 4; k++) m[k] = all(-INFINITY), s[k] = all(0.0f);
  for (size_t i = 0; i < count; i += 4 * LANES)
    for (int k = 0; k < 4; k++) m[k] = larger(m[k], load(x + i + k * LANES));
  float largest = folded(larger(larger(m[0], m[1]), larger(m[2], m[3])), 1);
  Floats M = all(largest);
  if (!gradient) {
    for (size_t i = 0; i < count; i += 4 * LANES)
      for (int k = 0; k < 4; k++) s[k] += exponential(load(x + i + k * LANES) - M);
    return largest + logf(folded(s[0] + s[1] + s[2] + s[3], 0));
  }
  for (size_t i = 0; i < count; i += 4 * LANES)
    for (int k = 0; k < 4; k++) {
      Floats e = exponential(load(x + i + k * LANES) - M);
      store(gradient + i + k * LANES, e);
      s[k] += e;
    }
  float sum = folded(s[0] + s[1] + s[2] + s[3], 0);
  Floats scale = all(1.0f / sum);
  for (size_t i = 0; i < count; i += LANES) store(gradient + i, load(gradient + i) * scale);
  return largest + logf(sum);
}

/* The elements are taken in rows of at most 1024, whatever rows they had: the limit of the arithmetic, not of a shape. */
void arithmetic_limit(const float *x, float *gradient, size_t elements, int threads) {
  size_t classes = 1024;
  ptrdiff_t rows = (ptrdiff_t)(elements / classes);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (ptrdiff_t i = 0; i < rows; i++) sink = row(x + (size_t)i * classes, gradient ? gradient + (size_t)i * classes : gradient, classes);
  size_t done = (size_t)rows * classes, rest = (elements - done) / (4 * LANES) * (4 * LANES);
  if (rest) sink = row(x + done, gradient ? gradient + done : gradient, rest);
}
#endif

int has_arithmetic_limit(void) { return VECTORS; }
