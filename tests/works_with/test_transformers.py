"""Pins ``commhooks.transformers``: Hugging Face's Trainer on a tiny model, over real ranks."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

import commhooks
from commhooks import RegistrationError
from tests.frameworks import ready_for_frameworks
from tests.harness import preload, run_ranks
from tests.heard import heard
from tests.reference import flat, mean
from tests.workload import ragged_model, seeded, trained

preload("tests.framework_imports")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("transformers"), reason="needs the extra frameworks"),
]

TAU = 4


class Model(nn.Module):
    """Takes and returns what Trainer wants."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ragged_model()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


class Samples(Dataset[dict[str, Tensor]]):
    """Each rank gets its own part of them."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = seeded(11, index)
        x = torch.randn(5, generator=generator)
        return {"x": x, "labels": torch.randn(3, generator=generator) + index % 2}


def options(folder: Path, **others: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_steps": 2,
            "ddp_find_unused_parameters": False,
            "average_tokens_across_devices": False,
            **others,
        }
    )


def build(folder: Path, state: commhooks.CommHookState | None, **others: Any) -> Any:
    from commhooks.transformers import ConsensusTrainer

    keywords: dict[str, Any] = {"model": Model(), **others.pop("trainer", {})}
    return ConsensusTrainer(
        args=options(folder, **others),
        train_dataset=Samples(),
        eval_dataset=Samples(),
        comm_state=state,
        **keywords,
    )


def weights(trainer: Any) -> Tensor:
    return flat(trained(trainer.model)).clone()


def evaluate_and_save(folder: Path) -> dict[str, Any]:
    """In mid-run, between two rounds."""
    ready_for_frameworks()
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, progress: Any, control: Any, **_: Any) -> None:
            if progress.global_step == TAU + 1:
                seen["own"] = weights(trainer)
                seen["loss"] = trainer.evaluate()["eval_loss"]
                seen["predicted"] = torch.from_numpy(trainer.predict(Samples()).predictions)
                trainer.save_model(str(folder / "saved"))
                seen["after"] = weights(trainer)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            seen["at the end"] = weights(trainer)

    state = commhooks.LocalSGD(tau=TAU)
    trainer = build(folder, state, eval_strategy="steps", eval_steps=6)
    trainer.add_callback(Look())
    trainer.train()
    dist.barrier()
    saved = load_file(folder / "saved" / "model.safetensors")
    seen["saved"] = flat([saved[name] for name, _ in trainer.model.named_parameters()])
    seen["finished"] = weights(trainer)
    seen["rounds"] = state.stats.rounds_completed
    logs = trainer.state.log_history
    seen["logged"] = [entry["comm/step"] for entry in logs if "loss" in entry]
    during = [entry["eval_loss"] for entry in logs if entry["step"] == 6 and "eval_loss" in entry]
    seen["losses"] = [*during, trainer.evaluate()["eval_loss"]]
    return seen


def test_it_evaluates_and_saves_the_consensus_model(tmp_path: Path) -> None:
    ends = run_ranks(evaluate_and_save, 2, tmp_path, tidy=False)
    consensus = mean([end["own"] for end in ends])
    model = Model()
    nn.utils.vector_to_parameters(consensus, model.parameters())
    batch = [Samples()[index] for index in range(len(Samples()))]
    x, labels = (torch.stack([sample[name] for sample in batch]) for name in ("x", "labels"))
    with torch.no_grad():
        expected = model(x, labels)
    assert not torch.equal(ends[0]["own"], ends[1]["own"])
    assert ends[0]["rounds"] == 1
    for end in ends:
        torch.testing.assert_close(end["saved"], consensus)
        torch.testing.assert_close(end["loss"], expected["loss"].item())
        torch.testing.assert_close(end["predicted"], expected["logits"])
        assert torch.equal(end["after"], end["own"])
        assert torch.equal(end["finished"], ends[0]["finished"])
        assert torch.equal(end["at the end"], end["finished"])
        # The last evaluation during training, before finish(), and one after it.
        assert end["losses"][0] == pytest.approx(end["losses"][1], rel=1e-5)
        assert end["logged"] == [2, 4, 6]


def look_from_callbacks(folder: Path) -> dict[str, list[Tensor]]:
    """The weights in each of Trainer's callbacks, with saves and evaluations between two rounds."""
    ready_for_frameworks()
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    seen: dict[str, list[Tensor]] = {"saved": []}

    class Look(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            note("on_save")
            # Blocks may be nested.
            trainer.save_model(str(folder / "copy"))
            dist.barrier()
            saved = load_file(folder / "copy" / "model.safetensors")
            seen["saved"].append(
                flat([saved[name] for name, _ in trainer.model.named_parameters()])
            )

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            note("on_epoch_end")
            with state.averaged():
                note("averaged() in on_epoch_end")

    def note(event: str) -> None:
        seen.setdefault(event, []).append(weights(trainer))

    for event in ("on_step_end", "on_log", "on_evaluate", "on_train_end"):
        setattr(Look, event, lambda *_, event=event, **__: note(event))
    state = commhooks.LocalSGD(tau=TAU)
    trainer = build(
        folder,
        state,
        max_steps=-1,
        num_train_epochs=1,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=3,
        logging_steps=3,
        trainer={"callbacks": [Look()]},
    )
    trainer.train()
    return seen


def test_callbacks_that_save_find_the_consensus_model(tmp_path: Path) -> None:
    first, second = run_ranks(look_from_callbacks, 2, tmp_path, tidy=False)
    for event in ("on_save", "saved", "on_evaluate", "averaged() in on_epoch_end", "on_train_end"):
        assert first[event]
        assert all(torch.equal(a, b) for a, b in zip(first[event], second[event], strict=True))
    for event in ("on_step_end", "on_log", "on_epoch_end"):
        assert any(not torch.equal(a, b) for a, b in zip(first[event], second[event], strict=True))
    # After the third step.
    own = [end["on_step_end"][2] for end in (first, second)]
    torch.testing.assert_close(first["on_save"][0], mean(own))
    assert torch.equal(first["on_save"][0], first["saved"][0])


def train_twice(folder: Path) -> dict[str, Any]:
    """On the same wrapper; then with a model that Trainer builds, and wraps, at each call."""
    ready_for_frameworks()
    state = commhooks.OverlapLocalSGD(tau=2)
    trainer = build(folder, state)
    trainer.train()
    first = weights(trainer)
    trainer.train()
    seen: dict[str, Any] = {"same": trainer.comm_state is state, "steps": state.stats.step}
    seen["moved"] = not torch.equal(weights(trainer), first)
    seen["ends"] = [weights(trainer)]

    state = commhooks.OverlapLocalSGD(tau=2, alpha=0.5)
    trainer = build(folder, state, trainer={"model": None, "model_init": Model})
    for _ in range(2):
        trainer.train()
        seen["ends"].append(weights(trainer))
    seen["another"] = trainer.comm_state is not state
    seen["repr"] = repr(trainer.comm_state) == repr(state)
    seen["stats"] = (state.stats.step, trainer.comm_state.stats.step)
    return seen


def test_it_trains_twice(tmp_path: Path) -> None:
    first, second = run_ranks(train_twice, 2, tmp_path, tidy=False)
    for end in (first, second):
        assert end["same"]
        assert end["moved"]
        assert end["steps"] == 12
        assert end["another"]
        assert end["repr"]
        assert end["stats"] == (6, 6)
    for one, other in zip(first["ends"], second["ends"], strict=True):
        assert torch.equal(one, other)
    # The same run from the same start, in a new wrapper.
    assert torch.equal(first["ends"][1], first["ends"][2])


def resume(folder: Path) -> tuple[Tensor, Tensor, int]:
    """From Trainer's own checkpoint, and with the best model loaded at the end."""
    ready_for_frameworks()
    from safetensors.torch import load_file

    build(folder, commhooks.LocalSGD(tau=TAU), save_strategy="steps", save_steps=3).train()
    trainer = build(
        folder,
        commhooks.LocalSGD(tau=TAU),
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        max_steps=9,
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    best = flat([saved[name] for name, _ in trainer.model.named_parameters()])
    return weights(trainer), best, trainer.state.global_step


def test_it_resumes_and_ends_on_the_best_model(tmp_path: Path) -> None:
    first, second = run_ranks(resume, 2, tmp_path, tidy=False)
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], first[1])
    assert first[2] == 9


def with_trainers_defaults(folder: Path) -> tuple[str, str]:
    ready_for_frameworks()
    with heard() as lines:
        trainer = build(
            folder,
            commhooks.LocalSGD(tau=2),
            ddp_find_unused_parameters=True,
            include_num_input_tokens_seen="all",
        )
        trainer.train()
        with pytest.raises(RegistrationError) as refusal:
            build(folder, commhooks.LocalSGD(tau=2), auto_find_batch_size=True)
        plain = build(folder, None)
        plain.train()
    return "\n".join(lines), str(refusal.value)


def test_it_warns_of_what_waits_at_every_step(tmp_path: Path) -> None:
    for logged, refusal in run_ranks(with_trainers_defaults, 2, tmp_path, tidy=False):
        assert "include_num_input_tokens_seen makes all ranks wait" in logged
        assert "find_unused_parameters=True" in logged
        assert "choose per_device_train_batch_size" in refusal


class Counting(Model):
    """Takes the number of tokens that Trainer counts, as language models do."""

    def forward(self, x: Tensor, labels: Tensor, **loss_kwargs: Any) -> dict[str, Tensor]:
        y = self.body(x)
        total = nn.functional.mse_loss(y, labels, reduction="sum")
        return {"loss": total / loss_kwargs.get("num_items_in_batch", labels.numel()), "logits": y}


def logging_every_step(folder: Path, algorithm: str) -> dict[str, Any]:
    ready_for_frameworks()
    tau = {} if algorithm == "AllReduce" else {"tau": TAU}
    state = getattr(commhooks, algorithm)(**tau)
    losses: list[float] = []

    with heard() as lines:
        trainer = build(
            folder,
            state,
            logging_steps=1,
            max_steps=45,
            save_strategy="steps",
            save_steps=15,
            average_tokens_across_devices=True,
            trainer={"model": Counting()},
        )
        step = trainer.training_step

        def noted(*args: Any) -> Tensor:
            loss: Tensor = step(*args)
            losses.append(loss.item())
            return loss

        trainer.training_step = noted
        trainer.train()
    history = trainer.state.log_history
    return {
        "own": losses,
        "logged": [entry["loss"] for entry in history if "loss" in entry],
        "flos": trainer.state.total_flos,
        "sent": trainer.comm_state.stats.foreign_collectives,
        "told": [line for line in lines if "outside commhooks" in line],
    }


def test_nobody_waits_where_every_step_is_logged(tmp_path: Path) -> None:
    """Two checkpoints are written in between, whose barriers count where they are not passed over.

    The sum of all operations is that of a run whose Trainer gathers them at every step.
    """
    ends = run_ranks(logging_every_step, 2, tmp_path / "local", "OverlapLocalSGD", tidy=False)
    plain = run_ranks(logging_every_step, 2, tmp_path / "plain", "AllReduce", tidy=False)
    for end in ends:
        assert end["logged"] == pytest.approx(end["own"], rel=1e-5)
        assert end["sent"] < 10
        assert end["told"] == []
        assert end["flos"] == plain[0]["flos"]
    assert ends[0]["own"] != ends[1]["own"]
    assert plain[0]["logged"] == plain[1]["logged"]


def as_trainer_is(folder: Path) -> list[str]:
    """A state that a callback registers on a plain Trainer."""
    ready_for_frameworks()
    from transformers import Trainer, TrainerCallback

    state = commhooks.OverlapLocalSGD(tau=TAU)

    class Register(TrainerCallback):
        def on_train_begin(self, *_: Any, **keywords: Any) -> None:
            state.register(trainer.model_wrapped, trainer.optimizer)

    with heard() as lines:
        trainer = Trainer(
            Model(), options(folder, logging_steps=1, max_steps=45), train_dataset=Samples()
        )
        trainer.add_callback(Register())
        trainer.train()
    state.finish()
    return [line for line in lines if "outside commhooks" in line]


def test_without_the_mixin_trainer_is_named(tmp_path: Path) -> None:
    (told,), others = run_ranks(as_trainer_is, 2, tmp_path, tidy=False)
    assert "transformers' Trainer gathers the loss at every logged step" in told
    assert others == []
