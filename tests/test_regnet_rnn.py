import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomize
from timm.models import generate_default_cfgs, group_parameters
from timm.optim import create_optimizer_v2

import timm_regnet_rnn
from timm_regnet_rnn import regnet_rnn
from timm_regnet_rnn.complexity import complexity
from timm_regnet_rnn.datasets import DATASETS
from timm_regnet_rnn.regulated_resnet import RegulatedResNet, RegulatedStage
from timm_regnet_rnn.weights.manifest import RELEASED

NAMES = timm.list_models(module='regnet_rnn')
GOLDEN = json.loads((Path(timm_regnet_rnn.__file__).parent / 'model_complexity.json').read_text())
WARM = [*(('', d) for d in (18, 34, 50, 101, 152)), ('se', 50)]


def test_the_names():
    cells, cifar, imagenet = ('convrnn', 'convgru', 'convlstm'), (20, 32, 44, 56, 110), (18, 34, 50, 101, 152)
    expected = {f'{se}regnet_{c}_{d}' for se in ('', 'se') for c in cells for d in cifar + imagenet}
    expected |= {f'cifar_{se}resnet_{d}' for se in ('', 'se') for d in cifar}
    assert set(NAMES) == expected and len(NAMES) == 70


# the exact counts of the design, typed here and nowhere generated
@pytest.mark.parametrize(
    'name, params',
    [
        ('cifar_resnet_20', 272_474),
        ('regnet_convrnn_20', 307_418),
        ('regnet_convgru_20', 310_106),
        ('regnet_convlstm_20', 311_450),
        ('regnet_convlstm_50', 28_133_160),
    ],
)
def test_parameters_of_the_design(name, params):
    assert GOLDEN[name]['params'] == params
    assert sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) == params


@pytest.mark.parametrize('name', NAMES)
def test_entrypoint(name):
    model = timm.create_model(name, device='meta').eval()
    cifar = model.pretrained_cfg['input_size'] == (3, 32, 32)
    depth = int(name.rsplit('_', 1)[1])
    per_block = 3 if model.layer1[0].expansion == 4 else 2
    stages = [getattr(model, n) for n in model.stage_names]
    assert type(model) is RegulatedResNet
    assert per_block * sum(map(len, stages)) + 2 == depth  # layers as papers count them: no shortcut, no regulator
    assert len(stages) == (3 if cifar else 4)
    assert all(isinstance(stage, RegulatedStage) == ('regnet' in name) for stage in stages)
    assert all((block.se is not None) == ('seres' in name or 'sereg' in name) for stage in stages for block in stage)
    kinds = {type(stage.regulator).__name__.lower() for stage in stages if isinstance(stage, RegulatedStage)}
    assert kinds == ({name.split('_')[1]} if 'regnet' in name else set())
    assert model.num_classes == (10 if cifar else 1000)
    out = model.forward_features(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    assert out.shape[1:] == (model.num_features, *model.pretrained_cfg['pool_size'])
    assert complexity(model) == GOLDEN[name]


@pytest.mark.parametrize('se', ['', 'se'])
@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_a_resnet_has_the_same_names_and_shapes(se, depth):
    with torch.device('meta'):
        theirs = timm.create_model(f'{se}resnet{depth}').state_dict()
    ours = timm.create_model(f'{se}regnet_convgru_{depth}', device='meta').state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: ours[k].shape for k in theirs}
    added = ('.regulator.', '.bn_h.', '.conv_fuse.', '.bn_fuse.')
    assert all(any(word in k for word in added) for k in ours.keys() - theirs.keys())
    plain = timm.create_model(f'{se}regnet_convgru_{depth}', regulator='none', device='meta').state_dict()
    assert plain.keys() == theirs.keys()


@pytest.mark.parametrize('name', ['regnet_convlstm_20', 'seregnet_convgru_18', 'cifar_resnet_20'])
@pytest.mark.parametrize('cls', ['list', 'dict', 'getter', 'hook'])
def test_features_only(name, cls):
    model = timm.create_model(name, features_only=True, feature_cls=cls).eval()
    out = model(torch.randn(1, 3, 64, 64))
    out = list(out.values()) if isinstance(out, dict) else out
    assert [o.shape[1] for o in out] == model.feature_info.channels()
    assert [64 // o.shape[2] for o in out] == model.feature_info.reduction()


def test_features_only_values():
    torch.manual_seed(0)
    features = timm.create_model('regnet_convlstm_20', features_only=True, out_indices=(1, -1)).eval()
    torch.manual_seed(0)
    model = timm.create_model('regnet_convlstm_20').eval()
    x = torch.randn(1, 3, 32, 32)
    for a, b in zip(features(x), model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)):
        assert torch.equal(a, b)


def test_fx_feature_extractor():
    from torchvision.models.feature_extraction import create_feature_extractor

    model = randomize(timm.create_model('regnet_convrnn_20')).eval()
    x = torch.randn(1, 3, 32, 32)
    out = create_feature_extractor(model, ['layer2.1.act_h', 'layer3.2.act2'])(x)
    assert out['layer2.1.act_h'].shape == (1, 32, 16, 16)
    torch.testing.assert_close(out['layer3.2.act2'], model.forward_features(x), rtol=1e-4, atol=1e-4)


def test_reset_classifier_and_pooling():
    model = timm.create_model('regnet_convgru_20', num_classes=0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    model.reset_classifier(5, 'catavgmax')
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert model.get_classifier() is model.fc and model.fc.in_features == 128


def test_layer_decay_groups():
    model = timm.create_model('regnet_convlstm_20', device='meta')
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    for stage in (1, 2, 3):
        assert fine[f'layer{stage}.regulator.dw'] == fine[f'layer{stage}.0.conv1.weight']
        assert coarse[f'layer{stage}.regulator.dw'] == coarse[f'layer{stage}.2.conv_fuse.weight'] == stage
    assert fine['conv1.weight'] == 0 and fine['fc.weight'] == max(fine.values()) == 10


def test_no_weight_decay_on_biases_and_norms():
    model = timm.create_model('regnet_convlstm_20')
    groups = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=1e-4).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    undecayed = {names[id(p)] for g in groups if g['weight_decay'] == 0 for p in g['params']}
    decayed = set(names.values()) - undecayed
    assert {'layer1.regulator.bias', 'layer1.0.bn_h.weight', 'fc.bias'} <= undecayed
    assert {'layer1.regulator.pw', 'layer1.regulator.dw', 'layer1.0.conv_fuse.weight'} <= decayed


def test_the_callers_arguments_win():
    model = timm.create_model('regnet_convlstm_20', regulator='convrnn', layers=[1, 1, 1], in_chans=1)
    assert type(model.layer1.regulator).__name__ == 'ConvRNN' and len(model.layer3) == 1
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize('name', ['regnet_convlstm_-20', 'regnet_lstm_20', 'regnet_convlstm_21'])
def test_unknown_names(name):
    with pytest.raises(RuntimeError, match='Unknown model') as caught:
        timm.create_model(name)
    assert '\n' not in str(caught.value)


def test_unknown_tag():
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        timm.create_model('regnet_convlstm_50.nothing', pretrained=True)


@pytest.mark.parametrize('se, depth', WARM)
@pytest.mark.parametrize('cell', ['convrnn', 'convgru', 'convlstm'])
def test_warm_start_tags(se, depth, cell):
    """The tag names its weights, says what they compute, and keeps the data settings they were trained with."""
    source, tag = f'{se}resnet{depth}.a1_in1k', f'{se}resnet{depth}_a1_in1k'
    name = f'{se}regnet_{cell}_{depth}.{tag}'
    assert name in timm.list_pretrained('*regnet_conv*')
    ours, theirs = (dataclasses.asdict(timm.get_pretrained_cfg(n)) for n in (name, source))
    assert ours['hf_hub_id'] == f'timm/{source}'
    assert 'until you fine-tune' in ours['description'] and source in ours['description']
    for key in ('mean', 'std', 'input_size', 'test_input_size', 'crop_pct', 'test_crop_pct', 'interpolation'):
        assert ours[key] == theirs[key], key
    model = timm.create_model(name, device='meta')
    assert model.pretrained_cfg['tag'] == tag


def test_module_name_does_not_collide():
    assert not set(NAMES) & set(timm.list_models(module='regnet'))
    assert set(regnet_rnn.__all__) == set(NAMES)


def test_file_that_is_not_there_or_broken(tmp_path):
    cut = tmp_path / 'cut.safetensors'
    cut.write_bytes(b'\x40\x00\x00\x00\x00\x00\x00\x00{"a":')
    for file, words in ((tmp_path / 'no.safetensors', 'no weights file'), (cut, 'truncated or not a safetensors file')):
        with pytest.raises((FileNotFoundError, ValueError), match=words) as caught:
            timm.create_model('regnet_convlstm_20', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
        assert '\n' not in str(caught.value) and str(file) in str(caught.value)
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            timm.create_model('regnet_convlstm_20', pretrained=True, pretrained_cfg=dict(file=str(file)))


def test_import_is_cheap():
    """Importing starts no thread and no process, and pulls in nothing heavy that `import timm` does not."""
    code = (
        'import sys, threading, timm; before = set(sys.modules); import timm_regnet_rnn;'
        'new = {m.split(".")[0] for m in set(sys.modules) - before};'
        'print(sorted(new), threading.active_count())'
    )
    out = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "['timm_regnet_rnn'] 1"


def test_weights_for_other_images_are_nobodys_default(monkeypatch):
    """Ten classes of clothes in grey are not CIFAR-10, and a hundred classes are not either."""
    known = RELEASED['regnet_convlstm_20.cifar10_jpeg75']
    grey = {**known, 'labels': [f'coat {i}' for i in range(10)], 'data_config': {'mean': [0.286], 'std': [0.353]}}
    released = {'cifar_resnet_56.grey': grey, 'regnet_convgru_56.grey': grey, 'regnet_convgru_56.usual': known}
    monkeypatch.setattr(regnet_rnn, 'RELEASED', {**RELEASED, **released})
    monkeypatch.setattr(regnet_rnn, 'hub_id', lambda name: f'org/{name}')
    defaults = generate_default_cfgs(regnet_rnn._default_cfgs())
    assert [*defaults['cifar_resnet_56'].tags] == ['', 'grey']
    assert [*defaults['regnet_convgru_56'].tags] == ['usual', 'grey']
    for name in (
        'cifar_resnet_20',
        'cifar_resnet_56',
        'regnet_convgru_56',
        'regnet_convlstm_20',
        'seregnet_convrnn_20',
    ):
        cfg = defaults[name].default
        assert cfg.label_names == DATASETS['cifar10'].labels and cfg.num_classes == 10 and len(cfg.mean) == 3
