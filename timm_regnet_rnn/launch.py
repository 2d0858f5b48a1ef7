"""The start of the command: `--help` and `list` need no models, and importing PyTorch for those takes seconds.

Importing the package registers its models. In the process of the command `timm-regnet-rnn` (or `python -m
timm_regnet_rnn`) that waits until a command asks for it by `register`; every other process imports as usual.
"""

import importlib
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from .errors import UsageError

__all__ = ['deferred', 'register']

COMMAND, PACKAGE = 'timm-regnet-rnn', 'timm_regnet_rnn'
_asked = False


def _is_command() -> bool:
    """Whether Python was started for the command. A worker process has its parent's argv, but not on its own line."""
    if sys.argv[:1] == ['-m']:  # while the module is looked for
        return '-m' in sys.orig_argv and sys.orig_argv[sys.orig_argv.index('-m') + 1 :][:1] == [PACKAGE]
    return Path(sys.argv[0] if sys.argv else '').stem == COMMAND and sys.argv[0] in sys.orig_argv


def deferred() -> bool:
    """Whether the package's import leaves the models out for now."""
    return not _asked and _is_command()


def register() -> None:
    """Register the models, if the import of the package has left that out.

    Raises:
        UsageError: HF_ENDPOINT is no address; the Hub's client would not even be imported.
    """
    global _asked
    endpoint = os.environ.get('HF_ENDPOINT', '')
    try:
        parts = urlsplit(endpoint)
        good = not endpoint or (parts.scheme in ('http', 'https') and parts.hostname and parts.port != 0)
    except ValueError:
        good = False
    if not good:
        raise UsageError(f'HF_ENDPOINT must be an address such as https://huggingface.co; got {endpoint!r}.')
    if deferred() or not hasattr(sys.modules[PACKAGE], 'from_resnet'):
        _asked = True
        importlib.reload(sys.modules[PACKAGE])
