"""Ours against ours by turns: what an option, a fresh gradient or a layout costs beside the plain call on equal arrays."""

from dataclasses import replace

from tqdm import tqdm

import pyx_xent

from .answers import assert_right
from .cases import CASES, FORWARD, GRADIENT, Problem
from .results import duration
from .roofline import touched_like
from .turns import by_turns, remark, repeated
from .worker import in_a_process

FRESH = "fresh gradient"
REUSED = "grad_out="
NAMES = {str(case): case for case in CASES}
LONG = "1024x32000"
RATIOS = [  # case and how, over case and how; operation; at most
    *(
        (f"{LONG}-{option}", REUSED, LONG, REUSED, operation, 1.05)
        for option in ("smoothing", "weights")
        for operation in (FORWARD, GRADIENT)
    ),
    *((case, FRESH, case, REUSED, GRADIENT, 1.15) for case in ("64x10", "256x1000", "1024x32000", "2048x32000")),
    *(("8x21x256x256-channels_last", REUSED, "8x21x256x256", REUSED, operation, 1.1) for operation in (FORWARD, GRADIENT)),
]


def prepare(case, how, operation, threads):
    problem = Problem(case)
    options = dict(problem.options, num_threads=threads)
    if operation == FORWARD:
        compute = repeated(lambda: pyx_xent.cross_entropy(problem.logits, problem.target, **options))
        assert_right(problem, operation, (compute(1), None))
        return compute
    if how == REUSED:
        options["grad_out"] = touched_like(problem.logits)
    compute = repeated(lambda: pyx_xent.cross_entropy_with_grad(problem.logits, problem.target, **options))
    loss, gradient = compute(1)
    assert_right(problem, operation, (loss, gradient[problem.sample]))
    return compute


def measure_ratio(one, how, other, other_how, operation, threads, budget, rounds):
    pyx_xent.set_num_threads(threads)
    functions = {0: prepare(one, how, operation, threads), 1: prepare(other, other_how, operation, threads)}
    turns = by_turns(functions, budget, rounds)
    return turns.medians, turns.quality


def measure(threads, budget, rounds, ratios=None, shape=None):
    """Records of each ratio, as soon as they are there; `shape`: of all cases instead of their own, to try the command."""
    for one, how, other, other_how, operation, wanted in tqdm(RATIOS if ratios is None else ratios, unit=" ratios"):
        cases = [NAMES[name] if shape is None else replace(NAMES[name], shape=shape) for name in (one, other)]
        medians, quality = in_a_process(measure_ratio, cases[0], how, cases[1], other_how, operation, threads, budget, rounds)
        yield [{
            "one": f"{one}, {how}", "other": f"{other}, {other_how}", "operation": operation, "seconds": medians[0],
            "other_seconds": medians[1], "ratio": medians[0] / medians[1], "wanted": wanted, **quality,
        }]  # fmt: skip


HEADINGS = ("ours", "over ours", "", "time", "other's", "ratio", "wanted", "")


def table(records):
    """Cells of each record, the worst first."""
    for record in sorted(records, key=lambda record: record["wanted"] / record["ratio"]):
        remarks = ["missed"] if record["ratio"] > record["wanted"] else []
        remarks += remark(record)
        yield (
            record["one"], record["other"], record["operation"], duration(record["seconds"]), duration(record["other_seconds"]),
            f"{record['ratio']:.2f}", f"≤ {record['wanted']:.2f}", ", ".join(remarks),
        )  # fmt: skip
