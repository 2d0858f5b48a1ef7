"""Turn results.csv, one row per finished run, into the tables of README.md and into plots.

    python train_recipes/results.py               rewrite the tables
    python train_recipes/results.py --check       write nothing; exit 1 if tables, or plots in docs/, are not current
    python train_recipes/results.py --plots DIR   also draw accuracy_params.svg, accuracy_macs.svg, learning_curves.svg

curves/RUN.csv holds the learning curve of a run. Nothing is written unless every row is sound.
"""

import argparse
import hashlib
import io
import math
import os
import re
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from timm_regnet_rnn.results import (
    CURVE,
    PLANNED_GROUPS,
    PLANNED_MODELS,
    describe,
    read_csv,
    read_runs,
    row_order,
    table,
    traits,
)

HOME = Path(__file__).resolve().parent
START, END = '<!-- results: made by train_recipes/results.py from results.csv -->', '<!-- end of results -->'
# Family -> name in legends, marker, lines and colours of learning curves (the first elsewhere).
STYLES = dict(
    resnet=('ResNet', 'o', ('--', ':'), ('#222222', '#8a8a8a', '#3f6c9c', '#b5b5b5')),
    convrnn=('ConvRNN', '^', ('-', '-.'), ('#0072b2', '#56b4e9')),
    convgru=('ConvGRU', 's', ('-', '-.'), ('#009e73', '#8fbc3a')),
    convlstm=(
        *('ConvLSTM', 'D', ('-', '-.')),
        ('#d55e00', '#cc79a7', '#e69f00', '#7f3c8d', '#8c2d04', '#f4a582', '#b8860b', '#ff5da2'),
    ),
)


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
            name, marker, _, (colour, *_) = list(STYLES.values())[family]
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
        name, _, lines, colours = list(STYLES.values())[traits(label[0])[2]]
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
