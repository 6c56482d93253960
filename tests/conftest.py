"""What all tests share."""

import torch

# The matrices here are small: more threads would spend their time waiting for each other, above all where other work
# shares the cores.
torch.set_num_threads(1)
