"""WER against the level of compression: an exponential through measured points, or lines.

WER = a + b exp(c level) is the law that was found for on-device recognisers (arXiv 2402.13076).
It is fitted by least squares: for a given c the rest is linear, so c alone is searched. Where the
points contradict it, lines between them serve instead; which of the two tells more about points
that it has not seen decides.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.errors import InputError

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
_STEEPEST, _FLATTEST = 60.0, 0.01  # c; the flattest is a line to the eye
_LEAST_POINTS = 4  # that an exponential of three parameters needs, to be put to the test


@dataclass(frozen=True)
class Exponential:
    """a + b exp(c x), with b >= 0 and c > 0, so it never falls."""

    a: float
    b: float
    c: float

    def at(self, x: float) -> float:
        return self.a + self.b * math.exp(self.c * x)


@dataclass(frozen=True)
class Lines:
    """Straight from point to point; ys never fall."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    def at(self, x: float) -> float:
        return float(np.interp(x, self.xs, self.ys))


Law = Exponential | Lines


@dataclass(frozen=True)
class Fit:
    """law: the one that was chosen. residual: root mean square over the points that it was made of.

    unseen, unseen_lines: the same of the exponential and of lines over the inner points, each left
    out in turn; None: too few to tell.
    """

    law: Law
    residual: float
    unseen: float | None
    unseen_lines: float | None


def fit(xs: Sequence[float], ys: Sequence[float], name: str = "points") -> Fit:
    """Through ys at rising xs. InputError: fewer than 2 points, or xs that do not rise.

    name: for the warning where the exponential does not serve.
    """
    x, y = np.array(xs, float), np.array(ys, float)
    if len(x) < 2 or len(x) != len(y) or not bool((np.diff(x) > 0).all()):
        raise InputError(f"cannot fit {len(y)} values at {list(xs)}; give at least 2 rising places")
    lines = fit_lines(x, y)
    if len(x) < _LEAST_POINTS:
        log.warning("%s: lines between %d points, too few for an exponential", name, len(x))
        return Fit(lines, _rms(lines, x, y), None, None)
    curve = fit_exponential(x, y)
    unseen, unseen_lines = _unseen(fit_exponential, x, y), _unseen(fit_lines, x, y)
    law: Law = curve if unseen <= unseen_lines else lines
    if law is lines:
        log.warning(
            "%s: an exponential is off by %.4f at points left out, lines by %.4f; lines are taken",
            name,
            unseen,
            unseen_lines,
        )
    return Fit(law, _rms(law, x, y), unseen, unseen_lines)


def fit_exponential(x: Floats, y: Floats) -> Exponential:
    """Least squares over a, b >= 0 and c, within what the levels can tell."""
    tried = np.geomspace(_FLATTEST, _STEEPEST, 80)
    errors = [_linear(x, y, c)[0] for c in tried]
    best = int(np.argmin(errors))
    low, high = tried[max(0, best - 1)], tried[min(len(tried) - 1, best + 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if _linear(x, y, left)[0] <= _linear(x, y, right)[0]:
            high = right
        else:
            low = left
    c = float((low + high) / 2)
    _, start, slope = _linear(x, y, c)
    return Exponential(start - slope / c, slope / c, c)


def fit_lines(x: Floats, y: Floats) -> Lines:
    """Points that fall below an earlier one are averaged with it (pool adjacent violators)."""
    blocks: list[list[float]] = []  # [mean, how many]
    for value in y.tolist():
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, count), (before, more) = blocks.pop(), blocks.pop()
            blocks.append([(mean * count + before * more) / (count + more), count + more])
    rising = [mean for mean, count in blocks for _ in range(int(count))]
    return Lines(tuple(x.tolist()), tuple(rising))


def _linear(x: Floats, y: Floats, c: float) -> tuple[float, float, float]:
    """For this c: (squared error, a, b) of a + b (exp(c x) - 1) / c, b >= 0; no digits lost."""
    basis = np.expm1(c * x) / c
    centred = basis - basis.mean()
    slope = max(0.0, float(centred @ (y - y.mean()) / (centred @ centred)))
    start = float(y.mean() - slope * basis.mean())
    return float(np.square(start + slope * basis - y).sum()), start, slope


def _rms(law: Law, x: Floats, y: Floats) -> float:
    return math.sqrt(np.mean([(law.at(at) - value) ** 2 for at, value in zip(x, y, strict=True)]))


def _unseen(make: Callable[[Floats, Floats], Law], x: Floats, y: Floats) -> float:
    """Root mean square error at the inner points, of a law that was made without each."""
    errors = []
    for left_out in range(1, len(x) - 1):
        seen = np.arange(len(x)) != left_out
        errors.append((make(x[seen], y[seen]).at(float(x[left_out])) - y[left_out]) ** 2)
    return math.sqrt(np.mean(errors))
