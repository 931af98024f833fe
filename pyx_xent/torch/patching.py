"""patch(): torch.nn.functional's losses, computed here, for models that call them."""

import collections
import functools
import threading
import types

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _operators, _private, functional
from ._routes import EAGER, PYTORCH, way_of
from ._tensors import FLOATS

_lock = threading.Lock()
_patches = []  # those that are active
_functions = {}  # name: (what torch.nn.functional has now, what it had before)


def _reason_against(way, *tensors):
    """Why a call is passed on to the function that was there before; None if it is computed here."""
    input, weight = tensors[0], tensors[-1]
    if not isinstance(input, Tensor):
        return "input is no tensor"
    if input.dtype not in FLOATS:
        return f"dtype {input.dtype}"
    if way is PYTORCH:
        if not input.is_cpu:
            return f"device {input.device.type}"
        return (
            "torch.func or forward-mode derivatives"
            if _private.is_transformed()
            else "tracing, export, layout or a tensor class"
        )
    if isinstance(weight, Tensor) and weight.requires_grad:
        return "weight requires grad"
    return None


def _count(reason=None):
    for patch in _patches:
        if reason is None:
            patch.computed += 1
        else:
            patch.passed_on[reason] += 1


def _route(ours, theirs, tensors, arguments, options):
    """One call, by ours or theirs; tensors: those that decide, the class weights last."""
    if not _patches:
        return theirs(*arguments, **options)
    way = way_of(tensors)
    reason = _reason_against(way, *tensors)
    # An operator counts itself, when it runs: what torch.compile compiles comes here but once.
    if not torch.compiler.is_compiling() and (way is EAGER or reason is not None):
        _count(reason)
    return (ours if reason is None else theirs)(*arguments, **options)


def _loss_route(ours, theirs):
    def call(input, target, weight=None, *arguments, **options):
        if has_torch_function((input, target, weight)):
            return handle_torch_function(call, (input, target, weight), input, target, weight, *arguments, **options)
        return _route(ours, theirs, (input, target, weight), (input, target, weight, *arguments), options)

    def routed(input, target, weight=None, *arguments, **options):
        return call(input, target, weight, *arguments, **options)

    return routed


def _linear_route(ours, theirs):
    def call(input, linear_weight, target, *, weight=None, **options):
        tensors = input, linear_weight, target, weight
        if has_torch_function(tensors):
            return handle_torch_function(call, tensors, input, linear_weight, target, weight=weight, **options)
        return _route(ours, theirs, tensors, tensors[:3], options | {"weight": weight})

    def routed(input, linear_weight, target, **options):
        return call(input, linear_weight, target, **options)

    return routed


_MAKERS = {"cross_entropy": _loss_route, "nll_loss": _loss_route, "linear_cross_entropy": _linear_route}


class Patch:
    """What `patch` returns: leaving it as a context manager takes this patch back.

    Attributes
    ----------
    computed : int
        Calls computed here since then. Compiled ones count when they run, also those of pyx_xent.torch's own functions.
    passed_on : Counter
        Calls that went to the functions that were there before, by reason.
    """

    def __init__(self):
        self.computed = 0
        self.passed_on = collections.Counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with _lock:
            if self in _patches:
                _patches.remove(self)
            _install()

    def __repr__(self):
        state = "active" if self in _patches else "taken back"
        routed = [f"torch.nn.functional.{name}" for name, (ours, _) in _functions.items() if _now(name) is ours]
        counts = f"{self.computed} calls computed here, {self.passed_on.total()} passed on"
        reasons = "".join(f"; {count}: {reason}" for reason, count in self.passed_on.most_common())
        return f"<pyx_xent.torch.patch, {state}: {', '.join(routed) or 'nothing'}; {counts}{reasons}>"


def _now(name):
    return getattr(torch.nn.functional, name, None)


def _install():
    _operators.watchers[:] = [_count] if _patches else []
    for name, make in _MAKERS.items():
        now, (ours, before) = _now(name), _functions.get(name, (None, None))
        if now is None:
            continue
        if _patches and now is not ours:
            # What another library has put there is wrapped, as PyTorch's own function is.
            routed = make(getattr(functional, name), now)
            if isinstance(now, types.FunctionType):  # with its globals: torch.jit.script compiles the source of what is wrapped
                routed = types.FunctionType(
                    routed.__code__, now.__globals__, now.__name__, routed.__defaults__, routed.__closure__
                )
            _functions[name] = functools.wraps(now)(routed), now
            setattr(torch.nn.functional, name, _functions[name][0])
        elif not _patches and now is ours:  # if it was wrapped by others meanwhile, it stays, and passes on
            setattr(torch.nn.functional, name, before)
            del _functions[name]


def patch():
    """Route ``torch.nn.functional``'s ``cross_entropy``, ``nll_loss`` and ``linear_cross_entropy`` to pyx_xent.

    And so the modules and models that call them, eager and under torch.compile. Calls with other devices and dtypes, under
    torch.func, tracing and export go on to the function that was there before: PyTorch's, or another library's. A function
    that was imported by name beforehand (``from torch.nn.functional import cross_entropy``) is not routed. Works until
    `unpatch`, or to the end of a `with` block; may be called again and from any thread: what was there is back when all
    patches are taken back.

    Returns
    -------
    Patch
        A context manager. Its repr says what is active, and how many calls were computed here or passed on, and why.

    Examples
    --------
    >>> import torch
    >>> import pyx_xent.torch
    >>> with pyx_xent.torch.patch() as patch:
    ...     loss = torch.nn.CrossEntropyLoss()(torch.zeros(2, 3), torch.tensor([0, 1]))
    >>> patch.computed
    1
    """
    new = Patch()
    with _lock:
        _patches.append(new)
        _install()
    return new


def unpatch():
    """Take all patches back; without one, do nothing.

    Examples
    --------
    >>> import pyx_xent.torch
    >>> pyx_xent.torch.unpatch()
    """
    with _lock:
        _patches.clear()
        _install()
