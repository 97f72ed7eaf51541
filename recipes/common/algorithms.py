"""The library's algorithms under the names that the recipes' options use."""

import inspect
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import tyro
from torch.optim import SGD, AdamW

import commhooks
import common.without_feedback  # noqa: F401 - an option of the recipes
from commhooks import CommHookState
from common.errors import RecipeError
from common.launch import MARK
from common.session import is_main_worker

__all__ = [
    "AlgorithmName",
    "AlgorithmOptions",
    "build_state",
    "hyper_parameters",
    "island_size",
    "run_name",
    "tell_of_rate",
]

AlgorithmName = Literal[
    "ddp",
    "all-reduce",
    "local-sgd",
    "overlap-local-sgd",
    "easgd",
    "cocod-sgd",
    "bmuf",
    "diloco",
    "slowmo",
]
OuterName = Literal["nesterov", "sgd", "adamw"]

_STATES: dict[AlgorithmName, type[CommHookState]] = {
    "all-reduce": commhooks.AllReduce,
    "local-sgd": commhooks.LocalSGD,
    "overlap-local-sgd": commhooks.OverlapLocalSGD,
    "easgd": commhooks.EASGD,
    "cocod-sgd": commhooks.CoCoDSGD,
    "bmuf": commhooks.BMUF,
    "diloco": commhooks.DiLoCo,
    "slowmo": commhooks.SlowMo,
}
# Arguments of a state that no option sets.
_NO_OPTIONS = ("process_group", "average_buffers")
# --lr is the learning rate of the workers' own optimizer.
_OPTION_NAMES = {"lr": "slow_lr"}
# The library leaves tau to its user, since it depends on the network; so must a recipe's default.
_DEFAULT_TAU = 8
# A learning rate is seldom known more closely; the library says nothing of less, either.
_NOTABLE_RATE = math.log(1.3)
# What a run's name says for them: lists of runs show the first 30 letters or so.
_SHORT_NAMES: dict[str, str] = {
    "all-reduce": "allreduce",
    "local-sgd": "local",
    "overlap-local-sgd": "overlap",
    "cocod-sgd": "cocod",
}
_SHORT_OPTIONS = {
    "tau": "t",
    "alpha": "a",
    "beta": "b",
    "eta": "e",
    "zeta": "z",
    "warmup_steps": "w",
    "fragments": "f",
    "delay": "d",
    "outer_lr": "olr",
    "outer_momentum": "om",
    "slow_lr": "slr",
    # Their values say what they are.
    "outer": "",
    "merge": "",
    "compression": "",
}

_hint = tyro.conf.arg


@dataclass(frozen=True)
class AlgorithmOptions:
    """How the workers agree on one model. An option the algorithm does not have is an error."""

    algorithm: AlgorithmName = "overlap-local-sgd"
    """ddp is PyTorch alone, without a hook; all-reduce is the same mathematics through the library,
    which then also measures its communication."""
    tau: Annotated[
        int | Literal["auto"] | None,
        _hint(metavar="STEPS|auto", help_behavior_hint="(default: 8)"),
    ] = None
    """Steps between two averagings of the parameters; auto takes as few as hide one."""
    alpha: Annotated[
        float | None,
        _hint(metavar="FLOAT", help_behavior_hint="(default: 0.6; easgd: 0.9/workers; diloco: 0)"),
    ] = None
    """overlap-local-sgd, easgd: how strongly a worker is drawn to the anchor; diloco: the weight of
    the worker's own model in a blend, where 0 replaces it."""
    beta: Annotated[
        float | None, _hint(metavar="FLOAT", help_behavior_hint="(default: 0; slowmo: 0.5)")
    ] = None
    """overlap-local-sgd: momentum of the anchor; slowmo: the slow momentum."""
    eta: Annotated[
        float | None, _hint(metavar="FLOAT", help_behavior_hint="(default: 1-1/workers)")
    ] = None
    """bmuf: block momentum."""
    zeta: Annotated[float | None, _hint(metavar="FLOAT", help_behavior_hint="(default: 1)")] = None
    """bmuf: block learning rate."""
    nesterov: tyro.conf.FlagCreatePairsOff[bool] = False
    """bmuf: Nesterov block momentum."""
    outer: Annotated[
        OuterName | None,
        _hint(metavar="nesterov|sgd|adamw", help_behavior_hint="(default: nesterov)"),
    ] = None
    """diloco: the outer optimizer; SGD with Nesterov's momentum, SGD with the common one, AdamW."""
    outer_lr: Annotated[
        float | None, _hint(metavar="RATE", help_behavior_hint="(default: 0.7; adamw: none)")
    ] = None
    """diloco: learning rate of the outer optimizer. AdamW moves every parameter by about as much in
    each round."""
    outer_momentum: Annotated[
        float | None, _hint(metavar="FLOAT", help_behavior_hint="(default: 0.9; adamw: none)")
    ] = None
    """diloco: momentum of the outer optimizer."""
    fragments: Annotated[int | None, _hint(metavar="INT", help_behavior_hint="(default: 1)")] = None
    """diloco: parts of the model that are averaged in turn."""
    delay: Annotated[
        int | str | None, _hint(metavar="STEPS|tau|tau/INT", help_behavior_hint="(default: 0)")
    ] = None
    """diloco: steps from the launch of a round to its use; 0 waits for it."""
    merge: Annotated[
        Literal["blend", "carry"] | None,
        _hint(metavar="blend|carry", help_behavior_hint="(default: blend)"),
    ] = None
    """diloco: how a worker takes the result up; carry keeps what it has learnt in the meantime."""
    slow_lr: Annotated[float | None, _hint(metavar="RATE", help_behavior_hint="(default: 1)")] = (
        None
    )
    """slowmo: the slow learning rate."""
    warmup_steps: Annotated[
        int | None, _hint(metavar="STEPS", help_behavior_hint="(default: 0)")
    ] = None
    """Steps at the start during which gradients are averaged, as plain DDP does."""
    bucket_cap_mb: Annotated[
        float | None, _hint(metavar="MB", help_behavior_hint="(default: 25)")
    ] = None
    """Largest message of a parameter averaging."""
    island: Annotated[
        Literal["node"] | int | None,
        _hint(metavar="node|INT", help_behavior_hint="(default: 1)"),
    ] = None
    """Ranks that average gradients at every step and so make one worker: node, those of a machine;
    or a number of neighbouring ranks."""
    compression: Annotated[
        Literal["bf16", "int8", "int4", "int4-without-feedback"] | None,
        _hint(metavar="bf16|int8|int4", help_behavior_hint="(default: none, fp32)"),
    ] = None
    """What the numbers of an averaging are rounded to; what is rounded off is sent later. For
    comparison, int4-without-feedback forgets it."""

    def given(self) -> dict[str, Any]:
        """The hyper-parameters set on the command line."""
        options = asdict(self)
        del options["algorithm"]
        # Not `in (None, False)`: 0 equals False, and is something to refuse.
        return {
            name: value
            for name, value in options.items()
            if value is not None and value is not False
        }


def hyper_parameters(options: AlgorithmOptions) -> dict[str, Any]:
    """All hyper-parameters of the chosen algorithm, the library's defaults filled in.

    Raises:
        RecipeError: an option was given that the algorithm does not have, or cannot be read.
    """
    defaults = _defaults(options.algorithm)
    given = options.given()
    if given.get("outer") == "adamw":
        # It has no momentum, and a good rate depends on how far a round goes.
        del defaults["outer_lr"], defaults["outer_momentum"]
        if "outer_lr" not in given:
            raise RecipeError("--outer adamw needs an --outer-lr, such as 0.01")
        defaults["outer_lr"] = given["outer_lr"]
    foreign = [_flag(name) for name in given if name not in defaults]
    if foreign:
        own = ", ".join(_flag(name) for name in defaults) or "none"
        raise RecipeError(
            f"{', '.join(foreign)}: not an option of {options.algorithm}; its own are: {own}"
        )
    found = {**defaults, **given}
    if "delay" in found:
        found["delay"] = _steps(found["delay"], found["tau"])
    return found


def island_size(options: AlgorithmOptions) -> int:
    """How many ranks make one worker."""
    if options.island == "node":
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return options.island or 1


def run_name(options: AlgorithmOptions, *, lr: float, seed: int, others: Sequence[str]) -> str:
    """What a run is called: ``overlap t8 lr0.05 s0 b0.7 iid 2w``.

    What tells most runs apart comes first: algorithm, tau, learning rate and seed. Then come the
    hyper-parameters that are not at their defaults, each with the first letter of its name.

    Args:
        options: the algorithm.
        lr: learning rate.
        seed: of the run.
        others: further words, the most important first.
    """
    defaults = _defaults(options.algorithm)
    changed = {
        name: value
        for name, value in hyper_parameters(options).items()
        # Messages of another size carry the same numbers.
        if name not in ("tau", "bucket_cap_mb") and value != defaults[name]
    }
    tau = hyper_parameters(options).get("tau")
    words = [_SHORT_NAMES.get(options.algorithm, options.algorithm)]
    words += [] if tau is None else [_word("tau", tau)]
    words += [f"lr{lr:g}", f"s{seed}"]
    return " ".join([*words, *(_word(*pair) for pair in changed.items()), *others])


def _word(name: str, value: Any) -> str:
    """A hyper-parameter in a name; one that is either on or off by its name alone."""
    if value is True:
        return name
    short = _SHORT_OPTIONS.get(name, f"{name}=")
    return f"{short}{value:g}" if isinstance(value, int | float) else f"{short}{value}"


def build_state(options: AlgorithmOptions) -> CommHookState | None:
    """The state to register, or None for plain DDP.

    Raises:
        RecipeError: an option was given that the algorithm does not have.
        HyperParameterError: an option has a value outside its range.
    """
    arguments = hyper_parameters(options)
    if options.algorithm == "ddp":
        return None
    if options.algorithm == "diloco":
        arguments["outer"] = _outer(
            arguments["outer"], arguments.pop("outer_lr"), arguments.pop("outer_momentum", 0.0)
        )
    names = {option: name for name, option in _OPTION_NAMES.items()}
    return _STATES[options.algorithm](
        **{names.get(option, option): value for option, value in arguments.items()}
    )


def tell_of_rate(state: CommHookState, cure: str) -> None:
    """Say, on one worker, that DDP's learning rate is not right for this algorithm, if it is not.

    The library would say so at registration, but knows no options. Nothing is said where a program
    of the recipes, such as demo.py, has chosen the options.

    Args:
        state: the algorithm, once there is a process group.
        cure: what to do, in a sentence.
    """
    factor = state.lr_factor
    if MARK in os.environ or not is_main_worker():
        return
    if abs(math.log(factor)) > _NOTABLE_RATE:
        sys.stderr.write(
            f"{type(state).__name__} wants {factor:.3g} times the learning rate that is right for "
            f"DDP. {cure}\n"
        )


def _outer(name: OuterName, lr: float, momentum: float) -> partial[Any]:
    """What builds DiLoCo's outer optimizer."""
    if name == "adamw":
        return partial(AdamW, lr=lr, weight_decay=0.0)
    # torch refuses Nesterov's momentum of 0, which is none.
    return partial(SGD, lr=lr, momentum=momentum, nesterov=name == "nesterov" and momentum > 0)


def _steps(delay: int | str, tau: int | str) -> int:
    """A number of steps, which may be said as a part of tau."""
    if isinstance(delay, int):
        return delay
    if isinstance(tau, str):
        raise RecipeError(f"--delay {delay}: with --tau {tau}, write a number of steps")
    head, slash, divisor = delay.partition("/")
    if head != "tau" or bool(slash) != bool(divisor.isdigit() and int(divisor)):
        raise RecipeError(f"--delay {delay}: write a number of steps, tau, or tau/4")
    return tau // int(divisor or 1)


def _defaults(name: AlgorithmName) -> dict[str, Any]:
    """The algorithm's hyper-parameters and their defaults, as its constructor has them."""
    # All-reduce takes what every state takes, but nothing of it has an effect there.
    if name in ("ddp", "all-reduce"):
        return {}
    own = inspect.signature(_STATES[name]).parameters.values()
    common = inspect.signature(CommHookState).parameters.values()
    defaults = {
        _OPTION_NAMES.get(parameter.name, parameter.name): parameter.default
        for parameter in (*own, *common)
        if parameter.name not in _NO_OPTIONS
    }
    if name == "diloco":
        # An optimizer is a name and two numbers on a command line.
        sgd = defaults["outer"].keywords
        outer = {"outer": "nesterov", "outer_lr": sgd["lr"], "outer_momentum": sgd["momentum"]}
        defaults = {
            key: value
            for option, default in defaults.items()
            for key, value in (outer if option == "outer" else {option: default}).items()
        }
    return {**defaults, "tau": _DEFAULT_TAU}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
