"""What a run leaves behind: its checkpoints, its learning curve and its row."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_run import rows

from timm_regnet_rnn.training import record


@pytest.mark.slow
@given(st.data())
@settings(max_examples=50, deadline=None)
def test_a_learning_curve_is_whole_however_often_the_run_was_cut(tmp_path_factory, data):
    """train.py writes the header again after each resume, and the epoch again that was not saved."""
    output = tmp_path_factory.mktemp('run')
    epochs = data.draw(st.integers(1, 6))
    start, lines, last = 0, [], {}
    while start < epochs:
        lines.append('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr')
        stop = data.draw(st.integers(start + 1, epochs))
        for epoch in range(start, stop):
            last[epoch + 1] = data.draw(st.floats(0, 100))
            lines.append(f'{epoch},1.0,2.0,{last[epoch + 1]!r},99.0,0.1')
        start = stop if stop == epochs else data.draw(st.integers(max(0, stop - 1), stop))
    if data.draw(st.booleans()):
        lines.append(f'{epochs},1.0,2')  # cut off by a kill
    (output / 'summary.csv').write_text('\n'.join(lines) + '\n')
    curve = record.learning_curve(output)
    assert [row['epoch'] for row in curve] == list(range(1, epochs + 1))
    assert {row['epoch']: row['top1'] for row in curve} == last


@pytest.mark.slow
def test_no_checkpoint_runs_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    torch.save(dict(state_dict=Bomb(), optimizer={}, epoch=9), tmp_path / 'last.pth.tar')
    (tmp_path / 'checkpoint-3.pth.tar').write_bytes(pickle.dumps(Bomb()))
    assert record.newest_checkpoint(tmp_path) == (None, 0) and not (tmp_path / 'ran').exists()
    torch.save(dict(state_dict={}, optimizer={}, epoch=4), tmp_path / 'tmp.pth.tar')
    assert record.newest_checkpoint(tmp_path) == (tmp_path / 'tmp.pth.tar', 5)


APPEND = """
import sys
from pathlib import Path
from timm_regnet_rnn.training.record import COLUMNS, append_row
for i in range(10):
    append_row(Path(sys.argv[1]), dict.fromkeys(COLUMNS, 'x, "y"') | dict(run='same'), [])
"""


@pytest.mark.slow
def test_rows_of_runs_that_end_together_are_all_there(tmp_path):
    command = [sys.executable, '-c', APPEND, tmp_path / 'results.csv']
    children = [subprocess.Popen(command) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    written = rows(tmp_path / 'results.csv')
    assert sorted(row['run'] for row in written) == sorted(['same', *(f'same-r{i}' for i in range(2, 21))])
    assert all(row['dataset'] == 'x, "y"' for row in written)
    assert len(list((tmp_path / 'curves').glob('*.csv'))) == 20
