"""Chooses the kernels: looks at the processor first, imports afterwards.

A module compiled for AVX2 may use AVX2 as soon as it is loaded, so an unsupported one is never imported. A supported one
that fails to import is an error of the installation and is not hidden.
"""

import importlib
import importlib.util
import os
from contextlib import contextmanager

from . import _call, _isas, _runtime

ISAS = _isas.of_machine()

compiled = tuple(isa for isa in ISAS if all(map(importlib.util.find_spec, _isas.modules(isa).values())))
supported = tuple(isa for isa in compiled if ISAS.index(isa) <= _runtime.x86_level())


def load(isa):
    """The kernel modules of `isa` by precision, "float" and "double"; ImportError if this processor or build lacks them."""
    if isa not in supported:
        raise ImportError(f"PYX_XENT_ISA={isa} is not available here; this processor and build have: {', '.join(supported)}")
    return {precision: importlib.import_module(module) for precision, module in _isas.modules(isa).items()}


def exponentials(isa, x, out):
    """out (n,) = exp(x (n,)) by the kernels of `isa`, for trust/ and the tests."""
    load(isa)["float" if x.dtype.itemsize == 4 else "double"].exponentials_alone(x, out)


def activate(isa):
    """Compute with `isa` from now on, in the whole process."""
    global active
    kernels = load(isa)
    _call.use_kernels(kernels["float"].run, kernels["double"].run, isa)
    active = isa


activate(os.environ.get("PYX_XENT_ISA") or supported[-1])


@contextmanager
def use(isa):
    """Compute with `isa` inside a with block. For tests and benchmarks."""
    before = active
    activate(isa)
    try:
        yield
    finally:
        activate(before)
