"""train_recipes/early_exit.py on a net whose answer is known."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomize
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / 'train_recipes' / 'early_exit.py'
_spec = importlib.util.spec_from_file_location('early_exit', SCRIPT)
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


@pytest.mark.parametrize('name', ['cifar_resnet_20', 'regnet_convlstm_20', 'seregnet_convgru_20', 'regnet_convrnn_18'])
def test_exits_are_the_net_cut_short(name):
    """Behind each block: the net without the blocks behind it; residual branches from the blocks' own arithmetic."""
    model = randomize(timm.create_model(name, num_classes=5)).eval()
    stage = model.layer3 if name.endswith('20') else model.layer4
    x, target = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    found = script.early_exit(model, [(x[:4], target[:4]), (x[4:], target[4:])])
    assert found['images'] == 6 and -1 <= found['cosine'] <= 1
    for top1 in reversed(found['top1']):
        with torch.no_grad():
            right = (model(x).argmax(1) == target).sum().item()
        assert top1 == pytest.approx(100 * right / 6)
        del stage[-1]
        if not len(stage):
            break
    assert not any(m._forward_hooks for m in model.modules())


def test_equal_branches_are_alike():
    model = timm.create_model('cifar_resnet_20').eval()
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            torch.nn.init.ones_(block.bn2.bias)
            torch.nn.init.zeros_(block.bn2.weight)
    assert script.early_exit(model, [(torch.randn(2, 3, 32, 32), torch.zeros(2))])['cosine'] == pytest.approx(1)


def test_rows_and_refusals(tmp_path, capsys):
    for i in range(10):
        (tmp_path / 'test' / f'c{i}').mkdir(parents=True)
        Image.new('RGB', (32, 32), (25 * i, 0, 0)).save(tmp_path / 'test' / f'c{i}' / 'a.png')
    file, tag = tmp_path / 'early_exit.csv', 'regnet_convlstm_20.cifar10_jpeg75'
    for _ in range(2):
        assert script.main([tag, '--data-dir', str(tmp_path)], file) == 0
        header, row = file.read_text().splitlines()
        assert row.startswith(f'{tag},10,') and header.count(',') == row.count(',')
    grey = 'cifar_resnet_20.fashion_mnist'
    assert script.main([grey, '--data-dir', str(tmp_path)], tmp_path / 'grey.csv') == 0
    assert (tmp_path / 'grey.csv').read_text().splitlines()[1].startswith(f'{grey},10,')
    (tmp_path / 'test' / 'more').mkdir()
    Image.new('RGB', (32, 32)).save(tmp_path / 'test' / 'more' / 'a.png')
    for argv, words in (([tmp_path], 'another data set'), (['nowhere'], "no folder 'test'")):
        assert script.main([tag, '--data-dir', str(*argv)], file) == 2
        err = capsys.readouterr().err
        assert words in err and err.count('\n') == 1
    assert file.read_text().splitlines() == [header, row]
