"""SPEC S39: linear_cross_entropy is cross_entropy of explicit logits, and its gradients are those of the products."""

import _thread
import itertools
import time

import numpy as np
import pytest
from conftest import assert_close

import pyx_xent as px
from pyx_xent import _gemm, linear, reference

pytestmark = pytest.mark.spec("S39")
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-10}
ROWS, CLASSES, WIDTH = 13, 37, 5


def problem(rng, dtype, rows=(ROWS,), soft=False):
    hidden = rng.normal(size=(*rows, WIDTH)).astype(dtype)
    weight, bias = rng.normal(size=(CLASSES, WIDTH)).astype(dtype), rng.normal(size=CLASSES).astype(dtype)
    target = rng.random((*rows, CLASSES)).astype(dtype) if soft else rng.integers(0, CLASSES, rows)
    if not soft and target.size > 3:
        target.reshape(-1)[[1, 2, -1]] = -100
    return hidden, weight, bias, target


def explicit(hidden, weight, bias, target, logit_scale=1.0, softcap=None, class_weight=None, **options):
    """Loss and gradients in float64, from logits as one array."""
    h, w = np.float64(hidden), np.float64(weight)
    raw = (h @ w.T + (0 if bias is None else bias)) * logit_scale
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    loss, grad = reference.cross_entropy_with_grad(logits, target, class_weight, axis=-1, **options)
    grad = grad * logit_scale
    if softcap is not None:
        grad = grad * (1 - np.tanh(raw / softcap) ** 2)
    flat = grad.reshape(-1, len(w))
    return loss, (grad @ w, flat.T @ h.reshape(-1, h.shape[-1]), None if bias is None else flat.sum(0))


def check(found, expected, dtype):
    assert_close(found[0], expected[0], TOLERANCE[dtype])
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:
            assert gradient.dtype == dtype
            assert_close(gradient, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * CLASSES * 8, 1 << 20])
def test_every_option(dtype, rng, soft, reduction, chunk_bytes):
    hidden, weight, bias, target = problem(rng, dtype, soft=soft)
    class_weight, samples = rng.random(CLASSES).astype(dtype), rng.random(ROWS)
    g = rng.random(ROWS) if reduction == "none" else 0.7
    for with_bias, weighted, sampled, smoothing, z_loss in itertools.product([False, True], repeat=5):
        options = {
            "label_smoothing": 0.2 * smoothing, "z_loss": 0.1 * z_loss, "sample_weight": samples if sampled else None,
            "reduction": reduction, "grad_output": g,
        }  # fmt: skip
        used_bias, used_weight = bias if with_bias else None, class_weight if weighted else None
        expected = explicit(hidden, weight, used_bias, target, class_weight=used_weight, **options)
        found = px.linear_cross_entropy_with_grad(
            hidden, weight, target, linear_bias=used_bias, weight=used_weight, chunk_bytes=chunk_bytes, **options
        )
        check(found, expected, dtype)
        del options["grad_output"]
        loss = px.linear_cross_entropy(
            hidden, weight, target, linear_bias=used_bias, weight=used_weight, chunk_bytes=chunk_bytes, **options
        )
        np.testing.assert_array_equal(loss, found[0])
        assert loss.dtype == found[0].dtype == dtype


@pytest.mark.parametrize(
    "options",
    [{"logit_scale": 0.3}, {"softcap": 2.0}, {"logit_scale": 3.0, "softcap": 5.0}, {"focal_gamma": 2.0, "softcap": 2.0}],
    ids=str,
)
def test_scaled_capped_and_focal(dtype, rng, options):
    hidden, weight, bias, target = problem(rng, dtype)
    found = px.linear_cross_entropy_with_grad(hidden, weight, target, linear_bias=bias, chunk_bytes=3 * CLASSES * 8, **options)
    check(found, explicit(hidden, weight, bias, target, **options), dtype)
    np.testing.assert_array_equal(
        px.linear_cross_entropy(hidden, weight, target, linear_bias=bias, chunk_bytes=3 * CLASSES * 8, **options), found[0]
    )


def test_shifted_targets_are_those_of_the_next_position(dtype, rng):
    for rows in ((3, 6), (6,), (2, 2, 4), (2, 1)):
        hidden, weight, bias, target = problem(rng, dtype, rows)
        for reduction in ("none", "sum"):
            expected = explicit(hidden[..., :-1, :], weight, bias, target[..., 1:], reduction=reduction)
            found = px.linear_cross_entropy_with_grad(
                hidden, weight, target, linear_bias=bias, reduction=reduction, shift=True, chunk_bytes=2 * CLASSES * 8
            )
            last = np.zeros((*rows[:-1], 1, WIDTH))
            of_hidden = np.concatenate([expected[1][0], last], axis=-2)
            expected = expected[0], (of_hidden, *expected[1][1:])
            check(found, expected, dtype)
            assert not found[1][0][..., -1, :].any()


def test_one_row_and_no_rows(dtype, rng):
    hidden, weight, bias, _ = problem(rng, dtype)
    check(
        px.linear_cross_entropy_with_grad(hidden[0], weight, 3, linear_bias=bias),
        explicit(hidden[0], weight, bias, np.array(3)),
        dtype,
    )
    for target in (np.full(ROWS, -100), np.zeros(0, int)):
        loss, gradients = px.linear_cross_entropy_with_grad(hidden[: len(target)], weight, target, linear_bias=bias)
        assert np.isnan(loss)
        assert not any(gradient.any() for gradient in gradients)
        assert px.linear_cross_entropy(hidden[: len(target)], weight, target, empty="zero") == 0


def test_ignored_rows_are_inert(dtype, rng):
    hidden, weight, bias, target = problem(rng, dtype)
    expected = px.linear_cross_entropy_with_grad(hidden, weight, target, linear_bias=bias)
    hidden[target == -100] = np.nan
    loss, gradients = px.linear_cross_entropy_with_grad(hidden, weight, target, linear_bias=bias)
    assert loss == expected[0]
    for gradient, wanted in zip(gradients, expected[1], strict=True):
        np.testing.assert_array_equal(gradient, wanted)
    assert not gradients[0][target == -100].any()


def test_only_what_is_wanted_is_computed_and_where_it_is_wanted(dtype, rng):
    hidden, weight, bias, target = problem(rng, dtype)
    expected = px.linear_cross_entropy_with_grad(hidden, weight, target, linear_bias=bias)[1]
    places = [np.full_like(gradient, 7) for gradient in expected]
    for name, wanted, place in zip(linear.GRADIENTS, expected, places, strict=True):
        _, found = px.linear_cross_entropy_with_grad(hidden, weight, target, linear_bias=bias, wanted=[name])
        assert [gradient is not None for gradient in found] == [other == name for other in linear.GRADIENTS]
        np.testing.assert_array_equal(found[linear.GRADIENTS.index(name)], wanted)
        assert (place == 7).all()
    _, found = px.linear_cross_entropy_with_grad(hidden, weight, target, linear_bias=bias, grad_out=places)
    for place, gradient, wanted in zip(places, found, expected, strict=True):
        assert gradient is place
        np.testing.assert_array_equal(place, wanted)


def test_wide_vocabularies_are_added_up_in_parts(rng, monkeypatch):
    hidden, weight, _, target = problem(rng, np.float64)
    expected = px.linear_cross_entropy_with_grad(hidden, weight, target)[1][1]
    monkeypatch.setattr(linear, "PART_BYTES", 10 * WIDTH * 8)
    found = px.linear_cross_entropy_with_grad(hidden, weight, target, chunk_bytes=3 * CLASSES * 8)[1][1]
    assert_close(found, expected, 1e-13)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("chunk_bytes", [4 * CLASSES * 4, 1 << 20])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_half_types_are_rounded_once(rng, monkeypatch, name, chunk_bytes, soft):
    half = np.dtype(name if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16)
    monkeypatch.setattr(linear, "PART_BYTES", 10 * WIDTH * 4)
    hidden, weight, bias, target = problem(rng, half, soft=soft)
    for options in ({}, {"softcap": 2.0, "logit_scale": 1.5, "reduction": "sum"}):
        found = px.linear_cross_entropy_with_grad(hidden, weight, target, linear_bias=bias, chunk_bytes=chunk_bytes, **options)
        assert found[0].dtype == half
        loss, gradients = explicit(
            hidden.astype(float), weight.astype(float), bias.astype(float), target.astype(float) if soft else target, **options
        )
        half_ulp = 2.0**-11 if name == "float16" else 2.0**-8
        np.testing.assert_allclose(np.float64(found[0]), loss, rtol=1.1 * half_ulp)
        for gradient, expected in zip(found[1], gradients, strict=True):
            assert gradient.dtype == half
            error = np.abs(gradient.astype(float) - expected)
            assert (error <= 1.1 * half_ulp * np.abs(expected) + 2e-6 * np.abs(expected).max() + 2.0**-24).all()


def test_threads_change_no_bits_of_the_loss(rng, dtype, many_threads):
    hidden, weight, bias, target = problem(rng, dtype, rows=(200,))
    one, four = (
        px.linear_cross_entropy_with_grad(hidden, weight, target, linear_bias=bias, softcap=3.0, num_threads=threads)
        for threads in (1, 4)
    )
    assert one[0] == four[0]
    for a, b in zip(one[1], four[1], strict=True):
        np.testing.assert_array_equal(a, b)


def no_memory_for_a_thread(function, arguments):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("start", [no_memory_for_a_thread, lambda function, arguments: 1], ids=["refused", "never runs"])
def test_threads_that_do_not_start_are_not_waited_for(rng, monkeypatch, many_threads, start):
    hidden, weight, bias, target = problem(rng, np.float32, (64,))
    expected = px.linear_cross_entropy_with_grad(hidden, weight, target, linear_bias=bias)
    monkeypatch.setattr(linear._thread, "start_new_thread", start)
    found = px.linear_cross_entropy_with_grad(hidden, weight, target, linear_bias=bias)
    assert found[0] == expected[0]
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_thread_ends(rng, many_threads):
    hidden, weight, _, target = problem(rng, np.float32, (64,))
    before = _thread._count()
    for _ in range(50):
        px.linear_cross_entropy_with_grad(hidden, weight, target)
    end = time.monotonic() + 10
    while _thread._count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert _thread._count() <= before  # those of earlier tests may have ended meanwhile


def test_the_first_error_of_a_thread_comes_back():
    def fail(part):
        if part == 2:
            raise KeyError(part)
        time.sleep(0.01)

    with pytest.raises(KeyError):
        linear._on_threads(fail, [0, 1, 2, 3], 4)


def test_numbers_beyond_the_range_bring_no_warnings(rng, dtype):
    hidden, weight, bias, target = problem(rng, dtype)
    for huge in (np.inf, np.finfo(dtype).max):
        hidden[0] = huge
        for softcap in (None, 9.0):
            loss, (of_hidden, _, _) = px.linear_cross_entropy_with_grad(
                hidden, weight, target, linear_bias=bias, softcap=softcap, reduction="none"
            )
            assert np.isfinite(loss[2:]).all()
            assert np.isfinite(of_hidden[2:]).all()


def test_errors_leave_everything_as_it_was(rng):
    hidden, weight, bias, target = problem(rng, np.float32)
    places = [np.full_like(array, 7) for array in (hidden, weight, bias)]
    out = np.full((), 7, np.float32)

    def call(**changed):
        arguments = {
            "hidden": hidden, "linear_weight": weight, "target": target, "linear_bias": bias, "grad_out": places, "out": out
        } | changed  # fmt: skip
        px.linear_cross_entropy_with_grad(**arguments)

    wrong = target.copy()
    wrong[5] = CLASSES
    backwards = places[0][::-1]
    for changed, error, message in [
        ({"target": wrong}, IndexError, r"Target 37 is out of bounds. \(target\[5\]"),
        ({"target": target[:-1]}, ValueError, "target"),
        ({"target": np.ma.masked_equal(target, 3)}, TypeError, "target is a masked array"),
        ({"hidden": hidden[:, :-1]}, ValueError, r"hidden must have shape \(..., H\) and linear_weight \(C, H\)"),
        ({"hidden": hidden.astype(int)}, TypeError, "hidden must be float32, float64, float16 or bfloat16, got int64"),
        ({"linear_weight": weight.astype(np.float64)}, TypeError, "linear_weight must have the dtype of hidden"),
        ({"linear_bias": bias[:-1]}, ValueError, r"linear_bias must have shape \(37,\), got \(36,\)"),
        ({"softcap": 0}, ValueError, "softcap must be positive in float32, got 0"),
        ({"softcap": 1e39}, ValueError, r"softcap must be finite in float32, got 1e\+39"),
        ({"softcap": 1e-46}, ValueError, "softcap must be positive in float32, got 1e-46"),
        ({"logit_scale": np.nan}, ValueError, "logit_scale must be finite"),
        ({"logit_scale": 1e39}, ValueError, r"logit_scale must be finite in float32, got 1e\+39"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1"),
        ({"wanted": ["logits"]}, ValueError, "wanted must be of"),
        ({"grad_out": places[:2]}, ValueError, "grad_out must have three entries"),
        ({"grad_out": [hidden, None, None]}, ValueError, r"grad_out\[0\] overlaps hidden"),
        ({"grad_out": [places[0], weight, None]}, ValueError, r"grad_out\[1\] overlaps linear_weight"),
        ({"grad_out": [backwards, None, None]}, ValueError, "C-contiguous"),
        ({"grad_out": [places[1], None, None]}, ValueError, r"grad_out\[0\] must have shape"),
        ({"out": hidden[0, 0:1].reshape(())}, ValueError, "out overlaps hidden"),
        ({"reduction": "some"}, ValueError, "not a valid value"),
        ({"shift": True, "target": target[:-1]}, ValueError, "shift=True needs"),
    ]:
        with pytest.raises(error, match=message):
            call(**changed)
        assert all((place == 7).all() for place in [*places, out])
    call()
    assert out == px.linear_cross_entropy(hidden, weight, target, linear_bias=bias)


def test_logits_are_never_one_array():
    pytest.importorskip("pytest_benchmark")
    from benchmarks import memory

    if memory.resident("VmHWM") is None:
        pytest.skip("the system does not tell how much memory a process has")
    hidden, weight = np.zeros((2000, 8), np.float32), np.zeros((50000, 8), np.float32)
    target = np.zeros(2000, int)
    px.linear_cross_entropy_with_grad(hidden[:500], weight, target[:500])  # BLAS keeps memory of its own
    memory.reset_mark()
    before = memory.resident("VmRSS")
    px.linear_cross_entropy_with_grad(hidden, weight, target)
    assert memory.resident("VmHWM") - before < 80 << 20  # the logits would be 400 MB


class TestAProductThatIsAddedByNumpysBlas:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (70, 400, 33), (300, 129, 65)])
    def test_is_the_product(self, rng, dtype, first, shape):
        rows, classes, width = shape
        left, right = (rng.standard_normal(of).astype(dtype) for of in ((rows, classes), (rows, width)))
        total = np.full((classes, width), np.nan if first else 2.0, dtype)
        if not _gemm.add_product(left, right, total, first):
            pytest.skip("NumPy's BLAS has no such function under a known name")
        expected = left.T.astype(np.float64) @ right + (0.0 if first else 2.0)
        assert np.allclose(total, expected, rtol=0, atol=40 * rows * np.finfo(dtype).eps)

    def test_numpys_wheels_have_it(self):
        if "openblas" not in str(np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]):
            pytest.skip("another BLAS")
        assert _gemm.add_product(np.ones((2, 2)), np.ones((2, 2)), np.zeros((2, 2)), first=False)

    def test_leaves_to_others_what_does_not_lie_as_it_needs(self):
        left, right, total = np.ones((4, 3)), np.ones((4, 2)), np.zeros((3, 2))
        read_only = total.copy()
        read_only.flags.writeable = False
        for arrays in (
            (left[::2], right[::2], total),
            (left, np.asfortranarray(right), total),
            (left, right, np.asfortranarray(total)),
            (left.astype(np.float32), right, total),
            (left, right, read_only),
            (left[:3], right, total),
            (left, right, np.zeros((2, 3))),
            (left[:0], right[:0], total),
            (left.astype(">f8"), right.astype(">f8"), total.astype(">f8")),
        ):
            assert not _gemm.add_product(*arrays, first=False)
        assert not total.any()

    def test_without_it_the_gradients_are_the_same(self, rng, monkeypatch):
        hidden, weight = rng.standard_normal((40, 6)), rng.standard_normal((50, 6))
        target = rng.integers(0, 50, 40)
        found = []
        for function in (_gemm._function, lambda dtype: None):
            monkeypatch.setattr(_gemm, "_function", function)
            found.append(px.linear_cross_entropy_with_grad(hidden, weight, target, chunk_bytes=4000)[1][1])
        assert np.allclose(*found, rtol=1e-12, atol=1e-15)
