"""The list of models, which is made without PyTorch."""

import json
import re

from test_cli import NAMES, call, on_terminal, refused

import timm_regnet_rnn
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
