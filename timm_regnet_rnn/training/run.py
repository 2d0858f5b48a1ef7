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
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from filelock import FileLock, Timeout
from huggingface_hub.utils import tqdm

from ..files import place
from ..inference import CLASSES, check_device
from ..results import IN_WHEEL
from .data import Data, check_data
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
    check_start,
    total_epochs,
)
from .recipe import check_recipe, find_recipe, load_recipe, train_options
from .record import (
    LIVE,
    append_row,
    check_record,
    code_commit,
    live_accuracy,
    make_row,
    newest_checkpoint,
    read_result,
    run_name,
)
from .train_py import find_train_py, machine_flags, parse_flags

__all__ = ['Nodes', 'Plan', 'plan', 'train']

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


class Nodes(NamedTuple):
    """The machines of one run: how many, which of them this one is, and HOST:PORT of node 0 where they meet."""

    size: int = 1
    rank: int = 0
    endpoint: str = ''


ONE_NODE = Nodes()


class Plan(NamedTuple):
    """A run before it starts: what it computes, where it goes, and train.py's command line.

    `settings` are train.py's options, with the batch of one process; `given` the names of those given besides the
    recipe; `processes` those of all nodes; `table` the file of results, `warning` what to say before it starts;
    `classes` their names, where they are known.
    """

    recipe: Path
    settings: Dict[str, Any]
    given: List[str]
    processes: int
    epochs: int
    name: str
    folder: Path
    table: Path
    warning: str
    command: List[str]
    classes: Tuple[str, ...]


def check_nodes(nodes: Nodes) -> None:
    """Refuse nodes that torchrun would wait for in vain.

    Raises:
        ValueError: In one line.
    """
    if nodes.size < 1:
        raise ValueError(f'--nnodes must be at least 1, got {nodes.size}.')
    if not 0 <= nodes.rank < nodes.size:
        raise ValueError(f'--node-rank must be from 0 to {nodes.size - 1} with --nnodes {nodes.size}.')
    host, _, port = nodes.endpoint.rpartition(':')
    if nodes.size > 1 and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f'--nnodes needs --rdzv-endpoint HOST:PORT, where node 0 is reached; got {nodes.endpoint!r}.')


def results_file(recipe: Path, results: Optional[str]) -> Path:
    """Where the row goes: the file given, or results.csv beside the recipe.

    An installed recipe's folder is replaced by the next install, so its rows go to the current one.
    """
    return Path(results) if results else (Path() if recipe.parent == IN_WHEEL else recipe.parent) / 'results.csv'


def plan(
    recipe: str,
    model: str,
    data_dir: str,
    flags: Sequence[str],
    train_py: Path,
    options: Dict[str, Dict[str, Any]],
    output: Optional[str] = None,
    results: Optional[str] = None,
    nproc: Optional[int] = None,
    nodes: Nodes = ONE_NODE,
    root: str = 'output',
    here: bool = True,
    data_of: Callable[[Dict[str, Any]], Data] = check_data,
) -> Plan:
    """Work out a run, and refuse what cannot work.

    Args:
        recipe, model, data_dir, flags, output, results, nproc, nodes: As in `train`.
        train_py: From `find_train_py`.
        options: From `train_options`.
        root: Holds the run's folder where `output` names none.
        here: Whether this machine is the one to train on.
        data_of: Checks the data.

    Raises:
        ValueError: What was asked for cannot work; in one line.
    """
    import torch

    recipe = find_recipe(recipe)
    config = load_recipe(recipe)
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
    check_nodes(nodes)
    processes = nproc * nodes.size
    if here:
        check_device(settings['device'])
    if settings['aug_repeats'] and processes == 1:
        raise ValueError('timm repeats augmentations over several processes only; give --nproc or --aug-repeats 0.')
    parameters, classes = check_model(settings)
    total = total_epochs(settings)
    check_numbers(settings, processes)
    data = data_of(settings)
    if settings['num_classes'] is None and len(data.names) not in (0, classes):  # the model's head is made for the data
        settings['num_classes'] = len(data.names)
        auto += ['--num-classes', str(len(data.names))]
    start = check_start(settings)
    check_batch(settings['batch_size'], data.images)
    warning = average_warning(settings, data.images)
    name = run_name(settings, Path(recipe), list(given))
    folder = Path(output) if output else Path(root) / name
    table = results_file(Path(recipe), results)
    check_results(table)
    check_room(folder, parameters, settings)

    command = [sys.executable]
    if processes > 1:
        where = ['--standalone']
        if nodes.size > 1:  # torchrun's static rendezvous: rank 0, which saves, is node 0's
            where = ['--nnodes', str(nodes.size), '--node_rank', str(nodes.rank)]
            where += ['--rdzv_backend', 'static', '--rdzv_endpoint', nodes.endpoint]
        command += ['-m', 'torch.distributed.run', *where, '--nproc_per_node', str(nproc)]
        settings['batch_size'] //= processes  # train.py's is that of one process
    command += ['-m', 'timm_regnet_rnn', 'run', str(train_py), '--config', recipe, '--model', model]
    command += ['--data-dir', data_dir, *auto, *flags]
    if start and settings['pretrained']:  # the recipe asks for weights, and these are they
        command += ['--pretrained-path', start, '--initial-checkpoint', '']
    elif start:
        command += ['--initial-checkpoint', start]
    if processes > 1:
        command += ['--batch-size', str(settings['batch_size'])]
    ours = ('cpu_ddp', 'epoch_seed') if processes > 1 and settings['device'] == 'cpu' else ('epoch_seed',)
    command += ['--device-modules', *(settings['device_modules'] or ())]
    command += [f'timm_regnet_rnn.training.{name}' for name in ours]
    command += ['--output', str(folder.parent), '--experiment', folder.name]
    return Plan(
        Path(recipe), settings, list(given), processes, total, name, folder, table, warning, command, data.names
    )


def train(
    recipe: str,
    model: str,
    data_dir: str,
    flags: Sequence[str],
    output: Optional[str] = None,
    results: Optional[str] = None,
    timm_dir: Optional[str] = None,
    nproc: Optional[int] = None,
    nodes: Nodes = ONE_NODE,
    dry_run: bool = False,
) -> int:
    """Train a model by a recipe, or go on where an earlier run in the same folder stopped; then write its row.

    Args:
        recipe: YAML file for train.py, or the name of one of ours, e.g. 'cifar_paper'.
        model: Any timm model.
        data_dir: The data.
        flags: More flags of train.py; they win over the recipe.
        output: The run's folder; `output/` and a name made of the settings if None. All nodes must see it.
        results: CSV file for the row; None for `results.csv` beside the recipe, for an installed one in the current
            folder. Node 0 writes it.
        timm_dir: A checkout of timm, see `find_train_py`.
        nproc: Processes on this machine, one per visible GPU if None.
        nodes: The machines of the run.
        dry_run: Print the command and stop.

    Returns:
        Exit status: 0, or 1 if train.py failed.

    Raises:
        ValueError: What was asked for cannot work; in one line.
    """
    config = load_recipe(find_recipe(recipe))  # what is wrong without train.py is said before it is fetched
    check_known(model, data_dir, bool(config.get('dataset_download')) or '--dataset-download' in flags)
    train_py = find_train_py(timm_dir)
    run = plan(recipe, model, data_dir, flags, train_py, train_options(train_py), output, results, nproc, nodes)
    command, folder, total = run.command, run.folder, run.epochs
    if run.warning:
        print(f'timm-regnet-rnn: warning: {run.warning}', file=sys.stderr, flush=True)
    if dry_run:
        checkpoint, _ = newest_checkpoint(folder)
        print(shlex.join([*command, *(['--resume', str(checkpoint)] if checkpoint else [])]))
        return 0

    commit = code_commit()
    folder.mkdir(parents=True, exist_ok=True)
    node = f'.node{nodes.rank}' if nodes.rank else ''  # node 0 holds the folder
    lock = FileLock(str(folder / f'.lock{node}'), timeout=0)
    try:
        with lock:
            checkpoint, done = newest_checkpoint(folder)
            if checkpoint:
                check_continuation(folder, run.settings, run.classes)
                print(f'{folder}: {done} of {total} epochs done', flush=True)
                command += ['--resume', str(checkpoint)]
            if run.classes and not node:
                names = json.dumps(run.classes, ensure_ascii=False) + '\n'
                place(folder / CLASSES, names.encode(), lambda scratch: None)
            if done < total:
                try:
                    status = run_logged(command, folder / f'train{node}.log', lock, done, total)
                except KeyboardInterrupt:
                    _, done = newest_checkpoint(folder)
                    print(
                        f'timm-regnet-rnn: stopped after {done} of {total} epochs; the same command goes on.',
                        file=sys.stderr,
                    )
                    return 130
                _, done = newest_checkpoint(folder)
                if status or (done < total and not node):
                    print(
                        f'timm-regnet-rnn: train.py stopped with status {status} after {done} of {total} epochs '
                        f'(log: {folder / f"train{node}.log"}); the same command goes on from there.',
                        file=sys.stderr,
                    )
                    return 1
            if node:
                print(f'node {nodes.rank} of {nodes.size} is done; node 0 writes the row.')
                return 0
            row, curve = make_row(run.settings, run.recipe, run.given, folder, run.processes, commit)
            check_record(row, curve, total, folder)
            return finish(folder, run.table, row, curve)
    except Timeout:
        raise ValueError(f'a run is under way in {str(folder)!r}.') from None


def finish(folder: Path, table: Path, row: Dict[str, Any], curve: List[Dict[str, float]]) -> int:
    """Write a finished run's row once, however often the command is repeated, and print it."""
    marker = folder / 'result.json'
    if marker.is_file():
        row = read_result(marker)
    else:
        note = folder / 'result.tmp'
        row = append_row(table, row, curve, note)
        os.replace(note, marker)
    words = f'top-1 {row["top1"]:.2f} %, top-5 {row["top5"]:.2f} % after epoch {row["epochs"]}'
    live = live_accuracy(folder) if row['weights'] == 'ema' else None
    if live is not None:
        words = f'averaged weights: {words}; the last weights themselves: top-1 {live:.2f} %'
    print(f'{row["run"]}: {words} ({table})')
    return 0
