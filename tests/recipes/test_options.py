"""Options: what is passed on, what is refused, and what help says."""

from dataclasses import fields, replace
from typing import Any, Literal, get_args

import pytest

import commhooks
import vision
from common.algorithms import (
    AlgorithmName,
    AlgorithmOptions,
    build_state,
    hyper_parameters,
    island_size,
    run_name,
)
from common.errors import RecipeError
from common.options import read_command_line


def read(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> vision.Config:
    monkeypatch.setattr("sys.argv", ["vision.py", *arguments])
    return read_command_line(vision.Config, "")


@pytest.mark.parametrize(
    ("options", "state"),
    [
        (AlgorithmOptions("all-reduce"), "AllReduce(warmup_steps=0, compression=None)"),
        (AlgorithmOptions("local-sgd", tau=3), "LocalSGD(tau=3, warmup_steps=0, compression=None)"),
        (
            AlgorithmOptions("overlap-local-sgd", beta=0.7, warmup_steps=5),
            "OverlapLocalSGD(tau=8, alpha=0.6, beta=0.7, warmup_steps=5, compression=None)",
        ),
        (AlgorithmOptions("easgd"), "EASGD(tau=8, alpha=None, warmup_steps=0, compression=None)"),
        (AlgorithmOptions("cocod-sgd", tau=1), "CoCoDSGD(tau=1, warmup_steps=0, compression=None)"),
        (
            AlgorithmOptions("bmuf", nesterov=True, eta=0.5),
            "BMUF(tau=8, eta=0.5, zeta=1.0, nesterov=True, warmup_steps=0, compression=None)",
        ),
        (
            AlgorithmOptions("diloco", fragments=4, delay=2, alpha=0.5),
            "DiLoCo(tau=8, outer='torch.optim.sgd.SGD(lr=0.7, momentum=0.9, nesterov=True)', "
            "fragments=4, delay=2, merge='blend', alpha=0.5, warmup_steps=0, compression=None)",
        ),
        (
            AlgorithmOptions("diloco", outer="sgd", outer_lr=1.0, outer_momentum=0.5),
            "DiLoCo(tau=8, outer='torch.optim.sgd.SGD(lr=1.0, momentum=0.5, nesterov=False)', "
            "fragments=1, delay=0, merge='blend', alpha=0.0, warmup_steps=0, compression=None)",
        ),
        (
            AlgorithmOptions("diloco", outer="adamw", outer_lr=0.01, merge="carry", delay="tau"),
            "DiLoCo(tau=8, outer='torch.optim.adamw.AdamW(lr=0.01, weight_decay=0.0)', "
            "fragments=1, delay=8, merge='carry', alpha=0.0, warmup_steps=0, compression=None)",
        ),
        (
            AlgorithmOptions("slowmo", beta=0.7, slow_lr=0.9),
            "SlowMo(tau=8, beta=0.7, lr=0.9, warmup_steps=0, compression=None)",
        ),
        (
            AlgorithmOptions("local-sgd", compression="int4"),
            "LocalSGD(tau=8, warmup_steps=0, compression='int4')",
        ),
    ],
)
def test_options_reach_the_state(options: AlgorithmOptions, state: str) -> None:
    built = build_state(options)
    assert repr(built) == state
    assert built is not None
    assert built.bucket_cap_mb == 25.0


@pytest.mark.parametrize(("island", "size"), [(None, 1), (2, 2), ("node", 3)])
def test_an_island_reaches_the_state(
    island: Literal["node"] | int | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    options = AlgorithmOptions("local-sgd", island=island)
    built = build_state(options)
    assert built is not None
    assert (built.island, island_size(options)) == (island, size)


@pytest.mark.parametrize(("given", "island"), [("node", "node"), ("2", 2)])
def test_the_command_line_knows_islands(
    given: str, island: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read(monkeypatch, "--island", given, "--compression", "bf16")
    assert (config.method.island, config.method.compression) == (island, "bf16")


def test_plain_ddp_has_no_state() -> None:
    assert build_state(AlgorithmOptions("ddp")) is None


def test_dilocos_default_is_the_librarys() -> None:
    built = build_state(AlgorithmOptions("diloco", tau=8))
    assert repr(built) == repr(commhooks.DiLoCo(8))


NOT_NUMBERS = {"nesterov": True, "outer": "sgd", "merge": "carry", "compression": "int8"}


@pytest.mark.parametrize("algorithm", get_args(AlgorithmName))
@pytest.mark.parametrize(
    "name", [f.name for f in fields(AlgorithmOptions) if f.name != "algorithm"]
)
def test_an_option_is_the_algorithms_or_refused(algorithm: AlgorithmName, name: str) -> None:
    value = NOT_NUMBERS.get(name, 1)
    values: dict[str, Any] = {name: value}
    options = replace(AlgorithmOptions(algorithm), **values)
    if name in hyper_parameters(AlgorithmOptions(algorithm)):
        assert hyper_parameters(options)[name] == value
        return
    flag = "--" + name.replace("_", "-")
    with pytest.raises(RecipeError, match=f"{flag}: not an option of {algorithm}"):
        hyper_parameters(options)


@pytest.mark.parametrize(
    ("delay", "steps"), [(3, 3), ("tau", 8), ("tau/4", 2), ("tau/3", 2), ("tau/16", 0)]
)
def test_a_delay_may_be_a_part_of_tau(delay: int | str, steps: int) -> None:
    assert hyper_parameters(AlgorithmOptions("diloco", tau=8, delay=delay))["delay"] == steps


@pytest.mark.parametrize("delay", ["soon", "tau/", "tau/0", "tau/x", "2tau", "tau/-2", ""])
def test_what_is_no_delay_is_refused(delay: str) -> None:
    with pytest.raises(RecipeError, match="write a number of steps, tau, or tau/4"):
        hyper_parameters(AlgorithmOptions("diloco", delay=delay))


def test_a_delay_above_tau_is_refused() -> None:
    with pytest.raises(commhooks.HyperParameterError, match="delay must be at most tau"):
        build_state(AlgorithmOptions("diloco", tau=8, delay=9))


def test_an_outer_adamw_has_a_rate_of_its_own_and_no_momentum() -> None:
    with pytest.raises(RecipeError, match="needs an --outer-lr"):
        hyper_parameters(AlgorithmOptions("diloco", outer="adamw"))
    with pytest.raises(RecipeError, match="--outer-momentum: not an option"):
        hyper_parameters(AlgorithmOptions("diloco", outer="adamw", outer_lr=1, outer_momentum=0.9))


def test_an_outer_momentum_of_zero_is_plain_sgd() -> None:
    """torch refuses it together with Nesterov's form, which is the default."""
    state = build_state(AlgorithmOptions("diloco", outer_momentum=0.0))
    assert "momentum=0.0, nesterov=False" in repr(state)


def test_zero_is_a_value_and_is_refused_as_one() -> None:
    """Equal to False, which is how an option that was not given looks."""
    with pytest.raises(commhooks.HyperParameterError, match="tau"):
        build_state(AlgorithmOptions("local-sgd", tau=0))
    with pytest.raises(RecipeError, match="--beta"):
        build_state(AlgorithmOptions("local-sgd", beta=0.0))


def name(options: AlgorithmOptions, *, lr: float = 0.05, seed: int = 0) -> str:
    return run_name(options, lr=lr, seed=seed, others=("major-class", "2w"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (AlgorithmOptions("ddp"), "ddp lr0.05 s0 major-class 2w"),
        (AlgorithmOptions("easgd"), "easgd t8 lr0.05 s0 major-class 2w"),
        # A default that is said is a default.
        (
            AlgorithmOptions("overlap-local-sgd", tau=16, alpha=0.6, beta=0.7),
            "overlap t16 lr0.05 s0 b0.7 major-class 2w",
        ),
        (
            AlgorithmOptions("bmuf", tau=2, nesterov=True, warmup_steps=9),
            "bmuf t2 lr0.05 s0 nesterov w9 major-class 2w",
        ),
        (
            AlgorithmOptions("local-sgd", bucket_cap_mb=1.0),
            "local t8 lr0.05 s0 major-class 2w",
        ),
        (
            AlgorithmOptions("diloco", tau=16, delay="tau/4", fragments=4, alpha=0.5),
            "diloco t16 lr0.05 s0 f4 d4 a0.5 major-class 2w",
        ),
        (
            AlgorithmOptions("diloco", outer="sgd", outer_lr=1.0, delay=2, merge="carry"),
            "diloco t8 lr0.05 s0 sgd olr1 d2 carry major-class 2w",
        ),
        (AlgorithmOptions("slowmo", slow_lr=0.9), "slowmo t8 lr0.05 s0 slr0.9 major-class 2w"),
    ],
)
def test_a_run_says_what_it_is(options: AlgorithmOptions, expected: str) -> None:
    assert name(options) == expected


def test_the_beginnings_of_names_tell_runs_apart() -> None:
    """Lists of runs, such as that of `wandb leet`, show no more."""
    overlap = AlgorithmOptions("overlap-local-sgd", tau=16, beta=0.7)
    names = [
        name(overlap),
        name(overlap, lr=0.15),
        name(overlap, seed=1),
        name(replace(overlap, tau=160)),
        name(replace(overlap, beta=0.75)),
        name(replace(overlap, beta=None)),
        name(replace(overlap, alpha=0.5)),
        name(AlgorithmOptions("cocod-sgd", tau=16)),
        name(AlgorithmOptions("bmuf", tau=16, eta=0.25)),
        name(AlgorithmOptions("bmuf", tau=16, eta=0.25, zeta=1.25)),
    ]
    assert len({each[:30] for each in names}) == len(names)


def test_the_command_line_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read(
        monkeypatch,
        *("--algorithm", "bmuf", "--tau", "4", "--nesterov", "--partition", "dirichlet"),
        *("--lr-milestones", "3", "4.5", "--mixed-precision", "bf16", "--tags", "a", "b"),
    )
    assert config.method == AlgorithmOptions("bmuf", tau=4, nesterov=True)
    assert config.data.partition == "dirichlet"
    assert config.training.lr_milestones == (3.0, 4.5)
    assert config.run.mixed_precision == "bf16"
    assert config.run.tags == ("a", "b")


def test_the_command_line_of_diloco(monkeypatch: pytest.MonkeyPatch) -> None:
    options = (
        *("--algorithm", "diloco", "--tau", "16", "--outer", "sgd", "--outer-lr", "0.9"),
        *("--outer-momentum", "0.8", "--fragments", "4", "--delay", "tau/4", "--merge", "carry"),
    )
    expected = AlgorithmOptions(
        "diloco",
        tau=16,
        outer="sgd",
        outer_lr=0.9,
        outer_momentum=0.8,
        fragments=4,
        delay="tau/4",
        merge="carry",
    )
    assert read(monkeypatch, *options).method == expected
    assert read(monkeypatch, "--algorithm", "diloco", "--delay", "3").method.delay == 3
    config = read(monkeypatch, "--algorithm", "slowmo", "--beta", "0.7", "--slow-lr", "0.9")
    assert config.method == AlgorithmOptions("slowmo", beta=0.7, slow_lr=0.9)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--max-steps", "0"], "--max-steps must be at least 1, not 0"),
        (["--batch-size", "-4"], "--batch-size must be at least 1, not -4"),
        (["--lr-decay", "nan"], "--lr-decay must be at least 0, not nan"),
        (["--tau", "often"], "--tau"),
        (["--algorithm", "sgd"], "overlap-local-sgd"),
        (["--gamma", "1"], "--gamma"),
    ],
)
def test_bad_values_say_what_is_wrong(
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        read(monkeypatch, *arguments)
    assert exit_status.value.code == 2
    assert says in capsys.readouterr().err


def test_one_worker_speaks_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        read(monkeypatch, "--epochs", "0")
    assert capsys.readouterr() == ("", "")


def test_help_explains_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_status:
        read(monkeypatch, "--help")
    assert exit_status.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for group in ("method", "training", "data", "run"):
        assert f"{group} options" in text
    for flag in ("--algorithm", "--tau", "--partition", "--mixed-precision", "--wandb", "--json"):
        assert flag in text
    # What tyro prints for an optional value, unless told what to say.
    assert "{None}" not in text
    assert "(default: None)" not in text
