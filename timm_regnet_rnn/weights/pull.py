"""Weights from the Hugging Face Hub, checked before anything reads them.

huggingface_hub does the transfer, the cache and the tokens. It gives up at the first lost connection and never looks at
what arrived; this retries the whole download, and verifies the file each time it is used, also when it comes from the
cache: released weights against the manifest, everything else against the sum that the Hub states for it.
"""

import errno
import json
import logging
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple, Union

from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import one_line
from ..files import file_sum
from .config import read_config
from .manifest import RELEASED, embedded_file, known_weights

__all__ = ['check_source', 'pull', 'pull_config', 'retry', 'weights_in']

PREFIX = 'hf-hub:'
CONFIG, WEIGHTS, SUMS = 'config.json', 'model.safetensors', 'SHA256SUMS'

WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each retry
PATIENCE = 20.0  # seconds after which there is no retry; huggingface_hub has some of its own, which take time
FINAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
LONGEST_WAIT = 60.0  # seconds that a server may ask for by Retry-After
TRANSPORTS = ('httpx', 'httpx2', 'httpcore', 'httpcore2', 'requests', 'urllib3')


log = logging.getLogger('timm_regnet_rnn')


class Overloaded(OSError):
    """The server asks for more patience than anybody has."""


class _Retries(logging.Filter):
    """Takes what huggingface_hub says of each of its retries, and says it once for all."""

    told = False

    def tell(self, reason: str) -> None:
        """Log that there are retries, if that is news."""
        if not self.told:
            log.warning('the Hub does not answer as it should (%s); trying again, for up to a minute.', reason)
        self.told = True

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message goes on.

        Raises:
            Overloaded: The client would now wait for longer than is bearable; it has no other limit to that.
        """
        message = record.getMessage()
        asked = re.match(r'Rate limited\. Waiting ([\d.]+)s', message)
        if asked and float(asked[1]) > LONGEST_WAIT:
            raise Overloaded(f'it is overloaded and asks to come back in {float(asked[1]):.0f} s')
        if re.match(r"HTTP Error \d+ thrown|'.*' thrown", message, re.DOTALL):
            self.tell(message.split(' thrown')[0].strip("'"))
            return False
        return not message.startswith(('Retrying in', 'Rate limited'))


@contextmanager
def _retries_told_once() -> Iterator[_Retries]:
    client, retries = logging.getLogger('huggingface_hub.utils._http'), _Retries()
    client.addFilter(retries)
    try:
        yield retries
    finally:
        client.removeFilter(retries)


def _is_transport(error: Exception) -> bool:
    return type(error).__module__.split('.')[0] in TRANSPORTS


def _passes(error: Exception) -> bool:
    """Whether another try could end otherwise: a lost connection or an overloaded server, not a wrong name."""
    if constants.HF_HUB_OFFLINE or isinstance(error, Overloaded):
        return False
    if isinstance(error, (LocalEntryNotFoundError, json.JSONDecodeError)):  # the Hub was not reached, or a proxy spoke
        return True
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if isinstance(error, (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)):
        return False
    return _is_transport(error) or (isinstance(error, OSError) and error.errno not in FINAL_ERRNOS)


def retry(call: Callable[..., Any], *args, patience: Optional[float] = None, **kwargs) -> Any:
    """Call something that talks to the Hub, again where that could help.

    Args:
        call: What to call.
        *args, **kwargs: Its arguments.
        patience: Seconds after which a failure is the last.

    Raises:
        Exception: What the last try raised; OSError if it was the connection.
    """
    start = time.monotonic()
    with _retries_told_once() as retries:
        for wait in (*WAITS, None):
            try:
                return call(*args, **kwargs)
            except Exception as e:
                late = time.monotonic() - start > (PATIENCE if patience is None else patience)
                if wait is not None and not late and _passes(e):
                    retries.tell(one_line(e))
                    time.sleep(wait)
                elif isinstance(e, json.JSONDecodeError):
                    raise ConnectionError('what answered is not the Hub') from None
                elif _is_transport(e) and not isinstance(e, OSError):
                    raise ConnectionError(f'connection lost: {e}') from None
                else:
                    raise
    raise AssertionError('the last try returns or raises')


def _stated(file: Path, repo_id: str, filename: str, revision: Optional[str]) -> str:
    """The sum the Hub stated: the cache names its blobs by it, and a cache without symbolic links asks again."""
    name = file.resolve().name
    if not re.fullmatch(r'[0-9a-f]{64}|[0-9a-f]{40}', name) and not constants.HF_HUB_OFFLINE:
        name = retry(get_hf_file_metadata, hf_hub_url(repo_id, filename, revision=revision)).etag or ''
    return name if re.fullmatch(r'[0-9a-f]{64}|[0-9a-f]{40}', name) else ''


def _explain(error: Exception, what: str) -> str:
    """An error of huggingface_hub in one line that says what to do; it never holds a token."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    refused = 'expired' in str(error) or 'Invalid credentials' in str(error) or 'Invalid user token' in str(error)
    if status == 401 and refused and get_token():
        return f'{what}: the Hub refuses the token (HF_TOKEN, or that of `hf auth login`): it is expired or wrong.'
    if isinstance(error, (RepositoryNotFoundError, GatedRepoError)) or status in (401, 403):
        return f'{what}: no such repository, or it is private; then HF_TOKEN must hold a token that may read it.'
    if isinstance(error, RevisionNotFoundError):
        return f'{what}: the repository has no such revision.'
    if constants.HF_HUB_OFFLINE:
        return f'{what}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it.'
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f'{what}: the repository has no such file; weights in other formats are not loaded.'
    reason = one_line(error)
    return f'cannot fetch {what} ({reason}).'


def _fetch(
    hub_id: str, filename: str, cache_dir: Optional[Union[str, Path]], sha256: Optional[str]
) -> Tuple[Path, bool]:
    """A verified file of a repository, and whether a bad one had to be replaced; errors as in `pull`."""
    repo_id, _, revision = hub_id.partition('@')
    what = f'{filename!r} of {hub_id!r}'
    where: Dict[str, Any] = dict(repo_id=repo_id, filename=filename, revision=revision or None, cache_dir=cache_dir)
    for again in (False, True):
        try:
            file = Path(retry(hf_hub_download, **where, force_download=again))
            expected = sha256 or _stated(file, repo_id, filename, revision or None)
        except Exception as e:
            raise OSError(_explain(e, what)) from None
        if not expected:  # offline, and a cache without links: nothing was stated
            return file, again
        found = file_sum(file, git=len(expected) == 40)
        if found == expected:
            return file, again
        if constants.HF_HUB_OFFLINE:
            break
        try:
            file.resolve().unlink(missing_ok=True)
            file.unlink(missing_ok=True)
        except OSError as e:
            raise OSError(f'{what} in the cache is broken and cannot be removed ({e}).') from None
    raise OSError(f'{what} is broken: expected {expected}, found {found} ({file}).')


def pull(
    hub_id: str,
    filename: Optional[str] = None,
    cache_dir: Optional[Union[str, Path]] = None,
    sha256: Optional[str] = None,
) -> Path:
    """A weights file of a repository on the Hub: the one inside this package, else from the cache, else fetched.

    Args:
        hub_id: ORG/NAME, or ORG/NAME@REVISION.
        filename: A safetensors file in it; `model.safetensors` if None or if it names a file of another format.
        cache_dir: The Hub cache, huggingface_hub's own if None.
        sha256: What the file must be; what the manifest says, or else what the Hub states, if None.

    Returns:
        The file, just verified.

    Raises:
        OSError: It cannot be had, or is not what it should be even when fetched again; one line that names file,
            expected and found.
    """
    if not filename or not filename.endswith('.safetensors'):
        filename = WEIGHTS
    name = known_weights(hub_id) if filename == WEIGHTS and sha256 is None else None
    broken = ''
    if name:
        sha256, file = RELEASED[name]['sha256'], embedded_file(name)
        if file:
            found = file_sum(file)
            if found == sha256:
                return file
            broken = f'{str(file)!r} is broken: expected {sha256}, found {found}; '
    try:
        return _fetch(hub_id, filename, cache_dir, sha256)[0]
    except OSError as e:
        raise OSError(f'{broken}{e}') from None


def pull_config(hub_id: str, cache_dir: Optional[Union[str, Path]] = None) -> Tuple[Path, bool]:
    """A repository's config.json, verified like its weights.

    Returns:
        The file in the cache, and whether a broken one had to be replaced there.

    Raises:
        OSError: As for `pull`.
    """
    return _fetch(hub_id, CONFIG, cache_dir, None)


def weights_in(folder: Path) -> Path:
    """The weights file of a folder, verified if the folder has sums; safetensors before anything else.

    Raises:
        OSError: There is none, or it is not what SHA256SUMS says; one line.
    """
    preferred = [
        folder / WEIGHTS,
        *(p for suffix in ('.safetensors', '.pth', '.pth.tar', '.bin') for p in sorted(folder.glob(f'*{suffix}'))),
    ]
    file = next((p for p in preferred if p.is_file()), None)
    if file is None:
        raise FileNotFoundError(f'no weights file in {str(folder)!r}; expected {WEIGHTS}.')
    sums = folder / SUMS
    stated = sums.read_text(encoding='utf-8', errors='replace').split() if sums.is_file() else []
    expected = dict(zip(stated[1::2], stated[::2]))
    for part in (file.name, CONFIG) if sums.is_file() else ():
        found = file_sum(folder / part)
        if part not in expected:
            raise OSError(f'{str(sums)!r} is broken: it has no sum of {part}.')
        if found != expected[part]:
            raise OSError(f'{str(folder / part)!r} is broken: expected {expected[part]}, found {found}.')
    return file


def check_source(name: str, cache_dir: Optional[Union[str, Path]] = None) -> None:
    """Check the config.json of a model called hf-hub:ORG/NAME or local-dir:FOLDER before timm reads it.

    Raises:
        OSError: It cannot be had.
        ValueError: It says what it must not.
    """
    source, _, where = name.partition(':')
    if source == 'hf-hub':
        read_config(pull_config(where, cache_dir)[0], f'config.json of {where!r}')
    else:
        file = Path(where) / CONFIG
        read_config(file, repr(str(file)))
