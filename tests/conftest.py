"""What holds for every test: one thread, so that sums have one order and a loaded machine is no slower than it must be."""

import torch

torch.set_num_threads(1)
