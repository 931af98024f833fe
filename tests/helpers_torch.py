"""What the tests of pyx_xent.torch have in common. Imported only where PyTorch is installed."""

import importlib
import itertools

import pytest

torch = pytest.importorskip("torch")
ours = importlib.import_module("pyx_xent.torch")
FlopCounterMode = importlib.import_module("torch.utils.flop_counter").FlopCounterMode
F = torch.nn.functional
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
GRID = list(itertools.product(["index", "soft"], ["none", "mean", "sum"], [False, True], [0.0, 0.3], [(5,), (4, 5), (2, 5, 3)]))


def problem(generator, kind, weighted, shape, dtype=torch.float64):
    """logits that require grad, target, weight"""
    rows = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    classes = shape[0] if len(shape) == 1 else shape[1]
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    if kind == "soft":
        target = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    else:
        target = torch.randint(classes, rows, generator=generator)
        if target.numel() > 2:
            target.view(-1)[1] = -100
    weight = (0.5 + torch.rand(classes, generator=generator, dtype=torch.float64)).to(dtype) if weighted else None
    return logits, target, weight


def both(function, theirs, inputs, *, seed=3):
    """[(output, gradients of what requires grad), ...] of the two functions for copies of the inputs."""
    found = []
    for f in (function, theirs):
        mine = [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs]
        out = f(*mine)
        wanted = [t for t in mine if isinstance(t, torch.Tensor) and t.requires_grad]
        g = torch.rand(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
        found.append((out.detach(), torch.autograd.grad(out, wanted, g) if out.requires_grad else ()))
    return found


def assert_equal(found, **tolerance):
    (out, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(out, expected, equal_nan=True, **tolerance)
    assert len(gradients) == len(expected_gradients)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, equal_nan=True, **tolerance)


def operator(name, variant=""):
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    return next(op for op in op_db if op.name == f"nn.functional.{name}" and op.variant_test_name == variant)
