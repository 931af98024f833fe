"""The clock of whatever is not timed by pytest-benchmark: warming up, limits, scaling."""

import time


def times(function, budget, least=3, most=1000):
    """Seconds of one call after the other: at least `least`, then until they come to `budget` or are `most`."""
    found = []
    while len(found) < least or (sum(found) < budget and len(found) < most):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return found
