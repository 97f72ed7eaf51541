"""What the fork server imports once, so that no rank has to.

A rank is a fork: what is imported here it finds done.
"""

import gc

import accelerate  # noqa: F401
import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch._dynamo
import torch.distributed.nn
import torch.distributed.optim
import torch.nn.parallel  # noqa: F401

import commhooks  # noqa: F401
import tests.harness.worker  # noqa: F401

# A collection would go through all objects of torch, 0.2 s each time, and copy every page they lie
# on. None of them can become garbage, so ranks look only at what they make themselves.
gc.collect()
gc.freeze()
