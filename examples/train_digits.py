"""Train a network in plain NumPy to read handwritten digits, with loss and gradient from pyx_xent.

    python examples/train_digits.py                     the 1,797 digits that scikit-learn carries
    python examples/train_digits.py --mnist DIR         the four MNIST files in DIR, plain or .gz
    python examples/train_digits.py --loss numpy        the textbook loss instead: the same curve

A multilayer perceptron (one hidden layer of ReLUs), mini-batches, Adam. Prints test accuracy and the time spent in the loss,
and writes a picture of the loss curve and of misread digits.
"""

import argparse
import gzip
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import pyx_xent

MNIST_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


@dataclass
class Digits:
    """Images (N, height, width) with values in [0, 1], and labels (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def scikit_learn_digits(seed):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.images / 16).astype(np.float32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, data.target, test_size=0.2, stratify=data.target, random_state=seed
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def read_idx(path):
    """An array in the IDX format of the MNIST files: two zero bytes, type 8 (unsigned byte), dimensions, their sizes, data."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * data[3]
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
    if len(data) != start + math.prod(shape):
        raise SystemExit(f"{path} should hold {math.prod(shape)} bytes of data for shape {shape}, but has {len(data) - start}")
    return np.frombuffer(data[start:], np.uint8).reshape(shape)


def mnist_digits(folder):
    found = {}
    for name, file in MNIST_FILES.items():
        candidates = [folder / file, folder / f"{file}.gz"]
        found[name] = next((path for path in candidates if path.is_file()), None)
    if None in found.values():
        missing = ", ".join(MNIST_FILES[name] for name, path in found.items() if path is None)
        raise SystemExit(f"--mnist {folder}: missing {missing} (each may end in .gz)")
    arrays = {name: read_idx(path) for name, path in found.items()}
    for part in ("train", "test"):
        if len(arrays[f"{part}_images"]) != len(arrays[f"{part}_labels"]):
            raise SystemExit(f"--mnist {folder}: {part} images and labels differ in number")
        arrays[f"{part}_images"] = (arrays[f"{part}_images"] / 255).astype(np.float32)
        arrays[f"{part}_labels"] = arrays[f"{part}_labels"].astype(np.int64)
    return Digits(**arrays)


def textbook_loss(logits, target):
    """Mean cross-entropy and its gradient as in a textbook, in three arrays of the size of the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    rows = np.arange(len(target))
    loss = -np.log(probabilities[rows, target]).mean()
    gradient = probabilities
    gradient[rows, target] -= 1
    return loss, gradient / len(target)


LOSSES = {"pyx_xent": pyx_xent.cross_entropy_with_grad, "numpy": textbook_loss}


class Perceptron:
    """logits = relu(images @ w1 + b1) @ w2 + b2"""

    def __init__(self, inputs, hidden, classes, rng):
        self.parameters = {
            "w1": (rng.normal(size=(inputs, hidden)) * math.sqrt(2 / inputs)).astype(np.float32),
            "b1": np.zeros(hidden, np.float32),
            "w2": (rng.normal(size=(hidden, classes)) * math.sqrt(2 / hidden)).astype(np.float32),
            "b2": np.zeros(classes, np.float32),
        }

    def forward(self, images):
        """images (N, inputs) -> logits (N, classes), hidden (N, hidden)"""
        p = self.parameters
        hidden = np.maximum(images @ p["w1"] + p["b1"], 0)
        return hidden @ p["w2"] + p["b2"], hidden

    def backward(self, images, hidden, grad_logits):
        """The gradient of each parameter."""
        grad_hidden = (grad_logits @ self.parameters["w2"].T) * (hidden > 0)
        return {
            "w1": images.T @ grad_hidden,
            "b1": grad_hidden.sum(0),
            "w2": hidden.T @ grad_logits,
            "b2": grad_logits.sum(0),
        }


@dataclass
class Adam:
    """Kingma and Ba, 2015, algorithm 1."""

    rate: float = 2e-3
    step: int = 0
    mean: dict = field(default_factory=dict)
    square: dict = field(default_factory=dict)

    def update(self, parameters, gradients):
        self.step += 1
        for name, g in gradients.items():
            m = self.mean[name] = 0.9 * self.mean.get(name, 0) + 0.1 * g
            v = self.square[name] = 0.999 * self.square.get(name, 0) + 0.001 * g * g
            corrected = m / (1 - 0.9**self.step)
            parameters[name] -= self.rate * corrected / (np.sqrt(v / (1 - 0.999**self.step)) + 1e-8)


@dataclass
class Result:
    losses: list  # of each mini-batch
    accuracy: float
    seconds: float
    loss_seconds: float
    predictions: np.ndarray


def train(digits, loss_function, *, epochs, batch, hidden, seed):
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    images = digits.train_images.reshape(len(digits.train_images), -1)
    labels = digits.train_labels
    network = Perceptron(images.shape[1], hidden, 10, rng)
    optimizer, losses, loss_seconds = Adam(), [], 0.0
    batches = math.ceil(len(images) / batch)
    start = time.perf_counter()
    with tqdm(total=epochs * batches, unit="batch") as progress:
        for epoch in range(epochs):
            order = rng.permutation(len(images))
            for first in range(0, len(images), batch):
                chosen = order[first : first + batch]
                logits, activations = network.forward(images[chosen])
                target = labels[chosen]
                before = time.perf_counter()
                loss, grad_logits = loss_function(logits, target)
                loss_seconds += time.perf_counter() - before
                optimizer.update(network.parameters, network.backward(images[chosen], activations, grad_logits))
                losses.append(float(loss))
                progress.update()
            progress.set_postfix(epoch=epoch + 1, loss=f"{np.mean(losses[-batches:]):.4f}")
    seconds = time.perf_counter() - start
    predictions = network.forward(digits.test_images.reshape(len(digits.test_images), -1))[0].argmax(1)
    return Result(losses, float((predictions == digits.test_labels).mean()), seconds, loss_seconds, predictions)


def draw(result, digits, path):
    """The loss of each mini-batch, and up to ten digits that were misread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic([["loss"] * 5, list("01234"), list("56789")], figsize=(9, 7), height_ratios=[2, 1, 1])
    axes["loss"].semilogy(result.losses, linewidth=0.8)
    axes["loss"].set(xlabel="mini-batch", ylabel="loss", title=f"test accuracy {result.accuracy:.2%}")
    wrong = np.flatnonzero(result.predictions != digits.test_labels)
    for k in range(10):
        axes[str(k)].set_axis_off()
        if k < len(wrong):
            axes[str(k)].imshow(digits.test_images[wrong[k]], cmap="gray_r")
            read, meant = result.predictions[wrong[k]], digits.test_labels[wrong[k]]
            axes[str(k)].set_title(f"{meant} read as {read}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="folder with the four MNIST files, plain or .gz")
    parser.add_argument("--loss", choices=LOSSES, default="pyx_xent", help="what computes loss and gradient")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256, help="units of the hidden layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("train_digits.png"), help="where the picture goes")
    options = parser.parse_args(arguments)
    for name in ("epochs", "batch", "hidden"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        digits = scikit_learn_digits(options.seed) if options.mnist is None else mnist_digits(options.mnist)
        print(f"{len(digits.train_images)} digits to learn from, {len(digits.test_images)} to test; loss: {options.loss}")
        result = train(
            digits, LOSSES[options.loss], epochs=options.epochs, batch=options.batch, hidden=options.hidden, seed=options.seed
        )
        draw(result, digits, options.plot)
    except ImportError as error:
        sys.exit(f"{error}. This example needs the extra 'demo': pip install 'pyx_xent[demo]'")
    batches = math.ceil(len(digits.train_images) / options.batch)
    print(f"mean loss of the last epoch  {np.mean(result.losses[-batches:]):.6f}")
    print(f"test accuracy                {result.accuracy:.2%}")
    print(
        f"time                         {result.seconds:.2f} s, of which {result.loss_seconds:.3f} s in the loss "
        f"({result.loss_seconds / len(result.losses) * 1e6:.1f} µs a batch of {options.batch} × 10)"
    )
    print(f"picture                      {options.plot}")
    return result


if __name__ == "__main__":
    main()
