"""timm's train.py: where it is found, and what it takes on its command line."""

import shutil
import subprocess

import pytest
import timm
import torch
from conftest import STAND_IN

from timm_regnet_rnn.training.train_py import TIMM_URL, find_train_py, machine_flags


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
