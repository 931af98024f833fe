"""The same bits from two builds, such as of two compilers or processors: NaN with their signs included."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np

CODE = """
import json, pickle, sys
import pyx_xent as px
from trust import bits
seed = int(sys.argv[1])
digests = {f"seed {s}, {what}": digest for s in (seed, seed + 1, seed + 2) for what, digest in bits.digests(s).items()}
with open(sys.argv[2], "wb") as file:
    pickle.dump(bits.examples(seed), file)
print(json.dumps([px.isa, digests]))
"""
INFINITY = {  # dtype: its bits
    "float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80), "float32": np.uint32(0x7F80_0000),
    "float64": np.uint64(0x7FF0_0000_0000_0000),
}  # fmt: skip


def results(file, seed, python=sys.executable, folder=".", environment=os.environ):
    """(instruction set, digests, arrays) of a Python that imports the package in `folder`; `file` is written on the way."""
    result = subprocess.run(
        [python, "-c", CODE, str(seed), str(file.absolute())], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"results in {folder} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    isa, digests = json.loads(result.stdout.splitlines()[-1])
    return isa, digests, pickle.loads(file.read_bytes())


def same_but_for_nan(dtype, one, other):
    """Whether two arrays differ in nothing but the sign and payload of their NaN."""
    if dtype not in INFINITY:
        return False
    infinity = INFINITY[dtype]
    one, other = np.frombuffer(one, infinity.dtype), np.frombuffer(other, infinity.dtype)
    magnitude = np.iinfo(infinity.dtype).max >> 1  # all bits but the sign
    nan = (one & magnitude) > infinity
    return np.array_equal(nan, (other & magnitude) > infinity) and np.array_equal(one[~nan], other[~nan])


def check(what, found, expected):
    """What has the same bits, in words; SystemExit naming what has not, and where NaN alone has another sign or payload."""
    _, digests, arrays = found
    _, expected_digests, expected_arrays = expected
    if digests.keys() != expected_digests.keys() or arrays.keys() != expected_arrays.keys():
        raise SystemExit(f"{what}: other results, such as for a missing dtype")
    different = [name for name, digest in digests.items() if digest != expected_digests[name]]
    numbers, nans = [], []
    for name, (dtype, values) in arrays.items():
        if (dtype, values) != expected_arrays[name]:
            (nans if same_but_for_nan(dtype, values, expected_arrays[name][1]) else numbers).append(name)
    if different or numbers or nans:
        raise SystemExit(
            f"{what}: other bits in {len(different)} of {len(digests)} digests {different[:3]}, in {len(numbers)} of "
            f"{len(arrays)} arrays {numbers[:5]}; only the sign or payload of NaN differs in {len(nans)} more {nans[:5]}"
        )
    return f"the same bits in {len(digests)} digests and {len(arrays):,} arrays, NaN's included"
