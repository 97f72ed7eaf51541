"""The pictures of a comparison: there, labelled, and readable without colour."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from comparison import pictures
from comparison.grid import parse_method
from comparison.panels import log_ticks, save
from comparison.results import CellResult
from comparison.style import looks
from tests.recipes.recorded_runs import recorded, result, results

NAMES = [
    *("accuracy-megabytes", "accuracy-tau", "exposed"),
    *("loss-megabytes", "loss-seconds", "loss-steps"),
]
LABELS = {
    "loss-megabytes": ("sent by each worker (MB)", "test loss (nats)"),
    "loss-steps": ("optimizer steps", "test loss (nats)"),
    "loss-seconds": ("training time (s)", "test loss (nats)"),
    "accuracy-megabytes": ("sent by each worker (MB)", "test accuracy (%)"),
    "exposed": ("communication (s)", ""),
    "accuracy-tau": ("tau (steps between two averagings)", "test accuracy (%)"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def drawn(folder: Path) -> dict[str, Figure]:
    return draw(results(), folder)


def draw(cells: list[CellResult], folder: Path) -> dict[str, Figure]:
    """The figures by name, and their files in ``folder``."""
    figures = {}

    def kept(figure: Figure, path: Path) -> None:
        figures[path.stem] = figure
        save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "save", kept)
        drawn = pictures.draw_all(cells, folder)
    assert sorted(path.stem for path in drawn) == sorted(figures)
    return figures


def test_all_pictures_are_there(drawn: dict[str, Figure], folder: Path) -> None:
    assert sorted(drawn) == NAMES
    for name in NAMES:
        content = (folder / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


@pytest.mark.parametrize("name", NAMES)
def test_every_axis_has_its_label_and_unit(drawn: dict[str, Figure], name: str) -> None:
    figure = drawn[name]
    x, y = LABELS[name]
    places = [axes.get_subplotspec() for axes in figure.axes]
    for axes, place in zip(figure.axes, places, strict=True):
        assert place is not None
        # Panels beside and above each other share the label at the edge.
        assert axes.get_xlabel() == (x if place.is_last_row() else "")
        assert axes.get_ylabel() == (y if place.is_first_col() else "")
        assert axes.get_title() != ""


def test_nothing_overlaps_the_labels(drawn: dict[str, Figure]) -> None:
    for figure in drawn.values():
        figure.canvas.draw()
        (legend,) = figure.legends
        below = legend.get_window_extent().y1
        lowest = [axes.get_tightbbox() for axes in figure.axes]
        assert all(box is not None and box.y0 >= below for box in lowest)


def test_a_legend_of_long_names_lies_within_the_picture(tmp_path: Path) -> None:
    names = ("overlap-local-sgd:beta=0.7", "easgd", "cocod-sgd", "diloco:outer_momentum=0.5")
    cells = [result(name, tau, [recorded(), recorded()]) for name in names for tau in (2, 8)]
    for name, figure in draw(cells, tmp_path).items():
        figure.canvas.draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1, name


def test_one_cell_fits_a_column(tmp_path: Path) -> None:
    figures = draw(results((8,), non_iid=False), tmp_path)
    # One tau is no axis.
    assert sorted(figures) == sorted(set(NAMES) - {"accuracy-tau"})
    for figure in figures.values():
        (axes,) = figure.axes
        assert figure.get_figwidth() <= 3.5
        sizes = [float(text.get_fontsize()) for text in (axes.xaxis.label, *axes.get_xticklabels())]
        assert min(sizes) >= 7


def test_methods_differ_without_colour() -> None:
    methods = [cell.cell.method for cell in results()]
    found = looks(methods).values()
    assert len({look.dashes for look in found}) >= len(found) - 1
    assert len({(look.marker, look.hollow) for look in found}) == len(found)


def test_an_algorithm_looks_the_same_in_every_comparison() -> None:
    (one,) = looks([result("easgd", 8, []).cell.method]).values()
    assert one in looks([cell.cell.method for cell in results()]).values()


def test_a_curve_is_where_its_records_are(drawn: dict[str, Figure]) -> None:
    panel = drawn["loss-steps"].axes[0]
    for line in panel.get_lines():
        assert list(line.get_xdata()) == [10.0, 20.0]  # type: ignore[arg-type]
        assert list(line.get_ydata()) == [1.0, 0.5]  # type: ignore[arg-type]


def test_bars_are_exposed_and_then_hidden_seconds(drawn: dict[str, Figure]) -> None:
    panel = drawn["exposed"].axes[0]
    bars = [(bar.get_x(), bar.get_width()) for bar in panel.patches]  # type: ignore[attr-defined]
    assert bars == [(0.0, 0.5), (0.5, 1.5)] * 6
    texts = [text.get_text() for text in panel.texts]
    assert texts == ["not measured", *["5.0%"] * 6]


def test_pictures_of_what_was_not_measured_are_left_out(tmp_path: Path) -> None:
    run = recorded(counted=False)
    run.history = [{k: v for k, v in item.items() if "accuracy" not in k} for item in run.history]
    figures = draw([result("ddp", None, [run])], tmp_path)
    assert sorted(figures) == ["loss-megabytes", "loss-seconds", "loss-steps"]


def test_several_learning_rates_make_a_picture_for_each_tau(tmp_path: Path) -> None:
    cells = [
        result(algorithm, tau, [recorded(accuracy=accuracy)], lr=lr)
        for algorithm, tau in (("ddp", None), ("easgd", 2), ("easgd", 8))
        for lr, accuracy in ((0.05, 0.8), (0.15, 0.9))
    ]
    figures = draw(cells, tmp_path)
    assert sorted(figures) == ["accuracy-lr-tau=2", "accuracy-lr-tau=8"]
    for figure in figures.values():
        (axes,) = figure.axes
        assert axes.get_xlabel() == "learning rate"
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.05", "0.15"]
        # Synchronised at every step or not, it was run at every rate.
        curves = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]  # type: ignore[arg-type]
        assert [list(line.get_ydata()) for line in curves[:2]] == [[80.0, 90.0]] * 2  # type: ignore[arg-type]


def test_a_language_models_quality_is_its_bits_per_byte(tmp_path: Path) -> None:
    run = recorded()
    for record in run.history:
        record.pop("eval/accuracy", None)
    run.summary["final/accuracy"] = None
    run.summary["final/bits_per_byte"] = 2.5
    merges = ("diloco", "diloco:delay=tau", "diloco:delay=tau,alpha=0.5", "diloco:merge=carry")
    cells = [result(merge, tau, [run]) for merge in merges for tau in (2, 8)]
    figures = draw(cells, tmp_path)
    assert "bits-per-byte-tau" in figures
    (axes,) = figures["bits-per-byte-tau"].axes
    assert axes.get_ylabel() == "bits per byte"
    found = looks([cell.cell.method for cell in cells]).values()
    assert len({(look.dashes, look.marker, look.hollow) for look in found}) == len(merges)
    assert len({(look.marker, look.hollow) for look in found}) == len(merges)


def test_methods_with_names_look_like_different_algorithms() -> None:
    names = ("blocking", "replaced", "blended", "carried", "streaming", "int8", "int4", "eighth")
    methods = [parse_method(f"{name}=diloco:delay={n}") for n, name in enumerate(names)]
    found = looks([parse_method("ddp"), *methods]).values()
    assert len({look.color for look in found}) == len(found)
    assert len({(look.marker, look.hollow) for look in found}) == len(found)


def test_a_short_axis_has_ticks() -> None:
    axis = Figure().subplots().yaxis
    axis.axes.set_yscale("log")
    for low, high in ((2.3, 3.9), (0.011, 0.02), (1.0, 3.0), (2.0, 90.0)):
        axis.axes.set_ylim(low, high)
        log_ticks(axis)
        assert sum(low <= tick <= high for tick in axis.get_ticklocs()) >= 3
