"""Derive the polynomial coefficients of pyx_xent/_kernels/exp.pxi (Remez exchange; needs mpmath).

    python tools/minimax.py

exp(r)    = 1 + r + r^2 q(r)                 on |r| <= ln2/2, relative error
log(1+f)  = f - (f^2/2 - s (f^2/2 + R(s^2)))  with s = f / (2 + f), 1 + f in [sqrt(1/2), sqrt(2)), where
            R(w) = (log(1+f) - 2 s) / s, the tail of 2 artanh(s), fitted in w = s^2
"""

from mpmath import atanh, cos, exp, log, lu_solve, matrix, mp, mpf, pi, sqrt

mp.dps = 50


def remez(function, weight, low, high, terms, rounds=12, grid=4000):
    """Coefficients c of sum c_k x^k that make max |weight * (polynomial - function)| smallest, and that maximum."""
    middle, half = (low + high) / 2, (high - low) / 2
    nodes = [middle - half * cos(pi * (k + mpf(1) / 2) / (terms + 1)) for k in range(terms + 1)]
    points = [low + (high - low) * k / grid for k in range(grid + 1)]
    values = [(function(x), weight(x)) for x in points]
    for _ in range(rounds):
        system, right = matrix(terms + 1, terms + 1), matrix(terms + 1, 1)
        for row, x in enumerate(nodes):
            for k in range(terms):
                system[row, k] = x**k
            system[row, terms] = (-1) ** row / weight(x)
            right[row] = function(x)
        solution = lu_solve(system, right)
        coefficients = [solution[k] for k in range(terms)]
        errors = [w * (sum(c * x**k for k, c in enumerate(coefficients)) - f) for x, (f, w) in zip(points, values, strict=True)]
        extrema, start = [], 0
        for k in range(1, grid + 2):  # the largest error of each run of one sign
            if k == grid + 1 or (errors[k] > 0) != (errors[start] > 0):
                extrema.append(max(range(start, k), key=lambda j: abs(errors[j])))
                start = k
        if len(extrema) < terms + 1:
            break
        while len(extrema) > terms + 1:
            extrema.pop(0 if abs(errors[extrema[0]]) < abs(errors[extrema[-1]]) else -1)
        nodes = [points[k] for k in extrema]
    return coefficients, max(abs(e) for e in errors)


def exp_tail(r):
    if abs(r) < mpf(10) ** -12:
        return mpf(1) / 2 + r / 6 + r * r / 24
    return (exp(r) - 1 - r) / r**2


def log_tail(w):
    if w < mpf(10) ** -20:
        return 2 * w / 3
    return 2 * atanh(sqrt(w)) / sqrt(w) - 2


def log_ratio(w):
    return log_tail(w) / w if w else mpf(2) / 3


if __name__ == "__main__":
    edge = log(2) / 2 * mpf("1.001")  # rounding n lets r pass ln2/2 a little
    for name, terms in (("exp32", 5), ("exp once, of float", 6), ("exp64", 10)):
        found, error = remez(exp_tail, lambda r: max(r**2, mpf("1e-4")) / exp(r), -edge, edge, terms)
        print(name, f"largest relative error 2^{float(log(error, 2)):.1f}", "(q, lowest power first)")
        print("\n".join("    " + mp.nstr(c, 20) for c in found))
    top = ((sqrt(mpf(2)) - 1) / (sqrt(mpf(2)) + 1)) ** 2 * mpf("1.001")
    for name, terms in (("log1p of float", 4), ("log1p64", 7)):
        found, error = remez(log_ratio, lambda w: (w + mpf("1e-4")) / 2, mpf(0), top, terms)
        print(name, f"largest error relative to the result 2^{float(log(error, 2)):.1f}", "(R / w, lowest power first)")
        print("\n".join("    " + mp.nstr(c, 20) for c in found))
    for name, bits, scale in (("ln2 float", 14, 2**14), ("ln2 double", 32, 2**32)):
        high = mp.nint(log(2) * scale) / scale
        print(name, f"high ({bits} bits)", mp.nstr(high, 25), "low", mp.nstr(log(2) - high, 20))
