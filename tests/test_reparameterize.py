"""Folding: a net that is deployed computes what it did, and what cannot be folded stays."""

import copy
import gc
import io
import weakref

import pytest
import timm
import torch
from conftest import randomize, scaled_error, tiny
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from timm_regnet_rnn.conv_rnn import CELLS, RegulatorCell
from timm_regnet_rnn.layers import SampledConv2d
from timm_regnet_rnn.reparameterize import fold_norm, fold_sequential


@pytest.mark.parametrize('wrap', [prune.identity, weight_norm, parametrizations.weight_norm, spectral_norm])
def test_weights_that_are_computed_at_each_call(wrap):
    """Pruning, weight and spectral norm of every weight: two steps of training, and evaluation."""
    net = tiny(layers=(2, 2)).train()
    for module in [m for m in net.modules() if isinstance(m, (nn.Conv2d, RegulatorCell))]:
        for name in ('pw', 'dw') if isinstance(module, RegulatorCell) else ('weight',):
            wrap(module, name)
    x = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        net(x).sum().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None]
    net.eval()
    with torch.no_grad():
        expected = net(x)
        assert scaled_error(reparameterize_model(net)(x), expected) < 1e-5
        if wrap is not spectral_norm:  # which changes the function, as it should
            plain = tiny(layers=(2, 2))
            plain.load_state_dict({k: v for k, v in baked(net).items() if k in plain.state_dict()})
            assert scaled_error(expected, plain(x)) < 1e-5


def baked(net):
    """The state dict with every weight as it is computed."""
    state = net.state_dict()
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, RegulatorCell)):
            names = ('pw', 'dw', 'bias') if isinstance(module, RegulatorCell) else ('weight',)
            state.update({f'{name}.{n}': getattr(module, n).detach() for n in names})
    return state


def test_a_net_is_freed_with_its_last_reference():
    net = tiny()
    gone = weakref.ref(net.layer1)
    conv1 = io.BytesIO()
    torch.save(net.conv1, conv1)
    assert conv1.tell() < 10_000
    gc.disable()
    try:
        del net
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize('kind', CELLS)
@pytest.mark.parametrize('block', ['basic', 'bottleneck'])
@pytest.mark.parametrize('share', [True, False])
def test_reparameterize_model(kind, block, share):
    net = tiny(block, regulator=kind, share_regulator=share, block_args=dict(attn_layer='se'))
    deployed = reparameterize_model(net)
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        assert scaled_error(deployed(x), net(x)) < 1e-5
    left = [name for name, m in deployed.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(name.endswith('.bn_h') for name in left) and len(left) == 4
    assert not [n for n, _ in deployed.named_parameters() if n.endswith(('.pw', '.dw'))]
    assert type(net.bn1) is nn.BatchNorm2d and hasattr(net.layer1[0], 'bn1')  # the original stays as it was


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(regulator=None),
        dict(regulated_stages=(2,)),
        dict(norm_layer='groupnorm1'),
    ],
)
def test_reparameterize_model_other(kwargs):
    net = tiny(**kwargs)
    x = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        assert scaled_error(reparameterize_model(net)(x), net(x)) < 1e-5


@pytest.mark.parametrize(
    'stem',
    [
        dict(stem_type='deep', stem_width=8, avg_down=True, replace_stem_pool=True),
        dict(stem_type=''),
        dict(stem_type='deep_tiered', stem_width=8),
    ],
)
def test_reparameterize_model_stems(stem):
    net = tiny(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), **stem)
    deployed = reparameterize_model(net)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert scaled_error(deployed(x), net(x)) < 1e-5
    assert all(n.endswith('bn_h') for n, m in deployed.named_modules() if isinstance(m, nn.BatchNorm2d))


def test_reparameterize_features_only():
    net = randomize(timm.create_model('regnet_convgru_20', features_only=True)).eval()
    deployed = reparameterize_model(net)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for a, b in zip(deployed(x), net(x)):
            assert scaled_error(a, b) < 1e-5
    assert type(deployed['bn1']) is nn.Identity and type(net['bn1']) is nn.BatchNorm2d


def test_a_copied_stem_does_not_drag_the_net_along():
    net = tiny()
    assert copy.deepcopy(net.conv1).reparameterize.net is None
    copied = copy.deepcopy(net)
    assert copied.conv1.reparameterize.net() is copied
    deployed = reparameterize_model(net)
    assert deployed.conv1.reparameterize.net is None  # and so deploying a second time changes nothing
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(reparameterize_model(deployed)(x), deployed(x))


def test_pickle_and_deepcopy():
    net = tiny()
    x = torch.randn(1, 3, 8, 8)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (loaded, copy.deepcopy(net)):
        assert torch.equal(other(x), net(x))
        reparameterize_model(other, inplace=True)
        assert type(other.bn1) is nn.Identity
    assert type(net.bn1) is nn.BatchNorm2d


def pair(conv, norm):
    """A convolution and a norm with statistics of its own, in a module of the names that `fold_norm` is told."""
    net = nn.Module()
    net.conv, net.norm = conv, norm
    return randomize(net).eval()


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('conv', [nn.Conv2d, SampledConv2d])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_folded_is_the_same_function(bias, conv, norm):
    net = pair(conv(4, 6, 1, 2, groups=2, bias=bias), nn.BatchNorm2d(6))
    x = torch.randn(2, 4, 7, 5)
    with torch.no_grad():
        want = net.norm(net.conv(x))
        if norm is nn.SyncBatchNorm:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        fold_norm(net, 'conv', 'norm')
        torch.testing.assert_close(net.conv(x), want, rtol=1e-4, atol=1e-5)
    assert type(net.norm) is nn.Identity and type(net.conv) is conv
    # by the formula: w = weight * gamma / sqrt(var + eps)
    other = pair(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0))
    for tensor, value in zip((other.conv.weight, other.norm.weight, other.norm.bias), (3.0, 5.0, 7.0)):
        nn.init.constant_(tensor, value)
    other.norm.running_mean.fill_(2.0)
    other.norm.running_var.fill_(4.0)
    fold_norm(other, 'conv', 'norm')
    assert other.conv.weight.item() == 7.5 and other.conv.bias.item() == 2.0  # 3 * 5 / 2, and 7 - 2 * 5 / 2


class Quantized(nn.Conv2d):
    """A convolution of somebody's own."""


@pytest.mark.parametrize(
    'conv, norm',
    [
        (nn.Conv2d(2, 4, 1), nn.GroupNorm(1, 4)),
        (nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        (nn.Conv2d(2, 4, 1), nn.Identity()),
        (Quantized(2, 4, 1), nn.BatchNorm2d(4)),
        (nn.ConvTranspose2d(2, 4, 1), nn.BatchNorm2d(4)),
        (parametrizations.weight_norm(nn.Conv2d(2, 4, 1)), nn.BatchNorm2d(4)),
    ],
)
def test_what_is_not_surely_the_same_stays(conv, norm):
    net = nn.Module()
    net.conv, net.norm = conv, norm
    fold_norm(net, 'conv', 'norm')
    fold_norm(net, 'conv', 'none')
    fold_norm(net, 'none', 'norm')
    assert net.conv is conv and net.norm is norm


def test_what_somebody_listens_to_stays():
    for which in ('conv', 'norm'):
        net = pair(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
        hook = getattr(net, which).register_forward_hook(lambda *_: None)
        fold_norm(net, 'conv', 'norm')
        assert type(net.norm) is nn.BatchNorm2d
        hook.remove()
        fold_norm(net, 'conv', 'norm')
        assert type(net.norm) is nn.Identity


def test_a_sequential_folds_what_follows_directly():
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    )
    randomize(net).eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        want = net(x)
        fold_sequential(net)
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)
    kinds = [type(module) for module in net]
    assert kinds == [nn.Conv2d, nn.Identity, nn.ReLU, nn.BatchNorm2d, nn.Conv2d, nn.Identity]
    fold_sequential(None)
    fold_sequential(nn.Identity())
