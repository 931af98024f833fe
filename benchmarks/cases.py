"""The shapes that are timed, each with its reason."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    reason: str

    def __str__(self):
        return f"{self.rows}x{self.classes}"

    def arrays(self):
        """(logits float32, target int64), the same each time."""
        rng = np.random.default_rng(0)
        logits = 3 * rng.standard_normal((self.rows, self.classes), dtype=np.float32)
        return logits, rng.integers(0, self.classes, self.rows)


CASES = [
    Case(64, 10, "a mini-batch of digits: the cost of the call itself"),
    Case(256, 1000, "image classification: in cache"),
    Case(2048, 32000, "a language model's head: memory"),
]
