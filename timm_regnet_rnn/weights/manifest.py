"""What was released: manifest.json, the one place of names, hashes and figures of pretrained weights."""

import json
import os
from pathlib import Path
from typing import Any, Dict, Optional

__all__ = ['RELEASED', 'embedded_file', 'hub_id', 'known_weights']

HERE = Path(__file__).parent
MANIFEST = HERE / 'manifest.json'
RELEASED: Dict[str, Dict[str, Any]] = json.loads(MANIFEST.read_text(encoding='utf-8'))
ORGANISATION = os.environ.get('TIMM_REGNET_RNN_HUB_ORG') or 'timm-regnet-rnn'


def hub_id(name: str) -> str:
    """Where a released weight lies on the Hub, ORG/NAME@REVISION; without the revision if it is not pinned.

    Args:
        name: NAME.TAG as in the manifest; `{org}` in its repository id stands for `TIMM_REGNET_RNN_HUB_ORG`.
    """
    entry = RELEASED[name]
    repo_id = entry['repo_id'].format(org=ORGANISATION)
    return f'{repo_id}@{entry["revision"]}' if entry['revision'] else repo_id


def known_weights(wanted: str) -> Optional[str]:
    """NAME.TAG of the released weights that an id on the Hub stands for, None for any other repository or revision."""
    return next((name for name in RELEASED if hub_id(name) == wanted), None)


def embedded_file(name: str) -> Optional[Path]:
    """The file of a released weight inside this package, None if there is none."""
    file = HERE / f'{name}.safetensors'
    return file if file.is_file() else None
