"""SPEC S36: a row's bits depend on nothing but the row."""

import numpy as np
import pytest
from conftest import same_bits

import pyx_xent as px
from pyx_xent import _dispatch

pytestmark = pytest.mark.spec("S36", "S7")

CLASSES = [1, 2, 10, 16, 31, 32, 33, 64, 65, 130, 1000, 2050, 4100]
OPTIONS = [{}, {"label_smoothing": 0.1, "z_loss": 0.01}]


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
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smoothed"])
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
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_class_axis_inside_gives_the_bits_of_class_axis_last(isa, dtype, rng, classes, soft):
    logits, target = problem(rng, 2 * 37, classes, dtype, soft)
    expected = px.cross_entropy_with_grad(logits, target, reduction="none", label_smoothing=0.1)
    inside = np.ascontiguousarray(logits.reshape(2, 37, classes).transpose(0, 2, 1))
    inside_target = np.ascontiguousarray(target.reshape(2, 37, classes).transpose(0, 2, 1)) if soft else target.reshape(2, 37)
    loss, grad = px.cross_entropy_with_grad(inside, inside_target, reduction="none", label_smoothing=0.1)
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
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_result_does_not_depend_on_thread_count_or_batch_split(isa, dtype, rng, many_threads, classes, soft):
    logits, target = problem(rng, 300, classes, dtype, soft)
    for reduction in ("none", "mean"):
        options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
        expected = px.cross_entropy_with_grad(logits, target, num_threads=1, **options)
        for threads in (2, 3, 4):
            result = px.cross_entropy_with_grad(logits, target, num_threads=threads, **options)
            assert same_bits(result[0], expected[0])
            assert same_bits(result[1], expected[1])
    loss, grad = px.cross_entropy_with_grad(logits, target, reduction="none")
    for part in (slice(0, 1), slice(1, 2), slice(2, 19), slice(19, 300)):
        part_loss, part_grad = px.cross_entropy_with_grad(logits[part], target[part], reduction="none")
        assert same_bits(part_loss, loss[part])
        assert same_bits(part_grad, grad[part])


@pytest.mark.parametrize("classes", [2, 10, 33, 1000, 4100])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_avx2_and_avx512_give_the_same_bits(dtype, rng, classes, soft):
    if "avx512" not in _dispatch.supported:
        pytest.skip("this processor has no AVX-512")
    logits, target = problem(rng, 50, classes, dtype, soft)
    results = []
    for isa in ("avx2", "avx512"):
        with _dispatch.use(isa):
            loss, grad = px.cross_entropy_with_grad(logits, target, reduction="none", label_smoothing=0.1)
            results.append([loss, grad, px.softmax(logits), px.log_softmax(logits)])
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


@pytest.mark.spec("S35")
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_outputs_that_are_given_have_the_bits_of_fresh_ones(isa, dtype, rng, classes, order):
    logits, target = problem(rng, 37, classes, dtype, False)
    logits = np.array(logits, order=order)
    loss, grad = px.cross_entropy_with_grad(logits, target, reduction="none")
    out, grad_out = np.empty_like(loss), np.full(logits.shape, np.nan, dtype)
    result = px.cross_entropy_with_grad(logits, target, reduction="none", out=out, grad_out=grad_out)
    assert result[0] is out
    assert result[1] is grad_out
    assert same_bits(out, loss)
    assert same_bits(grad_out, grad)
    spaced = np.full((37, 2 * classes), np.nan, dtype)
    px.cross_entropy_with_grad(logits, target, reduction="none", grad_out=spaced[:, ::2])
    assert same_bits(spaced[:, ::2], grad)
    assert np.isnan(spaced[:, 1::2]).all()
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


def test_a_gradient_is_laid_out_like_its_logits(rng):
    logits = np.asfortranarray(rng.normal(size=(20, 50)))
    assert px.cross_entropy_with_grad(logits, np.zeros(20, int))[1].strides == logits.strides
