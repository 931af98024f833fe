"""The benchmarks: peers' answers on a tiny problem of each kind, what is told of absent ones, a report from saved times."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pytest_benchmark")

from benchmarks import cases, linear, memory, peers, report, results, roofline, targets, test_cross_entropy
from pyx_xent import reference

ROOT = Path(__file__).parents[1]
TINY = {2: (6, 23), 4: (2, 5, 3, 4)}
SLOW = ("torch", "JAX", "Numba")  # seconds to load or to compile; test_benchmarks_run and `make bench` have them
PROBLEMS = {(len(case.shape), case.dtype, case.option): case for case in cases.CASES}.values()


def tiny(case):
    return replace(case, shape=TINY[len(case.shape)])


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_each_installed_peer_answers_as_the_reference(case):
    if case.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    problem = cases.Problem(tiny(case))
    for operation in (cases.FORWARD, cases.GRADIENT):
        for name, peer in peers.PEERS.items():
            if peer.fits(case, operation) and not peer.missing and not name.startswith(SLOW):
                result = peer.make(problem, operation, 1)()
                test_cross_entropy.assert_right(problem, operation, peer.answer(problem, result))


@pytest.mark.parametrize("part", [0, 1], ids=["loss", "gradient"])
def test_a_wrong_answer_is_not_timed(part):
    problem = cases.Problem(tiny(cases.CASES[0]))
    answer = list(peers.PEERS[peers.OURS].answer(problem, peers.PEERS[peers.OURS].make(problem, cases.GRADIENT, 1)()))
    answer[part] = answer[part] * 1.01
    with pytest.raises(AssertionError):
        test_cross_entropy.assert_right(problem, cases.GRADIENT, answer)


def test_names_of_cases_differ():
    assert len({str(case) for case in cases.CASES}) == len(cases.CASES)


def test_expected_loss_is_that_of_all_rows_when_gradients_are_sampled(monkeypatch):
    case = replace(cases.CASES[0], shape=(50, 7))
    whole = cases.Problem(case).expected
    monkeypatch.setattr(cases, "BLOCK", 21)  # three rows at a time
    monkeypatch.setattr(cases, "SAMPLE", 70)
    problem = cases.Problem(case)
    problem.logits = np.random.default_rng(5).normal(size=case.shape)
    loss, gradient = problem.expected
    assert gradient.shape == (10, 7)
    assert whole[1].shape == (50, 7)
    expected = reference.cross_entropy_with_grad(problem.logits, problem.target)
    assert loss == pytest.approx(expected[0])
    np.testing.assert_allclose(gradient, expected[1][problem.sample], atol=1e-15)


def test_bytes_needed():
    case = cases.Case((4, 10), "")
    assert case.bytes_needed(cases.FORWARD) == 160
    assert case.bytes_needed(cases.GRADIENT) == 320
    assert replace(case, option="soft").bytes_needed(cases.GRADIENT) == 480
    assert replace(case, option="ignored50", dtype="float64").bytes_needed(cases.GRADIENT) == 480


def test_absent_peers_are_reported(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "absent", replace(peers.PEERS["Numba"], modules=("no_such_module",)))
    assert peers.cannot_run("absent", cases.CASES[0], 1, 1) == "no_such_module is not installed"
    assert peers.cannot_run(peers.OURS, cases.CASES[0], 1, 1) is None


def test_jax_is_left_out_where_its_threads_cannot_be_limited():
    if peers.PEERS["JAX, optax"].missing is None:
        assert "cannot be limited to 1 of 2" in peers.cannot_run("JAX, optax", cases.CASES[0], 1, 2)


class TestRoofline:
    def test_without_a_compiler_the_reason_is_told(self, monkeypatch):
        monkeypatch.setenv("CC", "no-such-compiler")
        roofline._compiled.cache_clear()
        try:
            assert "no-such-compiler" in roofline.why_not()
        finally:
            roofline._compiled.cache_clear()

    @pytest.fixture
    def compiler(self, monkeypatch):
        monkeypatch.delenv("CC", raising=False)
        if shutil.which("cc") is None:
            pytest.skip("no cc")
        assert roofline.why_not() is None

    @pytest.mark.usefixtures("compiler")
    @pytest.mark.parametrize("threads", [1, 2, 3])
    @pytest.mark.parametrize("live", [1.0, 0.5])
    def test_memory_loops_move_all_bytes(self, threads, live):
        size = 256 * 4 * 3 * 2 * 5
        array = roofline.aligned(size, fill=7)
        _, _, out = roofline.memory_limit(roofline.WRITE_ELSEWHERE, size, threads, live, array=array)()
        assert (out == 7).sum() == live * size
        assert (out == 0).sum() == (1 - live) * size
        roofline.memory_limit(roofline.WRITE_IN_PLACE, size, threads, live, array=array)()
        assert (array == 7).sum() == live * size
        assert (array == 0).sum() == (1 - live) * size

    @pytest.mark.usefixtures("compiler")
    @pytest.mark.parametrize("elements", [2048, 640])
    def test_arithmetic_loop_computes_a_softmax_of_its_rows(self, elements):
        if not roofline._compiled()[0].has_arithmetic_limit():
            pytest.skip("no vector code for this processor")
        x, out = roofline.arithmetic_limit(elements, 1, True)()
        rows = x.reshape(-1, min(1024, elements)).astype(np.float64)
        expected = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(out.reshape(rows.shape), expected, rtol=1e-5)


def saved(folder):
    """A file as pytest-benchmark saves it, with made-up times."""
    benchmarks = []
    for case in (cases.CASES[0], cases.CASES[5]):
        members = {"limit: read + write": 1.0, peers.REUSED: 2.0, "pyx_xent, 1 thread": 3.0, "torch eager": 8.0}
        for name, seconds in members.items():
            info = {
                "name": name, "case": str(case), "operation": cases.GRADIENT, "elements": case.elements, "shape": case.shape,
                "dtype": case.dtype, "option": case.option, "bytes": case.bytes_needed(cases.GRADIENT),
                "threads": 1 if "1 thread" in name else 2,
            }  # fmt: skip
            benchmarks.append({"group": str(case), "extra_info": info, "stats": {"median": seconds, "min": seconds / 2}})
    machine = {
        "system": "Linux", "python_version": "3.11",
        "xent": {"cpu": "some CPU", "cpus": 2, "threads": 2, "last_level_cache": 32 << 20, "limits": "measured in each group",
                 "versions": {"numpy": "2.4", "torch": "2.13", "numba": None}, "config": {"isa_active": "avx2"}},
    }  # fmt: skip
    file = folder / "times.json"
    file.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))
    return file, benchmarks


def test_shares_of_the_limit_and_ratios(tmp_path):
    rows = {row.name: row for row in results.groups(saved(tmp_path)[1])["64x10"]}
    assert rows[peers.REUSED].fraction == 0.5
    assert rows["torch eager"].fraction == 0.125
    assert rows["torch eager"].ratio == 4
    assert rows["pyx_xent, 1 thread"].fraction is None  # the limit is one of two threads
    assert rows["limit: read + write"].fraction is None


def test_report_has_tables_memory_plots_and_what_is_absent(tmp_path):
    pytest.importorskip("matplotlib")
    peak, points = tmp_path / "memory.json", tmp_path / "scaling.json"
    peak.write_text(json.dumps({"case": "2048x32000", "operation": cases.GRADIENT, "bytes": {"torch eager": 786e6}}))
    point = {"classes": 10, "single_row": False, "operation": "forward", "seconds": 1e-6, "elements": 1000, "bytes": 4000}
    points.write_text(json.dumps({"points": [point], "last_level_cache": 1 << 25}))
    file = report.write([saved(tmp_path)[0]], tmp_path / "page", memory=peak, scaling=points)
    text = file.read_text(encoding="utf-8")
    assert "| torch eager | 8 s | 4 s |" in text
    assert "| 786 MB |" in text
    assert "| 2048x32000 | loss + gradient, torch eager: its time over ours | ≥ 15.0 × | 4.0 × | missed |" in text
    assert "| 2048x32000 | loss + gradient, pyx_xent, grad_out=: share of the limit | ≥ 85% | 50% | missed |" in text
    assert "some CPU" in text
    assert "not installed, so not here: numba" in text
    for plot in ("classes", "ratios", "scaling"):
        assert f"({plot}.svg)" in text
        assert "<svg" in (file.parent / f"{plot}.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", linear.CASES, ids=str)
def test_linear_layers_answer_as_the_reference(case):
    if case.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    problem = linear.Problem(replace(case, rows=50, width=8, classes=30)).first_rows()
    for operation in case.operations:
        for name in linear.names(case):
            answer = linear.PEERS[name](problem, operation, 1)()
            if answer is not None:
                linear.assert_right(problem, operation, answer)
                with pytest.raises(AssertionError):
                    linear.assert_right(problem, operation, (1.2 * answer[0], *answer[1:]))


def test_linear_times_become_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "CASES", [linear.Case(64, 8, 30, "tiny", rounds=3, peers=(linear.PRODUCTS, linear.OURS))])
    file = tmp_path / "linear.json"
    file.write_text(json.dumps(linear.measure(1)))
    pytest.importorskip("matplotlib")
    text = report.write([saved(tmp_path)[0]], tmp_path / "page", linear=file).read_text(encoding="utf-8")
    assert "## loss + gradient, 64x8x30 (tiny)" in text
    assert "| pyx_xent | " in text.partition("64x8x30")[2]


def test_targets_are_of_what_is_timed():
    timed = {str(case): case for case in cases.CASES}
    for case, operation, name, _, _ in targets.TARGETS:
        assert peers.PEERS[name].fits(timed[case], operation), (case, operation, name)


@pytest.mark.skipif(memory.resident("VmHWM") is None, reason="the system does not tell how much memory a process has")
def test_peak_memory_is_that_of_the_gradient():
    case = cases.Case((512, 20000), "a gradient of 41 MB")
    assert memory.measure(case, cases.GRADIENT, peers.REUSED, 1) == pytest.approx(case.logits_bytes, rel=0.1)


@pytest.mark.skipif(memory.resident("VmHWM") is None, reason="the system does not tell how much memory a process has")
def test_one_long_row_in_place_takes_no_memory_of_its_size():
    case = cases.Case((1, 1 << 25), "134 MB")
    assert memory.measure(case, cases.GRADIENT, "pyx_xent, in place", 2) < 0.02 * case.logits_bytes


def test_command_line_says_what_is_missing(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "report"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "nothing saved" in result.stderr
