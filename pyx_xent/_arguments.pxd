from pyx_xent._problem cimport Problem

cdef class Call:
    cdef Problem problem
    # The arrays that the problem points into:
    cdef object read_logits       # logits, or a copy that a kernel can read
    cdef object read_soft         # class probabilities, or a copy; None with class indices
    cdef object target            # (rows,) int64, ignored ones are -1; None with class probabilities
    cdef object weight
    cdef object sample_weight     # (rows,) float64
    cdef object grad_output       # (rows,) float64
    cdef object state             # (2, rows) float64
    cdef object scratch
    cdef object areas
    cdef object loss_array        # (rows,) float64
    cdef object computed          # where the kernels write softmax or a gradient: `output`, or a temporary of another layout
    # What comes of them:
    cdef object output            # the array the caller gets
    cdef object loss_out
    cdef object loss_dtype
    cdef object logits            # as the caller gave it: a gradient is laid out like it
    cdef int threads_asked        # the caller's num_threads; 0: as many as are worth it
    cdef int axis
    cdef Py_ssize_t rows
    cdef Py_ssize_t classes
    cdef int reduction
    cdef double divisor           # of the mean
    cdef bint nothing_to_average
    cdef double empty_value
