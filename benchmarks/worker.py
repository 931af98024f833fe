"""Processes that measure: with users' environment, PyTorch's THP_MEM_ALLOC_ENABLE=1, or another checkout's package.

PyTorch reads its switch once, when it is loaded, and a process has one pyx_xent, so a Worker is a process that makes its own
arrays. `seconds` is what its own clock says. A single call costs some 50 µs more, for the message and its answer: where
pytest-benchmark holds the clock, only arrays of 2 MB and more, which take PyTorch milliseconds, are sent here.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .cases import Problem

ROOT = Path(__file__).parents[1]
# seconds: OpenMP's threads spin that long after their work, and would take a CPU from another process whose turn it is
SPINNING = 0.03
LLVM_SPINS = {"KMP_BLOCKTIME": "20"}  # milliseconds, so less than that; by default 200
SWITCH = "THP_MEM_ALLOC_ENABLE"
# OpenBLAS finds out which kernels and block sizes fit the processor. Where a container sets these, it takes others: half the
# speed on a Zen 4 or Zen 5 that is told to be a Haswell. Users have neither, so no process that measures has them.
NOT_OF_USERS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


@contextmanager
def environment(huge_pages=False, isa=None):
    """Processes started inside have the environment that users have, with PyTorch's switch for huge pages on or off."""
    ours = {SWITCH: "1" if huge_pages else None, "PYX_XENT_ISA": isa or os.environ.get("PYX_XENT_ISA"), **LLVM_SPINS}
    before = dict(os.environ)
    for name, value in {**ours, **dict.fromkeys(NOT_OF_USERS)}.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_a_process(function, *arguments, huge_pages=False):
    """What function(*arguments) returns in a process of its own, started afresh."""
    with environment(huge_pages), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def serve(connection):
    """In the worker: ("prepare", case, operation, threads, peer), ("run",), ("seconds", count), ("fetch",), ("forget",)."""
    from . import peers

    peer = problem = compute = result = None
    while True:
        try:
            order, *arguments = connection.recv()
        except EOFError:
            return
        answer = None
        if order == "run":
            result = compute()
        elif order == "seconds":
            (count,) = arguments
            time.sleep(SPINNING)
            result = compute()  # brings its data into the caches and wakes its threads
            start = time.perf_counter()
            for _ in range(count):
                result = compute()
            answer = time.perf_counter() - start
        elif order == "fetch":
            answer = peer.answer(problem, result)
        else:
            peer = problem = compute = result = None  # the arrays of before go first
            if order == "prepare":
                case, operation, threads, name = arguments
                peer, problem = peers.PEERS[name], Problem(case)
                compute = peer.make(problem, operation, threads)
        connection.send(answer)


class Worker:
    """A process that computes a peer's answers to a case: with huge pages, another checkout's package, other kernels."""

    def __init__(self, huge_pages=False, checkout=None, isa=None):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._folder = tempfile.TemporaryDirectory()  # with nothing but pyx_xent: the benchmarks are these
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        with environment(huge_pages, isa):
            if checkout is not None:
                Path(self._folder.name, "pyx_xent").symlink_to(Path(checkout, "pyx_xent").resolve(strict=True))
                sys.path.insert(0, self._folder.name)
            try:
                self._process.start()
            finally:
                if checkout is not None:
                    sys.path.remove(self._folder.name)
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._connection.close()  # ends it
        self._process.join()
        self._folder.cleanup()

    def ask(self, *order):
        self._connection.send(order)
        return self._connection.recv()

    def prepare(self, case, operation, threads, peer):
        self.ask("prepare", case, operation, threads, peer)

    def __call__(self, count=1):
        for _ in range(count):
            self.ask("run")
        return self

    def seconds(self, count):
        return self.ask("seconds", count)

    def fetch(self):
        return self.ask("fetch")

    def forget(self):
        """Let its arrays go."""
        self.ask("forget")


@cache
def huge_pages():
    """One for the whole run, started when it is first needed."""
    return Worker(huge_pages=True)


def forget_huge_pages():
    if huge_pages.cache_info().currsize:
        huge_pages().forget()
