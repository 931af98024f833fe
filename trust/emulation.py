"""Processors that this machine is not, emulated by qemu-user: which kernels they choose, their bits, and calls of the fuzzer.

qemu 7.2 emulates AVX2 but no AVX-512. Below x86-64-v2 NumPy itself does not start.
"""

import json
import os
import subprocess
import sys

PROCESSORS = {  # name of qemu: the kernels it must choose
    "Nehalem": "baseline", "Westmere": "baseline", "SandyBridge": "baseline", "IvyBridge": "baseline", "Denverton": "baseline",
    "Opteron_G5": "baseline", "Haswell": "avx2", "EPYC": "avx2",
}  # fmt: skip
FASTER = {"baseline": ["avx2", "avx512"], "avx2": ["avx512"]}
CODE = """
import json, sys
import pyx_xent as px
from trust import bits, fuzz
print(json.dumps([px.isa, bits.digests(int(sys.argv[1])), fuzz.run(int(sys.argv[2]), (int(sys.argv[1]),))]))
"""


def run(code, processor=None, arguments=(), **variables):
    """The finished process of a Python with this code, on an emulated processor or on this one."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if processor:
        # As it is, NumPy's OpenBLAS takes Nehalem for a processor with AVX2.
        variables["OPENBLAS_CORETYPE"] = "Nehalem" if processor == "Nehalem" else ""
        command = ["qemu-x86_64", "-cpu", processor, *command]
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, check=False)


def answer(result):
    if result.returncode:
        raise SystemExit(f"{' '.join(result.args[:3])} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def check(processor, calls, seed):
    """(kernels, digests, calls that were made); SystemExit if anything is not as on this processor."""
    isa, digests, made = answer(run(CODE, processor, (seed, calls)))
    if isa != PROCESSORS[processor]:
        raise SystemExit(f"{processor} chose {isa} instead of {PROCESSORS[processor]}")
    for faster in FASTER[isa]:
        result = run("import pyx_xent", processor, PYX_XENT_ISA=faster)
        if result.returncode != 1 or "ImportError: PYX_XENT_ISA" not in result.stderr:
            raise SystemExit(f"{processor} with PYX_XENT_ISA={faster} ended with {result.returncode}: {result.stderr[-500:]}")
    _, native, _ = answer(run(CODE, None, (seed, 0), PYX_XENT_ISA=isa))
    different = [key for key in native if digests[key] != native[key]]
    if different:
        raise SystemExit(f"{processor} has other bits than this processor for {different}")
    return isa, len(digests), sum(made.values())
