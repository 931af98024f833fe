"""The products of a linear layer's tensors, and one call of pyx_xent.linear with them."""

import contextlib
import functools

import torch

from .. import _call, linear
from . import _calls, _matmul, _private
from ._tensors import array_of, contiguous_gradient, gradient_like, tensor_of, wide_dtype


def multiplied_dtype(dtype):
    """The dtype that PyTorch multiplies tensors of `dtype` in.

    bfloat16 as it is where oneDNN has such products, and float32 as bfloat16 where the processor has them, too, if the user has
    asked for that: torch.set_float32_matmul_precision("medium").
    """
    if dtype is torch.bfloat16 and _private.has_bfloat16_products():
        return dtype
    if dtype is torch.float32 and torch.get_float32_matmul_precision() == "medium" and _private.multiplies_bfloat16_fast():
        return torch.bfloat16
    return wide_dtype(dtype)


class NumpyProducts(linear.Products):
    """NumPy's products; PyTorch converts half types."""

    def __init__(self, linear_weight, threads=1):
        super().__init__(linear_weight, threads)
        self.tensor = tensor_of(linear_weight)
        self.wide_dtype = wide_dtype(self.tensor.dtype)

    def wide(self, array):
        return tensor_of(array).to(self.wide_dtype).numpy()

    def store(self, values, out, places):
        out = tensor_of(out)
        out[places] = torch.from_numpy(values).to(out.dtype)


class TorchProducts(NumpyProducts):
    """PyTorch's products, on OpenMP's threads, as the loss."""

    on_python_threads = False
    CLASSES_AT_ONCE = 512  # of the logits: MKL is faster in such parts than for all classes

    def __init__(self, linear_weight):
        super().__init__(linear_weight)
        self.multiplied = multiplied_dtype(self.tensor.dtype)
        if self.multiplied is torch.bfloat16:
            self.buffer_dtype = _call.bfloat16_bits
            self.tensor = self.tensor.to(torch.bfloat16)  # once a call
        self._converts = self.tensor.dtype is not self.multiplied

    def of_classes(self, some):
        return self.tensor[some].to(self.multiplied)

    def logits(self, hidden, out):
        hidden, out = tensor_of(hidden).to(self.multiplied), tensor_of(out)
        size = len(self.tensor) if self.multiplied is torch.bfloat16 else self.CLASSES_AT_ONCE
        for some in linear.split(self.everything, max(1, size)):
            torch.mm(hidden, self.of_classes(some).T, out=out[:, some])

    def grad_hidden(self, gradient):
        gradient = tensor_of(gradient)
        parts = (torch.mm(gradient[:, some], self.of_classes(some)) for some in self.converted(self.everything))
        return sum(part.to(self.wide_dtype) for part in parts).numpy()

    def add_grad_weight(self, gradient, hidden, total, first):
        gradient, hidden, total = tensor_of(gradient).T, tensor_of(hidden).to(self.multiplied), tensor_of(total)
        if total.dtype is self.multiplied:
            torch.addmm(total, gradient, hidden, beta=0 if first else 1, out=total)
            return
        for some in self.parts(self.everything):
            part = torch.mm(gradient[some], hidden)
            if first:
                total[some] = part
            else:
                total[some] += part

    def sums_of_classes(self, gradient):
        return tensor_of(gradient).sum(0, dtype=self.wide_dtype).numpy()


@contextlib.contextmanager
def _products_for(tensors):
    """What makes the products of a linear_weight."""
    input, linear_weight, _ = tensors.layer
    operations = 2.0 * input.numel() * len(linear_weight)
    if _matmul.multiplies(multiplied_dtype(input.dtype), operations) == _matmul.TORCH:
        yield TorchProducts
    else:
        with _matmul.one_thread_a_product() as threads:
            yield functools.partial(NumpyProducts, threads=threads)


def _problem_of(tensors, options, products, upstream=None):
    """The checked arguments; upstream: a number or an array."""
    return linear.Problem(
        array_of(tensors.input), array_of(tensors.linear_weight), array_of(tensors.target),
        _calls.converted_options(tensors.of_loss, options.loss, axis=-1),
        linear_bias=None if tensors.linear_bias is None else array_of(tensors.linear_bias), logit_scale=options.logit_scale,
        softcap=options.softcap, shift=options.shift, num_threads=torch.get_num_threads(), chunk_bytes=options.chunk_bytes,
        grad_output=upstream, products=products,
    )  # fmt: skip


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def with_loss(tensors, options):
    """The call that has the loss."""
    with _products_for(tensors) as products:
        return linear.run(_problem_of(tensors, options, products))


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def with_gradients(tensors, options, upstream, needed):
    """(call, gradients of input, linear_weight and linear_bias), None where not needed; those of half types are in float32."""
    with _products_for(tensors) as products:
        problem = _problem_of(tensors, options, products, upstream)
        found = [
            contiguous_gradient(tensor.shape, problem.products.wide_dtype) if is_needed and tensor is not None else None
            for tensor, is_needed in zip(tensors.layer, needed, strict=True)
        ]
        places = tuple(None if gradient is None else array_of(gradient) for gradient in found)
        wanted = [name for name, gradient in zip(linear.GRADIENTS, found, strict=True) if gradient is not None]
        call, _ = linear.run_with_gradients(problem, places, wanted, problem.products.dtype)
    return call, found


def rounded(gradients, tensors):
    """The gradients in the dtypes of their tensors."""
    return [
        gradient if gradient is None or gradient.dtype is tensor.dtype else gradient_like(tensor).copy_(gradient)
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]
