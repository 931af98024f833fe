/* The machine's limits for cross-entropy: loops that do only what no program can avoid. Loaded by roofline.py.
 *
 * memory_limit      each byte is moved once, nothing is computed
 * arithmetic_limit  one maximum and one exponential an element, as vector code by hand does them; for arrays in cache
 *
 * Both are upper bounds of speed, not cross-entropy: no targets, no checks, no options.
 */
#include "vectors.h"

static volatile float sink; /* what is read must be used, or the compiler drops the loop */

enum { READ = 0, WRITE_ELSEWHERE = 1, WRITE_IN_PLACE = 2, WRITE_CACHED = 3 };

/* second (NULL if there is none) is read, too. The last `bytes - live` bytes of each thread's share are not read, only set to
 * zero, as the gradients of ignored rows are. WRITE_ELSEWHERE goes past the caches, WRITE_CACHED does not: whichever is faster
 * is the limit. Bits are moved, not numbers: arithmetic on whatever is there could meet subnormals, which are slow.
 * Arrays start where NumPy put them: up to 63 bytes before the first cache line of the one that is written are left alone,
 * and as many as do not fill a step at the end. */
void memory_limit(int kind, char *array, const char *second, char *out, size_t bytes, double live, int threads) {
  char *to = kind == WRITE_ELSEWHERE || kind == WRITE_CACHED ? out : array;
  size_t skipped = -(uintptr_t)to % 64, step = 4 * sizeof(Bits), steps = (bytes - skipped) / step;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; t++) {
    size_t begin = steps * (size_t)t / (size_t)threads * step + skipped;
    size_t end = steps * (size_t)(t + 1) / (size_t)threads * step + skipped;
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
      for (; i < read_end; i += sizeof(Bits)) {
        v = load_bits(array + i);
        if (second) v = flip(v, load_bits(second + i));
        if (kind == WRITE_ELSEWHERE)
          stream_bits(to + i, v);
        else {
          v = flip(v, seen[0]); /* zero, which the compiler does not know */
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
/* A row of `count` elements, a multiple of 4 vectors. gradient: NULL, or where exp(x - max) goes first and
 * exp(x - max) / sum at last. */
#define DEFINE_ARITHMETIC(REAL, VECTOR, suffix, LOG)                                                                          \
  static REAL folded_##suffix(VECTOR v, int maximum) {                                                                        \
    REAL lane[sizeof(VECTOR) / sizeof(REAL)], result;                                                                         \
    OP(storeu, suffix)(lane, v);                                                                                              \
    result = lane[0];                                                                                                         \
    for (size_t i = 1; i < sizeof lane / sizeof *lane; i++)                                                                   \
      result = maximum ? (lane[i] > result ? lane[i] : result) : result + lane[i];                                            \
    return result;                                                                                                            \
  }                                                                                                                           \
  static REAL row_##suffix(const REAL *x, REAL *gradient, size_t count) {                                                     \
    enum { LANES = sizeof(VECTOR) / sizeof(REAL) };                                                                           \
    VECTOR m[4], s[4];                                                                                                        \
    for (int k = 0; k < 4; k++) m[k] = OP(set1, suffix)(-INFINITY), s[k] = OP(set1, suffix)(0);                               \
    for (size_t i = 0; i < count; i += 4 * LANES)                                                                             \
      for (int k = 0; k < 4; k++) m[k] = OP(max, suffix)(m[k], OP(loadu, suffix)(x + i + k * LANES));                         \
    REAL largest = folded_##suffix(OP(max, suffix)(OP(max, suffix)(m[0], m[1]), OP(max, suffix)(m[2], m[3])), 1);             \
    VECTOR M = OP(set1, suffix)(largest);                                                                                     \
    for (size_t i = 0; i < count; i += 4 * LANES)                                                                             \
      for (int k = 0; k < 4; k++) {                                                                                           \
        VECTOR e = exponential_##suffix(OP(loadu, suffix)(x + i + k * LANES) - M);                                            \
        if (gradient) OP(storeu, suffix)(gradient + i + k * LANES, e);                                                        \
        s[k] += e;                                                                                                            \
      }                                                                                                                       \
    REAL sum = folded_##suffix(s[0] + s[1] + s[2] + s[3], 0);                                                                 \
    if (gradient) {                                                                                                           \
      VECTOR scale = OP(set1, suffix)(1 / sum);                                                                               \
      for (size_t i = 0; i < count; i += LANES)                                                                               \
        OP(storeu, suffix)(gradient + i, OP(loadu, suffix)(gradient + i) * scale);                                            \
    }                                                                                                                         \
    return largest + LOG(sum);                                                                                                \
  }                                                                                                                           \
  /* `total` elements, in rows of at most 1024, whatever rows they had: the limit of the arithmetic, not of a shape. Of x and \
   * gradient there are `elements`, in cache: each thread takes its share of them again and again. */                         \
  void arithmetic_limit_##suffix(const REAL *x, REAL *gradient, size_t elements, size_t total, int threads) {                 \
    size_t step = 4 * sizeof(VECTOR) / sizeof(REAL), classes = 1024, rows = elements / classes, all = total / classes;        \
    size_t share = rows < (size_t)threads ? rows : (size_t)threads;                                                           \
    _Pragma("omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)")                                     \
    for (size_t t = 0; t < share; t++) {                                                                                      \
      size_t begin = rows * t / share, end = rows * (t + 1) / share, i = begin;                                               \
      for (size_t count = all * (t + 1) / share - all * t / share; count; count--) {                                          \
        sink = (float)row_##suffix(x + i * classes, gradient ? gradient + i * classes : gradient, classes);                   \
        i = i + 1 == end ? begin : i + 1;                                                                                     \
      }                                                                                                                       \
    }                                                                                                                         \
    size_t rest = elements == total ? (total - all * classes) / step * step : 0;                                              \
    if (rest) sink = (float)row_##suffix(x + all * classes, gradient ? gradient + all * classes : gradient, rest);            \
  }
DEFINE_ARITHMETIC(float, Floats, ps, logf)
DEFINE_ARITHMETIC(double, Doubles, pd, log)
#endif

int has_arithmetic_limit(void) { return VECTORS; }
