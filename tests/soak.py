"""A training killed at random moments and resumed by the same command, beside unbroken ones: `python tests/soak.py`.

    python tests/soak.py --timm-dir TIMM --steps 1000 --kills 12

Kills are SIGKILL, SIGTERM and SIGINT of the whole process group in turn, at moments drawn from a seed. Prints a line a
run and what the killed one shares with the unbroken one of its seed: the order of the images of every epoch, weights
bit for bit. As a device module of train.py (`--device-modules timm_regnet_rnn soak`) it writes that order down.
"""

import argparse
import contextlib
import csv
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from PIL import Image

ORDER = os.environ.get('SOAK_ORDER')  # where train.py's process notes epochs and the images read in them
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CLASSES, BATCH, TRAIN, TEST = 4, 8, 200, 200
FLAGS = (
    *('--num-classes', str(CLASSES), '--batch-size', str(BATCH), '--lr', '0.02', '--warmup-epochs', '0'),
    *('--model-ema', '--model-ema-decay', '0.95', '--mixup', '0.1', '--checkpoint-hist', '2'),
    *('--device', 'cpu', '-j', '0', '--log-interval', '1000', '--device-modules', 'timm_regnet_rnn', 'soak'),
)

if ORDER and __name__ == 'soak':  # imported by train.py
    import torch
    from timm.data import ImageDataset

    def getitem(self, index, read=ImageDataset.__getitem__):
        """Note the index where images are read to train on."""
        if 'train' in Path(self.reader.filename(0, absolute=True)).parts:
            with open(ORDER, 'a') as file:
                print(index, end=' ', file=file)
        return read(self, index)

    def set_epoch(self, epoch):
        """Note that an epoch begins."""
        with open(ORDER, 'a') as file:
            print(f'\n{epoch}:', end=' ', file=file)
        if hasattr(torch.utils.data.Dataset, 'set_epoch'):  # epoch_seed's
            torch.utils.data.Dataset.set_epoch(self, epoch)

    ImageDataset.__getitem__, ImageDataset.set_epoch = getitem, set_epoch


def make_data(folder, seed=0):
    """Patches of noise whose classes differ in orientation and colour, little enough that nets make mistakes."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32] / 32
    for split, count in (('train', TRAIN), ('test', TEST)):
        for label in range(CLASSES):
            (folder / split / f'c{label}').mkdir(parents=True)
            for i in range(count // CLASSES):
                angle = np.pi * label / CLASSES + draw.normal(0, 0.15)
                wave = np.sin(2 * np.pi * (4 * (x * np.cos(angle) + y * np.sin(angle)) + draw.uniform()))
                pixels = 128 + 40 * wave[..., None] + draw.normal(0, 60, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / f'c{label}' / f'{i}.png')
    return folder


def command(root, name, seed, epochs, timm_dir, flags=()):
    """`timm-regnet-rnn train` for a run that goes into root/name."""
    recipe = Path(__file__).parents[1] / 'train_recipes' / 'cifar_short.yaml'
    words = [sys.executable, '-m', 'timm_regnet_rnn', 'train', recipe, '--data-dir', root / 'data', *FLAGS]
    words += ['--model', 'regnet_convlstm_20', '--model-kwargs', 'layers=(1,1,1)', 'channels=(8,16,16)']
    (root / f'{name}.rows').mkdir(exist_ok=True)
    words += ['--output', root / name, '--results', root / f'{name}.rows' / 'results.csv', '--timm-dir', timm_dir]
    return [*map(str, words), '--seed', str(seed), '--epochs', str(epochs), *flags]


def start(words, order):
    """A run in a process group of its own; what it says goes into a file beside its order."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    env = {**os.environ, 'SOAK_ORDER': str(order), 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    with order.with_suffix('.log').open('a') as log:
        # a shell's background jobs ignore Ctrl-C, and so would what they start
        heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(words, env=env, start_new_session=True, stdout=log, stderr=log, preexec_fn=heed)


def killed(begin, waits):
    """Start a run anew after each kill, until it ends by itself.

    Args:
        begin: Starts it, in a process group of its own, which a signal ends after each of the waits.
        waits: Each gets the process, and returns at the moment to kill it, or once it has ended; whether it has.

    Returns:
        The number of kills and the exit status of the last start.
    """
    kills = 0
    for wait in [*waits, None]:
        child = begin()
        try:
            if wait is None or wait(child):
                return kills, child.wait()
            os.killpg(child.pid, SIGNALS[kills % len(SIGNALS)])
            child.wait(timeout=120)  # whatever the signal, it ends
            kills += 1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    raise AssertionError('the last start has no moment to be killed at')


def after(folder, epochs, seconds):
    """A wait for `killed`: until the run's summary has so many epochs, and for some seconds more."""
    from timm_regnet_rnn.training.record import learning_curve

    def wait(child):
        while child.poll() is None and len(learning_curve(folder)) < epochs:
            time.sleep(0.02)
        end = time.monotonic() + seconds
        while child.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        return child.poll() is not None

    return wait


def orders(file):
    """The order of the images of each epoch: what each start that came to it read, oldest first."""
    found = {}
    for line in file.read_text().splitlines():
        epoch, colon, images = line.partition(':')
        if colon:
            found.setdefault(int(epoch), []).append([int(i) for i in images.split()])
    return found


def weights(folder):
    """The last weights and their average."""
    from timm_regnet_rnn.weights.load import load_checkpoint

    state = load_checkpoint(folder / 'last.pth.tar')
    return {
        f'{key}.{name}': tensor
        for key in ('state_dict', 'state_dict_ema')
        for name, tensor in state.get(key, {}).items()
    }


def read_rows(file):
    """The rows of a CSV file."""
    with open(file, newline='', encoding='utf-8') as lines:
        return list(csv.DictReader(lines))


def check_whole(root, name, epochs):
    """Assert that a finished run left one row, one curve of all epochs, and files that are whole; its row and curve."""
    rows = root / f'{name}.rows'
    (row,) = read_rows(rows / 'results.csv')
    curve = read_rows(rows / 'curves' / f'{row["run"]}.csv')
    assert [int(line['epoch']) for line in curve] == list(range(1, epochs + 1)), curve
    result = json.loads((root / name / 'result.json').read_text())
    assert {key: str(value) for key, value in result.items()} == row
    assert json.loads((root / name / 'classes.json').read_text()) == [f'c{i}' for i in range(CLASSES)]
    left = [p.name for folder in (root / name, rows, rows / 'curves') for p in folder.glob('*tmp*')]
    assert not [p for p in left if p != 'tmp.pth.tar'], left
    return row, curve


def compare_weights(folder, other):
    """Whether two runs ended with the same weights, bit for bit."""
    import torch

    mine, its = weights(folder), weights(other)
    return mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in its)


def compare(root, name, other):
    """In how many epochs two runs read the same images, each time they came to them; of how many; and of weights."""
    ours, theirs = orders(root / f'{name}.order'), orders(root / f'{other}.order')
    same = sum(all(images == theirs[epoch][-1][: len(images)] for images in tries) for epoch, tries in ours.items())
    return same, len(theirs), compare_weights(root / name, root / other)


def main():
    """Run the soak and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--timm-dir', required=True)
    parser.add_argument('--folder', type=Path, required=True, help='a new folder')
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--kills', type=int, default=12)
    parser.add_argument('--pause', type=float, default=5, help='seconds after an epoch to a kill, at most')
    parser.add_argument('--seeds', type=int, default=4, help='unbroken runs')
    parser.add_argument('--jobs', type=int, default=2, help='runs at once')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    args = parser.parse_args()
    root, epochs, draw = args.folder, args.steps // (TRAIN // BATCH), random.Random(args.seed)
    make_data(root / 'data')
    moments = [(draw.randrange(epochs), draw.uniform(0, args.pause)) for _ in range(args.kills)]
    names = ['killed', *(f'seed{i}' for i in range(args.seeds))]

    def run(name):
        words = command(root, name, 0 if name == 'killed' else int(name[4:]), epochs, args.timm_dir)
        begin = time.monotonic()
        waits = [after(root / name, *moment) for moment in sorted(moments)] if name == 'killed' else []
        kills, status = killed(lambda: start(words, root / f'{name}.order'), waits)
        assert status == 0, (root / f'{name}.log').read_text()[-2000:]
        row, curve = check_whole(root, name, epochs)
        top1, loss = float(row['top1']), float(curve[-1]['train_loss'])
        words = f'{name}: {epochs} epochs, {kills} kills, top-1 {top1:.2f} %, training loss {loss:.4f}'
        print(f'{words}, {time.monotonic() - begin:.0f} s', flush=True)
        return top1, loss

    with ThreadPool(args.jobs) as pool:
        ends = dict(zip(names, pool.map(run, names, chunksize=1)))
    tops = [ends[name][0] for name in ends if name != 'killed']
    print(f'unbroken: top-1 {mean(tops):.2f} ± {stdev(tops):.2f} %, from {min(tops):.2f} to {max(tops):.2f}')
    same, count, equal = compare(root, 'killed', 'seed0')
    print(f'killed beside seed0: {same} of {count} epochs in the same order; weights {"" if equal else "not "}the same')


if __name__ == '__main__':
    main()
