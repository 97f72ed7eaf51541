"""``python -m commhooks.plan``: what it prints, and what it refuses."""

import subprocess
import sys

import pytest

from commhooks import plan
from commhooks.plan import ALGORITHMS, algorithms

GPT2 = "--params 124e6 --step-ms 300 --bandwidth 1gbit --latency-ms 0.5 --ranks 16"
SMALL = "--params 1e6 --step-ms 10 --bandwidth 1gbit --ranks 2"


def printed(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    plan.main(words.split())
    return capsys.readouterr().out


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "commhooks.plan", *GPT2.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'First choice: commhooks.OverlapLocalSGD(tau=5, beta=0.7, compression="int4")' in (
        done.stdout
    )
    assert "Learning rate: DDP's times state.lr_factor: 1.5, then try 3." in done.stdout


def test_a_fixed_tau_shows_every_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(f"{GPT2} --tau 8", capsys)
    assert all(algorithm.name in out for algorithm in ALGORITHMS)
    assert "The smallest tau that hides it under the steps is 27." in out
    assert "One of a fragment (4 in all) takes 2,019.9 ms, which a delay of 7 hides." in out


def test_a_number_of_fragments(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(f"{SMALL} --tau 16 --fragments 8", capsys)
    assert "DiLoCo, fragments=8, delay=tau/8" in out
    assert algorithms(8)[7].delay_steps(16) == 2


@pytest.mark.parametrize("option", ["--per-node 8", "--island 8"])
def test_machines_of_several_ranks(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(f"{GPT2} {option}", capsys)
    assert 'compression="int8", island="node")' in out


def test_one_compression_and_a_limit_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(f"{GPT2} --compression bf16 --memory-mb 2500", capsys)
    assert "int8" not in out
    assert "First choice: commhooks.CoCoDSGD" not in out
    assert 'First choice: commhooks.OverlapLocalSGD(tau=17, compression="bf16")' in out


def test_slow_rounding_needs_a_larger_tau(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{GPT2} --compression int4"
    assert "tau=5," in printed(words, capsys)
    assert "tau=9," in printed(f"{words} --encode-gbs 1", capsys)


def test_the_usual_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    plain = printed("--params 350e6 --step-ms 500 --bandwidth 100mbit --ranks 2", capsys)
    assert printed("--params 350M --step-ms 500 --bandwidth 100Mbps --ranks 2", capsys) == plain


def test_what_a_longer_tau_would_hide_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Exact rounds and those in bf16 are cut at the longest tau that is tried, or left out."""
    words = "--params 350M --step-ms 800 --bandwidth 100Mbps --ranks 2 --latency-ms 20"
    assert "would need 182 (exact)." in printed(words, capsys)
    out = printed(f"{words} --longest-tau 64", capsys)
    assert "would need 182 (exact), 91 (bf16)." in out
    out = printed(f"{words} --longest-tau 182 --rows 20", capsys)
    assert "was tried" not in out
    exact = next(line for line in out.splitlines() if "Overlap" in line and "exact" in line)
    assert " 182 " in exact


def test_the_latency_is_said_to_be_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    assert "one way, half of a ping" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--params 1e6 --step-ms 10", "--bandwidth, --ranks must be given, or --measure"),
        ("--params 1e6 --bandwidth 1gbit --ranks 2", "--step-ms must be given"),
        (f"{SMALL} --step train:step", "--step is for --measure"),
        (f"{SMALL} --fragments 0", "0 is not 1 or more"),
        (f"{SMALL} --tau 0", "0 is not 1 or more"),
        (f"{SMALL} --latency-ms -1", "no latency below 0"),
        (f"{SMALL} --ranks 1", "there must be 2 ranks at least"),
        (f"{SMALL} --island 2", "must divide --ranks, into 2 machines at least"),
        (f"{SMALL} --ranks 8 --per-node 3", "must divide --ranks"),
        (f"{SMALL} --ranks 8 --per-node 4 --island 2", "must be the same number"),
        (f"{SMALL} --bandwidth fast", "is no rate"),
        (f"{SMALL} --params 1k5", "is no number above 0"),
        ("--measure --params 1e6", "needs one of --step-ms and --step"),
        ("--measure --params 1e6 --step-ms 1 --step a:b", "needs one of --step-ms and --step"),
        ("--measure --params 1e6 --step-ms 1 --ranks 2", "finds out by itself: --ranks"),
        ("--measure --params 1e6 --step train", "wants module:function"),
    ],
)
def test_refusals(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        plan.main(words.split())
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err
