"""Builds one extension per instruction set from one kernel source; everything static is in pyproject.toml.

PYX_XENT_OPENMP=0 builds without OpenMP. A compiler that cannot link OpenMP is noticed and does the same.
"""

import os
import platform
import shlex
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# v3 is AVX2 + FMA, v4 is AVX-512 F/BW/CD/DQ/VL; _cpu.h checks for the same sets before a module is imported.
ISA_FLAGS = {
    "baseline": {"unix": [], "msvc": []},
    "avx2": {"unix": ["-march=x86-64-v3"], "msvc": ["/arch:AVX2"]},
    "avx512": {"unix": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "msvc": ["/arch:AVX512"]},
}
# The loops over lanes stay functions of their own: inlined into their callers, gcc 12 takes their arrays apart into scalars.
# clang does not know two of these flags, says so, and goes on.
KEEP_CALLS = ["-fno-inline-functions", "-fno-inline-small-functions", "-fno-inline-functions-called-once"]
# Not -ffast-math: NaN and infinity are inputs, and the order of additions is part of the result.
KERNEL_FLAGS = {
    "unix": ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", *KEEP_CALLS],
    "msvc": ["/O2", "/fp:precise"],
}
OPENMP_FLAGS = {"unix": (["-fopenmp"], ["-fopenmp"]), "msvc": (["/openmp"], [])}
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "freethreading_compatible": True,
}

on_x86_64 = platform.machine().lower() in ("x86_64", "amd64")
isas = list(ISA_FLAGS) if on_x86_64 else ["baseline"]
included = [str(path) for pattern in ("*.pxd", "*.h", "_kernels/*.pxi") for path in sorted(Path("pyx_xent").glob(pattern))]


class BuildKernels(build_ext):
    """Adds the flags of the compiler at hand to each extension."""

    def build_extensions(self):
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        compile_openmp, link_openmp = OPENMP_FLAGS[kind] if self.has_openmp(kind) else ([], [])
        for extension in self.extensions:
            extension.extra_compile_args += compile_openmp
            extension.extra_link_args += link_openmp
            if "._kernels." in extension.name:
                extension.extra_compile_args += KERNEL_FLAGS[kind] + ISA_FLAGS[extension.name.rpartition(".")[2]][kind]
        super().build_extensions()

    def has_openmp(self, kind):
        if os.environ.get("PYX_XENT_OPENMP", "1") == "0":
            return False
        compile_flags, link_flags = OPENMP_FLAGS[kind]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.c")
            source.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=compile_flags + shlex.split(os.environ.get("CFLAGS", ""))
                )
                self.compiler.link_executable(
                    objects, str(Path(folder, "openmp")), extra_postargs=link_flags + shlex.split(os.environ.get("LDFLAGS", ""))
                )
            except (CompileError, LinkError):
                print("pyx_xent: this compiler has no OpenMP; building for one thread")
                return False
        return True


def extension(name):
    return Extension(
        name,
        [name.replace(".", "/") + ".pyx"],
        include_dirs=[numpy.get_include(), "pyx_xent"],
        define_macros=[(name, "NPY_2_0_API_VERSION") for name in ("NPY_NO_DEPRECATED_API", "NPY_TARGET_VERSION")],
        depends=included,
    )


setup(
    ext_modules=cythonize(
        [extension(f"pyx_xent.{name}") for name in ("_arguments", "_memory", "_runtime", *(f"_kernels.{isa}" for isa in isas))],
        compiler_directives=DIRECTIVES,
    ),
    cmdclass={"build_ext": BuildKernels},
)
