"""`timm-regnet-rnn train`: timm's own train.py, started with a recipe, resumed, and written down.

There is no training loop here. What can be known to be wrong before the first epoch is said before it, in one line.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

from filelock import FileLock, Timeout
from huggingface_hub.utils import tqdm

from ..inference import CLASSES, check_device
from ..results import IN_WHEEL
from ..weights.load import check_file
from .data import check_data
from .preflight import (
    OURS,
    average_warning,
    check_batch,
    check_continuation,
    check_known,
    check_model,
    check_numbers,
    check_results,
    check_room,
    total_epochs,
)
from .recipe import check_recipe, find_recipe, load_recipe, train_options
from .record import LIVE, append_row, code_commit, live_accuracy, make_row, newest_checkpoint, read_result, run_name
from .train_py import find_train_py, machine_flags, parse_flags

__all__ = ['train']

BATCH = re.compile(r'^Train: (\d+) \[ *(\d+)/(\d+) .*Loss: +([\d.]+)')


@contextmanager
def terminal(done: int, total: int) -> Iterator[Callable[[str], None]]:
    """A function that shows a line of train.py: on a terminal the batches are one bar with the time left.

    Args:
        done: Epochs that an earlier start has behind it.
        total: Epochs in all.
    """
    if not sys.stderr.isatty():
        yield lambda line: print(line, end='', flush=True)
        return
    form = '{percentage:3.0f}% {bar} epoch {n:.1f} of {total} [{elapsed}, {remaining} left]{postfix}'
    with tqdm(total=total, initial=done, bar_format=form, dynamic_ncols=True) as bar:

        def show(line: str) -> None:
            batch = BATCH.match(line)
            if batch:
                bar.n = int(batch[1]) + int(batch[2]) / int(batch[3])
                bar.set_postfix_str(f'loss {batch[4]}')
            elif line.startswith('Test:'):
                top1 = LIVE.match(line)
                bar.set_postfix_str(f'test: top-1 {float(top1[1]):.2f} %' if top1 else 'test')
            else:
                bar.write(line, file=sys.stdout, end='')

        yield show
        bar.n = total


def run_logged(command: Sequence[str], log: Path, lock: FileLock, done: int, total: int) -> int:
    """Run a command with its output on the terminal and at the end of a log; its exit status.

    Where there are descriptors to inherit, the command gets the one that locks the run's folder, so the folder stays
    locked as long as it lives.
    """
    held = lock._context.lock_file_fd
    inherited = (held,) if os.name == 'posix' and held is not None else ()
    for descriptor in inherited:
        os.set_inheritable(descriptor, True)
    with log.open('a', encoding='utf-8') as file:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding='utf-8',
            errors='replace',
            pass_fds=inherited,
        )
        assert child.stdout is not None
        try:
            with terminal(done, total) as show:
                for line in child.stdout:
                    file.write(line)
                    file.flush()
                    show(line)
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
        recipe: YAML file for train.py, or the name of one of ours, e.g. 'cifar_paper'.
        model: Any timm model.
        data_dir: The data.
        flags: More flags of train.py; they win over the recipe.
        output: The run's folder; `output/` and a name made of the settings if None.
        results: CSV file for the row; None for `results.csv` beside the recipe, for an installed one in the current
            folder.
        timm_dir: A checkout of timm, see `find_train_py`.
        nproc: Processes, one per visible GPU if None.
        dry_run: Print the command and stop.

    Returns:
        Exit status: 0, or 1 if train.py failed.

    Raises:
        ValueError: What was asked for cannot work; in one line.
    """
    import torch

    recipe = find_recipe(recipe)
    config = load_recipe(recipe)
    check_known(model, data_dir, bool(config.get('dataset_download')) or '--dataset-download' in flags)
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
    check_device(settings['device'])
    if settings['aug_repeats'] and nproc == 1:
        raise ValueError('timm repeats augmentations over several processes only; give --nproc or --aug-repeats 0.')
    parameters, classes = check_model(settings)
    total = total_epochs(settings)
    check_numbers(settings, nproc)
    data = check_data(settings, classes)
    check_batch(settings['batch_size'], data.images)
    warning = average_warning(settings, data.images)
    if warning:
        print(f'timm-regnet-rnn: warning: {warning}', file=sys.stderr, flush=True)
    name = run_name(settings, Path(recipe), list(given))
    folder = Path(output) if output else Path('output') / name
    # an installed recipe's folder is replaced by the next install
    beside = Path() if Path(recipe).parent == IN_WHEEL else Path(recipe).parent
    table = Path(results) if results else beside / 'results.csv'
    check_results(table)
    check_room(folder, parameters, settings)

    command = [sys.executable]
    if nproc > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(nproc)]
        settings['batch_size'] //= nproc  # train.py's is that of one process
    command += ['-m', 'timm_regnet_rnn', 'run', str(train_py), '--config', recipe, '--model', model]
    command += ['--data-dir', data_dir, *auto, *flags]
    start = given.get('initial_checkpoint')
    if start:
        check_file(start)
        if settings['pretrained']:  # the recipe asks for weights, and these are they
            command += ['--pretrained-path', start, '--initial-checkpoint', '']
    if nproc > 1:
        command += ['--batch-size', str(settings['batch_size'])]
    if nproc > 1 and settings['device'] == 'cpu':
        command += ['--device-modules', *(settings['device_modules'] or ()), 'timm_regnet_rnn.training.cpu_ddp']
    command += ['--output', str(folder.parent), '--experiment', folder.name]
    if dry_run:
        checkpoint, _ = newest_checkpoint(folder)
        print(shlex.join([*command, *(['--resume', str(checkpoint)] if checkpoint else [])]))
        return 0

    commit = code_commit()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / '.lock'), timeout=0)
    try:
        with lock:
            checkpoint, done = newest_checkpoint(folder)
            if checkpoint:
                check_continuation(folder, settings)
                print(f'{folder}: {done} of {total} epochs done', flush=True)
                command += ['--resume', str(checkpoint)]
            if data.names:
                (folder / CLASSES).write_text(json.dumps(data.names, ensure_ascii=False) + '\n', encoding='utf-8')
            if done < total:
                try:
                    status = run_logged(command, folder / 'train.log', lock, done, total)
                except KeyboardInterrupt:
                    _, done = newest_checkpoint(folder)
                    print(
                        f'timm-regnet-rnn: stopped after {done} of {total} epochs; the same command goes on.',
                        file=sys.stderr,
                    )
                    return 130
                _, done = newest_checkpoint(folder)
                if status or done < total:
                    print(
                        f'timm-regnet-rnn: train.py stopped with status {status} after {done} of {total} epochs '
                        f'(log: {folder / "train.log"}); the same command goes on from there.',
                        file=sys.stderr,
                    )
                    return 1
            return finish(folder, table, *make_row(settings, Path(recipe), list(given), folder, nproc, commit))
    except Timeout:
        raise ValueError(f'a run is under way in {str(folder)!r}.') from None


def finish(folder: Path, table: Path, row: Dict[str, Any], curve: List[Dict[str, float]]) -> int:
    """Write a finished run's row once, however often the command is repeated, and print it."""
    marker = folder / 'result.json'
    if marker.is_file():
        row = read_result(marker)
    else:
        row = append_row(table, row, curve)
        scratch = marker.with_suffix('.tmp')
        scratch.write_text(json.dumps(row, indent=2) + '\n', encoding='utf-8')
        os.replace(scratch, marker)
    words = f'top-1 {row["top1"]:.2f} %, top-5 {row["top5"]:.2f} % after epoch {row["epochs"]}'
    live = live_accuracy(folder) if row['weights'] == 'ema' else None
    if live is not None:
        words = f'averaged weights: {words}; the last weights themselves: top-1 {live:.2f} %'
    print(f'{row["run"]}: {words} ({table})')
    return 0
