"""Pins folders of checkpoints: whole or not at all, the last few kept, damage reported."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from commhooks import CheckpointError, RoundError
from commhooks.checkpoints import Checkpoints, verify
from tests.harness import rank_outcomes, run_ranks


def write(text: str) -> Callable[[Path], object]:
    """Writes two files, one of them in a folder."""

    def files(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "one").write_text(text)
        (folder / "two").write_text(text * 100)

    return files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def text_of(checkpoint: Path | None) -> str:
    assert checkpoint is not None
    return (checkpoint / "deep" / "one").read_text()


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").newest() is None


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in (3, 20, 100):
        assert verify(checkpoints.save(number, write(str(number)))) is None
    assert names(tmp_path) == ["checkpoint-00000020", "checkpoint-00000100"]
    assert text_of(checkpoints.newest()) == "100"


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_the_same_number_again_replaces(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, write("old"))
    checkpoints.save(1, write("new"))
    assert text_of(checkpoints.newest()) == "new"
    assert names(tmp_path) == ["checkpoint-00000001"]


def test_a_crash_while_one_is_replaced_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    target = checkpoints.save(1, write("old"))
    rename = Path.rename

    def rename_or_crash(path: Path, to: Path) -> Path:
        if to == target:
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_or_crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(1, write("new"))
    assert text_of(checkpoints.newest()) == "old"
    checkpoints.save(1, write("newer"))
    assert text_of(checkpoints.newest()) == "newer"
    assert names(tmp_path) == ["checkpoint-00000001"]


def test_a_course_that_was_left_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run resumed from an earlier checkpoint must not later resume from the other future."""
    checkpoints = Checkpoints(tmp_path)
    for number in (10, 20):
        checkpoints.save(number, write(str(number)))
    checkpoints.save(15, write("15"))
    assert text_of(checkpoints.newest()) == "15"
    assert "abandoned-checkpoint-00000020" in names(tmp_path)
    assert "checkpoint-00000020 is of a course" in caplog.text


def truncated(checkpoint: Path) -> str:
    os.truncate(checkpoint / "two", 7)
    return "two has 7 bytes instead of 200."


def flipped(checkpoint: Path) -> str:
    path = checkpoint / "deep" / "one"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    return "deep/one has another SHA-256 sum than when it was saved."


def missing(checkpoint: Path) -> str:
    (checkpoint / "two").unlink()
    return "two cannot be read: No such file or directory."


def without_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    return "manifest.json cannot be read: No such file or directory."


def cut_manifest(checkpoint: Path) -> str:
    os.truncate(checkpoint / "manifest.json", 20)
    return "manifest.json is damaged"


def other_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_text("[]")
    return "manifest.json is damaged"


def future_manifest(checkpoint: Path) -> str:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    return "manifest.json is of format 99"


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        flipped,
        missing,
        without_manifest,
        cut_manifest,
        other_manifest,
        future_manifest,
    ],
)
def test_a_damaged_one_is_reported_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        checkpoints.save(number, write(f"{number}."))
    reason = damage(tmp_path / "checkpoint-00000002")
    assert text_of(checkpoints.newest()) == "1."
    assert "checkpoint-00000002 is not used" in caplog.text
    assert reason in caplog.text


def test_none_whole_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    missing(checkpoints.save(1, write("x")))
    with pytest.raises(CheckpointError, match="None of the 1 checkpoints"):
        checkpoints.newest()


def of_another_tool(folder: Path, name: str) -> None:
    """What Hugging Face's Trainer leaves."""
    (folder / name).mkdir(parents=True)
    (folder / name / "trainer_state.json").write_text("{}")


def test_what_another_tool_has_written_is_never_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("checkpoint-5000", "checkpoint-7", ".draft-letter"):
        of_another_tool(tmp_path, name)
    (tmp_path / "checkpoint-00000009").write_text("a file")
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.newest() is None
    for number in (3, 4):
        checkpoints.save(number, write(str(number)))
    assert text_of(checkpoints.newest()) == "4"
    assert names(tmp_path) == [
        ".draft-letter",
        "checkpoint-00000004",
        "checkpoint-00000009",
        "checkpoint-5000",
        "checkpoint-7",
    ]
    assert not caplog.records


def with_a_manifest_of_its_own(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"layers": []}')


def without_one(checkpoint: Path) -> None:
    pass


@pytest.mark.parametrize("manifest", [without_one, with_a_manifest_of_its_own])
def test_ours_by_name_alone_is_neither_renamed_nor_deleted(
    tmp_path: Path, manifest: Callable[[Path], object]
) -> None:
    """It may be another tool's, or ours that lost its manifest: nobody can know."""
    for name in ("checkpoint-00000001", "checkpoint-12345678"):
        of_another_tool(tmp_path, name)
        manifest(tmp_path / name)
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        checkpoints.newest()
    for number in (2, 3):
        checkpoints.save(number, write(str(number)))
    assert text_of(checkpoints.newest()) == "3"
    assert names(tmp_path) == [
        "checkpoint-00000001",
        "checkpoint-00000003",
        "checkpoint-12345678",
    ]


class PowerCut(BaseException):
    """Ends the process as far as the code under test can tell."""


def crash_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes ``calls`` more operations, then nothing."""
    left = calls

    def limited(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            if left == 0:
                raise PowerCut
            left -= 1
            return function(*args, **kwargs)

        return call

    for owner, name in [
        (Path, "rename"),
        (Path, "write_text"),
        (Path, "unlink"),
        (Path, "touch"),
        (Path, "mkdir"),
        (os, "fsync"),
        (shutil, "rmtree"),
    ]:
        monkeypatch.setattr(owner, name, limited(getattr(owner, name)))


def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Crashes before every single operation of a save, and goes on from what is left each time."""
    seen = set()
    calls, finished = 0, False
    while not finished:
        folder = tmp_path / str(calls)
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.save(1, write("old"))
        with monkeypatch.context() as patch:
            crash_after(calls, patch)
            try:
                checkpoints.save(2, write("new"))
                finished = True
            except PowerCut:
                calls += 1
        seen.add(text_of(checkpoints.newest()))
        checkpoints.save(3, write("next"))
        assert names(folder) == ["checkpoint-00000003"]
    assert calls > 10
    assert seen == {"old", "new"}
    assert not caplog.records


def save_by_rank(folder: Path, number: int, broken: int | None = None) -> Path | None:
    """Every rank writes a file of its own; rank ``broken`` cannot."""
    rank = dist.get_rank()

    def write_own(checkpoint: Path) -> None:
        if rank == broken:
            raise OSError(28, "No space left on device")
        (checkpoint / f"rank{rank}").write_text(str(number))

    return Checkpoints(folder).save(number, write_own)


def test_every_rank_writes_into_one_checkpoint(tmp_path: Path) -> None:
    paths = run_ranks(save_by_rank, 3, tmp_path, 5)
    assert paths == [tmp_path / "checkpoint-00000005"] * 3
    assert names(paths[0] or tmp_path) == ["manifest.json", "rank0", "rank1", "rank2"]
    assert verify(paths[0] or tmp_path) is None


def test_a_rank_that_cannot_write_fails_all_of_them(tmp_path: Path) -> None:
    run_ranks(save_by_rank, 2, tmp_path, 1)
    ends = rank_outcomes(save_by_rank, 2, tmp_path, 2, 1)
    assert isinstance(ends[1].error, OSError)
    assert isinstance(ends[0].error, CheckpointError)
    assert "rank 1: OSError: [Errno 28] No space left on device" in str(ends[0].error)
    assert Checkpoints(tmp_path).newest() == tmp_path / "checkpoint-00000001"


def test_a_name_that_another_tool_has_taken_is_refused_on_every_rank(tmp_path: Path) -> None:
    of_another_tool(tmp_path, "checkpoint-00000005")
    for end in rank_outcomes(save_by_rank, 2, tmp_path, 5):
        assert isinstance(end.error, CheckpointError), end.describe()
        assert "is there already and has no manifest.json" in str(end.error)
    assert names(tmp_path) == ["checkpoint-00000005"]
    assert names(tmp_path / "checkpoint-00000005") == ["trainer_state.json"]


def test_a_name_that_is_taken_on_one_disk_is_refused_on_every_rank(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    of_another_tool(folders[1], "checkpoint-00000005")
    ends = rank_outcomes(save_on_own_disk, 2, folders, [5])
    assert all(isinstance(end.error, CheckpointError) for end in ends)
    assert "rank 1: " in str(ends[0].error)
    assert not folders[0].exists()


def newest_by_rank(folders: list[Path]) -> tuple[Path | None, str]:
    """The choice of each rank, each with a folder of its own, and what it logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("commhooks").addHandler(handler)
    return Checkpoints(folders[dist.get_rank()]).newest(), "\n".join(lines)


def save_on_own_disk(folders: list[Path], numbers: list[int]) -> None:
    folder = folders[dist.get_rank()]
    for number in numbers:
        Checkpoints(folder).save(number, write(f"{number}."))


def test_ranks_without_a_common_file_system_choose_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    run_ranks(save_on_own_disk, 3, folders, [1, 2, 3, 4])
    truncated(folders[1] / "checkpoint-00000003")
    shutil.rmtree(folders[2] / "checkpoint-00000004")
    (choices, logs) = zip(*run_ranks(newest_by_rank, 3, folders), strict=True)
    assert choices == tuple(folder / "checkpoint-00000002" for folder in folders)
    assert "checkpoint-00000004 is not used: rank 2: it is missing." in logs[0]
    assert "checkpoint-00000003 is not used: rank 1: two has 7 bytes instead of 200." in logs[0]
    assert logs[1:] == ("", "")


def save_with_a_failed_round(folder: Path) -> None:
    def write_nothing(checkpoint: Path) -> None:
        raise RoundError("LocalSGD", 3, 9, [0, 1], "gone.")

    Checkpoints(folder).save(1, write_nothing)


def test_a_failed_round_needs_no_further_word_from_the_others(tmp_path: Path) -> None:
    ends = rank_outcomes(save_with_a_failed_round, 2, tmp_path)
    assert all(isinstance(end.error, RoundError) for end in ends)
    assert Checkpoints(tmp_path).newest() is None
