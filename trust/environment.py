"""The floating-point environment of a thread, which C libraries share: glibc's fenv_t on x86-64."""

import ctypes
import ctypes.util
import platform
from contextlib import contextmanager

AVAILABLE = platform.machine() in ("x86_64", "AMD64") and platform.libc_ver()[0] == "glibc"
DEFAULT = 0x1F80  # of the MXCSR register: to nearest, subnormal numbers, no traps
FLUSH = 0x8040  # subnormal results and operands are 0
ROUNDING = {"nearest": 0, "downward": 0x2000, "upward": 0x4000, "toward zero": 0x6000}
MODES = {
    **{f"rounding {name}": mode for name, mode in ROUNDING.items() if mode},
    "flushing to zero": FLUSH,
    "flushing to zero and rounding upward": FLUSH | ROUNDING["upward"],
}


class Environment:
    """The MXCSR register of this thread."""

    def __init__(self):
        self.libm = ctypes.CDLL(ctypes.util.find_library("m"))

    def get(self):
        fenv = (ctypes.c_uint32 * 8)()
        self.libm.fegetenv(fenv)
        return fenv[7]

    def set(self, mxcsr):
        fenv = (ctypes.c_uint32 * 8)()
        self.libm.fegetenv(fenv)
        fenv[7] = mxcsr
        self.libm.fesetenv(fenv)

    @contextmanager
    def under(self, mode):
        """Calls in this environment; AssertionError if they leave another. What has happened (flags) is not part of it."""
        self.set(DEFAULT | mode)
        try:
            yield
            after = self.get()
        finally:
            self.set(DEFAULT)
        assert after & 0xFFC0 == DEFAULT | mode, hex(after)
