"""A short form of what trust/ does at length, and whether the fuzzer would notice anything."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import pyx_xent as px
from pyx_xent import _dispatch

pytest.importorskip("tqdm")

from trust import accuracy, bits, callers, emulation, environment, exp, fuzz, plant, processes, races, sizes

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
    planted = [*plant.BUGS, *((what, *change) for what, changes in races.PLANTED.items() for change in changes)]
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
