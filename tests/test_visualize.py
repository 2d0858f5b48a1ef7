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
from test_inference import run_folder

from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.errors import UsageError
from timm_regnet_rnn.inference import create, preprocessing
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


def gate(cell, k, x, h):
    """Gate k in the paper's two steps, PW over the interleaved channels and DW, or folded where the cell is."""
    both = torch.stack([x, torch.zeros_like(x) if h is None else h], 2).flatten(1, 2)
    if not hasattr(cell, 'pw'):
        weight = cell.weight.unflatten(0, (len(cell.gates), -1))[k]
        return F.conv2d(both, weight, cell.bias[k], padding=1, groups=cell.width)
    both = F.conv2d(both, cell.pw[k][..., None, None], groups=cell.width)
    return F.conv2d(both, cell.dw[k][:, None], cell.bias[k], padding=1, groups=cell.width)


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
                letter: torch.sigmoid(gate(cell, k, read, h)).mean().item()
                for k, letter in enumerate(cell.gates)
                if letter in 'ifozr'
            }
            raw, c = cell.step(read, h, c, weight, bias)
            hidden = torch.relu(block.bn_h(raw))
            conv, width, share = block.conv_fuse.weight[:, :, 0, 0], main.shape[1], []
            for channel in conv:
                from_x = torch.einsum('c,chw->hw', channel[:width], main[0]).pow(2).sum().sqrt()
                from_h = torch.einsum('c,chw->hw', channel[width:], hidden[0]).pow(2).sum().sqrt()
                share.append(100 * from_h / (from_x + from_h))
            rows.append((f'{name}.{i}', hidden[0].mean(0), gates, torch.stack(share).mean().item()))
            main, h = block.fuse_state(main, raw)
            x = block.leave(x, main)
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


@pytest.mark.parametrize('cell', CELLS)
def test_folded_for_deployment_a_net_shows_the_same(cell):
    model = randomize(timm.create_model(f'seregnet_{cell}_20', layers=(2, 1, 1))).eval()
    one, other = visualize(model, CAT), visualize(timm.utils.reparameterize_model(model), CAT)
    for a, b in zip(one.blocks, other.blocks, strict=True):
        assert np.allclose(a.hidden, b.hidden, atol=1e-4) and a.gates == pytest.approx(b.gates, abs=1e-5)
        assert a.share == pytest.approx(b.share, abs=0.01)


def test_a_model_is_left_as_it_was():
    """Looked at in eval mode, also while it is being trained; weights, statistics, modes and hooks stay."""
    model = randomize(timm.create_model('regnet_convlstm_20', layers=(1, 1, 1), drop_rate=0.5))
    expected = visualize(model.eval(), CAT).probabilities
    model.train()
    model.layer2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert visualize(model, CAT).probabilities == expected
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_a_channel_that_nothing_reaches_counts_for_nothing():
    model = randomize(timm.create_model('regnet_convgru_20', layers=(1, 1, 1))).eval()
    with torch.no_grad():
        conv = model.layer1[0].conv_fuse.weight
        conv[3:] = 0
        conv[0, :16], conv[1, 16:] = 0, 0  # the first from h alone, the second from x alone
        conv[2] = 0
        model.layer2[0].conv_fuse.weight.zero_()
    shares = [block.share for block in visualize(model, CAT).blocks]
    assert shares[:2] == [50, 0] and 0 < shares[2] < 100


def test_a_warm_start_takes_nothing_from_the_state():
    model = timm.create_model('regnet_convlstm_20', layers=(1, 1, 1)).eval()
    with torch.no_grad():
        for name in model.stage_names[:3]:
            model.get_submodule(name)[0].conv_fuse.weight[:, -model.get_submodule(name)[0].state_width :] = 0
    assert [block.share for block in visualize(model, CAT).blocks] == [0, 0, 0]


ODD = {
    'grey': dict(in_chans=1),
    'one class': dict(num_classes=1),
    'smooth': dict(act_layer='gelu'),
    'no norm in the carried state, one stage': dict(carry='raw', regulated_stages=(2,)),
    'no regulator': dict(regulator='none'),
    'no memory': dict(regulator='fuse'),
}


@pytest.mark.parametrize('kwargs', ODD.values(), ids=ODD)
def test_odd_models(kwargs):
    model = timm.create_model('regnet_convlstm_20', layers=(1, 2, 1), **kwargs).eval()
    seen = visualize(model, CAT)
    blocks = 0 if 'regulator' in kwargs else 2 if 'regulated_stages' in kwargs else 4
    assert len(seen.blocks) == blocks and len(seen.probabilities) == kwargs.get('num_classes', 10)
    assert seen.image.shape == (32, 32, 3) and seen.model == 'regnet_convlstm_20'  # random weights have no tag
    assert len(seen.figure().axes) >= 3 and seen.document().count('<figure') == 1 + blocks


@pytest.mark.slow
def test_other_numbers_and_what_compile_made():
    model = timm.create_model('regnet_convlstm_20', pretrained=True).eval()
    expected = visualize(model, CAT)
    compiled = visualize(torch.compile(model), CAT)
    assert [block.share for block in compiled.blocks] == [block.share for block in expected.blocks]
    for dtype, tolerance in ((torch.bfloat16, 1.5), (torch.float16, 0.3)):
        for a, b in zip(visualize(model.to(dtype), CAT).blocks, expected.blocks, strict=True):
            assert a.share == pytest.approx(b.share, abs=tolerance) and a.gates == pytest.approx(b.gates, abs=0.01)


def test_what_is_no_classifier_or_broken():
    for model in (
        timm.create_model('regnet_convlstm_20', features_only=True),
        timm.create_model('regnet_convlstm_20', num_classes=0),
        torch.nn.Conv2d(3, 3, 3),
    ):
        with pytest.raises(UsageError, match=f'must be a classifier of timm .* got a {type(model).__name__}'):
            visualize(model, CAT)
    with pytest.raises(UsageError, match='takes 4 channels'):
        visualize(timm.create_model('regnet_convlstm_20', in_chans=4), CAT)
    model = timm.create_model('regnet_convlstm_20', layers=(1, 1, 1))
    torch.nn.init.constant_(model.layer2[0].bn_h.weight, float('nan'))
    with pytest.raises(UsageError, match='computes no probabilities: its weights hold NaN'):
        visualize(model, CAT)


def test_a_run_somebody_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / 'RUN')
    assert call(capsys, 'visualize', CAT, '--model', 'RUN')[0] == 0
    page = Path('chelsea.html').read_text(encoding='utf-8')
    names = re.findall(r'<figcaption>(layer.*?)</figcaption>', page)
    assert names == ['layer1.0', 'layer3.0'] and 'input, 40×40' in page and ' %</b> oak leaf</li>' in page
    assert re.findall(r'<i>(\w)</i><b', page) == ['z', 'r', 'h'] * 2
    seen = [visualize(create('RUN', ema=ema), CAT) for ema in (True, False)]
    assert f'{seen[0].blocks[0].share:.0f}%</span>' in page and seen[0].probabilities != seen[1].probabilities


def test_page_and_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, 'visualize', CAT) == (0, 'chelsea.html\n', '')
    page = Path('chelsea.html').read_text(encoding='utf-8')
    assert len(re.findall('<img ', page)) == 1 + 9 and page.count('class="bar share"') == 9
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|<script', page)  # needs nothing else
    assert 'width=device-width' in page and ' %</b> cat</li>' in page
    assert '<h1>regnet<wbr>_convlstm<wbr>_20<wbr>.cifar10<wbr>_jpeg75</h1>' in page
    assert call(capsys, 'visualize', CAT, '--output', 'a.PNG')[0] == 0
    assert np.asarray(Image.open('a.PNG').convert('RGB')).std() > 10
    assert sorted(path.name for path in Path().iterdir()) == ['a.PNG', 'chelsea.html']


def test_names_of_classes_are_text_not_html(tmp_path):
    model = timm.create_model('regnet_convgru_20', layers=(1, 1, 1), num_classes=2).eval()
    model.pretrained_cfg['label_names'] = ['<b>', '&amp;']
    document = visualize(model, CAT).document()
    assert '&lt;b&gt;' in document and '&amp;amp;' in document


@pytest.mark.slow
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
    Image.open(CAT).save('cat.png')
    before = sorted(Path().iterdir())
    assert "'cifar_resnet_20' has no regulator" in refused(capsys, 'visualize', CAT, *plain)
    assert 'would replace the image' in refused(capsys, 'visualize', 'cat.png', '--output', './cat.png')
    assert "no file 'none.jpg'" in refused(capsys, 'visualize', 'none.jpg')
    assert 'must end in .html or .png' in refused(capsys, 'visualize', CAT, '--output', 'a.gif')
    assert "no folder 'none'" in refused(capsys, 'visualize', CAT, '--output', 'none/a.png')
    assert 'not an image' in refused(capsys, 'visualize', 'text.jpg')
    assert sorted(Path().iterdir()) == before
