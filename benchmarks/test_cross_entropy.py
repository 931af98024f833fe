"""Each case in a group of its own: ours, every peer, the machine's limit. Each answer is checked before it is timed."""

import gc
import math
import os
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import pytest

from pyx_xent import _dispatch, _memory

from . import roofline
from .cases import CASES, FORWARD, Problem
from .peers import PEERS, cannot_run
from .timing import times
from .worker import HugePages

# Relative error of the loss and of each entry of the gradient. Wide enough for every peer: PyTorch rounds logarithms of
# probabilities to the half formats, and sums over 32,000 classes in float32 cost others three digits. tests/ asks more of ours.
LOSS = {"float32": 1e-4, "float64": 1e-10, "float16": 3e-3, "bfloat16": 2e-2}
ENTRY = {"float32": 1e-3, "float64": 1e-9, "float16": 3e-2, "bfloat16": 2e-1}
SMALLEST = {
    "float32": 1e-12,
    "float64": 1e-20,
    "float16": 1.2e-7,
    "bfloat16": 1e-12,
}  # float16 has no numbers below 6e-8


@lru_cache(maxsize=1)
def problem_of(case):
    return Problem(case)


def pytest_generate_tests(metafunc):
    """Only what exists: a peer without a function for a case is not in its group. One that is not installed is, as skipped."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = metafunc.config.getoption("bench_threads")
    parameters = []
    for case in CASES:
        for operation in case.operations:
            members = [(name, roofline.why_not()) for name in roofline.names(case, operation)]
            for name, peer in PEERS.items():
                if peer.fits(case, operation):
                    members.append((name, cannot_run(name, case, threads, cpus)))
            for name, reason in members:
                if threads == 1 and name.endswith(roofline.ONE_THREAD):  # everybody has one then
                    continue
                marks = [pytest.mark.skip(f"{name}: {reason}")] if reason else []
                # Inductor's minutes are spent once, where a quick run can afford it.
                if case.quick and (name != "torch.compile" or case.elements < 1e6):
                    marks.append(pytest.mark.quick)
                if name.startswith("pyx_xent"):
                    marks.append(pytest.mark.ours)
                parameters.append(pytest.param(case, operation, name, marks=marks, id=f"{operation}-{case}-{name}"))
    metafunc.parametrize(("case", "operation", "name"), parameters)


def assert_right(problem, operation, answer):
    dtype = problem.case.dtype
    loss, gradient = answer
    expected, expected_gradient = problem.expected
    assert loss == pytest.approx(expected, rel=LOSS[dtype])
    if operation == FORWARD:
        assert gradient is None
        return
    gradient = np.asarray(gradient, np.float64)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=ENTRY[dtype], atol=SMALLEST[dtype])


def test_cross_entropy(benchmark, request, case, operation, name):
    config = request.config
    isa, threads = None, config.getoption("bench_threads")
    if name.startswith("pyx_xent"):
        isa = PEERS[name].isa or _dispatch.active
    if name.endswith(roofline.ONE_THREAD):
        threads = 1
    benchmark.group = f"{operation}, {case} ({case.reason})"
    benchmark.extra_info.update(
        case=str(case), reason=case.reason, shape=case.shape, dtype=case.dtype, option=case.option, operation=operation,
        name=name, elements=case.elements, bytes=case.bytes_needed(operation), threads=threads, isa=isa,
    )  # fmt: skip
    with _dispatch.use(isa) if isa else nullcontext():
        if name.startswith("limit"):
            compute = roofline.make(name, case, operation, threads)
            compute()
        else:
            problem = problem_of(case)
            compute = PEERS[name].make(problem, operation, threads)
            assert_right(problem, operation, PEERS[name].answer(problem, first_result(compute)))
        if benchmark.disabled:
            benchmark.pedantic(compute)
            return
        budget = config.getoption("bench_seconds")
        # The first calls with large new arrays are slow until the system has joined their pages.
        seconds = min(times(compute, budget / 2, least=2, most=100))
        # A round is long enough for the clock; small calls have many, slow ones at least three.
        iterations = max(1, math.ceil(100e-6 / seconds))
        rounds = min(1000, max(math.ceil(budget / (seconds * iterations)), 3 if seconds > 1 else 5))
        benchmark.pedantic(compute, rounds=rounds, iterations=iterations)


def first_result(compute):
    try:
        return compute()
    except Exception as error:
        if "compiler" in str(error).lower():  # torch.compile needs one for C++
            pytest.skip(f"torch.compile: {error}")
        raise


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    yield
    HugePages.forget()
    gc.collect()
    _memory.forget()
