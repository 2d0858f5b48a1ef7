"""Lets train.py run in several processes on CPUs: `--device-modules timm_regnet_rnn timm_regnet_rnn.training.cpu_ddp`.

train.py names each process's device to DistributedDataParallel, which takes GPUs there and refuses a CPU. Importing
this module drops CPUs from that list, in this process only; for any other device nothing changes.
"""

import functools

import torch
from torch.nn.parallel import DistributedDataParallel

_init = DistributedDataParallel.__init__


@functools.wraps(_init)
def _init_on_cpu(self, module, device_ids=None, *args, **kwargs):
    if device_ids and all(isinstance(d, (str, torch.device)) and torch.device(d).type == 'cpu' for d in device_ids):
        device_ids = None
    _init(self, module, device_ids, *args, **kwargs)


DistributedDataParallel.__init__ = _init_on_cpu  # type: ignore[method-assign]
