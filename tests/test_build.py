"""Instruction sets, threads, OpenMP, fork, and what the package says of itself."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
from conftest import same_bits

import pyx_xent as px
from pyx_xent import _dispatch, _runtime, _threads

PACKAGE = Path(px.__file__).parent


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def test_best_supported_isa_is_the_active_one():
    assert _dispatch.compiled[0] == "baseline"
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
    assert "ImportError: PYX_XENT_ISA=avx1024 is not available here; this processor and build have: baseline" in result.stderr


def test_only_the_chosen_kernels_are_imported():
    code = "import pyx_xent, sys; print([m for m in sys.modules if m.startswith('pyx_xent._kernels.')])"
    assert python(code, PYX_XENT_ISA="baseline").stdout.strip() == "['pyx_xent._kernels.baseline']"


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
@pytest.mark.skipif("avx2" not in _dispatch.compiled, reason="not x86-64")
def test_baseline_modules_hold_no_avx():
    def registers(name):
        files = [PACKAGE / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES]
        file = next(f for f in files if f.exists())
        code = subprocess.run(["objdump", "-d", str(file)], capture_output=True, text=True, check=True).stdout
        return {r for r in ("ymm", "zmm") if f"%{r}" in code}

    for name in ("_arguments", "_memory", "_runtime", "_kernels/baseline"):
        assert registers(name) == set(), name
    assert "ymm" in registers("_kernels/avx2")
    assert "zmm" not in registers("_kernels/avx2")
    assert "zmm" in registers("_kernels/avx512")


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


@pytest.mark.skipif("avx512" not in _dispatch.supported, reason="the processor has no AVX-512")
def test_show_config_notices_an_openblas_that_takes_the_processor_for_an_older_one():
    pytest.importorskip("threadpoolctl")
    code = "import pyx_xent; config = pyx_xent.show_config(); print(config['blas'], config['blas_note'])"
    if "openblas" not in python(code).stdout:
        pytest.skip("NumPy has another BLAS")
    found = python(code, OPENBLAS_CORETYPE="Haswell").stdout
    assert "OPENBLAS_CORETYPE=SkylakeX" in found
    assert "Haswell" in found
    assert "try OPENBLAS" not in python(code, OPENBLAS_CORETYPE="SkylakeX").stdout


def test_public_names():
    for name in px.__all__:
        assert getattr(px, name) is not None


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
        monkeypatch.setattr(_threads, "_CGROUP_CPUS", 3)
        monkeypatch.setattr(_threads.os, "sched_getaffinity", lambda pid: range(5), raising=False)
        if _runtime.OPENMP:
            assert _threads.available() == (3, "cgroup CPU quota")
            assert _threads.for_work(None, 10**9) == 3
            assert _threads.for_work(2, 10**9) == 2
            assert _threads.for_work(2**31, 10**9) == 3
        assert _threads.for_work(8, 100) == 1

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


def test_build_without_openmp(tmp_path, rng):
    """PYX_XENT_OPENMP=0: the same bits on one thread, and show_config says so."""
    source = Path(__file__).parents[1]
    if not (source / "setup.py").exists():
        pytest.skip("not run from the source tree")
    tree = tmp_path / "tree"
    shutil.copytree(
        source,
        tree,
        ignore=lambda folder, names: [
            n for n in names if n.startswith(".") or n in ("build", "tests") or n.endswith((".so", ".c"))
        ],
    )
    build = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(tree)],
        env={**os.environ, "PYX_XENT_OPENMP": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    logits, target = rng.normal(size=(400, 1000)).astype(np.float32), rng.integers(0, 1000, 400)
    np.savez(tmp_path / "in.npz", logits=logits, target=target)
    code = """if True:
        import sys; sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else "site")
        import numpy as np, pyx_xent as px
        config = px.show_config()
        assert config["openmp"] == 0 and config["num_threads"] == 1 and config["openmp_library"] is None, config
        assert config["num_threads_reason"] == "built without OpenMP"
        given = np.load("in.npz")
        loss, grad = px.cross_entropy_with_grad(given["logits"], given["target"], num_threads=4)
        np.savez("out.npz", loss=loss, grad=grad)"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = np.load(tmp_path / "out.npz")
    loss, grad = px.cross_entropy_with_grad(logits, target)
    assert same_bits(result["loss"], loss)
    assert same_bits(result["grad"], grad)
