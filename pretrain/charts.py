"""Line charts as inline SVG, drawn for small multiples: one quantity a chart, a line a run or a variant of it.

Colours and fonts come from the page around them (report.py); nothing is loaded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 400, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24
_CHARACTER, _PRINTED_CHARACTER = 6.2, 8.5  # widths in an axis label, whose type report.css makes larger on paper
_BUCKETS = 160
_MINUS = "&#8722;"


@dataclass
class Series:
    """A line.

    Attributes:
        name: in the legend; "" when the chart has but one line.
        points: (x, y) sorted by x; a y that is not finite is left out.
        color: a CSS colour.
    """

    name: str
    points: Sequence[Point]
    color: str


@dataclass
class Chart:
    """A line chart of one quantity.

    Attributes:
        title: the quantity; `unit`: of its numbers, "" if they have none.
        x_unit: of the horizontal axis.
        format: of the values in the legend.
        from_zero: whether the vertical axis begins at 0; `top`: where it ends, None: above the largest value.
    """

    title: str
    unit: str
    series: Sequence[Series]
    x_unit: str
    format: Callable[[float], str]
    from_zero: bool = False
    top: float | None = None

    def svg(self) -> str:
        """The chart with its title and legend, as an HTML figure."""
        lines = [(series, _bucketed(series.points)) for series in self.series]
        lines = [(series, buckets) for series, buckets in lines if buckets]
        if not lines:
            return ""
        x_high = max(bucket.x for _, buckets in lines for bucket in buckets)
        y_low, y_high = self._range([bucket.mean for _, buckets in lines for bucket in buckets])
        y_ticks = nice_ticks(y_low, y_high, 4)
        y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

        def across(x: float) -> float:
            return _LEFT + (WIDTH - _LEFT - _RIGHT) * (x / x_high if x_high else 0.5)

        def down(y: float) -> float:
            share = (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)
            return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share

        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}" '
            f'data-x="{x_high:g} {_LEFT} {WIDTH - _RIGHT}">'
        ]
        for tick, label in zip(y_ticks, tick_labels(y_ticks)):
            y = down(tick)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
            parts.append(f'<text class="y" x="{_LEFT - 8}" y="{y + 3.5:.1f}">{label}</text>')
        parts += _x_axis([tick for tick in nice_ticks(0, x_high, 4) if tick <= x_high * 1.0001], self.x_unit, across)
        for series, buckets in lines:
            parts.append(_line(series, buckets, across, down))
        parts.append(f'<path class="cursor" d="M0 {_TOP}V{HEIGHT - _BOTTOM}"/></svg>')
        return f"<figure>{self._caption([line for line, _ in lines])}{''.join(parts)}</figure>"

    def _range(self, values: Sequence[float]) -> tuple[float, float]:
        low, high = min(values), max(values)
        if self.from_zero:
            low = min(0.0, low)
        if self.top is not None:
            high = max(self.top, high)
        if high - low < 1e-12 + 1e-6 * abs(high):  # a constant lies in the middle
            low, high = (0.0, 2 * high or 1.0) if high >= 0 else (low - 1, high + 1)
        return low, high

    def _caption(self, series: Sequence[Series]) -> str:
        unit = f" <small>{escape(self.unit)}</small>" if self.unit else ""
        entries = "".join(
            f'<li style="--s:{one.color}">{"<i></i>" if one.name else ""}{escape(one.name)} '
            f"<b>{self.format(_last(one.points))}</b></li>"
            for one in series
        )
        return f"<figcaption><h3>{escape(self.title)}{unit}</h3><ul>{entries}</ul></figcaption>"


@dataclass
class _Bucket:
    """Neighbouring points as one: the last x, and of the y the mean, the smallest and the largest."""

    x: float
    mean: float
    low: float
    high: float


def _bucketed(points: Sequence[Point]) -> list[_Bucket]:
    """Neighbouring points joined, so that a line of many thousand steps stays readable and small."""
    points = [point for point in points if math.isfinite(point[1])]
    size = max(1, math.ceil(len(points) / _BUCKETS))
    buckets = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [y for _, y in part]
        buckets.append(_Bucket(part[-1][0], sum(values) / len(values), min(values), max(values)))
    return buckets


def _line(
    series: Series, buckets: Sequence[_Bucket], across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    """The line, and behind it the band from the smallest to the largest value of each bucket."""
    shape = "M" + "L".join(f"{across(b.x):.1f} {down(b.mean):.1f}" for b in buckets)
    values = " ".join(f"{b.x:g}:{b.mean:.5g}" for b in buckets)
    band = ""
    if any(b.low != b.high for b in buckets):
        edge = [(b.x, b.high) for b in buckets] + [(b.x, b.low) for b in reversed(buckets)]
        outline = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in edge)
        band = f'<path class="band" style="--s:{series.color}" d="M{outline}Z"/>'
    dots = ""
    if len(buckets) <= 24:
        dots = "".join(
            f'<circle style="--s:{series.color}" cx="{across(b.x):.1f}" cy="{down(b.mean):.1f}" r="2.2"/>'
            for b in buckets
        )
    return f'{band}<path class="line" style="--s:{series.color}" d="{shape}" data-v="{values}"/>{dots}'


def _x_axis(ticks: Sequence[float], unit: str, across: Callable[[float], float]) -> list[str]:
    """A label at each tick, behind the last one the unit; those that it would run into are left out."""
    labels = tick_labels(ticks)
    last = f"{labels[-1]} {unit}"
    # the number stands at its tick and the unit behind it, as far as there is room
    end = min(across(ticks[-1]) + _CHARACTER * (len(last) - len(labels[-1]) / 2), WIDTH - _RIGHT)
    begin = end - _PRINTED_CHARACTER * (len(last) + 1)
    places = [(across(tick), label) for tick, label in zip(ticks[:-1], labels)]
    return [
        *(
            f'<text x="{x:.1f}" y="{HEIGHT - 6}">{label}</text>'
            for x, label in places
            if x + _PRINTED_CHARACTER * len(label) / 2 <= begin
        ),
        f'<text class="last" x="{end:.1f}" y="{HEIGHT - 6}">{escape(last)}</text>',
    ]


def _last(points: Sequence[Point]) -> float:
    return next((y for _, y in reversed(points) if math.isfinite(y)), math.nan)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, 1, 2, 2.5 or 5 times a power of ten apart, from below `low` to above `high`."""
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Short labels of one form for a whole axis: 0.05, 250, 40k, 1.5M, 2e-4."""
    largest = max(abs(tick) for tick in ticks)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if largest >= limit:
            factor = 1e3 if suffix == "k" else limit
            return ["0" if tick == 0 else f"{tick / factor:g}{suffix}" for tick in ticks]
    if 0 < largest < 5e-3:
        return ["0" if tick == 0 else _scientific(tick) for tick in ticks]
    return [f"{tick:g}".replace("-", _MINUS) for tick in ticks]


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{_MINUS}{abs(int(exponent))}" if int(exponent) < 0 else f"{value:g}"
