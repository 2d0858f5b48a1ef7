"""config.json: what is written rebuilds the model, and what a stranger writes is refused before it builds anything."""

import copy
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from conftest import randomize
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weights_pull import environment
from timm.data import resolve_data_config
from timm.models import save_for_hf

from timm_regnet_rnn.cli import main
from timm_regnet_rnn.weights.config import check_config, read_config, write_config

GOOD = dict(
    architecture='regnet_convgru_20',
    num_classes=4,
    num_features=64,
    global_pool='avg',
    label_names=['a', 'b', 'c', 'd'],
    model_args=dict(layers=[1, 1, 1], regulated_stages=[2, 3], block_args=dict(attn_layer='se'), carry='raw'),
    pretrained_cfg=dict(
        **dict(input_size=[3, 24, 24], mean=[0.5, 0.5, 0.5], std=[0.1, 0.2, 0.3], num_classes=4, crop_pct=0.9),
        **dict(interpolation='bicubic', classifier='fc', first_conv='conv1', custom_load=False, pool_size=None),
    ),
)


def changed(path, value):
    """GOOD with another value at a path."""
    config = place = copy.deepcopy(GOOD)
    *parents, last = path.split('/')
    for key in parents:
        place = place[key]
    place[last] = value
    return config


HOSTILE = {
    'unknown architecture': ('architecture', 'regnet_convlstm_21'),
    "timm's own architecture": ('architecture', 'resnet18'),
    'architecture is a path': ('architecture', '../../etc/passwd'),
    'architecture is a list': ('architecture', ['regnet_convgru_20']),
    'architecture is missing': ('architecture', None),
    'negative classes': ('num_classes', -1),
    'a classifier of terabytes': ('num_classes', 10**12),
    'classes as text': ('num_classes', '4'),
    'classes as truth': ('num_classes', True),
    'labels are numbers': ('label_names', [1, 2]),
    'labels are text': ('label_names', 'abcd'),
    'arguments are a list': ('model_args', ['layers']),
    'a million blocks': ('model_args/layers', [10**6, 1, 1]),
    'many blocks': ('model_args/layers', [900, 900, 900]),
    'blocks as text': ('model_args/layers', '123'),
    'negative blocks': ('model_args/layers', [1, -1, 1]),
    'a width of terabytes': ('model_args/channels', [2**40, 64, 64]),
    'a number of a thousand digits': ('model_args/base_width', 10**1000),
    'not a number': ('model_args/drop_rate', float('nan')),
    'a file of this machine': ('model_args/checkpoint_path', '/etc/passwd'),
    'another configuration': ('model_args/pretrained_cfg_overlay', dict(file='/etc/passwd')),
    'an unknown argument': ('model_args/nosuch', 1),
    'a device': ('model_args/device', 'cuda'),
    'code as a layer': ('model_args/norm_layer', '__import__("os")'),
    'an unknown layer': ('model_args/norm_layer', 'nosuch'),
    'deep nesting': ('model_args/block_args', dict(a=dict(b=dict(c=dict(d=1))))),
    'an unknown cell': ('model_args/regulator', 'conv'),
    'the configuration is text': ('pretrained_cfg', 'x'),
    'an unknown field': ('pretrained_cfg/nosuch', 1),
    'weights of this machine': ('pretrained_cfg/file', '/etc/passwd'),
    'weights from elsewhere': ('pretrained_cfg/url', 'http://example.com/x.pth'),
    "the model's own loader": ('pretrained_cfg/custom_load', True),
    'a path out of the repository': ('pretrained_cfg/hf_hub_filename', '../../secret.safetensors'),
    'a pickle': ('pretrained_cfg/hf_hub_filename', 'weights.bin'),
    'images of terabytes': ('pretrained_cfg/input_size', [3, 10**9, 10**9]),
    'two sizes': ('pretrained_cfg/input_size', [3, 32]),
    'no channels': ('pretrained_cfg/input_size', [0, 32, 32]),
    'a mean of text': ('pretrained_cfg/mean', ['0.5', '0.5', '0.5']),
    'division by zero': ('pretrained_cfg/std', [0.0, 1.0, 1.0]),
    'an infinite crop': ('pretrained_cfg/crop_pct', float('inf')),
    'an interpolation as a path': ('pretrained_cfg/interpolation', '../x'),
    'an interpolation nobody knows': ('pretrained_cfg/interpolation', 'cubic'),
    'a crop mode nobody knows': ('pretrained_cfg/crop_mode', 'middle'),
    'a crop of a thousandth': ('pretrained_cfg/crop_pct', 0.001),
    'images of gigabytes': ('pretrained_cfg/input_size', [3, 90000, 90000]),
    'widths of terabytes': ('model_args/channels', [100000, 100000, 100000]),
    'a width in words': ('model_args/channels', ['wide']),
}


def refused(config, tmp_path):
    """The error for a configuration, one line."""
    file = tmp_path / 'config.json'
    file.write_text(json.dumps(config), encoding='utf-8')
    with pytest.raises(ValueError) as e:
        read_config(file, 'it')
    message = str(e.value)
    assert message.startswith('it: ') and '\n' not in message and len(message) < 400
    return message


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_values_are_refused(tmp_path, case):
    key = HOSTILE[case][0].split('/')[-1]
    message = refused(changed(*HOSTILE[case]), tmp_path)
    assert key in message or "model_args do not build a regnet_convgru_20 ('nosuch')" in message


def test_files_that_are_no_configuration(tmp_path):
    file = tmp_path / 'config.json'
    for content in (b'', b'{', b'\xff\xfe', b'[' * 200_000, b'"x"', b'[]', b'null', b' ' * 2**21):
        file.write_bytes(content)
        with pytest.raises(ValueError, match='^it: ') as e:
            read_config(file, 'it')
        assert '\n' not in str(e.value)
    with pytest.raises(OSError, match='no such file'):
        read_config(tmp_path / 'none.json', 'it')


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@given(
    path=st.sampled_from(
        ['architecture', 'num_classes', 'label_names', 'model_args', 'pretrained_cfg']
        + [f'model_args/{key}' for key in ('layers', 'channels', 'regulator', 'stem_type', 'block', 'nosuch')]
        + [f'pretrained_cfg/{key}' for key in GOOD['pretrained_cfg']]
    ),
    value=VALUES,
)
@settings(max_examples=150, deadline=None)
def test_any_value_is_taken_or_refused_in_one_line(path, value, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / 'any.json'
    file.write_text(json.dumps(changed(path, value)), encoding='utf-8')
    try:
        assert read_config(file, 'it') < 2**33
    except ValueError as e:
        assert '\n' not in str(e) and len(str(e)) < 400


def test_the_good_one_is_taken(tmp_path):
    file = tmp_path / 'config.json'
    file.write_text(json.dumps(GOOD), encoding='utf-8')
    net = timm.create_model('regnet_convgru_20', num_classes=4, **GOOD['model_args'])
    assert read_config(file, 'it') == sum(p.numel() * p.element_size() for p in net.parameters())
    check_config(dict(architecture='regnet_convgru_20'), 'it')


def test_timms_own_and_ours_rebuild_the_model(tmp_path):
    """With arguments, channels and image size; what timm writes is taken as well."""
    kwargs = dict(layers=(1, 2, 1), regulated_stages=(1, 3), carry='raw')
    labels = ['α', 'b', 'c', 'd', 'e']
    for name, channels in dict(timm=3, ours=4).items():  # timm up to 1.0.20 writes three, whatever the model has
        net = randomize(timm.create_model('seregnet_convrnn_32', num_classes=5, in_chans=channels, **kwargs)).eval()
        config = dict(resolve_data_config({}, model=net), input_size=(4, 20, 20), mean=(0.5,) * 4, std=(0.25,) * 4)
        folder = tmp_path / name
        save_for_hf(net, folder, model_args=dict(kwargs, num_classes=5, in_chans=channels), safe_serialization=True)
        if name == 'ours':
            write_config(net, folder / 'config.json', kwargs, config, labels, 'mine', 'five classes')
        twin = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        x = torch.randn(2, channels, 20, 20)
        with torch.no_grad():
            torch.testing.assert_close(twin(x), net(x))
    cfg = twin.pretrained_cfg
    assert tuple(cfg['input_size']) == (4, 20, 20) and list(cfg['label_names']) == labels
    assert cfg['tag'] == 'mine' and cfg['description'] == 'five classes' and str(tmp_path) in cfg['file']


def test_a_model_far_larger_than_its_weights(tmp_path):
    net = timm.create_model('regnet_convgru_20', num_classes=4)
    save_for_hf(net, tmp_path, safe_serialization=True)
    file = tmp_path / 'config.json'
    config = json.loads(file.read_text())
    file.write_text(json.dumps(dict(config, model_args=dict(channels=[16, 32, 8192]))))
    with pytest.raises(ValueError, match='its model takes .* MB, its weights have 1 MB'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


@pytest.mark.parametrize('case', ['unknown architecture', 'a width of terabytes', 'weights of this machine'])
def test_every_way_in_is_checked(tmp_path, capsys, case):
    """The command, and through timm by a folder and by the Hub, in one line."""
    net = timm.create_model('regnet_convgru_20', num_classes=4, **GOOD['model_args'])
    save_for_hf(net, tmp_path / 'net', model_args=GOOD['model_args'], safe_serialization=True)
    (tmp_path / 'net' / 'config.json').write_text(json.dumps(changed(*HOSTILE[case])), encoding='utf-8')
    image = os.path.join(os.path.dirname(__file__), '..', 'docs', 'chelsea.jpg')
    assert main(['predict', image, '--model', f'local-dir:{tmp_path / "net"}']) == 2
    assert capsys.readouterr().err.count('\n') == 1
    with pytest.raises((ValueError, RuntimeError)) as e:
        timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=False)
    assert '\n' not in str(e.value)
    with HubServer() as hub:
        hub.add_repo('org/net', {p.name: p.read_bytes() for p in (tmp_path / 'net').iterdir()})
        command = [sys.executable, '-m', 'timm_regnet_rnn', 'pull', 'hf-hub:org/net', '--to', tmp_path / 'lab']
        done = subprocess.run(
            command, env=environment(hub, HF_HOME=str(tmp_path / 'cache')), capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and "config.json of 'org/net'" in done.stderr
        assert hub.count('GET', '/lfs/') == 0 and not list((tmp_path / 'lab').rglob('*.safetensors'))
