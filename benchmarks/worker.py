"""Processes that measure, with the environment that users have; and PyTorch with THP_MEM_ALLOC_ENABLE=1 beside PyTorch without.

That switch is read once, when PyTorch is loaded, so it needs a process of its own. Its worker makes its own arrays; a call
sends it one byte and waits for another. That costs some 50 µs and is inside the time: at most some percent, since only arrays
of 2 MB and more, which take PyTorch milliseconds, are sent here.
"""

import multiprocessing
import os
from contextlib import contextmanager

from .cases import Problem

SWITCH = "THP_MEM_ALLOC_ENABLE"
# OpenBLAS finds out which kernels and block sizes fit the processor. Where a container sets these, it takes others: half the
# speed on a Zen 4 or Zen 5 that is told to be a Haswell. Users have neither, so no process that measures has them.
NOT_OF_USERS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


@contextmanager
def environment(huge_pages=False):
    """Processes started inside have the environment that users have, with PyTorch's switch for huge pages on or off."""
    before = {name: os.environ.pop(name, None) for name in (SWITCH, *NOT_OF_USERS)}
    if huge_pages:
        os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(SWITCH, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def in_a_process(function, *arguments, huge_pages=False):
    """What function(*arguments) returns in a process of its own, started afresh."""
    with environment(huge_pages), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def serve(connection):
    """In the worker: ("prepare", case, operation, threads), ("run",), ("fetch",) until the other end is closed."""
    from . import peers

    make, problem, compute, result = peers.torch_eager, None, None, None
    while True:
        try:
            order, *arguments = connection.recv()
        except EOFError:
            return
        if order == "run":
            result = compute()
            connection.send(None)
        elif order == "fetch":
            connection.send(peers.torch_answer(problem, result))
        else:
            problem = compute = result = None  # the arrays of before go first
            if order == "prepare":
                case, operation, threads = arguments
                problem = Problem(case)
                compute = make(problem, operation, threads)
            connection.send(None)


class HugePages:
    """One worker for the whole run, started when it is first needed."""

    _connection = None

    @classmethod
    def ask(cls, *order):
        if cls._connection is None:
            context = multiprocessing.get_context("spawn")
            cls._connection, theirs = context.Pipe()
            with environment(huge_pages=True):
                context.Process(target=serve, args=(theirs,), daemon=True).start()
            theirs.close()
        cls._connection.send(order)
        return cls._connection.recv()

    @classmethod
    def prepare(cls, case, operation, threads):
        cls.ask("prepare", case, operation, threads)

        def compute():
            cls.ask("run")
            return cls

        return compute

    @classmethod
    def fetch(cls, problem):
        return cls.ask("fetch")

    @classmethod
    def forget(cls):
        """Let its arrays go."""
        if cls._connection is not None:
            cls.ask("forget")
