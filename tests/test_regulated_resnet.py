import copy
import gc
import io
import weakref

import pytest
import timm
import torch
import transcription
from conftest import randomize, scaled_error
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SEModule
from timm.models.resnet import downsample_conv
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from timm_regnet_rnn.conv_rnn import CELLS, RegulatorCell
from timm_regnet_rnn.regulated_resnet import (
    RegulatedBasicBlock,
    RegulatedBottleneck,
    RegulatedResNet,
    RegulatedStage,
    TimeStep,
)

LITERAL = {RegulatedBasicBlock: transcription.basic_block, RegulatedBottleneck: transcription.bottleneck}


def advance(block, cell, x, h=None, c=None, kernel=None):
    """A block as a function: features, h and c."""
    step = TimeStep(cell, h, c, *(kernel or cell.kernel()))
    return block(x, step), *step.next


def tiny(block='bottleneck', **kwargs):
    """A whole net that runs in milliseconds."""
    args = dict(block=block, layers=(2, 2), channels=(8, 16), stem_type='cifar', num_classes=7)
    return randomize(RegulatedResNet(**{**args, **kwargs})).eval()


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
def test_stage_is_its_blocks_in_sequence(kind):
    net = tiny(regulator=kind)
    stage = net.layer1
    assert isinstance(stage, RegulatedStage)
    x = torch.randn(2, 8, 6, 6)
    h = c = None
    out = x
    for k in range(2):
        out, h, c = advance(stage[k], stage.regulator, out, h, c)
    torch.testing.assert_close(stage(x), out)


def test_stage_is_a_sequence_of_blocks():
    stage = tiny().layer2
    assert len(stage) == 2
    assert list(stage) == [stage[0], stage[1]]
    assert stage[-1] is stage[1]
    assert [name for name, _ in stage.named_children()] == ['0', '1', 'regulator']


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


def test_a_stage_behaves_like_a_sequential():
    net = tiny(layers=(3, 2)).train(False)
    x, stage = torch.randn(2, 8, 6, 6), net.layer1
    first = stage[:1]
    assert isinstance(first, RegulatedStage) and len(first) == 1 and first.regulator is stage.regulator
    torch.testing.assert_close(first(x), advance(stage[0], stage.regulator, x)[0])
    torch.testing.assert_close(stage[:](x), stage(x))
    seen = []
    stage.insert(1, nn.Identity())
    stage[1].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(stage(x), stage[::2][:1].extend([stage[2], stage[3]])(x))
    assert seen and len(stage) == 4 and 'regulator' in repr(net)
    del stage[1]
    del stage[-1]
    assert [name for name, _ in stage.named_children()] == ['0', '1', 'regulator']
    torch.testing.assert_close(stage(x), stage[:2](x))
    stage[1] = nn.Identity()
    torch.testing.assert_close(stage(x), first(x))


def test_a_block_alone_needs_a_regulator():
    x = torch.randn(1, 8, 6, 6)
    with pytest.raises(TypeError, match='call the stage'):
        tiny().layer1[0](x)
    assert tiny(share_regulator=False).layer1[0](x).shape == (1, 32, 6, 6)


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


# arguments


def regulated(net):
    return [isinstance(getattr(net, name), RegulatedStage) for name in net.stage_names]


def test_regulated_stages():
    assert regulated(tiny()) == [True, True]
    assert regulated(tiny(regulated_stages=(2,))) == [False, True]
    assert regulated(tiny(regulated_stages=1)) == [True, False]
    assert regulated(tiny(regulated_stages=[])) == [False, False]
    assert regulated(tiny(regulator=None)) == regulated(tiny(regulator='none')) == [False, False]
    without = tiny(regulated_stages=(2,))
    assert not any('regulator' in k for k in without.layer1.state_dict())
    assert without(torch.randn(1, 3, 8, 8)).shape == (1, 7)


def test_share_regulator():
    shared, own = tiny(), tiny(share_regulator=False)
    cells = [m for m in own.modules() if type(m) in CELLS.values()]
    assert len(cells) == 4 and own.layer1.regulator is None
    params = [sum(p.numel() for p in net.parameters()) for net in (shared, own)]
    assert params[1] - params[0] == 12 * 4 * (8 + 16)
    own.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert not [n for n, p in own.named_parameters() if p.grad is None]  # as DDP demands


def test_carry_changes_the_function():
    norm, raw = tiny(), tiny(carry='raw')
    raw.load_state_dict(norm.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert (norm(x) - raw(x)).abs().max() > 1e-3


@pytest.mark.parametrize('output_stride, size', [(32, 4), (2, 8)])
def test_output_stride_cifar(output_stride, size):
    net = tiny(layers=(2, 2, 2), channels=(8, 8, 8), output_stride=output_stride)
    assert net.forward_features(torch.randn(1, 3, 16, 16)).shape[-2:] == (size, size)
    assert net.feature_info[-1]['reduction'] == 16 // size


@pytest.mark.parametrize('output_stride', [8, 16])
def test_output_stride_imagenet(output_stride):
    net = timm.create_model('regnet_convrnn_50', output_stride=output_stride, num_classes=0, global_pool='').eval()
    assert net(torch.randn(1, 3, 64, 96)).shape[-2:] == (64 // output_stride, 96 // output_stride)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(drop_path_rate=0.2),
        dict(drop_rate=0.3),
        dict(act_layer='silu'),
        dict(norm_layer='groupnorm1'),
        dict(block_args=dict(attn_layer='eca')),
        dict(global_pool='avgmax'),
        dict(in_chans=1),
        dict(num_classes=0),
        dict(avg_down=True),
        dict(zero_init_last=False),
        dict(drop_block_rate=0.1),
        dict(dtype=torch.float64),
        dict(cardinality=4, base_width=32),
        dict(block_reduce_first=2),
        dict(down_kernel_size=3),
        dict(aa_layer=nn.AvgPool2d),
    ],
)
def test_arguments_of_timm_resnets(kwargs):
    net = tiny(**kwargs).train()
    x = torch.randn(2, kwargs.get('in_chans', 3), 16, 16, dtype=kwargs.get('dtype', torch.float32))
    out = net(x)
    features = net.head_hidden_size
    assert out.shape == (2, kwargs.get('num_classes', 7) or features) and out.dtype == x.dtype
    out.sum().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    'kwargs, error, words',
    [
        (dict(regulater='convgru'), TypeError, ['regulater', 'regulator', 'drop_path_rate', 'regulated_stages']),
        (dict(regulator='lstm'), ValueError, ['regulator', "'lstm'", 'convlstm', 'none']),
        (dict(regulated_stages=(0,)), ValueError, ['regulated_stages', '1', '2']),
        (dict(regulated_stages=3), ValueError, ['regulated_stages', '1', '2']),
        (dict(carry='cell'), ValueError, ['carry', "'norm'", "'raw'"]),
        (dict(block='bottle'), ValueError, ['block', 'basic', 'bottleneck']),
        (dict(stem_type='deeper'), ValueError, ['stem_type', 'cifar']),
        (dict(layers=(-1, 2)), ValueError, ['layers', 'positive']),
        (dict(layers=(2, 2, 2)), ValueError, ['layers', '2 positive']),
        (dict(channels=(8,) * 5, layers=(1,) * 5), ValueError, ['channels', '1 to 4']),
        (dict(channels=(8,), layers=(1,)), ValueError, ['layers', 'two blocks']),
        (dict(block=['basic']), ValueError, ['block', 'bottleneck']),
        (dict(output_stride=7), ValueError, ['output_stride', '16']),
        (dict(in_chans=0), ValueError, ['in_chans', 'at least 1']),
        (dict(num_classes=-1), ValueError, ['num_classes']),
        (dict(channels=(7, 8)), ValueError, ['even']),
        (dict(replace_stem_pool=True), ValueError, ['replace_stem_pool']),
    ],
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error) as caught:
        tiny(**kwargs)
    message = str(caught.value)
    assert '\n' not in message
    assert all(word in message for word in words), message


# inputs


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    block=st.sampled_from(['basic', 'bottleneck']),
    cifar=st.booleans(),
)
def test_any_image_size(height, width, block, cifar):
    args = {} if cifar else dict(stem_type='', layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    net = tiny(block, **args)
    reduction = net.feature_info[-1]['reduction']
    out = net.forward_features(torch.randn(1, 3, height, width))
    assert out.shape[-2:] == (-(-height // reduction), -(-width // reduction))
    assert net.forward_head(out).isfinite().all()


@pytest.mark.parametrize(
    'shape, words',
    [
        ((2, 4, 8, 8), ['expected 3 channels', '4, 8, 8']),
        ((3, 8, 8), ['batch of images (B, C, H, W)', '3, 8, 8']),
        ((2, 3, 8), ['batch of images (B, C, H, W)']),
    ],
)
def test_bad_input(shape, words):
    with pytest.raises(AssertionError) as caught:
        tiny()(torch.randn(shape))
    assert all(word in str(caught.value) for word in words)


def test_checkpoint_that_does_not_fit():
    """The library says all that is wrong."""
    net, other = tiny(), tiny(channels=(8, 32))
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict(other.state_dict())
    assert str(caught.value).count('size mismatch for layer2') > 20
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match='Missing key'):
        net.load_state_dict({'a': torch.zeros(1)})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# what timm does with its own models


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


@pytest.mark.parametrize('kwargs', [{}, dict(share_regulator=False), dict(regulated_stages=(2,))])
def test_grad_checkpointing_gives_the_same_gradients(kwargs):
    x = torch.randn(2, 3, 8, 8)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = tiny(**kwargs).train()
        net.set_grad_checkpointing(checkpointing)
        net(x).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_grad_checkpointing_saves_memory():
    sizes = []
    for checkpointing in (False, True):
        net, saved = tiny(layers=(4, 4)).train(), []
        net.set_grad_checkpointing(checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            net(torch.randn(2, 3, 8, 8))
        sizes.append(sum(saved))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize('kind', [*CELLS, None])
@pytest.mark.parametrize('share', [True, False])
def test_torchscript(kind, share):
    net = tiny(regulator=kind, share_regulator=share)
    x = torch.randn(1, 3, 9, 7)
    scripted = torch.jit.script(net)
    torch.testing.assert_close(scripted(x), net(x))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(reparameterize_model(net)), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', CELLS)
def test_fx(kind):
    net = tiny(regulator=kind)
    x = torch.randn(1, 3, 9, 7)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))


def test_compile_fullgraph_trains():
    grads = []
    x = torch.randn(2, 3, 8, 8)
    for wrap in (lambda net: net, lambda net: torch.compile(net, fullgraph=True, backend='aot_eager')):
        torch.manual_seed(0)
        net = tiny().train()
        wrap(net)(x).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compile_inductor():
    net = tiny(layers=(1, 2), block='basic')
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', CELLS)
def test_export(kind):
    net = tiny(regulator=kind)
    batch, height, width = (torch.export.Dim(n, min=lo, max=64) for n, lo in (('b', 1), ('h', 4), ('w', 4)))
    exported = torch.export.export(
        net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch, 2: 2 * height, 3: 2 * width},)
    ).module()
    for size in ((1, 3, 8, 8), (3, 3, 10, 12)):
        x = torch.randn(size)
        torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', CELLS)
@pytest.mark.parametrize('deploy', [False, True])
def test_onnx(kind, deploy, tmp_path):
    import onnxruntime

    net = tiny(regulator=kind)
    x = torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        expected = net(x).numpy()
    file = tmp_path / 'net.onnx'
    torch.onnx.export(reparameterize_model(net) if deploy else net, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert abs(out - expected).max() < 1e-5 * max(1.0, abs(expected).max())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    net = tiny()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast('cpu', dtype=dtype):
        out = net(x)
    assert out.dtype == dtype
    assert scaled_error(out.float(), net(x)) < 20 * torch.finfo(dtype).eps


def test_half_precision_training_step():
    net = tiny().to(torch.bfloat16).train()
    net(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize('kind', CELLS)
def test_channels_last(kind):
    net = tiny(regulator=kind)
    x = torch.randn(2, 3, 9, 7)
    expected = net(x)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert last.forward_features(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x), expected, rtol=1e-4, atol=1e-5)
    deployed = reparameterize_model(net).to(memory_format=torch.channels_last)
    torch.testing.assert_close(deployed(x), expected, rtol=1e-4, atol=1e-5)


def test_meta_device():
    net = timm.create_model('regnet_convlstm_50', device='meta')
    assert {t.device.type for t in net.state_dict().values()} == {'meta'}
    small = RegulatedResNet('basic', (1, 1), channels=(8, 8), stem_type='cifar', device='meta')
    small.to_empty(device='cpu')
    for module in small.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    small.init_weights()
    small.fc.reset_parameters()
    assert small.eval()(torch.randn(1, 3, 8, 8)).isfinite().all()


def test_init_weights_draws_the_regulators_anew():
    net = tiny()
    before = net.layer1.regulator.dw.clone()
    net.init_weights()
    after = net.layer1.regulator
    assert not torch.equal(after.dw, before)
    assert torch.equal(after.bias[1], torch.ones(8))  # the forget gate


def test_zero_init_last():
    net = RegulatedResNet('basic', (1, 1), channels=(8, 8), stem_type='cifar')
    assert torch.count_nonzero(net.layer1[0].bn2.weight) == 0
    net = RegulatedResNet('basic', (1, 1), channels=(8, 8), stem_type='cifar', zero_init_last=False)
    assert torch.count_nonzero(net.layer1[0].bn2.weight) == 8


def test_prune_intermediate_layers():
    x = torch.randn(2, 3, 8, 8)
    for indices in ([0], [1], [0, 2]):
        net = tiny().train()
        taken = net.prune_intermediate_layers(indices)
        assert taken == indices
        features = net.forward_intermediates(x, indices=taken, intermediates_only=True, stop_early=True)
        sum(f.sum() for f in features).backward()
        assert not [n for n, p in net.named_parameters() if p.grad is None]
        assert net(x).shape[1] == net.num_features == net.feature_info[indices[-1]]['num_chs']


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
