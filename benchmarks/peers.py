"""Who computes mean cross-entropy, alone ("forward") or with its gradient with respect to the logits ("loss + gradient").

A peer's `make(problem, operation, threads)` prepares what it would have at hand in use and returns a function without
arguments; only that is timed. `answer(problem, result)` turns what it returned into (mean loss, gradient[problem.sample] or
None) for the comparison with the reference. Peers that are not installed stay in PEERS, with `missing` naming the package.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

import pyx_xent
from pyx_xent import _dispatch

from .cases import FORWARD, GRADIENT, Case

PEERS = {}
REUSED = "pyx_xent, grad_out="  # ratios are told against this one, or against OURS where there is no gradient
OURS = "pyx_xent"
TORCH_OURS = "pyx_xent.torch"


def numpy_answer(problem, result):
    loss, gradient = result
    return float(loss), None if gradient is None else np.asarray(gradient)[problem.sample]


@dataclass(frozen=True)
class Peer:
    make: Callable
    fits: Callable[[Case, str], bool]  # whether it has a function for that
    answer: Callable = numpy_answer
    modules: tuple[str, ...] = ()
    isa: str | None = None  # ours: the kernels to use

    @property
    def missing(self):
        return next((module for module in self.modules if find_spec(module) is None), None)


def peer(name, fits=lambda case, operation: True, **fields):
    def register(make):
        PEERS[name] = Peer(make, fits, **fields)
        return make

    return register


def index_targets(case, operation):
    return not case.option


# --- ours


def only_gradient(case, operation):
    return operation == GRADIENT


@peer(OURS)
def ours(problem, operation, threads):
    if operation == FORWARD:
        return lambda: (pyx_xent.cross_entropy(problem.logits, problem.target, num_threads=threads, **problem.options), None)
    return lambda: pyx_xent.cross_entropy_with_grad(problem.logits, problem.target, num_threads=threads, **problem.options)


@peer(REUSED, only_gradient)
def ours_reused(problem, operation, threads):
    if operation == FORWARD:
        return ours(problem, operation, threads)
    options = dict(problem.options, grad_out=np.empty_like(problem.logits), num_threads=threads)
    return lambda: pyx_xent.cross_entropy_with_grad(problem.logits, problem.target, **options)


@peer("pyx_xent, in place", only_gradient)
def ours_in_place(problem, operation, threads):
    # From the second call on the logits are the gradient of the call before: small numbers, so that all classes are about
    # equally probable. The kernels take as long for these as for the logits, to 4 % at 10 classes and 1 % at 1000 and more.
    logits = problem.logits.copy()
    options = dict(problem.options, grad_out=logits, num_threads=threads)
    return lambda: pyx_xent.cross_entropy_with_grad(logits, problem.target, **options)


def variants(case, operation):
    return case.variants


for _isa in _dispatch.supported[:-1]:
    peer(f"pyx_xent, {_isa}", variants, isa=_isa)(ours_reused)
peer("pyx_xent, 1 thread", variants)(ours_reused)


# --- NumPy


def textbook(case, operation):
    return not case.option and case.dtype in ("float32", "float64")  # half precision: one would convert first


@peer("NumPy textbook", textbook)
def numpy_textbook(problem, operation, threads):
    logits, target = problem.logits, problem.target
    first, *others = np.indices(target.shape, sparse=True)
    own = (first, target, *others)  # the entries of the targets' classes

    def forward():
        shifted = logits - logits.max(axis=1, keepdims=True)
        return (np.log(np.exp(shifted).sum(axis=1)) - shifted[own]).mean(), None

    def loss_and_gradient():
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        gradient = exponentials / exponentials.sum(axis=1, keepdims=True)
        loss = -np.log(gradient[own]).mean()
        gradient[own] -= 1
        gradient /= target.size
        return loss, gradient

    return forward if operation == FORWARD else loss_and_gradient


# --- Numba


def two_dimensional(case, operation):
    return textbook(case, operation) and len(case.shape) == 2


@peer("Numba", two_dimensional, modules=("numba",))
def numba_loops(problem, operation, threads):
    import numba

    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))

    # What somebody after speed would write: the logits are finite, and without fastmath no sum is vectorised.
    @numba.njit(parallel=True, fastmath=True)
    def forward(logits, target):
        rows, classes = logits.shape
        loss = np.empty(rows, logits.dtype)
        for i in numba.prange(rows):
            row = logits[i]
            largest = row[0]
            for c in range(1, classes):
                largest = max(largest, row[c])
            total = row[0] * 0
            for c in range(classes):
                total += math.exp(row[c] - largest)
            loss[i] = largest + math.log(total) - row[target[i]]
        return loss.mean()

    @numba.njit(parallel=True, fastmath=True)
    def loss_and_gradient(logits, target, gradient):
        rows, classes = logits.shape
        loss = np.empty(rows, logits.dtype)
        for i in numba.prange(rows):
            row, out = logits[i], gradient[i]
            largest = row[0]
            for c in range(1, classes):
                largest = max(largest, row[c])
            total = row[0] * 0
            for c in range(classes):
                out[c] = math.exp(row[c] - largest)
                total += out[c]
            scale = 1 / (total * rows)
            for c in range(classes):
                out[c] *= scale
            out[target[i]] -= row.dtype.type(1 / rows)
            loss[i] = largest + math.log(total) - row[target[i]]
        return loss.mean(), gradient

    logits, target = problem.logits, problem.target
    if operation == FORWARD:
        return lambda: (forward(logits, target), None)
    gradient = np.empty_like(logits)  # used again each time, as ours with grad_out=
    return lambda: loss_and_gradient(logits, target, gradient)


# --- scikit-learn


def mean_of_rows(problem, result):
    """scikit-learn gives the loss of each row and the gradient of their sum; taking the mean is not in its time."""
    loss, gradient = result
    gradient = None if gradient is None else np.asarray(gradient)[problem.sample] / len(problem.target)
    return loss.mean(dtype=np.float64), gradient


@peer("scikit-learn HalfMultinomialLoss", two_dimensional, answer=mean_of_rows, modules=("sklearn",))
def scikit_learn(problem, operation, threads):
    from sklearn._loss import HalfMultinomialLoss

    logits = problem.logits
    criterion = HalfMultinomialLoss(n_classes=logits.shape[1])
    labels = problem.target.astype(logits.dtype)
    loss = np.empty(len(labels), logits.dtype)
    if operation == FORWARD:
        return lambda: (criterion.loss(labels, logits, loss_out=loss, n_threads=threads), None)
    gradient = np.empty_like(logits)
    return lambda: criterion.loss_gradient(labels, logits, loss_out=loss, gradient_out=gradient, n_threads=threads)


# --- PyTorch


def torch_tensor(array):
    """The same memory as a tensor; PyTorch knows no ml_dtypes."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_answer(problem, result):
    import torch

    loss, x = result
    if x is None:
        return loss.item(), None
    return loss.item(), x.grad[torch.from_numpy(problem.sample)].double().numpy()


def torch_function(problem, operation, threads, function):
    import torch

    torch.set_num_threads(threads)
    x, target = torch_tensor(problem.logits), torch.from_numpy(problem.target)
    if problem.case.option == "soft":
        target = torch_tensor(problem.target)
    options = {key: torch_tensor(value) if key == "weight" else value for key, value in problem.options.items()}

    def forward():
        with torch.no_grad():
            return function(x, target, **options), None

    def loss_and_gradient():
        x.grad = None
        loss = function(x, target, **options)
        loss.backward()
        return loss.detach(), x  # not the gradient itself: as in training, nobody holds it when the next one is made

    if operation == FORWARD:
        return forward
    x.requires_grad_()
    return loss_and_gradient


@peer("torch eager", answer=torch_answer, modules=("torch",))
def torch_eager(problem, operation, threads):
    import torch

    return torch_function(problem, operation, threads, torch.nn.functional.cross_entropy)


@peer(TORCH_OURS, answer=torch_answer, modules=("torch",))
def torch_ours(problem, operation, threads):
    import pyx_xent.torch

    return torch_function(problem, operation, threads, pyx_xent.torch.cross_entropy)


def huge_arrays(case, operation):
    return case.logits_bytes >= 2 << 20  # the switch does nothing for smaller ones


@peer("torch eager, THP_MEM_ALLOC_ENABLE=1", huge_arrays, answer=lambda problem, result: result.fetch(), modules=("torch",))
def torch_huge_pages(problem, operation, threads):
    from .worker import huge_pages

    huge_pages().prepare(problem.case, operation, threads, "torch eager")
    return huge_pages()


def compiled_shapes(case, operation):
    """Inductor takes 10 to 60 s for each problem, so it gets the shapes that say most."""
    shapes = [(65536, 10), (256, 1000), (2048, 32000), (512, 32000), (1024, 32000), (8, 21, 256, 256)]
    return case.shape in shapes and operation == GRADIENT


@peer("torch.compile", compiled_shapes, answer=torch_answer, modules=("torch",))
def torch_compile(problem, operation, threads):
    import torch

    torch._dynamo.reset()  # each problem is compiled for itself; after some shapes it would give up and run eagerly
    compiled = torch.compile(torch.nn.functional.cross_entropy, dynamic=False)
    return torch_function(problem, operation, threads, compiled)  # the first call compiles


# --- JAX


@peer("JAX, optax", modules=("jax", "optax"))
def jax_optax(problem, operation, threads):
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)  # or float64 arrays would be rounded to float32
    jax.clear_caches()
    smoothing, weight = problem.options.get("label_smoothing", 0), problem.options.get("weight")

    def mean(x, target, weight):
        x = jnp.moveaxis(x, 1, -1)
        if target.ndim == x.ndim:
            return optax.softmax_cross_entropy(x, jnp.moveaxis(target, 1, -1)).mean()
        if smoothing:
            labels = jax.nn.one_hot(target, x.shape[-1], dtype=x.dtype)
            return optax.softmax_cross_entropy(x, optax.smooth_labels(labels, smoothing)).mean()
        counts = target != -100
        target = jnp.where(counts, target, 0)
        loss = optax.softmax_cross_entropy_with_integer_labels(x, target)
        factor = jnp.where(counts, 1 if weight is None else weight[target], 0).astype(jnp.float32)
        return (loss * factor).sum() / factor.sum() if problem.case.option else loss.mean()

    compute = jax.jit(mean if operation == FORWARD else jax.value_and_grad(mean))
    arrays = [None if array is None else jax.device_put(array) for array in (problem.logits, problem.target, weight)]
    if operation == FORWARD:
        return lambda: (compute(*arrays).block_until_ready(), None)
    return lambda: jax.block_until_ready(compute(*arrays))


def cannot_run(name, case, threads, cpus):
    """None, or why an installed peer has to be left out."""
    if PEERS[name].missing:
        return f"{PEERS[name].missing} is not installed"
    if case.dtype == "bfloat16" and find_spec("ml_dtypes") is None:
        return "ml_dtypes is not installed, so NumPy has no bfloat16"
    if name.startswith("JAX") and threads != cpus:
        return f"JAX cannot be limited to {threads} of {cpus} CPUs in a running process"
    return None
