"""The one place where weights files are opened: what is read, and what is refused in a line."""

from pathlib import Path

import pytest
import timm
import torch
from spread_nets import PadShortcut
from test_cli import CAT, refused

from timm_regnet_rnn import from_resnet


def test_pickled_code_is_not_run(capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / 'ran',))

    torch.save(dict(state_dict=Evil()), tmp_path / 'evil.pth.tar')
    assert 'besides weights' in refused(capsys, 'predict', CAT, '--checkpoint', tmp_path / 'evil.pth.tar')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    'state, words',
    [
        (lambda: timm.create_model('test_convnext').state_dict(), 'not the weights of a ResNet'),
        (lambda: timm.create_model('regnet_convrnn_20').state_dict(), "a RegNet's weights"),
        (lambda: {'a': 1}, 'no state dict'),
        (lambda: {'state_dict': {}}, 'no state dict'),
        (lambda: PadShortcut(1), 'Python objects'),
    ],
)
def test_files_that_are_no_resnet(tmp_path, state, words):
    torch.save(state(), tmp_path / 'net.pth')
    with pytest.raises(ValueError, match=words) as caught:
        from_resnet(tmp_path / 'net.pth')
    assert '\n' not in str(caught.value)
    (tmp_path / 'net.pth').write_bytes((tmp_path / 'net.pth').read_bytes()[:100])
    with pytest.raises(ValueError, match='is no PyTorch checkpoint, or broken'):
        from_resnet(tmp_path / 'net.pth')
    with pytest.raises(FileNotFoundError, match='no weights file'):
        from_resnet('nothing.pth')
