import os

os.environ['HF_HUB_OFFLINE'] = '1'  # a test that talks to a server of its own lifts this for its subprocess

import pytest
import torch

import timm_regnet_rnn  # noqa: F401  registers the models
from timm_regnet_rnn.regulated_block import TimeStep
from timm_regnet_rnn.regulated_resnet import RegulatedResNet

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


def advance(block, cell, x, h=None, c=None, kernel=None):
    """A block as a function: features, h and c."""
    step = TimeStep(cell, h, c, *(kernel or cell.kernel()))
    return block(x, step), *step.next


def tiny(block='bottleneck', **kwargs):
    """A whole net that runs in milliseconds."""
    args = dict(block=block, layers=(2, 2), channels=(8, 16), stem_type='cifar', num_classes=7)
    return randomize(RegulatedResNet(**{**args, **kwargs})).eval()
