"""What an installed wheel can do by itself, from an empty folder: predict, pull, push, verify, and train by a name.

It has compiled kernels and uses them: nothing is compiled where it is installed.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
from hub_server import HubServer
from PIL import Image
from safetensors.torch import save_file
from test_ops import compiler, needs_compiler

from timm_regnet_rnn.ops.compile_cpu import WHEEL_LEVELS, library_name, sum_file

ROOT = Path(__file__).resolve().parent.parent
TAG = 'regnet_convlstm_20.cifar10_jpeg75'

pytestmark = pytest.mark.slow


PIP = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
KERNELS = [file for level in WHEEL_LEVELS for file in (library_name(level), sum_file(Path(library_name(level))).name)]


def build_wheel(folder, **env):
    build = ['wheel', '--no-deps', '--no-build-isolation', '-w', str(folder), str(ROOT)]
    subprocess.run([*PIP, *build], check=True, capture_output=True, env={**os.environ, **env})
    (file,) = folder.glob('*.whl')
    assert file.stat().st_size < 20 << 20
    return file


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A folder with the wheel's content, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp('wheel')
    install = ['install', '--no-deps', '--target', str(folder / 'site'), str(build_wheel(folder))]
    subprocess.run([*PIP, *install], check=True)
    return folder / 'site'


@pytest.fixture
def command(wheel, tmp_path, monkeypatch):
    """Runs a command of the wheel in an empty folder; nothing may be written beside it."""
    monkeypatch.chdir(tmp_path)

    def content():
        return {p: p.stat().st_mtime_ns for p in wheel.rglob('*') if p.is_file() and '__pycache__' not in p.parts}

    before = content()

    def run(*args, status=0, **env):
        env = {**os.environ, 'PYTHONPATH': str(wheel), 'TIMM_DIR': str(ROOT / 'tests' / 'stand_in'), **env}
        words = [sys.executable, '-m', 'timm_regnet_rnn', *map(str, args)]
        done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    yield run
    assert content() == before


def test_the_package_is_the_wheels(wheel, command):
    Path('where.py').write_text('import timm_regnet_rnn; print(timm_regnet_rnn.__file__)')
    assert str(wheel) in command('run', 'where.py')


def test_list_has_the_gains(command):
    lines = command('list', '*.tiny100_32', '--sort', 'gain').splitlines()
    assert lines[1].startswith('regnet_convlstm_20.tiny100_32') and re.search(r'\+\d.\d\d ± \d.\d\d \(n=3\)$', lines[1])


@needs_compiler
@pytest.mark.skipif(not WHEEL_LEVELS, reason='no wheel carries kernels for this platform')
def test_the_kernels_are_there(wheel, command, tmp_path):
    """Nothing is compiled, nor written to a cache, which a read-only container has none of."""
    (file,) = wheel.parent.glob('*.whl')
    assert file.stem.split('-')[2:] == ['py3', 'none', 'linux_x86_64']
    ops = wheel / 'timm_regnet_rnn' / 'ops'
    assert sorted(p.name for p in ops.glob('fused_cpu-*')) == sorted(KERNELS)
    for level in WHEEL_LEVELS:
        assert ctypes.CDLL(str(ops / library_name(level))).conv_lstm_forward
    called = {'CXX': compiler(tmp_path, f'touch {tmp_path / "called"}; exit 1'), 'TIMM_REGNET_RNN_OPS': 'fused'}
    for cache in (tmp_path / 'cache', '/proc/no-such-cache'):
        out = command('predict', ROOT / 'docs' / 'chelsea.jpg', XDG_CACHE_HOME=str(cache), **called)
        assert 'cat' in out and 'compil' not in out
    assert not (tmp_path / 'cache').exists() and not (tmp_path / 'called').exists()


@needs_compiler
@pytest.mark.skipif(not WHEEL_LEVELS, reason='no wheel carries kernels for this platform')
@pytest.mark.parametrize('change', ['source', 'library'])
def test_kernels_of_another_version_or_damaged_are_not_loaded(wheel, tmp_path, change):
    site = shutil.copytree(wheel, tmp_path / 'site')
    ops = site / 'timm_regnet_rnn' / 'ops'
    for file in [ops / 'fused_cpu.cpp'] if change == 'source' else ops.glob('*.so'):
        file.write_bytes(file.read_bytes() + b'\n')
    script = 'from timm_regnet_rnn.ops import fused_cpu; print(fused_cpu.unavailable())'
    env = {**os.environ, 'PYTHONPATH': str(site), 'CXX': 'no-such-compiler'}
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout == 'no C++ compiler (no-such-compiler)\n', done.stderr


def test_a_wheel_without_a_compiler_is_for_every_platform(tmp_path):
    file = build_wheel(tmp_path, CXX='no-such-compiler')
    assert file.name.endswith('-py3-none-any.whl')
    assert not [name for name in zipfile.ZipFile(file).namelist() if name.endswith(('.so', '.sha256'))]


def test_predict_pull_and_verify(command):
    assert 'cat' in command('predict', ROOT / 'docs' / 'chelsea.jpg')
    command('pull', TAG, '--to', 'lab')
    assert 'cat' in command('predict', ROOT / 'docs' / 'chelsea.jpg', '--model', f'local-dir:lab/{TAG}')
    assert 'logits within' in command('verify', '--all')


def test_push_to_a_hub(command, tmp_path):
    net = timm.create_model('regnet_convgru_20')
    save_file(net.state_dict(), tmp_path / 'net.safetensors')
    with HubServer() as hub:
        hub.add_user('hf_right', 'alice')
        env = dict(HF_ENDPOINT=hub.endpoint, HF_TOKEN='hf_right', HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1')
        env.update(HF_HOME=str(tmp_path / 'cache'))
        args = ['push', 'net.safetensors', '--model', 'regnet_convgru_20', '--repo-id', 'alice/net', '--run', '']
        assert 'hold these files, bit for bit' in command(*args, **env).replace('holds', 'hold')
        assert {'model.safetensors', 'config.json', 'README.md'} <= hub.files('alice/net').keys()
        refusal = command(*args, '--release', 'regnet_convgru_20.mine', '--data-dir', '.', status=2, **env)
    assert 'is an installed copy' in refusal and refusal.count('\n') == 1


def test_train_by_a_name(command, tmp_path):
    for split in ('train', 'test'):
        for name in ('cat', 'dog'):
            (tmp_path / 'data' / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new('RGB', (32, 32), (60 * i, 10, 10)).save(tmp_path / 'data' / split / name / f'{i}.png')
    flags = ['--num-classes', '2', '--epochs', '1', '--device', 'cpu', '-j', '0', '--batch-size', '4']
    args = ['train', 'cifar_short', '--model', 'regnet_convrnn_20', '--data-dir', 'data', *flags]
    assert 'top-1' in command(*args)
    assert (tmp_path / 'results.csv').is_file() and list((tmp_path / 'curves').iterdir())
    assert "Did you mean 'cifar_short'?" in command(*['train', 'cifar_shrt', *args[2:]], status=2)
    assert "Did you mean 'cpu_tiny100'?" in command('study', 'cpu_tiny10', status=2)
    assert "no data folder 'data/tiny_imagenet100_32'" in command('study', 'cpu_tiny100', status=2)
