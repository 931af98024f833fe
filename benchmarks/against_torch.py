"""Ours and PyTorch's by turns, on the same arrays, from 16 elements to some millions: losses, softmax, and who else has a loss.

"loss"     pyx_xent.torch against PyTorch eager, with and without THP_MEM_ALLOC_ENABLE=1, a process each
"softmax"  softmax, log_softmax and their backwards, as one calls them and with out=
"compile"  pyx_xent.torch against torch.compile, float32
"others"   the NumPy functions against JAX, scikit-learn, Numba
"""

import os
from dataclasses import replace

import numpy as np
from tqdm import tqdm

import pyx_xent
from pyx_xent import reference

from . import targets
from .answers import ENTRY, assert_right
from .cases import CASES, FORWARD, GRADIENT, Case, Problem
from .peers import OURS, PEERS, REUSED, TORCH_OURS, cannot_run, huge_arrays, torch_tensor
from .turns import by_turns, record, repeated
from .worker import SWITCH, in_a_process

EAGER, COMPILED = "torch eager", "torch.compile"
OTHERS = ("JAX, optax", "scikit-learn HalfMultinomialLoss", "Numba")
PARTS = ("loss", "softmax", "compile", "others")
DTYPES = ("float32", "float64", "bfloat16", "float16")
FEW = ["64x10", "128x20", "65536x10", "65536x20", "16x2x64x64"]
MORE = ["4096x50", "8192x64", "128x100", "512x100", "4096x100", "1024x256", "256x1000"]
PLANES = ["8x21x256x256", "2x19x512x1024", "2x150x256x256", "8x21x256x256-channels_last"]
SHAPES = [
    *(case for case in CASES if str(case) in (*FEW, *MORE, *PLANES)),
    Case((200, 3), "iris and its like: three classes"),
    Case((32, 37), "one vector per row and a rest"),
    Case((1000, 37), "the same with enough rows for tiles"),
    Case((300, 150), "a number of rows that fills no tile"),
    Case((777, 131), "nothing divides anything"),
    Case((64, 300), "few rows, a rest of 12"),
    Case((4, 5, 37, 41), "planes of an odd size"),
    Case((2, 64, 50, 50), "many planes that are no multiple of a vector"),
    Case((1, 2, 512, 512), "one binary mask, beyond the second-level cache"),
    Case((8, 1000), "a few pictures of ImageNet"),
    Case((16384, 2), "binary labels: PyTorch's slow path below 16 classes"),
]
LONG = Case((1024, 32000), "a language model's head")  # in half precision: through autograd against PyTorch's best


def all_cases():
    """Every shape in every dtype, and long rows."""
    found = [replace(case, dtype=dtype) for dtype in DTYPES for case in SHAPES]
    return [*found, *(replace(LONG, dtype=dtype) for dtype in DTYPES)]


def checked(name, problem, operation, threads):
    """(function of a count, whether its answer is right). Ours has to be; PyTorch adds up 262,144 float16 losses to nan."""
    compute = PEERS[name].make(problem, operation, threads)
    answer = PEERS[name].answer(problem, compute())
    try:
        assert_right(problem, operation, answer)
    except AssertionError:
        if name in (OURS, REUSED, TORCH_OURS):
            raise
        return repeated(compute), False
    return repeated(compute), True


def softmax_functions(problem, operation, threads):
    """{OURS, EAGER: function} of "softmax", "log_softmax", "... backward", with or without ", out=", and if EAGER is right."""
    import torch

    name, _, out = operation.partition(", ")
    name, _, backward = name.partition(" ")
    inputs = [problem.logits]
    if backward:
        output = getattr(pyx_xent, name)(problem.logits, 1)
        upstream = np.random.default_rng(2).standard_normal(output.shape, np.float32).astype(output.dtype)
        gradient = np.empty_like(output)  # laid out like it
        gradient[...] = upstream
        inputs = [gradient, output]
    tensors = [torch_tensor(array) for array in inputs]
    torch.set_num_threads(threads)
    ours = getattr(pyx_xent, f"{name}_backward" if backward else name)
    aten = getattr(torch.ops.aten, f"_{name}_backward_data" if backward else f"_{name}")
    last = (1, tensors[0].dtype) if backward else (1, False)
    if out:
        place, tensor = np.empty_like(inputs[0]), torch.empty_like(tensors[0])
        argument = "grad_input" if operation.startswith("softmax backward") else "out"
        functions = {
            OURS: lambda: ours(*inputs, 1, out=place, num_threads=threads),
            EAGER: lambda: aten.out(*tensors, *last, **{argument: tensor}),
        }
    else:
        functions = {
            OURS: lambda: ours(*inputs, 1, num_threads=threads),
            EAGER: (lambda: aten(*tensors, *last)) if backward else (lambda: getattr(torch, name)(tensors[0], 1)),
        }
    expected = getattr(reference, f"{name}_backward" if backward else name)(*inputs, 1)
    right = {}
    for key, function in functions.items():
        found = function()
        found = found.astype(float) if isinstance(found, np.ndarray) else found.double().numpy()
        right[key] = np.abs(found - expected).max() <= ENTRY[problem.case.dtype] * np.abs(expected).max()
    assert right[OURS], (operation, str(problem.case))
    return {key: repeated(function) for key, function in functions.items()}, bool(right[EAGER])


SOFTMAX = [
    f"{name}{backward}{out}" for name in ("softmax", "log_softmax") for backward in ("", " backward") for out in ("", ", out=")
]


def measure_case(case, parts, huge, threads, budget, rounds):
    """Records of a case, in a process whose PyTorch has huge pages or not."""
    import torch

    torch.set_num_threads(threads)
    pyx_xent.set_num_threads(threads)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    problem, found = Problem(case), []

    def add(target, operation, ours, functions, right):
        turns = by_turns(functions, budget, rounds)
        (peer,) = functions.keys() - {ours}
        target = target or targets.of_torch(case, turns.medians[ours])
        one = record(target, case, operation, peer, ours, turns, remarks=[] if right else ["its answer is wrong"])
        found.append({**one, "numerator": f"{peer}, {SWITCH}=1"} if huge else one)

    def compare(operation, ours, peers):
        for name in peers:  # one at a time: each library has threads of its own, which wait spinning
            our_function, _ = checked(ours, problem, operation, threads)
            function, right = checked(name, problem, operation, threads)
            add(None if name == EAGER else targets.OTHERS, operation, ours, {ours: our_function, name: function}, right)

    for operation in (FORWARD, GRADIENT):
        if "loss" in parts:
            compare(operation, TORCH_OURS, [EAGER])
        if "compile" in parts and case.dtype == "float32" and not huge:
            compare(operation, TORCH_OURS, [COMPILED])
        if "others" in parts and not huge:
            names = [name for name in OTHERS if PEERS[name].fits(case, operation) and not cannot_run(name, case, threads, cpus)]
            compare(operation, OURS if operation == FORWARD else REUSED, names)
    if "softmax" in parts:
        for operation in SOFTMAX:
            functions, right = softmax_functions(problem, operation, threads)
            add(targets.SOFTMAX, operation, OURS, functions, right)
    return found


def measure(cases, parts, threads, budget, rounds):
    """Records of each case, as soon as they are there. A process for each case and setting of PyTorch's allocator."""
    with tqdm(total=2 * len(cases), unit=" groups") as progress:
        for case in cases:
            for huge in (False, True):
                if not huge or huge_arrays(case, GRADIENT):
                    yield in_a_process(measure_case, case, parts, huge, threads, budget, rounds, huge_pages=huge)
                progress.update()
