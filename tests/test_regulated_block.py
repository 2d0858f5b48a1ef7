"""The blocks: against the transcription of the paper, their hooks, their control and their checkpoints."""

import copy

import pytest
import torch
import transcription
from conftest import advance, randomize, scaled_error, tiny
from timm.layers import SEModule
from timm.models.resnet import downsample_conv
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.regulated_block import BLOCKS, RegulatedBasicBlock, RegulatedBottleneck, TimeStep
from timm_regnet_rnn.regulated_resnet import RegulatedResNet

LITERAL = {RegulatedBasicBlock: transcription.basic_block, RegulatedBottleneck: transcription.bottleneck}


def make_block(cls, kind, stride, carry='norm', se=False):
    width = 4
    inplanes = width * cls.expansion if stride == 1 else width
    downsample = None
    if stride == 2:
        downsample = downsample_conv(inplanes, width * cls.expansion, 1, stride)
    block = cls(inplanes, width, stride, downsample, regulator=kind, carry=carry, attn_layer=SEModule if se else None)
    return randomize(block).double().eval(), CELLS[kind](width, dtype=torch.float64), inplanes


@pytest.mark.parametrize('cls', LITERAL)
@pytest.mark.parametrize('kind', CELLS)
@pytest.mark.parametrize('stride, carry, se', [(1, 'norm', False), (2, 'norm', True), (1, 'raw', True)])
def test_block_equals_transcription(cls, kind, stride, carry, se):
    """Two steps, so that the carried state matters; odd sizes, so that the pool's border does. Gradients too."""
    block, cell, inplanes = make_block(cls, kind, stride, carry, se)
    x = torch.randn(2, inplanes, 7, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters(), *cell.parameters()]
    weights = transcription.gate_weights(cell)
    ours, theirs, state, literal_state = 0, 0, (None, None), (None, None)
    for _ in range(2):
        out, *state = advance(block, cell, x, *state)
        literal, *literal_state = LITERAL[cls](x, *literal_state, block, transcription.CELLS[kind], weights, carry)
        torch.testing.assert_close(out, literal, rtol=0, atol=1e-10)
        torch.testing.assert_close(state[0], literal_state[0], rtol=0, atol=1e-10)
        ours, theirs = ours + out.sin().sum(), theirs + literal.sin().sum()
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize('cls', LITERAL)
def test_block_gradcheck(cls):
    block, cell, inplanes = make_block(cls, 'convlstm', 2, se=True)
    x = torch.randn(1, inplanes, 3, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*cell.named_parameters())

    def run(x, *values):
        kernel = cell.kernel() if not values else (values[0][..., None, None] * values[1].unsqueeze(2), values[2])
        _, h, c = advance(block, cell, x, None, None, kernel)
        return advance(block, cell, x, h, c, kernel)

    assert names == ('pw', 'dw', 'bias')
    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize('kind', CELLS)
@pytest.mark.parametrize('share', [True, False])
@pytest.mark.parametrize('mode', ['eval', 'no_grad', 'train', 'checkpointed'])
def test_hooks_fire(kind, share, mode):
    """Once per time step on the regulator and once per block, whose output is its features alone."""
    net = tiny(regulator=kind, share_regulator=share, layers=(3, 2)).train(mode in ('train', 'checkpointed'))
    net.set_grad_checkpointing(mode == 'checkpointed')
    plain = copy.deepcopy(net)
    states, features, normed = [], [], []
    for stage in (net.layer1, net.layer2):
        cells = [stage.regulator] if share else [block.regulator for block in stage]
        for cell in cells:
            cell.register_forward_hook(lambda module, args, out: states.append(out))
        for block in stage:
            block.register_forward_hook(lambda module, args, out: features.append(out))
            block.act_h.register_forward_hook(lambda module, args, out: normed.append(out))
    x = torch.randn(2, 3, 8, 8)
    with torch.set_grad_enabled(mode != 'no_grad'):
        torch.testing.assert_close(net(x), plain(x), rtol=1e-5, atol=1e-5)
    assert len(states) == len(features) == len(normed) == 5
    assert [out.shape[1:] for out in features] == [(32, 8, 8)] * 3 + [(64, 4, 4)] * 2
    assert [h.shape == c.shape == out.shape for (h, c), out in zip(states, normed)] == [True] * 5
    assert all(h.min() < 0 <= out.min() for (h, _), out in zip(states, normed))  # h' before its norm and ReLU


def test_a_block_alone_needs_a_regulator():
    x = torch.randn(1, 8, 6, 6)
    with pytest.raises(TypeError, match='call the stage'):
        tiny().layer1[0](x)
    assert tiny(share_regulator=False).layer1[0](x).shape == (1, 32, 6, 6)


def test_reentrant_checkpoints_of_blocks_are_refused():
    """They would cut the gradient in the state, which does not pass through them."""
    net, x = tiny().train(), torch.randn(2, 3, 8, 8)
    for block in net.layer1:
        run = block.forward
        block.forward = lambda *args, run=run: checkpoint(run, *args, use_reentrant=True)
    with pytest.raises(RuntimeError, match='use_reentrant=False'):
        net(x)


def test_checkpoints_of_blocks_give_the_same_gradients():
    x, grads = torch.randn(2, 3, 8, 8), []
    for wrapped in (False, True):
        torch.manual_seed(0)
        net = tiny().train()
        for block in (*net.layer1, *net.layer2) if wrapped else ():
            run = block.forward
            block.forward = lambda *args, run=run: checkpoint(run, *args, use_reentrant=False)
        net(x).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('block', ['basic', 'bottleneck'])
def test_the_control_is_the_fuse_convolution_without_a_memory(block):
    net, resnet = tiny(block, regulator='fuse'), tiny(block, regulator=None)
    assert not any('regulator' in name or 'bn_h' in name for name in net.state_dict())
    for fuse in (b.aa for stage in (net.layer1, net.layer2) for b in stage):
        nn.init.dirac_(fuse.conv_fuse.weight)
        norm = fuse.bn_fuse
        norm.weight.data.fill_(1)
        norm.bias.data.zero_()
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
    resnet.load_state_dict({k: v for k, v in net.state_dict().items() if '.aa.' not in k})
    x = torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        assert scaled_error(net(x), resnet(x)) < 1e-6
        assert scaled_error(reparameterize_model(randomize(net))(x), net(x)) < 1e-5
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))


def test_carry_changes_the_function():
    norm, raw = tiny(), tiny(carry='raw')
    raw.load_state_dict(norm.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert (norm(x) - raw(x)).abs().max() > 1e-3


def test_zero_init_last():
    net = RegulatedResNet('basic', (1, 1), channels=(8, 8), stem_type='cifar')
    assert torch.count_nonzero(net.layer1[0].bn2.weight) == 0
    net = RegulatedResNet('basic', (1, 1), channels=(8, 8), stem_type='cifar', zero_init_last=False)
    assert torch.count_nonzero(net.layer1[0].bn2.weight) == 8


@pytest.mark.parametrize('cls', LITERAL)
@pytest.mark.parametrize('kind', CELLS)
def test_a_block_with_its_own_cell_starts_from_zero(cls, kind):
    block = randomize(cls(4 * cls.expansion, 4, regulator=kind, share_regulator=False)).eval()
    x = torch.randn(2, 4 * cls.expansion, 5, 6)
    zero = torch.zeros(2, 4, 5, 6)
    first, other = TimeStep(None, zero, zero), TimeStep(None, zero + 1, zero + 1)
    torch.testing.assert_close(block(x), block(x, first))
    assert (block(x) - block(x, other)).abs().max() > 1e-3
    assert first.next[0].shape == (2, 4, 5, 6) and first.recorded
    with torch.no_grad():
        block(x, first)
    assert not first.recorded


def test_the_three_kinds_of_block():
    assert [*BLOCKS] == ['basic', 'bottleneck']
    for kinds in BLOCKS.values():
        widths = {
            name: sum(p.numel() for p in kinds[name](8 * kinds[name].expansion, 8).parameters()) for name in kinds
        }
        assert [getattr(kinds[name], 'regulated', False) for name in kinds] == [name == 'regulated' for name in kinds]
        # the fuse convolution is 8x8 and its norm 2x8; the regulator's norm 2x8, and 8x8 more for the state it brings
        assert widths['control'] - widths['plain'] == 64 + 16
        assert widths['regulated'] - widths['control'] == 64 + 16
