import argparse
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import TRAIN_PY
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_regnet_rnn.training.recipe import check_recipe, load_recipe, train_options

FOLDER = Path(__file__).parent.parent / 'train_recipes'
RECIPES = sorted(path for path in FOLDER.rglob('*.yaml') if path.parent.name != 'studies')
OPTIONS = json.loads((FOLDER / 'options.json').read_text(encoding='utf-8'))['options']
# What train.py assumes where a recipe is silent, as far as the tests below depend on it.
DEFAULTS = dict(
    opt='sgd',
    momentum=0.9,
    weight_decay=2e-5,
    opt_kwargs={},
    sched='cosine',
    sched_on_updates=False,
    epochs=300,
    decay_epochs=90,
    decay_rate=0.1,
    min_lr=0,
    warmup_epochs=5,
    warmup_lr=1e-5,
    ratio=[3 / 4, 4 / 3],
    hflip=0.5,
)


def settings(name):
    return argparse.Namespace(**{**DEFAULTS, **load_recipe(FOLDER / f'{name}.yaml')})


def learning_rates(args, updates_per_epoch=4):
    """The rate of the first update of every epoch, and of the last update of all, stepped as train.py does."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    rates, updates = [], 0
    for epoch in range(epochs):
        for k in range(updates_per_epoch):
            rate = optimizer.param_groups[0]['lr']
            if k == 0:
                rates.append(rate)
            updates += 1
            scheduler.step_update(updates)
        scheduler.step(epoch + 1)
    return rates, rate


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_what_train_py_takes(path):
    config = load_recipe(path)
    assert check_recipe(config, OPTIONS) == []
    assert config['device_modules'] == ['timm_regnet_rnn']
    assert {'epochs', 'batch_size', 'lr'} <= set(config)
    if path.stem == 'finetune':  # for any folder: size and mean by the model, classes by the data
        assert not {'input_size', 'num_classes', 'mean', 'std', 'crop_pct', 'train_split', 'val_split'} & set(config)
    elif config['input_size'][1] <= 32:
        assert config['num_classes'] == 10 and config['val_split'] == 'test'
    else:
        assert config['num_classes'] == 1000
    # these belong to the command line
    assert not {'model', 'data', 'data_dir', 'output', 'device', 'resume', 'workers', 'seed'} & set(config)


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_every_recipe_opens_with_its_header(path):
    lines = path.read_text(encoding='utf-8').splitlines()
    header = lines[: next(k for k, line in enumerate(lines) if not line.startswith('#'))]
    fields = [line[2:].split(':')[0] for line in header if line[2:3].isupper() and line[11:12] == ' ' and ':' in line]
    assert fields[:6] == ['Purpose', 'Source', 'Launch', 'Change', 'Expected', 'Hardware']
    assert f'--config {path.name}' in '\n'.join(header)
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_every_schedule_runs_in_timm(path):
    args = settings(path.stem)
    rates, last = learning_rates(args)
    assert len(rates) == args.epochs
    assert rates[0] == pytest.approx(args.warmup_lr if args.warmup_epochs else args.lr)
    # a cosine has moved a little when the warm-up is over
    assert 0.9 * args.lr < rates[args.warmup_epochs] <= args.lr * (1 + 1e-9) and max(rates) <= args.lr * (1 + 1e-9)
    assert last <= args.lr / 20


@pytest.mark.parametrize(
    'name, expected',
    [
        ('cifar_paper', {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 199: 0.001}),
        ('imagenet_paper', {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 1e-3, 89: 1e-3, 90: 1e-4, 99: 1e-4}),
        ('cifar_modern', {0: 0.01, 5: 0.2 * (1 + np.cos(np.pi * 5 / 200)) / 2, 100: 0.1}),
        ('imagenet_a3', {0: 1e-4, 1: 1e-4 + 7.9e-3 / 5, 50: 4e-3}),
        ('imagenet_a2', {0: 1e-4, 1: 1e-4 + 4.9e-3 / 5, 150: 2.5e-3}),
        ('fashion_mnist', {0: 0.01, 5: 0.05}),
    ],
)
def test_learning_rate_by_epoch(name, expected):
    rates, _ = learning_rates(settings(name))
    assert {epoch: rates[epoch] for epoch in expected} == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_every_optimizer_exists_with_its_options(path):
    args = settings(path.stem)
    model = timm.create_model('regnet_convrnn_20')
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    decays = {group['weight_decay'] for group in optimizer.param_groups}
    paper = path.stem.endswith('_paper')
    assert decays == ({args.weight_decay} if paper else {0.0, args.weight_decay})  # the papers' spare no parameter
    if args.opt in ('sgd', 'momentum'):
        assert all(group['nesterov'] != paper for group in optimizer.param_groups)


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_binary_cross_entropy_is_not_dropped(path):
    config = load_recipe(path)
    if config.get('bce_loss'):  # else train.py takes plain cross-entropy without a word
        assert config['mixup'] > 0 or config['cutmix'] > 0 or config['smoothing'] > 0


def test_the_papers_crop_is_a_shift():
    """Of a 40x40 image, cifar_paper takes each 32x32 window or its mirror image, pixel by pixel."""
    args = settings('cifar_paper')
    transform = create_transform(
        tuple(args.input_size),
        is_training=True,
        use_prefetcher=True,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        interpolation='random',
    )
    rows, columns = np.mgrid[:40, :40].astype(np.uint8)
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=2)
    seen = set()
    for _ in range(2000):
        out = np.asarray(transform(Image.fromarray(image))).transpose(1, 2, 0)
        top, left, mirrored = int(out[0, 0, 0]), int(out[0, :, 1].min()), bool(out[0, 0, 1] > out[0, -1, 1])
        window = image[top : top + 32, left : left + 32]
        assert np.array_equal(out, window[:, ::-1] if mirrored else window)
        seen.add((top, left, mirrored))
    assert seen == {(i, j, m) for i in range(9) for j in range(9) for m in (False, True)}


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: p.stem)
def test_the_launch_lines_train_with_the_batch_of_the_recipe(recipe):
    """It is that of all processes for `timm-regnet-rnn train`, that of one for train.py."""
    text = recipe.read_text(encoding='utf-8').replace('\\\n#', '')
    whole = yaml.safe_load(text)['batch_size']
    lines = re.findall(r'(timm-regnet-rnn train .*|torchrun .*|python train.py .*)', text)
    assert lines
    for line in lines:
        batch = re.search(r'--batch-size (\d+)', line)
        if line.startswith('torchrun'):
            assert int(batch[1]) * int(re.search(r'--nproc_per_node (\d+)', line)[1]) == whole
        else:
            assert batch is None


@pytest.mark.parametrize('name, channels', [('cifar_paper', 3), ('cifar_modern', 3), ('fashion_mnist', 1)])
@pytest.mark.parametrize('model', ['cifar_resnet_20', 'regnet_convlstm_20'])
def test_normalisation(name, channels, model):
    """CIFAR's mean comes from the model, so that the recipe need not name it; Fashion-MNIST's from the recipe."""
    config = load_recipe(FOLDER / f'{name}.yaml')
    data = resolve_data_config(config, model=timm.create_model(model, in_chans=config['input_size'][0]))
    assert data['input_size'] == tuple(config['input_size']) and data['crop_pct'] == 1.0
    assert data['mean'] == ((0.4914, 0.4822, 0.4465) if channels == 3 else (0.2860,))
    assert data['std'] == ((0.2470, 0.2435, 0.2616) if channels == 3 else (0.3530,))


@pytest.fixture
def record(monkeypatch, tmp_path, capsys):
    """record_options.py as a function of its arguments that writes into the test's folder."""
    spec = importlib.util.spec_from_file_location('record_options', FOLDER / 'record_options.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'OPTIONS', tmp_path / 'options.json')

    def call(*argv):
        monkeypatch.setattr('sys.argv', ['record_options.py', *map(str, argv)])
        return module.main(), capsys.readouterr().err

    return call


def test_the_list_is_recorded_and_checked(record, checkout, tmp_path):
    status, err = record(checkout, '--check')
    assert status == 1 and err.count('\n') == 1 and not (tmp_path / 'options.json').exists()
    assert record(checkout) == (0, '') and record(checkout, '--check') == (0, '')
    recorded = json.loads((tmp_path / 'options.json').read_text())
    assert recorded['timm_version'] == '9.9.9' and len(recorded['train_py_sha256']) == 64
    assert recorded['options'] == train_options(checkout / 'train.py')
    (checkout / 'train.py').write_text(TRAIN_PY.replace('--amp', '--fast'))
    status, err = record(checkout, '--check')
    assert status == 1 and 'amp, fast' in err and err.count('\n') == 1


def test_a_folder_that_is_no_checkout(record, tmp_path):
    for folder in (tmp_path / 'none', tmp_path):
        status, err = record(folder)
        assert status == 2 and err.count('\n') == 1 and repr(str(folder)) in err
