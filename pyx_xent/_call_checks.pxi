# One argument each: converted, or refused with an error that says what was expected and what came.
#
# Only these functions run code of the caller's: __array__, __float__, __index__, __class__. An entry of _call.pyx calls all that
# it needs of them first, and looks at shapes and memory afterwards.

cdef int NONE = 0, MEAN = 1, SUM = 2
cdef dict REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
cdef int EMPTY_NAN = 0, EMPTY_ZERO = 1, EMPTY_RAISE = 2
cdef dict EMPTY = {"nan": EMPTY_NAN, "zero": EMPTY_ZERO, "raise": EMPTY_RAISE}
cdef object float32 = np.dtype(np.float32)
cdef object float64 = np.dtype(np.float64)
cdef object int64 = np.dtype(np.int64)
# How pyx_xent.torch passes bfloat16, which NumPy lacks, without ml_dtypes.
bfloat16_bits = np.dtype(np.uint16, metadata={"pyx_xent": "bfloat16"})


# Arrays

cpdef cnp.ndarray as_array(object value, str name):
    """`value` as an array of NumPy's own class; TypeError if something of it would be lost."""
    if cnp.PyArray_CheckExact(value):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost: pass an array without mask")
    if isinstance(value, np.matrix):
        raise TypeError(f"{name} is a numpy.matrix: pass an array, numpy.asarray({name})")
    if getattr(value, "requires_grad", False) is True:
        raise TypeError(
            f"{name} is a tensor that requires grad, and NumPy would lose the gradient: use pyx_xent.torch, or {name}.detach()"
        )
    return np.asarray(value)


cdef int storage_of(cnp.ndarray array) noexcept:
    # A Storage, or -1. ml_dtypes registers bfloat16 with NumPy; an array of it exists only where that is installed.
    cdef int kind = cnp.PyArray_TYPE(array)
    if kind == cnp.NPY_FLOAT32:
        return FLOAT32
    if kind == cnp.NPY_FLOAT64:
        return FLOAT64
    if kind == cnp.NPY_FLOAT16:
        return FLOAT16
    if cnp.PyTypeNum_ISUSERDEF(kind) and array.dtype.name == "bfloat16":
        return BFLOAT16
    if kind == cnp.NPY_UINT16 and array.dtype.metadata is not None and "pyx_xent" in array.dtype.metadata:
        return BFLOAT16
    return -1


cdef cnp.ndarray as_floating(object value, str name):
    cdef cnp.ndarray array = as_array(value, name)
    if storage_of(array) < 0:
        raise_not_floating(array, name, "")
    return array


cdef int raise_not_floating(cnp.ndarray array, str name, str hint) except -1:
    raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {array.dtype.name}{hint}")


def floating(value, str name):
    """An array of float32, float64, float16 or bfloat16 in the byte order of the machine; TypeError if `value` is none."""
    cdef cnp.ndarray array = as_floating(value, name)
    return array if array.dtype.isnative else copied(array, native_dtype(array))


cpdef cnp.ndarray as_real(object value, str name):
    """`value` as an array of real numbers; TypeError if it is none."""
    cdef cnp.ndarray array = as_array(value, name)
    if array.dtype.kind not in "fiub" and storage_of(array) != BFLOAT16:
        raise TypeError(f"{name} must be real numbers, got {array.dtype.name}")
    return array


cpdef cnp.ndarray as_output(object out, str name):
    """The memory of an array of any class, as an array of NumPy's own: what a class overrides is not called."""
    if cnp.PyArray_CheckExact(out):
        return out
    if not cnp.PyArray_Check(out) or isinstance(out, (np.ma.MaskedArray, np.matrix)):
        raise TypeError(f"{name} must be a numpy.ndarray, got {type(out).__name__}")
    return np.ndarray.view(out, np.ndarray)


# Dtypes

cdef object native_dtype(cnp.ndarray array):
    cdef int kind = cnp.PyArray_TYPE(array)
    if kind == cnp.NPY_FLOAT32:
        return float32
    if kind == cnp.NPY_UINT16:
        return bfloat16_bits
    return float64 if kind == cnp.NPY_FLOAT64 else array.dtype.newbyteorder("=")


cdef object promoted(object first, object second):
    # As PyTorch promotes: to the larger floating dtype, and float16 with bfloat16 to float32. Native dtypes only.
    if first == second:
        return first
    return float64 if first is float64 or second is float64 else float32


cdef object as_loss_dtype(object given):
    # float32, float64, or None
    if given is None:
        return None
    try:
        dtype = np.dtype(given)
    except TypeError:
        raise TypeError(f"loss_dtype must be None, float32 or float64, got {given!r}") from None
    if dtype == float32:
        return float32
    if dtype == float64:
        return float64
    raise TypeError(f"loss_dtype must be None, float32 or float64, got {dtype}")


cdef object checked_loss_dtype(object asked, object least):
    # in   asked         float32, float64, or None
    # in   least         the dtype that logits and class probabilities promote to
    if asked is None:
        return least
    if least is float64 and asked is not float64:
        raise ValueError(f"loss_dtype must be None or float64 for a loss of float64, which it may not narrow, got {asked}")
    return asked


# Numbers and names

cpdef double as_double(object value, str name) except? -1.0:
    """`value` as a float, the nearest in any rounding mode; TypeError if it is no number."""
    cdef Environment environment
    if type(value) is float:
        return value
    environment = enter_environment()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    finally:
        leave_environment(environment, NULL)


cdef int as_reduction(object reduction) except -1:
    cdef object found = REDUCTIONS.get(reduction) if type(reduction) is str else None
    if found is None:
        raise ValueError(f"{reduction} is not a valid value for reduction: 'none', 'mean' or 'sum'")
    return found


cdef int as_empty(object empty) except -1:
    cdef object found = EMPTY.get(empty) if isinstance(empty, str) else None
    if found is None:
        raise ValueError(f"empty must be 'nan', 'zero' or 'raise', got {empty!r}")
    return found


cdef double as_smoothing(object label_smoothing) except -1.0:
    cdef double smoothing = as_double(label_smoothing, "label_smoothing")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    return smoothing


cdef double as_factor(object value, str name) except -1.0:
    cdef double factor = as_double(value, name)
    if not 0.0 <= factor < INFINITY:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return factor


cdef int64_t as_ignore_index(object ignore_index) except? -1:
    try:
        return ignore_index if type(ignore_index) is int else operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}") from None
    except OverflowError:
        raise ValueError(f"ignore_index must fit into 64 bits, got {ignore_index}") from None


cdef int checked_axis(object axis, int ndim) except -1:
    # in   axis          an int
    if -ndim <= axis < ndim:
        return axis + ndim if axis < 0 else axis
    raise np.exceptions.AxisError(axis, ndim)


cdef int class_axis(object axis, int ndim, str name) except -1:
    # in   axis          an int, or None: where PyTorch has the classes
    if ndim == 0:
        raise ValueError(f"{name} must have a class axis, got an array of shape ()")
    if axis is None:
        return 0 if ndim == 1 else 1
    return checked_axis(axis, ndim)


cdef int check_weight(cnp.ndarray weight, Py_ssize_t classes) except -1:
    if cnp.PyArray_NDIM(weight) != 1 or cnp.PyArray_DIM(weight, 0) != classes:
        raise ValueError(
            f"weight tensor should be defined either for all {classes} classes or no classes "
            f"but got weight tensor of shape: {(<object>weight).shape}"
        )
    return 0


@cython.final
@cython.freelist(4)
cdef class Options:
    """What a loss may be asked for besides logits and targets, converted: nothing of it runs code of the caller's any more."""

    cdef readonly object weight                   # an array of real numbers, or None
    cdef readonly object sample_weight
    cdef KernelOptions numbers                    # what kernels take as it is; nothing in it points anywhere yet
    cdef int64_t ignore_index
    cdef int reduction
    cdef int empty
    cdef bint has_normalizer
    cdef double normalizer
    cdef object axis                              # an int, or None
    cdef object loss_dtype                        # float32, float64, or None
    # For messages: what logits are called, what to do if the class axis is the last, and how binary logits x become rows of two
    cdef str name
    cdef str if_last
    cdef str if_binary

    def of_rows(self, weight, sample_weight):
        """Of some rows of the same loss, not reduced: of labels and weights that are checked already, copies or None."""
        cdef Options o = Options.__new__(Options)
        o.weight, o.sample_weight = weight, sample_weight
        o.numbers = self.numbers
        o.ignore_index = -100
        o.reduction = NONE
        o.axis = -1
        o.name, o.if_last, o.if_binary = self.name, self.if_last, self.if_binary
        return o


def options(
    weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, axis=None, sample_weight=None, normalizer=None,
    z_loss=0.0, empty="nan", focal_gamma=0.0, loss_dtype=None, name="logits", if_last="pass axis=-1 if it is the last",
    if_binary="numpy.stack([0 * x, x], 1)",
):
    """The Options of pyx_xent.cross_entropy, converted; an error if one of them makes no sense for any loss."""
    cdef Options o = Options.__new__(Options)
    if weight is not None:
        o.weight = as_real(weight, "weight")
    if sample_weight is not None:
        o.sample_weight = as_real(sample_weight, "sample_weight")
    o.ignore_index = as_ignore_index(ignore_index)
    o.reduction = as_reduction(reduction)
    o.numbers.label_smoothing = as_smoothing(label_smoothing)
    if axis is not None:
        o.axis = int(operator.index(axis))        # int: not of a class that compares in its own way
    if normalizer is not None:
        if o.reduction != MEAN:
            raise ValueError(f"normalizer replaces the divisor of reduction='mean', got reduction={reduction!r}")
        o.has_normalizer = True
        o.normalizer = as_double(normalizer, "normalizer")
    o.numbers.z_loss = as_factor(z_loss, "z_loss")
    o.numbers.focal_gamma = as_factor(focal_gamma, "focal_gamma")
    if o.numbers.focal_gamma != 0 and o.numbers.label_smoothing != 0:
        raise ValueError(f"focal_gamma does not go together with label_smoothing, got {focal_gamma} and {label_smoothing}")
    o.empty = as_empty(empty)
    o.loss_dtype = as_loss_dtype(loss_dtype)
    o.name, o.if_last, o.if_binary = name, if_last, if_binary
    return o
