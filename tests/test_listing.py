"""The list of models, which is made without PyTorch."""

import csv
import fnmatch
import json
import re
import sys

import pytest
import timm
from test_cli import NAMES, call, on_terminal, refused

import timm_regnet_rnn
from timm_regnet_rnn.errors import UsageError
from timm_regnet_rnn.listing import SORTS, csv_table, full_name, list_rows, markdown_tables, names, print_rows
from timm_regnet_rnn.names import parse_name
from timm_regnet_rnn.results import RECIPES
from timm_regnet_rnn.weights.manifest import RELEASED

WORDS = [word for name in NAMES for word in (name, *(full for full in timm.list_pretrained(f'{name}.*')))]
SIZES = ('params', 'macs', 'activations')


def test_list_table(capsys):
    status, out, _ = call(capsys, 'list')
    header, *rows = out.splitlines()
    assert status == 0 and sorted(row.split()[0] for row in rows) == sorted(WORDS) and len(rows) > 85
    assert re.split('  +', header) == [
        *('model', 'params M', 'params cost', 'macs G', 'macs cost', 'acts M', 'acts cost', 'input', 'top-1 %', 'gain')
    ]
    cells = {row.split()[0]: re.split('  +', row) for row in rows}
    assert all(len(row) == 10 for row in cells.values()) and '\x1b' not in out and ' \n' not in out
    # 28,133,160 and 4.561 G of the design against timm's 25,557,032 and 4.089 G
    warm = cells['regnet_convlstm_50.resnet50_a1_in1k']
    assert warm[1:5] + warm[7:] == ['28.133', '+10.1 %', '4.561', '+11.5 %', '3x224x224', '-', '-']
    assert cells['cifar_resnet_20'][1:5] == ['0.272', '-', '0.041', '-']
    ends = {row.index(cell) + len(cell) for row in rows for cell in [row.split()[1]]}
    assert len(ends) == 1  # aligned to the right


def test_list_says_what_the_registry_says(capsys):
    """The list is made without timm; it must not differ from it."""
    rows = json.loads(call(capsys, 'list', '--json')[1])
    cfgs = timm_regnet_rnn.regnet_rnn.default_cfgs
    for name in NAMES:
        cfg, tagged = cfgs[name], [row for row in rows if row['name'] == name and row['tag']]
        assert sorted(row['tag'] for row in tagged) == sorted(t for t in cfg.tags if t and cfg.cfgs[t].has_weights), (
            name
        )
        for row in tagged:
            said = re.search(r'top-1 ([\d.]+) %', cfg.cfgs[row['tag']].description or '')
            assert row['top1'] == (float(said[1]) if full_name(row) in RELEASED else None), row
    assert [row['name'] for row in rows if not row['tag']] == NAMES
    assert {full_name(row) for row in rows if row['top1'] is not None} == set(RELEASED)


def test_list_sorted_and_filtered(capsys):
    def rows(*argv):
        return json.loads(call(capsys, 'list', '--json', *argv)[1])

    for key in SIZES:
        values = [row[key] for row in rows('--sort', key)]
        assert values == sorted(values) and len(values) == len(WORDS)
    for key in ('top1', 'gain'):
        values = [row[key] for row in rows('--sort', key)]
        measured = [value for value in values if value is not None]
        assert measured and values == sorted(measured, reverse=True) + [None] * (len(values) - len(measured))
    chosen = rows('*_20', '--pretrained')
    assert chosen and all(row['tag'] and row['name'].endswith('_20') for row in chosen)
    assert {row['tag'] for row in rows('*.tiny100_32')} == {'tiny100_32'}
    assert [full_name(row) for row in rows('regnet_convlstm_20.cifar10*75')] == ['regnet_convlstm_20.cifar10_jpeg75']
    assert 'no model with pretrained weights matches' in refused(capsys, 'list', '*_110', '--pretrained')
    assert "Did you mean 'regnet_convlstm_20'?" in refused(capsys, 'list', 'regnet_convlstm20')
    assert "invalid choice: 'parms'" in (words := refused(capsys, 'list', '--sort', 'parms')) and "'params'?" in words


def test_list_on_a_terminal():
    status, coloured = on_terminal('list', '*convlstm_20')
    assert status == 0 and '\x1b[36m' in coloured
    for pattern, out in (('*convlstm_20', 'acts cost, input'), ('*50', 'gain')):
        status, plain = on_terminal('list', pattern, NO_COLOR='1')
        assert '\x1b[3' not in plain
        table, last = re.sub('\x1b.*?m', '', plain).replace('\r', '').split('60 columns leave out: ')
        header, *rows = table.splitlines()
        assert all(len(line) <= 60 for line in (header, *rows)) and re.match('model .* params M', header)
        assert [row.split()[0] for row in rows] == [w for w in WORDS if fnmatch.fnmatch(w.split('.')[0], pattern)]
        assert out in ' '.join(last.split()), plain


def test_list_json(capsys):
    rows = json.loads(call(capsys, 'list', '*regnet_convlstm_20', '--json')[1])
    assert [full_name(row) for row in rows if not row['tag']] == ['regnet_convlstm_20', 'seregnet_convlstm_20']
    assert rows[0]['params'] == 311_450 and rows[0]['macs'] == 49_316_480
    assert "no model matches 'resnet*'" in refused(capsys, 'list', 'resnet*')


# by the functions themselves


def test_words_to_complete():
    """Every model, and behind it its tags: what timm knows by the same names."""
    words = names()
    assert [word for word in words if '.' not in word] == NAMES
    assert {*words} == {*WORDS} and len({*words}) == len(words)
    assert all(words.index(word.split('.')[0]) < words.index(word) for word in words if '.' in word)


def test_every_row():
    rows = list_rows()
    assert [full_name(row) for row in rows] == names() and len({tuple(row) for row in rows}) == 1
    by_name = {full_name(row): row for row in rows}
    assert by_name['regnet_convlstm_20.cifar10_jpeg75']['top1'] == 85.26
    assert by_name['regnet_convlstm_20']['top1'] is None  # the name alone is no weights
    assert [full_name(row) for row in list_rows('*', pretrained=True)] == [w for w in names() if '.' in w]
    assert list_rows('REGNET*') == list_rows('') == []


def test_costs_by_hand():
    """Percent more than the ResNet with the same classes, from counts of timm's nets and ours."""
    row = {full_name(row): row for row in list_rows()}
    assert row['regnet_convlstm_20']['params_cost'] == pytest.approx(100 * (311_450 / 272_474 - 1), abs=0.005)
    tiny = row['regnet_convlstm_20.tiny100_32']  # 90 classes more in both, of 64 weights and a bias
    assert tiny['params'] == 311_450 + 90 * 65 and tiny['macs'] == 49_316_480 + 90 * 64
    assert tiny['params_cost'] == pytest.approx(100 * ((311_450 + 5850) / (272_474 + 5850) - 1), abs=0.005)
    assert row['regnet_convlstm_50']['params_cost'] == pytest.approx(100 * (28_133_160 / 25_557_032 - 1), abs=0.005)
    grey = row['regnet_convgru_20.fashion_mnist']  # both nets at 1x28x28: a stem of one channel, maps of 28, 14 and 7
    assert grey['input_size'] == [1, 28, 28] and grey['macs'] == 36_807_872
    assert grey['params_cost'] == pytest.approx(100 * ((310_106 - 288) / (272_474 - 288) - 1), abs=0.005)
    assert grey['macs_cost'] == pytest.approx(100 * (36_807_872 / 31_021_952 - 1), abs=0.005)
    # a gate is PW and DW: one layer of 16, 32 and 64 channels per block, beside the fuse convolution
    more = sum(3 * width * side**2 * (1 + 2 * 4) for width, side in ((16, 32), (32, 16), (64, 8)))
    assert row['regnet_convlstm_20']['activations'] - row['cifar_resnet_20']['activations'] == more
    for name, line in row.items():
        assert line['resnet'] == (parse_name(name).resnet if 'regnet' in name else None)
        assert all((line[f'{size}_cost'] is None) == ('regnet' not in name) for size in SIZES)


def test_gains_are_paired_by_seed():
    """From results.csv, read here as text: the difference to the ResNet under the settings of the tag's own run."""
    with open(RECIPES / 'results.csv', newline='', encoding='utf-8') as file:
        runs = list(csv.DictReader(file))
    same = ('recipe', 'overrides', 'dataset', 'epochs', 'processes')
    checked = 0
    for row in list_rows(pretrained=True):
        run = next((r for r in runs if r['run'] == RELEASED.get(full_name(row), {}).get('run')), None)
        if run is None or not row['resnet']:
            assert row['gain'] is None and row['gain_seeds'] == 0
            continue
        alike = [r for r in runs if not r['model_kwargs'] and all(r[key] == run[key] for key in same)]
        tops = {
            model: {r['seed']: float(r['top1']) for r in alike if r['model'] == model}
            for model in (row['name'], row['resnet'])
        }
        pairs = [
            top - tops[row['resnet']][seed] for seed, top in tops[row['name']].items() if seed in tops[row['resnet']]
        ]
        assert row['gain'] == pytest.approx(sum(pairs) / len(pairs), abs=0.0051) and row['gain_seeds'] == len(pairs)
        checked += 1
    assert checked >= 3
    assert all(row['gain'] is None for row in list_rows(groups={}))


@pytest.mark.parametrize('sort', SORTS)
@pytest.mark.parametrize('pattern', ['*', 'se*', '*_[25]0'])
def test_order(sort, pattern):
    def key(row):
        best_first = sort in ('top1', 'gain')
        return (float('inf') if row[sort] is None else -row[sort]) if best_first else row[sort]

    rows = list_rows(pattern, sort=sort)
    chosen = [word for word in names() if fnmatch.fnmatch(word.split('.')[0], pattern)]
    assert [full_name(row) for row in rows] == chosen if sort == 'name' else rows == sorted(rows, key=key)
    assert sorted(full_name(row) for row in rows) == sorted(chosen)


ROW = dict(
    name='n',
    tag='t' * 90,
    params=1_234_567,
    macs=2_500_000,
    activations=9_000,
    input_size=[3, 8, 8],
    dataset='d',
    top1=50.0,
    resnet='r',
    params_cost=12.34,
    macs_cost=-1.0,
    activations_cost=0.0,
    gain=-0.5,
    gain_deviation=None,
    gain_seeds=1,
)


def test_a_table_in_a_file_is_as_wide_as_it_is(capsys):
    print_rows([ROW])
    header, line = capsys.readouterr().out.splitlines()
    cells = ['n.' + 't' * 90, '1.235', '+12.3 %', '0.003', '-1.0 %', '0.009', '+0.0 %', '3x8x8', '50.00', '-0.50 (n=1)']
    assert re.split('  +', line) == cells and 'macs G' in header


def test_csv_and_markdown():
    rows = list_rows('*_20')
    read = list(csv.DictReader(csv_table(rows).splitlines()))
    assert [row['name'] + ('.' if row['tag'] else '') + row['tag'] for row in read] == [full_name(row) for row in rows]
    assert [int(row['params']) for row in read] == [row['params'] for row in rows]
    sizes = {row['input_size']: row['tag'] for row in read}
    assert sizes.keys() == {'3x32x32', '1x28x28'} and sizes['1x28x28'] == 'fashion_mnist'
    text = markdown_tables([ROW, *list_rows('regnet_convlstm_50')])
    assert re.findall('### (.*)', text) == ['Images of 8x8', 'Images of 224x224']
    tables = [line for line in text.splitlines() if line.startswith('|')]
    assert {line.count('|') for line in tables} == {7} and '| -0.50 (n=1) |' in text and 'input' not in text


def test_a_list_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, 'rich.console', None)
    with pytest.raises(UsageError, match='the list needs rich: pip install rich; --json does without it.'):
        print_rows([ROW])
