"""The command starts without PyTorch; everybody else sees the whole package."""

import subprocess
import sys

import pytest

import timm_regnet_rnn
from timm_regnet_rnn import launch
from timm_regnet_rnn.errors import UsageError

LIGHT = """
import sys, time
started = time.perf_counter()
sys.argv = ['-m', *sys.argv[1:]]
sys.orig_argv = [sys.executable, '-m', 'timm_regnet_rnn', *sys.argv[1:]]
import timm_regnet_rnn
from timm_regnet_rnn.cli import DEFAULT_MODEL, main, make_parser
from timm_regnet_rnn.weights.manifest import RELEASED
sys.argv[0] = 'timm_regnet_rnn'
try:
    status = main()
except SystemExit as e:
    status = e.code
print('heavy:', sorted({'torch', 'timm', 'huggingface_hub', 'PIL', 'numpy'} & set(sys.modules)), status)
"""


@pytest.mark.parametrize(
    'argv',
    [['--help'], ['--version'], ['list'], ['list', '--json'], ['predict', '--help'], ['fly'], ['autoload', '--status']],
    ids=' '.join,
)
def test_starts_without_pytorch(argv):
    done = subprocess.run([sys.executable, '-c', LIGHT, *argv], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith('heavy: [] '), done.stdout + done.stderr
    as_users_do = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'timm_regnet_rnn', *argv], capture_output=True
    )
    assert b'| torch\n' not in as_users_do.stderr and b'timm_regnet_rnn.cli' in as_users_do.stderr


def test_a_script_sees_the_whole_package(tmp_path):
    """Also in a process that began without the models."""
    (tmp_path / 'script.py').write_text('import timm_regnet_rnn; print(timm_regnet_rnn.from_resnet.__name__)')
    done = subprocess.run(
        [sys.executable, '-m', 'timm_regnet_rnn', 'run', str(tmp_path / 'script.py')], capture_output=True, text=True
    )
    assert done.stdout == 'from_resnet\n', done.stderr


@pytest.fixture
def started(monkeypatch):
    """Python as it was started: argv as the program sees it, and its whole line."""

    def start(argv, line):
        monkeypatch.setattr(sys, 'argv', argv)
        monkeypatch.setattr(sys, 'orig_argv', line)
        monkeypatch.setattr(launch, '_asked', False)
        return launch.deferred()

    return start


@pytest.mark.parametrize(
    'argv, line, waits',
    [
        (['-m', 'list'], ['python', '-m', 'timm_regnet_rnn', 'list'], True),
        (['-m', 'list'], ['python', '-I', '-m', 'timm_regnet_rnn', 'list'], True),
        (['-m', 'timm_regnet_rnn'], ['python', '-m', 'other', 'timm_regnet_rnn'], False),
        (['-m'], ['python', '-m', 'timm_regnet_rnn.weights'], False),
        (['-m'], ['python', '-m'], False),
        (['-m'], ['python'], False),
        (['/bin/timm-regnet-rnn', 'list'], ['python', '/bin/timm-regnet-rnn', 'list'], True),
        (['C/timm-regnet-rnn.exe'], ['python', 'C/timm-regnet-rnn.exe'], True),
        (['/bin/timm-regnet-rnn', 'list'], ['python', '-c', 'from multiprocessing.spawn import ...'], False),
        (['train.py'], ['python', 'train.py', 'timm-regnet-rnn'], False),
        ([''], ['python'], False),
        ([], ['python'], False),
    ],
)
def test_only_the_command_waits(started, argv, line, waits):
    assert started(argv, line) is waits


def test_asked_once_it_waits_no_more(started, monkeypatch):
    assert started(['-m'], ['python', '-m', 'timm_regnet_rnn'])
    loaded = []
    monkeypatch.setattr(launch.importlib, 'reload', loaded.append)
    launch.register()
    assert loaded == [timm_regnet_rnn] and not launch.deferred()
    launch.register()
    assert loaded == [timm_regnet_rnn], 'the models are there'


@pytest.mark.parametrize(
    'endpoint',
    ['huggingface.co', 'ftp://hub', 'https://', 'http://:80', 'http://hub:0', 'http://hub:x', 'http://[::1', ' '],
)
def test_an_endpoint_that_is_no_address(monkeypatch, endpoint):
    monkeypatch.setenv('HF_ENDPOINT', endpoint)
    with pytest.raises(UsageError, match='HF_ENDPOINT must be an address') as caught:
        launch.register()
    assert repr(endpoint) in str(caught.value)


@pytest.mark.parametrize('endpoint', ['', 'https://huggingface.co', 'http://127.0.0.1:8080/hub', 'http://[::1]:9'])
def test_an_endpoint_that_is_an_address(monkeypatch, endpoint):
    monkeypatch.setenv('HF_ENDPOINT', endpoint)
    launch.register()
