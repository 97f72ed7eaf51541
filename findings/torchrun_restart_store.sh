#!/usr/bin/env bash
# torchrun gives a restarted script the store of the attempt that has failed, with all its keys.
#
# Versions: torch 2.13.0, Python 3.11, Linux.
#
# What one expects. After a failure, `torchrun --max-restarts` starts the workers again, and they meet
# in a store that knows nothing of the dead ones. Earlier versions saw to it with a prefix for each
# attempt. torch 2.13 adds none, and says why in torch/distributed/rendezvous.py: "We create a new
# TCPStore for every retry so no need to add prefix for each attempt."
#
# What happens. There is no new store, neither with --standalone (the agent shares one TCPStore
# between all rounds) nor with the static rendezvous, torchrun's default. So the second attempt finds
# what the first has written. Over gloo these are the addresses of processes that are gone, and
# init_process_group may fail with "Gloo connectFullMesh failed ... Connection refused" and use up a
# restart (it depends on who is faster; that is not run here). With
# TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, --standalone does make a new store.
#
# Below, the first attempt writes a key and ends with status 1; the second says whether it is there.
# Seen:
#     standalone: the second attempt finds: True
#     static: the second attempt finds: True
#     standalone, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: the second attempt finds: False
#
# Exits with 0 as long as this is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy

cat > script.py <<'PYTHON'
import os
import sys

import torch.distributed as dist

store, _, _ = next(dist.rendezvous("env://"))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    store.set("written by the first attempt", "")
    sys.exit(1)
print("the second attempt finds:", store.check(["written by the first attempt"]))
PYTHON

attempts() {
    OMP_NUM_THREADS=1 venv/bin/torchrun "$@" --nproc_per_node 1 --max-restarts 1 script.py \
        2> /dev/null | grep "the second attempt finds"
}

{
    echo "standalone: $(attempts --standalone)"
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    echo "static: $(attempts --master-port "$port")"
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    echo "standalone, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: $(attempts --standalone)"
} | tee seen

diff seen - <<'EXPECTED'
standalone: the second attempt finds: True
static: the second attempt finds: True
standalone, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: the second attempt finds: False
EXPECTED
