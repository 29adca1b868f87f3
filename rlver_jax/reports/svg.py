"""Charts as SVG: axes, lines with a band, stacked bars, boxes and dots.

Drawn here and not by a library: the page runs no script for them, they follow dark mode by CSS alone, tests and readers
of screens find their text in the markup, and the same code writes a picture file (docs/report.md compares libraries).
A chart is drawn 360 units wide, which is a phone; a wide screen puts several beside each other. Colours are classes of
chart.css, so that they change with dark mode. ElementTree writes the markup and escapes every text.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from xml.etree import ElementTree

from rich.cells import cell_len

from rlver_jax.text.console import plain_line

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _BOTTOM, _LINE = 38, 18, 32, 15
_CHARACTER = 6.0  # about the width of a Latin one in the legend
Element = ElementTree.Element


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of a legend: classes of the thing that it explains, and its name."""

    classes: str
    name: str
    shape: str = "line"  # line | box


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart with the text around it."""

    title: str
    caption: str
    chart: "Chart"


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """At most about `most` round numbers in low..high; `whole`: integers only."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's number, without needless zeros."""
    return f"{value:g}".replace("-", "−")


class Chart:
    """One chart; its methods draw in data coordinates, `markup` gives the SVG."""

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        labels: tuple[str, str] = ("", ""),
        legend: Sequence[Key] = (),
        size: tuple[int, int] = (WIDTH, HEIGHT),
        left: int = _LEFT,
    ):
        """An empty plot.

        Args:
            title: read out to those who don't see it.
            x, y: ranges; a y range may fall.
            labels: of the two axes.
            left: room for the numbers or names on the y axis.
        """
        self.x, self.y, self.left = x, y, left
        self.width, self.height = size
        lines = _legend_lines(legend, self.width - 2)
        self.top = 8 + _LINE * len(lines) + 4 * bool(lines) + 20 * bool(labels[1])
        self.bottom = self.height - (_BOTTOM if labels[0] else _BOTTOM - 13)
        box = f"0 0 {self.width} {self.height}"
        self.root = Element("svg", {"viewBox": box, "role": "img", "aria-label": plain_line(title), "class": "chart"})
        for i, line in enumerate(lines):
            self._legend(line, 8 + _LINE * i)
        middle = (self.left + self.width - _RIGHT) / 2
        self._text(middle, self.height - 3, labels[0], "label middle")
        self._text(2, self.top - 12, labels[1], "label")

    def px(self, x: float) -> float:
        """Horizontal position of a value."""
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - _RIGHT - self.left)

    def py(self, y: float) -> float:
        """Vertical position of a value."""
        return self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top)

    def x_axis(self, values: Sequence[float], *, grid: bool = False, percent: bool = False) -> None:
        """Numbers below the plot."""
        for value in values:
            x = self.px(value)
            if grid:
                self._add("line", "grid", x1=x, x2=x, y1=self.top, y2=self.bottom)
            self._text(x, self.bottom + 13, f"{value:.0%}" if percent else number(value), "tick middle")

    def y_axis(self, values: Sequence[float], *, percent: bool = False) -> None:
        """Lines across the plot with their numbers."""
        for value in values:
            y = self.py(value)
            self._add("line", "grid", x1=self.left, x2=self.width - _RIGHT, y1=y, y2=y)
            self._text(self.left - 4, y + 3.5, f"{value:.0%}" if percent else number(value), "tick end")

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], classes: str) -> None:
        """An area between two lines, kept within the plot."""
        edge = [*zip(xs, high, strict=True), *reversed([*zip(xs, low, strict=True)])]
        self._add("path", f"band {classes}", d=self._path(edge) + "Z")

    def line(self, xs: Sequence[float], ys: Sequence[float], classes: str, dots: bool = False) -> None:
        """A line through points; a single point, or each with `dots`, is a dot."""
        self._add("path", f"line {classes}", d=self._path([*zip(xs, ys, strict=True)]))
        for x, y in zip(xs, ys, strict=True) if dots or len(xs) == 1 else ():
            self.dot(x, y, classes, 2.5)

    def dot(self, x: float, y: float, classes: str, radius: float = 4, tip: str = "") -> None:
        """A dot."""
        self._add("circle", f"dot {classes}", tip, cx=self.px(x), cy=self.py(y), r=radius)

    def bar(self, x: tuple[float, float], y: tuple[float, float], classes: str, tip: str = "") -> None:
        """A rectangle between two corners."""
        (left, right), (low, high) = map(self.px, x), map(self.py, y)
        self._add("rect", f"bar {classes}", tip, x=left, width=right - left, y=high, height=low - high)

    def row_name(self, y: float, name: str) -> None:
        """A name left of the plot, its middle left out where there is no room."""
        room = int(self.left / 6.3)
        short = name if len(name) <= room else f"{name[: room // 2 - 1]}…{name[-room // 2 :]}"
        text = self._text(self.left - 5, self.py(y) + 3.5, short, "tick end")
        if short != name and text is not None:
            ElementTree.SubElement(text, "title").text = plain_line(name)

    def rule(self, x: float | None = None, y: float | None = None) -> None:
        """A stronger line across the plot, at an x or a y."""
        if x is not None:
            self._add("line", "rule", x1=self.px(x), x2=self.px(x), y1=self.top, y2=self.bottom)
        if y is not None:
            self._add("line", "rule", x1=self.left, x2=self.width - _RIGHT, y1=self.py(y), y2=self.py(y))

    def note(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        """A word within the plot."""
        self._text(self.px(x), self.py(y), text, f"label {anchor}")

    def tips(self, xs: Sequence[float], texts: Sequence[str]) -> None:
        """Texts that the page shows when the column around an x (rising) is touched."""
        middles = [(a + b) / 2 for a, b in itertools.pairwise(xs)]
        edges = [self.x[0], *middles, self.x[1]]
        for left, right, text in zip(edges, edges[1:], texts, strict=False):
            x, width = self.px(left), self.px(right) - self.px(left)
            self._add("rect", "hit", text, y=self.top, height=self.bottom - self.top, x=x, width=width)

    def markup(self) -> str:
        """The `<svg>` element, for a page."""
        return ElementTree.tostring(self.root, encoding="unicode")

    def document(self, style: str) -> str:
        """A file of its own."""
        root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg"} | self.root.attrib)
        ElementTree.SubElement(root, "style").text = style
        ElementTree.SubElement(root, "rect", {"width": "100%", "height": "100%", "class": "paper"})
        root.extend(self.root)
        return ElementTree.tostring(root, encoding="unicode") + "\n"

    def _path(self, points: Sequence[tuple[float, float]]) -> str:
        low, high = sorted(self.y)
        positions = [f"{self.px(x):.1f} {self.py(min(max(y, low), high)):.1f}" for x, y in points]
        return "M" + "L".join(positions)

    def _add(self, tag: str, classes: str, tip: str = "", **at: float | str) -> Element:
        shown = {name: value if isinstance(value, str) else f"{value:.1f}" for name, value in at.items()}
        shown |= {"data-tip": plain_line(tip)} if tip else {}
        return ElementTree.SubElement(self.root, tag, {"class": classes} | shown)

    def _text(self, x: float, y: float, text: str, classes: str) -> Element | None:
        if not text:
            return None
        element = self._add("text", classes, x=x, y=y)
        element.text = plain_line(text)
        return element

    def _legend(self, line: Sequence[tuple[float, Key, str]], y: float) -> None:
        for x, key, name in line:
            if key.shape == "line":
                self._add("line", f"line {key.classes}", x1=x, x2=x + 14, y1=y, y2=y)
            else:
                self._add("rect", f"bar {key.classes}", x=x + 2, width=10, y=y - 5, height=10)
            self._text(x + 18, y + 3.5, name, "label")


def _legend_lines(keys: Sequence[Key], width: float) -> list[list[tuple[float, Key, str]]]:
    """(x, key, name cut short) of the legend's entries, line by line."""
    lines: list[list[tuple[float, Key, str]]] = []
    x = math.inf
    for key in keys:
        name = key.name if len(key.name) <= 44 else key.name[:43] + "…"
        needs = 26 + _CHARACTER * cell_len(name)
        if x + needs > width:
            lines.append([])
            x = 2.0
        lines[-1].append((x, key, name))
        x += needs
    return lines
