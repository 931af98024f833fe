"""Train a causal language model of transformers with its Trainer, as it is and with a fused head, and tell what a step costs.

    python examples/finetune_transformers.py                     a small Llama from a configuration, in float32
    python examples/finetune_transformers.py --bf16              the model in bfloat16
    python examples/finetune_transformers.py --model FOLDER      a pretrained model of yours
    python examples/finetune_transformers.py --text book.txt     on a text of yours (default: the standard library's sources)

The one line that counts is `pyx_xent.torch.fuse_head(model)`. Words are bytes here, because a tokenizer would have to be
downloaded; the vocabulary has as many entries as those of language models in use.
"""

import argparse
import sys
import sysconfig
import time
from pathlib import Path

try:
    import torch
    import transformers

    import pyx_xent.torch
except ImportError as error:
    sys.exit(f"{error}. This example needs the extra 'transformers': pip install 'pyx_xent[transformers]'")


def text_of(path):
    if path is not None:
        return path.read_bytes()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return b"".join(file.read_bytes() for file in files)


class Samples(torch.utils.data.Dataset):
    """Pieces of a text, each of which is its own target: transformers moves it by one."""

    def __init__(self, text, context):
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.context = context

    def __len__(self):
        return len(self.tokens) // self.context

    def __getitem__(self, k):
        piece = self.tokens[k * self.context : (k + 1) * self.context]
        return {"input_ids": piece, "labels": piece}


def model_of(options):
    if options.model is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(options.model)
    torch.manual_seed(options.seed)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=4 * options.width,
            num_hidden_layers=options.layers, num_attention_heads=4, num_key_value_heads=4,
        )
    )  # fmt: skip


class Clock(transformers.TrainerCallback):
    """Seconds of all steps but the first, which has memory and threads to get."""

    def __init__(self):
        self.started, self.seconds, self.steps = None, 0.0, 0

    def on_step_end(self, args, state, control, **_):
        if self.started is None:
            self.started = time.perf_counter()
        else:
            self.seconds, self.steps = time.perf_counter() - self.started, self.steps + 1


def train(options, samples, fused):
    """(losses, seconds a step, the fused head or None)"""
    model = model_of(options)
    if options.bf16:
        model = model.to(torch.bfloat16)
    head = pyx_xent.torch.fuse_head(model) if fused else None
    clock = Clock()
    arguments = transformers.TrainingArguments(
        output_dir=str(options.output), max_steps=options.steps, per_device_train_batch_size=options.batch, report_to=[],
        save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=False, seed=options.seed, learning_rate=options.rate,
        gradient_accumulation_steps=options.accumulate,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=samples, callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, clock.seconds / clock.steps, head


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder with a pretrained causal language model")
    parser.add_argument("--text", type=Path, help="a file of text (default: sources of the standard library)")
    parser.add_argument("--bf16", action="store_true", help="the model in bfloat16")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/finetune_transformers"))
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first one is not timed")
    samples = Samples(text_of(options.text), options.context)
    if len(samples) < options.batch:
        sys.exit(f"the text has {len(samples.tokens)} bytes; a step takes {options.batch * options.context}")
    tokens = options.batch * options.accumulate * options.context
    times = {}
    for name, fused in (("as it is", False), ("fused head", True)):
        losses, seconds, head = train(options, samples, fused)
        times[name] = seconds
        speed = f"{seconds * 1e3:.0f} ms a step, {tokens / seconds:,.0f} tokens/s"
        print(f"{name:10} loss {losses[0]:.4f} -> {losses[-1]:.4f}, {speed}")
        if head is not None:
            print(head)
    print(f"as it is / fused head: {times['as it is'] / times['fused head']:.2f}")


if __name__ == "__main__":
    main()
