"""PyTorch with THP_MEM_ALLOC_ENABLE=1 beside PyTorch without: it is read once, when PyTorch is loaded, so in a worker process.

The worker makes its own arrays; a call sends it one byte and waits for another. That costs some 50 µs and is inside the time:
at most some percent, since only arrays of 2 MB and more, which take PyTorch milliseconds, are sent here.
"""

import multiprocessing
import os
from contextlib import contextmanager

from .cases import Problem

SWITCH = "THP_MEM_ALLOC_ENABLE"


@contextmanager
def switched_on():
    """Processes started inside inherit the switch."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


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
            with switched_on():
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
