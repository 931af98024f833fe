"""Each case's limit and ours by turns, on the same arrays, in a process for each case: which share of the limit we reach.

The figure is limit / (ours - CALL), medians; `roofline` says what the limits are, `targets.of_limit` which counts.
"""

from tqdm import tqdm

import pyx_xent

from . import roofline, targets
from .answers import assert_right
from .cases import FORWARD, GRADIENT, Problem
from .turns import by_turns, record, repeated
from .worker import in_a_process

IN_PLACE = "loss + gradient in place"
OURS = "pyx_xent"
CALL = 1.2e-6  # seconds of a Python call with its checks: what a limit, which repeats itself in C, does not have
LONG = 8192  # classes from which on overwriting the logits is worth a figure: both memory and the arithmetic show there


def operations(case):
    found = [FORWARD, GRADIENT]
    # The target of class probabilities is about a gradient that is written elsewhere.
    in_place = case.classes >= LONG and not roofline.in_cache(case, arrays=1) and case.option != "soft"
    return [*found, IN_PLACE] if in_place else found


def limits_of(case, operation):
    """(target, names of the limits of all threads that it is told against, without those of the other place to write to)."""
    target, beginnings = targets.of_limit(case, operation)
    without = {FORWARD: (), GRADIENT: ("limit: in place",), IN_PLACE: ("limit: read + write",)}[operation]
    names = roofline.names(case, FORWARD if operation == FORWARD else GRADIENT)
    threaded = [name for name in names if not name.endswith(roofline.ONE_THREAD)]
    return target, [name for name in threaded if name.startswith(beginnings) and not name.startswith(without)]


def ours(problem, operation, threads, gradient):
    """A function of a count: our calls, which leave the gradient in `gradient`; and what the last one returns, checked."""
    arguments = problem.logits, problem.target
    options = dict(problem.options, num_threads=threads)
    if operation == FORWARD:
        compute = repeated(lambda: pyx_xent.cross_entropy(*arguments, **options))
        assert_right(problem, FORWARD, (compute(1), None))
        return compute
    compute = repeated(lambda: pyx_xent.cross_entropy_with_grad(*arguments, grad_out=gradient, **options))
    _ = problem.expected  # before the logits are overwritten, in place
    loss, found = compute(1)
    assert_right(problem, GRADIENT, (loss, found[problem.sample]))
    return compute


def measure_operation(problem, operation, threads, budget, rounds):
    """A record of one case and operation."""
    target, names = limits_of(problem.case, operation)
    gradient = None
    if operation != FORWARD:
        gradient = problem.logits if operation == IN_PLACE else roofline.touched_like(problem.logits)
    functions = {OURS: ours(problem, operation, threads, gradient)}
    for name in names:
        # In place, exponentials are stored elsewhere: in the cache, where it makes no difference.
        to = None if operation == IN_PLACE else gradient
        functions[name] = roofline.make(name, problem, FORWARD if operation == FORWARD else GRADIENT, threads, to)
        answer = functions[name](1)
        if name.startswith(roofline.BY_HAND):
            loss, found = answer
            assert_right(problem, operation, (loss, None if found is None else found[problem.sample]))
    turns = by_turns(functions, budget, rounds)
    limit, _ = roofline.binding({name: turns.medians[name] for name in names})
    return record(target, problem.case, operation, limit, OURS, turns, less=CALL)


def measure_case(case, threads, budget, rounds):
    pyx_xent.set_num_threads(threads)
    problem = Problem(case)
    # In place is the last: it overwrites the logits.
    limited = [operation for operation in operations(case) if limits_of(case, operation)[1]]
    return [measure_operation(problem, operation, threads, budget, rounds) for operation in limited]


def measure(cases, threads, budget, rounds):
    """Records of each case, as soon as they are there."""
    for case in tqdm(cases, unit=" cases"):
        yield in_a_process(measure_case, case, threads, budget, rounds)
