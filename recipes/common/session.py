"""One worker's side of an accelerated run: the Accelerator, checked before anything is trained."""

import os
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from common.errors import RecipeError

__all__ = [
    "LAUNCH",
    "RUN_OF_LAUNCH",
    "MixedPrecision",
    "is_main_worker",
    "open_session",
    "require_workers",
    "trains_on_cpu",
]

MixedPrecision = Literal["no", "bf16", "fp16"]

LAUNCH = "accelerate launch --multi_gpu --num_processes 2"
# The variable that tells one run from another where a launch is of several.
RUN_OF_LAUNCH = "COMMHOOKS_RUN_OF_LAUNCH"


def is_main_worker() -> bool:
    """Whether this is the process that speaks for all, as known before they have met."""
    return int(os.environ.get("RANK", "0")) == 0


def trains_on_cpu() -> bool:
    """Whether there are fewer GPUs than processes on this machine."""
    return torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_workers() -> None:
    """Refuse to be one process by itself.

    Raises:
        RecipeError: this process was not launched, or as the only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise RecipeError(
            "this recipe trains over several processes and was started as one by itself; start it "
            f"with: {LAUNCH} RECIPE ... (--cpu in place of --multi_gpu starts only one process)"
        )


def open_session(
    *, project_dir: Path, mixed_precision: MixedPrecision, accumulate: int, track: bool
) -> Accelerator:
    """The Accelerator of this process, part of one run over all the launched processes.

    Runs on the CPU where there are fewer GPUs than processes on this machine.

    Raises:
        RecipeError: the processes did not find each other, or the hardware lacks the precision.
    """
    require_workers()
    world_size = int(os.environ["WORLD_SIZE"])
    on_cpu = trains_on_cpu()
    if on_cpu and mixed_precision == "fp16":
        raise RecipeError("fp16 needs a GPU for each process: use --mixed-precision bf16")
    _meet_anew("gloo" if on_cpu else "nccl")
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulate,
        # Schedules here count optimizer steps. By default Accelerate would advance them by the
        # number of processes at each step, and hold them back where a scaler skips one, which
        # different workers do at different steps.
        step_scheduler_with_optimizer=False,
        log_with="wandb" if track else None,
        project_config=ProjectConfiguration(
            project_dir=str(project_dir), logging_dir=str(project_dir)
        ),
    )
    if accelerator.num_processes != world_size:
        raise RecipeError(
            f"{world_size} processes were launched, but Accelerate sees {accelerator.num_processes}"
        )
    return accelerator


def _meet_anew(backend: str) -> None:
    """Make the process group that Accelerate would make, where the launcher's store is a used one.

    The launcher keeps one store for all its attempts (with --max_restarts) and all the runs of
    comparison/worker.py, in which torch 2.13 finds the addresses of the processes that are gone,
    and waits for them. So every attempt and every run keeps to a part of it.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    run = os.environ.get(RUN_OF_LAUNCH)
    first = attempt == "0" and run is None
    if first or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(  # type: ignore[attr-defined]
            f"commhooks attempt {attempt} run {run}", store
        ),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
