"""A trained model as the folder that goes to the Hub, and a folder that loads without a network."""

import subprocess
import sys

import pytest
import timm
import torch
from conftest import randomize
from hub_server import Fault, environment
from safetensors.torch import load_file, save_file
from test_weights_pull import BODY, NAME
from test_weights_push import checkpoint
from timm.models import save_for_hf

from timm_regnet_rnn.cli import main


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
        ('regnet_convgru_20', 'no pretrained weights are called'),
        ('regnet_convlstm_20', 'exists and is none of these folders'),
    ):
        assert main(['pull', name, '--to', str(lab)]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and words in error
    assert {p.name for p in lab.iterdir()} == {*names, 'regnet_convlstm_20'}
