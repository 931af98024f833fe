from pyx_xent._problem cimport Problem


cdef class Call:
    cdef Problem problem
    # Every array that the problem points into is kept here.
    cdef object read_logits       # the arrays behind problem.logits and problem.soft
    cdef object read_soft
    cdef tuple memory             # weight, sample_weight, state
    cdef object grad_output       # (positions,) float64
    cdef object scratch
    cdef object parts
    cdef object output             # softmax, gradients: the array the caller gets
    cdef object computed          # where the kernels write it, if elsewhere (layout or dtype)
    cdef object loss_array        # (positions,) float64
    cdef object loss_out
    cdef object loss_dtype
    cdef tuple loss_shape         # of reduction "none"
    cdef int reduction
    cdef double divisor           # of the mean
    cdef bint nothing_to_average
    cdef double empty_value
    cdef object logits            # as the caller gave it, for a later gradient
    cdef object target            # (positions,) int64, ignored ones are -1; None with soft targets
    cdef int axis
