"""Calls without the memory they would need: each works or raises MemoryError with given outputs untouched, and all goes on."""

import resource
from collections import Counter

import numpy as np

import pyx_xent as px

from .fuzz import flattened

ROWS, CLASSES = 3000, 5000  # 60 MB: more than malloc keeps for the next array
FILL = 7


def used():
    """Bytes of this process's address space."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def calls():
    """{what: (function of given outputs, outputs)}"""
    rng = np.random.default_rng(0)
    logits = rng.random((ROWS, CLASSES), np.float32)
    strided = rng.random((300, 2 * CLASSES, 20), np.float32)[:, ::2, ::2].transpose(2, 1, 0)[::-1]
    target = rng.integers(0, CLASSES, ROWS)
    few = rng.integers(0, 100, (10, 300)).astype(np.int8)
    soft = np.full((ROWS, CLASSES), 1 / CLASSES, np.float32)
    hidden, weight = rng.random((ROWS, 64), np.float32), rng.random((CLASSES, 64), np.float32)

    def gradient():
        return {"grad_out": np.full_like(logits, FILL)}

    return {
        "fresh gradient": (lambda: px.cross_entropy_with_grad(logits, target), {}),
        "given gradient": (lambda **out: px.cross_entropy_with_grad(logits, target, reduction="none", **out), gradient()),
        "big-endian logits": (lambda: px.cross_entropy(logits.astype(">f4"), target), {}),
        "strided logits": (lambda: px.cross_entropy_with_grad(strided, few, axis=1), {}),
        "class probabilities": (lambda **out: px.cross_entropy_with_grad(logits, soft, **out), gradient()),
        "softmax": (lambda **out: px.softmax(logits, **out), {"out": np.full_like(logits, FILL)}),
        "linear layer": (lambda: px.linear_cross_entropy_with_grad(hidden, weight, target), {}),
    }


def sweep(steps, step_bytes):
    """{what and how it ended: calls}, with 0, 1, 2, ... steps of memory to be had."""
    found = Counter()
    px.reuse_gradients(0)  # what is kept would be enough
    prepared = calls()
    expected = {what: [np.array(a) for a in flattened(call(**outputs))] for what, (call, outputs) in prepared.items()}
    failed = dict.fromkeys(prepared, 0)
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    for step in range(steps):
        for what, (call, outputs) in prepared.items():
            for array in outputs.values():
                array.fill(FILL)
            resource.setrlimit(resource.RLIMIT_AS, (used() + step * step_bytes, unlimited[1]))
            try:
                result = flattened(call(**outputs))
            except MemoryError:
                result = None
            finally:
                resource.setrlimit(resource.RLIMIT_AS, unlimited)
            if result is None:
                assert all((array == FILL).all() for array in outputs.values()), f"{what}: an output has changed"
            else:
                same = all(np.array_equal(one, other) for one, other in zip(result, expected[what], strict=True))
                assert same, f"{what}: another result with {step * step_bytes} bytes"
            found["MemoryError" if result is None else "worked"] += 1
            failed[what] += result is None
    # Calls that are given their outputs need next to nothing.
    never = [what for what, (_, outputs) in prepared.items() if not outputs and not failed[what]]
    assert not never, f"never without memory: {never}"
    return dict(found)
