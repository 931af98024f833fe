"""Train a small transformer on text from the same seed in several ways, and tell what its head and its loss cost.

    python examples/train_language_model.py                        on the documentation strings of Python's standard library
    python examples/train_language_model.py --text book.txt        on a text of yours
    python examples/train_language_model.py --ways fused --steps 2000
    python examples/train_language_model.py --width 768 --vocabulary 50257 --untied

Ways: PyTorch's loss (torch), pyx_xent's in its place (loss), a head that is fused with the loss (fused), and the first and the
last of these with the model in bfloat16. Words are tokens; the vocabulary has as many entries as those of models in use,
whether or not the text fills it. Prints tokens per second, the time that head and loss take (forward and backward), and memory.
"""

import argparse
import ast
import collections
import re
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    import torch
    from torch import nn
    from tqdm import tqdm

    import pyx_xent.torch
except ImportError as error:
    sys.exit(f"{error}. This example needs PyTorch and the extra 'demo': pip install 'pyx_xent[demo,torch]'")


class Way(NamedTuple):
    """How head and loss are computed."""

    title: str
    loss: Callable
    fused: bool = False
    dtype: torch.dtype = torch.float32


PYTORCH, OURS = nn.functional.cross_entropy, pyx_xent.torch.cross_entropy
WAYS = {
    "torch": Way("PyTorch", PYTORCH),
    "loss": Way("loss replaced", OURS),
    "fused": Way("fused head", PYTORCH, fused=True),
    "torch-bfloat16": Way("PyTorch, bfloat16", PYTORCH, dtype=torch.bfloat16),
    "fused-bfloat16": Way("fused head, bfloat16", PYTORCH, fused=True, dtype=torch.bfloat16),
}


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
        if not options.untied:
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


def train(tokens, way, options):
    """(losses, seconds, seconds in head and loss, bytes of head and loss)"""
    torch.manual_seed(options.seed)
    model = LanguageModel(options).to(way.dtype)
    fused = pyx_xent.torch.fuse_head(model.head) if way.fused else None
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    generator = torch.Generator().manual_seed(options.seed)
    window = torch.arange(options.context + 1)
    losses, peak = [], None
    seconds = loss_seconds = 0.0
    with tqdm(total=options.steps, unit="step", desc=way.title) as progress:
        for step in range(options.steps):
            started = time.perf_counter()
            begin = torch.randint(len(tokens) - options.context, (options.batch, 1), generator=generator)
            sample = tokens[begin + window]
            optimizer.zero_grad()
            hidden, target = model(sample[:, :-1]), sample[:, 1:].flatten()
            # The graph is cut before the head only to see what head and loss take.
            leaf = hidden.detach().requires_grad_()

            def loss_and_gradient(leaf=leaf, target=target):
                loss = way.loss(model.head(leaf).float(), target)
                loss.backward()
                return loss.item()

            before = time.perf_counter()
            if step == 0:  # later, memory of the step before may be used again
                loss, peak = with_peak(loss_and_gradient)
            else:
                loss = loss_and_gradient()
            in_loss = time.perf_counter() - before
            hidden.backward(leaf.grad)
            optimizer.step()
            losses.append(loss)
            if step > 0:  # the first one has memory and threads to get
                seconds += time.perf_counter() - started
                loss_seconds += in_loss
            progress.update()
            progress.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    if fused is not None and fused.fused != options.steps:
        sys.exit(f"not every step was fused: {fused}")
    return losses, seconds, loss_seconds, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a file of text (default: the standard library's documentation strings)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--untied", action="store_true", help="the head does not share the words' vectors")
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
    curves = {}
    print(f"{'':21}{'loss':>18}{'tokens/s':>10}{'ms a step':>11}{'head and loss':>22}{'their memory':>14}")
    for name in options.ways:
        way = WAYS[name]
        losses, seconds, loss_seconds, peak = train(tokens, way, options)
        curves[name] = np.array(losses)
        memory = "unknown" if peak is None else f"{peak / 1e6:,.0f} MB"
        steps = options.steps - 1
        in_loss = f"{loss_seconds / steps * 1e3:.1f} ms, {loss_seconds / seconds:.0%}"
        print(
            f"{way.title:21}{losses[0]:8.4f} ->{np.mean(losses[-20:]):7.4f}{rows * steps / seconds:10,.0f}"
            f"{seconds / steps * 1e3:11.1f}{in_loss:>22}{memory:>14}"
        )
    first, *others = options.ways
    for name in others:
        difference = np.abs(curves[name] - curves[first]).max()
        print(f"largest difference of the losses of {WAYS[name].title} from {WAYS[first].title}: {difference:.1e}")


if __name__ == "__main__":
    main()
