import csv
import io
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from conftest import CLASSES, OPTIONS, RECIPES, STAND_IN
from filelock import FileLock
from test_cli import call, refused

from timm_regnet_rnn import results
from timm_regnet_rnn.training import run as training
from timm_regnet_rnn.training.recipe import train_options

pytestmark = pytest.mark.slow


def rows(file):
    return list(csv.DictReader(file.open(encoding='utf-8')))


def test_the_stand_in_has_the_recorded_options():
    assert train_options(STAND_IN / 'train.py') == OPTIONS


def test_a_run_ends_with_its_row(capsys, argv, tmp_path, data):
    (data / 'prepared.json').write_text('{"dataset": "cifar10_jpeg75"}')
    status, out, err = call(capsys, *argv)
    assert status == 0, err
    (row,) = rows(tmp_path / 'results.csv')
    assert tuple(row) == results.COLUMNS
    assert row['run'] == 'regnet_convrnn_20-layers-1-1-1-carry-raw-cifar_paper-cifar10_jpeg75-e3-batch-size-4-s7'
    assert (row['model'], row['model_kwargs']) == ('regnet_convrnn_20', 'layers=(1,1,1) carry=raw')
    assert (row['recipe'], row['overrides']) == ('cifar_paper', '--batch-size 4 --epochs 3')
    assert row['dataset'] == 'CIFAR-10, JPEG q75 mirror'
    assert (row['seed'], row['epochs'], row['processes'], row['weights']) == ('7', '3', '1', 'last')
    assert (row['top1'], row['top5']) == ('52.0', '99.0'), 'of the last epoch'
    assert (row['best_epoch'], row['best_top1']) == ('2', '61.0')
    assert row['images_per_s'] == '101', 'the median of 100, 101 and 102'
    model = timm.create_model('regnet_convrnn_20', num_classes=2, layers=(1, 1, 1))
    assert int(row['params']) == sum(p.numel() for p in model.parameters()) and int(row['macs']) > 10**6
    assert f'timm {timm.__version__}' in row['versions'] and torch.__version__.split('+')[0] in row['versions']
    curve = rows(tmp_path / 'curves' / f'{row["run"]}.csv')
    assert [line['epoch'] for line in curve] == ['1', '2', '3'] and curve[-1]['top1'] == '52.0'
    assert f'{row["run"]}: top-1 52.00 %' in out.splitlines()[-1]

    assert json.loads((tmp_path / 'run' / 'classes.json').read_text()) == [*CLASSES]
    predicted = json.loads(call(capsys, 'predict', data / 'test', '--model', tmp_path / 'run', '--json')[1])
    assert len(predicted) == 4 and {name for image in predicted for name, _ in image['top']} == {*CLASSES}

    log = (tmp_path / 'run' / 'train.log').read_text()
    status, _, err = call(capsys, *argv)
    assert status == 0, err
    assert len(rows(tmp_path / 'results.csv')) == 1 and (tmp_path / 'run' / 'train.log').read_text() == log


def test_a_terminal_shows_one_bar(monkeypatch, capsys):
    screen = io.StringIO()
    monkeypatch.setattr(screen, 'isatty', lambda: True, raising=False)
    lines = (
        'Scheduled epochs: 3\n',
        'Train: 1 [ 100/400 ( 25%)]  Loss: 4.63 (4.63)  Time: 1.181s,  108.42/s  (1.181s,  108.42/s)\n',
        'Test: [  78/78]  Time: 0.115 (0.230)  Loss:  3.42 ( 3.47)  Acc@1:  20.0 ( 21.46)  Acc@5: 50.0 ( 51.0)\n',
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stderr', screen)
        with training.terminal(1, 3) as show:
            for line in lines:
                show(line)
    assert capsys.readouterr().out == lines[0]
    text = screen.getvalue()
    assert 'epoch 1.2 of 3' in text and 'loss 4.63' in text and 'top-1 21.46 %' in text and ' left]' in text
    with training.terminal(0, 3) as show:  # into a file every line goes
        show(lines[1])
    assert capsys.readouterr().out == lines[1]


def test_a_killed_run_goes_on_from_its_last_epoch(capsys, argv, tmp_path, monkeypatch):
    monkeypatch.setenv('KILL_AFTER', '2')
    status, _, err = call(capsys, *argv)
    assert status == 1 and err.count('\n') == 1
    assert 'train.py stopped with status -9 after 2 of 3 epochs' in err and not (tmp_path / 'results.csv').exists()
    monkeypatch.delenv('KILL_AFTER')
    last = tmp_path / 'run' / 'last.pth.tar'
    whole = last.read_bytes()
    last.unlink()  # which is a hard link to checkpoint-1
    last.write_bytes(whole[: len(whole) // 2])
    assert 'seed 7, not 8; give another --output' in refused(capsys, *argv, '--seed', '8')
    status, out, err = call(capsys, *argv)
    assert status == 0, err
    assert 'run: 2 of 3 epochs done' in out and 'starts at epoch 2' in out
    (row,) = rows(tmp_path / 'results.csv')
    assert row['epochs'] == '3'
    assert [line['epoch'] for line in rows(tmp_path / 'curves' / f'{row["run"]}.csv')] == ['1', '2', '3']


def test_two_processes(capsys, argv, tmp_path):
    status, out, err = call(capsys, *argv, '--nproc', '2', '--epochs', '1')
    assert status == 0, out[-2000:] + err
    assert 'rank 0 of 2' in out and 'rank 1 of 2' in out
    assert rows(tmp_path / 'results.csv')[0]['processes'] == '2'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_two_nodes_on_the_loopback(argv, tmp_path):
    """Two commands, as on two machines that see one folder."""
    words = [sys.executable, '-m', 'timm_regnet_rnn', *map(str, argv), '--epochs', '1', '--nnodes', '2']
    words += ['--rdzv-endpoint', f'127.0.0.1:{free_port()}', '--node-rank']
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    nodes = [subprocess.Popen([*words, str(rank)], **pipes) for rank in (1, 0)]
    (one, err1), (zero, err0) = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], err0 + err1
    assert 'rank 1 of 2 starts at epoch 0' in one and 'node 1 of 2 is done; node 0 writes the row.' in one
    assert 'rank 0 of 2 starts at epoch 0' in zero and 'top-1 50.00 %' in zero
    (row,) = rows(tmp_path / 'results.csv')
    assert row['processes'] == '2' and row['epochs'] == '1'
    assert yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())['batch_size'] == 2, 'a batch of 4 over both'
    assert 'rank 1 of 2' in (tmp_path / 'run' / 'train.node1.log').read_text()


def test_dry_run_prints_the_command(capsys, recorded, argv, tmp_path, monkeypatch):
    status, out, _ = call(capsys, *argv, '--dry-run')
    words = out.split()
    assert status == 0 and out.count('\n') == 1 and not (tmp_path / 'run').exists()
    assert words[1:5] == ['-m', 'timm_regnet_rnn', 'run', str(STAND_IN / 'train.py')]
    for pair in ('--model regnet_convrnn_20', '--channels-last', '--device cpu', f'--output {tmp_path}', '--seed 7'):
        assert pair in out
    assert '--amp' not in words and '--timm-dir' not in words
    out = call(capsys, *argv, '--nproc', '2', '--dry-run')[1]
    assert '-m torch.distributed.run --standalone --nproc_per_node 2 -m timm_regnet_rnn run' in out
    assert '--batch-size 4 ' in out and out.index('--batch-size 2') > out.index('--batch-size 4'), 'the last one counts'
    assert '--device-modules timm_regnet_rnn timm_regnet_rnn.training.cpu_ddp' in out
    nodes = ['--nnodes', '2', '--node-rank', '1', '--rdzv-endpoint', 'host:29400']
    out = call(capsys, *argv, '--nproc', '2', *nodes, '--dry-run')[1]
    assert '--nnodes 2 --node_rank 1 --rdzv_backend static --rdzv_endpoint host:29400 --nproc_per_node 2 -m' in out
    assert '--batch-size 1 --device-modules' in out
    monkeypatch.chdir(tmp_path)
    where = argv.index('--output')
    out = call(capsys, *argv[:where], *argv[where + 2 :], '--dry-run')[1]
    assert (
        '--output output --experiment regnet_convrnn_20-layers-1-1-1-carry-raw-cifar_paper-data-e3-batch-size-4-s7'
        in out
    )


@pytest.fixture
def finetune(data, argv):
    """The recipe for one's own folder, with train/ and val/."""
    (data / 'test').rename(data / 'val')
    where = argv[argv.index('--output') :]
    return ['train', 'finetune', '--model', 'regnet_convlstm_20', '--data-dir', data, '--batch-size', '4', *where]


def test_a_folder_of_ones_own(capsys, finetune, data, tmp_path):
    """Nothing says how many classes; the run's folder is a model that knows their names, for every command."""
    status, out, err = call(capsys, *finetune, '--epochs', '1', '--device', 'cpu', '-j', '0', '--seed', '1')
    assert status == 0, err
    run = tmp_path / 'run'
    predicted = json.loads(call(capsys, 'predict', data / 'val', '--model', run, '--json')[1])
    assert len(predicted) == 4 and {name for image in predicted for name, _ in image['top']} == {*CLASSES}
    image = data / 'val' / 'cat' / '0.png'
    assert call(capsys, 'visualize', image, '--model', run, '--output', tmp_path / 'seen.html')[0] == 0
    assert '% </b> cat' in (tmp_path / 'seen.html').read_text().replace('%</b>', '% </b>')
    assert call(capsys, 'export', run, '--format', 'safetensors', '--output', tmp_path / 'net.safetensors')[0] == 0
    again = json.loads(call(capsys, 'predict', image, '--model', tmp_path / 'net.safetensors', '--json')[1])
    assert again[0]['top'] == predicted[0]['top']
    status, out, err = call(capsys, 'push', run, '--repo-id', 'me/pets', '--dry-run')
    assert status == 0, err
    start = ['--initial-checkpoint', run, '--output', tmp_path / 'second', '--dry-run']
    out = call(capsys, *finetune, *start)[1]
    assert f"--pretrained-path {run / 'last.pth.tar'} --initial-checkpoint ''" in out and '--num-classes 2' in out


def test_starts_that_are_none(capsys, recorded, finetune, tmp_path):
    assert 'no pretrained weights to start from' in refused(capsys, *finetune, '--model', 'regnet_convlstm_110')
    (tmp_path / 'empty').mkdir()
    other = tmp_path / 'other.pth'
    torch.save(timm.create_model('cifar_resnet_32').state_dict(), other)
    for start, words in (
        (tmp_path / 'none.pth', 'no weights file'),
        (tmp_path / 'empty', 'no checkpoint in folder'),
        (other, "other.pth' is no start for 'regnet_convlstm_20'"),
    ):
        assert words in refused(capsys, *finetune, '--initial-checkpoint', start)
    torch.save(timm.create_model('cifar_resnet_20', num_classes=5).state_dict(), other)  # of other classes
    assert call(capsys, *finetune, '--initial-checkpoint', other, '--dry-run')[0] == 0
    assert not (tmp_path / 'run').exists()


def test_a_folder_takes_one_run_at_a_time(capsys, recorded, argv, tmp_path):
    (tmp_path / 'run').mkdir()
    with FileLock(tmp_path / 'run' / '.lock'):
        assert 'a run is under way' in refused(capsys, *argv)


def nest(tmp_path):
    for folder in (tmp_path / 'data').glob('*/*'):
        for i, file in enumerate(sorted(folder.iterdir())):
            (folder / ('indoor', 'outdoor')[i % 2]).mkdir(exist_ok=True)
            shutil.move(file, folder / ('indoor', 'outdoor')[i % 2])


def test_a_failed_start_leaves_the_folder_free(capsys, argv, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'args.yaml').write_text('batch_size: 9000\n')  # all that a start without an epoch leaves
    status, _, err = call(capsys, *argv)
    assert status == 0, err
    assert 'holds a run with batch_size 4' in refused(capsys, *argv, '--batch-size', '2')


DAMAGES = [
    ('args.yaml', 'a: [', 'is damaged'),
    ('args.yaml', '!!python/object/apply:os.system [ls]', 'is damaged'),
    ('args.yaml', '\0', 'is damaged'),
    ('args.yaml', 'text', 'is damaged'),
    ('result.json', '{"run": ', 'is damaged'),
    ('result.json', '{"run": "x"}', 'it lacks a key'),
    ('summary.csv', '', 'has no epoch'),
    ('summary.csv', 'epoch,train_loss\n0,1\n', 'needs epoch, lr and train_loss'),
]


def test_damaged_folders(capsys, recorded, argv, tmp_path):
    assert call(capsys, *argv)[0] == 0
    before = (tmp_path / 'results.csv').read_bytes()
    for i, (file, text, words) in enumerate(DAMAGES):
        folder = tmp_path / f'run{i}'
        shutil.copytree(tmp_path / 'run', folder)
        if file == 'summary.csv':
            (folder / 'result.json').unlink()
        (folder / file).write_text(text)
        status, _, err = call(capsys, *argv, '--output', folder)
        assert status == 2 and words in err and err.count('\n') == 1, (file, text, err)
        assert (tmp_path / 'results.csv').read_bytes() == before


def test_other_processes_are_another_table():
    text = dict(zip(results.COLUMNS, ['r', 'd', 'regnet_convlstm_20', '', 'cifar_paper', '', 'CIFAR-10'] + ['1'] * 6))
    text.update(top1='1', top5='1', weights='last', best_epoch='1', best_top1='1', images_per_s='', processes='1')
    text.update(device='', versions='', commit='')
    assert results.parse(text).group != results.parse({**text, 'processes': '2'}).group


def write_recipe(tmp_path, text):
    base = (RECIPES / 'cifar_paper.yaml').read_text(encoding='utf-8')
    (tmp_path / 'recipe.yaml').write_text(base + text, encoding='utf-8')
    return tmp_path / 'recipe.yaml'


BAD = {
    'no recipe': (lambda t: ['train', t / 'none.yaml'], 'no recipe'),
    'misspelt key': (lambda t: ['train', write_recipe(t, 'wieght_decay: 0.1\n')], "did you mean 'weight_decay'?"),
    'text for a number': (lambda t: ['train', write_recipe(t, 'min_lr: 5e-4\n')], 'min_lr: '),
    'no data': (lambda t: ['--data-dir', t / 'none'], 'no data folder'),
    'no split': (lambda t: shutil.move(t / 'data/test', t / 'data/dev'), "no folder 'test' in"),
    'empty class': (lambda t: [f.unlink() for f in (t / 'data/train/dog').iterdir()], 'hold different classes'),
    'other classes': (lambda t: shutil.move(t / 'data/test/dog', t / 'data/test/fox'), 'hold different classes'),
    'too few classes': (lambda t: ['--num-classes', '10'], 'the data have 2 classes, the recipe 10'),
    'no border': (
        lambda t: shutil.rmtree(t / 'data/train') or shutil.copytree(t / 'data/test', t / 'data/train'),
        '--pad 4',
    ),
    'no torchvision data': (lambda t: ['--dataset', 'torch/cifar10'], '--dataset-download fetches it'),
    'unknown model': (lambda t: ['--model', 'regnet_20'], "unknown model 'regnet_20'"),
    'no value': (lambda t: ['--model-kwargs', 'a'], 'must be NAME=VALUE'),
    'unknown argument': (lambda t: ['--model-kwargs', 'regulater=1'], "unknown argument 'regulater'"),
    'unknown flag': (lambda t: ['--epoch', '3'], 'unrecognized arguments: --epoch 3'),
    'no number': (lambda t: ['--lr', 'high'], "invalid float value: 'high'"),
    'our own flag': (lambda t: ['--resume', 'x'], '--resume is set by this command'),
    'no train.py': (lambda t: ['--timm-dir', t], 'holds no train.py'),
    'nested folders': (lambda t: nest(t), "timm would take 'indoor' for its class"),
    'stray image': (
        lambda t: shutil.copy(t / 'data/train/cat/0.png', t / 'data/train/x.png'),
        'beside the class folders',
    ),
    'batch beyond the data': (lambda t: ['--batch-size', '9000'], 'a batch of 9000 out of 8 training images'),
    'batch that cannot be shared': (lambda t: ['--nproc', '3'], 'the batch of 4 is that of all processes together'),
    'no such device': (lambda t: ['--device', 'cuda'], "there is no device 'cuda' here, only cpu"),
    'negative rate': (lambda t: ['--lr', '-1'], '--lr must be above 0, got -1.0'),
    'no area': (lambda t: ['--scale', '0', '0'], '--scale must be two shares of the area'),
    'a net for large images': (
        lambda t: ['--model', 'resnet18', '--model-kwargs', 'drop_rate=0'],
        'leaves a single pixel',
    ),
    'no activation': (lambda t: ['--model-kwargs', 'act_layer=foo'], 'cannot build'),
    'no norm': (lambda t: ['--model-kwargs', 'norm_layer=foo'], 'cannot build'),
    'no pooling': (lambda t: ['--model-kwargs', 'global_pool=foo'], 'cannot build'),
    'no torch data set': (lambda t: ['--dataset', 'torch/nope'], "timm knows no data set 'torch/nope'"),
    'results no file': (lambda t: ['--results', '/dev/full'], 'is no regular file'),
    'curves no folder': (lambda t: (t / 'curves').write_text(''), 'is no folder'),
    'damaged prepared.json': (lambda t: (t / 'data/prepared.json').write_text('{'), 'does not say which data set'),
    'no process': (lambda t: ['--nproc', '0'], '--nproc must be at least 1'),
    'no node': (lambda t: ['--nnodes', '0'], '--nnodes must be at least 1'),
    'a node too many': (lambda t: ['--nnodes', '2', '--node-rank', '2'], '--node-rank must be from 0 to 1'),
    'a node of one': (lambda t: ['--node-rank', '1'], '--node-rank must be from 0 to 0 with --nnodes 1'),
    'nowhere to meet': (lambda t: ['--nnodes', '2'], '--nnodes needs --rdzv-endpoint HOST:PORT'),
    'no port': (lambda t: ['--nnodes', '2', '--rdzv-endpoint', 'host'], "got 'host'"),
    'batch for nodes': (lambda t: ['--nnodes', '3', '--rdzv-endpoint', 'host:1'], '3 cannot share it'),
    'repeated augmentation': (lambda t: ['--aug-repeats', '3'], 'over several processes only'),
    'no results folder': (lambda t: ['--results', t / 'none' / 'results.csv'], 'give a file by --results'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line_before_anything_runs(capsys, recorded, argv, tmp_path, case):
    change, message = BAD[case]
    words = change(tmp_path)
    words = words if isinstance(words, list) and all(words) else []
    full = [*words, *argv[2:]] if words[:1] == ['train'] else [*argv, *words]
    assert message in refused(capsys, *full)
    assert not (tmp_path / 'run').exists() and not (tmp_path / 'results.csv').exists()
