"""Warm start: a timm ResNet becomes a RegNet that computes the same function.

The fuse convolution starts as [I | 0], so the regulator is heard only once training moves it, and the norm behind it
starts as the identity. Derived here, not in the paper.
"""

import math
from functools import partial
from typing import Any, Dict, Union

import timm
import torch
import torch.nn as nn
from timm.layers import EcaModule, SEModule
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from .conv_rnn import CELLS
from .regulated_resnet import RegulatedBasicBlock, RegulatedBottleneck, RegulatedResNet

__all__ = ['from_resnet', 'checkpoint_filter_fn']

# (block, layers) of the ImageNet nets that have an entrypoint
DEPTHS = {
    ('basic', (2, 2, 2, 2)): 18,
    ('basic', (3, 4, 6, 3)): 34,
    ('bottleneck', (3, 4, 6, 3)): 50,
    ('bottleneck', (3, 4, 23, 3)): 101,
    ('bottleneck', (3, 8, 36, 3)): 152,
}


def rectified_gaussian_moments(gamma: torch.Tensor, beta: torch.Tensor):
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


def _warm_block(block: nn.Module, prefix: str, source: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
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


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Complete a timm ResNet's checkpoint with what its RegNet has besides; pass a RegNet's own through.

    Args:
        state_dict: Checkpoint of this model, or of the timm ResNet of the same shape.
        model: The model that is about to load it; its regulators' weights are kept.

    Returns:
        A state dict that `model` can load strictly.

    Raises:
        ValueError: The checkpoint is of neither kind, or the model has no batch norm or no ReLU.
    """
    if 'layer1.0.conv1.weight' not in state_dict:
        raise ValueError(
            "the checkpoint is of another architecture: it has no 'layer1.0.conv1.weight', but e.g. "
            f'{next(iter(state_dict), None)!r}; expected a RegNet or a timm ResNet of the same depth.'
        )
    if any('.conv_fuse.' in key for key in state_dict):
        return state_dict
    out = dict(state_dict)
    own = model.state_dict()
    out.update((k, v) for k, v in own.items() if '.regulator.' in k or '.bn_h.' in k)
    for name, module in model.named_modules():
        if isinstance(module, (RegulatedBasicBlock, RegulatedBottleneck)) and f'{name}.conv1.weight' in state_dict:
            out.update(_warm_block(module, name, state_dict))
    return out


def _attn_layer(block: nn.Module) -> Any:
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


def _resnet_args(net: ResNet) -> Dict[str, Any]:
    """The arguments of RegulatedResNet that rebuild a timm ResNet, those at their default left out."""
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    first, last = stages[0][0], stages[-1][-1]
    if type(first) not in (BasicBlock, Bottleneck):
        raise TypeError(f'from_resnet knows timm BasicBlock and Bottleneck, not {type(first).__name__}.')
    bottleneck = type(first) is Bottleneck
    conv_last = 'conv3' if bottleneck else 'conv2'
    channels = tuple(getattr(stage[0], conv_last).out_channels // first.expansion for stage in stages)
    args = dict(
        block='bottleneck' if bottleneck else 'basic',
        layers=tuple(len(stage) for stage in stages),
        channels=channels,
        num_classes=net.num_classes,
        global_pool=net.global_pool.pool_type,
        output_stride=4 * math.prod(stage[0].stride for stage in stages),
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
    stem = net.conv1[0] if isinstance(net.conv1, nn.Sequential) else net.conv1
    args['in_chans'] = stem.in_channels
    if isinstance(net.conv1, nn.Sequential):
        args['stem_width'] = net.conv1[3].out_channels
        args['stem_type'] = 'deep' if stem.out_channels == args['stem_width'] else 'deep_tiered'
    down = stages[1][0].downsample
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
        args['norm_layer'] = partial(type(first.bn1), eps=first.bn1.eps)
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


def from_resnet(
    resnet: Union[str, ResNet],
    regulator: str = 'convlstm',
    pretrained: bool = True,
    cache_dir: Union[str, None] = None,
    **kwargs,
) -> RegulatedResNet:
    """Turn a timm ResNet into the RegNet of the same depth that computes the same function.

    In eval mode the two give the same logits; in training mode they are close, because the fuse norm's statistics are
    those of a rectified Gaussian. The regulator joins in as soon as training moves the fuse convolution.

    Args:
        resnet: Any ResNet, ResNeXt, wide ResNet, ResNet-D or SE-ResNet of timm's ResNet class with batch norm and ReLU,
            or its name, e.g. 'resnet50.a1_in1k'.
        regulator: 'convrnn', 'convgru' or 'convlstm'.
        pretrained: For a name, load timm's weights.
        cache_dir: For a name, where to keep the download.
        **kwargs: Other arguments of RegulatedResNet, e.g. `regulated_stages`, `drop_path_rate`; for a name also
            `num_classes` and `in_chans`.

    Returns:
        The RegNet, in the mode, on the device and of the type of `resnet`; `timm.create_model` made it, so that it can
        be saved, pushed and rebuilt like any other.

    Raises:
        TypeError: `resnet` is not of timm's ResNet class, or an argument would change its head or stem.
        ValueError: Unknown name, norm other than batch norm, or activation other than ReLU.
    """
    if regulator not in CELLS:
        raise ValueError(f'regulator must be one of {", ".join(map(repr, CELLS))}; got {regulator!r}.')
    if isinstance(resnet, str):
        if not timm.is_model(resnet):
            raise ValueError(f"unknown model {resnet!r}; timm.list_models('*resnet*') lists the names.")
        adapt = {k: kwargs.pop(k) for k in ('num_classes', 'in_chans') if k in kwargs}
        cfg = timm.get_pretrained_cfg(resnet)
        if pretrained and cfg is not None and cfg.hf_hub_id:
            from .weights.pull import pull

            adapt['pretrained_cfg_overlay'] = dict(file=str(pull(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir)))
        resnet = timm.create_model(resnet, pretrained=pretrained, **adapt)
    if not isinstance(resnet, ResNet) or isinstance(resnet, RegulatedResNet):
        raise TypeError(f"from_resnet takes a model of timm's ResNet class, got {type(resnet).__name__}.")
    for name in ('num_classes', 'in_chans'):
        if name in kwargs:
            raise TypeError(f'from_resnet keeps the {name} of `resnet`; give {name} to timm.create_model for it.')
    args = _resnet_args(resnet)
    block, layers = args.pop('block'), args.pop('layers')
    se = args.get('block_args') == dict(attn_layer='se')
    depth = DEPTHS.get((block, layers))
    if depth is None:
        depth = 18 if block == 'basic' else 50
        args['layers'] = layers
    if se:
        del args['block_args']
    variant = f'{"se" if se else ""}regnet_{regulator}_{depth}'
    cfg = {
        k: v
        for k, v in getattr(resnet, 'pretrained_cfg', {}).items()
        if k not in ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict', 'custom_load')
    }
    source = '_'.join(filter(None, (cfg.get('architecture'), cfg.get('tag'))))
    cfg.update(architecture=variant, tag=source or None)
    model = timm.create_model(variant, pretrained_cfg=cfg, **dict(args, **kwargs))
    parameter = next(resnet.parameters())
    model.to(device=parameter.device, dtype=parameter.dtype).train(resnet.training)
    for name, module in resnet.named_modules():
        if next(module.children(), None) is None and name and 'drop' not in name and name.partition('.')[0] != 'fc':
            ours = repr(model.get_submodule(name))
            if ours != repr(module):
                raise ValueError(f'cannot rebuild {name}: {module!r} became {ours}.')
    model.load_state_dict(checkpoint_filter_fn(resnet.state_dict(), model))
    return model
