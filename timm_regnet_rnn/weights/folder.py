"""A trained model as the folder that goes to the Hub: model.safetensors and config.json, read from a checkpoint."""

import hashlib
import json
import os
import shutil
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import safetensors
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import clean_state_dict, is_model_in_modules
from timm.utils import AverageMeter, accuracy

import timm_regnet_rnn

from ..datasets import dataset_name, labels_of
from ..errors import UsageError
from .config import write_config
from .load import check_file, load_checkpoint


@dataclass
class Trained:
    """A model with its weights, and what is known of where they come from.

    Attributes:
        model: In eval mode.
        name: Its entrypoint, with a tag if it started from one.
        args: Arguments that rebuild it, besides classes and channels.
        settings: train.py's options; empty if the checkpoint does not have them.
        epochs: Epochs behind the weights, None if unknown.
        data_config: Input size, mean, std, crop and interpolation.
        labels: A name per class, or empty.
        file: The safetensors file to publish as it is, None to write one.
    """

    model: torch.nn.Module
    name: str
    args: Dict[str, Any]
    settings: Dict[str, Any] = field(default_factory=dict)
    epochs: Optional[int] = None
    data_config: Dict[str, Any] = field(default_factory=dict)
    labels: List[str] = field(default_factory=list)
    file: Optional[Path] = None

    @property
    def dataset(self) -> str:
        """Name of the data set it was trained on, '' if unknown."""
        return dataset_name(self.settings)[1] if self.settings.get('data_dir') else ''


def read_tensors(file: Path, ema: Optional[bool]) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """The weights in a checkpoint of train.py or in a safetensors file, and what stands beside them.

    Args:
        file: The file.
        ema: Take the averaged weights, or the others; None for the averaged where there are both, and for a file of
            nothing but weights too.

    Raises:
        UsageError: There are no such weights in it.
        OSError, ValueError: The file is missing, broken, or holds more than weights.
    """
    check_file(file)
    if file.suffix == '.safetensors':
        if ema:
            raise UsageError(f'--ema is for checkpoints of train.py; {str(file)!r} holds one set of weights.')
        with safe_open(file, framework='pt') as f:
            return load_file(file), f.metadata() or {}
    state = load_checkpoint(file)
    if ema is None and isinstance(state, dict):
        if state and all(isinstance(value, torch.Tensor) for value in state.values()):
            return clean_state_dict(state), {}
        ema = 'state_dict_ema' in state
    key = 'state_dict_ema' if ema else 'state_dict'
    if not isinstance(state, dict) or not isinstance(state.get(key), dict):
        raise UsageError(
            f"{str(file)!r} has no {key!r}; expected a checkpoint of timm's train.py{' --model-ema' * bool(ema)}."
        )
    return clean_state_dict(state[key]), state


def rebuild(
    file: Path, ema: bool = False, model: Optional[str] = None, model_kwargs: Optional[Dict[str, Any]] = None
) -> Trained:
    """The model of a checkpoint.

    Args:
        file: train.py's .pth.tar, or safetensors.
        ema: Take the averaged weights.
        model: The entrypoint, if the file does not say.
        model_kwargs: The model's arguments, if the file does not say.

    Raises:
        UsageError: The file does not say which model it is of, or says otherwise.
        OSError, ValueError: The file is missing or broken, or the weights are not of that model.
    """
    tensors, info = read_tensors(file, ema)
    settings = vars(info['args']) if isinstance(info.get('args'), Namespace) else {}
    stated = settings.get('model') or info.get('model') or (info.get('arch') if not settings else None)
    if model and stated and model.split('.')[0] != stated.split('.')[0]:
        raise UsageError(f'{str(file)!r} is of {stated}, not of {model}.')
    name = stated or model
    if not name:
        raise UsageError(f'{str(file)!r} does not say which model it is of; --model names it.')
    if not is_model_in_modules(name.split('.')[0], ['regnet_rnn']):
        raise UsageError(f'{name!r} is no model of timm_regnet_rnn; `timm-regnet-rnn list` prints the names.')
    args = dict(
        model_kwargs if model_kwargs else settings.get('model_kwargs') or json.loads(info.get('model_args', '{}'))
    )
    if settings.get('gp'):
        args['global_pool'] = settings['gp']
    classes = tensors['fc.weight'].shape[0] if 'fc.weight' in tensors else 0
    first = next((v for k, v in tensors.items() if k in ('conv1.weight', 'conv1.0.weight')), None)
    if first is None:
        raise UsageError(f'{str(file)!r} holds no weights of {name}: it has no conv1.')
    sizes = dict(num_classes=classes, in_chans=first.shape[1])
    net = timm.create_model(name, **{**args, **sizes}).eval()
    net.load_state_dict(tensors)
    config = resolve_data_config(settings, model=net)
    config['input_size'] = (first.shape[1], *config['input_size'][1:])
    for key in ('mean', 'std'):
        config[key] = tuple(adapt_to_chs(config[key], first.shape[1]))  # as the loader does in training
    trained = Trained(net, name, {k: v for k, v in args.items() if k not in sizes}, settings, data_config=config)
    trained.epochs = info['epoch'] + 1 if 'epoch' in info else None
    cfg: Any = net.pretrained_cfg
    known = cfg.get('label_names') if not settings else labels_of(trained.dataset)
    trained.labels = list(known) if known and len(known) == classes else []
    return trained


def write_folder(trained: Trained, folder: Path, release: str = '') -> None:
    """Write model.safetensors and config.json into an empty folder, and prove that they rebuild the model.

    Args:
        trained: The model.
        folder: An existing, empty folder.
        release: NAME.TAG, for the file's metadata.

    Raises:
        RuntimeError: What was written does not rebuild the model bit for bit.
    """
    net, weights = trained.model, folder / 'model.safetensors'
    if trained.file:
        shutil.copyfile(trained.file, weights)
    else:
        metadata = dict(format='pt', model=release or trained.name, model_args=json.dumps(trained.args))
        metadata.update(timm_regnet_rnn=timm_regnet_rnn.__version__, timm=timm.__version__)
        metadata.update(torch=torch.__version__, safetensors=safetensors.__version__)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, weights, metadata)
        sort_metadata(weights)
    tag = release.partition('.')[2]
    write_config(net, folder / 'config.json', trained.args, trained.data_config, trained.labels, tag)
    twin = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    mine, its = net.state_dict(), twin.state_dict()
    x = torch.randn(2, *trained.data_config['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same = mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)
        if not same or not torch.allclose(net(x), twin(x), rtol=1e-4, atol=1e-5):
            raise RuntimeError('what was written does not rebuild the model bit for bit; nothing is sent.')


def sort_metadata(file: Path) -> None:
    """Order the metadata of a safetensors file, which else has them in another order each time it is written."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + size])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(size)
    file.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size :])


def evaluate(trained: Trained, data_dir: str, split: str) -> Dict[str, Any]:
    """Top-1 and top-5 accuracy in percent on a split of an image folder, and its number of images.

    Raises:
        UsageError: The folder has another number of classes than the model.
    """
    data = create_dataset('', data_dir, split=split)
    classes = len(data.reader.class_to_idx)
    if classes != trained.model.num_classes:
        raise UsageError(f'{data_dir!r} has {classes} classes, the model {trained.model.num_classes}.')
    keys = ('interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    loader = create_loader(
        data,
        trained.data_config['input_size'],
        batch_size=256,
        use_prefetcher=False,
        num_workers=os.cpu_count() or 1,
        persistent_workers=False,
        **{key: trained.data_config[key] for key in keys},
    )
    top1, top5 = AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, target in loader:
            first, fifth = accuracy(trained.model(images), target, topk=(1, min(5, classes)))
            top1.update(first.item(), len(target))
            top5.update(fifth.item(), len(target))
    return dict(top1=round(top1.avg, 2), top5=round(top5.avg, 2), images=top1.count, split=split)


def tensor_digest(file: Path) -> str:
    """sha256 of the tensors of a safetensors file: name, type, shape and bytes of each, in the order of their names.

    Two files have the same digest if they hold the same weights, whatever their metadata and order.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f'{name} {str(tensor.dtype).split(".")[1]} {tuple(tensor.shape)}\0'.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
