"""What the processor and the OpenMP runtime say. Compiled for the baseline, so that it can be asked on any machine."""

from libc.stdlib cimport free, malloc

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
    static int omp_get_num_procs(void) { return 1; }
    #endif
    #if PYX_XENT_OPENMP < 201511 /* the date of OpenMP 4.5, the first that tells its places */
    enum { omp_proc_bind_false = 0, omp_proc_bind_master = 2 };
    static int omp_get_proc_bind(void) { return 0; }
    static int omp_get_num_places(void) { return 0; }
    static int omp_get_place_num(void) { return -1; }
    static int omp_get_place_num_procs(int place) { return 0; }
    static void omp_get_place_proc_ids(int place, int *cpus) {}
    #endif
    """
    int PYX_XENT_OPENMP
    int omp_proc_bind_false, omp_proc_bind_master
    int omp_get_max_threads() noexcept nogil
    int omp_get_num_procs() noexcept nogil
    int omp_get_proc_bind() noexcept nogil
    int omp_get_num_places() noexcept nogil
    int omp_get_place_num() noexcept nogil
    int omp_get_place_num_procs(int place) noexcept nogil
    void omp_get_place_proc_ids(int place, int* cpus) noexcept nogil

OPENMP = PYX_XENT_OPENMP  # the date of the OpenMP specification (201511), or 0 when built without it


def x86_level():
    """0: x86-64's baseline or another processor, 1: x86-64-v3 (AVX2), 2: x86-64-v4 (AVX-512)."""
    return pyx_xent_x86_level()


def openmp_max_threads():
    """What the OpenMP runtime would use now: OMP_NUM_THREADS, omp_set_num_threads() and threadpoolctl all end up here."""
    return omp_get_max_threads()


def openmp_cpus():
    """The CPUs that the process could use when the OpenMP runtime started, however many of them are in its places."""
    return omp_get_num_procs()


def openmp_places():
    """The sets of CPUs that the OpenMP runtime binds threads to; () where it binds none, or cannot tell."""
    places = []
    cdef int place, i, count, number = omp_get_num_places()  # the first question: with it LLVM's runtime starts
    cdef int* cpus
    if omp_get_proc_bind() == omp_proc_bind_false:
        return ()
    for place in range(number):
        count = max(0, omp_get_place_num_procs(place))
        cpus = <int*>malloc((count + 1) * sizeof(int))
        if cpus == NULL:
            raise MemoryError
        omp_get_place_proc_ids(place, cpus)
        places.append(frozenset([cpus[i] for i in range(count)]))
        free(cpus)
    return tuple(places)


def openmp_place():
    """The index of the calling thread's place, -1 if it has none. A thread that has none yet may be bound to one by asking."""
    return omp_get_place_num()


def openmp_keeps_one_place():
    """Do all threads of a team stay in the place of the one that started it (OMP_PROC_BIND=primary, or master)?"""
    return omp_get_proc_bind() == omp_proc_bind_master
