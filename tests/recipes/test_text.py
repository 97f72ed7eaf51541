"""The text of the language recipe, and the model that reads it."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import RecipeError
from common.text import STRETCHES, load_text, python_text
from common.transformer import ByteTransformer, generate


def write(folder: Path, length: int) -> tuple[Path, bytes]:
    text = np.random.default_rng(0).integers(256, size=length, dtype=np.uint8).tobytes()
    file = folder / "text"
    file.write_bytes(text)
    return file, text


def test_every_byte_is_said_at_most_once_and_tests_are_held_out(tmp_path: Path) -> None:
    """Each byte of this text is its own place in it, modulo 2**8, and its window tells the rest."""
    file, text = write(tmp_path, 40_000)
    cut = load_text(file, context=16)
    train = {bytes(cut.train[index].tolist()) for index in range(len(cut.train))}
    test = {bytes(cut.test[index].tolist()) for index in range(len(cut.test))}
    assert len(train) == len(cut.train)
    assert not train & test
    assert all(len(window) == 17 for window in train | test)
    said = sorted(text.index(window) + 1 for window in train | test)
    # 16 further bytes a window, none of them another's.
    assert min(after - before for before, after in pairwise(said)) >= 16
    # What is left over is less than a window at each of the 2 * 10 ends.
    assert 16 * len(said) > len(text) - 2 * STRETCHES * 17
    assert len(test) / len(said) == pytest.approx(0.02, abs=0.005)


def test_labels_are_stretches_in_order(tmp_path: Path) -> None:
    file, text = write(tmp_path, 40_000)
    cut = load_text(file, context=16)
    assert len(cut.labels) == len(cut.train)
    for index in range(0, len(cut.train), 97):
        place = text.index(bytes(cut.train[index].tolist()))
        assert cut.labels[index] == place // (len(text) // STRETCHES)


def test_pythons_own_text_is_prose_and_code() -> None:
    text = python_text().decode()
    assert len(text) > 2_000_000
    assert 'The "with" statement' in text
    assert "class Thread:" in text


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    file, _ = write(tmp_path, 1000)
    with pytest.raises(RecipeError, match="1000 bytes; with a --context of 16 it takes 8500"):
        load_text(file, context=16)
    file, _ = write(tmp_path, 8500)
    assert len(load_text(file, context=16).test) == STRETCHES


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--text .*nothing: No such file"):
        load_text(tmp_path / "nothing", context=16)


@pytest.fixture
def model() -> ByteTransformer:
    torch.manual_seed(0)
    return ByteTransformer(context=12, width=16, heads=2, layers=2)


def test_the_model_does_not_look_ahead(model: ByteTransformer) -> None:
    text = torch.randint(256, (2, 12), dtype=torch.uint8)
    other = text.clone()
    other[:, 7] = 255 - other[:, 7]
    before, after = model(text), model(other)
    assert before.shape == (2, 12, 256)
    assert torch.equal(before[:, :7], after[:, :7])
    for position in range(7, 12):
        assert not torch.allclose(before[:, position], after[:, position])


def test_the_first_guess_is_close_to_uniform(model: ByteTransformer) -> None:
    text = torch.randint(256, (4, 12), dtype=torch.uint8)
    logits = model(text[:, :-1]).transpose(1, 2)
    loss = torch.nn.functional.cross_entropy(logits, text[:, 1:].long())
    assert loss.item() == pytest.approx(np.log(256), abs=0.05)


def test_writing_goes_on_past_the_context(model: ByteTransformer) -> None:
    with torch.no_grad():
        # Whatever it read, it says "a".
        model.head.weight.zero_()
        model.head.bias.fill_(-50.0)
        model.head.bias[ord("a")] = 50.0
    assert generate(model, b"x", 30, temperature=1.0) == b"a" * 30
