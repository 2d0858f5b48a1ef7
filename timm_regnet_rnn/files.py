"""Sums of files, and files that have their name only once they are whole.

What a killed process left behind is cleared by the next.
"""

import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

from filelock import FileLock, Timeout
from huggingface_hub.utils.sha import git_hash, sha_fileobj

try:
    import fcntl
except ImportError:  # Windows: what was left behind stays there
    fcntl = None  # type: ignore[assignment]

__all__ = ['file_sum', 'place', 'scratch_folder']

Result = TypeVar('Result')
SCRATCH = '.timm_regnet_rnn-'
YOUNG = 60  # seconds in which a file that nobody holds yet may still be about to be locked


def _clear(file: Path) -> None:
    """Remove the scratch files of `file` that no process holds."""
    for left in file.parent.glob(f'.*.{file.name}') if fcntl else ():
        if re.fullmatch(rf'\.\d+\.{re.escape(file.name)}', left.name):
            with contextlib.suppress(OSError), left.open('rb') as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(held.fileno()).st_mtime > YOUNG:
                    left.unlink()


@contextlib.contextmanager
def _written(scratch: Path, data: bytes) -> Iterator[Any]:
    """A file with its bytes on the disk, locked as long as the context lasts."""
    with open(scratch, 'wb') as f:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_SH)
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
        yield f


def place(file: Path, data: bytes, check: Callable[[Path], Result]) -> Result:
    """Write a file that has its name only once it is whole, on the disk and checked.

    Args:
        file: The file; an older one of that name is replaced, or left as it was.
        data: Its content.
        check: Gets the file under another name, and raises what is wrong with it.

    Returns:
        What `check` returns.

    Raises:
        OSError: The file cannot be written.
    """
    _clear(file)
    scratch = file.with_name(f'.{os.getpid()}.{file.name}')
    with contextlib.ExitStack() as stack:
        stack.callback(scratch.unlink, missing_ok=True)
        try:
            written = stack.enter_context(_written(scratch, data))
        except OSError as e:
            raise OSError(f'cannot write {str(file)!r} ({e.strerror}).') from None
        result = check(scratch)
        if not fcntl:
            written.close()  # Windows renames no open file
        os.replace(scratch, file)
        return result


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder to make things in, beside where they go; what killed processes left of theirs is removed first."""
    for left in parent.glob(f'{SCRATCH}*'):
        with contextlib.suppress(OSError, Timeout), FileLock(str(left / '.lock'), timeout=0):
            if time.time() - left.stat().st_mtime > YOUNG:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=parent) as name, FileLock(str(Path(name) / '.lock')):
        yield Path(name)


def file_sum(file: Path, git: bool = False) -> str:
    """The sum by which the Hub knows a file, in hexadecimal: sha256, or git's own for files outside of LFS."""
    if git:
        return git_hash(file.read_bytes())
    with file.open('rb') as f:
        return sha_fileobj(f).hex()
