"""Does the fuzzer bite? Bugs that others had, planted one at a time into a sanitized build: each must make it fail."""

import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from . import build

CALL, CHECKS, LABELS = "pyx_xent/_call.pyx", "pyx_xent/_call_checks.pxi", "pyx_xent/_call_labels.pxi"
MEMORY, PLAN, THREADS, LINEAR = "pyx_xent/_call_memory.pxi", "pyx_xent/_plan.pxi", "pyx_xent/_threads.py", "pyx_xent/linear.py"
BATCH, COPY, EXP, ROW, STEPS, TILE = (
    f"pyx_xent/_kernels/{name}.pxi" for name in ("batch", "copy", "exp", "row", "steps", "tile")
)

BUGS = [  # what is wrong, where, the right code, the wrong code
    ("a label may be the number of classes", LABELS, "(y - <uint64_t>classes)) >> 63", "(y - <uint64_t>classes - 1)) >> 63"),
    ("labels that are all at most the number of classes are not looked at again", LABELS,
     "all_valid &= ~y & (y - <uint64_t>classes)", "all_valid &= ~y & (y - <uint64_t>classes - 1)"),
    ("a class that is ignored counts", LABELS, "0 <= ignored < classes", "False"),
    ("labels are not checked", LABELS, "return <Py_ssize_t>(others - lives)", "return 0"),
    ("ignored labels are used as classes", LABELS, "    if live < n:\n", "    if False:\n"),
    ("uint64 labels wrap", LABELS, "    if is_uint64:\n        for i", "    if False:\n        for i"),
    ("class weights may be too few", CHECKS, "weight) != 1 or cnp.PyArray_DIM(weight, 0) != classes", "weight) != 1"),
    ("outputs may overlap themselves", MEMORY, "        if stride < covered:", "        if False:"),
    ("outputs may overlap inputs", MEMORY, "        if share_memory(out, inputs[k]):", "        if False:"),
    ("outputs may have another shape", MEMORY,
     "    if not has_shape(out, shape):\n        raise", "    if False:\n        raise"),
    ("outputs may be read-only", MEMORY, "    if not cnp.PyArray_ISWRITEABLE(out):", "    if False:"),
    ("outputs may be of another dtype", MEMORY, "    if out.dtype is not dtype and (", "    if False and ("),
    ("unaligned arrays are read as aligned ones", MEMORY, "not cnp.PyArray_ISBEHAVED_RO(array):\n        return False",
     "not cnp.PyArray_ISNOTSWAPPED(array):\n        return False"),
    ("foreign byte order is read as native", MEMORY, "not cnp.PyArray_ISBEHAVED_RO(array):\n        return False",
     "not cnp.PyArray_ISALIGNED(array):\n        return False"),
    ("two axes pass for one", MEMORY, "            elif stride != expected:", "            elif False:"),
    ("sample weights may be too few", CALL, "if not is_one_per_row(weight, call.logits, call.axis) and (", "if False and ("),
    ("upstream gradients may be too few", CALL, "elif not is_one_per_row(array, call.logits, call.axis):", "elif False:"),
    ("the scratch is too small", PLAN, "        area = plan.rows * plan.tile_classes\n",
     "        area = plan.rows * (plan.tile_classes - 1)\n"),
    ("ignored rows count in the mean", LABELS, "if label == NULL or label[i] >= 0:", "if True:"),
    ("no threads are as good as one", THREADS, "    if number < 1:", "    if number < -9:"),
    ("a row is read beyond its end", ROW, "rows_in(&p.logits, b.outer, b.inner, b.count, p.classes, cached, stride)",
     "rows_in(&p.logits, b.outer, b.inner, b.count, p.classes + 1, cached, stride)"),
    ("a tile is read beyond the last row", COPY, "data + k * array.inner * size_of(array.storage), array.storage, array.inner, "
     "lanes_left(run, k), classes,\n                    in_panel",
     "data + k * array.inner * size_of(array.storage), array.storage, array.inner, LANES, classes,\n"
     "                    in_panel"),
    ("the last vector of a run ends beyond it", COPY, "load(data, start + size - LANES, storage, LANES)",
     "load(data, start + size - LANES + 1, storage, LANES)"),
    ("columns are read beyond the last class", COPY, "columns_in(x + i, stride, <int>(size - i), to",
     "columns_in(x + i, stride, UNIT, to"),
    ("a batch is one row too large", BATCH, "min(end - position, p.inner - batches[now].inner))",
     "min(end - position + 1, p.inner - batches[now].inner))"),
    ("slices overlap the end", BATCH, "min(start + p.plan.part, end)", "start + p.plan.part"),
    ("of few classes the last is never found", TILE, "for c in range(classes):\n        found",
     "for c in range(classes - 1):\n        found"),
    ("equal largest logits count once", STEPS, "d_mul(d_sub(v_to_doubles(count), d_set(1.0))", "d_mul(d_set(0.0)"),
    ("the loss of ignored rows is left as it was", BATCH, "        p.loss[position] = 0", "        pass"),
    ("the gradient of ignored rows is left as it was", BATCH,
     "        zeros_out(&p.out, outer, position - outer * p.inner, p.classes, p.plan.stream)", "        pass"),
    ("the last element of a row is left out", ROW, "min(<Py_ssize_t>SEGMENT, classes - segment * SEGMENT)",
     "min(<Py_ssize_t>SEGMENT, classes - segment * SEGMENT - 1)"),
    ("a digit of exp is wrong", EXP, "0.16666520107819589", "0.16686520107819589"),
    ("a digit of exp in double is wrong", EXP, "8.3333333334956238e-3", "8.3333343334956238e-3"),
    ("ignored rows are multiplied", LINEAR, "np.flatnonzero(self.labels >= 0)", "np.flatnonzero(self.labels >= -1)"),
    ("the first chunk alone is written", LINEAR, "                total[some] += part", "                pass"),
]  # fmt: skip
AGAIN = [(MEMORY, "    if not is_doubles(array) or cnp.PyArray_SIZE(array) != size:", "    if not is_doubles(array):")]
ALSO = {  # what is checked a second time, where pointers are taken: changed there, too
    "sample weights may be too few": AGAIN,
    "upstream gradients may be too few": AGAIN,
    "outputs may be read-only": [
        (MEMORY, "cnp.PyArray_SAMESHAPE(out, x) and cnp.PyArray_ISWRITEABLE(out)", "cnp.PyArray_SAMESHAPE(out, x) and True")
    ],
}


def run(folder, calls):
    """{what is wrong: the last line that the fuzzer said, or None if it found nothing}"""
    folder = Path(folder)
    build.copy(folder)
    build.only(folder, "avx2")
    build.build_with_sanitizers(folder)
    if said := fuzz(folder, calls):
        raise SystemExit(f"the fuzzer finds something where nothing was planted: {said}")
    found = {}
    for what, name, right, wrong in tqdm(BUGS, unit=" bugs"):
        changes = [(name, right, wrong), *ALSO.get(what, [])]
        before = {name: (folder / name).read_bytes() for name, _, _ in changes}
        for name, right, wrong in changes:
            build.replace(folder / name, right, wrong)
        try:
            build.build_with_sanitizers(folder)
            found[what] = fuzz(folder, calls)
        finally:
            for name, text in before.items():
                (folder / name).write_bytes(text)
        tqdm.write(f"{'caught' if found[what] else 'MISSED'}: {what}: {found[what]}")
    return found


def fuzz(folder, calls):
    """None, or what it died of."""
    try:
        result = subprocess.run(
            [sys.executable, "-m", "trust", "fuzz", "--calls", str(calls), "--jobs", "1"],
            cwd=folder, env=build.under_sanitizers(), capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "it did not end"
    if result.returncode == 0:
        return None
    lines = [line for line in result.stderr.splitlines() if "ERROR: " in line or "runtime error" in line or "Error: " in line]
    return (lines or [f"exit code {result.returncode}"])[-1][:200]
