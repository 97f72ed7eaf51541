#!/usr/bin/env bash
# A DDP model that is converted to another dtype and back no longer averages gradients, without a word.
#
# Versions: torch 2.13.0, Python 3.11, Linux, gloo.
#
# What one expects. `ddp_model.double()` for an evaluation and `ddp_model.float()` after it leave the
# model as it was: the parameters are the same objects, with the same numbers. Or else, the next
# forward raises.
#
# What happens. Training goes on, and every rank keeps its own gradient. DDP hooks the node that
# accumulates a parameter's gradient; the conversion sets `parameter.data` to a tensor of another
# type, torch makes a new node for it, and nobody calls the hook again. Nothing in the forward or in
# the backward says so, and a conversion to the dtype that the model has already changes nothing.
#
# Below, two ranks compute gradients from different inputs. Seen:
#     as wrapped: the ranks' gradients are the same
#     after .float(), which it was already: the ranks' gradients are the same
#     after .double() and .float(): the ranks' gradients differ
#
# Exits with 0 as long as this is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy

cat > script.py <<'PYTHON'
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel


def compared(model, rank):
    model.zero_grad()
    model(torch.full((1, 3), 1.0 + rank)).sum().backward()
    mine = model.module.weight.grad.clone()
    everyones = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyones, mine)
    return "are the same" if torch.equal(*everyones) else "differ"


def main(rank):
    dist.init_process_group("gloo", init_method="file://" + "/".join([FOLDER, "store"]), rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(3, 1, bias=False))
    seen = [f"as wrapped: the ranks' gradients {compared(model, rank)}"]
    model.float()
    seen.append(f"after .float(), which it was already: the ranks' gradients {compared(model, rank)}")
    model.double()
    model.float()
    seen.append(f"after .double() and .float(): the ranks' gradients {compared(model, rank)}")
    if rank == 0:
        print("\n".join(seen), flush=True)
    dist.destroy_process_group()


FOLDER = __file__.rpartition("/")[0]

if __name__ == "__main__":
    mp.spawn(main, nprocs=2)
PYTHON

cat > expected <<'TEXT'
as wrapped: the ranks' gradients are the same
after .float(), which it was already: the ranks' gradients are the same
after .double() and .float(): the ranks' gradients differ
TEXT
venv/bin/python "$folder/script.py" | tee seen
diff expected seen
