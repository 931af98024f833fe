"""From pytest-benchmark's records to what is shown: nanoseconds per element, GB/s, the share of the limit, ratios. Medians."""

from dataclasses import dataclass

from . import roofline
from .peers import OURS, REUSED

HEADINGS = ("", "median", "min", "ns/element", "GB/s", "of the limit", "ratio")


@dataclass
class Row:
    name: str
    info: dict
    median: float  # seconds
    minimum: float
    fraction: float | None = None  # of the machine's limit, by medians
    ratio: float | None = None  # to ours with grad_out=, by medians

    @property
    def is_limit(self):
        return self.name.startswith("limit")

    def limits(self, other):
        """ "limit: in place" is of those that overwrite the logits; one for all threads is none for a single one."""
        memory_fits = "exp" in self.name or "by hand" in self.name or ("in place" in self.name) == ("in place" in other.name)
        return self.is_limit and not other.is_limit and memory_fits and self.info["threads"] == other.info["threads"]

    @property
    def nanoseconds(self):
        return self.median / self.info["elements"] * 1e9

    @property
    def gigabytes(self):
        """A second, counting only the bytes that have to be moved."""
        return self.info["bytes"] / self.median / 1e9

    def cells(self):
        return (
            self.name,
            duration(self.median) + (" (unsteady)" if self.info.get("unsteady") else ""),
            duration(self.minimum),
            f"{self.nanoseconds:.3f}",
            f"{self.gigabytes:.1f}",
            "" if self.fraction is None else f"{self.fraction:.0%}",
            "" if self.ratio is None else f"{self.ratio:.2f}",
        )


def duration(seconds):
    unit, factor = next((u, f) for u, f in (("s", 1), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9)) if seconds * f >= 1 or u == "ns")
    return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"


def groups(benchmarks):
    """{group: [Row, ...] from fast to slow}, in the order of the run."""
    found = {}
    for b in benchmarks:
        stats, info = b["stats"], b["extra_info"]
        found.setdefault(b["group"], []).append(Row(info["name"], info, stats["median"], stats["min"]))
    for rows in found.values():
        rows.sort(key=lambda row: row.median)
        by_name = {row.name: row for row in rows}
        ours = by_name.get(REUSED) or by_name.get(OURS)
        for row in rows:
            if own := {limit.name: limit.median for limit in rows if limit.limits(row)}:
                row.fraction = roofline.binding(own)[1] / row.median
            if ours:
                row.ratio = row.median / ours.median
    return found


def text_table(table):
    """Lines of an aligned table, from tuples of cells."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        yield "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()
