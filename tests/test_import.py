"""Pins that `import commhooks` needs torch alone, and is quick because it loads little else."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import commhooks
from tests.harness import scaled

PACKAGE = Path(commhooks.__file__).parent

LOADED = """
import sys
import torch, torch.distributed, torch.nn.parallel, torch.distributed.algorithms.join
before = set(sys.modules)
import commhooks
print("\\n".join(sorted(set(sys.modules) - before)))
"""


@functools.cache
def loaded_by_commhooks() -> frozenset[str]:
    """Modules that are there after the import and were not after torch's."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        capture_output=True,
        text=True,
        check=True,
        timeout=scaled(100),
    )
    return frozenset(done.stdout.split())


def test_nothing_is_imported_beyond_torch_and_the_standard_library() -> None:
    loaded = {name.partition(".")[0] for name in loaded_by_commhooks()}
    assert loaded <= {"commhooks", "torch"} | sys.stdlib_module_names


def test_the_import_loads_little() -> None:
    """Counted in modules: seconds would depend on the machine."""
    others = {name for name in loaded_by_commhooks() if not name.startswith("commhooks")}
    assert len(others) <= 20, sorted(others)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


BACKGROUND = {"concurrent", "multiprocessing", "asyncio", "_thread"}
ALGORITHM_FILES = sorted(PACKAGE.glob("algorithms/*.py"))
ENGINE_FILES = sorted(PACKAGE.rglob("engine/**/*.py"))


@pytest.mark.parametrize("path", ALGORITHM_FILES, ids=lambda path: path.name)
def test_an_algorithm_knows_no_distributed(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith("torch.distributed")]


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.name)
def test_the_engine_knows_no_algorithm(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith("commhooks.algorithms")]
    names = {"LocalSGD", "OverlapLocalSGD", "EASGD", "CoCoDSGD", "BMUF", "DiLoCo", "SlowMo"}
    used = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not used & names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_no_python_threads_and_no_polling(path: Path) -> None:
    """Background work is futures of the backend; a lock or an event is no thread."""
    assert not [name for name in imports(path) if name.partition(".")[0] in BACKGROUND]
    called = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    # At the exit of a process, when nothing tells whether the backend's threads are at rest.
    allowed = {"sleep"} if path.name == "process_exit.py" else set()
    assert not (called & {"Thread", "Timer", "sleep"}) - allowed


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert ALGORITHM_FILES
    assert ENGINE_FILES
