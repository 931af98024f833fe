"""patch(): torch.nn.functional's losses, computed here, for models that call them."""

import collections
import functools
import threading
import types

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _operators, functional
from ._arguments import loses_gradient
from ._routes import EAGER, PYTORCH, reason_of, way_of
from ._tensors import FLOATS

_lock = threading.Lock()
_patches = []  # those that are active
_functions = {}  # name: (what torch.nn.functional has now, its _Route)


def _reason_against(way, tensors, weight):
    """Why a call is passed on to the function that was there before; None if it is computed here."""
    input = tensors[0]
    if not isinstance(input, Tensor):
        return "input is no tensor"
    if input.dtype not in FLOATS:
        return f"dtype {input.dtype}"
    if way is PYTORCH:
        return reason_of(tensors)
    if loses_gradient(weight):
        return "weight requires grad"
    return None


def _count(reason=None):
    with _lock:
        for patch in _patches:
            if reason is None:
                patch.computed += 1
            else:
                patch.passed_on[reason] += 1


_LOSS = ("input", "target", "weight")
_POSITIONAL = {"cross_entropy": _LOSS, "nll_loss": _LOSS, "linear_cross_entropy": ("input", "linear_weight", "target")}
_DECIDING = ("input", "target", "linear_weight", "linear_bias", "weight")  # who computes


class _Route:
    """What `handle_torch_function` gets in the place of torch.nn.functional's own function, and passes for it.

    A tensor class that has its own implementation of that function finds it; torch.fx traces it, and pickles the trace.
    """

    def __init__(self, name, ours, theirs):
        functools.update_wrapper(self, theirs)
        self.name, self.ours, self.theirs = name, ours, theirs
        self.outermost = True  # nobody has wrapped it since, and patch() that

    def __eq__(self, other):
        return other is self or other is self.theirs

    def __hash__(self):
        return hash(self.theirs)

    def __reduce__(self):
        return _now, (self.name,)

    def __call__(self, *arguments, **options):
        named = dict(zip(_POSITIONAL[self.name], arguments, strict=False)) | options
        tensors = [named.get(name) for name in _DECIDING]
        if has_torch_function(tensors):
            return handle_torch_function(self, tensors, *arguments, **options)
        if not _patches or not self.outermost:
            return self.theirs(*arguments, **options)
        way = way_of(tensors)
        reason = _reason_against(way, tensors, named.get("weight"))
        if reason is not None:
            if not torch.compiler.is_compiling():
                _count(reason)
            return self.theirs(*arguments, **options)
        result = self.ours(*arguments, **options)
        if way is EAGER:  # an operator counts itself when it runs: what torch.compile compiles comes here but once
            _count()
        return result


class Patch:
    """What `patch` returns: leaving it as a context manager takes this patch back.

    Attributes
    ----------
    computed : int
        Calls computed here since `patch`. Compiled ones count when they run, also those of pyx_xent.torch's own functions.
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
    for name in _POSITIONAL:
        now, (ours, route) = _now(name), _functions.get(name, (None, None))
        if now is None:
            continue
        if _patches and now is not ours:
            # What another library has put there is wrapped, as PyTorch's own function is.
            if route is not None:
                route.outermost = False
            route = _Route(name, getattr(functional, name), now)
            _functions[name] = _function_of(route), route
            setattr(torch.nn.functional, name, _functions[name][0])
        elif not _patches and now is ours:  # if it was wrapped by others meanwhile, it stays, and passes on
            setattr(torch.nn.functional, name, route.theirs)
            del _functions[name]


def _function_of(route):
    def routed(*arguments, **options):
        return route(*arguments, **options)

    if isinstance(route.theirs, types.FunctionType):  # with its globals: torch.jit.script compiles what is wrapped
        routed = types.FunctionType(
            routed.__code__, route.theirs.__globals__, route.theirs.__name__, routed.__defaults__, routed.__closure__
        )
    return functools.wraps(route.theirs)(routed)


def patch():
    """Route ``torch.nn.functional``'s ``cross_entropy``, ``nll_loss`` and ``linear_cross_entropy`` to pyx_xent.

    And so the modules and models that call them, eager and under torch.compile. Calls with other devices and dtypes, under
    torch.func, tracing and export go on to the function that was there before: PyTorch's, or another library's. A function
    that was imported by name beforehand (``from torch.nn.functional import cross_entropy``) is not routed. Works until
    `unpatch`, or to the end of a `with` block; may be called again and from any thread. When all patches are taken back, what
    was there is back, or passes calls on to it where another library has wrapped it meanwhile.

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
