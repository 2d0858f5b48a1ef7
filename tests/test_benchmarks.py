"""The benchmarks run and their tables are whole; what they measure is for the reader, not for a test."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

HOUSE = Path(__file__).parent.parent
sys.path.append(str(HOUSE))
from benchmarks import scaling, speed  # noqa: E402


@pytest.fixture(autouse=True)
def rule():
    from timm_regnet_rnn import ops

    before = ops._ops
    yield
    ops.set_ops(before)


@pytest.mark.parametrize(
    'case',
    [
        speed.Case('training', 'regnet_convrnn_20', 2, 'bfloat16'),
        speed.Case('training', 'regnet_convlstm_20', 2, op='reference'),
        speed.Case('inference', 'regnet_convgru_18', 1, form='deployed'),
        speed.Case('inference, ONNX Runtime', 'regnet_convlstm_20', 2, form='deployed', op='reference'),
    ],
    ids=str,
)
def test_a_row(case):
    lines = list(speed.model_rows([case], 2, 'cpu'))
    cells = [cell.strip() for cell in lines[-1].strip('|').split('|')]
    assert len(lines) == 3 and all(line.count('|') == 8 for line in lines)
    assert cells[:3] == [str(case), f'`{case.regnet}`', case.op] and float(cells[3]) > 0
    middle, low, high = map(float, re.fullmatch(r'([\d.]+) \(([\d.]+) to ([\d.]+)\)', cells[4]).groups())
    assert 0 <= low <= middle <= high and 0.5 < float(cells[5]) < 1
    assert (1 < float(cells[6]) < 6) if case.work == 'training' else cells[6] == ''


def test_the_op():
    lines = list(speed.op_rows([(1, 16, 5, 4)], 1, 'cpu'))
    assert len(lines) == 2 + 3 and all(line.count('|') == 6 for line in lines)


def test_openvino():
    """The engine's own numbers are those of the model that it was given."""
    pytest.importorskip('openvino')
    lines = list(
        speed.model_rows([speed.Case('inference, OpenVINO', 'regnet_convlstm_20', 2, form='deployed')], 1, 'cpu')
    )
    assert len(lines) == 3 and 'OpenVINO' in lines[-1]


def test_the_fastest_setting_is_taken():
    took = []
    steps = [lambda: (time.sleep(0.02), took.append('slow')), lambda: took.append('fast')]
    speed.fastest(steps)()
    assert took[-1] == 'fast' and took.count('slow') == 4


def test_a_quick_table(monkeypatch, capsys):
    """The code that a GPU would run, without the nets that take minutes to compile."""
    monkeypatch.setitem(speed.QUICK_CASES, 'cpu', [speed.Case('training', 'regnet_convlstm_20', 2)])
    monkeypatch.setattr(sys, 'argv', ['speed', '--quick', '--rounds', '1'])
    speed.main()
    out = capsys.readouterr().out
    assert out.count('| half the warps |') == 1 and out.count('| convlstm |') == 2 and re.search(r'\n\d+ s\n$', out)


def test_other_warps_are_asked_for(monkeypatch):
    """Whatever a step launches, it gets half and double the warps that the rule says, which is the rule again after."""
    asked, shape_of = [], speed.fused_cuda._shape
    step = lambda x, *_: asked.append(speed.fused_cuda._shape(x, False)[1])  # noqa: E731
    monkeypatch.setattr(speed.CELLS['convrnn'], 'step', staticmethod(step))
    monkeypatch.setattr(speed, 'CELLS', {'convrnn': speed.CELLS['convrnn']})
    list(speed.warps_rows([(1, 64, 16, 16)], 1, 'cpu'))
    rule = shape_of(torch.empty(1, 64, 16, 16).contiguous(memory_format=speed.CL), False)[1]
    assert rule > 1 and set(asked) == {rule // 2, rule, 2 * rule} and speed.fused_cuda._shape is shape_of


def test_a_profile(capsys):
    speed.profile([speed.Case('training', 'regnet_convlstm_20', 2)], 'cpu', 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10
    assert any(line.startswith('| timm_regnet_rnn::conv_lstm_norm_backward | 0.0 |') for line in lines)


def test_memory_is_what_autograd_holds():
    """The fused step holds no gates, so less than the reference."""
    held = {}
    for op in ('fused', 'reference'):
        case = speed.Case('training', 'regnet_convlstm_20', 2, op=op)
        held[op] = speed.memory(case, True, 'cpu')
    assert held['fused'] < 0.8 * held['reference']


def test_a_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, 'AXES', dict(batch=('batch', (1, 2))))
    monkeypatch.setattr(scaling, 'DEFAULTS', dict(depth=20, width=16, size=8, batch=1))
    scaling.draw(tmp_path / 'plot.svg', 1, 'cpu')
    assert (tmp_path / 'plot.svg').read_bytes().count(b'<path') > 20


@pytest.mark.parametrize(
    'args',
    [
        ('speed', '--rounds', '0'),
        ('speed', '--nosuch'),
        ('speed', '--engines', '--quick'),
        ('scaling', '--to', '/nowhere/x.svg'),
    ],
)
def test_bad_arguments(args):
    command = [sys.executable, '-m', f'benchmarks.{args[0]}', *args[1:]]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
