"""What the compiler made of loops: vector instructions, and vector registers that did not suffice.

An innermost loop is a backward branch and what lies between it and its target, without another such branch inside. Calls are
not followed: a hot loop has to have everything inlined.
"""

import re
import subprocess
from dataclasses import dataclass
from typing import NamedTuple

# Functions of steps.pxi whose innermost loops have to be vectors, and nothing else.
STEPS = ("exponentials", "distances")
# Of a loop's instructions: a register or two that wait on the stack cost nothing beside 50 others.
FEW_SPILLS = 0.05
HOT = 0.15  # of a loop's instructions are arithmetic: others are branches around the end of a row

FUNCTION = re.compile(r"^([0-9a-f]+) <(.+)>:$")
INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\t(.+)$")
TARGET = re.compile(r"\b([0-9a-f]+) <")


class Machine(NamedTuple):
    """How objdump prints the instructions that matter, each as a regular expression for "mnemonic operands"."""

    objdump: str
    branch: str
    vector: str  # arithmetic of vectors
    scalar: str  # of one number
    spill: str  # a vector register on the stack
    call: str


AARCH64 = Machine(
    objdump="aarch64-linux-gnu-objdump",
    branch=r"(b|b\..+|cbn?z|tbn?z) ",
    vector=r"(fml[as]|fadd|fsub|fmul|fmaxnm) v\d+\.(4s|2d)",
    scalar=r"(fn?m(add|sub)|fadd|fsub|fn?mul|fmaxnm) [sd]",
    spill=r"((ldr|str|ldp|stp|ldur|stur|ldnp|stnp) q|(ld1|st1) ).*\[(sp|x29)\b",
    call=r"blr? ",
)
X86_64 = Machine(
    objdump="objdump",
    branch=r"j(?!mp)[a-z]+ ",
    vector=r"v(fn?m(add|sub)\d+|add|sub|mul|max)p[sd] ",
    scalar=r"v(fn?m(add|sub)\d+|add|sub|mul|max)s[sd] ",
    spill=r"vmov\w+ %[xyz]mm\d+,.*\(%r[sb]p",  # constants are read from there: AVX2 has 16 registers
    call=r"call",
)


@dataclass
class Loop:
    """Instructions of an innermost loop, or of several."""

    size: int = 0  # instructions
    vector: int = 0  # arithmetic of vectors
    scalar: int = 0  # of one number
    spills: int = 0  # vector registers on the stack
    calls: int = 0

    def is_bad(self):
        return bool(self.scalar or self.calls or not self.vector or self.spills > FEW_SPILLS * self.size)

    def __add__(self, other):
        return Loop(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def functions(file, machine):
    """{function: [(address, "mnemonic operands"), ...]} of an object file or shared library."""
    command = [machine.objdump, "-d", "--no-show-raw-insn", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, instructions = {}, []
    for line in text.splitlines():
        if match := FUNCTION.match(line):
            instructions = found.setdefault(match[2], [])
        elif match := INSTRUCTION.match(line):
            instructions.append((int(match[1], 16), " ".join(match[2].split())))
    return found


def innermost(instructions, machine):
    """The innermost loops, as lists of instructions."""
    begin = instructions[0][0] if instructions else 0
    backward = []
    for address, text in instructions:
        if re.match(machine.branch, text) and (target := TARGET.search(text)) and begin <= int(target[1], 16) <= address:
            backward.append((int(target[1], 16), address))
    inner = [
        one for one in backward if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in backward)
    ]
    return [[text for address, text in instructions if first <= address <= last] for first, last in inner]


def counted(instructions, machine):
    def of(pattern):
        return sum(bool(re.match(pattern, text)) for text in instructions)

    return Loop(len(instructions), of(machine.vector), of(machine.scalar), of(machine.spill), of(machine.call))


def hot_loops(instructions, machine):
    """Of one function: each Loop that consists of arithmetic."""
    counts = [counted(loop, machine) for loop in innermost(instructions, machine)]
    return [loop for loop in counts if loop.vector + loop.scalar > HOT * loop.size]


def check(file, machine, steps=STEPS):
    """{function: Loop of all its hot loops}; SystemExit if one is scalar, calls or spills, or if there is none for a step.

    Looked at are functions that are named after one of `steps`.
    """
    found, faults = {}, []
    disassembled = functions(file, machine)
    for step in steps:
        of_step = [name for name in disassembled if re.search(rf"(^|_){step}(\.|$)", name)]
        of_functions = {name: hot for name in of_step if (hot := hot_loops(disassembled[name], machine))}
        if not of_functions:
            faults.append(f"no function {step} has a hot loop")
        for name, hot in of_functions.items():
            faults += [f"{name}: {loop}" for loop in hot if loop.is_bad()]
            found[name] = sum(hot, Loop())
    if faults:
        raise SystemExit(f"{file}: loops that are scalar, spill or call:\n" + "\n".join(faults))
    return found
