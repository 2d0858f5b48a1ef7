"""What a training run leaves behind: its checkpoints, its learning curve, and its row in results.csv."""

import contextlib
import csv
import io
import json
import os
import platform
import re
import shlex
import subprocess
from datetime import date
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from filelock import FileLock

from ..datasets import dataset_name
from ..files import place
from ..results import COLUMNS, CURVE, Key, group_of, label_of, parse, read_csv, read_header, whole

__all__ = [
    *(
        'append_row',
        'check_record',
        'code_commit',
        'learning_curve',
        'live_accuracy',
        'make_row',
        'newest_checkpoint',
        'read_result',
    ),
    *('run_key', 'run_name'),
]

# fmt: off
# Where and with what help a run computes, and what has a column of its own: not among the overrides.
NOT_OVERRIDES = (
    'data_dir', 'dataset', 'dataset_download', 'device', 'amp', 'amp_dtype', 'channels_last', 'workers', 'pin_mem',
    'log_interval', 'checkpoint_hist', 'seed', 'model', 'model_kwargs', 'num_classes',
)
# fmt: on
LIVE = re.compile(r'^Test: .*Acc@1: +[\d.]+ \( *([\d.]+)\)')
THROUGHPUT = re.compile(r'^Train: (\d+) .*\([\d.]+s, +([\d.]+)/s\)')


def newest_checkpoint(output: Path) -> Tuple[Optional[Path], int]:
    """The checkpoint to resume a run from.

    train.py replaces `last.pth.tar` in steps, so a kill can leave the newest state under another name, or a file that
    is not whole; every candidate is read before it is trusted, and none is unpickled without restriction.

    Args:
        output: The run's folder.

    Returns:
        The file with the most epochs behind it and their number; None and 0 if there is none.
    """
    from ..weights.load import check_sums, load_checkpoint

    found: List[Tuple[int, bool, Path]] = []
    for file in sorted(file for file in output.glob('*.pth.tar') if file.is_file()):  # a pipe would wait for ever
        try:
            state = load_checkpoint(file, mmap=True)
            if {'state_dict', 'optimizer'} <= state.keys() and state['epoch'] >= 0:
                found.append((state['epoch'] + 1, file.name == 'last.pth.tar', file))
        except Exception:  # truncated, not a checkpoint, or holding more than one: none to resume from
            continue
    for epochs, _, file in sorted(found, key=lambda item: item[:2], reverse=True):
        with contextlib.suppress(ValueError):  # damaged inside: an older one may not be
            check_sums(file)
            return file, epochs
    return None, 0


def learning_curve(output: Path) -> List[Dict[str, float]]:
    """A run's epochs from train.py's summary.csv.

    A resumed run writes the header once more and repeats an epoch that was cut off; the later line counts.

    Returns:
        A row per epoch, counted from 1, with the keys `epoch,lr,train_loss,eval_loss,top1,top5`.
    """
    file = output / 'summary.csv'
    rows: Dict[int, Dict[str, float]] = {}
    header: List[str] = []
    text = file.read_text(encoding='utf-8') if file.is_file() else ''
    for cells in csv.reader(io.StringIO(text[: text.rfind('\n') + 1])):  # a last line without its end is cut
        if cells[:1] == ['epoch']:
            header = cells
        elif len(cells) == len(header):
            values = dict(zip(header, cells))
            try:
                epoch, names = int(values['epoch']) + 1, ('eval_loss', 'eval_top1', 'eval_top5')
                found = [values['lr'], values['train_loss'], *(values.get(name, 'nan') for name in names)]
                numbers = [float(f'{float(text):.6g}') for text in found]  # a mean leaves 26.9999997 of 27
            except (KeyError, ValueError):
                raise ValueError(f'{str(file)!r} is damaged: it needs epoch, lr and train_loss, as numbers.') from None
            rows[epoch] = dict(zip(CURVE, [epoch, *numbers]))
    return [rows[epoch] for epoch in sorted(rows)]


def throughput(output: Path) -> Optional[float]:
    """Training images per second: the median over epochs of what train.py's log gives at the end of each."""
    epochs: Dict[str, float] = {}
    file = output / 'train.log'
    for line in file.read_text(encoding='utf-8', errors='replace').splitlines() if file.is_file() else ():
        match = THROUGHPUT.match(line)
        if match:
            epochs[match[1]] = float(match[2])
    values = sorted(epochs.values())
    return values[len(values) // 2] if values else None


def live_accuracy(output: Path) -> Optional[float]:
    """Top-1 of the last weights themselves, where averaged ones are reported: the last line of train.py's own test."""
    found = None
    file = output / 'train.log'
    for line in file.read_text(encoding='utf-8', errors='replace').splitlines() if file.is_file() else ():
        match = LIVE.match(line)
        found = float(match[1]) if match else found
    return found


def read_result(file: Path) -> Dict[str, Any]:
    """The row that a finished run left in result.json.

    Raises:
        ValueError: It is damaged; in one line.
    """
    try:
        row = json.loads(file.read_text(encoding='utf-8'))
        if not {'run', 'top1', 'top5', 'epochs', 'weights'} <= row.keys():
            raise ValueError('it lacks a key')
        return row
    except (ValueError, AttributeError) as e:
        raise ValueError(f'{str(file)!r} is damaged ({e}); delete it, and the same command writes it anew.') from None


def overrides(settings: Dict[str, Any], given: Sequence[str]) -> str:
    """The flags given besides the recipe that change what is computed, as on a command line."""
    words = []
    for name in sorted(given):
        value = settings[name]
        if name in NOT_OVERRIDES:
            continue
        words.append('--' + name.replace('_', '-'))
        if isinstance(value, dict):
            words += [f'{k}={v}' for k, v in value.items()]
        elif value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def model_kwargs(settings: Dict[str, Any]) -> str:
    """Arguments of the model other than its defaults, as `name=value name=value`."""
    return ' '.join(f'{k}={v!r}'.replace(' ', '').replace("'", '') for k, v in settings['model_kwargs'].items())


def run_key(settings: Dict[str, Any], recipe: Path, given: Sequence[str], processes: int, epochs: int) -> Key:
    """What a row of the results tells a run by, before there is one: its table, its row there, and its seed."""
    what = overrides(settings, given)
    group = group_of(dataset_name(settings)[1], recipe.stem, epochs, what, processes)
    return group, label_of(settings['model'], model_kwargs(settings)), settings['seed']


def run_name(settings: Dict[str, Any], recipe: Path, given: Sequence[str] = ()) -> str:
    """A name for a run, and for its folder unless one is given: everything that tells it from its neighbours."""
    words = [settings['model'], *re.findall(r'\w+', model_kwargs(settings)), recipe.stem, dataset_name(settings)[0]]
    changed = [w for w in re.findall(r'[\w.]+', overrides(settings, [n for n in given if n != 'epochs']))]
    return '-'.join([*words, f'e{settings["epochs"]}', *changed, f's{settings["seed"]}'])[:200]


def device_name(device: str) -> str:
    """The hardware in words."""
    import torch

    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text(encoding='utf-8'))
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return f'{name}, {torch.get_num_threads()} thread{"s" * (torch.get_num_threads() > 1)}'


def code_commit() -> str:
    """The commit of the checkout that this package runs from, `-dirty` if its files differ; empty outside of one."""
    git = ['git', '-C', str(Path(__file__).parents[1])]
    try:
        # an installed copy may lie in somebody's repository, which does not know its files
        subprocess.run([*git, 'ls-files', '--error-unmatch', __file__], capture_output=True, check=True)
        name = subprocess.run([*git, 'rev-parse', '--short=12', 'HEAD'], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, 'status', '--porcelain', '-uno', '.'], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ''
    return name.stdout.strip() + ('-dirty' if changes.stdout.strip() else '')


def make_row(
    settings: Dict[str, Any], recipe: Path, given: List[str], output: Path, processes: int, commit: str
) -> Tuple[Dict[str, Any], List[Dict[str, float]]]:
    """The row of a finished run, and its learning curve.

    Args:
        settings: train.py's options as they were in force.
        recipe: The recipe's file.
        given: Names of the options given besides the recipe.
        output: The run's folder.
        processes: How many took part.
        commit: From `code_commit`, before the run.
    """
    import huggingface_hub
    import timm
    import torch
    import torchvision

    from .. import __version__
    from ..complexity import complexity, on_meta

    curve = learning_curve(output)
    if not curve:
        raise ValueError(f'{str(output / "summary.csv")!r} has no epoch, so there is nothing to record.')
    last, best = curve[-1], max(curve, key=lambda row: row['top1'])
    kwargs = dict(num_classes=settings['num_classes'], in_chans=settings['in_chans'], **settings['model_kwargs'])
    size = settings['input_size']
    if size:
        kwargs['in_chans'] = size[0]
    model = on_meta(settings['model'], **{k: v for k, v in kwargs.items() if v is not None})
    counts = complexity(model.eval(), size)
    images = throughput(output)
    versions = dict(timm_regnet_rnn=__version__, timm=timm.__version__, torch=torch.__version__)
    versions.update(torchvision=torchvision.__version__, huggingface_hub=huggingface_hub.__version__)
    row = dict(
        run=run_name(settings, recipe, given),
        date=date.today().isoformat(),
        model=settings['model'],
        model_kwargs=model_kwargs(settings),
        recipe=recipe.stem,
        overrides=overrides(settings, given),
        dataset=dataset_name(settings)[1],
        seed=settings['seed'],
        epochs=last['epoch'],
        params=counts['params'],
        macs=counts['macs'],
        top1=last['top1'],
        top5=last['top5'],
        weights='ema' if settings['model_ema'] and not settings['model_ema_force_cpu'] else 'last',
        best_epoch=best['epoch'],
        best_top1=best['top1'],
        images_per_s='' if images is None else f'{images:.0f}',
        processes=processes,
        device=device_name(settings['device']),
        versions=', '.join(f'{name} {version.split("+")[0]}' for name, version in versions.items()),
        commit=commit,
    )
    return row, curve


def check_record(row: Dict[str, Any], curve: List[Dict[str, float]], epochs: int, output: Path) -> None:
    """Refuse a row that is not of the whole run, or that no table could be made of.

    Args:
        row, curve: From `make_row`.
        epochs: Of the whole run.
        output: The run's folder.

    Raises:
        ValueError: In one line.
    """
    file = output / 'summary.csv'
    missing = sorted({*range(1, epochs + 1)} - {line['epoch'] for line in curve})
    if missing or row['epochs'] != epochs:
        what = f'lacks epoch {missing[0]:.0f}' if missing else f'has epoch {row["epochs"]:.0f}'
        raise ValueError(f'{str(file)!r} {what} of a run of {epochs}; it is damaged, or of another run.')
    try:
        parse({key: str(value) for key, value in row.items()})
    except ValueError as e:
        raise ValueError(f'{str(file)!r} gives no sound row: {e}.') from None


def append_row(
    results: Path, row: Dict[str, Any], curve: List[Dict[str, float]], note: Optional[Path] = None
) -> Dict[str, Any]:
    """Add a run to results.csv, and its learning curve to `curves/` beside it.

    Several runs may finish at once: the file is locked while one of them writes. A run of the same name as an earlier
    one gets a number.

    Args:
        results: results.csv.
        row, curve: From `make_row`.
        note: A file that holds the row before results.csv does: where a kill came behind that, the row in the note is
            found in results.csv word for word, and is not added again.

    Returns:
        The row as written.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(results.with_name(f'.{results.name}.lock')))
    with lock, results.open('a+b') as file:
        header = read_header(results) if file.seek(0, os.SEEK_END) else ()
        rows = read_csv(results, COLUMNS, whole) if header else []
        noted = _noted(note, rows) if note else None
        if noted:
            return noted
        taken = {other['run'] for other in rows}
        names = [row['run'], *(f'{row["run"]}-r{i}' for i in range(2, len(taken) + 2))]
        row = {**row, 'run': next(name for name in names if name not in taken)}
        curve_file = results.parent / 'curves' / f'{row["run"]}.csv'
        curve_file.parent.mkdir(exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, CURVE, lineterminator='\n')
        writer.writeheader()
        writer.writerows(curve)
        place(curve_file, text.getvalue().encode(), lambda scratch: None)
        if note:
            place(note, json.dumps(row, indent=2).encode() + b'\n', lambda scratch: None)
        lines = io.StringIO()
        writer = csv.DictWriter(lines, header or COLUMNS, lineterminator='\n')
        if not header:
            writer.writeheader()
        elif not results.read_bytes().endswith(b'\n'):  # as some editors leave a file
            lines.write('\n')
        writer.writerow(row)
        file.write(lines.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())
    return row


def _noted(note: Path, rows: Sequence[Mapping[str, str]]) -> Optional[Dict[str, Any]]:
    """The row in the note, if it is one of the rows."""
    try:
        row = json.loads(note.read_text(encoding='utf-8')) if note.is_file() else {}
        words = {key: str(value) for key, value in row.items()}
    except (OSError, ValueError, AttributeError):  # there is none
        return None
    return row if any({key: other.get(key) for key in COLUMNS} == words for other in rows) else None
