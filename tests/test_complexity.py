"""Counts of parameters and multiply-adds, against figures worked out by hand."""

import pytest
import timm
import torch
from test_regnet_rnn import GOLDEN, NAMES
from timm.utils import reparameterize_model
from torch import nn

from timm_regnet_rnn.complexity import complexity, on_meta
from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.weights.manifest import RELEASED


def test_multiply_adds_of_the_design():
    assert round(GOLDEN['regnet_convlstm_50']['macs'] / 1e9, 2) == 4.56
    assert round(4.09 / (GOLDEN['regnet_convlstm_50']['macs'] / 1e9), 3) == 0.897
    with torch.device('meta'):
        resnet = complexity(timm.create_model('resnet50').eval())
    assert resnet['params'] == 25_557_032 and round(resnet['macs'] / 1e9, 2) == 4.09
    assert round(resnet['activations'] / 1e6, 1) == 11.1  # as "Designing Network Design Spaces" has it, in millions
    assert resnet == GOLDEN['resnet50']


@pytest.mark.parametrize('name', [name for name in GOLDEN if name not in NAMES and name != 'resnet50'])
def test_sizes_of_resnets_and_of_tags(name):
    assert complexity(on_meta(name).eval()) == GOLDEN[name]


def test_a_tag_without_sizes_of_its_own_has_those_of_its_model():
    for name in RELEASED:
        assert complexity(on_meta(name).eval()) == GOLDEN.get(name, GOLDEN[name.split('.')[0]])


class Net(nn.Module):
    """A convolution, a cell that runs twice, and a linear layer."""

    pretrained_cfg = dict(input_size=(3, 8, 6))

    def __init__(self, cell):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.cell, self.fc = cell(4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(x)
        h, c = self.cell(x)
        h, _ = self.cell(x, h, c)
        return self.fc(h.mean((2, 3)))


@pytest.mark.parametrize('kind, gates', [('convrnn', 1), ('convgru', 3), ('convlstm', 4)])
def test_counts_by_hand(kind, gates):
    """A gate is 2 + 9 per position and channel, at every step; the size is the model's own, or the one given."""
    net = Net(CELLS[kind]).to('meta')
    params = 4 * 27 + gates * 4 * (2 + 9 + 1) + 4 * 5 + 5
    for size, positions in ((None, 4 * 3), ((3, 5, 7), 3 * 4)):
        macs = positions * (4 * 27 + 2 * gates * 4 * 11) + 4 * 5
        activations = positions * (4 + 2 * gates * 4 * 2) + 5
        expected = dict(params=params, macs=macs, activations=activations, input_size=list(size or (3, 8, 6)))
        assert complexity(net, size) == expected
    assert not net.conv._forward_hooks and not net.cell._forward_hooks


def test_no_hook_is_left_behind_by_an_input_that_does_not_fit():
    net = Net(CELLS['convgru']).to('meta')
    with pytest.raises(RuntimeError):
        complexity(net, (2, 8, 8))
    assert not [module for module in net.modules() if module._forward_hooks]


def test_folding_does_not_change_the_count_of_a_gate():
    net = timm.create_model('regnet_convgru_20').eval()
    deployed = reparameterize_model(net)
    assert not [name for name, _ in deployed.named_parameters() if name.endswith('.pw')]
    assert complexity(deployed.to('meta'))['macs'] == complexity(net.to('meta'))['macs'] == 48_370_304
