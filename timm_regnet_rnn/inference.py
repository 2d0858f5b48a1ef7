"""A model ready to predict, from whatever names it: a name, a run's folder, a checkpoint, the Hub; and what it says.

What a run or a file knows of itself (architecture, arguments, classes and their names, mean, size) goes into the
model's `pretrained_cfg`, so that whoever asks timm for the model's data settings gets those it was trained with.
"""

import json
import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import get_pretrained_cfg, is_model, is_model_pretrained

from .errors import UsageError, did_you_mean
from .images import image_mode, read_image

log = logging.getLogger('timm_regnet_rnn')
Model = Any  # a timm model; what timm sets on its models has no types

__all__ = ['check_device', 'class_names', 'create', 'from_file', 'newest_of', 'predictions', 'preprocessing', 'rows_of']

CLASSES = 'classes.json'  # in a run's folder: the names of the classes, in the order of the classifier's outputs
INPUT = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
HUB, FOLDER = 'hf-hub:', 'local-dir:'


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: This machine, or this PyTorch, does not have it.
    """
    here = ['cpu']
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        here += [f'{kind.type}:{i}' for i in range(torch.accelerator.device_count())] if kind else []
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    there = device and (device.type == 'cpu' or f'{device.type}:{device.index or 0}' in here)
    if device is None or not there:
        raise UsageError(f'there is no device {name!r} here, only {", ".join(here)}.')
    return device


def _tags(model: str) -> List[str]:
    """The NAME.TAGs of a model."""
    return timm.list_models(f'{model}.*', include_tags=True)


def check_name(name: str) -> None:
    """Refuse what is no NAME or NAME.TAG of a model.

    Raises:
        UsageError: In one line, with the nearest that is.
    """
    model, _, tag = name.partition('.')
    if not is_model(model):
        hint = did_you_mean(model, timm.list_models(module='regnet_rnn')) or did_you_mean(model, timm.list_models())
        if re.fullmatch(r'[\w.-]+/[\w.-]+', name):
            hint = f' On the Hub it would be {HUB}{name}; here is no such file or folder.'
        raise UsageError(f'unknown model {name!r}; `timm-regnet-rnn list` prints the names.{hint}')
    tags = [full.partition('.')[2] for full in _tags(model)] if tag else []
    if tag and tag not in tags:
        what = f'its tags are {", ".join(tags)}' if tags else 'it has none'
        raise UsageError(f'{model!r} has no tag {tag!r}; {what}.{did_you_mean(tag, tags)}')


def class_names(model: Model) -> List[str]:
    """One readable name per class: the weights' own, else ImageNet's, else numbers."""
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [f'class {i}' for i in range(model.num_classes)]


def _readable(names: Sequence[str]) -> List[str]:
    """Names of classes from those of folders; WordNet's numbers of nouns, as in ImageNet's, become the nouns."""
    from .datasets import labels_of_folders

    if not all(re.fullmatch(r'n\d{8}', name) for name in names):
        return list(labels_of_folders(names))
    info = ImageNetInfo('imagenet-22k')
    known = set(info.label_names())
    return [info.label_name_to_description(name).split(',')[0] if name in known else name for name in names]


def _labels(folder: Path, settings: Dict[str, Any], classes: int) -> List[str]:
    """Names of a run's classes: those in its folder, or those of a data set that is known, or numbers.

    Raises:
        UsageError: The folder's are not as many as there are classes.
    """
    from .datasets import dataset_name, labels_of

    file = folder / CLASSES
    if file.is_file():
        try:
            names = json.loads(file.read_text(encoding='utf-8'))
        except ValueError:
            names = None
        if not isinstance(names, list) or len(names) != classes or not all(isinstance(n, str) for n in names):
            raise UsageError(f'{str(file)!r} must be a JSON list of {classes} names, one per class.')
        return _readable(names)
    known = labels_of(dataset_name(settings)[1]) if settings.get('data_dir') else None
    return list(known) if known and len(known) == classes else [f'class {i}' for i in range(classes)]


def _metadata(info: Dict[str, Any]) -> Dict[str, Any]:
    """What the header of a safetensors file, which `export` or `push` wrote, says of its input and classes."""
    values = {key: info[key] for key in (*INPUT, 'label_names') if isinstance(info.get(key), str)}
    return {k: v if k in ('interpolation', 'crop_mode') else json.loads(v) for k, v in values.items()}


class FromFile(NamedTuple):
    """What a checkpoint or safetensors file holds.

    Attributes:
        model: In eval mode; its `model_args` are the arguments that built it.
        tensors: The weights as they stand in the file.
        settings: train.py's options; empty if the file does not have them.
        info: What else stands beside the weights.
    """

    model: Model
    tensors: Dict[str, torch.Tensor]
    settings: Dict[str, Any]
    info: Dict[str, Any]


def from_file(
    file: Path, name: Optional[str] = None, ema: Optional[bool] = None, model_kwargs: Optional[Dict[str, Any]] = None
) -> FromFile:
    """The model of a run's folder, a checkpoint or a safetensors file.

    Args:
        file: The file, or the folder, whose newest checkpoint is taken.
        name: The model, where the file does not say, or must say so.
        ema: As in `create`.
        model_kwargs: The model's arguments, where the file does not say.

    Raises:
        UsageError: The file does not say which model it is of, says another one, or what it says cannot be read.
        OSError, ValueError, RuntimeError: It is missing or broken, or the weights are not of that model.
    """
    from .weights.load import read_tensors

    file = newest_of(file) if file.is_dir() else file
    tensors, info = read_tensors(file, ema)
    settings = vars(info['args']) if isinstance(info.get('args'), Namespace) else {}
    run = settings if isinstance(settings.get('model'), str) else {}
    stated = run.get('model') or (info.get('model') if file.suffix == '.safetensors' else None)
    if name and isinstance(stated, str) and name.split('.')[0] != stated.split('.')[0]:
        raise UsageError(f'{str(file)!r} is of {stated}, not of {name}.')
    # a tag says what the input is made of: the file's own, before another
    model_name = stated if isinstance(stated, str) else name or ''
    if not model_name:
        raise UsageError(
            f'{str(file)!r} does not say which model it is of; give the model, and the file by --checkpoint '
            '(push: --model names it).'
        )
    if model_name != name and '.' in model_name and model_name not in _tags(model_name.split('.')[0]):
        if not (run.get('mean') or info.get('mean')):
            log.warning(
                '%r is of %s, a tag that is not known here; its mean and deviation are guessed.', str(file), stated
            )
        model_name = name or model_name.split('.')[0]
    check_name(model_name)
    try:
        cfg: Any = get_pretrained_cfg(model_name)
        kwargs = dict(model_kwargs or run.get('model_kwargs') or json.loads(info.get('model_args', '{}')))
        if run.get('gp'):
            kwargs['global_pool'] = run['gp']
        sizes = dict(num_classes=rows_of(tensors, cfg.classifier, 0), in_chans=rows_of(tensors, cfg.first_conv, 1))
        kwargs.update({key: value for key, value in sizes.items() if value})
        said = {} if run else _metadata(info)
        channels = kwargs.get('in_chans', cfg.input_size[0])
        overlay = dict(
            state_dict=tensors,
            file=None,
            hf_hub_id=None,
            source=None,
            num_classes=kwargs.get('num_classes', cfg.num_classes),
            input_size=(channels, *cfg.input_size[1:]),  # so that timm takes the first convolution as it is
        )
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UsageError(f'what {str(file)!r} says of itself cannot be read: {e}') from None
    try:
        model: Model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except (AssertionError, KeyError) as e:  # timm's word for an argument that it does not know
        raise UsageError(f'{str(file)!r} does not build a {model_name}: {e}') from None
    model.model_args = kwargs  # for whoever writes them beside the weights
    model.pretrained_cfg.pop('state_dict', None)
    model.pretrained_cfg.update(tag=None, input_size=cfg.input_size)
    try:
        data = resolve_data_config(run or said, model=model)
    except (AssertionError, AttributeError, TypeError, ValueError):
        raise UsageError(f'what {str(file)!r} says of its input cannot be read.') from None
    data['input_size'] = (channels, *data['input_size'][1:])
    data.update({key: tuple(adapt_to_chs(data[key], channels)) for key in ('mean', 'std')})
    model.pretrained_cfg.update({key: data[key] for key in INPUT})
    if run or said:
        for key in ('test_input_size', 'test_crop_pct', 'description'):
            model.pretrained_cfg.pop(key, None)
        labels = _labels(file.parent, run, model.num_classes) if run else said.get('label_names')
        model.pretrained_cfg.update(label_names=labels)
    return FromFile(model.eval(), tensors, run, info)


def rows_of(tensors: Dict[str, torch.Tensor], module: Any, axis: int) -> Optional[int]:
    """The length along an axis of the weight of a module, None where there is no such weight."""
    weight = tensors.get(f'{module}.weight') if isinstance(module, str) else None
    return weight.shape[axis] if weight is not None and weight.ndim > axis else None


def newest_of(folder: Path) -> Path:
    """The newest checkpoint in the folder of a run.

    Raises:
        UsageError: There is none.
    """
    from .training.record import newest_checkpoint

    file, epochs = newest_checkpoint(folder)
    if file is None:
        raise UsageError(f'no checkpoint in folder {str(folder)!r}; a run of `timm-regnet-rnn train` has last.pth.tar.')
    last = folder / 'last.pth.tar'
    if file != last and last.exists():
        log.warning('%r is damaged, or older; taking %s, of %d epochs.', str(last), file.name, epochs)
    return file


def create(name: str, checkpoint: Optional[Union[str, Path]] = None, ema: Optional[bool] = None) -> Model:
    """A model in eval mode with weights, whose `pretrained_cfg` says what its input and its classes are.

    Args:
        name: NAME[.TAG] of any timm model, hf-hub:ORG/NAME, local-dir:FOLDER, the folder of a run of
            `timm-regnet-rnn train` (or one that `pull` made), or a .pth.tar or .safetensors file that says which model
            it is of.
        checkpoint: Weights to take instead of the pretrained ones: a file, or the folder of a run.
        ema: Of a checkpoint that has both, take the averaged weights or the others; None for the averaged, which
            training measures.

    Raises:
        UsageError: There is no such model or weights, or the two do not belong together.
        OSError, ValueError, RuntimeError: The weights cannot be had, are broken or do not fit.
    """
    path = Path(name)
    if name.startswith(FOLDER) or (not is_model(name) and path.is_dir() and (path / 'config.json').is_file()):
        name = name if name.startswith(FOLDER) else f'{FOLDER}{name}'
    if name.startswith((HUB, FOLDER)):
        from .weights import pull

        pull.check_source(name)
        kwargs: Dict[str, Any] = {}
        if checkpoint is not None:
            kwargs = dict(pretrained_cfg_overlay=dict(file=str(checkpoint), hf_hub_id=None, source=None))
        return timm.create_model(name, pretrained=True, **kwargs).eval()
    if not is_model(name) and path.exists():
        if checkpoint is not None:
            raise UsageError(f'{name!r} has weights of its own; --checkpoint goes with the name of a model.')
        return from_file(path, None, ema).model
    check_name(name)
    if checkpoint is not None:
        return from_file(Path(checkpoint), name, ema).model
    if not is_model_pretrained(name):
        raise UsageError(
            f'{name!r} has no pretrained weights; `timm-regnet-rnn list` prints the tags that have, '
            'and --checkpoint takes a file.'
        )
    return timm.create_model(name, pretrained=True).eval()


def preprocessing(model: Model) -> Tuple[Dict[str, Any], Callable[[Union[str, Path]], torch.Tensor]]:
    """How a model's input is made.

    Returns:
        timm's data settings, and a function from an image file to a tensor (C, H, W), which raises UsageError where
        the file cannot be read.

    Raises:
        UsageError: The model takes neither 1 nor 3 channels.
    """
    config = resolve_data_config({}, model=model, use_test_size=True)
    first = model.pretrained_cfg.get('first_conv')
    conv = dict(model.named_modules()).get(first) if isinstance(first, str) else None
    channels = getattr(conv, 'in_channels', config['input_size'][0])
    if channels != config['input_size'][0]:  # timm builds with `in_chans` and keeps the settings of the weights
        config['input_size'] = (channels, *config['input_size'][1:])
        config.update({key: tuple(adapt_to_chs(config[key], channels)) for key in ('mean', 'std')})
    mode, transform = image_mode(channels), create_transform(**config)

    def prepare(path: Union[str, Path]) -> torch.Tensor:
        image: Image.Image = read_image(path, mode)
        try:
            return transform(image)
        except (MemoryError, RuntimeError, ValueError) as e:
            raise UsageError(f'cannot bring {str(path)!r} to the size of the model: {e}') from None

    return config, prepare


@torch.inference_mode()
def probabilities(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Probabilities of the classes (B, N) for images (B, C, H, W), on the CPU in float32.

    Raises:
        UsageError: They are no numbers.
    """
    found = model(x).float().softmax(-1).cpu()
    if not found.isfinite().all():
        raise UsageError('the model computes no probabilities: its weights hold NaN or infinity, or numbers too large.')
    return found


def predictions(
    model: Model, paths: Sequence[Union[str, Path]], topk: int = 5, device: Union[str, torch.device] = 'cpu'
) -> Iterator[Dict[str, Any]]:
    """Classify images one by one.

    Yields:
        For each path a dict of `path` and either `top`, a list of (class name, probability) from the most probable
        down, or `error`, one line that says why the file could not be read.
    """
    _, prepare = preprocessing(model)
    names = class_names(model)
    for path in paths:
        try:
            x = prepare(path).unsqueeze(0).to(device)
        except UsageError as e:
            yield dict(path=str(path), error=str(e))
            continue
        value, index = probabilities(model, x)[0].topk(min(topk, len(names)))
        yield dict(path=str(path), top=[(names[i], v) for i, v in zip(index.tolist(), value.tolist())])
