"""A trained model as the folder that goes to the Hub: model.safetensors and config.json, read from a checkpoint."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import safetensors
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import get_pretrained_cfg, is_model, is_model_in_modules, is_model_pretrained
from timm.utils import AverageMeter, accuracy

import timm_regnet_rnn

from ..datasets import dataset_name
from ..errors import UsageError
from ..files import file_sum, scratch_folder
from ..images import image_mode
from ..inference import from_file
from ..training.data import read_classes, split_folder
from .config import write_config
from .pull import CONFIG, PREFIX, SUMS, WEIGHTS, check_source, pull, pull_config


@dataclass
class Trained:
    """A model with its weights, and what is known of where they come from.

    Attributes:
        model: In eval mode.
        name: Its entrypoint, with a tag if it started from one.
        args: Arguments that rebuild it, besides classes and channels.
        settings: train.py's options; empty if the checkpoint does not have them.
        epochs: Epochs behind the weights, None if unknown.
        averaged: Whether they are the averaged ones of their run.
        data_config: Input size, mean, std, crop and interpolation.
        labels: A name per class, or empty.
        file: The safetensors file to publish as it is, None to write one.
    """

    model: torch.nn.Module
    name: str
    args: Dict[str, Any]
    settings: Dict[str, Any] = field(default_factory=dict)
    epochs: Optional[int] = None
    averaged: bool = False
    data_config: Dict[str, Any] = field(default_factory=dict)
    labels: List[str] = field(default_factory=list)
    file: Optional[Path] = None

    @property
    def dataset(self) -> str:
        """Name of the data set it was trained on, '' if unknown."""
        return dataset_name(self.settings)[1] if self.settings.get('data_dir') else ''


def rebuild(
    file: Path,
    ema: Optional[bool] = None,
    model: Optional[str] = None,
    model_kwargs: Optional[Dict[str, Any]] = None,
) -> Trained:
    """The model of a checkpoint.

    Args:
        file: train.py's .pth.tar, the folder of a run, or safetensors.
        ema: Take the averaged weights or the others; None for the averaged where there are both.
        model: The entrypoint, if the file does not say.
        model_kwargs: The model's arguments, if the file does not say.

    Raises:
        UsageError: The file does not say which model it is of, says otherwise, or holds weights of another model.
        OSError, ValueError: The file is missing or broken, or the weights are not of that model.
    """
    refuse = '{!r} is no model of timm_regnet_rnn; `timm-regnet-rnn list` prints the names.'
    if model and not is_model_in_modules(model.split('.')[0], ['regnet_rnn']):
        raise UsageError(refuse.format(model))
    net, tensors, settings, info = from_file(file, model, ema, model_kwargs)
    stated = settings.get('model') or info.get('model')
    name = stated if isinstance(stated, str) else model or ''
    if not is_model_in_modules(name.split('.')[0], ['regnet_rnn']):
        raise UsageError(refuse.format(name))
    if net.state_dict().keys() != tensors.keys():  # a ResNet's, which would start a RegNet
        raise UsageError(f'{str(file)!r} holds no weights of {name}, but those of another model.')
    args = {key: value for key, value in net.model_args.items() if key not in ('num_classes', 'in_chans')}
    trained = Trained(net, name, args, settings, data_config=resolve_data_config({}, model=net))
    trained.epochs = info['epoch'] + 1 if isinstance(info.get('epoch'), int) else None
    trained.averaged = 'state_dict_ema' in info if ema is None else ema
    names = list(net.pretrained_cfg.get('label_names') or ())
    numbers = [f'class {i}' for i in range(len(names))]
    trained.labels = names if names != numbers and len(names) == net.num_classes else []
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
        if not same or not torch.allclose(net(x), twin(x), rtol=1e-4, atol=1e-5, equal_nan=True):
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
        ValueError: There is no such folder, timm would misread it, it has another number of classes than the model, or
            the model takes neither 1 nor 3 channels.
    """
    classes = len(read_classes(split_folder(dict(data_dir=data_dir), split))[0])
    data = create_dataset('', data_dir, split=split, input_img_mode=image_mode(trained.data_config['input_size'][0]))
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


def pull_folder(name: str, to: Union[str, Path], cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """Make a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads without a network.

    Args:
        name: A model with pretrained weights, NAME or NAME.TAG, hf-hub:ORG/NAME, or the folder or checkpoint of a run.
        to: Where the folder goes; it is called like the model, and replaces one that this made before.
        cache_dir: The Hub cache, huggingface_hub's own if None.

    Returns:
        The folder, with model.safetensors, config.json and SHA256SUMS.

    Raises:
        OSError: The files cannot be had or written.
        ValueError: There is no such model, it has no weights, or something else has the folder's name.
    """
    hub = name[len(PREFIX) :] if name.startswith(PREFIX) else ''
    run = Path(name) if not hub and not is_model(name) and Path(name).exists() else None
    known = is_model_in_modules(name.split('.')[0], ['regnet_rnn']) and is_model_pretrained(name)
    if not hub and not run and not known:
        raise ValueError(f'no pretrained weights are called {name!r}; `timm-regnet-rnn list` prints the tags.')
    if run:
        one = run.resolve()
        called = one.name if one.is_dir() else one.stem if one.suffix == '.safetensors' else one.parent.name
    else:
        called = hub.partition('@')[0].split('/')[-1] or name
    folder = Path(to) / called
    if folder.exists() and not (folder / SUMS).is_file():
        raise ValueError(f'{str(folder)!r} exists and is none of these folders; give --to another one.')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent) as scratch:
        new = scratch / 'new'
        new.mkdir()
        weights = new / WEIGHTS
        if run:
            write_folder(rebuild(run), new)
        elif hub:
            check_source(name, cache_dir)
            config, _ = pull_config(hub, cache_dir)
            shutil.copyfile(config, new / CONFIG)
            filename = json.loads(config.read_text(encoding='utf-8')).get('pretrained_cfg', {}).get('hf_hub_filename')
            weights = pull(hub, filename, cache_dir)
        else:
            cfg: Any = get_pretrained_cfg(name)
            model = timm.create_model(name)
            data_config = resolve_data_config(model=model)
            write_config(model, new / CONFIG, {}, data_config, cfg.label_names or (), cfg.tag, cfg.description or '')
            weights = pull(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir)
        if not run:
            shutil.copyfile(weights, new / WEIGHTS)
        sums = {file: file_sum(new / file) for file in (WEIGHTS, CONFIG)}
        if sums[WEIGHTS] != file_sum(weights):
            raise OSError(f'{str(folder / WEIGHTS)!r} was not written as it was read; nothing is kept.')
        (new / SUMS).write_text(''.join(f'{value}  {file}\n' for file, value in sums.items()), encoding='utf-8')
        timm.create_model(f'local-dir:{new}', pretrained=True)
        if folder.exists():
            os.rename(folder, scratch / 'old')
        os.rename(new, folder)
    return folder
