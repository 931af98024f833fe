"""What the processor and the OpenMP runtime say. Compiled for the baseline, so that it can be asked on any machine."""

cdef extern from "_cpu.h":
    int pyx_xent_x86_level() noexcept nogil

cdef extern from *:
    """
    #if defined(_OPENMP)
    #include <omp.h>
    #define PYX_XENT_OPENMP _OPENMP
    #else
    #define PYX_XENT_OPENMP 0
    static int omp_get_max_threads(void) { return 1; }
    #endif
    """
    int PYX_XENT_OPENMP
    int omp_get_max_threads() noexcept nogil

OPENMP = PYX_XENT_OPENMP  # the date of the OpenMP specification (201511), or 0 when built without it


def x86_level():
    """0: x86-64's baseline or another processor, 1: x86-64-v3 (AVX2), 2: x86-64-v4 (AVX-512)."""
    return pyx_xent_x86_level()


def openmp_max_threads():
    """What the OpenMP runtime would use now: OMP_NUM_THREADS, omp_set_num_threads() and threadpoolctl all end up here."""
    return omp_get_max_threads()
