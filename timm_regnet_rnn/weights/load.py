"""The one place where weights files are opened: safetensors, and PyTorch's checkpoints without unrestricted pickle."""

from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Dict, Iterator, Optional, Tuple, Union
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict

from ..errors import UsageError

__all__ = ['check_file', 'check_sums', 'load_checkpoint', 'read_tensors', 'read_weights']

WRAPPERS = ('state_dict', 'model', 'net', 'model_state_dict')  # what a training loop's checkpoint calls its weights


FLOATS = ('weight', 'bias', 'running_mean', 'running_var')  # what is never a whole number, and never complex


def _types(state: Any) -> Iterator[Tuple[str, torch.dtype]]:
    """Name and type of all tensors in dicts of dicts."""
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, torch.Tensor):
            yield str(name), value.dtype
        else:
            yield from _types(value)


def _check_types(file: Union[str, Path], types: Iterator[Tuple[str, torch.dtype]]) -> None:
    """Raise ValueError for weights that torch would cast, and change, without an error."""
    for name, dtype in types:
        if dtype.is_complex or (name.rpartition('.')[2] in FLOATS and not dtype.is_floating_point):
            raise ValueError(f'{str(file)!r} is broken ({name[:80]!r} is {dtype}, not of floats); it is not loaded.')


def check_sums(file: Union[str, Path]) -> None:
    """Compare a checkpoint's parts with the sums (CRC-32) that it has of them; torch reads them unseen.

    A file from `torch.serialization.set_crc32_options(False)` has none, which is zero for every part.

    Raises:
        ValueError: One differs.
    """
    if is_zipfile(file):  # of before PyTorch 1.6 it is none, and has no sums
        try:
            with ZipFile(file) as parts:
                broken = parts.testzip() if any(part.CRC for part in parts.infolist()) else None
        except Exception as e:  # a damaged directory fails in many ways
            broken = type(e).__name__
        if broken:
            raise ValueError(f'{str(file)!r} is broken ({broken[:80]} is not what its sum says); it is not loaded.')


def load_checkpoint(file: Union[str, Path], mmap: bool = False) -> Any:
    """What a PyTorch checkpoint holds, on the CPU; besides tensors and plain values, train.py's arguments.

    Args:
        file: The checkpoint.
        mmap: Leave the tensors on the disk, and their sums unchecked.

    Raises:
        Exception: Whatever torch raises for a file that is broken or holds other Python objects.
    """
    if not mmap:
        check_sums(file)
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(file, map_location='cpu', weights_only=True, mmap=mmap)


def check_file(path: Union[str, Path]) -> None:
    """Refuse a weights file that is missing, not whole, or holds more than weights, before a model is built for it.

    timm up to 1.0.20 unpickles such a file without restriction; one that passes here holds nothing that could run.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is broken, no checkpoint, or holds Python objects, or weights that are no floats; in one line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'no weights file {str(path)!r}.')
    if str(path).endswith('.safetensors'):
        try:
            with safe_open(path, framework='pt') as f:
                names = [name for name in f.keys() if f.get_slice(name).get_shape()]  # noqa: SIM118  no dict
                types = [(name, f.get_slice(name)[:0].dtype) for name in names]  # no element, so nothing is read
        except SafetensorError as e:
            raise ValueError(f'{str(path)!r} is truncated or not a safetensors file ({e}); fetch it again.') from None
        return _check_types(path, iter(types))
    if not is_zipfile(path):
        raise ValueError(f'{str(path)!r} is neither a .safetensors file nor a PyTorch checkpoint, or it is truncated.')
    try:
        state = load_checkpoint(path, mmap=True)
    except (UnpicklingError, RuntimeError):
        raise ValueError(
            f'{str(path)!r} is broken or holds Python objects besides weights; it is not loaded.'
        ) from None
    _check_types(path, _types(state))


def read_weights(path: Union[str, Path]) -> Dict[str, torch.Tensor]:
    """The names and tensors of a weights file, out of whatever a training loop wrapped them in.

    Args:
        path: A .safetensors file, or a checkpoint of PyTorch's, of before its version 1.6 too.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is broken, no checkpoint, holds Python objects, or no tensors; in one line.
    """
    if str(path).endswith('.safetensors'):
        check_file(path)
        return load_file(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f'no weights file {str(path)!r}.')
    try:
        state = load_checkpoint(path)
    except Exception as e:  # a stream of bytes that is no checkpoint fails in many ways
        why = (
            'holds Python objects besides weights' if 'Unsupported' in str(e) else 'is no PyTorch checkpoint, or broken'
        )
        raise ValueError(f'{str(path)!r} {why}; it is not loaded.') from None
    for name in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f'{str(path)!r} holds no state dict: names with tensors.')
    _check_types(path, _types(state))
    return dict(state)


def read_tensors(file: Path, ema: Optional[bool]) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """The weights in a checkpoint of train.py or in a safetensors file, and what stands beside them.

    Args:
        file: The file.
        ema: Take the averaged weights, or the others; None for the averaged where there are both, and for a file of
            nothing but weights too.

    Raises:
        UsageError: There are no such weights in it.
        OSError, ValueError: The file is missing, broken, or holds more than weights.
    """
    check_file(file)
    if file.suffix == '.safetensors':
        if ema:
            raise UsageError(f'--ema is for checkpoints of train.py; {str(file)!r} holds one set of weights.')
        with safe_open(file, framework='pt') as f:
            return load_file(file), f.metadata() or {}
    state = load_checkpoint(file)
    if ema is None and isinstance(state, dict):
        if state and all(isinstance(value, torch.Tensor) for value in state.values()):
            return clean_state_dict(state), {}
        ema = 'state_dict_ema' in state
    key = 'state_dict_ema' if ema else 'state_dict'
    if not isinstance(state, dict) or not isinstance(state.get(key), dict):
        raise UsageError(
            f"{str(file)!r} has no {key!r}; expected a checkpoint of timm's train.py{' --model-ema' * bool(ema)}."
        )
    return clean_state_dict(state[key]), state
