"""The models, their sizes and their pretrained tags, from the package's own files: nothing here imports PyTorch.

Each model has a row, and each of its tags one more, with what the model costs and gains beside its ResNet.
"""

import csv
import fnmatch
import io
import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from .errors import UsageError
from .names import parse_name
from .weights.manifest import RELEASED

if TYPE_CHECKING:
    from .results import Groups

__all__ = ['SORTS', 'csv_table', 'full_name', 'list_rows', 'markdown_tables', 'names', 'print_rows']

SIZES = ('params', 'macs', 'activations')
BEST_FIRST = ('top1', 'gain')
SORTS = ('name', *SIZES, *BEST_FIRST)
# Depths for which timm has ResNet weights that a model starts from; the registry, checked by a test, goes by timm.
WARM_STARTS = {'resnet': (18, 34, 50, 101, 152), 'seresnet': (50,)}
COMPLEXITY: Dict[str, Dict[str, Any]] = json.loads(
    (Path(__file__).parent / 'model_complexity.json').read_text(encoding='utf-8')
)
OURS = [name for name in COMPLEXITY if re.match('(se)?regnet_|cifar_', name) and '.' not in name]


def _tags(name: str) -> List[str]:
    """The pretrained tags of a model: the released weights', and the ResNet's that it starts as."""
    released = [full.partition('.')[2] for full in sorted(RELEASED) if full.partition('.')[0] == name]
    regnet = re.fullmatch(r'(se)?regnet_\w+_(\d+)', name)
    source = f'{regnet[1] or ""}resnet' if regnet else ''
    warm = [f'{source}{regnet[2]}_a1_in1k'] if regnet and int(regnet[2]) in WARM_STARTS[source] else []
    return [*released, *warm]


def _gain(run: Optional[str], groups: 'Groups') -> List[float]:
    """Points of top-1 over the ResNet, one per seed, under the settings of a run; none where nobody measured both."""
    from .results import over_resnet

    for rows in groups.values():
        for label, runs in rows.items():
            if run in [other.run for other in runs]:
                return over_resnet(rows, label)
    return []


def _row(name: str, tag: str, groups: 'Groups') -> Dict[str, Any]:
    """What is known of a model, or of a tag of it; keys as in `list_rows`."""
    full = f'{name}.{tag}' if tag else name
    sizes = COMPLEXITY.get(full, COMPLEXITY[name])
    released = RELEASED.get(full, {})
    row = dict(name=name, tag=tag, **sizes, dataset=released.get('dataset'), top1=None, resnet=None)
    row['top1'] = released['metrics']['top1'] if released else None
    costs = dict.fromkeys(f'{size}_cost' for size in SIZES)
    gains: List[float] = []
    if parse_name(name).cell:
        row['resnet'] = parse_name(name).resnet
        base = COMPLEXITY.get(f'{row["resnet"]}.{tag}', COMPLEXITY[row['resnet']])  # the same images and classes
        for size in SIZES:
            costs[f'{size}_cost'] = round(100 * (sizes[size] / base[size] - 1), 2)
        gains = _gain(released.get('run'), groups)
    points = round(mean(gains), 2) if gains else None
    deviation = round(stdev(gains), 2) if len(gains) > 1 else None
    return dict(row, **costs, gain=points, gain_deviation=deviation, gain_seeds=len(gains))


def list_rows(
    pattern: str = '*', pretrained: bool = False, sort: str = 'name', groups: 'Optional[Groups]' = None
) -> List[Dict[str, Any]]:
    """What is known of every model that matches, and of its tags, without building it.

    * `name`, `tag` ('' for the model itself), and `resnet`, which it is measured against (None for a ResNet);
    * `params`, and `macs` and `activations` for one image of `input_size`;
    * `params_cost`, `macs_cost` and `activations_cost`, percent more than the ResNet's;
    * `top1`, percent on the test split of `dataset`, of the released weights; None where not measured;
    * `gain`, points of top-1 over the ResNet under the same settings, mean of `gain_seeds` differences paired by
      seed, and `gain_deviation`, their sample standard deviation.

    Args:
        pattern: As a shell matches file names; a tag is listed where NAME or NAME.TAG matches.
        pretrained: Only tags, which have pretrained weights.
        sort: One of SORTS; 'top1' and 'gain' begin with the best, the others with the smallest.
        groups: Runs as `results.read_runs` gives them; those of the project if None.

    Returns:
        A dict per model, and one per tag, with these keys.

    Raises:
        ValueError: The project's results.csv is broken.
    """
    if groups is None:
        from .results import RECIPES, parse, read_runs

        groups = read_runs(RECIPES / 'results.csv', parse)
    rows: List[Dict[str, Any]] = []
    for name in OURS:
        for tag in ('', *_tags(name)):
            matches = fnmatch.fnmatch(name, pattern) or (tag and fnmatch.fnmatch(f'{name}.{tag}', pattern))
            if matches and (tag or not pretrained):
                rows.append(_row(name, tag, groups))
    if sort in BEST_FIRST:
        rows.sort(key=lambda row: -(float('-inf') if row[sort] is None else row[sort]))
    elif sort != 'name':  # they are in that order
        rows.sort(key=lambda row: row[sort])
    return rows


def full_name(row: Dict[str, Any]) -> str:
    """NAME or NAME.TAG, as timm.create_model takes it."""
    return f'{row["name"]}.{row["tag"]}' if row['tag'] else row['name']


def names() -> List[str]:
    """Every model, and NAME.TAG of all pretrained weights."""
    return [full_name(row) for row in list_rows(groups={})]


def _cells(row: Dict[str, Any]) -> Dict[str, str]:
    """Titles, in the order of the table, and what stands below them: '' where there is nothing."""

    def cost(size: str) -> str:
        value = row[f'{size}_cost']
        return '' if value is None else f'{value:+.1f} %'

    spread = f' ± {row["gain_deviation"]:.2f}' if row['gain_deviation'] is not None else ''
    return {
        'model': full_name(row),
        'params M': f'{row["params"] / 1e6:.3f}',
        'params cost': cost('params'),
        'macs G': f'{row["macs"] / 1e9:.3f}',
        'macs cost': cost('macs'),
        'acts M': f'{row["activations"] / 1e6:.3f}',
        'acts cost': cost('activations'),
        'input': 'x'.join(map(str, row['input_size'])),
        'top-1 %': '' if row['top1'] is None else f'{row["top1"]:.2f}',
        'gain': '' if row['gain'] is None else f'{row["gain"]:+.2f}{spread} (n={row["gain_seeds"]})',
    }


WITH_COST = ('params M', 'params cost'), ('macs G', 'macs cost'), ('acts M', 'acts cost')
FIRST_TO_GO = ('input', 'acts cost', 'acts M', 'params cost', 'macs cost', 'gain', 'top-1 %', 'macs G', 'params M')


def _fitting(table: Sequence[Dict[str, str]], width: int) -> Tuple[List[str], List[str]]:
    """The titles of the columns that fit into a width, and of those that do not."""
    shown, hidden = list(table[0]), list[str]()
    wide = {title: max(len(title), *(len(cells[title]) for cells in table)) + 2 for title in shown}
    for title in FIRST_TO_GO:
        if sum(wide[title] for title in shown) - 2 > width:
            shown.remove(title)
            hidden.insert(0, title)
    return shown, hidden


def print_rows(rows: Sequence[Dict[str, Any]]) -> None:
    """Print the models in columns; in colour, and no wider than it is, on a terminal.

    Args:
        rows: One or more of `list_rows`.

    Raises:
        UsageError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        raise UsageError('the list needs rich: pip install rich; --json does without it.') from None
    plain = None if sys.stdout.isatty() else io.StringIO()
    console = Console(file=plain, width=None if plain is None else 1000, highlight=False)
    cells = [_cells(row) for row in rows]
    shown, hidden = _fitting(cells, console.width)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style='bold')
    styles = {'model': 'cyan', 'top-1 %': 'green', 'gain': 'green'}
    for title in shown:
        style = styles.get(title, 'dim' if title in FIRST_TO_GO[:5] else None)
        left = title == 'model'
        table.add_column(title, justify='left' if left else 'right', style=style, no_wrap=not left, overflow='fold')
    for row in cells:
        table.add_row(*(Text(row[title] or '-') for title in shown))
    console.print(table)
    if plain is not None:  # a file has lines as long as they are
        print('\n'.join(line.rstrip() for line in plain.getvalue().splitlines()))
    elif hidden:
        console.print(f'{console.width} columns leave out: {", ".join(hidden)}', style='dim')


def csv_table(rows: Sequence[Dict[str, Any]]) -> str:
    """The rows of `list_rows` as CSV, with its keys as header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(dict(row, input_size='x'.join(map(str, row['input_size']))) for row in rows)
    return out.getvalue()


def markdown_tables(rows: Sequence[Dict[str, Any]]) -> str:
    """The rows of `list_rows` as Markdown, a table for each size of images."""
    parts = []
    for size in dict.fromkeys(tuple(row['input_size']) for row in rows):
        lines = [['model', 'params M', 'macs G', 'acts M', 'top-1 %', 'gain'], ['---', *['---:'] * 5]]
        for cells in (_cells(row) for row in rows if tuple(row['input_size']) == size):
            sizes = [f'{cells[title]} {cells[cost]}'.rstrip().replace(' %', '\u00a0%') for title, cost in WITH_COST]
            lines.append([f'`{cells["model"]}`', *sizes, cells['top-1 %'], cells['gain']])
        table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
        parts.append(f'### Images of {size[1]}x{size[2]}\n\n{table}')
    return '\n\n'.join(parts)
