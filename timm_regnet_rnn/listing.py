"""The models, their sizes and their pretrained tags, from the package's own files: nothing here imports PyTorch."""

import fnmatch
import json
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

from .errors import UsageError
from .weights.manifest import RELEASED

__all__ = ['SORTS', 'list_rows', 'names', 'print_rows']

SORTS = ('name', 'params', 'macs', 'top1')
# Depths for which timm has ResNet weights that a model starts from; the registry, checked by a test, goes by timm.
WARM_STARTS = {'resnet': (18, 34, 50, 101, 152), 'seresnet': (50,)}
COMPLEXITY: Dict[str, Dict[str, Any]] = json.loads(
    (Path(__file__).parent / 'model_complexity.json').read_text(encoding='utf-8')
)


def _tags(name: str) -> List[str]:
    """The pretrained tags of a model: the released weights', and the ResNet's that it starts as."""
    released = [full.partition('.')[2] for full in RELEASED if full.partition('.')[0] == name]
    regnet = re.fullmatch(r'(se)?regnet_\w+_(\d+)', name)
    source = f'{regnet[1] or ""}resnet' if regnet else ''
    warm = [f'{source}{regnet[2]}_a1_in1k'] if regnet and int(regnet[2]) in WARM_STARTS[source] else []
    return [*released, *warm]


def list_rows(pattern: str = '*', pretrained: bool = False, sort: str = 'name') -> List[Dict[str, Any]]:
    """What is known of every model that matches, without building it.

    Args:
        pattern: As a shell matches file names.
        pretrained: Only models with pretrained weights.
        sort: One of SORTS; 'top1' begins with the best, the others with the smallest.

    Returns:
        A dict per model of `name`, `params`, `macs` at `input_size`, pretrained `tags`, and `top1`, percent by tag
        where it was measured.
    """
    rows: List[Dict[str, Any]] = []
    for name, sizes in COMPLEXITY.items():
        tags = _tags(name)
        if fnmatch.fnmatch(name, pattern) and (tags or not pretrained):
            measured = {
                tag: RELEASED[f'{name}.{tag}']['metrics']['top1'] for tag in tags if f'{name}.{tag}' in RELEASED
            }
            rows.append(dict(name=name, **sizes, tags=tags, top1=measured))
    if sort == 'top1':
        rows.sort(key=lambda row: -max(row['top1'].values(), default=-1))
    elif sort != 'name':  # the file's order is that of the names
        rows.sort(key=lambda row: row[sort])
    return rows


def names() -> List[str]:
    """Every model, and NAME.TAG of all pretrained weights."""
    return [word for row in list_rows() for word in (row['name'], *(f'{row["name"]}.{tag}' for tag in row['tags']))]


def print_rows(rows: Sequence[Dict[str, Any]]) -> None:
    """Print the models in columns; in colour, and no wider than it is, on a terminal.

    Raises:
        UsageError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        raise UsageError('the list needs rich: pip install rich; --json does without it.') from None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style='bold')
    for title, right, style in (
        ('name', False, 'cyan'),
        ('params M', True, None),
        ('macs G', True, None),
        ('input', True, 'dim'),
        ('pretrained tags (top-1 %)', False, 'green'),
    ):
        fixed = title != 'pretrained tags (top-1 %)'
        table.add_column(title, justify='right' if right else 'left', style=style, no_wrap=fixed, overflow='fold')
    for row in rows:
        tags = (f'{tag} ({row["top1"][tag]:.2f})' if tag in row['top1'] else tag for tag in row['tags'])
        numbers = f'{row["params"] / 1e6:.2f}', f'{row["macs"] / 1e9:.3f}', 'x'.join(map(str, row['input_size']))
        table.add_row(row['name'], *numbers, Text(', '.join(tags)))
    width = None if sys.stdout.isatty() else 1000  # a file has lines as long as they are
    Console(width=width, highlight=False).print(table)
