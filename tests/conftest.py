import json
import os
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'  # a test that talks to a server of its own lifts this for its subprocess

import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from push_client import client, hub, stand_in  # noqa: F401  fixtures

import timm_regnet_rnn  # noqa: F401  registers the models
from timm_regnet_rnn.regulated_block import TimeStep
from timm_regnet_rnn.regulated_resnet import RegulatedResNet

torch.set_num_threads(1)
settings.register_profile('shared machine', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('shared machine')

STAND_IN = Path(__file__).parent / 'stand_in'
RECIPES = Path(__file__).parent.parent / 'train_recipes'
OPTIONS = json.loads((RECIPES / 'options.json').read_text(encoding='utf-8'))['options']
CLASSES = ('cat', 'dog')


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


TRAIN_PY = """
import argparse
from neighbour import ParseKwargs

config_parser = parser = argparse.ArgumentParser(add_help=False)
parser.add_argument('--config')
parser = argparse.ArgumentParser()
parser.add_argument('data', nargs='?')
parser.add_argument('--batch-size', '-b', type=int, default=128)
parser.add_argument('--scale', type=float, nargs='+')
parser.add_argument('--input-size', type=int, nargs=3)
parser.add_argument('--amp', action='store_true')
parser.add_argument('--mode', choices=('a', 'b'))
parser.add_argument('--model-kwargs', nargs='*', action=ParseKwargs)
print('imported')
if __name__ == '__main__':
    raise SystemExit('trained')
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like a checkout of timm, with a train.py of seven options."""
    folder = tmp_path / 'checkout'
    (folder / 'timm').mkdir(parents=True)
    (folder / 'timm' / 'version.py').write_text("__version__ = '9.9.9'\n")
    (folder / 'neighbour.py').write_text('import argparse\nclass ParseKwargs(argparse.Action):\n    pass\n')
    (folder / 'train.py').write_text(TRAIN_PY)
    return folder


@pytest.fixture
def data(tmp_path):
    """Two classes of four padded images to train on and two to test on."""
    for split, count, size in (('train', 4, 40), ('test', 2, 32)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / 'data' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (size, size), (60 * i, 100 * label, 50)).save(folder / f'{i}.png')
    return tmp_path / 'data'


@pytest.fixture
def argv(tmp_path, data):
    """A command that runs in seconds; the last value of a repeated flag counts."""
    model = ['--model', 'regnet_convrnn_20', '--model-kwargs', 'layers=(1,1,1)', 'carry=raw']
    flags = ['--num-classes', '2', '--epochs', '3', '--seed', '7', '--device', 'cpu', '-j', '0', '--batch-size', '4']
    where = ['--data-dir', data, '--output', tmp_path / 'run', '--results', tmp_path / 'results.csv']
    return ['train', RECIPES / 'cifar_paper.yaml', *model, *flags, *where, '--timm-dir', STAND_IN]


@pytest.fixture
def recorded(monkeypatch):
    """The stand-in's options without asking it; that they are the same is a test of its own."""
    monkeypatch.setattr('timm_regnet_rnn.training.run.train_options', lambda _: OPTIONS)
