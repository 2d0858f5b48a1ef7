"""The data of a run, seen as train.py will see them."""

import pytest
from test_cli import call


@pytest.mark.slow
def test_empty_folders_are_no_classes(capsys, recorded, argv, data):
    (data / 'train' / '.ipynb_checkpoints').mkdir()
    assert call(capsys, *argv, '--dry-run')[0] == 0
