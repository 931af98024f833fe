"""The benchmarks: peers' answers on a tiny problem of each kind, what is told of absent ones, a report from saved times."""

import itertools
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

import pyx_xent
from benchmarks import (
    against_torch,
    answers,
    cases,
    limits,
    linear,
    memory,
    ours,
    peers,
    report,
    results,
    roofline,
    targets,
    turns,
    worker,
)  # fmt: skip
from pyx_xent import reference

ROOT = Path(__file__).parents[1]
TINY = {2: (6, 23), 4: (2, 5, 3, 4)}
SLOW = ("torch", "JAX", "Numba")  # seconds to load or to compile; test_benchmarks_run and `make bench` have them
PROBLEMS = {(len(case.shape), case.dtype, case.option, case.layout): case for case in cases.CASES}.values()


@pytest.fixture(autouse=True)
def threads_as_before():
    """A measurement sets numbers of threads for its process, which here is that of other tests too."""
    torch = sys.modules.get("torch")
    before = torch and torch.get_num_threads()
    yield
    pyx_xent.set_num_threads(None)
    if torch:
        torch.set_num_threads(before)


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
                answers.assert_right(problem, operation, peer.answer(problem, result))


@pytest.mark.parametrize("part", [0, 1], ids=["loss", "gradient"])
def test_a_wrong_answer_is_not_timed(part):
    problem = cases.Problem(tiny(cases.CASES[0]))
    answer = list(peers.PEERS[peers.OURS].answer(problem, peers.PEERS[peers.OURS].make(problem, cases.GRADIENT, 1)()))
    answer[part] = answer[part] * 1.01
    with pytest.raises(AssertionError):
        answers.assert_right(problem, cases.GRADIENT, answer)


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

    @pytest.fixture
    def vectors(self, compiler):
        if not roofline._compiled()[0].has_arithmetic_limit():
            pytest.skip("no vector code for this processor")

    @pytest.mark.usefixtures("compiler")
    @pytest.mark.parametrize("threads", [1, 2, 3])
    @pytest.mark.parametrize("live", [1.0, 0.5])
    @pytest.mark.parametrize("kind", [roofline.WRITE_ELSEWHERE, roofline.WRITE_CACHED])
    def test_memory_loops_move_all_bytes(self, kind, threads, live):
        size = 256 * 4 * 3 * 2 * 5
        array, out = roofline.aligned(size, fill=7), roofline.aligned(size)
        roofline.memory_limit(kind, array, threads, live, out=out)()
        assert (out == 7).sum() == live * size
        assert (out == 0).sum() == (1 - live) * size
        roofline.memory_limit(roofline.WRITE_IN_PLACE, array, threads, live)()
        assert (array == 7).sum() == live * size
        assert (array == 0).sum() == (1 - live) * size

    @pytest.mark.usefixtures("compiler")
    @pytest.mark.parametrize("offset", [0, 16, 52])
    def test_memory_loops_keep_within_arrays_that_begin_anywhere(self, offset):
        size = 5000
        array, around = roofline.aligned(size, fill=7), roofline.aligned(size + 256, fill=1)
        out = around[64 + offset :][:size]
        roofline.memory_limit(roofline.WRITE_ELSEWHERE, array, 2, out=out)()
        assert (out == 7).sum() > size - 64 - 256
        out[:] = 1
        assert (around == 1).all()

    @pytest.mark.usefixtures("vectors")
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("elements", [640, 2048, 70_000 // 1024 * 1024])
    def test_arithmetic_loop_computes_a_softmax_of_its_rows(self, elements, dtype):
        x = 3 * np.random.default_rng(0).standard_normal(elements, dtype)
        _, out = roofline.arithmetic_limit(x, 2, np.empty_like(x))()
        rows = x.reshape(-1, min(1024, elements)).astype(np.float64)
        expected = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(out.reshape(rows.shape), expected, rtol=1e-5 if dtype == "float32" else 1e-12)

    @pytest.mark.usefixtures("compiler")
    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize(
        "case",
        [
            *(cases.Case((48, classes), "") for classes in (1, 2, 10, 15, 16, 21, 64, 65, 100, 256, 1000, 1024)),
            *(cases.Case((48, classes), "", "bfloat16") for classes in (1, 7, 64, 100, 1000)),
            *(cases.Case((3, 5, *image), "") for image in ((4, 4), (16, 32), (16, 33), (24, 70))),
            cases.Case((2, 21, 8, 8), "", layout=cases.CHANNELS_LAST),
        ],
        ids=str,
    )
    def test_by_hand_computes_loss_and_gradient(self, case, threads):
        if not roofline._compiled()[0].has_handwritten():
            pytest.skip("no AVX-512")
        if case.dtype == "bfloat16":
            pytest.importorskip("ml_dtypes")
        problem = cases.Problem(case)
        assert roofline.by_hand(problem, threads)()[1] is None
        for plain_stores in (False, True):
            loss, gradient = roofline.by_hand(problem, threads, roofline.touched_like(problem.logits), plain_stores)()
            assert loss == pytest.approx(problem.expected[0], rel=1e-6)
            tolerance = 5e-3 if case.dtype == "bfloat16" else 2e-5
            np.testing.assert_allclose(gradient.astype(float), problem.expected[1], rtol=tolerance, atol=1e-8)

    @pytest.mark.usefixtures("compiler")
    @pytest.mark.parametrize("option", ["", "soft", "ignored50"])
    def test_limits_leave_the_arrays_to_those_after_them(self, option, monkeypatch):
        monkeypatch.setattr(roofline, "own_cache", lambda: 0)  # all of the limits
        problem = cases.Problem(cases.Case((8, 1000), "", option=option))
        logits, target = problem.logits.copy(), problem.target.copy()
        for operation in (cases.FORWARD, cases.GRADIENT):
            for name in roofline.names(problem.case, operation):
                roofline.make(name, problem, operation, 2)()
                np.testing.assert_array_equal(problem.logits, logits, err_msg=name)
                np.testing.assert_array_equal(problem.target, target, err_msg=name)
        assert "limit: in place" in roofline.names(problem.case, cases.GRADIENT)

    @pytest.mark.usefixtures("compiler")
    def test_every_case_of_short_rows_has_a_limit_by_hand(self):
        if not roofline._compiled()[0].has_handwritten():
            pytest.skip("no AVX-512")
        by_hand = {str(case) for case in cases.CASES if roofline.BY_HAND in roofline.names(case, cases.GRADIENT)}
        short = "64x10 128x20 128x100 512x100 4096x50 65536x10 65536x20 8192x64 4096x100 1024x256 256x1000 4096x100-bfloat16"
        planes = "256x1000-bfloat16 8x21x256x256 8x21x256x256-channels_last 2x19x512x1024 16x2x64x64"
        assert by_hand == {*short.split(), *planes.split()}

    def test_of_a_limit_the_fastest_way_counts_and_of_limits_the_slowest(self):
        medians = {"limit: read + write": 3.0, "limit: read + write / plain stores": 2.0, "limit: max, exp": 1.0}
        assert roofline.binding(medians) == ("limit: read + write / plain stores", 2.0)


class TestTurns:
    def test_everybody_has_as_many_turns(self):
        calls = dict.fromkeys("ab", 0)

        def count(name):
            def function(times):
                calls[name] += times

            return function

        found = turns.by_turns({name: count(name) for name in calls}, budget=0, rounds=9, tries=1)
        assert {len(seconds) for seconds in found.seconds.values()} == {9}
        assert all(made > 9 for made in calls.values())  # a turn is longer than a call

    def test_an_unsteady_group_is_repeated_and_the_steadiest_is_taken(self, monkeypatch):
        groups = iter([{"a": [1, 3, 3]}, {"a": [1, 2, 2]}, {"a": [1, 9, 9]}])
        monkeypatch.setattr(turns, "_one_group", lambda *_: next(groups))
        monkeypatch.setattr(turns, "switches", lambda: 0)
        found = turns.by_turns({"a": lambda count: None}, budget=0)
        assert found.medians == {"a": 2}
        assert not found.steady

    def test_a_group_beside_another_program_is_repeated_and_marked(self, monkeypatch):
        monkeypatch.setattr(turns, "_one_group", lambda *_: {"a": [1, 1, 1]})
        monkeypatch.setattr(turns, "switches", itertools.count(0, 10**9).__next__)
        found = turns.by_turns({"a": lambda count: None}, budget=0)
        assert found.spread == 1
        assert not found.steady
        assert turns.switches() == 6 * 10**9  # three groups
        assert "preempted" in found.remarks[0]

    def test_a_steady_group_is_not_repeated(self, monkeypatch):
        groups = iter([{"a": [1, 1.2, 1.2]}])
        monkeypatch.setattr(turns, "_one_group", lambda *_: next(groups))
        monkeypatch.setattr(turns, "switches", lambda: 0)
        assert turns.by_turns({"a": lambda count: None}, budget=0).steady


def environment_of_workers():
    return {name: os.environ.get(name) for name in (worker.SWITCH, *worker.NOT_OF_USERS)}


def test_processes_that_measure_have_the_environment_of_users(monkeypatch):
    for name in worker.NOT_OF_USERS:
        monkeypatch.setenv(name, "Haswell")
    found = worker.in_a_process(environment_of_workers)
    assert set(found.values()) == {None}
    assert worker.in_a_process(environment_of_workers, huge_pages=True) == {**found, worker.SWITCH: "1"}
    assert os.environ["OPENBLAS_CORETYPE"] == "Haswell"


@pytest.fixture
def other_checkout(tmp_path):
    """A package that says so wherever it computes."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "pyx_xent", folder / "pyx_xent", ignore=shutil.ignore_patterns("*.c"))
    with (folder / "pyx_xent/__init__.py").open("a") as file:
        file.write("\n_right = cross_entropy\ndef cross_entropy(*a, **k): return 1000 + _right(*a, **k)\n")
    return folder


def test_workers_compute_with_the_package_of_another_checkout_and_with_other_kernels(other_checkout):
    case = replace(cases.CASES[0], shape=(6, 23))
    expected = cases.Problem(case).expected[0]
    with worker.Worker(checkout=other_checkout) as theirs, worker.Worker(isa="baseline") as own:
        for one, added in ((theirs, 1000), (own, 0)):
            one.prepare(case, cases.FORWARD, 1, peers.OURS)
            assert one(2).fetch() == (pytest.approx(added + expected), None)
            assert one.seconds(3) > 0
            one.forget()
    assert "PYX_XENT_ISA" not in os.environ


def test_a_wrong_answer_of_another_checkout_is_not_timed(other_checkout, monkeypatch):
    monkeypatch.setitem(ours.NAMES, "tiny", cases.Case((6, 23), ""))
    found = ours.measure_checkout(other_checkout, [(targets.CALL, None, ["tiny"])], bool, 1, 0, 2)
    with pytest.raises(AssertionError):
        next(found)


def test_another_checkout_is_measured_by_turns_with_this_one(monkeypatch):
    monkeypatch.setitem(ours.NAMES, "tiny", cases.Case((6, 23), ""))
    (records,) = ours.measure_checkout(ROOT, [(targets.CALL, "baseline", ["tiny"])], bool, 1, 0, 2)
    assert [one["operation"] for one in records] == [cases.FORWARD, cases.GRADIENT]
    assert all(one["figure"] == one["seconds"][0] / one["seconds"][1] for one in records)


def test_import_is_measured_in_milliseconds():
    ((record,),) = ours.measure_import(rounds=2)
    assert record["figure"] == pytest.approx(1e3 * record["seconds"][0])
    assert len(next(turns.table([record]))) == len(turns.HEADINGS)


def test_shares_of_limits_are_measured():
    if roofline.why_not():
        pytest.skip(roofline.why_not())
    shapes = [cases.Case((32, 10), "rows"), cases.Case((2, 5, 4, 8), "planes"), cases.Case((32, 10), "", "float64")]
    found = [record for case in shapes for record in limits.measure_case(case, 1, 0, 2)]
    assert [record["operation"] for record in found] == [cases.FORWARD, cases.GRADIENT] * 3
    for record in found:
        limit, own = record["seconds"]
        assert record["figure"] == pytest.approx(limit / (own - limits.CALL))
        assert record["numerator"].startswith("limit: ")


def test_in_place_is_measured_last_and_only_where_rows_are_long():
    long = cases.Case((2048, 32000), "")
    operations = [cases.FORWARD, cases.GRADIENT, limits.IN_PLACE]
    assert limits.operations(long) == operations
    assert limits.operations(replace(long, option="soft")) == operations[:2]
    assert limits.operations(cases.Case((256, 1000), "")) == operations[:2]
    elsewhere, in_place = (limits.limits_of(long, operation)[1] for operation in operations[1:])
    assert "limit: in place" in in_place
    assert "limit: in place" not in elsewhere
    assert not any("read + write" in name for name in in_place)


@pytest.mark.parametrize("case", ["2048x32000", "1024x32000-soft", "2x150x256x256"])
def test_shares_of_memory_are_not_those_of_arithmetic(case):
    target, names = limits.limits_of(ours.NAMES[case], cases.GRADIENT)
    assert target.wanted
    assert names
    assert all(name.startswith("limit: read + write") for name in names)


def test_ratios_of_ours_to_ours_are_measured(monkeypatch):
    for name in ours.NAMES:
        monkeypatch.setitem(ours.NAMES, name, replace(ours.NAMES[name], shape=cases.CASES[0].shape, layout=""))
    found = [one for records in ours.measure_ratios(lambda name: "smoothing" in name, 1, 0, 2) for one in records]
    assert [one["operation"] for one in found] == [cases.FORWARD, cases.GRADIENT]
    fresh = ours.measure_ratio(targets.FRESH, cases.CASES[0], ours.FRESH, cases.CASES[0], ours.INTO, cases.GRADIENT, 1, 0, 2)
    assert fresh[0]["numerator"] == ours.FRESH
    assert fresh[0]["denominator"] == ours.INTO


def test_ours_and_pytorch_by_turns():
    pytest.importorskip("torch")
    parts = ("loss", "softmax")
    for case in (cases.Case((6, 23), ""), cases.Case((2, 5, 3, 4), "", "float16"), cases.Case((6, 23), "", "float64")):
        found = against_torch.measure_case(case, parts, False, 1, 0, 2)
        assert [one["operation"] for one in found] == [cases.FORWARD, cases.GRADIENT, *against_torch.SOFTMAX]
        assert {one["row"] for one in found} == {targets.LOSS, targets.SOFTMAX.row}
        assert len(set(map(turns.identity, found))) == len(found)


def made_up(row, sign, figure, wanted=1.0, **fields):
    return {
        "row": row, "sign": sign, "wanted": wanted, "case": "64x10", "operation": cases.GRADIENT, "numerator": "limit: by hand",
        "denominator": "pyx_xent", "seconds": [1e-6, 2e-6], "figure": figure, "remarks": [], **fields,
    }  # fmt: skip


def test_summary_counts_steady_figures_that_meet_their_target_and_names_the_worst():
    records = [
        made_up(targets.FRESH.row, "≤", 1.5, case="worst"), made_up(targets.FRESH.row, "≤", 0.9),
        *(made_up(targets.FRESH.row, "≤", figure, remarks=["unsteady: 2.0"]) for figure in (0.8, 9)),
        made_up(targets.BY_HAND, "≥", 1.5), made_up(targets.OTHER_LIMITS, "≥", 0.1, wanted=None),
    ]  # fmt: skip
    by_hand, fresh, other = turns.summary(records)
    assert by_hand[:3] == (targets.BY_HAND, "1 of 1", "0")
    assert fresh[:3] == (targets.FRESH.row, "1 of 4", "2")
    assert fresh[4].startswith("worst")
    assert other[1] == "1 of 1"


def test_every_row_of_figures_has_a_comparison():
    asked = {targets.of_limit(case, operation)[0].row for case in cases.CASES for operation in (cases.FORWARD, cases.GRADIENT)}
    asked |= {targets.of_torch(case, 1).row for case in against_torch.all_cases()}
    asked |= {target.row for target, *_ in (*ours.RATIOS, *ours.OLDER, *ours.CLANG)}
    asked |= {targets.SOFTMAX.row, targets.OTHERS.row, targets.IMPORT.row}
    if roofline.why_not() is None and roofline._compiled()[0].has_handwritten():
        assert asked == set(targets.ROWS)


def test_names_of_cases_that_are_asked_for_exist():
    known = {*ours.NAMES, *map(str, against_torch.all_cases())}
    assert set(cases.QUICK) <= known
    assert {name for _, _, names in (*ours.OLDER, *ours.CLANG) for name in names} <= known
    assert {name for _, one, _, other, _, _ in ours.RATIOS for name in (one, other)} <= known


def test_shapes_that_are_compared_with_pytorch():
    asked = "200x3 32x37 1000x37 300x150 777x131 64x300 4x5x37x41 2x64x50x50 1x2x512x512 8x1000 16384x2 2x150x256x256 512x100"
    names = [str(case) for case in against_torch.all_cases()]
    assert len(set(names)) == len(names)
    for dtype in ("", "-float64", "-bfloat16", "-float16"):
        assert {name + dtype for name in asked.split()} <= set(names)


def saved(folder):
    """A file as pytest-benchmark saves it, with made-up times."""
    benchmarks = []
    for case in (cases.CASES[0], next(case for case in cases.CASES if str(case) == "2048x32000")):
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


def test_report_has_what_was_measured_by_turns(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "turns.json"
    file.write_text(json.dumps([made_up(targets.BY_HAND, "≥", 0.5, 0.75, remarks=["unsteady: 1.5"])]))
    text = report.write([saved(tmp_path)[0]], tmp_path / "page", by_turns=file).read_text(encoding="utf-8")
    assert f"| {targets.BY_HAND} | 0 of 1 | 1 | 0.50 | 64x10, loss + gradient, limit: by hand | 0.50 | ≥ 0.75 |" in text
    line = "| 64x10 | loss + gradient | limit: by hand | 1 µs | pyx_xent | 2 µs | 0.50 | ≥ 0.75 | missed, unsteady: 1.5 |"
    assert line in text


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
                linear.assert_right(problem, operation, name, answer)
                with pytest.raises(AssertionError):
                    linear.assert_right(problem, operation, name, (1.2 * answer[0], *answer[1:]))


def test_linear_times_become_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "CASES", [linear.Case(64, 8, 30, "tiny", rounds=3, peers=(linear.PRODUCTS, linear.OURS))])
    file = tmp_path / "linear.json"
    file.write_text(json.dumps(linear.measure(1)))
    pytest.importorskip("matplotlib")
    text = report.write([saved(tmp_path)[0]], tmp_path / "page", linear=file).read_text(encoding="utf-8")
    assert "## loss + gradient, 64x8x30 (tiny; " in text
    assert "arrays by numpy" in text
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
