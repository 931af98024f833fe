"""A short form of what trust/ does at length, and whether the fuzzer would notice anything."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pyx_xent as px
from pyx_xent import _dispatch

pytest.importorskip("tqdm")

from trust import (
    aarch64,
    accuracy,
    bits,
    callers,
    compare,
    disassembly,
    emulation,
    environment,
    exp,
    fuzz,
    plant,
    processes,
    races,
    sizes,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("seed", range(4))
def test_random_calls(seed):
    found = fuzz.run(500, (seed,))
    assert found["raised"] > 100
    assert found["cross_entropy_with_grad"] > 50


def spoiled(function, spoil):
    def call(*arguments, **options):
        result = function(*arguments, **options)
        spoil(result, arguments, options)
        return result

    return call


def add_a_digit(result, arguments, options):
    if result[1].size:
        result[1].reshape(-1)[:1] *= 1.5


def write_into_the_logits(result, arguments, options):
    if options["logits"].size and options["logits"].flags.writeable and options.get("grad_out") is None:
        options["logits"].flat[0] = 0


def write_behind_an_output(result, arguments, options):
    out = options.get("grad_out")
    if out is not None and out.base is not None and out.size:
        out.base[-1:] = 0


@pytest.mark.parametrize("spoil", [add_a_digit, write_into_the_logits, write_behind_an_output])
def test_what_is_not_as_it_should_be_is_noticed(monkeypatch, spoil):
    monkeypatch.setattr(px, "cross_entropy_with_grad", spoiled(px.cross_entropy_with_grad, spoil))
    with pytest.raises(AssertionError):
        fuzz.run(500, (0,))


def test_accepting_what_is_wrong_is_noticed(monkeypatch):
    monkeypatch.setattr(px, "softmax", lambda x, axis=-1, out=None, num_threads=None: np.zeros(x.shape, np.float32))
    with pytest.raises(AssertionError):
        fuzz.run(500, (0,))


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from the source tree")
def test_planted_bugs_are_in_code_that_is_there():
    assert len(plant.BUGS) >= 20
    several = [*plant.ALSO.items(), *races.PLANTED.items()]
    planted = [*plant.BUGS, *((what, *change) for what, changes in several for change in changes)]
    for what, file, right, wrong in planted:
        assert (ROOT / file).read_text(encoding="utf-8").count(right) == 1, what
        assert right != wrong


linux = pytest.mark.skipif(sys.platform != "linux", reason="as Linux forks, maps and limits memory")


@pytest.mark.parametrize("regime", ["spread 5", "offset 1e4", "gap 12", "gap 60"])
@pytest.mark.parametrize("classes", [10, 1000])
def test_results_are_near_those_of_arb(monkeypatch, regime, classes, dtype):
    pytest.importorskip("flint")
    monkeypatch.setitem(accuracy.ROWS, classes, 10)
    monkeypatch.setattr(accuracy, "PEERS", {})
    found = accuracy.measure((regime, classes, np.dtype(dtype).name, 1))["pyx_xent"]
    assert all(error <= promised for error, promised in zip(found, accuracy.PROMISED[np.dtype(dtype).name], strict=True))
    assert found[1] > 0


def test_exponentials_of_numpys_table(isa):
    if not exp.TABLE.exists():
        pytest.skip("NumPy comes without it here")
    found = exp.table(isa)
    assert all(count > 50 and error <= 1 for count, error in found.values())


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_does_not_matter_changes_a_bit(seed):
    found = bits.check((1, seed))
    assert found["1 to 64 threads"] > 50
    assert found["other strides, order, alignment"] > 20
    assert bool(found["rounding modes, flushing to zero"]) == environment.AVAILABLE


def test_another_bit_is_noticed(monkeypatch):
    def softmax(x, axis=-1, out=None, num_threads=None):
        return x * (num_threads or 1)

    monkeypatch.setattr(px, "softmax", softmax)
    with pytest.raises(AssertionError, match="1 to 64 threads"):
        bits.check(0)


@linux
def test_many_callers():
    counts, samples = callers.run(4, 2)
    assert counts["calls"] > 50
    assert counts["worked on changing labels"] + counts["IndexError on changing labels"] > 0
    assert samples


@linux
def test_forked_children_compute():
    found = processes.in_new_process("print(json.dumps(processes.forks(20)))")
    assert {what: children == right == 20 for what, (children, right) in found.items()} == dict.fromkeys(processes.KINDS, True)


@linux
def test_limits_on_threads_change_no_bit():
    found = processes.limits()
    assert len(found) > len(processes.LIMITS)


@pytest.mark.parametrize("last", [False, True])
def test_other_libraries_before_and_after(last):
    order = sorted(processes.import_orders()[0], key=lambda name: (name == "pyx_xent") == last)
    assert processes.check_order(order) == len(order)


@linux
@pytest.mark.parametrize("what", ["2 rows of 2^30 + 64 classes", "2^32 classes, labels beyond them"])
def test_more_elements_than_32_bits_count(what):
    elements, left_out = sizes.check(what)
    if left_out:
        pytest.skip(left_out)
    assert elements > 2**31


@linux
def test_calls_without_memory():
    found = processes.in_new_process("from trust import faults; print(json.dumps(faults.sweep(8, 16 << 20)))")
    assert min(found["worked"], found["MemoryError"]) > 5


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None or "avx2" not in _dispatch.supported, reason="needs qemu-x86_64")
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell"])
def test_emulated_processors(processor):
    isa, digests, calls = emulation.check(processor, 20, 0)
    assert (isa, digests, calls) == (emulation.PROCESSORS[processor], len(bits.digests(0)), 20)


def test_aarch64_is_left_out_with_a_reason(monkeypatch):
    assert "no folder" in aarch64.not_possible("")
    ((what, found),) = aarch64.check("", 0, 1)
    assert (what, found[:10]) == ("emulated aarch64", "not tried:")
    monkeypatch.setattr(aarch64.shutil, "which", lambda program: None)
    monkeypatch.setattr(aarch64.platform, "system", lambda: "Linux")
    monkeypatch.setattr(aarch64.platform, "machine", lambda: "x86_64")
    assert "apt install qemu-user" in aarch64.not_possible("anywhere")


def test_a_folder_with_other_files_is_not_taken_for_an_emulated_python(tmp_path):
    (tmp_path / "letter").touch()
    with pytest.raises(SystemExit, match="neither empty"):
        aarch64.Emulated(tmp_path)


def test_results_that_differ_are_named():
    arrays = {"numbers": np.arange(3.0, dtype=np.float32), "nan": np.array([1, np.nan], np.float32)}

    def found(**changed):
        return "", {"all": "digest"}, {name: ("float32", array.tobytes()) for name, array in {**arrays, **changed}.items()}

    assert compare.check("x", found(), found()) == "the same bits in 1 digests and 2 arrays, NaN's included"
    minus_zero = found(numbers=np.array([-0.0, 1, 2], np.float32))
    minus_nan = found(nan=np.copysign(arrays["nan"], np.array([1, -1], np.float32)))
    for other, message in ((minus_nan, "NaN differs in 1 more .'nan'"), (minus_zero, "in 1 of 2 arrays .'numbers'")):
        with pytest.raises(SystemExit, match=message):
            compare.check("x", other, found())


LISTING = """
0000000000000100 <hot>:
 100:\tfmov\tv9.4s, #1.0
 104:\tldr\tq1, [x0], #16
 108:\t{inside}
 10c:\tfmla\tv2.4s, v1.4s, v9.4s
 110:\tcmp\tx0, x1
 114:\tb.ne\t104 <hot+0x4>  // b.any
 118:\tldr\tq9, [sp, #32]
 11c:\tcbnz\tx3, 100 <hot>
 120:\tret

0000000000000200 <cold>:
 200:\tfmadd\ts1, s2, s3, s4
 204:\tb.ne\t200 <cold>
"""


@pytest.mark.parametrize(
    ("inside", "is_good"),
    [
        ("fadd\tv3.4s, v3.4s, v2.4s", True),
        ("str\tq4, [x2]", True),
        ("ldr\tq5, [sp, #16]", False),
        ("stp\tq4, q5, [x29, #-32]", False),
        ("fmadd\ts1, s2, s3, s4", False),
        ("bl\t400 <expf>", False),
    ],
)
def test_loops_that_are_scalar_spill_or_call_are_seen(monkeypatch, inside, is_good):
    text = LISTING.format(inside=inside)
    monkeypatch.setattr(disassembly.subprocess, "run", lambda *command, **options: SimpleNamespace(stdout=text))
    if is_good:
        vector = 2 if inside.startswith("fadd") else 1
        assert disassembly.check("file", disassembly.AARCH64, ["hot"]) == {"hot": disassembly.Loop(size=5, vector=vector)}
    else:
        with pytest.raises(SystemExit, match="hot: Loop"):
            disassembly.check("file", disassembly.AARCH64, ["hot"])
    with pytest.raises(SystemExit, match="cold: Loop"):
        disassembly.check("file", disassembly.AARCH64, ["cold"])
    with pytest.raises(SystemExit, match="no function warm"):
        disassembly.check("file", disassembly.AARCH64, ["warm"])
