"""Objects with the constructors of torch.nn's modules: called for the loss, asked afterwards for the gradient."""

from . import _call, functional

__all__ = ["CrossEntropyLoss", "LogSoftmax", "NLLLoss", "Softmax"]


class _Criterion:
    """Keeps its options as attributes, which may be set later and show in repr, and the last call for backward()."""

    _last = None

    def _set(self, given):
        """given: the arguments of __init__, of which each but self is an option."""
        vars(self).update({name: value for name, value in given.items() if name != "self"})

    def _options(self):
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __getstate__(self):
        return vars(self) | {"_last": None}

    def __repr__(self):
        options = (f"{name}={value!r}" for name, value in self._options().items())
        return f"{type(self).__name__}({', '.join(options)})"

    def _last_call(self):
        last = self._last  # read once: another thread may call
        if last is None:
            raise RuntimeError(f"{type(self).__name__}.backward() needs a call first: there is nothing to differentiate")
        return last


class CrossEntropyLoss(_Criterion):
    """Cross-entropy with the arguments of ``torch.nn.CrossEntropyLoss``.

    Calling it gives the loss; `backward` the gradient, from the logits and two numbers a row that the call has kept. The
    logits are kept by reference: they must not change in between. Use one object per thread.

    Parameters
    ----------
    weight, ignore_index, reduction, label_smoothing, axis, z_loss, empty, focal_gamma, loss_dtype
        As for `pyx_xent.cross_entropy`. They are attributes, which may be set later.

    Examples
    --------
    >>> import numpy as np
    >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
    >>> loss = criterion(np.array([[2.0, 0.5, -1.0]]), [0])
    >>> float(loss.round(4))
    0.3913
    >>> criterion.backward().round(4)
    array([[-0.1477,  0.142 ,  0.0058]])
    """

    def __init__(
        self,
        weight=None,
        *,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
        axis=None,
        z_loss=0.0,
        empty="nan",
        focal_gamma=0.0,
        loss_dtype=None,
    ):
        self._set(locals())

    def __call__(self, logits, target, *, sample_weight=None, normalizer=None):
        """The loss of `logits` for `target`; see `pyx_xent.cross_entropy` for shapes, dtypes and errors."""
        self._last = None
        options = _call.options(sample_weight=sample_weight, normalizer=normalizer, **self._options())
        call = _call.cross_entropy_with_state(logits, target, options)
        call.run()
        self._last = call
        return call.loss()

    def backward(self, grad_output=1.0):
        """The gradient with respect to the logits of the last call; bit for bit that of `cross_entropy_with_grad`.

        Parameters
        ----------
        grad_output : float or array_like
            Upstream gradient: a scalar, or for reduction "none" also an array with the shape of the loss.

        Returns
        -------
        ndarray
            A new array of the shape and dtype of the logits.

        Raises
        ------
        RuntimeError
            Nothing was called before.
        ValueError
            `grad_output` has another shape.
        """
        call = self._last_call().backward(grad_output)
        call.run()
        return call.gradient()


class NLLLoss(_Criterion):
    """Negative log-likelihood with the arguments of ``torch.nn.NLLLoss``; `backward` as for `CrossEntropyLoss`.

    Examples
    --------
    >>> import numpy as np
    >>> criterion = NLLLoss(reduction="sum")
    >>> float(criterion(np.log([[0.25, 0.75]]), [1]).round(4))
    0.2877
    >>> criterion.backward()
    array([[ 0., -1.]])
    """

    def __init__(self, weight=None, *, ignore_index=-100, reduction="mean", axis=None, empty="nan", loss_dtype=None):
        self._set(locals())

    def __call__(self, log_probs, target, *, sample_weight=None, normalizer=None):
        """The loss of `log_probs` for `target`; see `pyx_xent.nll_loss`."""
        self._last = None
        options = _call.options(sample_weight=sample_weight, normalizer=normalizer, name="log_probs", **self._options())
        call = _call.nll(log_probs, target, options)
        call.run()
        self._last = call
        return call.loss()

    backward = CrossEntropyLoss.backward


class Softmax(_Criterion):
    """Softmax along `dim`, as ``torch.nn.Softmax``; `backward` takes the gradient with respect to the result.

    Examples
    --------
    >>> import numpy as np
    >>> layer = Softmax(dim=-1)
    >>> layer(np.array([[0.0, np.log(3.0)]]))
    array([[0.25, 0.75]])
    >>> layer.backward(np.array([[1.0, 0.0]]))
    array([[ 0.1875, -0.1875]])
    """

    _forward = staticmethod(functional.softmax)
    _backward = staticmethod(functional.softmax_backward)

    def __init__(self, dim=-1):
        self._set(locals())

    def __call__(self, x):
        """The result of `pyx_xent.softmax` (`log_softmax`), of the shape and dtype of `x`."""
        self._last = None
        self._last = self._forward(x, self.dim)
        return self._last

    def backward(self, grad_output):
        """The gradient with respect to the last input, from `grad_output`, of the shape and dtype of the last result."""
        return self._backward(grad_output, self._last_call(), self.dim)


class LogSoftmax(Softmax):
    """Logarithm of softmax along `dim`, as ``torch.nn.LogSoftmax``.

    Examples
    --------
    >>> import numpy as np
    >>> layer = LogSoftmax(dim=0)
    >>> np.exp(layer(np.array([0.0, np.log(3.0)])))
    array([0.25, 0.75])
    """

    _forward = staticmethod(functional.log_softmax)
    _backward = staticmethod(functional.log_softmax_backward)
