import argparse
import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import timm_regnet_rnn
from timm_regnet_rnn.cli import DEFAULT_MODEL, main, make_parser
from timm_regnet_rnn.weights.manifest import RELEASED

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


def test_list_table(capsys):
    status, out, _ = call(capsys, 'list')
    header, *rows = out.splitlines()
    assert status == 0 and [row.split()[0] for row in rows] == NAMES
    assert header.split()[0] == 'name' and len(rows) == 70
    row = next(row for row in rows if row.startswith('regnet_convlstm_50 '))
    assert row.split()[1:] == ['28.13', '4.561', '3x224x224', 'resnet50_a1_in1k']


def test_list_says_what_the_registry_says(capsys):
    """The list is made without timm; it must not differ from it."""
    rows = json.loads(call(capsys, 'list', '--json')[1])
    cfgs = timm_regnet_rnn.regnet_rnn.default_cfgs
    for row in rows:
        cfg = cfgs[row['name']]
        assert sorted(row['tags']) == sorted(tag for tag in cfg.tags if tag and cfg.cfgs[tag].has_weights), row['name']
        assert all(f'top-1 {value:.2f} %' in cfg.cfgs[tag].description for tag, value in row['top1'].items())
    assert [row['name'] for row in rows] == NAMES
    released = [row for row in rows if row['top1']]
    assert {f'{row["name"]}.{tag}' for row in released for tag in row['top1']} == set(RELEASED)


def test_list_sorted_and_filtered(capsys):
    def rows(*argv):
        return json.loads(call(capsys, 'list', '--json', *argv)[1])

    for key in ('params', 'macs'):
        values = [row[key] for row in rows('--sort', key)]
        assert values == sorted(values) and len(values) == len(NAMES)
    best = [max(row['top1'].values(), default=-1) for row in rows('--sort', 'top1')]
    assert best == sorted(best, reverse=True) and best[0] > 0
    chosen = rows('*_20', '--pretrained')
    assert chosen and all(row['tags'] and row['name'].endswith('_20') for row in chosen)
    assert 'no model with pretrained weights matches' in refused(capsys, 'list', '*_110', '--pretrained')
    assert "Did you mean 'regnet_convlstm_20'?" in refused(capsys, 'list', 'regnet_convlstm20')
    assert "invalid choice: 'parms'" in (words := refused(capsys, 'list', '--sort', 'parms')) and "'params'?" in words


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


def test_list_on_a_terminal():
    status, coloured = on_terminal('list', '*convlstm_20')
    assert status == 0 and '\x1b[36m' in coloured
    status, plain = on_terminal('list', '*convlstm_20', NO_COLOR='1')
    assert '\x1b[3' not in plain
    plain = re.sub('\x1b.*?m', '', plain)
    assert all(len(line) <= 60 for line in plain.splitlines()) and 'regnet_convlstm_20' in plain, plain


@pytest.mark.slow
def test_export_says_what_it_does(tmp_path):
    file = str(tmp_path / 'net.pt2')
    status, shown = on_terminal('export', DEFAULT_MODEL, '--format', 'torch-export', '--output', file)
    assert status == 0 and 'converting' in shown and 'checking net.pt2' in shown and '0:00:0' in shown


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
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=300)
        assert child.returncode == 130 and err.splitlines() == ['timm-regnet-rnn: stopped.'], err
    assert not (tmp_path / 'a.onnx').exists() and not list(tmp_path.glob('.*'))


def test_list_json(capsys):
    rows = json.loads(call(capsys, 'list', '*regnet_convlstm_20', '--json')[1])
    assert [row['name'] for row in rows] == ['regnet_convlstm_20', 'seregnet_convlstm_20']
    assert rows[0]['params'] == 311_450 and rows[0]['macs'] == 49_316_480
    assert "no model matches 'resnet*'" in refused(capsys, 'list', 'resnet*')


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


def test_pickled_code_is_not_run(capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / 'ran',))

    torch.save(dict(state_dict=Evil()), tmp_path / 'evil.pth.tar')
    assert 'besides weights' in refused(capsys, 'predict', CAT, '--checkpoint', tmp_path / 'evil.pth.tar')
    assert not (tmp_path / 'ran').exists()


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


def test_closed_pipe_is_quiet():
    done = subprocess.run(
        f'"{sys.executable}" -m timm_regnet_rnn list | head -n 1', shell=True, capture_output=True, text=True
    )
    assert done.stdout.startswith('name') and done.stderr == ''
