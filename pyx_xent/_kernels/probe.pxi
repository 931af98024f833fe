# What is asked of exp.pxi alone: by trust/ and the tests, of every number there is.


def exponentials(const floating[::1] x, floating[::1] out):
    """out (n,) = exp(x (n,)) for numbers from -87 to 88 (double: -708 to 709), as the kernels compute it. Nothing is checked."""
    cdef floating low = <floating>lowest[floating](0, 0, 0), round_by = <floating>rounder[floating](0, 0, 0)
    cdef Py_ssize_t i
    for i in range(x.shape[0]):
        out[i] = exp_shifted[floating](x[i], low, round_by)
