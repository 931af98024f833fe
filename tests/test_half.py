"""float16 and bfloat16: numbers as they lie in memory, computed in float32. SPEC sections 3 and 10."""

import itertools

import numpy as np
import pytest
from conftest import same_bits
from test_bits import assert_outputs_have_the_bits_of_fresh_ones, layouts

import pyx_xent as px
from pyx_xent import reference

# (bits of the fraction, exponent of the smallest normal number, largest number)
FORMATS = {"float16": (10, -14, 65504.0), "bfloat16": (7, -126, float(2**127 * (2 - 2**-7)))}


@pytest.fixture(params=FORMATS)
def half(request):
    return np.float16 if request.param == "float16" else pytest.importorskip("ml_dtypes").bfloat16


def name_of(half):
    return np.dtype(half).name


def rounded(values, half):
    """To the nearest, through float32 as the kernels do; what is too large becomes infinite."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(values, np.float32).astype(half)


def every_number(half):
    """All 65,536 bit patterns, and what they mean in float64."""
    numbers = np.arange(2**16, dtype=np.uint16).view(half)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return numbers, numbers.astype(np.float64)


def spacing(values, half):
    fraction, smallest, _ = FORMATS[name_of(half)]
    _, exponent = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponent - 1, smallest) - fraction)


def assert_within_one_ulp(actual, expected, half, terms=0.0):
    """`terms`: the size of what cancels in `expected`, of which float32 keeps 22 bits."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == half
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= spacing(expected, half) + 2.0**-22 * terms).all()


def problem(rng, shape, half, soft=False, axis=1):
    rows = shape[:axis] + shape[axis + 1 :]
    logits = (3 * rng.normal(size=shape)).astype(half)
    if soft:
        return logits, rng.dirichlet(np.ones(shape[axis]), rows).swapaxes(axis, -1).reshape(shape).astype(half)
    return logits, np.where(rng.random(rows) < 0.2, -100, rng.integers(0, shape[axis], rows))


SHAPES = [(7, 3), (17, 10), (6, 33), (4, 64), (4, 65), (3, 1000), (2, 9001), (2, 21, 5, 7), (2, 70, 33), (3, 40, 5)]


# Values


@pytest.mark.spec("S8", "S11", "S14", "S15", "S31")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_index_targets_are_within_one_ulp_of_the_reference(isa, rng, half, shape):
    logits, target = problem(rng, shape, half)
    weight = (0.5 + rng.random(shape[1])).astype(half)
    for reduction, w, smoothing in itertools.product(("none", "mean", "sum"), (None, weight), (0.0, 0.1)):
        g = rng.random(target.shape) if reduction == "none" else 0.7
        options = {"reduction": reduction, "label_smoothing": smoothing}
        loss, grad = px.cross_entropy_with_grad(logits, target, w, grad_output=g, **options)
        expected, expected_grad = reference.cross_entropy_with_grad(logits, target, w, grad_output=g, **options)
        assert_within_one_ulp(loss, expected, half)
        assert_within_one_ulp(grad, expected_grad, half, terms=np.abs(expected_grad).max())
        assert same_bits(px.cross_entropy(logits, target, w, **options), loss)
        if reduction == "none":
            criterion = px.CrossEntropyLoss(w, **options)
            assert same_bits(criterion(logits, target), loss)
            assert same_bits(criterion.backward(g), grad)


@pytest.mark.spec("S8", "S11", "S16", "S31")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_targets_are_within_one_ulp_of_the_reference(isa, rng, half, shape):
    logits, target = problem(rng, shape, half, soft=True)
    weight = (0.5 + rng.random(shape[1])).astype(half)
    for reduction, w, smoothing in itertools.product(("none", "mean", "sum"), (None, weight), (0.0, 0.1)):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        loss, grad = px.cross_entropy_with_grad(logits, target, w, **options)
        expected, expected_grad = reference.cross_entropy_with_grad(logits, target, w, **options)
        assert_within_one_ulp(loss, expected, half)
        assert_within_one_ulp(grad, expected_grad, half, terms=np.abs(expected_grad).max())


@pytest.mark.spec("S23", "S24")
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_sample_weight_normalizer_and_z_loss_are_within_one_ulp(isa, rng, half, soft):
    logits, target = problem(rng, (6, 100), half, soft)
    options = {"sample_weight": rng.random(6).astype(half), "normalizer": 3.5, "z_loss": 0.01, "label_smoothing": 0.1}
    loss, grad = px.cross_entropy_with_grad(logits, target, **options)
    expected, expected_grad = reference.cross_entropy_with_grad(logits, target, **options)
    assert_within_one_ulp(loss, expected, half)
    assert_within_one_ulp(grad, expected_grad, half, terms=np.abs(expected_grad).max())


@pytest.mark.spec("S37")
@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((7, 10), 1), ((10, 40), 0), ((3, 130), -1), ((2, 70, 33), 1)])
def test_softmax_and_its_backward_are_within_one_ulp(isa, rng, half, shape, axis):
    x, g = (4 * rng.normal(size=shape)).astype(half), rng.normal(size=shape).astype(half)
    for operation in ("softmax", "log_softmax"):
        output = getattr(px, operation)(x, axis)
        assert_within_one_ulp(output, getattr(reference, operation)(x, axis), half)
        backward = getattr(px, operation + "_backward")(g, output, axis)
        expected = getattr(reference, operation + "_backward")(g, output, axis)
        assert_within_one_ulp(backward, expected, half, terms=np.abs(g.astype(np.float64)).max())


@pytest.mark.spec("S34")
@pytest.mark.parametrize("classes", [2, 33, 1000])
@pytest.mark.parametrize("gap", [6.0, 8.0, 12.0])
def test_confident_rows_keep_their_digits(isa, half, classes, gap):
    logits = np.zeros((3, classes), half)
    logits[:, 1] = gap
    loss, grad = px.cross_entropy_with_grad(logits, [1, 1, 1], reduction="sum")
    expected, expected_grad = reference.cross_entropy_with_grad(logits, [1, 1, 1], reduction="sum")
    assert_within_one_ulp(loss, expected, half)
    assert_within_one_ulp(grad, expected_grad, half)
    assert loss > 0


@pytest.mark.spec("S26", "S28", "S29")
def test_ignored_rows_are_inert_and_nan_is_not(isa, rng, half):
    for classes in (3, 33, 200):
        logits, _ = problem(rng, (20, classes), half)
        target = rng.integers(0, classes, 20)
        target[::3] = -100
        expected = px.cross_entropy_with_grad(logits, target)
        logits[::3] = np.nan
        loss, grad = px.cross_entropy_with_grad(logits, target)
        assert same_bits(loss, expected[0])
        assert same_bits(grad, expected[1])
        assert not grad[::3].astype(np.float32).any()
        target[0] = 0
        loss, grad = px.cross_entropy_with_grad(logits, target, reduction="sum")
        assert np.isnan(loss.astype(np.float32))
        assert np.isnan(grad[0].astype(np.float32)).all()
        assert np.isfinite(grad[1:].astype(np.float32)).all()


def test_a_float16_gradient_of_70000_rows_is_finite(isa, rng):
    # 70,000 is no float16 number, and one over it is a subnormal one.
    logits, target = rng.normal(size=(70_000, 3)).astype(np.float16), rng.integers(0, 3, 70_000)
    loss, grad = px.cross_entropy_with_grad(logits, target)
    expected, expected_grad = reference.cross_entropy_with_grad(logits, target)
    assert_within_one_ulp(loss, expected, np.float16)
    assert_within_one_ulp(grad, expected_grad, np.float16)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_loss_that_is_too_large_is_infinite_without_a_warning(isa, reduction):
    logits = np.array([[6e4, -6e4, 0], [6e4, -6e4, 0]], np.float16)
    assert np.isinf(px.cross_entropy(logits, [1, 1], reduction=reduction)).all()
    out = np.zeros(2 if reduction == "none" else (), np.float16)
    px.cross_entropy(logits, [1, 1], reduction=reduction, out=out)
    assert np.isinf(out).all()


@pytest.mark.parametrize("value", [0.0, 1e-8, 1e-30, 2049.0, 65504.0, 7e4, 1e30, 3e38, 3.4e38, 1e300])
def test_a_loss_of_any_size_is_rounded_without_a_warning(isa, half, value):
    logits, out = np.zeros((2, 2), half), np.empty((), half)
    options = {"sample_weight": np.full(2, value / np.log(4)), "reduction": "sum", "grad_output": 0.0}
    with np.errstate(all="raise"):
        loss, _ = px.cross_entropy_with_grad(logits, [0, 0], out=out, **options)
        fresh, _ = px.cross_entropy_with_grad(logits, [0, 0], **options)
    assert loss is out
    assert same_bits(out[()], fresh)
    if np.isfinite(rounded(value, half)):
        assert_within_one_ulp(out, np.float64(value), half)
    else:
        assert np.isinf(out.astype(np.float32))


# dtypes


@pytest.mark.spec("S8", "S11")
def test_results_have_the_logits_dtype_and_soft_targets_promote_the_loss(isa, rng, half):
    logits, target = problem(rng, (4, 5), half)
    loss, grad = px.cross_entropy_with_grad(logits, target, np.ones(5))
    assert loss.dtype == grad.dtype == half
    assert px.softmax(logits).dtype == px.log_softmax(logits).dtype == px.nll_loss(logits, target).dtype == half
    for other in (half, np.float32, np.float64):
        soft = rng.dirichlet(np.ones(5), 4).astype(other)
        loss, grad = px.cross_entropy_with_grad(logits, soft)
        expected, expected_grad = reference.cross_entropy_with_grad(logits, soft)
        assert loss.dtype == np.promote_types(half, other)
        assert float(loss) == pytest.approx(float(expected), rel={half: 2.0**-7, np.float32: 1e-6, np.float64: 1e-14}[other])
        assert_within_one_ulp(grad, expected_grad, half, terms=1.0)
        assert px.cross_entropy(logits, soft, np.ones(5, np.float64)).dtype == np.float64
        assert px.cross_entropy_with_grad(soft, logits)[1].dtype == other


@pytest.mark.spec("S11")
def test_float16_and_bfloat16_promote_to_float32(rng):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    logits, soft = rng.normal(size=(4, 5)).astype(bfloat16), rng.dirichlet(np.ones(5), 4).astype(np.float16)
    loss, grad = px.cross_entropy_with_grad(logits, soft)
    assert loss.dtype == np.float32
    assert grad.dtype == bfloat16
    assert float(loss) == pytest.approx(float(reference.cross_entropy_with_grad(logits, soft)[0]), rel=1e-6)


@pytest.mark.spec("S11")
def test_soft_targets_promote_as_in_pytorch(rng):
    torch = pytest.importorskip("torch")
    floating = {"float16": np.float16, "float32": np.float32, "float64": np.float64}
    floating["bfloat16"] = pytest.importorskip("ml_dtypes").bfloat16
    weights = {**floating, "int64": np.int64, "uint8": np.uint8, "bool": np.bool_}
    values = 3 * rng.normal(size=(4, 5)), rng.dirichlet(np.ones(5), 4), np.arange(5)

    def loss_and_grad_dtypes(names):
        logits, target, *weight = (value.astype(weights[name]) for value, name in zip(values, names, strict=False))
        return [result.dtype.name for result in px.cross_entropy_with_grad(logits, target, *weight)]

    def loss_and_grad_dtypes_of_pytorch(names):
        logits, target, *weight = (torch.tensor(v).to(getattr(torch, name)) for v, name in zip(values, names, strict=False))
        loss = torch.nn.functional.cross_entropy(logits, target, *weight)
        return [str(dtype).removeprefix("torch.") for dtype in (loss.dtype, logits.dtype)]

    for names in (*itertools.product(floating, floating), *itertools.product(floating, floating, weights)):
        assert loss_and_grad_dtypes(names) == loss_and_grad_dtypes_of_pytorch(names), names


@pytest.mark.spec("S11", "S12")
def test_an_integer_weight_counts_as_its_float_counterpart(rng, half):
    logits, target = problem(rng, (6, 5), half, soft=True)
    loss, grad = px.cross_entropy_with_grad(logits, target, np.arange(5))
    expected, expected_grad = px.cross_entropy_with_grad(logits, target, np.arange(5).astype(half))
    assert same_bits(loss, expected)
    assert same_bits(grad, expected_grad)


@pytest.mark.spec("S11", "S12")
@pytest.mark.skipif(np.longdouble is np.float64, reason="longdouble is float64 here")
def test_longdouble_is_no_dtype_of_class_probabilities():
    logits, target = np.zeros((2, 3), np.float32), np.full((2, 3), 1 / 3)
    message = f"must promote to float32 or float64, got {np.dtype(np.longdouble)}"
    with pytest.raises(TypeError, match=message):
        px.cross_entropy(logits, target.astype(np.longdouble))
    with pytest.raises(TypeError, match=message):
        px.cross_entropy(logits, target, np.ones(3, np.longdouble))
    assert px.cross_entropy(logits, [0, 1], np.ones(3, np.longdouble)).dtype == np.float32


@pytest.mark.spec("S8")
def test_other_dtypes_are_refused_by_naming_the_four(half):
    message = "must be float32, float64, float16 or bfloat16, got "
    others = [np.int16, np.int64, bool, np.complex64, np.longdouble]
    if half is not np.float16:
        others = [pytest.importorskip("ml_dtypes").float8_e4m3fn]
    for other in others:
        x = np.ones((2, 3), other)
        for call in (lambda x: px.cross_entropy(x, [0, 1]), lambda x: px.nll_loss(x, [0, 1]), px.softmax, px.log_softmax):
            with pytest.raises(TypeError, match=message + np.dtype(other).name):
                call(x)
    with pytest.raises(TypeError, match="grad_output must have the dtype of output"):
        px.softmax_backward(np.ones((2, 3), np.float32), np.ones((2, 3), half))


# Memory


def half_layouts(array):
    # A bfloat16 array has no other byte order.
    return ((name, other) for name, other in layouts(array) if name != "big-endian" or array.dtype == np.float16)


@pytest.mark.spec("S7", "S36")
@pytest.mark.parametrize("classes", [3, 33, 64, 65, 1000, 2050])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_result_does_not_depend_on_memory_layout(isa, rng, half, classes, soft):
    logits, target = problem(rng, (19, classes), half, soft)
    options = {"reduction": "none", "label_smoothing": 0.1}
    loss, grad = px.cross_entropy_with_grad(logits, target, **options)
    softmax, log_softmax = px.softmax(logits), px.log_softmax(logits)
    for name, other in half_layouts(logits):
        result = px.cross_entropy_with_grad(other, target, **options)
        assert same_bits(result[0], loss), name
        assert same_bits(result[1], grad), name
        assert same_bits(px.softmax(other), softmax), name
        assert same_bits(px.log_softmax(other), log_softmax), name
        assert same_bits(px.softmax_backward(other, softmax), px.softmax_backward(logits, softmax)), name
    if soft:
        for name, other in half_layouts(target):
            result = px.cross_entropy_with_grad(logits, other, **options)
            assert same_bits(result[0], loss), name
            assert same_bits(result[1], grad), name


@pytest.mark.spec("S1", "S7", "S36")
@pytest.mark.parametrize("classes", [3, 33, 65, 1000])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_class_axis_inside_gives_the_bits_of_class_axis_last(isa, rng, half, classes, soft):
    logits, target = problem(rng, (2 * 37, classes), half, soft)
    loss, grad = px.cross_entropy_with_grad(logits, target, reduction="none")
    inside = np.ascontiguousarray(logits.reshape(2, 37, classes).transpose(0, 2, 1))
    inside_target = np.ascontiguousarray(target.reshape(2, 37, classes).transpose(0, 2, 1)) if soft else target.reshape(2, 37)
    inside_loss, inside_grad = px.cross_entropy_with_grad(inside, inside_target, reduction="none")
    assert same_bits(inside_loss.reshape(-1), loss)
    assert same_bits(inside_grad.transpose(0, 2, 1).reshape(-1, classes), grad)
    first_target = np.ascontiguousarray(target.T) if soft else target
    first_loss, first_grad = px.cross_entropy_with_grad(np.ascontiguousarray(logits.T), first_target, reduction="none", axis=0)
    assert same_bits(first_loss, loss)
    assert same_bits(first_grad.T, grad)
    softmax = px.softmax(logits)
    assert same_bits(px.softmax(inside, axis=1).transpose(0, 2, 1).reshape(-1, classes), softmax)


@pytest.mark.spec("S36")
@pytest.mark.parametrize(("rows", "classes"), [(300, 3), (300, 33), (60, 1000), (1, 40_000), (3, 32_773)])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_result_does_not_depend_on_thread_count(isa, rng, half, many_threads, rows, classes, soft):
    logits, target = problem(rng, (rows, classes), half, soft)
    if not soft:
        target[0] = classes // 2
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    expected = [*px.cross_entropy_with_grad(logits, target, num_threads=1, **options), px.softmax(logits, num_threads=1)]
    for threads in (2, 3, 4):
        result = [
            *px.cross_entropy_with_grad(logits, target, num_threads=threads, **options),
            px.softmax(logits, num_threads=threads),
        ]
        for ours, one_thread in zip(result, expected, strict=True):
            assert same_bits(ours, one_thread)


@pytest.mark.spec("S35", "S36")
@pytest.mark.parametrize("classes", [3, 33, 64, 65, 1000])
@pytest.mark.parametrize("order", ["C", "F"])
def test_outputs_that_are_given_have_the_bits_of_fresh_ones(isa, rng, half, classes, order):
    logits, target = problem(rng, (37, classes), half)
    logits = np.array(logits, order=order)
    assert_outputs_have_the_bits_of_fresh_ones(logits, target)
    softmax = np.empty((37, classes), half)
    assert px.softmax(logits, out=softmax) is softmax
    assert same_bits(softmax, px.softmax(logits))
    with pytest.raises(ValueError, match=f"grad_out must have dtype {name_of(half)}, got float32"):
        px.cross_entropy_with_grad(logits, target, grad_out=np.empty(logits.shape, np.float32))


# Conversion


@pytest.mark.parametrize("spaced", [False, True], ids=["contiguous", "strided"])
def test_every_bit_pattern_is_read_as_its_number(isa, half, spaced):
    numbers, values = every_number(half)
    rows = np.repeat(numbers, 3)[:, None][::3] if spaced else numbers[:, None]
    loss = px.nll_loss(rows, np.zeros(2**16, int), reduction="none")
    assert same_bits(np.isnan(loss.astype(np.float32)), np.isnan(values))
    finite_or_infinite = ~np.isnan(values)
    assert same_bits(loss[finite_or_infinite], (-values[finite_or_infinite]).astype(half))


@pytest.mark.parametrize("classes", [16, 62, 124, 31_744])
@pytest.mark.parametrize("order", ["C", "F"])
def test_finite_numbers_pass_through_a_row_unchanged(isa, half, classes, order):
    # log_softmax_backward is g - 0 Σ g where each probability is 0.
    numbers, values = every_number(half)
    numbers = numbers[np.abs(values) < 1e36]  # a sum of larger ones overflows
    g = np.array(numbers[: numbers.size // classes * classes].reshape(-1, classes), order=order)
    impossible = np.full_like(g, -np.inf)
    result = px.log_softmax_backward(g, impossible)
    np.testing.assert_array_equal(result.astype(np.float32), g.astype(np.float32))


def around_every_tie(half):
    """Each number of the format, the middle to its neighbour, and that middle's neighbours in float32: as float32."""
    _, values = every_number(half)
    low = np.unique(np.abs(values[np.isfinite(values)])).astype(np.float32)
    high = np.append(low[1:], np.float32(2 * low[-1].astype(np.float64) - low[-2]) if low[-1] < 1e38 else np.float32(np.inf))
    with np.errstate(over="ignore"):
        middle = np.where(np.isfinite(high), low + (high - low) / 2, low + (low - np.roll(low, 1)) / 2).astype(np.float32)
    positive = np.concatenate([low, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))])
    return np.concatenate([positive, -positive, np.float32([1e-45, 7e4, 1e6, 3e38, np.inf, -np.inf, np.nan])])


def test_one_number_is_stored_to_the_nearest_ties_to_even(isa, half):
    g = around_every_tie(half)
    _, grad = px.nll_loss_with_grad(np.zeros((g.size, 1), half), np.zeros(g.size, int), reduction="none", grad_output=g)
    expected = rounded(-g, half)
    nan = np.isnan(g)
    assert np.isnan(grad[nan].astype(np.float32)).all()
    assert same_bits(grad[~nan, 0], expected[~nan])
    assert np.isinf(expected[~nan].astype(np.float32)).sum() > 4  # some were too large


@pytest.mark.parametrize("classes", [5, 33, 65, 127, 1000])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_have_the_rounded_bits_of_the_float32_result(isa, rng, half, classes, order):
    # Many different numbers on their way to memory, ties, subnormal and infinite ones among them.
    logits = np.array((6 * rng.normal(size=(40_000 // classes, classes))).astype(half), order=order)
    single = logits.astype(np.float32)
    target = rng.integers(0, classes, len(logits))
    assert same_bits(px.softmax(logits), rounded(px.softmax(single), half))
    assert same_bits(px.log_softmax(logits), rounded(px.log_softmax(single), half))
    for g in (1.0, 1e-6, 1e6, 1e38):
        _, grad = px.cross_entropy_with_grad(logits, target, reduction="sum", grad_output=g)
        _, expected = px.cross_entropy_with_grad(single, target, reduction="sum", grad_output=g)
        assert same_bits(grad, rounded(expected, half))


def test_every_finite_number_is_read_in_a_row_as_its_float32(isa, half):
    numbers, values = every_number(half)
    numbers = numbers[np.isfinite(values)]
    for classes in (31, 128, 62 * 128):
        rows = numbers[: numbers.size // classes * classes].reshape(-1, classes)
        assert same_bits(px.log_softmax(rows), rounded(px.log_softmax(rows.astype(np.float32)), half))


# Beside PyTorch


@pytest.mark.spec("S8")
@pytest.mark.parametrize("classes", [2, 10, 100, 3000])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_never_farther_from_float64_than_pytorch(isa, rng, half, classes, reduction):
    torch = pytest.importorskip("torch")
    ours, theirs = np.zeros(2), np.zeros(2)
    for _ in range(5):
        logits, target = (3 * rng.normal(size=(64, classes))).astype(half), rng.integers(0, classes, 64)
        expected, expected_grad = reference.cross_entropy_with_grad(logits, target, reduction=reduction)
        loss, grad = px.cross_entropy_with_grad(logits, target, reduction=reduction)
        x = torch.tensor(logits.astype(np.float32)).to(getattr(torch, name_of(half))).requires_grad_()
        their_loss = torch.nn.functional.cross_entropy(x, torch.tensor(target), reduction=reduction)
        their_loss.backward(torch.ones_like(their_loss))
        for errors, values in ((ours, (loss, grad)), (theirs, (their_loss.detach().double(), x.grad.double()))):
            for i, (value, exact) in enumerate(zip(values, (expected, expected_grad), strict=True)):
                errors[i] += np.abs(np.asarray(value, np.float64) - exact).mean()
    assert (ours <= theirs).all()


# nll_loss


@pytest.mark.spec("S38")
@pytest.mark.parametrize("shape", [(7, 3), (6, 33), (2, 21, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nll_loss_is_within_one_ulp_of_the_reference(isa, rng, half, shape, reduction):
    logits, target = problem(rng, shape, half)
    log_probs = px.log_softmax(logits, 1)
    weight = (0.5 + rng.random(shape[1])).astype(half)
    g = rng.random(target.shape) if reduction == "none" else 0.7
    loss, grad = px.nll_loss_with_grad(log_probs, target, weight, reduction=reduction, grad_output=g)
    expected, expected_grad = reference.nll_loss_with_grad(log_probs, target, weight, reduction=reduction, grad_output=g)
    assert_within_one_ulp(loss, expected, half)
    assert_within_one_ulp(grad, expected_grad, half)
    assert same_bits(px.nll_loss(np.asfortranarray(log_probs), target, weight, reduction=reduction), loss)
