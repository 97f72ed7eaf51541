"""Pins ``commhooks.lightning``: Lightning's Trainer on a tiny model, over real ranks."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import commhooks
from tests.frameworks import ready_for_frameworks
from tests.harness import preload, run_ranks
from tests.reference import flat, mean
from tests.workload import initialise, seeded, trained

preload("tests.framework_imports")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("lightning"), reason="needs the extra frameworks"),
]

TAU = 4
SAMPLES = 48
BATCH = 4
"""Six batches an epoch for each of two ranks."""


def samples() -> TensorDataset:
    generator = seeded(11)
    x, y = (torch.randn(SAMPLES, size, generator=generator) for size in (5, 3))
    return TensorDataset(x, y + torch.arange(SAMPLES).remainder(2).unsqueeze(1))


def build_module(normed: bool = False) -> Any:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.BatchNorm1d(7) if normed else nn.Identity()
            self.body = initialise(nn.Sequential(nn.Linear(5, 7), norm, nn.Linear(7, 3)))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.mse_loss(self.body(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            loss = nn.functional.mse_loss(self.body(batch[0]), batch[1])
            self.log("loss", loss, sync_dist=True, batch_size=len(batch[0]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    return Module()


def build(folder: Path, *callbacks: Any, **options: Any) -> Any:
    import lightning as L

    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": dist.get_world_size(),
            "strategy": "ddp",
            "callbacks": list(callbacks),
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            **options,
        }
    )


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(samples(), batch_size=BATCH), DataLoader(samples(), batch_size=BATCH)


def weights(module: Any) -> Tensor:
    return flat(trained(module)).clone()


def saved_weights(path: Path) -> Tensor:
    saved = torch.load(path, weights_only=False)["state_dict"]
    return flat([saved[name] for name, _ in build_module().named_parameters()])


def validate_and_save(folder: Path) -> dict[str, Any]:
    """In mid-run, between two rounds; the sanity check comes before the first step."""
    ready_for_frameworks()
    from lightning import Callback
    from lightning.pytorch.loggers import CSVLogger

    from commhooks.lightning import Consensus

    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == TAU + 1:
                seen["own"] = weights(module)
                trainer.save_checkpoint(folder / "all.ckpt")
                trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if trainer.global_step == TAU + 1:
                seen["validated"] = weights(module)
                seen["loss"] = trainer.callback_metrics["loss"].item()

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == TAU + 1:
                seen["after"] = weights(module)

    state = commhooks.LocalSGD(tau=TAU)
    module = build_module()
    trainer = build(
        folder,
        # Its place in the list does not matter.
        Consensus(state),
        Look(),
        val_check_interval=TAU + 1,
        logger=CSVLogger(str(folder), name="", version=""),
        log_every_n_steps=2,
    )
    trainer.fit(module, *loaders())
    dist.barrier()
    seen["finished"] = weights(module)
    seen["stats"] = (state.stats.step, state.stats.rounds_completed)
    for name in ("all", "weights"):
        seen[name] = saved_weights(folder / f"{name}.ckpt")
    trainer.save_checkpoint(folder / "end.ckpt")
    dist.barrier()
    seen["end"] = saved_weights(folder / "end.ckpt")
    return seen


def loss_of(parameters: Tensor) -> float:
    body = build_module().body
    nn.utils.vector_to_parameters(parameters, body.parameters())
    x, y = samples().tensors
    with torch.no_grad():
        return nn.functional.mse_loss(body(x), y).item()


def plain_loss(folder: Path, parameters: Tensor) -> float:
    ready_for_frameworks()
    return loss_of(parameters)


def test_it_validates_and_saves_the_consensus_model(tmp_path: Path) -> None:
    ends = run_ranks(validate_and_save, 2, tmp_path, tidy=False)
    consensus = mean([end["own"] for end in ends])
    assert not torch.equal(ends[0]["own"], ends[1]["own"])
    (expected,) = run_ranks(plain_loss, 1, tmp_path, consensus, tidy=False)
    for end in ends:
        for name in ("validated", "all", "weights"):
            torch.testing.assert_close(end[name], consensus)
        assert end["loss"] == pytest.approx(expected, rel=1e-5)
        assert torch.equal(end["after"], end["own"])
        assert torch.equal(end["finished"], ends[0]["finished"])
        assert torch.equal(end["end"], end["finished"])
        assert end["stats"] == (6, 1)
    assert "comm/rounds_completed" in (tmp_path / "metrics.csv").read_text()


def fit_twice(folder: Path) -> dict[str, Any]:
    ready_for_frameworks()
    from commhooks.lightning import Consensus

    state = commhooks.OverlapLocalSGD(tau=2, alpha=0.5)
    callback = Consensus(state)
    module = build_module()
    trainer = build(folder, callback)
    trainer.fit(module, loaders()[0])
    seen: dict[str, Any] = {"ends": [weights(module)]}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loaders()[0])
    seen["ends"].append(weights(module))
    seen["another"] = callback.state is not state
    seen["repr"] = repr(callback.state) == repr(state)
    seen["stats"] = (state.stats.step, callback.state.stats.step)
    return seen


def test_it_fits_twice(tmp_path: Path) -> None:
    first, second = run_ranks(fit_twice, 2, tmp_path, tidy=False)
    assert first["another"]
    assert first["repr"]
    assert first["stats"] == (6, 6)
    assert not torch.equal(*first["ends"])
    for one, other in zip(first["ends"], second["ends"], strict=True):
        assert torch.equal(one, other)


def fit_with_ema(folder: Path, last: bool) -> dict[str, Any]:
    """The moving average of this rank's own model, and what Lightning makes of it."""
    ready_for_frameworks()
    from lightning import Callback
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from commhooks.lightning import Consensus

    seen: dict[str, Any] = {}
    ema = EMAWeightAveraging(decay=0.8)

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == TAU + 1:
                seen["own"] = weights(module)
                seen["average"] = weights(ema._average_model)
                trainer.save_checkpoint(folder / "ema.ckpt")
                assert torch.equal(weights(module), seen["own"])
                assert torch.equal(weights(ema._average_model), seen["average"])

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if trainer.global_step == TAU + 1:
                seen["loss"] = trainer.callback_metrics["loss"].item()

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == TAU + 1:
                seen["after"] = (weights(module), weights(ema._average_model))

        def on_train_end(self, trainer: Any, module: Any) -> None:
            seen["last average"] = weights(ema._average_model)

    state = commhooks.LocalSGD(tau=TAU)
    callbacks = [ema, Look()]
    callbacks.insert(2 if last else 0, Consensus(state))
    module = build_module()
    trainer = build(folder, *callbacks, val_check_interval=TAU + 1, num_sanity_val_steps=0)
    trainer.fit(module, *loaders())
    dist.barrier()
    seen["finished"] = weights(module)
    seen["saved"] = saved_weights(folder / "ema.ckpt")
    saved = torch.load(folder / "ema.ckpt", weights_only=False)["current_model_state"]
    seen["current"] = flat([saved[name] for name, _ in module.named_parameters()])
    return seen


@pytest.mark.parametrize("last", [True, False], ids=["after", "before"])
def test_an_ema_is_averaged_over_the_ranks(tmp_path: Path, last: bool) -> None:
    ends = run_ranks(fit_with_ema, 2, tmp_path, last, tidy=False)
    average = mean([end["average"] for end in ends])
    assert not torch.equal(ends[0]["average"], ends[1]["average"])
    (expected,) = run_ranks(plain_loss, 1, tmp_path, average, tidy=False)
    for end in ends:
        torch.testing.assert_close(end["saved"], average)
        torch.testing.assert_close(end["current"], mean([e["own"] for e in ends]))
        assert end["loss"] == pytest.approx(expected, rel=1e-5)
        assert torch.equal(end["after"][0], end["own"])
        assert torch.equal(end["after"][1], end["average"])
        assert torch.equal(end["finished"], ends[0]["finished"])
        torch.testing.assert_close(end["finished"], mean([e["last average"] for e in ends]))


def fit_with_swa(folder: Path, normed: bool) -> tuple[Tensor, Tensor]:
    ready_for_frameworks()
    from lightning import Callback
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    from commhooks.lightning import Consensus

    swa = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)
    own: list[Tensor] = []

    class Look(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            own.append(weights(module))
            if not normed:
                # With BatchNorm Lightning's extra epoch ends in a step of the optimizer.
                assert torch.equal(own[0], weights(swa._average_model))

    module = build_module(normed)
    state = commhooks.LocalSGD(tau=TAU)
    build(folder, Consensus(state), swa, Look(), max_epochs=3).fit(module, loaders()[0])
    values = [value.float() for value in module.state_dict().values()]
    return own[0], torch.cat([weights(module), flat(values)])


@pytest.mark.parametrize("normed", [False, True], ids=["", "BatchNorm"])
def test_stochastic_weight_averaging_ends_on_one_model(tmp_path: Path, normed: bool) -> None:
    (own_0, end_0), (own_1, end_1) = run_ranks(fit_with_swa, 2, tmp_path, normed, tidy=False)
    assert not torch.equal(own_0, own_1)
    assert torch.equal(end_0, end_1)
    torch.testing.assert_close(end_0[: own_0.numel()], mean([own_0, own_1]))


def refusals(folder: Path) -> list[str]:
    ready_for_frameworks()
    from lightning.pytorch.callbacks import BackboneFinetuning
    from lightning.pytorch.strategies import DDPStrategy

    from commhooks.lightning import Consensus

    def refused(*callbacks: Any, **options: Any) -> str:
        state = commhooks.LocalSGD(tau=2)
        module = build_module()
        module.backbone = module.body[0]
        with pytest.raises(commhooks.RegistrationError) as refusal:
            build(folder, Consensus(state), *callbacks, **options).fit(module, loaders()[0])
        return str(refusal.value)

    hook = DDPStrategy(ddp_comm_state=commhooks.LocalSGD(tau=2), ddp_comm_hook=commhooks.comm_hook)
    return [refused(BackboneFinetuning()), refused(strategy=hook)]


def test_what_cannot_work_is_refused_by_name(tmp_path: Path) -> None:
    for finetuning, hook in run_ranks(refusals, 2, tmp_path, tidy=False):
        assert "BackboneFinetuning unfreezes parameters after DDP was built" in finetuning
        assert "leave out ddp_comm_state and ddp_comm_hook" in hook


def fit_with_a_scaler(folder: Path) -> dict[str, Any]:
    """One rank's gradients overflow once: its scaler skips a step that the others make."""
    ready_for_frameworks()
    from lightning import Callback
    from lightning.pytorch.plugins import MixedPrecision

    from commhooks.lightning import Consensus

    class Overflow(Callback):
        def on_after_backward(self, trainer: Any, module: Any) -> None:
            if trainer.global_step == 1 and dist.get_rank() == 1:
                module.body[0].weight.grad.fill_(float("inf"))

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    state = commhooks.LocalSGD(tau=2)
    module = build_module()
    trainer = build(folder, Overflow(), Consensus(state), plugins=[precision])
    trainer.fit(module, loaders()[0])
    return {"end": weights(module), "step": state.stats.step, "scale": scaler.get_scale()}


def test_a_step_that_lightnings_scaler_skips_counts(tmp_path: Path) -> None:
    first, second = run_ranks(fit_with_a_scaler, 2, tmp_path, tidy=False)
    assert (first["scale"], second["scale"]) == (16.0, 8.0)
    assert first["step"] == second["step"] == 6
    assert torch.equal(first["end"], second["end"])
    assert first["end"].isfinite().all()


def resume(folder: Path) -> tuple[Tensor, int]:
    ready_for_frameworks()
    from lightning.pytorch.callbacks import ModelCheckpoint

    from commhooks.lightning import Consensus

    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=5)
    first = build(folder, Consensus(commhooks.LocalSGD(tau=TAU)), saver, enable_checkpointing=True)
    first.fit(build_module(), loaders()[0])
    module = build_module()
    trainer = build(folder, Consensus(commhooks.LocalSGD(tau=TAU)), max_epochs=2)
    trainer.fit(module, loaders()[0], ckpt_path=str(folder / "step=5.ckpt"), weights_only=False)
    return weights(module), trainer.global_step


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(resume, 2, tmp_path, tidy=False)
    assert torch.equal(first[0], second[0])
    assert first[1] == 12


def teach_and_save(folder: Path) -> dict[str, Any]:
    """A teacher within the module, which a hook of its own moves after every batch."""
    ready_for_frameworks()
    from lightning import Callback

    from commhooks.lightning import Consensus

    seen: dict[str, Any] = {}

    class Teach(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            for t, s in zip(module.teacher.parameters(), module.body.parameters(), strict=True):
                t.data.mul_(0.7).add_(s.data, alpha=0.3)
            if trainer.global_step == TAU + 1:
                seen["own"] = flat(list(module.teacher.parameters())).clone()
                trainer.save_checkpoint(folder / "all.ckpt")
                seen["after"] = flat(list(module.teacher.parameters())).clone()

    module = build_module()
    module.teacher = build_module().body.requires_grad_(False)
    trainer = build(folder, Consensus(commhooks.LocalSGD(tau=TAU)), Teach())
    trainer.fit(module, loaders()[0])
    seen["finished"] = flat(list(module.teacher.parameters())).clone()
    dist.barrier()
    saved = torch.load(folder / "all.ckpt", weights_only=False)["state_dict"]
    seen["saved"] = flat([saved[f"teacher.{n}"] for n, _ in module.teacher.named_parameters()])
    return seen


def test_a_checkpoint_holds_the_mean_of_the_teachers(tmp_path: Path) -> None:
    """It held rank 0's, beside the mean of the students."""
    ends = run_ranks(teach_and_save, 2, tmp_path, tidy=False)
    assert not torch.equal(ends[0]["own"], ends[1]["own"])
    assert torch.equal(ends[0]["finished"], ends[1]["finished"])
    for end in ends:
        torch.testing.assert_close(end["saved"], mean([each["own"] for each in ends]))
        assert torch.equal(end["after"], end["own"])
