"""hub/push.py against the stand-in through the unmodified huggingface_hub; timm and transformers load what it sent."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomize
from hub_server import Fault
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_weights_pull import environment

from timm_regnet_rnn.results import COLUMNS
from timm_regnet_rnn.weights.manifest import RELEASED

pytestmark = pytest.mark.slow

HUB = Path(__file__).parent.parent / 'hub'
TAG = 'regnet_convlstm_20.cifar10_jpeg75'
EMBEDDED = HUB.parent / 'timm_regnet_rnn' / 'weights' / f'{TAG}.safetensors'
FILES = {'model.safetensors', 'config.json', 'README.md'}


def checkpoint(folder, model='regnet_convgru_20', epoch=19, ema=None, channels_last=False, dtype=None, **settings):
    """A file such as train.py leaves behind."""
    kwargs = settings.get('model_kwargs', {})
    sizes = {k: settings[k] for k in ('num_classes', 'in_chans') if k in settings}
    net = randomize(timm.create_model(model, **kwargs, **sizes))
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    args = Namespace(model=model, seed=42, **{'model_kwargs': {}, 'data_dir': '/data/mine', 'dataset': '', **settings})
    state = dict(epoch=epoch, arch=model, state_dict=net.state_dict(), args=args, optimizer={}, version=2, metric=1.0)
    if ema:
        state['state_dict_ema'] = {k: v + 1 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / 'last.pth.tar')
    return folder / 'last.pth.tar', net


CASES = {
    'other classes and channels': dict(num_classes=4, in_chans=2, input_size=[2, 24, 24]),
    'one channel': dict(num_classes=3, in_chans=1),
    'channels_last': dict(channels_last=True, num_classes=5),
    'arguments': dict(num_classes=4, model_kwargs=dict(regulated_stages=[2, 3], share_regulator=False)),
    'max pooling': dict(num_classes=4, model_kwargs=dict(global_pool='max')),
}
REBUILD = """
import json, sys, warnings, timm, torch, timm_regnet_rnn
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
for i, repo in enumerate(json.loads(sys.argv[1])):
    net = timm.create_model(f'hf-hub:org/{repo}', pretrained=True, cache_dir=f'{sys.argv[2]}/{i}').eval()
    want = torch.load(f'{sys.argv[2]}/{i}.pt')
    got = net.state_dict()
    assert got.keys() == want['state'].keys() and all(torch.equal(got[k], want['state'][k]) for k in got), repo
    assert torch.allclose(net(want['x']), want['y'], atol=1e-5), repo
    assert list(net.pretrained_cfg['input_size']) == list(want['size']), net.pretrained_cfg
    twin = AutoModelForImageClassification.from_pretrained(f'org/{repo}', cache_dir=f'{sys.argv[2]}/t{i}').eval()
    assert torch.allclose(twin(pixel_values=want['x']).logits, want['y'], atol=1e-5), repo
print('all the same')
"""


def test_what_is_pushed_comes_back_bit_for_bit(hub, client, tmp_path):
    """By timm and by transformers, each in a new process with an empty cache and no argument."""
    cases = []
    for i, (case, settings) in enumerate(CASES.items()):
        file, net = checkpoint(tmp_path / case, **settings)
        status, out, err = client.push(file, '--repo-id', f'org/{i}')
        assert status == 0, err
        assert f'org/{i} at ' in out and 'bit for bit' in out
        assert {*hub.files(f'org/{i}')} - {'.gitattributes'} == FILES and len(hub.commits(f'org/{i}')) == 2
        size = settings.get('input_size', [settings.get('in_chans', 3), 32, 32])
        x = torch.randn(2, *size)
        with torch.no_grad():
            want = dict(state=net.state_dict(), x=x, y=net.eval()(x), size=size)
        torch.save(want, tmp_path / f'{i}.pt')
        cases.append(str(i))
    command = [sys.executable, '-c', REBUILD, json.dumps(cases), tmp_path]
    done = subprocess.run(command, env=environment(hub), capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith('all the same\n'), done.stderr[-3000:]


def test_an_embedded_tag(hub, client, tmp_path):
    status, _, err = client.push('--tag', TAG)
    assert status == 0, err
    files = hub.files(f'timm-regnet-rnn/{TAG}')
    assert files['model.safetensors'] == EMBEDDED.read_bytes()
    config = json.loads(files['config.json'])
    assert config['architecture'] == TAG.split('.')[0] and config['label_names'][3] == 'cat'
    assert 'model_args' not in config and config['pretrained_cfg']['input_size'] == [3, 32, 32]
    (tmp_path / 'README.md').write_bytes(files['README.md'])
    card = ModelCard.load(tmp_path / 'README.md')
    assert [r.metric_value for r in card.data.eval_results] == [85.26, 99.25]
    assert card.data.to_dict().items() >= dict(library_name='timm', license='apache-2.0').items()
    assert 'import timm, timm_regnet_rnn' in card.text and f"'hf-hub:timm-regnet-rnn/{TAG}'" in card.text
    assert '| parameters | 0.311 M |' in card.text and 'cifar_short.yaml' in card.text


ROW = {
    **dict(
        run='run', date='2026-11-23', model='regnet_convgru_20', model_kwargs='', recipe='cifar_paper', overrides=''
    ),
    **dict(dataset='CIFAR-10', seed='42', epochs='20', params='1', macs='1', top1='90.5', top5='99.5', weights='last'),
    **dict(best_epoch='20', best_top1='90.5', images_per_s='', processes='1', device='a', versions='b', commit=''),
}


def results(folder, *changes):
    rows = [{**ROW, **change} for change in changes]
    lines = [','.join(ROW), *(','.join(row.values()) for row in rows)]
    (folder / 'results.csv').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return folder / 'results.csv'


@pytest.mark.parametrize(
    'change',
    [dict(epochs='19', best_epoch='19'), dict(seed='1'), dict(weights='ema'), dict(model='regnet_convrnn_20')],
)
def test_figures_of_other_weights_are_refused(hub, client, tmp_path, change):
    file, _ = checkpoint(tmp_path / 'run')
    table = results(tmp_path, change)
    error = client.fails(file, '--repo-id', 'org/net', '--results', table)
    assert "its run 'run' was measured with" in error and not hub.repos
    status, _, err = client.push(file, '--repo-id', 'org/net', '--results', table, '--run', '', '--dry-run')
    assert status == 0, err


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Twelve images in four classes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp('images')
    for i in range(12):
        target = folder / 'test' / f'class{i % 4}' / f'{i}.png'
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 60 + 10 * i).convert('RGB').save(target)
    return folder


def test_accuracy_is_measured_before_anything_is_sent(hub, client, tmp_path, images):
    file, net = checkpoint(tmp_path / 'run', num_classes=4)
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0]))
    torch.save(dict(torch.load(file, weights_only=False), state_dict=net.state_dict()), file)
    args = file, '--repo-id', 'org/net', '--data-dir', images
    error = client.fails(*args, '--expect-top1', 90)
    assert 'top-1 is 25.00 %, but --expect-top1 says 90.00 %; nothing is sent' in error and not hub.requests
    error = client.fails(*args, '--results', results(tmp_path, {}))
    assert 'but results.csv says 90.50 %' in error and not hub.requests
    assert '--expect-top1 needs --data-dir' in client.fails(file, '--repo-id', 'org/net', '--expect-top1', 25)
    status, out, err = client.push(*args, '--expect-top1', 25)
    assert status == 0 and 'top-1 25.00 %' in out, err
    assert (
        '25.00 %, 100.00 % on its 12 test images, after 20 epochs; one run'
        in hub.files('org/net')['README.md'].decode()
    )
    assert 'has 4 classes, the model 10' in client.fails('--tag', TAG, '--data-dir', images)


def test_a_release_is_entered_into_the_manifest(hub, tmp_path, images):
    """In a copy of the house, whose own manifest it writes; verify.py then believes it."""
    root = HUB.parent
    for name in ('hub', 'timm_regnet_rnn', 'train_recipes', 'docs'):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', 'manifest.json.tmp'))
    shutil.copy(root / 'pyproject.toml', tmp_path)
    file, net = checkpoint(tmp_path / 'run', num_classes=4)
    with torch.no_grad():
        net.fc.bias.copy_(torch.tensor([0.0, 300.0, 0.0, 0.0]))
    torch.save(dict(torch.load(file, weights_only=False), state_dict=net.state_dict()), file)
    table = results(tmp_path, dict(top1='25.0', top5='100', best_top1='25.0'))
    env = dict(environment(hub, HF_HUB_DISABLE_XET='1', PYTHONPATH=str(tmp_path)), HF_TOKEN='hf_right')
    env.update(HF_HOME=str(tmp_path / 'cache'))
    name = 'regnet_convgru_20.mine'
    args = [file, '--repo-id', f'timm-regnet-rnn/{name}', '--results', table, '--data-dir', images, '--release', name]

    def run(script, *args):
        command = [sys.executable, tmp_path / 'hub' / script, *map(str, args)]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    done = run('push.py', *args)
    assert done.returncode == 0, done.stderr
    entry = json.loads((tmp_path / 'timm_regnet_rnn' / 'weights' / 'manifest.json').read_text(encoding='utf-8'))[name]
    head = hub.commits(f'timm-regnet-rnn/{name}')[-1]
    assert entry['revision'] == head.id and entry['sha256'] == head.files['model.safetensors'].sha256
    assert entry['repo_id'] == '{org}/' + name and entry['metrics']['top1'] == 25.0 and entry['num_classes'] == 4
    done = run('verify.py', '--all')
    assert done.returncode == 0 and done.stdout.count('sha256') == len(RELEASED) + 1, done.stderr
    hub.repos[f'timm-regnet-rnn/{name}'].objects[entry['sha256']] = bytes(entry['size'])
    shutil.rmtree(tmp_path / 'cache')
    done = run('verify.py', name)
    assert done.returncode == 2 and f'expected {entry["sha256"]}' in done.stderr and done.stderr.count('\n') == 1


def test_accuracy_of_a_release_on_its_data_set(images):
    """These images are not the data set, so it must say so; where that is at hand, the same measures it."""
    command = [sys.executable, HUB / 'verify.py', TAG, '--data-dir']
    done = subprocess.run([*command, images], capture_output=True, text=True)
    assert done.returncode == 2 and "no --data-dir has 'CIFAR-10, JPEG q75 mirror'" in done.stderr
    assert done.stderr.count('\n') == 1
    for i in range(4, 10):
        (images / 'test' / f'class{i}').mkdir()
        shutil.copy(images / 'test' / 'class0' / '0.png', images / 'test' / f'class{i}')
    done = subprocess.run([*command, images], capture_output=True, text=True)
    assert done.returncode == 2 and 'the manifest says 85.26' in done.stderr
    for i in range(4, 10):
        shutil.rmtree(images / 'test' / f'class{i}')


STEPS = {
    'repository info': ('GET', '/api/models/org/net$'),
    'create_repo': ('POST', '/api/repos/create'),
    'card validation': ('POST', '/api/validate-yaml'),
    'what is there': ('POST', '/paths-info/'),
    'preupload': ('POST', '/preupload/'),
    'LFS batch': ('POST', '/info/lfs/objects/batch'),
    'LFS upload': ('PUT', '/lfs/'),
    'commit': ('POST', '/commit/main'),
    'fetched to compare': ('HEAD', '/resolve/'),
    'body fetched to compare': ('GET', '/lfs/'),
}
FAULTS = {
    'one 503': dict(status=503),
    'three 503': dict(status=503, times=3),
    'reset': dict(drop=True),
    'closed': dict(drop=True, rst=False),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_survives(hub, client, tmp_path, fault):
    """The same fault at every step, one after another; the repository ends with one commit, whole."""
    file, _ = checkpoint(tmp_path / 'run')
    for step, where in STEPS.items():
        hub.faults[:] = [Fault(*where, **FAULTS[fault])]
        status, _, err = client.push(file, '--repo-id', 'org/net')
        assert status == 0 and hub.faults[0].seen, (step, err)
        assert {*hub.files('org/net')} - {'.gitattributes'} == FILES and len(hub.commits('org/net')) == 2, step
        hub.repos.clear()


@pytest.mark.parametrize('late', [dict(status=504, late=True), dict(drop=True, late=True)], ids=['504', 'reset'])
@pytest.mark.parametrize('args', [[], ['--create-pr']], ids=['commit', 'pull request'])
def test_a_commit_whose_answer_was_lost_is_recognised(hub, client, tmp_path, late, args):
    file, _ = checkpoint(tmp_path / 'run')
    hub.add_repo('org/net')
    hub.faults.append(Fault('POST', '/commit/main', **late))
    status, out, err = client.push(file, '--repo-id', 'org/net', *args)
    assert status == 0, err
    assert hub.count('POST', '/commit/main') == 1
    revision = 'refs/pr/1' if args else 'main'
    assert {*hub.files('org/net', revision)} - {'.gitattributes'} == FILES and 'refs/pr/2' not in hub.repos[
        'org/net'
    ].refs


def test_cut_before_the_commit_leaves_the_repository_as_before(hub, client, tmp_path):
    file, _ = checkpoint(tmp_path / 'run')
    before = hub.add_repo('org/net', {'README.md': b'# mine'})
    hub.faults.append(Fault('POST', '/commit/main', drop=True, times=math.inf))
    assert 'Traceback' not in client.fails(file, '--repo-id', 'org/net')
    assert hub.repos['org/net'].refs == {'main': before}
    hub.faults.clear()
    assert client.push(file, '--repo-id', 'org/net')[0] == 0  # and updates the card that is there
    assert b'# mine' not in hub.files('org/net')['README.md'] and len(hub.commits('org/net')) == 2


def test_killed_while_uploading(hub, tmp_path):
    file, _ = checkpoint(tmp_path / 'run')
    before = hub.add_repo('org/net')
    hub.faults.append(Fault('PUT', '/lfs/', stall=0))
    env = dict(environment(hub, HF_HUB_DISABLE_XET='1'), HF_TOKEN='hf_right')
    command = [sys.executable, HUB / 'push.py', file, '--repo-id', 'org/net']
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.faults[0].stalled.wait(120)
    process.kill()
    process.wait()
    hub.faults[0].release.set()
    assert hub.repos['org/net'].refs == {'main': before}


def test_what_was_sent_is_compared(hub, client, tmp_path):
    file, _ = checkpoint(tmp_path / 'run')
    hub.faults.append(Fault('GET', '/lfs/', flip=5000, times=math.inf))
    assert 'is not what was sent' in client.fails(file, '--repo-id', 'org/net')


def test_tokens_that_may_not(hub, client, tmp_path):
    file, _ = checkpoint(tmp_path / 'run')
    hub.add_repo('org/net', {'README.md': b'# mine'})
    for token in ('hf_reader', 'hf_foreign', 'hf_old', 'hf_unknown', ''):
        for repo in ('org/net', 'org/new'):
            assert 'HF_TOKEN must hold a valid token' in client.fails(file, '--repo-id', repo, token=token), token
    assert len(hub.commits('org/net')) == 1 and 'org/new' not in hub.repos


def test_private_branches_and_pull_requests(hub, client, tmp_path):
    file, _ = checkpoint(tmp_path / 'run')
    assert client.push(file, '--repo-id', 'org/secret', '--private')[0] == 0
    assert hub.repos['org/secret'].private
    hub.add_repo('org/net')
    assert 'exists and is public' in client.fails(file, '--repo-id', 'org/net', '--private')
    assert client.push(file, '--repo-id', 'org/net', '--revision', 'trial')[0] == 0
    assert {*hub.files('org/net', 'trial')} >= FILES and {*hub.files('org/net')} == {'.gitattributes'}
    assert client.push(file, '--repo-id', 'org/net', '--create-pr')[0] == 0
    assert {*hub.files('org/net', 'refs/pr/1')} >= FILES and {*hub.files('org/net')} == {'.gitattributes'}
    assert 'there is no repository' in client.fails(file, '--repo-id', 'org/other', '--create-pr')


def test_a_trial_sends_nothing(hub, client, tmp_path):
    file, _ = checkpoint(tmp_path / 'run')
    target = tmp_path / 'a' / 'folder'
    status, out, _ = client.push(file, '--repo-id', 'org/net', '--dry-run', '--folder', target)
    assert status == 0 and 'nothing was sent' in out and not hub.requests
    assert {p.name for p in target.iterdir()} == FILES and all(name in out for name in FILES)
    assert 'exists' in client.fails(file, '--repo-id', 'org/net', '--dry-run', '--folder', target)


def test_bad_input_is_one_line(hub, client, tmp_path):
    good, net = checkpoint(tmp_path / 'run')
    bad = tmp_path / 'bad.pth.tar'
    bad.write_bytes(good.read_bytes()[:9000])
    pickle = tmp_path / 'pickle.pth.tar'
    torch.save(dict(state_dict=net), pickle)
    nameless = tmp_path / 'nameless.safetensors'
    save_file(net.state_dict(), nameless)
    to = ['--repo-id', 'org/net']
    for args, words in (
        ([], 'give a CHECKPOINT or --tag'),
        ([good, '--tag', TAG], 'one of them'),
        ([good], '--repo-id must be ORG/NAME'),
        ([good, '--repo-id', 'a/b/c'], '--repo-id must be ORG/NAME'),
        ([tmp_path / 'none.pth.tar', *to], 'no weights file'),
        ([bad, *to], 'truncated'),
        ([pickle, *to], 'Python objects'),
        ([nameless, *to], '--model names it'),
        ([nameless, *to, '--model', 'resnet18'], 'no model of timm_regnet_rnn'),
        ([nameless, *to, '--model', 'regnet_convlstm_20'], 'layer1.regulator'),
        ([good, *to, '--model', 'regnet_convlstm_20'], 'is of regnet_convgru_20'),
        (['--tag', 'nosuch.tag', *to], 'is not in the manifest'),
        (['--tag', TAG, '--ema'], '--tag takes what the manifest says'),
        ([good, *to, '--run', 'nosuch'], "no run 'nosuch'"),
        ([good, *to, '--labels', HUB / 'space' / 'README.md'], 'the model 10 classes'),
        ([good, *to, '--release', 'other.tag'], '--release takes regnet_convgru_20.TAG'),
        ([good, *to, '--release', 'regnet_convgru_20.t'], '--release needs --data-dir'),
        ([good, *to, '--nosuch'], 'unrecognized arguments'),
        ([good, *to, '--data-dir', tmp_path / 'nowhere'], 'nowhere'),
        ([good, *to, '--model-kwargs', 'a'], '--model-kwargs'),
        ([tmp_path, *to], 'no checkpoint in folder'),
        ([good, *to, '--labels', '/dev/zero'], "no file '/dev/zero'"),
        ([good, *to, '--results', '/dev/zero'], "'/dev/zero' is no regular file"),
    ):
        assert words in client.fails(*args), (args, words)
    assert not hub.requests
    status, _, err = client.push(nameless, *to, '--model', 'regnet_convgru_20')
    assert status == 0, err


def test_a_run_is_pushed_by_its_folder(hub, client, tmp_path):
    """With the classes' names that training kept, and the figures of its own result.json; no table is at hand."""
    file, net = checkpoint(tmp_path / 'run', num_classes=2, dataset=None, ema=True)
    (tmp_path / 'run' / 'classes.json').write_text('["cat", "dog"]')
    row = dict(zip(COLUMNS, [''] * 99), run='run-r2', model='regnet_convgru_20', recipe='cifar_short')
    row |= dict(dataset='mine', seed=42, epochs=20, params=1, macs=1, top1=71.5, top5=100.0, weights='ema')
    row |= dict(best_epoch=20, best_top1=71.5, processes=1)
    (tmp_path / 'run' / 'result.json').write_text(json.dumps(row))
    status, _, err = client.push(file.parent, '--repo-id', 'org/mine', '--folder', tmp_path / 'kept')
    assert status == 0, err
    config = json.loads((tmp_path / 'kept' / 'config.json').read_text())
    assert config['label_names'] == ['cat', 'dog']
    assert '71.50' in (tmp_path / 'kept' / 'README.md').read_text()
    row['recipe'], row['dataset'] = 'cifar_short', 'CIFAR-10, JPEG q75 mirror'  # which has rows, but not these
    (tmp_path / 'run' / 'result.json').write_text(json.dumps(row))
    assert client.push(file.parent, '--repo-id', 'org/mine', '--dry-run')[0] == 0
    assert client.push(file.parent, '--repo-id', 'org/mine', '--dry-run', '--results', tmp_path / 'none.csv')[0] == 0
    sent = load_file(tmp_path / 'kept' / 'model.safetensors')
    assert torch.equal(sent['fc.bias'], net.state_dict()['fc.bias'] + 1)  # averaged, as training measures
    error = client.fails(file.parent, '--repo-id', 'org/live', '--no-ema')
    assert "its run 'run-r2' was measured with" in error


def test_disk_full_leaves_nothing(hub, tmp_path):
    """A limit on the size of files stands for it."""
    file, _ = checkpoint(tmp_path / 'run')
    command = [
        sys.executable,
        HUB / 'push.py',
        file,
        '--repo-id',
        'org/net',
        '--dry-run',
        '--folder',
        tmp_path / 'kept',
    ]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run(command, preexec_fn=limit, env=environment(hub), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['run']
    assert os.listdir(tmp_path / 'run') == ['last.pth.tar']
