"""What this build and this machine offer, for reports of problems and figures."""

import os
import platform
import sys

import numpy as np

from . import _dispatch, _runtime, _threads
from ._version import __version__


def _openmp_library():
    """The files of the OpenMP runtimes in this process, as far as the system tells: ours, and those of torch and the like."""
    if not _runtime.OPENMP:
        return None
    try:
        # As bytes: any mapped file is listed, and the name of a file need be text in no encoding.
        with open("/proc/self/maps", "rb") as maps:
            fields = [line.split(maxsplit=5) for line in maps]
    except OSError:
        return "unknown"
    paths = {columns[5].rstrip() for columns in fields if len(columns) == 6}
    found = {path for path in paths if path.rpartition(b"/")[2].startswith((b"libgomp", b"libomp", b"libiomp"))}
    return ", ".join(sorted(path.decode("utf-8", "backslashreplace") for path in found)) or "unknown"


WITH_AVX512 = ("SkylakeX", "Cooperlake", "SapphireRapids")  # OpenBLAS's names of its kernels


def _blas():
    """(each BLAS in this process, what is amiss with them): threadpoolctl tells, where it is installed."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return ["unknown: threadpoolctl is not installed"], ""
    found, note = [], ""
    for library in threadpool_info():
        if library["user_api"] != "blas":
            continue
        architecture = library.get("architecture", "")
        parts = library["internal_api"], library["version"], architecture, f"{library['num_threads']} threads"
        found.append(" ".join(str(part) for part in parts if part))
        if library["internal_api"] == "openblas" and "avx512" in _dispatch.supported and architecture not in WITH_AVX512:
            chosen = os.environ.get("OPENBLAS_CORETYPE")
            note = (
                f"OpenBLAS {library['version']} has taken this processor for a {architecture}, without its AVX-512, "
                "which makes linear_cross_entropy slow: "
                + (f"unset OPENBLAS_CORETYPE={chosen}" if chosen else "a later NumPy may have an OpenBLAS that knows it")
            )
    return found, note


def _matmul():
    torch = sys.modules.get("pyx_xent.torch._matmul")
    return "arrays by numpy" + (f"; tensors: {torch.description()}" if torch else "; pyx_xent.torch is not imported")


def show_config():
    """Version, instruction sets, OpenMP, threads, BLAS: what ``python -m pyx_xent`` prints, as a dict.

    Returns
    -------
    dict
        Keys: version, isa_compiled, isa_supported, isa_active, openmp (date of the specification, 0 if absent),
        openmp_library (every OpenMP runtime in the process), num_threads, num_threads_reason, blas (those in the process, with
        the processor that OpenBLAS has found), blas_note (what may make `linear_cross_entropy` slow), matmul (who
        multiplies for it), numpy, python, machine.

    Examples
    --------
    >>> import pyx_xent
    >>> pyx_xent.show_config()["isa_active"] == pyx_xent.isa
    True
    """
    threads, reason = _threads.available()
    blas, blas_note = _blas()
    return {
        "version": __version__,
        "isa_compiled": list(_dispatch.compiled),
        "isa_supported": list(_dispatch.supported),
        "isa_active": _dispatch.active,
        "openmp": _runtime.OPENMP,
        "openmp_library": _openmp_library(),
        "num_threads": threads,
        "num_threads_reason": reason,
        "blas": blas,
        "blas_note": blas_note,
        "matmul": _matmul(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
