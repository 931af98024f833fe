"""The floating-point environment of a thread, which C libraries share: glibc's fenv_t on x86-64 and aarch64."""

import ctypes
import ctypes.util
import platform
from contextlib import contextmanager

AVAILABLE = platform.machine() in ("x86_64", "AMD64", "aarch64") and platform.libc_ver()[0] == "glibc"
if platform.machine() == "aarch64":
    WORDS, CONTROL = 2, 0  # fenv_t is FPCR, FPSR
    DEFAULT = 0  # to nearest, subnormal numbers, no traps
    KEPT = 0xFFFF_FFFF  # FPCR holds no flags
    ROUNDING = {"nearest": 0, "upward": 0x40_0000, "downward": 0x80_0000, "toward zero": 0xC0_0000}
    FLUSH = 0x100_0000  # FZ: subnormal results and operands are 0
    OTHER_MODES = {"NaN without sign and payload": 0x200_0000}  # DN
    TRAPS = 0x0F  # fenv.h: invalid, division by zero, overflow, underflow
else:
    WORDS, CONTROL = 8, 7  # the last word of fenv_t is MXCSR
    DEFAULT = 0x1F80  # to nearest, subnormal numbers, no traps
    KEPT = 0xFFC0  # the other bits are flags
    ROUNDING = {"nearest": 0, "downward": 0x2000, "upward": 0x4000, "toward zero": 0x6000}
    FLUSH = 0x8040  # FTZ and DAZ: subnormal results and operands are 0
    OTHER_MODES = {}
    TRAPS = 0x1D
MODES = {
    **{f"rounding {name}": mode for name, mode in ROUNDING.items() if mode},
    "flushing to zero": FLUSH,
    "flushing to zero and rounding upward": FLUSH | ROUNDING["upward"],
    **OTHER_MODES,
}


class Environment:
    """The control register of this thread: MXCSR, or FPCR."""

    def __init__(self):
        self.libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")

    def fenv(self):
        fenv = (ctypes.c_uint32 * WORDS)()
        self.libm.fegetenv(fenv)
        return fenv

    def get(self):
        """Without what has happened (flags)."""
        return self.fenv()[CONTROL] & KEPT

    def set(self, control):
        fenv = self.fenv()
        fenv[CONTROL] = control
        self.libm.fesetenv(fenv)

    @contextmanager
    def under(self, mode):
        """Calls in this environment; AssertionError if they leave another."""
        self.set(DEFAULT | mode)
        try:
            yield
            after = self.get()
        finally:
            self.set(DEFAULT)
        assert after == DEFAULT | mode, hex(after)
