"""The benchmark, in its small form and through its command line. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.bars import measured_bars
from benchmark.contenders import DELAYED, FLAT, ISLANDS, STREAMING, TORCHFT_DELAYED
from benchmark.results import Cell, Line, lines
from network.sandbox import refusal
from tests.harness import scaled

BENCH = Path(__file__).parents[2] / "recipes" / "bench.py"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_quick_form_measures_every_contender(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--output-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=scaled(390),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    every_race = [record for record in records if record["measurement"] == "race"]
    races = [record for record in every_race if record["per_node"] == 1]
    names = {record["contender"] for record in races}
    assert {"no communication", "DDP", "accelerate LocalSGD"} < names
    assert sum(name.startswith("commhooks") for name in names) == 13
    # Every algorithm, and each of its lines, in every cell.
    cells = {(record["ranks"], record["rate"]) for record in races}
    for cell in cells:
        assert names == {r["contender"] for r in races if (r["ranks"], r["rate"]) == cell}
    machines = {r["contender"]: r for r in every_race if r["per_node"] == 2}
    assert {"no communication", "DDP", "torch post_localSGD, averager", FLAT} < set(machines)
    assert sum(name.startswith(ISLANDS) for name in machines) == 4
    assert len([r for r in records if r["measurement"] == "overheads"]) == 6
    assert len([r for r in records if r["measurement"] == "boundaries"]) == 13
    shared = [r for r in records if r["measurement"] == "shared"]
    assert [r["algorithm"] for r in shared] == ["OverlapLocalSGD", "DiLoCo, carry"]
    for record in shared:
        # Half of the vectors, a model to put the halves together in, and room for a chunk.
        assert record["extra_shared"] < record["extra_alone"] / 2 + 1.3
    assert (folder / "bench.png").stat().st_size > 10_000
    assert list(folder.glob("wandb/offline-run-*"))
    if refusal() is None:
        # Bytes are no times: a ring over 2 ranks sends every parameter once, plus headers.
        by_name = {r["contender"]: r for r in races if r["ranks"] == 2}
        for name in ("DDP", "commhooks LocalSGD", "commhooks OverlapLocalSGD"):
            sample = by_name[name]
            assert 1.0 < sample["sent"] / sample["parameters"] < 1.10, name
        streaming = by_name["commhooks DiLoCo, 4 fragments"]
        assert 1.0 < streaming["sent"] / streaming["parameters"] < 1.15
        assert by_name["no communication"]["sent"] < 0.01 * by_name["DDP"]["parameters"]
        # A machine's ranks together send every parameter once, and flat ones half as much more.
        for name, models in ((FLAT, 1.5), (f"{ISLANDS} OverlapLocalSGD", 1.0)):
            sample = machines[name]
            assert 0.95 < sample["sent"] / sample["parameters"] / models < 1.10, name
        alone = machines["no communication"]
        assert alone["sent"] < 0.01 * alone["parameters"]


def test_a_sample_is_compared_within_its_repeat() -> None:
    samples = [
        _sample("no communication", 0, 1.0),
        _sample("DDP", 0, 3.0),
        _sample("no communication", 1, 2.0),
        _sample("DDP", 1, 8.0),
    ]
    baseline, ddp = lines(samples, tau=4)
    assert baseline.multiple == (1.0, 1.0, 1.0)
    assert ddp.multiple == (3.5, 3.0, 4.0)


def test_what_streaming_sends_in_a_step_is_compared_where_no_link_spreads_it() -> None:
    results = {
        Cell(2, "unshaped", "pretend"): [_line(DELAYED, 40.0, 1.0), _line(STREAMING, 10.0, 1.0)],
        Cell(2, "200mbit", "pretend"): [
            *(_line(DELAYED, 7.5, 1.005), _line(STREAMING, 7.5, 1.002)),
            _line(TORCHFT_DELAYED, 7.5, 1.2),
        ],
    }
    bars = {bar.what: bar for bar in measured_bars(results, {})}
    (peak,) = (bar for what, bar in bars.items() if "the most sent" in what)
    assert (peak.bar, peak.measured) == ("at most 0.3", "0.25")
    (ours,) = (bar for what, bar in bars.items() if "4 fragments, 2 ranks" in what)
    assert ours.measured == "1.002 to 1.005"
    (theirs,) = (bar for what, bar in bars.items() if "torchft" in what)
    assert theirs.measured == "1.200"


def test_islands_are_held_to_what_they_share_out() -> None:
    shared = {
        "algorithm": "LocalSGD",
        "parameters": 25 * 2**18,
        "island": 4,
        "above": (0.5, 0.2, 1.5),
        "extra_alone": 4.0,
        "extra_shared": 2.25,
    }
    boundary, memory = measured_bars({}, {"shared": [shared]})
    assert (boundary.bar, boundary.measured) == ("at most 1", "0.50")
    # A model is a bucket here, and the islands keep a quarter of one more than they should.
    assert (memory.bar, memory.measured) == ("at most 1", "0.25")


def _line(contender: str, peak_sent: float, multiple: float) -> Line:
    return Line(
        contender=contender,
        kind="overlapped",
        multiple=(multiple,) * 3,
        above=0.0,
        exposed=0.0,
        hidden=0.0,
        sent=None,
        sent_per_step=None,
        peak_sent=peak_sent,
        peak=1.0,
        samples=1,
        step_seconds=0.3,
        parameters=1,
    )


def _sample(contender: str, repeat: int, seconds: float) -> dict[str, object]:
    return {
        "contender": contender,
        "kind": "step",
        "repeat": repeat,
        "steps": 2,
        "seconds": seconds,
        "exposed": None,
        "hidden": None,
        "sent": None,
        "peak_sent": None,
        "peak": 1,
        "parameters": 1,
    }
