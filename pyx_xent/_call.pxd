cimport cython

from pyx_xent._problem cimport Problem

@cython.final
cdef class Call:
    cdef Problem problem
    # The caller's arguments as arrays of NumPy's own class, so that no code of the caller's runs when they are used:
    cdef object logits            # a gradient is laid out like it
    cdef object target
    cdef object weight            # None with the arrays below: absent
    cdef object sample_weight
    cdef object grad_output
    cdef object out
    cdef object grad_out
    cdef object hess_out
    cdef object loss_result       # `out`, `grad_out` and `hess_out` as the caller gave them, of whatever class
    cdef object gradient_result
    cdef object hessian_result
    cdef object num_threads       # an int, or None
    # The arrays that the problem points into:
    cdef object read_logits       # logits, or a copy that a kernel can read
    cdef object read_soft         # class probabilities, or a copy; None with class indices
    cdef object of_rows           # int64: the labels, -1 where a row is inert, then as many doubles for a reduced loss
    cdef object losses            # (rows,) float64, of a loss that is not reduced; None: they are in of_rows
    cdef object class_weight      # (classes,) a copy in the dtype that is computed in
    cdef object row_weight        # (rows,) float64: sample_weight
    cdef object row_grad_output   # (rows,) float64
    cdef object state             # (2, rows) float64
    cdef object scratch
    cdef object areas
    cdef object computed          # where the kernels write softmax or a gradient: the output, or a temporary of another layout
    cdef object computed_hessian  # likewise; None: not wanted
    # What was found out about them:
    cdef int axis
    cdef Py_ssize_t rows
    cdef Py_ssize_t classes
    cdef int reduction
    cdef object loss_dtype
    cdef double divisor           # of the mean
    cdef double empty_value       # in place of the mean, if
    cdef bint nothing_to_average
    cdef bint shifted             # target is the caller's from the second position of the last axis on
