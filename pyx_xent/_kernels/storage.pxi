# How numbers lie in memory: float16 and bfloat16 are computed in float; rows that a kernel cannot read where they are go
# through a scratch; results larger than the caches go past them.

from libc.stdint cimport uint16_t, uint32_t, uintptr_t
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    /* IEEE half precision by integer arithmetic, for processors without F16C. */
    static inline float pyx_xent_half_to_float_bits(uint16_t h) {
      const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
      uint32_t bits = magnitude << 13;
      float f;
      if (magnitude >= 0x7c00u) {
        bits += 0x70000000u;                        /* infinity or NaN */
        memcpy(&f, &bits, 4);
      } else {
        memcpy(&f, &bits, 4);
        f *= 5192296858534827628530496329220096.0f; /* 2^112: right for subnormal numbers, too */
      }
      memcpy(&bits, &f, 4);
      bits |= sign;
      memcpy(&f, &bits, 4);
      return f;
    }
    static inline uint16_t pyx_xent_float_to_half_bits(float f) {
      uint32_t bits, sign;
      float magnitude;
      memcpy(&bits, &f, 4);
      sign = (bits >> 16) & 0x8000u;
      bits &= 0x7fffffffu;
      if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
      if (bits >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);  /* 65536 and more */
      if (bits < 0x38800000u) {                     /* subnormal: adding 2^-1 rounds it to a multiple of 2^-24 */
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
      }
      bits += 0xfffu + ((bits >> 13) & 1u);         /* to nearest, ties to even; may become infinity */
      return (uint16_t)(sign | ((bits - 0x38000000u) >> 13));
    }
    #if defined(__F16C__) || (defined(_MSC_VER) && defined(__AVX2__))
    #include <immintrin.h>
    /* 16 at once: gcc 12 leaves conversions of _Float16 scalar. */
    static inline void pyx_xent_halves_to_floats(const uint16_t *half, float *single) {
      _mm256_storeu_ps(single, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)half)));
      _mm256_storeu_ps(single + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + 8))));
    }
    static inline void pyx_xent_floats_to_halves(const float *single, uint16_t *half) {
      _mm_storeu_si128((__m128i *)half, _mm256_cvtps_ph(_mm256_loadu_ps(single), 0));
      _mm_storeu_si128((__m128i *)(half + 8), _mm256_cvtps_ph(_mm256_loadu_ps(single + 8), 0));
    }
    #else
    static inline void pyx_xent_halves_to_floats(const uint16_t *half, float *single) {
      int l;
      for (l = 0; l < 16; l++) single[l] = pyx_xent_half_to_float_bits(half[l]);
    }
    static inline void pyx_xent_floats_to_halves(const float *single, uint16_t *half) {
      int l;
      for (l = 0; l < 16; l++) half[l] = pyx_xent_float_to_half_bits(single[l]);
    }
    #endif

    /* Past the caches, for results that nobody reads soon: saves reading the lines that will be overwritten.
       `to` on a 64-byte boundary. Elsewhere an ordinary store, which is right, too. */
    #if defined(__AVX512F__)
    #include <immintrin.h>
    static inline void pyx_xent_stream_line(void *to, const void *from) {
      _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
    }
    #define pyx_xent_stream_fence() _mm_sfence()
    #elif defined(__AVX2__)
    #include <immintrin.h>
    static inline void pyx_xent_stream_line(void *to, const void *from) {
      _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
      _mm256_stream_si256((__m256i *)to + 1, _mm256_loadu_si256((const __m256i *)from + 1));
    }
    #define pyx_xent_stream_fence() _mm_sfence()
    #else
    static inline void pyx_xent_stream_line(void *to, const void *from) { memcpy(to, from, 64); }
    #define pyx_xent_stream_fence() ((void)0)
    #endif

    /* A hint, allowed for any address. */
    #if defined(__GNUC__) || defined(__clang__)
    #define pyx_xent_prefetch(address) __builtin_prefetch((address), 0, 3)
    #define pyx_xent_prefetch_far(address) __builtin_prefetch((address), 0, 2)
    #else
    #define pyx_xent_prefetch(address) ((void)(address))
    #define pyx_xent_prefetch_far(address) ((void)(address))
    #endif
    """
    float half_to_float "pyx_xent_half_to_float_bits"(uint16_t half) noexcept nogil
    uint16_t float_to_half "pyx_xent_float_to_half_bits"(float single) noexcept nogil
    void halves_to_floats "pyx_xent_halves_to_floats"(const uint16_t* half, float* single) noexcept nogil
    void floats_to_halves "pyx_xent_floats_to_halves"(const float* single, uint16_t* half) noexcept nogil
    void stream_line "pyx_xent_stream_line"(void* to, const void* source) noexcept nogil
    void stream_fence "pyx_xent_stream_fence"() noexcept nogil
    void prefetch "pyx_xent_prefetch"(const void* address) noexcept nogil
    void prefetch_far "pyx_xent_prefetch_far"(const void* address) noexcept nogil


cdef inline Py_ssize_t size_of(Storage storage) noexcept nogil:
    if storage == FLOAT64:
        return 8
    return 4 if storage == FLOAT32 else 2


cdef inline void* element(const ClassArray* array, Py_ssize_t outer, Py_ssize_t inner) noexcept nogil:
    # The first class of a position; NULL if the array is absent.
    if array.data == NULL:
        return NULL
    return <char*>array.data + (outer * array.outer + inner * array.inner) * size_of(array.storage)


cdef inline float bfloat_to_float(uint16_t bfloat) noexcept nogil:
    cdef uint32_t bits = <uint32_t>bfloat << 16
    cdef float single
    memcpy(&single, &bits, 4)
    return single


cdef inline uint16_t float_to_bfloat(float single) noexcept nogil:
    # To nearest, ties to even.
    cdef uint32_t bits
    memcpy(&bits, &single, 4)
    return <uint16_t>0x7fc0 if single != single else <uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)


cdef void load(
    const void* data, Storage storage, Py_ssize_t stride,     # in   (count,)
    Py_ssize_t count,
    floating* to, Py_ssize_t to_stride,                       # out  (count,)
) noexcept nogil:
    cdef Py_ssize_t i = 0
    cdef float strip[LANES]
    cdef int l
    if storage == FLOAT32:
        for i in range(count):
            to[i * to_stride] = <floating>(<const float*>data)[i * stride]
    elif storage == FLOAT64:
        for i in range(count):
            to[i * to_stride] = <floating>(<const double*>data)[i * stride]
    elif storage == BFLOAT16 and stride == 1 and to_stride == 1:
        for i in range(count):
            to[i] = bfloat_to_float((<const uint16_t*>data)[i])
    elif storage == BFLOAT16:
        for i in range(count):
            to[i * to_stride] = bfloat_to_float((<const uint16_t*>data)[i * stride])
    else:
        if stride == 1 and to_stride == 1:
            while i + <Py_ssize_t>LANES <= count:
                halves_to_floats(<const uint16_t*>data + i, strip)
                for l in range(LANES):
                    to[i + l] = strip[l]
                i += LANES
        while i < count:
            to[i * to_stride] = half_to_float((<const uint16_t*>data)[i * stride])
            i += 1


cdef void store(
    const floating* values, Py_ssize_t values_stride,         # in   (count,)
    Py_ssize_t count,
    void* data, Storage storage, Py_ssize_t stride,           # out  (count,)
) noexcept nogil:
    cdef Py_ssize_t i = 0
    cdef float strip[LANES]
    cdef int l
    if storage == FLOAT32:
        for i in range(count):
            (<float*>data)[i * stride] = <float>values[i * values_stride]
    elif storage == FLOAT64:
        for i in range(count):
            (<double*>data)[i * stride] = values[i * values_stride]
    elif storage == BFLOAT16 and stride == 1 and values_stride == 1:
        for i in range(count):
            (<uint16_t*>data)[i] = float_to_bfloat(<float>values[i])
    elif storage == BFLOAT16:
        for i in range(count):
            (<uint16_t*>data)[i * stride] = float_to_bfloat(<float>values[i * values_stride])
    else:
        if stride == 1 and values_stride == 1:
            while i + <Py_ssize_t>LANES <= count:
                for l in range(LANES):
                    strip[l] = <float>values[i + l]
                floats_to_halves(strip, <uint16_t*>data + i)
                i += LANES
        while i < count:
            (<uint16_t*>data)[i * stride] = float_to_half(<float>values[i * values_stride])
            i += 1


cdef inline bint begins_lines(const void* address, Py_ssize_t step) noexcept nogil:
    # Is a line of memory begun at each step?
    return (<uintptr_t>address | <size_t>step) % 64 == 0


cdef inline Py_ssize_t bytes_to_line(const void* address) noexcept nogil:
    # Until a line of memory begins.
    return <Py_ssize_t>(-<uintptr_t>address % 64)


cdef void stream_out(void* data, const void* values, Py_ssize_t size) noexcept nogil:
    # Whole lines of memory past the caches; what is before and after them is stored as usual.
    cdef char* to = <char*>data
    cdef const char* source = <const char*>values
    cdef Py_ssize_t head = min(bytes_to_line(to), size), lines = (size - head) // 64, i
    cdef Py_ssize_t tail = size - head - lines * 64
    memcpy(to, source, head)
    to += head
    source += head
    for i in range(lines):
        stream_line(to + i * 64, source + i * 64)
    memcpy(to + lines * 64, source + lines * 64, tail)


cdef void prefetch_lines(const char* data, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    for i from 0 <= i < size by 64:
        prefetch_far(data + i)


cdef void store_zeros(void* data, Storage storage, Py_ssize_t stride, Py_ssize_t count, bint stream) noexcept nogil:
    cdef Py_ssize_t size = size_of(storage), i = 0
    cdef char zeros[4096]
    cdef char* to = <char*>data
    if stride != 1:
        for i in range(count):
            memset(to + i * stride * size, 0, size)
    elif not stream:
        memset(to, 0, count * size)
    else:
        memset(zeros, 0, sizeof(zeros))
        while i < count * size:
            stream_out(to + i, zeros, min(<Py_ssize_t>sizeof(zeros), count * size - i))
            i += sizeof(zeros)
