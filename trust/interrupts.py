"""How long Ctrl-C takes during calls on large arrays, all of whose memory is there."""

import signal
import subprocess
import sys
import time

import numpy as np

PROMISED = 2.0  # seconds
CASES = {  # what: (code that makes arrays, the call)
    "loss, logits (8, 2^28)": ("x = full((8, 2**28), 'f4')", "px.cross_entropy(x, [0] * 8)"),
    "loss, logits (1, 2^31)": ("x = full((1, 2**31), 'f4')", "px.cross_entropy(x, [0])"),
    "loss and gradient in place, logits (1, 2^31)": (
        "x = full((1, 2**31), 'f4')", "px.cross_entropy_with_grad(x, [0], grad_out=x)"
    ),
    "loss, logits (2^28, 2), labels int64": ("x, t = full((2**28, 2), 'f4'), full(2**28, 'i8')", "px.cross_entropy(x, t)"),
    "loss, logits (2^29, 2) of one row, labels int8": (
        "x, t = np.broadcast_to(full(2, 'f4'), (2**29, 2)), full(2**29, 'i1')", "px.cross_entropy(x, t)"
    ),
    "loss, logits (2^28, 2) of one row, labels uint64": (
        "x, t = np.broadcast_to(full(2, 'f4'), (2**28, 2)), full(2**28, 'u8')", "px.cross_entropy(x, t)"
    ),
    "loss of each row, logits (2^28, 2)": (
        "x, t = full((2**28, 2), 'f4'), full(2**28, 'i8')", "px.cross_entropy(x, t, reduction='none')"
    ),
    "softmax, logits (2^28, 4)": ("x = full((2**28, 4), 'f4')", "px.softmax(x)"),
    "loss, big-endian logits (2^30, 2)": ("x, t = full((2**30, 2), '>f2'), full(2**30, 'i1')", "px.cross_entropy(x, t)"),
    "linear_cross_entropy_with_grad (4096, 1024, 131072)": (
        "h, w, t = full((4096, 1024), 'f4'), full((131072, 1024), 'f4'), full(4096, 'i8')",
        "px.linear_cross_entropy_with_grad(h, w, t)",
    ),
}  # fmt: skip
WORKER = """
import signal
import numpy as np, pyx_xent as px
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without
full = lambda shape, dtype: np.full(shape, 1, dtype)
{}
while True:
    try:
        print("ready", flush=True)
        while True:
            {}
    except KeyboardInterrupt:
        print("heard", flush=True)
"""


def latencies(what, count, seed):
    """Seconds from the signal to KeyboardInterrupt, for signals at random moments of calls that follow each other."""
    rng = np.random.default_rng(seed)
    found = []
    with subprocess.Popen([sys.executable, "-c", WORKER.format(*CASES[what])], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(count):
            assert process.stdout.readline() == "ready\n", what
            time.sleep(rng.uniform(0, 5))
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            heard = process.stdout.readline()
            found.append(time.monotonic() - start)
            assert heard == "heard\n", f"{what}: {heard!r}"
        process.kill()
    return found
