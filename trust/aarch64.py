"""The package on aarch64: cross-compiled by gcc, and tested under qemu-user. Emulation says nothing about speed.

A folder of its own holds the emulated Python: Debian 12's packages for arm64 and wheels from PyPI, about 450 MB. This machine
needs qemu-user and gcc-aarch64-linux-gnu, and nothing is installed on it. One can also have a part of the check:

    python -m trust.aarch64 FOLDER [build] [code] [bits] [tests] [test_values test_bits ...]
"""

import concurrent.futures
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pyx_xent import _dispatch

from . import build, compare, disassembly

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
TOOLS = {EMULATOR: "qemu-user", COMPILER: "gcc-aarch64-linux-gnu"}  # program: Debian's package
PROCESSOR = "neoverse-n1"  # for qemu's own choice, OpenBLAS takes kernels whose emulation is 30 times slower
TREE = Path("build/trust/aarch64")
PYTHON = "python3.11"
DEBIAN = [
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libpython3.11-dev", "libc6", "libgcc-s1",
    "libstdc++6", "libgomp1", "zlib1g", "libexpat1", "libssl3", "libcrypt1", "libbz2-1.0", "liblzma5", "libffi8", "libuuid1",
    "libsqlite3-0",
]  # fmt: skip
WHEELS = [
    "numpy>=2", "cython>=3.1", "setuptools>=77", "ml_dtypes>=0.5", "pytest>=8", "hypothesis>=6.100", "threadpoolctl>=3.5",
    "python-flint>=0.7", "pytest-benchmark>=5",
]  # fmt: skip
# Each name promises the oldest glibc that a wheel runs with; Debian 12 has 2.36. pip does not derive the older names itself.
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (34, 28, 27, 26, 24, 17)] + ["manylinux2014_aarch64"]
APT = """\
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Dir::State "STATE";
Dir::State::status "STATE/status";
Dir::Cache "CACHE";
"""
TESTS = ["accuracy", "bits", "linear", "values", "environment", "half", "losses", "edges", "arguments"]  # the longest first
NOT_EMULATED = {  # test: why it cannot pass under qemu-user
    "tests/test_environment.py::test_without_memory_for_the_gradient_all_stays_usable": "qemu ignores RLIMIT_AS",
}
SAME_BITS_AS = ("avx2", "avx512")  # those with FMA
THREADS = """
import numpy as np, pyx_xent as px
logits, target = np.random.default_rng(1).random((1000, 1000), np.float32), np.arange(1000)
one, two = (px.cross_entropy_with_grad(logits, target, num_threads=threads)[1].tobytes() for threads in (1, 2))
assert one == two
print(px.show_config()["openmp_library"], px.isa)
"""


def progress(text):
    print(f"aarch64: {text}", file=sys.stderr, flush=True)


def not_possible(folder):
    """Why nothing can be emulated; None if it can."""
    if not folder:
        return "no folder for the emulated Python is given (--aarch64 FOLDER)"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "this machine is not Linux on x86-64"
    for program, package in TOOLS.items():
        if not shutil.which(program):
            return f"{program} is not installed (Debian: apt install {package})"
    if not Path(folder, "ready").exists() and not shutil.which("apt-get"):
        return "there is no apt-get to fetch Debian's packages with"
    return None


def run(command, **options):
    """Its output; SystemExit if it fails."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    if result.returncode:
        told = (result.stdout + result.stderr)[-3000:]
        raise SystemExit(f"{' '.join(map(str, command))[:200]} ended with {result.returncode}:\n{told}")
    return result.stdout


class Emulated:
    """The Python for aarch64 in `folder`: made if the folder is empty or new, used again otherwise."""

    def __init__(self, folder):
        self.folder = Path(folder).absolute()
        self.root, self.site, self.python = self.folder / "root", self.folder / "site", self.folder / "bin/python"
        if not (self.folder / "ready").exists():
            self.make()
        self.place()

    def make(self):
        begun = self.folder / "begun"
        if not begun.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise SystemExit(f"{self.folder} is neither empty nor has an emulated Python in it")
        self.folder.mkdir(parents=True, exist_ok=True)
        begun.touch()
        self.fetch_debian()
        self.fetch_wheels()
        begun.rename(self.folder / "ready")

    def fetch_debian(self):
        """Through a package database of our own, in which nothing is installed: this needs neither root nor
        `dpkg --add-architecture`."""
        progress("fetches Debian's packages for arm64")
        state, cache, packages = self.folder / "apt/state", self.folder / "apt/cache", self.folder / "apt/packages"
        for new in state / "lists/partial", cache / "archives/partial", packages, self.root:
            new.mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        settings = self.folder / "apt/apt.conf"
        settings.write_text(APT.replace("STATE", str(state)).replace("CACHE", str(cache)))
        environment = {**os.environ, "APT_CONFIG": str(settings)}
        run(["apt-get", "-qq", "update"], env=environment)
        run(["apt-get", "-qq", "download", *DEBIAN], env=environment, cwd=packages)
        for package in packages.glob("*.deb"):
            run(["dpkg", "-x", package, self.root])

    def fetch_wheels(self):
        progress("fetches wheels")
        names = [word for name in PLATFORMS for word in ("--platform", name)]
        run([
            sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", self.site, "--only-binary=:all:",
            "--implementation", "cp", "--python-version", PYTHON.removeprefix("python"), *names, *WHEELS,
        ])  # fmt: skip

    def place(self):
        """Files that name the folder, which may have been moved.

        A program that the emulated Python starts runs natively, such as the compiler. So sys.executable, which tests start,
        has to be a script for this machine.
        """
        self.python.parent.mkdir(exist_ok=True)
        emulator = f'{EMULATOR} -cpu {PROCESSOR} -L "{self.root}"'
        self.python.write_text(f'#!/bin/sh\nexec {emulator} "{self.root}/usr/bin/{PYTHON}" "$@"\n')
        self.python.chmod(0o755)
        (self.site / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = {str(self.python)!r}\n")

    def environment(self, **more):
        """Without what is meant for the Python of this machine."""
        unwanted = ("PYTHONHOME", "CFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED", "CC", "PYX_XENT_ISA", "OPENBLAS_CORETYPE")
        kept = {name: value for name, value in os.environ.items() if name not in unwanted}
        return {**kept, "PYTHONPATH": str(self.site), "PYTHONNOUSERSITE": "1", **more}

    def run(self, *arguments, tree=TREE, **more):
        return run([self.python, *arguments], cwd=tree, env=self.environment(**more))


def compiled(emulated, tree):
    """Build the sources in `tree`, a new folder."""
    progress("builds")
    build.copy(tree)
    # Cython runs on this machine, because it is slow under emulation; its C files are newer than their sources, so cythonize()
    # leaves them alone there.
    as_aarch64 = "import platform, runpy; platform.machine = lambda: 'aarch64'; runpy.run_path('setup.py', run_name='__main__')"
    run([sys.executable, "-c", as_aarch64, "--quiet", "egg_info"], cwd=tree)
    # The compiler is that of Debian's sysconfig. Its headers go in by CC, because CFLAGS would replace -O2 and -DNDEBUG.
    headers = f"-I{emulated.root}/usr/include/{PYTHON} -I{emulated.root}/usr/include"
    emulated.run("setup.py", "--quiet", "build_ext", "--inplace", f"-j{os.cpu_count()}", tree=tree, CC=f"{COMPILER} {headers}")
    isa, supported = emulated.run(
        "-c", "import pyx_xent as p; c = p.show_config(); print(p.isa, *c['isa_supported'])", tree=tree
    ).split()
    if (isa, supported) != ("neon", "neon"):
        raise SystemExit(f"aarch64 has chosen {isa} of {supported}")
    versions = emulated.run(
        "-c", "import platform, numpy; print(platform.python_version(), numpy.__version__)", tree=tree
    ).split()
    compiler = run([COMPILER, "-dumpfullversion"]).strip()
    return "emulated {}: Python {}, NumPy {}, gcc {}".format(PROCESSOR, *versions, compiler), f"chose the {isa} kernels"


def threads(emulated, tree):
    library = emulated.run("-c", THREADS, tree=tree).split()[0]
    return f"emulated aarch64: two threads of {os.path.basename(library)}", "the same bits as one"


def bits(emulated, tree, seed):
    """Digests and whole arrays, beside those of each native instruction set with FMA."""
    isas = [isa for isa in SAME_BITS_AS if isa in _dispatch.supported]
    if not isas:
        raise SystemExit("this processor has no AVX2, so there are no bits to compare those of aarch64 with")
    progress("computes bits to compare")
    found = compare.results(tree / "neon.pickle", seed, emulated.python, tree, emulated.environment())
    for isa in isas:
        native = compare.results(tree / f"{isa}.pickle", seed, environment={**os.environ, "PYX_XENT_ISA": isa})
        yield f"emulated aarch64: results beside those of {isa}", compare.check(f"neon beside {isa}", found, native)


def code(tree):
    """The kernels' machine code."""
    (file,) = (tree / "pyx_xent/_kernels").glob("neon_float.*aarch64*.so")
    found = disassembly.check(file, disassembly.AARCH64)
    total = sum(found.values(), disassembly.Loop())
    yield (
        f"machine code of neon_float for aarch64: innermost loops of {len(found)} functions",
        f"{total.vector} instructions of vectors, none of single numbers, {total.spills} that keep one on the stack",
    )


def tested(emulated, tree, name):
    """(last line of pytest, the lines that tell failures)"""
    start = time.monotonic()
    left_out = [f"--deselect={one}" for one in NOT_EMULATED]
    result = subprocess.run(
        [emulated.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *left_out, f"tests/test_{name}.py"],
        cwd=tree, env=emulated.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    (tree / f"test_{name}.log").write_text(result.stdout + result.stderr, encoding="utf-8")
    last = (result.stdout.strip().splitlines() or [result.stderr.strip()])[-1].strip("= ")
    progress(f"test_{name}: {last}, {time.monotonic() - start:.0f} s in all")
    failures = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return last, failures or ([f"test_{name}: {last}"] if result.returncode else [])


def tests_of(names, emulated, tree, jobs):
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(names, pool.map(lambda name: tested(emulated, tree, name), names), strict=True))
    if failures := [line for _, of_file in found.values() for line in of_file]:
        raise SystemExit("\n".join(["tests that fail on aarch64:", *failures]))
    return [(f"emulated aarch64: tests/test_{name}.py", last) for name, (last, _) in found.items()]


def check(folder, seed, jobs):
    """[(what was done, what was found), ...]"""
    if reason := not_possible(folder):
        progress(f"skipped: {reason}")
        return [("emulated aarch64", f"not tried: {reason}")]
    emulated = Emulated(folder)
    lines = [compiled(emulated, TREE), *code(TREE), threads(emulated, TREE), *bits(emulated, TREE, seed)]
    return lines + tests_of(TESTS, emulated, TREE, jobs)


def main(folder, *parts):
    """Parts of the check, one after the other; all of them if none is named."""
    if reason := not_possible(folder):
        raise SystemExit(f"not possible: {reason}")
    emulated = Emulated(folder)
    for part in parts or ("build", "code", "bits", "tests"):
        if part == "build":
            lines = [compiled(emulated, TREE), threads(emulated, TREE)]
        elif part == "code":
            lines = code(TREE)
        elif part == "bits":
            lines = bits(emulated, TREE, 0)
        else:
            names = TESTS if part == "tests" else [part.removeprefix("test_")]
            lines = tests_of(names, emulated, TREE, os.cpu_count())
        for what, found in lines:
            print(f"{what}: {found}")


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
