"""The kernels of the fused ops on the CPU: fused_cpu.cpp, compiled in the wheel, or at the first call and then kept in
the user's cache.

They compute in float32 and channels_last, for finite values of ordinary size; a tensor with others (infinite, NaN, or
beyond 1e8) is computed by the reference. All memory they work in is torch's. Without a C++ compiler there are none,
`unavailable` says why, and one warning says what that costs.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from . import reference
from .compile_cpu import compile_library, find_compiler, library_name, sum_file
from .fused import check, check_devices, check_maps

__all__ = [
    'CONVERTS',
    'backward',
    'backward_norm',
    'batch_norm_relu',
    'batch_norm_relu_backward',
    'empty',
    'forward',
    'forward_fuse',
    'forward_norm',
    'fuse_norm',
    'fuse_norm_backward',
    'unavailable',
]

CONVERTS = True  # a step turns every tensor into float32 and channels_last
LANES = 16  # channels that the kernels take together
UNUSUAL = 1  # what a kernel returns for values that it does not take
logger = logging.getLogger('timm_regnet_rnn')


def cache_dir() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_regnet_rnn'


def _trusted(path: Path) -> bool:
    """Whether nobody but this user (and root) can have written to a file or folder."""
    state = path.stat()
    return not hasattr(os, 'getuid') or (state.st_uid in (os.getuid(), 0) and not state.st_mode & 0o022)


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Replace a file by one that is whole and on the disk."""
    handle, scratch = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def _whole(library: Path) -> bool:
    """Whether a library is there with the bytes that were written."""
    summed = sum_file(library)
    if not (library.is_file() and summed.is_file()):
        return False
    return summed.read_text(encoding='utf-8', errors='replace').strip() == _sum(library)


def _kept(library: Path) -> bool:
    """Whether the cache has a library, whole and by this user."""
    return library.is_file() and _trusted(library) and _whole(library)


def build() -> Path:
    """The shared library: the wheel's, or the cache's, or else compiled now, by one process while others wait for it.

    Returns:
        Its path; outside of the cache, for this process alone, where the cache cannot be trusted or used.

    Raises:
        OSError: There is no compiler, or it failed; in one line.
    """
    level = torch.backends.cpu.get_cpu_capability()
    brought = Path(__file__).with_name(library_name(level))
    if _whole(brought):
        return brought
    compiler, folder = find_compiler(), cache_dir()
    library = folder / library_name(level, compiler)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            usable = _trusted(folder)
            if usable and _kept(library):
                return library
            if usable:
                stack.enter_context(FileLock(str(folder / f'.{library.stem}.lock')))
        except (OSError, NotImplementedError):  # a file system without locks
            usable = False
        if usable and _kept(library):
            return library
        for found in (brought, library):
            if found.exists():
                logger.warning('%s is damaged: compiled again.', found)
        logger.info('compiling the CPU kernels with %s, once: a few seconds.', compiler)
        data = compile_library(level, compiler)
        if usable:
            with contextlib.suppress(OSError):
                _write(library, data)
                _write(sum_file(library), hashlib.sha256(data).hexdigest().encode())
                return library
    logger.warning('%s is not writable, or others can write to it: the CPU kernels are not kept.', folder)
    with tempfile.NamedTemporaryFile(suffix='.so', delete=False) as file:
        file.write(data)
    return Path(file.name)


def _load() -> Tuple[Any, str]:
    try:
        path = build()
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # a torch that keeps its OpenMP runtime to itself, or has none
            ctypes.CDLL('libgomp.so.1', ctypes.RTLD_GLOBAL)
            loaded = ctypes.CDLL(str(path))
        if path.parent == Path(tempfile.gettempdir()):
            with contextlib.suppress(OSError):
                path.unlink()  # it stays loaded
        for name in ('conv_rnn', 'conv_gru', 'conv_lstm', 'fuse_norm'):
            getattr(loaded, f'{name}_room').restype = ctypes.c_int64
        return loaded, ''
    except (OSError, RuntimeError) as e:  # RuntimeError: a user without a home
        reason = str(e).splitlines()[0]
        logger.warning('%s: regulators run in plain PyTorch, about three times slower on the CPU.', reason)
        return None, reason


_lock = threading.Lock()
_loaded: Optional[Tuple[Any, str]] = None


def _library() -> Tuple[Any, str]:
    """The compiled library, or None and the reason in one line; compiled by the first caller."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def unavailable() -> str:
    """Why there are no kernels, in one line; '' if there are."""
    return _library()[1]


def _pointer(tensor: Optional[Tensor]) -> Optional[ctypes.c_void_p]:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _call(name: str, x: Tensor, *arguments: Union[None, float, Tensor]) -> int:
    converted = (ctypes.c_double(a) if isinstance(a, float) else _pointer(a) for a in arguments)
    return getattr(_library()[0], name)(torch.get_num_threads(), *map(ctypes.c_int64, x.shape), *converted)


def _channels_last(tensor: Optional[Tensor]) -> Any:
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def _contiguous(tensor: Optional[Tensor]) -> Any:
    return None if tensor is None else tensor.contiguous()


def empty(x: Tensor) -> Tensor:
    """What a kernel returns is of x's shape, in channels_last."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def _room(cell: str, x: Tensor, backward: bool) -> Tensor:
    """Memory to work in; too much of it is torch's own error."""
    sizes = map(ctypes.c_int64, x.shape)
    return torch.empty(getattr(_library()[0], f'{cell}_room')(torch.get_num_threads(), *sizes, int(backward)))


def _above_autograd(function: Callable[[], Any]) -> Any:
    """Run a function in a thread of its own: a kernel runs below autograd, and so would what it calls."""
    out: List[Any] = []
    thread = threading.Thread(target=lambda: out.append(function()))
    thread.start()
    thread.join()
    return out[0]


def _check_float32(*tensors: Optional[Tensor]) -> None:
    if any(t is not None and (t.dtype != torch.float32 or t.device.type != 'cpu') for t in tensors):
        raise ValueError('the fused CPU op takes float32 tensors on the CPU, all of them.')


def _check_vectors(x: Tensor, *vectors: Optional[Tensor]) -> None:
    """Raise ValueError unless x is (B, N, H, W) and the others, where given, (N,), all of them float32 on the CPU."""
    tensors = [x, *(v for v in vectors if v is not None)]
    if x.ndim != 4 or x.shape[1] % LANES or any(v.shape != x.shape[1:2] for v in tensors[1:]):
        shapes = ', '.join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f'x must be (B, N, H, W), N a multiple of {LANES}, and the others (N,); got {shapes}.')
    check_devices(*tensors)
    _check_float32(*tensors)


def forward(
    cell: str,
    x: Tensor,
    h: Optional[Tensor],
    c: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    scale: Optional[Tensor],
    shift: Optional[Tensor],
) -> List[Tensor]:
    """The new h, after the norm if scale and shift are given, and, of an LSTM, the new c."""
    outs = [empty(x) for _ in range(1 + (cell == 'conv_lstm'))]
    _forward(cell, (x, h, c, weight, bias, scale, shift), outs, (None, None, None, None))
    return outs


def forward_fuse(
    cell: str,
    tensors: Sequence[Optional[Tensor]],
    main: Tensor,
    fuse_weight: Tensor,
    fuse_bias: Tensor,
    y: Tensor,
    outs: List[Tensor],
) -> None:
    """`forward` of its seven tensors into `outs`, and ReLU(fuse_weight [main, h'] + fuse_bias) into `y`."""
    x: Any = tensors[0]
    _check_vectors(x, fuse_bias)
    _check_fuse(main, x, fuse_weight)
    _check_float32(*outs, y)
    if len(outs) != 1 + (cell == 'conv_lstm'):
        raise ValueError("conv_lstm must be given room for h' and c', another step for h' alone.")
    if any(t.shape != x.shape or not t.is_contiguous(memory_format=torch.channels_last) for t in (*outs, y)):
        raise ValueError(f'what the step writes to must be {tuple(x.shape)} in channels_last.')
    strips = fuse_weight.unflatten(0, (-1, LANES)).transpose(1, 2)
    if not _forward(cell, tensors, outs, (_channels_last(main), _contiguous(strips), _contiguous(fuse_bias), y)):
        with torch.autocast('cpu', enabled=False):
            y.copy_(torch.relu(reference.fuse(main, outs[0], fuse_weight, fuse_bias)))


def _forward(
    cell: str, tensors: Sequence[Optional[Tensor]], outs: List[Tensor], fuse: Sequence[Optional[Tensor]]
) -> bool:
    """Write a step to `outs`; False if the reference had to, and nothing was made of the main features, weight, bias
    and result in `fuse`."""
    x, h, c, weight, bias, scale, shift = tensors  # type: Any, Any, Any, Any, Any, Any, Any
    check(cell, x, h, c, weight, bias, LANES)
    _check_float32(x, h, c, weight, bias)
    _check_vectors(x, scale, shift)
    x, h, c = map(_channels_last, (x, h, c))
    weight, bias, scale, shift = map(_contiguous, (weight, bias, scale, shift))
    arguments = (weight, bias, x, h, c, scale, shift, *fuse, outs[0], outs[-1], _room(cell, x, False))
    if _call(f'{cell}_forward', x, *arguments) != UNUSUAL:
        return True
    with torch.autocast('cpu', enabled=False):
        raw, state = getattr(reference, f'{cell}_step')(x, h, c, weight, bias)
    for out, found in zip(outs, (reference.affine_relu(raw, scale, shift), state)):
        out.copy_(found)
    return False


def backward(
    cell: str,
    x: Tensor,
    h: Optional[Tensor],
    c: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    dh_out: Optional[Tensor],
    dc_out: Optional[Tensor],
) -> List[Tensor]:
    """Gradients of x, weight, bias, and of h and c where they are given."""
    check(cell, x, h, c, weight, bias, LANES)
    check_maps(x, dh_out, dc_out)
    _check_float32(x, h, c, weight, bias, dh_out, dc_out)
    x, h, c, dh_out, dc_out = map(_channels_last, (x, h, c, dh_out, dc_out))
    weight, bias = weight.contiguous(), bias.contiguous()
    dx, dweight, dbias = empty(x), torch.zeros_like(weight), torch.zeros_like(bias)
    dh, dc = (None if state is None else empty(state) for state in (h, c))
    room = _room(cell, x, True)
    arguments = (weight, bias, x, h, c, dh_out, dc_out, dx, dh, dc, dweight, dbias, room)
    if _call(f'{cell}_backward', x, *arguments) != UNUSUAL:
        return [dx, dweight, dbias, *(grad for grad in (dh, dc) if grad is not None)]

    def differentiate() -> List[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, h, c) if t is not None]
        states = iter(leaves[3:])
        state = [next(states) if t is not None else None for t in (h, c)]
        outs = getattr(reference, f'{cell}_step')(leaves[0], *state, *leaves[1:3])
        pairs = [(o, g) for o, g in zip(outs, (dh_out, dc_out)) if g is not None]
        found: Sequence[Optional[Tensor]] = [None] * len(leaves)
        if pairs:
            given, seeds = zip(*pairs)
            found = torch.autograd.grad(given, leaves, seeds, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found)]
        return [_channels_last(g) if g.shape == x.shape else g.contiguous() for g in grads]

    dx, dweight, dbias, *states = _above_autograd(differentiate)
    return [dx, dweight, dbias, *states]


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    """As the reference: ReLU(BN(x)) in training mode, and the mean and (biased) variance of x."""
    _check_vectors(x, weight, bias)
    x, weight, bias = _channels_last(x), _contiguous(weight), _contiguous(bias)
    y, mean, var = empty(x), torch.empty_like(weight), torch.empty_like(weight)
    if _call('batch_norm_relu_forward', x, eps, weight, bias, x, y, mean, var, _norm_room(x)) == UNUSUAL:
        y, mean, _ = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        return _channels_last(torch.relu(y)), mean, x.double().var((0, 2, 3), correction=0).float()
    return y, mean, var


def _norm_room(x: Tensor) -> Tensor:
    return torch.empty((torch.get_num_threads() + 1) * 2 * x.shape[1], dtype=torch.float64)


def batch_norm_relu_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor, var: Tensor, dy: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    _check_vectors(x, weight, bias, mean, var)
    check_maps(x, dy)
    _check_float32(dy)
    x, dy = _channels_last(x), _channels_last(dy)
    weight, bias, mean, var = map(_contiguous, (weight, bias, mean, var))
    dx, dweight, dbias = empty(x), torch.empty_like(weight), torch.empty_like(bias)
    arguments = (weight, bias, x, mean, var, dy, dx, dweight, dbias, _norm_room(x))
    if _call('batch_norm_relu_backward', x, eps, *arguments) != UNUSUAL:
        return dx, dweight, dbias

    def differentiate() -> Tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = torch.relu(F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=eps))
        return torch.autograd.grad(y, leaves, dy)

    dx, dweight, dbias = _above_autograd(differentiate)
    return _channels_last(dx), dweight, dbias


def forward_norm(cell: str, tensors: Sequence[Optional[Tensor]], eps: float) -> List[Tensor]:
    """`batch_norm_relu` of a step's h', in its pass: ReLU(BN(h')), h', its mean and variance, and, of an LSTM, c'.

    Args:
        cell: 'conv_rnn', 'conv_gru' or 'conv_lstm'.
        tensors: x, h, c, weight and bias, and the norm's weight and bias.
        eps: The norm's.
    """
    x, h, c, weight, bias, norm_weight, norm_bias = tensors  # type: Any, Any, Any, Any, Any, Any, Any
    check(cell, x, h, c, weight, bias, LANES)
    _check_float32(x, h, c, weight, bias)
    _check_vectors(x, norm_weight, norm_bias)
    x, h, c = map(_channels_last, (x, h, c))
    vectors = weight, bias, norm_weight, norm_bias = tuple(map(_contiguous, (weight, bias, norm_weight, norm_bias)))
    y, *outs = (empty(x) for _ in range(2 + (cell == 'conv_lstm')))
    mean, var = torch.empty_like(norm_weight), torch.empty_like(norm_weight)
    arguments = (*vectors[:2], x, h, c, *vectors[2:], y, outs[0], outs[-1], mean, var)
    if _call(f'{cell}_norm_forward', x, eps, *arguments, _room(cell, x, False), _norm_room(x)) == UNUSUAL:
        outs = forward(cell, x, h, c, weight, bias, None, None)
        y, mean, var = batch_norm_relu(outs[0], norm_weight, norm_bias, eps)
    return [y, outs[0], mean, var, *outs[1:]]


def backward_norm(
    cell: str,
    tensors: Sequence[Optional[Tensor]],
    eps: float,
    raw: Tensor,
    mean: Tensor,
    var: Tensor,
    dy: Tensor,
    dc_out: Optional[Tensor],
    more: Optional[Tensor] = None,
) -> List[Tensor]:
    """Gradients of x, the two weights and biases, and of h and c where they are given, of `forward_norm`'s seven.

    Args:
        more: A gradient of x from elsewhere, which is added, in the same pass.
    """
    x, h, c, weight, bias, norm_weight, norm_bias = tensors  # type: Any, Any, Any, Any, Any, Any, Any
    check(cell, x, h, c, weight, bias, LANES)
    check_maps(x, raw, dy, dc_out, more)
    _check_float32(x, h, c, weight, bias, raw, dy, dc_out, more)
    _check_vectors(x, norm_weight, norm_bias, mean, var)
    x, h, c, raw, dy, dc_out, more = map(_channels_last, (x, h, c, raw, dy, dc_out, more))
    vectors = tuple(map(_contiguous, (weight, bias, norm_weight, norm_bias, mean, var)))
    dx, dh, dc = (None if t is None else empty(t) for t in (x, h, c))
    grads = [torch.zeros_like(t) for t in vectors[:4]]
    given = (*vectors[:2], x, h, c, *vectors[2:4], raw, *vectors[4:], dy, dc_out, more)
    arguments = (*given, dx, dh, dc, *grads, _room(cell, x, True), _norm_room(x))
    if _call(f'{cell}_norm_backward', x, eps, *arguments) != UNUSUAL:
        return [dx, *grads, *(t for t in (dh, dc) if t is not None)]  # type: ignore[list-item]
    dh_out, *norm_grads = batch_norm_relu_backward(raw, norm_weight, norm_bias, eps, mean, var, dy)
    dx, dweight, dbias, *states = backward(cell, x, h, c, weight, bias, dh_out, dc_out)
    return [dx if more is None else dx.add_(more), dweight, dbias, *norm_grads, *states]


def _check_fuse(main: Tensor, h: Tensor, fuse_weight: Tensor) -> None:
    """Raise ValueError unless main and h are maps of one shape and fuse_weight (N, 2 N) for them."""
    if main.shape != h.shape or fuse_weight.shape != (h.shape[1], 2 * h.shape[1]):
        shapes = tuple(main.shape), tuple(fuse_weight.shape)
        raise ValueError(f'main must be (B, N, H, W) as x is, fuse_weight (N, 2 N); got {shapes[0]} and {shapes[1]}.')
    check_devices(main, h, fuse_weight)
    _check_float32(main, h, fuse_weight)


def fuse_norm(
    main: Tensor, h: Tensor, fuse_weight: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """`batch_norm_relu` of fuse_weight [main, h], a 1x1 convolution, and that convolution, its mean and variance.

    Args:
        main: Features (B, N, H, W).
        h: State (B, N, H, W).
        fuse_weight: (N, 2 N).
        weight, bias, eps: The norm's.
    """
    _check_vectors(h, weight, bias)
    _check_fuse(main, h, fuse_weight)
    main, h, weight, bias = _channels_last(main), _channels_last(h), _contiguous(weight), _contiguous(bias)
    y, out, mean, var = empty(h), empty(h), torch.empty_like(weight), torch.empty_like(weight)
    strips = fuse_weight.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()
    arguments = (main, h, strips, weight, bias, y, out, mean, var, _norm_room(h))
    if _call('fuse_norm_forward', h, eps, *arguments) == UNUSUAL:
        with torch.autocast('cpu', enabled=False):
            y = _channels_last(reference.fuse(main, h, fuse_weight))
        out, mean, var = batch_norm_relu(y, weight, bias, eps)
    return out, y, mean, var


def fuse_norm_backward(
    main: Tensor,
    h: Tensor,
    fuse_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    dout: Tensor,
    more: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of main, h, fuse_weight, weight and bias of `fuse_norm`.

    Args:
        more: A gradient of h from elsewhere, which is added, in the same pass.
    """
    _check_vectors(h, weight, bias, mean, var)
    _check_fuse(main, h, fuse_weight)
    check_maps(h, y, dout, more)
    _check_float32(y, dout, more)
    main, h, y, dout, more = map(_channels_last, (main, h, y, dout, more))
    weight, bias, mean, var = map(_contiguous, (weight, bias, mean, var))
    n, threads = h.shape[1], torch.get_num_threads()
    strips = fuse_weight.unflatten(1, (-1, LANES)).transpose(0, 1).contiguous()
    dmain, dh, dstrips = empty(h), empty(h), torch.zeros_like(strips)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    room = torch.empty(_library()[0].fuse_norm_room(threads, *map(ctypes.c_int64, h.shape)))
    given = (main, h, strips, weight, bias, y, mean, var, dout, more)
    if _call('fuse_norm_backward', h, eps, *given, dmain, dh, dstrips, dweight, dbias, room, _norm_room(h)) != UNUSUAL:
        return dmain, dh, dstrips.transpose(0, 1).reshape(n, 2 * n), dweight, dbias
    dy, dweight, dbias = batch_norm_relu_backward(y, weight, bias, eps, mean, var, dout)
    dy, inputs = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (dy, torch.cat((main, h), 1)))
    with torch.autocast('cpu', enabled=False):
        dmaps, dfuse_weight = dy @ fuse_weight, dy.t() @ inputs
    dmain, dh = dmaps.unflatten(0, (h.shape[0], *h.shape[2:])).permute(0, 3, 1, 2).split(n, 1)
    return _channels_last(dmain), _channels_last(dh if more is None else dh + more), dfuse_weight, dweight, dbias
