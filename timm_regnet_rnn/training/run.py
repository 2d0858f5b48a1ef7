"""`timm-regnet-rnn train`: timm's own train.py, started with a recipe, resumed, and written down.

There is no training loop here. What can be known to be wrong before the first epoch is said before it, in one line.
"""

import argparse
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from ..errors import one_line
from ..ops.fused_cpu import cache_dir
from .recipe import check_recipe, load_recipe, train_options
from .record import append_row, code_commit, make_row, newest_checkpoint, run_name

__all__ = ['train']

TIMM_URL = 'https://github.com/huggingface/pytorch-image-models'
OURS = ('config', 'output', 'experiment', 'resume')
# May differ between a run and its continuation: they say where and how it computes, not what.
FREE = (*OURS, 'data', 'data_dir', 'device', 'device_modules', 'workers', 'pin_mem', 'local_rank', 'log_interval')


def find_train_py(timm_dir: Optional[str]) -> Path:
    """timm's train.py: in `timm_dir`, in `$TIMM_DIR`, or in a clone of the installed timm's tag in the user's cache.

    The clone is fetched once, and verified at every use: the version is the installed one and no file differs from the
    tag's.

    Raises:
        ValueError: It is not there, cannot be fetched, or the clone was altered.
    """
    import timm

    where = timm_dir or os.environ.get('TIMM_DIR')
    if where:
        train_py = Path(where) / 'train.py'
        if not train_py.is_file():
            raise ValueError(f'{"--timm-dir" if timm_dir else "$TIMM_DIR"} {where!r} holds no train.py.')
        return train_py
    clone = cache_dir() / f'timm-{timm.__version__}'
    if not clone.exists():
        clone.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=clone.parent) as scratch:
            target = Path(scratch) / 'timm'
            command = ['git', 'clone', '-q', '--depth', '1', '--branch', f'v{timm.__version__}', TIMM_URL, str(target)]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError:
                raise ValueError('fetching train.py needs git; install it, or give --timm-dir.') from None
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ['git failed'])[-1]
                raise ValueError(
                    f'cannot fetch train.py of timm {timm.__version__} ({reason}); give a checkout by --timm-dir.'
                )
            try:
                os.replace(target, clone)
            except OSError:  # another run was first
                if not clone.exists():
                    raise
    version = clone / 'timm' / 'version.py'
    status = subprocess.run(['git', '-C', str(clone), 'status', '--porcelain'], capture_output=True, text=True)
    changed = [line for line in status.stdout.splitlines() if '__pycache__' not in line]
    found = re.search(r"__version__ = '(.+)'", version.read_text(encoding='utf-8')) if version.is_file() else None
    if status.returncode or changed or not found or found[1] != timm.__version__:
        raise ValueError(
            f'{str(clone)!r} is not the unaltered tag v{timm.__version__} of timm; delete it and try again.'
        )
    return clone / 'train.py'


class _Flags(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f'{message}.')


def parse_flags(options: Dict[str, Dict[str, Any]], flags: Sequence[str]) -> Dict[str, Any]:
    """The options that a train.py command line gives.

    Args:
        options: From `train_options`.
        flags: Words as they would stand after `train.py`.

    Raises:
        ValueError: train.py would refuse them.
    """
    from timm.utils import ParseKwargs

    kinds = dict(int=int, float=float)
    parser = _Flags(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, option in options.items():
        if not option['flags']:
            continue
        rest: Dict[str, Any] = {k: option[k] for k in ('nargs', 'choices') if k in option}
        if option['type'] == 'kwargs':
            rest['action'] = ParseKwargs
        elif option['type'] == 'bool':
            rest['action'] = 'store_true'
        else:
            rest['type'] = kinds.get(option['type'], str)
            if option.get('nargs') == '?':
                rest['const'] = True
        parser.add_argument(*option['flags'], dest=name, **rest)
    return vars(parser.parse_args(list(flags)))


def split_folder(settings: Dict[str, Any], split: str) -> Path:
    """The folder that train.py takes for a split of a folder data set: the one of that name, or a synonym's.

    Raises:
        ValueError: There is none; train.py would then read the root as one big split.
    """
    root, name = Path(settings['data_dir']), split.split('[')[0]
    synonyms = [('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation')]
    for candidate in (name, *(word for words in synonyms if name in words for word in words)):
        if (root / candidate).is_dir():
            return root / candidate
    raise ValueError(
        f'no folder {name!r} in {str(root)!r}; it must hold a folder per split, with a folder per class in it.'
    )


def check_data(settings: Dict[str, Any]) -> None:
    """Refuse data that train.py would misread, or that do not fit the recipe.

    Raises:
        ValueError: In one line.
    """
    name, splits = settings['dataset'], (settings['train_split'], settings['val_split'])
    root = Path(settings['data_dir'])
    if not root.is_dir() and not settings['dataset_download']:
        raise ValueError(f'no data folder {str(root)!r}.')
    if '/' in name:
        if not name.startswith('torch/') or settings['dataset_download']:
            return
        from timm.data import create_dataset

        try:
            data = create_dataset(name, root=str(root), split=splits[0], is_training=True)
            image, classes = data[0][0], len(data.classes)
        except (RuntimeError, FileNotFoundError) as e:
            raise ValueError(
                f'no {name} in {str(root)!r} ({str(e).splitlines()[0]}); --dataset-download fetches it.'
            ) from None
    else:
        from PIL import Image
        from timm.data.readers.img_extensions import get_img_extensions

        suffixes, folders = tuple(get_img_extensions()), []
        for split in splits:
            folder = split_folder(settings, split)
            found = {}
            for path in sorted(p for p in folder.iterdir() if p.is_dir()):
                images = (file for file in path.rglob('*') if file.name.lower().endswith(suffixes))
                found[path.name] = next(images, None)
            empty = [name for name, first in found.items() if first is None]
            if empty or not found:
                raise ValueError(f'no image in {str(folder / empty[0] if empty else folder)!r}.')
            folders.append(found)
        if folders[0].keys() != folders[1].keys():
            odd = sorted(folders[0].keys() ^ folders[1].keys())[0]
            raise ValueError(f'{splits[0]!r} and {splits[1]!r} hold different classes, {odd!r} for one.')
        classes = len(folders[0])
        with Image.open(next(iter(folders[0].values()))) as image:
            image.load()
    if settings['num_classes'] not in (None, classes):
        raise ValueError(
            f'the data have {classes} classes, the recipe {settings["num_classes"]}; give --num-classes {classes}, '
            'or the folder the recipe is for.'
        )
    scale, ratio, size = settings['scale'], settings['ratio'], settings['input_size']
    if size and scale[0] == scale[1] and scale[0] < 1 and ratio[0] == ratio[1] == 1:  # an exact crop of a padded image
        side = size[-1] / math.sqrt(scale[0])
        if any(abs(s - side) > 0.5 for s in image.size):
            raise ValueError(
                f'the recipe crops {size[-1]}x{size[-1]} out of training images of {side:.0f}x{side:.0f}; these are '
                f'{image.size[0]}x{image.size[1]}. `prepare_data.py --pad {(side - size[-1]) / 2:.0f}` makes them.'
            )


def check_model(settings: Dict[str, Any]) -> int:
    """Refuse a model that cannot be built.

    Returns:
        Its number of parameters.

    Raises:
        ValueError: In one line.
    """
    import timm

    name, kwargs = settings['model'], dict(settings['model_kwargs'])
    if not timm.is_model(name):
        raise ValueError(f'unknown model {name!r}; `timm-regnet-rnn list` prints ours, timm.list_models() all.')
    if settings['num_classes'] is not None:
        kwargs['num_classes'] = settings['num_classes']
    try:
        model = timm.create_model(name, device='meta', **kwargs)
    except (TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise ValueError(f'cannot build {name!r}: {one_line(e)}') from None
    return sum(p.numel() for p in model.parameters())


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


def machine_flags(settings: Dict[str, Any], given: Sequence[str]) -> List[str]:
    """Flags that suit this machine, where neither the recipe nor the command line has them."""
    import torch

    mps = torch.backends.mps.is_available()
    device = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    flags = []
    if 'device' in given:
        device = settings['device']
    else:
        flags += ['--device', device]
    if 'channels_last' not in given:
        flags.append('--channels-last')
    if device.startswith('cuda') and 'amp' not in given and 'model_dtype' not in given:
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        flags += ['--amp', '--amp-dtype', dtype]
    return flags


def check_continuation(output: Path, settings: Dict[str, Any]) -> None:
    """Refuse to continue a run with other settings.

    Raises:
        ValueError: Names the first that differs.
    """
    import yaml

    file = output / 'args.yaml'
    if not file.is_file():
        return
    before = yaml.safe_load(file.read_text(encoding='utf-8')) or {}
    for name, value in yaml.safe_load(yaml.safe_dump(settings)).items():  # as train.py writes it: tuples are lists
        if name not in FREE and name in before and before[name] != value:
            raise ValueError(
                f'{str(output)!r} holds a run with {name} {before[name]!r}, not {value!r}; give another --output.'
            )


def run_logged(command: Sequence[str], log: Path, lock: int) -> int:
    """Run a command with its output on the terminal and at the end of a log; its exit status.

    The command inherits the descriptor that locks the run's folder, so the folder stays locked as long as it lives.
    """
    with log.open('a', encoding='utf-8') as file:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding='utf-8',
            errors='replace',
            pass_fds=(lock,),
        )
        try:
            for line in child.stdout:
                file.write(line)
                file.flush()
                sys.stdout.write(line)
                sys.stdout.flush()
        except BaseException:
            child.terminate()
            raise
        finally:
            child.wait()
    return child.returncode


def train(
    recipe: str,
    model: str,
    data_dir: str,
    flags: Sequence[str],
    output: Optional[str] = None,
    results: Optional[str] = None,
    timm_dir: Optional[str] = None,
    nproc: Optional[int] = None,
    dry_run: bool = False,
) -> int:
    """Train a model by a recipe, or go on where an earlier run in the same folder stopped; then write its row.

    Args:
        recipe: YAML file for train.py.
        model: Any timm model.
        data_dir: The data.
        flags: More flags of train.py; they win over the recipe.
        output: The run's folder; `output/` and a name made of the settings if None.
        results: CSV file for the row, `results.csv` beside the recipe if None.
        timm_dir: A checkout of timm, see `find_train_py`.
        nproc: Processes, one per visible GPU if None.
        dry_run: Print the command and stop.

    Returns:
        Exit status: 0, or 1 if train.py failed.

    Raises:
        ValueError: What was asked for cannot work; in one line.
    """
    import torch

    config = load_recipe(recipe)
    train_py = find_train_py(timm_dir)
    options = train_options(train_py)
    problems = check_recipe(config, options)
    if problems:
        raise ValueError(f'recipe {recipe!r}: {problems[0]}')
    given = parse_flags(options, flags)
    forbidden = [name for name in OURS if name in given]
    if forbidden:
        raise ValueError(
            f'--{forbidden[0]} is set by this command; --output names the folder of a run, to resume it too.'
        )
    defaults = {name: option['default'] for name, option in options.items()}
    chosen = dict(model=model, data_dir=data_dir)
    auto = machine_flags({**config, **given}, [*config, *given])
    settings = {**defaults, **config, **parse_flags(options, auto), **given, **chosen}
    if nproc is None:
        nproc = max(1, torch.cuda.device_count()) if settings['device'] == 'cuda' else 1
    if nproc < 1:
        raise ValueError(f'--nproc must be at least 1, got {nproc}.')
    if settings['aug_repeats'] and nproc == 1:
        raise ValueError('timm repeats augmentations over several processes only; give --nproc or --aug-repeats 0.')
    parameters = check_model(settings)
    total = total_epochs(settings)
    check_data(settings)
    name = run_name(settings, Path(recipe))
    folder = Path(output) if output else Path('output') / name
    table = Path(results) if results else Path(recipe).parent / 'results.csv'
    if not os.access(table if table.exists() else table.resolve().parent, os.W_OK):
        raise ValueError(f'cannot write to {str(table)!r}; give a file by --results.')
    check_room(folder, parameters, settings)

    command = [sys.executable]
    if nproc > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(nproc)]
    command += ['-m', 'timm_regnet_rnn', 'run', str(train_py), '--config', recipe, '--model', model]
    command += ['--data-dir', data_dir, *auto, *flags]
    if nproc > 1 and settings['device'] == 'cpu':
        command += ['--device-modules', *(settings['device_modules'] or ()), 'timm_regnet_rnn.training.cpu_ddp']
    command += ['--output', str(folder.parent), '--experiment', folder.name]
    if dry_run:
        checkpoint, _ = newest_checkpoint(folder)
        print(shlex.join([*command, *(['--resume', str(checkpoint)] if checkpoint else [])]))
        return 0

    commit = code_commit()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / '.lock').open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f'a run is under way in {str(folder)!r}.') from None
        check_continuation(folder, settings)
        checkpoint, done = newest_checkpoint(folder)
        if checkpoint:
            print(f'{folder}: {done} of {total} epochs done', flush=True)
            command += ['--resume', str(checkpoint)]
        if done < total:
            os.set_inheritable(lock.fileno(), True)
            status = run_logged(command, folder / 'train.log', lock.fileno())
            _, done = newest_checkpoint(folder)
            if status or done < total:
                print(
                    f'timm-regnet-rnn: train.py stopped with status {status} after {done} of {total} epochs '
                    f'(log: {folder / "train.log"}); the same command goes on from there.',
                    file=sys.stderr,
                )
                return 1
        return finish(folder, table, *make_row(settings, Path(recipe), list(given), folder, nproc, commit))


def finish(folder: Path, table: Path, row: Dict[str, Any], curve: List[Dict[str, float]]) -> int:
    """Write a finished run's row once, however often the command is repeated, and print it."""
    marker = folder / 'result.json'
    if marker.is_file():
        row = json.loads(marker.read_text(encoding='utf-8'))
    else:
        row = append_row(table, row, curve)
        scratch = marker.with_suffix('.tmp')
        scratch.write_text(json.dumps(row, indent=2) + '\n', encoding='utf-8')
        os.replace(scratch, marker)
    print(f'{row["run"]}: top-1 {row["top1"]:.2f} %, top-5 {row["top5"]:.2f} % after epoch {row["epochs"]} ({table})')
    return 0
