"""Do our threads slow PyTorch's matrix products, or theirs our loss? Each alone, and by turns, as in training."""

import statistics

import torch

import pyx_xent.torch

from .timing import times


def measure(threads, rows=1024, hidden=512, classes=32000, budget=2.0):
    """{"torch.mm", "loss", "by turns": seconds}: medians; "by turns" is of one product and one loss with its gradient."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, hidden, generator=generator), torch.randn(hidden, classes, generator=generator)
    logits = torch.randn(rows, classes, generator=generator, requires_grad=True)
    target = torch.randint(classes, (rows,), generator=generator)

    def product():
        return torch.mm(a, b, out=out)

    def loss():
        logits.grad = None
        pyx_xent.torch.cross_entropy(logits, target).backward()

    def by_turns():
        product()
        loss()

    out = torch.mm(a, b)
    functions = {"torch.mm": product, "loss": loss, "by turns": by_turns}
    for function in functions.values():
        times(function, budget=0, least=3)
    return {name: statistics.median(times(function, budget)) for name, function in functions.items()}
