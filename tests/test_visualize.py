"""What is drawn is what the model computes: maps, gates and shares against a pass written out by hand."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomize
from PIL import Image
from safetensors.torch import save_file
from test_cli import CAT, call, refused

from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.inference import preprocessing
from timm_regnet_rnn.ops import reference
from timm_regnet_rnn.visualize import visualize

GATES = dict(convrnn='', convgru='zr', convlstm='ifo')
NETS = {
    'basic': lambda cell: timm.create_model(f'regnet_{cell}_20', layers=(2, 1, 2)),
    'raw_own_cells': lambda cell: timm.create_model(
        f'seregnet_{cell}_20', layers=(2, 1, 2), carry='raw', share_regulator=False
    ),
    'bottleneck': lambda cell: timm.create_model(
        f'regnet_{cell}_50', layers=(1, 2, 1, 1), regulated_stages=(2, 3), num_classes=7
    ),
    'deployed': lambda cell: timm.utils.reparameterize_model(
        randomize(timm.create_model(f'regnet_{cell}_20', layers=(1, 2, 1)).eval())
    ),
}


def by_hand(model, x):
    """Name, h, gates and share of every regulated block, by the paper's equations on the model's parts."""
    rows = []
    x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    for name in model.stage_names:
        stage, h, c = getattr(model, name), None, None
        for i, block in enumerate(stage):
            if not hasattr(block, 'conv_fuse'):
                x = block(x)
                continue
            cell = block.regulator or stage.regulator
            main, read = block.enter(x)
            weight, bias = cell.kernel()
            gates = {
                gate: torch.sigmoid(reference.gate(read, h, weight[k], bias[k])).mean().item()
                for k, gate in enumerate(cell.gates)
                if gate in 'ifozr'
            }
            raw, c = cell.step(read, h, c, weight, bias)
            hidden = torch.relu(block.bn_h(raw))
            both, conv, width = torch.cat([main, hidden], 1), block.conv_fuse.weight, main.shape[1]
            from_h = F.conv2d(hidden, conv[:, width:]).norm()
            from_x = F.conv2d(both[:, :width], conv[:, :width]).norm()
            rows.append((f'{name}.{i}', hidden[0].mean(0), gates, (100 * from_h / (from_h + from_x)).item()))
            x, h = block.leave(x, main, raw)
    return rows


@pytest.mark.parametrize('cell', CELLS)
@pytest.mark.parametrize('net', NETS)
def test_numbers(cell, net):
    model = randomize(NETS[net](cell)).eval()
    _, prepare = preprocessing(model)
    x = prepare(CAT).unsqueeze(0)
    if net == 'bottleneck':
        model.pretrained_cfg.update(input_size=(3, 64, 64), test_input_size=None)
        x = preprocessing(model)[1](CAT).unsqueeze(0)
    with torch.no_grad():
        expected, probability = by_hand(model, x), model(x).softmax(-1)[0]
    seen = visualize(model, CAT)
    assert [p for _, p in seen.probabilities] == pytest.approx(probability.tolist(), abs=1e-5)
    assert [block.name for block in seen.blocks] == [name for name, *_ in expected]
    for block, (_, hidden, gates, share) in zip(seen.blocks, expected):
        assert np.allclose(block.hidden, hidden, atol=1e-4) and block.hidden.std() > 0
        assert ''.join(block.gates) == GATES[cell] and block.gates == pytest.approx(gates, abs=1e-5)
        assert block.share == pytest.approx(share, abs=0.01) and 0 < share < 100
    assert not any(module._forward_hooks for module in model.modules())


def test_a_warm_start_takes_nothing_from_the_state():
    model = timm.create_model('regnet_convlstm_20', layers=(1, 1, 1)).eval()
    with torch.no_grad():
        for name in model.stage_names[:3]:
            model.get_submodule(name)[0].conv_fuse.weight[:, -model.get_submodule(name)[0].state_width :] = 0
    assert [block.share for block in visualize(model, CAT).blocks] == [0, 0, 0]


def test_page_and_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, 'visualize', CAT) == (0, 'chelsea.html\n', '')
    page = Path('chelsea.html').read_text(encoding='utf-8')
    assert len(re.findall('<img ', page)) == 1 + 9 and page.count('class="bar share"') == 9
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|<script', page)  # needs nothing else
    assert 'width=device-width' in page and ' %</b> cat</li>' in page
    assert call(capsys, 'visualize', CAT, '--output', 'a.png')[0] == 0
    assert np.asarray(Image.open('a.png').convert('RGB')).std() > 10
    assert sorted(path.name for path in Path().iterdir()) == ['a.png', 'chelsea.html']


def test_names_of_classes_are_text_not_html(tmp_path):
    model = timm.create_model('regnet_convgru_20', layers=(1, 1, 1), num_classes=2).eval()
    model.pretrained_cfg['label_names'] = ['<b>', '&amp;']
    document = visualize(model, CAT).document()
    assert '&lt;b&gt;' in document and '&amp;amp;' in document


@pytest.mark.parametrize('name', ['regnet_convrnn_110', 'regnet_convlstm_152'])
def test_deep_nets_fit_a_figure(name, tmp_path):
    model = timm.create_model(name).eval()
    model.pretrained_cfg.update(input_size=(3, 32, 32), test_input_size=None)
    seen = visualize(model, CAT)
    assert len(seen.blocks) == {'110': 54, '152': 50}[name.split('_')[-1]]
    width, height = seen.figure().get_size_inches()
    assert width <= 16 and height <= 20


def test_refuses(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model('cifar_resnet_20').state_dict(), 'plain.safetensors')
    Path('text.jpg').write_text('no image')
    plain = ('--model', 'cifar_resnet_20', '--checkpoint', 'plain.safetensors')
    before = sorted(Path().iterdir())
    assert "'cifar_resnet_20' has no regulator" in refused(capsys, 'visualize', CAT, *plain)
    assert "no file 'none.jpg'" in refused(capsys, 'visualize', 'none.jpg')
    assert 'must end in .html or .png' in refused(capsys, 'visualize', CAT, '--output', 'a.gif')
    assert "no folder 'none'" in refused(capsys, 'visualize', CAT, '--output', 'none/a.png')
    assert 'not an image' in refused(capsys, 'visualize', 'text.jpg')
    assert sorted(Path().iterdir()) == before
