"""Pieces of a static HTML page: plots as inline SVG, images as data URIs, tables. No script, nothing loaded from elsewhere.

    page(title, [(heading, body), ...])      the whole file
    svg_lines, scatter, png_grid, png_image, table, paragraph, figure, preformatted      bodies, joined with +

Every function escapes the text it is given and returns finished HTML.
"""

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from itertools import groupby
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands with a page answer --help at once
    import numpy as np

Point = tuple[float, float | None]
_COLOURS = 10
_WIDTH, _HEIGHT = 520, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 10, 42  # margins of the plot's area
_MOST_POINTS = 600  # of one line: a page of a long run stays small


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole file: title, then each section's heading and body, which is HTML made here."""
    parts = "\n".join(f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>" for heading, body in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{parts}\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def preformatted(text: str, summary: str) -> str:
    """Long text behind a line to click on."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def figure(content: str, caption: str) -> str:
    """`content` is HTML made here."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def table(rows: Sequence[Sequence[Any]]) -> str:
    """The first row is the heading; the first column names the rows. Floats get four significant digits."""
    if not rows:
        return paragraph("nothing to show")
    head = "".join(f'<th scope="col">{escape(number(cell))}</th>' for cell in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, range(len(row)), row))}</tr>\n" for row in rows[1:])
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'


def _cell(column: int, value: Any) -> str:
    if column == 0:
        return f'<th scope="row">{escape(number(value))}</th>'
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f'<td class="n">{escape(number(value))}</td>' if numeric else f"<td>{escape(number(value))}</td>"


def number(value: Any) -> str:
    """As a reader wants it: 0.00123456 -> 0.001235, 12345 -> 12,345, None -> an en dash; text as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    if isinstance(value, Integral):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


# -- images ----------------------------------------------------------------------------------------------------------


def png_grid(images: "np.ndarray", columns: int, scale: int = 1, alt: str = "images") -> str:
    """images (N, H, W, 3) or (N, H, W) uint8 in rows of `columns`, each pixel `scale` x `scale` on the page -> an <img> tag."""
    import numpy as np
    from PIL import Image

    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise ValueError(f"png_grid: expected (N, H, W, 3) or (N, H, W) uint8, N above 0, got {images.dtype} {images.shape}")
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    return png_image(file.getvalue(), (columns * width * scale, rows * height * scale), alt, exact=True)


def png_image(png: bytes, size: tuple[int, int], alt: str = "image", exact: bool = False) -> str:
    """A PNG file's bytes, shown `size` = (width, height) large; `exact` enlarges without smoothing."""
    data = base64.b64encode(png).decode("ascii")
    style = ' class="exact"' if exact else ""
    return f'<img{style} width="{size[0]}" height="{size[1]}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


# -- plots -----------------------------------------------------------------------------------------------------------


def svg_lines(
    series: Mapping[str, Sequence[Point]], title: str, log: bool = False, x_label: str = "step", dashed: Collection[str] = ()
) -> str:
    """Lines by name, each of (x, y) in rising x, with axes and a legend; `log` draws y on a logarithmic axis, `dashed` names lines.

    A missing (None) or non-finite y, or one at or below 0 on a logarithmic axis, breaks its line.
    """
    runs = {name: _unbroken(points, log) for name, points in series.items()}
    drawn = [point for pieces in runs.values() for piece in pieces for point in piece]
    if not drawn:
        return paragraph(f"{title}: no values")
    x_axis, y_axis = _Axis([x for x, _ in drawn], False, _LEFT, _WIDTH - _RIGHT), _Axis([y for _, y in drawn], log, _HEIGHT - _BOTTOM, _TOP)
    marks = []
    for index, (name, pieces) in enumerate(runs.items()):
        style = f"s{index % _COLOURS}" + (" dashed" if index >= _COLOURS or name in dashed else "")
        for piece in map(_thinned, pieces):
            places = [(x_axis.place(x), y_axis.place(y)) for x, y in piece]
            if len(places) == 1:
                marks.append(f'<circle class="dot {style}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2.5"/>')
            else:
                marks.append(f'<polyline class="line {style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    return _plot(title, x_axis, y_axis, marks, list(series), x_label)


def scatter(points: "np.ndarray", labels: Sequence[Any], title: str) -> str:
    """points (N, 2), coloured by labels (N,), with a legend of the labels."""
    import numpy as np

    points = np.asarray(points, dtype=float)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) != len(labels):
        raise ValueError(f"scatter: expected (N, 2) points and N labels, got {points.shape} and {len(labels)}")
    finite = np.isfinite(points).all(axis=1)
    if not finite.any():
        return paragraph(f"{title}: no values")
    x_axis, y_axis = _Axis(points[finite, 0], False, _LEFT, _WIDTH - _RIGHT), _Axis(points[finite, 1], False, _HEIGHT - _BOTTOM, _TOP)
    kinds = sorted({str(label) for label in labels})
    marks = [
        f'<circle class="dot s{kinds.index(str(label)) % _COLOURS}" cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="2"/>'
        for (x, y), label, inside in zip(points, labels, finite) if inside
    ]  # fmt: skip
    return _plot(title, x_axis, y_axis, marks, kinds, "")


class _Axis:
    """From values to pixels, and where the ticks stand. The range reaches a little beyond the values."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float):
        self.log, self.start, self.end = log, start, end
        low, high = (self._measure(float(v)) for v in (min(values), max(values)))
        pad = 0.03 * (high - low) or 0.05 * abs(high) or 0.5
        self.low, self.high = low - pad, high + pad

    def _measure(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: float) -> float:
        return self.start + (self._measure(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to ten round values inside the range: multiples of 1, 2 or 5, or on a logarithmic axis those times powers of ten."""
        if not self.log:
            return _round_values(self.low, self.high)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        stride = -(-len(decades) // 8)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            ticks = [digit * 10.0**power for power in decades[::stride] for digit in digits]
            inside = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]
            if len(inside) >= 3:
                return inside
        return _round_values(10**self.low, 10**self.high)


def _round_values(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    return [round(n * step, 12 - math.floor(math.log10(step))) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _unbroken(points: Sequence[Point], log: bool) -> list[list[tuple[float, float]]]:
    """The pieces of a line between values that cannot be drawn."""
    drawable = lambda p: p[1] is not None and math.isfinite(p[1]) and (p[1] > 0 or not log)
    return [[(float(x), float(y)) for x, y in piece] for good, piece in groupby(points, drawable) if good]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `_MOST_POINTS`: of each stretch its lowest and its highest, so that no spike is lost."""
    size = -(-2 * len(points) // _MOST_POINTS)
    if size <= 2:
        return points
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    pairs = (sorted({min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])}) for s in stretches)
    return [point for pair in pairs for point in pair]


def _plot(title: str, x_axis: _Axis, y_axis: _Axis, marks: Sequence[str], names: Sequence[str], x_label: str) -> str:
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    grid = [f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>' for x in map(x_axis.place, x_axis.ticks())]
    grid += [f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>' for y in map(y_axis.place, y_axis.ticks())]
    words = [f'<text class="tick" x="{x_axis.place(v):.1f}" y="{bottom + 15}" text-anchor="middle">{_tick(v)}</text>' for v in x_axis.ticks()]
    words += [f'<text class="tick" x="{left - 6}" y="{y_axis.place(v) + 4:.1f}" text-anchor="end">{_tick(v)}</text>' for v in y_axis.ticks()]
    words.append(f'<text class="tick" x="{(left + right) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    frame = f'<path class="frame" d="M{left},{top}V{bottom}H{right}"/>'
    key = "".join(f'<span><i class="s{n % _COLOURS}"></i>{escape(name)}</span>' for n, name in enumerate(names))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(grid)}{frame}{''.join(marks)}{''.join(words)}</svg>"
    )
    return f'<div class="plot"><p class="title">{escape(title)}</p>{svg}<p class="key">{key}</p></div>'


def _tick(value: float) -> str:
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.10g}" if abs(value) >= 1 else f"{value:.10g}"


_PALETTE = ("#3b82d0", "#e07b20", "#2f9e5a", "#d1495b", "#8b63c9", "#9a6a4f", "#d667ad", "#7d8590", "#a89a12", "#1aa3b0")  # on white and on black


def _style() -> str:
    """Light or dark as the reader's system is; prints in the light one."""
    colours = "".join(f".line.s{n}{{stroke:{c}}}.dot.s{n}{{fill:{c}}}i.s{n}{{background:{c}}}" for n, c in enumerate(_PALETTE))
    return (
        ":root{color-scheme:light dark;--ink:#1d2127;--soft:#626b76;--edge:#d5dae0;--paper:#fff;--raised:#f6f7f9}"
        "@media screen and (prefers-color-scheme:dark){:root{--ink:#e3e6ea;--soft:#98a1ac;--edge:#373d45;--paper:#15181c;--raised:#1d2126}}"
        "body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:70rem;margin:0 auto;padding:1rem 1.2rem 4rem}"
        "h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.5rem;border-bottom:1px solid var(--edge);padding-bottom:.2rem}"
        "p{max-width:46rem}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}"
        "th,td{padding:.25rem .8rem .25rem 0;text-align:left;border-bottom:1px solid var(--edge);vertical-align:top;overflow-wrap:anywhere}"
        "th{font-weight:600}tbody th{font-weight:400;color:var(--soft);min-width:9rem}td.n{text-align:right}"
        ".plot{display:inline-block;width:100%;max-width:33rem;vertical-align:top;margin:0 1rem 1rem 0}svg{width:100%;height:auto;display:block}"
        ".grid{stroke:var(--edge);stroke-width:.6}.frame{fill:none;stroke:var(--soft)}.line{fill:none;stroke-width:1.6;stroke-linejoin:round}"
        ".dashed{stroke-dasharray:5 3}.tick{font-size:11px;fill:var(--soft)}.title{margin:0;font-size:.88rem;font-weight:600}"
        ".key{margin:.2rem 0 0;font-size:.82rem;color:var(--soft)}.key span{margin-right:1rem;white-space:nowrap}"
        ".key i{display:inline-block;width:.9em;height:.55em;margin-right:.35em;border-radius:2px}"
        "figure{display:inline-block;margin:0 1.5rem 1rem 0;vertical-align:top}figcaption{font-size:.85rem;color:var(--soft);max-width:33rem}"
        "img{max-width:100%;height:auto;background:#000}.exact{image-rendering:pixelated}"
        "pre{background:var(--raised);padding:.8rem;overflow-x:auto;font-size:.8rem}summary{cursor:pointer}" + colours
    )
