"""How near every answer must be to the float64 reference's before it is timed."""

import numpy as np

from .cases import FORWARD

# Relative error of the loss and of each entry of the gradient. Wide enough for every peer: PyTorch rounds logarithms of
# probabilities to the half formats, and sums over 32,000 classes in float32 cost others three digits. tests/ asks more of ours.
LOSS = {"float32": 1e-4, "float64": 1e-10, "float16": 3e-3, "bfloat16": 2e-2}
ENTRY = {"float32": 1e-3, "float64": 1e-9, "float16": 3e-2, "bfloat16": 2e-1}
# float16 has no numbers below 6e-8
SMALLEST = {"float32": 1e-12, "float64": 1e-20, "float16": 1.2e-7, "bfloat16": 1e-12}
# Of the largest entry there can be, 1 / divisor: most peers take exp(x - lse) - 1 at the target, which cancels in confident
# rows.
CANCELLED = {"float32": 2.4e-7, "float64": 4.5e-16, "float16": 2e-3, "bfloat16": 1.6e-2}


def assert_right(problem, operation, answer):
    """answer: (mean loss, gradient[problem.sample] or None)."""
    dtype = problem.case.dtype
    loss, gradient = answer
    expected, expected_gradient = problem.expected
    np.testing.assert_allclose(np.float64(loss), expected, rtol=LOSS[dtype])
    if operation == FORWARD:
        assert gradient is None
        return
    gradient = np.asarray(gradient, np.float64)
    smallest = max(SMALLEST[dtype], CANCELLED[dtype] / problem.divisor)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=ENTRY[dtype], atol=smallest)
