"""Pins that the Python of README and docs runs, block after block of a page in one namespace.

Fences of ``python`` are run as they are; on the pages in ``PROGRAMS`` each is a complete program,
which is run on its own. Those of ``py``, fragments of somebody's larger program, and of
``diff``, with what they add, are run after what the program has before them.
"""

import os
import re
import tempfile
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.harness import preload, run_ranks
from tests.harness.script import run_script

preload("tests.framework_imports")

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("docs/frameworks.md",)
# Others are for two.
RANKS = {"docs/islands.md": 4}
PAGES = sorted(
    name
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in page.parts
    and BLOCK.search(page.read_text())
    and (name := str(page.relative_to(ROOT))) not in PROGRAMS
)


def run_page(name: str, folder: str) -> int:
    os.chdir(folder)
    blocks = BLOCK.findall((ROOT / name).read_text())
    namespace: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{name}, block {number}", "exec"), namespace)
    return len(blocks)


FRAGMENT = re.compile(r"^```(py|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = """
import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

import commhooks

module = torch.nn.Linear(8, 1)
loader = [(torch.randn(4, 8), torch.randn(4, 1)) for _ in range(20)]
loss_fn = torch.nn.functional.mse_loss
tau, step, folder = 2, 1, "checkpoint"


def evaluate(model):
    with torch.no_grad():
        loss_fn(model(loader[0][0]), loader[0][1])


def fresh():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return accelerator, *accelerator.prepare(model, optimizer), commhooks.LocalSGD(tau=2)


accelerator, ddp_model, optimizer, state = fresh()
model = ddp_model
"""
FRAGMENTS = [
    pytest.param(str(page.relative_to(ROOT)), id=str(page.relative_to(ROOT)))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in page.parts and FRAGMENT.search(page.read_text())
]


def run_fragments(name: str) -> int:
    rank, size = (str(f()) for f in (torch.distributed.get_rank, torch.distributed.get_world_size))
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ["OMP_NUM_THREADS"] = "1"
    fragments = FRAGMENT.findall((ROOT / name).read_text())
    folders = [tempfile.mkdtemp() if rank == "0" else ""]
    torch.distributed.broadcast_object_list(folders)
    os.chdir(folders[0])
    namespace: dict[str, object] = {"__name__": "page"}
    exec(PROGRAM, namespace)
    for number, (kind, text) in enumerate(fragments, start=1):
        if kind == "diff":
            text = "\n".join(line[2:] for line in text.splitlines() if line[:1] != "-")
        exec(compile(textwrap.dedent(text), f"{name}, fragment {number}", "exec"), namespace)
    return len(fragments)


@pytest.mark.parametrize("page", FRAGMENTS)
def test_fragments_run_in_a_program(page: str) -> None:
    assert all(count > 0 for count in run_ranks(run_fragments, 2, page, tidy=False))


def test_there_are_pages_to_run() -> None:
    assert "docs/start.md" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, tmp_path: Path) -> None:
    # Not tidy: the classes and functions of a page keep its model, and so its group, for a while.
    assert all(
        blocks > 0
        for blocks in run_ranks(run_page, RANKS.get(page, 2), page, str(tmp_path), tidy=False)
    )


LAUNCHED = [
    pytest.param(block, id=f"{name} {number}")
    for name in PROGRAMS
    for number, block in enumerate(BLOCK.findall((ROOT / name).read_text()), start=1)
]
# What a machine needs whose torchvision was built for CUDA and whose torch was not.
TORCHVISION = "import common.torchvision_cpu\n"
EXTRAS = {"transformers", "lightning"}


@pytest.mark.slow
@pytest.mark.parametrize("program", LAUNCHED)
def test_program_runs_in_a_file_of_its_own(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    imported = set(re.findall(r"^(?:from|import) (\w+)", program, re.MULTILINE))
    needed = imported & EXTRAS
    if not all(find_spec(package) for package in needed):
        pytest.skip("needs the extra frameworks")
    script = tmp_path / "script.py"
    script.write_text((TORCHVISION if needed else "") + program)
    run_script(script, [], 2, folder=tmp_path, timeout=110.0)
    saved = {path.name for path in tmp_path.iterdir()}
    assert saved & {"model", "model.pt", "model.ckpt"}
