"""Weights from the Hugging Face Hub, checked against the sum that the Hub states for them before anything reads them.

huggingface_hub does the transfer, the cache and the tokens. It gives up at the first lost connection and never looks at
what arrived; this retries the whole download, and verifies the file each time it is used, also when it comes from the
cache.
"""

import errno
import hashlib
import re
import time
from pathlib import Path
from typing import Any, Callable, Optional, Union

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ['pull']

WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each retry
PATIENCE = 20.0  # seconds after which there is no retry; huggingface_hub has some of its own, which take time
FINAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
TRANSPORTS = ('httpx', 'httpx2', 'httpcore', 'httpcore2', 'requests', 'urllib3')


def _passes(error: Exception) -> bool:
    """Whether another try could end otherwise: a lost connection or an overloaded server, not a wrong name."""
    if constants.HF_HUB_OFFLINE:
        return False
    if isinstance(error, LocalEntryNotFoundError):  # the Hub could not be reached, and the cache has no copy
        return True
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if isinstance(error, (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)):
        return False
    transport = type(error).__module__.split('.')[0] in TRANSPORTS
    return transport or (isinstance(error, OSError) and error.errno not in FINAL_ERRNOS)


def _retry(call: Callable[..., Any], *args, **kwargs) -> Any:
    start = time.monotonic()
    for wait in WAITS:
        try:
            return call(*args, **kwargs)
        except Exception as e:
            if not _passes(e) or time.monotonic() - start > PATIENCE:
                raise
            time.sleep(wait)
    return call(*args, **kwargs)


def _sum(file: Path, kind: str) -> str:
    """sha256 of a file, or git's name for it, which the Hub states for files that are not in LFS."""
    digest = hashlib.new(kind)
    if kind == 'sha1':
        digest.update(f'blob {file.stat().st_size}\0'.encode())
    with file.open('rb') as f:
        for chunk in iter(lambda: f.read(1 << 20), b''):
            digest.update(chunk)
    return digest.hexdigest()


def _stated(file: Path, repo_id: str, filename: str, revision: Optional[str]) -> str:
    """The sum the Hub stated: the cache names its blobs by it, and a cache without symbolic links asks again."""
    name = file.resolve().name
    if not re.fullmatch(r'[0-9a-f]{64}|[0-9a-f]{40}', name) and not constants.HF_HUB_OFFLINE:
        name = _retry(get_hf_file_metadata, hf_hub_url(repo_id, filename, revision=revision)).etag or ''
    return name if re.fullmatch(r'[0-9a-f]{64}|[0-9a-f]{40}', name) else ''


def _explain(error: Exception, what: str) -> str:
    """An error of huggingface_hub in one line that says what to do; it never holds a token."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if isinstance(error, (RepositoryNotFoundError, GatedRepoError)) or status in (401, 403):
        return f'{what}: no such repository, or it is private; then HF_TOKEN must hold a token that may read it.'
    if isinstance(error, RevisionNotFoundError):
        return f'{what}: the repository has no such revision.'
    if constants.HF_HUB_OFFLINE:
        return f'{what}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it.'
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f'{what}: the repository has no such file; weights in other formats are not loaded.'
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f'cannot fetch {what} ({reason}).'


def pull(
    hub_id: str,
    filename: Optional[str] = None,
    cache_dir: Optional[Union[str, Path]] = None,
    sha256: Optional[str] = None,
) -> Path:
    """A weights file of a repository on the Hub, from the cache if it is there.

    Args:
        hub_id: ORG/NAME, or ORG/NAME@REVISION.
        filename: A safetensors file in it; `model.safetensors` if None or if it names a file of another format.
        cache_dir: The Hub cache, huggingface_hub's own if None.
        sha256: What the file must be; what the Hub states if None.

    Returns:
        The file in the cache, just verified.

    Raises:
        OSError: It cannot be had, or is not what it should be even when fetched again; one line that names file,
            expected and found.
    """
    repo_id, _, revision = hub_id.partition('@')
    if not filename or not filename.endswith('.safetensors'):
        filename = 'model.safetensors'
    what = f'{filename!r} of {hub_id!r}'
    where = dict(repo_id=repo_id, filename=filename, revision=revision or None, cache_dir=cache_dir)
    for again in (False, True):
        try:
            file = Path(_retry(hf_hub_download, **where, force_download=again))
            expected = sha256 or _stated(file, repo_id, filename, revision or None)
        except Exception as e:
            raise OSError(_explain(e, what)) from None
        if not expected:  # offline, and a cache without links: nothing was stated
            return file
        found = _sum(file, 'sha256' if len(expected) == 64 else 'sha1')
        if found == expected:
            return file
        if constants.HF_HUB_OFFLINE:
            break
        try:
            file.resolve().unlink(missing_ok=True)
            file.unlink(missing_ok=True)
        except OSError as e:
            raise OSError(f'{what} in the cache is broken and cannot be removed ({e}).') from None
    raise OSError(f'{what} is broken: expected {expected}, found {found} ({file}).')
