"""What we hold our times against, and what a run found. A table for the report: nothing here measures, nothing fails."""

from collections.abc import Callable
from dataclasses import dataclass

from . import roofline
from .cases import FORWARD, GRADIENT
from .peers import OURS, REUSED, TORCH_OURS

HEADINGS = ("case", "", "target", "found", "")
PLAIN = "1024x32000"  # what an option may cost is told against this one
EAGER, BEST = "torch eager", "torch eager, THP_MEM_ALLOC_ENABLE=1"
SKLEARN = "scikit-learn HalfMultinomialLoss"


@dataclass(frozen=True)
class Figure:
    what: str
    sign: str
    text: str
    of: Callable  # of a Row, of the same peer's in the case PLAIN, and of TORCH_OURS in the same case


OF_LIMIT = Figure("share of the limit", "≥", "{:.0%}", lambda row, plain, bridge: row.fraction)
OVER_OURS = Figure("its time over ours", "≥", "{:.1f} ×", lambda row, plain, bridge: row.ratio)
ONE_CALL = Figure("one call", "≤", "{:.2f} µs", lambda row, plain, bridge: row.median * 1e6)
OVER_PLAIN = Figure(
    f"its time over that of {PLAIN}", "≤", "{:.2f} ×", lambda row, plain, bridge: plain and row.median / plain.median
)
OVER_BRIDGE = Figure(
    f"its time over that of {TORCH_OURS}", "≥", "{:.1f} ×", lambda row, plain, bridge: bridge and row.median / bridge.median
)

TARGETS = [  # case, operation, whose, which figure, at least or at most
    ("2048x32000", FORWARD, OURS, OF_LIMIT, 0.90),
    ("2048x32000", GRADIENT, REUSED, OF_LIMIT, 0.85),
    ("2048x32000", GRADIENT, "pyx_xent, in place", OF_LIMIT, 0.90),
    ("2048x32000", GRADIENT, EAGER, OVER_OURS, 15),
    ("2048x32000", GRADIENT, BEST, OVER_OURS, 6),
    ("2048x32000", GRADIENT, "torch.compile", OVER_OURS, 3),
    ("2048x32000", GRADIENT, "JAX, optax", OVER_OURS, 6),
    ("2048x32000", GRADIENT, "Numba", OVER_OURS, 3),
    ("2048x32000", GRADIENT, SKLEARN, OVER_OURS, 10),
    ("2048x32000", GRADIENT, "NumPy textbook", OVER_OURS, 6),
    ("2048x32000", FORWARD, "pyx_xent, avx2", OF_LIMIT, 0.85),
    ("2048x32000", GRADIENT, "pyx_xent, avx2", OF_LIMIT, 0.70),
    ("256x1000", FORWARD, "pyx_xent, 1 thread", OF_LIMIT, 0.90),
    ("256x1000", GRADIENT, "pyx_xent, 1 thread", OF_LIMIT, 0.90),
    ("64x10", GRADIENT, OURS, ONE_CALL, 2.5),
    ("64x10", GRADIENT, SKLEARN, OVER_OURS, 2),
    ("64x10", GRADIENT, EAGER, OVER_OURS, 8),
    ("65536x10", GRADIENT, EAGER, OVER_OURS, 10),
    ("65536x10", GRADIENT, SKLEARN, OVER_OURS, 5),
    ("8x21x256x256", GRADIENT, REUSED, OF_LIMIT, 0.75),
    ("8x21x256x256", GRADIENT, EAGER, OVER_OURS, 15),
    ("512x32000-float64", GRADIENT, REUSED, OF_LIMIT, 0.80),
    ("512x32000-float64", GRADIENT, EAGER, OVER_OURS, 8),
    ("1024x32000-bfloat16", GRADIENT, EAGER, OVER_OURS, 6),
    ("1024x32000-float16", GRADIENT, EAGER, OVER_OURS, 6),
    ("1024x32000-soft", GRADIENT, EAGER, OVER_OURS, 10),
    ("1024x32000-smoothing", GRADIENT, REUSED, OVER_PLAIN, 1.1),
    ("1024x32000-weights", GRADIENT, REUSED, OVER_PLAIN, 1.1),
    ("1024x32000-ignored50", GRADIENT, REUSED, OVER_PLAIN, 0.6),
    *(
        (case, GRADIENT, whose, OVER_BRIDGE, wanted)
        for cases, eager, best in (
            (("2048x32000", "1024x50257", "512x128256"), 10, 4),
            (("2048x32000-bfloat16", "1024x50257-bfloat16", "512x128256-bfloat16"), 5, 5),
            (("8x21x256x256",), 10, 10),
            (("256x1000",), 2.5, None),
            (("64x10",), 1, None),
        )
        for case in cases
        for whose, wanted in ((EAGER, eager), (BEST, best))
        if wanted  # the smallest have no setting of the allocator
    ),
]


def table(groups):
    """Cells of each target that the run has measured."""
    rows = {(row.info["case"], row.info["operation"], row.name): row for group in groups.values() for row in group}
    for case, operation, name, figure, wanted in TARGETS:
        if row := rows.get((case, operation, name)):
            found = figure.of(row, rows.get((PLAIN, operation, name)), rows.get((case, operation, TORCH_OURS)))
            if found is not None:
                met = found >= wanted if figure.sign == "≥" else found <= wanted
                target = f"{figure.sign} {figure.text.format(wanted)}"
                yield case, f"{operation}, {name}: {figure.what}", target, figure.text.format(found), "" if met else "missed"


def share(case, operation):
    """The share of the limit that `python -m benchmarks limits` is to find, or None where nothing was asked for."""
    by_hand = roofline.by_hand_kind(case) is not None
    if case.option == "soft":
        return 0.80 if operation == GRADIENT else None
    if case.option:
        return None
    if by_hand:
        return 0.75
    if len(case.shape) > 2:
        return 0.65
    if case.dtype == "float64":
        return 0.80
    if case.dtype == "float32" and not roofline.in_cache(case):
        return 0.93 if operation == FORWARD else 0.90
    return None


def torch_ratio(case, seconds):
    """How many times as long as pyx_xent.torch PyTorch is to take, in its better setting; `seconds` of our call."""
    if case.shape == (1024, 32000) and case.dtype in ("bfloat16", "float16"):
        return 4.5
    if case.elements >= 128 * 100:
        return 1.5
    return 0.95 if seconds < 30e-6 else 1.0


OTHER_PEERS_RATIO = 1.5  # of JAX, scikit-learn, torch.compile, Numba
SOFTMAX_RATIO = 1.0  # of PyTorch's softmax and log_softmax, and their backwards
