"""A run that is killed again and again ends as one that was left alone; tests/soak.py does the same at full length."""

import csv
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import OPTIONS
from soak import after, compare_weights, killed
from timm.utils import CheckpointSaver, update_summary

from timm_regnet_rnn import cli
from timm_regnet_rnn.files import place
from timm_regnet_rnn.results import COLUMNS
from timm_regnet_rnn.training import record
from timm_regnet_rnn.training import run as training

EPOCHS = 6


class Forked:
    """`timm-regnet-rnn train` in a process group of its own, forked so that importing torch is paid once."""

    def __init__(self, argv, log):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                os.dup2(out, 1)
                os.dup2(out, 2)
                sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', closefd=False)
                training.train_options = lambda _: OPTIONS
                status = cli.main([str(word) for word in argv])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def poll(self):
        if self.returncode is None:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(code) if pid else None
        return self.returncode

    def wait(self, timeout=300):
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, 'it does not end'
            time.sleep(0.02)
        return self.returncode


def read(file):
    return list(csv.DictReader(file.open(encoding='utf-8')))


@pytest.mark.slow
def test_a_run_killed_at_random_is_an_unbroken_one(argv, tmp_path, monkeypatch):
    """By SIGKILL, SIGTERM and Ctrl-C; every epoch in its order, the same curve, the same weights bit for bit."""
    monkeypatch.setenv('PAUSE', '0.3')
    draw, folders, rows = random.Random(0), {}, {}
    for name in ('unbroken', 'killed'):
        folder = folders[name] = tmp_path / name / 'run'
        folder.parent.mkdir()
        (tmp_path / name / 'rows').mkdir()
        words = [*argv, '--epochs', EPOCHS, '--output', folder, '--results', tmp_path / name / 'rows' / 'results.csv']
        waits = [after(folder, epochs, draw.uniform(0, 0.3)) for epochs in (1, 2, 4)] if name == 'killed' else []
        kills, status = killed(lambda w=words, f=folder: Forked(w, f.parent / 'log'), waits)
        assert (kills, status) == (len(waits), 0), (folder.parent / 'log').read_text()
        (rows[name],) = read(tmp_path / name / 'rows' / 'results.csv')
        result = json.loads((folder / 'result.json').read_text())
        assert {key: str(value) for key, value in result.items()} == rows[name]
        assert json.loads((folder / 'classes.json').read_text()) == ['cat', 'dog']
        assert not [p.name for p in (tmp_path / name).rglob('*') if 'tmp' in p.name and p.name != 'tmp.pth.tar']
    for log in ('train.log',):
        lines = {n: [x for x in (folders[n] / log).read_text().splitlines() if ' reads ' in x] for n in folders}
        assert len(set(lines['unbroken'])) == EPOCHS and set(lines['killed']) == set(lines['unbroken'])
        assert len(lines['killed']) >= EPOCHS
    assert (folders['killed'] / 'train.log').read_text().count('starts at epoch') >= 3
    curves = [read(tmp_path / n / 'rows' / 'curves' / f'{rows[n]["run"]}.csv') for n in folders]
    assert curves[0] == curves[1] and [row['epoch'] for row in curves[0]] == [str(i + 1) for i in range(EPOCHS)]
    assert len({row['train_loss'] for row in curves[0]}) == EPOCHS
    assert compare_weights(folders['unbroken'], folders['killed'])


def killed_at_every_line(files, action, check, step=1, most=5000):
    """Run an action in children, each killed where it comes to one more line of the files; check what is left.

    Args:
        files: Endings of source files.
        action: What is done.
        check: Called after each child, with whether it was killed.
        step: 2 for every second line only, and so on.
        most: Lines after which an action is endless.
    """
    for line in range(1, most, step):
        child = os.fork()
        if child == 0:
            left = [line]

            def trace(frame, event, arg, left=left):
                if not frame.f_code.co_filename.endswith(files):
                    return None
                if event == 'line':
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                return trace

            status = 99
            try:
                sys.settrace(trace)
                action()
                status = 0
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        check(code != 0)
        if code == 0:
            return line
    raise AssertionError('it does not end')


ROW = dict(dict.fromkeys(COLUMNS, 'x'), run='mine', top1=50.5, top5=99.0, epochs=2, weights='last', seed=7)
CURVE = [dict(epoch=i, lr=0.1, train_loss=1.0, eval_loss=1.0, top1=50.0, top5=99.0) for i in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize('there', [False, True])
def test_a_row_is_written_once_wherever_a_kill_comes(tmp_path, there, capfd):
    """The curve, the row and result.json: whole or not there, and the next start completes them."""
    table, marker = tmp_path / 'results.csv', tmp_path / 'run' / 'result.json'

    def clear():
        for file in [p for p in tmp_path.rglob('*') if p.is_file()]:
            file.unlink()
        marker.parent.mkdir(exist_ok=True)
        if there:  # of an earlier run of the same name
            record.append_row(table, ROW, CURVE)

    def check(was_killed):
        written = read(table) if table.exists() else []
        assert len(written) <= 1 + there and not marker.exists() or json.loads(marker.read_text())
        training.finish(marker.parent, table, ROW, CURVE)
        written = read(table)
        assert [row['run'] for row in written] == ['mine', 'mine-r2'][: 1 + there]
        assert {key: str(value) for key, value in json.loads(marker.read_text()).items()} == written[-1]
        curves = [file for file in (tmp_path / 'curves').iterdir() if file.name[0] != '.']  # what a kill left is hidden
        assert sorted(file.stem for file in curves) == [row['run'] for row in written]
        assert all(len(read(file)) == 2 for file in curves)
        assert not (marker.parent / 'result.tmp').exists()
        clear()

    clear()
    sources = ('training/run.py', 'training/record.py', 'timm_regnet_rnn/files.py')
    lines = killed_at_every_line(sources, lambda: training.finish(marker.parent, table, ROW, CURVE), check)
    assert lines > 40


@pytest.mark.slow
def test_a_file_is_the_old_or_the_new_one_wherever_a_kill_comes(tmp_path):
    """classes.json, and whatever else is placed."""
    file = tmp_path / 'classes.json'
    file.write_text('["old"]\n')
    seen = set()

    def check(was_killed):
        seen.add(file.read_text())
        assert was_killed or file.read_text() == '["new"]\n'
        for left in tmp_path.iterdir():  # where what was left piles up, each child has more of it to look at
            left.unlink()
        file.write_text('["old"]\n')

    sources = ('timm_regnet_rnn/files.py',)
    killed_at_every_line(sources, lambda: place(file, b'["new"]\n', lambda _: None), check)
    assert seen == {'["old"]\n', '["new"]\n'}


@pytest.mark.slow
def test_a_checkpoint_is_there_wherever_a_kill_comes(tmp_path):
    """timm's saver, summary and torch's writer: an epoch that was saved is never lost, and none counts that was not."""
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def saver():
        return CheckpointSaver(net, optimizer, checkpoint_dir=str(tmp_path), max_history=2)

    def save():
        for epoch in (2, 3):
            update_summary(epoch, dict(loss=1.0), dict(loss=1.0, top1=50.0, top5=99.0), tmp_path / 'summary.csv', 0.1)
            keep.save_checkpoint(epoch, metric=50.0 + epoch)

    def clear():
        for file in tmp_path.iterdir():
            file.unlink()
        for epoch in (0, 1):
            update_summary(
                epoch, dict(loss=1.0), dict(loss=1.0, top1=50.0, top5=99.0), tmp_path / 'summary.csv', 0.1, not epoch
            )
            keep.save_checkpoint(epoch, metric=50.0 + epoch)

    found = []

    def check(was_killed):
        nonlocal keep
        file, epochs = record.newest_checkpoint(tmp_path)
        assert file is not None and epochs >= (2 if was_killed else 4)
        assert torch.load(file, weights_only=True)['epoch'] == epochs - 1
        assert len(record.learning_curve(tmp_path)) >= epochs, 'the epoch of a checkpoint has its line'
        found.append(epochs)
        keep = saver()
        clear()

    keep = saver()
    clear()
    sources = ('utils/checkpoint_saver.py', 'utils/summary.py', 'torch/serialization.py')
    killed_at_every_line(sources, save, check, step=29)
    assert found == sorted(found) and {*found} == {2, 3, 4}


def test_an_epoch_has_its_own_random_numbers(tmp_path):
    """Whatever came before it, and other ones than its neighbours and than other seeds."""
    code = Path(__file__).parents[1] / 'timm_regnet_rnn' / 'training' / 'epoch_seed.py'
    scope = {}
    before = torch.utils.data.Dataset
    had = before.__dict__.get('set_epoch')
    try:
        drawn = {}
        for seed in (0, 1):
            exec(compile(code.read_text(encoding='utf-8'), str(code), 'exec'), scope)  # as in a process of its own
            torch.manual_seed(seed)
            data = before()
            for epoch in (0, 1, 2, 1):
                data.set_epoch(epoch)
                numbers = torch.rand(2).tolist(), random.random(), float(scope['np'].random.rand())
                assert drawn.setdefault((seed, epoch), numbers) == numbers
        assert len({str(numbers) for numbers in drawn.values()}) == 6
    finally:
        if had is None:
            del before.set_epoch
        else:
            before.set_epoch = had
