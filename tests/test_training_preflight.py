"""What is refused, or said, before the first epoch."""

import shutil
from pathlib import Path

import pytest
from test_cli import call, refused

from timm_regnet_rnn.training import record


@pytest.mark.slow
@pytest.mark.parametrize('text', [b'a,b\n1,2\n', 'ü,'.encode('latin-1'), b'run,date\n"', b'\0'])
def test_damaged_results_are_said_before_training(capsys, recorded, argv, tmp_path, text):
    (tmp_path / 'results.csv').write_bytes(text)
    assert 'results.csv' in refused(capsys, *argv)
    assert (tmp_path / 'results.csv').read_bytes() == text and not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_averaged_weights_are_said_to_lag(capsys, recorded, argv):
    status, _, err = call(capsys, *argv, '--model-ema', '--dry-run')
    assert status == 0 and '6 updates are few for averaged weights of decay 0.9998, which remember 5000' in err
    assert 'updates' not in call(capsys, *argv, '--model-ema', '--model-ema-decay', '0.4', '--dry-run')[2]
    log = 'Test: [   1/1]  Acc@1:  50.000 ( 48.000)\nTest: [   1/1]  Acc@1:  80.000 ( 72.000)  Acc@5: 99 (99)\n'
    log += 'Test (EMA): [   1/1]  Acc@1:  20.000 ( 20.000)\n'
    folder = Path(argv[argv.index('--output') + 1])
    folder.mkdir()
    (folder / 'train.log').write_text(log)
    assert record.live_accuracy(folder) == 72.0


@pytest.mark.slow
def test_a_full_disk_is_told_before(capsys, recorded, argv, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    assert 'has 1 MB free, the checkpoints take' in refused(capsys, *argv)
