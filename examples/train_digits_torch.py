"""Train a PyTorch network to read handwritten digits, with pyx_xent's loss, PyTorch's, or both from the same seed.

    python examples/train_digits_torch.py                    both losses, a dense network: the curves agree
    python examples/train_digits_torch.py --network conv     a convolutional one
    python examples/train_digits_torch.py --loss pyx_xent    one loss only

Changing the loss is changing one import: see LOSSES. Prints test accuracy and the time spent in the loss, forward and backward.
"""

import argparse
import math
import sys
import time

import numpy as np

try:
    import torch
    from torch import nn
    from tqdm import tqdm
    from train_digits import scikit_learn_digits

    import pyx_xent.torch
except ImportError as error:
    sys.exit(f"{error}. This example needs PyTorch and the extra 'demo': pip install 'pyx_xent[demo,torch]'")

LOSSES = {"pyx_xent": pyx_xent.torch.cross_entropy, "torch": nn.functional.cross_entropy}


def network(kind):
    """(N, 8, 8) images -> (N, 10) logits"""
    if kind == "dense":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip


def train(digits, name, options):
    """(loss of each mini-batch, test accuracy, seconds, seconds in the loss)"""
    torch.manual_seed(options.seed)
    model = network(options.network)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    losses, loss_seconds, start = [], 0.0, time.perf_counter()
    batches = math.ceil(len(images) / options.batch)
    with tqdm(total=options.epochs * batches, unit="batch", desc=name) as progress:
        for _ in range(options.epochs):
            for chosen in torch.randperm(len(images)).split(options.batch):
                logits = model(images[chosen])
                target = labels[chosen]
                # The graph is cut at the logits only to see how long the loss takes.
                leaf = logits.detach().requires_grad_()
                before = time.perf_counter()
                loss = LOSSES[name](leaf, target)
                loss.backward()
                loss_seconds += time.perf_counter() - before
                optimizer.zero_grad()
                logits.backward(leaf.grad)
                optimizer.step()
                losses.append(loss.item())
                progress.update()
            progress.set_postfix(loss=f"{np.mean(losses[-batches:]):.4f}")
    seconds = time.perf_counter() - start
    with torch.no_grad():
        predictions = model(torch.from_numpy(digits.test_images)).argmax(1)
    accuracy = (predictions == torch.from_numpy(digits.test_labels)).double().mean().item()
    return np.array(losses), accuracy, seconds, loss_seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=[*LOSSES, "both"], default="both")
    parser.add_argument("--network", choices=["dense", "conv"], default="dense")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("epochs", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    digits = scikit_learn_digits(options.seed)
    curves = []
    for name in LOSSES if options.loss == "both" else [options.loss]:
        losses, accuracy, seconds, loss_seconds = train(digits, name, options)
        curves.append(losses)
        print(
            f"{name:9} last loss {losses[-1]:.6f}, test accuracy {accuracy:.2%}, {seconds:.2f} s, "
            f"of which {loss_seconds:.3f} s in the loss ({loss_seconds / len(losses) * 1e6:.0f} µs a batch)"
        )
    if len(curves) == 2:
        first = min(50, len(curves[0]))  # later, rounding has led the two to different places in the same valley
        apart = np.abs(curves[0] - curves[1])[:first].max()
        print(f"largest difference of the first {first} losses: {apart:.1e}")


if __name__ == "__main__":
    main()
