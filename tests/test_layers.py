"""What blocks are made of, against plain torch."""

import copy
import itertools

import pytest
import timm
import torch
from conftest import randomize, scaled_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import count_norms, needs_compiler, rule, small  # noqa: F401  the rule is a fixture
from torch import nn

from timm_regnet_rnn import layers, ops
from timm_regnet_rnn.conv_rnn import CELLS


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
        assert calls['training'] == 12 * _
        ops.set_ops('')
        net(x)
    assert calls['training'] == 24, 'three norms in each of four blocks'
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
    assert scaled_error(*gradients) < 1e-4 and calls == {'training': 24, 'step': 8, 'eval': 0, 'fuse': 8}


@needs_compiler
def test_norms_that_are_left_to_torch(monkeypatch):
    """Hooks fire; other norms, activations and settings are called as they are."""
    calls, seen = count_norms(monkeypatch), []
    net, x = small()
    net(x)
    assert calls['training'] == 12
    hook = net.layer1[0].act_h.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    net(x)
    assert calls['training'] == 23 and len(seen) == 1
    with torch.no_grad():
        net.eval()(x)
    assert calls['eval'] == 3 and len(seen) == 2
    hook.remove()
    net.layer1[0].bn_h.momentum = None
    net.train()(x)
    assert calls['training'] == 34 and net.layer1[0].bn_h.num_batches_tracked == 3
    for kwargs in (dict(norm_layer='groupnorm1'), dict(act_layer='silu')):
        net, x = small(**kwargs)
        net(x)
        with torch.no_grad():
            net.eval()(x)
    assert calls == {'training': 34, 'step': 10, 'eval': 3, 'fuse': 13}
    for change in (  # what timm has between a norm and its activation
        lambda block: block.drop_block.register_forward_hook(lambda module, args, out: seen.append(out.shape)),
        lambda block: setattr(block, 'drop_block', nn.Dropout(0.5)),
    ):
        net, x = small()
        change(net.layer1[0])
        net(x)
    assert calls['training'] == 34 + 2 * 11 and len(seen) == 3
    net, x = small(carry='raw')  # h' itself goes on, so that its norm is no part of the step
    with torch.no_grad():
        net.eval()(x)
    assert calls['eval'] == 3
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        net.train()(x[:1, :, :4, :4])


# BatchNorm and ReLU, at once or one after another


def norms(channels=16, seed=0, **kwargs):
    """A batch norm that is no longer new, and a ReLU."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(channels, **kwargs)
    return randomize(nn.Sequential(norm, nn.ReLU()))


def plain(norm, x):
    """ReLU(BN(x)) in float64 by the formula, with the statistics that training leaves."""
    x, weight, bias = x.double(), norm.weight.detach().double(), norm.bias.detach().double()
    mean, var = norm.running_mean.double(), norm.running_var.double()
    if norm.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    scale = weight / (var + norm.eps).sqrt()
    return ((x - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]).clamp(min=0)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize('shape', [(3, 16, 7, 5), (1, 16, 1, 2), (2, 7, 4, 3)])
def test_norm_and_activation_are_torchs(training, layout, shape):
    ours, torchs = (norms(shape[1]).train(training) for _ in range(2))
    x = torch.randn(shape).mul(3).add(1).contiguous(memory_format=layout)
    results = []
    for step in (lambda x: layers.norm_act(*ours, x), torchs):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = step(leaf)
        parameters = ours.parameters() if step is not torchs else torchs.parameters()
        out.mul(torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in parameters)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.state_dict().values(), torchs.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        results[0][0].double(), plain(norms(shape[1]).train(training)[0], x), rtol=1e-4, atol=1e-5
    )


def test_scale_and_shift_are_the_norm():
    norm = norms()[0].eval()
    scale, shift = layers.scale_and_shift(norm)
    x = torch.randn(2, 16, 3, 4)
    torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], norm(x), rtol=1e-5, atol=1e-5)


def test_a_step_takes_the_norm_only_where_it_is_the_same():
    """Eval mode, no gradient, channels_last, nothing but a plain norm and ReLU, and nobody listens."""
    cell = CELLS['convlstm'](16)
    norm, act = norms().eval()
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    takes = ops.fused_on_cpu(x)  # not where there is no compiler
    with torch.no_grad():
        assert layers.norm_in_step(cell, norm, act, x) == takes
        for other in (nn.BatchNorm2d(16, affine=False), nn.BatchNorm2d(16, momentum=None), nn.GroupNorm(1, 16)):
            assert not layers.norm_in_step(cell, other.eval(), act, x)
        assert not layers.norm_in_step(cell, norm, nn.SiLU(), x)
        assert not layers.norm_in_step(cell, norm, act, x.double())
        assert not layers.norm_in_step(cell, norm.train(), act, x)
        norm.eval()
        for module in (cell, norm, act):
            hook = module.register_forward_hook(lambda *_: None)
            assert not layers.norm_in_step(cell, norm, act, x)
            hook.remove()
        assert layers.norm_in_step(cell, norm, act, x) == takes
    assert not layers.norm_in_step(cell, norm, act, x)


def test_a_cell_is_its_step_only_where_nothing_else_would_be_called():
    """Not where a tool has put something around it: a subclass, a wrapper, another forward, a hook."""

    class Louder(CELLS['convlstm']):
        def forward(self, *args, **kwargs):
            return tuple(2 * t for t in super().forward(*args, **kwargs))

    cell = CELLS['convlstm'](16)
    assert layers.is_step(cell) and not layers.is_step(Louder(16)) and not layers.is_step(torch.compile(cell))
    cell.forward = cell.forward
    assert not layers.is_step(cell)
    del cell.forward
    hook = cell.register_forward_pre_hook(lambda *_: None)
    assert not layers.is_step(cell)
    hook.remove()
    assert layers.is_step(cell)


@needs_compiler
@pytest.mark.parametrize('training', [True, False])
def test_a_replaced_forward_is_called(training):
    """As accelerate, and whoever patches an instance, leave it; the numbers are the patched net's."""
    net, x = small()
    net.train(training)
    for name, module in (('bn_h', net.layer1[0]), ('act_h', net.layer1[1]), ('regulator', net.layer1)):
        called, forward = [], getattr(module, name).forward

        def patched(*args, called=called, forward=forward):
            called.append(1)
            return forward(*args)

        getattr(module, name).forward = patched
        with torch.no_grad():
            net(x)
        assert len(called) == (2 if name == 'regulator' else 1), name


def test_a_step_takes_the_fuse_convolution_only_where_it_is_the_same():
    """A plain 1x1 convolution of twice the width, no wider than WIDEST, and what `norm_in_step` says of norms."""
    conv, (norm, act) = nn.Conv2d(32, 16, 1, bias=False), norms().eval()
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    main = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    assert layers.fuse_in_step(conv, norm, act, x, main) and layers.fuse_in_step(conv, nn.Identity(), act, x, x)
    for other in (nn.BatchNorm2d(16), nn.BatchNorm2d(16, affine=False).eval(), nn.GroupNorm(1, 16)):
        assert not layers.fuse_in_step(conv, other, act, x, main)
    for other in (nn.SiLU(), nn.Identity()):
        assert not layers.fuse_in_step(conv, norm, other, x, main)
        assert not layers.fuse_in_step(conv, nn.Identity(), other, x, main)
    assert not layers.fuse_in_step(nn.Conv2d(24, 16, 1), norm, act, x, main)
    for other in (
        nn.Linear(32, 16),
        nn.Conv2d(32, 16, 3, padding=1),
        nn.Conv2d(32, 16, 1, 2),
        nn.Conv2d(32, 16, 1, groups=2),
    ):
        assert not layers.fuse_in_step(other, norm, act, x, main)
    assert not layers.fuse_in_step(conv, norm, act, x, main[:, :8])
    assert not layers.fuse_in_step(conv, norm, act, x, main.double())
    assert not layers.fuse_in_step(conv, norm, act, x, torch.randn(1, 16, 4, 4))
    assert not layers.fuse_in_step(conv, norm, act, x[:0], main[:0])
    with torch.autocast('cpu', torch.bfloat16):
        assert not layers.fuse_in_step(conv, norm, act, x, main)
    wide = nn.Conv2d(4 * layers.WIDEST, 2 * layers.WIDEST, 1)
    assert not layers.fuse_in_step(wide, nn.Identity(), act, x, x)
    for module in (conv, norm, act):
        hook = module.register_forward_hook(lambda *_: None)
        assert not layers.fuse_in_step(conv, norm, act, x, main)
        hook.remove()
    nn.utils.parametrizations.weight_norm(conv)
    assert not layers.fuse_in_step(conv, norm, act, x, main)


def test_a_training_step_takes_the_fuse_convolution_only_where_it_is_the_same():
    """As in eval mode, but with a norm that is trained, and no bias before it."""
    conv, (norm, act) = nn.Conv2d(32, 16, 1, bias=False), norms()
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    takes = ops.fused_on_cpu(x)  # not where there is no compiler
    assert layers.fuse_in_norm_step(conv, norm, act, x, x) == takes
    assert not layers.fuse_in_norm_step(nn.Conv2d(32, 16, 1), norm, act, x, x)
    assert not layers.fuse_in_norm_step(nn.Conv2d(32, 16, 3, padding=1, bias=False), norm, act, x, x)
    wide = [nn.Conv2d(4 * layers.WIDEST, 2 * layers.WIDEST, 1, bias=False), nn.BatchNorm2d(2 * layers.WIDEST), act]
    maps = torch.randn(1, 2 * layers.WIDEST, 4, 4).contiguous(memory_format=torch.channels_last)
    assert not layers.fuse_in_norm_step(*wide, maps, maps)
    for other in (nn.BatchNorm2d(16).eval(), nn.BatchNorm2d(16, affine=False), nn.GroupNorm(1, 16), nn.Identity()):
        assert not layers.fuse_in_norm_step(conv, other, act, x, x)
    assert not layers.fuse_in_norm_step(conv, norm, nn.SiLU(), x, x)
    assert not layers.fuse_in_norm_step(conv, norm, act, x, x[:, :8])
    assert not layers.fuse_in_norm_step(conv, norm, act, x, x.contiguous())
    assert not layers.fuse_in_norm_step(conv, norm, act, x, x[:, :, :1, :1]), 'one value a channel is refused by torch'
    for module in (conv, norm, act):
        hook = module.register_forward_hook(lambda *_: None)
        assert not layers.fuse_in_norm_step(conv, norm, act, x, x)
        hook.remove()
    assert layers.fuse_in_norm_step(conv, norm, act, x, x) == takes


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('folded', [True, False])
def test_the_fuse_kernel_is_convolution_and_norm(bias, folded):
    conv, norm = nn.Conv2d(32, 16, 1, bias=bias), nn.Identity() if folded else norms()[0].eval()
    weight, shift = layers.fuse_kernel(conv, norm)
    x = torch.randn(2, 32, 3, 4)
    got = nn.functional.conv2d(x, weight[:, :, None, None], shift)
    torch.testing.assert_close(got, norm(conv(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'register',
    [
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: module.register_full_backward_pre_hook(lambda *_: None),
        lambda module: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
        lambda module: torch.nn.modules.module.register_module_full_backward_hook(lambda *_: None),
    ],
    ids=['forward', 'before', 'backward', 'before backward', 'everywhere', 'everywhere backward'],
)
def test_every_hook_listens(register):
    heard, other = nn.ReLU(), nn.ReLU()
    assert not layers.listened(heard, other)
    hook = register(heard)
    try:
        assert layers.listened(other, heard)
    finally:
        hook.remove()
    assert not layers.listened(other, heard)


# the convolutions


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('layouts', list(itertools.product((torch.channels_last, torch.contiguous_format), repeat=2)))
@pytest.mark.parametrize('gradients', [True, False])
def test_the_fuse_convolution_is_one_over_both(bias, layouts, gradients):
    conv = nn.Conv2d(5 + 3, 5, 1, bias=bias)
    tensors = [torch.randn(2, n, 4, 7).contiguous(memory_format=layout) for n, layout in zip((5, 3), layouts)]
    results = []
    for run in (lambda x, h: layers.fuse(conv, x, h), lambda x, h: conv(torch.cat((x, h), 1))):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_(gradients) for t in tensors]
        with torch.set_grad_enabled(gradients):
            out = run(*leaves)
        results.append([out])
        if gradients:
            results[-1] += torch.autograd.grad(out.sin().sum(), [*leaves, *conv.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_took_the_fuse_convolutions_place_is_called():
    x, h, seen = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3), []
    assert torch.equal(layers.fuse(nn.Identity(), x, h), torch.cat((x, h), 1))
    conv = nn.Conv2d(4, 2, 1)
    conv.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    layers.fuse(conv, x, h)
    assert seen == [(1, 4, 3, 3)]
    for other in (nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(4, 2, 1, 2), nn.Conv2d(4, 2, 1, groups=2)):
        with torch.no_grad():
            assert torch.equal(layers.fuse(other, x, h), other(torch.cat((x, h), 1)))


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.sampled_from([1, 2]),
    last=st.booleans(),
)
def test_samples_first_is_the_same_convolution(height, width, stride, groups, last):
    """Odd sizes and unequal strides; outputs and gradients."""
    x = torch.randn(2, 4, height, width)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    conv, twin = nn.Conv2d(4, 6, 1, stride, groups=groups), layers.SampledConv2d(4, 6, 1, stride, groups=groups)
    twin.load_state_dict(conv.state_dict())
    results = []
    for module in (conv, twin):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = module.double()(leaf.double())
        results.append([out, *torch.autograd.grad(out.sin().sum(), [leaf, *module.parameters()])])
    assert results[1][0].shape == (2, 6, -(-height // stride[0]), -(-width // stride[1]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_only_convolutions_that_need_it_sample_first():
    sizes = dict(needs=(8, 4, 1, 2), wide=(16, 4, 1, 2), plain=(8, 4, 1, 1), large=(8, 4, 3, 2))
    net = nn.ModuleDict({name: nn.Conv2d(*args) for name, args in sizes.items()})
    net['padded'] = nn.Conv2d(8, 4, 1, 2, padding=1)
    layers.sample_first(net)
    assert {name for name, conv in net.items() if type(conv) is layers.SampledConv2d} == {'needs'}


def test_names_that_timm_knows_pass():
    kwargs = dict(block_args=dict(attn_layer='eca'), aa_layer='')
    assert layers.check_layers('silu', 'groupnorm1', 'avgmax', kwargs) is None
    assert layers.check_layers(nn.ReLU, nn.BatchNorm2d, '', {}) is None
    with pytest.raises(ValueError, match="attn_layer: timm has no 'sea'; give a name it knows, or a class."):
        layers.check_layers('relu', 'batchnorm2d', 'avg', dict(block_args=dict(attn_layer='sea')))
