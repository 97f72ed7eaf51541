"""The pictures of a comparison, for a column or the width of a page, in colour or without."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from comparison.grid import Cell, Method
from comparison.panels import (
    Panel,
    canvas,
    label_axes,
    legend_of_lines,
    log_ticks,
    panels_of,
    save,
)
from comparison.results import AXES, Axis, CellResult, sweeps_rates
from comparison.style import FONT_SIZE, Look, looks
from comparison.tables import Measure, quality_of

__all__ = ["draw_all", "draw_curves"]

Looks = dict[Method, Look]
# Values of an axis in its order, and how they are written below it.
Places = dict[float, str]

_LOSS = "test loss (nats)"
_ACCURACY = "test accuracy (%)"
_CURVE_HEIGHT = 1.9
# About as many markers on a curve, whatever its length.
_MARKERS = 6
# Letters of a legend's label that leave room for others beside it, below one panel and on a page.
_LETTERS = {True: 22, False: 28}
# A method's place beside its neighbours where several share a tau, in steps of the tau axis.
_DODGE = 0.09


def draw_all(results: Sequence[CellResult], folder: Path) -> list[Path]:
    """Draw what the results allow into ``folder``; returns the files."""
    drawn = [result for result in results if result.runs]
    if sweeps_rates(drawn):
        # A curve for every learning rate would be too many for one picture.
        return _over_learning_rates(drawn, folder)
    style = looks(result.cell.method for result in drawn)
    pictures = []
    for name, metric, axis in (
        ("loss-steps", "eval/loss", AXES["steps"]),
        ("loss-seconds", "eval/loss", AXES["seconds"]),
        ("loss-megabytes", "eval/loss", AXES["megabytes"]),
        ("accuracy-megabytes", "eval/accuracy", AXES["megabytes"]),
    ):
        if any(metric in record for result in drawn for record in result.runs[0].history):
            path = folder / f"{name}.png"
            draw_curves(drawn, style, metric, axis, path)
            pictures.append(path)
    if any(result.figure("seconds_exposed") for result in drawn):
        draw_exposed(drawn, folder / "exposed.png")
        pictures.append(folder / "exposed.png")
    taus = {result.cell.tau for result in drawn} - {None}
    if len(taus) > 1:
        quality = quality_of(drawn)
        path = folder / f"{quality.slug}-tau.png"
        draw_quality_over_tau(quality, drawn, style, path)
        pictures.append(path)
    return pictures


def _over_learning_rates(results: Sequence[CellResult], folder: Path) -> list[Path]:
    """A picture for every tau; who has no tau is in all of them."""
    style = looks(result.cell.method for result in results)
    taus = sorted({r.cell.tau for r in results if r.cell.tau is not None})
    columns: list[int | None] = [*taus] or [None]
    pictures = []
    for tau in columns:
        drawn = [result for result in results if result.cell.tau in (tau, None)]
        quality = quality_of(drawn)
        name = f"{quality.slug}-lr" + ("" if len(taus) < 2 else f"-tau={tau}")
        draw_quality_over_lr(quality, drawn, style, folder / f"{name}.png")
        pictures.append(folder / f"{name}.png")
    return pictures


def draw_curves(
    results: Sequence[CellResult], style: Looks, metric: str, axis: Axis, path: Path
) -> None:
    """A metric against an axis, one panel for every tau and partition."""
    panels = panels_of(results)
    columns = _legend_columns(style, one_panel=len(panels[0]) == 1)
    with canvas(
        len(panels),
        len(panels[0]),
        height=_CURVE_HEIGHT if len(panels[0]) > 1 else 2.3,
        legend_rows=math.ceil(len(style) / columns),
    ) as (figure, axes):
        for row, line in zip(axes, panels, strict=True):
            for cell, panel in zip(row, line, strict=True):
                _curves(cell, panel, style, metric, axis)
                if len(panels) * len(line) > 1:
                    cell.set_title(panel.title)
        for row in axes:
            if metric.endswith("loss"):
                row[0].set_yscale("log")
                log_ticks(row[0].yaxis)
            if axis.logarithmic:
                row[0].set_xscale("log")
                log_ticks(row[0].xaxis)
        label_axes(axes, axis.label, _LOSS if metric.endswith("loss") else _ACCURACY)
        legend_of_lines(figure, _labelled(style), columns)
        save(figure, path)


def _legend_columns(style: Looks, *, one_panel: bool) -> int:
    """As many as have room for the longest label, below one panel or below the width of a page."""
    columns = 2 if one_panel else 4
    longest = max(len(method.label) for method in style)
    return columns if longest <= _LETTERS[one_panel] else columns // 2


def _labelled(style: Looks) -> dict[str, Look]:
    return {method.label: look for method, look in style.items()}


def _curves(axes: Axes, panel: Panel, style: Looks, metric: str, axis: Axis) -> None:
    scale = 100 if metric.endswith("accuracy") else 1
    for number, result in enumerate(panel.results):
        curve = result.curve(metric, axis)
        every = max(1, len(curve.x) // _MARKERS)
        look = style[result.cell.method]
        # Markers of different methods at different points, so that none hides another.
        places = (number * every // max(1, len(panel.results)), every)
        axes.plot(curve.x, [scale * y for y in curve.y], markevery=places, **look.line())
        if len(result.runs) > 1:
            axes.fill_between(
                curve.x,
                [scale * y for y in curve.least],
                [scale * y for y in curve.most],
                color=look.color,
                alpha=0.12,
                linewidth=0,
            )


def draw_exposed(results: Sequence[CellResult], path: Path) -> None:
    """Seconds of communication per method, exposed and hidden, one panel a tau and partition.

    The figure beside a bar is the exposed part of the time of training.
    """
    panels = panels_of(results)
    methods = list(dict.fromkeys(result.cell.method for result in results))
    height = 0.35 + 0.2 * len(methods)
    with canvas(len(panels), len(panels[0]), height=height, legend_rows=1) as (figure, axes):
        for row, line in zip(axes, panels, strict=True):
            for cell, panel in zip(row, line, strict=True):
                _bars(cell, panel, methods)
                if len(panels) * len(line) > 1:
                    cell.set_title(panel.title)
            row[0].set_yticks(range(len(methods)), [method.label for method in reversed(methods)])
            row[0].set_ylim(-0.6, len(methods) - 0.4)
        label_axes(axes, "communication (s)", None)
        figure.legend(
            handles=[
                Patch(
                    facecolor="black",
                    edgecolor="black",
                    label="exposed, % of training time",
                ),
                Patch(facecolor="white", edgecolor="black", hatch="/////", label="hidden"),
            ],
            loc="outside lower center",
            ncols=2,
            frameon=False,
            fontsize=FONT_SIZE - 1,
        )
        save(figure, path)


def _bars(axes: Axes, panel: Panel, methods: Sequence[Method]) -> None:
    for result in panel.results:
        row = len(methods) - 1 - methods.index(result.cell.method)
        exposed, hidden = result.figure("seconds_exposed"), result.figure("seconds_hidden")
        seconds = result.figure("seconds")
        if exposed is None or hidden is None or seconds is None:
            text, end = "not measured", 0.0
        else:
            axes.barh(row, exposed.mean, height=0.6, color="black", edgecolor="black")
            axes.barh(
                row,
                hidden.mean,
                left=exposed.mean,
                height=0.6,
                color="white",
                edgecolor="black",
                hatch="/////",
                linewidth=0.6,
            )
            end = exposed.mean + hidden.mean
            text = f"{exposed.mean / seconds.mean:.1%}"
        axes.annotate(
            text,
            (end, row),
            (3, 0),
            textcoords="offset points",
            fontsize=FONT_SIZE - 1.5,
            verticalalignment="center",
        )
    axes.grid(visible=False, axis="y")
    # Room for the figures beside the longest bar.
    axes.margins(x=0.35)


def draw_quality_over_tau(
    quality: Measure, results: Sequence[CellResult], style: Looks, path: Path
) -> None:
    """How good models are against tau, one panel a partition; a bar is a standard deviation."""
    taus = sorted({r.cell.tau for r in results if r.cell.tau is not None})
    places: Places = {tau: str(tau) for tau in taus}
    label = "tau (steps between two averagings)"
    _draw_quality_over(quality, results, style, path, places, lambda cell: cell.tau, label)


def draw_quality_over_lr(
    quality: Measure, results: Sequence[CellResult], style: Looks, path: Path
) -> None:
    """How good models are against the learning rate, likewise."""
    rates = sorted({r.cell.lr for r in results if r.cell.lr is not None})
    places: Places = {lr: f"{lr:g}" for lr in rates}
    _draw_quality_over(quality, results, style, path, places, lambda cell: cell.lr, "learning rate")


def _draw_quality_over(
    quality: Measure,
    results: Sequence[CellResult],
    style: Looks,
    path: Path,
    places: Places,
    place: Callable[[Cell], float | None],
    label: str,
) -> None:
    """The quality at ``places``, that are evenly apart; ``place`` says where a cell belongs."""
    partitions = list(dict.fromkeys(result.cell.partition for result in results))
    columns = _legend_columns(style, one_panel=len(partitions) == 1)
    with canvas(
        1,
        len(partitions),
        height=2.4,
        legend_rows=math.ceil(len(style) / columns),
        sharey=False,
    ) as (
        figure,
        axes,
    ):
        for panel, partition in zip(axes[0], partitions, strict=True):
            if len(partitions) > 1:
                panel.set_title(partition)
            for number, (method, look) in enumerate(style.items()):
                own = {
                    place(r.cell): r
                    for r in results
                    if r.cell.partition == partition and r.cell.method == method
                }
                shift = _DODGE * (number - (len(style) - 1) / 2)
                _quality(panel, quality, own, list(places), look, shift)
            panel.set_xticks(range(len(places)), list(places.values()))
        label_axes(axes, label, quality.heading)
        legend_of_lines(figure, _labelled(style), columns)
        save(figure, path)


def _quality(
    axes: Axes,
    quality: Measure,
    results: Mapping[float | None, CellResult],
    places: Sequence[float],
    look: Look,
    shift: float,
) -> None:
    points = []
    for place, result in results.items():
        found = result.figure(quality.name)
        if found is None:
            continue
        mean, deviation = quality.scale * found.mean, quality.scale * (found.deviation or 0.0)
        if place is None:
            # Synchronised at every step: one value, for all tau.
            axes.axhline(mean, **{**look.line(), "marker": ""})
            axes.axhspan(mean - deviation, mean + deviation, color="0.9", linewidth=0, zorder=0)
        else:
            points.append((places.index(place) + shift, mean, deviation))
    if points:
        x, y, error = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, yerr=error, capsize=2, elinewidth=0.8, **look.line())
