import os
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import randomize, scaled_error
from spread_nets import SpreadNet
from torch import nn
from torch.nn import functional as F

from timm_regnet_rnn import from_resnet
from timm_regnet_rnn.errors import one_line
from timm_regnet_rnn.warm_start import checkpoint_filter_fn, rectified_gaussian_moments

RESNETS = ['resnet18', 'resnet50', 'resnet101d', 'resnext50_32x4d', 'wide_resnet50_2', 'seresnet50']


@pytest.mark.parametrize('name', RESNETS)
def test_same_logits_and_gradients_by_the_second_step(name):
    resnet = randomize(timm.create_model(name)).eval()
    model = from_resnet(resnet)
    assert not model.training
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert scaled_error(model(x), resnet(x)) < 1e-5

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = torch.arange(4)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    regulator = {n: p.grad for n, p in model.named_parameters() if '.regulator.' in n or '.bn_h.' in n}
    assert len(regulator) == 4 * 3 + 2 * sum(len(getattr(resnet, f'layer{i}')) for i in (1, 2, 3, 4))
    assert not [n for n, g in regulator.items() if not g.abs().sum() > 0]


@pytest.mark.parametrize(
    'name',
    [
        'resnet10t',
        'resnet26t',
        'seresnext26d_32x4d',
        'resnetaa50',
        'resnetblur18',
        'ecaresnet26t',
        'resnet50s',
        'resnetrs50',
        'resnet34d',
    ],
)
def test_other_variants_of_timms_class(name):
    resnet = randomize(timm.create_model(name)).eval()
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        assert scaled_error(from_resnet(resnet, 'convrnn')(x), resnet(x)) < 1e-5


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(num_classes=7),
        dict(in_chans=1),
        dict(global_pool='max'),
        dict(output_stride=8),
        dict(num_classes=0),
        dict(act_layer='relu', drop_path_rate=0.1),
    ],
)
@pytest.mark.parametrize('regulator', ['convrnn', 'convgru'])
def test_adapted_resnets(kwargs, regulator):
    resnet = randomize(timm.create_model('resnet26', **kwargs)).eval()
    model = from_resnet(resnet, regulator, regulated_stages=(1, 3))
    x = torch.randn(1, kwargs.get('in_chans', 3), 64, 64)
    with torch.no_grad():
        assert scaled_error(model(x), resnet(x)) < 1e-5
    assert not any(k.startswith('layer2.regulator') for k in model.state_dict())


def test_training_mode_is_close():
    """The calibrated fuse norm changes a training forward pass less than one left at its defaults."""
    torch.manual_seed(0)
    resnet = randomize(timm.create_model('resnet18')).train()
    model = from_resnet(resnet)
    uncalibrated = from_resnet(resnet)
    for module in uncalibrated.modules():
        if hasattr(module, 'bn_fuse'):
            module.bn_fuse.reset_parameters()
    x = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        expected = resnet(x)
        error, plain = (((net(x) - expected).norm() / expected.norm()).item() for net in (model, uncalibrated))
    assert error < 0.6 * plain, (error, plain)


def test_moments_of_a_rectified_gaussian():
    gamma, beta = torch.tensor([1.0, 0.5, -2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, -1.0, -8.0, 0.7])
    z = torch.randn(2_000_000, 5, dtype=torch.float64) * gamma + beta
    mean, var = rectified_gaussian_moments(gamma, beta)
    torch.testing.assert_close(mean, z.relu().mean(0), rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(var, z.relu().var(0), rtol=1e-2, atol=1e-3)
    assert (var >= 0).all()


def test_keeps_data_settings_mode_and_type():
    resnet = timm.create_model('resnet50.a1_in1k', pretrained=False).double()
    model = from_resnet(resnet)
    assert model.training and next(model.parameters()).dtype == torch.float64
    cfg = model.pretrained_cfg
    assert cfg['architecture'] == 'regnet_convlstm_50' and cfg['tag'] == 'resnet50_a1_in1k'
    assert cfg['test_crop_pct'] == 1.0 and 'hf_hub_id' not in cfg


def test_by_name_without_weights():
    model = from_resnet('seresnet50', regulator='convgru', pretrained=False, num_classes=5, in_chans=1)
    assert model.pretrained_cfg['architecture'] == 'seregnet_convgru_50'
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    'argument, kwargs, error, words',
    [
        ('resnet51', {}, ValueError, ['resnet51', 'list_models']),
        ('resnet18', dict(regulator='lstm'), ValueError, ['convlstm', "'lstm'"]),
        ('vit_tiny_patch16_224', dict(pretrained=False), TypeError, ["timm's ResNet", 'VisionTransformer']),
        ('resnet50_gn', dict(pretrained=False), ValueError, ['batch norm', 'GroupNorm']),
        ('resnet18', dict(pretrained=False, carry='all'), ValueError, ['carry', 'raw']),
        (nn.Linear(1, 1), {}, TypeError, ["timm's ResNet", 'Linear']),
    ],
)
def test_bad_arguments(argument, kwargs, error, words):
    with pytest.raises(error) as caught:
        from_resnet(argument, **kwargs)
    assert '\n' not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_other_activation_and_head_arguments_are_refused():
    with pytest.raises(ValueError, match='SiLU'):
        from_resnet(timm.create_model('resnet18', act_layer='silu'))
    with pytest.raises(TypeError, match='num_classes'):
        from_resnet(timm.create_model('resnet18'), num_classes=3)


def test_checkpoint_of_another_architecture():
    model = timm.create_model('regnet_convlstm_18', device='meta')
    with pytest.raises(ValueError, match='another architecture') as caught:
        checkpoint_filter_fn(timm.create_model('convnext_atto').state_dict(), model)
    assert '\n' not in str(caught.value)


def test_checkpoint_of_another_depth():
    model = timm.create_model('regnet_convlstm_34')
    with pytest.raises(RuntimeError, match='Missing key') as caught:
        model.load_state_dict(checkpoint_filter_fn(timm.create_model('resnet18').state_dict(), model))
    assert str(caught.value).count('layer3.5.') > 10  # a library's caller reads all of it
    line = one_line(caught.value)
    assert line.startswith('the weights do not fit the model: Missing key') and len(line) < 400


def test_own_checkpoint_passes_through():
    model = timm.create_model('regnet_convgru_20')
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model) is state


# What people have: files, torchvision's models, a head of one's own, and two layouts of CIFAR nets.


@torch.no_grad()
def same(resnet, regnet, size=32):
    x = torch.randn(2, 3, size, size)
    return scaled_error(regnet(x), resnet(x)) < 1e-5


@pytest.mark.parametrize('shortcut', ['A', 'B'])
@pytest.mark.parametrize('depth, variant', [(20, 'regnet_convlstm_20'), (32, 'regnet_convlstm_32'), (14, None)])
def test_checkpoint_files_of_cifar_nets(tmp_path, depth, variant, shortcut):
    net = SpreadNet(depth, 7, shortcut)
    state = net.state_dict()
    if shortcut == 'A':
        state = {'state_dict': {f'module.{k}': v for k, v in state.items()}, 'best_prec1': 1.0}
    torch.save(state, tmp_path / 'net.th', _use_new_zipfile_serialization=depth != 20)  # of before torch 1.6 too
    regnet = from_resnet(str(tmp_path / 'net.th'))
    assert same(net, regnet) and regnet.num_classes == 7 and not regnet.training
    assert variant is None or regnet.pretrained_cfg['architecture'] == variant


@pytest.mark.parametrize('name', ['cifar_resnet_20', 'cifar_seresnet_32', 'cifar_resnet_56'])
def test_cifar_nets_of_ours(name):
    resnet = randomize(timm.create_model(name, num_classes=5)).eval()
    regnet = from_resnet(resnet, regulator='convgru')
    assert same(resnet, regnet) and regnet.pretrained_cfg['architecture'].endswith(name.split('_')[-1])
    with pytest.raises(TypeError, match='has regulators already'):
        from_resnet(regnet)


def test_a_head_of_ones_own():
    resnet = randomize(timm.create_model('resnet18')).eval()
    resnet.fc = nn.Linear(512, 7)
    regnet = from_resnet(resnet)
    assert same(resnet, regnet, 64) and regnet.num_classes == 7
    resnet.fc = nn.Sequential(nn.Linear(512, 7))
    with pytest.raises(TypeError, match='not Sequential'):
        from_resnet(resnet)


@pytest.mark.parametrize('name', ['resnet18', 'resnext50_32x4d', 'wide_resnet50_2'])
def test_models_and_files_of_torchvision(name, tmp_path):
    resnet = randomize(getattr(torchvision.models, name)(num_classes=6)).eval()
    assert same(resnet, from_resnet(resnet), 64)
    torch.save(resnet.state_dict(), tmp_path / 'net.pth')
    assert same(resnet, from_resnet(tmp_path / 'net.pth', regulator='convrnn'), 64)


def test_timm_loads_a_resnet_by_itself(tmp_path):
    """create_model's checkpoint_path, and load_state_dict, which train.py's --initial-checkpoint comes to."""
    resnet = randomize(timm.create_model('resnet18', num_classes=4)).eval()
    torch.save({'state_dict': resnet.state_dict()}, tmp_path / 'my.pth')
    regnet = timm.create_model('regnet_convlstm_18', num_classes=4, checkpoint_path=str(tmp_path / 'my.pth')).eval()
    assert same(resnet, regnet, 64)
    with pytest.raises(RuntimeError, match='size mismatch for fc.weight'):
        timm.create_model('regnet_convlstm_18', checkpoint_path=str(tmp_path / 'my.pth'))


TRAINED = sorted(Path(os.environ.get('CIFAR_RESNETS', 'nowhere')).glob('resnet*-*.th'))


@pytest.mark.skipif(not TRAINED, reason='CIFAR_RESNETS names no folder with resnet20-*.th and its like')
@pytest.mark.parametrize('file', TRAINED, ids=[file.stem for file in TRAINED])
def test_nets_that_others_trained(file):
    net = SpreadNet(int(re.findall(r'\d+', file.name)[0]))
    weights = torch.load(file, map_location='cpu', weights_only=True)['state_dict']
    net.load_state_dict({name.removeprefix('module.'): value for name, value in weights.items()})
    assert same(net, from_resnet(file))
