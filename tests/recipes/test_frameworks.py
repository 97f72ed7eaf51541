"""recipes/trainer.py and recipes/lightning_fit.py through their command lines."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

# transformers imports torchvision, which beside a CPU build of torch takes some help.
import common.torchvision_cpu  # noqa: F401
from common.launch import RECIPES, launch
from common.text import load_text, python_text
from common.transformer import ByteTransformer
from tests.harness import scaled
from tests.recipes.runs import TIMEOUT

pytestmark = pytest.mark.slow

CONTEXT, WIDTH, HEADS, LAYERS = 32, 32, 2, 1
SMALL = ("--layers", "1", "--width", "32", "--heads", "2", "--context", "32", "--batch-size", "16")
# Whole batches of 16 for each of two workers: of 120 windows, these.
TESTED = 96
# The last evaluation during training is after the last step, but before finish().
STEPS = ("--max-steps", "90", "--eval-every", "45", "--lr", "5e-3", "--accumulate", "2")


def fit(recipe: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What the recipe wrote and printed, trained on a little prose and code."""
    text = python_text()
    (folder / "text").write_bytes(text[:100_000] + text[-100_000:])
    printed = launch(
        RECIPES / f"{recipe}.py",
        [
            *("--text", str(folder / "text"), "--output-dir", str(folder)),
            *("--json", str(folder / "results.json"), "--wandb", "disabled"),
            *SMALL,
            *STEPS,
            *arguments,
        ],
        workers=2,
        capture=True,
        timeout=scaled(TIMEOUT),
        cwd=folder,
    )
    return json.loads((folder / "results.json").read_text()), printed


def check(results: dict[str, Any], saved_loss: float) -> None:
    """That it learned, and evaluated and saved the consensus model."""
    assert (results["steps"], results["rounds"]) == (90, 30)
    # A uniform guess takes 8 bits a byte.
    assert results["bits_per_byte"] < 5.0
    # Before finish() the workers' own models differ; only the consensus model is as good as after.
    assert results["last_eval_loss"] == pytest.approx(results["loss"], abs=1e-5)
    # Were it one worker's own, it would be off by 1e-3 and more.
    assert saved_loss == pytest.approx(results["loss"], abs=1e-4)


@pytest.mark.skipif(not find_spec("transformers"), reason="needs the extra frameworks")
def test_hugging_faces_trainer(tmp_path: Path) -> None:
    results, printed = fit("trainer", tmp_path, "--algorithm", "overlap-local-sgd", "--tau", "3")
    # Late: it takes seconds to import.
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    windows = load_text(tmp_path / "text", CONTEXT - 1).test.windows[:TESTED].long()
    with torch.no_grad():
        check(results, model(input_ids=windows, labels=windows).loss.item())
    assert "Traceback" not in printed


@pytest.mark.skipif(not find_spec("lightning"), reason="needs the extra frameworks")
def test_lightning(tmp_path: Path) -> None:
    results, printed = fit("lightning_fit", tmp_path, "--algorithm", "local-sgd", "--tau", "3")
    model = ByteTransformer(context=CONTEXT, width=WIDTH, heads=HEADS, layers=LAYERS)
    saved = torch.load(tmp_path / "model.ckpt", weights_only=False)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in saved.items()})
    windows = load_text(tmp_path / "text", CONTEXT).test.windows[:TESTED]
    with torch.no_grad():
        logits = model(windows[:, :-1]).transpose(1, 2)
        check(results, cross_entropy(logits, windows[:, 1:].long()).item())
    assert "Traceback" not in printed
