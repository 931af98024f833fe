"""The kernels of avx2 in float. Only pyx_xent._dispatch imports this, after it has looked at the processor."""

include "float.pxi"
include "kernels.pxi"
