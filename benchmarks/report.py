"""Saved times as a Markdown page with plots: docs/benchmarks/report.md. Nothing here measures."""

import json
from pathlib import Path

from . import limits, results, roofline, targets, turns
from . import linear as linear_layer
from .cases import GRADIENT
from .peers import OURS, REUSED, TORCH_OURS

TITLE = "# Cross-entropy on this machine"
# One hue for each peer, ours in black, so that plots and readers keep them apart.
FEW = (REUSED, "pyx_xent, in place", OURS, TORCH_OURS, "torch eager", "torch eager, THP_MEM_ALLOC_ENABLE=1", "torch.compile")
FEW += ("JAX, optax", "NumPy textbook", "Numba", "scikit-learn HalfMultinomialLoss")


def load(files):
    """(machine_info, benchmarks) of files of pytest-benchmark; of a group that several files have, the last is taken."""
    machine, found = None, {}
    for file in files:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
        if machine and data["machine_info"]["xent"]["cpu"] != machine["xent"]["cpu"]:
            raise SystemExit(f"{file}: measured on another machine than the files before it")
        machine = data["machine_info"]
        groups = {}
        for benchmark in data["benchmarks"]:
            groups.setdefault(benchmark["group"], []).append(benchmark)
        found.update(groups)
    return machine, [benchmark for group in found.values() for benchmark in group]


def markdown_table(headings, lines, numbers=True):
    yield "| " + " | ".join(headings) + " |"
    yield "|---" + ("|---:" if numbers else "|---") * (len(headings) - 1) + "|"
    for cells in lines:
        yield "| " + " | ".join(cells) + " |"


def machine_lines(machine):
    about = machine["xent"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    absent = ", ".join(name for name, number in about["versions"].items() if not number)
    cache = about["last_level_cache"] >> 20
    yield f"- machine: {about['cpu']}, {about['cpus']} CPUs, last-level cache {cache} MB, {machine['system']}"
    yield f"- threads: {about['threads']}, kernels: {about['config']['isa_active']}"
    yield f"- versions: CPython {machine['python_version']}, {versions}"
    if absent:
        yield f"- not installed, so not here: {absent}"
    yield f"- the machine's limits: {about['limits']}"


EXPLANATION = """\
Each group ran in one go, on the same arrays. Times are medians of at least 5 rounds (3 for calls slower than 1 s), after
warming up; each answer was compared with a float64 reference first: all losses, and of large cases a sample of the gradient's
rows. GB/s counts only bytes that have to be moved: logits once, class probabilities once, the gradient once. "Of the limit" is
the time of the slowest `limit` row over the peer's own: moving these bytes and doing nothing else, one maximum and one
exponential an element in cache, or the whole computation by hand, called from Python as everybody is; of the ways after " / "
the fastest counts. "Ratio" is the peer's time over that of `pyx_xent` with `grad_out=`. Times drift from run to run; a row
whose median is more than 1.3 times its minimum was repeated, and is marked if it stayed so.
"""


LINEAR_EXPLANATION = """\
Rows x width of hidden x classes. Everybody was called once a round, by turns; losses and gradients of the first rows were
compared with a float64 reference. "Over its products": over the time of the matrix products alone, three, or one for the loss,
by the same library, with the logits in memory. Memory is that of one call, in a process of its own.
"""

WORST = 40
BY_TURNS_EXPLANATION = f"""\
`python -m benchmarks turns`: by turns in one process on the same arrays, or in two processes on equal ones, at least
{turns.ROUNDS} turns each; medians. A group whose median is more than {turns.UNSTEADY} times its minimum, or whose threads lost
the processor to other programs, was repeated, and is marked "unsteady" if it stayed so.

Ours is `pyx_xent.torch` beside PyTorch's losses, the NumPy functions beside everybody else. A limit's figure is a share: its
time over ours, less {limits.CALL * 1e6:.1f} µs for a Python call. Hand-written code (benchmarks/handwritten.c) is AVX-512 and
has no options, no checks and no NaN. Each table has its {WORST} worst.
"""


def write(files, folder, memory=None, scaling=None, linear=None, by_turns=None):
    """Write report.md and its plots into `folder`; the others are files of `python -m benchmarks`, or None."""
    machine, benchmarks = load(files)
    groups = results.groups(benchmarks)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [TITLE, "", *machine_lines(machine), "- command: `make bench`", "", EXPLANATION]
    peak = json.loads(Path(memory).read_text(encoding="utf-8")) if memory else None
    for name, draw in (("classes", draw_classes), ("ratios", draw_ratios)):
        if caption := draw(groups, folder / f"{name}.svg"):
            lines += [f"![{caption}]({name}.svg)", ""]
    if scaling:
        caption = draw_scaling(json.loads(Path(scaling).read_text(encoding="utf-8")), folder / "scaling.svg")
        lines += [f"![{caption}](scaling.svg)", ""]
    if met_or_not := list(targets.table(groups)):
        lines += ["## Targets", "", *markdown_table(targets.HEADINGS, met_or_not), ""]
    for group, rows in groups.items():
        of_peak = peak and all(rows[0].info[key] == peak[key] for key in ("case", "operation"))
        extra = peak["bytes"] if of_peak else {}
        table = [list(row.cells()) for row in rows]
        headings = list(results.HEADINGS)
        if extra:
            headings.append("peak memory")
            for cells in table:
                cells.append(f"{extra[cells[0]] / 1e6:.0f} MB" if cells[0] in extra else "")
        lines += [f"## {group}", "", *markdown_table(headings, table), ""]
        if extra:
            lines += ["Peak memory: of one call in a process of its own, beyond its inputs.", ""]
    if linear:
        lines += ["# A linear layer and its loss", "", LINEAR_EXPLANATION]
        for heading, rows in linear_layer.groups(json.loads(Path(linear).read_text(encoding="utf-8"))).items():
            lines += [f"## {heading}", "", *markdown_table(linear_layer.HEADINGS, rows), ""]
    if by_turns:
        lines += ["# By turns", "", BY_TURNS_EXPLANATION, *by_turns_lines(json.loads(by_turns.read_text(encoding="utf-8")))]
    file = folder / "report.md"
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return file


def by_turns_lines(records):
    yield from (*markdown_table(turns.SUMMARY_HEADINGS, turns.summary(records)), "")
    for row, some in turns.rows(records).items():
        yield from (f"## {row}", "", *markdown_table(turns.HEADINGS, list(turns.table(some))[:WORST]), "")


def axes(width=8, height=5):
    from matplotlib.figure import Figure  # without pyplot: no window system is asked

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save(figure, file):
    import matplotlib

    # No date and no random ids: the same times give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "pyx_xent", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})


def styles():
    import matplotlib

    colours = matplotlib.colormaps["tab10"].colors
    others = zip([name for name in FEW if name != REUSED], colours, strict=True)
    return {REUSED: {"color": "black", "marker": "o"}, **{name: {"color": hue, "marker": "o"} for name, hue in others}}


def draw_classes(groups, file):
    """Time per element against the number of classes, float32 rows, all peers, the limit as a line."""
    series = {}
    for rows in groups.values():
        info = rows[0].info
        if info["operation"] != GRADIENT or info["dtype"] != "float32" or info["option"] or len(info["shape"]) > 2:
            continue
        rows_of_case, classes = info["shape"]
        if rows_of_case < 64:
            continue
        shown = {row.name: row.nanoseconds for row in rows if row.name in FEW}
        limits = {row.name: row.nanoseconds for row in rows if row.is_limit and not row.name.endswith(("1 thread", "in place"))}
        if limits:
            shown["the machine's limit"] = roofline.binding(limits)[1]
        for name, nanoseconds in shown.items():
            points = series.setdefault(name, {})
            if rows_of_case >= points.get(classes, (0, 0))[0]:  # the larger batch
                points[classes] = rows_of_case, nanoseconds
    if not series:
        return None
    figure, plot = axes()
    style = styles()
    for name in sorted(series, key=lambda name: ["the machine's limit", *FEW].index(name)):
        points = sorted((classes, time) for classes, (_, time) in series[name].items())
        look = style.get(name, {"color": "grey", "linestyle": "--"})
        plot.plot(*zip(*points, strict=True), label=name, markersize=4, **look)
    plot.set(xscale="log", yscale="log", xlabel="classes", ylabel="ns per element", title="Loss and gradient, float32")
    plot.grid(alpha=0.3)
    plot.legend(fontsize="small")
    save(figure, file)
    return "Loss and gradient of float32 logits: nanoseconds per element against the number of classes"


def draw_ratios(groups, file):
    """How many times as long as ours with grad_out= each peer takes, for each case."""
    chosen = {
        rows[0].info["case"]: {row.name: row.ratio for row in rows if row.name in FEW and row.name != REUSED and row.ratio}
        for rows in groups.values()
        if rows[0].info["operation"] == GRADIENT
    }
    names = [name for name in FEW if any(name in ratios for ratios in chosen.values())]
    if not names:
        return None
    figure, plot = axes(9, 1 + 0.09 * (len(names) + 2) * len(chosen))
    style = styles()
    step = 1 / (len(names) + 1.5)
    for k, name in enumerate(names):
        at = [i + k * step for i, ratios in enumerate(chosen.values()) if name in ratios]
        values = [ratios[name] for ratios in chosen.values() if name in ratios]
        plot.barh(at, values, height=step, label=name, color=style[name]["color"])
    plot.set_yticks([i + (len(names) - 1) * step / 2 for i in range(len(chosen))], chosen)
    plot.invert_yaxis()
    plot.axvline(1, color="black", linewidth=1)
    plot.set(xscale="log", xlabel=f"time over that of {REUSED} (log)", title="Loss and gradient")
    plot.grid(alpha=0.3, axis="x")
    plot.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.05 - 0.3 / len(chosen)), ncols=3)
    save(figure, file)
    return f"Time of each peer over that of {REUSED}"


def draw_scaling(data, file):
    """Our time per element as the array grows, a line for each number of classes, a panel for each operation."""
    from matplotlib.figure import Figure

    operations = list(dict.fromkeys(point["operation"] for point in data["points"]))
    figure = Figure(figsize=(5 * len(operations), 4.5), layout="constrained")
    panels = figure.subplots(1, len(operations), sharey=True, squeeze=False)[0]
    for operation, plot in zip(operations, panels, strict=True):
        lines = {}
        for point in data["points"]:
            if point["operation"] == operation:
                label = "one row" if point["single_row"] else f"{point['classes']} classes"
                lines.setdefault(label, []).append((point["bytes"], point["seconds"] / point["elements"] * 1e9))
        for label, points in lines.items():
            plot.plot(*zip(*sorted(points), strict=True), label=label, marker="o", markersize=3)
        plot.axvline(data["last_level_cache"], color="grey", linestyle=":", label="last-level cache")
        plot.set_xscale("log", base=2)
        plot.set(yscale="log", xlabel="bytes of logits", title=operation)
        plot.grid(alpha=0.3)
    panels[0].set_ylabel("ns per element")
    panels[0].legend(fontsize="small")
    save(figure, file)
    return "Our time per element from 4 KB to 8 GB of float32 logits"
