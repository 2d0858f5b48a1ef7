"""Warm start: a ResNet becomes a RegNet that computes the same function.

A ResNet is a model of timm's or torchvision's, or a state dict by itself, whose names and shapes say what it is; the
layouts of CIFAR ResNets that are spread widely are read too. The fuse convolution starts as [I | 0], so the regulator
is heard only once training moves it, and the norm behind it starts as the identity. Derived here, not in the paper.
"""

import itertools
import math
import re
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.layers import EcaModule, SEModule
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models import ResNet as TorchvisionResNet

from .conv_rnn import CELLS
from .regulated_block import PlainBasicBlock, PlainBottleneck, RegulatedBasicBlock, RegulatedBottleneck
from .regulated_resnet import RegulatedResNet
from .weights.load import read_weights

__all__ = ['as_resnet', 'checkpoint_filter_fn', 'describe', 'from_resnet']

# (block, layers) of the ImageNet nets that have an entrypoint
DEPTHS = {
    ('basic', (2, 2, 2, 2)): 18,
    ('basic', (3, 4, 6, 3)): 34,
    ('bottleneck', (3, 4, 6, 3)): 50,
    ('bottleneck', (3, 4, 23, 3)): 101,
    ('bottleneck', (3, 8, 36, 3)): 152,
}


def rectified_gaussian_moments(gamma: torch.Tensor, beta: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of ReLU(z) for z ~ N(beta, gamma²), what a batch norm and a ReLU put out.

    Args:
        gamma: The norm's weight (C,).
        beta: The norm's bias (C,).

    Returns:
        Mean and variance, each (C,), in float64.
    """
    gamma, beta = gamma.double().abs(), beta.double()
    # below this a channel is constant to any digit that float32 has, and beta / gamma may overflow
    ratio = beta / gamma.clamp_min(1e-30)
    cdf = torch.special.ndtr(ratio)
    pdf = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    mean = beta * cdf + gamma * pdf
    second = (beta.square() + gamma.square()) * cdf + beta * gamma * pdf
    return mean, (second - mean.square()).clamp_min(0.0)


def _warm_block(block: Any, prefix: str, source: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The state that makes a block's fuse convolution and its norm the identity on the ResNet's own features."""
    if type(block.bn_fuse) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or not isinstance(block.act_fuse, nn.ReLU):
        raise ValueError(
            f'a warm start needs batch norm and ReLU; {prefix} has {type(block.bn_fuse).__name__} '
            f'and {type(block.act_fuse).__name__}.'
        )
    norm = prefix + ('.bn1' if isinstance(block, BasicBlock) else '.bn2')
    mean, var = rectified_gaussian_moments(source[norm + '.weight'], source[norm + '.bias'])
    weight = torch.zeros(block.conv_fuse.weight.shape)
    nn.init.dirac_(weight)
    return {
        f'{prefix}.conv_fuse.weight': weight,
        f'{prefix}.bn_fuse.weight': (var + block.bn_fuse.eps).sqrt().float(),
        f'{prefix}.bn_fuse.bias': mean.float(),
        f'{prefix}.bn_fuse.running_mean': mean.float(),
        f'{prefix}.bn_fuse.running_var': var.float(),
        f'{prefix}.bn_fuse.num_batches_tracked': torch.tensor(0),
    }


def as_resnet(state_dict: Mapping[str, Any]) -> Dict[str, torch.Tensor]:
    """A ResNet's state dict in timm's names, which are torchvision's.

    Known besides: `module.` before every name, `linear.` for the head, `shortcut.` for `downsample.`; and the CIFAR
    nets of He et al., arXiv 1512.03385, whose shortcuts have no parameters (type A): every other pixel, with as many
    channels of zeros before as behind. That is a strided 1x1 convolution with a shifted identity, and a norm that is
    one.

    Args:
        state_dict: Names and tensors.
    """
    out = dict(state_dict)
    if out and all(name.startswith('module.') for name in out):
        out = {name[7:]: value for name, value in out.items()}
    for old, new in ((r'^linear\.', 'fc.'), (r'\.shortcut\.', '.downsample.')):
        out = {re.sub(old, new, name): value for name, value in out.items()}
    for stage in (2, 3, 4):
        first = out.get(f'layer{stage}.0.conv1.weight')
        bare = not any(
            f'layer{stage}.0.{name}' in out for name in ('downsample.0.weight', 'downsample.1.weight', 'conv3.weight')
        )
        if first is None or not bare or 'layer1.0.conv1.weight' not in out or first.shape[0] == first.shape[1]:
            continue
        wide, narrow = first.shape[:2]
        shift = wide // 4
        weight = first.new_zeros(wide, narrow, 1, 1)
        for i in range(min(narrow, wide - shift)):
            weight[i + shift, i] = 1
        prefix = f'layer{stage}.0.downsample'
        out.update({f'{prefix}.0.weight': weight, f'{prefix}.1.weight': first.new_ones(wide)})
        out.update({f'{prefix}.1.bias': first.new_zeros(wide), f'{prefix}.1.running_mean': first.new_zeros(wide)})
        out[f'{prefix}.1.running_var'] = first.new_full((wide,), 1 - 1e-5)  # with the norm's epsilon, one
        out[f'{prefix}.1.num_batches_tracked'] = torch.tensor(0)
    return out


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Complete a ResNet's checkpoint with what its RegNet has besides; pass a RegNet's own through.

    Args:
        state_dict: Checkpoint of this model, or of the ResNet of the same shape, see `as_resnet`.
        model: The model that is about to load it; its regulators' weights are kept.

    Returns:
        A state dict that `model` can load strictly.

    Raises:
        ValueError: The checkpoint is of neither kind, or the model has no batch norm or no ReLU.
    """
    if any('.conv_fuse.' in key for key in state_dict):
        return state_dict
    state_dict = as_resnet(state_dict)
    if 'layer1.0.conv1.weight' not in state_dict:
        raise ValueError(
            "the checkpoint is of another architecture: it has no 'layer1.0.conv1.weight', but e.g. "
            f'{next(iter(state_dict), None)!r}; expected a RegNet or a timm ResNet of the same depth.'
        )
    out = dict(state_dict)
    own = model.state_dict()
    out.update((k, v) for k, v in own.items() if '.regulator.' in k or '.bn_h.' in k)
    for name, module in model.named_modules():
        if isinstance(module, (RegulatedBasicBlock, RegulatedBottleneck)) and f'{name}.conv1.weight' in state_dict:
            out.update(_warm_block(module, name, state_dict))
    return out


def _attn_layer(block: Any) -> Any:
    """The `attn_layer` argument that rebuilds a block's attention."""
    if type(block.se) is EcaModule:
        return 'eca'
    if type(block.se) is SEModule:
        reduced, channels = block.se.fc1.out_channels, block.se.fc1.in_channels
        with torch.device('meta'):
            default = SEModule(channels)
        if reduced == default.fc1.out_channels:
            return 'se'
        return partial(SEModule, rd_ratio=reduced / channels)
    return type(block.se)


def _resnet_args(net: Any) -> Dict[str, Any]:
    """The arguments of RegulatedResNet that rebuild a timm ResNet, those at their default left out."""
    stages = [stage for stage in (net.layer1, net.layer2, net.layer3, net.layer4) if len(stage)]
    first, last = stages[0][0], stages[-1][-1]
    cifar = isinstance(net, RegulatedResNet) and isinstance(net.maxpool, nn.Identity)
    if type(first) not in (BasicBlock, Bottleneck, PlainBasicBlock, PlainBottleneck):
        raise TypeError(f'from_resnet knows timm BasicBlock and Bottleneck, not {type(first).__name__}.')
    bottleneck = isinstance(first, Bottleneck)
    if not isinstance(net.fc, (nn.Linear, nn.Identity)):
        raise TypeError(
            f'from_resnet keeps a linear classifier, not {type(net.fc).__name__}; give a model with `fc` of its kind.'
        )
    conv_last = 'conv3' if bottleneck else 'conv2'
    channels = tuple(getattr(stage[0], conv_last).out_channels // first.expansion for stage in stages)
    args = dict(
        block='bottleneck' if bottleneck else 'basic',
        layers=tuple(len(stage) for stage in stages),
        channels=channels,
        num_classes=net.fc.out_features if isinstance(net.fc, nn.Linear) else 0,  # people put one of theirs there
        global_pool=net.global_pool.pool_type,
        output_stride=(1 if cifar else 4) * math.prod(stage[0].stride for stage in stages),
        drop_rate=net.drop_rate,
        drop_path_rate=last.drop_path.drop_prob if last.drop_path is not None else 0.0,
        replace_stem_pool=isinstance(net.maxpool, nn.Sequential) and isinstance(net.maxpool[0], nn.Conv2d),
    )
    if bottleneck:
        width = first.conv2.out_channels
        args.update(
            cardinality=first.conv2.groups,
            base_width=width // first.conv2.groups * 64 // channels[0],
            block_reduce_first=width // first.conv1.out_channels,
        )
    if cifar:
        args.update(stem_type='cifar', output_stride=32)
        strides = math.prod(stage[0].stride for stage in stages)
        args['output_stride'] = strides if strides != 2 ** (len(stages) - 1) else 32
    stem = net.conv1[0] if isinstance(net.conv1, nn.Sequential) else net.conv1
    args['in_chans'] = stem.in_channels
    if isinstance(net.conv1, nn.Sequential):
        args['stem_width'] = net.conv1[3].out_channels
        args['stem_type'] = 'deep' if stem.out_channels == args['stem_width'] else 'deep_tiered'
    down = stages[1][0].downsample if len(stages) > 1 else None
    if down is not None:
        args['avg_down'] = not isinstance(down[0], nn.Conv2d)
        args['down_kernel_size'] = down[-2].kernel_size[0]
    for block in (stage[0] for stage in stages):
        if not isinstance(block.aa, nn.Identity):
            args['aa_layer'] = type(block.aa)
    if first.se is not None:
        args['block_args'] = dict(attn_layer=_attn_layer(first))
    if type(first.act1) is not nn.ReLU:
        args['act_layer'] = type(first.act1)
    if type(first.bn1) is not nn.BatchNorm2d or first.bn1.eps != 1e-5:
        norm: Any = type(first.bn1)
        args['norm_layer'] = partial(norm, eps=first.bn1.eps)
    defaults = dict(
        channels=(64, 128, 256, 512),
        num_classes=1000,
        in_chans=3,
        global_pool='avg',
        output_stride=32,
        drop_rate=0.0,
        drop_path_rate=0.0,
        replace_stem_pool=False,
        cardinality=1,
        base_width=64,
        block_reduce_first=1,
        avg_down=False,
        down_kernel_size=1,
    )
    return {k: v for k, v in args.items() if k not in defaults or v != defaults[k]}


def describe(state: Mapping[str, torch.Tensor]) -> Dict[str, Any]:
    """The arguments of RegulatedResNet that a ResNet's names and shapes tell, those at their default left out.

    Args:
        state: From `as_resnet`.

    Raises:
        ValueError: It is no ResNet of basic blocks or bottlenecks; in one line.
    """
    layers: List[int] = []
    while f'layer{len(layers) + 1}.0.conv1.weight' in state:
        stage = len(layers) + 1
        layers.append(next(i for i in itertools.count() if f'layer{stage}.{i}.conv1.weight' not in state))
    stem = state.get('conv1.weight', state.get('conv1.0.weight'))
    if not layers or len(layers) > 4 or stem is None or stem.ndim != 4:
        raise ValueError(f'not the weights of a ResNet: no conv1 and layer1, but e.g. {next(iter(state), None)!r}.')
    bottleneck = 'layer1.0.conv3.weight' in state
    last = 'conv3' if bottleneck else 'conv2'
    tops = [state[f'layer{i + 1}.0.{last}.weight'].shape[0] for i in range(len(layers))]
    channels = tuple(top // (4 if bottleneck else 1) for top in tops)
    args: Dict[str, Any] = dict(
        block='bottleneck' if bottleneck else 'basic',
        layers=tuple(layers),
        in_chans=stem.shape[1],
        num_classes=state['fc.weight'].shape[0] if 'fc.weight' in state else 0,
    )
    if channels != (64, 128, 256, 512):
        args['channels'] = channels
    if 'conv1.0.weight' in state:
        width = state['conv1.3.weight'].shape[0]
        args.update(stem_width=width, stem_type='deep' if stem.shape[0] == width else 'deep_tiered')
    elif stem.shape[-1] == 3:
        args['stem_type'] = 'cifar'
    if bottleneck:
        middle = state['layer1.0.conv2.weight']
        groups = middle.shape[0] // middle.shape[1]
        args.update(cardinality=groups, base_width=middle.shape[0] // groups * 64 // channels[0])
    average = state.get('layer2.0.downsample.1.weight')
    if average is not None and average.ndim == 4:
        args['avg_down'] = True
    if 'layer1.0.se.fc1.weight' in state:
        args['block_args'] = dict(attn_layer='se')
    elif any('.se.' in name for name in state):
        raise ValueError(
            'the attention of these blocks is not SE, and names alone do not say more: give the model itself.'
        )
    return args


def _variant(args: Dict[str, Any], regulator: str) -> Tuple[str, Dict[str, Any]]:
    """The entrypoint that a RegNet is made by, and the arguments it takes besides."""
    args = dict(args)
    block, layers = args.pop('block'), args.pop('layers')
    se = args.get('block_args') == dict(attn_layer='se')
    if se:
        del args['block_args']
    if args.get('stem_type') == 'cifar' and block == 'basic' and len(layers) == 3:
        del args['stem_type']
        depth = 6 * layers[0] + 2 if layers in [(n,) * 3 for n in (3, 5, 7, 9, 18)] else 20
        whole = layers == ((depth - 2) // 6,) * 3
        if args.get('channels') == (16, 32, 64):
            del args['channels']
    else:
        depth = DEPTHS.get((block, layers), 18 if block == 'basic' else 50)
        whole = (block, layers) in DEPTHS
    if not whole:
        args['layers'] = layers
    return f'{"se" if se else ""}regnet_{regulator}_{depth}', args


def _is_file(name: str) -> bool:
    return Path(name).suffix in ('.pth', '.pt', '.th', '.tar', '.bin', '.safetensors') or Path(name).is_file()


def from_resnet(
    resnet: Union[str, Path, nn.Module],
    regulator: str = 'convlstm',
    pretrained: bool = True,
    cache_dir: Union[str, None] = None,
    **kwargs: Any,
) -> RegulatedResNet:
    """Turn a ResNet into the RegNet of the same depth that computes the same function.

    In eval mode the two give the same logits; in training mode they are close, because the fuse norm's statistics are
    those of a rectified Gaussian. The regulator joins in as soon as training moves the fuse convolution.

    Args:
        resnet: Any ResNet, ResNeXt, wide ResNet, ResNet-D or SE-ResNet of timm's ResNet class with batch norm and ReLU,
            a `cifar_resnet_*` of ours, a ResNet of torchvision; or timm's name of one, e.g. 'resnet50.a1_in1k'; or a
            checkpoint's file, whose names and shapes tell depth, widths, classes and channels (see `as_resnet`).
        regulator: 'convrnn', 'convgru' or 'convlstm'.
        pretrained: For a name, load timm's weights.
        cache_dir: For a name, where to keep the download.
        **kwargs: Other arguments of RegulatedResNet, e.g. `regulated_stages`, `drop_path_rate`; for a name also
            `num_classes` and `in_chans`.

    Returns:
        The RegNet, in the mode, on the device and of the type of `resnet` (from a file in eval mode);
        `timm.create_model` made it, so that it can be saved, pushed and rebuilt like any other.

    Raises:
        TypeError: `resnet` is no ResNet of these kinds, or an argument would change its head or stem.
        ValueError: Unknown name, norm other than batch norm, or activation other than ReLU; a file of another
            architecture, or that is no checkpoint.
        OSError: A file cannot be read.
    """
    if regulator not in CELLS:
        raise ValueError(f'regulator must be one of {", ".join(map(repr, CELLS))}; got {regulator!r}.')
    if isinstance(resnet, Path) or (isinstance(resnet, str) and not timm.is_model(resnet) and _is_file(resnet)):
        return _from_state(read_weights(resnet), regulator, kwargs)
    if isinstance(resnet, str):
        if not timm.is_model(resnet):
            raise ValueError(
                f"unknown model {resnet!r}, and no file of that name; timm.list_models('*resnet*') lists the names."
            )
        adapt: Dict[str, Any] = {k: kwargs.pop(k) for k in ('num_classes', 'in_chans') if k in kwargs}
        source = timm.get_pretrained_cfg(resnet)
        if pretrained and source is not None and source.hf_hub_id:
            from .weights.pull import pull

            file = pull(source.hf_hub_id, source.hf_hub_filename, cache_dir)
            adapt['pretrained_cfg_overlay'] = dict(file=str(file))
        resnet = timm.create_model(resnet, pretrained=pretrained, **adapt)
    if isinstance(resnet, TorchvisionResNet):
        regnet = _from_state(resnet.state_dict(), regulator, kwargs)
        parameter = next(resnet.parameters())
        return regnet.to(device=parameter.device, dtype=parameter.dtype).train(resnet.training)
    if not isinstance(resnet, ResNet):
        kind = type(resnet).__name__
        raise TypeError(f"from_resnet takes a model of timm's ResNet class or torchvision's, got {kind}.")
    if any(isinstance(m, (RegulatedBasicBlock, RegulatedBottleneck)) for m in resnet.modules()):
        raise TypeError('from_resnet takes a ResNet; this model has regulators already.')
    _refuse_adaptation(kwargs)
    variant, args = _variant(_resnet_args(resnet), regulator)
    cfg = {
        k: v
        for k, v in getattr(resnet, 'pretrained_cfg', {}).items()
        if k not in ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict', 'custom_load')
    }
    name = '_'.join(filter(None, (cfg.get('architecture'), cfg.get('tag'))))
    cfg.update(architecture=variant, tag=name or None)
    model = timm.create_model(variant, pretrained_cfg=cfg, **dict(args, **kwargs))
    parameter = next(resnet.parameters())
    model.to(device=parameter.device, dtype=parameter.dtype).train(resnet.training)
    for name, module in resnet.named_modules():
        if next(module.children(), None) is None and name and 'drop' not in name and name.partition('.')[0] != 'fc':
            if isinstance(module, nn.Sequential):  # an empty layer4
                continue
            ours = repr(model.get_submodule(name))
            if ours != repr(module):
                raise ValueError(f'cannot rebuild {name}: {module!r} became {ours}.')
    model.load_state_dict(checkpoint_filter_fn(resnet.state_dict(), model))
    return model  # type: ignore[return-value]


def _refuse_adaptation(kwargs: Dict[str, Any]) -> None:
    for name in ('num_classes', 'in_chans'):
        if name in kwargs:
            raise TypeError(f'from_resnet keeps the {name} of `resnet`; give {name} to timm.create_model for it.')


def _from_state(state_dict: Mapping[str, Any], regulator: str, kwargs: Dict[str, Any]) -> RegulatedResNet:
    """A RegNet in eval mode from a ResNet's state dict alone."""
    _refuse_adaptation(kwargs)
    state = as_resnet(state_dict)
    if any('.conv_fuse.' in name for name in state):
        raise ValueError(
            "these are a RegNet's weights already: timm.create_model(NAME, checkpoint_path=FILE) loads them."
        )
    variant, args = _variant(describe(state), regulator)
    model = timm.create_model(variant, **dict(args, **kwargs))
    model.load_state_dict(checkpoint_filter_fn(state, model))
    return model.eval()  # type: ignore[return-value]
