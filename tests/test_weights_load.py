"""The one place where weights files are opened: what is read, and what is refused in a line."""

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from spread_nets import PadShortcut
from test_cli import CAT, refused

from timm_regnet_rnn import from_resnet
from timm_regnet_rnn.errors import UsageError
from timm_regnet_rnn.weights.load import check_file, read_tensors, read_weights


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


# by the functions themselves

STATE = {'fc.weight': torch.arange(6.0).view(2, 3), 'fc.bias': torch.tensor([1.0, 2.0]), 'fc.seen': torch.tensor(3)}


def same(found, expected=STATE):
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: state,
        lambda state: OrderedDict(state),
        *(
            lambda state, name=name: {name: state, 'epoch': 3}
            for name in ('state_dict', 'model', 'net', 'model_state_dict')
        ),
        lambda state: dict(state_dict=dict(model=state), best_prec1=91.0),
        lambda state: dict(state_dict=state, args=Namespace(lr=0.1, model='resnet18')),
    ],
)
@pytest.mark.parametrize('whole', [True, False], ids=['zip', 'of before 1.6'])
def test_weights_out_of_what_holds_them(tmp_path, wrap, whole):
    file = tmp_path / 'net.th'
    torch.save(wrap(STATE), file, _use_new_zipfile_serialization=whole)
    for path in (file, str(file)):
        found = read_weights(path)
        assert type(found) is dict and same(found)


def test_weights_of_safetensors(tmp_path):
    save_file(STATE, tmp_path / 'net.safetensors', dict(model='x'))
    assert same(read_weights(tmp_path / 'net.safetensors'))
    tensors, info = read_tensors(tmp_path / 'net.safetensors', None)
    assert same(tensors) and info == dict(model='x')
    save_file(STATE, tmp_path / 'bare.safetensors')
    assert read_tensors(tmp_path / 'bare.safetensors', False)[1] == {}
    with pytest.raises(UsageError, match='--ema is for checkpoints of train.py'):
        read_tensors(tmp_path / 'bare.safetensors', True)


@pytest.mark.parametrize(
    'content', [{}, [], 3, None, 'weights', torch.ones(2), {'a': 1}, {'state_dict': {}}, {'model': {'a': 'b'}}, [STATE]]
)
def test_checkpoints_without_weights(tmp_path, content):
    torch.save(content, tmp_path / 'net.pth')
    with pytest.raises(ValueError, match='holds no state dict: names with tensors.') as caught:
        read_weights(tmp_path / 'net.pth')
    assert str(tmp_path / 'net.pth') in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(['net.pth', 'net.safetensors']))
def test_bytes_that_are_no_weights(tmp_path_factory, content, name):
    file = tmp_path_factory.mktemp('weights') / name
    file.write_bytes(content)
    for read in (read_weights, check_file, lambda path: read_tensors(path, None)):
        with pytest.raises(ValueError) as caught:
            read(file)
        assert len(str(caught.value).splitlines()) == 1 and str(file) in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.sampled_from(['net.pth', 'old.pth', 'net.safetensors']))
def test_files_that_were_cut(tmp_path_factory, share, name):
    file = tmp_path_factory.mktemp('weights') / name
    if name.endswith('pth'):
        torch.save(STATE, file, _use_new_zipfile_serialization=name == 'net.pth')
    else:
        save_file(STATE, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    for read in (read_weights, check_file):
        with pytest.raises(ValueError) as caught:
            read(file)
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('sums', [True, False])
def test_sums_are_held_against_what_is_read_where_there_are_any(tmp_path, sums):
    state, file = dict(state_dict=dict(weight=torch.arange(1000.0))), tmp_path / 'net.pth'
    torch.serialization.set_crc32_options(sums)
    try:
        torch.save(state, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_weights(file)['weight'], state['state_dict']['weight'])
    data = file.read_bytes()
    flipped = data.replace(torch.tensor(500.0).numpy().tobytes(), torch.tensor(500.5).numpy().tobytes())
    assert flipped != data
    file.write_bytes(flipped)
    if sums:
        with pytest.raises(ValueError, match='or broken; it is not loaded'):
            read_weights(file)
    else:  # nobody can know
        assert read_weights(file)['weight'][500] == 500.5


def test_files_that_are_not_there(tmp_path):
    for name in ('net.pth', 'net.safetensors', ''):  # the last is the folder
        for read in (read_weights, check_file, lambda path: read_tensors(path, None)):
            with pytest.raises(FileNotFoundError, match='no weights file'):
                read(tmp_path / name)


class Odd:
    """A class that no checkpoint of weights has."""


def test_objects_are_not_made(tmp_path):
    torch.save(dict(state_dict=STATE, more=Odd()), tmp_path / 'net.pth')
    for read in (read_weights, check_file, lambda path: read_tensors(path, None)):
        with pytest.raises(ValueError, match='Python objects besides weights'):
            read(tmp_path / 'net.pth')


AVERAGED = {name: value + 1 for name, value in STATE.items()}


@pytest.mark.parametrize(
    'content, ema, expected',
    [
        (dict(state_dict=STATE, state_dict_ema=AVERAGED), None, AVERAGED),
        (dict(state_dict=STATE, state_dict_ema=AVERAGED), True, AVERAGED),
        (dict(state_dict=STATE, state_dict_ema=AVERAGED), False, STATE),
        (dict(state_dict=STATE), None, STATE),
        (dict(state_dict={f'module.{name}': value for name, value in STATE.items()}), False, STATE),
        (STATE, None, STATE),
    ],
)
def test_averaged_or_not(tmp_path, content, ema, expected):
    torch.save(content, tmp_path / 'last.pth.tar')
    found, info = read_tensors(tmp_path / 'last.pth.tar', ema)
    assert same(found, expected) and info.keys() == ({} if content is STATE else content).keys()


@pytest.mark.parametrize(
    'content, ema, words',
    [
        (
            dict(state_dict=STATE),
            True,
            "has no 'state_dict_ema'; expected a checkpoint of timm's train.py --model-ema.",
        ),
        (dict(model=STATE), None, "has no 'state_dict'; expected a checkpoint of timm's train.py."),
        (dict(state_dict=[1]), False, "has no 'state_dict'"),
        (STATE, True, "has no 'state_dict_ema'"),
        ([STATE], None, "has no 'state_dict'"),
        ({}, None, "has no 'state_dict'"),
    ],
)
def test_checkpoints_of_other_programs(tmp_path, content, ema, words):
    torch.save(content, tmp_path / 'last.pth.tar')
    with pytest.raises(UsageError) as caught:
        read_tensors(tmp_path / 'last.pth.tar', ema)
    assert words in str(caught.value)


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
@pytest.mark.parametrize('dtype', [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_torch_would_change_without_an_error_are_refused(tmp_path, dtype, suffix):
    """load_state_dict casts whatever it is given, and drops an imaginary part with a warning at most."""
    file, state = tmp_path / f'net{suffix}', {'fc.weight': torch.ones(2, 3).to(dtype), 'fc.bias': torch.ones(2)}
    try:
        save_file(state, file) if suffix == '.safetensors' else torch.save({'state_dict': state}, file)
    except KeyError:
        pytest.skip(f'this safetensors has no {dtype}')
    for read in (check_file, read_weights, lambda path: read_tensors(path, None)):
        with pytest.raises(ValueError, match=rf"'fc.weight' is {dtype}, not of floats") as caught:
            read(file)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_length_are_taken(tmp_path, dtype):
    state = {'fc.weight': torch.ones(2, 3, dtype=dtype), 'bn.num_batches_tracked': torch.tensor(7)}
    save_file(state, tmp_path / 'net.safetensors')
    torch.save(state, tmp_path / 'net.pth')
    for file in ('net.safetensors', 'net.pth'):
        assert same(read_weights(tmp_path / file), state)
