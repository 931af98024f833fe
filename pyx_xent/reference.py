"""The specification in float64 NumPy, each formula as docs/SPEC.md writes it. Tests compare with it; nothing falls back to it.

Slow and plain on purpose: arrays of the size of the logits are made freely, arguments are not checked, and rows are
(..., C) after the class axis is moved to the end.
"""

import numpy as np

__all__ = [
    "cross_entropy_derivatives",
    "cross_entropy_with_grad",
    "log_softmax",
    "log_softmax_backward",
    "nll_loss_with_grad",
    "softmax",
    "softmax_backward",
]


def log_softmax(x, axis=-1):
    """ℓ = x - lse, from the sum of the other classes where a class has nearly all: ℓ_c = -log1p(Σ_{k≠c} e^{x_k - x_c})."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    with np.errstate(all="ignore"):
        largest = x.max(-1, keepdims=True, initial=-np.inf)
        exponentials = np.exp(x - largest)
        if x.shape[-1]:
            np.put_along_axis(exponentials, x.argmax(-1)[..., None], 0.0, -1)
        others = exponentials.sum(-1, keepdims=True)
        lost = np.isnan(x).any(-1, keepdims=True) | np.isinf(largest)  # NaN or +inf anywhere, or nothing but -inf
        result = np.where(lost, np.nan, (x - largest) - np.log1p(others))
    return np.moveaxis(result, -1, axis)


def softmax(x, axis=-1):
    """p = exp(ℓ)."""
    with np.errstate(under="ignore"):
        return np.exp(log_softmax(x, axis))


def softmax_backward(grad_output, output, axis=-1):
    """y (g - Σ g y)."""
    g, y = np.asarray(grad_output, np.float64), np.asarray(output, np.float64)
    return y * (g - (g * y).sum(axis, keepdims=True))


def log_softmax_backward(grad_output, output, axis=-1):
    """g - exp(ℓ) Σ g."""
    g = np.asarray(grad_output, np.float64)
    return g - np.exp(np.asarray(output, np.float64)) * g.sum(axis, keepdims=True)


def cross_entropy_derivatives(
    logits,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    axis=None,
    sample_weight=None,
    normalizer=None,
    z_loss=0.0,
    empty="nan",
    focal_gamma=0.0,
    grad_output=1.0,
):
    """SPEC S14 to S16, S23, S24, S26, S31, S44, S46: (loss, gradient, diagonal of the Hessian without z_loss), all float64."""
    logits = np.asarray(logits, np.float64)
    target = np.asarray(target)
    axis = (0 if logits.ndim == 1 else 1) if axis is None else axis
    x = np.moveaxis(logits, axis, -1)
    classes = x.shape[-1]
    rows = x.shape[:-1]
    w = np.ones(classes) if weight is None else np.asarray(weight, np.float64)
    s = np.ones(rows) if sample_weight is None else np.asarray(sample_weight, np.float64).reshape(rows)
    eps, soft = label_smoothing, target.shape == logits.shape

    r = s != 0  # rows that are not inert
    if not soft:
        y = target.reshape(rows)
        r = r & (y != ignore_index)
        y = np.where(r, y, 0)
        onehot = np.arange(classes) == y[..., None]
    x = np.where(r[..., None], x, 0.0)
    with np.errstate(all="ignore"):
        ell = log_softmax(x)
        p = np.exp(ell)
        lse = (x - ell).max(-1, initial=-np.inf, where=np.isfinite(x))
        lse = np.where(np.isnan(ell).any(-1), np.nan, lse)
        if soft:
            q = (1 - eps) * np.moveaxis(np.asarray(target, np.float64), axis, -1) + eps / max(classes, 1)
            nll = np.where(w * q == 0, np.where(np.isneginf(ell), 0.0, 0.0 * ell), -w * q * ell).sum(-1)
            mass, own = (w * q).sum(-1), w * q
            divisor = s.sum()
        else:
            w_y = w[y] if classes else np.zeros(rows)
            ell_y = np.take_along_axis(ell, y[..., None], -1)[..., 0] if classes else np.zeros(rows)
            nll = (1 - eps) * w_y * -ell_y
            if eps:
                nll = nll + eps / classes * (w * -ell).sum(-1)
            mass = (1 - eps) * w_y + eps / max(classes, 1) * w.sum()
            own = (1 - eps) * w_y[..., None] * onehot + eps / max(classes, 1) * w
            divisor = (r * s * w_y).sum()
        curvature = mass
        if focal_gamma:
            others, p_y = np.where(onehot, 0.0, p).sum(-1), np.exp(ell_y)  # others: 1 - p_y
            factor = others**focal_gamma
            own_part = np.where(p_y == 0, 0.0, np.where(others == 0, 1.0, p_y * -ell_y / others))
            nll, curvature = factor * nll, factor * mass
            factor = factor * (1 + focal_gamma * own_part)  # (1 - p)^γ - γ p (1 - p)^(γ - 1) log p
            mass, own = factor * mass, factor[..., None] * own
        loss = s * (nll + (z_loss * lse**2 if z_loss else 0.0))
        loss = np.where(r, loss, 0.0)
        g = s * np.asarray(grad_output, np.float64)
        if reduction == "mean":
            divisor = divisor if normalizer is None else normalizer
            g = g / divisor
        a = mass + (2 * z_loss * lse if z_loss else 0.0)
        # p - 1 for a class with nearly all the probability, from the others': expm1(ℓ) = p - 1
        near_one = p > 0.5
        grad = np.where(near_one, a[..., None] * np.expm1(ell) + (a[..., None] - own), a[..., None] * p - own)
        grad = np.where(r[..., None], g[..., None] * grad, 0.0)
        hessian = np.where(r[..., None], (g * curvature)[..., None] * p * -np.expm1(ell), 0.0)
        if reduction == "sum":
            loss = loss.sum()
        elif reduction == "mean":
            loss = loss.sum() / divisor
            if empty == "zero" and normalizer is None and not (r.any() if soft else w[y[r]].any()):
                loss, grad, hessian = 0.0, np.zeros_like(grad), np.zeros_like(hessian)
    return loss, np.moveaxis(grad, -1, axis), np.moveaxis(hessian, -1, axis)


def cross_entropy_with_grad(*arguments, **options):
    """(loss, gradient) of `cross_entropy_derivatives`."""
    return cross_entropy_derivatives(*arguments, **options)[:2]


def nll_loss_with_grad(log_probs, target, weight=None, *, ignore_index=-100, reduction="mean", axis=None, grad_output=1.0):
    """SPEC S38: L_i = -w_y ℓ_y with ℓ as given."""
    log_probs = np.asarray(log_probs, np.float64)
    axis = (0 if log_probs.ndim == 1 else 1) if axis is None else axis
    ell = np.moveaxis(log_probs, axis, -1)
    rows, classes = ell.shape[:-1], ell.shape[-1]
    w = np.ones(classes) if weight is None else np.asarray(weight, np.float64)
    y = np.asarray(target).reshape(rows)
    r = y != ignore_index
    y = np.where(r, y, 0)
    with np.errstate(all="ignore"):
        loss = np.where(r, -w[y] * np.take_along_axis(ell, y[..., None], -1)[..., 0], 0.0)
        g = np.broadcast_to(np.asarray(grad_output, np.float64), rows)
        if reduction == "mean":
            divisor = (r * w[y]).sum()
            g, loss = g / divisor, loss.sum() / divisor
        elif reduction == "sum":
            loss = loss.sum()
        grad = np.where((np.arange(classes) == y[..., None]) & r[..., None], -(g * w[y])[..., None], 0.0)
    return loss, np.moveaxis(grad, -1, axis)
