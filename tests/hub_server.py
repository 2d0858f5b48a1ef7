"""A stand-in for the Hugging Face Hub: the HTTP endpoints that huggingface_hub and timm call, and faults on demand.

`HF_ENDPOINT` (or `endpoint=`) leads a client here. The content of LFS files is behind a second port, because the Hub
keeps it on other hosts: a client stops at the redirect to them and must not take its token along. Xet is not spoken:
downloads do without what the server does not offer, but huggingface_hub 2 uploads LFS files by it without asking,
unless HF_HUB_DISABLE_XET=1 or they come as open file objects.
"""

import base64
import contextlib
import fnmatch
import hashlib
import http.server
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import traceback
from collections import namedtuple
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote, unquote

import yaml  # huggingface_hub requires it

LARGEST_REGULAR_FILE = 10 * 2**20
ROUTES = []

User = namedtuple('User', 'name role orgs expired')
Commit = namedtuple('Commit', 'id parent title message authors date files')  # all files (path to File) after it
Reply = namedtuple('Reply', 'status body headers start', defaults=(b'', {}, 0))  # start: where in its file the body is


@dataclass
class Fault:
    """What happens to `times` requests (math.inf: to all) after the first `skip` whose method and path match.

    Both are regular expressions; that of the path is searched for, also in the query.
    """

    method: str
    path: str
    status: int | None = None  # answer with this error page
    retry_after: int | None = None
    drop: bool = False  # close the connection instead of answering
    late: bool = False  # status and drop only after the request took effect, like a gateway that lost patience
    cut: int | None = None  # close the connection after so many bytes of the body
    rst: bool = True  # drop and cut by a reset, or else by FIN
    flip: int | None = None  # the byte to change, counted in the file, or in what a PUT or POST brings
    bit: int = 0
    slow: float = 0  # seconds before the header and before each chunk of the body
    chunk: int = 65536
    stall: int | None = None  # hang after so many bytes of the body (0: before it takes effect) until `release`
    times: float = 1
    skip: int = 0
    seen: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def wait(self):
        """Tell that a client hangs, and let it."""
        self.stalled.set()
        self.release.wait()

    def flipped(self, data, start=0):
        """The data, which begins at `start`, with the bit changed if it is there."""
        if self.flip is None or not 0 <= self.flip - start < len(data):
            return data
        position = self.flip - start
        return data[:position] + bytes([data[position] ^ 1 << self.bit]) + data[position + 1 :]


@dataclass
class Request:
    """What a client asked, and what it was told (None: nothing)."""

    method: str
    path: str
    authorized: bool
    range: str | None
    status: int | None = None


class File:
    """A file of a commit, with the names that git and LFS have for its content."""

    def __init__(self, content, lfs):
        self.content, self.lfs, self.size = content, lfs, len(content)
        self.sha256 = hashlib.sha256(content).hexdigest()
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n'.encode()
        blob = pointer if lfs else content
        self.blob_id, self.pointer_size = hashlib.sha1(b'blob %d\0' % len(blob) + blob).hexdigest(), len(pointer)

    def about_lfs(self, name_of_hash):
        """What the Hub's JSON adds for an LFS file."""
        lfs = {name_of_hash: self.sha256, 'size': self.size, 'pointerSize': self.pointer_size}
        return {'lfs': lfs} if self.lfs else {}


@dataclass
class Repo:
    """A model repository: `refs` are branches and refs/pr/N, `objects` the LFS contents that it was sent."""

    private: bool
    gated: bool
    lfs: tuple
    refs: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)

    def is_lfs(self, path, size):
        """Whether its name or its size makes it an LFS file."""
        return size > LARGEST_REGULAR_FILE or any(fnmatch.fnmatch(path.split('/')[-1], pattern) for pattern in self.lfs)

    def head(self, revision):
        """The commit that a branch, a PR or a commit id names."""
        commit = self.commits.get(self.refs.get(revision, revision))
        if commit is None:
            raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit


class HubError(Exception):
    """An error as the Hub tells it: in the headers, and in the body."""

    def __init__(self, status, message, code=None, headers=()):
        headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {}), **dict(headers)}
        self.reply = Reply(status, json.dumps({'error': message}).encode(), headers)


class HubServer:
    """The stand-in: state in memory, one thread for each connection.

    with HubServer() as hub:
        hub.add_user('hf_alice', 'alice', orgs=('org',))
        hub.add_repo('org/name', {'config.json': b'{}', 'model.safetensors': weights})
        hub.faults.append(Fault('GET', r'/lfs/.*model.safetensors', cut=1000))
    """

    def __init__(self):
        self.repos, self.faults, self.requests = {}, [], []
        self.users, self.errors, self.connections, self.lock = {}, [], set(), threading.RLock()

    def __enter__(self):
        self.servers = [Server(('127.0.0.1', 0), Handler) for _ in range(2)]
        self.endpoint, self.cdn = (f'http://127.0.0.1:{server.server_port}' for server in self.servers)
        for server in self.servers:
            server.hub, server.is_cdn = self, server is self.servers[1]
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind, *_):
        for fault in self.faults:
            fault.release.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):  # kept alive, they would outlive the server
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self.errors and kind is None:
            raise AssertionError('the stand-in failed:\n' + '\n'.join(self.errors))

    def add_user(self, token, name, role='write', orgs=(), expired=False):
        """Let a token in; `role` is 'read' or 'write'."""
        self.users[hashlib.sha256(token.encode()).digest()] = User(name, role, tuple(orgs), expired)

    def add_repo(self, name, files=None, private=False, gated=False, lfs=('*.safetensors', '*.bin')):
        """Make a repository whose first commit holds `files` (path to bytes) and .gitattributes; returns its id."""
        self.repos[name] = Repo(private, gated, tuple(lfs))
        attributes = ''.join(f'{pattern} filter=lfs diff=lfs merge=lfs -text\n' for pattern in lfs).encode()
        return self.commit(name, {'.gitattributes': attributes, **(files or {})}, title='initial commit')

    def commit(self, name, changes, revision='main', title='commit', message='', author='somebody', parent=None):
        """Commit to a branch or PR: path to bytes, or to None for a file to delete. Returns the commit's id."""
        with self.lock:
            repo = self.repos[name]
            parent = parent or repo.refs.get(revision)
            files = dict(repo.commits[parent].files) if parent else {}
            for path, content in changes.items():
                if isinstance(content, bytes):
                    content = File(content, repo.is_lfs(path, len(content)))
                files[path] = content
                if content and content.lfs:
                    repo.objects[content.sha256] = content.content
            files = {path: file for path, file in sorted(files.items()) if file}
            what = [len(repo.commits), parent, title, [(path, file.blob_id) for path, file in files.items()]]
            oid = hashlib.sha1(json.dumps(what).encode()).hexdigest()
            date = time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime())
            repo.commits[oid] = Commit(oid, parent, title, message, [{'user': author}], date, files)
            repo.refs[revision] = oid
            return oid

    def files(self, name, revision='main'):
        """The content of every file, .gitattributes among them, by path."""
        return {path: file.content for path, file in self.repos[name].head(revision).files.items()}

    def commits(self, name, revision='main'):
        """The commits that lead to a revision, the oldest first."""
        repo = self.repos[name]
        history = [repo.head(revision)]
        while history[0].parent:
            history.insert(0, repo.commits[history[0].parent])
        return history

    def count(self, method, path):
        """How many requests matched both, as in a fault."""
        return sum(bool(re.fullmatch(method, r.method) and re.search(path, r.path)) for r in list(self.requests))

    def fault(self, method, path):
        """The fault that a request is to meet."""
        with self.lock:
            for fault in self.faults:
                if re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.seen += 1
                    if fault.skip < fault.seen <= fault.skip + fault.times:
                        return fault
        return Fault('', '')


class Server(http.server.ThreadingHTTPServer):
    """One of the two ports."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Clients that go away are what this is for."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.hub.errors.append(traceback.format_exc())


def route(method, path):
    """Make a method the endpoint of a path, in which NAME and REV stand for a repository and a revision."""
    path = path.replace('NAME', '(?P<name>[^/]+/[^/]+)').replace('REV', '(?P<revision>[^/]+)')
    return lambda endpoint: ROUTES.append((method, re.compile(path), endpoint)) or endpoint


def answer(value, status=200):
    """A JSON answer."""
    return Reply(status, json.dumps(value).encode(), {'Content-Type': 'application/json; charset=utf-8'})


def tree(files):
    """What the Hub's JSON says of files, by path."""
    entries = {
        path: {'type': 'file', 'path': path, 'oid': file.blob_id, 'size': file.size} for path, file in files.items()
    }
    return {path: entry | files[path].about_lfs('oid') for path, entry in entries.items()}


class Handler(http.server.BaseHTTPRequestHandler):
    """First HTTP, the record of the requests and the faults; then the endpoints."""

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.hub = self.server.hub
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def serve(self):
        fault = self.hub.fault(self.command, self.path)
        request = Request(self.command, self.path, 'Authorization' in self.headers, self.headers.get('Range'))
        self.hub.requests.append(request)
        size = int(self.headers.get('Content-Length', 0))
        if fault.drop and not fault.late:
            if not fault.rst:
                self.rfile.read(size)  # with something unread, the kernel sends RST instead of FIN
            return self.drop(fault.rst)
        self.body = fault.flipped(self.rfile.read(size))
        if len(self.body) < size:
            return self.drop(rst=False)  # the client left in the middle
        if fault.stall == 0:
            fault.wait()
        reply = self.dispatch() if fault.status is None or fault.late else None
        if fault.drop:
            return self.drop(fault.rst)
        if fault.status is not None:
            wait = {} if fault.retry_after is None else {'Retry-After': fault.retry_after}
            reply = Reply(fault.status, b'<html>fault</html>', {'Content-Type': 'text/html', **wait})
        request.status = reply.status
        self.send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def send(self, reply, fault):
        time.sleep(fault.slow)
        self.send_response(reply.status)
        for key, value in {**reply.headers, 'Content-Length': len(reply.body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        body = b'' if self.command == 'HEAD' else fault.flipped(reply.body, reply.start)
        for part in (body[: fault.stall], body[fault.stall :]) if fault.stall else (body[: fault.cut],):
            for start in range(0, len(part), fault.chunk):
                time.sleep(fault.slow)
                self.wfile.write(part[start : start + fault.chunk])
            if fault.stall and not fault.release.is_set():
                fault.wait()
        if fault.cut is not None:
            self.drop(fault.rst)

    def drop(self, rst):
        self.close_connection = True
        if rst:
            time.sleep(0.05)  # a reset overtakes what was sent just before it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.connection.close()  # before the base class shuts it down, which would send a FIN first

    def dispatch(self):
        path, _, query = self.path.partition('?')
        self.query = {key: values[-1] for key, values in parse_qs(query).items()}
        wanted = self.command.replace('HEAD', 'GET'), self.server.is_cdn
        try:
            for method, pattern, endpoint in ROUTES:
                match = pattern.fullmatch(path)
                if match and (method, path.startswith('/lfs/')) == wanted:
                    self.user = self.authenticate()
                    with self.hub.lock:
                        return endpoint(self, **{key: v and unquote(v) for key, v in match.groupdict().items()})
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        except HubError as error:
            return error.reply
        except Exception:
            self.hub.errors.append(f'{self.command} {path}\n{traceback.format_exc()}')
            return HubError(500, 'Internal Error').reply

    def authenticate(self):
        if 'Authorization' not in self.headers:
            return None
        if self.server.is_cdn:
            raise HubError(400, 'Only one auth mechanism allowed')  # as S3 says: the signed URL is one already
        token = self.headers['Authorization'].removeprefix('Bearer ')
        user = self.hub.users.get(hashlib.sha256(token.encode()).digest())
        if user is None or user.expired:
            what = 'User Access Token "test" is expired' if user else 'Invalid credentials in Authorization header'
            raise HubError(401, what)
        return user

    def owns(self, name):
        return self.user is not None and name.split('/')[0] in (self.user.name, *self.user.orgs)

    def readable(self, name, content=False):
        repo = self.hub.repos.get(name)
        if repo is None or repo.private and not self.owns(name):
            message = 'Repository not found' if self.user else 'Invalid username or password.'
            raise HubError(404 if self.user else 401, message, 'RepoNotFound')
        if content and repo.gated and not self.owns(name):
            raise HubError(403 if self.user else 401, f'Access to model {name} is restricted.', 'GatedRepo')
        return repo

    def writable(self, name, by_pull_request=False):
        repo = self.readable(name)
        if self.user is None:
            raise HubError(401, 'Invalid username or password.')
        if self.user.role != 'write' or not (by_pull_request or self.owns(name)):
            raise HubError(403, 'Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request')
        return repo

    def content(self, content, etag, headers=()):
        headers = {'ETag': f'"{etag}"', 'Accept-Ranges': 'bytes', **dict(headers)}
        wanted = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
        if not wanted:
            return Reply(200, content, headers)
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= stop:
            raise HubError(416, 'Range Not Satisfiable', headers={'Content-Range': f'bytes */{len(content)}'})
        headers['Content-Range'] = f'bytes {start}-{stop - 1}/{len(content)}'
        return Reply(206, content[start:stop], headers, start)

    @route('GET', '/NAME/resolve/REV/(?P<path>.+)')
    def resolve(self, name, revision, path):
        commit = self.readable(name, content=True).head(revision)
        file, headers = commit.files.get(path), {'X-Repo-Commit': commit.id}
        if file is None:
            raise HubError(404, 'Entry not found', 'EntryNotFound', headers)
        if not file.lfs:
            return self.content(file.content, file.blob_id, headers)
        location = f'{self.hub.cdn}/lfs/{name}/{file.sha256}?filename={quote(path, safe="")}'
        linked = {'X-Linked-Etag': f'"{file.sha256}"', 'X-Linked-Size': file.size, 'Location': location}
        return Reply(302, b'', headers | linked)

    @route('GET', '/lfs/NAME/(?P<oid>[0-9a-f]{64})')
    def download(self, name, oid):
        if oid not in self.hub.repos[name].objects:
            raise HubError(404, 'NoSuchKey')
        return self.content(self.hub.repos[name].objects[oid], oid)

    @route('PUT', '/lfs/NAME/(?P<oid>[0-9a-f]{64})')
    def upload(self, name, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, 'BadDigest: the content does not have this sha256')
        if name not in self.hub.repos:
            raise HubError(404, 'NoSuchBucket')
        self.hub.repos[name].objects[oid] = self.body
        return Reply(200)

    @route('POST', '/NAME.git/info/lfs/objects/batch')
    def batch(self, name):
        repo, objects = self.writable(name, by_pull_request=True), []
        for item in json.loads(self.body)['objects']:
            actions = {
                'upload': {'href': f'{self.hub.cdn}/lfs/{name}/{item["oid"]}'},
                'verify': {'href': f'{self.hub.endpoint}/{name}.git/info/lfs/objects/verify'},
            }
            objects.append(item if item['oid'] in repo.objects else {**item, 'actions': actions})
        return answer({'transfer': 'basic', 'objects': objects})

    @route('POST', '/NAME.git/info/lfs/objects/verify')
    def verify(self, name):
        item = json.loads(self.body)
        content = self.writable(name, by_pull_request=True).objects.get(item['oid'])
        if content is None or len(content) != item['size']:
            raise HubError(404, 'The object was not uploaded')
        return answer({})

    @route('POST', '/api/models/NAME/preupload/REV')
    def preupload(self, name, revision):
        repo, infos = self.writable(name, 'create_pr' in self.query), []
        files = repo.head(revision).files
        for item in json.loads(self.body)['files']:
            mode = 'lfs' if repo.is_lfs(item['path'], item['size']) else 'regular'
            known = files.get(item['path'])
            oid = {'oid': known.sha256 if known.lfs else known.blob_id} if known else {}
            infos.append({'path': item['path'], 'uploadMode': mode, 'shouldIgnore': False, **oid})
        return answer({'files': infos})

    @route('POST', '/api/models/NAME/commit/REV')
    def commit(self, name, revision):
        pull_request = 'create_pr' in self.query
        repo = self.writable(name, pull_request)
        operations = [(item['key'], item['value']) for item in map(json.loads, self.body.splitlines())]
        header, changes = dict(operations)['header'], {}
        base = repo.head(header.get('parentCommit', revision) if pull_request else revision)
        if revision not in repo.refs:
            raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        if header.get('parentCommit', base.id) != base.id:
            raise HubError(412, 'A commit has happened since. Please refresh and try again.')
        for key, value in operations[1:]:
            path = value['path']
            if key == 'file':
                changes[path] = File(base64.b64decode(value['content']), lfs=False)
            elif key == 'lfsFile':
                if value['oid'] not in repo.objects:
                    raise HubError(400, 'Your push was rejected: an LFS pointer points to a file that does not exist.')
                changes[path] = File(repo.objects[value['oid']], lfs=True)
            else:
                gone = [
                    p
                    for p in base.files
                    if p == path or key == 'deletedFolder' and p.startswith(path.rstrip('/') + '/')
                ]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", 'EntryNotFound')
                changes |= dict.fromkeys(gone)
        done = {'success': True, 'hookOutput': ''}
        if pull_request:
            number = 1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)
            revision = f'refs/pr/{number}'
            done['pullRequestUrl'] = f'{self.hub.endpoint}/{name}/discussions/{number}'
        about = {'title': header['summary'], 'message': header['description'], 'author': self.user.name}
        done['commitOid'] = self.hub.commit(name, changes, revision, parent=base.id, **about)
        return answer(done | {'commitUrl': f'{self.hub.endpoint}/{name}/commit/{done["commitOid"]}'})

    @route('POST', '/api/models/NAME/branch/REV')
    def branch(self, name, revision):
        repo = self.writable(name)
        if revision in repo.refs:
            raise HubError(409, f'Reference already exists: {revision}')
        repo.refs[revision] = repo.head(json.loads(self.body or b'{}').get('startingPoint', 'main')).id
        return answer({})

    @route('GET', '/api/models/NAME/refs')
    def refs(self, name):
        refs = self.readable(name).refs
        pulls = [ref for ref in refs if ref.startswith('refs/pr/')]
        branches = [{'name': ref, 'ref': f'refs/heads/{ref}', 'targetCommit': refs[ref]} for ref in {*refs} - {*pulls}]
        about = {'branches': branches, 'converts': [], 'tags': []}
        pulls = [{'name': ref.split('/')[-1], 'ref': ref, 'targetCommit': refs[ref]} for ref in pulls]
        return answer(about | ({'pullRequests': pulls} if 'include_prs' in self.query else {}))

    @route('GET', '/api/models/NAME/commits/REV')
    def history(self, name, revision):
        self.readable(name).head(revision)
        return answer([commit._replace(files=None)._asdict() for commit in reversed(self.hub.commits(name, revision))])

    @route('GET', '/api/models/NAME(?:/revision/REV)?')
    def model_info(self, name, revision):
        repo = self.readable(name)
        head, siblings = repo.head(revision or 'main'), []
        for path, file in head.files.items():
            metadata = {'size': file.size, 'blobId': file.blob_id, **file.about_lfs('sha256')}
            siblings.append({'rfilename': path, **(metadata if 'blobs' in self.query else {})})
        about = {'id': name, 'author': name.split('/')[0], 'sha': head.id, 'lastModified': head.date}
        return answer(about | {'private': repo.private, 'gated': repo.gated and 'manual', 'siblings': siblings})

    @route('GET', '/api/models/NAME/tree/REV')
    def list_tree(self, name, revision):
        return answer(list(tree(self.readable(name).head(revision).files).values()))

    @route('POST', '/api/models/NAME/paths-info/REV')
    def paths_info(self, name, revision):
        entries = tree(self.readable(name).head(revision).files)
        return answer([entries[path] for path in parse_qs(self.body.decode()).get('paths', ()) if path in entries])

    @route('GET', '/api/whoami-v2')
    def whoami(self):
        if self.user is None:
            raise HubError(401, 'Invalid username or password.')
        auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': self.user.role}}
        orgs = [{'type': 'org', 'name': org} for org in self.user.orgs]
        return answer({'type': 'user', 'name': self.user.name, 'orgs': orgs, 'auth': auth})

    @route('POST', '/api/repos/create')
    def create(self):
        if self.user is None:
            raise HubError(401, 'Invalid username or password.')
        wanted = json.loads(self.body)
        namespace = wanted.get('organization') or self.user.name
        name = f'{namespace}/{wanted["name"]}'
        if self.user.role != 'write' or not self.owns(name):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        url = f'{self.hub.endpoint}/{name}'
        if name in self.hub.repos:
            return answer({'error': f'You already created this model repo: {name}', 'url': url}, 409)
        self.hub.add_repo(name, private=wanted.get('private') or wanted.get('visibility') == 'private')
        return answer({'url': url, 'name': name})

    @route('POST', '/api/validate-yaml')
    def validate_yaml(self):
        content = json.loads(self.body)['content']
        metadata = re.match(r'---[ \t]*\r?\n(.*?)^---[ \t]*$', content, re.DOTALL | re.MULTILINE)
        try:
            card = yaml.safe_load(metadata[1]) if metadata else {}
            if not isinstance(card, dict):
                raise yaml.YAMLError('the metadata must be a mapping')
        except yaml.YAMLError as error:
            return answer({'errors': [{'message': str(error)}], 'warnings': []}, 400)
        warnings = [] if card else [{'message': 'empty or missing yaml metadata in repo card'}]
        return answer({'errors': [], 'warnings': warnings})


def environment(hub, **more):
    """A process's environment in which the stand-in is the Hub."""
    env = dict(os.environ, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE='0', HF_HUB_DISABLE_TELEMETRY='1', HF_TOKEN='')
    env.update(HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_DOWNLOAD_TIMEOUT='5', HF_HUB_ETAG_TIMEOUT='5', **more)
    return env
