"""The manifest of what was released, and the files inside the package."""

import hashlib
import os
import subprocess
import sys

import pytest
import timm
from safetensors import safe_open
from safetensors.torch import load_file
from test_weights_verify import EMBEDDED

from timm_regnet_rnn.names import parse_name
from timm_regnet_rnn.weights import manifest
from timm_regnet_rnn.weights.manifest import RELEASED, embedded_file


def test_every_file_has_its_entry():
    assert {p.stem for p in embedded_file(next(iter(EMBEDDED))).parent.glob('*.safetensors')} == set(EMBEDDED)


@pytest.mark.parametrize('name', EMBEDDED)
def test_the_file_is_the_one_that_was_measured(name):
    entry, file = RELEASED[name], embedded_file(name)
    assert file.stat().st_size == entry['size'] < 5_000_000
    assert hashlib.sha256(file.read_bytes()).hexdigest() == entry['sha256']
    with safe_open(file, framework='pt') as f:
        assert f.metadata()['model'] == name
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_the_organisation_is_one_setting():
    code = f'import timm, timm_regnet_rnn; print(timm.get_pretrained_cfg("{next(iter(RELEASED))}").hf_hub_id)'
    env = dict(os.environ, TIMM_REGNET_RNN_HUB_ORG='lab')
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == f'lab/{next(iter(RELEASED))}', done.stderr


def test_where_a_release_lies(monkeypatch):
    entry = dict(repo_id='{org}/net', revision=None)
    monkeypatch.setattr(manifest, 'RELEASED', dict(net=entry, other=dict(repo_id='me/other', revision='abc')))
    monkeypatch.setattr(manifest, 'ORGANISATION', 'lab')
    assert manifest.hub_id('net') == 'lab/net' and manifest.hub_id('other') == 'me/other@abc'
    with pytest.raises(KeyError):
        manifest.hub_id('nosuch')
    for wanted, name in (
        ('lab/net', 'net'),
        ('me/other@abc', 'other'),
        ('me/other', None),
        ('me/other@abd', None),
        ('timm-regnet-rnn/net', None),
        ('{org}/net', None),
        ('', None),
    ):
        assert manifest.known_weights(wanted) == name


@pytest.mark.parametrize('name', RELEASED)
def test_every_release_is_known_by_its_place(name):
    assert manifest.known_weights(manifest.hub_id(name)) == name
    assert timm.is_model(parse_name(name).resnet) and timm.is_model(name.split('.')[0])


def test_a_release_without_a_file_here():
    for name in ('nosuch', '', '../weights/nosuch', 'regnet_convlstm_20'):
        assert embedded_file(name) is None
