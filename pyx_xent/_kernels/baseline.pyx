"""The kernels for baseline. Only pyx_xent._dispatch imports this, after it has looked at the processor."""

include "exp.pxi"
include "lanes.pxi"
include "storage.pxi"
include "work.pxi"
include "blocks.pxi"
include "operations.pxi"
include "batch.pxi"
