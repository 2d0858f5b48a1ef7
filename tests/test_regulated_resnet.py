import copy
import io

import pytest
import timm
import torch
from conftest import advance, scaled_error, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import reparameterize_model
from torch import nn

from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.regulated_resnet import (
    RegulatedResNet,
    RegulatedStage,
)


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
