# The only place that knows how numbers lie in memory: strides and half types, on the way in and out.
#
# A tile is (classes, LANES): class by class, a row in each lane. Rows are (rows, stride): the classes of a row side by side.
# Contiguous rows become a tile, and planes become rows, by transposing in registers; what has neither stride 1 goes number by
# number.


cdef inline Py_ssize_t size_of(Storage storage) noexcept nogil:
    if storage == FLOAT64:
        return 8
    return 4 if storage == FLOAT32 else 2


cdef inline Storage own_storage() noexcept nogil:
    return FLOAT64 if IS_DOUBLE else FLOAT32


cdef inline char* element(const Strided* array, Py_ssize_t outer, Py_ssize_t inner) noexcept nogil:
    # The first class of a position.
    return <char*>array.data + (outer * array.outer + inner * array.inner) * size_of(array.storage)


cdef inline bint lies_as_rows(const Strided* array) noexcept nogil:
    # Can the row kernel read or write it where it is? Absent arrays are like that.
    return array.data == NULL or (array.classes == 1 and array.storage == own_storage())


# Numbers of any storage. `i` counts numbers.


cdef inline real number(const void* data, Py_ssize_t i, Storage storage) noexcept nogil:
    if storage == FLOAT32:
        return <real>(<const float*>data)[i]
    if storage == FLOAT64:
        return <real>(<const double*>data)[i]
    if storage == BFLOAT16:
        return v_bfloat_to_float((<const uint16_t*>data)[i])
    return v_half_to_float((<const uint16_t*>data)[i])


cdef inline void put_number(void* data, Py_ssize_t i, Storage storage, real value) noexcept nogil:
    if storage == FLOAT32:
        (<float*>data)[i] = <float>value
    elif storage == FLOAT64:
        (<double*>data)[i] = value
    elif storage == BFLOAT16:
        (<uint16_t*>data)[i] = v_float_to_bfloat(<float>value)
    else:
        (<uint16_t*>data)[i] = v_float_to_half(<float>value)


cdef vec load_odd(const void* data, Py_ssize_t i, Storage storage, int count) noexcept nogil:
    # The rest is 0.
    cdef real all[LANES]
    cdef int l
    memset(all, 0, sizeof(all))
    for l in range(count):
        all[l] = number(data, i + l, storage)
    return v_load(all)


cdef void store_odd(void* data, Py_ssize_t i, Storage storage, vec values, int count) noexcept nogil:
    cdef real all[LANES]
    cdef int l
    v_store(all, values)
    for l in range(count):
        put_number(data, i + l, storage, all[l])


cdef inline vec load(const void* data, Py_ssize_t i, Storage storage, int count) noexcept nogil:
    # `count` neighbours, at most LANES; the rest is 0.
    if storage == own_storage():
        return v_load((<const real*>data) + i) if count == LANES else v_load_first((<const real*>data) + i, count, 0)
    if IS_DOUBLE or count < LANES:
        return load_odd(data, i, storage, count)
    if storage == BFLOAT16:
        return v_load_bfloat16((<const uint16_t*>data) + i)
    return v_load_float16((<const uint16_t*>data) + i)


cdef inline void store(void* data, Py_ssize_t i, Storage storage, vec values, int count) noexcept nogil:
    if storage == own_storage():
        if count == LANES:
            v_store((<real*>data) + i, values)
        else:
            v_store_first((<real*>data) + i, values, count)
    elif IS_DOUBLE or count < LANES:
        store_odd(data, i, storage, values, count)
    elif storage == BFLOAT16:
        v_store_bfloat16((<uint16_t*>data) + i, values)
    else:
        v_store_float16((<uint16_t*>data) + i, values)


cdef inline int lanes_left(Py_ssize_t size, Py_ssize_t done) noexcept nogil:
    return <int>min(<Py_ssize_t>LANES, size - done)


cdef void runs_in(
    const char* data, Storage storage, Py_ssize_t stride,      # in   (count, size), `stride` numbers from run to run
    Py_ssize_t count, Py_ssize_t size,
    real* to, Py_ssize_t to_stride,                            # out  (count, size)
) noexcept nogil:
    # The memory behind each run is asked for, because planes are read run after run. A run's last vector is whole, too: reading
    # some numbers twice takes less time than reading less than a vector.
    cdef Py_ssize_t k, i, start
    for k in range(count):
        start = k * stride
        i = 0
        while i + LANES <= size:
            v_prefetch(data + (start + size + i) * size_of(storage))
            v_store(to + k * to_stride + i, load(data, start + i, storage, LANES))
            i += LANES
        if i < size and size >= LANES:
            v_store(to + k * to_stride + size - LANES, load(data, start + size - LANES, storage, LANES))
        elif i < size:
            v_store_first(to + k * to_stride, load(data, start, storage, <int>size), <int>size)


cdef void runs_out(
    const real* source, Py_ssize_t source_stride,              # in   (count, size)
    Py_ssize_t count, Py_ssize_t size,
    char* data, Storage storage, Py_ssize_t stride,            # out  (count, size)
    bint stream,
) noexcept nogil:
    cdef Py_ssize_t k, i, start
    cdef const real* x
    stream = stream and storage == own_storage() and (<uintptr_t>data | <size_t>(stride * sizeof(real))) % 64 == 0
    for k in range(count):
        x = source + k * source_stride
        start = k * stride
        i = 0
        if stream:
            while i + LANES <= size:
                v_stream((<real*>data) + start + i, v_load(x + i))
                i += LANES
        else:
            while i + LANES <= size:
                store(data, start + i, storage, v_load(x + i), LANES)
                i += LANES
        if i < size and size >= LANES and not stream:
            store(data, start + size - LANES, storage, v_load(x + size - LANES), LANES)
        elif i < size:
            store(data, start + i, storage, at(x, i, size, 0), <int>(size - i))


cdef inline void columns_in(const real* x, Py_ssize_t stride, int width, real* to, Py_ssize_t to_stride, int runs) noexcept nogil:
    cdef vec column[UNIT]
    cdef int c
    v_load_columns(x, stride, width, column)
    for c in range(width):
        if runs == LANES:
            v_store(to + c * to_stride, column[c])
        else:
            v_store_first(to + c * to_stride, column[c], runs)


cdef inline void columns_out(const real* source, Py_ssize_t stride, int runs, real* x, Py_ssize_t x_stride, int width) noexcept nogil:
    cdef vec column[UNIT]
    cdef int c
    for c in range(UNIT):
        column[c] = at(source + c * stride, 0, runs, 0) if c < width else v_set(0)
    v_store_columns(x, x_stride, width, column)


cdef inline void tile_in(
    const real* x, Py_ssize_t stride, Py_ssize_t size,         # in   (LANES, size), `stride` numbers from run to run
    real* to, Py_ssize_t to_stride, int runs,                  # out  (size, runs)
) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i + UNIT <= size:
        columns_in(x + i, stride, UNIT, to + i * to_stride, to_stride, runs)
        i += UNIT
    if i < size:
        columns_in(x + i, stride, <int>(size - i), to + i * to_stride, to_stride, runs)


cdef inline void tile_out(
    const real* source, Py_ssize_t source_stride, int runs,    # in   (size, runs)
    real* x, Py_ssize_t stride, Py_ssize_t size,               # out  (LANES, size); what is in runs beyond means nothing
) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i + UNIT <= size:
        columns_out(source + i * source_stride, source_stride, runs, x + i, stride, UNIT)
        i += UNIT
    if i < size:
        columns_out(source + i * source_stride, source_stride, runs, x + i, stride, <int>(size - i))


cdef void transposed_in(
    const char* data, Storage storage, Py_ssize_t stride,      # in   (count, size), `stride` numbers from run to run
    Py_ssize_t count, Py_ssize_t size,
    real* to, Py_ssize_t to_stride,                            # out  (size, count)
) noexcept nogil:
    cdef real runs[LANES * FEW_CLASSES]
    cdef Py_ssize_t k, i
    cdef int width, l
    for k from 0 <= k < count by LANES:
        if storage == own_storage() and k + LANES <= count:
            tile_in((<const real*>data) + k * stride, stride, size, to + k, to_stride, LANES)
            continue
        if stride == size <= FEW_CLASSES and k + LANES <= count:     # one run, of whole vectors
            for i from 0 <= i < LANES * size by LANES:
                v_store(runs + i, load(data, k * stride + i, storage, LANES))
            tile_in(runs, size, size, to + k, to_stride, LANES)
            continue
        for i from 0 <= i < size by LANES:
            width = lanes_left(size, i)
            for l in range(LANES):
                v_store(runs + l * LANES, load(data, (k + l) * stride + i, storage, width) if k + l < count else v_set(0))
            tile_in(runs, LANES, width, to + i * to_stride + k, to_stride, lanes_left(count, k))


cdef void transposed_out(
    const real* source, Py_ssize_t source_stride,              # in   (size, count)
    Py_ssize_t count, Py_ssize_t size,
    char* data, Storage storage, Py_ssize_t stride,            # out  (count, size)
) noexcept nogil:
    cdef real runs[LANES * FEW_CLASSES]
    cdef Py_ssize_t k, i
    cdef int l, width
    for k from 0 <= k < count by LANES:
        if storage == own_storage() and k + LANES <= count:
            tile_out(source + k, source_stride, LANES, (<real*>data) + k * stride, stride, size)
            continue
        if stride == size <= FEW_CLASSES and k + LANES <= count:
            tile_out(source + k, source_stride, LANES, runs, size, size)
            for i from 0 <= i < LANES * size by LANES:
                store(data, k * stride + i, storage, v_load(runs + i), LANES)
            continue
        for i from 0 <= i < size by LANES:
            width = lanes_left(size, i)
            tile_out(source + i * source_stride + k, source_stride, lanes_left(count, k), runs, LANES, width)
            for l in range(lanes_left(count, k)):
                store(data, (k + l) * stride + i, storage, v_load(runs + l * LANES), width)


# Rows: `rows` neighbouring positions of one outer


cdef void rows_in(
    const Strided* array, Py_ssize_t outer, Py_ssize_t inner, int rows, Py_ssize_t classes, real* to, Py_ssize_t to_stride
) noexcept nogil:
    cdef const char* data = element(array, outer, inner)
    cdef Py_ssize_t c
    cdef int l
    if array.classes == 1:
        runs_in(data, array.storage, array.inner, rows, classes, to, to_stride)
    elif array.inner == 1:
        transposed_in(data, array.storage, array.classes, classes, rows, to, to_stride)
    else:
        for l in range(rows):
            for c in range(classes):
                to[l * to_stride + c] = number(data, l * array.inner + c * array.classes, array.storage)


cdef void rows_out(
    const real* source, Py_ssize_t source_stride, int rows, Py_ssize_t classes,
    const Strided* array, Py_ssize_t outer, Py_ssize_t inner,
) noexcept nogil:
    cdef char* data = element(array, outer, inner)
    cdef Py_ssize_t c
    cdef int l
    if array.classes == 1:
        runs_out(source, source_stride, rows, classes, data, array.storage, array.inner, False)
    elif array.inner == 1:
        transposed_out(source, source_stride, classes, rows, data, array.storage, array.classes)
    else:
        for l in range(rows):
            for c in range(classes):
                put_number(data, l * array.inner + c * array.classes, array.storage, source[l * source_stride + c])


# A panel: the tiles of `rows` neighbouring positions, one after the other. Far planes are read in runs of a whole panel: a tile
# that jumps between planes a power of two apart would find every line in the same set of the cache.


cdef inline real* in_panel(real* panel, Py_ssize_t tile_classes, Py_ssize_t row, Py_ssize_t c) noexcept nogil:
    return panel + (row // LANES * tile_classes + c) * LANES + row % LANES


cdef void panel_in(
    const Strided* array, const Problem* p, Py_ssize_t position, Py_ssize_t rows, real* panel
) noexcept nogil:
    # Lanes beyond the last row are 0.
    cdef const real* x
    cdef real* to
    cdef Py_ssize_t classes = p.classes, pitch = p.plan.tile_classes, done = 0, outer, inner, run, c, k
    cdef const char* data
    if rows % LANES != 0:
        memset(in_panel(panel, pitch, rows - rows % LANES, 0), 0, classes * LANES * sizeof(real))
    while done < rows:
        outer = (position + done) // p.inner
        inner = (position + done) - outer * p.inner
        run = min(p.inner - inner, rows - done)
        data = element(array, outer, inner)
        if array.inner == 1 and done % LANES == 0 and array.storage == own_storage() and run % LANES == 0:
            for c in range(classes):
                x = (<const real*>data) + c * array.classes
                to = in_panel(panel, pitch, done, c)
                for k from 0 <= k < run by LANES:
                    v_prefetch(x + run + k)
                    v_store(to + k * pitch, v_load(x + k))
        elif array.inner == 1 and done % LANES == 0:
            for c in range(classes):
                for k from 0 <= k < run by LANES:
                    v_store(in_panel(panel, pitch, done + k, c), load(data, c * array.classes + k, array.storage, lanes_left(run, k)))
        elif array.classes == 1 and done % LANES == 0:
            for k from 0 <= k < run by LANES:
                transposed_in(
                    data + k * array.inner * size_of(array.storage), array.storage, array.inner, lanes_left(run, k), classes,
                    in_panel(panel, pitch, done + k, 0), LANES,
                )
        else:
            for k in range(run):
                for c in range(classes):
                    in_panel(panel, pitch, done + k, c)[0] = number(data, k * array.inner + c * array.classes, array.storage)
        done += run


cdef void panel_out(
    real* panel, const Strided* array, const Problem* p, Py_ssize_t position, Py_ssize_t rows
) noexcept nogil:
    cdef Py_ssize_t classes = p.classes, pitch = p.plan.tile_classes, done = 0, outer, inner, run, c, k
    cdef char* data
    cdef bint stream
    while done < rows:
        outer = (position + done) // p.inner
        inner = (position + done) - outer * p.inner
        run = min(p.inner - inner, rows - done)
        data = element(array, outer, inner)
        stream = (
            p.plan.stream and array.storage == own_storage() and run % LANES == 0
            and (<uintptr_t>data | <size_t>(array.classes * sizeof(real))) % 64 == 0
        )
        if array.inner == 1 and done % LANES == 0 and stream:
            for c in range(classes):
                for k from 0 <= k < run by LANES:
                    v_stream((<real*>data) + c * array.classes + k, v_load(in_panel(panel, pitch, done + k, c)))
        elif array.inner == 1 and done % LANES == 0:
            for c in range(classes):
                for k from 0 <= k < run by LANES:
                    store(data, c * array.classes + k, array.storage, v_load(in_panel(panel, pitch, done + k, c)), lanes_left(run, k))
        elif array.classes == 1 and done % LANES == 0:
            for k from 0 <= k < run by LANES:
                transposed_out(
                    in_panel(panel, pitch, done + k, 0), LANES, lanes_left(run, k), classes,
                    data + k * array.inner * size_of(array.storage), array.storage, array.inner,
                )
        else:
            for k in range(run):
                for c in range(classes):
                    put_number(data, k * array.inner + c * array.classes, array.storage, in_panel(panel, pitch, done + k, c)[0])
        done += run


cdef void zeros_out(const Strided* array, Py_ssize_t outer, Py_ssize_t inner, Py_ssize_t classes, bint stream) noexcept nogil:
    # One row; its bits are 0 whatever the storage.
    cdef char* data = element(array, outer, inner)
    cdef Py_ssize_t c, size = size_of(array.storage), i
    cdef vec zero = v_set(0)
    if array.classes != 1:
        for c in range(classes):
            memset(data + c * array.classes * size, 0, size)
        return
    size *= classes
    i = min(size, <Py_ssize_t>(-<uintptr_t>data % 64)) if stream else size
    memset(data, 0, i)
    while i + 64 <= size:
        v_stream(<real*>(data + i), zero)
        i += 64
    memset(data + i, 0, size - i)
