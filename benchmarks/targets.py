"""What we hold our times against, and what a run found. A table for the report: nothing here measures, nothing fails."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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


# --- what `python -m benchmarks turns` is to find


class Target(NamedTuple):
    row: str  # of the table of figures
    sign: str
    wanted: float | None  # None: nothing was asked for


BY_HAND = "hand-written / ours: short rows, few classes, planes, bfloat16"
LONG_ROWS = "memory / ours: float32 beyond the caches"
PROBABILITIES = "read two, write one / ours: class probabilities"
DOUBLE = "slower of memory, arithmetic / ours: float64 beyond the caches"
MANY_PLANES = "memory / ours: planes with 150 classes"
OTHER_LIMITS = "limit / ours: without a target"
LOSS = "PyTorch eager / ours: loss, and with its gradient"
HALF = "PyTorch eager / ours: bfloat16, float16 1024x32000"
SOFTMAX = Target("PyTorch / ours: softmax, log_softmax, their backwards", "≥", 1.0)
OTHERS = Target("JAX, scikit-learn, torch.compile, Numba / ours", "≥", 1.5)
OPTIONS = Target("label smoothing, class weights / plain: long rows", "≤", 1.05)
FRESH = Target("fresh gradient / grad_out=", "≤", 1.15)
CHANNELS_LAST = Target("channels_last / planes", "≤", 1.1)
CALL = Target("older checkout / ours: one call, 64x10", "≥", 1 / 0.85)
AVX2_SHORT = Target("older checkout / ours: avx2, short rows", "≥", 2.0)
AVX2_LONG = Target("older checkout / ours: avx2, long rows", "≥", 1.0)
BASELINE = Target("older checkout / ours: baseline, short rows", "≥", 1.3)
CLANG = Target("clang's build / ours", "≤", 1.15)
IMPORT = Target("import after NumPy, ms", "≤", 5.0)
ROWS = [
    getattr(one, "row", one)
    for one in (
        BY_HAND, LOSS, OTHERS, SOFTMAX, LONG_ROWS, OPTIONS, PROBABILITIES, HALF, DOUBLE, MANY_PLANES, FRESH, CHANNELS_LAST,
        AVX2_SHORT, AVX2_LONG, BASELINE, CALL, CLANG, IMPORT, OTHER_LIMITS,
    )
]  # fmt: skip


def of_limit(case, operation):
    """(Target, beginnings of the names of the limits that it is told against)."""
    memory = tuple(roofline.MEMORY)
    if roofline.by_hand_kind(case) is not None:
        return Target(BY_HAND, "≥", 0.75), (roofline.BY_HAND,)
    if case.option == "soft" and operation != FORWARD:
        return Target(PROBABILITIES, "≥", 0.80), memory
    if not case.option and not roofline.in_cache(case):
        if len(case.shape) > 2:
            return Target(MANY_PLANES, "≥", 0.65), memory
        if case.dtype == "float64":
            return Target(DOUBLE, "≥", 0.80), ("limit",)
        if case.dtype == "float32":
            return Target(LONG_ROWS, "≥", 0.93 if operation == FORWARD else 0.90), memory
    return Target(OTHER_LIMITS, "≥", None), ("limit",)


def of_torch(case, seconds):
    """Target for PyTorch's loss, in either setting of its allocator; `seconds` of our call."""
    if case.shape == (1024, 32000) and case.dtype in ("bfloat16", "float16"):
        return Target(HALF, "≥", 4.5)
    if case.elements >= 128 * 100:
        return Target(LOSS, "≥", 1.5)
    return Target(LOSS, "≥", 0.95 if seconds < 30e-6 else 1.0)
