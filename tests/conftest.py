import os

os.environ['HF_HUB_OFFLINE'] = '1'  # a test that talks to a server of its own lifts this for its subprocess

import pytest
import torch

import timm_regnet_rnn  # noqa: F401  registers the models

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def randomize(model):
    """Non-trivial weights and statistics everywhere, so that no test passes because something is zero or one."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def scaled_error(a, b):
    """Largest difference, relative to the scale of b."""
    return ((a - b).abs().max() / b.abs().max()).item()
