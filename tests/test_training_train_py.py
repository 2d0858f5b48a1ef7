"""timm's train.py: where it is found, and what it takes on its command line."""

import runpy
import shutil
import subprocess

import pytest
import timm
import torch
from conftest import OPTIONS, STAND_IN
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_regnet_rnn.training.train_py import TIMM_URL, find_train_py, machine_flags, parse_flags


@pytest.mark.slow
@pytest.mark.parametrize(
    'cuda, given, flags',
    [
        (False, {}, '--device cpu --channels-last'),
        (False, dict(device='cpu', channels_last=True), ''),
        (True, {}, '--device cuda --channels-last --amp --amp-dtype bfloat16'),
        (True, dict(amp=True), '--device cuda --channels-last'),
        (True, dict(model_dtype='bfloat16'), '--device cuda --channels-last'),
        (True, dict(device='cpu'), '--channels-last'),
    ],
)
def test_flags_for_the_machine(monkeypatch, cuda, given, flags):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: True)
    assert ' '.join(machine_flags(given, given)) == flags


def git(*words, cwd):
    name = ['-c', 'user.name=t', '-c', 'user.email=t@example.org']
    subprocess.run(['git', *name, *words], cwd=cwd, check=True, capture_output=True)


@pytest.mark.slow
def test_train_py_comes_from_the_tag_of_the_installed_timm(tmp_path, monkeypatch):
    upstream = tmp_path / 'upstream'
    (upstream / 'timm').mkdir(parents=True)
    (upstream / 'train.py').write_text('parser = None\n')
    (upstream / 'timm' / 'version.py').write_text(f"__version__ = '{timm.__version__}'\n")
    git('init', '-q', cwd=upstream)
    git('add', '.', cwd=upstream)
    git('commit', '-q', '-m', 'x', cwd=upstream)
    monkeypatch.delenv('TIMM_DIR', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    config = dict(COUNT='1', KEY_0=f'url.{upstream.as_uri()}.insteadOf', VALUE_0=TIMM_URL)
    for key, value in config.items():
        monkeypatch.setenv(f'GIT_CONFIG_{key}', value)
    with pytest.raises(ValueError, match=f'cannot fetch train.py of timm {timm.__version__} .*give a checkout by'):
        find_train_py(None)
    assert list((tmp_path / 'cache' / 'timm_regnet_rnn').iterdir()) == [], 'nothing half-fetched'
    git('tag', f'v{timm.__version__}', cwd=upstream)
    train_py = find_train_py(None)
    assert train_py.read_text() == 'parser = None\n' and tmp_path / 'cache' in train_py.parents
    shutil.rmtree(upstream)
    assert find_train_py(None) == train_py, 'fetched once'
    train_py.write_text('parser = 1\n')
    with pytest.raises(ValueError, match='not the unaltered tag'):
        find_train_py(None)
    monkeypatch.setenv('TIMM_DIR', str(STAND_IN))
    assert find_train_py(None) == STAND_IN / 'train.py'


@pytest.fixture(scope='module')
def parser():
    """The parser of a train.py with timm's options, and timm's own action for NAME=VALUE words."""
    return runpy.run_path(str(STAND_IN / 'train.py'), run_name='options')['parser']


def words_for(name, option):
    """Words that a user could give for an option."""
    value = dict(int=st.integers(-9, 999).map(str), float=st.floats(0, 9).map(repr)).get(option['type'], st.just('x'))
    if 'choices' in option:
        value = st.sampled_from(option['choices'])
    if option['type'] == 'kwargs':
        value = st.tuples(st.sampled_from('ab'), st.sampled_from(['1', 'x', '(1,2)', 'True', '1e-3'])).map('='.join)
    nargs = option.get('nargs')
    counts = {None: (1, 1), '?': (0, 1), '*': (0, 3), '+': (1, 3)}.get(nargs, (nargs, nargs))
    if option['type'] == 'bool':
        counts = 0, 0
    values = st.lists(value, min_size=counts[0], max_size=counts[1])
    return st.tuples(st.just(name), st.sampled_from(option['flags']), values)


FLAGS = {name: option for name, option in OPTIONS.items() if option['flags']}


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(sorted(FLAGS)).flatmap(lambda name: words_for(name, FLAGS[name])), max_size=4))
def test_flags_are_read_as_train_py_reads_them(parser, words):
    line = [word for _, flag, values in words for word in (flag, *values)]
    given = parse_flags(OPTIONS, line)
    theirs = vars(parser.parse_args(line))
    assert given.keys() == {name for name, _, _ in words}
    for name, value in given.items():
        assert value == (theirs[name] if theirs[name] is not None else True), name


def test_nothing_given_is_nothing():
    assert parse_flags(OPTIONS, []) == {}
    assert parse_flags(OPTIONS, ['--torchcompile']) == dict(torchcompile=True)
    assert parse_flags(OPTIONS, ['-b', '3', '-b', '4', '--model-kwargs', 'a=1', 'b=x', '--amp']) == dict(
        batch_size=4, model_kwargs=dict(a=1, b='x'), amp=True
    )


@pytest.mark.parametrize(
    'line, words',
    [
        ('--epoch 3', 'unrecognized arguments: --epoch 3.'),
        ('--lr high', "argument --lr: invalid float value: 'high'."),
        ('--epochs 3.5', "invalid int value: '3.5'."),
        ('--input-size 3 32', 'expected 3 arguments.'),
        ('--amp yes', 'unrecognized arguments: yes.'),
        ('--model-kwargs a', "must be NAME=VALUE ..., got 'a'."),
        ('--train-size-schedule slow', 'invalid choice'),
        ('--lr', 'expected one argument.'),
        ('data', 'unrecognized arguments: data.'),
    ],
)
def test_flags_that_train_py_would_refuse(line, words):
    with pytest.raises(ValueError) as caught:
        parse_flags(OPTIONS, line.split())
    assert words in str(caught.value) and '\n' not in str(caught.value)


def test_train_py_where_it_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_DIR', str(STAND_IN))
    assert find_train_py(None) == STAND_IN / 'train.py'
    with pytest.raises(ValueError, match='--timm-dir .* holds no train.py.'):
        find_train_py(str(tmp_path))
    monkeypatch.setenv('TIMM_DIR', str(tmp_path))
    assert find_train_py(str(STAND_IN)) == STAND_IN / 'train.py'
    with pytest.raises(ValueError, match=r'\$TIMM_DIR .* holds no train.py.'):
        find_train_py(None)


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.delenv('TIMM_DIR', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('PATH', str(tmp_path / 'none'))
    with pytest.raises(ValueError, match='needs git; install it, or give --timm-dir.'):
        find_train_py(None)
