"""What goes wrong is one line, and a command's exit status."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_cli import CAT, refused

from timm_regnet_rnn.cli import DEFAULT_MODEL


@pytest.mark.parametrize(
    'argv, meant',
    [
        (['pedict', 'x'], 'predict'),
        (['predict', 'x', '--modell', 'm'], '--model'),
        (['predict', 'x', '--tokp=3'], '--topk'),
        (['export', 'x', '--format', 'safetensor'], 'safetensors'),
        (['list', '--pretraind'], '--pretrained'),
    ],
)
def test_did_you_mean(capsys, argv, meant):
    assert f'Did you mean {meant!r}?' in refused(capsys, *argv)


@pytest.mark.slow
@pytest.mark.parametrize('command', ['predict', 'export'])
def test_ctrl_c_is_one_line(command, tmp_path):
    """Wherever it comes: while PyTorch is imported, and in the middle of the work."""
    for i in range(2000):
        os.link(CAT, tmp_path / f'{i}.jpg') if i else shutil.copy(CAT, tmp_path / '0.jpg')
    argv = dict(
        predict=[str(tmp_path)], export=[DEFAULT_MODEL, '--format', 'onnx', '--output', str(tmp_path / 'a.onnx')]
    )
    for seconds in (1, 9):
        child = subprocess.Popen(
            [sys.executable, '-m', 'timm_regnet_rnn', command, *argv[command]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=300)
        assert child.returncode == 130 and err.splitlines() == ['timm-regnet-rnn: stopped.'], err
    assert not (tmp_path / 'a.onnx').exists() and not list(tmp_path.glob('.*'))


def test_closed_pipe_is_quiet():
    done = subprocess.run(
        f'"{sys.executable}" -m timm_regnet_rnn list | head -n 1', shell=True, capture_output=True, text=True
    )
    assert done.stdout.startswith('name') and done.stderr == ''
