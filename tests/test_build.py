"""Instruction sets, threads, OpenMP, fork, and what the package says of itself."""

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from conftest import same_bits

import pyx_xent as px
import trust.build
from pyx_xent import _dispatch, _isas, _runtime, _threads
from trust import disassembly

PACKAGE = Path(px.__file__).parent
COMPILER = os.environ.get("CC", sysconfig.get_config_var("CC") or "cc")


def file_of(module):
    """The shared library of pyx_xent.{module}."""
    files = [PACKAGE / f"{module.removeprefix('pyx_xent.').replace('.', '/')}{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next(f for f in files if f.exists())


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def test_best_supported_isa_is_the_active_one():
    assert _dispatch.compiled == _isas.of_machine()
    result = python("import pyx_xent; print(pyx_xent.isa)", PYX_XENT_ISA="")
    assert result.stdout.strip() == _dispatch.supported[-1]


def test_x86_level_is_what_numpy_found():
    features = pytest.importorskip("numpy._core._multiarray_umath").__cpu_features__
    assert (_runtime.x86_level() >= 1) == (features.get("AVX2", False) and features.get("FMA3", False))
    assert (_runtime.x86_level() >= 2) == features.get("AVX512_SKX", features.get("X86_V4", False))


@pytest.mark.parametrize("isa", _dispatch.supported)
def test_environment_chooses_the_isa(isa):
    result = python("import pyx_xent; print(pyx_xent.isa, pyx_xent.cross_entropy([[0.0, 0.0]], [1]))", PYX_XENT_ISA=isa)
    assert result.stdout.split() == [isa, str(np.log(2))]


def test_an_isa_that_is_not_there_is_an_import_error_that_names_what_is():
    result = python("import pyx_xent", PYX_XENT_ISA="avx1024")
    have = ", ".join(_dispatch.supported)
    assert f"ImportError: PYX_XENT_ISA=avx1024 is not available here; this processor and build have: {have}\n" in result.stderr


def test_only_the_chosen_kernels_are_imported():
    code = "import pyx_xent, sys; print(sorted(m for m in sys.modules if m.startswith('pyx_xent._kernels.')))"
    isa = _dispatch.supported[0]
    assert python(code, PYX_XENT_ISA=isa).stdout.strip() == str(sorted(_isas.modules(isa).values()))


@pytest.mark.parametrize(
    ("machine", "isas"),
    [
        ("x86_64", ["baseline", "avx2", "avx512"]),
        ("AMD64", ["baseline", "avx2", "avx512"]),
        ("aarch64", ["neon"]),
        ("arm64", ["neon"]),
        ("riscv64", ["baseline"]),
    ],
)
def test_each_kind_of_processor_has_its_instruction_sets(monkeypatch, machine, isas):
    monkeypatch.setattr(_isas.platform, "machine", lambda: machine)
    assert list(_isas.of_machine()) == isas
    assert {_isas.of_module(module) for isa in isas for module in _isas.modules(isa).values()} == set(isas)


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
@pytest.mark.skipif("avx2" not in _dispatch.compiled, reason="not x86-64")
def test_baseline_modules_hold_no_avx():
    def registers(module):
        code = subprocess.run(["objdump", "-d", str(file_of(module))], capture_output=True, text=True, check=True).stdout
        return {r for r in ("ymm", "zmm") if f"%{r}" in code}

    def of_kernels(isa):
        return [registers(module) for module in _isas.modules(isa).values()]

    assert not any([*map(registers, ("_call", "_memory", "_runtime")), *of_kernels("baseline")])
    assert all(found == {"ymm"} for found in of_kernels("avx2"))
    assert all("zmm" in found for found in of_kernels("avx512"))


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
@pytest.mark.skipif("clang" in COMPILER, reason="clang has these loops in other functions")
@pytest.mark.parametrize("isa", [isa for isa in _dispatch.compiled if isa in ("avx2", "avx512")])
def test_loops_of_the_kernels_are_vectors(isa):
    for module in _isas.modules(isa).values():
        found = disassembly.check(file_of(module), disassembly.X86_64)
        assert sum(loop.vector for loop in found.values()) > 10


def test_show_config_and_python_m_say_the_same():
    code = """if True:
        import json, runpy, pyx_xent
        print(json.dumps(pyx_xent.show_config()))
        runpy.run_module("pyx_xent", run_name="__main__")"""
    config, _, printed = python(code).stdout.partition("\n")
    for name, value in json.loads(config).items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        assert re.search(rf"^{name} +{re.escape(text)}$", printed, re.MULTILINE), name
    assert px.show_config().keys() == json.loads(config).keys()
    assert px.show_config()["version"] == px.__version__


@pytest.mark.skipif(sys.platform != "linux", reason="only there a name may be any bytes, and /proc lists mapped files")
@pytest.mark.parametrize("name", [b"donn\xe9es.bin", "données.bin".encode(), b"a\romp", b"lib gomp"])
def test_show_config_does_not_stumble_over_the_name_of_a_mapped_file(tmp_path, name):
    before = px.show_config()["openmp_library"]
    with open(os.path.join(os.fsencode(tmp_path), name), "w+b") as file:
        file.write(bytes(4096))
        file.flush()
        with mmap.mmap(file.fileno(), 4096):
            assert px.show_config()["openmp_library"] == before


@pytest.mark.skipif("avx512" not in _dispatch.supported, reason="the processor has no AVX-512")
def test_show_config_notices_an_openblas_that_takes_the_processor_for_an_older_one():
    pytest.importorskip("threadpoolctl")
    code = "import pyx_xent; config = pyx_xent.show_config(); print(config['blas'], config['blas_note'])"
    if "openblas" not in python(code).stdout:
        pytest.skip("NumPy has another BLAS")
    found = python(code, OPENBLAS_CORETYPE="Haswell").stdout
    assert "taken this processor for a Haswell" in found
    assert "unset OPENBLAS_CORETYPE=Haswell" in found
    assert "taken this" not in python(code, OPENBLAS_CORETYPE="SkylakeX").stdout


# What a program on NumPy has not imported already, and what takes longer to import than this package.
HEAVY = ("importlib.metadata", "email", "zipfile", "inspect", "ctypes", "threadpoolctl", "torch", "multiprocessing", "json")


def test_import_loads_no_heavy_standard_module():
    code = f"""if True:
        import sys, numpy
        before = set(sys.modules)
        import pyx_xent
        print([name for name in {HEAVY} if name in sys.modules and name not in before])"""
    assert python(code).stdout.strip() == "[]"


def test_a_copy_without_its_metadata_can_be_imported(tmp_path):
    """Vendored, frozen, or a build tree on PYTHONPATH: nothing but the package's folder and NumPy."""
    shutil.copytree(PACKAGE, tmp_path / "pyx_xent")
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for name in ("numpy", "numpy.libs"):
        if (site := Path(np.__file__).parents[1] / name).exists():
            (dependencies / name).symlink_to(site)
    code = "import sys; sys.path[:0] = sys.argv[1:]; import pyx_xent; print(pyx_xent.__version__)"
    command = [sys.executable, "-S", "-E", "-c", code, str(tmp_path), str(dependencies)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.strip() == px.__version__, result.stderr


def test_the_version_of_the_metadata_is_that_of_the_package():
    assert version("pyx_xent") == px.__version__


def test_public_names():
    for name in px.__all__:
        assert getattr(px, name) is not None


needs_affinity = pytest.mark.skipif(
    not _runtime.OPENMP or not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs OpenMP, and an affinity of two CPUs",
)
AVAILABLE = """if True:
    import json, os, threading, numpy as np, pyx_xent as px
    from pyx_xent import _threads
    _threads._cgroup_cpus = lambda: None
    def ask():
        print(json.dumps(_threads.available()))
    def work():
        px.cross_entropy(np.zeros((1000, 1000), np.float32), np.zeros(1000, int))
    def other(code):
        thread = threading.Thread(target=code)
        thread.start()
        thread.join()
"""


def bound(code, variables):
    """What AVAILABLE's ask() prints in a new process under these variables of OpenMP, and under no other."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    result = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **variables}, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


PERIOD = {"cpu,cpuacct/a/cpu.cfs_period_us": "100000"}  # of version 1


class TestThreads:
    @pytest.mark.parametrize(
        ("lines", "files", "cpus"),
        [
            ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 2),
            ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, 1),
            ("3:cpuset:/x\n1:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000", **PERIOD}, 3),
            ("1:cpu,cpuacct:/a\n0::/\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", **PERIOD}, None),
            ("1:cpu,cpuacct:/elsewhere\n", {}, None),
            ("0::/a\n", {"a/cpu.max": "nonsense"}, None),
        ],
    )
    def test_cgroup_quotas_of_both_versions(self, tmp_path, lines, files, cpus):
        groups, mounted = tmp_path / "cgroup", tmp_path / "mounted"
        groups.write_text(lines)
        for name, text in files.items():
            (mounted / name).parent.mkdir(parents=True, exist_ok=True)
            (mounted / name).write_text(text + "\n")
        assert _threads._cgroup_cpus(groups, mounted) == cpus
        assert _threads._cgroup_cpus(tmp_path / "none", mounted) is None

    def test_limits_are_kept(self, monkeypatch):
        monkeypatch.setattr(_threads._runtime, "openmp_max_threads", lambda: 64)
        monkeypatch.setattr(_threads, "_cgroup_cpus", lambda: 3)
        monkeypatch.setattr(_threads.os, "sched_getaffinity", lambda pid: range(5), raising=False)
        if _runtime.OPENMP:
            assert _threads.available() == (3, "cgroup CPU quota")
            assert _threads.limited(None, 1e9) == 3
            assert _threads.limited(2, 1e9) == 2
            assert _threads.limited(2**20, 1e9) == 3
        assert _threads.limited(8, 100) == 1

    def test_set_num_threads(self):
        try:
            px.set_num_threads(1)
            assert px.get_num_threads() == 1
        finally:
            px.set_num_threads(None)
        for bad, error in ((0, ValueError), (-3, ValueError), (1.5, TypeError), ("2", TypeError)):
            with pytest.raises(error, match="num_threads must be"):
                px.set_num_threads(bad)

    def test_omp_num_threads_and_affinity(self):
        code = "import pyx_xent; print(pyx_xent.get_num_threads())"
        assert python(code, OMP_NUM_THREADS="1").stdout.strip() == "1"
        if hasattr(os, "sched_setaffinity"):
            one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + code
            assert python(one).stdout.strip() == "1"

    BINDINGS = (
        {"OMP_PROC_BIND": "true"}, {"OMP_PROC_BIND": "spread", "OMP_PLACES": "threads"}, {"OMP_PLACES": "cores"},
        {"GOMP_CPU_AFFINITY": "0-4095"}, {"KMP_AFFINITY": "granularity=fine,compact"}, {"OMP_PROC_BIND": "false"},
    )  # fmt: skip

    @needs_affinity
    @pytest.mark.parametrize("variables", BINDINGS, ids=str)
    def test_binding_threads_leaves_all_cpus_to_us(self, variables):
        """Before the first parallel region, after it, and in other threads of Python, which inherit the first one's place."""
        asked = "ask(); work(); ask(); other(lambda: (ask(), work(), ask()))"
        for first in ("", "import ctypes, sys; sys.platform == 'linux' and ctypes.CDLL('libgomp.so.1')\n"):
            found = bound(first + AVAILABLE + asked, variables)
            assert {cpus for cpus, _ in found} == {len(os.sched_getaffinity(0))}
            assert {reason for _, reason in found} <= {_threads.OF_PROCESS, _threads.OF_START}

    @needs_affinity
    def test_binding_threads_when_torch_is_there_first_leaves_all_cpus_to_us(self):
        pytest.importorskip("torch")
        found = bound(f"import torch\n{AVAILABLE}ask(); work(); ask()", {"OMP_PROC_BIND": "true"})
        assert found == 2 * [[len(os.sched_getaffinity(0)), _threads.OF_START]]

    @needs_affinity
    def test_places_on_some_cpus_are_a_limit(self):
        one, two = sorted(os.sched_getaffinity(0))[:2]
        everywhere = bound(AVAILABLE + "work(); ask()", {"OMP_PLACES": f"{{{one},{two}}}"})
        assert everywhere == [[2, _threads.OF_START if len(os.sched_getaffinity(0)) == 2 else _threads.OF_PLACES]]
        for variables in ({"OMP_PLACES": f"{{{two}}}"}, {"GOMP_CPU_AFFINITY": str(two)}):
            assert bound(AVAILABLE + "ask(); work(); ask()", variables) == 2 * [[1, _threads.OF_PLACES]]
        found = bound(AVAILABLE + "ask(); work(); ask()", {"OMP_PROC_BIND": "master", "OMP_PLACES": "threads"})
        assert found == 2 * [[1, _threads.OF_ONE_PLACE]]

    @needs_affinity
    @pytest.mark.parametrize("variables", [{}, {"OMP_PROC_BIND": "true"}, {"OMP_PLACES": "threads"}], ids=str)
    def test_an_affinity_set_by_the_program_is_a_limit_with_bound_threads_too(self, variables):
        before = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        assert {cpus for cpus, _ in bound(before + AVAILABLE + "ask(); work(); ask()", variables)} == {1}
        last = max(os.sched_getaffinity(0))
        after = f"os.sched_setaffinity(0, [{last}]); ask(); work(); ask(); assert os.sched_getaffinity(0) == {{{last}}}"
        assert bound(f"{AVAILABLE}work(); {after}", variables) == 2 * [[1, _threads.OF_PROCESS]]
        assert bound(f"{AVAILABLE}def code(): {after}\nother(code)", variables) == 2 * [[1, _threads.OF_PROCESS]]

    def test_threadpoolctl(self):
        threadpoolctl = pytest.importorskip("threadpoolctl")
        with threadpoolctl.threadpool_limits(1, user_api="openmp"):
            assert px.get_num_threads() == 1

    def test_small_stacks_are_enough(self):
        code = """if True:
            import numpy as np, pyx_xent as px
            x = np.zeros((1000, 1000)); t = np.zeros(1000, int)
            px.cross_entropy_with_grad(x, t, label_smoothing=.1); px.cross_entropy_with_grad(x[:, :10], x[:, :10] + .1)
            print(px.get_num_threads())"""
        assert python(code, OMP_STACKSIZE="64K").returncode == 0

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_forked_children_compute(self):
        code = """if True:
            import os, signal, numpy as np, pyx_xent as px
            x = np.random.default_rng(0).normal(size=(500, 1000)); t = np.zeros(500, int)
            expected = px.cross_entropy(x, t)
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    signal.alarm(10)
                    os._exit(px.cross_entropy(x, t) != expected or px.get_num_threads() != 1)
                assert os.waitpid(child, 0)[1] == 0
            assert px.cross_entropy(x, t) == expected"""
        result = python(code)
        assert result.returncode == 0, result.stderr


def source_tree(folder, isa):
    """The sources with kernels of one instruction set, and the C of earlier builds, which saves Cython's time."""
    source = Path(__file__).parents[1]
    if not (source / "setup.py").exists():
        pytest.skip("not run from the source tree")
    pytest.importorskip("Cython")

    def unwanted(_, names):
        return [n for n in names if n.startswith(".") or n in ("build", "tests", "docs") or n.endswith((".so", ".egg-info"))]

    shutil.copytree(source, folder, ignore=unwanted)
    trust.build.only(folder, isa)
    return folder


def build_ext(folder, **variables):
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


unix = pytest.mark.skipif(os.name != "posix", reason="flags of gcc and clang")
FAST = "-O2 -ffast-math -funsafe-math-optimizations -fassociative-math -fno-signed-zeros -freciprocal-math -Ofast"
EVERY_KIND_OF_VALUE = """if True:
    import sys
    sys.path.insert(0, sys.argv[1])
    import numpy as np, pyx_xent as px
    tiny = np.finfo(np.float32).smallest_subnormal
    assert str(px.__file__).startswith(sys.argv[1]) and tiny * np.float32(1) > 0, "subnormals are flushed"
    rng, results = np.random.default_rng(0), []
    for dtype in (np.float32, np.float64):
        for classes in (3, 10, 37, 1000):
            logits = (4 * rng.normal(size=(64, classes))).astype(dtype)
            target = rng.integers(0, classes, 64)
            logits[3, 1], logits[7, 2], logits[9, 0], logits[11] = np.nan, np.inf, -np.inf, -np.inf
            logits[13] = -1e30  # all equal, and far from zero
            logits[13, target[13]] = 0  # a confident row: its loss is smaller than an ulp of 1
            logits[17] = np.where(np.arange(classes) == target[17], 30, 0)
            logits[19, 1:] -= 700 if dtype is np.float64 else 90  # subnormal probabilities
            logits[23] = -0.0
            target[5] = -100
            for options in ({}, {"label_smoothing": 0.1}, {"weight": rng.random(classes)}):
                results += px.cross_entropy_with_grad(logits, target, reduction="none", **options)
            probabilities = rng.dirichlet(np.ones(classes), 64).astype(dtype)
            results += px.cross_entropy_with_grad(logits, probabilities, reduction="sum")
            results += [px.softmax(logits), px.log_softmax(logits), px.softmax_backward(logits, px.softmax(logits))]
            results += [px.cross_entropy(logits[:2], [-100, -100])]
    for smoothing in (np.nan, np.inf):
        try:
            px.cross_entropy(logits, target, label_smoothing=smoothing)
        except ValueError:
            continue
        raise AssertionError(smoothing)
    np.savez(sys.argv[2], *results)"""


def built(folder, isa, **variables):
    """A copy of the sources, built with kernels of one instruction set."""
    tree = source_tree(folder, isa)
    result = build_ext(tree, **variables)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.count(variables["CFLAGS"]) > 5
    return str(tree)


@pytest.fixture(scope="module")
def plain_build(tmp_path_factory):
    """As of a compiler without OpenMP and without vector types, so that vectors.h is plain C."""
    folder = tmp_path_factory.mktemp("plain") / "tree"
    return built(folder, _dispatch.supported[0], PYX_XENT_OPENMP="0", CFLAGS="-DPYX_XENT_PLAIN_C=1")


def assert_bits_are_ours(other, isa, folder):
    """Of results with every kind of value, from the build in `other`."""
    found = []
    for tree in (PACKAGE.parent, other):
        file = folder / f"{len(found)}.npz"
        run = subprocess.run(
            [sys.executable, "-c", EVERY_KIND_OF_VALUE, str(tree), str(file)],
            env={**os.environ, "PYX_XENT_ISA": isa}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        found.append(np.load(file))
    ours, theirs = found
    assert len(ours.files) == len(theirs.files) > 80
    for name in ours.files:
        assert same_bits(ours[name], theirs[name]), name


@unix
def test_plain_c_has_the_bits_of_vectors(plain_build, tmp_path):
    assert_bits_are_ours(plain_build, _dispatch.supported[0], tmp_path)


@unix
def test_fast_math_in_cc_cflags_and_ldflags_changes_no_bit(tmp_path):
    isa = _dispatch.supported[-1]
    flags = {"CC": f"{COMPILER} -ffast-math", "CFLAGS": FAST, "LDFLAGS": "-ffast-math -Ofast"}
    assert_bits_are_ours(built(tmp_path / "tree", isa, **flags), isa, tmp_path)


@unix
def test_build_without_openmp(plain_build, tmp_path, rng):
    """PYX_XENT_OPENMP=0: the same bits on one thread, and show_config says so."""
    logits, target = rng.normal(size=(400, 1000)).astype(np.float32), rng.integers(0, 1000, 400)
    np.savez(tmp_path / "in.npz", logits=logits, target=target)
    code = """if True:
        import sys; sys.path.insert(0, sys.argv[1])
        import numpy as np, pyx_xent as px
        config = px.show_config()
        assert str(px.__file__).startswith(sys.argv[1])
        assert config["openmp"] == 0 and config["num_threads"] == 1 and config["openmp_library"] is None, config
        assert config["num_threads_reason"] == "built without OpenMP"
        given = np.load("in.npz")
        loss, grad = px.cross_entropy_with_grad(given["logits"], given["target"], num_threads=4)
        np.savez("out.npz", loss=loss, grad=grad)"""
    run = subprocess.run([sys.executable, "-c", code, plain_build], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = np.load(tmp_path / "out.npz")
    with _dispatch.use(_dispatch.supported[0]):
        loss, grad = px.cross_entropy_with_grad(logits, target)
    assert same_bits(result["loss"], loss)
    assert same_bits(result["grad"], grad)


@unix
@pytest.mark.parametrize(
    ("variables", "appended", "culprit"),
    [
        ({"CFLAGS": "-fsingle-precision-constant"}, "", "-fsingle-precision-constant"),
        ({}, "-ffast-math", "-ffast-math"),
        ({}, "-Ofast", "crtfastmath.o"),
        ({}, "-ffinite-math-only", "-ffinite-math-only"),
    ],
    ids=str,
)
def test_what_flags_of_ours_cannot_undo_is_refused_by_name(tmp_path, variables, appended, culprit):
    """As a wrapper of the compiler does that adds its flags after all others."""
    tree = source_tree(tmp_path / "tree", "baseline")
    for module in tree.glob("pyx_xent/**/*.pyx"):
        module.with_suffix(".c").unlink(missing_ok=True)
        module.write_text("")
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" {appended}\n')
    wrapper.chmod(0o755)
    result = build_ext(tree, CC=str(wrapper), **variables)
    assert result.returncode != 0
    assert f"error: pyx_xent would compute something else with {culprit}" in result.stderr
    assert not list(tree.glob("**/*.o"))
