"""Turn results.csv, one row per finished run, into the tables of README.md and docs/ and into plots.

    python train_recipes/results.py               rewrite the tables, that of all models as docs/models.csv too
    python train_recipes/results.py --check       write nothing; exit 1 if tables, or plots in docs/, are not current
    python train_recipes/results.py --plots DIR   also draw accuracy_params.svg, accuracy_macs.svg, models.svg, and the
                                                  learning curves of each data set

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
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from timm_regnet_rnn.datasets import HELD_OUT
from timm_regnet_rnn.listing import SIZES, csv_table, list_rows, markdown_tables
from timm_regnet_rnn.results import (
    EARLY_EXIT,
    PLANNED_GROUPS,
    PLANNED_MODELS,
    describe,
    differences,
    early_exits,
    read_curves,
    read_exits,
    read_runs,
    row_order,
    table,
    traits,
)
from timm_regnet_rnn.weights.manifest import RELEASED

HOME = Path(__file__).resolve().parent
START, END = '<!-- {}: made by train_recipes/results.py from results.csv -->', '<!-- end of {} -->'
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

SIDES = [3, 32, 32], [3, 224, 224]  # images of the two families of models


def sections(groups, curves, exits, models):
    """What the pages hold between their markers, by the markers' name."""
    tables = [table({group: groups.get(group, {}) for group in PLANNED_GROUPS}, PLANNED_MODELS)]
    tables += [table({group: rows}) for group, rows in groups.items() if group not in PLANNED_GROUPS]
    made = dict(results='\n\n'.join(tables), differences=differences(groups, curves), exits=early_exits(exits))
    return dict(made, models=markdown_tables(models))


def update(page, made):
    """A page's text with what `made` has between its markers.

    Raises:
        ValueError: It has none of the markers, or not once each and in order.
    """
    found = 0
    for name, text in made.items():
        start, end = START.format(name), END.format(name)
        match = re.fullmatch(f'(.*{re.escape(start)}).*({re.escape(end)}.*)', page, flags=re.DOTALL)
        count = page.count(start) + page.count(end)
        if count and (not match or count != 2):
            raise ValueError(f'a page lacks the markers {start} and {end}, once each')
        if match:
            page, found = '\n\n'.join([match[1], text, match[2]]), found + 1
    if not found:
        raise ValueError(f'a page has no markers such as {START.format("results")}')
    return page


def draw_accuracy(figure, groups, column, scale, unit):
    """Top-1 against the models' size; one panel per table, one marker per family, hollow with SE.

    A recipe's trials, one model on images held out, compare no models: they have no panel beside other tables.
    """
    groups = {group: rows for group, rows in groups.items() if len(rows) > 1 or not held_out(group[0])} or groups
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
        axes.set(xlabel=unit, ylabel=accuracy(group[0]), title=title(group, 60))
        axes.margins(0.15, 0.2)
    figure.legend(*zip(*(handles[key] for key in sorted(handles))), loc='outside lower center', ncols=2 * across + 1)


def slug(dataset):
    """A data set's name as part of a file's name."""
    return re.sub(r'\W+', '_', dataset.lower()).strip('_')


def held_out(dataset):
    """Whether a data set has training images held out, which may be what accuracies are of."""
    return dataset.endswith(HELD_OUT.rpartition('}')[2])


def accuracy(dataset):
    """What an axis with accuracies on a data set is called."""
    return 'top-1 (%)' if held_out(dataset) else 'top-1 on the test split (%)'


def title(group, width):
    """What a panel shows, in lines short enough for it."""
    words = f'{group[1]}, {describe(group)}'
    return '\n'.join([group[0], *textwrap.wrap(words, width, break_on_hyphens=False)])


def with_curves(groups):
    """The data sets that have learning curves, and their tables: of three epochs and more, fewer are no curve."""
    found = defaultdict(dict)
    for group, rows in groups.items():
        if group[2] > 2:
            found[group[0]][group] = rows
    return found


def draw_curves(figure, groups, curves):
    """Loss and accuracy by epoch on one data set; a strip per table, seeds as thin lines, their mean a thick one."""
    figure.set_size_inches(10, 3.6 * len(groups) + 0.8)
    strips = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    used, styles, handles = defaultdict(int), {}, {}
    for label in sorted({label for rows in groups.values() for label in rows}, key=row_order):
        name, _, lines, colours = list(STYLES.values())[traits(label[0])[2]]
        turn, i = divmod(used[name], len(colours))
        styles[label] = dict(color=colours[i], ls=lines[turn % 2])
        used[name] += 1
    for strip, (group, rows) in zip(strips, groups.items()):
        strip.suptitle(title(group, 110), fontsize='medium')
        panels = [
            (strip.add_subplot(1, 2, 1), 'train_loss', 'training loss'),
            (strip.add_subplot(1, 2, 2), 'top1', accuracy(group[0])),
        ]
        for label, runs in rows.items():
            for axes, column, _ in panels:
                lines = [[row[column] for row in curves[run.run]] for run in runs]
                epochs = range(1, group[2] + 1)
                if len(lines) > 1:
                    for line in lines:
                        axes.plot(epochs, line, lw=0.6, alpha=0.45, **styles[label])
                thick = dict(lw=2 if len(lines) > 1 else 1.2, alpha=0.9)
                (handle,) = axes.plot(epochs, [mean(values) for values in zip(*lines)], **thick, **styles[label])
                handles[' '.join(filter(None, label))] = handle
        for axes, _, name in panels:
            axes.set(xlabel='epoch', ylabel=name)
            axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=3)


def draw_exits(figure, exits):
    """Top-1 of the trained classifier behind each of the last blocks; a panel per data set, one line per weights."""
    panels = defaultdict(list)
    for row in exits:
        name, _, tag = row['weights'].partition('.')
        panels[RELEASED.get(row['weights'], {}).get('dataset') or tag].append((name, tag, row))
    figure.set_size_inches(4.4 * len(panels), 3.8)
    for axes, (dataset, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        tags = {tag for _, tag, _ in rows}
        for name, tag, row in rows:
            colours = list(STYLES.values())[traits(name)[2]][3]
            used = sum(line.get_color() in colours for line in axes.lines)
            tops = [(x, float(row[column])) for x, column in enumerate(EARLY_EXIT[2:5]) if row[column]]
            style = dict(ms=3, lw=1.2, color=colours[used % len(colours)])
            axes.plot(*zip(*tops), 'o-', **style, label=name if len(tags) == 1 else f'{name}.{tag}')
        axes.set_xticks(range(3), ['last but two', 'last but one', 'last'])
        axes.set(xlabel='classifier behind block', ylabel='top-1 on the test split (%)')
        axes.set_title('\n'.join(textwrap.wrap(dataset, 50)))
        axes.legend(loc='lower right', fontsize=6.5)


def draw_models(figure, rows):
    """What RegNets cost, a panel per size, and what they gain over their ResNets where that was measured."""
    figure.set_size_inches(10, 7)
    *panels, last = figure.subplots(2, 2).flat
    nets = [(row, *traits(row['name'])) for row in rows if row['resnet']]
    families = [sorted({depth for row, depth, *_ in nets if row['input_size'] == size}) for size in SIDES]
    places = {depth: x for x, depth in enumerate([*families[0], None, *families[1]])}
    for axes, size, title in zip(panels, SIZES, ('parameters', 'multiply-adds', 'activations')):
        for (i, depths), family, se in product(enumerate(families), range(1, len(STYLES)), (False, True)):
            name, marker, (line, _), (colour, *_) = list(STYLES.values())[family]
            costs = {row[1]: row[0][f'{size}_cost'] for row in nets if not row[0]['tag'] and row[2:] == (se, family)}
            style = dict(ms=7, mfc='none') if se else dict(ms=3.5)  # rings around points: the two are close
            label = None if i else f'{"SE-" * se}{name}'
            xs, ys = [places[depth] for depth in depths], [costs[depth] for depth in depths]
            axes.plot(xs, ys, f'{marker}{line}', color=colour, lw=0.7, label=label, **style)
        axes.set_xticks([places[depth] for depths in families for depth in depths], sum(families, []))
        axes.set(xlabel='depth, for 32x32 and for 224x224', ylabel='more than the ResNet (%)', title=title)
        axes.set_ylim(bottom=0)
    for row, _, se, family in (net for net in nets if net[0]['gain'] is not None):
        _, marker, _, (colour, *_) = list(STYLES.values())[family]
        point = row['macs_cost'], row['gain']
        style = dict(color=colour, mfc='white' if se else colour, capsize=3, elinewidth=1)
        last.errorbar(*point, row['gain_deviation'], fmt=marker, **style)
        where = dict(xytext=(5, 4), textcoords='offset points', fontsize=7)
        last.annotate(f'{row["name"]}\n{row["tag"]}, n = {row["gain_seeds"]}', point, **where)
    last.axhline(0, color='#666666', lw=0.8)
    last.margins(x=0.6)
    last.set(xlabel='multiply-adds more than the ResNet (%)', ylabel='points of top-1 ± deviation', title='gain')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=6)


def digest(results):
    """A sum over what plots are made from, which they carry so that an outdated one is found out."""
    files = [results, results.parent / 'early_exit.csv', *sorted((results.parent / 'curves').glob('*.csv'))]
    return hashlib.sha256(b'\0'.join(file.read_bytes() for file in files if file.exists())).hexdigest()


def text_digest(text):
    """A sum over a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def draw(groups, curves, made_from='', exits=(), models=()):
    """The plots by file name, as bytes that depend on the runs alone.

    Raises:
        ValueError: There is no run.
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
        accuracy_params=lambda figure: draw_accuracy(figure, groups, 'params', 1e6, 'parameters (millions)'),
        accuracy_macs=lambda figure: draw_accuracy(figure, groups, 'macs', 1e9, 'multiply-adds (billions)'),
    )
    for dataset, there in with_curves(groups).items():
        plots[f'curves_{slug(dataset)}'] = partial(draw_curves, groups=there, curves=curves)
    if exits:
        plots['early_exit'] = partial(draw_exits, exits=exits)
    if models:
        plots['models'] = partial(draw_models, rows=models)
    files = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({'svg.hashsalt': 'results', 'axes.titlesize': 9, 'legend.frameon': False})
        matplotlib.rcParams.update({'axes.grid': True, 'grid.alpha': 0.3, 'figure.constrained_layout.w_pad': 0.1})
        for name, plot in plots.items():
            figure, buffer = Figure(layout='constrained'), io.BytesIO()
            plot(figure)
            source = text_digest(csv_table(models)) if name == 'models' else made_from
            figure.savefig(buffer, format='svg', metadata=dict(Date=None, Creator=None, Description=source))
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


PAGES = tuple(HOME.parent / page for page in ('README.md', 'docs/results.md', 'docs/models.md'))


def main(argv=None, results=HOME / 'results.csv', pages=PAGES):
    """Exit status: 0, 1 if `--check` finds other tables than the rows give, 2 with one line for what is unsound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        '--check', action='store_true', help='write nothing; exit 1 if a page or a plot in docs/ is not current'
    )
    action.add_argument('--plots', metavar='DIR', type=Path, help='also draw the plots there')
    args = parser.parse_args(argv)
    try:
        groups = read_runs(results)
        curves = read_curves(groups, results.parent / 'curves')
        exits = read_exits(results.parent / 'early_exit.csv')
        models = list_rows(groups=groups)
        made = sections(groups, curves, exits, models)
        new = {page: update(page.read_text(encoding='utf-8'), made) for page in pages}
        for page in [page for page in pages if page.name == 'models.md']:
            new[page.with_suffix('.csv')] = csv_table(models)
        if args.check:
            old = {file: file.read_text(encoding='utf-8') if file.exists() else '' for file in new}
            stale = [file.name for file in new if new[file] != old[file]]
            made = {
                plot: digest(results)
                for name in ('accuracy', 'curves', 'early')
                for plot in pages[0].parent.glob(f'docs/{name}_*.svg')
            }
            made.update((plot, text_digest(csv_table(models))) for plot in pages[0].parent.glob('docs/models.svg'))
            stale += sorted(plot.name for plot, sum in made.items() if sum not in plot.read_text(encoding='utf-8'))
            if stale:
                print(f'results: {stale[0]} is not current; run results.py --plots docs', file=sys.stderr)
            return int(bool(stale))
        plots = draw(groups, curves, digest(results), exits, models) if args.plots else {}
        for name, data in plots.items():
            write(args.plots / name, data)
        for page, text in new.items():
            write(page, text.encode())
    except (ValueError, OSError, ImportError) as e:
        print(f'results: {" ".join(str(e).split())[:500]}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
