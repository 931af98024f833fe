/* Cross-entropy by hand, in AVX-512: loss of each row, and its gradient times `scale`. The limit of short rows, few classes,
 * planes and bfloat16, where moving bytes and taking exponentials alone says too little. Loaded by roofline.py.
 *
 * tile   LANES rows, one in each lane, class by class        at most FEW classes; planes (N, C, pixels)
 * row    one row, LANES classes in a vector                  at most MANY classes; float32 or bfloat16
 *
 * Sums are double, logarithms and divisions too, and what happens once a row happens for LANES rows at once. Less than the
 * package promises: x - max is rounded, NaN is not looked for, labels are not checked, there are no options.
 */
#include "vectors.h"

enum { LANES = 16, FEW = 64, MANY = 1024, PIXELS = 512 };
enum { ROWS = 0, ROWS_BFLOAT16 = 1, PLANES = 2 }; /* as in roofline.py */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))

INLINE Floats all(float a) { return _mm512_set1_ps(a); }
INLINE Doubles all_pd(double a) { return _mm512_set1_pd(a); }
INLINE Doubles low(Floats v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
INLINE Doubles high(Floats v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
INLINE Floats joined(Doubles a, Doubles b) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a)), _mm512_cvtpd_ps(b), 1);
}
INLINE Bits labels(const int64_t *target) {
  __m256i a = _mm512_cvtepi64_epi32(_mm512_loadu_si512(target)), b = _mm512_cvtepi64_epi32(_mm512_loadu_si512(target + 8));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

/* log(m 2^e) = e ln 2 + 2 artanh((m - 1) / (m + 1)), m from 3/4 to 3/2, by artanh's series: to about 1e-13. */
INLINE Doubles logarithm(Doubles z) {
  static const double term[] = {2. / 17, 2. / 15, 2. / 13, 2. / 11, 2. / 9, 2. / 7, 2. / 5, 2. / 3, 2.};
  Doubles m = _mm512_getmant_pd(z, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src), e = _mm512_getexp_pd(z);
  e = _mm512_mask_add_pd(e, _mm512_cmp_pd_mask(m, all_pd(1), _CMP_LT_OQ), e, all_pd(1)); /* getexp's m is from 1 to 2 */
  Doubles s = (m - all_pd(1)) / (m + all_pd(1)), w = s * s, sum = all_pd(term[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 9; i++) sum = _mm512_fmadd_pd(sum, w, all_pd(term[i]));
  return _mm512_fmadd_pd(e, all_pd(0.6931471805599453), s * sum);
}

/* What a row's gradient is made of, for LANES rows: `factor` for exponentials, and the target's entry. */
typedef struct {
  Floats factor, of_target;
} Gradient;

/* others: the sums without the target, of lanes 0 to 7 and 8 to 15; d: the target's logit less the maximum. */
INLINE Gradient losses(const Doubles others[2], Floats d, double scale, double *loss) {
  Floats own = exponential_ps(d);
  Doubles sum[2] = {others[0] + low(own), others[1] + high(own)};
  Doubles factor[2] = {all_pd(scale) / sum[0], all_pd(scale) / sum[1]};
  _mm512_storeu_pd(loss, logarithm(sum[0]) - low(d));
  _mm512_storeu_pd(loss + 8, logarithm(sum[1]) - high(d));
  return (Gradient){joined(factor[0], factor[1]), joined(-others[0] * factor[0], -others[1] * factor[1])};
}

/* --- tiles */

/* x: (classes, LANES), rows of it `stride` apart. cached: out, (classes, LANES), the exponentials; NULL: not wanted. */
INLINE Gradient tile(const float *x, size_t stride, size_t classes, Bits y, float *cached, double scale, double *loss) {
  Floats largest = _mm512_loadu_ps(x), of_target = all(0);
  Doubles others[2] = {all_pd(0), all_pd(0)};
  for (size_t c = 1; c < classes; c++) largest = _mm512_max_ps(largest, _mm512_loadu_ps(x + c * stride));
  for (size_t c = 0; c < classes;) {
    Floats some = all(0);
    for (size_t end = c + 8 < classes ? c + 8 : classes; c < end; c++) {
      Floats v = _mm512_loadu_ps(x + c * stride), e = exponential_ps(v - largest);
      __mmask16 is_target = _mm512_cmpeq_epi32_mask(_mm512_set1_epi32((int)c), y);
      if (cached) _mm512_store_ps(cached + c * LANES, e);
      some = _mm512_mask_add_ps(some, (__mmask16)~is_target, some, e);
      of_target = _mm512_mask_mov_ps(of_target, is_target, v);
    }
    others[0] += low(some), others[1] += high(some);
  }
  return losses(others, of_target - largest, scale, loss);
}
INLINE Floats tile_gradient(const float *cached, size_t c, Bits y, Gradient g) {
  __mmask16 is_target = _mm512_cmpeq_epi32_mask(_mm512_set1_epi32((int)c), y);
  return _mm512_mask_mov_ps(_mm512_load_ps(cached + c * LANES) * g.factor, is_target, g.of_target);
}

/* Four by four in each quarter of four registers. Register l has rows l, l + 4, l + 8, l + 12 of four neighbouring classes:
 * these become four registers of LANES rows, one for each class; and the inverse. */
INLINE void transpose_quarters(Floats r[4]) {
  Doubles a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
  Doubles c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
  r[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)), r[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  r[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)), r[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}
INLINE __m128 load_quarter(const float *p, int whole, __mmask8 mask) {
  return whole ? _mm_loadu_ps(p) : _mm_maskz_loadu_ps(mask, p);
}
INLINE void store_quarter(float *p, int whole, __mmask8 mask, __m128 v) {
  if (whole)
    _mm_storeu_ps(p, v);
  else
    _mm_mask_storeu_ps(p, mask, v);
}
INLINE void load_four_classes(const float *x, size_t classes, float *out, int whole, __mmask8 mask) {
  Floats r[4];
  for (size_t l = 0; l < 4; l++) {
    r[l] = _mm512_castps128_ps512(load_quarter(x + l * classes, whole, mask));
    r[l] = _mm512_insertf32x4(r[l], load_quarter(x + (l + 4) * classes, whole, mask), 1);
    r[l] = _mm512_insertf32x4(r[l], load_quarter(x + (l + 8) * classes, whole, mask), 2);
    r[l] = _mm512_insertf32x4(r[l], load_quarter(x + (l + 12) * classes, whole, mask), 3);
  }
  transpose_quarters(r);
  for (size_t l = 0; l < 4; l++) _mm512_store_ps(out + l * LANES, r[l]);
}
INLINE void store_four_classes(float *out, size_t classes, Floats r[4], int whole, __mmask8 mask) {
  transpose_quarters(r);
  for (size_t l = 0; l < 4; l++) {
    store_quarter(out + l * classes, whole, mask, _mm512_castps512_ps128(r[l]));
    store_quarter(out + (l + 4) * classes, whole, mask, _mm512_extractf32x4_ps(r[l], 1));
    store_quarter(out + (l + 8) * classes, whole, mask, _mm512_extractf32x4_ps(r[l], 2));
    store_quarter(out + (l + 12) * classes, whole, mask, _mm512_extractf32x4_ps(r[l], 3));
  }
}

/* LANES contiguous rows of at most FEW classes. */
static void few(const float *x, const int64_t *target, size_t classes, double scale, double *loss, float *gradient) {
  float lanes[FEW * LANES] ALIGNED, cached[FEW * LANES] ALIGNED;
  size_t whole = classes / 4 * 4;
  __mmask8 rest = (__mmask8)((1u << classes % 4) - 1);
  Bits y = labels(target);
  for (size_t c = 0; c < whole; c += 4) load_four_classes(x + c, classes, lanes + c * LANES, 1, 0);
  if (rest) load_four_classes(x + whole, classes, lanes + whole * LANES, 0, rest);
  if (!gradient) {
    tile(lanes, LANES, classes, y, NULL, scale, loss);
    return;
  }
  Gradient g = tile(lanes, LANES, classes, y, cached, scale, loss);
  for (size_t c = 0; c < whole; c += 4) {
    Floats r[4];
    for (size_t l = 0; l < 4; l++) r[l] = tile_gradient(cached, c + l, y, g);
    store_four_classes(gradient + c, classes, r, 1, 0);
  }
  if (rest) {
    Floats r[4] = {all(0), all(0), all(0), all(0)};
    for (size_t l = 0; l < classes % 4; l++) r[l] = tile_gradient(cached, whole + l, y, g);
    store_four_classes(gradient + whole, classes, r, 0, rest);
  }
}

/* `count` neighbouring pixels, a multiple of LANES and at most PIXELS, of one image whose classes are `pixels` apart. They are
 * copied side by side first: read a tile at a time, planes a power of two apart would share few cache sets. */
static void pixels_of_image(const float *x, const int64_t *target, size_t count, size_t pixels, size_t classes, double scale,
                            double *loss, float *gradient, int stream) {
  float side_by_side[FEW * PIXELS] ALIGNED, cached[FEW * LANES] ALIGNED;
  for (size_t c = 0; c < classes; c++)
    for (size_t i = 0; i < count; i += LANES) {
      _mm_prefetch((const char *)(x + c * pixels + i + PIXELS), _MM_HINT_T1);
      _mm512_store_ps(side_by_side + c * PIXELS + i, _mm512_loadu_ps(x + c * pixels + i));
    }
  for (size_t i = 0; i < count; i += LANES) {
    Bits y = labels(target + i);
    if (!gradient) {
      tile(side_by_side + i, PIXELS, classes, y, NULL, scale, loss + i);
      continue;
    }
    Gradient g = tile(side_by_side + i, PIXELS, classes, y, cached, scale, loss + i);
    for (size_t c = 0; c < classes; c++) {
      Floats v = tile_gradient(cached, c, y, g);
      float *to = gradient + c * pixels + i;
      if (stream)
        _mm512_stream_ps(to, v);
      else
        _mm512_storeu_ps(to, v);
    }
  }
}

/* One block of an image. With `stream`, blocks start at a cache line of the gradient; pixels before the first line and after
 * the last are computed by tiles that overlap their neighbours. */
static void block(const float *x, const int64_t *target, size_t index, size_t pixels, size_t classes, double scale,
                  double *loss, float *gradient, int stream) {
  size_t head = stream && gradient ? -(uintptr_t)gradient % 64 / sizeof(float) : 0;
  size_t lines_end = head + (pixels - head) / LANES * LANES, begin = head + index * PIXELS;
  size_t end = begin + PIXELS < lines_end ? begin + PIXELS : lines_end, last = pixels - LANES;
  if (index == 0 && head) pixels_of_image(x, target, LANES, pixels, classes, scale, loss, gradient, 0);
  pixels_of_image(x + begin, target + begin, end - begin, pixels, classes, scale, loss + begin,
                  gradient ? gradient + begin : NULL, stream);
  if (end == lines_end && end < pixels)
    pixels_of_image(x + last, target + last, LANES, pixels, classes, scale, loss + last, gradient ? gradient + last : NULL, 0);
}

/* --- rows */

INLINE Floats load_any(const void *x, size_t i, __mmask16 mask, int bfloat16) {
  if (!bfloat16) return _mm512_maskz_loadu_ps(mask, (const float *)x + i);
  __m256i bits = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + i);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INLINE void store_any(void *to, size_t i, __mmask16 mask, Floats v, int bfloat16) {
  if (!bfloat16) {
    _mm512_mask_storeu_ps((float *)to + i, mask, v);
    return;
  }
  Bits bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd)); /* to nearest, ties to even */
  _mm256_mask_storeu_epi16((uint16_t *)to + i, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

/* Lane l of the result: the largest number in register l. Half the registers in each step. */
INLINE Floats maxima(Floats r[LANES]) {
  for (int i = 0; i < 16; i += 2)
    r[i / 2] = _mm512_max_ps(_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1]));
  for (int i = 0; i < 8; i += 2) {
    Doubles a = _mm512_castps_pd(r[i]), b = _mm512_castps_pd(r[i + 1]);
    r[i / 2] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int n = 4; n > 1; n /= 2)
    for (int i = 0; i < n; i += 2)
      r[i / 2] = _mm512_max_ps(_mm512_shuffle_f32x4(r[i], r[i + 1], 0x88), _mm512_shuffle_f32x4(r[i], r[i + 1], 0xdd));
  return r[0];
}
/* Lane l of the result: the sum of register l. */
INLINE Doubles sums(Doubles r[8]) {
  for (int i = 0; i < 8; i += 2) r[i / 2] = _mm512_unpacklo_pd(r[i], r[i + 1]) + _mm512_unpackhi_pd(r[i], r[i + 1]);
  for (int n = 4; n > 1; n /= 2)
    for (int i = 0; i < n; i += 2)
      r[i / 2] = _mm512_shuffle_f64x2(r[i], r[i + 1], 0x88) + _mm512_shuffle_f64x2(r[i], r[i + 1], 0xdd);
  return r[0];
}

/* LANES contiguous rows. cached: scratch, (LANES, classes up to whole vectors). */
INLINE void row(const void *x, const int64_t *target, size_t classes, double scale, double *loss, void *gradient, float *cached,
                int bfloat16) {
  const __mmask16 every = 0xffff, rest = (__mmask16)((1u << classes % LANES) - 1);
  size_t whole = classes / LANES * LANES, width = whole + LANES;
  Floats r[LANES];
  Doubles total[LANES];
  float largest[LANES] ALIGNED, of_target[LANES] ALIGNED, own[LANES] ALIGNED;
  for (size_t l = 0; l < LANES; l++) {
    size_t first = l * classes, c = 0;
    Floats a = all(-INFINITY), b = a;
    for (; c + LANES < whole; c += 2 * LANES) {
      a = _mm512_max_ps(a, load_any(x, first + c, every, bfloat16));
      b = _mm512_max_ps(b, load_any(x, first + c + LANES, every, bfloat16));
    }
    if (c < whole) a = _mm512_max_ps(a, load_any(x, first + c, every, bfloat16));
    if (rest) b = _mm512_mask_max_ps(b, rest, b, load_any(x, first + whole, rest, bfloat16));
    r[l] = _mm512_max_ps(a, b);
  }
  Floats M = maxima(r);
  _mm512_store_ps(largest, M);
  for (size_t l = 0; l < LANES; l++) {
    size_t first = l * classes;
    Floats m = all(largest[l]), e;
    Doubles a = all_pd(0), b = a;
    for (size_t c = 0; c < whole;) {
      Floats some = all(0);
      for (size_t end = c + 8 * LANES < whole ? c + 8 * LANES : whole; c < end; c += LANES) {
        e = exponential_ps(load_any(x, first + c, every, bfloat16) - m);
        _mm512_store_ps(cached + l * width + c, e);
        some += e;
      }
      a += low(some), b += high(some);
    }
    if (rest) {
      e = _mm512_maskz_mov_ps(rest, exponential_ps(load_any(x, first + whole, rest, bfloat16) - m));
      _mm512_store_ps(cached + l * width + whole, e);
      a += low(e), b += high(e);
    }
    total[l] = a + b;
    own[l] = cached[l * width + (size_t)target[l]];
    of_target[l] = _mm512_cvtss_f32(load_any(x, first + (size_t)target[l], 1, bfloat16));
  }
  Floats e = _mm512_load_ps(own);
  Doubles others[2] = {sums(total) - low(e), sums(total + 8) - high(e)};
  Gradient g = losses(others, _mm512_load_ps(of_target) - M, scale, loss);
  if (!gradient) return;
  float factor[LANES] ALIGNED, entry[LANES] ALIGNED;
  _mm512_store_ps(factor, g.factor), _mm512_store_ps(entry, g.of_target);
  for (size_t l = 0; l < LANES; l++) {
    size_t first = l * classes;
    const float *of_row = cached + l * width;
    Floats f = all(factor[l]);
    for (size_t c = 0; c < whole; c += LANES) store_any(gradient, first + c, every, _mm512_load_ps(of_row + c) * f, bfloat16);
    if (rest) store_any(gradient, first + whole, rest, _mm512_load_ps(of_row + whole) * f, bfloat16);
    store_any(gradient, first + (size_t)target[l], 1, all(entry[l]), bfloat16);
  }
}

static void rows(int kind, const void *x, const int64_t *target, size_t first, size_t classes, double scale, double *loss,
                 void *gradient) {
  float cached[LANES * (MANY + LANES)] ALIGNED;
  size_t size = kind == ROWS_BFLOAT16 ? 2 : 4;
  const void *from = (const char *)x + first * classes * size;
  void *to = gradient ? (char *)gradient + first * classes * size : NULL;
  if (kind == ROWS_BFLOAT16)
    row(from, target + first, classes, scale, loss + first, to, cached, 1);
  else if (classes <= FEW)
    few(from, target + first, classes, scale, loss + first, to);
  else
    row(from, target + first, classes, scale, loss + first, to, cached, 0);
}

/* Everything `repeat` times. x (N, classes, pixels) of class indices `target` (N, pixels), both contiguous; rows have one
 * pixel. N (of rows) or pixels (of planes) is a multiple of LANES. loss: out, (N, pixels), double; gradient: out, as x, of
 * sum(loss) * scale; NULL: not wanted. stream: planes are written by non-temporal stores.
 * Returns 0, or 1 where a shape or this processor is not for these loops. */
int handwritten(int kind, const void *x, const int64_t *target, double *loss, void *gradient, size_t N, size_t classes,
                size_t pixels, double scale, int stream, int threads, int repeat) {
  int fits = kind == PLANES ? pixels >= LANES && pixels % LANES == 0 && classes <= FEW
                            : pixels == 1 && N % LANES == 0 && classes <= MANY;
  size_t blocks = (pixels + PIXELS - 1) / PIXELS, image = classes * pixels;
  if (!fits || classes < 1) return 1;
  while (repeat--) {
    if (kind == PLANES) {
#pragma omp parallel num_threads(threads) if (threads > 1)
      {
#pragma omp for schedule(dynamic, 8) /* 8: neighbours are prefetched */
        for (size_t i = 0; i < N * blocks; i++) {
          size_t n = i / blocks;
          block((const float *)x + n * image, target + n * pixels, i % blocks, pixels, classes, scale, loss + n * pixels,
                gradient ? (float *)gradient + n * image : NULL, stream);
        }
        _mm_sfence();
      }
    } else {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
      for (size_t i = 0; i < N; i += LANES) rows(kind, x, target, i, classes, scale, loss, gradient);
    }
  }
  return 0;
}
int has_handwritten(void) { return 1; }
#else
int handwritten(int kind, const void *x, const int64_t *target, double *loss, void *gradient, size_t N, size_t classes,
                size_t pixels, double scale, int stream, int threads, int repeat) {
  (void)kind, (void)x, (void)target, (void)loss, (void)gradient, (void)N, (void)classes, (void)pixels, (void)scale;
  (void)stream, (void)threads, (void)repeat;
  return 1;
}
int has_handwritten(void) { return 0; }
#endif
