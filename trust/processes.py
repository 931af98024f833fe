"""Forks, limits on threads, and other libraries in the process: calls must come back, and with the same bits.

Each check runs in a process of its own (`in_new_process`), because OpenMP's threads and imports cannot be undone.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import pyx_xent as px
from pyx_xent import _threads

PATIENCE = 10  # seconds for a child that has milliseconds of work
LIBRARIES = ("torch", "sklearn", "scipy.special", "jax")


def problem():
    """So much that a call uses all threads it may."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((300, 1000))).astype(np.float32)
    return logits, rng.integers(0, 1000, 300)


def digest():
    """Of what calls on `problem` give: the same in every process."""
    logits, target = problem()
    loss, gradient = px.cross_entropy_with_grad(logits, target, reduction="none")
    together = hashlib.sha256()
    for array in (loss, gradient, px.softmax(logits), px.log_softmax(logits[:1].repeat(50, axis=1))):
        together.update(array.tobytes())
    return together.hexdigest()


def in_new_process(code, timeout=600, **environment):
    """What `code` prints, which is to be JSON."""
    result = subprocess.run(
        [sys.executable, "-c", f"import json\nfrom trust import processes\n{code}"],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"{code!r} with {environment} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


# Forks


def child(expected, generations):
    """What a forked child does; never returns."""
    status = 1
    try:
        status = 0 if digest() == expected and (generations == 1 or forked(expected, generations - 1)) else 2
    finally:
        os._exit(status)


def ended_well(pid):
    """Wait for a child; one that hangs is killed."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def forked(expected, generations=1):
    pid = os.fork()
    if pid == 0:
        child(expected, generations)
    return ended_well(pid)


def grandchild(expected):
    return forked(expected, generations=2)


def forked_by_a_thread(expected):
    found = []
    thread = threading.Thread(target=lambda: found.append(forked(expected)))
    thread.start()
    thread.join()
    return found[0]


def same_digest(expected):
    return digest() == expected


def pool_of_ten(expected):
    """A child for each task."""
    with multiprocessing.get_context("fork").Pool(10, maxtasksperchild=1) as pool:
        try:
            return all(pool.map_async(same_digest, [expected] * 10, chunksize=1).get(10 * PATIENCE))
        except multiprocessing.TimeoutError:
            return False


def while_a_thread_computes(expected):
    """Fork with another thread inside a kernel nearly all the time."""
    stop = threading.Event()
    logits, target = problem()
    logits, target = logits.repeat(10, axis=0), target.repeat(10)

    def compute():
        while not stop.is_set():
            px.cross_entropy_with_grad(logits, target)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        time.sleep(0.01)
        return forked(expected)
    finally:
        stop.set()
        thread.join()


KINDS = {  # name: (what forks, children that compute)
    "os.fork": (forked, 1),
    "os.fork by another thread": (forked_by_a_thread, 1),
    "grandchild": (grandchild, 2),
    "multiprocessing pool": (pool_of_ten, 10),
    "os.fork while another thread computes": (while_a_thread_computes, 1),
}


def forks(count):
    """{kind: [children, those that computed the right bits]}, `count` of each kind, after this process computed in parallel."""
    expected = digest()
    found = {}
    for name, (fork, children) in KINDS.items():
        times = count // children
        found[name] = [times * children, children * sum(fork(expected) for _ in range(times))]
    return found


# Limits on threads


def threads_and_digest():
    return [px.get_num_threads(), _threads.available()[1], digest()]


class Group:
    """A cgroup with a quota of one CPU, for this process and what it starts; OSError where that is not permitted."""

    def __enter__(self):
        self.version_2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        parent = Path("/sys/fs/cgroup") if self.version_2 else Path("/sys/fs/cgroup/cpu")
        self.home = parent / "cgroup.procs"
        self.folder = Path(tempfile.mkdtemp(prefix="pyx_xent-", dir=parent))
        try:
            if self.version_2:
                (self.folder / "cpu.max").write_text("100000 100000")
            else:
                (self.folder / "cpu.cfs_quota_us").write_text("100000")
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            self.folder.rmdir()
            raise
        return self

    def __exit__(self, *_):
        self.home.write_text(str(os.getpid()))
        self.folder.rmdir()


CALL = "print(json.dumps(processes.threads_and_digest()))"
LIMITS = {  # what: (code, environment, most threads; None: any)
    "OMP_NUM_THREADS=1": (CALL, {"OMP_NUM_THREADS": "1"}, 1),
    "OMP_NUM_THREADS=64": (CALL, {"OMP_NUM_THREADS": "64"}, None),
    "OMP_THREAD_LIMIT=1": (CALL, {"OMP_THREAD_LIMIT": "1"}, None),
    "OMP_STACKSIZE=64K": (CALL, {"OMP_STACKSIZE": "64K"}, None),
    "OMP_WAIT_POLICY=active": (CALL, {"OMP_WAIT_POLICY": "active"}, None),
    "OMP_DYNAMIC=true": (CALL, {"OMP_DYNAMIC": "true"}, None),
    "affinity mask of one CPU, set before the import": (CALL, {}, 1),
    "affinity mask of one CPU, set after the import": (
        "import os; processes.digest(); os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);" + CALL, {}, 1,
    ),
    "threadpoolctl.threadpool_limits(1)": (
        "import threadpoolctl\nwith threadpoolctl.threadpool_limits(1): " + CALL, {}, 1,
    ),
    "set_num_threads(1)": ("import pyx_xent; pyx_xent.set_num_threads(1);" + CALL, {}, 1),
}  # fmt: skip


def limits():
    """{what: (threads, reason)} where bits are the usual ones; SystemExit where they are not, or there are too many threads."""
    found, expected = {}, digest()

    def check(what, most, result):
        threads, reason, bits = result
        if bits != expected or (most is not None and threads > most):
            raise SystemExit(f"{what}: {threads} threads ({reason}), {'same' if bits == expected else 'other'} bits")
        found[what] = threads, reason

    for what, (code, environment, most) in LIMITS.items():
        cpus = os.sched_getaffinity(0)
        if what.endswith("before the import"):
            os.sched_setaffinity(0, [min(cpus)])  # inherited
        try:
            check(what, most, in_new_process(code, **environment))
        finally:
            os.sched_setaffinity(0, cpus)
    try:
        with Group() as group:
            what = f"cgroup quota of one CPU (version {2 if group.version_2 else 1})"
            check(what, 1, in_new_process(CALL))
    except OSError as error:
        found["cgroup quota"] = None, f"could not be set: {error}"
    return found


# Other libraries


def use(library):
    """Import it and compute something, on its own threads where it has some."""
    logits, target = problem()
    if library == "pyx_xent":
        return digest()
    if library == "torch":
        import torch

        x = torch.from_numpy(logits).requires_grad_()
        torch.nn.functional.cross_entropy(x @ x.T @ x, torch.from_numpy(target)).backward()
        return x.grad.isfinite().all().item()
    if library == "sklearn":
        from sklearn._loss import HalfMultinomialLoss

        loss, _ = HalfMultinomialLoss(n_classes=1000).loss_gradient(target.astype(np.float32), logits, n_threads=2)
        return bool(np.isfinite(loss).all())
    if library == "scipy.special":
        from scipy.special import log_softmax

        return bool(np.isfinite(log_softmax(logits @ logits.T, axis=1)).all())
    import jax

    return bool(np.isfinite(jax.jit(jax.nn.log_softmax)(logits)).all())


def import_and_use(order):
    """Import in this order, then call each, twice round; -> what pyx_xent computed."""
    for name in order:
        __import__(name)
    return [use(name) for _ in range(2) for name in order]


def import_orders():
    """Every permutation of this package and what is installed of LIBRARIES."""
    return list(itertools.permutations(["pyx_xent", *(name for name in LIBRARIES if find_spec(name.partition(".")[0]))]))


def check_order(order):
    # Not through `processes`, which imports pyx_xent first.
    code = (
        "import json, sys\nfor name in sys.argv[1:]: __import__(name)\n"
        "from trust import processes\nprint(json.dumps(processes.import_and_use(sys.argv[1:])))"
    )
    result = subprocess.run([sys.executable, "-c", code, *order], capture_output=True, text=True, timeout=300, check=False)
    text = f"importing {', '.join(order)}"
    if result.returncode:
        raise SystemExit(f"{text} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    found = json.loads(result.stdout.splitlines()[-1])
    expected = [digest() if name == "pyx_xent" else True for name in order] * 2
    if found != expected:
        raise SystemExit(f"{text}: {found}")
    return len(order)
