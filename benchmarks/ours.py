"""Ours against ours by turns: what an option, a fresh gradient or a layout costs; another checkout's times; the import.

Of options, fresh gradients and layouts both calls are made in one process. Another checkout (an older one, or one that another
compiler built) has a process of its own and so have we, with equal arrays; each measures its own turns.
"""

import os
import statistics
import subprocess
import sys

from tqdm import tqdm

import pyx_xent

from . import targets
from .answers import assert_right
from .cases import CASES, FORWARD, GRADIENT, Problem
from .peers import OURS, REUSED
from .roofline import touched_like
from .turns import ROUNDS, Turns, by_turns, record, repeated
from .worker import ROOT, Worker, in_a_process

FRESH, INTO = "fresh gradient", "grad_out="
NAMES = {str(case): case for case in CASES}
LONG = "1024x32000"
RATIOS = [  # target; case and how, over case and how; operation
    *(
        (targets.OPTIONS, f"{LONG}-{option}", INTO, LONG, INTO, operation)
        for option in ("smoothing", "weights")
        for operation in (FORWARD, GRADIENT)
    ),
    *((targets.FRESH, case, FRESH, case, INTO, GRADIENT) for case in ("64x10", "256x1000", LONG, "2048x32000")),
    *(
        (targets.CHANNELS_LAST, "8x21x256x256-channels_last", INTO, "8x21x256x256", INTO, operation)
        for operation in (FORWARD, GRADIENT)
    ),
]
SHORT = ["128x20", "128x100", "512x100", "4096x50", "4096x100", "8192x64", "65536x10", "65536x20", "1024x256", "256x1000"]
SHORT += ["8x21x256x256", "2x19x512x1024", "16x2x64x64", "256x1000-bfloat16", "4096x100-bfloat16"]
LONG_ROWS = ["2048x32000", "512x32000-float64", "1024x32000-bfloat16"]
OLDER = [  # target, kernels (None: the best), cases
    (targets.CALL, None, ["64x10"]),
    (targets.AVX2_SHORT, "avx2", SHORT),
    (targets.AVX2_LONG, "avx2", LONG_ROWS),
    (targets.BASELINE, "baseline", SHORT),
]
CLANG = [(targets.CLANG, None, ["64x10", *SHORT, *LONG_ROWS])]


def prepare(case, how, operation, threads):
    problem = Problem(case)
    options = dict(problem.options, num_threads=threads)
    if operation == FORWARD:
        compute = repeated(lambda: pyx_xent.cross_entropy(problem.logits, problem.target, **options))
        assert_right(problem, operation, (compute(1), None))
        return compute
    if how == INTO:
        options["grad_out"] = touched_like(problem.logits)
    compute = repeated(lambda: pyx_xent.cross_entropy_with_grad(problem.logits, problem.target, **options))
    loss, gradient = compute(1)
    assert_right(problem, operation, (loss, gradient[problem.sample]))
    return compute


def measure_ratio(target, case, how, other, other_how, operation, threads, budget, rounds):
    pyx_xent.set_num_threads(threads)
    both = [(case, how), (other, other_how)]
    names = [how, INTO] if how != INTO else list(map(str, (case, other)))
    functions = {name: prepare(*one, operation, threads) for name, one in zip(names, both, strict=True)}
    return [record(target, case, operation, *names, by_turns(functions, budget, rounds))]


def measure_ratios(wanted, threads, budget, rounds):
    """Records of each ratio whose first case is `wanted`, as soon as they are there."""
    for target, case, how, other, other_how, operation in tqdm([one for one in RATIOS if wanted(one[1])], unit=" ratios"):
        arguments = target, NAMES[case], how, NAMES[other], other_how, operation
        yield in_a_process(measure_ratio, *arguments, threads, budget, rounds)


def measure_checkout(folder, which, wanted, threads, budget, rounds):
    """Records of `which` (OLDER or CLANG): the time of the package that is built in `folder`, over ours."""
    groups = [(target, isa, [NAMES[name] for name in names if wanted(name)]) for target, isa, names in which]
    with tqdm(total=sum(len(cases) for _, _, cases in groups), unit=" cases") as progress:
        for target, isa, cases in groups:
            if not cases:
                continue
            with Worker(checkout=folder, isa=isa) as theirs, Worker(isa=isa) as ours:
                for case in cases:
                    how = theirs, ours, threads, budget, rounds
                    yield [_theirs_and_ours(target, case, operation, *how) for operation in (FORWARD, GRADIENT)]
                    progress.update()


def _theirs_and_ours(target, case, operation, theirs, ours, threads, budget, rounds):
    functions = {"the other checkout": theirs, OURS: ours}
    problem = Problem(case)
    for worker in functions.values():
        worker.prepare(case, operation, threads, OURS if operation == FORWARD else REUSED)
        worker(1)
        assert_right(problem, operation, worker.fetch())
    turns = by_turns(functions, budget, rounds)
    for worker in functions.values():
        worker.forget()
    return record(target, case, operation, *functions, turns)


IMPORTING = """
import time, numpy
start = time.perf_counter()
import pyx_xent
print(time.perf_counter() - start)
"""


def seconds_of_import(count=1):
    # With byte code kept, as where nothing is set: else each child compiles our modules anew, and that is what is timed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", IMPORTING]
    children = (subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True) for _ in range(count))
    return sum(float(child.stdout) for child in children)


def measure_import(rounds=ROUNDS):
    """One record: the milliseconds of `import pyx_xent` in a process that has NumPy."""
    seconds_of_import()  # files are read from the disk
    turns = Turns({"import pyx_xent": [seconds_of_import() for _ in range(rounds)]})
    seconds = statistics.median(turns.seconds["import pyx_xent"])
    yield [{
        **targets.IMPORT._asdict(), "case": "", "operation": "", "numerator": "import pyx_xent", "denominator": "",
        "seconds": [seconds], "figure": seconds * 1e3, "remarks": turns.remarks,
    }]  # fmt: skip
