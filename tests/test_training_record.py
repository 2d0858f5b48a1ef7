"""What a run leaves behind: its checkpoints, its learning curve and its row."""

import json
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import OPTIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_run import rows

from timm_regnet_rnn import results
from timm_regnet_rnn.complexity import complexity
from timm_regnet_rnn.training import record
from timm_regnet_rnn.training.train_py import parse_flags
from timm_regnet_rnn.weights.load import load_checkpoint


@pytest.mark.slow
@given(st.data())
@settings(max_examples=50, deadline=None)
def test_a_learning_curve_is_whole_however_often_the_run_was_cut(tmp_path_factory, data):
    """train.py writes the header again after each resume, and the epoch again that was not saved."""
    output = tmp_path_factory.mktemp('run')
    epochs = data.draw(st.integers(1, 6))
    start, lines, last = 0, [], {}
    while start < epochs:
        lines.append('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr')
        stop = data.draw(st.integers(start + 1, epochs))
        for epoch in range(start, stop):
            last[epoch + 1] = data.draw(st.integers(0, 10_000)) / 100
            mean = last[epoch + 1] * (1 - 1e-8)  # as train.py's averages are, in float32
            lines.append(f'{epoch},1.0,2.0,{mean!r},99.0,0.1')
        start = stop if stop == epochs else data.draw(st.integers(max(0, stop - 1), stop))
    if data.draw(st.booleans()):
        lines.append(f'{epochs},1.0,2')  # cut off by a kill
    (output / 'summary.csv').write_text('\n'.join(lines) + '\n')
    curve = record.learning_curve(output)
    assert [row['epoch'] for row in curve] == list(range(1, epochs + 1))
    assert {row['epoch']: row['top1'] for row in curve} == last


@pytest.mark.slow
def test_no_checkpoint_runs_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    torch.save(dict(state_dict=Bomb(), optimizer={}, epoch=9), tmp_path / 'last.pth.tar')
    (tmp_path / 'checkpoint-3.pth.tar').write_bytes(pickle.dumps(Bomb()))
    assert record.newest_checkpoint(tmp_path) == (None, 0) and not (tmp_path / 'ran').exists()
    torch.save(dict(state_dict={}, optimizer={}, epoch=4), tmp_path / 'tmp.pth.tar')
    assert record.newest_checkpoint(tmp_path) == (tmp_path / 'tmp.pth.tar', 5)


@pytest.mark.parametrize('start, end', [('\ufeff', '\n'), ('', '')])
def test_a_row_finds_its_columns(tmp_path, start, end):
    """Behind a byte-order mark, in another order, beside a column of somebody's own, and without the last newline."""
    header = ['note', *reversed(results.COLUMNS)]
    text = f'{start}{",".join(header)}\n{",".join(["ü"] * len(header))}{end}'
    (tmp_path / 'results.csv').write_text(text, encoding='utf-8')
    record.append_row(tmp_path / 'results.csv', dict.fromkeys(results.COLUMNS, 'x') | dict(run='mine'), [])
    first, second = results.read_csv(tmp_path / 'results.csv', header, dict)
    assert set(first.values()) == {'ü'} and second == {**dict.fromkeys(header, 'x'), 'note': '', 'run': 'mine'}
    assert (tmp_path / 'results.csv').read_text(encoding='utf-8').startswith(text)


APPEND = """
import sys
from pathlib import Path
from timm_regnet_rnn.training.record import COLUMNS, append_row
for i in range(10):
    append_row(Path(sys.argv[1]), dict.fromkeys(COLUMNS, 'x, "y"') | dict(run='same'), [])
"""


@pytest.mark.slow
def test_rows_of_runs_that_end_together_are_all_there(tmp_path):
    command = [sys.executable, '-c', APPEND, tmp_path / 'results.csv']
    children = [subprocess.Popen(command) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    written = rows(tmp_path / 'results.csv')
    assert sorted(row['run'] for row in written) == sorted(['same', *(f'same-r{i}' for i in range(2, 21))])
    assert all(row['dataset'] == 'x, "y"' for row in written)
    assert len(list((tmp_path / 'curves').glob('*.csv'))) == 20


# by the functions themselves


def test_the_newest_whole_checkpoint(tmp_path):
    """By the epochs behind it, not by its name or age; `last` of two that are alike."""
    assert record.newest_checkpoint(tmp_path) == record.newest_checkpoint(tmp_path / 'none') == (None, 0)
    state = dict(state_dict={}, optimizer={})
    for name, epoch in (('checkpoint-9', 1), ('last', 4), ('checkpoint-4', 4), ('model_best', 2)):
        torch.save(dict(state, epoch=epoch), tmp_path / f'{name}.pth.tar')
    assert record.newest_checkpoint(tmp_path) == (tmp_path / 'last.pth.tar', 5)
    whole = (tmp_path / 'last.pth.tar').read_bytes()
    (tmp_path / 'last.pth.tar').write_bytes(whole[:-9])
    assert record.newest_checkpoint(tmp_path) == (tmp_path / 'checkpoint-4.pth.tar', 5)
    torch.save(dict(state_dict={}, epoch=8), tmp_path / 'recovery-8.pth.tar')  # no optimizer: none to go on from
    torch.save([1], tmp_path / 'list.pth.tar')
    torch.save(dict(state, epoch='8'), tmp_path / 'odd.pth.tar')
    assert record.newest_checkpoint(tmp_path) == (tmp_path / 'checkpoint-4.pth.tar', 5)


def test_a_curve_without_a_test(tmp_path):
    assert record.learning_curve(tmp_path) == []
    (tmp_path / 'summary.csv').write_text('epoch,lr,train_loss\n0,0.1,2.5\n1,0.05,1.5\n')
    first, second = record.learning_curve(tmp_path)
    assert [*first] == [*results.CURVE] and (second['epoch'], second['lr'], second['train_loss']) == (2, 0.05, 1.5)
    assert all(math.isnan(first[name]) for name in ('eval_loss', 'top1', 'top5'))


@pytest.mark.parametrize(
    'text',
    [
        'epoch,lr\n0,0.1\n',
        'epoch,lr,train_loss\n0,high,1\n',
        'epoch,lr,train_loss\n,,\n',
        'epoch,lr,train_loss,eval_top1\n0,0.1,1,\n',
    ],
)
def test_a_curve_that_is_damaged(tmp_path, text):
    (tmp_path / 'summary.csv').write_text(text)
    with pytest.raises(ValueError, match=r'summary.csv. is damaged: it needs epoch, lr and train_loss.'):
        record.learning_curve(tmp_path)


def line(epoch, rate, mean):
    return (
        f'Train: {epoch} [ 100/400 ( 25%)]  Loss: 4.63 (4.63)  Time: 1.181s,  {rate}/s  (1.181s,  {mean}/s)  LR: 1e-1'
    )


def test_images_per_second(tmp_path):
    """The median over epochs, of each the last that was said."""
    assert record.throughput(tmp_path) is record.live_accuracy(tmp_path) is None
    (tmp_path / 'train.log').write_text('Scheduled epochs: 3\n')
    assert record.throughput(tmp_path) is record.live_accuracy(tmp_path) is None
    lines = [
        line(0, 9.5, 1.25),
        line(0, 9.5, 1.5),
        line(0, 9.5, 100.5),
        line(1, 9.5, '    90.00'),
        line(2, 9.5, 300),
        'Train: 3 [',
    ]
    (tmp_path / 'train.log').write_bytes('\n'.join(lines).encode() + b'\n\xff\n')
    assert record.throughput(tmp_path) == 100.5


ROW = dict(run='x', top1=50.0, top5=90.0, epochs=3, weights='last')


def test_the_result_of_a_run(tmp_path):
    file = tmp_path / 'result.json'
    file.write_text(json.dumps({**ROW, 'more': 1}))
    assert record.read_result(file) == {**ROW, 'more': 1}
    for name in ROW:
        file.write_text(json.dumps({k: v for k, v in ROW.items() if k != name}))
        with pytest.raises(ValueError, match='it lacks a key'):
            record.read_result(file)
    for text in ('', '[]', '3', '{', '"run"', b'\xff'.decode('latin-1')):
        file.write_text(text, encoding='latin-1')
        with pytest.raises(ValueError, match='delete it, and the same command writes it anew') as caught:
            record.read_result(file)
        assert '\n' not in str(caught.value)


SETTINGS = dict(
    model='regnet_convrnn_20',
    model_kwargs=dict(layers=(1, 1, 1), carry='raw'),
    dataset='torch/cifar10',
    data_dir='/data',
    seed=42,
    epochs=20,
    batch_size=64,
    lr=0.05,
    opt_kwargs=dict(a=1, b='x y'),
    decay_milestones=[11, 16],
    nesterov=True,
    workers=3,
)


@pytest.mark.parametrize(
    'given, words',
    [
        ([], ''),
        (['model', 'model_kwargs', 'seed', 'workers', 'data_dir', 'dataset'], ''),  # have columns, or change nothing
        (['lr', 'batch_size'], '--batch-size 64 --lr 0.05'),
        (['nesterov'], '--nesterov'),
        (['decay_milestones'], '--decay-milestones 11 16'),
        (['opt_kwargs'], "--opt-kwargs a=1 'b=x y'"),
    ],
)
def test_what_was_given_besides_the_recipe(given, words):
    assert record.overrides(SETTINGS, given) == words
    found = shlex.split(words)
    assert [word[2:].replace('-', '_') for word in found if word.startswith('--')] == sorted(
        name for name in given if name not in record.NOT_OVERRIDES
    )


def test_what_was_given_is_read_back_by_train_py():
    given = ['lr', 'batch_size', 'decay_milestones', 'opt_kwargs']
    read = parse_flags(OPTIONS, shlex.split(record.overrides(SETTINGS, given)))
    assert read == {name: SETTINGS[name] for name in given}


def test_a_summary_that_lost_its_end_gives_no_row(tmp_path):
    """A last line without its end is no line, even where what is left of it reads as numbers."""
    lines = ['epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', '0,2.0,1.0,60.0,95.0,0.1', '1,1.5,0.9,55.5,96.0,0.05']
    summary = tmp_path / 'summary.csv'
    row = dict.fromkeys(results.COLUMNS, '1') | dict(run='a', weights='last', commit='')
    for text, epochs in (('\n'.join([*lines, '']), 2), ('\n'.join(lines), 1), ('\n'.join([*lines[:2], '']), 1)):
        summary.write_text(text)
        curve = record.learning_curve(tmp_path)
        assert len(curve) == epochs
        row.update(epochs=curve[-1]['epoch'], top1=curve[-1]['top1'], top5=curve[-1]['top5'], best_top1=1.0)
        if epochs == 2:
            record.check_record(row, curve, 2, tmp_path)
        else:
            with pytest.raises(ValueError, match='lacks epoch 2 of a run of 2; it is damaged'):
                record.check_record(row, curve, 2, tmp_path)
    with pytest.raises(ValueError, match='gives no sound row: top1 nan, top5 1.0, best_top1 1.0: not percentages.'):
        record.check_record({**row, 'epochs': 1, 'top1': math.nan, 'top5': '1'}, curve, 1, tmp_path)


def test_a_checkpoint_with_a_bit_that_flipped_is_none(tmp_path):
    """torch reads a tensor whose sum is wrong without a word."""
    for epoch, name in ((3, 'checkpoint-3'), (4, 'last')):
        torch.save(dict(state_dict=dict(w=torch.ones(999)), optimizer={}, epoch=epoch), tmp_path / f'{name}.pth.tar')
    last = tmp_path / 'last.pth.tar'
    data = bytearray(last.read_bytes())
    data[data.index(torch.ones(9).numpy().tobytes()) + 6] ^= 1
    last.write_bytes(data)
    assert torch.load(last, weights_only=True)['state_dict']['w'].sum() != 999
    assert record.newest_checkpoint(tmp_path) == (tmp_path / 'checkpoint-3.pth.tar', 4)
    with pytest.raises(ValueError, match='is not what its sum says'):
        load_checkpoint(last)


def test_the_name_of_a_run():
    name = record.run_name(SETTINGS, Path('a/cifar_paper.yaml'))
    assert name == 'regnet_convrnn_20-layers-1-1-1-carry-raw-cifar_paper-cifar10-e20-s42'
    name = record.run_name(SETTINGS, Path('cifar_paper.yaml'), ['epochs', 'lr', 'seed'])
    assert name == 'regnet_convrnn_20-layers-1-1-1-carry-raw-cifar_paper-cifar10-e20-lr-0.05-s42'
    assert len(record.run_name({**SETTINGS, 'model_kwargs': dict(layers=(1,) * 999)}, Path('a'))) == 200


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(['lr', 'batch_size', 'opt_kwargs', 'nesterov', 'decay_milestones']), unique=True))
def test_the_name_of_a_run_is_that_of_a_file(given):
    name = record.run_name(SETTINGS, Path('cifar_paper.yaml'), given)
    assert re.fullmatch(r'[\w.-]+', name) and name == record.run_name(SETTINGS, Path('cifar_paper.yaml'), given[::-1])


def test_a_row_and_its_curve(tmp_path):
    """Of a run that was measured by its averaged weights; what the table's reader takes."""
    (tmp_path / 'run').mkdir()
    lines = ['epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', '0,2.0,1.0,60.0,95.0,0.1', '1,1.5,0.9,55.5,96.0,0.05']
    (tmp_path / 'run' / 'summary.csv').write_text('\n'.join(lines) + '\n')
    told = dict(SETTINGS, model_kwargs={}, num_classes=10, in_chans=None, input_size=[3, 32, 32], device='cpu')
    told.update(model_ema=True, model_ema_force_cpu=False)
    row, curve = record.make_row(told, Path('cifar_paper.yaml'), ['lr', 'seed'], tmp_path / 'run', 2, '0123456789ab')
    assert (row['top1'], row['top5'], row['best_top1'], row['best_epoch'], row['epochs']) == (55.5, 96.0, 60.0, 1, 2)
    assert (row['params'], row['macs']) == (
        307_418,
        complexity(timm.create_model(told['model'], device='meta'))['macs'],
    )
    assert (row['weights'], row['overrides'], row['dataset']) == ('ema', '--lr 0.05', 'CIFAR-10')
    assert (row['processes'], row['commit'], row['images_per_s']) == (2, '0123456789ab', '')
    written = record.append_row(tmp_path / 'to' / 'results.csv', row, curve)
    again = record.append_row(tmp_path / 'to' / 'results.csv', row, curve)
    assert written['run'] == row['run'] and again['run'] == f'{row["run"]}-r2'
    runs = results.read_csv(tmp_path / 'to' / 'results.csv', results.COLUMNS, results.parse)
    assert [run.run for run in runs] == [written['run'], again['run']] and runs[0].top1 == 55.5
    saved = results.read_csv(tmp_path / 'to' / 'curves' / f'{row["run"]}.csv', results.CURVE, dict)
    assert [(r['epoch'], r['top1'], r['lr']) for r in saved] == [('1', '60.0', '0.1'), ('2', '55.5', '0.05')]
    (tmp_path / 'run' / 'summary.csv').write_text('epoch,lr\n')
    with pytest.raises(ValueError, match='has no epoch, so there is nothing to record.'):
        record.make_row(told, Path('cifar_paper.yaml'), [], tmp_path / 'run', 1, '')


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    def git(*words):
        name = ['-c', 'user.name=t', '-c', 'user.email=t@example.org']
        done = subprocess.run(['git', *name, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    module = tmp_path / 'package' / 'training' / 'record.py'
    module.parent.mkdir(parents=True)
    module.touch()
    monkeypatch.setattr(record, '__file__', str(module))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert record.code_commit() == ''
    git('init', '-q')
    git('add', '.')
    git('commit', '-q', '-m', 'x')
    commit = git('rev-parse', 'HEAD')[:12]
    (tmp_path / 'notes.txt').touch()
    installed = tmp_path / 'venv' / 'training' / 'record.py'  # in somebody's repository, which does not know it
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(record, '__file__', str(installed))
    assert record.code_commit() == ''
    monkeypatch.setattr(record, '__file__', str(module))
    assert record.code_commit() == commit
    module.write_text('changed')
    assert record.code_commit() == f'{commit}-dirty'
    monkeypatch.setenv('PATH', '')
    assert record.code_commit() == ''
