"""Examples that people copy must run: docstrings, README, the digits example; and each SPEC clause has its test."""

import doctest
import gzip
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
MODULES = ["pyx_xent"] + [
    name
    for folder in ("pyx_xent", "pyx_xent.torch")
    for name in (f"{folder}.{m.name}" for m in pkgutil.iter_modules([str(ROOT / folder.replace(".", "/"))]))
    if name not in ("pyx_xent.__main__", "pyx_xent._kernels")
]
WITH_EXAMPLES = {
    f"pyx_xent.{name}"
    for name in ("functional", "losses", "torch.functional", "torch.modules", "torch.patching", "torch.fused_head")
}


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    if module.startswith("pyx_xent.torch"):
        pytest.importorskip("torch")
    found = doctest.testmod(importlib.import_module(module))
    assert found.failed == 0
    assert found.attempted > 0 or module not in WITH_EXAMPLES


@pytest.mark.parametrize("module", ["pyx_xent", "pyx_xent.torch"])
def test_every_public_function_has_an_example(module):
    if module == "pyx_xent.torch":
        pytest.importorskip("torch")
    module = importlib.import_module(module)
    for name in module.__all__:
        item = getattr(module, name)
        if callable(item):
            assert ">>> " in item.__doc__, name


README_EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(README_EXAMPLES)))
def test_readme_examples(number):
    if "torch" in README_EXAMPLES[number]:
        pytest.importorskip("torch")
    exec(compile(README_EXAMPLES[number], f"README example {number + 1}", "exec"), {})


class TestTrainDigits:
    @pytest.fixture(autouse=True)
    def _needs(self):
        for module in ("sklearn", "tqdm", "matplotlib"):
            pytest.importorskip(module)

    def run(self, folder, *arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "examples/train_digits.py"), "--plot", str(folder / "plot.png"), *arguments],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def test_reaches_its_accuracy_and_draws(self, tmp_path):
        result = self.run(tmp_path)
        assert result.returncode == 0, result.stderr
        assert float(re.search(r"test accuracy +([\d.]+)%", result.stdout)[1]) >= 97
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_textbook_loss_gives_the_same_curve(self, tmp_path):
        lines = [
            re.search(r"mean loss.* ([\d.]+)", self.run(tmp_path, "--epochs", "5", "--loss", loss).stdout)[1]
            for loss in ("pyx_xent", "numpy")
        ]
        assert float(lines[0]) == pytest.approx(float(lines[1]), rel=1e-3)

    def test_mnist_files(self, tmp_path):
        rng = np.random.default_rng(0)

        def idx(array):
            header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
            return header + array.astype(np.uint8).tobytes()

        missing = self.run(tmp_path, "--mnist", str(tmp_path))
        assert missing.returncode == 1
        assert "missing train-images-idx3-ubyte, train-labels-idx1-ubyte" in missing.stderr
        for part, rows in (("train", 90), ("t10k", 20)):
            (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (rows, 28, 28))))
            (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(rng.integers(0, 10, rows))))
        result = self.run(tmp_path, "--mnist", str(tmp_path), "--epochs", "2")
        assert result.returncode == 0, result.stderr
        assert "90 digits to learn from, 20 to test" in result.stdout
        (tmp_path / "train-images-idx3-ubyte").write_bytes(b"not an IDX file")
        assert "is not an IDX file" in self.run(tmp_path, "--mnist", str(tmp_path)).stderr


def run_example(name, *arguments):
    pytest.importorskip("torch")
    for module in ("sklearn", "tqdm"):
        pytest.importorskip(module)
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("network", ["dense", "conv"])
def test_train_digits_torch(network):
    output = run_example("train_digits_torch.py", "--epochs", "8", "--network", network)
    accuracies = [float(found) for found in re.findall(r"test accuracy ([\d.]+)%", output)]
    assert len(accuracies) == 2
    assert min(accuracies) > 90
    assert float(re.search(r"difference of the first 50 losses: (\S+)", output)[1]) < 1e-3


def test_train_language_model(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog lay beside it. " * 200, encoding="utf-8")
    small = ["--steps", "12", "--width", "16", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "4"]
    for head in ([], ["--untied"]):
        output = run_example("train_language_model.py", "--text", str(text), *head, *small)
        for title in ("PyTorch ", "loss replaced", "fused head ", "fused head, bfloat16"):
            first, last = map(float, re.search(rf"^{title} *([\d.]+) -> *([\d.]+)", output, re.MULTILINE).groups())
            assert last < first
        for title in ("loss replaced", "fused head"):
            assert float(re.search(rf"losses of {title} from PyTorch: (\S+)", output)[1]) < 1e-2


def test_standard_library_has_text(monkeypatch):
    for module in ("torch", "tqdm"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("train_language_model")
    tokens = example.tokens_of(example.standard_library_text(), 32000)
    assert len(tokens) > 100_000
    assert tokens.max() < 32000


def test_benchmarks_run():
    pytest.importorskip("pytest_benchmark")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "benchmarks", "--benchmark-disable", "-k", "64x10-pyx_xent",
         "-p", "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


def test_every_clause_that_differs_is_on_the_page_of_differences():
    spec = (ROOT / "docs/SPEC.md").read_text(encoding="utf-8")
    page = (ROOT / "docs/differences.md").read_text(encoding="utf-8")
    differing = {
        clause for clause, text in re.findall(r"^(S\d+) (.*)$", spec, re.MULTILINE)
        if not text.startswith("[=]") or re.search(r"\[(wider|stricter|safer|new)", text)
    }  # fmt: skip
    assert len(differing) > 15
    assert differing <= set(re.findall(r"S\d+", page))


def test_each_spec_clause_has_a_test_that_names_it():
    named = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        for clauses in re.findall(r"mark\.spec\((.*?)\)", file.read_text(encoding="utf-8")):
            named.update(re.findall(r"S\d+", clauses))
    assert {f"S{n}" for n in range(1, 40)} <= named
