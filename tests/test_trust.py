"""A short run of the fuzzer of trust/, and whether it would notice anything."""

from pathlib import Path

import numpy as np
import pytest

import pyx_xent as px

pytest.importorskip("tqdm")

from trust import fuzz, plant

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
    if options["logits"].size and options.get("grad_out") is None:
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
    for what, file, right, wrong in plant.BUGS:
        assert (ROOT / file).read_text(encoding="utf-8").count(right) == 1, what
        assert right != wrong
