"""Counts of parameters and multiply-adds, against figures worked out by hand."""

import timm
import torch
from test_regnet_rnn import GOLDEN

from timm_regnet_rnn.complexity import complexity


def test_multiply_adds_of_the_design():
    assert round(GOLDEN['regnet_convlstm_50']['macs'] / 1e9, 2) == 4.56
    assert round(4.09 / (GOLDEN['regnet_convlstm_50']['macs'] / 1e9), 3) == 0.897
    with torch.device('meta'):
        resnet = complexity(timm.create_model('resnet50').eval())
    assert resnet['params'] == 25_557_032 and round(resnet['macs'] / 1e9, 2) == 4.09
