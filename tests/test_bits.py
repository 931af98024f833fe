"""SPEC S36: a row's bits depend on nothing but the row."""

import numpy as np
import pytest
from conftest import same_bits

import pyx_xent as px
from pyx_xent import _dispatch, _threads

pytestmark = pytest.mark.spec("S36", "S7")

CLASSES = [1, 2, 10, 16, 31, 32, 33, 64, 65, 128, 130, 244, 257, 1000, 2050, 4100]
SMOOTHED = {"label_smoothing": 0.1, "z_loss": 0.01}
KINDS = {  # is the target class probabilities, options
    "index": (False, {}),
    "index, smoothed": (False, SMOOTHED),
    "index, focal": (False, {"focal_gamma": 1.5}),
    "soft": (True, {}),
    "soft, smoothed": (True, SMOOTHED),
}
of_each_kind = pytest.mark.parametrize(("soft", "options"), KINDS.values(), ids=KINDS)


def problem(rng, rows, classes, dtype, soft):
    logits = (5 * rng.normal(size=(rows, classes))).astype(dtype)
    logits[0] += 300  # the row that subtracts an offset
    logits[1, classes // 2] += 30  # a confident one
    logits[2, -1] = 500  # one whose first guess at the maximum is far off
    target = rng.random((rows, classes)).astype(dtype) if soft else rng.integers(0, classes, rows)
    if soft:
        target[1] = np.arange(classes) == classes // 2
    else:
        target[1], target[4] = classes // 2, -100
    return logits, target


def layouts(array):
    """The same values in other memory: (name, array)."""
    yield "Fortran order", np.asfortranarray(array)
    spaced = np.zeros((array.shape[0] * 2, array.shape[1] * 3), array.dtype)
    spaced[::2, ::3] = array
    yield "every other element", spaced[::2, ::3]
    yield "backwards", np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    raw = np.zeros(array.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    yield "unaligned", unaligned
    shifted = np.zeros(array.size + 3, array.dtype)[3:].reshape(array.shape)
    shifted[...] = array
    yield "shifted by three elements", shifted
    yield "big-endian", array.astype(array.dtype.newbyteorder(">"))
    read_only = array.copy()
    read_only.flags.writeable = False
    yield "read-only", read_only
    records = np.zeros(array.shape, np.dtype([("pad", "i1"), ("value", array.dtype)]))
    records["value"] = array
    yield "packed records", records["value"]


@pytest.mark.parametrize("classes", CLASSES)
@of_each_kind
def test_result_does_not_depend_on_memory_layout(isa, dtype, rng, classes, soft, options):
    logits, target = problem(rng, 37, classes, dtype, soft)
    expected = px.cross_entropy_with_grad(logits, target, reduction="none", **options)
    softmax = px.softmax(logits), px.log_softmax(logits)
    for name, other in layouts(logits):
        loss, grad = px.cross_entropy_with_grad(other, target, reduction="none", **options)
        assert same_bits(loss, expected[0]), name
        assert same_bits(grad, expected[1]), name
        assert same_bits(px.softmax(other), softmax[0]), name
        assert same_bits(px.log_softmax(other), softmax[1]), name
    if soft:
        for name, other in layouts(target):
            loss, grad = px.cross_entropy_with_grad(logits, other, reduction="none", **options)
            assert same_bits(loss, expected[0]), name
            assert same_bits(grad, expected[1]), name


@pytest.mark.parametrize("classes", CLASSES)
@of_each_kind
def test_class_axis_inside_gives_the_bits_of_class_axis_last(isa, dtype, rng, classes, soft, options):
    logits, target = problem(rng, 2 * 37, classes, dtype, soft)
    expected = px.cross_entropy_with_grad(logits, target, reduction="none", **options)
    inside = np.ascontiguousarray(logits.reshape(2, 37, classes).transpose(0, 2, 1))
    inside_target = np.ascontiguousarray(target.reshape(2, 37, classes).transpose(0, 2, 1)) if soft else target.reshape(2, 37)
    loss, grad = px.cross_entropy_with_grad(inside, inside_target, reduction="none", **options)
    assert same_bits(loss.reshape(-1), expected[0])
    assert same_bits(grad.transpose(0, 2, 1).reshape(-1, classes), expected[1])
    g = rng.normal(size=logits.shape).astype(dtype)
    g_inside = np.ascontiguousarray(g.reshape(2, 37, classes).transpose(0, 2, 1))
    for name in ("softmax", "log_softmax"):
        output = getattr(px, name)(logits)
        output_inside = getattr(px, name)(inside, axis=1)
        assert same_bits(output_inside.transpose(0, 2, 1).reshape(-1, classes), output)
        backward = getattr(px, name + "_backward")
        assert same_bits(backward(g_inside, output_inside, axis=1).transpose(0, 2, 1).reshape(-1, classes), backward(g, output))


@pytest.mark.parametrize("classes", CLASSES)
@of_each_kind
def test_result_does_not_depend_on_thread_count_or_batch_split(isa, dtype, rng, many_threads, classes, soft, options):
    logits, target = problem(rng, 300, classes, dtype, soft)
    for reduction in ("none", "mean"):
        expected = px.cross_entropy_with_grad(logits, target, num_threads=1, reduction=reduction, **options)
        for threads in (2, 3, 4):
            result = px.cross_entropy_with_grad(logits, target, num_threads=threads, reduction=reduction, **options)
            assert same_bits(result[0], expected[0])
            assert same_bits(result[1], expected[1])
    loss, grad = px.cross_entropy_with_grad(logits, target, reduction="none", **options)
    for part in (slice(0, 1), slice(1, 2), slice(2, 19), slice(19, 300)):
        part_loss, part_grad = px.cross_entropy_with_grad(logits[part], target[part], reduction="none", **options)
        assert same_bits(part_loss, loss[part])
        assert same_bits(part_grad, grad[part])


@pytest.mark.parametrize("classes", [2, 10, 33, 1000, 4100])
@of_each_kind
def test_avx2_and_avx512_give_the_same_bits(dtype, rng, classes, soft, options):
    if "avx512" not in _dispatch.supported:
        pytest.skip("this processor has no AVX-512")
    logits, target = problem(rng, 50, classes, dtype, soft)
    results = []
    for isa in ("avx2", "avx512"):
        with _dispatch.use(isa):
            loss, grad = px.cross_entropy_with_grad(logits, target, reduction="none", **options)
            results.append([loss, grad, px.softmax(logits), px.log_softmax(logits)])
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


def assert_outputs_have_the_bits_of_fresh_ones(logits, target):
    """Whatever array is given: contiguous, spaced, unaligned, the logits themselves. `logits`: (rows, classes)."""
    dtype, classes = logits.dtype, logits.shape[1]
    loss, grad = px.cross_entropy_with_grad(logits, target, reduction="none")
    out, grad_out = np.empty_like(loss), np.full(logits.shape, np.nan, dtype)
    result = px.cross_entropy_with_grad(logits, target, reduction="none", out=out, grad_out=grad_out)
    assert result[0] is out
    assert result[1] is grad_out
    assert same_bits(out, loss)
    assert same_bits(grad_out, grad)
    spaced = np.full((len(logits), 2 * classes), np.nan, dtype)
    px.cross_entropy_with_grad(logits, target, reduction="none", grad_out=spaced[:, ::2])
    assert same_bits(spaced[:, ::2], grad)
    assert np.isnan(spaced[:, 1::2].astype(np.float64)).all()
    raw = np.zeros(logits.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(dtype).reshape(logits.shape)
    px.cross_entropy_with_grad(logits, target, reduction="none", grad_out=unaligned)
    assert same_bits(unaligned, grad)
    in_place = logits.copy(order="K")
    loss_again, grad_again = px.cross_entropy_with_grad(in_place, target, reduction="none", grad_out=in_place)
    assert grad_again is in_place
    assert same_bits(loss_again, loss)
    assert same_bits(in_place, grad)
    total = np.empty((), dtype)
    assert px.cross_entropy(logits, target, out=total) is total
    assert same_bits(total, px.cross_entropy(logits, target))


@pytest.mark.spec("S35")
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_outputs_that_are_given_have_the_bits_of_fresh_ones(isa, dtype, rng, classes, order):
    logits, target = problem(rng, 37, classes, dtype, False)
    logits = np.array(logits, order=order)
    assert_outputs_have_the_bits_of_fresh_ones(logits, target)


@pytest.mark.parametrize("classes", [3, 64, 65, 100, 512, 513, 2500])
def test_equal_logits_have_the_same_bits_in_every_layout(isa, dtype, rng, classes):
    """Which of the largest is left out of a sum must not depend on the kernel."""
    logits = np.round(2 * rng.normal(size=(37, classes))).astype(dtype)
    logits[0], logits[1], logits[2, 1:] = 1, -np.inf, np.inf
    logits[3:20] += rng.choice(np.array([0, 2.0**-20], dtype), size=(17, classes))  # whose exponentials are equal, or nearly
    planes = np.ascontiguousarray(logits.T)
    for function in (px.softmax, px.log_softmax):
        assert same_bits(function(planes, axis=0).T, function(logits))
    probabilities = rng.random((37, classes)).astype(dtype)
    expected = px.cross_entropy_with_grad(logits, probabilities, reduction="none")
    loss, gradient = px.cross_entropy_with_grad(planes, np.ascontiguousarray(probabilities.T), axis=0, reduction="none")
    assert same_bits(loss, expected[0])
    assert same_bits(gradient.T, expected[1])


def test_a_gradient_is_laid_out_like_its_logits(rng):
    logits = np.asfortranarray(rng.normal(size=(20, 50)))
    assert px.cross_entropy_with_grad(logits, np.zeros(20, int))[1].strides == logits.strides


# Long rows

FUNCTIONS = {
    "plain": lambda x, y, **threads: px.cross_entropy_with_grad(x, y, reduction="none", **threads),
    "smoothed, with z_loss": lambda x, y, **threads: px.cross_entropy_with_grad(
        x, y, reduction="none", label_smoothing=0.1, z_loss=0.01, **threads
    ),
    "loss only": lambda x, y, **threads: (px.cross_entropy(x, y, reduction="none", label_smoothing=0.1, **threads),),
    "in place": lambda x, y, **threads: gradient_in_place(x, y, **threads),
    "softmax": lambda x, y, **threads: (px.softmax(x, **threads), px.log_softmax(x, **threads)),
    "backward": lambda x, y, **threads: (px.softmax_backward(x, y, **threads), px.log_softmax_backward(x, y, **threads)),
}


def gradient_in_place(logits, target, **options):
    logits = logits.copy(order="K")
    return px.cross_entropy_with_grad(logits, target, reduction="none", grad_out=logits, **options)


@pytest.mark.parametrize(("rows", "classes"), [(1, 40_000), (3, 32_768 + 5), (2, 70_001)])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_rows_that_threads_share_have_the_bits_of_the_same_rows_in_a_batch(isa, dtype, rng, many_threads, rows, classes, soft):
    logits, target = problem(rng, 6, classes, dtype, soft)
    target[3] = target[1]
    logits[3, : classes - 1] = -np.inf  # a row whose sum begins in its last segment
    for name, function in FUNCTIONS.items():
        if name == "backward" and not soft:
            continue
        batch = function(logits, target, num_threads=1)
        for start in range(0, 6, rows):
            part = slice(start, start + rows)
            for threads in (1, 2, 3, 4):
                for alone, together in zip(function(logits[part], target[part], num_threads=threads), batch, strict=True):
                    assert same_bits(alone, together[part]), (name, start, threads)


@pytest.mark.parametrize(("rows", "classes"), [(1, 40_000), (3, 32_768 + 5), (2, 70_001)])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_backward_on_shared_rows_has_the_bits_of_one_thread(isa, dtype, rng, many_threads, monkeypatch, rows, classes, soft):
    logits, target = (array[1 : 1 + rows] for array in problem(rng, 6, classes, dtype, soft))
    g = rng.normal(size=rows)
    loss, grad = px.cross_entropy_with_grad(
        logits, target, reduction="none", label_smoothing=0.1, grad_output=g, num_threads=1
    )  # fmt: skip
    criterion = px.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    for threads in (1, 2, 3, 4):
        monkeypatch.setattr(_threads, "available", lambda threads=threads: (threads, "test"))
        assert same_bits(criterion(logits, target), loss)
        assert same_bits(criterion.backward(g), grad)


@pytest.mark.parametrize("classes", [8191, 8192, 8193, 8192 + 15, 16384, 16385, 8192 * 2 + 17])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_rows_of_about_a_segment_have_the_same_bits_in_every_layout(isa, dtype, rng, many_threads, classes, soft):
    logits, target = problem(rng, 18, classes, dtype, soft)
    transposed, transposed_target = np.ascontiguousarray(logits.T), np.ascontiguousarray(target.T)
    options = {"reduction": "none", "label_smoothing": 0.1}
    loss, grad = px.cross_entropy_with_grad(logits, target, num_threads=1, **options)
    softmax, log_softmax = px.softmax(logits, num_threads=1), px.log_softmax(logits, num_threads=1)
    for threads in (1, 4):
        for rows in (5, 18):  # fewer and more than a tile
            columns = {"axis": 0, "num_threads": threads}
            part = transposed_target[..., :rows]
            result = px.cross_entropy_with_grad(transposed[:, :rows], part, **columns, **options)
            assert same_bits(result[0], loss[:rows])
            assert same_bits(result[1].T, grad[:rows])
            assert same_bits(px.softmax(transposed[:, :rows], **columns).T, softmax[:rows])
            assert same_bits(px.log_softmax(transposed[:, :rows], **columns).T, log_softmax[:rows])
            result = px.cross_entropy_with_grad(logits[:rows], target[:rows], num_threads=threads, **options)
            assert same_bits(result[0], loss[:rows])
            assert same_bits(result[1], grad[:rows])


# Results that are stored past the caches

STREAM_BYTES = 2**25  # as in _plan.pxi


class Guarded:
    """An array of NaN in the middle of a larger one, some elements behind a 64-byte boundary."""

    def __init__(self, shape, dtype, elements):
        size, itemsize = int(np.prod(shape)), np.dtype(dtype).itemsize
        self.around = np.full(size + 512, np.nan, dtype)
        self.start = 128 + (-self.around.ctypes.data % 64) // itemsize + elements
        self.end = self.start + size
        self.array = self.around[self.start : self.end].reshape(shape)

    def is_intact(self):
        return np.isnan(self.around[: self.start]).all() and np.isnan(self.around[self.end :]).all()


def large_problem(rng, classes, dtype):
    """Rows whose gradient just passes the limit, some of them ignored."""
    rows = -(-STREAM_BYTES // (classes * np.dtype(dtype).itemsize))
    logits = np.resize(5 * rng.standard_normal(100_003).astype(dtype), (rows, classes))
    target = rng.integers(0, classes, rows)
    target[::5] = target[3] = target[-1] = -100
    return logits, target


def in_parts(function, rows):
    """The results of a function of slices, each too small to be stored past the caches, put together."""
    parts = [function(slice(start, min(start + 150, rows))) for start in range(0, rows, 150)]
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


@pytest.mark.spec("S35")
@pytest.mark.parametrize("classes", [3001, 4096])
def test_a_gradient_stored_past_the_caches_has_the_bits_of_its_rows(isa, dtype, rng, many_threads, classes):
    logits, target = large_problem(rng, classes, dtype)
    options = {"reduction": "none", "label_smoothing": 0.1}
    loss, grad = in_parts(lambda part: px.cross_entropy_with_grad(logits[part], target[part], **options), len(logits))
    for row in (0, 1, 2, 3, len(logits) - 2, len(logits) - 1):
        assert same_bits(px.cross_entropy_with_grad(logits[row], target[row], **options)[1], grad[row])
    output = Guarded(logits.shape, dtype, 1)
    result = px.cross_entropy_with_grad(logits, target, grad_out=output.array, num_threads=3, **options)
    assert same_bits(result[0], loss)
    assert same_bits(output.array, grad)
    assert output.is_intact()
    assert not output.array[target < 0].any()
    assert not np.signbit(output.array[target < 0]).any()
    assert same_bits(px.cross_entropy_with_grad(logits, target, num_threads=1, **options)[1], grad)
    # Logits that go through a scratch, then in place.
    output = Guarded(logits.shape, dtype, 1)
    px.cross_entropy_with_grad(np.asfortranarray(logits), target, grad_out=output.array, **options)
    assert same_bits(output.array, grad)
    assert output.is_intact()
    px.cross_entropy_with_grad(logits, target, grad_out=logits, **options)
    assert same_bits(logits, grad)


@pytest.mark.spec("S35", "S37", "S38")
@pytest.mark.parametrize("classes", [3001, 4096])
def test_other_results_stored_past_the_caches_have_the_bits_of_their_rows(isa, dtype, rng, many_threads, classes):
    logits, target = large_problem(rng, classes, dtype)
    for function in (px.softmax, px.log_softmax):
        (expected,) = in_parts(lambda part, function=function: (function(logits[part]),), len(logits))
        output = Guarded(logits.shape, dtype, 1)
        assert function(logits, out=output.array, num_threads=3) is output.array
        assert same_bits(output.array, expected)
        assert output.is_intact()
    output = Guarded(logits.shape, dtype, 1)
    px.log_softmax_backward(logits, expected, out=output.array)
    (backward,) = in_parts(lambda part: (px.log_softmax_backward(logits[part], expected[part]),), len(logits))
    assert same_bits(output.array, backward)
    assert output.is_intact()
    output = Guarded(logits.shape, dtype, 1)
    px.nll_loss_with_grad(logits, target, reduction="sum", grad_out=output.array)
    assert same_bits(output.array, np.where(np.arange(classes) == target[:, None], dtype(-1), dtype(0)))
    assert output.is_intact()


@pytest.mark.parametrize("inner", [5, 800])
def test_a_large_gradient_with_the_class_axis_inside_has_the_bits_of_class_axis_last(isa, dtype, rng, many_threads, inner):
    classes = 3001
    logits, target = large_problem(rng, classes, dtype)
    outer = -(-len(logits) // inner)
    logits, target = np.resize(logits, (outer * inner, classes)), np.resize(target, outer * inner)
    expected = px.cross_entropy_with_grad(logits, target, reduction="none")[1].reshape(outer, inner, classes)
    inside = np.ascontiguousarray(logits.reshape(outer, inner, classes).swapaxes(1, 2))
    output = Guarded(inside.shape, dtype, 1)
    px.cross_entropy_with_grad(inside, target.reshape(outer, inner), reduction="none", grad_out=output.array, num_threads=3)
    assert np.array_equal(output.array, expected.swapaxes(1, 2))
    assert output.is_intact()


@pytest.mark.parametrize("offset", [0, 1, 13])
def test_large_planes_whatever_their_alignment_have_the_bits_of_class_axis_last(isa, dtype, rng, many_threads, offset):
    # Each row of a plane is whole lines of memory from the class before: they are stored past the caches.
    classes, inner = 21, 4096
    outer = -(-STREAM_BYTES // (classes * inner * np.dtype(dtype).itemsize))
    logits = np.resize(5 * rng.standard_normal(100_003).astype(dtype), (outer, inner, classes))
    target = rng.integers(0, classes, (outer, inner))
    target[:, ::7] = target[0, :40] = -100
    inside = Guarded((outer, classes, inner), dtype, offset)
    inside.array[...] = logits.swapaxes(1, 2)
    output = Guarded(inside.array.shape, dtype, offset)
    for options in ({}, {"label_smoothing": 0.1}):
        expected = px.cross_entropy_with_grad(logits, target, axis=-1, reduction="none", **options)
        result = px.cross_entropy_with_grad(
            inside.array, target, reduction="none", grad_out=output.array, num_threads=3, **options
        )
        assert same_bits(result[0], expected[0])
        assert np.array_equal(output.array, expected[1].swapaxes(1, 2))
        assert output.is_intact()
    px.softmax(inside.array, axis=1, out=output.array)
    assert np.array_equal(output.array, px.softmax(logits).swapaxes(1, 2))
    assert output.is_intact()


def test_a_large_float16_gradient_has_the_bits_of_its_rows(isa, rng):
    logits, target = large_problem(rng, 4099, np.float16)
    options = {"reduction": "none"}
    (grad,) = in_parts(lambda part: px.cross_entropy_with_grad(logits[part], target[part], **options)[1:], len(logits))
    output = Guarded(logits.shape, np.float16, 1)
    px.cross_entropy_with_grad(logits, target, grad_out=output.array, **options)
    assert same_bits(output.array, grad)
    assert output.is_intact()
    assert not grad[target < 0].any()


@pytest.mark.parametrize("classes", [16385, 20_000, 33_001])
@pytest.mark.parametrize("rows", [1, 2, 7, 420])
def test_long_rows_have_the_bits_of_each_row_alone(isa, rng, classes, rows):
    # The gradient of a long row is written while the next one is summed; 420 rows are stored past the caches.
    if rows == 420 and isa == "baseline":
        pytest.skip("the same code, and slow")
    logits = rng.standard_normal((rows, classes), dtype=np.float32)
    target = rng.integers(0, classes, rows)
    target[1:-1:3] = -100
    logits[rows // 2, 7] = np.nan
    logits[0] += 3e6  # moved before it is summed
    criterion = px.CrossEntropyLoss(reduction="none")
    loss = criterion(logits, target)
    grad = criterion.backward()
    for shift in range(16) if rows < 10 else (5,):  # what is left for the next row depends on where lines of memory begin
        guarded = np.full(logits.size + 33, 7, np.float32)
        out = guarded[1 + shift : 1 + shift + logits.size].reshape(logits.shape)
        together = px.cross_entropy_with_grad(logits, target, reduction="none", grad_out=out)
        assert same_bits(together[0], loss)
        assert same_bits(together[1], grad)
        assert (guarded[: 1 + shift] == 7).all()
        assert (guarded[1 + shift + logits.size :] == 7).all()
    probabilities = px.softmax(logits, axis=1)
    for i in range(rows) if rows < 10 else (0, 1, rows // 2, rows - 1):
        alone = px.cross_entropy_with_grad(logits[i : i + 1], target[i : i + 1], reduction="none")
        assert same_bits(alone[0], loss[i : i + 1])
        assert same_bits(alone[1], grad[i : i + 1])
        assert same_bits(px.softmax(logits[i : i + 1], axis=1), probabilities[i : i + 1])
    wanted = grad.copy()
    assert same_bits(px.cross_entropy_with_grad(logits, target, reduction="none", grad_out=logits)[1], wanted)


def test_rows_too_long_to_keep_their_exponentials(isa, rng, many_threads):
    # With so many classes they are computed twice, so that no memory of the size of a row is taken.
    logits = np.tile(rng.standard_normal(1 << 16, dtype=np.float32), 17)[None, :-3]
    target = [5]
    criterion = px.CrossEntropyLoss()
    loss = criterion(logits, target)
    for num_threads in (1, 4):
        for grad_out in (None, logits.copy()):
            x = logits if grad_out is None else grad_out
            found = px.cross_entropy_with_grad(x, target, grad_out=grad_out, num_threads=num_threads)
            assert same_bits(found[0], loss)
            assert same_bits(found[1], criterion.backward())


def test_rows_broadcast_along_several_axes(isa, dtype, rng):
    row = rng.normal(size=20).astype(dtype)
    target = rng.integers(0, 20, (3, 4, 5))
    expected = px.cross_entropy_with_grad(np.tile(row, (3, 4, 5, 1)), target, axis=-1, reduction="none")
    for logits in (np.broadcast_to(row, (3, 4, 5, 20)), np.broadcast_to(np.tile(row, (5, 1)), (3, 4, 5, 20))):
        found = px.cross_entropy_with_grad(logits, target, axis=-1, reduction="none")
        assert same_bits(found[0], expected[0])
        assert same_bits(np.ascontiguousarray(found[1]), expected[1])
