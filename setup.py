"""Builds one extension per instruction set from one kernel source; everything static is in pyproject.toml.

PYX_XENT_OPENMP=0 builds without OpenMP. A compiler that cannot link OpenMP is noticed and does the same.
"""

import os
import runpy
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

_isas = runpy.run_path("pyx_xent/_isas.py")  # its package cannot be imported before it is built
isas = _isas["of_machine"]()
# v3 is AVX2 + FMA, v4 is AVX-512 F/BW/CD/DQ/VL; _cpu.h checks for the same sets before a module is imported.
ISA_FLAGS = {
    "baseline": {"unix": [], "msvc": []},
    "neon": {"unix": [], "msvc": []},  # every aarch64 has it, with FMA
    "avx2": {"unix": ["-march=x86-64-v3"], "msvc": ["/arch:AVX2"]},
    "avx512": {"unix": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "msvc": ["/arch:AVX512"]},
}
# Not -ffast-math: NaN and infinity are inputs, and the order of additions is part of the result. CC, CFLAGS and LDFLAGS may
# bring it, or parts of it, so every module is compiled and linked with these, which come last; gcc and clang know them all.
# Only another -O undoes -Ofast. In linking, -ffast-math adds crtfastmath.o, which flushes subnormals in the whole process.
STRICT_FLAGS = {
    "unix": [
        "-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-finite-math-only", "-fno-associative-math",
        "-fno-reciprocal-math", "-fsigned-zeros", "-ffp-contract=off",
    ],
    "msvc": ["/O2", "/fp:precise"],
}  # fmt: skip
KERNEL_FLAGS = {"unix": ["-fno-math-errno", "-fno-trapping-math"], "msvc": []}
# Refused by name: a flag that no other undoes (in both compilers), and what the compiler's wrapper adds after all of ours.
REFUSED_FLAGS = ("-fsingle-precision-constant", "-fdenormal-fp-math")
REFUSED_MACROS = {
    "__FAST_MATH__ 1": "-ffast-math",
    "__FINITE_MATH_ONLY__ 1": "-ffinite-math-only",
    "__NO_SIGNED_ZEROS__ 1": "-fno-signed-zeros",
    "__ASSOCIATIVE_MATH__ 1": "-fassociative-math",
    "__RECIPROCAL_MATH__ 1": "-freciprocal-math",
}
if "avx2" in isas:  # x86-64; elsewhere wider intermediate results may be all there is
    REFUSED_MACROS |= {"__FLT_EVAL_METHOD__ 2": "-mfpmath=387", "__FLT_EVAL_METHOD__ -1": "-mfpmath=both"}
OPENMP_FLAGS = {"unix": (["-fopenmp"], ["-fopenmp"]), "msvc": (["/openmp"], [])}
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "freethreading_compatible": True,
}

kernels = [module.removeprefix("pyx_xent.") for isa in isas for module in _isas["modules"](isa).values()]


def included(name):
    """What a module of this name may include, so that it is built again when one of these changes."""
    patterns = ("*.pxd", "*.h", "_kernels/*.pxi", "_kernels/*.h") if "._kernels." in name else ("*.pxd", "*.h", "*.pxi")
    return [str(path) for pattern in patterns for path in sorted(Path("pyx_xent").glob(pattern))]


class BuildKernels(build_ext):
    """Adds the flags of the compiler at hand to each extension."""

    def build_extensions(self):
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        if kind == "unix":
            self.refuse_other_arithmetic()
        compile_openmp, link_openmp = OPENMP_FLAGS[kind] if self.has_openmp(kind) else ([], [])
        for extension in self.extensions:
            extension.extra_compile_args += compile_openmp + STRICT_FLAGS[kind]
            extension.extra_link_args += link_openmp + (STRICT_FLAGS[kind] if kind == "unix" else [])
            if "._kernels." in extension.name:
                extension.extra_compile_args += KERNEL_FLAGS[kind] + ISA_FLAGS[_isas["of_module"](extension.name)][kind]
        self.parallel = self.parallel or os.cpu_count()  # a kernel module takes ten seconds
        super().build_extensions()

    def refuse_other_arithmetic(self):
        """CompileError that names the flag, where the compiler would not compute by IEEE 754 in spite of STRICT_FLAGS."""
        strict, compiler, linker = STRICT_FLAGS["unix"], self.compiler.compiler_so, self.compiler.linker_so
        with tempfile.TemporaryDirectory() as folder:
            source, target = str(Path(folder, "empty.c")), str(Path(folder, "empty"))
            Path(source).touch()
            options = {"capture_output": True, "text": True, "check": False}
            macros = subprocess.run([*compiler, source, *strict, "-dM", "-E"], **options)
            commands = subprocess.run([*linker, source, "-o", target, *strict, "-###"], **options)
        defined = {line.removeprefix("#define ") for line in macros.stdout.splitlines()}
        refused = [flag for flag in [*compiler, *linker] if flag.startswith(REFUSED_FLAGS)]
        refused += [flag for macro, flag in REFUSED_MACROS.items() if macro in defined]
        if "crtfastmath" in commands.stderr:
            refused.append("crtfastmath.o (-ffast-math or -mdaz-ftz when linking)")
        if refused:
            raise CompileError(
                f"pyx_xent would compute something else with {', '.join(dict.fromkeys(refused))}: "
                "take it out of CC, CFLAGS, LDFLAGS or the compiler's wrapper"
            )

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
        include_dirs=[numpy.get_include(), "pyx_xent", "pyx_xent/_kernels"],
        define_macros=[(macro, "NPY_2_0_API_VERSION") for macro in ("NPY_NO_DEPRECATED_API", "NPY_TARGET_VERSION")],
        depends=included(name),
    )


setup(
    ext_modules=cythonize(
        [extension(f"pyx_xent.{name}") for name in ("_call", "_memory", "_runtime", *kernels)],
        compiler_directives=DIRECTIVES,
    ),
    cmdclass={"build_ext": BuildKernels},
)
