"""What is refused, or said, before the first epoch."""

import math
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import OPTIONS
from hypothesis import assume, given
from hypothesis import strategies as st
from test_cli import call, refused

from timm_regnet_rnn import results
from timm_regnet_rnn.training import record
from timm_regnet_rnn.training.preflight import (
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

CUT = (','.join(results.COLUMNS) + '\nrun,2026-01-01,regnet_convlst').encode()


@pytest.mark.slow
@pytest.mark.parametrize('text', [CUT, b'a,b\n1,2\n', 'ü,'.encode('latin-1'), b'run,date\n"', b'\0'])
def test_damaged_results_are_said_before_training(capsys, recorded, argv, tmp_path, text):
    (tmp_path / 'results.csv').write_bytes(text)
    assert 'results.csv' in refused(capsys, *argv)
    assert (tmp_path / 'results.csv').read_bytes() == text and not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_averaged_weights_are_said_to_lag(capsys, recorded, argv):
    status, _, err = call(capsys, *argv, '--model-ema', '--dry-run')
    assert status == 0 and '6 updates are few for averaged weights of decay 0.9998, which remember 5000' in err
    assert 'updates' not in call(capsys, *argv, '--model-ema', '--model-ema-decay', '0.4', '--dry-run')[2]
    log = 'Test: [   1/1]  Acc@1:  50.000 ( 48.000)\nTest: [   1/1]  Acc@1:  80.000 ( 72.000)  Acc@5: 99 (99)\n'
    log += 'Test (EMA): [   1/1]  Acc@1:  20.000 ( 20.000)\n'
    folder = Path(argv[argv.index('--output') + 1])
    folder.mkdir()
    (folder / 'train.log').write_text(log)
    assert record.live_accuracy(folder) == 72.0


@pytest.mark.slow
def test_a_full_disk_is_told_before(capsys, recorded, argv, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    assert 'has 1 MB free, the checkpoints take' in refused(capsys, *argv)


# by the functions themselves

GOOD = dict(val_interval=1, batch_size=4, epochs=3, lr=0.1, lr_base=None, scale=[0.5, 1.0], ratio=[0.75, 1.25])


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(batch_size=0), '--batch-size must be at least 1, got 0.'),
        (dict(epochs=-3), '--epochs must be at least 1, got -3.'),
        (dict(batch_size=5), 'the batch of 5 is that of all processes together, and 2 cannot share it.'),
        (dict(val_interval=2), 'a learning curve has every epoch: --val-interval must be 1, got 2.'),
        (dict(lr=0.0), '--lr must be above 0, got 0.0.'),
        (dict(lr=math.nan), '--lr must be above 0, got nan.'),
        (dict(lr=None, lr_base=-1), '--lr-base must be above 0, got -1.'),
        (dict(scale=[0.0, 1.0]), '--scale must be two shares of the area, 0 < low <= high; got 0.0 1.0.'),
        (dict(scale=[0.6, 0.5]), 'got 0.6 0.5.'),
        (dict(ratio=[2.0, 1.0]), '--ratio must be two aspect ratios, 0 < low <= high; got 2.0 1.0.'),
        (dict(ratio=[-1.0, 1.0]), 'got -1.0 1.0.'),
    ],
)
def test_numbers_that_train_py_would_take(changes, words):
    with pytest.raises(ValueError) as caught:
        check_numbers({**GOOD, **changes}, 2)
    assert words in str(caught.value)


def test_good_numbers():
    for changes in ({}, dict(lr=None), dict(scale=None, ratio=None), dict(scale=[0.64, 0.64], ratio=[1.0, 1.0])):
        check_numbers({**GOOD, **changes}, 2)


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_batch_that_is_not_filled(batch, images):
    if images and images < batch:
        with pytest.raises(ValueError, match=f'a batch of {batch} out of {images} training images') as caught:
            check_batch(batch, images)
        advice = re.search(r'--batch-size (\d+)', str(caught.value))
        assert (advice is None) == (images == 1)
        assert advice is None or (int(advice[1]) >= 2 and check_batch(int(advice[1]), images) is None)
    else:
        check_batch(batch, images)


@given(
    st.integers(1, 400), st.integers(1, 50_000), st.integers(1, 512), st.sampled_from([0.9, 0.99, 0.999, 0.9998, 1.0])
)
def test_an_average_that_cannot_follow(epochs, images, batch, decay):
    settings = dict(epochs=epochs, batch_size=batch, model_ema=True, model_ema_warmup=False, model_ema_decay=decay)
    updates = epochs * (images // batch)
    assume(abs(updates * (1 - decay) - 3) > 1e-6)  # there rounding decides
    warning = average_warning(settings, images)
    assert bool(warning) == (updates * (1 - decay) < 3)
    assert average_warning({**settings, 'model_ema': False}, images) == ''
    assert average_warning({**settings, 'model_ema_warmup': True}, images) == average_warning(settings, 0) == ''
    if updates >= 40 and warning:  # what it advises is good, to the digits that it prints
        advice = float(re.search(r'--model-ema-decay ([\d.]+)\.$', warning)[1])
        assert 1 - 100 / updates < advice < 1 - 3 / updates


def test_models_that_cannot_be_built_or_trained():
    settings = dict(model='regnet_convlstm_20', model_kwargs={}, num_classes=7, gp=None, input_size=[3, 32, 32])
    assert check_model(settings) == (311_450 - 65 * 3, 7)  # three outputs fewer, of 64 weights and a bias each
    assert check_model({**settings, 'num_classes': None})[1] == 10
    assert check_model({**settings, 'gp': 'max'})[1] == 7
    for changes, words in (
        (dict(model_kwargs=dict(carry='all')), "cannot build 'regnet_convlstm_20': carry"),
        (dict(gp='foo'), "global_pool: timm has no 'foo'"),
        (
            dict(model='regnet_convlstm_50'),
            'divides the sides of its images by 32, which leaves a single pixel of 32x32',
        ),
        (dict(input_size=[3, 64, 4]), 'leaves a single pixel of 64x4'),
    ):
        with pytest.raises(ValueError) as caught:
            check_model({**settings, **changes})
        assert words in str(caught.value) and '\n' not in str(caught.value), caught.value
    assert check_model({**settings, 'model': 'regnet_convlstm_50', 'input_size': [3, 64, 64]})[1] == 7


def test_what_is_not_there_is_said_first(tmp_path):
    check_known('regnet_convlstm_20', str(tmp_path), False)
    check_known('regnet_convlstm_20.cifar10_jpeg75', str(tmp_path / 'none'), True)
    with pytest.raises(ValueError, match='no data folder'):
        check_known('regnet_convlstm_20', str(tmp_path / 'none'), False)
    with pytest.raises(ValueError, match="unknown model 'regnet_convlstm_21'.*Did you mean 'regnet_convlstm_"):
        check_known('regnet_convlstm_21', str(tmp_path), False)
    with pytest.raises(ValueError, match="has no tag 'nosuch'"):
        check_known('regnet_convlstm_20.nosuch', str(tmp_path), False)
    with pytest.raises(ValueError, match='is no name of a model; weights to start from are given by --initial'):
        check_known(str(tmp_path), str(tmp_path), False)


def test_a_table_that_takes_no_row(tmp_path):
    table = tmp_path / 'results.csv'
    check_results(table)
    table.touch()
    check_results(table)
    table.write_text(','.join(results.COLUMNS) + '\n')
    check_results(table)
    (tmp_path / 'curves').touch()
    with pytest.raises(ValueError, match="curves' is where learning curves go, and is no folder."):
        check_results(table)
    (tmp_path / 'curves').unlink()
    for file, words in (
        (tmp_path / 'none' / 'results.csv', 'cannot write to'),
        (tmp_path, 'is no regular file'),
        (Path(os.devnull), 'is no regular file'),
    ):
        with pytest.raises(ValueError, match=words):
            check_results(file)
    table.write_text('run,date\na,b\n')
    with pytest.raises(ValueError, match='no column model, '):
        check_results(table)


@pytest.mark.parametrize(
    'changes, epochs',
    [
        (dict(), 10),
        (dict(cooldown_epochs=3), 13),
        (dict(warmup_epochs=2, warmup_prefix=True), 12),
        (dict(lr_cycle_limit=3), 30),
        (dict(sched='multistep', cooldown_epochs=3), 10),
    ],
)
def test_how_long_timms_schedule_is(changes, epochs):
    settings = {name: option['default'] for name, option in OPTIONS.items()}
    settings.update(epochs=10, warmup_epochs=0, cooldown_epochs=0, lr=0.1, eval_metric='top1', decay_milestones=[3, 6])
    settings.update(changes)
    assert total_epochs(settings) == epochs
    with pytest.raises(ValueError, match='the schedule cannot be built'):
        total_epochs({**settings, 'sched': 'cosine', 'epochs': 'ten'})


def test_room_for_the_checkpoints(tmp_path, monkeypatch):
    """Weights, two moments and an average of a million parameters, for the history, the last and the next."""
    need = (10 + 2) * 10**6 * 4 * (3 + 1)
    settings = dict(checkpoint_hist=10, model_ema=True)
    for free in (need, need - 1):
        monkeypatch.setattr(shutil, 'disk_usage', lambda _, free=free: shutil._ntuple_diskusage(2 * need, need, free))
        if free == need:
            check_room(tmp_path / 'a' / 'b', 10**6, settings)
            continue
        with pytest.raises(ValueError, match='has 192 MB free, the checkpoints take 192 MB'):
            check_room(tmp_path / 'a' / 'b', 10**6, settings)
        check_room(tmp_path, 10**6, {**settings, 'model_ema': False})


def test_a_run_goes_on_with_its_own_settings(tmp_path):
    settings = dict(seed=7, lr=0.1, scale=(0.5, 1.0), model_kwargs=dict(layers=(1, 1)), output='a', device='cpu')
    check_continuation(tmp_path, settings)
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**settings, 'scale': [0.5, 1.0], 'more': 1}))
    check_continuation(tmp_path, settings)
    check_continuation(tmp_path, {**settings, 'output': 'b', 'device': 'cuda', 'data_dir': 'c', 'new': 2})
    for changes, words in (
        (dict(seed=8), 'holds a run with seed 7, not 8; give another --output.'),
        (dict(scale=(0.5, 0.9)), r'scale \[0.5, 1.0\], not \[0.5, 0.9\]'),
        (dict(model_kwargs={}), 'model_kwargs'),
    ):
        with pytest.raises(ValueError, match=words):
            check_continuation(tmp_path, {**settings, **changes})
    for text in ('a: [', 'text', '- a', '\x00'):
        (tmp_path / 'args.yaml').write_text(text)
        with pytest.raises(ValueError, match='is damaged, so nothing says what the run was'):
            check_continuation(tmp_path, settings)
    (tmp_path / 'args.yaml').write_bytes(b'a: \xff')
    with pytest.raises(ValueError, match='is damaged'):
        check_continuation(tmp_path, settings)
    (tmp_path / 'args.yaml').unlink()
    for names in ('["cat", "dog"]', '["cat"', '{}'):  # its own, and what is written anew
        (tmp_path / 'classes.json').write_text(names)
        check_continuation(tmp_path, settings, ('cat', 'dog'))
    (tmp_path / 'classes.json').write_text('["dog", "cat"]')
    check_continuation(tmp_path, settings)
    with pytest.raises(ValueError, match='has other classes than the data; give another --output.'):
        check_continuation(tmp_path, settings, ('cat', 'dog'))
