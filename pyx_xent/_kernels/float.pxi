# Numbers are float.

ctypedef float real

cdef extern from *:
    """
    #define PYX_XENT_DOUBLE 0
    """

cdef enum:
    IS_DOUBLE = 0
    LANES = 16                    # reals of a vec
