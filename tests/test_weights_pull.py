"""Weights from the Hub through the unmodified huggingface_hub and timm, with everything that goes wrong on the way."""

import hashlib
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import timm
from conftest import randomize
from hub_server import Fault, HubServer, environment
from safetensors.torch import save_file
from timm.models import save_for_hf

pytestmark = pytest.mark.slow

BODY = '/lfs/'
RESOLVE = '/resolve/main/model.safetensors'
WEIGHTS = bytes(random.Random(0).randbytes(300_000))
CLIENT = """
import json, os, sys
from timm_regnet_rnn.weights import pull
pull.WAITS, pull.PATIENCE = (0.01, 0.02, 0.04, 0.08), 5.0
for line in sys.stdin:
    try:
        question = json.loads(line)
        if question == 'become nobody':
            os.geteuid() or os.seteuid(65534)
            continue
        answer = dict(file=str(pull.pull(**question)))
    except OSError as e:
        answer = dict(error=str(e))
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that pulls what it is told to, so that importing torch is paid once."""

    def __init__(self, hub, preexec_fn=None, **env):
        self.process = subprocess.Popen(
            [sys.executable, '-c', CLIENT],
            env=environment(hub, **env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=preexec_fn,
        )

    def become_nobody(self):
        print(json.dumps('become nobody'), file=self.process.stdin, flush=True)

    def send(self, hub_id, cache_dir, **kwargs):
        print(json.dumps(dict(hub_id=hub_id, cache_dir=str(cache_dir), **kwargs)), file=self.process.stdin, flush=True)

    def read(self):
        return json.loads(self.process.stdout.readline())

    def pull(self, hub_id, cache_dir, **kwargs):
        self.send(hub_id, cache_dir, **kwargs)
        return self.read()

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope='module')
def stand_in():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(stand_in):
    stand_in.faults.clear()
    stand_in.requests.clear()
    if 'org/net' not in stand_in.repos:
        stand_in.add_repo('org/net', {'model.safetensors': WEIGHTS, 'small.safetensors': b'abc'})
        stand_in.add_repo('org/pickle', {'pytorch_model.bin': b'\x80\x04.'})
        stand_in.add_repo('me/secret', {'model.safetensors': WEIGHTS}, private=True)
        stand_in.add_user('hf_right', 'me', role='read')
    return stand_in


@pytest.fixture(scope='module')
def client(stand_in):
    client = Client(stand_in)
    yield client
    client.close()


@pytest.fixture(scope='module')
def offline(stand_in):
    client = Client(stand_in, HF_HUB_OFFLINE='1')
    yield client
    client.close()


def test_fetched_once_and_verified(hub, client, tmp_path):
    file = client.pull('org/net', tmp_path)['file']
    assert Path(file).read_bytes() == WEIGHTS and Path(file).is_relative_to(tmp_path)
    assert client.pull('org/net', tmp_path)['file'] == file
    assert hub.count('GET', BODY) == 1


FAULTS = {
    'one 503 on HEAD': dict(method='HEAD', path=RESOLVE, status=503),
    'three 503 on HEAD': dict(method='HEAD', path=RESOLVE, status=503, times=3),
    'one 503 on the body': dict(method='GET', path=BODY, status=503),
    'three 503 on the body': dict(method='GET', path=BODY, status=503, times=3),
    'too many requests': dict(method='HEAD', path=RESOLVE, status=429, retry_after=0),
    'HEAD reset': dict(method='HEAD', path=RESOLVE, drop=True),
    'HEAD closed': dict(method='HEAD', path=RESOLVE, drop=True, rst=False, times=2),
    'body never begins': dict(method='GET', path=BODY, drop=True),
    'reset in the middle': dict(method='GET', path=BODY, cut=100_000),
    'closed in the middle': dict(method='GET', path=BODY, cut=100_000, rst=False, times=2),
    'flipped on the way': dict(method='GET', path=BODY, flip=123_456, bit=3),
    'slow': dict(method='GET', path=BODY, slow=0.05, chunk=65536),
}


@pytest.mark.parametrize('case', FAULTS)
def test_survives(hub, client, tmp_path, case):
    hub.faults.append(Fault(**FAULTS[case]))
    answer = client.pull('org/net', tmp_path)
    assert hub.faults[0].seen >= 1, 'the fault was met'
    assert 'file' in answer, answer
    assert Path(answer['file']).read_bytes() == WEIGHTS


def test_gives_up_in_one_line_and_leaves_no_bad_file(hub, client, tmp_path):
    hub.faults.append(Fault('GET', BODY, flip=7, times=math.inf))
    bad = bytearray(WEIGHTS)
    bad[7] ^= 1
    error = client.pull('org/net', tmp_path)['error']
    assert error.count('\n') == 0 and "'model.safetensors' of 'org/net' is broken" in error
    assert f'expected {hashlib.sha256(WEIGHTS).hexdigest()}, found {hashlib.sha256(bad).hexdigest()}' in error
    assert hub.count('GET', BODY) == 2, 'fetched once more, not for ever'
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and p.stat().st_size >= 100_000]
    hub.faults.clear()
    assert Path(client.pull('org/net', tmp_path)['file']).read_bytes() == WEIGHTS
    hub.faults.append(Fault('HEAD', RESOLVE, status=503, times=math.inf))
    assert client.pull('org/net', tmp_path / 'empty')['error'].startswith(
        "cannot fetch 'model.safetensors' of 'org/net' ("
    )


def test_what_was_promised_wins_over_what_the_hub_states(hub, client, tmp_path):
    right = hashlib.sha256(WEIGHTS).hexdigest()
    assert 'file' in client.pull('org/net', tmp_path, sha256=right)
    assert f'expected {"0" * 64}, found {right}' in client.pull('org/net', tmp_path, sha256='0' * 64)['error']


def test_small_files_have_gits_sum(hub, client, tmp_path):
    hub.commit('org/net', {'README.safetensors': b'x'})
    repo = hub.repos['org/net'].lfs
    hub.repos['org/net'].lfs = ()
    hub.commit('org/net', {'small.safetensors': b'not in LFS'})
    hub.repos['org/net'].lfs = repo
    file = Path(client.pull('org/net', tmp_path, filename='small.safetensors')['file'])
    file.resolve().write_bytes(b'not in LFs')
    assert Path(client.pull('org/net', tmp_path, filename='small.safetensors')['file']).read_bytes() == b'not in LFS'


def test_a_hundred_flipped_bits_in_the_cache_are_caught(hub, client, offline, tmp_path):
    file = Path(client.pull('org/net', tmp_path)['file']).resolve()
    draw = random.Random(1)
    for _ in range(100):
        bad = bytearray(WEIGHTS)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        assert 'is broken: expected' in offline.pull('org/net', tmp_path)['error']
    assert file.read_bytes() == bytes(bad), 'offline nothing can replace it, so it is kept'
    assert Path(client.pull('org/net', tmp_path)['file']).read_bytes() == WEIGHTS
    assert 'file' in offline.pull('org/net', tmp_path)


def test_a_truncated_file_in_the_cache_is_fetched_again(hub, client, tmp_path):
    Path(client.pull('org/net', tmp_path)['file']).resolve().write_bytes(WEIGHTS[:1000])
    assert Path(client.pull('org/net', tmp_path)['file']).read_bytes() == WEIGHTS


def test_a_cache_without_links_is_verified_too(hub, client, tmp_path):
    file = Path(client.pull('org/net', tmp_path)['file'])
    file.unlink()
    file.write_bytes(WEIGHTS[:-1] + b'?')
    assert Path(client.pull('org/net', tmp_path)['file']).read_bytes() == WEIGHTS


def test_offline_and_not_there(offline, tmp_path):
    assert offline.pull('org/net', tmp_path)['error'].endswith(
        'not in the cache, and HF_HUB_OFFLINE forbids to fetch it.'
    )


@pytest.mark.parametrize(
    'hub_id, message',
    [
        ('org/nothing', 'no such repository, or it is private; then HF_TOKEN must hold a token that may read it.'),
        ('me/secret', 'HF_TOKEN must hold a token'),
        ('org/net@v9', 'no such revision'),
        ('org/pickle', 'no such file; weights in other formats are not loaded'),
    ],
)
def test_wrong_names_are_told_at_once(hub, client, tmp_path, hub_id, message):
    error = client.pull(hub_id, tmp_path)['error']
    assert message in error and repr(hub_id) in error and '\n' not in error
    assert hub.count('.*', '') <= 3 and hub.count('.*', 'pytorch_model') == 0


def test_tokens(hub, tmp_path):
    for token, works in (('hf_right', True), ('hf_wrong', False)):
        client = Client(hub, HF_TOKEN=token)
        answer = client.pull('me/secret', tmp_path / token)
        client.close()
        assert ('file' in answer) == works and 'hf_' not in answer.get('error', '')
        assert works or 'HF_TOKEN' in answer['error']


def test_a_killed_download_and_two_at_once(hub, client, tmp_path):
    hub.faults.append(Fault('GET', BODY, stall=100_000))
    killed = Client(hub)
    killed.send('org/net', tmp_path)
    assert hub.faults[0].stalled.wait(60)
    killed.close()
    hub.faults[0].release.set()
    second = Client(hub)
    for process in (client, second):
        process.send('org/net', tmp_path)
    for process in (client, second):
        assert Path(process.read()['file']).read_bytes() == WEIGHTS
    second.close()


REBUILD = """
import sys, timm, torch, timm_regnet_rnn
from safetensors.torch import load_file
want = load_file(sys.argv[2])
net = timm.create_model('hf-hub:org/regnet', pretrained=True, cache_dir=sys.argv[1])
got = net.state_dict()
assert net.num_classes == 4 and net.layer2.regulator.pw.shape[0] == 3 and not hasattr(net.layer1, 'regulator')
assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
assert net.pretrained_cfg['hf_hub_id'] == 'org/regnet' and sys.argv[1] not in str(net.pretrained_cfg)
other = timm.create_model('hf-hub:org/regnet', pretrained=True, cache_dir=sys.argv[1], num_classes=7, in_chans=1)
assert other(torch.randn(1, 1, 16, 16)).shape == (1, 7)
resnet = timm.create_model('resnet18').eval()
resnet.load_state_dict(load_file(sys.argv[3]))
x = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    for kwargs in ({}, dict(in_chans=1, num_classes=5), dict(features_only=True), dict(num_classes=0)):
        net = timm.create_model('regnet_convlstm_18', pretrained=True, cache_dir=sys.argv[1], **kwargs).eval()
        out = net(x[:, :kwargs.get('in_chans', 3)])
        if not kwargs:
            assert (out - resnet(x)).abs().max() < 1e-5 * resnet(x).abs().max()
        elif kwargs == dict(num_classes=0):
            expected = resnet.forward_head(resnet.forward_features(x), pre_logits=True)
            assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
    net = timm_regnet_rnn.from_resnet('resnet18.a1_in1k', regulator='convgru', cache_dir=sys.argv[1]).eval()
    assert (net(x) - resnet(x)).abs().max() < 1e-5 * resnet(x).abs().max()
print('all the same')
"""


def test_create_model_takes_verified_files(hub, tmp_path):
    """Known tags, hf-hub: names and from_resnet; each through a bit that flips on its way."""
    kwargs = dict(layers=(1, 1, 1), regulated_stages=(2, 3))
    net = randomize(timm.create_model('regnet_convgru_20', num_classes=4, **kwargs))
    save_for_hf(net, tmp_path / 'net', model_args=kwargs, safe_serialization=True)  # timm 1.0.20 does not know them
    hub.add_repo('org/regnet', {p.name: p.read_bytes() for p in (tmp_path / 'net').iterdir()})
    save_file(randomize(timm.create_model('resnet18')).state_dict(), tmp_path / 'resnet18.safetensors')
    hub.add_repo('timm/resnet18.a1_in1k', {'model.safetensors': (tmp_path / 'resnet18.safetensors').read_bytes()})
    hub.faults += [Fault('GET', BODY, flip=5000), Fault('GET', BODY, flip=5000, skip=1)]
    files = [tmp_path / 'net' / 'model.safetensors', tmp_path / 'resnet18.safetensors']
    command = [sys.executable, '-c', REBUILD, tmp_path / 'cache', *files]
    done = subprocess.run(command, env=environment(hub), capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith('all the same\n'), done.stderr[-3000:]
    assert [fault.seen for fault in hub.faults] == [4, 3] and hub.count('GET', BODY) == 4


def test_tags_name_repositories_not_files():
    cfg = timm.get_pretrained_cfg('regnet_convlstm_50.resnet50_a1_in1k')
    assert cfg.hf_hub_id == 'timm/resnet50.a1_in1k' and not cfg.url and not cfg.file


def test_a_read_only_cache(hub):
    """Of another user: root may write anywhere, so the process becomes nobody."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        client = Client(hub, HF_HOME=folder, HF_TOKEN='hf_right')
        file = client.pull('org/net', folder)['file']
        for path in (Path(folder), *Path(folder).rglob('*')):
            if not path.is_symlink():
                path.chmod(0o555 if path.is_dir() else 0o444)
        client.become_nobody()
        hub.requests.clear()
        answer = client.pull('org/net', folder)
        assert answer == dict(file=file) and hub.count('GET', BODY) == 0
        Path(file).resolve().chmod(0o644)
        Path(file).resolve().write_bytes(WEIGHTS[:-1])
        assert 'in the cache is broken and cannot be removed' in client.pull('org/net', folder)['error']
        client.close()
        for path in Path(folder).rglob('*'):
            if path.is_dir():
                path.chmod(0o755)


def test_disk_full_leaves_nothing_under_the_final_name(hub, tmp_path):
    client = Client(hub, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    error = client.pull('org/net', tmp_path)['error']
    client.close()
    assert '\n' not in error and 'File too large' in error, error
    assert not [p for p in tmp_path.rglob('model.safetensors')]
    client = Client(hub)
    assert Path(client.pull('org/net', tmp_path)['file']).read_bytes() == WEIGHTS
    client.close()


def test_an_expired_token(hub, tmp_path):
    hub.add_user('hf_old', 'me', role='read', expired=True)
    client = Client(hub, HF_TOKEN='hf_old')
    error = client.pull('me/secret', tmp_path)['error']
    client.close()
    assert 'the Hub refuses the token' in error and 'it is expired or wrong' in error and 'hf_' not in error


NAME = 'regnet_convlstm_20.cifar10_jpeg75'
HOUSE = Path(__file__).parent.parent
KNOWN = f"""
import sys, timm, timm_regnet_rnn
from timm_regnet_rnn.weights import pull
pull.WAITS = (0.01, 0.02)
for cache in sys.stdin:
    try:
        timm.create_model('{NAME}', pretrained=True, cache_dir=cache.strip())
        print('loaded', flush=True)
    except OSError as e:
        print(e, flush=True)
"""


def test_released_weights_are_checked_against_the_manifest(hub, tmp_path):
    """In a copy of the package, whose embedded file is lost, then broken; on a Hub that lies, then tells the truth."""
    shutil.copytree(HOUSE / 'timm_regnet_rnn', tmp_path / 'timm_regnet_rnn')
    embedded = tmp_path / 'timm_regnet_rnn' / 'weights' / f'{NAME}.safetensors'
    weights = embedded.read_bytes()
    broken = weights[:-1] + bytes([weights[-1] ^ 1])
    truth, lie = (hashlib.sha256(content).hexdigest() for content in (weights, broken))

    env = environment(hub, PYTHONPATH=str(tmp_path))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, '-c', KNOWN], env=env, cwd=tmp_path, **pipes)

    def load(cache):
        print(tmp_path / cache, file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    repo = f'timm-regnet-rnn/{NAME}'
    assert load('a') == 'loaded' and not hub.requests
    embedded.unlink()
    hub.add_repo(repo, {'model.safetensors': broken})
    assert f"'model.safetensors' of {repo!r} is broken: expected {truth}, found {lie} (" in load('a')
    embedded.write_bytes(broken)
    answer = load('a')
    assert answer.count('\n') == 0 and f"{embedded.name}' is broken: expected {truth}, found {lie}; 'model" in answer
    hub.commit(repo, {'model.safetensors': weights})
    assert load('b') == 'loaded'
    process.kill()
    process.wait()


def test_a_broken_configuration_in_the_cache(hub, tmp_path):
    """It is JSON still, but says something else: timm has read it before we can, so the model is not built from it."""
    net = timm.create_model('regnet_convgru_20', num_classes=4)
    save_for_hf(net, tmp_path / 'net', safe_serialization=True)
    hub.add_repo('org/config', {p.name: p.read_bytes() for p in (tmp_path / 'net').iterdir()})
    script = """
import sys, timm, timm_regnet_rnn
from pathlib import Path

def load():
    try:
        return timm.create_model('hf-hub:org/config', pretrained=True, cache_dir=sys.argv[1]).num_classes
    except OSError as e:
        return e

print(load())
file = next(Path(sys.argv[1]).rglob('config.json')).resolve()
file.write_text(file.read_text().replace('"num_classes": 4', '"num_classes": 5'))
print(load())
print(load())
"""
    command = [sys.executable, '-c', script, tmp_path / 'cache']
    done = subprocess.run(command, env=environment(hub), capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        '4',
        "config.json of 'org/config' was broken in the cache and is fetched anew: create the model once more.",
        '4',
    ], done.stderr
