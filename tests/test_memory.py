"""Memory of large outputs that nobody holds any more is used again, and no other."""

import ctypes
import functools
import gc
import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import same_bits

import pyx_xent as px
from pyx_xent import _call, _memory

ROWS, CLASSES = 130, 1009  # 525 kB of float32
DEFAULT = 512 << 20


@pytest.fixture(autouse=True)
def _as_new():
    px.reuse_gradients(0)
    px.reuse_gradients(DEFAULT)
    yield
    px.reuse_gradients(DEFAULT)


def place_of(array):
    return array.__array_interface__["data"][0]


@pytest.fixture
def gradient(rng):
    """A function that computes a new gradient of ROWS x CLASSES, other numbers at each call."""
    logits = rng.normal(size=(ROWS, CLASSES)).astype(np.float32)
    target = rng.integers(CLASSES, size=ROWS)
    factors = iter(range(1, 1000))

    def compute():
        return px.cross_entropy_with_grad(logits, target, grad_output=next(factors))[1]

    compute.logits, compute.target = logits, target
    return compute


HOLDERS = {
    "the array": lambda a: a,
    "a row": lambda a: a[0],
    "a row of a transposed slice": lambda a: a[3:70].T[5:9][2],
    "a reshaped view in another dtype": lambda a: a.view(np.int32).reshape(-1)[7:],
    "a list of rows": list,
    "the last element of rows": lambda a: list(a)[-1],
    "an iterator of rows": lambda a: (row for row in a),
    "broadcast": lambda a: np.broadcast_to(a, (2, *a.shape)),
    "as_strided": lambda a: np.lib.stride_tricks.as_strided(a[1:], (3, 5), a.strides),
    "a subclass": lambda a: a.view(np.recarray),
    "flat": lambda a: a.flat,
    "a memoryview": memoryview,
    "a slice of a memoryview": lambda a: memoryview(a)[4:9],
    "an array of a memoryview": lambda a: np.asarray(memoryview(a)),
    "frombuffer": lambda a: np.frombuffer(a, np.float32)[11:],
    "a bytes-like cast": lambda a: memoryview(a).cast("B")[100:200],
    "DLPack by way of NumPy": lambda a: np.from_dlpack(a)[2:],
    "a DLPack capsule": lambda a: a.__dlpack__(),
    "ctypes, a pointer": lambda a: a.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
    "ctypes, the attribute": lambda a: a.ctypes,
    "ctypes, an array in the buffer": lambda a: (ctypes.c_float * a.size).from_buffer(a),
    "__array_interface__ of an object that keeps it": lambda a: np.asarray(Interface(a)),
    "a pickle buffer": lambda a: pickle.PickleBuffer(a),
    "an exception's frame": lambda a: raised(a),
    "a cycle": lambda a: cycle(a),
}


class Interface:
    def __init__(self, array):
        self.array, self.__array_interface__ = array, array.__array_interface__


def raised(array):
    try:
        raise ValueError(array[1:])
    except ValueError as error:
        return error


def cycle(array):
    ring = [array[1:]]
    ring.append(ring)
    return ring


def torchs():
    return pytest.importorskip("torch")


TORCH_HOLDERS = {
    "torch.from_numpy": lambda a: torchs().from_numpy(a),
    "a view of a tensor": lambda a: torchs().from_numpy(a).T[3:5].reshape(2, -1)[1],
    "a tensor's storage": lambda a: torchs().from_numpy(a).untyped_storage(),
    "DLPack by way of PyTorch": lambda a: torchs().from_dlpack(a)[1:],
    "an array of a tensor": lambda a: torchs().from_numpy(a)[5:].numpy(),
    "torch.frombuffer": lambda a: torchs().frombuffer(a, dtype=torchs().float32),
}


@pytest.mark.parametrize("way", HOLDERS | TORCH_HOLDERS)
def test_memory_is_not_used_again_while_it_is_held_by(way, gradient):
    array = gradient()
    place, size = place_of(array), array.nbytes
    holder = (HOLDERS | TORCH_HOLDERS)[way](array)
    del array
    memory = (ctypes.c_char * size).from_address(place)  # which does not hold it
    before = bytes(memory)
    others = [gradient() for _ in range(3)]
    assert all(abs(place_of(other) - place) >= size for other in others)
    assert bytes(memory) == before
    del others, holder
    gc.collect()
    assert place in map(place_of, [gradient() for _ in range(4)])


def test_a_row_survives_the_next_calls(gradient):
    grad = gradient()
    expected = grad[0].copy()
    row = grad[0]
    del grad
    for _ in range(5):
        gradient()
    assert same_bits(row, expected)


def test_memory_is_not_used_again_while_another_thread_holds_it(gradient):
    ready, done, seen = threading.Event(), threading.Event(), []

    def hold(row):
        before = row.copy()
        ready.set()
        done.wait(30)
        seen.append(same_bits(row, before))

    array = gradient()
    place = place_of(array)
    thread = threading.Thread(target=hold, args=(array[0],))
    thread.start()
    ready.wait(30)
    del array
    others = [gradient() for _ in range(3)]
    assert place not in map(place_of, others)
    done.set()
    thread.join()
    assert seen == [True]
    del others, thread
    assert place in map(place_of, [gradient() for _ in range(4)])


@pytest.mark.parametrize(
    "copied",
    [np.copy, lambda a: a + 0, bytes, lambda a: pickle.loads(pickle.dumps(a)), lambda a: a.tolist(), lambda a: a.sum()],
    ids=["copy", "result", "bytes", "pickle", "list", "scalar"],
)
def test_copies_do_not_hold_memory(copied, gradient):
    array = gradient()
    place = place_of(array)
    result = copied(array)
    del array
    assert place_of(gradient()) == place
    del result


def test_a_cycle_is_freed_by_the_collector_only(gradient):
    gc.disable()
    try:
        array = gradient()
        place = place_of(array)
        cycle(array)
        del array
        assert place_of(gradient()) != place
    finally:
        gc.enable()
    gc.collect()
    assert place in [place_of(a) for a in [gradient(), gradient()]]


def test_outputs_are_ordinary_arrays(gradient):
    gradient()
    again = gradient()
    assert type(again) is np.ndarray
    assert again.base is None
    assert again.flags.owndata
    assert again.flags.writeable
    assert again.flags.c_contiguous
    assert place_of(again) % 64 == 0
    again[...] = 1
    again.resize((2 * ROWS, CLASSES), refcheck=False)
    assert again.sum() == ROWS * CLASSES
    again.resize((3, 5), refcheck=False)
    assert again.tolist() == np.ones((3, 5)).tolist()
    del again
    assert _memory.kept_bytes() >= 4 * ROWS * CLASSES


OPERATIONS = {
    "cross_entropy_with_grad": lambda x, y, g: px.cross_entropy_with_grad(x, y)[1],
    "nll_loss_with_grad": lambda x, y, g: px.nll_loss_with_grad(x, y)[1],
    "softmax": lambda x, y, g: px.softmax(x),
    "log_softmax": lambda x, y, g: px.log_softmax(x),
    "softmax_backward": lambda x, y, g: px.softmax_backward(g, x),
    "log_softmax_backward": lambda x, y, g: px.log_softmax_backward(g, x),
    "CrossEntropyLoss": lambda x, y, g: backward(px.CrossEntropyLoss(), x, y),
    "NLLLoss": lambda x, y, g: backward(px.NLLLoss(), x, y),
}


def backward(criterion, x, y):
    criterion(x, y)
    return criterion.backward()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=["float32", "float64", "float16"])
def test_used_memory_changes_no_bit(name, dtype, rng):
    shape = (2 * ROWS, CLASSES)
    layouts = {"C": lambda a: a, "Fortran": np.asfortranarray, "every other": lambda a: np.repeat(a, 2, axis=1)[:, ::2]}
    target = rng.integers(CLASSES, size=shape[0])
    x, g = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    for layout in layouts.values():
        arguments = layout(x), target, layout(g)
        px.reuse_gradients(0)
        new = OPERATIONS[name](*arguments)
        px.reuse_gradients(DEFAULT)
        spoilt = OPERATIONS[name](*arguments)
        place = place_of(spoilt)
        spoilt[...] = np.nan
        del spoilt
        again = OPERATIONS[name](*arguments)
        assert place_of(again) == place
        assert again.strides == new.strides
        assert same_bits(again, new)


def test_bfloat16_of_ml_dtypes(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    logits = rng.normal(size=(2 * ROWS, CLASSES)).astype(ml_dtypes.bfloat16)
    first = px.softmax(logits)
    place, bits = place_of(first), first.tobytes()
    del first
    again = px.softmax(logits)
    assert place_of(again) == place
    assert again.dtype == ml_dtypes.bfloat16
    assert again.tobytes() == bits


def test_gradients_of_a_linear_layer(rng):
    hidden, weight = (rng.normal(size=(rows, 256)).astype(np.float32) for rows in (600, 1000))
    target = rng.integers(1000, size=600)

    def gradients():
        return px.linear_cross_entropy_with_grad(hidden, weight, target)[1]

    first = gradients()
    before = [gradient.copy() for gradient in first[:2]]
    row, places = first[0][0], [place_of(gradient) for gradient in first[:2]]
    del first
    again = gradients()
    assert places[0] not in map(place_of, again[:2])  # the row holds it
    assert places[1] in map(place_of, again[:2])
    assert all(same_bits(gradient, expected) for gradient, expected in zip(again[:2], before, strict=True))
    assert same_bits(row, before[0][0])


def test_a_loop_holds_the_last_gradient_and_needs_two(gradient):
    places, grad = set(), None
    for _ in range(20):
        grad = gradient()
        places.add(place_of(grad))
    assert len(places) == 2
    del grad


def test_small_outputs_are_left_to_the_allocator(rng):
    logits = rng.normal(size=(100, 100)).astype(np.float32)
    px.cross_entropy_with_grad(logits, np.zeros(100, int))
    assert _memory.kept_bytes() == 0


def test_an_exception_gives_memory_back(gradient, monkeypatch):
    def interrupted(entry):
        def call(*args, **kwargs):
            entry(*args, **kwargs)
            raise KeyboardInterrupt

        return call

    grad = gradient()
    place = place_of(grad)
    del grad
    before = _memory.kept_bytes()
    with monkeypatch.context() as patched:
        for name in ("cross_entropy_with_grad", "cross_entropy_gradient"):
            patched.setattr(_call, name, interrupted(getattr(_call, name)))
        with pytest.raises(KeyboardInterrupt):
            gradient()
    gc.collect()
    assert _memory.kept_bytes() == before
    assert place_of(gradient()) == place


# The budget


def outputs(rng, sizes):
    """A softmax of each size in bytes, a multiple of 4000."""
    return [px.softmax(np.zeros((size // 4000, 1000), np.float32)) for size in sizes]


def test_what_is_kept_stays_within_the_budget(rng):
    px.reuse_gradients(3_000_000)
    arrays = outputs(rng, [1_000_000] * 8)
    assert _memory.kept_bytes() == 0
    while arrays:
        arrays.pop()
        assert _memory.kept_bytes() <= 3_000_000
    assert _memory.kept_bytes() >= 2_000_000
    px.reuse_gradients(1_500_000)
    assert 1_000_000 <= _memory.kept_bytes() <= 1_500_000
    px.reuse_gradients(0)
    assert _memory.kept_bytes() == 0
    outputs(rng, [1_000_000] * 3)
    assert _memory.kept_bytes() == 0


def test_what_is_larger_than_the_budget_is_not_kept(rng):
    px.reuse_gradients(2_000_000)
    outputs(rng, [1_000_000])
    before = _memory.kept_bytes()
    outputs(rng, [4_000_000])
    assert _memory.kept_bytes() == before > 0


def test_what_is_kept_longest_goes_first(rng):
    px.reuse_gradients(5_000_000)
    first, second, third = outputs(rng, [1_000_000, 2_000_000, 3_200_000])
    places = [place_of(array) for array in (first, second, third)]
    del first
    del second
    del third  # 6.2 MB: the first two must go, or the first and this one would be over the budget
    assert _memory.kept_bytes() < 3_300_000
    assert place_of(outputs(rng, [3_200_000])[0]) == places[2]


def test_sizes_that_nobody_asks_for_again_are_given_back(rng):
    outputs(rng, [1_000_000])
    for _ in range(100):
        outputs(rng, [2_000_000])
    assert 2_000_000 <= _memory.kept_bytes() < 2_100_000


def test_a_block_serves_outputs_a_little_smaller(rng):
    (array,) = outputs(rng, [2_000_000])
    place = place_of(array)
    del array
    (smaller,) = outputs(rng, [1_800_000])
    assert place_of(smaller) == place
    del smaller
    assert place_of(outputs(rng, [1_000_000])[0]) != place  # half of it would be held for nothing
    assert place_of(outputs(rng, [2_000_000])[0]) == place  # all of it is still there


def test_mixed_sizes_find_their_own(rng):
    sizes = [1_000_000, 4_000_000, 2_000_000, 8_000_000]
    first = [place_of(array) for array in outputs(rng, sizes)]
    for _ in range(3):
        assert [place_of(array) for array in outputs(rng, sizes[::-1])] == first[::-1]


@pytest.mark.parametrize("wrong", [-1, 1.5, None, "1"])
def test_budget_is_a_number_of_bytes(wrong):
    with pytest.raises(ValueError, match="max_bytes must be an int and not negative, got"):
        px.reuse_gradients(wrong)


def test_any_budget():
    px.reuse_gradients(1 << 80)
    px.reuse_gradients(np.int64(5))


def test_one_budget_with_pytorch(gradient):
    ours = pytest.importorskip("pyx_xent.torch")
    torch = torchs()
    assert ours.reuse_gradients is px.reuse_gradients
    logits, target = torch.zeros(1100, 1000, requires_grad=True), torch.zeros(1100, dtype=torch.int64)

    def gradient_of_torch():
        return torch.autograd.grad(ours.cross_entropy(logits, target), logits)[0]

    grad = gradient_of_torch()
    place = grad.data_ptr()
    row = grad.detach().T[4]
    del grad
    other = gradient_of_torch()
    assert other.data_ptr() != place
    del row
    assert gradient_of_torch().data_ptr() == place
    size = other.numel() * 4
    del other
    assert px._memory.kept_bytes() == 0  # nobody holds two gradients of PyTorch's
    px.reuse_gradients(3 * size)
    arrays = [px.softmax(logits.detach().numpy()) for _ in range(2)]
    del arrays
    gradient_of_torch()  # of PyTorch's, what is over the limit is given back with the next one
    remembered = pytest.importorskip("pyx_xent.torch._tensors")._memories
    assert 2 * size <= px._memory.kept_bytes() + size * len(remembered) <= 3.5 * size
    px.reuse_gradients(0)
    assert px._memory.kept_bytes() == len(remembered) == 0


# Handlers, processes, threads


@functools.cache  # so that the handler outlives every array
def _handlers():
    """(set handler, get handler, one that is NumPy's under another identity, its memory): the C API of NEP 49."""
    pointer, text, item, python = ctypes.c_void_p, ctypes.c_char_p, ctypes.py_object, ctypes.pythonapi
    pointer_of = ctypes.PYFUNCTYPE(pointer, item, text)(("PyCapsule_GetPointer", python))
    capsule_of = ctypes.PYFUNCTYPE(item, pointer, pointer, pointer)(("PyCapsule_New", python))
    api = (pointer * 307).from_address(pointer_of(np._core.multiarray._ARRAY_API, None))
    set_handler, get_handler = ctypes.PYFUNCTYPE(item, item)(api[304]), ctypes.PYFUNCTYPE(item)(api[305])
    size = 128 + 5 * ctypes.sizeof(pointer)  # name and version; ctx and four functions
    name = ctypes.create_string_buffer(b"mem_handler")
    copied = ctypes.create_string_buffer(ctypes.string_at(pointer_of(get_handler(), name.value), size), size)
    return set_handler, get_handler, capsule_of(ctypes.addressof(copied), ctypes.addressof(name), None), (name, copied)


@pytest.fixture
def applications_handler():
    set_handler, get_handler, handler, _ = _handlers()
    before = set_handler(handler)
    yield lambda: get_handler() is handler
    set_handler(before)


def test_the_handler_of_an_application_stays_and_gets_the_outputs(gradient, applications_handler):
    for _ in range(3):
        gradient()
    assert applications_handler()
    assert _memory.kept_bytes() == 0
    for shape in [(), (3, 5), (600, 1001)]:  # products of matrices depend on where they begin
        array = _memory.empty(shape, np.dtype(np.float64))
        assert (array.shape, array.dtype, place_of(array) % 64) == (shape, np.float64, 0)


def test_our_handler_is_set_for_our_outputs_alone(gradient):
    gradient()
    before = _memory.kept_bytes()
    other = np.empty((ROWS, CLASSES), np.float32)
    assert _memory.kept_bytes() == before
    del other
    assert _memory.kept_bytes() == before


def test_tracemalloc_sees_who_holds_memory(gradient):
    tracemalloc = pytest.importorskip("tracemalloc")
    gradient()
    tracemalloc.start()
    try:
        grad = gradient()
        held = tracemalloc.get_traced_memory()[0]
        del grad
        assert held - tracemalloc.get_traced_memory()[0] >= 4 * ROWS * CLASSES
    finally:
        tracemalloc.stop()


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


SETUP = """if True:
    import os, sys, threading, atexit
    import numpy as np
    import pyx_xent as px
    from pyx_xent import _memory
    x, y = np.zeros((1000, 1000), np.float32), np.zeros(1000, int)
    def gradient():
        return px.cross_entropy_with_grad(x, y)[1]
"""


def test_arrays_may_outlive_everything():
    # In a module that is cleared last, in an exit handler, in a thread that never ends.
    code = """
    sys.kept = gradient(), gradient()[3:5]
    px.kept = np.from_dlpack(gradient())
    _memory.kept = gradient()
    atexit.register(gradient().sum)
    threading.Thread(target=lambda g: threading.Event().wait(), args=(gradient(),), daemon=True).start()
    gradient()
    print("done")"""
    assert run(SETUP + code) == "done"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_keeps_nothing_of_its_parents(gradient):
    held, before = gradient(), None
    gradient()
    assert _memory.kept_bytes() > 0
    expected = held.copy()
    child = os.fork()
    if not child:  # pytest must not go on here
        code = 1
        try:
            ok = _memory.kept_bytes() == 0
            for _ in range(3):
                before = gradient()
                ok = ok and place_of(before) != place_of(held)
            ok = ok and same_bits(held, expected)
            place = place_of(held)
            del held
            ok = ok and place in [place_of(g) for g in [gradient() for _ in range(3)]]
            code = 0 if ok else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _memory.kept_bytes() > 0
    assert same_bits(held, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_blocks_that_are_kept_do_not_make_a_call_fail():
    code = """
    import resource
    held = [gradient() for _ in range(60)]
    held.clear()
    small = np.zeros((700, 1000), np.float32), y[:700]
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 20), now + (1 << 20)))
    many = [px.cross_entropy_with_grad(*small, num_threads=1)[1] for _ in range(30)]
    print(_memory.kept_bytes() < 40 * 4000000)"""
    assert run(SETUP + code) == "True"


def test_nothing_is_used_again_while_it_is_held_by_eight_threads():
    """Each thread marks its outputs, keeps some by their rows, and finds its own marks at the end."""
    wrong, until = [], time.monotonic() + 3
    shared, lock = [], threading.Lock()  # arrays that one thread has made and another one drops

    def work(seed):
        rng, held, count = np.random.default_rng(seed), [], 0
        while time.monotonic() < until and not wrong:
            count += 1
            rows = int(rng.choice([140, 150, 300, 600]))
            array = _memory.empty((rows, 1000), np.dtype(np.float32))
            mark = float(seed * 100_000 + count % 100_000)
            array[...] = mark
            item = (array[rows // 2 :] if count % 3 else array, mark)
            del array
            if count % 5 == 0:
                with lock:
                    shared.append(item)
                    item = shared.pop(int(rng.integers(len(shared))))
            held.append(item)
            if len(held) > 6:
                view, mark = held.pop(int(rng.integers(len(held))))
                if not (view == mark).all():
                    wrong.append((seed, mark, view[:, 0]))
            if count % 50 == 0:
                px.reuse_gradients(int(rng.choice([0, 1, 5, 500])) << 20)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:2]
    shared.clear()
    gc.collect()
    px.reuse_gradients(5 << 20)
    assert 0 <= _memory.kept_bytes() <= 5 << 20
    px.reuse_gradients(0)
    assert _memory.kept_bytes() == 0
