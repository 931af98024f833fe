# The names of vectors.h, for typed Cython.

from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int64_t, uint16_t, uintptr_t
from libc.string cimport memcpy, memset

cdef extern from "vectors.h" nogil:
    bint HAS_FMA
    ctypedef struct vec:          # LANES reals
        pass
    ctypedef struct mask:
        pass
    ctypedef struct doubles:      # LANES doubles
        pass
    ctypedef struct dmask:
        pass
    vec v_set(real)
    vec v_load(const real*)
    vec v_load_first(const real*, int count, real rest)
    void v_store(real*, vec)
    void v_store_first(real*, vec, int count)
    void v_stream(real*, vec)
    vec v_add(vec, vec)
    vec v_sub(vec, vec)
    vec v_mul(vec, vec)
    vec v_max(vec, vec)           # NaN in the second is passed over
    vec v_fma(vec, vec, vec)
    vec v_power(vec)              # two to the number in the lowest bits
    mask v_equal(vec, vec)
    bint v_any(mask)
    int v_first(mask)
    vec v_select(mask, vec, vec)
    real v_fold_max(vec)
    const int UNIT
    void v_load_columns(const real*, Py_ssize_t, int, vec*)
    void v_store_columns(real*, Py_ssize_t, int, const vec*)
    doubles v_to_doubles(vec)
    vec v_from_doubles(doubles)
    doubles d_set(double)
    doubles d_load(const double*)
    doubles d_load_reals(const real*)
    void d_store(double*, doubles)
    doubles d_add(doubles, doubles)
    doubles d_sub(doubles, doubles)
    doubles d_mul(doubles, doubles)
    doubles d_div(doubles, doubles)
    doubles d_max(doubles, doubles)       # likewise
    doubles d_fma(doubles, doubles, doubles)
    doubles d_power(doubles)
    doubles d_exponent(doubles)
    doubles d_significand(doubles)
    dmask d_equal(doubles, doubles)
    dmask d_unequal(doubles, doubles)
    dmask d_greater(doubles, doubles)
    doubles d_select(dmask, doubles, doubles)
    bint d_any(dmask)
    double d_fold_add(doubles)
    vec v_load_bfloat16(const uint16_t*)
    void v_store_bfloat16(uint16_t*, vec)
    vec v_load_float16(const uint16_t*)
    void v_store_float16(uint16_t*, vec)
    float v_bfloat_to_float(uint16_t)
    uint16_t v_float_to_bfloat(float)
    float v_half_to_float(uint16_t)
    uint16_t v_float_to_half(float)
    void v_prefetch(const void*)
    void v_fence()
