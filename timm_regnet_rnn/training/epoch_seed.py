"""Seeds every epoch of train.py by its number: `--device-modules timm_regnet_rnn.training.epoch_seed`.

train.py seeds its random numbers once, at its start, so the first epoch after each resume would read the images in the
order of epoch 0, crop and mix them as epoch 0 did, and no epoch would be that of an unbroken run. It tells a data set
that wants to know which epoch begins; importing this module makes every one want to, in this process only.

With `--workers 0` a resumed run then computes what an unbroken one does, bit for bit on the same machine. Workers draw
their random numbers in processes that outlive an epoch: with them the order is the same, not the crops.
"""

from typing import Any

import numpy as np
import torch
from timm.utils import random_seed

_start: int = -1  # what train.py seeded with, its own for each process


def set_epoch(dataset: Any, epoch: int) -> None:
    """Seed Python, NumPy and PyTorch by what train.py seeded with and the epoch, counted from 0."""
    global _start
    _start = torch.initial_seed() if _start < 0 else _start
    random_seed(int(np.random.SeedSequence((_start, epoch)).generate_state(1)[0]))


torch.utils.data.Dataset.set_epoch = set_epoch  # type: ignore[attr-defined]
