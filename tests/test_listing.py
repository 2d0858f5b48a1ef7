"""The list of models, which is made without PyTorch."""

import fnmatch
import json
import re
import sys

import pytest
import timm
from test_cli import NAMES, call, on_terminal, refused

import timm_regnet_rnn
from timm_regnet_rnn.errors import UsageError
from timm_regnet_rnn.listing import SORTS, list_rows, names, print_rows
from timm_regnet_rnn.weights.manifest import RELEASED


def test_list_table(capsys):
    status, out, _ = call(capsys, 'list')
    header, *rows = out.splitlines()
    assert status == 0 and [row.split()[0] for row in rows] == NAMES
    assert header.split()[0] == 'name' and len(rows) == 70
    row = next(row for row in rows if row.startswith('regnet_convlstm_50 '))
    assert row.split()[1:] == ['28.13', '4.561', '3x224x224', 'resnet50_a1_in1k']


def test_list_says_what_the_registry_says(capsys):
    """The list is made without timm; it must not differ from it."""
    rows = json.loads(call(capsys, 'list', '--json')[1])
    cfgs = timm_regnet_rnn.regnet_rnn.default_cfgs
    for row in rows:
        cfg = cfgs[row['name']]
        assert sorted(row['tags']) == sorted(tag for tag in cfg.tags if tag and cfg.cfgs[tag].has_weights), row['name']
        assert all(f'top-1 {value:.2f} %' in cfg.cfgs[tag].description for tag, value in row['top1'].items())
    assert [row['name'] for row in rows] == NAMES
    released = [row for row in rows if row['top1']]
    assert {f'{row["name"]}.{tag}' for row in released for tag in row['top1']} == set(RELEASED)


def test_list_sorted_and_filtered(capsys):
    def rows(*argv):
        return json.loads(call(capsys, 'list', '--json', *argv)[1])

    for key in ('params', 'macs'):
        values = [row[key] for row in rows('--sort', key)]
        assert values == sorted(values) and len(values) == len(NAMES)
    best = [max(row['top1'].values(), default=-1) for row in rows('--sort', 'top1')]
    assert best == sorted(best, reverse=True) and best[0] > 0
    chosen = rows('*_20', '--pretrained')
    assert chosen and all(row['tags'] and row['name'].endswith('_20') for row in chosen)
    assert 'no model with pretrained weights matches' in refused(capsys, 'list', '*_110', '--pretrained')
    assert "Did you mean 'regnet_convlstm_20'?" in refused(capsys, 'list', 'regnet_convlstm20')
    assert "invalid choice: 'parms'" in (words := refused(capsys, 'list', '--sort', 'parms')) and "'params'?" in words


def test_list_on_a_terminal():
    status, coloured = on_terminal('list', '*convlstm_20')
    assert status == 0 and '\x1b[36m' in coloured
    status, plain = on_terminal('list', '*convlstm_20', NO_COLOR='1')
    assert '\x1b[3' not in plain
    plain = re.sub('\x1b.*?m', '', plain)
    assert all(len(line) <= 60 for line in plain.splitlines()) and 'regnet_convlstm_20' in plain, plain


def test_list_json(capsys):
    rows = json.loads(call(capsys, 'list', '*regnet_convlstm_20', '--json')[1])
    assert [row['name'] for row in rows] == ['regnet_convlstm_20', 'seregnet_convlstm_20']
    assert rows[0]['params'] == 311_450 and rows[0]['macs'] == 49_316_480
    assert "no model matches 'resnet*'" in refused(capsys, 'list', 'resnet*')


# by the functions themselves


def test_words_to_complete():
    """Every model, and behind it its tags: what timm knows by the same names."""
    words = names()
    assert [word for word in words if '.' not in word] == NAMES
    tagged = [word for word in words if '.' in word]
    assert {*tagged} == {n for n in timm.list_pretrained() if n.split('.')[0] in NAMES} and len({*words}) == len(words)
    assert all(words.index(word.split('.')[0]) < words.index(word) for word in tagged)


def test_every_row():
    rows = list_rows()
    assert [row['name'] for row in rows] == NAMES
    assert all({*row} == {'name', 'params', 'macs', 'input_size', 'tags', 'top1'} for row in rows)
    assert list_rows('regnet_convlstm_20')[0]['top1']['cifar10_jpeg75'] == 85.26
    assert {row['name'] for row in list_rows('*', pretrained=True)} == {
        word.split('.')[0] for word in names() if '.' in word
    }
    assert list_rows('REGNET*') == list_rows('') == []


@pytest.mark.parametrize('sort', SORTS)
@pytest.mark.parametrize('pattern', ['*', 'se*', '*_[25]0'])
def test_order(sort, pattern):
    def key(row):
        return -max(row['top1'].values(), default=-1) if sort == 'top1' else row[sort]

    rows = list_rows(pattern, sort=sort)
    chosen = [name for name in NAMES if fnmatch.fnmatch(name, pattern)]
    by_depth = sorted(rows, key=key) if sort != 'name' else [next(r for r in rows if r['name'] == n) for n in chosen]
    assert rows == by_depth and sorted(row['name'] for row in rows) == sorted(chosen)


def test_a_table_in_a_file_is_as_wide_as_it_is(capsys):
    row = dict(name='n', params=1_234_567, macs=2_500_000, input_size=[3, 8, 8], tags=['t' * 90, 'u'], top1=dict(u=50))
    print_rows([row])
    header, line = capsys.readouterr().out.splitlines()
    assert line.split() == ['n', '1.23', '0.003', '3x8x8', 't' * 90 + ',', 'u', '(50.00)'] and 'macs G' in header


def test_a_list_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, 'rich.console', None)
    with pytest.raises(UsageError, match='the list needs rich: pip install rich; --json does without it.'):
        print_rows([])
