#!/usr/bin/env bash
# DistributedDataParallel(delay_all_reduce_named_params=...): backward() returns before those gradients are averaged.
#
# Versions: torch 2.13.0 (CPU), gloo, 2 ranks on one machine.
#
# DDP promises that when backward() returns, .grad holds the mean over the ranks; an optimizer steps
# right behind it. With the options delay_all_reduce_named_params and param_to_hook_all_reduce, DDP
# starts an asynchronous all-reduce of the named gradients in a hook, and drops the handle: nobody
# waits for it. So .grad is still being written to when the optimizer reads it. It becomes the mean
# a moment later.
#
# Seen: the norm of a delayed gradient right after backward() and 3 s later, three steps:
#   rank 0: 103.3 -> 125.4, 123.8 -> 125.4, 52.5 -> 125.4
#   rank 1:  88.5 -> 125.4, 106.5 -> 125.4, 106.5 -> 125.4
#
# Exits with 0 while it is so, and with 1 once gradients are whole when backward() returns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/delayed.py" <<'PYTHON'
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(8, 4096, bias=False), nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 1, bias=False)
)
named = dict(model.named_parameters())
ddp = DistributedDataParallel(
    model,
    delay_all_reduce_named_params=[("1.weight", named["1.weight"])],
    param_to_hook_all_reduce=named["0.weight"],
)
early = 0
for step in range(3):
    loss = ddp(torch.full((4, 8), float(rank + 1))).sum()
    dist.barrier()
    loss.backward()
    at_once = named["1.weight"].grad.norm().item()
    time.sleep(3)
    later = named["1.weight"].grad.norm().item()
    print(f"rank {rank}: {at_once:.1f} right after backward(), {later:.1f} after 3 s", flush=True)
    early += abs(at_once - later) > 1e-3 * later
    ddp.zero_grad()
    dist.barrier()
found = torch.tensor(early)
dist.all_reduce(found)
dist.destroy_process_group()
raise SystemExit(0 if found else 1)
PYTHON
"$folder/venv/bin/torchrun" --nproc_per_node 2 "$folder/delayed.py"
