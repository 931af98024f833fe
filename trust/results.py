"""What the checks found: kept as JSON by each of them, and made into TRUST.md by `python -m trust report`."""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.conftest import cpu_name, versions
from benchmarks.report import markdown_table

FOLDER = Path("build/trust/results")
PAGE = Path("TRUST.md")
PROMISES = {
    1: "Accuracy",
    2: "The same bits",
    3: "Memory safety",
    4: "Errors, labels that change, Ctrl-C",
    5: "Never hangs",
    6: "Never an illegal instruction",
    7: "Sizes",
    8: "Free-threaded Python",
    9: "Without memory",
}


@dataclass
class Finding:
    """What a check has found. It is kept only if the check has passed."""

    lines: list[tuple[str, str]]  # (what was done, what was found)
    table: list[list[str]] = field(default_factory=list)  # headings first
    note: str = ""  # below the table


@dataclass
class Check:
    name: str
    promise: int
    run: object  # (arguments) -> Finding
    about: str
    options: dict = field(default_factory=dict)  # name: default, besides --seed and --jobs


def run(check, arguments):
    """Run, print, keep."""
    start = time.monotonic()
    finding = check.run(arguments)
    for what, found in finding.lines:
        print(f"{what}: {found}")
    options = {name: getattr(arguments, name) for name in [*check.options, "seed"]}
    told = (f"--{name.replace('_', '-')} {os.path.basename(str(value))}" for name, value in options.items() if value != "")
    FOLDER.mkdir(parents=True, exist_ok=True)
    kept = {
        **asdict(finding),
        "command": " ".join(["python -m trust", check.name, *told]),
        "seconds": round(time.monotonic() - start),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }
    (FOLDER / f"{check.name}.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")


def machine():
    return {
        "processor": cpu_name(),
        "system": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]),
        "Python": platform.python_version(),
        **{name: number for name, number in versions().items() if number},
        **{tool: told for tool, command in TOOLS.items() if (told := first_line(command))},
    }


TOOLS = {
    "gcc": ["gcc", "--version"],
    "clang": ["clang-19", "--version"],
    "valgrind": ["valgrind", "--version"],
    "qemu": ["qemu-x86_64", "--version"],
    "gcc for aarch64": ["aarch64-linux-gnu-gcc", "--version"],
}


def first_line(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


INTRODUCTION = """\
# How hard pyx_xent was tried to be broken

`make trust` does all of this and writes this page; `make test` does a short form of it. Each line is kept only if its check has
passed: a report of a sanitizer, another bit, a child that hangs or a bug that goes unnoticed ends the run with an error. The
checks are in [trust/](trust), a module each.
"""


def page(checks):
    kept = {check.name: FOLDER / f"{check.name}.json" for check in checks}
    found = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in kept.items() if file.exists()}
    machines = {json.dumps(one["machine"]): one["machine"] for one in found.values()}
    if len(machines) != 1:
        raise SystemExit(f"{FOLDER} has results of {len(machines)} machines or sets of versions: run all checks on one")
    dates = sorted({one["date"] for one in found.values()})
    minutes = sum(one["seconds"] for one in found.values()) // 60
    yield INTRODUCTION
    yield f"- date: {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, {minutes} minutes"
    yield from (f"- {name}: {value}" for name, value in next(iter(machines.values())).items())
    for promise, title in PROMISES.items():
        of_promise = {check.name: found.get(check.name) for check in checks if check.promise == promise}
        yield f"\n## {promise}. {title}\n"
        lines = [(what, told, f"`{one['command']}`") for one in of_promise.values() if one for what, told in one["lines"]]
        lines += [(f"`python -m trust {name}`", "not run", "") for name, one in of_promise.items() if not one]
        yield from markdown_table(("what", "found", "command"), lines, numbers=False)
        for one in of_promise.values():
            if one and one["table"]:
                yield ""
                yield from markdown_table(one["table"][0], one["table"][1:])
                yield f"\n{one['note']}"


def write(checks):
    PAGE.write_text("\n".join(page(checks)) + "\n", encoding="utf-8")
    print(f"{PAGE} written", file=sys.stderr)
