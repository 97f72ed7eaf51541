"""What holds for every test: one thread, as the ranks have, so that the same sums round alike."""

import torch

torch.set_num_threads(1)
