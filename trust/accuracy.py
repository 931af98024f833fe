"""Losses, softmax and gradients of this package and of others, in units in the last place of a rigorous reference.

The reference is Arb's, through python-flint: every number is computed with an error bound far below the digits that count.
Rows are rounded to their dtype before anybody sees them. Only results that are normal numbers count.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

import pyx_xent as px
from pyx_xent import _dispatch

from .exp import unit_in_the_last_place

BITS = 192
REGIMES = {  # (standard deviation, constant, how far the target's logit lies above all others)
    "spread 1": (1, 0, None),
    "spread 5": (5, 0, None),
    "spread 20": (20, 0, None),
    "offset 1e4": (5, 1e4, None),
    "gap 12": (1, 0, 12),
    "gap 25": (1, 0, 25),
    "gap 60": (1, 0, 60),
}
ROWS = {2: 20_000, 10: 4_000, 1000: 100, 50257: 8}  # classes: rows
DTYPES = ("float32", "float64")
QUANTITIES = ("loss", "softmax", "gradient", "row sum")
# What we promise, in ULP; of row sums, the largest of a gradient's row. A row sum has what eight terms lose that are added in
# float before they go to a double: with four it stays below 1e-7, and forward takes up to 40 % longer.
PROMISED = {"float32": (2, 4, 4, 2e-7), "float64": (3, 4, 5, 1e-15)}


def problem(regime, classes, dtype, seed):
    """(logits, target)"""
    rng = np.random.default_rng((seed, list(REGIMES).index(regime), classes))
    spread, constant, gap = REGIMES[regime]
    rows = ROWS[classes]
    logits = constant + spread * rng.standard_normal((rows, classes))
    target = rng.integers(0, classes, rows)
    if gap is not None:
        own = np.arange(rows), target
        logits[own] = -np.inf
        logits[own] = logits.max(axis=1) + gap
    return logits.astype(dtype), target


@dataclass
class Exact:
    """Correctly rounded values and what that rounding took away, so that errors of doubles can be told, too."""

    values: np.ndarray
    rest: np.ndarray

    def error(self, found):
        """The largest, in ULP."""
        wide = np.longdouble
        exact = self.values.astype(wide) + self.rest
        normal = np.abs(self.values) >= np.finfo(found.dtype).tiny
        difference = np.abs((found.astype(wide) - self.values) - self.rest)
        return float((difference[normal] / unit_in_the_last_place(exact[normal], found.dtype)).max(initial=0))


def split(number):
    """(nearest double, nearest double to what is left) of an Arb number"""
    from flint import arb

    assert number.rel_accuracy_bits() > 110, number
    high = float(number.mid())
    return high, float((number - arb(high)).mid())


def exact(logits, target):
    """{quantity: Exact}: loss of each row, softmax, gradient of the sum of the losses."""
    import flint

    flint.ctx.prec = BITS
    losses, probabilities, own = [], [], []
    for row, t in zip(logits.tolist(), target.tolist(), strict=True):
        largest = max(row)
        terms = [(flint.arb(x) - largest).exp() for x in row]
        total = sum(terms, flint.arb(0))
        others = sum(terms[:t] + terms[t + 1 :], flint.arb(0))
        losses.append(split((others / terms[t]).log1p()))
        probabilities.append([split(term / total) for term in terms])
        own.append(split(-others / total))
    found = {"loss": Exact(*np.array(losses).T), "softmax": Exact(*np.moveaxis(np.array(probabilities), -1, 0))}
    gradient = Exact(found["softmax"].values.copy(), found["softmax"].rest.copy())
    at = np.arange(len(target)), target
    gradient.values[at], gradient.rest[at] = np.array(own).T
    return {**found, "gradient": gradient}


# Who computes them: (loss of each row, softmax, gradient of the sum of the losses)


def ours(logits, target):
    losses, gradient = px.cross_entropy_with_grad(logits, target, reduction="none")
    return losses, px.softmax(logits), gradient


def pytorch(logits, target):
    import torch

    x, target = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(target)
    losses = torch.nn.functional.cross_entropy(x, target, reduction="none")
    losses.sum().backward()
    return losses.detach().numpy(), torch.softmax(x.detach(), 1).numpy(), x.grad.numpy()


def scikit_learn(logits, target):
    from sklearn._loss import HalfMultinomialLoss

    loss = HalfMultinomialLoss(n_classes=logits.shape[1])
    target = target.astype(logits.dtype)
    losses, gradient = loss.loss_gradient(target, logits)
    _, probabilities = loss.gradient_proba(target, logits)
    return losses, probabilities, gradient


def scipy(logits, target):
    from scipy.special import log_softmax, softmax

    at = np.arange(len(target)), target
    probabilities = softmax(logits, axis=1)
    gradient = probabilities.copy()
    gradient[at] -= 1
    return -log_softmax(logits, axis=1)[at], probabilities, gradient


def optax(logits, target):
    import jax
    from optax import softmax_cross_entropy_with_integer_labels as losses_of

    jax.config.update("jax_enable_x64", True)
    gradient = jax.grad(lambda x: losses_of(x, target).sum())(logits)
    return tuple(np.asarray(array) for array in (losses_of(logits, target), jax.nn.softmax(logits), gradient))


PEERS = {
    "PyTorch": ("torch", pytorch),
    "scikit-learn": ("sklearn", scikit_learn),
    "SciPy": ("scipy", scipy),
    "optax": ("optax", optax),
}


def errors(found, expected):
    """In the order of QUANTITIES."""
    row_sum = np.abs(found[-1].sum(axis=1, dtype=np.longdouble)).max()
    return *(exact.error(array) for exact, array in zip(expected.values(), found, strict=True)), float(row_sum)


def measure(job):
    """{who: errors} of one regime, number of classes and dtype."""
    regime, classes, dtype, seed = job
    logits, target = problem(regime, classes, dtype, seed)
    expected = exact(logits, target)
    mine = []
    for isa in _dispatch.supported:
        with _dispatch.use(isa):
            mine.append(errors(ours(logits, target), expected))
    found = {"pyx_xent": tuple(max(column) for column in zip(*mine, strict=True))}  # the worst of all instruction sets
    for name, (module, function) in PEERS.items():
        if find_spec(module):
            found[name] = errors(function(logits, target), expected)
    return found


def jobs(seed):
    return [(regime, classes, dtype, seed) for dtype in DTYPES for classes in ROWS for regime in REGIMES]


def summary(measured, dtype):
    """(what was done, what was found) for {job: errors of each}; SystemExit where more was promised."""
    of_dtype = {job: one["pyx_xent"] for job, one in measured.items() if job[2] == dtype}
    worst = [max(column) for column in zip(*of_dtype.values(), strict=True)]
    *ulps, row_sum = (f"{what} {number:.2g}" for what, number in zip(QUANTITIES, worst, strict=True))
    told = f"at most {', '.join(ulps)} ULP, {row_sum}"
    if any(error > promised for error, promised in zip(worst, PROMISED[dtype], strict=True)):
        raise SystemExit(f"{dtype}: {told}; promised {PROMISED[dtype]}")
    rows = sum(ROWS[classes] for _, classes, _, _ in of_dtype)
    return f"{dtype}, {rows:,} rows of {len(of_dtype)} kinds, all instruction sets", told


NOTE = (
    "Loss of each row, softmax, gradient of the sum of the losses: largest error in units in the last place, against Arb "
    "(python-flint). Row sum: the largest sum of a gradient's row, which is exactly 0. pyx_xent: the worst of its instruction "
    "sets. spread: standard deviation of normal logits; offset: added to them (spread 5); gap: the target's logit above all "
    "others (spread 1). SciPy has softmax and log_softmax, from which the others were made. Results that are no normal numbers "
    "do not count."
)


def table(measured):
    """Cells, with NOTE for below."""
    names = list(next(iter(measured.values())))
    lines = [[f"ULP: {' / '.join(QUANTITIES[:3])}, {QUANTITIES[3]}", *names]]
    for (regime, classes, dtype, _), one in measured.items():
        cells = (f"{' / '.join(f'{number:.2g}' for number in one[name][:3])}, {one[name][3]:.1g}" for name in names)
        lines.append([f"{dtype}, {classes:,} classes, {regime}", *cells])
    return lines
