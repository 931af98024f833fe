"""Chooses the kernels: looks at the processor first, imports afterwards.

A module compiled for AVX2 may use AVX2 as soon as it is loaded, so an unsupported one is never imported. A supported one
that fails to import is an error of the installation and is not hidden.
"""

import importlib
import importlib.util
import os
from contextlib import contextmanager

from . import _isas, _runtime

ISAS = _isas.of_machine()


def _modules(isa):
    return [f"{__package__}._kernels.{module}" for module in _isas.modules(isa)]


compiled = tuple(isa for isa in ISAS if all(map(importlib.util.find_spec, _modules(isa))))
supported = tuple(isa for isa in compiled if ISAS.index(isa) <= _runtime.x86_level())


def load(isa):
    """The kernel module for `isa`; ImportError if this processor or this build does not have it."""
    if isa not in supported:
        raise ImportError(f"PYX_XENT_ISA={isa} is not available here; this processor and build have: {', '.join(supported)}")
    (module,) = _modules(isa)
    return importlib.import_module(module)


active = os.environ.get("PYX_XENT_ISA") or supported[-1]
kernels = load(active)


@contextmanager
def use(isa):
    """Compute with `isa` inside a with block. For tests and benchmarks: it changes the whole process."""
    global active, kernels
    before = active, kernels
    active, kernels = isa, load(isa)
    try:
        yield
    finally:
        active, kernels = before
