"""The kernels of baseline in float. Only pyx_xent._dispatch imports this, after it has looked at the processor."""

include "float.pxi"
include "kernels.pxi"
