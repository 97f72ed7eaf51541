"""The shaped link: what a command sees under it, and what is left when it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from network.launchers import Place, command_of, environment_of, places
from network.rates import Change, Course, parse_rates
from network.sandbox import refusal
from tests.harness import scaled

LINK = Path(__file__).parents[2] / "recipes" / "link.py"
PLACE = Place(rank=1, ranks=2, address="10.0.0.1", port=29500, interface="link0")
REFUSAL = refusal()
shapes = pytest.mark.skipif(REFUSAL is not None, reason=f"no shaped network here: {REFUSAL}")

# Sends 2 MB from rank 0 to rank 1 and measures how long rank 1 waits for the last of it.
SEND = """
import os, socket, time
rank, at = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], 29501)
if rank == 0:
    with socket.create_server(at) as server:
        connection, _ = server.accept()
        connection.sendall(bytes(2_000_000))
        connection.recv(1)
else:
    while True:
        try:
            connection = socket.create_connection(at)
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    received, start = 0, time.monotonic()
    while received < 2_000_000:
        received += len(connection.recv(1 << 20))
    seconds = time.monotonic() - start
    connection.sendall(b"x")
    # 2 MB at 16 Mbit/s take 1 s; a link that is not shaped takes milliseconds.
    assert seconds > 0.8, seconds
"""


def link(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LINK), *arguments],
        capture_output=True,
        text=True,
        timeout=scaled(60),
        check=False,
    )


def environment(rank: int, **variables: str) -> dict[str, str]:
    place = Place(rank=rank, ranks=2, address="10.0.0.1", port=29500, interface="link0")
    return environment_of(place, variables)


@pytest.mark.parametrize(
    ("visible", "own"), [("4,7", ["4", "7"]), ("0,1,2", ["0", "1"]), ("3", ["", ""])]
)
def test_ranks_share_no_gpu(visible: str, own: list[str]) -> None:
    """Each is alone on its machine, as far as it knows, and would take the first one."""
    found = [environment(rank, CUDA_VISIBLE_DEVICES=visible) for rank in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == own


def test_ranks_of_a_machine_see_its_gpus() -> None:
    """LOCAL_RANK picks one of them, and a launcher counts them."""
    first = Place(0, 4, "10.0.0.1", 29500, "link0", per_node=2)
    visible = {"CUDA_VISIBLE_DEVICES": "3,1,0,2"}
    found = [
        environment_of(each, visible)["CUDA_VISIBLE_DEVICES"]
        for each in places(first, ["python", "train.py"])
    ]
    assert found == ["3,1", "3,1", "0,2", "0,2"]
    found = [
        environment_of(each, visible)["CUDA_VISIBLE_DEVICES"]
        for each in places(first, ["torchrun", "train.py"])
    ]
    assert found == ["3,1", "0,2"]


@shapes
def test_rate_holds_and_bytes_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "link.json"
    done = link("--rate", "16mbit", "--json", str(report), "--", sys.executable, "-c", SEND)
    assert done.returncode == 0, done.stderr
    sent = json.loads(report.read_text())["bytes_sent"]
    # Every 1448 bytes of payload carry 66 bytes of headers.
    assert 1.04 < sent[0] / 2e6 < 1.06
    assert sent[1] < 0.1 * sent[0]


@shapes
def test_only_rank_0_is_heard_unless_another_fails() -> None:
    done = link("--ranks", "3", "--", "sh", "-c", "echo hello from {rank}; test {rank} != 2")
    assert done.returncode == 1
    assert done.stdout == "hello from 0\n"
    assert "[rank 2] hello from 2" in done.stderr
    assert "hello from 1" not in done.stderr


@shapes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_survives_a_signal(number: signal.Signals) -> None:
    # A child in a session of its own is what escapes a careless clean-up.
    mark = f"{os.getpid()}{int(number):02}"
    command = ["sh", "-c", f"setsid sleep 1{mark} & echo started; sleep 1{mark}"]
    process = subprocess.Popen(
        [sys.executable, str(LINK), "--", *command], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    process.stdout.close()
    assert process.wait(timeout=scaled(30)) != 0
    deadline = time.monotonic() + scaled(10)
    while (left := _running(f"1{mark}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@shapes
def test_unknown_rate_is_reported() -> None:
    done = link("--rate", "fast", "--", "true")
    assert done.returncode == 1
    assert "fast" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_tools_it_runs_unshaped_and_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(LINK), "--", "/bin/sh", "-c", "echo {address} {interface}"],
        capture_output=True,
        text=True,
        timeout=scaled(60),
        check=False,
        env={**os.environ, "PATH": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "127.0.0.1 lo\n"
    assert "running unshaped" in done.stderr


def test_a_launcher_learns_its_machine() -> None:
    words = "accelerate launch --multi_gpu --num_machines 1 --num_processes=4 a.py --num_machines 7"
    command = " ".join(command_of(PLACE, words.split()))
    assert command == (
        "accelerate launch --num_machines 2 --num_processes 2 --machine_rank 1 "
        "--main_process_ip 10.0.0.1 --main_process_port 29500 --multi_gpu a.py --num_machines 7"
    )


def test_placeholders_are_filled_and_other_braces_left() -> None:
    assert command_of(PLACE, ["x", "{rank}/{ranks}", '{"json": 1}']) == ["x", "1/2", '{"json": 1}']


def test_environment_keeps_what_the_user_chose() -> None:
    environment = environment_of(PLACE, {"OMP_NUM_THREADS": "7", "RANK": "0"})
    assert environment["OMP_NUM_THREADS"] == "7"
    assert environment["RANK"] == environment["PET_NODE_RANK"] == "1"


def _running(argument: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[:2] == [b"sleep", argument.encode()]:
                found.append(entry.name)
    return found


# 20 MB stay inside each machine, and 2 MB are averaged over all ranks.
TWO_BY_TWO = """
import os, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
local, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
assert (size, dist.get_rank() % 2) == (2, local)
group, _ = dist.new_subgroups(group_size=2)
dist.all_reduce(torch.zeros(5_000_000), group=group)
start = time.monotonic()
dist.all_reduce(torch.zeros(500_000))
# 2 MB at 16 Mbit/s take 1 s, and more than that on a busy machine.
assert time.monotonic() - start > 0.8
dist.destroy_process_group()
"""


@shapes
def test_ranks_of_a_machine_share_its_link_and_pass_it_by(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_BY_TWO)
    counted = tmp_path / "bytes.json"
    options = ["--ranks", "4", "--per-node", "2", "--rate", "16mbit", "--json", str(counted)]
    ran = link(*options, "--", sys.executable, str(script))
    assert ran.returncode == 0, ran.stderr
    sent = json.loads(counted.read_text())["bytes_sent"]
    # What stays inside a machine, ten times as much, is not on its link.
    assert len(sent) == 2
    assert all(1.5e6 < each < 3.5e6 for each in sent)


@shapes
@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    ["-m torch.distributed.run", "-m accelerate.commands.launch --multi_gpu --num_processes 1"],
)
def test_a_launcher_starts_the_ranks_of_its_machine(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_BY_TWO)
    options = ["--ranks", "4", "--per-node", "2", "--rate", "16mbit"]
    ran = link(*options, "--", sys.executable, *launcher.split(), str(script))
    assert ran.returncode == 0, ran.stderr


@shapes
def test_what_fails_is_named_as_it_was_started() -> None:
    options = ("--ranks", "4", "--per-node", "2", "--")
    ran = link(*options, "sh", "-c", "test {rank} != 3")
    assert "rank 3 ended with 1" in ran.stderr
    ran = link(*options, sys.executable, "-m", "torch.distributed.run", "nothing.py")
    # Both fail, and either may be the first.
    assert re.search("machine [01] ended with", ran.stderr)


def test_a_launcher_is_started_once_a_machine() -> None:
    place = Place(0, 6, "10.0.0.1", 29500, "link0", per_node=3)
    script = places(place, ["python", "train.py"])
    assert [each.rank for each in script] == [0, 1, 2, 3, 4, 5]
    assert len(places(place, ["torchrun", "train.py"])) == 2
    first, second = places(place, ["accelerate", "launch", "train.py"])
    assert (first.node, second.node, second.nodes) == (0, 1, 2)
    command = command_of(second, ["accelerate", "launch", "train.py"])
    options = dict(zip(command[2:-1:2], command[3:-1:2], strict=True))
    assert options["--num_machines"] == "2"
    assert options["--num_processes"] == "6"
    assert options["--machine_rank"] == "1"
    found = environment_of(second, {})
    assert (found["PET_NNODES"], found["PET_NPROC_PER_NODE"]) == ("2", "3")
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("0", "3")


def test_machines_have_as_many_ranks_each() -> None:
    ran = link("--ranks", "4", "--per-node", "3", "--", "true")
    assert ran.returncode == 2
    assert "does not divide" in ran.stderr


def test_rates_are_read_in_order() -> None:
    assert parse_rates("200mbit") == ("200mbit", ())
    first, changes = parse_rates("200mbit,50mbit@60,1gbit@120.5")
    assert first == "200mbit"
    assert changes == (Change(60, "50mbit"), Change(120.5, "1gbit"))


@pytest.mark.parametrize(
    ("rate", "reason"),
    [
        ("", "does not begin with the rate of the start"),
        ("50mbit@60", "does not begin with the rate of the start"),
        ("200mbit,50mbit", "write a change as RATE@SECONDS"),
        ("200mbit,@60", "write a change as RATE@SECONDS"),
        ("200mbit,50mbit@soon", "write a change as RATE@SECONDS"),
        ("200mbit,50mbit@-1", "write a change as RATE@SECONDS"),
        ("200mbit,50mbit@inf", "write a change as RATE@SECONDS"),
        ("200mbit,50mbit@60,1gbit@60", "in the order in which they happen"),
        ("200mbit,unshaped@60", "cannot be unshaped"),
        ("unshaped,50mbit@60", "cannot be unshaped"),
    ],
)
def test_rates_that_cannot_be_read(rate: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_rates(rate)


def test_a_rate_that_cannot_be_read_is_refused_before_anything_runs() -> None:
    done = link("--rate", "200mbit,50mbit", "--", "echo", "started")
    assert done.returncode == 2
    assert (done.stdout, "RATE@SECONDS" in done.stderr) == ("", True)
    assert "Traceback" not in done.stderr


def test_every_change_is_made_once() -> None:
    made: list[Change] = []
    changes = [Change(1e-9, "50mbit"), Change(2e-9, "1gbit"), Change(3600, "10mbit")]
    course = Course(changes, made.append)
    for _ in range(3):
        course.keep_up()
    assert made == changes[:2]


# Ends when every rank sees the last rate at its own interface, which the timeout waits for.
UNTIL_1GBIT = "until tc qdisc show dev link0 | grep -q 'rate 1Gbit'; do sleep 0.05; done"


@shapes
def test_the_rate_changes_while_the_ranks_run() -> None:
    done = link("--rate", "200mbit,50mbit@3600", "--", "tc", "qdisc", "show", "dev", "link0")
    assert done.returncode == 0, done.stderr
    assert "rate 200Mbit" in done.stdout
    done = link("--rate", "200mbit,50mbit@0.1,1gbit@0.2", "--", "sh", "-c", UNTIL_1GBIT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.index("50mbit from now on") < done.stderr.index("1gbit from now on")


@shapes
def test_no_byte_is_forgotten_when_the_rate_changes(tmp_path: Path) -> None:
    report = tmp_path / "link.json"
    # Sending takes at least a second, and the change falls into it or comes before it.
    rate = ("--rate", "16mbit,15mbit@0.5")
    done = link(*rate, "--json", str(report), "--", sys.executable, "-c", SEND)
    assert done.returncode == 0, done.stderr
    assert "15mbit from now on" in done.stderr
    assert 1.04 < json.loads(report.read_text())["bytes_sent"][0] / 2e6 < 1.15


@shapes
def test_a_later_rate_that_is_unknown_is_reported_at_once() -> None:
    done = link("--rate", "200mbit,fast@3600", "--", "echo", "started")
    assert (done.returncode, done.stdout) == (1, "")
    assert "fast" in done.stderr
    assert "Traceback" not in done.stderr
