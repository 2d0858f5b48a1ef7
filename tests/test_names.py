"""A model's name is read as it was made."""

import contextlib

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.names import CIFAR_DEPTHS, IMAGENET_DEPTHS, Name, parse_name

DEPTHS = (*CIFAR_DEPTHS, *IMAGENET_DEPTHS)
RESNETS = [*(f'cifar_{se}resnet_{d}' for se in ('', 'se') for d in CIFAR_DEPTHS)]
RESNETS += [f'{se}resnet{d}' for se in ('', 'se') for d in IMAGENET_DEPTHS]


@pytest.mark.parametrize(
    'name, parts',
    [
        ('regnet_convlstm_20', (False, 'convlstm', 20, '')),
        ('seregnet_convgru_152', (True, 'convgru', 152, '')),
        ('regnet_convrnn_18.resnet18_a1_in1k', (False, 'convrnn', 18, 'resnet18_a1_in1k')),
        ('regnet_convlstm_20.a.b', (False, 'convlstm', 20, 'a.b')),
        ('cifar_resnet_110', (False, '', 110, '')),
        ('cifar_seresnet_20.tiny100_32', (True, '', 20, 'tiny100_32')),
        ('resnet50', (False, '', 50, '')),
        ('seresnet50.a1_in1k', (True, '', 50, 'a1_in1k')),
    ],
)
def test_parts(name, parts):
    assert parse_name(name) == parts


@given(
    se=st.booleans(),
    cell=st.sampled_from(['convrnn', 'convgru', 'convlstm']),
    depth=st.sampled_from(DEPTHS),
    tag=st.from_regex(r'([a-z0-9_.-]{1,20})?', fullmatch=True),
)
def test_a_name_that_is_made_is_read(se, cell, depth, tag):
    name = f'{"se" * se}regnet_{cell}_{depth}{"." * bool(tag)}{tag}'
    assert parse_name(name) == Name(se, cell, depth, tag)


@pytest.mark.parametrize('name', timm.list_models(module='regnet_rnn', include_tags=True))
def test_every_registered_name(name):
    """All are read, each otherwise, and each model is built of what its name says."""
    parts = parse_name(name)
    prefix = 'se' * parts.se
    made = f'{prefix}regnet_{parts.cell}_{parts.depth}' if parts.cell else parts.resnet
    assert f'{made}{"." * bool(parts.tag)}{parts.tag}' == name
    assert parts.depth in DEPTHS and parts.cell in ('', *CELLS)
    assert timm.is_model(parts.resnet) or (parts.se and parts.depth in (18, 34, 101, 152))
    cifar = timm.get_pretrained_cfg(name).input_size[-1] <= 32
    assert cifar == (parts.depth in CIFAR_DEPTHS)


@pytest.mark.parametrize('name', RESNETS)
def test_a_resnet_is_its_own(name):
    assert parse_name(name).resnet == name and parse_name(name).cell == ''


@pytest.mark.parametrize(
    'name',
    [
        *('', '.', '20', 'regnet', 'regnet_20', 'regnet_convlstm', 'regnet_convlstm_', 'regnet_convlstm_-20'),
        *('regnet_lstm_20', 'regnet_convLSTM_20', 'Regnet_convlstm_20', 'seseregnet_convlstm_20', 'sresnet20'),
        *('regnet_convlstm_20.', 'regnet_convlstm_20 ', ' regnet_convlstm_20', 'regnet_convlstm_20\n', 'xresnet50'),
        *('regnet_convlstm_20x', 'cifar_regnet_convlstm_20', 'resnet50d', 'resnext50_32x4d'),
        *('regnet_convfoo_20', 'regnet_convlstm_21', 'resnet_20', 'cifar_resnet50', 'cifar_resnet_50', 'resnet٥٠'),
        *('regnetx_002', 'regnety_032', 'secifar_resnet_20', 'hf-hub:org/regnet_convlstm_20', 'wide_resnet50_2'),
    ],
)
def test_near_misses(name):
    with pytest.raises(ValueError, match='is no name such as') as caught:
        parse_name(name)
    assert repr(name) in str(caught.value) and '\n' not in str(caught.value)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(ValueError):
        parts = parse_name(text)
        assert text.endswith(parts.tag) and isinstance(parts.depth, int)
