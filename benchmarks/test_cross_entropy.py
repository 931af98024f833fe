"""Each case in a group of its own: ours, every peer, the machine's limit. Each answer is checked before it is timed."""

import gc
import math
import os
from contextlib import nullcontext
from functools import lru_cache

import pytest

from pyx_xent import _dispatch, _memory

from . import roofline
from .answers import assert_right
from .cases import CASES, Problem
from .peers import PEERS, cannot_run
from .timing import times
from .turns import UNSTEADY, spread
from .worker import forget_huge_pages


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
            problem = problem_of(case)
            compute = roofline.make(name, problem, operation, threads)
            answer = compute()
            if name.startswith(roofline.BY_HAND):
                loss, gradient = answer
                assert_right(problem, operation, (loss, gradient if gradient is None else gradient[problem.sample]))
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
        benchmark.extra_info["unsteady"] = not repeat_until_steady(benchmark.stats.stats, compute, rounds, iterations)


def repeat_until_steady(stats, compute, rounds, iterations, tries=2):
    """Measure again what another program disturbed, and put it into pytest-benchmark's `stats`; whether it became steady."""
    best = list(stats.data)
    for _ in range(tries):
        if spread(best) <= UNSTEADY:
            break
        again = [sum(times(compute, 0, least=iterations)) / iterations for _ in range(rounds)]
        best = min(best, again, key=spread)
    stats.data[:] = best  # before its median and the like are first asked for
    return spread(best) <= UNSTEADY


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
    forget_huge_pages()
    gc.collect()
    _memory.forget()
