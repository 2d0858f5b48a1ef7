"""A run's folder, or a file of weights, is a model: what it was trained with comes from it, wherever it is used."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import randomize
from PIL import Image
from safetensors.torch import save_file
from test_cli import CAT, call, refused
from timm.data import resolve_data_config

from timm_regnet_rnn.errors import UsageError
from timm_regnet_rnn.images import read_image
from timm_regnet_rnn.inference import check_device, class_names, create, predictions

NAMES = ['oak leaf', 'maple', 'birch', 'fern', 'moss']
ARGS = dict(
    model='regnet_convgru_20',
    model_kwargs=dict(layers=(1, 2, 1), regulated_stages=(1, 3)),
    num_classes=5,
    in_chans=None,
    gp='max',
    input_size=[3, 40, 40],
    img_size=None,
    mean=[0.4, 0.5, 0.6],
    std=[0.3, 0.2, 0.1],
    crop_pct=0.8,
    interpolation='bilinear',
    crop_mode=None,
    data_dir='leaves',
    dataset='',
    model_ema=True,
    lr=0.1,
)


def net(args, seed=0):
    torch.manual_seed(seed)
    kwargs = dict(args['model_kwargs'], num_classes=args['num_classes'], global_pool=args['gp'])
    return randomize(timm.create_model(args['model'].split('.')[0], **kwargs)).eval()


def run_folder(folder, args=ARGS, labels=NAMES):
    """What a run of train.py leaves: live weights, averaged ones, and its options."""
    folder.mkdir()
    live, averaged = net(args), net(args, 1)
    state = dict(epoch=2, arch=args['model'], state_dict=live.state_dict(), optimizer={}, args=Namespace(**args))
    torch.save(dict(state, state_dict_ema=averaged.state_dict()), folder / 'last.pth.tar')
    if labels:
        (folder / 'classes.json').write_text(json.dumps(labels))
    return live, averaged


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    live, averaged = run_folder(tmp_path / 'RUN')
    return live, averaged


def same(model, other):
    mine, its = model.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)


@pytest.mark.parametrize('source', ['RUN', 'RUN/', 'RUN/last.pth.tar', 'name and file', 'name and folder'])
def test_a_run_is_a_model(run, source):
    live, averaged = run
    name, file = ('regnet_convgru_20', 'RUN/last.pth.tar') if source.startswith('name') else (source, None)
    file = 'RUN' if source == 'name and folder' else file
    model = create(name, file)
    assert same(model, averaged) and same(create(name, file, ema=False), live)
    assert not model.training and class_names(model) == NAMES and model.num_classes == 5
    data = resolve_data_config({}, model=model, use_test_size=True)
    assert data['input_size'] == (3, 40, 40) and data['mean'] == (0.4, 0.5, 0.6) and data['std'] == (0.3, 0.2, 0.1)
    assert data['crop_pct'] == 0.8 and data['interpolation'] == 'bilinear'
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(model(x), averaged(x))  # with the run's own pooling


def test_predict_export_and_back(run, capsys):
    (row,) = json.loads(call(capsys, 'predict', CAT, '--model', 'RUN', '--json')[1])
    assert {name for name, _ in row['top']} == set(NAMES)
    image = read_image(CAT)
    short = min(image.size)
    scale = 50 / short  # 40 / 0.8
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 40) / 2), round((resized.height - 40) / 2)
    pixels = np.asarray(resized.crop((left, top, left + 40, top + 40)), dtype=np.float32) / 255
    x = torch.from_numpy((pixels - np.float32(ARGS['mean'])) / np.float32(ARGS['std'])).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = run[1](x).softmax(-1)[0]
    assert dict(row['top']) == pytest.approx(dict(zip(NAMES, expected.tolist())), abs=0.02)

    status, out, err = call(capsys, 'export', 'RUN', '--format', 'safetensors')
    assert status == 0 and out.startswith('RUN.safetensors') and err == ''
    assert json.loads(call(capsys, 'predict', CAT, '--model', 'RUN.safetensors', '--json')[1]) == [row]
    run_folder(Path('MEAN'), dict(ARGS, gp='avg'))  # torch up to 2.11 cannot export a maximum over the image
    status, _, err = call(capsys, 'export', 'MEAN/last.pth.tar', '--format', 'onnx')
    assert status == 0, err
    about = {p.key: p.value for p in onnx.load('MEAN.onnx').metadata_props}
    assert about['model'] == 'regnet_convgru_20' and json.loads(about['input_size']) == [3, 40, 40]
    assert json.loads(about['label_names']) == NAMES and json.loads(about['mean']) == ARGS['mean']
    assert call(capsys, 'visualize', CAT, '--model', 'RUN', '--output', 'a.html')[0] == 0
    assert 'oak leaf' in Path('a.html').read_text(encoding='utf-8')


def test_classes_without_names_are_numbers_not_another_data_sets(tmp_path):
    run_folder(tmp_path / 'ten', dict(ARGS, num_classes=10), labels=None)  # as many as CIFAR-10 has
    assert class_names(create(str(tmp_path / 'ten'))) == [f'class {i}' for i in range(10)]
    run_folder(tmp_path / 'cifar', dict(ARGS, num_classes=10, data_dir='data/cifar10'), labels=None)
    assert class_names(create(str(tmp_path / 'cifar')))[:2] == ['airplane', 'automobile']
    nouns = ['n01443537', 'n02124075', 'n04285008', 'n99999999', 'n07749582']
    run_folder(tmp_path / 'nouns', labels=nouns)
    assert class_names(create(str(tmp_path / 'nouns')))[:4] == ['goldfish', 'Egyptian cat', 'sports car', 'n99999999']


def test_other_channels_and_models_of_timm(tmp_path):
    args = dict(ARGS, model='resnet18', model_kwargs={}, input_size=None, gp='avg')
    run_folder(tmp_path / 'timms', args)
    model = create(str(tmp_path / 'timms'))
    assert type(model).__module__ == 'timm.models.resnet' and class_names(model) == NAMES
    args = dict(ARGS, model_kwargs=dict(in_chans=1), input_size=[1, 32, 32], mean=None, std=None)
    run_folder(tmp_path / 'grey', args)
    model = create(str(tmp_path / 'grey'))
    assert model.conv1.weight.shape[1] == 1 and len(next(predictions(model, [CAT]))['top']) == 5
    assert resolve_data_config({}, model=model)['mean'] == pytest.approx(((0.4914 + 0.4822 + 0.4465) / 3,))


def broken_runs():
    yield 'model', dict(model=7)
    yield 'kwargs', dict(model_kwargs='layers')
    yield 'mean', dict(mean='red')
    yield 'size', dict(input_size=[3])
    yield 'size2', dict(input_size=['a', 'b', 'c'])
    yield 'unknown', dict(model='regnet_convgru_21')
    yield 'pool', dict(gp='foo')


@pytest.mark.parametrize('change', [c for _, c in broken_runs()], ids=[n for n, _ in broken_runs()])
def test_a_checkpoint_that_says_nonsense_is_one_line(change, tmp_path, capsys):
    run_folder(tmp_path / 'good')
    state = torch.load(tmp_path / 'good' / 'last.pth.tar', weights_only=False)
    state['args'] = Namespace(**{**ARGS, **change})
    torch.save(state, tmp_path / 'bad.pth.tar')
    refused(capsys, 'predict', CAT, '--model', tmp_path / 'bad.pth.tar')


def test_refuses(run, capsys, tmp_path):
    (tmp_path / 'empty').mkdir()
    assert "no checkpoint in folder 'empty'" in refused(capsys, 'predict', CAT, '--model', 'empty')
    assert 'is of regnet_convgru_20, not of regnet_convlstm_20' in refused(
        capsys, 'predict', CAT, '--checkpoint', 'RUN'
    )
    assert 'has weights of its own' in refused(capsys, 'predict', CAT, '--model', 'RUN', '--checkpoint', 'RUN')
    torch.save(net(ARGS).state_dict(), 'plain.pth')
    assert 'does not say which model' in refused(capsys, 'predict', CAT, '--model', 'plain.pth')
    Path('RUN/classes.json').write_text('["one"]')
    assert 'must be a JSON list of 5 names' in refused(capsys, 'predict', CAT, '--model', 'RUN')
    assert "Did you mean 'regnet_convlstm_20'?" in refused(capsys, 'predict', CAT, '--model', 'regnet_convlstm20')
    words = refused(capsys, 'predict', CAT, '--model', 'regnet_convlstm_20.cifar_jpeg75')
    assert "has no tag 'cifar_jpeg75'" in words and "Did you mean 'cifar10_jpeg75'?" in words
    assert 'On the Hub it would be hf-hub:me/five' in refused(capsys, 'pull', 'me/five', '--to', 'lab')


@pytest.mark.parametrize('device', ['xpu', 'hpu', 'privateuseone', 'mkldnn', 'meta', 'vulkan', 'cuda:99', 'gpu', ''])
def test_a_device_that_is_not_there(device, capsys):
    assert f'no device {device!r} here, only cpu' in refused(capsys, 'predict', CAT, '--device', device)
    with pytest.raises(UsageError):
        check_device(device)
    assert check_device('cpu').type == 'cpu'


def test_an_older_checkpoint_is_said(run, capsys):
    """Where the last one is damaged; other weights are another answer."""
    last = Path('RUN/last.pth.tar')
    older = torch.load(last, weights_only=False)
    torch.save({**older, 'epoch': older['epoch'] - 1, 'optimizer': {}}, 'RUN/checkpoint-1.pth.tar')
    assert call(capsys, 'predict', CAT, '--model', 'RUN')[2] == ''
    last.write_bytes(last.read_bytes()[:-9])
    status, _, err = call(capsys, 'predict', CAT, '--model', 'RUN')
    assert status == 0 and err.count('\n') == 1
    assert f"last.pth.tar' is damaged, or older; taking checkpoint-1.pth.tar, of {older['epoch']} epochs." in err


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_give_no_answer(value, run, capsys):
    state = torch.load('RUN/last.pth.tar', weights_only=False)
    state['state_dict_ema']['fc.bias'][0] = value
    torch.save(state, 'RUN/last.pth.tar')
    for command in ('predict', 'visualize'):
        assert 'its weights hold NaN or infinity' in refused(capsys, command, CAT, '--model', 'RUN')
    assert not Path('chelsea.html').exists()


@pytest.mark.parametrize('tag', ['regnet_convlstm_20.tiny100_32', 'regnet_convlstm_20.cifar10_jpeg75'])
def test_the_input_is_that_of_the_tag_that_a_run_began_from(tag, tmp_path):
    """train.py takes mean and deviation from the tag; so must whoever reads the run, or its weights beside a tag."""
    want = timm.data.resolve_data_config({}, model=timm.create_model(tag))
    assert want['mean'] != timm.data.resolve_data_config({}, model=timm.create_model('resnet18'))['mean']
    args = dict(ARGS, model=tag, model_kwargs={}, mean=None, std=None)
    folder = tmp_path / 'RUN'
    run_folder(folder, args)
    torch.save(create(str(folder)).state_dict(), tmp_path / 'bare.pth')
    found = [
        create(str(folder)),
        create(tag, folder),
        create(tag.split('.')[0], folder),
        create(tag, tmp_path / 'bare.pth'),
    ]
    for model in found:
        got = resolve_data_config({}, model=model)
        assert all(tuple(got[k]) == tuple(want[k]) for k in ('mean', 'std'))
    save_file(create(str(folder)).state_dict(), tmp_path / 'of.safetensors', dict(model=tag, model_args='{}'))
    got = resolve_data_config({}, model=create(tag.split('.')[0], tmp_path / 'of.safetensors'))
    assert tuple(got['mean']) == tuple(want['mean'])
    other = next(name for name in timm.list_pretrained('regnet_convlstm_20.*') if name != tag)
    got = resolve_data_config({}, model=create(other, folder))  # another tag's name does not change what the run saw
    assert tuple(got['mean']) == tuple(want['mean'])


def test_a_run_of_a_tag_that_is_not_known_here(tmp_path, caplog):
    """Of another version of the package: a word, unless the run says itself what its input is."""
    args = dict(ARGS, model='regnet_convlstm_20.of_tomorrow', model_kwargs={})
    run_folder(tmp_path / 'said', args)
    assert tuple(create(str(tmp_path / 'said')).pretrained_cfg['mean']) == tuple(ARGS['mean']) and not caplog.messages
    run_folder(tmp_path / 'silent', dict(args, mean=None, std=None))
    assert create(str(tmp_path / 'silent')).num_classes == ARGS['num_classes']
    assert len(caplog.messages) == 1 and 'a tag that is not known here' in caplog.messages[0]
    with pytest.raises(UsageError, match="has no tag 'of_tomorrow'"):
        create('regnet_convlstm_20.of_tomorrow', tmp_path / 'silent')
