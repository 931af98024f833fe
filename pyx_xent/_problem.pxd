# What a kernel gets: plain memory, checked by _call.pyx before it is put here. Nothing in it is looked at twice.
#
# Every array over classes is seen as (outer, classes, inner), whatever its axes were: (N, C) is (1, C, N), and
# (N, C, d1..dk) is (N, C, d1*..*dk). A row is one (outer, inner) position; positions are numbered in C order.

from libc.stdint cimport int64_t

cdef extern from "_environment.h":
    ctypedef struct Environment "pyx_xent_environment":
        pass
    Environment enter_environment "pyx_xent_enter"() noexcept nogil
    void leave_environment "pyx_xent_leave"(Environment before, void* result) noexcept nogil

cdef enum:
    LANES = 16                    # columns or rows that a kernel works on together: one AVX-512 register of floats
    FEW_CLASSES = 64              # up to here LANES rows, transposed in a scratch, are faster than a row at a time
    SEGMENT = 8192                # classes of a row that are added up before they go to its total; threads may share segments
    ROWS = 64                     # rows that are worked on together, at most
    BLOCK = 32768                 # and their elements: what is read twice stays in cache

cdef enum Storage:
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16

cdef enum Operation:
    CROSS_ENTROPY
    NLL
    SOFTMAX
    LOG_SOFTMAX
    SOFTMAX_BACKWARD
    LOG_SOFTMAX_BACKWARD

cdef struct ClassArray:
    void* data                    # NULL: absent
    Storage storage               # of one number there
    Py_ssize_t outer              # strides, in elements
    Py_ssize_t classes
    Py_ssize_t inner

cdef struct Problem:
    Operation operation
    bint is_double                # computed in double, else in float
    int num_threads
    bint shared                   # the threads share each row, else each takes rows of its own
    bint stream                   # store the gradient past the caches
    bint keep                     # keep the exponentials of the sum for the gradient
    Py_ssize_t outer
    Py_ssize_t classes
    Py_ssize_t inner
    ClassArray logits             # in   NLL: log-probabilities; backward operations: the forward's output
    ClassArray soft               # in   class probabilities; backward operations: grad_output
    ClassArray grad               # out  softmax, log_softmax: the output
    const int64_t* target         # in   (positions,)  -1: ignored, otherwise in [0, classes); NULL with soft targets
    const void* weight            # in   (classes,)  of the logits' dtype; NULL: 1
    const double* sample_weight   # in   (positions,)  NULL: 1
    const double* grad_output     # in   (positions,)  NULL: 1
    double grad_scale             # of the whole gradient: the scalar grad_output over the mean's divisor
    double label_smoothing
    double z_loss
    double* loss                  # out  (positions,)  NULL: not wanted
    double* row_max               # state for a later backward: out, or in if have_state; NULL: not wanted
    double* row_total            # out or in  see Block.total and give_state in _kernels/blocks.pxi
    bint have_state
    void* scratch                 # (num_threads, 3, scratch_size) of float or double, as computed: for logits, soft, grad;
                                  # NULL: small, run() has one
    Py_ssize_t scratch_size
    bint across                   # rows lie side by side, or there are few classes
    Py_ssize_t rows_together      # at most so many rows at once; across the lanes whole tiles
    double* parts                 # (segments, 2) if shared
