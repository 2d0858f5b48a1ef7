"""The fused regulator step and its norm on CPU: fused_cpu.cpp as ops that autograd and torch.compile know.

It computes in float32 and channels_last. Forward saves its inputs only; backward computes the gates again. The first
import compiles the source in a few seconds, once per version of it and kind of CPU, and keeps the library in the user's
cache. Without a C++ compiler there is no fused op, and `UNAVAILABLE` says why.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor, library

from . import LANES

__all__ = ['STEPS', 'UNAVAILABLE', 'batch_norm_relu']

SOURCE = Path(__file__).with_name('fused_cpu.cpp')
FLAGS = ['-std=c++17', '-O3', '-ffp-contract=fast', '-fno-math-errno', '-fopenmp', '-shared', '-fPIC', '-Wno-psabi']
CPU_FLAGS = {
    'AVX512': ['-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mavx2', '-mfma'],
    'AVX2': ['-mavx2', '-mfma'],
}


def cache_dir() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_regnet_rnn'


def build() -> Path:
    """Compile the source unless the cache has it.

    Returns:
        The shared library.

    Raises:
        OSError: There is no compiler, or it failed; in one line.
    """
    compiler = os.environ.get('CXX') or next(filter(shutil.which, ('g++', 'c++', 'clang++')), None)
    if compiler is None:
        raise OSError('no C++ compiler (g++, c++, clang++ or $CXX)')
    command = [*compiler.split(), *FLAGS, *CPU_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])]
    key = hashlib.sha256(repr((command, platform.machine())).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    target = cache_dir() / f'fused_cpu-{key}.so'
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(suffix='.so', dir=target.parent)
    os.close(handle)
    try:
        done = subprocess.run([*command, str(SOURCE), '-o', scratch], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f'{compiler} failed: {(done.stderr.strip().splitlines() or ["no message"])[0]}')
        os.replace(scratch, target)  # whole or not at all, whoever else is compiling
    finally:
        Path(scratch).unlink(missing_ok=True)
    return target


def load() -> Tuple[Optional[ctypes.CDLL], str]:
    """The compiled library, or None and the reason in one line."""
    try:
        return ctypes.CDLL(str(build())), ''
    except OSError as e:
        return None, str(e).splitlines()[0]


LIBRARY, UNAVAILABLE = load()  # at import, so that torch.compile finds a constant


def _pointer(tensor: Optional[Tensor]) -> Optional[ctypes.c_void_p]:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _call(name: str, x: Tensor, *arguments: Union[None, float, Tensor]) -> None:
    sizes = map(ctypes.c_int64, x.shape)
    arguments = (ctypes.c_double(a) if isinstance(a, float) else _pointer(a) for a in arguments)
    getattr(LIBRARY, name)(torch.get_num_threads(), *sizes, *arguments)


def _channels_last(tensor: Optional[Tensor]) -> Optional[Tensor]:
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def _contiguous(tensor: Optional[Tensor]) -> Optional[Tensor]:
    return None if tensor is None else tensor.contiguous()


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _check(gates: int, x: Tensor, h: Optional[Tensor], c: Optional[Tensor], weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError for shapes and types that the C++ code, which only sees addresses, would read wrongly."""
    n = x.shape[1] if x.ndim == 4 else 0
    states = all(state is None or state.shape == x.shape for state in (h, c))
    if not (n and n % LANES == 0 and states and weight.shape == (gates, n, 2, 3, 3) and bias.shape == (gates, n)):
        shapes = ', '.join('None' if t is None else str(tuple(t.shape)) for t in (x, h, c, weight, bias))
        raise ValueError(
            f'x, h, c must be (B, N, H, W), N a multiple of {LANES}, weight ({gates}, N, 2, 3, 3), bias ({gates}, N); '
            f'got {shapes}.'
        )
    if any(t is not None and (t.dtype != torch.float32 or t.device.type != 'cpu') for t in (x, h, c, weight, bias)):
        raise ValueError('the fused CPU op takes float32 tensors on the CPU, all of them.')


def _check_vectors(x: Tensor, *vectors: Optional[Tensor]) -> None:
    """Raise ValueError unless x is (B, N, H, W) and the others, where given, (N,), all of them float32 on the CPU."""
    tensors = [x, *(v for v in vectors if v is not None)]
    if x.ndim != 4 or x.shape[1] % LANES or any(v.shape != x.shape[1:2] for v in tensors[1:]):
        shapes = ', '.join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f'x must be (B, N, H, W), N a multiple of {LANES}, and the others (N,); got {shapes}.')
    if any(t.dtype != torch.float32 or t.device.type != 'cpu' for t in tensors):
        raise ValueError('the fused CPU op takes float32 tensors on the CPU, all of them.')


def _register(name: str, gates: int, has_c: bool):
    """The ops `{name}` and `{name}_backward` in torch's library `timm_regnet_rnn`, and the step that calls them."""

    def forward(
        x: Tensor,
        h: Optional[Tensor],
        c: Optional[Tensor],
        weight: Tensor,
        bias: Tensor,
        scale: Optional[Tensor],
        shift: Optional[Tensor],
    ) -> List[Tensor]:
        _check(gates, x, h, c, weight, bias)
        _check_vectors(x, scale, shift)
        x, h, c = map(_channels_last, (x, h, c))
        outs = [_empty(x) for _ in range(1 + has_c)]
        weight, bias, scale, shift = map(_contiguous, (weight, bias, scale, shift))
        _call(f'{name}_forward', x, weight, bias, x, h, c, scale, shift, outs[0], outs[-1])
        return outs

    def backward(
        x: Tensor,
        h: Optional[Tensor],
        c: Optional[Tensor],
        weight: Tensor,
        bias: Tensor,
        dh_out: Optional[Tensor],
        dc_out: Optional[Tensor],
    ) -> List[Tensor]:
        _check(gates, x, h, c, weight, bias)
        x, h, c, dh_out, dc_out = map(_channels_last, (x, h, c, dh_out, dc_out))
        weight, bias = weight.contiguous(), bias.contiguous()
        dx, dweight, dbias = _empty(x), torch.zeros_like(weight), torch.zeros_like(bias)
        dh, dc = (None if state is None else _empty(state) for state in (h, c))
        _call(f'{name}_backward', x, weight, bias, x, h, c, dh_out, dc_out, dx, dh, dc, dweight, dbias)
        return [dx, dweight, dbias, *(grad for grad in (dh, dc) if grad is not None)]

    forward = library.custom_op(f'timm_regnet_rnn::{name}', forward, mutates_args=())
    backward = library.custom_op(f'timm_regnet_rnn::{name}_backward', backward, mutates_args=())

    @forward.register_fake
    def _(x, h, c, weight, bias, scale, shift):
        return [_empty(x) for _ in range(1 + has_c)]

    @backward.register_fake
    def _(x, h, c, weight, bias, dh_out, dc_out):
        states = [_empty(state) for state in (h, c) if state is not None]
        return [_empty(x), torch.empty_like(weight), torch.empty_like(bias), *states]

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    def differentiate(ctx, grads):
        x, h, c, weight, bias, scale, shift = ctx.saved_tensors
        dh_out, dc_out, dscale, dshift = grads[0], grads[1] if has_c else None, None, None
        if scale is not None and dh_out is not None:  # rare, so h' is computed again rather than kept
            raw = forward(x, h, c, weight, bias, None, None)[0]
            dh_out = dh_out * (raw * scale[:, None, None] + shift[:, None, None] > 0)
            dscale, dshift = (dh_out * raw).sum((0, 2, 3)), dh_out.sum((0, 2, 3))
            dh_out = dh_out * scale[:, None, None]
        dx, dweight, dbias, *states = backward(x, h, c, weight, bias, dh_out, dc_out)
        dh = None if h is None else states.pop(0)
        return dx, dh, None if c is None else states.pop(0), dweight, dbias, dscale, dshift

    forward.register_autograd(differentiate, setup_context=setup_context)

    forward.register_autocast('cpu', torch.float32)

    def step(x, h, c, weight, bias, scale=None, shift=None):
        """Takes bfloat16 and NCHW too: converting is little work beside the step. h' is like x; c' is channels_last."""
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        if dtype != torch.float32:
            tensors = (x, h, c, weight, bias, scale, shift)
            x, h, c, weight, bias, scale, shift = (None if t is None else t.float() for t in tensors)
        outs = [out.to(dtype) for out in forward(x, h, c if has_c else None, weight, bias, scale, shift)]
        return outs[0].contiguous(memory_format=layout), outs[1] if has_c else c

    return step


STEPS: Dict[str, object] = {
    'conv_rnn': _register('conv_rnn', gates=1, has_c=False),
    'conv_gru': _register('conv_gru', gates=3, has_c=False),
    'conv_lstm': _register('conv_lstm', gates=4, has_c=True),
}


@library.custom_op('timm_regnet_rnn::batch_norm_relu', mutates_args=())
def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    """As the reference: ReLU(BN(x)) in training mode, and the mean and (biased) variance of x."""
    _check_vectors(x, weight, bias)
    x, weight, bias = _channels_last(x), _contiguous(weight), _contiguous(bias)
    y, mean, var = _empty(x), torch.empty_like(weight), torch.empty_like(weight)
    _call('batch_norm_relu_forward', x, eps, weight, bias, x, y, mean, var)
    return y, mean, var


@library.custom_op('timm_regnet_rnn::batch_norm_relu_backward', mutates_args=())
def _batch_norm_relu_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor, var: Tensor, dy: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    _check_vectors(x, weight, bias, mean, var)
    x, dy = _channels_last(x), _channels_last(dy)
    weight, bias, mean, var = map(_contiguous, (weight, bias, mean, var))
    dx, dweight, dbias = _empty(x), torch.empty_like(weight), torch.empty_like(bias)
    _call('batch_norm_relu_backward', x, eps, weight, bias, x, mean, var, dy, dx, dweight, dbias)
    return dx, dweight, dbias


@batch_norm_relu.register_fake
def _(x, weight, bias, eps):
    return _empty(x), torch.empty_like(weight), torch.empty_like(weight)


@_batch_norm_relu_backward.register_fake
def _(x, weight, bias, eps, mean, var, dy):
    return _empty(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup_norm(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _differentiate_norm(ctx, dy, _, __):
    x, weight, bias, mean, var = ctx.saved_tensors
    return *_batch_norm_relu_backward(x, weight, bias, ctx.eps, mean, var, dy), None


batch_norm_relu.register_autograd(_differentiate_norm, setup_context=_setup_norm)
