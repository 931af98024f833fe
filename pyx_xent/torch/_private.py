"""What pyx_xent.torch needs of PyTorch that is not public: one function each, and nowhere else.

They are looked for at import. Where one is gone, either there is another way, which is taken, or the import says what is
missing. Tried with PyTorch 2.13.
"""

import sys

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree


def _needed(name):
    """torch._C.<name>, whose absence nothing else makes up for."""
    try:
        return getattr(torch._C, name)
    except AttributeError:
        raise ImportError(
            f"pyx_xent.torch needs torch._C.{name}, which PyTorch {torch.__version__} does not have; it was tried with 2.13"
        ) from None


_dispatch_modes = _needed("_len_torch_dispatch_stack")
_transforms_active = _needed("_are_functorch_transforms_active")
_tracing_state = _needed("_get_tracing_state")
_batches = _needed("_functorch")
_autograd = getattr(torch._C, "_autograd", None)


def is_watched():
    """Whether a TorchDispatchMode sees each operator."""
    return _dispatch_modes() > 0


def is_traced():
    """Whether torch.jit.trace is at work."""
    return _tracing_state() is not None


def is_transformed():
    """Whether torch.func or forward-mode derivatives are at work. Dynamo understands it, too."""
    return forward_ad._current_level >= 0 or _transforms_active()


def is_anything_at_work():
    """Whether any of all this is, or torch.compile."""
    return torch.compiler.is_compiling() or is_watched() or is_traced() or is_transformed()


def is_transformed_upstream(grad_output):
    """Whether backward is given what torch.func or forward-mode derivatives are at work on.

    It may be a batch of torch.vmap, or of torch.autograd.grad(is_grads_batched=True), which has another kind; or a dual number.
    """
    is_batch = _batches.is_functorch_wrapped_tensor(grad_output) or _batches.is_legacy_batchedtensor(grad_output)
    return is_batch or is_transformed()


def saved_tensors_are_hooked():
    """Whether torch.autograd.graph.saved_tensors_hooks are at work; if nobody can tell, no."""
    top = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


_uses_of = getattr(torch._C, "_storage_Use_Count", None)
knows_holders = _uses_of is not None


def holders_of(tensor):
    """Of a tensor's memory, what changes when another tensor or a storage object holds it; only if knows_holders."""
    storage = tensor.untyped_storage()
    return _uses_of(storage._cdata), sys.getrefcount(storage)


def apply_of(function):
    """`apply` of a torch.autograd.Function that is never called under torch.func, which Function's own looks after."""
    return super(torch.autograd.Function, function).apply


def has_bfloat16_products():
    """Whether oneDNN multiplies bfloat16 on this processor."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()


def multiplies_bfloat16_fast():
    """Whether the processor has instructions for products of bfloat16: AVX512_BF16 or AMX."""
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    return any(getattr(torch.cpu, name, bool)() for name in names) and has_bfloat16_products()


def reduction_of(size_average, reduce):
    """The reduction that the deprecated arguments stand for, with PyTorch's own warning."""
    return torch.nn._reduction.legacy_get_string(size_average, reduce)


def is_exporting():
    """Whether torch.export is at work, whose programs run where pyx_xent is not."""
    asked = getattr(torch.compiler, "is_exporting", None)
    return asked is not None and asked()


def is_fake(tensor):
    """Whether a tensor stands for one, as under FakeTensorMode."""
    return isinstance(tensor, torch._subclasses.FakeTensor)


tree_map_only = _pytree.tree_map_only  # (class, function, nested lists, tuples and dicts) -> the same of what is of the class
as_tensors = _needed("DisableTorchFunctionSubclass")  # a context in which subclasses of Tensor are not asked


def wrapper_of(cls, like):
    """A tensor of the class `cls` on the CPU without memory, otherwise like a tensor on the meta device."""
    return torch.Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device="cpu")


def is_of_a_function(node):
    """Whether a node of autograd's graph is that of a torch.autograd.Function."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)
