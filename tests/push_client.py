"""A process that pushes, and the stand-in for the Hub that it pushes to, for the tests of what is sent."""

import json
import subprocess
import sys

import pytest
from hub_server import HubServer, environment

CLIENT = """
import contextlib, io, json, os, sys
from timm_regnet_rnn.weights import pull, push
pull.WAITS = (0.01, 0.02, 0.04, 0.08)
for line in sys.stdin:
    os.environ['HF_TOKEN'], *args = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = push.main(args)
        except SystemExit as e:
            status = e.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


class Client:
    """A process that pushes what it is told to, so that importing torch is paid once."""

    def __init__(self, hub):
        self.process = subprocess.Popen(
            [sys.executable, '-c', CLIENT],
            env=environment(hub, HF_HUB_DISABLE_XET='1'),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def push(self, *args, token='hf_right'):
        """Status, stdout and stderr of `push.py ARGS`; the token is in neither."""
        print(json.dumps([token, *map(str, args)]), file=self.process.stdin, flush=True)
        status, out, err = json.loads(self.process.stdout.readline())
        assert 'hf_' not in out + err
        return status, out, err

    def fails(self, *args, **kwargs):
        """The one line that a push ends with, behind at most one that says it tries again."""
        status, _, err = self.push(*args, **kwargs)
        *notes, error = err.splitlines()
        assert status == 2 and len(notes) < 2 and all('trying again' in note for note in notes), err
        return error

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope='module')
def stand_in():
    with HubServer() as hub:
        hub.add_user('hf_right', 'alice', orgs=('org', 'timm-regnet-rnn'))
        hub.add_user('hf_reader', 'bob', role='read')
        hub.add_user('hf_foreign', 'carol')
        hub.add_user('hf_old', 'alice', orgs=('org',), expired=True)
        yield hub


@pytest.fixture
def hub(stand_in):
    stand_in.faults.clear()
    stand_in.requests.clear()
    stand_in.repos.clear()
    return stand_in


@pytest.fixture(scope='module')
def client(stand_in):
    client = Client(stand_in)
    yield client
    client.close()
