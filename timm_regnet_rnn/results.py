"""results.csv, one row per finished run: read, checked, and made into tables."""

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypeVar, get_type_hints

import yaml

from .names import parse_name

HERE = Path(__file__).resolve().parent
# A wheel carries the recipes inside the package; a checkout has them in a folder of their own.
IN_WHEEL, IN_CHECKOUT = HERE / 'training' / 'recipes', HERE.parent / 'train_recipes'
RECIPES = IN_CHECKOUT if (IN_CHECKOUT / 'cifar_paper.yaml').is_file() else IN_WHEEL
REPOSITORY = 'https://github.com/timm-regnet-rnn/timm_regnet_rnn'  # as in pyproject.toml
COMPLEXITY = json.loads((HERE / 'model_complexity.json').read_text(encoding='utf-8'))
EPOCHS = {p.stem: yaml.safe_load(p.read_text(encoding='utf-8')).get('epochs', 300) for p in RECIPES.glob('*.yaml')}
Label = Tuple[str, str]  # a row of a table: model, model_kwargs
Group = Tuple[Any, ...]  # a table: data set, recipe, epochs, overrides
Key = Tuple[Group, Label, int]  # a run: its table, its row there, its seed


class Run(NamedTuple):
    """A row of results.csv, and the table and the table's row that it belongs to.

    Units: `top1`, `top5` and `best_top1` in percent, `params` in parameters, `macs` in multiply-adds for one image.
    """

    run: str
    date: str
    model: str
    model_kwargs: str
    recipe: str
    overrides: str
    dataset: str
    seed: int
    epochs: int
    params: int
    macs: int
    top1: float
    top5: float
    weights: str
    best_epoch: int
    best_top1: float
    images_per_s: Any  # a float, or '' where it was not measured
    processes: int
    device: str
    versions: str
    commit: str
    group: Group
    label: Label

    @property
    def key(self) -> Key:
        """What no two runs share."""
        return self.group, self.label, self.seed


COLUMNS = Run._fields[:-2]
EARLY_EXIT = ('weights', 'images', 'last_but_two', 'last_but_one', 'last', 'cosine')
CURVE = ('epoch', 'lr', 'train_loss', 'eval_loss', 'top1', 'top5')
REGULATOR_KWARGS = ('regulator', 'regulated_stages', 'share_regulator', 'carry')  # a ResNet has none of them
NUMBERS = {name: kind for name, kind in get_type_hints(Run).items() if kind in (int, float)}
# Cells that stand in the README before anybody has filled them.
PLANNED_RECIPES = ('cifar_paper', 'cifar_modern')
PLANNED_GROUPS = [('CIFAR-10, JPEG q75 mirror', name, EPOCHS.get(name, 200), '') for name in PLANNED_RECIPES]
PLANNED_MODELS = (
    *('cifar_resnet_20', 'regnet_convrnn_20', 'regnet_convgru_20', 'regnet_convlstm_20'),
    *('cifar_seresnet_20', 'seregnet_convlstm_20', 'cifar_resnet_56', 'regnet_convlstm_56'),
)
# Student's t, 0.975 quantile, for 1 to 20 degrees of freedom
# fmt: off
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)
# fmt: on
FAMILIES = ('', 'convrnn', 'convgru', 'convlstm')  # cells, in the order of rows


def split_kwargs(text: str) -> List[str]:
    """`name=value` arguments, sorted, so that two spellings are one row."""
    return sorted(re.split(r'\s+(?=\w+=)', text)) if text else []


def label_of(model: str, model_kwargs: str) -> Label:
    """The row of a table that a run belongs to."""
    return model, ' '.join(split_kwargs(model_kwargs))


def group_of(dataset: str, recipe: str, epochs: int, overrides: str, processes: int) -> Group:
    """The table that a run belongs to."""
    # a batch norm sees the images of its process alone, so their number is part of the setting
    several = f'--nproc {processes}' if processes > 1 else ''
    return dataset, recipe, epochs, ' '.join(filter(None, [overrides, several]))


def resnet_of(label: Label) -> Optional[Label]:
    """Label of the ResNet that a RegNet is measured against; arguments that both can have must agree."""
    try:
        name = parse_name(label[0])
    except ValueError:  # a model of timm's that is neither
        return None
    if not name.cell or name.tag:  # a ResNet, or one that starts elsewhere
        return None
    shared = [arg for arg in split_kwargs(label[1]) if arg.split('=')[0] not in REGULATOR_KWARGS]
    return name.resnet, ' '.join(shared)


MODELS = {*COMPLEXITY, *(resnet[0] for name in COMPLEXITY if (resnet := resnet_of((name, ''))))}


def traits(model: str) -> Tuple[int, bool, int]:
    """Depth, whether with SE, and index of the family."""
    try:
        name = parse_name(model)
    except ValueError:  # a model of timm's that is neither a RegNet nor its ResNet
        return 0, False, 0
    return name.depth, name.se, FAMILIES.index(name.cell)


def row_order(label: Label) -> Tuple[Any, ...]:
    """Sort key of rows: variants stand below their model."""
    return traits(label[0]), label


def group_order(group: Group) -> Tuple[Any, ...]:
    """Sort key of tables: the planned ones, others of full length, the shortened."""
    planned = PLANNED_GROUPS.index(group) if group in PLANNED_GROUPS else len(PLANNED_GROUPS)
    return planned, group[2] < EPOCHS.get(group[1], 0), group


def whole(row: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The row.

    Raises:
        ValueError: It is cut, or has more fields than the header.
    """
    if None in row or None in row.values():
        raise ValueError('not as many fields as the header has')
    return row


def parse_ours(row: Mapping[Any, Any]) -> Run:
    """The Run of a row for this project's own tables: of a model and a recipe of ours."""
    run = parse(row)
    if run.model.split('.')[0] not in MODELS:
        raise ValueError(f'unknown model {run.model!r}')
    if run.recipe not in EPOCHS:
        raise ValueError(f'no recipe {run.recipe!r} in {RECIPES.name}')
    return run


def parse(row: Mapping[Any, Any]) -> Run:
    """The Run of one row of results.csv, checked by itself."""
    whole(row)
    values: Dict[str, Any] = {}
    for name in COLUMNS:
        text = ' '.join(row[name].split())
        if re.search('[|<>`]', text):
            raise ValueError(f'{name} {text!r} would break the table')
        try:
            values[name] = float(text) if name == 'images_per_s' and text else NUMBERS.get(name, str)(text)
        except ValueError:
            raise ValueError(f'{name} is no number: {text!r}') from None
    if values['weights'] not in ('last', 'ema'):
        raise ValueError(f'weights are last or ema, not {values["weights"]!r}')
    if (
        not values['dataset'] or not values['run'] or Path(values['run']).name != values['run']
    ):  # the run names its curve's file
        raise ValueError(f'empty dataset, or run {values["run"]!r} is no file name')
    if min(values['params'], values['macs'], values['epochs']) < 1:
        raise ValueError('params, macs or epochs below 1')
    if not 0 <= values['top1'] <= values['top5'] <= 100 or not 0 <= values['best_top1'] <= 100:
        raise ValueError(
            f'top1 {values["top1"]}, top5 {values["top5"]}, best_top1 {values["best_top1"]}: not percentages'
        )
    if not re.fullmatch('([0-9a-f]{12,40}(-dirty)?)?', values['commit']):  # the last column: a cut row ends in it
        raise ValueError(f'commit {values["commit"]!r} is none: twelve hexadecimal digits, or nothing')
    group = group_of(*(values[name] for name in ('dataset', 'recipe', 'epochs', 'overrides', 'processes')))
    return Run(**values, group=group, label=label_of(values['model'], values['model_kwargs']))


T = TypeVar('T')


def read_csv(
    path: Path, columns: Sequence[str], convert: Callable[[Mapping[Any, Any]], T], ended: bool = False
) -> List[T]:
    """`convert` of each row; what it raises gets the line.

    Args:
        path: The file.
        columns: Those that it must have.
        convert: Makes something of a row.
        ended: Refuse a last row without its end of line: what is left of a number is a number too.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f'{str(path)!r} is no regular file.')
    with open(path, newline='', encoding='utf-8-sig') as file:
        reader = csv.DictReader(file, strict=True)
        try:
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f'no column {", ".join(missing)}')
            rows = [convert(row) for row in reader]
            if ended and not path.read_bytes().endswith(b'\n'):
                raise ValueError('the row is cut: it has no end of line')
            return rows
        except (ValueError, csv.Error) as e:
            raise ValueError(f'{path.name}, line {reader.line_num}: {e}') from None


def read_header(path: Path) -> List[str]:
    """The columns of a CSV file."""
    with open(path, newline='', encoding='utf-8-sig') as file:
        return list(csv.DictReader(file).fieldnames or ())


Groups = Dict[Group, Dict[Label, List[Run]]]


def read_runs(path: Path, parse: Callable[[Mapping[Any, Any]], Run] = parse_ours) -> Groups:
    """The runs of results.csv by group and label, in the order of tables and rows; none without the file.

    Args:
        path: results.csv.
        parse: Makes a Run of a row; `parse` takes those of any model and recipe.

    Raises:
        ValueError: A row cannot stand in a table; in one line.
    """
    runs = read_csv(path, COLUMNS, parse) if path.exists() else []
    seen: Dict[Any, Any] = {}
    groups: Groups = defaultdict(lambda: defaultdict(list))
    for run in runs:
        # once each: the run, and a seed under the same settings, whose second run would be no independent draw
        keys: Tuple[Any, ...] = (run.run, run.key)
        for key in keys:
            if seen.setdefault(key, run) is not run:
                raise ValueError(f'{path.name}: {run.run!r} repeats {seen[key].run!r}; one of the two rows has to go')
        sizes = f'{run.params} params and {run.macs} macs'
        for key, value in ((run.group, f'{run.weights} weights'), ((*run.group, *run.label), sizes)):
            if seen.setdefault(key, value) != value:
                raise ValueError(f'{path.name}: {run.run!r} has {value}, a row that it stands with {seen[key]}')
    for run in sorted(runs, key=lambda run: (group_order(run.group), row_order(run.label), run.seed)):
        groups[run.group][run.label].append(run)
    return groups


def read_curves(groups: Groups, folder: Path) -> Dict[str, List[Dict[str, float]]]:
    """The learning curve of every run, one mapping of CURVE's columns for each epoch.

    Raises:
        ValueError: A curve is not whole; in one line.
        OSError: A curve is missing.
    """
    curves = {}
    for run in (run for rows in groups.values() for runs in rows.values() for run in runs):
        path = folder / f'{run.run}.csv'
        curve = read_csv(path, CURVE, lambda row: {name: float(whole(row)[name]) for name in CURVE}, ended=True)
        if [row['epoch'] for row in curve] != list(range(1, run.epochs + 1)):
            raise ValueError(f'{path.name} does not have the epochs 1 to {run.epochs}')
        curves[run.run] = curve
    return curves


def interval(values: Sequence[float]) -> Tuple[float, float]:
    """95 % confidence interval of the mean, Student's t: mean ± t(0.975, n - 1) s / √n.

    Beyond 21 values it is a little too wide, by less than 7 %.
    """
    half = T975[min(len(values) - 1, len(T975)) - 1] * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def control_of(label: Label) -> Label:
    """Label of the control of a RegNet: the same net with the fuse convolution and no memory."""
    kwargs = [arg for arg in split_kwargs(label[1]) if arg.split('=')[0] not in REGULATOR_KWARGS]
    name = re.sub(r'regnet_conv[a-z]+_', 'regnet_convlstm_', label[0])
    return name, ' '.join(sorted([*kwargs, 'regulator=fuse']))


def differences(groups: Groups, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown table of paired differences by seed, of RegNets to their ResNets and to their controls.

    Only where at least two seeds are shared: one pair says nothing of the spread.
    """
    head = ['data set, length', 'model', 'against', 'top-1, points', '95 % interval', 'training loss', 'seeds']
    lines = []
    for group, rows in groups.items():
        for label, runs in rows.items():
            others = [resnet_of(label)] if 'regulator=fuse' in label[1] else [resnet_of(label), control_of(label)]
            for other in (other for other in others if other and other in rows):
                pair = {run.seed: run for run in rows[other]}
                both = [(run, pair[run.seed]) for run in runs if run.seed in pair]
                if len(both) < 2:
                    continue
                tops = [a.top1 - b.top1 for a, b in both]
                losses = [curves[a.run][-1]['train_loss'] - curves[b.run][-1]['train_loss'] for a, b in both]
                low, high = interval(tops)
                name, against = (f'`{" ".join(filter(None, x))}`' for x in (label, other))
                where = f'{group[0]}, {group[2]} epochs'
                seeds = ', '.join(str(run.seed) for run, _ in both)
                ends = f'{low:+.2f} to {high:+.2f}'
                lines.append([where, name, against, spread(tops, '+'), ends, f'{mean(losses):+.3f}', seeds])
    if not lines:
        return 'No two nets share two seeds yet.'
    return '\n'.join(f'| {" | ".join(line)} |' for line in [head, ['---'] * len(head), *lines])


def read_exits(file: Path) -> List[Dict[str, str]]:
    """The rows of early_exit.csv; none without the file."""
    return read_csv(file, EARLY_EXIT, lambda row: dict(whole(row)), ended=True) if file.is_file() else []


def early_exits(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown table of the rows of early_exit.csv."""
    if not rows:
        return 'Nothing measured yet.'
    head = ['weights', 'images', 'after the last block but two', 'last but one', 'last', 'cosine']
    lines = [[f'`{row["weights"]}`', *(row[name] for name in EARLY_EXIT[1:])] for row in rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in [head, ['---'] * len(head), *lines])


def spread(values: Sequence[float], sign: str = '') -> str:
    """Mean, and sample standard deviation where there is one."""
    deviation = f' ± {stdev(values):.2f}' if len(values) > 1 else ''
    return f'{round(mean(values), 2) + 0.0:{sign}.2f}{deviation}'  # + 0.0 turns -0.0 into 0.0


def over_resnet(rows: Mapping[Label, List[Run]], label: Label) -> List[float]:
    """Points of top-1 that a label's runs have over the runs of its ResNet with the same seeds."""
    baseline = resnet_of(label)
    resnet = {run.seed: run.top1 for run in rows.get(baseline, [])} if baseline else {}
    return [run.top1 - resnet[run.seed] for run in rows.get(label, []) if run.seed in resnet]


def cells(rows: Mapping[Label, List[Run]], label: Label) -> List[str]:
    """A label's top-1, top-5, difference to its ResNet, and seeds; empty where nobody ran it."""
    runs = rows.get(label, [])
    if not runs:
        return [''] * 4
    differences = over_resnet(rows, label)
    difference = spread(differences, '+') if differences else ''
    if differences and len(differences) < len(runs):
        difference += f' (n = {len(differences)})'
    seeds = f'n = {len(runs)}: {", ".join(str(run.seed) for run in runs)}'
    return [spread([run.top1 for run in runs]), spread([run.top5 for run in runs]), difference, seeds]


def describe(group: Group, mark: str = '') -> str:
    """Epochs and overrides in words, with `mark` around code."""
    full = EPOCHS.get(group[1], 0)
    epochs = f'shortened to {group[2]} of {full} epochs' if group[2] < full else f'{group[2]} epochs'
    return f'{epochs}, {mark + group[3] + mark if group[3] else "no overrides"}'


def table(groups: Groups, planned: Sequence[str] = ()) -> str:
    """Caption and Markdown table of groups on one data set, side by side."""
    labels: Dict[Label, Mapping[str, Any]] = {(model, ''): COMPLEXITY[model] for model in planned}
    caption, head, runs = '', ['model', 'parameters (M)', 'multiply-adds (G)'], list[Run]()
    for group, rows in groups.items():
        runs += [run for same in rows.values() for run in same]
        ema = ', EMA weights' if any(run.weights == 'ema' for same in rows.values() for run in same) else ''
        recipe = f'`{group[1]}`'
        if group[1] in EPOCHS:
            recipe = f'[{recipe}]({REPOSITORY}/blob/main/train_recipes/{group[1]}.yaml)'
        caption += f' {recipe}: {describe(group, "`")}{ema}.'
        head += [f'`{group[1]}`: top-1' if len(groups) > 1 else 'top-1', 'top-5', 'to its ResNet', 'seeds']
    labels.update((run.label, run._asdict()) for run in runs)
    commits = sorted({re.sub('^([0-9a-f]{7})[0-9a-f]+', r'\1', run.commit) or 'unknown' for run in runs})
    where = f'{"; ".join(sorted({run.device for run in runs}))}; commit {", ".join(commits)}' if runs else 'no runs yet'
    lines = [f'**{group[0]}.**{caption} Last epoch; {where}.', '', f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    for label, size in sorted(labels.items(), key=lambda item: row_order(item[0])):
        row = [f'`{" ".join(filter(None, label))}`']
        row += [f'{x:.3f}' if x < 1 else f'{x:.2f}' for x in (size['params'] / 1e6, size['macs'] / 1e9)]
        row += [cell for rows in groups.values() for cell in cells(rows, label)]
        lines.append('|' + ''.join(f' {cell} |' if cell else ' |' for cell in row))
    return '\n'.join(lines)
