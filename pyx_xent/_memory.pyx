"""Large outputs in memory that earlier ones have left: the system clears a page of new memory when it is first touched, which
costs more than computing what goes there.

Whoever may still use an array's memory keeps the array alive: views, memoryviews, DLPack exports and tensors all do. So the
question whether anybody holds it is left to NumPy, which frees an array's memory when nobody does. NumPy takes that memory from
a handler (NEP 49), and here is one: what it is given back is kept, up to a budget, and is the next array's. The arrays are
ordinary ones that own their data.

    empty, empty_like ── NumPy ── handler ── allocate, release      a block is a header and an array's memory behind it
                                                │
                                              take, keep            the blocks that nobody uses: a ring of `SLOTS`

Arrays die in any thread, at any time, also when the interpreter ends and in a child that was forked meanwhile. So there is no
lock: a block belongs to whoever has exchanged it out of its slot.
"""

import math
import operator
import os
import sys

import numpy as np

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.ref cimport Py_INCREF, PyObject, PyTypeObject
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset, strcpy

cdef extern from "numpy/arrayobject.h":
    PyObject* PyDataMem_DefaultHandler
    cnp.ndarray PyArray_NewFromDescr(
        PyTypeObject*, cnp.dtype, int, cnp.npy_intp*, cnp.npy_intp*, void*, int, PyObject*
    )

cdef extern from "_atomic.h":
    void* swap "pyx_xent_swap"(void** place, void* value) noexcept
    bint put_if_null "pyx_xent_put_if_null"(void** place, void* value) noexcept
    bint is_null "pyx_xent_is_null"(void** place) noexcept
    Py_ssize_t add "pyx_xent_add"(Py_ssize_t* count, Py_ssize_t n) noexcept
    Py_ssize_t load "pyx_xent_load"(Py_ssize_t* count) noexcept
    void store "pyx_xent_store"(Py_ssize_t* count, Py_ssize_t n) noexcept

cnp.import_array()

# Bytes. Taking an array from here costs 0.6 µs more than from NumPy: 1 % of a call of this size, which would touch 128 new
# pages otherwise, wherever the system's malloc gives them back (glibc learns not to, others do not).
LARGE = 1 << 19
cdef Py_ssize_t KEPT_FROM = LARGE

cdef enum:
    ALIGNMENT = 64                # a cache line; the last digits of BLAS's products may depend on where matrices begin
    SLOTS = 32                    # a block that nobody has asked for while so many others came back is not kept any longer


cdef struct Block:
    # In front of the memory that an array gets
    void* begin                   # what NumPy's allocator has given
    size_t size                   # of that
    size_t capacity               # bytes for an array


cdef void* slots[SLOTS]           # of Block*: a ring, in the order in which they came back
cdef Py_ssize_t returned = 0      # how many came back; the last one went into slots[returned % SLOTS]
cdef Py_ssize_t kept = 0          # bytes of those in the ring; never less
cdef Py_ssize_t budget = 512 << 20
cdef cnp.PyDataMemAllocator* numpys


# The ring

cdef void give_back(Block* block) noexcept:
    """To the system."""
    numpys.free(numpys.ctx, block.begin, block.size)


cdef Py_ssize_t shrink(Py_ssize_t most) noexcept:
    """Keep at most so many bytes, and give back the oldest blocks; -> how many."""
    cdef Py_ssize_t newest = load(&returned), k, count = 0
    cdef Block* block
    for k in range(1, SLOTS + 1):
        if load(&kept) <= most:
            break
        block = <Block*>swap(&slots[(newest + k) % SLOTS], NULL)
        if block != NULL:
            add(&kept, -<Py_ssize_t>block.capacity)
            give_back(block)
            count += 1
    return count


cdef void keep(Block* block) noexcept:
    cdef Block* before
    if <Py_ssize_t>block.capacity > load(&budget):
        give_back(block)
        return
    add(&kept, block.capacity)
    before = <Block*>swap(&slots[add(&returned, 1) % SLOTS], block)
    if before != NULL:
        add(&kept, -<Py_ssize_t>before.capacity)
        give_back(before)
    shrink(load(&budget))         # read again: it may have been set since, without seeing this block


cdef Block* take(size_t size) noexcept:
    """A block for so many bytes, with at most a quarter of that to spare; NULL if there is none."""
    cdef Py_ssize_t newest = load(&returned), k
    cdef void** slot
    cdef Block* block
    for k in range(SLOTS):                            # the newest first: it may still be in a cache
        slot = &slots[(newest + SLOTS - k) % SLOTS]
        if is_null(slot):
            continue
        block = <Block*>swap(slot, NULL)              # its header may be read only by one who has taken it out
        if block == NULL:
            continue
        if size <= block.capacity <= size + size // 4:
            add(&kept, -<Py_ssize_t>block.capacity)
            return block
        if not put_if_null(slot, block):              # another has come here meanwhile
            add(&kept, -<Py_ssize_t>block.capacity)
            give_back(block)
        shrink(load(&budget))                         # it may have been set since, without seeing this block
    return NULL


# The handler

cdef Block* block_of(void* data) noexcept:
    return <Block*>data - 1


cdef void* allocate(void* _, size_t size) noexcept:
    cdef Block* block = take(size) if size >= <size_t>KEPT_FROM else NULL
    cdef size_t total = size + sizeof(Block) + ALIGNMENT
    cdef void* begin
    if block != NULL:
        return block + 1
    if total < size:
        return NULL
    begin = numpys.malloc(numpys.ctx, total)
    if begin == NULL and shrink(0):                   # blocks that are kept must not be what makes a call fail
        begin = numpys.malloc(numpys.ctx, total)
    if begin == NULL:
        return NULL
    block = <Block*>((<uintptr_t>begin + sizeof(Block) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT) - 1
    block.begin = begin
    block.size = total
    block.capacity = total - (<char*>(block + 1) - <char*>begin)
    return block + 1


cdef void release(void* _, void* data, size_t size) noexcept:
    if data == NULL:
        return
    if block_of(data).capacity >= <size_t>KEPT_FROM:
        keep(block_of(data))
    else:
        give_back(block_of(data))


cdef void* allocate_zeros(void* _, size_t count, size_t size) noexcept:
    cdef void* data
    if size and count > (<size_t>-1) // size:
        return NULL
    data = allocate(NULL, count * size)
    if data != NULL:
        memset(data, 0, count * size)
    return data


cdef void* reallocate(void* _, void* data, size_t size) noexcept:
    cdef void* moved = allocate(NULL, size)
    if moved != NULL and data != NULL:
        memcpy(moved, data, min(size, block_of(data).capacity))
        release(NULL, data, 0)
    return moved


cdef object default_handler = <object>PyDataMem_DefaultHandler
numpys = &(<cnp.PyDataMem_Handler*>PyCapsule_GetPointer(default_handler, "mem_handler")).allocator
cdef cnp.PyDataMem_Handler description
strcpy(description.name, "pyx_xent")
description.version = 1
description.allocator.ctx = NULL
description.allocator.malloc = allocate
description.allocator.calloc = allocate_zeros
description.allocator.realloc = reallocate
description.allocator.free = release
cdef object handler = PyCapsule_New(&description, "mem_handler", NULL)


# What others call

def empty(shape, dtype):
    """np.empty, 64-byte aligned; from LARGE bytes on in memory that is used again."""
    before = cnp.PyDataMem_GetHandler()
    if before is not default_handler:        # the application has one of its own, for reasons of its own
        size = math.prod(shape) * dtype.itemsize
        memory = np.empty(size + ALIGNMENT - 1, np.uint8)
        begin = -memory.ctypes.data % ALIGNMENT
        return memory[begin : begin + size].view(dtype).reshape(shape)
    cnp.PyDataMem_SetHandler(handler)
    try:
        return np.empty(shape, dtype)
    finally:
        cnp.PyDataMem_SetHandler(before)


def empty_like(cnp.ndarray array, dtype):
    """Likewise, with the axes in memory ordered as those of `array`; no alignment promised on the application's handler."""
    before = cnp.PyDataMem_GetHandler()
    if before is not default_handler:
        return np.empty_like(array, dtype, subok=False)
    cnp.PyDataMem_SetHandler(handler)
    try:
        return np.empty_like(array, dtype, subok=False)
    finally:
        cnp.PyDataMem_SetHandler(before)


def array_at(
    size_t address, Py_ssize_t first, Py_ssize_t nbytes,
    shape, tuple strides, cnp.dtype dtype, owner,
):
    """The numbers of `owner`, another library's tensor, as an array that keeps it alive; nothing is copied.

    They are strided numbers (element strides, not negative) from `address` on, where the `first` of a memory of `nbytes` lies.
    ValueError if they reach beyond that.
    """
    cdef cnp.npy_intp dims[64]
    cdef cnp.npy_intp steps[64]
    cdef Py_ssize_t itemsize = dtype.itemsize, last = first, k
    cdef bint empty = False
    cdef cnp.ndarray array
    if len(shape) > 64 or len(strides) != len(shape):
        raise ValueError(f"an array has at most 64 axes, and as many strides, got {len(shape)} and {len(strides)}")
    for k in range(len(shape)):
        dims[k] = shape[k]
        steps[k] = <Py_ssize_t>strides[k] * itemsize
        last += (dims[k] - 1) * <Py_ssize_t>strides[k]
        empty = empty or dims[k] == 0
    if not empty and (address == 0 or (last + 1) * itemsize > nbytes):
        raise ValueError(f"numbers of shape {tuple(shape)} need {(last + 1) * itemsize} bytes, and there are {nbytes}: was the memory freed?")
    Py_INCREF(dtype)                                  # which the next call takes over
    array = PyArray_NewFromDescr(
        <PyTypeObject*>cnp.ndarray, dtype, <int>len(shape), dims, steps, <void*>address, cnp.NPY_ARRAY_WRITEABLE, NULL
    )
    cnp.set_array_base(array, owner)
    return array


def kept_bytes():
    """Bytes that nobody uses and that are kept for the next large output."""
    return load(&kept)


def budget_bytes():
    """The most bytes that reuse_gradients lets be kept."""
    return load(&budget)


shrunk = []  # what else keeps memory, and is called when the budget has been set


def also_when_shrunk(function):
    """Call `function` whenever reuse_gradients has set the budget."""
    shrunk.append(function)


def reuse_gradients(max_bytes):
    """Set how much memory of large gradients that nobody holds any more is kept, to be used again.

    Memory that is new to the process is cleared by the system, page by page, as it is first touched: in a loop that costs
    more than computing the gradient. So the memory of outputs of 512 KiB and more is kept when the last array, view, memoryview,
    DLPack export or tensor that holds it is gone, and the next output of that size, or up to a fifth smaller, is put there.
    Beyond the limit, what came back first goes first. One budget for NumPy and `pyx_xent.torch`; it counts what nobody uses, and not the
    gradients that somebody holds. A forked child starts with nothing kept.

    Parameters
    ----------
    max_bytes : int
        At most so much is kept. 0 gives back everything that is kept now, and keeps nothing. 512 MiB when nothing was set:
        a gradient of 4096 rows and 32,000 classes in float32.

    Raises
    ------
    ValueError
        `max_bytes` is not an int, or is negative.

    Examples
    --------
    >>> import numpy as np
    >>> import pyx_xent
    >>> logits, target = np.zeros((1024, 1000), np.float32), np.zeros(1024, int)
    >>> pyx_xent.reuse_gradients(64 << 20)
    >>> places = set()
    >>> for step in range(10):
    ...     loss, grad = pyx_xent.cross_entropy_with_grad(logits, target)
    ...     places.add(grad.ctypes.data)
    >>> len(places)  # the last gradient is still there while the next one is computed
    2
    >>> pyx_xent.reuse_gradients(0)
    >>> pyx_xent.reuse_gradients(512 << 20)
    """
    try:
        most = operator.index(max_bytes)
    except TypeError:
        most = -1
    if most < 0:
        raise ValueError(f"max_bytes must be an int and not negative, got {max_bytes!r}")
    store(&budget, min(most, sys.maxsize))
    shrink(load(&budget))
    for function in shrunk:
        function()


def forget():
    """Give back everything that is kept."""
    shrink(0)


def forget_after_fork():
    # Its pages are the parent's until they are written: copying them costs more than clearing new ones. What other threads were
    # about to put into the ring, or had just taken from it, is counted but not there, and will never be.
    forget()
    store(&kept, 0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_after_fork)
