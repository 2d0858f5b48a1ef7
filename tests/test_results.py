"""train_recipes/results.py on made-up rows; the figures here are nobody's results."""

import csv
import importlib.util
import inspect
import json
import os
import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure
from scipy import stats
from timm.models.resnet import ResNet

from timm_regnet_rnn import results as rows
from timm_regnet_rnn.listing import list_rows
from timm_regnet_rnn.regulated_resnet import RegulatedResNet
from timm_regnet_rnn.results import COLUMNS, CURVE

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'train_recipes' / 'results.py'
_spec = importlib.util.spec_from_file_location('results', SCRIPT)
results = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(results)

PLANNED = [
    *('cifar_resnet_20', 'regnet_convrnn_20', 'regnet_convgru_20', 'regnet_convlstm_20'),
    *('cifar_seresnet_20', 'seregnet_convlstm_20', 'cifar_resnet_56', 'regnet_convlstm_56'),
]
SIZES = json.loads((ROOT / 'timm_regnet_rnn' / 'model_complexity.json').read_text())
URL = rows.REPOSITORY
START, END = (mark.format('results') for mark in (results.START, results.END))
README = f'# Title\n\nbefore\n\n{START}\nold\n{END}\n\nafter\n'
SHORT = dict(epochs=20, overrides='--decay-milestones 11 16 --epochs 20')


def row(model='regnet_convlstm_20', top1=91.0, seed=1, **changes):
    values = dict(
        date='2026-01-02',
        model=model,
        model_kwargs='',
        recipe='cifar_paper',
        overrides='',
        dataset='CIFAR-10, JPEG q75 mirror',
        seed=seed,
        epochs=200,
        params=SIZES[model]['params'] if model in SIZES else 1,
        macs=SIZES[model]['macs'] if model in SIZES else 1,
        top1=top1,
        top5=99.5,
        weights='last',
        best_epoch=7,
        best_top1=99.87,
        images_per_s=1000.5,
        processes=1,
        device='Some GPU',
        versions='timm 1.0, torch 2.11',
        commit='0123456789ab',
    )
    values.update(changes)
    kwargs = re.sub(r'\W+', '-', values['model_kwargs'])
    run = f'{model}-{kwargs}-{values["recipe"]}-e{values["epochs"]}-s{seed}'
    return {'run': run, **values}


class Project:
    """results.csv, learning curves and README.md in a folder of their own."""

    def __init__(self, folder, capsys):
        self.results, self.readme, self.plots = folder / 'results.csv', folder / 'README.md', folder / 'plots'
        self.capsys = capsys
        self.readme.write_text(README, encoding='utf-8')

    def write(self, *rows, columns=COLUMNS):
        with open(self.results, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, columns, extrasaction='ignore')
            writer.writeheader()
            writer.writerows(rows)
        curves = self.results.parent / 'curves'
        curves.mkdir(exist_ok=True)
        for r in rows:
            epochs = range(1, int(r['epochs']) + 1)
            lines = [f'{e},0.1,{2 / e},1.0,{float(r["top1"]) * e / epochs[-1]},99' for e in epochs]
            (curves / f'{r["run"]}.csv').write_text('\n'.join([','.join(CURVE), *lines, '']))
        return self

    def call(self, *argv):
        status = results.main([str(a) for a in argv], self.results, (self.readme,))
        out, self.err = self.capsys.readouterr()
        assert out == ''
        return status

    def refused(self, *argv):
        """The line that refuses these rows; nothing is written."""
        before = self.readme.read_bytes()
        assert self.call(*argv) == 2
        assert self.readme.read_bytes() == before and not self.plots.exists()
        assert self.err.startswith('results: ') and self.err.count('\n') == 1 and self.err.endswith('\n'), self.err
        assert len(self.err) < 600
        return self.err

    def tables(self):
        """Caption, header, and the cells by model of every table in the README."""
        assert self.call() == 0, self.err
        text = self.readme.read_text(encoding='utf-8')
        start, rest = text.split(START)
        middle, end = rest.split(END)
        assert start == '# Title\n\nbefore\n\n' and end == '\n\nafter\n'
        found = []
        for block in re.split(r'\n\n(?=\*\*)', middle.strip('\n')):
            caption, _, head, rule, *lines = block.strip().split('\n')
            cut = [[cell.strip() for cell in line.strip('|').split('|')] for line in (head, rule, *lines)]
            assert {len(cells) for cells in cut} == {len(cut[0])} and set(cut[1]) == {'---'}
            rows = {cells[0].strip('`'): cells[1:] for cells in cut[2:]}
            assert len(rows) == len(lines)
            found.append((caption, cut[0], rows))
        return found


@pytest.fixture
def project(tmp_path, capsys):
    return Project(tmp_path, capsys)


def test_readme_is_current():
    """The tables in README.md are those that the rows in results.csv give."""
    assert results.main(['--check']) == 0


def test_script(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['results.py', '--check'])
    with pytest.raises(SystemExit, match='^0$'):
        runpy.run_path(str(SCRIPT), run_name='__main__')


def test_without_rows(project):
    assert not project.results.exists()
    ((caption, head, rows),) = project.tables()
    assert list(rows) == PLANNED and len(head) == 11
    assert rows['regnet_convlstm_20'][:2] == ['0.311', '0.049']
    assert rows['cifar_resnet_56'][:2] == ['0.856', '0.126']
    assert all(cells[2:] == [''] * 8 for cells in rows.values())
    assert caption.startswith('**CIFAR-10, JPEG q75 mirror.**') and 'no runs yet' in caption
    assert caption.count('200 epochs, no overrides.') == 2 and 'shortened' not in caption
    project.write()  # a header alone
    assert project.tables() == [(caption, head, rows)]


def test_mean_and_deviation(project):
    project.write(*(row(top1=t, top5=u, seed=s) for s, t, u in ((3, 94.0, 99.0), (1, 91.0, 98.0), (2, 92.0, 98.5))))
    ((caption, head, rows),) = project.tables()
    assert head[3:7] == ['`cifar_paper`: top-1', 'top-5', 'to its ResNet', 'seeds']
    # mean 277 / 3; squares of -4/3, -1/3, 5/3 sum up to 14/3, halved and rooted 1.5275
    assert rows['regnet_convlstm_20'][2:6] == ['92.33 ± 1.53', '98.50 ± 0.50', '', 'n = 3: 1, 2, 3']
    assert all(cells[2:] == [''] * 8 for model, cells in rows.items() if model != 'regnet_convlstm_20')
    assert caption.endswith('Last epoch; Some GPU; commit 0123456.')
    assert '99.87' not in project.readme.read_text(encoding='utf-8')  # the best epoch's


def test_one_run_has_no_deviation(project):
    project.write(row(top1=91.234))
    assert project.tables()[0][2]['regnet_convlstm_20'][2:6] == ['91.23', '99.50', '', 'n = 1: 1']


def test_difference_is_paired_by_seed(project):
    project.write(
        *(row('cifar_resnet_20', t, s) for s, t in ((1, 90.0), (2, 91.5), (4, 50.0))),
        *(row('regnet_convlstm_20', t, s) for s, t in ((1, 91.0), (2, 92.0), (3, 94.0))),
        *(row('regnet_convgru_20', t, s) for s, t in ((1, 90.5), (2, 92.5))),
        row('regnet_convrnn_20', 89.996, 1),
        row('regnet_convlstm_56', 93.0, 1),
        row('cifar_seresnet_20', 92.0, 2),
        row('seregnet_convlstm_20', 91.5, 2),
        row('seregnet_convlstm_20', 99.0, 3),
    )
    difference = {model: cells[4] for model, cells in project.tables()[0][2].items()}
    assert difference == {
        'cifar_resnet_20': '',
        'regnet_convrnn_20': '+0.00',  # -0.004
        'regnet_convgru_20': '+0.75 ± 0.35',  # 0.5 and 1
        'regnet_convlstm_20': '+0.75 ± 0.35 (n = 2)',  # 1 and 0.5; nothing for seeds 3 and 4
        'cifar_seresnet_20': '',
        'seregnet_convlstm_20': '-0.50 (n = 1)',  # to the ResNet with SE
        'cifar_resnet_56': '',
        'regnet_convlstm_56': '',  # the ResNet of its depth was not run
    }


def test_difference_with_arguments(project):
    project.write(
        row('cifar_resnet_20', 90.0),
        row('cifar_resnet_20', 89.0, model_kwargs='zero_init_last=False'),
        row(model_kwargs='carry=raw regulated_stages=(1,)', top1=91.0),
        row(model_kwargs='regulated_stages=(1,)  carry=raw', top1=93.0, seed=2, run='other order'),
        row(model_kwargs='zero_init_last=False carry=raw', top1=91.0),
        row(model_kwargs='act_layer=silu', top1=91.0),
    )
    rows = project.tables()[0][2]
    assert rows['regnet_convlstm_20 carry=raw regulated_stages=(1,)'][2:6] == [
        *('92.00 ± 1.41', '99.50 ± 0.00', '+1.00 (n = 1)', 'n = 2: 1, 2')
    ]
    assert rows['regnet_convlstm_20 carry=raw zero_init_last=False'][4] == '+2.00'
    assert rows['regnet_convlstm_20 act_layer=silu'][4] == ''
    assert rows['regnet_convlstm_20'][2:6] == [''] * 4
    assert list(rows)[3:5] == ['regnet_convgru_20', 'regnet_convlstm_20']


def test_regulator_arguments_are_those_of_the_class():
    ours, timms = (set(inspect.signature(cls.__init__).parameters) for cls in (RegulatedResNet, ResNet))
    others = {'kwargs', 'device', 'dtype'}  # timm 1.0.20's has not the last two
    assert set(rows.REGULATOR_KWARGS) == ours - timms - others


@pytest.mark.parametrize(
    'model, resnet',
    [
        ('regnet_convgru_110', 'cifar_resnet_110'),
        ('seregnet_convrnn_32', 'cifar_seresnet_32'),
        ('regnet_convlstm_50', 'resnet50'),
        ('seregnet_convlstm_152', 'seresnet152'),
        ('cifar_resnet_20', None),
        ('regnet_convlstm_50.resnet50_a1_in1k', None),  # starts elsewhere
    ],
)
def test_resnet_of(model, resnet):
    assert rows.resnet_of((model, '')) == (resnet and (resnet, ''))


def test_recipes_stand_side_by_side(project):
    project.write(
        row(top1=91.0),
        row(top1=94.0, recipe='cifar_modern', weights='ema', device='Other, 2 threads', commit=''),
        row('cifar_resnet_20', 93.5, recipe='cifar_modern', weights='ema', commit='fedcba987654-dirty'),
    )
    ((caption, _, rows),) = project.tables()
    assert rows['regnet_convlstm_20'][2:] == ['91.00', '99.50', '', 'n = 1: 1', '94.00', '99.50', '+0.50', 'n = 1: 1']
    assert rows['cifar_resnet_20'][2:] == ['', '', '', '', '93.50', '99.50', '', 'n = 1: 1']
    paper, modern = caption.split('[`cifar_modern`]')
    assert 'EMA' not in paper and '200 epochs, no overrides, EMA weights.' in modern
    assert modern.endswith('Last epoch; Other, 2 threads; Some GPU; commit 0123456, fedcba9-dirty, unknown.')


def test_other_settings_are_tables_of_their_own(project):
    project.write(
        row(**SHORT, top1=80.0),
        row('cifar_resnet_20', 79.0, **SHORT),
        row(top1=81.0, dataset='CIFAR-10', run='lossless'),
        row(top1=82.0, overrides='--lr 0.05', run='lr'),
        row(top1=83.0, recipe='fashion_mnist', epochs=10, dataset='Fashion-MNIST'),
        row(top1=84.0, epochs=100, overrides='--epochs 100'),
    )
    planned, *others = project.tables()
    assert all(cells[2:] == [''] * 8 for cells in planned[2].values())
    tops = [{model: cells[2] for model, cells in rows.items()} for _, _, rows in others]
    name = 'regnet_convlstm_20'
    assert tops == [
        *({name: '81.00'}, {name: '82.00'}, {name: '83.00'}),
        *({'cifar_resnet_20': '79.00', name: '80.00'}, {name: '84.00'}),
    ]
    assert others[3][2][name][2:] == ['80.00', '99.50', '+1.00', 'n = 1: 1']
    lossless, rate, fashion, short, shorter = (caption for caption, _, _ in others)
    assert lossless.startswith(
        f'**CIFAR-10.** [`cifar_paper`]({URL}/blob/main/train_recipes/cifar_paper.yaml): 200 epochs, no overrides.'
    )
    assert '200 epochs, `--lr 0.05`.' in rate
    assert 'fashion_mnist.yaml): 10 epochs, no overrides.' in fashion  # its full length
    assert 'shortened to 20 of 200 epochs, `--decay-milestones 11 16 --epochs 20`.' in short
    assert 'shortened to 100 of 200 epochs' in shorter
    assert not any('shortened' in caption for caption in (planned[0], lossless, rate, fashion))


def test_sizes_come_from_the_rows(project):
    tagged = 'regnet_convlstm_50.resnet50_a1_in1k'  # no ResNet, whatever the tag names
    project.write(
        row(tagged, 76.0, recipe='imagenet_a3', epochs=100, dataset='ImageNet-1k'),
        row('regnet_convlstm_50', 75.0, recipe='imagenet_a3', epochs=100, dataset='ImageNet-1k'),
        row(
            'resnet50', 74.0, recipe='imagenet_a3', epochs=100, dataset='ImageNet-1k', params=25557032, macs=4089184256
        ),
    )
    rows = project.tables()[1][2]
    assert rows['resnet50'][:3] == ['25.56', '4.09', '74.00']
    assert list(rows) == ['resnet50', 'regnet_convlstm_50', tagged]
    assert rows['regnet_convlstm_50'][4] == '+1.00' and rows[tagged][4] == ''


def test_check_detects_an_outdated_plot(project):
    project.write(row(top1=91.0))
    assert project.call('--plots', project.readme.parent / 'docs') == 0 and project.call('--check') == 0
    curve = next((project.results.parent / 'curves').iterdir())
    curve.write_text(curve.read_text().replace('0.1,', '0.2,', 1))
    assert project.call('--check') == 1 and 'accuracy_macs.svg is not current' in project.err


def test_check_detects_a_changed_figure(project):
    assert project.write(row(top1=91.0)).call('--check') == 1
    assert project.readme.read_text(encoding='utf-8') == README
    assert project.call() == 0
    written = project.readme.read_bytes()
    assert project.call('--check') == 0 and project.err == ''
    assert project.call() == 0 and project.readme.read_bytes() == written
    project.write(row(top1=91.01))
    assert project.call('--check') == 1
    assert project.err.startswith('results: ') and project.err.count('\n') == 1
    assert project.readme.read_bytes() == written
    project.readme.write_bytes(written.replace(b'91.00', b'91.01'))
    assert project.call('--check') == 0


@pytest.mark.parametrize(
    'rows, message',
    [
        ([dict(top1='high')], 'line 2: top1 is no number'),
        ([dict(top1='')], 'top1 is no number'),
        ([dict(params='1e5')], 'params is no number'),
        ([dict(seed='x')], 'seed is no number'),
        ([dict(seed='x' * 5000)], 'seed is no number'),
        ([dict(images_per_s='fast')], 'images_per_s is no number'),
        ([dict(top1='nan')], 'not percentages'),
        ([dict(top1=100.1, top5=100.2)], 'not percentages'),
        ([dict(top1=-1)], 'not percentages'),
        ([dict(top1=99.6)], 'not percentages'),  # above top5
        ([dict(best_top1='inf')], 'not percentages'),
        ([dict(epochs=0)], 'below 1'),
        ([dict(model='regnetx_002')], 'unknown model'),
        ([dict(model='')], 'unknown model'),
        ([dict(recipe='secret')], "no recipe 'secret'"),
        ([dict(weights='best')], 'weights are last or ema'),
        ([dict(commit='0123456')], "commit '0123456' is none"),
        ([dict(commit='0123456789ab-dir')], "commit '0123456789ab-dir' is none"),
        ([dict(dataset=' ')], 'empty dataset'),
        ([dict(run='../run')], 'no file name'),
        ([dict(overrides='--aa a|b')], 'would break the table'),
        ([dict(device=END)], 'would break the table'),
        ([dict(run='a'), dict(run='a', seed=2)], "'a' repeats 'a'"),
        ([dict(run='a'), dict(run='b')], "'b' repeats 'a'"),  # the same settings and seed
        ([dict(run='a'), dict(seed=2, weights='ema')], 'ema weights'),
        ([dict(run='a'), dict(seed=2, params=5)], '5 params'),
        ([dict(), dict(seed=2), dict(seed=3, top5='?')], 'line 4: top5 is no number'),
    ],
)
def test_unsound_rows(project, rows, message):
    project.results.write_text('')
    with open(project.results, 'w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row(**changes) for changes in rows)
    for argv in ((), ('--check',), ('--plots', project.plots)):
        assert message in project.refused(*argv)


@pytest.mark.parametrize('column', COLUMNS)
def test_missing_column(project, column):
    project.write(row(), columns=[name for name in COLUMNS if name != column])
    assert f'no column {column}' in project.refused()


def test_broken_files(project):
    project.write(row())
    text = project.results.read_text()
    project.results.write_text(text.rstrip('\n').rsplit(',', 1)[0] + '\n')
    assert 'line 2: not as many fields' in project.refused()
    project.results.write_text(text.rstrip('\n') + ',more\n')
    assert 'line 2: not as many fields' in project.refused()
    project.results.write_bytes(b'\xff\xfe\x00')
    assert 'results.csv' in project.refused()
    project.results.write_text('')
    assert 'no column run' in project.refused()
    project.results.unlink()
    project.results.mkdir()
    project.refused()


def test_unknown_throughput_and_byte_order_mark(project):
    project.write(row(images_per_s=''))
    project.results.write_bytes(b'\xef\xbb\xbf' + project.results.read_bytes())  # as spreadsheets save it
    assert project.tables()[0][2]['regnet_convlstm_20'][2] == '91.00'


@pytest.mark.parametrize(
    'text',
    [
        *('nothing', START, END, f'{END}\n{START}'),
        *(README + START, README + END, README + README),
    ],
)
def test_readme_without_markers(project, text):
    project.write(row()).readme.write_text(text, encoding='utf-8')
    for argv in ((), ('--check',), ('--plots', project.plots)):
        assert 'markers' in project.refused(*argv)


def test_no_readme(project):
    project.readme.unlink()
    assert project.call() == 2 and project.err.count('\n') == 1
    assert not project.readme.exists()


def test_readme_is_replaced_at_once(project, monkeypatch):
    def fail(*args):
        raise OSError('disk full')

    project.write(row())
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', fail)
        assert 'disk full' in project.refused()
    assert sorted(path.name for path in project.readme.parent.iterdir()) == ['README.md', 'curves', 'results.csv']


ALL = [
    *(row('cifar_resnet_20', 90.0 + s, s) for s in (1, 2)),
    *(row('regnet_convlstm_20', 91.0 + s, s) for s in (1, 3)),
    row('regnet_convlstm_20', 90.5, model_kwargs='carry=raw'),
    row('seregnet_convlstm_20', 92.0),
    row('regnet_convlstm_56', 94.0),
    row('regnet_convlstm_20', 80.0, **SHORT),
]


def test_plots_depend_on_rows_alone(project):
    names = [
        f'{name}.svg' for name in ('accuracy_macs', 'accuracy_params', 'curves_cifar_10_jpeg_q75_mirror', 'models')
    ]

    def plots():
        assert project.call('--plots', project.plots) == 0, project.err
        assert sorted(path.name for path in project.plots.iterdir()) == names
        return [(project.plots / name).read_bytes() for name in names]

    few = ALL[1:4]
    first = project.write(*few) and plots()
    assert '93.00 ± 1.41' in project.readme.read_text(encoding='utf-8')
    for data in first:
        paths = ElementTree.fromstring(data).iter('{http://www.w3.org/2000/svg}path')
        assert len(list(paths)) > 50 and b'<dc:date>' not in data
    with matplotlib.rc_context({'lines.linewidth': 9, 'font.size': 30}):  # of the user's
        assert plots() == first
    project.write(*few[:-1], dict(few[-1], top1=94.01))
    assert [a == b for a, b in zip(plots(), first)] == [False, False, False, True]  # made of other rows


def test_two_epochs_are_no_curve(project):
    two = dict(dataset='Fashion-MNIST', overrides='--epochs 2', epochs=2, best_epoch=1)
    project.write(*ALL[:2], row('cifar_resnet_20', 80.0, **two))
    assert project.call('--plots', project.plots) == 0, project.err
    curves = [path.name for path in project.plots.iterdir() if 'curves' in path.name]
    assert curves == ['curves_cifar_10_jpeg_q75_mirror.svg'] and 'Fashion-MNIST' in project.readme.read_text()


def test_exits_have_a_panel_per_data_set(project):
    """Weights of one set share it, released or not; their names need a tag only where there are several."""
    names = ['cifar_resnet_20.tiny100_32', 'regnet_convgru_20.tiny100_32', 'regnet_convlstm_20.x']
    names += ['regnet_convlstm_20.cifar10_jpeg75', 'regnet_convlstm_20.cifar10_jpeg75_e4']
    exits = [dict(zip(results.EARLY_EXIT, [name, '100', '40.1', '60.2', '83.9', '0.31'])) for name in names]
    figure = Figure()
    results.draw_exits(figure, exits)
    found = {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figure.axes}
    assert found == {
        'Tiny-ImageNet, first 100 classes, 32x32': ['cifar_resnet_20', 'regnet_convgru_20'],
        'x': ['regnet_convlstm_20'],
        'CIFAR-10, JPEG q75 mirror': names[3:],
    }
    assert len({line.get_color() for line in figure.axes[2].lines}) == 2


MODELS = START.replace('results:', 'models:'), END.replace('results', 'models')


def test_table_of_models(project):
    """Markdown, CSV and plot from one command; --check finds each of them out of date."""
    page = project.readme.parent / 'models.md'
    csv_file, plot = page.with_suffix('.csv'), project.readme.parent / 'docs' / 'models.svg'
    project.write(row())
    page.write_text(f'# Models\n\n{MODELS[0]}\n{MODELS[1]}\n', encoding='utf-8')

    def call(*argv):
        return results.main([str(a) for a in argv], project.results, (project.readme, page))

    assert call('--plots', plot.parent) == 0 and call('--check') == 0
    for file, old, new in ((page, '311', '312'), (csv_file, '311450', '311451'), (plot, '<dc:description>', '')):
        whole = file.read_text(encoding='utf-8')
        assert old in whole and '`regnet_convlstm_20`' in page.read_text(encoding='utf-8')
        file.write_text(whole.replace(old, new), encoding='utf-8')
        if file is plot:
            file.write_text(re.sub('<dc:description>.*?<', '<dc:description><', whole), encoding='utf-8')
        assert call('--check') == 1 and f'{file.name} is not current' in project.capsys.readouterr().err
        file.write_text(whole, encoding='utf-8')
    csv_file.unlink()
    assert call('--check') == 1 and call() == 0 and call('--check') == 0 and csv_file.is_file()


def test_plot_of_models():
    """Every RegNet is in each panel of costs, at its depth; a gain with its deviation where there is one."""
    figure, models = Figure(), list_rows()
    results.draw_models(figure, models)
    *panels, last = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ['parameters', 'multiply-adds', 'activations', 'gain']
    for axes, size in zip(panels, ('params', 'macs', 'activations')):
        depths = [int(text.get_text()) for text in axes.get_xticklabels()]
        assert depths == [20, 32, 44, 56, 110, 18, 34, 50, 101, 152]
        at = dict(zip(axes.get_xticks(), depths))
        drawn = sorted((at[x], y) for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata()))
        costs = [(rows.traits(m['name'])[0], m[f'{size}_cost']) for m in models if m['resnet'] and not m['tag']]
        assert drawn == sorted(costs) and len(drawn) == 60
    gains = sorted((m['macs_cost'], m['gain']) for m in models if m['gain'] is not None)
    assert sorted((c[0].get_xdata()[0], c[0].get_ydata()[0]) for c in last.containers) == gains and gains
    assert len(figure.legends[0].get_texts()) == 6


def test_accuracy_plot(project):
    groups = results.read_runs(project.write(*ALL).results)
    figure = Figure()
    results.draw_accuracy(figure, groups, 'params', 1e6, 'parameters (millions)')
    full, short = figure.axes
    assert full.get_title() == 'CIFAR-10, JPEG q75 mirror\ncifar_paper, 200 epochs, no overrides'
    assert short.get_title().startswith('CIFAR-10, JPEG q75 mirror\ncifar_paper, shortened to 20 of 200 epochs')
    assert (full.get_xlabel(), full.get_ylabel()) == ('parameters (millions)', 'top-1 on the test split (%)')
    drawn = {}
    for container in full.containers:
        line, _, (bars,) = container
        style = line.get_marker(), line.get_markerfacecolor() == 'white', line.get_markersize()
        heights = [abs(b[1] - a[1]) / 2 for a, b in (s for s in bars.get_segments() if len(s))]
        drawn[style] = list(zip(line.get_xdata(), line.get_ydata())), [h for h in heights if h == h]
    size = {name: counts['params'] / 1e6 for name, counts in SIZES.items()}
    deviation = pytest.approx([0.5**0.5])
    assert drawn.pop(('o', False, 7)) == ([(size['cifar_resnet_20'], 91.5)], deviation)
    points, bars = drawn.pop(('D', False, 7))
    assert points == [(size['regnet_convlstm_20'], 93.0), (size['regnet_convlstm_56'], 94.0)]
    assert bars == pytest.approx([2**0.5])
    assert drawn.pop(('D', True, 7)) == ([(size['seregnet_convlstm_20'], 92.0)], [])
    assert drawn.pop(('D', False, 4)) == ([(size['regnet_convlstm_20'], 90.5)], [])
    assert not drawn
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ['ResNet', 'ConvLSTM', 'SE-ConvLSTM', 'ConvLSTM, other arguments']


def test_plots_of_images_held_out(project):
    """Trials of a recipe have no panel beside comparisons, and no axis says that they are of the test split."""
    held = dict(dataset='CIFAR-10, JPEG q75 mirror, 5,000 training images held out')
    trials = [row('cifar_resnet_20', 60.0, run='a', **held)]
    trials.append(row('cifar_resnet_20', 61.0, run='b', overrides='--lr 0.1', **held))
    several = [row('regnet_convlstm_20', 62.0, run='c', **held)]
    for runs, panels, labels in (
        ([*ALL, *trials], 2, {'top-1 on the test split (%)'}),
        ([*ALL, *trials, *several], 3, {'top-1 on the test split (%)', 'top-1 (%)'}),
        (trials, 2, {'top-1 (%)'}),
    ):
        figure = Figure()
        results.draw_accuracy(figure, results.read_runs(project.write(*runs).results), 'params', 1e6, 'parameters')
        assert len(figure.axes) == panels and {axes.get_ylabel() for axes in figure.axes} == labels


def test_learning_curves(project):
    groups = results.read_runs(project.write(*ALL).results)
    figure = Figure(layout='constrained')
    results.draw_curves(figure, groups, results.read_curves(groups, project.results.parent / 'curves'))
    loss, top1, *short = figure.axes
    assert len(short) == 2 and [len(axes.lines) for axes in figure.axes] == [9] * 2 + [1] * 2
    assert [axes.get_xlabel() for axes in figure.axes] == ['epoch'] * 4
    assert loss.get_ylabel() == 'training loss' and top1.get_ylabel() == 'top-1 on the test split (%)'
    assert list(loss.lines[0].get_xdata()) == list(range(1, 201)) and loss.lines[0].get_ydata()[1] == 1.0
    # two seeds and their mean, two seeds and their mean, and three nets of one seed
    assert [line.get_ydata()[-1] for line in top1.lines] == [91.0, 92.0, 91.5, 92.0, 94.0, 93.0, 90.5, 92.0, 94.0]
    thin = [line.get_linewidth() < 1 for line in top1.lines]
    assert thin == [True, True, False, True, True, False, False, False, False]
    styles = [(line.get_color(), line.get_linestyle()) for line in top1.lines]
    assert len(set(styles[:3])) == len(set(styles[3:6])) == 1 and len(set(styles)) == 5  # seeds look alike
    assert [style for _, style in styles] == ['--'] * 3 + ['-'] * 6
    assert styles[3] == (short[1].lines[0].get_color(), '-')  # nor do other tables change a model's colour
    titles = [strip.get_suptitle() for strip in figure.subfigs]
    assert titles[1] == (
        'CIFAR-10, JPEG q75 mirror\ncifar_paper, shortened to 20 of 200 epochs, --decay-milestones 11 16 --epochs 20'
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *('cifar_resnet_20', 'regnet_convlstm_20', 'regnet_convlstm_20 carry=raw'),
        *('seregnet_convlstm_20', 'regnet_convlstm_56'),
    ]


def test_differences_are_paired_by_seed(project):
    """To the ResNet and to the control, mean, deviation and Student's interval, of hand-made rows."""
    fuse = dict(model_kwargs='regulator=fuse')
    project.write(
        *(row('cifar_resnet_20', t, s) for s, t in ((0, 80.0), (1, 81.0), (2, 82.0))),
        *(row('regnet_convlstm_20', t, s, **fuse) for s, t in ((0, 80.5), (1, 81.5), (2, 82.5))),
        *(row('regnet_convgru_20', t, s) for s, t in ((0, 81.0), (1, 83.0), (2, 85.0), (3, 1.0))),
        row('regnet_convrnn_20', 99.0, 0),  # one pair says nothing
    )
    project.readme.write_text(
        README.replace('results:', 'differences:').replace('end of results', 'end of differences')
    )
    assert project.call() == 0, project.err
    lines = [line for line in project.readme.read_text().splitlines() if line.startswith('| CIFAR')]
    found = {tuple(re.findall('`(.*?)`', line)): [x.strip() for x in line.split('|')[4:8]] for line in lines}
    gru, control = 'regnet_convgru_20', 'regnet_convlstm_20 regulator=fuse'
    assert found.keys() == {(gru, 'cifar_resnet_20'), (gru, control), (control, 'cifar_resnet_20')}
    # differences 1, 2, 3: t(0.975, 2) = 4.303 times 1 / sqrt(3) is 2.48
    assert found[gru, 'cifar_resnet_20'] == ['+2.00 ± 1.00', '-0.48 to +4.48', '+0.000', '0, 1, 2']
    assert found[gru, control][0] == '+1.50 ± 1.00'
    assert found[control, 'cifar_resnet_20'][:2] == ['+0.50 ± 0.00', '+0.50 to +0.50']


def test_quantiles_are_students():
    assert tuple(round(float(stats.t.ppf(0.975, n)), 3) for n in range(1, len(rows.T975) + 1)) == rows.T975


def test_pages_name_the_projects_repository():
    """One placeholder organisation: pyproject.toml's."""
    home = re.search(r'Homepage = "(.*)"', (ROOT / 'pyproject.toml').read_text(encoding='utf-8'))[1]
    assert home == rows.REPOSITORY
    raw = home.replace('github.com', 'raw.githubusercontent.com')
    for page in (ROOT / 'README.md', *ROOT.glob('docs/*.md')):
        text = page.read_text(encoding='utf-8')
        for link in re.findall(r'\]\((https://(?:raw\.)?github[^)]*timm_regnet_rnn[^)]*)\)', text):
            assert link.startswith((f'{raw}/main/', f'{home}/')), link
            path = re.sub(f'^({raw}/main|{home}/(blob|tree)/main)/', '', link)
            assert path == link or (ROOT / path).exists(), link
        for image in re.findall(r'!\[[^]]*\]\(([^)]*)\)', text) if page.name == 'README.md' else ():
            assert image.startswith(raw), image  # a package page shows no relative image


def test_curve_must_be_whole(project):
    project.write(*ALL)
    path = project.results.parent / 'curves' / f'{ALL[0]["run"]}.csv'
    text = path.read_text()
    path.write_text(text[: text.rstrip().rindex('\n') + 1])
    assert 'does not have the epochs 1 to 200' in project.refused('--plots', project.plots)
    path.write_text(text.replace('train_loss', 'loss'))
    assert 'no column train_loss' in project.refused('--plots', project.plots)
    path.unlink()
    assert path.name in project.refused('--plots', project.plots)


def test_plots_without_runs_or_matplotlib(project, monkeypatch):
    assert 'no runs to plot' in project.refused('--plots', project.plots)
    project.write(row())
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert "pip install '.[plot]'" in project.refused('--plots', project.plots)
    assert project.call() == 0


@pytest.mark.parametrize('file', ['curves/RUN.csv', 'early_exit.csv'])
def test_a_cut_table_is_refused(project, file):
    """Also where what is left of its last number is a number."""
    run = row(top1=91.0)
    project.write(run)
    exits = project.results.parent / 'early_exit.csv'
    exits.write_text(f'{",".join(results.EARLY_EXIT)}\nregnet_convlstm_20.x,100,40.1,60.2,83.9,0.3125\n')
    assert project.call() == 0
    path = project.results.parent / file.replace('RUN', run['run'])
    text = path.read_text()
    for cut in (1, 2, 3, 9):
        path.write_text(text[:-cut])
        assert f'{path.name}, line ' in project.refused()
