import contextlib
import hashlib
import http.client
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from conftest import randomize
from hub_server import Fault, File, HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, file_download, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

pytestmark = pytest.mark.slow

WEIGHTS = bytes(torch.randint(256, (300_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).tolist())
FILES = {'README.md': b'---\nlicense: mit\n---\n# Card', 'model.safetensors': WEIGHTS, 'extra/notes.txt': b'one\ntwo\n'}


def reset_client():
    """huggingface_hub < 1 decides when it opens a session whether it is offline."""
    getattr(huggingface_hub.utils._http, 'reset_sessions', lambda: None)()


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, and the client as the environment variables of these names make it when it is imported."""
    with HubServer() as hub:
        template = hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
        for module in (constants, file_download):
            monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
        monkeypatch.setattr(constants, 'ENDPOINT', hub.endpoint)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_TELEMETRY', True)
        reset_client()
        hub.add_user('hf_alice', 'alice', orgs=('org',))
        hub.add_user('hf_reader', 'alice', role='read', orgs=('org',))
        hub.add_user('hf_expired', 'alice', orgs=('org',), expired=True)
        hub.add_user('hf_mallory', 'mallory')
        hub.add_repo('org/net', FILES)
        yield hub
    reset_client()


@pytest.fixture
def download(hub, tmp_path):
    return partial(hf_hub_download, cache_dir=tmp_path / 'cache', token=False)


def api(hub, token='hf_alice'):
    return HfApi(endpoint=hub.endpoint, token=token)


def add(path, content):
    return CommitOperationAdd(path, content)


def get(url, method='GET', headers=(), body=None):
    """What arrives, byte for byte, without a client that mends it."""
    connection = http.client.HTTPConnection(url.split('/')[2], timeout=10)
    with contextlib.closing(connection):
        connection.request(method, '/' + url.split('/', 3)[3], body=body, headers=dict(headers))
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def raw(url, method='GET', body=b'', size=None):
    """What arrives of a body, and how the connection ended; with a `size` above the body's, we leave in the middle."""
    _, _, host, path = url.split('/', 3)
    size = len(body) if size is None else size
    head = f'{method} /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n\r\n'
    received, end = b'', 'FIN'
    with socket.create_connection(host.split(':'), timeout=10) as connection:
        try:
            connection.sendall(head.encode() + body)
            while size <= len(body) and (part := connection.recv(65536)):
                received += part
        except ConnectionError:
            end = 'RST'
    return received.partition(b'\r\n\r\n')[2], end


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_download(hub, download):
    for path, content in FILES.items():
        assert Path(download('org/net', path, token='hf_alice')).read_bytes() == content
    assert hub.count('HEAD', '/resolve/main/') == 3
    assert hub.count('GET', '/resolve/main/') == 2  # the LFS file is fetched where the HEAD said
    content = [r for r in hub.requests if r.path.startswith('/lfs/')]
    assert [(r.method, r.authorized, r.status) for r in content] == [('GET', False, 200)]
    assert all(r.authorized for r in hub.requests if r not in content)
    assert 'hf_alice' not in repr(vars(hub))

    done = len(hub.requests)
    path = Path(download('org/net', 'model.safetensors'))
    assert [r.method for r in hub.requests[done:]] == ['HEAD']  # from the cache, under the name that is its hash
    assert path.resolve().name == hub.commits('org/net')[0].files['model.safetensors'].sha256
    assert path.parent.name == hub.commits('org/net')[0].id

    status, _, headers = get(f'{hub.endpoint}/org/net/resolve/main/model.safetensors', 'HEAD')
    assert (status, headers['X-Linked-Size']) == (302, '300000')
    hub.commit('org/net', {'extra/notes.txt': b'three\n'})
    assert Path(download('org/net', 'extra/notes.txt')).read_bytes() == b'three\n'
    assert Path(download('org/net', 'extra/notes.txt', revision=path.parent.name)).read_bytes() == b'one\ntwo\n'


def test_resume(hub, download, monkeypatch):
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 10_000)  # what the client keeps is a multiple of it, of 10 MB
    hub.faults.append(Fault('GET', '/lfs/', cut=100_000, rst=False))
    try:
        path = download('org/net', 'model.safetensors')
    except Exception:  # huggingface_hub 0.36 goes on only when it is called again
        path = download('org/net', 'model.safetensors')
    assert Path(path).read_bytes() == WEIGHTS
    ranges = [(r.range, r.status) for r in hub.requests if r.path.startswith('/lfs/')]
    assert ranges == [(None, 200), ('bytes=100000-', 206)]


@pytest.mark.parametrize(
    'asked, expected',
    [
        ('bytes=5-9', WEIGHTS[5:10]),
        ('bytes=299990-', WEIGHTS[-10:]),
        ('bytes=-7', WEIGHTS[-7:]),
        ('bytes=300000-', None),
    ],
)
def test_ranges(hub, asked, expected):
    sha256 = hub.commits('org/net')[0].files['model.safetensors'].sha256
    status, body, headers = get(f'{hub.cdn}/lfs/org/net/{sha256}', headers={'Range': asked})
    if expected is None:
        assert status == 416 and headers['Content-Range'] == 'bytes */300000'
    else:
        assert (status, body) == (206, expected)
        start = WEIGHTS.index(expected)
        assert headers['Content-Range'] == f'bytes {start}-{start + len(body) - 1}/300000'


def test_snapshot_of_a_private_repository(hub, tmp_path):
    hub.add_repo('alice/secret', FILES, private=True)
    snapshot = partial(huggingface_hub.snapshot_download, 'alice/secret', cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError) as caught:
        snapshot(token=False)
    assert caught.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError) as caught:
        snapshot(token='hf_mallory')
    assert caught.value.response.status_code == 404
    folder = Path(snapshot(token='hf_reader'))
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    assert found == hub.files('alice/secret') and found.keys() == FILES.keys() | {'.gitattributes'}


@pytest.mark.parametrize('token', ['hf_expired', 'hf_nobody'])
def test_bad_tokens(hub, download, token):
    for call in (
        lambda: download('org/net', 'README.md', token=token),  # even what anybody may read
        lambda: api(hub, token).whoami(),
        lambda: api(hub, token).create_repo('org/new'),
    ):
        with pytest.raises(
            OSError
        ) as caught:  # HfHubHTTPError or, from whoami of huggingface_hub 0.36, that of requests
            call()
        assert caught.value.response.status_code == 401
        assert not isinstance(caught.value, RepositoryNotFoundError)
        message = caught.value.response.headers['X-Error-Message']
        assert ('expired' if token == 'hf_expired' else 'Invalid credentials') in message
    assert 'org/new' not in hub.repos


def test_what_is_not_there(hub, download):
    with pytest.raises(EntryNotFoundError):
        download('org/net', 'pytorch_model.bin')
    with pytest.raises(RevisionNotFoundError):
        download('org/net', 'README.md', revision='v2')
    for token, status in ((False, 401), ('hf_alice', 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            download('org/nothing', 'README.md', token=token)
        assert caught.value.response.status_code == status
    hub.add_repo('org/gated', FILES, gated=True)
    for token, status in ((False, 401), ('hf_mallory', 403)):
        with pytest.raises(GatedRepoError) as caught:
            download('org/gated', 'README.md', token=token)
        assert caught.value.response.status_code == status
    assert Path(download('org/gated', 'README.md', token='hf_reader')).read_bytes() == FILES['README.md']
    assert get(f'{hub.endpoint}/api/nothing')[0] == 404


def test_whoami_and_rights(hub):
    about = api(hub).whoami()
    assert about['name'] == 'alice' and [org['name'] for org in about['orgs']] == ['org']
    assert api(hub, 'hf_reader').whoami()['auth']['accessToken']['role'] == 'read'
    before = hub.commits('org/net')
    for token in ('hf_reader', 'hf_mallory'):
        for call in (
            lambda client: client.create_repo('org/new'),
            lambda client: client.create_commit('org/net', [add('a', b'a')], commit_message='no'),
            lambda client: client.create_branch('org/net', branch='new'),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                call(api(hub, token))
            assert caught.value.response.status_code == 403
    assert (
        hub.commits('org/net') == before
        and list(hub.repos) == ['org/net']
        and list(hub.repos['org/net'].refs) == ['main']
    )
    mine = api(hub, 'hf_mallory').create_commit('org/net', [add('a.bin', b'a')], commit_message='PR', create_pr=True)
    assert mine.pr_revision == 'refs/pr/1' and hub.files('org/net', 'refs/pr/1')['a.bin'] == b'a'


def test_push(hub, tmp_path):
    client = api(hub)
    url = client.create_repo('org/new', private=True)
    assert url.repo_id == 'org/new' and hub.repos['org/new'].private
    assert client.create_repo('org/new', exist_ok=True) == url
    with pytest.raises(HfHubHTTPError) as caught:
        client.create_repo('org/new')
    assert caught.value.response.status_code == 409

    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(WEIGHTS)
    operations = [
        add('README.md', FILES['README.md']),
        add('model.safetensors', str(weights)),
        add('a/config.json', b'{}'),
    ]
    info = client.create_commit('org/new', operations, commit_message='weights', commit_description='all of it')
    first, second = hub.commits('org/new')
    assert (second.id, second.parent, second.title, second.authors[0]['user']) == (
        info.oid,
        first.id,
        'weights',
        'alice',
    )
    assert second.message == 'all of it' and info.repo_url.repo_id == 'org/new'
    assert hub.files('org/new') == {
        '.gitattributes': hub.files('org/new')['.gitattributes'],
        'README.md': FILES['README.md'],
        'model.safetensors': WEIGHTS,
        'a/config.json': b'{}',
    }
    assert {path for path, file in second.files.items() if file.lfs} == {'model.safetensors'}
    puts = [r for r in hub.requests if r.method == 'PUT']
    assert [(r.status, r.authorized) for r in puts] == [(200, False)]
    assert hub.count('POST', '/objects/verify') == 1

    same = [add('model.safetensors', WEIGHTS), add('a/config.json', b'{}')]
    assert client.create_commit('org/new', same, commit_message='again').oid == info.oid
    client.create_commit('org/new', [add('copy.bin', WEIGHTS), CommitOperationDelete('a/')], commit_message='copy')
    assert hub.count('PUT', '.') == 1  # the content is known
    assert hub.files('org/new').keys() == {'.gitattributes', 'README.md', 'model.safetensors', 'copy.bin'}
    client.create_commit('org/new', [add('large.txt', bytes(10 * 2**20 + 1))], commit_message='large')
    assert [commit.title for commit in hub.commits('org/new')] == ['initial commit', 'weights', 'copy', 'large']
    assert hub.commits('org/new')[-1].files['large.txt'].lfs


def test_branches_pull_requests_and_conflicts(hub):
    client, head = api(hub), hub.commits('org/net')[-1].id
    commit = partial(client.create_commit, 'org/net', commit_message='more')
    with pytest.raises(RevisionNotFoundError):
        commit([add('a.bin', b'a')], revision='dev')
    with pytest.raises(RevisionNotFoundError):
        commit([add('a.bin', b'a')], revision=head)
    client.create_branch('org/net', branch='dev')
    with pytest.raises(HfHubHTTPError) as caught:
        client.create_branch('org/net', branch='dev')
    assert caught.value.response.status_code == 409
    info = commit([add('a.bin', b'a')], revision='dev')
    assert client.model_info('org/net', revision='dev').sha == info.oid
    for number in (1, 2):
        info = commit([add('b.txt', b'%d' % number)], create_pr=True)
        assert (info.pr_num, info.pr_revision) == (number, f'refs/pr/{number}')
        assert hub.files('org/net', info.pr_revision) == hub.files('org/net') | {'b.txt': b'%d' % number}
    commit([add('c.txt', b'c')], revision='refs/pr/2')
    assert [len(hub.commits('org/net', revision)) for revision in ('main', 'dev', 'refs/pr/1', 'refs/pr/2')] == [
        1,
        2,
        2,
        3,
    ]
    assert hub.files('org/net', 'dev')['a.bin'] == b'a' and hub.commits('org/net')[-1].id == head

    hub.commit('org/net', {'d.txt': b'from somebody else'})
    with pytest.raises(HfHubHTTPError) as caught:
        commit([add('e.txt', b'e')], parent_commit=head)
    assert caught.value.response.status_code == 412
    commit([add('e.txt', b'e')], parent_commit=hub.commits('org/net')[-1].id)
    assert [c.commit_id for c in client.list_repo_commits('org/net')] == [c.id for c in hub.commits('org/net')[::-1]]


def test_commits_are_whole_or_refused(hub):
    """What a client that skips steps would get; each line of a commit is checked before any takes effect."""
    before, headers = hub.commits('org/net'), {'Authorization': 'Bearer hf_alice'}
    header = {'key': 'header', 'value': {'summary': 'bad', 'description': ''}}
    fine = {'key': 'file', 'value': {'path': 'fine.txt', 'content': '', 'encoding': 'base64'}}
    for bad in (
        {'key': 'lfsFile', 'value': {'path': 'model.safetensors', 'algo': 'sha256', 'oid': 'a' * 64, 'size': 5}},
        {'key': 'deletedFile', 'value': {'path': 'extra'}},
        {'key': 'deletedFolder', 'value': {'path': 'README'}},
    ):
        body = '\n'.join(map(json.dumps, (header, fine, bad)))
        assert get(f'{hub.endpoint}/api/models/org/net/commit/main', 'POST', headers, body)[0] in (400, 404)
    assert get(f'{hub.cdn}/lfs/org/net/{"a" * 64}', 'PUT', body=b'other content')[0] == 400
    sha256 = hashlib.sha256(b'with a token').hexdigest()
    assert get(f'{hub.cdn}/lfs/org/net/{sha256}', 'PUT', headers, b'with a token')[0] == 400
    known = {'oid': next(iter(hub.repos['org/net'].objects)), 'size': 300_000}
    for item, status in ((known, 200), ({**known, 'size': 299_999}, 404), ({'oid': sha256, 'size': 12}, 404)):
        url = f'{hub.endpoint}/org/net.git/info/lfs/objects/verify'
        assert get(url, 'POST', headers, json.dumps(item))[0] == status
    assert hub.commits('org/net') == before and len(hub.repos['org/net'].objects) == 1
    for card in (b'---\na: b: c\n---\n', b'---\n- a\n- b\n---\n'):
        with pytest.raises(ValueError, match='Invalid metadata'):
            api(hub).create_commit('org/net', [add('README.md', card)], commit_message='card')
    with pytest.warns(UserWarning, match='empty or missing'):
        api(hub).create_commit('org/net', [add('README.md', b'# Card')], commit_message='card')


def test_metadata(hub):
    files, client = hub.commits('org/net')[0].files, api(hub)
    info = client.model_info('org/net', files_metadata=True)
    assert info.sha == hub.commits('org/net')[0].id
    for sibling in info.siblings:
        file = files[sibling.rfilename]
        assert (sibling.size, sibling.blob_id) == (file.size, file.blob_id)
        assert (sibling.lfs and sibling.lfs.sha256) == (file.sha256 if file.lfs else None)
    assert {sibling.rfilename for sibling in info.siblings} == files.keys() == set(client.list_repo_files('org/net'))
    assert len(hub.connections) == 1  # kept alive
    assert client.model_info('org/net', revision=info.sha).siblings[0].size is None
    found = {entry.path: entry for entry in client.get_paths_info('org/net', ['model.safetensors', 'nothing'])}
    assert found.keys() == {'model.safetensors'} and found['model.safetensors'].lfs.size == 300_000
    # `git hash-object` of b'one\ntwo\n', and of the LFS pointer to b'abc'
    assert files['extra/notes.txt'].blob_id == '814f4a422927b82f5f8a43f8fab6d3839e3983f2'
    pointer = File(b'abc', lfs=True)
    assert (pointer.blob_id, pointer.pointer_size) == ('80d7d501c2b256023dc42e46d958b9ac2ec283ee', 126)


def test_end_of_the_server():
    with HubServer() as hub:
        connection = http.client.HTTPConnection(hub.endpoint.split('/')[2], timeout=10)
        connection.request('GET', '/api/nothing')
        assert connection.getresponse().read() and connection.sock
    with contextlib.closing(connection), pytest.raises((ConnectionError, http.client.HTTPException)):
        connection.request('GET', '/api/nothing')
        connection.getresponse()


def test_its_own_errors_are_not_hidden():
    with pytest.raises(AssertionError, match='JSONDecodeError'), HubServer() as hub:
        hub.add_user('hf_alice', 'alice')
        headers = {'Authorization': 'Bearer hf_alice'}
        assert get(f'{hub.endpoint}/api/repos/create', 'POST', headers, b'no JSON')[0] == 500


def test_status_and_skip(hub, download):
    hub.faults.append(Fault('HEAD', '/resolve/', status=503))
    with contextlib.suppress(LocalEntryNotFoundError):  # huggingface_hub 0.36 does not ask again
        download('org/net', 'README.md')
    assert Path(download('org/net', 'README.md')).read_bytes() == FILES['README.md']
    assert [r.status for r in hub.requests if r.method == 'HEAD'][:2] == [503, 200]

    hub.faults[0] = Fault('GET', '/resolve/', status=429, retry_after=7, skip=1, times=math.inf)
    url = f'{hub.endpoint}/org/net/resolve/main/README.md'
    assert get(url)[:2] == (200, FILES['README.md'])
    for _ in range(3):
        status, body, headers = get(url)
        assert (status, headers['Retry-After']) == (429, '7') and b'Card' not in body
    assert get(url, 'HEAD')[0] == 200


@pytest.mark.parametrize('rst, end', [(True, 'RST'), (False, 'FIN')])
def test_dropped_and_cut_connections(hub, rst, end):
    hub.faults.extend(
        [Fault('HEAD|POST', 'org', drop=True, rst=rst, times=2), Fault('GET', 'org', cut=250_000, rst=rst)]
    )
    sha256 = hub.commits('org/net')[0].files['model.safetensors'].sha256
    assert raw(f'{hub.endpoint}/org/net/resolve/main/README.md', 'HEAD') == (b'', end)
    assert raw(f'{hub.endpoint}/org/net.git/info/lfs/objects/batch', 'POST', bytes(100_000)) == (b'', end)
    assert raw(f'{hub.cdn}/lfs/org/net/{sha256}') == (WEIGHTS[:250_000], end)
    assert [r.status for r in hub.requests] == [None, None, 200]
    assert get(f'{hub.cdn}/lfs/org/net/{sha256}')[1] == WEIGHTS


def test_clients_that_leave(hub):
    raw(f'{hub.cdn}/lfs/org/net/{"a" * 64}', 'PUT', b'half of it', size=20)
    wait_for(lambda: hub.requests and not hub.connections)
    assert [r.status for r in hub.requests] == [None] and len(hub.repos['org/net'].objects) == 1
    hub.faults.append(Fault('GET', 'README', slow=0.05, chunk=1))
    connection = http.client.HTTPConnection(hub.endpoint.split('/')[2], timeout=10)
    with contextlib.closing(connection):
        connection.request('GET', '/org/net/resolve/main/README.md')
        connection.getresponse()
    wait_for(lambda: not hub.connections)
    assert not hub.errors


@pytest.mark.parametrize('offset, bit', [(0, 0), (123_456, 5), (299_999, 7)])
def test_flipped_bits_are_not_noticed_by_the_client(hub, download, offset, bit):
    hub.faults.append(Fault('GET', '/lfs/', flip=offset, bit=bit))
    received = Path(download('org/net', 'model.safetensors')).read_bytes()
    assert [(i, a ^ b) for i, (a, b) in enumerate(zip(WEIGHTS, received)) if a != b] == [(offset, 1 << bit)]

    hub.faults.append(Fault('GET', '/lfs/', flip=offset, bit=bit))
    sha256 = hub.commits('org/net')[0].files['model.safetensors'].sha256
    body = get(f'{hub.cdn}/lfs/org/net/{sha256}', headers={'Range': 'bytes=100000-'})[1]
    assert body == received[100_000:]


def test_a_bit_flipped_in_an_upload_is_refused(hub):
    hub.faults.append(Fault('PUT', '/lfs/', flip=7))
    before = hub.commits('org/net')
    with pytest.raises(Exception, match='uploading|BadDigest'):
        api(hub).create_commit('org/net', [add('other.bin', b'other content')], commit_message='flipped')
    assert hub.commits('org/net') == before and len(hub.repos['org/net'].objects) == 1


def test_slow(hub, download):
    hub.faults.append(Fault('GET', '/lfs/', slow=0.05, chunk=50_000))
    start = time.monotonic()
    assert Path(download('org/net', 'model.safetensors')).read_bytes() == WEIGHTS
    assert time.monotonic() - start > 7 * 0.05


@pytest.mark.parametrize('stall', [0, 1000])
def test_stall(hub, download, stall):
    hub.faults.append(fault := Fault('GET', '/lfs/', stall=stall))
    results = []
    thread = threading.Thread(target=lambda: results.append(download('org/net', 'model.safetensors')))
    thread.start()
    assert fault.stalled.wait(10)
    thread.join(0.2)
    assert thread.is_alive() and not results
    fault.release.set()
    thread.join(10)
    assert Path(results[0]).read_bytes() == WEIGHTS


@pytest.mark.parametrize('late', [False, True])
@pytest.mark.parametrize('fault', [dict(status=504), dict(drop=True), dict(drop=True, rst=False)])
def test_push_cut_before_and_after_the_commit(hub, fault, late):
    hub.faults.append(Fault('POST', '/commit/', late=late, **fault))
    with pytest.raises(Exception) as caught:
        api(hub).create_commit('org/net', [add('a.txt', b'a')], commit_message='cut')
    assert type(caught.value).__module__.split('.')[0] in ('huggingface_hub', 'httpx', 'httpx2', 'requests')
    assert [commit.title for commit in hub.commits('org/net')] == ['initial commit'] + ['cut'] * late
    assert hub.count('POST', '/commit/') == 1


WITH_TIMM = """
import sys, timm, torch, timm_regnet_rnn
from timm.models import push_to_hf_hub
model = timm.create_model('hf-hub:org/regnet', pretrained=True).eval()
expected = timm.create_model('regnet_convrnn_20', num_classes=7, regulated_stages=(1, 3), checkpoint_path=sys.argv[1])
x = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    assert torch.equal(model(x), expected.eval()(x))
push_to_hf_hub(model, 'alice/pushed', safe_serialization=True, private=True)
print('same function')
"""


def test_timm(hub, tmp_path):
    """The unmodified timm, in a process that knows the stand-in from its environment only."""
    kwargs = dict(regulated_stages=(1, 3))
    model = randomize(timm.create_model('regnet_convrnn_20', num_classes=7, **kwargs))
    timm.models.save_for_hf(model, tmp_path / 'saved', model_args=kwargs, safe_serialization=True)
    hub.add_repo('org/regnet', {path.name: path.read_bytes() for path in (tmp_path / 'saved').iterdir()})
    environment = dict(
        os.environ,
        HF_ENDPOINT=hub.endpoint,
        HF_HOME=str(tmp_path / 'home'),
        HF_HUB_OFFLINE='0',
        HF_HUB_DISABLE_XET='1',
        HF_HUB_DISABLE_TELEMETRY='1',
        HF_TOKEN='hf_alice',
    )
    command = [sys.executable, '-c', WITH_TIMM, str(tmp_path / 'saved' / 'model.safetensors')]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'same function' in done.stdout and 'hf_alice' not in done.stdout + done.stderr
    assert hub.files('alice/pushed').keys() == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}
    assert hub.files('alice/pushed')['model.safetensors'] == hub.files('org/regnet')['model.safetensors']
    assert all(r.status for r in hub.requests)
