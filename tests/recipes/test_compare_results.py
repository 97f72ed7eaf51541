"""The figures of a comparison, from runs whose figures are known."""

import math

import pytest
from rich.console import Console

from comparison.results import AXES, CellResult, Spread, best_rates, spread, sweeps_rates
from comparison.tables import markdown, terminal_tables
from tests.recipes.recorded_runs import recorded, result, results


def test_mean_and_sample_standard_deviation() -> None:
    found = spread([0.90, 0.92, 0.97])
    assert found.mean == pytest.approx(0.93)
    # sqrt((0.03^2 + 0.01^2 + 0.04^2) / 2)
    assert found.deviation == pytest.approx(0.0360555, abs=1e-7)
    assert found.count == 3


def test_one_seed_has_no_spread() -> None:
    assert spread([0.5]) == Spread(0.5, None, 1)


@pytest.mark.parametrize("value", [None, "Infinity"])
def test_a_seed_that_diverged_is_not_averaged_away(value: str | None) -> None:
    """W&B 0.31 writes infinity as a string, and NaN in a summary as null."""
    diverged = recorded()
    diverged.summary["final/loss"] = value
    cell = result("easgd", 8, [recorded(), diverged])
    figure = cell.figure("loss")
    assert figure is not None
    assert math.isnan(figure.mean)
    assert "diverged" in page([cell])


def test_what_was_not_measured_is_none() -> None:
    cell = result("ddp", None, [recorded(counted=False)])
    assert cell.figure("seconds_exposed") is None
    assert cell.figure("bits_per_byte") is None


def test_a_curve_is_the_mean_of_its_seeds_along_both_axes() -> None:
    cell = result("easgd", 8, [recorded(seconds=10, accuracy=0.8), recorded(seconds=14)])
    curve = cell.curve("eval/accuracy", AXES["seconds"])
    assert curve.x == [6.0, 12.0]
    assert curve.y == pytest.approx([0.425, 0.85])
    assert curve.least == pytest.approx([0.4, 0.8])
    assert curve.most == pytest.approx([0.45, 0.9])
    assert cell.curve("eval/loss", AXES["steps"]).x == [10.0, 20.0]


def test_megabytes_are_those_on_a_link() -> None:
    """A ring of 4 sends 2 (4 - 1) / 4 of the payload: 1.5 times 1 MB and 3 MB."""
    curve = result("easgd", 8, [recorded()]).curve("eval/accuracy", AXES["megabytes"])
    assert curve.x == [1.5, 4.5]


def test_plain_ddp_sends_the_same_at_every_step() -> None:
    cell = result("ddp", None, [recorded(counted=False)])
    assert cell.curve("eval/accuracy", AXES["megabytes"]).x == [2.25, 4.5]


def test_what_is_sent_until_a_model_is_good() -> None:
    """The mean over seeds of the first evaluation that is good enough, if all of them have one."""
    good = recorded(accuracy=0.96)
    early = recorded(accuracy=0.96)
    early.history[1]["eval/accuracy"] = 0.95
    cell = result("easgd", 8, [good, early])
    assert cell.reached("eval/accuracy", 0.95, AXES["megabytes"]) == spread([4.5, 1.5])
    assert "| 2 | 3.0 |" in page([cell])
    cell = result("easgd", 8, [good, recorded()])
    assert cell.reached("eval/accuracy", 0.95, AXES["megabytes"]) is None
    assert "| 2 | never |" in page([cell])


def test_the_best_learning_rate_is_the_one_with_the_least_loss() -> None:
    cells = []
    for lr, loss in ((0.1, 0.5), (0.2, 0.4), (0.4, None)):
        run = recorded()
        run.summary["final/loss"] = loss
        cells.append(result("easgd", 8, [run], lr=lr))
    assert sweeps_rates(cells)
    assert [cell.lr for cell in best_rates(cells)] == [0.2]
    others = [result("easgd", 24, [recorded()], lr=0.1), result("ddp", None, [recorded()], lr=0.4)]
    assert [cell.lr for cell in best_rates([*cells, *others])] == [0.2, 0.1, 0.4]
    assert not sweeps_rates([cells[1], *others])
    lines = page([cells[1], *others]).splitlines()
    assert "| easgd | | 90.0 | 90.0 |".replace("| |", "|  |") in lines


def test_nothing_sent_has_no_place_on_a_logarithmic_axis() -> None:
    early = recorded()
    early.history = [{**record, "comm/bytes_reduced": 0} for record in early.history[:2]]
    cell = result("easgd", 24, [early])
    assert cell.curve("eval/accuracy", AXES["megabytes"]).x == []
    assert cell.curve("eval/accuracy", AXES["steps"]).x == [10.0]


def test_markdown_has_every_figure_with_its_spread() -> None:
    found = page(results((8,), non_iid=False))
    # 0.9 and 0.94 for DDP; 0.8 and 0.9 for the others.
    ddp = "| ddp | - | 92.0±2.8 | 0.500±0.000 | 0.250±0.000 | 10.0±0.0 | - | - | 4.5 | 2 | never |"
    easgd = "| easgd | 8 | 85.0±7.1 | 0.500±0.000 | 0.250±0.000 | 10.0±0.0 "
    assert ddp in found.splitlines()
    assert easgd in found
    assert "| 0.50±0.00 | 1.50±0.00 | 4.5 | 2 | never |" in found
    assert "`the command`" in found
    assert "the details" in found
    # One tau is nothing to spread over columns.
    assert "every step" not in found


def test_several_tau_stand_side_by_side() -> None:
    lines = page(results((2, 8))).splitlines()
    for title in ("**Test accuracy (%), iid**", "**Test accuracy (%), major-class**"):
        start = lines.index(title)
        assert lines[start + 2] == "|  | every step | tau=2 | tau=8 |"
        assert lines[start + 4] == "| ddp | 92.0±2.8 |  |  |"
        assert lines[start + 5] == "| local-sgd |  | 85.0±7.1 | 85.0±7.1 |"
    assert {"**Iid**", "**Major-class**"} <= set(lines)


def test_a_language_model_is_judged_by_bits_per_byte() -> None:
    runs = [recorded(), recorded()]
    for run, bits in zip(runs, (2.0, 2.5), strict=True):
        # As W&B writes what a recipe does not measure.
        run.summary["final/accuracy"] = None
        run.summary["final/bits_per_byte"] = bits
    found = page([result("local-sgd", 8, runs)])
    assert "bits per byte" in found
    assert "2.250±0.354" in found
    assert "accuracy" not in found


def test_the_terminal_shows_all_of_it() -> None:
    slow = recorded(seconds=1234.5)
    shown = printed([*results(), result("bmuf:eta=0.75,nesterov=1", 128, [slow, recorded()])])
    assert "…" not in shown
    for text in ("bmuf eta=0.75 nesterov=1", "92.0±2.8", "622.2±865.9", "not measured"):
        assert text in shown


def test_figures_are_whole_however_long_a_name_is() -> None:
    method = "overlap-local-sgd:alpha=0.65,beta=0.75,warmup-steps=1000,bucket-cap-mb=12.5"
    slow = [recorded(seconds=1234.5), recorded(seconds=4321.5)]
    shown = printed([result(method, 128, slow, lr=lr) for lr in (0.025, 0.05)])
    assert "…" not in shown
    # 1234.5 and 4321.5: their mean, and 3087 / sqrt(2).
    for figure in ("90.0±0.0", "2,778.0±2182.8", "0.50±0.00", "0.025", "128"):
        assert figure in shown
    assert all(len(line.rstrip()) <= 120 for line in shown.splitlines())


def test_learning_rates_stand_side_by_side() -> None:
    cells = [
        result(algorithm, tau, [recorded(accuracy=accuracy)], lr=lr)
        for algorithm, tau, accuracies in (("ddp", None, (0.8, 0.9)), ("easgd", 8, (0.7, 0.85)))
        for lr, accuracy in zip((0.05, 0.15), accuracies, strict=True)
    ]
    lines = page(cells).splitlines()
    start = lines.index("**Test accuracy (%), iid**")
    assert lines[start + 2] == "|  | lr=0.05 | lr=0.15 |"
    assert lines[start + 4 : start + 6] == [
        "| ddp | 80.0 | 90.0 |",
        "| easgd tau=8 | 70.0 | 85.0 |",
    ]
    assert any(line.startswith("| easgd | 8 | 0.15 | 85.0 |") for line in lines)


def printed(cells: list[CellResult]) -> str:
    """What a terminal of 120 columns shows."""
    console = Console(width=120)
    with console.capture() as captured:
        for table in terminal_tables(cells, "a title"):
            console.print(table)
    return captured.get()


def page(cells: list[CellResult]) -> str:
    return markdown(cells, command="the command", details="the details")
