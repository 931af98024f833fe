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
    FEW_CLASSES = 64              # up to here LANES rows at once, one in each lane, are faster than a row at a time
    SHORT_CLASSES = 512           # up to here some rows go through each step together
    SEGMENT = 2048                # classes that are in the nearest cache between maximum, exponentials and their sum
    FLOAT_LANES = 16              # of a vec, 64 bytes
    DOUBLE_LANES = 8
    ROWS_BYTES = 2048             # at least what the kernels' structs Rows and Segment take
    SEGMENT_BYTES = 64

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

cdef struct Strided:
    void* data                    # NULL: absent
    Storage storage               # of one number there
    Py_ssize_t outer              # strides, in elements
    Py_ssize_t classes
    Py_ssize_t inner

cdef struct Options:
    double label_smoothing
    double z_loss
    double focal_gamma            # 0: not focal
    double hessian_scale          # of the whole Hessian
    const void* weight            # in   (classes,)  float or double, as computed; NULL: 1
    double weight_sum             # of all classes; without weight their number
    const double* sample_weight   # in   (positions,)  NULL: 1. A row of weight 0 is not looked at
    const double* grad_output     # in   (positions,)  NULL: 1
    double grad_scale             # of the whole gradient: the scalar grad_output over the mean's divisor

cdef struct Plan:                 # how to compute, see _plan.pxi
    int num_threads
    bint shared                   # the threads share each row, else each takes rows of its own
    bint stream                   # non-temporal stores for `out`
    bint keep                     # the exponentials of the sum are cached for the gradient
    bint defer                    # a row's gradient is written while the next row is summed
    Py_ssize_t tile_classes       # classes of a tile, with the zeros beyond them; 0: rows
    Py_ssize_t rows               # that are worked on together: whole tiles, or LANES rows, or 1
    Py_ssize_t part               # rows that a thread takes at a time
    Py_ssize_t between_signals    # rows until Ctrl-C is heard; whole parts
    bint quick                    # the GIL is kept
    void* scratch                 # (num_threads, scratch_size) bytes, then segments; 64-byte aligned; see Scratch in batch.pxi
    Py_ssize_t scratch_size
    void* areas                   # (num_threads, areas_size) bytes, if shared (1, areas_size), likewise
    Py_ssize_t areas_size
    Py_ssize_t area[5]            # numbers of each of them,
    Py_ssize_t staged             # positions of which planes are copied side by side; 0: none,
    Py_ssize_t segments           # segments of `rows` rows,
    Py_ssize_t discarded          # numbers of exponentials that are not cached,
    Py_ssize_t weights            # numbers of class weights that are repeated for all lanes

cdef struct Problem:
    Operation operation
    bint is_double                # computed in double, else in float
    Py_ssize_t outer
    Py_ssize_t classes
    Py_ssize_t inner
    Strided logits                # in   NLL: log-probabilities; backward operations: the forward's output
    Strided other                 # in   class probabilities; backward operations: grad_output
    Strided out                   # out  the gradient; softmax, log_softmax: the output
    Strided hessian               # out  its diagonal, where the gradient is wanted, too
    const int64_t* target         # in   (positions,)  -1: ignored, otherwise in [0, classes); NULL with class probabilities
    Options options
    double* loss                  # out  (positions,)  NULL: not wanted
    double* row_max               # state for a later backward: out, or in if have_state; NULL: not wanted
    double* row_total             # the sum of the exponentials without the target's, see loss.pxi
    bint have_state
    Plan plan
