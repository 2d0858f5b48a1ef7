"""What can be known to be wrong with a run before its first epoch."""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

from ..errors import one_line
from ..inference import CLASSES, check_name, newest_of

__all__ = [
    *('OURS', 'average_warning', 'check_batch', 'check_continuation', 'check_known', 'check_model'),
    *('check_numbers', 'check_results', 'check_room', 'check_start', 'total_epochs'),
]

OURS = ('config', 'output', 'experiment', 'resume')
# May differ between a run and its continuation: they say where and how it computes, not what.
FREE = (*OURS, 'data', 'data_dir', 'device', 'device_modules', 'workers', 'pin_mem', 'local_rank', 'log_interval')


def check_known(model: str, data_dir: str, download: bool) -> None:
    """Refuse a model or a data folder that is not there, before train.py is fetched to ask what it takes.

    Raises:
        ValueError: In one line.
    """
    if '/' in model and Path(model).exists():
        raise ValueError(f'{model!r} is no name of a model; weights to start from are given by --initial-checkpoint.')
    check_name(model)
    if not download and not Path(data_dir).is_dir():
        raise ValueError(f'no data folder {data_dir!r}.')


def check_model(settings: Dict[str, Any]) -> Tuple[int, int]:
    """Refuse a model that cannot be built, or not be trained with the recipe's images.

    Returns:
        Its number of parameters, and of classes.

    Raises:
        ValueError: In one line.
    """
    from ..complexity import on_meta

    name = settings['model']
    check_name(name)
    try:
        model = on_meta(name, **model_arguments(settings))
    except Exception as e:  # timm's factories say a wrong name by KeyError, AssertionError and more
        raise ValueError(f'cannot build {name!r}: {one_line(e)}') from None
    size, info = settings['input_size'], getattr(model, 'feature_info', None)
    reduction = info[-1]['reduction'] if isinstance(info, list) and info else 1
    if size and min(size[1:]) <= reduction:
        raise ValueError(
            f'{name!r} divides the sides of its images by {reduction}, which leaves a single pixel of '
            f'{size[1]}x{size[2]}; give a model for small images, or --input-size.'
        )
    return sum(p.numel() for p in model.parameters()), int(model.num_classes)  # type: ignore[arg-type]


def model_arguments(settings: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments that train.py builds its model with, as far as they shape it."""
    said = dict(num_classes=settings['num_classes'], global_pool=settings['gp'])
    return {**settings['model_kwargs'], **{key: value for key, value in said.items() if value is not None}}


def check_start(settings: Dict[str, Any]) -> str:
    """Refuse weights to start from that there are not, or that are not the model's.

    Returns:
        The file that `--initial-checkpoint` names, of a run's folder its newest checkpoint; '' where nothing is named.

    Raises:
        ValueError, OSError: In one line.
    """
    import timm

    from ..inference import rows_of
    from ..warm_start import as_resnet
    from ..weights.load import check_file, read_weights

    name, start = settings['model'], settings['initial_checkpoint']
    if not start:
        if settings['pretrained'] and not settings['pretrained_path'] and not timm.models.is_model_pretrained(name):
            raise ValueError(
                f'{name!r} has no pretrained weights to start from; `timm-regnet-rnn list --pretrained` prints the '
                'names that have, and --initial-checkpoint takes a file or the folder of a run.'
            )
        return ''
    file = newest_of(Path(start)) if Path(start).is_dir() else Path(start)
    check_file(file)
    kwargs = model_arguments(settings)
    cfg: Any = timm.models.get_pretrained_cfg(name)
    if settings['pretrained']:
        # train.py's --pretrained-path lets the classifier start anew, and drops what does not fit without a word: with
        # the classes and channels of the file, timm takes all of it or says what is wrong
        state = as_resnet(read_weights(file))
        classes = rows_of(state, cfg.classifier, 0) or 0
        channels = rows_of(state, cfg.first_conv, 1) or cfg.input_size[0]
        overlay = dict(file=str(file), num_classes=classes, input_size=(channels, *cfg.input_size[1:]))
        kwargs.update(pretrained=True, num_classes=classes, in_chans=channels, pretrained_cfg_overlay=overlay)
    else:
        channels = settings['in_chans'] or (settings['input_size'] or (3,))[0]
        kwargs.update(checkpoint_path=str(file), in_chans=channels)
    try:
        timm.create_model(name, **kwargs)
    except Exception as e:  # timm's loaders say what does not fit by RuntimeError, KeyError and more
        raise ValueError(f'{str(file)!r} is no start for {name!r}: {one_line(e)}') from None
    return str(file)


def check_numbers(settings: Dict[str, Any], nproc: int) -> None:
    """Refuse numbers that train.py takes and fails with, or worse, does not.

    Args:
        settings: train.py's options; the batch is that of all processes together.
        nproc: Processes.

    Raises:
        ValueError: In one line.
    """
    batch = settings['batch_size']
    for name in ('batch_size', 'epochs'):
        if settings[name] < 1:
            raise ValueError(f'--{name.replace("_", "-")} must be at least 1, got {settings[name]}.')
    if settings['val_interval'] != 1:
        raise ValueError(f'a learning curve has every epoch: --val-interval must be 1, got {settings["val_interval"]}.')
    if batch % nproc:
        raise ValueError(f'the batch of {batch} is that of all processes together, and {nproc} cannot share it.')
    for name in ('lr', 'lr_base'):
        if settings[name] is not None and not settings[name] > 0:
            raise ValueError(f'--{name.replace("_", "-")} must be above 0, got {settings[name]}.')
    low, high = (settings['scale'] or (0.08, 1.0))[:2]
    if not 0 < low <= high:
        raise ValueError(f'--scale must be two shares of the area, 0 < low <= high; got {low} {high}.')
    low, high = (settings['ratio'] or (0.75, 1.33))[:2]
    if not 0 < low <= high:
        raise ValueError(f'--ratio must be two aspect ratios, 0 < low <= high; got {low} {high}.')


def check_batch(batch: int, images: int) -> None:
    """Refuse a batch that the training images, 0 if their number is not known, do not fill.

    Raises:
        ValueError: In one line.
    """
    if images and images < batch:
        more = f'give --batch-size {max(2, images // 8)} or so' if images > 1 else 'training takes two at least'
        raise ValueError(f'a batch of {batch} out of {images} training images: {more}.')


def average_warning(settings: Dict[str, Any], images: int) -> str:
    """A line to say before training where averaged weights (EMA) cannot follow so few updates, '' where they can.

    An average of decay d forgets what it started from over 1 / (1 - d) updates; what is reported are its weights.
    """
    if not settings['model_ema'] or settings['model_ema_warmup'] or not images:
        return ''
    updates = settings['epochs'] * (images // settings['batch_size'])
    memory = 1 / max(1e-9, 1 - settings['model_ema_decay'])
    if updates >= 3 * memory:
        return ''
    decay = round(1 - 10 / max(updates, 20), len(str(updates)))  # remembers a tenth of the run
    return (
        f'{updates} updates are few for averaged weights of decay {settings["model_ema_decay"]}, which remember '
        f'{memory:.0f}: their accuracy will lag behind. Give --model-ema-warmup, or --model-ema-decay {decay:.10g}.'
    )


def check_results(table: Path) -> None:
    """Refuse a results.csv that a row cannot be added to.

    Raises:
        ValueError: It is no regular file, cannot be written, or is damaged; in one line.
    """
    from ..results import COLUMNS, read_csv, whole

    if table.exists() and not table.is_file():
        raise ValueError(f'{str(table)!r} is no regular file; give one by --results.')
    if not os.access(table if table.exists() else table.resolve().parent, os.W_OK):
        raise ValueError(f'cannot write to {str(table)!r}; give a file by --results.')
    if (table.parent / 'curves').exists() and not (table.parent / 'curves').is_dir():
        raise ValueError(f'{str(table.parent / "curves")!r} is where learning curves go, and is no folder.')
    if table.is_file() and table.stat().st_size:
        read_csv(table, COLUMNS, whole)


def total_epochs(settings: Dict[str, Any]) -> int:
    """How many epochs train.py will run: by timm's scheduler, which may add warm-up, cycles and cool-down.

    Raises:
        ValueError: There is no such schedule.
    """
    import torch
    from timm.scheduler import create_scheduler_v2, scheduler_kwargs

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        kwargs = scheduler_kwargs(argparse.Namespace(**settings))
        return create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=1)[1]
    except (AssertionError, TypeError, ValueError) as e:
        raise ValueError(f'the schedule cannot be built: {one_line(e)}') from None


def check_room(folder: Path, parameters: int, settings: Dict[str, Any]) -> None:
    """Refuse to start where the checkpoints of the run would not find room, or cannot be written.

    Raises:
        ValueError: In one line.
    """
    folder = next(p for p in (folder, *folder.resolve().parents) if p.is_dir())
    if not os.access(folder, os.W_OK):
        raise ValueError(f'cannot write to {str(folder)!r}.')
    # weights, one or two moments, the moving average; train.py keeps `checkpoint_hist`, the last and the next
    need = (settings['checkpoint_hist'] + 2) * parameters * 4 * (3 + settings['model_ema'])
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(
            f'{str(folder)!r} has {free / 1e6:,.0f} MB free, the checkpoints take {need / 1e6:,.0f} MB; '
            'give another --output or a smaller --checkpoint-hist.'
        )


def check_continuation(output: Path, settings: Dict[str, Any], classes: Sequence[str] = ()) -> None:
    """Refuse to continue a run with other settings or other classes. A run without a finished epoch is none.

    Raises:
        ValueError: Names the first that differs.
    """
    import yaml

    names = output / CLASSES
    try:
        known = json.loads(names.read_text(encoding='utf-8')) if names.is_file() and classes else None
    except ValueError:  # it is written anew
        known = None
    if isinstance(known, list) and known != list(classes):
        raise ValueError(f'{str(names)!r} has other classes than the data; give another --output.')
    file = output / 'args.yaml'
    if not file.is_file():
        return
    try:
        before = yaml.safe_load(file.read_text(encoding='utf-8')) or {}
    except (yaml.YAMLError, UnicodeDecodeError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise ValueError(f'{str(file)!r} is damaged, so nothing says what the run was; give another --output.')
    for name, value in yaml.safe_load(yaml.safe_dump(settings)).items():  # as train.py writes it: tuples are lists
        if name not in FREE and name in before and before[name] != value:
            raise ValueError(
                f'{str(output)!r} holds a run with {name} {before[name]!r}, not {value!r}; give another --output.'
            )
