"""The instruction sets that kernels are compiled for, and the modules of each.

setup.py runs this file before the package is built, so it imports nothing from it. An instruction set added here needs its
kernel modules, its flags in setup.py and, on x86-64, its level in _cpu.h.
"""

import platform

# Slowest first. On x86-64 the index is the level of _runtime.x86_level(); elsewhere every processor has all of them.
OF_MACHINE = {
    "x86_64": ("baseline", "avx2", "avx512"),
    "aarch64": ("neon",),
}
OTHER_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}  # of Windows and macOS


def of_machine():
    """The instruction sets of this kind of processor, slowest first; `baseline` alone where none is known."""
    machine = platform.machine().lower()
    return OF_MACHINE.get(OTHER_NAMES.get(machine, machine), ("baseline",))


def modules(isa):
    """The kernel modules of one instruction set, by precision."""
    return {precision: f"pyx_xent._kernels.{isa}_{precision}" for precision in ("float", "double")}


def of_module(name):
    """The instruction set that a kernel module is compiled for."""
    return name.rpartition(".")[2].partition("_")[0]
