"""A matrix product that is added to what is there, by the BLAS that NumPy multiplies by: np.matmul cannot add.

Its function is looked for behind NumPy's own module, under the names that NumPy is built with. Where it is not found, the
caller makes the product in parts and adds them.
"""

import functools

import numpy as np

# Of cblas_sgemm and cblas_dgemm: before, after, and whether sizes have 64 bits. The first are NumPy's wheels'.
NAMES = (("scipy_", "64_", True), ("scipy_", "", False), ("", "64_", True), ("", "", False))
ROWS, AS_IT_IS, TRANSPOSED = 101, 111, 112  # CblasRowMajor, CblasNoTrans, CblasTrans


@functools.cache  # ctypes takes some milliseconds to import
def _function(dtype):
    """cblas_sgemm or cblas_dgemm; None if it is not found."""
    try:
        import ctypes

        library = ctypes.CDLL(np._core._multiarray_umath.__file__)  # what it is linked with is found, too
    except (ImportError, AttributeError, OSError):
        return None
    letter, number = ("d", ctypes.c_double) if dtype == np.float64 else ("s", ctypes.c_float)
    for before, after, wide in NAMES:
        function = getattr(library, f"{before}cblas_{letter}gemm{after}", None)
        if function is not None:
            size, matrix = ctypes.c_int64 if wide else ctypes.c_int32, ctypes.c_void_p
            function.restype = None
            function.argtypes = [ctypes.c_int] * 3 + [size] * 3 + [number, matrix, size, matrix, size, number, matrix, size]
            return function
    return None


def add_product(left, right, total, first):
    """total (C, H) += left.T @ right, of left (n, C) and right (n, H); = for the first. -> was it done?

    It is if all three are C-contiguous, left perhaps some columns of such an array, and of one dtype, float32 or float64, and
    the BLAS has such a function.
    """
    arrays = left, right, total
    (rows, classes), width = left.shape, right.shape[1]
    if len(right) != rows or total.shape != (classes, width) or not all(0 < size < 2**31 for size in (rows, classes, width)):
        return False
    if total.dtype not in (np.float32, np.float64) or any(array.dtype != total.dtype for array in arrays):
        return False
    if not total.flags.writeable or not all(array.flags.aligned for array in arrays):
        return False
    step, rest = divmod(left.strides[0], left.itemsize)  # from row to row
    if rest or not classes <= step < 2**31 or not all(array.flags.c_contiguous for array in (left[0], right, total)):
        return False
    function = _function(total.dtype)
    if function is None:
        return False
    function(
        ROWS, TRANSPOSED, AS_IT_IS, classes, width, rows, 1.0, left.ctypes.data, step, right.ctypes.data, width,
        0.0 if first else 1.0, total.ctypes.data, width,
    )  # fmt: skip
    return True
