import argparse
import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import timm_regnet_rnn
from timm_regnet_rnn.cli import DEFAULT_MODEL, main, make_parser

CAT = Path(__file__).parent.parent / 'docs' / 'chelsea.jpg'
NAMES = timm.list_models(module='regnet_rnn')


def call(capsys, *argv):
    """Exit status, standard output and standard error of a command."""
    try:
        status = main([str(a) for a in argv])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *argv):
    """The one line that a command prints when it refuses its input."""
    status, out, err = call(capsys, *argv)
    assert status == 2 and out == ''
    assert err.count('\n') == 1 and err.endswith('\n'), err
    return err


@pytest.fixture
def checkpoint(tmp_path):
    file = tmp_path / 'model.safetensors'
    save_file(timm.create_model('regnet_convrnn_20').state_dict(), file)
    return file


def on_terminal(*argv, **env):
    """What a command writes where its output is a terminal of 60 columns."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 60, 0, 0))
    with subprocess.Popen(
        [sys.executable, '-m', 'timm_regnet_rnn', *argv],
        stdin=its,
        stdout=its,
        stderr=its,
        env={**{k: v for k, v in os.environ.items() if k not in ('COLUMNS', 'LINES')}, 'TERM': 'xterm-256color', **env},
    ) as child:
        os.close(its)
        written = b''
        with contextlib.suppress(OSError):  # the other side is closed
            while data := os.read(mine, 4096):
                written += data
    os.close(mine)
    return child.returncode, written.decode()


@pytest.mark.slow
def test_export_says_what_it_does(tmp_path):
    file = str(tmp_path / 'net.pt2')
    status, shown = on_terminal('export', DEFAULT_MODEL, '--format', 'torch-export', '--output', file)
    assert status == 0 and 'converting' in shown and 'checking net.pt2' in shown and '0:00:0' in shown


def test_version_and_examples(capsys):
    status, out, _ = call(capsys, '--version')
    assert status == 0 and out.startswith(
        f'timm-regnet-rnn {timm_regnet_rnn.__version__} (timm {timm.__version__}, torch'
    )
    commands = re.findall(r'^    (\w+)', call(capsys, '--help')[1], re.MULTILINE)
    assert {'list', 'predict', 'visualize', 'train', 'export', 'pull', 'run', 'autoload'} <= set(commands)
    for command in commands:
        out = call(capsys, command, '--help')[1]
        examples = re.findall(rf'^  (timm-regnet-rnn {command} .*)', out, re.MULTILINE)
        assert 'examples:' in out and examples, command
        for example in examples:  # which its own parser takes
            make_parser().parse_known_args(shlex.split(example)[1:])


def test_predict_json_and_checkpoint(capsys, checkpoint):
    status, out, _ = call(
        capsys, 'predict', CAT, '--model', 'regnet_convrnn_20', '--checkpoint', checkpoint, '--json', '--topk', 3
    )
    (row,) = json.loads(out)
    assert status == 0 and row['path'] == str(CAT) and len(row['top']) == 3
    probabilities = [p for _, p in row['top']]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1 + 1e-6
    assert {name for name, _ in row['top']} <= set(timm.get_pretrained_cfg('regnet_convrnn_20').label_names)


def test_predict_reads_train_pys_checkpoints(capsys, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model('regnet_convrnn_20').state_dict()
    torch.save(dict(state_dict=state, epoch=3, args=argparse.Namespace(lr=0.1)), tmp_path / 'last.pth.tar')
    save_file(state, tmp_path / 'same.safetensors')
    rows = [
        call(capsys, 'predict', CAT, '--model', 'regnet_convrnn_20', '--checkpoint', tmp_path / name, '--json')[1]
        for name in ('last.pth.tar', 'same.safetensors')
    ]
    assert rows[0] == rows[1] != ''


def test_predict_folder_goes_on_past_a_bad_file(capsys, checkpoint, tmp_path):
    folder = tmp_path / 'images' / 'deep'
    folder.mkdir(parents=True)
    for k, mode in enumerate(('RGB', 'L', 'RGBA', 'P')):
        Image.new(mode, (20 + k, 30)).save(folder / f'{k}.png')
    (folder / 'bad.png').write_text('not an image')
    (folder / 'notes.txt').write_text('skipped')
    whole = CAT.read_bytes()
    (folder / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    status, out, err = call(
        capsys, 'predict', tmp_path / 'images', '--model', 'regnet_convrnn_20', '--checkpoint', checkpoint
    )
    assert status == 2
    assert [line for line in out.splitlines() if not line.startswith(' ')] == [
        str(folder / f'{k}.png') for k in range(4)
    ]
    assert out.count('%') == 4 * 5
    lines = err.strip().splitlines()
    assert len(lines) == 2
    assert 'bad.png' in lines[0] and 'not an image that Pillow can read' in lines[0]
    assert 'cut.jpg' in lines[1] and 'truncated' in lines[1]


def test_predict_refuses(capsys, checkpoint, tmp_path):
    assert "no file or folder 'nowhere.jpg'" in refused(capsys, 'predict', 'nowhere.jpg')
    assert 'no image in folder' in refused(capsys, 'predict', tmp_path)
    assert "unknown model 'regnet_convlstm_-20'" in refused(capsys, 'predict', CAT, '--model', 'regnet_convlstm_-20')
    assert 'no pretrained weights' in refused(capsys, 'predict', CAT, '--model', 'regnet_convlstm_110')
    assert '--topk must be at least 1' in refused(capsys, 'predict', CAT, '--topk', 0)
    assert 'no weights file' in refused(capsys, 'predict', CAT, '--checkpoint', tmp_path / 'no.safetensors')
    offline = refused(capsys, 'predict', CAT, '--model', 'regnet_convgru_18.resnet18_a1_in1k')
    assert 'Hub' in offline or 'hf' in offline.lower()
    broken = tmp_path / 'broken.safetensors'
    broken.write_bytes(checkpoint.read_bytes()[:1000])
    assert 'truncated or not a safetensors file' in refused(capsys, 'predict', CAT, '--checkpoint', broken)
    (tmp_path / 'text.pth').write_text('weights?')
    assert 'neither a .safetensors file nor a PyTorch checkpoint' in refused(
        capsys, 'predict', CAT, '--checkpoint', tmp_path / 'text.pth'
    )
    assert 'do not fit' in refused(capsys, 'predict', CAT, '--checkpoint', checkpoint)  # ConvRNN's into ConvLSTM
    other = tmp_path / 'other.safetensors'
    save_file(timm.create_model('test_convnext').state_dict(), other)
    assert 'another architecture' in refused(capsys, 'predict', CAT, '--checkpoint', other)


@pytest.mark.parametrize(
    'argv, words',
    [
        ([], 'required'),
        (['predict'], 'IMAGE'),
        (['fly'], 'invalid choice'),
        (['autoload'], '--enable'),
        (['run', 'no_such_script.py'], 'no script'),
        (['predict', 'x', '--topk', 'many'], 'invalid int'),
    ],
)
def test_usage_errors(capsys, argv, words):
    assert words in refused(capsys, *argv)


SCRIPT = """
import sys, timm
import neighbour
print(__name__, sys.argv[1:], neighbour.VALUE, timm.is_model('regnet_convlstm_50'))
sys.exit(7)
"""


def test_run_is_the_script_with_the_models_registered(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'neighbour.py').write_text('VALUE = 42')
    done = subprocess.run(
        [sys.executable, '-m', 'timm_regnet_rnn', 'run', tmp_path / 'script.py', '--model', 'x', '-b', '3'],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.strip() == "__main__ ['--model', 'x', '-b', '3'] 42 True"
