# Numbers are double.

ctypedef double real

cdef extern from *:
    """
    #define PYX_XENT_DOUBLE 1
    """

cdef enum:
    IS_DOUBLE = 1
    LANES = 8                     # reals of a vec
