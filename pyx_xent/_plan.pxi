# How to compute: which kernel, how many rows at once, threads, scratch, streaming. Every tuning constant is here, with its
# reason; the shape of the kernels (FEW_CLASSES, SEGMENT, which decide bits) is in _problem.pxd.

cdef enum:
    PANEL_NUMBERS = 8192          # of a panel of tiles: with what else is read twice, it fits into a nearest cache of 32 to 48 KB
    PANEL_ROWS = 256
    SHORT_NUMBERS = 4096          # of rows that go through each step together: two arrays of them are in the nearest cache
    STAGED_NUMBERS = 1 << 15      # of planes that are copied side by side: in the second cache, in runs of many lines
    STREAM_BYTES = 1 << 25        # an output of this size will not be found in a cache: it is stored past them
    KEPT_CLASSES = 1 << 20        # exponentials of longer rows are computed twice, rather than cached in memory as large as the row
    CLASSES_WORTH_SHARING = 1 << 15   # so many classes of a row are worth waking threads for
    APART = 2048                  # bytes between the memory of two threads: processors ask ahead for some lines of memory, too
    QUICK = 1024                  # so few elements are computed sooner than the GIL is given away and taken back
    BETWEEN_SIGNALS = 1 << 27     # elements, some tenths of a second: then Ctrl-C is heard
    PARTS_OF_A_THREAD = 8         # even out ignored rows and a busy core

# Nanoseconds that a number takes, roughly, for loss and gradient in float: for threads and their parts only. Smaller parts move
# between the caches of cores: 256 x 1000 takes 1.2 times as long with parts of a microsecond.
cdef dict NANOSECONDS = {"baseline": 1.5, "neon": 0.8, "avx2": 0.5, "avx512": 0.3}
cdef double NUMBERS_OF_A_ROW = 16.0   # what happens once a row takes as long as so many numbers of it
cdef double NANOSECONDS_WORTH_A_PART = 10000.0


cdef Py_ssize_t rounded_up(Py_ssize_t size, Py_ssize_t step) noexcept:
    return (size + step - 1) // step * step


cdef bint lies_as_rows(const Problem* p, const Strided* array) noexcept:
    return array.data == NULL or (array.classes == 1 and array.storage == (FLOAT64 if p.is_double else FLOAT32))


cdef bint is_plane(const Strided* array) noexcept:
    return array.data == NULL or (array.inner == 1 and array.classes != 1)


cdef bint adds_only_exponentials(const Problem* p) noexcept:
    if p.operation == CROSS_ENTROPY:
        return p.target != NULL and p.options.label_smoothing == 0
    return p.operation == SOFTMAX or p.operation == LOG_SOFTMAX


cdef int threads_for(Call call) except -1:
    # A function of Python's, so before the pointers are taken.
    cdef double nanoseconds = nanoseconds_for(call)
    if call.num_threads == 1 or nanoseconds < 2 * <double>_threads.NANOSECONDS_WORTH_A_THREAD:
        return 1  # what _threads would say, without asking
    return _threads.limited(call.num_threads, nanoseconds)


cdef double nanoseconds_for(Call call) noexcept:
    return nanoseconds_of_number * (call.classes + NUMBERS_OF_A_ROW) * call.rows * (2 if call.problem.is_double else 1)


cdef int settle_shape(Problem* p) noexcept:
    # As few axes as the strides allow: a batch of rows is (1, classes, rows), so that a tile can hold LANES of them.
    cdef Strided* arrays[4]
    cdef bint one_stride = True
    cdef int k
    arrays[0], arrays[1], arrays[2], arrays[3] = &p.logits, &p.other, &p.out, &p.hessian
    if p.inner == 1:
        p.inner = p.outer
        p.outer = 1
        for k in range(4):
            arrays[k].inner = arrays[k].outer
            arrays[k].outer = 0
    for k in range(4):
        if arrays[k].data != NULL:
            one_stride = one_stride and arrays[k].outer == arrays[k].inner * p.inner
    if one_stride and p.outer > 1:
        p.inner *= p.outer
        p.outer = 1
    return 0


cdef int plan(Call call) except -1:
    # Last step of every call: in the problem are the arrays as they are in memory, and the number of threads. It allocates without
    # Python code: see set_pointers.
    cdef Problem* p = &call.problem
    cdef Plan* plan = &p.plan
    cdef Py_ssize_t lanes = DOUBLE_LANES if p.is_double else FLOAT_LANES, itemsize = 64 // lanes
    cdef Py_ssize_t positions = p.outer * p.inner, segments = (p.classes + SEGMENT - 1) // SEGMENT, area, parts, between
    cdef int k
    cdef bint few = p.classes <= FEW_CLASSES, beside, curved = p.hessian.data != NULL
    cdef bint direct = lies_as_rows(p, &p.logits) and lies_as_rows(p, &p.other) and lies_as_rows(p, &p.out)
    cdef bint planes = is_plane(&p.logits) and is_plane(&p.out) and is_plane(&p.hessian)
    plan.shared = (
        plan.num_threads > 1 and positions < min(4 * plan.num_threads, <int>FLOAT_LANES) and p.classes >= CLASSES_WORTH_SHARING
    )
    plan.stream = (
        p.out.data != NULL and p.out.data != p.logits.data
        and positions * p.classes * (2 if p.out.storage >= FLOAT16 else itemsize) >= STREAM_BYTES
    )
    plan.keep = p.out.data != NULL and p.classes <= KEPT_CLASSES and (p.operation == CROSS_ENTROPY or p.operation == SOFTMAX)
    plan.defer = False
    plan.staged = 0
    plan.discarded = plan.weights = plan.segments = 0
    plan.tile_classes = 0
    if few:
        plan.tile_classes = max(p.classes, 1)
    elif p.classes <= SHORT_CLASSES and adds_only_exponentials(p) and planes:
        plan.tile_classes = rounded_up(p.classes, lanes)
    if plan.tile_classes > 0:
        area = PANEL_NUMBERS if few else STAGED_NUMBERS
        plan.rows = max(lanes, min(<Py_ssize_t>PANEL_ROWS, area // max(p.classes, 1)) // lanes * lanes)
        plan.rows = min(plan.rows, rounded_up(max(positions, 1), lanes))
        area = plan.rows * plan.tile_classes
        plan.area[0] = area
        beside = not few and (p.operation == SOFTMAX or p.operation == LOG_SOFTMAX)      # exponentials without the largest
        plan.area[1] = area if p.other.data != NULL or beside else 0
        plan.area[2] = plan.area[3] = 0
        plan.area[4] = area if curved else 0
        if p.options.weight != NULL:
            plan.weights = p.classes * lanes
    else:
        plan.rows = lanes if segments == 1 or (p.classes <= KEPT_CLASSES and p.logits.classes != 1) else 1
        if p.classes <= SHORT_CLASSES and p.logits.classes == 1:
            plan.rows = min(plan.rows, <Py_ssize_t>SHORT_NUMBERS // p.classes)
        plan.rows = 1 if plan.shared else min(plan.rows, max(positions, 1))
        plan.defer = (
            plan.rows == 1 and segments > 1 and plan.keep and not p.have_state and direct and not plan.shared and not curved
        )
        plan.segments = plan.rows * segments
        plan.discarded = plan.rows * rounded_up(p.classes, lanes) if p.classes <= SHORT_CLASSES else SEGMENT
        area = plan.rows * rounded_up(p.classes, lanes)
        plan.area[0] = area if plan.keep or not direct else 0
        plan.area[1] = 0 if lies_as_rows(p, &p.other) else area
        plan.area[2] = 0 if p.operation == SOFTMAX_BACKWARD or p.operation == LOG_SOFTMAX_BACKWARD else area
        plan.area[3] = area if plan.defer else 0
        plan.area[4] = 0 if lies_as_rows(p, &p.hessian) else area
        if not plan.shared and segments == 1 and planes and is_plane(&p.other) and not curved:
            plan.staged = min(max(lanes, STAGED_NUMBERS // p.classes // lanes * lanes), rounded_up(p.inner, lanes))
    parts = <Py_ssize_t>(nanoseconds_for(call) / NANOSECONDS_WORTH_A_PART / plan.num_threads)      # of a thread
    parts = max(<Py_ssize_t>1, min(<Py_ssize_t>PARTS_OF_A_THREAD, parts)) * plan.num_threads
    between = max(1, BETWEEN_SIGNALS // max(p.classes, 1))
    plan.part = max(1, min((positions + parts - 1) // parts, (between + plan.num_threads - 1) // plan.num_threads))
    if plan.part > plan.rows:
        plan.part = rounded_up(plan.part, plan.rows)
    elif plan.part > lanes:
        plan.part = rounded_up(plan.part, lanes)
    plan.between_signals = max(1, between // plan.part) * plan.part
    plan.quick = plan.num_threads == 1 and positions * p.classes <= QUICK
    plan.scratch_size = (
        rounded_up((plan.rows + lanes - 1) // lanes * ROWS_BYTES, 64) + rounded_up(plan.discarded * itemsize, 64)
        + rounded_up(plan.weights * itemsize, 64)
    )
    plan.areas_size = 0
    for k in range(5):
        plan.areas_size += rounded_up(plan.area[k] * itemsize, 64)
    plan.areas_size += (1 if p.other.data == NULL else 2) * rounded_up(p.classes * plan.staged * itemsize, 64)
    if plan.num_threads > 1:
        plan.scratch_size += APART
        plan.areas_size += APART
    # Two arrays, because a large one lies in huge pages, of which those that the kernels do not come to use are never touched.
    call.scratch = new_array(
        plan.num_threads * plan.scratch_size + (1 if plan.shared else 2 * plan.num_threads) * plan.segments * SEGMENT_BYTES + 64,
        cnp.NPY_UINT8,
    )
    call.areas = new_array((1 if plan.shared else plan.num_threads) * plan.areas_size + 64, cnp.NPY_UINT8)
    plan.scratch = aligned(call.scratch)
    plan.areas = aligned(call.areas)
    return 0


cdef void* aligned(cnp.ndarray bytes) noexcept:
    return <void*>((<size_t>cnp.PyArray_DATA(bytes) + 63) // 64 * 64)
