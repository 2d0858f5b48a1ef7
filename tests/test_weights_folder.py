"""A trained model as the folder that goes to the Hub, and a folder that loads without a network."""

import hashlib
import json
import subprocess
import sys

import pytest
import timm
import torch
from conftest import randomize
from hub_server import Fault, environment
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_weights_pull import BODY, NAME
from test_weights_push import checkpoint
from timm.models import save_for_hf

from timm_regnet_rnn.cli import main
from timm_regnet_rnn.errors import UsageError
from timm_regnet_rnn.weights.folder import (
    Trained,
    evaluate,
    pull_folder,
    rebuild,
    sort_metadata,
    tensor_digest,
    write_folder,
)
from timm_regnet_rnn.weights.manifest import embedded_file


@pytest.mark.slow
def test_averaged_weights(hub, client, tmp_path):
    file, net = checkpoint(tmp_path / 'run', ema=True)
    assert client.push(file, '--repo-id', 'org/ema', '--ema', '--folder', tmp_path / 'kept')[0] == 0
    got = load_file(tmp_path / 'kept' / 'model.safetensors')
    assert torch.equal(got['fc.bias'], net.fc.bias + 1)
    file, _ = checkpoint(tmp_path / 'plain')
    assert "has no 'state_dict_ema'" in client.fails(file, '--repo-id', 'org/net', '--ema')


ODD = {
    'model is a number': dict(model=3),
    'model is a list': dict(model=['regnet_convgru_20']),
    'unknown model': dict(model='regnet_convgru_21'),
    'unknown pooling': dict(gp='foo'),
    'unknown argument': dict(model_kwargs=dict(nosuch=1)),
    'arguments are a list': dict(model_kwargs=[1]),
    'data set is a number': dict(dataset=3),
    'folder is a list': dict(data_dir=['a']),
    'odd size': dict(input_size=[3, 24]),
    'size of words': dict(input_size='big'),
    'mean of one channel too few': dict(mean=[0.5, 0.5]),
    'scalar convolution': dict(conv1=torch.ones(())),
    'convolution of another shape': dict(conv1=torch.ones(3, 3)),
    'a word for a convolution': dict(conv1='weights'),
}


@pytest.mark.slow
@pytest.mark.parametrize('odd', ODD)
def test_odd_checkpoints_are_refused_in_a_line(hub, client, tmp_path, odd):
    file, net = checkpoint(tmp_path / 'run')
    state = torch.load(file, weights_only=False)
    change = dict(ODD[odd])
    if 'conv1' in change:
        state['state_dict']['conv1.weight'] = change.pop('conv1')
    vars(state['args']).update(change)
    torch.save(state, file)
    assert len(client.fails(file, '--repo-id', 'org/net', '--dry-run')) < 600 and not hub.requests


@pytest.mark.slow
def test_a_folder_for_a_machine_without_a_network(hub, tmp_path, capsys):
    """An embedded tag, a warm start and somebody's own repository, by the command; then loaded offline."""
    net = randomize(timm.create_model('regnet_convgru_20', num_classes=4, regulated_stages=(2,)))
    save_for_hf(net, tmp_path / 'net', model_args=dict(regulated_stages=[2]), safe_serialization=True)
    hub.add_repo('org/mine', {p.name: p.read_bytes() for p in (tmp_path / 'net').iterdir()})
    resnet = randomize(timm.create_model('resnet18'))
    save_file(resnet.state_dict(), tmp_path / 'resnet18.safetensors')
    hub.add_repo('timm/resnet18.a1_in1k', {'model.safetensors': (tmp_path / 'resnet18.safetensors').read_bytes()})
    hub.faults += [Fault('GET', BODY, flip=5000), Fault('GET', '/resolve/main/config.json', flip=9)]
    lab = tmp_path / 'lab'

    names = NAME, 'regnet_convlstm_18', 'mine'
    command = [
        sys.executable,
        '-m',
        'timm_regnet_rnn',
        'pull',
        '--to',
        lab,
        *names[:2],
        'hf-hub:org/mine',
        'hf-hub:org/no',
    ]
    env = environment(hub, HF_HOME=str(tmp_path / 'cache'))
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f'local-dir:{lab / name}' for name in names], done.stderr
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'no such repository' in done.stderr
    assert [fault.seen > 0 for fault in hub.faults] == [True, True]
    for name in names:
        check = subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=lab / name, capture_output=True, text=True)
        assert check.stdout.count(': OK') == 2 and {p.name for p in (lab / name).iterdir()} == {
            *('model.safetensors', 'config.json', 'SHA256SUMS')
        }
    assert {p.name for p in lab.iterdir()} == {*names}
    # this process is offline
    embedded, warm, mine = (timm.create_model(f'local-dir:{lab / name}', pretrained=True) for name in names)
    assert embedded.pretrained_cfg['label_names'][0] == 'airplane' and mine.num_classes == 4
    assert all(torch.equal(mine.state_dict()[key], value) for key, value in net.state_dict().items())
    assert torch.equal(warm.layer1[0].conv1.weight, resnet.layer1[0].conv1.weight)
    # a file that broke meanwhile is noticed, and pulled again
    weights = lab / NAME / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'?')
    with pytest.raises(OSError, match="model.safetensors' is broken: expected 57f44f73"):
        timm.create_model(f'local-dir:{lab / NAME}', pretrained=True)
    assert main(['pull', NAME, '--to', str(lab)]) == 0
    timm.create_model(f'local-dir:{lab / NAME}', pretrained=True)
    (lab / 'regnet_convlstm_20').mkdir()
    capsys.readouterr()
    for name, words in (
        ('nosuch', "unknown model 'nosuch'; `timm-regnet-rnn list` prints the names."),
        ('resnet18', 'no pretrained weights are called'),
        ('regnet_convgru_56', 'no pretrained weights are called'),
        ('regnet_convlstm_20', 'exists and is none of these folders'),
    ):
        assert main(['pull', name, '--to', str(lab)]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and words in error
    assert {p.name for p in lab.iterdir()} == {*names, 'regnet_convlstm_20'}


# by the functions themselves


def small(folder, **settings):
    """A checkpoint of a net that is built and written in a moment."""
    kwargs = dict(layers=[1, 1, 1], carry='raw')
    return checkpoint(folder, num_classes=2, **{'model_kwargs': kwargs, **settings})


def test_the_model_of_a_checkpoint(tmp_path):
    file, net = small(tmp_path / 'run', ema=True, input_size=[3, 24, 24], data_dir='/data/flowers')
    live, averaged = rebuild(file, ema=False), rebuild(file)
    assert (live.name, live.args, live.epochs) == ('regnet_convgru_20', dict(layers=[1, 1, 1], carry='raw'), 20)
    assert not live.averaged and averaged.averaged and not live.model.training
    assert live.dataset == 'flowers' and live.data_config['input_size'] == (3, 24, 24) and live.labels == []
    for found, step in ((live, 0), (averaged, 1)):
        assert torch.equal(found.model.fc.weight, net.fc.weight + step)
    folder = tmp_path / 'run'
    (folder / 'classes.json').write_text('["cat", "dog"]')
    assert rebuild(folder).labels == ['cat', 'dog']
    for wrong, words in (
        (dict(model='resnet18'), 'is no model of timm_regnet_rnn'),
        (dict(model='nosuch'), 'is no model'),
    ):
        with pytest.raises(UsageError, match=words):
            rebuild(file, **wrong)
    resnet = timm.create_model('cifar_resnet_20', num_classes=2)
    save_file(resnet.state_dict(), tmp_path / 'resnet.safetensors')
    with pytest.raises(UsageError, match='holds no weights of regnet_convgru_20, but those of another model'):
        rebuild(tmp_path / 'resnet.safetensors', model='regnet_convgru_20')


def test_a_written_folder_is_the_model(tmp_path):
    file, net = small(tmp_path / 'run', data_dir='/data/flowers')
    found = rebuild(file)
    found.labels = ['cat', 'dog']
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        write_folder(found, tmp_path / name, release='regnet_convgru_20.mine')
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ('a', 'b')]
    assert files[0] == files[1] and {*files[0]} == {'model.safetensors', 'config.json'}, 'the same each time'
    with safe_open(tmp_path / 'a' / 'model.safetensors', framework='pt') as f:
        metadata = f.metadata()
    assert metadata['model'] == 'regnet_convgru_20.mine' and json.loads(metadata['model_args'])['layers'] == [1, 1, 1]
    twin = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True)
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in net.state_dict().items())
    assert twin.pretrained_cfg['label_names'] == ['cat', 'dog']
    # a file to publish as it is, which holds other weights than the model
    found.file = tmp_path / 'a' / 'model.safetensors'
    with torch.no_grad():
        found.model.fc.bias.add_(1)
    (tmp_path / 'c').mkdir()
    with pytest.raises(RuntimeError, match='does not rebuild the model bit for bit; nothing is sent.'):
        write_folder(found, tmp_path / 'c')


@settings(max_examples=25, deadline=None)
@given(
    st.permutations(['a', 'b', 'c']),
    st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), min_size=1, max_size=4),
)
def test_the_digest_is_of_the_weights_alone(tmp_path_factory, order, metadata):
    """Whatever the metadata and the order in which they were written; metadata are sorted, and stay what they were."""
    folder = tmp_path_factory.mktemp('digest')
    tensors = dict(a=torch.arange(3), b=torch.ones(2, 2).half(), c=torch.zeros(()))
    file = folder / 'net.safetensors'
    save_file({name: tensors[name] for name in order}, file, metadata)
    digest = hashlib.sha256()
    for words, data in (
        ('a int64 (3,)', tensors['a']),
        ('b float16 (2, 2)', tensors['b']),
        ('c float32 ()', tensors['c']),
    ):
        digest.update(f'{words}\0'.encode() + data.numpy().tobytes())
    assert tensor_digest(file) == digest.hexdigest()
    sort_metadata(file)
    assert tensor_digest(file) == digest.hexdigest()
    with safe_open(file, framework='pt') as f:
        assert f.metadata() == metadata
    size = int.from_bytes(file.read_bytes()[:8], 'little')
    assert [*json.loads(file.read_bytes()[8 : 8 + size])['__metadata__']] == sorted(metadata)
    assert load_file(file).keys() == tensors.keys()
    save_file({**tensors, 'c': torch.ones(())}, file)
    assert tensor_digest(file) != digest.hexdigest()
    save_file({**tensors, 'a': torch.arange(3).int()}, file)
    assert tensor_digest(file) != digest.hexdigest()


class Always(torch.nn.Module):
    """A model that ranks its six classes alike for every image."""

    num_classes = 6

    def __init__(self, channels=3):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        assert x.shape[1:] == (self.channels, 8, 8)
        return torch.tensor([0.0, 5.0, 4.0, 3.0, 2.0, 1.0]).expand(len(x), -1)


def test_accuracy_is_counted(tmp_path):
    """Of ten images, three are of the class it ranks first and two of the one it ranks last; in grey as well."""
    for label, count in enumerate((2, 3, 1, 2, 1, 1)):
        folder = tmp_path / 'validation' / f'class{label}'
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', (10, 10)).save(folder / f'{i}.png')
    config = dict(input_size=(3, 8, 8), interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    found = Trained(Always(), 'x', {}, data_config=dict(config, crop_mode='center'))
    assert evaluate(found, str(tmp_path), 'val') == dict(top1=30.0, top5=80.0, images=10, split='val')
    for channels in (1, 2):
        sizes = dict(input_size=(channels, 8, 8), mean=(0.5,) * channels, std=(0.5,) * channels, crop_mode='center')
        grey = Trained(Always(channels), 'x', {}, data_config=dict(config, **sizes))
        if channels == 1:
            assert evaluate(grey, str(tmp_path), 'val')['top1'] == 30.0
        else:
            with pytest.raises(UsageError, match='takes 2 channels; images are read with 1 or 3'):
                evaluate(grey, str(tmp_path), 'val')
    found.model.num_classes = 7
    with pytest.raises(UsageError, match='has 6 classes, the model 7.'):
        evaluate(found, str(tmp_path), 'val')
    with pytest.raises(ValueError, match="no folder 'test' in"):
        evaluate(found, str(tmp_path), 'test')


def test_a_run_as_a_folder(tmp_path):
    """It replaces one of its own, and nothing else; nothing half-made is left beside it."""
    file, net = small(tmp_path / 'mine', data_dir='/data/flowers')
    for source in (file, file.parent):
        folder = pull_folder(str(source), tmp_path / 'lab')
        assert folder == tmp_path / 'lab' / 'mine'
        lines = (folder / 'SHA256SUMS').read_text().splitlines()
        sums = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in ('model.safetensors', 'config.json')
        }
        assert lines == [f'{value}  {name}' for name, value in sums.items()]
        assert [p.name for p in (tmp_path / 'lab').iterdir()] == ['mine']
    twin = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(twin.fc.weight, net.fc.weight)
    assert pull_folder(str(folder / 'model.safetensors'), tmp_path / 'lab').name == 'model'
    (folder / 'SHA256SUMS').unlink()
    with pytest.raises(ValueError, match='exists and is none of these folders'):
        pull_folder(str(file), tmp_path / 'lab')
    with pytest.raises(ValueError, match="no pretrained weights are called 'nosuch'"):
        pull_folder('nosuch', tmp_path / 'lab')
    assert {p.name for p in (tmp_path / 'lab').iterdir()} == {'mine', 'model'}


def test_runs_keep_their_names(tmp_path):
    for rate in ('0.05', '0.01'):
        file, _ = small(tmp_path / f'net-lr-{rate}-s4', data_dir='/data/flowers')
        for source in (file, file.parent):
            assert pull_folder(str(source), tmp_path / 'lab').name == f'net-lr-{rate}-s4'


def test_an_embedded_release_as_a_folder(tmp_path):
    folder = pull_folder(NAME, tmp_path)
    assert (folder / 'model.safetensors').read_bytes() == embedded_file(NAME).read_bytes()
    assert {p.name for p in folder.iterdir()} == {'model.safetensors', 'config.json', 'SHA256SUMS'}


@pytest.mark.parametrize('part', ['config.json', 'model.safetensors', 'SHA256SUMS'])
def test_a_folder_is_what_its_sums_say(tmp_path, part):
    """Its config.json too: another mean is another answer."""
    folder = pull_folder(NAME, tmp_path)
    old = (folder / part).read_bytes()
    changes = {
        'config.json': [old.replace(b'0.4914', b'0.4915')],
        'model.safetensors': [old[:-1] + bytes([old[-1] ^ 1])],
        'SHA256SUMS': [b'', old[: len(old) // 2], old.replace(b'config', b'other'), b'\xff' * 99],
    }
    for new in changes[part]:
        assert new != old
        (folder / part).write_bytes(new)
        with pytest.raises(OSError, match='is broken: (expected|it has no sum of)'):
            timm.create_model(f'local-dir:{folder}', pretrained=True)
