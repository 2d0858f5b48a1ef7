"""timm's train.py, which its package does not carry: where it is, and what it takes on its command line."""

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Sequence

from ..errors import KeyValues
from ..ops.fused_cpu import cache_dir

__all__ = ['find_train_py', 'machine_flags', 'parse_flags']

TIMM_URL = 'https://github.com/huggingface/pytorch-image-models'


def find_train_py(timm_dir: Optional[str]) -> Path:
    """timm's train.py: in `timm_dir`, in `$TIMM_DIR`, or in a clone of the installed timm's tag in the user's cache.

    The clone is fetched once, and verified at every use: the version is the installed one and no file differs from the
    tag's.

    Raises:
        ValueError: It is not there, cannot be fetched, or the clone was altered.
    """
    import timm

    where = timm_dir or os.environ.get('TIMM_DIR')
    if where:
        train_py = Path(where) / 'train.py'
        if not train_py.is_file():
            raise ValueError(f'{"--timm-dir" if timm_dir else "$TIMM_DIR"} {where!r} holds no train.py.')
        return train_py
    clone = cache_dir() / f'timm-{timm.__version__}'
    if not clone.exists():
        clone.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=clone.parent) as scratch:
            target = Path(scratch) / 'timm'
            command = ['git', 'clone', '-q', '--depth', '1', '--branch', f'v{timm.__version__}', TIMM_URL, str(target)]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError:
                raise ValueError('fetching train.py needs git; install it, or give --timm-dir.') from None
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ['git failed'])[-1]
                raise ValueError(
                    f'cannot fetch train.py of timm {timm.__version__} ({reason}); give a checkout by --timm-dir.'
                )
            try:
                os.replace(target, clone)
            except OSError:  # another run was first
                if not clone.exists():
                    raise
    version = clone / 'timm' / 'version.py'
    status = subprocess.run(['git', '-C', str(clone), 'status', '--porcelain'], capture_output=True, text=True)
    changed = [line for line in status.stdout.splitlines() if '__pycache__' not in line]
    found = re.search(r"__version__ = '(.+)'", version.read_text(encoding='utf-8')) if version.is_file() else None
    if status.returncode or changed or not found or found[1] != timm.__version__:
        raise ValueError(
            f'{str(clone)!r} is not the unaltered tag v{timm.__version__} of timm; delete it and try again.'
        )
    return clone / 'train.py'


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f'{message}.')


def parse_flags(options: Dict[str, Dict[str, Any]], flags: Sequence[str]) -> Dict[str, Any]:
    """The options that a train.py command line gives.

    Args:
        options: From `train_options`.
        flags: Words as they would stand after `train.py`.

    Raises:
        ValueError: train.py would refuse them.
    """
    kinds = dict(int=int, float=float)
    parser = _Flags(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, option in options.items():
        if not option['flags']:
            continue
        rest: Dict[str, Any] = {k: option[k] for k in ('nargs', 'choices') if k in option}
        if option['type'] == 'kwargs':
            rest['action'] = KeyValues
        elif option['type'] == 'bool':
            rest['action'] = 'store_true'
        else:
            rest['type'] = kinds.get(option['type'], str)
            if option.get('nargs') == '?':
                rest['const'] = True
        parser.add_argument(*option['flags'], dest=name, **rest)
    return vars(parser.parse_args(list(flags)))


def machine_flags(settings: Dict[str, Any], given: Sequence[str]) -> List[str]:
    """Flags that suit this machine, where neither the recipe nor the command line has them."""
    import torch

    mps = torch.backends.mps.is_available()
    device = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    flags = []
    if 'device' in given:
        device = settings['device']
    else:
        flags += ['--device', device]
    if 'channels_last' not in given:
        flags.append('--channels-last')
    if device.startswith('cuda') and 'amp' not in given and 'model_dtype' not in given:
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        flags += ['--amp', '--amp-dtype', dtype]
    return flags
