"""A linear layer and its loss: ours without the logits, PyTorch's two ways, and the matrix products that nobody can do without.

Each round calls everybody once, by turns, because the machine drifts over the minutes that this takes. Before that, everybody's
loss and gradients of the first rows are compared with the float64 reference.
"""

import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import numpy as np
from tqdm import tqdm

import pyx_xent
from pyx_xent import _memory, reference

from . import memory
from .cases import FORWARD, GRADIENT, numpy_dtype
from .peers import OURS, TORCH_OURS, torch_tensor
from .results import duration
from .worker import in_a_process

CHECKED = 40  # rows
PRODUCTS = "matrix products, NumPy"
TORCH_PRODUCTS = "matrix products, PyTorch"
LOGITS = "PyTorch, from logits"
CHUNKS = "PyTorch, LinearCrossEntropyOptions()"
BY_NUMPY = f"{TORCH_OURS}, set_matmul('numpy')"
BY_TORCH = f"{TORCH_OURS}, set_matmul('torch')"
MEDIUM = f"{TORCH_OURS}, medium precision"  # torch.set_float32_matmul_precision("medium"): products in bfloat16
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest entry


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    classes: int
    reason: str
    dtype: str = "float32"
    ignored: float = 0.0
    shift: bool = False
    rounds: int = 1
    peak: bool = False  # whether memory is measured, too
    peers: tuple[str, ...] = (PRODUCTS, OURS, TORCH_PRODUCTS, TORCH_OURS, BY_NUMPY, BY_TORCH, MEDIUM, LOGITS, CHUNKS)
    operations: tuple[str, ...] = (GRADIENT,)

    def __str__(self):
        parts = [
            f"{self.rows}x{self.width}x{self.classes}", "" if self.dtype == "float32" else self.dtype,
            "shift" if self.shift else "", f"ignored{self.ignored:.0%}" if self.ignored else "",
        ]  # fmt: skip
        return "-".join(filter(None, parts))


WITHOUT_LOGITS = (OURS, TORCH_OURS, CHUNKS)
CASES = [
    Case(2048, 768, 50257, "GPT-2's head", rounds=4, peak=True, operations=(FORWARD, GRADIENT)),
    Case(2048, 768, 50257, "GPT-2's head", "bfloat16", rounds=2, peers=(TORCH_PRODUCTS, TORCH_OURS, LOGITS, CHUNKS)),
    Case(4096, 1024, 128256, "a 128k vocabulary: 2.1 GB of logits"),
    Case(8192, 256, 262144, "the largest vocabulary: 8.6 GB of logits", shift=True, peers=(PRODUCTS, OURS, TORCH_OURS)),
    Case(8192, 256, 262144, "40 % of it a prompt", ignored=0.4, shift=True, peak=True, peers=WITHOUT_LOGITS),
]


class Problem:
    """The arrays of a case, the same each time."""

    def __init__(self, case):
        rng = np.random.default_rng(0)
        dtype = numpy_dtype(case.dtype)
        self.case = case
        self.hidden = rng.standard_normal((case.rows, case.width), np.float32).astype(dtype)
        self.weight = (0.05 * rng.standard_normal((case.classes, case.width), np.float32)).astype(dtype)
        self.target = rng.integers(0, case.classes, case.rows)
        self.target[rng.permutation(case.rows)[: round(case.ignored * case.rows)]] = -100

    def first_rows(self):
        found = object.__new__(Problem)
        found.case = replace(self.case, rows=CHECKED)
        found.hidden, found.weight, found.target = self.hidden[:CHECKED], self.weight, self.target[:CHECKED]
        return found

    def expected(self):
        """(loss, gradients of hidden and weight) in float64."""
        hidden, weight, target = self.hidden.astype(float), self.weight.astype(float), self.target
        skipped = np.zeros_like(hidden[:1])
        if self.case.shift:
            hidden, target = hidden[:-1], target[1:]
        loss, gradient = reference.cross_entropy_with_grad(hidden @ weight.T, target)
        of_hidden = gradient @ weight
        return loss, np.concatenate([of_hidden, skipped]) if self.case.shift else of_hidden, gradient.T @ hidden


def touched(shape, dtype):
    """Memory that the system has cleared already: what that takes is nobody's here."""
    return np.full(shape, 1, dtype)


def numpy_products(problem, operation, threads):
    logits = touched((len(problem.hidden), len(problem.weight)), problem.hidden.dtype)
    of_hidden, of_weight = (touched(array.shape, array.dtype) for array in (problem.hidden, problem.weight))

    def compute():
        np.matmul(problem.hidden, problem.weight.T, out=logits)
        if operation == GRADIENT:
            np.matmul(logits, problem.weight, out=of_hidden)
            np.matmul(logits.T, problem.hidden, out=of_weight)

    return compute


def torch_products(problem, operation, threads):
    import torch

    torch.set_num_threads(threads)
    hidden, weight = torch_tensor(problem.hidden), torch_tensor(problem.weight)
    logits = torch.ones(len(hidden), len(weight), dtype=hidden.dtype)
    of_hidden, of_weight = torch.ones_like(hidden), torch.ones_like(weight)

    def compute():
        torch.mm(hidden, weight.T, out=logits)
        if operation == GRADIENT:
            torch.mm(logits, weight, out=of_hidden)
            torch.mm(logits.T, hidden, out=of_weight)

    return compute


def ours(problem, operation, threads):
    options = {"shift": problem.case.shift, "num_threads": threads}
    arguments = problem.hidden, problem.weight, problem.target
    if operation == FORWARD:
        return lambda: (pyx_xent.linear_cross_entropy(*arguments, **options), None, None)
    places = *(touched(array.shape, array.dtype) for array in (problem.hidden, problem.weight)), None

    def compute():
        loss, gradients = pyx_xent.linear_cross_entropy_with_grad(*arguments, **options, grad_out=places)
        return loss, *gradients[:2]

    return compute


def torch_function(problem, operation, threads, function):
    import torch

    torch.set_num_threads(threads)
    hidden, weight = (torch_tensor(a).requires_grad_(operation == GRADIENT) for a in (problem.hidden, problem.weight))
    target = torch.from_numpy(problem.target)

    def compute():
        hidden.grad = weight.grad = None
        loss = function(hidden, weight, target)
        if operation == FORWARD:
            return loss.item(), None, None
        loss.backward()
        return loss.item(), hidden.grad, weight.grad

    return compute


def torch_ours(problem, operation, threads, library="auto", precision="highest"):
    import torch

    import pyx_xent.torch

    compute = torch_function(
        problem, operation, threads, lambda *a: pyx_xent.torch.linear_cross_entropy(*a, shift=problem.case.shift)
    )

    def compute_so():
        pyx_xent.torch.set_matmul(library)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return compute()
        finally:
            pyx_xent.torch.set_matmul("auto")
            torch.set_float32_matmul_precision(before)

    return compute_so


def torch_logits(problem, operation, threads):
    import torch

    return torch_function(problem, operation, threads, torch.nn.functional.linear_cross_entropy)


def torch_chunks(problem, operation, threads):
    import torch

    options = torch.nn.LinearCrossEntropyOptions()

    def loss_of(hidden, weight, target):
        if problem.case.shift:  # PyTorch's function has no such option
            hidden, target = hidden[:-1], target[1:]
        return torch.nn.functional.linear_cross_entropy(hidden, weight, target, options=options)

    return torch_function(problem, operation, threads, loss_of)


PEERS = {
    PRODUCTS: numpy_products,
    OURS: ours,
    TORCH_PRODUCTS: torch_products,
    TORCH_OURS: torch_ours,
    BY_NUMPY: partial(torch_ours, library="numpy"),
    BY_TORCH: partial(torch_ours, library="torch"),
    MEDIUM: partial(torch_ours, precision="medium"),
    LOGITS: torch_logits,
    CHUNKS: torch_chunks,
}


def tolerance(name, case):
    return TOLERANCE["bfloat16" if name == MEDIUM else case.dtype]


def assert_right(problem, operation, name, answer):
    for found, expected in zip(answer, problem.expected(), strict=True):
        if operation == GRADIENT or np.ndim(expected) == 0:
            largest = np.abs(expected).max()
            found = found.double().numpy() if hasattr(found, "double") else found
            assert np.abs(found - expected).max() <= tolerance(name, problem.case) * largest, (found, expected)


def names(case):
    return [name for name in case.peers if find_spec("torch") or name in (PRODUCTS, OURS)]


def measure_times(case, operation, threads):
    """({name: seconds of each round}, who multiplied)"""
    problem = Problem(case)
    small = problem.first_rows()
    computed, losses = {}, []
    for name in names(case):
        if name not in (PRODUCTS, TORCH_PRODUCTS):
            assert_right(small, operation, name, PEERS[name](small, operation, threads)())
        computed[name] = PEERS[name](problem, operation, threads)
    seconds = {name: [] for name in computed}
    for _ in range(case.rounds + (case.rounds > 1)):  # the first round gets memory, where there are others
        for name, compute in computed.items():
            start = time.perf_counter()
            answer = compute()
            seconds[name].append(time.perf_counter() - start)
            if answer is not None:
                losses.append((tolerance(name, case), float(answer[0])))
            del answer
    for limit, _ in losses:  # of all that are as exact or more
        some = [loss for exact, loss in losses if exact <= limit]
        assert max(some) - min(some) <= limit * abs(some[0]), losses
    return {name: found[case.rounds > 1 :] for name, found in seconds.items()}, multiplied_by()


def multiplied_by():
    """The BLAS and its kernels, and which of them tensors had, as show_config() says it."""
    config = pyx_xent.show_config()
    return "; ".join([*config["blas"], config["matmul"]])


def extra_memory(case, operation, name, threads):
    """Bytes of one call beyond its inputs, its gradients and what BLAS keeps."""
    compute = PEERS[name](Problem(case), operation, threads)
    held = compute()
    _memory.forget()  # the buffer for logits, which the second call then takes anew
    memory.reset_mark()
    before = memory.resident("VmRSS")
    del held  # its gradients are replaced by those of the second call
    compute()
    return max(0, memory.resident("VmHWM") - before)


def measure(threads):
    """A record for each case, operation and peer."""
    found = []
    with tqdm(total=sum(len(case.operations) for case in CASES), unit=" groups") as progress:
        for case in CASES:
            for operation in case.operations:
                seconds, blas = in_a_process(measure_times, case, operation, threads)
                for name, rounds in seconds.items():
                    torchs = TORCH_PRODUCTS in seconds and name not in (PRODUCTS, OURS)
                    base = seconds.get(TORCH_PRODUCTS if torchs else PRODUCTS)
                    extra = None
                    if memory.resident("VmHWM") is not None and case.peak and name not in (PRODUCTS, TORCH_PRODUCTS):
                        extra = in_a_process(extra_memory, case, operation, name, threads)
                    found.append({
                        "case": str(case), "reason": case.reason, "operation": operation, "name": name, "min": min(rounds),
                        "median": statistics.median(rounds), "over_products": base and min(rounds) / min(base), "memory": extra,
                        "blas": blas,
                    })  # fmt: skip
                progress.update()
    return found


HEADINGS = ("", "fastest", "median", "over its products", "memory beside inputs and gradients")


def groups(records):
    """{heading: cells of each peer, from fast to slow}"""
    found = {}
    for record in records:
        heading = f"{record['operation']}, {record['case']} ({record['reason']}; {record['blas']})"
        found.setdefault(heading, []).append(record)
    return {heading: [_cells(one) for one in sorted(some, key=lambda one: one["min"])] for heading, some in found.items()}


def _cells(record):
    return (
        record["name"], duration(record["min"]), duration(record["median"]),
        "" if record["over_products"] is None else f"{record['over_products']:.2f} ×",
        "" if record["memory"] is None else f"{record['memory'] / 1e6:.0f} MB",
    )  # fmt: skip
