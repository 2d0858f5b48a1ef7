"""Entrypoints and pretrained configurations: what timm's registry sees of this package."""

from pathlib import Path
from typing import Any, Dict, Optional, Union

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model_pretrained, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._registry import get_pretrained_cfg

from .conv_rnn import CELLS
from .datasets import DATASETS
from .names import CIFAR_DEPTHS, IMAGENET_DEPTHS, parse_name
from .regulated_resnet import RegulatedResNet
from .reparameterize import link_stem
from .warm_start import checkpoint_filter_fn
from .weights.config import read_config
from .weights.load import check_file
from .weights.manifest import RELEASED, hub_id

__all__ = []  # register_model adds each entrypoint

CIFAR10 = DATASETS['cifar10']
SPARE = 2**28  # bytes that a model may take beyond its weights file, for a regulator or another classifier


def _locate(cfg: Any, pretrained: bool, cache_dir: Optional[Union[str, Path]]) -> Optional[Path]:
    """The verified file to load instead of what timm would fetch by itself; None if that is a file already.

    Raises:
        OSError: The file cannot be had, or is broken.
        ValueError: A file or a config.json is none that may be loaded.
    """
    by_name = cfg.source not in ('hf-hub', 'local-dir')
    if by_name and (not pretrained or cfg.file or cfg.state_dict or cfg.url or not cfg.hf_hub_id):
        if pretrained and cfg.file and not cfg.state_dict:
            check_file(cfg.file)
        return None
    from .weights import pull  # with huggingface_hub, which only these need

    if by_name:
        return pull.pull(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir)
    if cfg.source == 'hf-hub':
        what = f'config.json of {cfg.hf_hub_id!r}'
        config, replaced = pull.pull_config(cfg.hf_hub_id, cache_dir)
        if replaced:
            raise OSError(f'{what} was broken in the cache and is fetched anew: create the model once more.')
    else:
        config = Path(cfg.file) / 'config.json'
        what = repr(str(config))
    needed = read_config(config, what)
    if not pretrained:
        return None
    from_hub = cfg.source == 'hf-hub'
    file = pull.pull(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir) if from_hub else pull.weights_in(Path(cfg.file))
    check_file(file)
    if needed > 4 * file.stat().st_size + SPARE:
        raise ValueError(f'{what}: its model takes {needed >> 20} MB, its weights have {file.stat().st_size >> 20} MB.')
    return file


def _create_regnet(variant: str, pretrained: bool, **kwargs) -> Any:
    overlay = kwargs.get('pretrained_cfg_overlay')
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    file = _locate(cfg, pretrained, kwargs.get('cache_dir'))
    if file:
        kwargs['pretrained_cfg_overlay'] = {**(overlay or {}), 'file': str(file), 'source': None}
        if kwargs.get('in_chans', cfg.input_size[0]) == cfg.input_size[0]:
            kwargs['pretrained_cfg_overlay']['first_conv'] = None  # timm up to 1.0.20 would adapt what fits already
    model = build_model_with_cfg(
        RegulatedResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )
    if file:  # where it lies in this machine's cache is nothing to remember
        for name, value in dict(file=cfg.file, source=cfg.source, first_conv=cfg.first_conv).items():
            model.pretrained_cfg.pop(name, None)
            if value is not None:
                model.pretrained_cfg[name] = value
    if not isinstance(model, RegulatedResNet) and hasattr(model, 'conv1'):
        link_stem(model)  # features_only took the net apart
    return model


def _create_cifar(variant: str, pretrained: bool, **kwargs) -> Any:
    cifar_args = dict(block='basic', stem_type='cifar', channels=(16, 32, 64))
    return _create_regnet(variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3)), **dict(cifar_args, **kwargs))


def _create_imagenet(variant: str, pretrained: bool, **kwargs) -> Any:
    return _create_regnet(variant, pretrained, **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return (
        dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation='bicubic',
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv='conv1',
            classifier='fc',
            license='apache-2.0',
            paper_ids='arXiv:2101.00590',
            paper_name='RegNet: Self-Regulated Network for Image Classification',
        )
        | kwargs
    )


def _cifar_cfg(**kwargs) -> Dict[str, Any]:
    return (
        _cfg(
            num_classes=10,
            input_size=(3, 32, 32),
            pool_size=(8, 8),
            crop_pct=1.0,
            label_names=CIFAR10.labels,
            mean=CIFAR10.mean,
            std=CIFAR10.std,
        )
        | kwargs
    )


def _warm_cfg(source: str) -> Dict[str, Any]:
    """Configuration of a warm start: the weights and the data settings of a timm ResNet."""
    known = get_pretrained_cfg(source, allow_unregistered=False)
    assert known is not None
    cfg = known.to_dict()
    cfg.update(
        paper_ids=('arXiv:2101.00590', 'arXiv:2110.00476'),
        description=(
            f"timm's {source} weights and an untrained regulator behind a fuse convolution that starts as the "
            "identity: computes the ResNet's function until you fine-tune it."
        ),
    )
    return _cfg(**{k: v for k, v in cfg.items() if k not in ('url', 'architecture', 'tag')})


def _released_cfg(name: str, entry: Dict[str, Any]) -> Dict[str, Any]:
    """Configuration of released weights, with what was measured from the stored file."""
    depth = parse_name(name).depth
    metrics = entry['metrics']
    return (_cifar_cfg if depth in CIFAR_DEPTHS else _cfg)(
        **entry['data_config'],
        num_classes=entry['num_classes'],
        label_names=tuple(entry['labels']) if entry['labels'] else None,
        hf_hub_id=hub_id(name),
        license=entry['license'],
        description=(
            f'{entry["dataset"]}: top-1 {metrics["top1"]:.2f} %, top-5 {metrics["top5"]:.2f} % on its '
            f'{metrics["images"]:,} {metrics["split"]} images; {entry["recipe"]}, seed {entry["seed"]}, '
            f'last of {entry["epochs"]} epochs.'
        ),
    )


def _default_cfgs() -> Dict[str, Dict[str, Any]]:
    """Every model's configurations, those with weights by tag; without a tag a CIFAR model is for CIFAR-10, always."""
    released = sorted(RELEASED, key=lambda name: tuple(RELEASED[name]['labels'] or ()) != CIFAR10.labels)
    cfgs = {name: _released_cfg(name, RELEASED[name]) for name in released}
    for se in ('', 'se'):
        for prefix in (f'cifar_{se}resnet', *(f'{se}regnet_{cell}' for cell in CELLS)):
            names = (f'{prefix}_{depth}' for depth in CIFAR_DEPTHS)
            for name in names:
                tagged = [cfg for key, cfg in cfgs.items() if key.startswith(f'{name}.')]
                if not tagged or tagged[0]['label_names'] != CIFAR10.labels:
                    cfgs[f'{name}.*' if tagged else name] = _cifar_cfg()  # '*' makes it the default one
        for prefix in (f'{se}regnet_{cell}' for cell in CELLS):
            for depth in IMAGENET_DEPTHS:
                source = f'{se}resnet{depth}.a1_in1k'
                if is_model_pretrained(source):
                    cfgs[f'{prefix}_{depth}.{source.replace(".", "_")}'] = _warm_cfg(source)
                else:
                    cfgs[f'{prefix}_{depth}'] = _cfg()
    return cfgs


default_cfgs = generate_default_cfgs({**_default_cfgs()})


@register_model
def cifar_resnet_20(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """ResNet-20 for 32x32 images, without a regulator."""
    model_args = dict(layers=(3, 3, 3), regulator=None)
    return _create_cifar('cifar_resnet_20', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet_32(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """ResNet-32 for 32x32 images, without a regulator."""
    model_args = dict(layers=(5, 5, 5), regulator=None)
    return _create_cifar('cifar_resnet_32', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet_44(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """ResNet-44 for 32x32 images, without a regulator."""
    model_args = dict(layers=(7, 7, 7), regulator=None)
    return _create_cifar('cifar_resnet_44', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet_56(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """ResNet-56 for 32x32 images, without a regulator."""
    model_args = dict(layers=(9, 9, 9), regulator=None)
    return _create_cifar('cifar_resnet_56', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet_110(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """ResNet-110 for 32x32 images, without a regulator."""
    model_args = dict(layers=(18, 18, 18), regulator=None)
    return _create_cifar('cifar_resnet_110', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_seresnet_20(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-ResNet-20 for 32x32 images, without a regulator."""
    model_args = dict(layers=(3, 3, 3), regulator=None, block_args=dict(attn_layer='se'))
    return _create_cifar('cifar_seresnet_20', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_seresnet_32(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-ResNet-32 for 32x32 images, without a regulator."""
    model_args = dict(layers=(5, 5, 5), regulator=None, block_args=dict(attn_layer='se'))
    return _create_cifar('cifar_seresnet_32', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_seresnet_44(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-ResNet-44 for 32x32 images, without a regulator."""
    model_args = dict(layers=(7, 7, 7), regulator=None, block_args=dict(attn_layer='se'))
    return _create_cifar('cifar_seresnet_44', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_seresnet_56(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-ResNet-56 for 32x32 images, without a regulator."""
    model_args = dict(layers=(9, 9, 9), regulator=None, block_args=dict(attn_layer='se'))
    return _create_cifar('cifar_seresnet_56', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_seresnet_110(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-ResNet-110 for 32x32 images, without a regulator."""
    model_args = dict(layers=(18, 18, 18), regulator=None, block_args=dict(attn_layer='se'))
    return _create_cifar('cifar_seresnet_110', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convrnn_20(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-20 with ConvRNN regulators, for 32x32 images."""
    model_args = dict(layers=(3, 3, 3), regulator='convrnn')
    return _create_cifar('regnet_convrnn_20', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convrnn_32(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-32 with ConvRNN regulators, for 32x32 images."""
    model_args = dict(layers=(5, 5, 5), regulator='convrnn')
    return _create_cifar('regnet_convrnn_32', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convrnn_44(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-44 with ConvRNN regulators, for 32x32 images."""
    model_args = dict(layers=(7, 7, 7), regulator='convrnn')
    return _create_cifar('regnet_convrnn_44', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convrnn_56(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-56 with ConvRNN regulators, for 32x32 images."""
    model_args = dict(layers=(9, 9, 9), regulator='convrnn')
    return _create_cifar('regnet_convrnn_56', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convrnn_110(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-110 with ConvRNN regulators, for 32x32 images."""
    model_args = dict(layers=(18, 18, 18), regulator='convrnn')
    return _create_cifar('regnet_convrnn_110', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convrnn_18(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-18 with ConvRNN regulators."""
    model_args = dict(block='basic', layers=(2, 2, 2, 2), regulator='convrnn')
    return _create_imagenet('regnet_convrnn_18', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convrnn_34(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-34 with ConvRNN regulators."""
    model_args = dict(block='basic', layers=(3, 4, 6, 3), regulator='convrnn')
    return _create_imagenet('regnet_convrnn_34', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convrnn_50(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-50 with ConvRNN regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 6, 3), regulator='convrnn')
    return _create_imagenet('regnet_convrnn_50', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convrnn_101(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-101 with ConvRNN regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 23, 3), regulator='convrnn')
    return _create_imagenet('regnet_convrnn_101', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convrnn_152(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-152 with ConvRNN regulators."""
    model_args = dict(block='bottleneck', layers=(3, 8, 36, 3), regulator='convrnn')
    return _create_imagenet('regnet_convrnn_152', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convgru_20(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-20 with ConvGRU regulators, for 32x32 images."""
    model_args = dict(layers=(3, 3, 3), regulator='convgru')
    return _create_cifar('regnet_convgru_20', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convgru_32(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-32 with ConvGRU regulators, for 32x32 images."""
    model_args = dict(layers=(5, 5, 5), regulator='convgru')
    return _create_cifar('regnet_convgru_32', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convgru_44(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-44 with ConvGRU regulators, for 32x32 images."""
    model_args = dict(layers=(7, 7, 7), regulator='convgru')
    return _create_cifar('regnet_convgru_44', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convgru_56(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-56 with ConvGRU regulators, for 32x32 images."""
    model_args = dict(layers=(9, 9, 9), regulator='convgru')
    return _create_cifar('regnet_convgru_56', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convgru_110(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-110 with ConvGRU regulators, for 32x32 images."""
    model_args = dict(layers=(18, 18, 18), regulator='convgru')
    return _create_cifar('regnet_convgru_110', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convgru_18(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-18 with ConvGRU regulators."""
    model_args = dict(block='basic', layers=(2, 2, 2, 2), regulator='convgru')
    return _create_imagenet('regnet_convgru_18', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convgru_34(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-34 with ConvGRU regulators."""
    model_args = dict(block='basic', layers=(3, 4, 6, 3), regulator='convgru')
    return _create_imagenet('regnet_convgru_34', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convgru_50(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-50 with ConvGRU regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 6, 3), regulator='convgru')
    return _create_imagenet('regnet_convgru_50', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convgru_101(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-101 with ConvGRU regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 23, 3), regulator='convgru')
    return _create_imagenet('regnet_convgru_101', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convgru_152(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-152 with ConvGRU regulators."""
    model_args = dict(block='bottleneck', layers=(3, 8, 36, 3), regulator='convgru')
    return _create_imagenet('regnet_convgru_152', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convlstm_20(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-20 with ConvLSTM regulators, for 32x32 images."""
    model_args = dict(layers=(3, 3, 3), regulator='convlstm')
    return _create_cifar('regnet_convlstm_20', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convlstm_32(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-32 with ConvLSTM regulators, for 32x32 images."""
    model_args = dict(layers=(5, 5, 5), regulator='convlstm')
    return _create_cifar('regnet_convlstm_32', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convlstm_44(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-44 with ConvLSTM regulators, for 32x32 images."""
    model_args = dict(layers=(7, 7, 7), regulator='convlstm')
    return _create_cifar('regnet_convlstm_44', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convlstm_56(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-56 with ConvLSTM regulators, for 32x32 images."""
    model_args = dict(layers=(9, 9, 9), regulator='convlstm')
    return _create_cifar('regnet_convlstm_56', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convlstm_110(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-110 with ConvLSTM regulators, for 32x32 images."""
    model_args = dict(layers=(18, 18, 18), regulator='convlstm')
    return _create_cifar('regnet_convlstm_110', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convlstm_18(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-18 with ConvLSTM regulators."""
    model_args = dict(block='basic', layers=(2, 2, 2, 2), regulator='convlstm')
    return _create_imagenet('regnet_convlstm_18', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convlstm_34(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-34 with ConvLSTM regulators."""
    model_args = dict(block='basic', layers=(3, 4, 6, 3), regulator='convlstm')
    return _create_imagenet('regnet_convlstm_34', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convlstm_50(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-50 with ConvLSTM regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 6, 3), regulator='convlstm')
    return _create_imagenet('regnet_convlstm_50', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convlstm_101(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-101 with ConvLSTM regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 23, 3), regulator='convlstm')
    return _create_imagenet('regnet_convlstm_101', pretrained, **dict(model_args, **kwargs))


@register_model
def regnet_convlstm_152(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """RegNet-152 with ConvLSTM regulators."""
    model_args = dict(block='bottleneck', layers=(3, 8, 36, 3), regulator='convlstm')
    return _create_imagenet('regnet_convlstm_152', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convrnn_20(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-20 with ConvRNN regulators, for 32x32 images."""
    model_args = dict(layers=(3, 3, 3), regulator='convrnn', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convrnn_20', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convrnn_32(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-32 with ConvRNN regulators, for 32x32 images."""
    model_args = dict(layers=(5, 5, 5), regulator='convrnn', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convrnn_32', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convrnn_44(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-44 with ConvRNN regulators, for 32x32 images."""
    model_args = dict(layers=(7, 7, 7), regulator='convrnn', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convrnn_44', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convrnn_56(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-56 with ConvRNN regulators, for 32x32 images."""
    model_args = dict(layers=(9, 9, 9), regulator='convrnn', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convrnn_56', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convrnn_110(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-110 with ConvRNN regulators, for 32x32 images."""
    model_args = dict(layers=(18, 18, 18), regulator='convrnn', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convrnn_110', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convrnn_18(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-18 with ConvRNN regulators."""
    model_args = dict(block='basic', layers=(2, 2, 2, 2), regulator='convrnn', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convrnn_18', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convrnn_34(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-34 with ConvRNN regulators."""
    model_args = dict(block='basic', layers=(3, 4, 6, 3), regulator='convrnn', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convrnn_34', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convrnn_50(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-50 with ConvRNN regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 6, 3), regulator='convrnn', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convrnn_50', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convrnn_101(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-101 with ConvRNN regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 23, 3), regulator='convrnn', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convrnn_101', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convrnn_152(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-152 with ConvRNN regulators."""
    model_args = dict(block='bottleneck', layers=(3, 8, 36, 3), regulator='convrnn', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convrnn_152', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convgru_20(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-20 with ConvGRU regulators, for 32x32 images."""
    model_args = dict(layers=(3, 3, 3), regulator='convgru', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convgru_20', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convgru_32(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-32 with ConvGRU regulators, for 32x32 images."""
    model_args = dict(layers=(5, 5, 5), regulator='convgru', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convgru_32', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convgru_44(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-44 with ConvGRU regulators, for 32x32 images."""
    model_args = dict(layers=(7, 7, 7), regulator='convgru', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convgru_44', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convgru_56(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-56 with ConvGRU regulators, for 32x32 images."""
    model_args = dict(layers=(9, 9, 9), regulator='convgru', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convgru_56', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convgru_110(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-110 with ConvGRU regulators, for 32x32 images."""
    model_args = dict(layers=(18, 18, 18), regulator='convgru', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convgru_110', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convgru_18(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-18 with ConvGRU regulators."""
    model_args = dict(block='basic', layers=(2, 2, 2, 2), regulator='convgru', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convgru_18', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convgru_34(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-34 with ConvGRU regulators."""
    model_args = dict(block='basic', layers=(3, 4, 6, 3), regulator='convgru', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convgru_34', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convgru_50(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-50 with ConvGRU regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 6, 3), regulator='convgru', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convgru_50', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convgru_101(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-101 with ConvGRU regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 23, 3), regulator='convgru', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convgru_101', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convgru_152(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-152 with ConvGRU regulators."""
    model_args = dict(block='bottleneck', layers=(3, 8, 36, 3), regulator='convgru', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convgru_152', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convlstm_20(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-20 with ConvLSTM regulators, for 32x32 images."""
    model_args = dict(layers=(3, 3, 3), regulator='convlstm', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convlstm_20', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convlstm_32(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-32 with ConvLSTM regulators, for 32x32 images."""
    model_args = dict(layers=(5, 5, 5), regulator='convlstm', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convlstm_32', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convlstm_44(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-44 with ConvLSTM regulators, for 32x32 images."""
    model_args = dict(layers=(7, 7, 7), regulator='convlstm', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convlstm_44', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convlstm_56(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-56 with ConvLSTM regulators, for 32x32 images."""
    model_args = dict(layers=(9, 9, 9), regulator='convlstm', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convlstm_56', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convlstm_110(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-110 with ConvLSTM regulators, for 32x32 images."""
    model_args = dict(layers=(18, 18, 18), regulator='convlstm', block_args=dict(attn_layer='se'))
    return _create_cifar('seregnet_convlstm_110', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convlstm_18(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-18 with ConvLSTM regulators."""
    model_args = dict(block='basic', layers=(2, 2, 2, 2), regulator='convlstm', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convlstm_18', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convlstm_34(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-34 with ConvLSTM regulators."""
    model_args = dict(block='basic', layers=(3, 4, 6, 3), regulator='convlstm', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convlstm_34', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convlstm_50(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-50 with ConvLSTM regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 6, 3), regulator='convlstm', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convlstm_50', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convlstm_101(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-101 with ConvLSTM regulators."""
    model_args = dict(block='bottleneck', layers=(3, 4, 23, 3), regulator='convlstm', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convlstm_101', pretrained, **dict(model_args, **kwargs))


@register_model
def seregnet_convlstm_152(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """SE-RegNet-152 with ConvLSTM regulators."""
    model_args = dict(block='bottleneck', layers=(3, 8, 36, 3), regulator='convlstm', block_args=dict(attn_layer='se'))
    return _create_imagenet('seregnet_convlstm_152', pretrained, **dict(model_args, **kwargs))
