"""Turn results.csv, one row per finished run, into the tables of README.md and into plots.

    python train_recipes/results.py               rewrite the tables
    python train_recipes/results.py --check       write nothing; exit 1 if tables, or plots in docs/, are not current
    python train_recipes/results.py --plots DIR   also draw accuracy_params.svg, accuracy_macs.svg, learning_curves.svg

curves/RUN.csv holds the learning curve of a run. Nothing is written unless every row is sound.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import textwrap
from collections import defaultdict, namedtuple
from pathlib import Path
from statistics import mean, stdev

import yaml

from timm_regnet_rnn.record import COLUMNS, CURVE

HOME = Path(__file__).resolve().parent
COMPLEXITY = json.loads((HOME.parent / 'timm_regnet_rnn' / 'model_complexity.json').read_text(encoding='utf-8'))
EPOCHS = {p.stem: yaml.safe_load(p.read_text(encoding='utf-8')).get('epochs', 300) for p in HOME.glob('*.yaml')}
START, END = '<!-- results: made by train_recipes/results.py from results.csv -->', '<!-- end of results -->'
REGULATOR_KWARGS = ('regulator', 'regulated_stages', 'share_regulator', 'carry')  # a ResNet has none of them
INTEGERS, FLOATS = ('seed', 'epochs', 'params', 'macs', 'best_epoch', 'processes'), ('top1', 'top5', 'best_top1')
# Cells that stand in the README before anybody has filled them.
PLANNED_GROUPS = [('CIFAR-10, JPEG q75 mirror', name, EPOCHS[name], '') for name in ('cifar_paper', 'cifar_modern')]
PLANNED_MODELS = (
    *('cifar_resnet_20', 'regnet_convrnn_20', 'regnet_convgru_20', 'regnet_convlstm_20'),
    *('cifar_seresnet_20', 'seregnet_convlstm_20', 'cifar_resnet_56', 'regnet_convlstm_56'),
)
# Part of a model's name -> name in legends, marker, lines and colours of learning curves (the first elsewhere).
FAMILIES = dict(
    resnet=('ResNet', 'o', ('--', ':'), ('#222222', '#8a8a8a', '#3f6c9c', '#b5b5b5')),
    convrnn=('ConvRNN', '^', ('-', '-.'), ('#0072b2', '#56b4e9')),
    convgru=('ConvGRU', 's', ('-', '-.'), ('#009e73', '#8fbc3a')),
    convlstm=(
        *('ConvLSTM', 'D', ('-', '-.')),
        ('#d55e00', '#cc79a7', '#e69f00', '#7f3c8d', '#8c2d04', '#f4a582', '#b8860b', '#ff5da2'),
    ),
)
# A table is a group of runs (data set, recipe, epochs, overrides); a row is a label (model, model_kwargs).
Run = namedtuple('Run', [*COLUMNS, 'group', 'label'])


def split_kwargs(text):
    """`name=value` arguments, sorted, so that two spellings are one row."""
    return sorted(re.split(r'\s+(?=\w+=)', text)) if text else []


def resnet_of(label):
    """Label of the ResNet that a RegNet is measured against; arguments that both can have must agree."""
    match = re.fullmatch(r'(se)?regnet_conv[a-z]+_(\d+)', label[0])
    if not match:
        return None
    name = f'{match[1] or ""}resnet{match[2]}'
    cifar = re.sub(r'(\d+)', r'_\1', f'cifar_{name}')
    shared = [arg for arg in split_kwargs(label[1]) if arg.split('=')[0] not in REGULATOR_KWARGS]
    return cifar if cifar in COMPLEXITY else name, ' '.join(shared)


MODELS = {*COMPLEXITY, *(resnet_of((name, ''))[0] for name in COMPLEXITY if 'regnet' in name)}


def traits(model):
    """Depth, whether with SE, and index of the family."""
    name = model.split('.')[0]  # a tag may name another model
    family = next(i for i, part in enumerate(FAMILIES) if part in name)
    return int(re.search(r'\d+', name)[0]), 'sere' in name, family


def row_order(label):
    """Sort key of rows: variants stand below their model."""
    return traits(label[0]), label


def group_order(group):
    """Sort key of tables: the planned ones, others of full length, the shortened."""
    planned = PLANNED_GROUPS.index(group) if group in PLANNED_GROUPS else len(PLANNED_GROUPS)
    return planned, group[2] < EPOCHS[group[1]], group


def parse(row):
    """The Run of one row of results.csv, checked by itself."""
    if None in row or None in row.values():
        raise ValueError('not as many fields as the header has')
    row = {name: ' '.join(row[name].split()) for name in COLUMNS}
    for name, text in row.items():
        if re.search('[|<>`]', text):
            raise ValueError(f'{name} {text!r} would break the table')
        numeric = name in INTEGERS or name in FLOATS or (name == 'images_per_s' and text)
        try:
            row[name] = (int if name in INTEGERS else float)(text) if numeric else text
        except ValueError:
            raise ValueError(f'{name} is no number: {text!r}') from None
    if row['model'].split('.')[0] not in MODELS:
        raise ValueError(f'unknown model {row["model"]!r}')
    if row['recipe'] not in EPOCHS:
        raise ValueError(f'no recipe {row["recipe"]!r} in {HOME.name}')
    if row['weights'] not in ('last', 'ema'):
        raise ValueError(f'weights are last or ema, not {row["weights"]!r}')
    if not row['dataset'] or not row['run'] or Path(row['run']).name != row['run']:  # the run names its curve's file
        raise ValueError(f'empty dataset, or run {row["run"]!r} is no file name')
    if min(row['params'], row['macs'], row['epochs']) < 1:
        raise ValueError('params, macs or epochs below 1')
    if not 0 <= row['top1'] <= row['top5'] <= 100 or not 0 <= row['best_top1'] <= 100:
        raise ValueError(f'top1 {row["top1"]}, top5 {row["top5"]}, best_top1 {row["best_top1"]}: not percentages')
    group = row['dataset'], row['recipe'], row['epochs'], row['overrides']
    return Run(**row, group=group, label=(row['model'], ' '.join(split_kwargs(row['model_kwargs']))))


def read_csv(path, columns, convert):
    """`convert` of each row; what it raises gets the line."""
    with open(path, newline='', encoding='utf-8-sig') as file:
        reader = csv.DictReader(file, strict=True)
        try:
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f'no column {", ".join(missing)}')
            return [convert(row) for row in reader]
        except (ValueError, csv.Error) as e:
            raise ValueError(f'{path.name}, line {reader.line_num}: {e}') from None


def read_runs(path):
    """The runs of results.csv by group and label, in the order of tables and rows; none without the file.

    Raises:
        ValueError: A row cannot stand in a table; in one line.
    """
    runs = read_csv(path, COLUMNS, parse) if path.exists() else []
    seen, groups = {}, defaultdict(lambda: defaultdict(list))
    for run in runs:
        # once each: the run, and a seed under the same settings, whose second run would be no independent draw
        for key in (run.run, (*run.group, *run.label, run.seed)):
            if seen.setdefault(key, run) is not run:
                raise ValueError(f'{path.name}: {run.run!r} repeats {seen[key].run!r}; one of the two rows has to go')
        sizes = f'{run.params} params and {run.macs} macs'
        for key, value in ((run.group, f'{run.weights} weights'), ((*run.group, *run.label), sizes)):
            if seen.setdefault(key, value) != value:
                raise ValueError(f'{path.name}: {run.run!r} has {value}, a row that it stands with {seen[key]}')
    for run in sorted(runs, key=lambda run: (group_order(run.group), row_order(run.label), run.seed)):
        groups[run.group][run.label].append(run)
    return groups


def spread(values, sign=''):
    """Mean, and sample standard deviation where there is one."""
    deviation = f' ± {stdev(values):.2f}' if len(values) > 1 else ''
    return f'{round(mean(values), 2) + 0.0:{sign}.2f}{deviation}'  # + 0.0 turns -0.0 into 0.0


def cells(rows, label):
    """A label's top-1, top-5, difference to its ResNet, and seeds; empty where nobody ran it."""
    runs, resnet = rows.get(label, ()), {run.seed: run.top1 for run in rows.get(resnet_of(label), ())}
    if not runs:
        return [''] * 4
    differences = [run.top1 - resnet[run.seed] for run in runs if run.seed in resnet]
    difference = spread(differences, '+') if differences else ''
    if differences and len(differences) < len(runs):
        difference += f' (n = {len(differences)})'
    seeds = f'n = {len(runs)}: {", ".join(str(run.seed) for run in runs)}'
    return [spread([run.top1 for run in runs]), spread([run.top5 for run in runs]), difference, seeds]


def describe(group, mark=''):
    """Epochs and overrides in words, with `mark` around code."""
    full = EPOCHS[group[1]]
    epochs = f'shortened to {group[2]} of {full} epochs' if group[2] < full else f'{group[2]} epochs'
    return f'{epochs}, {mark + group[3] + mark if group[3] else "no overrides"}'


def table(groups, planned=()):
    """Caption and Markdown table of groups on one data set, side by side."""
    labels = {(model, ''): COMPLEXITY[model] for model in planned}
    caption, head, runs = '', ['model', 'parameters (M)', 'multiply-adds (G)'], []
    for group, rows in groups.items():
        runs += [run for same in rows.values() for run in same]
        ema = ', EMA weights' if any(run.weights == 'ema' for same in rows.values() for run in same) else ''
        caption += f' [`{group[1]}`](train_recipes/{group[1]}.yaml): {describe(group, "`")}{ema}.'
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


def update(readme, groups):
    """README.md's text with the tables between its markers.

    Raises:
        ValueError: The markers are not there, once each and in order.
    """
    match = re.fullmatch(f'(.*{re.escape(START)}).*({re.escape(END)}.*)', readme, flags=re.DOTALL)
    if not match or readme.count(START) + readme.count(END) != 2:
        raise ValueError(f'README lacks the markers {START} and {END}, once each')
    tables = [table({group: groups.get(group, {}) for group in PLANNED_GROUPS}, PLANNED_MODELS)]
    tables += [table({group: rows}) for group, rows in groups.items() if group not in PLANNED_GROUPS]
    return '\n\n'.join([match[1], *tables, match[2]])


def draw_accuracy(figure, groups, column, scale, unit):
    """Top-1 against the models' size; one panel per table, one marker per family, hollow with SE."""
    across, handles = min(2, len(groups)), {}
    down = math.ceil(len(groups) / across)
    figure.set_size_inches(5 * across, 3.6 * down + 0.6)
    for i, (group, rows) in enumerate(groups.items(), 1):
        axes, series, tops = figure.add_subplot(down, across, i), defaultdict(list), defaultdict(list)
        for (model, kwargs), runs in rows.items():
            top1 = [run.top1 for run in runs]
            point = getattr(runs[0], column) / scale, mean(top1), stdev(top1) if len(runs) > 1 else math.nan
            series[traits(model)[1:], bool(kwargs)].append(point)
            tops[traits(model)[0]].append((max(point[1], sum(point[1:])), point[0]))
        for ((se, family), variant), points in series.items():
            name, marker, _, (colour, *_) = list(FAMILIES.values())[family]
            style = dict(mfc='white' if se else colour, ms=4 if variant else 7, lw=0 if variant else 0.8)
            drawn = axes.errorbar(*zip(*points), fmt=f'{marker}-', color=colour, capsize=3, elinewidth=1, **style)
            handles[variant, se, family] = drawn, f'{"SE-" * se}{name}{", other arguments" * variant}'
        for depth, points in tops.items():
            style = dict(textcoords='offset points', ha='center', color='#666666')
            axes.annotate(f'depth {depth}', max(points)[::-1], (0, 9), **style)
        axes.set(xlabel=unit, ylabel='top-1 on the test split (%)', title=title(group, 60))
        axes.margins(0.15, 0.2)
    figure.legend(*zip(*(handles[key] for key in sorted(handles))), loc='outside lower center', ncols=2 * across + 1)


def title(group, width):
    """What a panel shows, in lines short enough for it."""
    words = f'{group[1]}, {describe(group)}'
    return '\n'.join([group[0], *textwrap.wrap(words, width, break_on_hyphens=False)])


def draw_curves(figure, groups, folder):
    """Loss and accuracy by epoch, and its end magnified; a strip per table, one line per run, ResNets dashed."""
    figure.set_size_inches(13, 3.4 * len(groups) + 0.8)
    strips = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    used, styles, handles = defaultdict(int), {}, {}
    for label in sorted({label for rows in groups.values() for label in rows}, key=row_order):
        name, _, lines, colours = list(FAMILIES.values())[traits(label[0])[2]]
        turn, i = divmod(used[name], len(colours))
        styles[label] = dict(color=colours[i], ls=lines[turn % 2])
        used[name] += 1
    for strip, (group, rows) in zip(strips, groups.items()):
        strip.suptitle(title(group, 150), fontsize='medium')
        late = group[2] * 3 // 4
        panels = [
            (strip.add_subplot(1, 3, 1), 'train_loss', 'training loss', 0),
            (strip.add_subplot(1, 3, 2), 'top1', 'top-1 on the test split (%)', 0),
            (strip.add_subplot(1, 3, 3), 'top1', f'top-1 after epoch {late} (%)', late),
        ]
        for label, run in ((label, run) for label, runs in rows.items() for run in runs):
            path = folder / f'{run.run}.csv'
            curve = read_csv(path, CURVE, lambda row: {name: float(row[name]) for name in CURVE})
            if not curve or curve[-1]['epoch'] != run.epochs:
                raise ValueError(f'{path.name} does not end at epoch {run.epochs}')
            for axes, column, _, first in panels:
                x, y = zip(*((row['epoch'], row[column]) for row in curve if row['epoch'] > first))
                (handles[' '.join(filter(None, label))],) = axes.plot(x, y, lw=1.2, alpha=0.85, **styles[label])
        for axes, _, name, _ in panels:
            axes.set(xlabel='epoch', ylabel=name)
            axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=4)


def digest(results):
    """A sum over what plots are made from, which they carry so that an outdated one is found out."""
    files = [results, *sorted((results.parent / 'curves').glob('*.csv'))]
    return hashlib.sha256(b'\0'.join(file.read_bytes() for file in files if file.exists())).hexdigest()


def draw(groups, folder, made_from=''):
    """The plots by file name, as bytes that depend on the runs alone; `folder` holds the learning curves.

    Raises:
        ValueError: There is no run, or a learning curve is not whole.
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install '.[plot]'") from None
    if not groups:
        raise ValueError('no runs to plot')
    plots = dict(
        learning_curves=lambda figure: draw_curves(figure, groups, folder),
        accuracy_params=lambda figure: draw_accuracy(figure, groups, 'params', 1e6, 'parameters (millions)'),
        accuracy_macs=lambda figure: draw_accuracy(figure, groups, 'macs', 1e9, 'multiply-adds (billions)'),
    )
    files = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({'svg.hashsalt': 'results', 'axes.titlesize': 9, 'legend.frameon': False})
        matplotlib.rcParams.update({'axes.grid': True, 'grid.alpha': 0.3, 'figure.constrained_layout.w_pad': 0.1})
        for name, plot in plots.items():
            figure, buffer = Figure(layout='constrained'), io.BytesIO()
            plot(figure)
            figure.savefig(buffer, format='svg', metadata=dict(Date=None, Creator=None, Description=made_from))
            files[f'{name}.svg'] = buffer.getvalue()
    return files


def write(path, data):
    """Replace a file at once, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def main(argv=None, results=HOME / 'results.csv', readme=HOME.parent / 'README.md'):
    """Exit status: 0, 1 if `--check` finds other tables than the rows give, 2 with one line for what is unsound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        '--check', action='store_true', help='write nothing; exit 1 if README.md or a plot in docs/ is not current'
    )
    action.add_argument('--plots', metavar='DIR', type=Path, help='also draw the plots there')
    args = parser.parse_args(argv)
    try:
        groups, old = read_runs(results), readme.read_text(encoding='utf-8')
        new = update(old, groups)
        if args.check:
            stale = ['README.md'] if new != old else []
            plots = (readme.parent / 'docs').glob('*.svg')
            stale += sorted(plot.name for plot in plots if digest(results) not in plot.read_text(encoding='utf-8'))
            if stale:
                print(f'results: {stale[0]} is not current; run results.py --plots docs', file=sys.stderr)
            return int(bool(stale))
        plots = draw(groups, results.parent / 'curves', digest(results)) if args.plots else {}
        for name, data in plots.items():
            write(args.plots / name, data)
        write(readme, new.encode())
    except (ValueError, OSError, ImportError) as e:
        print(f'results: {" ".join(str(e).split())}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
