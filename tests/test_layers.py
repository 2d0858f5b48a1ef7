"""What blocks are made of, against plain torch."""

import copy

import pytest
import timm
import torch
from conftest import scaled_error
from test_ops import count_norms, needs_compiler, rule, small  # noqa: F401  the rule is a fixture
from torch import nn

from timm_regnet_rnn import layers, ops


@pytest.mark.parametrize(
    'kwargs, words',
    [
        (dict(act_layer='foo'), "act_layer: timm has no 'foo'"),
        (dict(norm_layer='foo'), "norm_layer: timm has no 'foo'"),
        (dict(global_pool='foo'), "global_pool: timm has no 'foo'"),
        (dict(aa_layer='foo'), "aa_layer: timm has no 'foo'"),
        (dict(block_args=dict(attn_layer='foo')), "attn_layer: timm has no 'foo'"),
        (dict(channels=(16, 0, 64)), 'channels must be positive'),
        (dict(channels=(16, 32.0, 64)), 'channels must be positive'),
    ],
)
def test_layers_that_timm_does_not_know(kwargs, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model('regnet_convlstm_20', **kwargs)


def test_layers_by_name_and_class():
    for kwargs in (
        dict(act_layer='silu'),
        dict(norm_layer=nn.BatchNorm2d),
        dict(global_pool=''),
    ):
        timm.create_model('regnet_convlstm_20', device='meta', **kwargs)
    assert 'regulator' in repr(timm.create_model('regnet_convlstm_20', device='meta'))


@pytest.mark.slow
def test_sampled_convolutions_compute_the_same():
    conv, twin = (torch.nn.Sequential(torch.nn.Conv2d(8, 4, 1, 2)) for _ in range(2))
    twin.load_state_dict(conv.state_dict())
    layers.sample_first(twin)
    assert type(twin[0]) is layers.SampledConv2d and isinstance(twin[0], torch.nn.Conv2d)
    for size in ((7, 9), (8, 6)):
        x = torch.randn(2, 8, *size)
        torch.testing.assert_close(twin(x), conv(x))


@needs_compiler
def test_norms_keep_their_statistics(monkeypatch):
    """Buffers after training, and the gradients of frozen norms."""
    calls = count_norms(monkeypatch)
    net, x = small()
    twin = copy.deepcopy(net)
    for _ in range(2):
        ops.set_ops('reference')
        twin(x)
        assert calls['training'] == 8 * _
        ops.set_ops('')
        net(x)
    assert calls['training'] == 16, 'two norms in each of four blocks'
    assert list(net.state_dict()) == list(twin.state_dict())
    for (name, ours), theirs in zip(net.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    gradients = []
    for model, name in ((net, ''), (twin, 'reference')):
        ops.set_ops(name)
        model.load_state_dict(net.state_dict())
        model.zero_grad()
        model.eval()(x).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert scaled_error(*gradients) < 1e-4 and calls == {'training': 16, 'eval': 0}


@needs_compiler
def test_norms_that_are_left_to_torch(monkeypatch):
    """Hooks fire; other norms, activations and settings are called as they are."""
    calls, seen = count_norms(monkeypatch), []
    net, x = small()
    net(x)
    assert calls['training'] == 8
    hook = net.layer1[0].act_h.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    net(x)
    assert calls['training'] == 15 and len(seen) == 1
    with torch.no_grad():
        net.eval()(x)
    assert calls['eval'] == 3 and len(seen) == 2
    hook.remove()
    net.layer1[0].bn_h.momentum = None
    net.train()(x)
    assert calls['training'] == 22 and net.layer1[0].bn_h.num_batches_tracked == 3
    for kwargs in (dict(norm_layer='groupnorm1'), dict(act_layer='silu')):
        net, x = small(**kwargs)
        net(x)
        with torch.no_grad():
            net.eval()(x)
    assert calls == {'training': 22, 'eval': 3}
    net, x = small(carry='raw')  # h' itself goes on, so that its norm is no part of the step
    with torch.no_grad():
        net.eval()(x)
    assert calls['eval'] == 3
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        net.train()(x[:1, :, :4, :4])
