import fcntl
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_regnet_rnn.files import SCRATCH, YOUNG, file_sum, place, scratch_folder


@settings(max_examples=20)
@given(st.binary(max_size=3000))
def test_sums_are_the_hubs(tmp_path_factory, data):
    file = tmp_path_factory.mktemp('sum') / 'file'
    file.write_bytes(data)
    assert file_sum(file) == hashlib.sha256(data).hexdigest()
    stated = subprocess.run(['git', 'hash-object', '--no-filters', file], capture_output=True, text=True, check=True)
    assert file_sum(file, git=True) == stated.stdout.strip()


def test_a_file_that_fails_its_check_leaves_the_old_one(tmp_path):
    file = tmp_path / 'net.onnx'
    file.write_bytes(b'old')

    def fail(path):
        assert path.read_bytes() == b'new' and file.read_bytes() == b'old'
        raise ValueError('wrong')

    with pytest.raises(ValueError, match='wrong'):
        place(file, b'new', fail)
    assert [p.name for p in tmp_path.iterdir()] == ['net.onnx'] and file.read_bytes() == b'old'
    assert place(file, b'new', Path.read_bytes) == b'new' == file.read_bytes()
    with pytest.raises(OSError, match='cannot write'):
        place(tmp_path / 'none' / 'net.onnx', b'new', fail)


KILLED = """
import os, signal, sys
from pathlib import Path
from timm_regnet_rnn.files import place, scratch_folder
if sys.argv[1] == 'place':
    place(Path(sys.argv[2]) / 'net.onnx', b'half', lambda file: os.kill(os.getpid(), signal.SIGKILL))
with scratch_folder(Path(sys.argv[2])) as folder:
    (folder / 'half').write_bytes(b'half')
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize('what', ['place', 'folder'])
def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path, what):
    def again():
        if what == 'place':
            place(tmp_path / 'net.onnx', b'new', Path.read_bytes)
            (tmp_path / 'net.onnx').unlink()
        else:
            with scratch_folder(tmp_path) as folder:
                assert folder.name.startswith(SCRATCH) and folder.parent == tmp_path

    subprocess.run([sys.executable, '-c', KILLED, what, tmp_path])
    (left,) = tmp_path.iterdir()
    again()
    assert left.exists(), 'too young to tell whether somebody is about to lock it'
    old = time.time() - 2 * YOUNG
    os.utime(left, (old, old))
    held = left if what == 'place' else left / '.lock'
    with held.open('rb') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        again()
        assert left.exists(), 'somebody holds it'
    os.utime(left, (old, old))
    (tmp_path / 'mine').write_bytes(b'kept')
    again()
    assert [p.name for p in tmp_path.iterdir()] == ['mine']
