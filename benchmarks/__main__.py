"""What goes with the times of `pytest benchmarks`: python -m benchmarks {command}.

report · turns · machine, memory, scaling, linear, alternation
"""

import argparse
import json
import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

import pyx_xent

from . import against_torch, limits, linear, memory, ours, report, results, roofline, scaling, turns
from .cases import CASES, GRADIENT, QUICK
from .peers import PEERS
from .timing import times

SAVED = Path(".benchmarks")
TIMES, MEMORY, SCALING, LINEAR = SAVED / "full", SAVED / "memory.json", SAVED / "scaling.json", SAVED / "linear.json"
TURNS = SAVED / "turns.json"


def run_turns(arguments):
    """Every part that was asked for and can be measured here; each case's records are saved when they come."""
    dtypes = arguments.dtypes

    def wanted(name):
        if arguments.quick and name not in QUICK:
            return False
        return not arguments.cases or any(part in name for part in arguments.cases)

    limits_of = [case for case in CASES if wanted(str(case)) and case.dtype in dtypes]
    compared = [case for case in against_torch.all_cases() if wanted(str(case)) and case.dtype in dtypes]
    torch_parts = [part for part in against_torch.PARTS if part in arguments.parts]
    how = arguments.threads, 0.03 if arguments.quick else arguments.seconds, turns.ROUNDS
    parts = {
        "limits": (roofline.why_not(), lambda: limits.measure(limits_of, *how)),
        "ours": (None, lambda: ours.measure_ratios(wanted, *how)),
        "import": (None, ours.measure_import),
        "older": (_no_folder(arguments.older), lambda: ours.measure_checkout(arguments.older, ours.OLDER, wanted, *how)),
        "clang": (_no_folder(arguments.clang), lambda: ours.measure_checkout(arguments.clang, ours.CLANG, wanted, *how)),
        "torch": (
            None if find_spec("torch") else "PyTorch is not installed",
            lambda: against_torch.measure(compared, torch_parts, *how),
        ),
    }
    chosen = {"torch" if part in torch_parts else part for part in arguments.parts}
    kept = json.loads(TURNS.read_text(encoding="utf-8")) if TURNS.exists() else []
    found = {}
    try:
        for part, (why_not, measured) in parts.items():
            if part in chosen and why_not:
                print(f"{part}: {why_not}")
            elif part in chosen:
                for records in measured():
                    stamp = {"measured": time.strftime("%Y-%m-%d %H:%M"), "threads": arguments.threads}
                    found.update({turns.identity(one): {**one, **stamp} for one in records})
                    if not arguments.quick:  # too short to be reported
                        save(TURNS, list({**{turns.identity(one): one for one in kept}, **found}.values()), quiet=True)
    finally:  # also of what there is when it is interrupted
        shown = [one for one in found.values() if arguments.all or turns.margin(one) < 1 or one["remarks"]]
        for headings, cells in (turns.HEADINGS, turns.table(shown)), (turns.SUMMARY_HEADINGS, turns.summary(found.values())):
            print(*results.text_table([headings, *cells]), "", sep="\n")


def _no_folder(checkout):
    return None if checkout else "no folder of another checkout was given"


def run_machine(arguments):
    if roofline.why_not():
        raise SystemExit(roofline.why_not())
    large, threads = np.ones(64 << 20, np.float32), arguments.threads
    elsewhere = roofline.touched_like(large)
    functions = {
        f"memory: {name.removeprefix('limit: ')}": (
            large.size, roofline.memory_limit(kind, large, threads, out=elsewhere), 4 * min(kind + 1, 2)
        )
        for name, kind in roofline.MEMORY.items()
    }  # fmt: skip
    if roofline._compiled()[0].has_arithmetic_limit():
        for dtype in ("float32", "float64"):
            small = 3 * np.random.default_rng(0).standard_normal(roofline.IN_CACHE // 2, dtype)
            out = roofline.touched_like(small)
            functions[f"in cache: max, exp, {dtype}"] = small.size, roofline.arithmetic_limit(small, threads), 0
            functions[f"in cache: max, exp, scale, {dtype}"] = small.size, roofline.arithmetic_limit(small, threads, out), 0
    print(f"{threads} threads, fastest and median")
    for name, (count, function, bytes_moved) in functions.items():
        function()
        seconds = times(function, budget=0, least=15 if bytes_moved else 600)
        best, median = min(seconds) / count * 1e9, statistics.median(seconds) / count * 1e9
        rate = f"{bytes_moved / best:8.1f} GB/s" if bytes_moved else ""
        print(f"{name:36}{best:8.4f} ns/element{median:9.4f}{rate}")


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


def save(file, data, quiet=False):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1), encoding="utf-8")
    if not quiet:
        print(f"saved: {file}")


def run_report(arguments):
    files = arguments.files or sorted(TIMES.glob("*/*.json"))[-1:]
    if not files:
        raise SystemExit(f"nothing saved in {TIMES}: run `make bench` first")
    saved = {"memory": MEMORY, "scaling": SCALING, "linear": LINEAR, "by_turns": TURNS}
    extras = {name: file if file.exists() else None for name, file in saved.items()}
    print(report.write(files, arguments.output, **extras))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("report", help="Markdown and plots from saved times")
    command.add_argument("files", nargs="*", type=Path, help=f"JSON of pytest-benchmark (default: the last in {TIMES})")
    command.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    command.set_defaults(run=run_report)

    parts = ["limits", "ours", "import", "older", "clang", *against_torch.PARTS]
    command = commands.add_parser("turns", help="the table of figures: limits, options, PyTorch and others, by turns with ours")
    command.add_argument("parts", nargs="*", metavar="part", help=f"some of {', '.join(parts)} (default: all)")
    command.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="only those with such parts in their names")
    command.add_argument("--dtypes", nargs="+", default=against_torch.DTYPES, choices=against_torch.DTYPES)
    command.add_argument("--seconds", type=float, default=0.3, help="about how long each function is timed")
    command.add_argument("--older", type=Path, metavar="FOLDER", help="a checkout of an older commit, built in place")
    command.add_argument("--clang", type=Path, metavar="FOLDER", help="a checkout of this commit, built in place by clang")
    command.add_argument("--quick", action="store_true", help="a few cases of each kind for a short time, not saved")
    command.add_argument("--all", action="store_true", help="print all figures, not only those missed or unsteady")
    command.set_defaults(run=run_turns)

    command = commands.add_parser("machine", help="bandwidth of memory and speed of exponentials, alone")
    command.set_defaults(run=run_machine)

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
    if unknown := set(getattr(arguments, "parts", ())) - set(parts):
        parser.error(f"no such parts: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    if getattr(arguments, "parts", None) == []:
        arguments.parts = parts
    arguments.run(arguments)


if __name__ == "__main__":
    main()
