"""What the compiler made of loops, for aarch64: vector instructions, and vector registers that did not suffice.

An innermost loop is a backward branch and what lies between it and its target, without another such branch inside. Calls are
not followed: a hot loop has to have everything inlined.
"""

import re
import subprocess
from dataclasses import dataclass

FUNCTION = re.compile(r"^([0-9a-f]+) <(.+)>:$")
INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\t(\S+)\t?(.*)$")
BRANCH = re.compile(r"^(b|b\..+|cbn?z|tbn?z)$")
TARGET = re.compile(r"\b([0-9a-f]+) <")
VECTORS = re.compile(r"^v\d+\.(4s|2d)")
ON_THE_STACK = re.compile(r"\[(sp|x29)\b")


@dataclass
class Loop:
    """Instructions of an innermost loop, or of several."""

    size: int = 0  # instructions
    vector: int = 0  # fmla and fmls of .4s or .2d
    scalar: int = 0  # fmadd and the like of one number
    spills: int = 0  # q registers stored to the stack or loaded from it
    calls: int = 0

    def __add__(self, other):
        return Loop(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def functions(file, objdump="aarch64-linux-gnu-objdump"):
    """{function: [(address, mnemonic, operands), ...]} of an object file or shared library."""
    text = subprocess.run([objdump, "-d", "--no-show-raw-insn", file], capture_output=True, text=True, check=True).stdout
    found, instructions = {}, []
    for line in text.splitlines():
        if match := FUNCTION.match(line):
            instructions = found.setdefault(match[2], [])
        elif match := INSTRUCTION.match(line):
            instructions.append((int(match[1], 16), match[2], match[3]))
    return found


def innermost(instructions):
    """The innermost loops, as lists of instructions."""
    begin = instructions[0][0] if instructions else 0
    backward = []
    for address, mnemonic, operands in instructions:
        if BRANCH.match(mnemonic) and (target := TARGET.search(operands)) and begin <= int(target[1], 16) <= address:
            backward.append((int(target[1], 16), address))
    inner = [
        one for one in backward if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in backward)
    ]
    return [[each for each in instructions if first <= each[0] <= last] for first, last in inner]


def is_spill(mnemonic, operands):
    of_a_vector = operands.startswith("q") and mnemonic in ("ldr", "str", "ldp", "stp", "ldur", "stur", "ldnp", "stnp")
    return bool((of_a_vector or mnemonic in ("ld1", "st1")) and ON_THE_STACK.search(operands))


def counted(instructions):
    return Loop(
        size=len(instructions),
        vector=sum(mnemonic in ("fmla", "fmls") and bool(VECTORS.match(operands)) for _, mnemonic, operands in instructions),
        scalar=sum(mnemonic in ("fmadd", "fmsub", "fnmadd", "fnmsub") for _, mnemonic, _ in instructions),
        spills=sum(is_spill(mnemonic, operands) for _, mnemonic, operands in instructions),
        calls=sum(mnemonic in ("bl", "blr") for _, mnemonic, _ in instructions),
    )


def loops(file, pattern, objdump="aarch64-linux-gnu-objdump"):
    """{function: [Loop, ...]} of functions whose name has `pattern` (a regular expression), loops with multiply-adds alone."""
    found = {}
    for name, instructions in functions(file, objdump).items():
        if re.search(pattern, name):
            counts = map(counted, innermost(instructions))
            found[name] = [loop for loop in counts if loop.vector or loop.scalar]
    return found


def check(file, patterns, objdump="aarch64-linux-gnu-objdump"):
    """{function: Loop of all its hot loops}; SystemExit if one is scalar or spills, or if there is none for a pattern.

    Hot loops are the innermost ones with multiply-adds, of functions that match one of `patterns`.
    """
    found, faults = {}, []
    for pattern in patterns:
        of_functions = {name: hot for name, hot in loops(file, pattern, objdump).items() if hot}
        if not of_functions:
            faults.append(f"no function that matches {pattern!r} has a loop with multiply-adds")
        for name, hot in of_functions.items():
            faults += [f"{name}: {loop}" for loop in hot if loop.scalar or loop.spills or loop.calls or not loop.vector]
            found[name] = sum(hot, Loop())
    if faults:
        raise SystemExit(f"{file}: loops that are scalar, spill or call:\n" + "\n".join(faults))
    return found
