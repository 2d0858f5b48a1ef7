"""What is fuzzed: for each target good files, a command that reads them, and what must hold if it succeeds."""

import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import random
import shutil
import tarfile
import zipfile
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict
from unittest.mock import patch

import fuzz_mutants
import timm
import torch
import yaml
from PIL import Image

from timm_regnet_rnn import autoload, cli, results
from timm_regnet_rnn.training import record, study
from timm_regnet_rnn.training import run as training
from timm_regnet_rnn.weights import manifest, verify
from timm_regnet_rnn.weights.folder import pull_folder

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / 'tests' / 'stand_in'
OPTIONS = json.loads((ROOT / 'train_recipes' / 'options.json').read_text(encoding='utf-8'))['options']
TAG = 'regnet_convlstm_20.cifar10_jpeg75'
IMAGES = fuzz_mutants.images()


def script(name):
    """A script of train_recipes as a module."""
    spec = importlib.util.spec_from_file_location(f'fuzzed_{name}', ROOT / 'train_recipes' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPTS = {name: script(name) for name in ('results', 'prepare_data')}
TARGETS: Dict[str, 'Target'] = {}


@dataclasses.dataclass
class Target:
    """A command and what it reads.

    Attributes:
        build: Fills a folder.
        files: What is changed there, file -> kind of mutant.
        command: Runs in the folder; its exit status.
        holds: Given folder, stdout, stderr, the change and what the unchanged case printed: what is wrong, or ''.
        left: Pattern of what may be there after a refusal.
        lines: At most so many lines of error.
        silent: Whether success says nothing on stderr.
        every: One of so many rounds.
        remember: Given folder and stdout of the unchanged case: what `holds` compares with.
        expected: That.
    """

    build: Callable
    files: Dict[str, str]
    command: Callable
    holds: Callable = lambda *_: ''
    left: str = '$.'
    lines: int = 1
    silent: bool = True
    every: int = 1
    remember: Callable = lambda box, out: out
    expected: Any = None

    def change(self, draw: random.Random, box: Path) -> str:
        """Change one of the files, now and then two."""
        names = list(self.files)
        done = []
        for name in draw.sample(names, min(len(names), draw.choice([1, 1, 1, 1, 2]))):
            done.append(f'{name} {fuzz_mutants.replace(draw, box / name, self.files[name])}')
        return ', '.join(done)

    def run(self, box: Path) -> int:
        """The command's exit status."""
        with ExitStack() as stack:
            for where in ('run', 'study'):
                stack.enter_context(patch(f'timm_regnet_rnn.training.{where}.train_options', lambda _: OPTIONS))
            stack.enter_context(patch.object(training, 'run_logged', lambda *_: 1))
            stack.enter_context(patch.object(training, 'code_commit', lambda: ''))
            return self.command(box)


def main(*words):
    """The command `timm-regnet-rnn`."""
    return lambda box: cli.main([str(word) for word in words])


def predictions(out):
    """What `predict --json` printed; ValueError where it is no probability."""
    rows = json.loads(out, parse_constant=lambda word: float('nan'))
    for row in rows:
        for name, p in row['top']:
            if not isinstance(name, str) or not 0 <= p <= 1 or not math.isfinite(p):
                raise ValueError(f'{name}: {p}')
    return rows


def sound(box, out, err, change, expected):
    """Probabilities are numbers."""
    try:
        predictions(out)
    except ValueError as e:
        return f'no probabilities: {e}'
    return ''


def same(box, out, err, change, expected):
    """Nothing else than from the unchanged files."""
    if out == expected or 'taking ' in err:
        return ''
    return f'other output: {out[:150]!r}'


def same_unless(*words):
    """As `same`, where the change is none of those that cannot be told from what somebody meant."""

    def holds(box, out, err, change, expected):
        if any(word in change for word in words):
            return sound(box, out, err, change, expected) if out.startswith('[') else ''
        return same(box, out, err, change, expected)

    return holds


def small():
    """A net of milliseconds."""
    torch.manual_seed(1)
    return timm.create_model('regnet_convrnn_20', num_classes=2, **KWARGS)


KWARGS = dict(layers=(1, 1, 1), channels=(8, 8, 8))
WORDS = ('--model-kwargs', 'layers=(1,1,1)', 'channels=(8,8,8)', '--num-classes', '2', '--epochs', '3', '--seed', '7')
TRAIN = (
    *(
        'train',
        'recipe.yaml',
        '--model',
        'regnet_convrnn_20',
        '--data-dir',
        'data',
        *WORDS,
        '--device',
        'cpu',
        '-j',
        '0',
    ),
    *('--batch-size', '4', '--output', 'run', '--results', 'rows/results.csv', '--timm-dir', STAND_IN),
)


def build_data(box):
    """A data set of two classes, and a recipe for it."""
    for split, side in (('train', 40), ('test', 32)):
        for label, name in enumerate(('cat', 'dog')):
            (box / 'data' / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new('RGB', (side, side), (60 * i, 100 * label, 50)).save(box / 'data' / split / name / f'{i}.png')
    (box / 'data' / 'prepared.json').write_text(json.dumps(dict(dataset='flowers', pad=4)))
    shutil.copy(ROOT / 'train_recipes' / 'cifar_paper.yaml', box / 'recipe.yaml')
    (box / 'rows').mkdir()


def build_run(box):
    """A finished run without its row; and rows of others."""
    build_data(box)
    plan = training.plan(
        *(str(box / 'recipe.yaml'), 'regnet_convrnn_20', str(box / 'data')),
        *([*WORDS, '--device', 'cpu', '-j', '0', '--batch-size', '4'], STAND_IN / 'train.py', OPTIONS),
        *(str(box / 'run'), str(box / 'rows' / 'results.csv')),
    )
    run = box / 'run'
    run.mkdir()
    settings = dict(plan.settings, data_dir='data')
    (run / 'args.yaml').write_text(yaml.safe_dump(settings))
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch, name in ((1, 'checkpoint-1'), (2, 'last')):
        with torch.no_grad():
            net.fc.bias += 0.1
        state = dict(epoch=epoch, arch='regnet_convrnn_20', version=2, metric=50.0, args=Namespace(**settings))
        state.update(state_dict=net.state_dict(), optimizer=optimizer.state_dict())
        torch.save(state, run / f'{name}.pth.tar')
    lines = [f'{i},{2.5 - i / 4},{1.5 - i / 8},{50.5 + i},{99.5 - i},0.0{5 - i}' for i in range(3)]
    (run / 'summary.csv').write_text('\n'.join(['epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', *lines, '']))
    (run / 'train.log').write_text('Train: 0 [  49/50 (100%)]  Loss: 2.1  Time: 0.1s, 99.0/s  (0.100s, 101.00/s)\n')
    (run / 'classes.json').write_text('["cat", "dog"]\n')
    add_row(box / 'rows' / 'results.csv', 'other', seed=1)
    shutil.copy(sorted((ROOT / 'docs').glob('chelsea.jpg'))[0], box / 'cat.jpg')


def add_row(table, name, **values):
    """A sound row and its curve."""
    row = dict(
        *(dict(run=name, date='2026-01-01', model='regnet_convlstm_20', model_kwargs='', recipe='cifar_paper'),),
        **dict(overrides='--epochs 3', dataset='CIFAR-10', seed=0, epochs=3, params=311450, macs=49316480, top1=83.68),
        **dict(top5=99.36, weights='last', best_epoch=3, best_top1=83.68, images_per_s='317', processes=1),
        **dict(device='AMD EPYC, 1 thread', versions='timm 1.0.31, torch 2.15.0', commit='65e485c24adc'),
    )
    curve = [dict(epoch=i + 1, lr=0.1, train_loss=2.0 - i, eval_loss=1.5, top1=60.0 + i, top5=99.0) for i in range(3)]
    record.append_row(table, {**row, **values}, curve)


def recorded(box, out, err, change, expected):
    """One row more, which is that of the unchanged run where only the tail of a file was lost."""
    rows = list(csv.DictReader((box / 'rows' / 'results.csv').open(newline='', encoding='utf-8-sig')))
    mine = [row for row in rows if row['run'].startswith('regnet_convrnn_20-')]
    if len(mine) != 1 and 'results.csv' not in change:
        return f'{len(mine)} rows'
    found = row_of(box) if mine else {}
    lost = ('truncate', 'delete', 'line', 'empty', 'numbers', 'file:')
    if (
        all(any(word in part for word in lost) for part in change.split(', '))
        and 'results.csv' not in change
        and found != expected
    ):
        return f'row {found}'
    return ''


def row_of(box, out=''):
    """The run's row, as far as it depends on what was trained."""
    rows = csv.DictReader((box / 'rows' / 'results.csv').open(newline='', encoding='utf-8-sig'))
    mine = [row for row in rows if row['run'].startswith('regnet_convrnn_20-')]
    return {key: mine[-1][key] for key in ('model', 'overrides', 'seed', 'epochs', 'top1', 'top5', 'weights')}


def tables_of(box, out=''):
    """The folder's CSV files."""
    return {file.name: file.read_text() for file in (box / 'rows').rglob('*.csv')}


def build_results(box):
    """Rows, curves, early exits and pages."""
    (box / 'rows').mkdir()
    for seed in (0, 1):
        add_row(box / 'rows' / 'results.csv', f'reg-s{seed}', seed=seed)
        sizes = dict(model='cifar_resnet_20', params=272474, macs=40813184, top1=82.5 + seed)
        add_row(box / 'rows' / 'results.csv', f'res-s{seed}', seed=seed, **sizes)
    (box / 'rows' / 'early_exit.csv').write_text(f'{",".join(results.EARLY_EXIT)}\n{TAG},10000,40.1,60.2,83.9,0.31\n')
    parts = []
    for name in ('results', 'differences', 'exits'):
        parts += [SCRIPTS['results'].START.format(name), 'old', SCRIPTS['results'].END.format(name)]
    (box / 'page.md').write_text('\n\n'.join(['# Page', *parts, 'end\n']))


def made_of_whole_rows(box, out, err, change, expected):
    """A cut table is refused, or loses whole rows only."""
    if 'truncate' not in change:
        return ''
    for name in change.split(', '):
        file = box / name.split(' ')[0]
        if file.is_file() and file.suffix == '.csv' and 'truncate' in name:
            old = (expected or {}).get(file.name, '').splitlines()
            lost = [line for line in file.read_text(encoding='utf-8', errors='replace').splitlines() if line not in old]
            if lost and old:
                return f'{file.name}: took {lost[-1][-80:]!r} for a row'
    return ''


def run_results(*words):
    """results.py on the folder's own files."""
    return lambda box: SCRIPTS['results'].main(
        list(words), results=box / 'rows' / 'results.csv', pages=(box / 'page.md',)
    )


STUDY = dict(
    recipe='recipe.yaml',
    data_dir='data',
    num_classes=2,
    seeds=[0, 1],
    overrides=dict(epochs=3, batch_size=4, workers=0),
    models=['cifar_resnet_20', dict(model='regnet_convlstm_20', model_kwargs=dict(carry='raw'))],
)


def build_study(box):
    """A study all of whose rows are there."""
    build_data(box)
    table = box / 'rows' / 'results.csv'
    (box / 'study.yaml').write_text(yaml.safe_dump(STUDY, sort_keys=False))
    for run in planned(box):
        settings = run.plan.settings
        values = dict(model=settings['model'], model_kwargs=record.model_kwargs(settings), recipe='recipe')
        values.update(overrides=record.overrides(settings, run.plan.given), dataset='flowers', seed=settings['seed'])
        values.update(params=272474 if 'resnet' in settings['model'] else 311450)
        add_row(table, run.plan.name, **values)


def planned(box):
    """The runs of the study."""
    spec = dict(STUDY, recipe=str(box / 'recipe.yaml'), data_dir=str(box / 'data'))
    with patch.object(study, 'train_options', lambda _: OPTIONS):
        return study.plan_runs(
            study.read_groups(spec, 'x'), 'x', str(box / 'rows' / 'results.csv'), 'output', str(STAND_IN), 'cpu', True
        )


def run_study(*more):
    """`study` whose jobs do nothing."""

    def command(box):
        with patch.object(study, 'make_executor', lambda *_: None), patch.object(study, 'work', lambda *_: True):
            words = ('study', 'study.yaml', '--output', 'output', '--results', 'rows/results.csv', '--device', 'cpu')
            return cli.main([*words, '--timm-dir', str(STAND_IN), *more])

    return command


def build_weights(box):
    """Embedded weights, what they compute, and a folder that was pulled."""
    (box / 'weights').mkdir()
    shutil.copy(ROOT / 'timm_regnet_rnn' / 'weights' / f'{TAG}.safetensors', box / 'weights')
    shutil.copy(ROOT / 'timm_regnet_rnn' / 'weights' / 'checks' / f'{TAG}.safetensors', box / 'check.safetensors')
    (box / 'rgb.png').write_bytes(IMAGES['rgb.png'])


def embedded(*words):
    """A command of a package whose embedded weights are the folder's."""

    def command(box):
        (box / 'checks').mkdir()
        if (box / 'check.safetensors').is_file() and not (box / 'check.safetensors').is_symlink():
            shutil.copy(box / 'check.safetensors', box / 'checks' / f'{TAG}.safetensors')
        with patch.object(manifest, 'HERE', box / 'weights'), patch.object(verify, 'HOME', box):
            return cli.main(list(words))

    return command


def build_pulled(box):
    """A folder that `pull` made."""
    pull_folder(TAG, box)
    (box / TAG).rename(box / 'net')
    (box / 'rgb.png').write_bytes(IMAGES['rgb.png'])


def build_bare(box):
    """A small net's folder that has no sums, and one file of its weights that says what it is of."""
    build_run(box)
    pull_folder(str(box / 'run'), box / 'lab')
    (box / 'lab' / 'run').rename(box / 'net')
    (box / 'net' / 'SHA256SUMS').unlink()
    shutil.copy(box / 'net' / 'model.safetensors', box / 'w.safetensors')


def exported(box, out, err, change, expected):
    """The file is there, and predicts."""
    return '' if (box / 'o.safetensors').is_file() else 'no file'


def build_tar(box):
    """A mirror of four classes."""
    out = io.BytesIO()
    picture = io.BytesIO()
    Image.new('RGB', (32, 32), (9, 99, 199)).save(picture, 'jpeg')
    with tarfile.open(fileobj=out, mode='w:xz') as tar:
        for split, count in (('train', 2), ('test', 1)):
            for name in ('bird', 'cat'):
                for i in range(count):
                    member = tarfile.TarInfo(f'{split}/{name}/{i}.jpg')
                    member.size = len(picture.getvalue())
                    tar.addfile(member, io.BytesIO(picture.getvalue()))
    (box / 'mirror.tar.xz').write_bytes(out.getvalue())


def build_zip(box):
    """A Tiny-ImageNet of two classes of one image."""
    picture = io.BytesIO()
    Image.new('RGB', (64, 64), (9, 99, 199)).save(picture, 'jpeg')
    ids = ('n00000001', 'n00000002')
    with zipfile.ZipFile(box / 'tiny.zip', 'w') as archive:
        archive.writestr('tiny/wnids.txt', '\n'.join(ids) + '\n')
        archive.writestr('tiny/words.txt', ''.join(f'{wnid}\tname {wnid}, other\n' for wnid in ids))
        lines = [f'val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n' for i, wnid in enumerate(ids)]
        archive.writestr('tiny/val/val_annotations.txt', ''.join(lines))
        for i, wnid in enumerate(ids):
            archive.writestr(f'tiny/train/{wnid}/images/{wnid}_0.JPEG', picture.getvalue())
            archive.writestr(f'tiny/val/images/val_{i}.JPEG', picture.getvalue())


def prepare(dataset, file, *words, **sizes):
    """prepare_data.py on an archive that has the sum it should have, so that what is in it counts."""

    def command(box):
        module = SCRIPTS['prepare_data']
        sums = {}
        if dataset != 'tiny-imagenet' and (box / file).is_file() and not (box / file).is_symlink():
            sums = {file: hashlib.sha256((box / file).read_bytes()).hexdigest()}
        elif dataset != 'tiny-imagenet':
            sums = {file: 'x' * 64}
        spec = dataclasses.replace(module.SOURCES[dataset], sums=sums, **sizes)
        with patch.dict(module.SOURCES, {dataset: spec}):
            return module.main([dataset, '--to', 'made', '--from', file, *words])

    return command


def prepared(box, out, err, change, expected):
    """What was made is whole: as many images in as many classes; of an archive all that were decoded can be read.

    An archive's test images are copied, which its sum, set aside here, vouches for.
    """
    files = sorted(
        p.relative_to(box / 'made') for p in (box / 'made').rglob('*') if p.suffix in ('.jpg', '.png', '.JPEG')
    )
    archive = (box / 'mirror.tar.xz').exists()
    for file in files:
        if archive and file.parts[0] == 'test':
            continue
        try:
            with Image.open(box / 'made' / file) as image:
                image.load()
        except Exception as e:
            return f'{file}: {type(e).__name__} {e}'
    return '' if len(files) == (6 if archive else 4) else f'{len(files)} images'


def build_nothing(box):
    """No file but an image."""
    (box / 'argv.json').write_text('["list"]')
    (box / 'rgb.png').write_bytes(IMAGES['rgb.png'])


class Words(Target):
    """Commands with odd arguments."""

    def change(self, draw, box):
        odd = [str(v) for v in fuzz_mutants.NASTY if isinstance(v, (str, int, float)) and v != fuzz_mutants.HUGE]
        odd = [w.replace('\0', '').replace('\ud800', '\udc80') for w in odd]
        command = draw.choice(
            ['list', 'predict', 'visualize', 'export', 'pull', 'push', 'verify', 'train', 'study', 'autoload']
        )
        flags = draw.sample(
            [
                '--model',
                '--topk',
                '--json',
                '--sort',
                '--pretrained',
                '--checkpoint',
                '--device',
                '--format',
                '--output',
            ]
            + ['--to', '--tag', '--repo-id', '--dry-run', '--data-dir', '--results', '--jobs', '--ema', '--image-size']
            + ['--batch-size', '--status', '--labels', '--folder', '--all', 'rgb.png', TAG, 'onnx', 'safetensors'],
            draw.randrange(5),
        )
        words = [command]
        for flag in flags:
            words += [flag, *draw.choices(odd, k=draw.choice([0, 1, 1, 2]))]
        (box / 'argv.json').write_text(json.dumps(words))
        return ' '.join(words)[:150].encode('ascii', 'backslashreplace').decode()


def run_words(box):
    """The command in argv.json, its files in the folder."""
    words = json.loads((box / 'argv.json').read_text())
    with patch.object(autoload, '_site_dirs', lambda: [box]):
        return cli.main(words)


def build_site(box):
    """A folder of packages."""
    (box / 'site').mkdir()
    (box / 'site' / autoload.FILENAME).write_text('import sys\n')


def run_autoload(box):
    """Status, then disable."""
    with patch.object(autoload, '_site_dirs', lambda: [box / 'site']):
        return cli.main(['autoload', '--status']) or cli.main(['autoload', '--disable'])


PREDICT = ('predict', 'cat.jpg', '--json', '--model')
RUN = {'run/last.pth.tar': 'checkpoint', 'run/classes.json': 'json'}
MEANT = ('args', 'values', 'weights', 'classes.json')  # what somebody may have meant
LOCKS = r'^(run/(\.lock|classes\.json|result\.tmp|train\.log)|rows/(\.results\.csv\.lock|results.csv|curves(/.*)?))$'

for name, data in IMAGES.items():
    TARGETS[f'image {name}'] = Target(
        lambda box, name=name, data=data: (box / name).write_bytes(data),
        {name: 'image'},
        main('predict', name, '--json'),
        sound,
        lines=2 if name == 'lzw.tiff' else 1,  # libtiff, which Pillow calls, has a line of its own
    )
TARGETS.update(
    predict_run=Target(build_run, RUN, main(*PREDICT, 'run'), same_unless(*MEANT), silent=False),
    predict_weights=Target(
        build_bare,
        {'w.safetensors': 'safetensors'},
        main(*PREDICT, 'w.safetensors'),
        same_unless('numbers', 'flip', 'fill', 'swap', 'share', 'metadata', 'rename', 'drop', 'value', 'poison'),
    ),
    predict_pulled=Target(
        build_pulled,
        {'net/config.json': 'json', 'net/model.safetensors': 'safetensors', 'net/SHA256SUMS': 'text'},
        main('predict', 'rgb.png', '--json', '--model', 'net'),
        same_unless('SHA256SUMS file: missing'),
    ),
    predict_config=Target(build_bare, {'net/config.json': 'json'}, main(*PREDICT, 'net'), sound),
    predict_embedded=Target(
        build_weights,
        {f'weights/{TAG}.safetensors': 'safetensors'},
        embedded('predict', 'rgb.png', '--json', '--model', TAG),
        same,
        left='^checks',
    ),
    verify=Target(
        build_weights,
        {f'weights/{TAG}.safetensors': 'safetensors', 'check.safetensors': 'safetensors'},
        embedded('verify', TAG),
        same_unless('check'),
        left='^checks',
    ),
    visualize=Target(
        build_run,
        {**RUN, 'cat.jpg': 'image'},
        main('visualize', 'cat.jpg', '--model', 'run', '--output', 'o.html'),
        silent=False,
    ),
    export=Target(
        build_run,
        RUN,
        main('export', 'run', '--format', 'safetensors', '--output', 'o.safetensors'),
        exported,
        silent=False,
    ),
    pull=Target(
        build_run, {**RUN, 'data/prepared.json': 'json'}, main('pull', 'run', '--to', 'lab'), left='^lab$', silent=False
    ),
    push=Target(
        build_run,
        {**RUN, 'rows/results.csv': 'text', 'data/prepared.json': 'json'},
        main('push', 'run', '--repo-id', 'a/b', '--dry-run', '--folder', 'kept', '--results', 'rows/results.csv'),
        silent=False,
    ),
    train_ends=Target(
        build_run,
        {
            **RUN,
            'run/summary.csv': 'text',
            'run/args.yaml': 'text',
            'run/train.log': 'text',
            'rows/results.csv': 'text',
            'run/checkpoint-1.pth.tar': 'checkpoint',
        },
        main(*TRAIN),
        recorded,
        left=LOCKS,
        remember=row_of,
    ),
    train_starts=Target(
        build_data,
        {'recipe.yaml': 'text', 'data/prepared.json': 'json', 'data/train/cat/0.png': 'image'},
        main(*TRAIN, '--dry-run'),
        silent=False,
    ),
    study_starts=Target(
        build_study, {'study.yaml': 'text', 'recipe.yaml': 'text'}, run_study('--dry-run'), silent=False
    ),
    study_ends=Target(
        build_study,
        {'rows/results.csv': 'text', 'study.yaml': 'text'},
        run_study(),
        made_of_whole_rows,
        left='^rows/',
        silent=False,
        remember=tables_of,
    ),
    results=Target(
        build_results,
        {
            'rows/results.csv': 'text',
            'rows/curves/reg-s0.csv': 'text',
            'rows/early_exit.csv': 'text',
            'page.md': 'text',
        },
        run_results(),
        made_of_whole_rows,
        remember=tables_of,
    ),
    plots=Target(
        build_results,
        {'rows/results.csv': 'text', 'rows/curves/reg-s0.csv': 'text', 'rows/early_exit.csv': 'text'},
        run_results('--plots', 'plots'),
        every=12,
        silent=False,
    ),
    prepare_tar=Target(
        build_tar,
        {'mirror.tar.xz': 'tar'},
        prepare('cifar10_jpeg75', 'mirror.tar.xz', '--pad', '4', train=4, test=2, classes=2),
        prepared,
        silent=False,
    ),
    prepare_tar_as_it_is=Target(
        build_tar,
        {'mirror.tar.xz': 'tar'},
        prepare('cifar10_jpeg75', 'mirror.tar.xz', train=4, test=2, classes=2),
        silent=False,
    ),
    prepare_zip=Target(
        build_zip,
        {'tiny.zip': 'zip'},
        prepare('tiny-imagenet', 'tiny.zip', '--size', '32', train=2, test=2, classes=2),
        prepared,
        silent=False,
    ),
    words=Words(build_nothing, {}, run_words, left='^(lab|output)', lines=3, silent=False),
    autoload=Target(build_site, {f'site/{autoload.FILENAME}': 'text'}, run_autoload, every=4),
)


def make_base(base: Path) -> None:
    """The good files of every target."""
    with torch.inference_mode():
        timm.create_model(TAG, pretrained=True).eval()(torch.zeros(1, 3, 32, 32))  # its kernel is loaded once
    for name, target in TARGETS.items():
        (base / name).mkdir(parents=True)
        target.build(base / name)
