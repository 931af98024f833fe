"""The floating-point environment of the caller, signals, and memory that is not there."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import same_bits

import pyx_xent as px
from pyx_xent import _call
from trust.environment import AVAILABLE, MODES, TRAPS, Environment

glibc = pytest.mark.skipif(not AVAILABLE, reason="fenv_t is that of glibc on x86-64 and aarch64")
ROOT = os.path.dirname(os.path.dirname(__file__))


def everything(logits, target, soft, weight, threads):
    options = {"num_threads": threads}
    yield px.cross_entropy(logits, target, **options)
    for reduction in ("none", "mean"):
        yield from px.cross_entropy_with_grad(logits, target, reduction=reduction, label_smoothing=0.1, **options)
        yield from px.cross_entropy_with_grad(logits, soft, reduction=reduction, **options)
    of_rows = np.arange(1, len(target) + 1) / np.longdouble(3)  # rounded where they become float64
    third = np.longdouble(0.7) / 3
    for how in (
        {"label_smoothing": third}, {"sample_weight": of_rows, "z_loss": third}, {"normalizer": third, "grad_output": third}
    ):  # fmt: skip
        yield from px.cross_entropy_with_grad(logits, target, weight=weight / np.longdouble(3), **how, **options)
        if "z_loss" not in how:
            yield from px.cross_entropy_with_grad(logits, soft, weight=weight, **how, **options)
    yield from px.cross_entropy_with_grad(logits, target, reduction="none", grad_output=of_rows, **options)
    softmax = px.softmax(logits, **options)
    yield softmax
    yield px.log_softmax(logits, **options)
    yield px.softmax_backward(logits, softmax, **options)


@glibc
@pytest.mark.spec("S36")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(40, 10), (40, 300), (1, 70000), (20, 9000)], ids=str)
def test_no_rounding_mode_and_no_flushing_changes_a_bit(isa, dtype, rng, many_threads, mode, shape):
    logits = (10 * rng.normal(size=shape)).astype(dtype)
    logits[:, ::3] -= 95 if dtype is np.float32 else 720  # subnormal probabilities
    target, soft = rng.integers(0, shape[1], shape[0]), rng.dirichlet(np.ones(shape[1]), shape[0]).astype(dtype)
    weight = rng.random(shape[1])
    expected = list(everything(logits, target, soft, weight, 1))
    for threads in (1, 4):
        with Environment().under(MODES[mode]):
            found = list(everything(logits, target, soft, weight, threads))
        for one, other in zip(found, expected, strict=True):
            assert same_bits(one, other)


@glibc
@pytest.mark.spec("S36", "S40")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(np.float32), _call.bfloat16_bits], ids=str)
def test_losses_are_rounded_alike_in_any_mode(rng, mode, dtype):
    losses = np.concatenate([rng.exponential(size=200), 10.0 ** rng.uniform(-45, 5, 200)])
    expected = _call.rounded_losses(losses, dtype)
    with Environment().under(MODES[mode]):
        found = _call.rounded_losses(losses, dtype)
    assert found.tobytes() == expected.tobytes()


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100, check=False)


@glibc
def test_calls_trap_nothing():
    """Where the caller has the processor stop at NaN and infinities, those inside are none of its business."""
    code = """if True:
        import sys
        sys.path[:0] = sys.argv[1:]
        import numpy as np, pyx_xent as px
        from trust.environment import TRAPS, Environment
        logits = np.array([[0, -1e4, np.nan], [3e38, -3e38, 0], [0, -np.inf, np.inf]], np.float32)
        px.cross_entropy_with_grad(logits, [0, 1, 2])
        libm = Environment().libm
        if libm.feenableexcept(TRAPS) == -1:
            print("no traps")
            sys.exit()
        px.cross_entropy_with_grad(logits, [0, 1, 2])
        px.softmax(logits)
        libm.fedisableexcept(TRAPS)
        print("done")"""
    result = python(code, ROOT)
    if result.stdout == "no traps\n":
        pytest.skip("the processor has no traps")
    assert result.stdout == "done\n", result.stderr


@glibc
def test_calls_leave_exception_flags_as_they_were(isa, dtype):
    logits = np.array([[0, -1e4, np.nan], [3e38, -3e38, 1], [0, -np.inf, np.inf]], dtype)
    target, grad_out, probabilities = np.arange(3), np.empty_like(logits), np.empty_like(logits)
    libm = Environment().libm
    for flags in (0, TRAPS):  # Python itself may raise the flag of inexact results
        for call in (
            lambda: px.cross_entropy_with_grad(logits, target, reduction="none", grad_out=grad_out),
            lambda: px.softmax(logits, out=probabilities),
        ):
            libm.feclearexcept(TRAPS)
            libm.feraiseexcept(flags)
            call()
            assert libm.fetestexcept(TRAPS) == flags


@glibc
def test_importing_changes_no_environment():
    code = """if True:
        import sys
        sys.path[:0] = sys.argv[1:]
        import numpy
        from trust.environment import DEFAULT, MODES, Environment
        environment = Environment()
        for mode in (0, MODES["flushing to zero and rounding upward"]):
            environment.set(DEFAULT | mode)
            import pyx_xent
            pyx_xent.cross_entropy(numpy.ones((3, 4)), [0, 1, 2])
            assert environment.get() == DEFAULT | mode, hex(environment.get())
        environment.set(DEFAULT)
        print("done")"""
    result = python(code, ROOT)
    assert result.stdout == "done\n", result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sends a signal as POSIX does")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_call_hears_ctrl_c(threads):
    code = f"""if True:
        import os, signal, threading, numpy as np, pyx_xent as px
        logits = np.broadcast_to(np.zeros(1 << 20, np.float32), (1 << 21, 1 << 20))  # as 8.8 TB: it would take minutes
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            px.cross_entropy(logits, np.zeros(1 << 21, int), num_threads={threads})
        except KeyboardInterrupt:
            print("interrupted")
        logits = logits[:10]
        assert px.cross_entropy(logits, np.zeros(10, int)) > 9"""
    result = python(code)
    assert result.stdout == "interrupted\n", result.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or sys.platform != "linux", reason="limits memory as Linux does")
def test_without_memory_for_the_gradient_all_stays_usable():
    code = """if True:
        import resource, numpy as np, pyx_xent as px
        logits = np.zeros((1000, 100000), np.float32)  # 400 MB, never touched
        target = np.zeros(1000, int)
        px.cross_entropy(logits, target)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
        for function in (px.cross_entropy_with_grad, lambda x, y: px.softmax(x)):
            try:
                function(logits, target)
            except MemoryError:
                print("MemoryError", px.cross_entropy(logits, target) > 11)"""
    assert python(code).stdout == "MemoryError True\nMemoryError True\n"


def test_without_pytorch():
    code = """
import sys
sys.modules["torch"] = None
import pyx_xent
print(hasattr(pyx_xent, "torch"), "torch" in dir(pyx_xent))
try:
    import pyx_xent.torch
except ModuleNotFoundError as error:
    print(error)"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert found[0] == "False False"
    assert "pyx_xent.torch needs PyTorch: pip install torch" in found[1]
