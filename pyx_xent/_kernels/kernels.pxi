# All of the kernels, from what a vector is to what threads do.

from pyx_xent._problem cimport (
    BFLOAT16,
    CROSS_ENTROPY,
    FEW_CLASSES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LOG_SOFTMAX,
    LOG_SOFTMAX_BACKWARD,
    NLL,
    ROWS_BYTES,
    SEGMENT,
    SEGMENT_BYTES,
    SHORT_CLASSES,
    SOFTMAX,
    SOFTMAX_BACKWARD,
    Environment,
    Operation,
    Problem,
    Storage,
    Strided,
    enter_environment,
    leave_environment,
)

include "vectors.pxi"
include "exp.pxi"
include "steps.pxi"
include "loss.pxi"
include "copy.pxi"
include "tile.pxi"
include "row.pxi"
include "batch.pxi"
