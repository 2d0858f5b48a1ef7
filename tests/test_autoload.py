"""Autoload in a virtual environment of its own, which sees this one's packages and has this package installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import timm_regnet_rnn

pytestmark = pytest.mark.slow

USE = 'import timm; timm.create_model("regnet_convlstm_20", device="meta"); print("created")'


@pytest.fixture(scope='module')
def python(tmp_path_factory):
    home = tmp_path_factory.mktemp('venv')
    venv.create(home, with_pip=False)
    python = home / 'bin' / 'python'
    out = subprocess.run(
        [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], capture_output=True, text=True
    )
    site = Path(out.stdout.strip())
    # what pip would install, and every other package from this environment
    shutil.copytree(Path(timm_regnet_rnn.__file__).parent, site / 'timm_regnet_rnn')
    info = site / f'timm_regnet_rnn-{timm_regnet_rnn.__version__}.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(
        f'Metadata-Version: 2.1\nName: timm-regnet-rnn\nVersion: {timm_regnet_rnn.__version__}\n'
    )
    (site / 'others.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return python


def site_of(python):
    return next((python.parent.parent / 'lib').glob('python*')) / 'site-packages'


def run(python, *args, check=True):
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([python, *args], capture_output=True, text=True, cwd=python.parent, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done


def autoload(python, action):
    return run(python, '-m', 'timm_regnet_rnn', 'autoload', f'--{action}').stdout.strip()


def call(python, function):
    """The same without the seconds that importing torch takes."""
    module = site_of(python) / 'timm_regnet_rnn' / 'autoload.py'
    run(python, '-c', f'import runpy; runpy.run_path({str(module)!r})[{function!r}]()')


@pytest.fixture
def enabled(python):
    call(python, 'enable')
    yield python
    call(python, 'disable')


def test_enable_status_disable(python):
    before = sorted(site_of(python).iterdir())
    assert 'Unknown model' in run(python, '-c', USE, check=False).stderr
    file = Path(autoload(python, 'enable').removeprefix('enabled: '))
    assert file.parent == site_of(python).resolve() and file.suffix == '.pth'
    assert len(file.read_text().splitlines()) == 1
    assert autoload(python, 'status') == f'enabled: {file}'
    call(python, 'enable')  # a second time changes nothing
    assert sorted(site_of(python).iterdir()) == sorted([*before, file])
    assert run(python, '-c', USE).stdout == 'created\n'
    assert str(file) in autoload(python, 'disable')
    call(python, 'disable')
    assert sorted(site_of(python).iterdir()) == before


def test_only_importing_timm_registers(enabled):
    out = run(
        enabled,
        '-c',
        (
            'import sys, json, email;'
            'print([m for m in ("torch", "timm", "timm_regnet_rnn") if m in sys.modules]);'
            'import torch; print("timm_regnet_rnn" in sys.modules);'
            'import timm.layers; print("timm_regnet_rnn" in sys.modules);'
            'print(any(getattr(f, "__name__", "") == "Finder" for f in sys.meta_path))'
        ),
    ).stdout
    assert out.split('\n')[:4] == ['[]', 'False', 'True', 'False']


@pytest.mark.parametrize(
    'first',
    [
        'import importlib.util; assert importlib.util.find_spec("timm") and importlib.util.find_spec("timm")',
        'import pkgutil; assert pkgutil.find_loader("timm")' if sys.version_info < (3, 12) else 'import pkgutil',
        'import transformers.utils; assert transformers.utils.is_timm_available()',
    ],
    ids=['find_spec', 'find_loader', 'transformers'],
)
def test_asking_for_timm_first_changes_nothing(enabled, first):
    done = run(enabled, '-c', f'{first}; import sys; assert "timm" not in sys.modules; {USE}')
    assert done.stdout == 'created\n'


def test_start_imports_nothing(enabled):
    modules = 'import sys; print(sorted(sys.modules))'
    with_hook = run(enabled, '-c', modules).stdout
    call(enabled, 'disable')
    assert with_hook == run(enabled, '-c', modules).stdout


def test_a_broken_package_does_not_stop_timm(enabled):
    package = site_of(enabled) / 'timm_regnet_rnn' / '__init__.py'
    text = package.read_text()
    try:
        package.write_text('raise ImportError("broken")')
        done = run(enabled, '-c', 'import timm; print(len(timm.list_models()) > 100)')
    finally:
        package.write_text(text)
    assert done.stdout == 'True\n' and done.stderr == ''


def test_without_timm_nothing_happens(enabled):
    others = site_of(enabled) / 'others.pth'
    hidden = others.rename(others.with_suffix('.hidden'))
    try:
        done = run(enabled, '-c', 'import timm', check=False)
    finally:
        hidden.rename(others)
    assert "No module named 'timm'" in done.stderr and done.stderr.count('Error') == 1


def test_gone_at_the_next_start_after_uninstalling(enabled):
    site = site_of(enabled)
    file = site / 'timm_regnet_rnn_autoload.pth'
    info = next(site.glob('timm_regnet_rnn-*.dist-info'))
    away = site.parent / 'away'
    info.rename(away)
    try:
        assert file.exists()
        done = run(enabled, '-c', 'print("started")')
        assert done.stdout == 'started\n' and done.stderr == '' and not file.exists()
    finally:
        away.rename(info)


def test_unreadable_folder_is_ignored(enabled):
    file = site_of(enabled) / 'timm_regnet_rnn_autoload.pth'
    file.write_text(file.read_text().replace(str(file.parent), '/no/such/folder'))
    done = run(enabled, '-c', 'print("started")')
    assert done.stdout == 'started\n' and done.stderr == ''


def test_not_installed(enabled):
    site = site_of(enabled)
    call(enabled, 'disable')
    info = next(site.glob('timm_regnet_rnn-*.dist-info'))
    away = site.parent / 'away'
    info.rename(away)
    try:
        done = run(enabled, '-m', 'timm_regnet_rnn', 'autoload', '--enable', check=False)
    finally:
        away.rename(info)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert 'not installed' in done.stderr and 'pip install' in done.stderr
