"""What the cost model says past one machine: curves over bandwidth, for few and many workers."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from commhooks.plan import ALGORITHMS, Network, Work, hiding_tau, predict
from pictures.paper import INK, SMALL, TEXT

__all__ = ["draw_steps", "draw_taus"]

_MODELS = {"11 M": 11e6, "124 M": 124e6, "7 G": 7e9}
_STEP_S = 0.3
_LATENCY_S = 50e-6
_BYTES = 4
_GBITS = [10 ** (exponent / 12) for exponent in range(32)] + [400.0]
_WORKERS = {8: 0.7, 128: 1.4, 1024: 2.2}
_TAU = 32
_CURVES = {"AllReduce": "-", "LocalSGD": "--", "OverlapLocalSGD": ":"}
_BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}


def draw_steps() -> Figure:
    """A step's time, as a multiple of its compute, a panel a model."""
    figure, panels = _panels(len(_MODELS), 1.75)
    for axes, (name, params) in zip(panels, _MODELS.items(), strict=True):
        work = Work(params * _BYTES, _STEP_S)
        for workers, width in _WORKERS.items():
            for algorithm, style in _CURVES.items():

                def multiple(network: Network, work: Work = work, name: str = algorithm) -> float:
                    return predict(_BY_NAME[name], _TAU, work, network).step / work.step

                label = f"{_label(algorithm)}, {workers:,} workers"
                _curve(axes, workers, multiple, style, width, label)
        axes.set_yscale("log")
        ticks = [1, 2, 5, 10, 100, 1000] if params < 1e9 else [1, 10, 100, 1000]
        bottom, top = 0.9, axes.get_ylim()[1]
        axes.set_yticks([tick for tick in ticks if tick < top])
        axes.set_ylim(bottom, top)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{name} parameters", fontsize=TEXT)
        axes.set_ylabel("step / compute", fontsize=SMALL)
    _finish(figure, panels, columns=2)
    return figure


def draw_taus() -> Figure:
    """The smallest tau that hides an all-reduce of the model."""
    figure, panels = _panels(1, 2.6)
    for (name, params), style in zip(_MODELS.items(), ("-", "--", ":"), strict=True):
        work = Work(params * _BYTES, _STEP_S)
        for workers, width in _WORKERS.items():

            def tau(network: Network, work: Work = work) -> float:
                return hiding_tau(work, network)

            _curve(panels[0], workers, tau, style, width, f"{name}, {workers:,} workers")
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("tau (steps)", fontsize=SMALL)
    _finish(figure, panels, columns=2)
    return figure


def _label(algorithm: str) -> str:
    return {
        "AllReduce": "DDP",
        "LocalSGD": f"blocking, tau={_TAU}",
        "OverlapLocalSGD": f"overlapped, tau={_TAU}",
    }[algorithm]


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.5, height * count + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def _curve(
    axes: Axes,
    workers: int,
    value: Callable[[Network], float],
    style: str,
    width: float,
    label: str,
) -> None:
    values = [value(Network(workers, gbits * 1e9, _LATENCY_S)) for gbits in _GBITS]
    axes.plot(_GBITS, values, color=INK, linestyle=style, linewidth=width, label=label)


def _finish(figure: Figure, panels: list[Axes], columns: int) -> None:
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xlim(1, 400)
        axes.set_xticks([1, 10, 25, 100, 400], ["1", "10", "25", "100", "400"])
        axes.minorticks_off()
        axes.tick_params(labelsize=SMALL)
        axes.grid(color="0.9", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("link of a worker (Gbit/s)", fontsize=SMALL)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
    )
