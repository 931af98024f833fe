"""The kernels of baseline in double. Only pyx_xent._dispatch imports this, after it has looked at the processor."""

include "double.pxi"
include "kernels.pxi"
