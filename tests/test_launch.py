"""The command starts without PyTorch; everybody else sees the whole package."""

import subprocess
import sys

import pytest

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
