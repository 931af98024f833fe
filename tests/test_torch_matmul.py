"""Which BLAS multiplies for pyx_xent.torch.linear_cross_entropy, and that all it promises holds with either."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers_torch import F, ours, torch

import pyx_xent as px
from pyx_xent import linear
from pyx_xent.torch import _linear_products, _matmul
from pyx_xent.torch._tensors import array_of

pytest.importorskip("threadpoolctl")
LIBRARIES = ["numpy", "torch"]


@pytest.fixture(autouse=True)
def _as_before():
    yield
    ours.set_matmul("auto")
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def layer(dtype=torch.float32, rows=30, width=12, classes=700, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(classes, width, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(classes, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)
    target[1] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [None, 20000])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.5}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
def test_either_gives_the_loss_and_gradients_of_the_logits(library, dtype, chunk_bytes, options):
    ours.set_matmul(library)
    hidden, weight, bias, target = layer(dtype)
    loss = ours.linear_cross_entropy(hidden, weight, target, linear_bias=bias, chunk_bytes=chunk_bytes, **options)
    found = torch.autograd.grad(loss, (hidden, weight, bias))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = F.linear(*exact) * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = torch.tanh(logits / options["softcap"]) * options["softcap"]
    of_loss = {name: value for name, value in options.items() if name in ("label_smoothing", "z_loss")}
    expected = ours.cross_entropy(logits, target, **of_loss)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(found, torch.autograd.grad(expected, exact), strict=True):
        assert one.dtype is dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("library", LIBRARIES)
def test_either_differentiates_twice_compiles_and_works_under_autocast(library):
    ours.set_matmul(library)
    hidden, weight, _, target = layer(torch.float64, rows=4, width=3, classes=5)
    assert torch.autograd.gradgradcheck(lambda h, w: ours.linear_cross_entropy(h, w, target), (hidden, weight))
    hidden, weight, _, target = layer()
    eager = ours.linear_cross_entropy(hidden, weight, target)
    compiled = torch.compile(lambda h, w, t: ours.linear_cross_entropy(h, w, t), fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden, weight, target), eager)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours.linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(loss, eager, rtol=2e-2, atol=0)


@pytest.mark.parametrize("library", LIBRARIES)
def test_either_finds_bad_labels_before_anything_is_multiplied(library):
    ours.set_matmul(library)
    hidden, weight, _, target = layer()
    target[7] = 700
    with pytest.raises(IndexError, match=r"Target 700 is out of bounds. \(target\[7\]"):
        ours.linear_cross_entropy(hidden, weight, target)


def test_deterministic_algorithms_mean_pytorchs_products():
    ours.set_matmul("numpy")
    assert _matmul.multiplies(torch.float32, 1.0) == "numpy"
    torch.use_deterministic_algorithms(True)
    assert _matmul.multiplies(torch.float32, 1.0) == "torch"
    assert "use_deterministic_algorithms" in px.show_config()["matmul"]


@pytest.mark.parametrize("missing", ["vendor", "mkl", "dtype", "gain", "size"])
def test_auto_leaves_pytorchs_products_unless_every_fact_speaks_for_numpys(missing, monkeypatch):
    blas = _matmul.numpy_blas()
    monkeypatch.setattr(_matmul, "numpy_blas", lambda: blas)
    monkeypatch.setattr(blas, "internal_api", "openblas", raising=False)
    monkeypatch.setattr(_matmul, "vendor", lambda: "GenuineIntel" if missing == "vendor" else "AuthenticAMD")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: missing != "mkl")
    monkeypatch.setattr(_matmul, "_gains", {})
    monkeypatch.setattr(_matmul, "_measured_gain", lambda dtype: 1.2 if missing == "gain" else 2.5)
    dtype = torch.bfloat16 if missing == "dtype" else torch.float32
    operations = 1e6 if missing == "size" else 1e12
    assert _matmul.multiplies(dtype, operations) == "torch"
    monkeypatch.setattr(_matmul, "vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(_matmul, "_measured_gain", lambda dtype: 2.5)
    _matmul._gains.clear()
    assert _matmul.multiplies(torch.float32, 1e12) == "numpy"
    assert "by numpy: numpy is 2.50 times as fast as torch" in px.show_config()["matmul"]


def test_the_measurement_is_one_of_the_two_products():
    assert 0.01 < _matmul._measured_gain(torch.float32) < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numpys_blas_has_one_thread_a_product_and_its_own_again_afterwards(monkeypatch, dtype):
    blas = _matmul.numpy_blas()
    before, threads = blas.get_num_threads(), torch.get_num_threads()
    of_blas, callers = [], set()
    matmul = np.matmul

    def watched(*arguments, **named):
        of_blas.append(blas.get_num_threads())
        callers.add(threading.get_ident())
        time.sleep(0.001)  # long enough for the other thread to begin
        return matmul(*arguments, **named)

    monkeypatch.setattr(np, "matmul", watched)
    monkeypatch.setattr(linear, "PART_BYTES", 50 * 12 * 4)
    ours.set_matmul("numpy")
    hidden, weight, _, target = layer(dtype)
    try:
        blas.set_num_threads(3)
        for allowed in (1, 2):
            torch.set_num_threads(allowed)
            callers.clear()
            ours.linear_cross_entropy(hidden, weight, target).backward()
            assert set(of_blas) == {1}
            assert len(callers) <= allowed
            assert blas.get_num_threads() == 3
        target[0] = 9999
        with pytest.raises(IndexError):
            ours.linear_cross_entropy(hidden, weight, target)
        assert blas.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
        blas.set_num_threads(before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 2, 3, 100, 701])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("in_place", [True, False])
def test_products_on_any_number_of_threads(dtype, classes, threads, in_place, monkeypatch):
    if not in_place:
        monkeypatch.setattr(linear._gemm, "add_product", lambda *arguments: False)
    monkeypatch.setattr(linear, "PART_BYTES", 50 * 12 * 8)
    rng = np.random.default_rng(0)
    half = dtype is torch.bfloat16
    hidden, weight = rng.standard_normal((30, 12)), rng.standard_normal((classes, 12))
    if half:
        hidden, weight = (torch.from_numpy(array).to(dtype) for array in (hidden, weight))
        products = _linear_products.NumpyProducts(array_of(weight), threads)
        hidden, weight, given = hidden.double().numpy(), weight.double().numpy(), array_of(hidden)
    else:
        given = hidden = hidden.astype(dtype)
        weight = weight.astype(dtype)
        products = linear.Products(weight, threads)
    tolerance = 1e-12 if dtype is np.float64 else 1e-5
    logits = np.full((30, classes), np.nan, products.dtype)
    products.logits(given, logits)
    np.testing.assert_allclose(logits, hidden @ weight.T, tolerance, 10 * tolerance)
    np.testing.assert_allclose(products.grad_hidden(logits), logits @ weight, tolerance, 100 * tolerance)
    total = np.full((classes, 12), np.nan, products.dtype)
    for times in (1, 2):
        products.add_grad_weight(logits, given, total, first=times == 1)
        np.testing.assert_allclose(total, times * (logits.T @ hidden), tolerance, 100 * tolerance)


def test_many_callers_leave_numpys_threads_as_they_were():
    blas = _matmul.numpy_blas()
    before, results = blas.get_num_threads(), []
    ours.set_matmul("numpy")
    hidden, weight, _, target = layer()

    def work():
        for _ in range(10):
            loss = ours.linear_cross_entropy(hidden, weight, target)
            results.append(torch.autograd.grad(loss, weight)[0])

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert blas.get_num_threads() == before
    assert len(results) == 40
    for result in results:
        torch.testing.assert_close(result, results[0])


def _in_child(queue):
    hidden, weight, _, target = layer()
    queue.put(ours.linear_cross_entropy(hidden, weight, target).item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_multiplies_by_numpy():
    ours.set_matmul("numpy")
    hidden, weight, _, target = layer()
    expected = ours.linear_cross_entropy(hidden, weight, target).item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    with _matmul._threads.lock:  # whoever has it at the fork is not in the child
        child.start()
    assert queue.get(timeout=60) == pytest.approx(expected, rel=1e-6)
    child.join(60)
    assert child.exitcode == 0


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )


def test_the_environment_variable_chooses():
    code = "import pyx_xent, pyx_xent.torch; print(pyx_xent.show_config()['matmul'])"
    assert "tensors: numpy (set_matmul or PYX_XENT_MATMUL)" in run(code, PYX_XENT_MATMUL="numpy").stdout
    assert "tensors: torch (set_matmul" in run(code, PYX_XENT_MATMUL="torch").stdout
    assert "PYX_XENT_MATMUL must be one of 'auto', 'numpy', 'torch', got 'mkl'" in run(code, PYX_XENT_MATMUL="mkl").stderr


SETUP = """if True:
    import os, resource, signal, threading, torch, pyx_xent.torch as px
    from pyx_xent.torch import _matmul
    torch.set_num_threads(2)
    threads = _matmul.numpy_blas().get_num_threads()
    hidden, target = torch.ones(2000, 200, requires_grad=True), torch.zeros(2000, dtype=int)
    weight = torch.zeros(100_000, 200, requires_grad=True)
    px.linear_cross_entropy(hidden[:3], weight, target[:3]).backward()
    weight.grad = None
"""
AS_EVER = """
    assert _matmul.numpy_blas().get_num_threads() == threads
    assert 11 < px.linear_cross_entropy(hidden[:3], weight, target[:3]) < 12
    print("as ever")"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sends a signal as POSIX does")
@pytest.mark.parametrize("library", LIBRARIES)
def test_either_hears_ctrl_c(library):
    code = f"""
    many, targets = hidden.detach().repeat(300, 1), target.repeat(300)  # a minute of products and more
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        px.linear_cross_entropy(many, weight, targets)
    except KeyboardInterrupt:
        print("interrupted")
    {AS_EVER}"""
    result = run(SETUP + code, PYX_XENT_MATMUL=library)
    assert result.stdout == "interrupted\nas ever\n", result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("library", LIBRARIES)
def test_either_stays_usable_without_memory_for_the_gradients(library):
    code = f"""
    px.reuse_gradients(0)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), limits[1]))
    try:
        px.linear_cross_entropy(hidden, weight, target).backward()
    except MemoryError as error:
        print("MemoryError")
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert hidden.grad[5:].count_nonzero() == 0 and weight.grad is None
    {AS_EVER}"""
    result = run(SETUP + code, PYX_XENT_MATMUL=library)
    assert result.stdout == "MemoryError\nas ever\n", result.stderr


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="library must be one of 'auto', 'numpy', 'torch', got 'MKL'"):
        ours.set_matmul("MKL")


def test_without_threadpoolctl_auto_means_pytorch_and_numpy_is_refused(monkeypatch):
    monkeypatch.setattr(_matmul, "numpy_blas", lambda: None)
    assert _matmul.multiplies(torch.float32, 1e12) == "torch"
    assert "threadpoolctl is not installed" in px.show_config()["matmul"]
    with pytest.raises(ImportError, match="pip install threadpoolctl"):
        ours.set_matmul("numpy")


def test_float32_is_multiplied_in_bfloat16_only_where_the_user_says_so(monkeypatch):
    from pyx_xent.torch import _private

    monkeypatch.setattr(_private, "multiplies_bfloat16_fast", _private.has_bfloat16_products)
    hidden, weight, bias, target = layer(rows=200, width=64)
    exact = ours.linear_cross_entropy(hidden, weight, target, linear_bias=bias)
    exact_gradients = torch.autograd.grad(exact, (hidden, weight, bias))
    assert _linear_products.multiplied_dtype(torch.float32) is torch.float32
    torch.set_float32_matmul_precision("medium")
    assert _linear_products.multiplied_dtype(torch.float64) is torch.float64
    if not _private.has_bfloat16_products():
        pytest.skip("oneDNN has no bfloat16 products here")
    loss = ours.linear_cross_entropy(hidden, weight, target, linear_bias=bias, chunk_bytes=100_000)
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss.dtype is torch.float32
    assert not torch.equal(loss, exact)
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    for found, expected in zip(gradients, exact_gradients, strict=True):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-2 * expected.abs().max().item())
