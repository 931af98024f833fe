"""Train a small transformer on text, with pyx_xent's loss, PyTorch's, or both from the same seed, and tell what the loss costs.

    python examples/train_language_model.py                        on the documentation strings of Python's standard library
    python examples/train_language_model.py --text book.txt        on a text of yours
    python examples/train_language_model.py --loss pyx_xent --steps 2000
    python examples/train_language_model.py --head linear-cross-entropy     head and loss in one, without the logits

Words are tokens; the vocabulary has as many entries as those of language models in use, whether or not the text fills it.
Prints tokens per second, the share of the time spent in the loss (forward and backward), and the memory that the loss takes.
"""

import argparse
import ast
import collections
import re
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np

try:
    import torch
    from torch import nn
    from tqdm import tqdm

    import pyx_xent.torch
except ImportError as error:
    sys.exit(f"{error}. This example needs PyTorch and the extra 'demo': pip install 'pyx_xent[demo,torch]'")

LOSSES = {"pyx_xent": pyx_xent.torch.cross_entropy, "torch": nn.functional.cross_entropy}
LINEAR_LOSSES = {"pyx_xent": pyx_xent.torch.linear_cross_entropy, "torch": nn.functional.linear_cross_entropy}


def standard_library_text():
    """All documentation strings of the standard library, read from its sources: nothing is imported."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # there are files of other versions' syntax
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found.append(ast.get_docstring(node) or "")
    return "\n".join(found)


def tokens_of(text, vocabulary):
    """Each word or sign as a number below `vocabulary`, the most frequent ones first; 0 is any other word."""
    words = re.findall(r"\w+|[^\w\s]", text)
    frequent = collections.Counter(words).most_common(vocabulary - 1)
    number = {word: k for k, (word, _) in enumerate(frequent, 1)}
    return torch.tensor([number.get(word, 0) for word in words])


class LanguageModel(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.words = nn.Embedding(options.vocabulary, options.width)
        self.positions = nn.Embedding(options.context, options.width)
        layer = nn.TransformerEncoderLayer(
            options.width, options.heads, 4 * options.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, options.layers, nn.LayerNorm(options.width), enable_nested_tensor=False)
        self.head = nn.Linear(options.width, options.vocabulary, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if options.head != "untied":
            self.head.weight = self.words.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(options.context), persistent=False)

    def forward(self, tokens):
        """tokens (N, context) -> what the head reads, (N * context, width)"""
        hidden = self.words(tokens) + self.positions.weight
        return self.body(hidden, mask=self.mask, is_causal=True).flatten(0, 1)


def bytes_of_process(field):
    """ "VmRSS": in memory now; "VmHWM": at most. None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), None)


def with_peak(function):
    """(result, bytes that it took at most)"""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # lets VmHWM start again
    except OSError:
        return function(), None
    before = bytes_of_process("VmRSS")
    result = function()
    return result, max(0, bytes_of_process("VmHWM") - before)


def train(tokens, name, options):
    """(losses, seconds, seconds in the loss, bytes of the loss)"""
    torch.manual_seed(options.seed)
    model = LanguageModel(options)
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    generator = torch.Generator().manual_seed(options.seed)
    window = torch.arange(options.context + 1)
    fused = options.head == "linear-cross-entropy"
    losses, peak = [], None
    seconds = loss_seconds = 0.0
    with tqdm(total=options.steps, unit="step", desc=name) as progress:
        for step in range(options.steps):
            started = time.perf_counter()
            begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=generator)
            sample = tokens[begin + window]
            optimizer.zero_grad()
            hidden, target = model(sample[:, :-1]), sample[:, 1:].flatten()
            read = hidden if fused else model.head(hidden)
            # The graph is cut before the loss only to see what that takes.
            leaf = read.detach().requires_grad_()

            def loss_and_gradient(leaf=leaf, target=target):
                loss = LINEAR_LOSSES[name](leaf, model.head.weight, target) if fused else LOSSES[name](leaf, target)
                loss.backward()
                return loss.item()

            before = time.perf_counter()
            if step == 0:  # later, memory of the step before may be used again
                loss, peak = with_peak(loss_and_gradient)
            else:
                loss = loss_and_gradient()
            in_loss = time.perf_counter() - before
            read.backward(leaf.grad)
            optimizer.step()
            losses.append(loss)
            if step > 0:  # the first one has memory and threads to get
                seconds += time.perf_counter() - started
                loss_seconds += in_loss
            progress.update()
            progress.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    return losses, seconds, loss_seconds, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a file of text (default: the standard library's documentation strings)")
    parser.add_argument("--loss", choices=[*LOSSES, "both"], default="both")
    parser.add_argument(
        "--head",
        choices=["tied", "untied", "linear-cross-entropy"],
        default="tied",
        help="does the head share the words' vectors? linear-cross-entropy: it does, and belongs to the loss, which pyx_xent "
        "computes without the logits and PyTorch from them",
    )
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="tokens that are seen at once")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("vocabulary", "layers", "heads", "context", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first one is not timed")
    text = standard_library_text() if options.text is None else options.text.read_text(encoding="utf-8", errors="replace")
    tokens = tokens_of(text, options.vocabulary)
    if len(tokens) <= options.context:
        sys.exit(f"the text has {len(tokens)} words; one sample takes {options.context + 1}")
    rows = options.batch * options.context
    megabytes = rows * options.vocabulary * 4 / 1e6
    print(f"{len(tokens):,} tokens; logits of a step: {rows} x {options.vocabulary}, {megabytes:.0f} MB")
    curves = []
    for name in LOSSES if options.loss == "both" else [options.loss]:
        losses, seconds, loss_seconds, peak = train(tokens, name, options)
        curves.append(np.array(losses))
        memory = "unknown" if peak is None else f"{peak / 1e6:.0f} MB"
        what = "head and loss" if options.head == "linear-cross-entropy" else "the loss"
        print(
            f"{name:9} loss {losses[0]:.4f} -> {np.mean(losses[-20:]):.4f}, "
            f"{rows * (options.steps - 1) / seconds:,.0f} tokens/s, "
            f"{loss_seconds / seconds:.0%} of the time in {what} ({loss_seconds / (options.steps - 1) * 1e3:.1f} ms a step), "
            f"memory it takes: {memory}"
        )
    if len(curves) == 2:
        print(f"largest difference of the two curves: {np.abs(curves[0] - curves[1]).max():.1e}")


if __name__ == "__main__":
    main()
