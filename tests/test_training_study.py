"""`timm-regnet-rnn study`, through submitit's real local executor and through stand-ins for SLURM's commands."""

import csv
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from PIL import Image
from rich.console import Console
from test_cli import call, refused

from timm_regnet_rnn import results
from timm_regnet_rnn.training import jobs, study
from timm_regnet_rnn.training.recipe import load_yaml

ROOT = Path(__file__).parent.parent
STAND_IN = ROOT / 'tests' / 'stand_in'
STUDIES = sorted((ROOT / 'train_recipes' / 'studies').glob('*.yaml'))
OPTIONS = json.loads((ROOT / 'train_recipes' / 'options.json').read_text(encoding='utf-8'))['options']
TINY = dict(layers=[1, 1, 1])


def make_data(root, classes, train, test, size=32, splits=('train', 'test'), key=None, **note):
    """A folder data set of grey squares, one file hard-linked everywhere."""
    root.mkdir(parents=True, exist_ok=True)
    for split, count, side in ((splits[0], train, size), (splits[1], test, 32)):
        file = root / f'{split}.png'
        Image.new('RGB', (side, side), (60, 90, 50)).save(file)
        for name in range(classes):
            (root / split / f'c{name:03}').mkdir(parents=True)
            for i in range(count):
                os.link(file, root / split / f'c{name:03}' / f'{i}.png')
    if key:
        (root / 'prepared.json').write_text(json.dumps(dict(note, dataset=key)))
    return root


@pytest.fixture
def spec(tmp_path):
    """A study of two nets and one seed that runs in seconds."""
    return dict(
        recipe='cifar_short',
        data_dir=str(make_data(tmp_path / 'data', 2, 4, 2)),
        num_classes=2,
        seeds=[7],
        overrides=dict(epochs=2, batch_size=4, workers=0, warmup_epochs=0),
        models=[
            dict(model='cifar_resnet_20', model_kwargs=TINY),
            dict(model='regnet_convlstm_20', model_kwargs=TINY),
        ],
    )


NET, RNN = (
    f'{name}-layers-1-1-1-cifar_short-data-e2-batch-size-4-warmup-epochs-0-s7'
    for name in ('cifar_resnet_20', 'regnet_convlstm_20')
)


@pytest.fixture
def argv(tmp_path, spec):
    """Arguments of the command, once `spec` is written down."""

    def write(*more, **changes):
        for key, value in changes.items():
            spec[key] = value
        (tmp_path / 'small.yaml').write_text(yaml.safe_dump({k: v for k, v in spec.items() if v is not None}))
        where = ['--output', tmp_path / 'out', '--results', tmp_path / 'results.csv', '--timm-dir', STAND_IN]
        return ['study', tmp_path / 'small.yaml', *where, '--device', 'cpu', *more]

    return write


@pytest.fixture
def recorded(monkeypatch):
    """The stand-in's options without asking it."""
    monkeypatch.setattr(study, 'train_options', lambda _: OPTIONS)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(jobs, 'PERIOD', 0.1)


def rows(file):
    return list(csv.DictReader(file.open(encoding='utf-8')))


def epochs(folder):
    """The lines of a summary, by epoch."""
    file = folder / 'summary.csv'
    return [line.split(',')[0] for line in file.read_text().splitlines()[1:]] if file.is_file() else []


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it took too long'
        time.sleep(0.05)


@pytest.mark.slow
def test_a_study_runs_what_has_no_row(capsys, argv, quick, recorded, tmp_path):
    words = argv('--jobs', '1')
    status, out, err = call(capsys, *words)
    assert status == 0, out + err
    assert out.splitlines()[:4] == [
        f'running {NET}',
        f'done {NET}: top-1 61.00 %',
        f'running {RNN}',
        f'done {RNN}: top-1 61.00 %',
    ], 'one at a time'
    assert '| `regnet_convlstm_20 layers=(1,1,1)` |' in out and '+0.00' in out and err == ''
    first = (tmp_path / 'results.csv').read_bytes()
    assert [row['run'] for row in rows(tmp_path / 'results.csv')] == [NET, RNN]
    status, out, err = call(capsys, *words)
    assert status == 0 and 'running' not in out and '| `regnet_convlstm_20 layers=(1,1,1)` |' in out
    assert (tmp_path / 'results.csv').read_bytes() == first
    out = call(capsys, *argv('--dry-run', seeds=[7, 8]))[1]
    assert out.splitlines()[:3] == [
        f'there    {NET}: top-1 61.00 %',
        f'there    {RNN}: top-1 61.00 %',
        f'to run   {NET[:-1]}8',
    ]
    assert '4 runs, 2 to run; rows in' in out
    shutil.copy(tmp_path / 'results.csv', tmp_path / 'other.csv')
    (tmp_path / 'results.csv').write_text((tmp_path / 'results.csv').read_text().splitlines()[0] + '\n')
    status, _, err = call(capsys, *argv(seeds=[7]))
    assert status == 1 and err.count('\n') == 2 and 'its row went into another file of results' in err


@pytest.mark.slow
def test_killed_runs_go_on(capsys, argv, quick, recorded, tmp_path, monkeypatch):
    monkeypatch.setenv('KILL_AFTER', '1')
    status, out, err = call(capsys, *argv('--jobs', '2'))
    assert status == 1 and out.splitlines()[:2] == [f'running {NET}', f'running {RNN}'], 'both at once'
    assert err.count('\n') == 2 and err.count('train.py stopped with status -9 after 1 of 2 epochs') == 2
    assert f'timm-regnet-rnn: {NET}: ' in err and not (tmp_path / 'results.csv').exists()
    monkeypatch.delenv('KILL_AFTER')
    assert f'to run   {NET} (1 of 2 epochs done)' in call(capsys, *argv('--dry-run'))[1]
    status, out, err = call(capsys, *argv('--jobs', '2'))
    assert status == 0, out + err
    assert 'starts at epoch 1' in (tmp_path / 'out' / NET / 'train.log').read_text()
    assert sorted(row['run'] for row in rows(tmp_path / 'results.csv')) == [NET, RNN]


@pytest.mark.slow
def test_the_others_go_on_when_one_fails(capsys, argv, quick, recorded, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / NET).write_text('in the way')
    status, out, err = call(capsys, *argv('--jobs', '1'))
    assert status == 1 and err.count('\n') == 1 and err.startswith(f'timm-regnet-rnn: {NET}: ') and 'exists' in err
    assert f'failed {NET}' in out and f'done {RNN}' in out
    assert [row['run'] for row in rows(tmp_path / 'results.csv')] == [RNN]


def background(words, pause):
    """The command in a process group of its own, as a terminal starts it."""
    env = {**os.environ, 'PAUSE': str(pause), 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    full = [sys.executable, '-m', 'timm_regnet_rnn', *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a shell's background jobs ignore it
    return subprocess.Popen(full, env=env, start_new_session=True, preexec_fn=heard, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize('whom', ['group', 'study'])
def test_ctrl_c_ends_the_jobs(argv, tmp_path, whom):
    """A terminal sends Ctrl-C to the jobs too, `kill -INT` to the study alone."""
    words = argv('--jobs', '2', overrides=dict(epochs=9, batch_size=4, workers=0, warmup_epochs=0))
    child = background(words, 0.5)
    folders = [tmp_path / 'out' / name.replace('-e2-', '-e9-') for name in (NET, RNN)]
    try:
        wait_for(lambda: all(epochs(folder) for folder in folders) or child.poll() is not None)
        (os.killpg if whom == 'group' else os.kill)(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=300)
    finally:
        child.poll() is None and os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 130, out + err
    assert err == 'timm-regnet-rnn: stopped with 0 of 2 runs done; the same command goes on.\n'
    for folder in folders:
        with FileLock(folder / '.lock', timeout=1):  # which lives as long as train.py
            pass
    seen = [epochs(folder) for folder in folders]
    time.sleep(1)
    assert [epochs(folder) for folder in folders] == seen and not (tmp_path / 'results.csv').exists()


@pytest.mark.slow
def test_a_study_that_was_killed_finds_its_jobs_at_work(capsys, argv, quick, recorded, tmp_path):
    words = argv(
        '--jobs', '1', overrides=dict(epochs=6, batch_size=4, workers=0, warmup_epochs=0), models=['cifar_resnet_20']
    )
    child = background(words, 1.5)
    (name,) = (run for run in ['cifar_resnet_20-cifar_short-data-e6-batch-size-4-warmup-epochs-0-s7'])
    folder = tmp_path / 'out' / name
    wait_for(lambda: epochs(folder) or child.poll() is not None)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    status, out, err = call(capsys, *words)
    assert status == 0, out + err
    assert f'done {name}' in out and epochs(folder) == [str(i) for i in range(6)], 'once, and from one start'
    assert len(rows(tmp_path / 'results.csv')) == 1


SBATCH = """
import os, re, subprocess, sys
text = open(sys.argv[1]).read()
array = re.search(r'--array=0-(\\d+)%(\\d+)', text)
open(os.environ['SEEN'], 'w').write(text)
task = f'env SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=% SLURM_JOB_ID=8% bash {sys.argv[1]}'
task = f'{task} && touch $SEEN.COMPLETED.% || touch $SEEN.FAILED.%'
script = f'seq 0 {array[1]} | xargs -P {array[2]} -I% bash -c "{task}"'
subprocess.Popen(['bash', '-c', script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print('Submitted batch job 77')
"""
SRUN = """
import os, subprocess, sys
def file(name):
    return open(name.replace('%A', '77').replace('%a', os.environ['SLURM_ARRAY_TASK_ID']).replace('%t', '0'), 'a')
words = sys.argv[1:]
assert (words[0], words[1], words[3]) == ('--unbuffered', '--output', '--error'), words
sys.exit(subprocess.call(words[5:], stdout=file(words[2]), stderr=file(words[4])))
"""
SACCT = """
import os
def state(i):
    ended = [name for name in ('COMPLETED', 'FAILED') if os.path.exists(f'{os.environ["SEEN"]}.{name}.{i}')]
    return (ended or ['RUNNING'])[0]
print('JobID|State|NodeList')
for i in range(2):
    print(f'77_{i}|{state(i)}|here')
"""


@pytest.mark.slow
def test_the_same_study_on_slurm(capsys, argv, quick, recorded, tmp_path, monkeypatch):
    """With stand-ins for sbatch, srun and sacct that run an array on this machine."""
    for name, code in (('sbatch', SBATCH), ('srun', SRUN), ('sacct', SACCT)):
        file = tmp_path / 'bin' / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!{sys.executable}\n{code}')
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
    monkeypatch.setenv('SEEN', str(tmp_path / 'seen'))
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    words = argv(
        '--executor', 'slurm', '--jobs', '1', '--slurm', 'partition=gpu', '--slurm', 'time=30', slurm=dict(time=9)
    )
    assert "parameter 'slurm_tme'" in refused(capsys, *words, '--slurm', 'tme=3')
    (tmp_path / 'out' / NET).parent.mkdir(exist_ok=True)
    (tmp_path / 'out' / NET).write_text('in the way')
    status, out, err = call(capsys, *words)
    assert status == 1 and err.count('\n') == 1 and err.startswith(f'timm-regnet-rnn: {NET}: '), err
    assert f'done {RNN}' in out and [row['run'] for row in rows(tmp_path / 'results.csv')] == [RNN]
    text = (tmp_path / 'seen').read_text()
    for line in ('array=0-1%1', 'partition=gpu', 'time=30', 'cpus-per-task=1', 'job-name=small'):
        assert f'#SBATCH --{line}\n' in text
    assert 'gpus' not in text


BAD = {
    'no study': (lambda t: ['study', t / 'none.yaml'], {}, 'no study'),
    'no study of that name': (lambda t: ['study', 'cpu_tiny10'], {}, "Did you mean 'cpu_tiny100'?"),
    'no mapping': (lambda t: (t / 'small.yaml').write_text('[1]'), {}, 'is not a mapping'),
    'no YAML': (lambda t: (t / 'small.yaml').write_text('a: ['), {}, 'is not YAML'),
    'a key twice': (
        lambda t: (t / 'small.yaml').write_text('groups:\n- seeds: [1]\n  seeds: [2]\n'),
        {},
        'and again in 3',
    ),
    'a loop': (lambda t: (t / 'small.yaml').write_text('groups: &a [*a]'), {}, 'group 1 must be a mapping'),
    'unknown key': (None, dict(modles=['x']), "modles: a study has no such option; did you mean 'models'?"),
    'unknown key of a model': (None, dict(models=[dict(model='x', kwarg={})]), 'models: kwarg: a study has no such'),
    'unknown key of a group': (None, dict(groups=[dict(jobs=2)]), 'group 1: jobs: a study has no such option'),
    'text for seeds': (None, dict(seeds='0 1'), "seeds: '0 1' is text; write a list of one or more whole numbers"),
    'text for a seed': (None, dict(seeds=['0']), "seeds: '0' is text; write 0"),
    'no seeds': (None, dict(seeds=None), "lacks the key 'seeds'"),
    'no models': (None, dict(models=[]), 'models: [] holds 0'),
    'a model of nothing': (None, dict(models=[dict(model_kwargs={})]), "lacks the key 'model'"),
    'a number for a model': (None, dict(models=[20]), 'models must be a mapping of model, model_kwargs; got 20'),
    'unknown model': (None, dict(models=['regnet_20']), "unknown model 'regnet_20'"),
    'unknown argument': (
        None,
        dict(models=[dict(model='regnet_convlstm_20', model_kwargs=dict(cary='raw'))]),
        "'cary'",
    ),
    'unknown recipe': (None, dict(recipe='cifar_shrt'), "Did you mean 'cifar_short'?"),
    'unknown data': (None, dict(data_dir='none'), "no data folder 'none'"),
    'unknown flag': (
        None,
        dict(overrides=dict(epoch=3)),
        'overrides: epoch: train.py has no such option; did you mean',
    ),
    'text for a number': (None, dict(overrides=dict(lr='high')), "overrides: lr: 'high' is text"),
    'false for a flag': (None, dict(overrides=dict(amp=False)), 'train.py has no flag for false'),
    'a key of its own': (None, dict(overrides=dict(seed=3)), 'overrides: seed is no override'),
    'our own flag': (None, dict(overrides=dict(resume='x')), '--resume is set by this command'),
    'a run twice': (None, dict(seeds=[1, 1]), "-s1' twice"),
    'a run twice, in other words': (
        None,
        dict(models=[dict(model='regnet_convrnn_20', model_kwargs=k) for k in (TINY, dict(layers='(1, 1, 1)'))]),
        'twice',
    ),
    'no jobs': (lambda t: ['--jobs', '0'], {}, '--jobs must be at least 1'),
    'no processes': (None, dict(nproc=0), '--nproc must be at least 1'),
    'another device': (lambda t: ['--device', 'cuda'], {}, "there is no device 'cuda' here"),
    'slurm here': (lambda t: ['--slurm', 'time=3'], {}, '--slurm is for --executor slurm'),
    'no slurm': (lambda t: ['--executor', 'slurm'], {}, '"srun"'),
    'no parameter': (lambda t: ['--executor', 'slurm', '--slurm', 'gpu'], {}, 'takes KEY=VALUE'),
    'two folders': (
        lambda t: ['--data-dir', t],
        dict(groups=[dict(data_dir='a'), dict(data_dir='b')]),
        'reads several folders',
    ),
    'a cut row': (
        lambda t: (t / 'results.csv').write_text(','.join(results.COLUMNS) + '\nrun,2026-01-01,regn'),
        {},
        'not as many fields as the header has',
    ),
    'a missing column': (lambda t: (t / 'results.csv').write_text('run,date\n'), {}, 'results.csv, line 1: no column'),
    'another encoding': (lambda t: (t / 'results.csv').write_bytes('run,ü\n'.encode('latin-1')), {}, 'results.csv'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line_before_anything_runs(capsys, recorded, argv, tmp_path, monkeypatch, case):
    if case == 'no slurm':
        pytest.importorskip('submitit')
        monkeypatch.setenv('PATH', '')
    change, changes, message = BAD[case]
    words = argv(**changes)
    more = change(tmp_path) if change else []
    more = more if isinstance(more, list) else []
    before = (tmp_path / 'results.csv').read_bytes() if (tmp_path / 'results.csv').exists() else None
    full = [*more, *words[2:]] if more[:1] == ['study'] else [*words, *more]
    assert message in refused(capsys, *full)
    assert not list((tmp_path / 'out').rglob('*.csv')), 'nothing has run'
    assert ((tmp_path / 'results.csv').read_bytes() if before is not None else None) == before


def test_without_submitit(capsys, recorded, argv, monkeypatch):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    assert "pip install 'timm-regnet-rnn[cluster]'" in refused(capsys, *argv())
    assert call(capsys, *argv('--dry-run'))[0] == 0, 'which submits nothing'


def test_results_with_a_byte_order_mark(capsys, recorded, argv, tmp_path):
    text = '\ufeff' + ','.join(results.COLUMNS) + '\n'
    (tmp_path / 'results.csv').write_text(text, encoding='utf-8')
    status, out, _ = call(capsys, *argv('--dry-run'))
    assert status == 0 and '2 runs, 2 to run' in out
    assert (tmp_path / 'results.csv').read_text(encoding='utf-8') == text


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Data of as many classes, and of the size, as the studies want, by the name of the folder."""
    root = tmp_path_factory.mktemp('folders')
    make_data(root / 'tiny_imagenet100_32', 100, 2, 1, key='tiny_imagenet100_32')
    make_data(root / 'cifar10_jpeg75', 10, 20, 1, key='cifar10_jpeg75')
    splits = ('train', 'val')
    make_data(root / 'cifar10_jpeg75_held5000', 10, 20, 1, splits=splits, key='cifar10_jpeg75', held_out=5000)
    make_data(root / 'fashion_mnist', 10, 20, 1, size=28, key='fashion_mnist')
    make_data(root / 'cifar10_pad4', 10, 20, 1, size=40, key='cifar10')
    make_data(root / 'cifar100_pad4', 100, 2, 1, size=40, key='cifar100')
    make_data(root / 'imagenet', 1000, 1, 1, size=256, splits=splits)
    return root


LISTED = dict(
    ablation=(12, 'regnet_convlstm_20-share_regulator-False-cifar_short-tiny_imagenet100_32-e4-'),
    cpu_cifar10=(12, 'regnet_convgru_20-cifar_short-cifar10_jpeg75-e4-s2'),
    cpu_fashion=(6, 'seregnet_convlstm_20-fashion_mnist-fashion_mnist-e2-s0'),
    cpu_tiny100=(15, 'regnet_convlstm_20-regulator-fuse-cifar_short-tiny_imagenet100_32-e4-'),
    gpu_half_hour=(6, 'regnet_convlstm_20-cifar_paper-cifar10-e200-s0'),
    imagenet=(4, 'regnet_convlstm_50-imagenet_paper-imagenet-e100-s0'),
    paper_cifar10=(48, 'seregnet_convgru_20-cifar_paper-cifar10-e200-s1'),
    paper_cifar100=(48, 'regnet_convrnn_56-cifar_paper-cifar100-e200-s2'),
    position=(6, 'regnet_convlstm_20-regulated_stages-2-cifar_short-tiny_imagenet100_32-e4-'),
    recipe_trials=(7, 'cifar_resnet_20-cifar_short-cifar10_jpeg75-held5000-e2-lr-0.4-val-split-val-s0'),
)


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.stem)
def test_every_study_of_ours(capsys, recorded, folders, tmp_path, path):
    """Found by its name, and checked down to its models; what the results have already is there."""
    lines = path.read_text(encoding='utf-8').splitlines()
    fields = re.findall(r'^# ([A-Z][a-z]+): ', '\n'.join(lines), flags=re.MULTILINE)
    assert fields == ['Purpose', 'Source', 'Launch', 'Expected', 'Hardware'] and max(map(len, lines)) <= 120
    assert f'timm-regnet-rnn study {path.stem} --data-dir DIR' in '\n'.join(lines)
    config = load_yaml(path, 'study', path.parent)
    data = folders / Path(config['data_dir']).name
    words = ['study', path.stem, '--data-dir', data, '--output', tmp_path / 'out', '--timm-dir', STAND_IN, '--dry-run']
    status, out, err = call(capsys, *words, '--results', tmp_path / 'results.csv')
    count, name = LISTED[path.stem]
    assert status == 0, err
    assert out.count('to run   ') == count and f'to run   {name}' in out
    assert f'{count} runs, {count} to run' in out and not (tmp_path / 'out').exists()


def test_the_rows_of_cpu_tiny100_are_there(capsys, recorded, folders):
    words = ['study', 'cpu_tiny100', '--data-dir', folders / 'tiny_imagenet100_32', '--timm-dir', STAND_IN, '--dry-run']
    out = call(capsys, *words)[1]
    name = 'Tiny-ImageNet, first 100 classes, 32x32'
    found = [row for row in rows(ROOT / 'train_recipes' / 'results.csv') if row['dataset'] == name]
    plain = [row for row in found if row['model_kwargs'] in ('', 'regulator=fuse') and row['epochs'] == '4']
    assert out.count('there    ') == len(plain) >= 14


def test_any_model_and_recipe_has_its_table(capsys, recorded, argv, tmp_path):
    """A recipe of somebody's own, and a net of timm's that is neither a RegNet nor its ResNet."""
    shutil.copy(ROOT / 'train_recipes' / 'cifar_short.yaml', tmp_path / 'mine.yaml')
    words = argv(
        recipe=str(tmp_path / 'mine.yaml'),
        models=['densenet121'],
        overrides=dict(epochs=2, batch_size=4, workers=0, warmup_epochs=0, input_size=[3, 64, 64]),
    )
    out = call(capsys, *words, '--dry-run')[1]
    name = 'densenet121-mine-data-e2-batch-size-4-input-size-3-64-64-warmup-epochs-0-s7'
    assert f'to run   {name}\n' in out
    (tmp_path / 'out' / name).mkdir(parents=True)
    with FileLock(tmp_path / 'out' / name / '.lock'):
        assert f'at work  {name}\n' in call(capsys, *words, '--dry-run')[1]
    overrides = '--batch-size 4 --epochs 2 --input-size 3 64 64 --warmup-epochs 0'
    row = dict(run=name, date='2026-01-02', model='densenet121', model_kwargs='', recipe='mine', overrides=overrides)
    row.update(dataset='data', seed=7, epochs=2, params=9, macs=9, top1=50.0, top5=60.0, weights='last', best_epoch=1)
    row.update(best_top1=70.0, images_per_s='', processes=1, device='', versions='', commit='')
    with open(tmp_path / 'results.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, results.COLUMNS)
        writer.writeheader()
        writer.writerow(row)
    status, out, err = call(capsys, *words)
    assert status == 1 and err.startswith('timm-regnet-rnn: no tables: ') and name in err and err.count('\n') == 1
    (tmp_path / 'curves').mkdir()
    lines = [','.join(results.CURVE), '1,0.1,2,1,40,60', '2,0.1,2,1,50,60']
    (tmp_path / 'curves' / f'{name}.csv').write_text('\n'.join([*lines, '']))
    status, out, err = call(capsys, *words)
    assert status == 0 and '| `densenet121` | 0.000 | 0.000 | 50.00 | 60.00 | | n = 1: 7 |' in out, err
    assert out.startswith('**data.** `mine`: 2 epochs, `--batch-size 4')


def planned(device='cpu', size=(3, 32, 32), workers=4, nproc=1, epochs=10):
    """A run with as much of a plan as its surroundings ask for."""
    settings = dict(device=device, input_size=size, workers=workers)
    plan = jobs.Plan(Path('r'), settings, [], nproc, epochs, 'name', Path('none'), Path('t'), '', [], ())
    return jobs.Run(plan, (('d', 'r', 10, ''), ('m', ''), 0), {}, nproc)


@pytest.mark.parametrize(
    'run, gpus, cores, expected',
    [
        (planned(), [], 2, 2),
        (planned(nproc=2), [], 5, 2),
        (planned(nproc=9), [], 2, 1),
        (planned('cuda', workers=3), ['0'], 16, 4),
        (planned('cuda', workers=4), ['0'], 16, 3),
        (planned('cuda', size=(3, 224, 224), workers=1), ['0', '1'], 16, 2),
        (planned('cuda', size=None, workers=1), ['0', '1'], 16, 2),
        (planned('cuda', size=(3, 224, 224), workers=8, nproc=8), list('01234567'), 96, 1),
        (planned('cuda', workers=8), ['0'], 2, 1),
    ],
)
def test_how_much_a_machine_carries(run, gpus, cores, expected):
    assert study.room([run], gpus, cores) == expected


def test_jobs_get_the_idlest_gpus(monkeypatch, tmp_path):
    class Executor:
        folder = tmp_path / 'jobs'

        def map_array(self, function, arguments, env):
            self.env = env
            return [object() for _ in env]

    pytest.importorskip('submitit')
    executor, runs = Executor(), [planned('cuda') for _ in range(5)]
    runs[0].gpus = ['3']
    jobs.start(runs[1:], runs[:1], executor, ['3', '5'], 1)
    assert [env['CUDA_VISIBLE_DEVICES'] for env in executor.env] == ['5', '3', '5', '3']
    assert all(run.state == 'running' for run in runs[1:])
    jobs.start([planned('cuda', nproc=2)], [], executor, ['3', '5'], 1)
    assert executor.env == [dict(CUDA_VISIBLE_DEVICES='3,5')]
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3, 5,7')
    assert study.visible_gpus(runs) == ['3', '5'] and study.visible_gpus([planned()]) == []
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    assert study.visible_gpus(runs) == ['0', '1']


def test_slurm_gets_what_the_runs_need():
    runs = [planned(workers=3, nproc=2), planned(workers=1)]
    found = study.slurm_parameters(runs, None, None, dict(qos='x'), ['time=60', 'constraint=a100', 'exclusive=true'])
    assert found == dict(time=60, cpus_per_task=8, array_parallelism=2, gpus_per_node=2, qos='x') | dict(
        constraint='a100', exclusive=True
    )
    assert 'gpus_per_node' not in study.slurm_parameters(runs, 1, 'cpu', {}, [])


def test_the_table_of_a_terminal(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    curve = []
    monkeypatch.setattr(jobs, 'learning_curve', lambda _: curve)
    run, done, failed = planned(), planned(), planned()
    run.state, done.state, failed.state = 'running', 'done', 'failed'
    run.look()
    assert run.time_left() == ''
    now[0], curve[:] = 3700.0, [dict(top1=10.0), dict(top1=20.5)]
    run.look()
    now[0] = 3800.0
    assert run.time_left() == '3:58:20', 'eight epochs of half an hour, a hundred seconds ago'
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(jobs.board([run, done, failed, planned()]))
    text = console.export_text()
    assert '2/10' in text and '20.50' in text and '3:58:20' in text
    assert '1 of 4 done, 1 running, 1 waiting, 1 failed' in text
