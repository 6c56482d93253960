"""Charts as inline SVG: functions from numbers to text.

Their colours are those of the classes in report.css, so that a page in the dark has others; dashes and fills tell the
series apart without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Size of the picture, which is scaled to the available width: small, so that text stays readable on a phone.
WIDTH, HEIGHT = 420, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 22, 56, 44
_N_TICKS = 5
_N_BINS = 36
# In units of the range of the calibration scores: scores farther away are counted in the outermost bins.
_REACH = 1.5


class Series(NamedTuple):
    """A line of a chart.

    name : str, in the legend.
    style : str, a class in report.css.
    x, y : sequence of float, of one length.
    filled : bool, whether the area down to the axis is filled.
    """

    name: str
    style: str
    x: Sequence[float] | NDArray[np.floating]
    y: Sequence[float] | NDArray[np.floating]
    filled: bool = False


class Mark(NamedTuple):
    """A vertical line with a name, or a point where `y` is given."""

    name: str
    x: float
    y: float | None = None


class Axis(NamedTuple):
    """An axis of a chart: its name, its ends, and whether its numbers are shares, shown in per cent."""

    name: str
    low: float
    high: float
    in_percent: bool = False


def line_chart(description: str, x: Axis, y: Axis, series: Sequence[Series], marks: Sequence[Mark] = ()) -> str:
    """Return a chart of lines as an SVG element.

    Parameters
    ----------
    description : str
        What the chart shows, for those who do not see it.
    x, y : Axis
        What lies outside of them is cut off.
    series : sequence of Series
        The lines.
    marks : sequence of Mark
        What is marked.

    Returns
    -------
    str
        The element; all text in it is escaped.
    """
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def place(at_x: float, at_y: float) -> tuple[str, str]:
        across = (min(max(at_x, x.low), x.high) - x.low) / (x.high - x.low)
        up = (min(max(at_y, y.low), y.high) - y.low) / (y.high - y.low)
        return f"{_LEFT + across * (right - _LEFT):.1f}", f"{bottom - up * (bottom - _TOP):.1f}"

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">']
    for tick in ticks(y.low, y.high):
        _, at = place(x.low, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {at}H{right}"/>')
        parts.append(_text(_label(tick, y), _LEFT - 6, float(at) + 4, "end"))
    for tick in ticks(x.low, x.high):
        at, _ = place(tick, y.low)
        parts.append(f'<path class="grid" d="M{at} {bottom}v4"/>')
        parts.append(_text(_label(tick, x), float(at), bottom + 17, "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(_text(x.name, (_LEFT + right) / 2, HEIGHT - 8, "middle"))
    parts.append(_text(y.name, 4, 12, "start"))
    for line in series:
        points = [" ".join(place(*point)) for point in zip(line.x, line.y, strict=True)]
        if line.filled:
            base = place(line.x[-1], y.low)[1]
            area = f"M{place(line.x[0], y.low)[0]} {base}L{'L'.join(points)}V{base}Z"
            parts.append(f'<path class="area {line.style}" d="{area}"/>')
        parts.append(f'<path class="line {line.style}" d="M{"L".join(points)}"/>')
    for mark in marks:
        at_x, at_y = place(mark.x, y.high if mark.y is None else mark.y)
        is_far = float(at_x) > (_LEFT + right) / 2
        beside, anchor = (-7, "end") if is_far else (7, "start")
        if mark.y is None:
            parts.append(f'<path class="mark" d="M{at_x} {_TOP}V{bottom}"/>')
            parts.append(_text(mark.name, float(at_x), _TOP - 5, "end" if is_far else "middle", "mark"))
        else:
            parts.append(f'<circle class="mark" cx="{at_x}" cy="{at_y}" r="4.5"/>')
            below = 17 if float(at_y) < (_TOP + bottom) / 2 else -9
            parts.append(_text(mark.name, float(at_x) + beside, float(at_y) + below, anchor, "mark"))
    parts += _legend(series)
    parts.append("</svg>")
    return "".join(parts)


def histogram(
    description: str,
    calibration_scores: NDArray[np.floating],
    new: Sequence[tuple[str, str, NDArray[np.floating]]],
    threshold: float,
) -> tuple[str, int]:
    """Return a chart of the distributions of calibration scores and of new ones, each as shares of its images.

    Parameters
    ----------
    description : str
        As in `line_chart`.
    calibration_scores : ndarray of shape (n,)
        They decide the range.
    new : sequence of (name, style, ndarray)
        Scores of new images, in sets that are drawn one by one.
    threshold : float
        Is marked.

    Returns
    -------
    chart : str
        An SVG element.
    n_beyond : int
        The number of new scores that lie outside the range, and are counted in the outermost bins.
    """
    calibrated = calibration_scores.astype(np.float64)
    everything = np.concatenate([calibrated, *(scores.astype(np.float64) for _, _, scores in new)])
    reach = _REACH * (np.ptp(calibrated) or 1.0)
    low = min(max(everything.min(), calibrated.min() - reach), threshold)
    high = max(min(everything.max(), calibrated.max() + reach), threshold)
    margin = 0.02 * (high - low) or 0.5
    edges = np.linspace(low - margin, high + margin, _N_BINS + 1)

    def steps(name: str, style: str, scores: NDArray[np.floating], filled: bool) -> Series:
        counts, _ = np.histogram(np.clip(scores.astype(np.float64), low, high), edges)
        shares = np.repeat(counts / max(1, len(scores)), 2)
        return Series(name, style, np.repeat(edges, 2), np.concatenate([[0.0], shares, [0.0]]), filled)

    series = [steps("calibration", "calibration", calibrated, True)]
    series += [steps(name, style, scores, False) for name, style, scores in new]
    top = max(float(np.max(line.y)) for line in series)
    chart = line_chart(
        description,
        Axis("score (log density; higher is more normal)", edges[0], edges[-1]),
        Axis("share of its images", 0.0, 1.05 * top, in_percent=True),
        series,
        [Mark(f"threshold {threshold:.4g}", threshold)],
    )
    return chart, int(((everything < low) | (everything > high)).sum())


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten.

    Parameters
    ----------
    low, high : float
        The ends, of which the second is the larger one.

    Returns
    -------
    list of float
        In rising order.
    """
    rough = (high - low) / _N_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # A power of ten below one is no binary fraction, but its inverse is a whole number.
    return [i * step if step >= 1 else i / round(1 / step) for i in range(first, last + 1)]


def _label(value: float, axis: Axis) -> str:
    return f"{100 * value:.4g} %" if axis.in_percent else f"{value:.6g}"


def _text(text: str, x: float, y: float, anchor: str, style: str = "") -> str:
    classes = f' class="{style}"' if style else ""
    return f'<text{classes} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(series: Sequence[Series]) -> list[str]:
    """Return a sample of each line beside its name, above the chart."""
    parts, left = [], float(_LEFT)
    for line in series:
        shape = f"M{left:.1f} 28h22"
        if line.filled:
            parts.append(f'<path class="area {line.style}" d="{shape}v-8h-22Z"/>')
        parts.append(f'<path class="line {line.style}" d="{shape}"/>')
        parts.append(_text(line.name, left + 27, 31, "start"))
        # No browser is here to measure the text: its letters are half as wide as high, on average.
        left += 27 + 7 * len(line.name) + 14
    return parts
