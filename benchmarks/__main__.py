"""python -m benchmarks {report,limits,memory,scaling,linear,alternation}: what goes with the times of `pytest benchmarks`."""

import argparse
import json
import statistics
from pathlib import Path

from tqdm import tqdm

import pyx_xent

from . import linear, memory, report, results, roofline, scaling
from .cases import CASES, GRADIENT
from .peers import PEERS
from .timing import times

SAVED = Path(".benchmarks")
TIMES, MEMORY, SCALING, LINEAR = SAVED / "full", SAVED / "memory.json", SAVED / "scaling.json", SAVED / "linear.json"


def run_limits(arguments):
    if roofline.why_not():
        raise SystemExit(roofline.why_not())
    elements = 64 << 20
    names = ("read", "read + write", "in place")
    limits = {f"memory: {name}": (elements, roofline.memory_limit(kind, 4 * elements, arguments.threads), 4 * min(kind + 1, 2))
              for kind, name in enumerate(names)}  # fmt: skip
    if roofline._compiled()[0].has_arithmetic_limit():
        small = roofline.IN_CACHE
        limits["in cache: max, exp"] = small, roofline.arithmetic_limit(small, arguments.threads, False), 0
        limits["in cache: max, exp, scale"] = small, roofline.arithmetic_limit(small, arguments.threads, True), 0
    print(f"{arguments.threads} threads, float32, fastest and median")
    for name, (count, function, bytes_moved) in limits.items():
        function()
        seconds = times(function, budget=0, least=15 if bytes_moved else 600)
        best, median = min(seconds) / count * 1e9, statistics.median(seconds) / count * 1e9
        rate = f"{bytes_moved / best:8.1f} GB/s" if bytes_moved else ""
        print(f"{name:27}{best:8.4f} ns/element{median:9.4f}{rate}")


def run_memory(arguments):
    case = next(case for case in CASES if str(case) == arguments.case)
    names = [
        name for name, peer in PEERS.items()
        if peer.fits(case, GRADIENT) and not peer.missing and peer.isa is None and not name.endswith("1 thread")
        and (not arguments.peers or any(wanted in name for wanted in arguments.peers))
    ]  # fmt: skip
    found = {}
    for name in tqdm(names, unit=" peers"):
        try:
            found[name] = memory.measure(case, GRADIENT, name, arguments.threads)
        except Exception as error:  # of a peer: the others are still told
            tqdm.write(f"{name}: {error}")
    for name, bytes_ in found.items():
        print(f"{name:40}{bytes_ / 1e6:10.1f} MB{bytes_ / case.logits_bytes:8.2f} x the logits")
    save(MEMORY, {"case": str(case), "operation": GRADIENT, "bytes": found})


def run_scaling(arguments):
    points = scaling.measure(largest=int(arguments.gigabytes * 2**30), threads=arguments.threads)
    save(SCALING, {"points": points, "last_level_cache": roofline.last_level_cache()})
    for point in points:
        shape = f"{point['rows']}x{point['classes']}"
        print(f"{shape:24}{point['operation']:26}{point['seconds'] / point['elements'] * 1e9:10.4f} ns/element")


def run_linear(arguments):
    records = linear.measure(arguments.threads)
    save(LINEAR, records)
    for heading, rows in linear.groups(records).items():
        print("", heading, *("    " + line for line in results.text_table([linear.HEADINGS, *rows])), sep="\n")


def run_alternation(arguments):
    try:
        from . import alternation
    except ImportError as error:
        raise SystemExit(f"{error}: this compares with PyTorch") from None
    found = alternation.measure(arguments.threads)
    for name, seconds in found.items():
        print(f"{name:12}{seconds * 1e3:8.2f} ms")
    print(f"by turns over the sum: {found['by turns'] / (found['torch.mm'] + found['loss']):.3f}")


def save(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1), encoding="utf-8")
    print(f"saved: {file}")


def run_report(arguments):
    files = arguments.files or sorted(TIMES.glob("*/*.json"))[-1:]
    if not files:
        raise SystemExit(f"nothing saved in {TIMES}: run `make bench` first")
    extras = {
        name: file if file.exists() else None for name, file in (("memory", MEMORY), ("scaling", SCALING), ("linear", LINEAR))
    }
    print(report.write(files, arguments.output, **extras))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("report", help="Markdown and plots from saved times")
    command.add_argument("files", nargs="*", type=Path, help=f"JSON of pytest-benchmark (default: the last in {TIMES})")
    command.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    command.set_defaults(run=run_report)

    command = commands.add_parser("limits", help="the machine's limits, as in the times' `limit` rows")
    command.set_defaults(run=run_limits)

    command = commands.add_parser("memory", help="peak memory of each peer, in a process of its own")
    command.add_argument("peers", nargs="*", help="only those with such names")
    command.add_argument("--case", default="2048x32000", choices=[str(case) for case in CASES], metavar="CASE")
    command.set_defaults(run=run_memory)

    command = commands.add_parser("scaling", help="our time per element from 4 KB to 8 GB")
    command.add_argument("--gigabytes", type=float, default=8, help="the largest array")
    command.set_defaults(run=run_scaling)

    command = commands.add_parser("linear", help="a linear layer and its loss, against PyTorch and the products alone")
    command.set_defaults(run=run_linear)

    command = commands.add_parser("alternation", help="torch.mm and our loss by turns, and each alone")
    command.set_defaults(run=run_alternation)

    for command in commands.choices.values():
        command.add_argument("--threads", type=int, default=pyx_xent.get_num_threads())
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
