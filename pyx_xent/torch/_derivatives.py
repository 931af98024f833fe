"""Derivatives of the gradient (SPEC S33) and the gradient of class probabilities, by operations that PyTorch differentiates."""

import torch

from ._tensors import wide_dtype


def class_axis(input):
    """Where the classes are."""
    return 0 if input.dim() == 1 else 1


def is_soft(tensors, options):
    """Whether the target is class probabilities."""
    return not options.log_probs and tensors.target.shape == tensors.input.shape


def _of_classes(numbers, input, axis):
    """(C,) numbers, to be multiplied with the logits."""
    return numbers.view([-1] + [1] * (input.dim() - axis - 1))


def _sample_weights(tensors, rows, dtype):
    """Of the shape `rows`."""
    if tensors.sample_weight is None:
        return tensors.input.new_ones((), dtype=dtype).expand(rows)
    return tensors.sample_weight.to(dtype).reshape(rows)


def _factors(grad_output, s, divisor):
    """The upstream gradient of each row's loss, as its gradients are multiplied with it."""
    return grad_output.to(s.dtype) * s / divisor


def _divisor(tensors, options, s, live=None, w_y=None):
    """What sums are divided by: SPEC S15, S16, S23, S24. live, w_y: of class indices."""
    if options.reduction != "mean":
        return 1
    if tensors.normalizer is not None:
        return tensors.normalizer
    if w_y is None:  # class probabilities
        axis = class_axis(tensors.input)
        if tensors.sample_weight is None:
            return tensors.input.numel() / tensors.input.shape[axis]
        divisor, live = s.sum(), s != 0
    elif tensors.weight is None and tensors.sample_weight is None:
        divisor = live.sum()
    else:
        divisor = (w_y * s).sum()
    if options.empty != "nan":
        divisor = torch.where(divisor == 0, torch.inf, divisor)
    return torch.where(live.any(), divisor, torch.inf)  # where no row counts, all gradients are 0: SPEC S26, S28


def _onehot(y, input, axis):
    return torch.nn.functional.one_hot(y, input.shape[axis]).movedim(-1, axis)


def _focal(log_p, gamma):
    """Of the target's log-probability: A of SPEC S46 over g s w_y, and p times the derivative of that with respect to p."""
    p, others = log_p.exp(), (-log_p.expm1()).clamp_min(torch.finfo(log_p.dtype).tiny)
    power, ratio = others**gamma, log_p / others
    return power * (1 - gamma * p * ratio), gamma * p * power / others * (((gamma - 1) * p - others) * ratio - 2)


def derivatives_of_gradient(grad_output, tensors, options, cotangent):
    """Derivatives of Σ cotangent · gradient(grad_output, input, target): of grad_output, of input, of target.

    That of target is None with class indices.
    """
    input, target, weight = tensors.input, tensors.target, tensors.weight
    smoothing, z = options.label_smoothing, options.z_loss
    axis, soft = class_axis(input), is_soft(tensors, options)
    classes = input.shape[axis]
    if classes == 0:
        return torch.zeros_like(grad_output), torch.zeros_like(input), torch.zeros_like(target) if soft else None
    dtype = wide_dtype(input.dtype)
    dtype = torch.promote_types(dtype, target.dtype) if soft else dtype
    x, v = input.to(dtype), cotangent.to(dtype)
    rows = v.sum(axis).shape
    s = _sample_weights(tensors, rows, dtype)
    w = x.new_ones(classes) if weight is None else weight.to(dtype)
    of_class = _of_classes(w, x, axis)
    live = s != 0
    # A gradient is h (mass p - own): see SPEC S31. own_v: Σ own v, of each row.
    if soft:
        own = of_class * ((1 - smoothing) * target.to(dtype) + smoothing / classes)
        mass, own_v, w_y = own.sum(axis), (own * v).sum(axis), None
    else:
        y = target.reshape(rows).long()
        live = live & (y != options.ignore_index)
        y = torch.where(live, y, 0)
        w_y = torch.where(live, w[y], 0)
        v_y = v.gather(axis, y.unsqueeze(axis)).squeeze(axis)
        mass = (1 - smoothing) * w_y + smoothing / classes * w.sum()
        own_v = (1 - smoothing) * w_y * v_y + smoothing / classes * (of_class * v).sum(axis)
    divisor = _divisor(tensors, options, s, live, w_y)
    h = _factors(grad_output, s, divisor)
    of_input, of_row = torch.zeros_like(input), -own_v
    if not options.log_probs:
        x = torch.where(live.unsqueeze(axis), x, 0)
        p = x.softmax(axis)
        p_v = (p * v).sum(axis)
        bend = 0
        if options.focal_gamma:
            factor, slope = _focal(x.log_softmax(axis).gather(axis, y.unsqueeze(axis)).squeeze(axis), options.focal_gamma)
            bend = (slope * w_y * (p_v - v_y)).unsqueeze(axis) * (_onehot(y, x, axis) - p)
            mass, own_v = factor * mass, factor * own_v
        mass = mass + 2 * z * x.logsumexp(axis) if z else mass
        of_row = mass * p_v - own_v
        a = torch.where(live, h, 0)
        of_input = (mass.unsqueeze(axis) * (v - p_v.unsqueeze(axis)) + 2 * z * p_v.unsqueeze(axis)) * p + bend
        of_input = (of_input * a.unsqueeze(axis)).to(input.dtype)
    of_row = torch.where(live, of_row * s, 0) / divisor
    of_grad_output = (of_row if options.reduction == "none" else of_row.sum()).to(grad_output.dtype)
    of_target = None
    if soft:
        of_target = ((1 - smoothing) * h.unsqueeze(axis) * of_class * (p_v.unsqueeze(axis) - v)).to(target.dtype)
    return of_grad_output, of_input, of_target


def gradient_of_target(grad_output, tensors, options):
    """SPEC S31, of class probabilities: (1-ε) g s w_c (-ℓ_c). Seldom asked for."""
    input, target, weight = tensors.input, tensors.target, tensors.weight
    axis = class_axis(input)
    if input.shape[axis] == 0:
        return torch.zeros_like(target)
    dtype = torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32)
    log_p = input.to(dtype).log_softmax(axis)
    s = _sample_weights(tensors, log_p.sum(axis).shape, dtype)
    if tensors.sample_weight is not None:
        log_p = torch.where((s != 0).unsqueeze(axis), log_p, 0)
    h = _factors(grad_output, s, _divisor(tensors, options, s))
    gradient = -(1 - options.label_smoothing) * h.unsqueeze(axis) * log_p
    if weight is not None:
        gradient = gradient * _of_classes(weight.to(dtype), input, axis)
    return gradient.to(target.dtype)


def gradients_by_autograd(loss, tensors, grad_output, needed):
    """Of loss() with respect to the tensors that are needed, else None; to be differentiated again where that is asked for."""
    asked = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        found = iter(torch.autograd.grad(loss(), asked, grad_output, create_graph=twice))
    return [next(found) if is_needed else None for is_needed in needed]
