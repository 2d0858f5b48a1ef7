"""config.json, as timm and transformers read it: written for our models, and checked before it is believed.

A stranger's config.json decides what is built and from which file it is filled, before any weight is looked at: timm
passes its `model_args` on as keyword arguments and its `pretrained_cfg` as a configuration, whatever they hold. Here it
may name an architecture of this package and plain values within bounds.
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any, Dict, Sequence, Union

import torch.nn as nn
from timm.models import PretrainedCfg, is_model_in_modules, model_entrypoint
from timm.models._hub import save_config_for_hf
from timm.models.resnet import ResNet

from ..errors import one_line
from ..regulated_resnet import RegulatedResNet

__all__ = ['check_config', 'read_config', 'write_config']

LARGEST_FILE = 2**20  # bytes
LARGEST_COUNT = 10**5  # classes, and any other count
LARGEST_SIDE, WIDEST = 4096, 8192  # pixels of an image's side, channels of a stage
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random')  # timm's
CROP_MODES = ('center', 'squash', 'border')
MOST_BLOCKS = 1000
ELSEWHERE = ('url', 'file', 'state_dict', 'custom_load', 'source')  # would lead to other files than the repository's
FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)}
ARGUMENTS = {name for cls in (RegulatedResNet, ResNet) for name in inspect.signature(cls.__init__).parameters}
ARGUMENTS -= {'self', 'kwargs', 'device', 'dtype'}


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_COUNT


def _is_size(value: Any) -> bool:
    sides = isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_count, value))
    return sides and max(value) <= LARGEST_SIDE


def _is_color(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) and abs(v) < 1e6 for v in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r'[\w.-]{1,100}', value) is not None


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is a name, a number of usual size, or a few of them."""
    if isinstance(value, dict):
        return depth < 3 and len(value) < 64 and all(_is_name(k) and _is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return depth < 3 and len(value) < 64 and all(_is_plain(v, depth + 1) for v in value)
    if isinstance(value, (int, float)):
        return abs(value) <= LARGEST_COUNT  # no infinity, no NaN
    return value is None or value == '' or _is_name(value)


SIZES = f'three positive counts up to {LARGEST_SIDE}'
FORMS: Dict[str, Any] = dict(
    **{key: (_is_size, SIZES) for key in ('input_size', 'test_input_size', 'min_input_size')},
    num_classes=(lambda v: _is_count(v, 0), f'a count up to {LARGEST_COUNT}'),
    mean=(_is_color, 'a list of numbers'),
    std=(lambda v: _is_color(v) and all(x > 0 for x in v), 'a list of positive numbers'),
    # the image is resized to 1 / crop_pct of the size
    crop_pct=(lambda v: isinstance(v, (int, float)) and 0.1 <= v <= 2, 'a number from 0.1 to 2'),
    interpolation=(lambda v: v in INTERPOLATIONS, f'one of {", ".join(INTERPOLATIONS)}'),
    crop_mode=(lambda v: v in CROP_MODES, f'one of {", ".join(CROP_MODES)}'),
    hf_hub_filename=(
        lambda v: isinstance(v, str) and bool(re.fullmatch(r'\w[\w.-]*\.safetensors', v)),
        'NAME.safetensors',
    ),
    **{key: (_is_name, 'a name') for key in ('architecture', 'classifier', 'first_conv')},
)


def check_config(config: Any, what: str) -> None:
    """Refuse a configuration that names another architecture or values beyond what any model of it has.

    Args:
        config: What was read from config.json, as timm's `save_for_hf` writes it.
        what: The name that an error gives it.

    Raises:
        ValueError: One line with the key, what it must be, and what it is.
    """

    def refuse(key: str, must: str, value: Any) -> None:
        raise ValueError(f'{what}: {key} must be {must}; got {repr(value)[:80]}.')

    if not isinstance(config, dict):
        refuse('a configuration', 'a JSON object', config)
    name = config.get('architecture')
    if not _is_name(name) or not is_model_in_modules(name, ['regnet_rnn']):
        refuse('architecture', 'a model of timm_regnet_rnn', name)
    pretrained_cfg, args = config.get('pretrained_cfg', {}), config.get('model_args', {})
    for key, value in (('pretrained_cfg', pretrained_cfg), ('model_args', args)):
        if not isinstance(value, dict):
            refuse(key, 'a JSON object', value)
    for key, value in pretrained_cfg.items():
        if key not in FIELDS:
            refuse(f'pretrained_cfg.{key[:40]!r}', "one of timm's fields", value)
        if key in ELSEWHERE and value:
            refuse(f'pretrained_cfg.{key}', 'left out', value)
        if value is not None and key in FORMS and not FORMS[key][0](value):
            refuse(f'pretrained_cfg.{key}', FORMS[key][1], value)
    if not _is_count(config.get('num_classes', 0), 0):
        refuse('num_classes', FORMS['num_classes'][1], config['num_classes'])
    labels = config.get('label_names') or pretrained_cfg.get('label_names') or []
    if not isinstance(labels, (list, dict)) or not all(isinstance(label, str) for label in labels):
        refuse('label_names', 'a list of names', labels)
    for key, value in args.items():
        if key not in ARGUMENTS:
            refuse(f'model_args.{key[:40]!r}', 'an argument of RegulatedResNet', value)
        if not _is_plain(value):
            refuse(f'model_args.{key}', 'a name, a number of usual size or a few of them', value)
    widths = args.get('channels', ())
    if not isinstance(widths, (list, tuple)) or not all(_is_count(width) and width <= WIDEST for width in widths):
        refuse('model_args.channels', f'a list of widths up to {WIDEST}', widths)
    layers = args.get('layers', ())
    if not isinstance(layers, list) and layers != () or not all(map(_is_count, layers)) or sum(layers) > MOST_BLOCKS:
        refuse('model_args.layers', f'a list of block counts, at most {MOST_BLOCKS} in all', layers)


def read_config(file: Union[str, Path], what: str) -> int:
    """Check a config.json, and build its model without memory.

    Args:
        file: The file.
        what: The name that an error gives it.

    Returns:
        What the model's parameters take, in bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large, no JSON object, or says what it must not; one line.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f'{what}: no such file.')
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f'{what}: a config.json is a few KB, this one has {file.stat().st_size} bytes.')
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
    except (ValueError, RecursionError):
        raise ValueError(f'{what}: not a JSON file.') from None
    check_config(config, what)
    size = config.get('pretrained_cfg', {}).get('input_size') or (3,)
    args = dict(num_classes=config.get('num_classes', 0), in_chans=size[0]) | config.get('model_args', {})
    try:
        model = model_entrypoint(config['architecture'])(device='meta', **args)
    except Exception as e:
        reason = one_line(e)
        raise ValueError(f'{what}: model_args do not build a {config["architecture"]} ({reason})') from None
    return sum(p.numel() * p.element_size() for p in model.parameters())


def write_config(
    model: nn.Module,
    file: Union[str, Path],
    args: Dict[str, Any],
    data_config: Dict[str, Any],
    labels: Sequence[str] = (),
    tag: str = '',
    description: str = '',
) -> None:
    """Write a config.json by timm, with what the weights were trained for instead of what the entrypoint states.

    `model_args` leaves out the classes, which timm takes from elsewhere in the file: transformers' TimmWrapper gives
    them too, and fails where they come twice. It builds with three channels unless `model_args` says otherwise.

    Args:
        model: The model.
        file: The file to write.
        args: Arguments that rebuild the model, besides classes and channels.
        data_config: Input size, mean, std, crop and interpolation.
        labels: A name per class, if they are known.
        tag: The tag of released weights.
        description: What the weights are.
    """
    file = Path(file)
    path: Any = Path(file)  # timm's annotation says str
    save_config_for_hf(model, path, model_args=dict(args))
    config = json.loads(file.read_text(encoding='utf-8'))
    cfg = config['pretrained_cfg']
    for key in (*ELSEWHERE, 'label_names', 'label_descriptions', 'notes', 'origin_url', 'test_input_size'):
        cfg.pop(key, None)
    cfg.update(data_config, num_classes=model.num_classes)
    for key, value in (('tag', tag), ('description', description)):
        cfg.pop(key, None)
        if value:
            cfg[key] = value
    kept = dict(args)
    kept.pop('num_classes', None)
    for key, value, default in (
        ('in_chans', data_config['input_size'][0], 3),
        ('global_pool', args.get('global_pool', 'avg'), 'avg'),
    ):
        kept.pop(key, None)
        if value != default:
            kept[key] = value
    for key in ('label_names', 'model_args'):
        config.pop(key, None)
    if labels:
        config['label_names'] = list(labels)
    if kept:
        config['model_args'] = kept
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
