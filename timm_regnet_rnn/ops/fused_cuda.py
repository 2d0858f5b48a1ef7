"""The kernels of the fused ops on CUDA, in Triton.

float32, float16 or bfloat16, summed in float32; weight and bias are of the states' type or float32. NCHW and
channels_last tensors are read where they lie, and everything that is returned follows the layout of x; other strides
are copied first. Under autocast x, h and c are cast to its type, weight and bias stay as they are. Forward saves its
inputs only; backward computes the gates again. Sums over pixels go through one buffer in a fixed order, so a gradient
is the same from run to run.

A tile is TY rows of TX pixels of TC channels. A row is a tensor of its own, so that a loaded row serves all three
vertical taps from registers: at TY = 4 an element costs 9 loads instead of 18, all but the first out of cache.

Memory traffic in tensors of the size of x, and its floor, every input read and every output written once:

                forward                 floor   backward                                       floor
    conv_rnn    3: x h, h'                  3   10: gates 4, inputs 3, weights 3                   5
    conv_gru    3: x h, h'                  3   25: gates 7, reset 4, inputs 8, weights 6          5
    conv_lstm   5: x h c, h' c'             5   22: gates 10, inputs 6, weights 6                  8

A tensor is 4 bytes per element in float32 and 2 otherwise; what tiles read beyond their border comes out of cache.

The GRU's candidate convolves r * h, so a tile computes r in a ring around itself, (TY + 2) / TY times per element, and
takes neighbours along the row from its own registers; a pass of its own for r would make the 3 tensors 7.

Backward writes the gradients of the pre-activations once, for two kernels to convolve. A single pass would compute
them in a ring, half again of an LSTM's 72 multiply-adds per element and more with its neighbours along the row, where
72 already take as long as moving 10 bytes on an H200 (4.8 TB/s, 33 T multiply-adds per second). For the same reason the
forward step of an LSTM in bfloat16, which moves 10 bytes, is bound by arithmetic rather than by memory.
"""

from types import SimpleNamespace
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from .fused import GATES, check
from .reference import affine_relu

try:
    import triton
    import triton.language as tl

    jit, UNAVAILABLE, INTERPRETED = triton.jit, '', triton.knobs.runtime.interpret
except ImportError:  # the kernels below stay plain functions that nobody calls
    tl = SimpleNamespace(constexpr=None)
    jit, UNAVAILABLE, INTERPRETED = lambda kernel: kernel, 'Triton is not installed', False
inline = (lambda function: function) if INTERPRETED else jit  # the interpreter takes milliseconds to enter a function

__all__ = ['CONVERTS', 'backward', 'empty', 'forward', 'unavailable']

CONVERTS = False  # the kernels take every layout and type of DTYPES

NCHW, CL = torch.contiguous_format, torch.channels_last
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WARPS = 4096  # aimed at by the sum over pixels: enough for 132 multiprocessors, and the same on every device


# SHAPE is (channels_last or not, TY, TX, TC, ring or not). A tile is (first element of the image, channels n, columns
# px, which of them are its own and not the ring's, N, H, W); n and px broadcast to [TX, TC] in channels_last and to
# [TC, TX] in NCHW, so that the last axis is contiguous.


@inline
def _blocks(size, block):
    return (size + block - 1) // block


@inline
def _tile(item, block, N, H, W, SHAPE: tl.constexpr):
    """Tile and first row of a work item: a strip of rows of an image, for one block of channels."""
    LAST: tl.constexpr = SHAPE[0]
    TY: tl.constexpr = SHAPE[1]
    TX: tl.constexpr = SHAPE[2]
    TC: tl.constexpr = SHAPE[3]
    RING: tl.constexpr = SHAPE[4]
    columns = _blocks(W, TX - 2 * RING)
    lane = tl.arange(0, TX)[:, None] if LAST else tl.arange(0, TX)[None, :]
    n = block * TC + (tl.arange(0, TC)[None, :] if LAST else tl.arange(0, TC)[:, None])
    px = item % columns * (TX - 2 * RING) - RING + lane
    own = (n < N) & (px < W) & (lane >= RING) & (lane < TX - RING)
    strip = item // columns
    rows = _blocks(H, TY)
    image = (strip // rows).to(tl.int64) * N * H * W
    y = strip % rows * TY + tl.zeros((1, 1), tl.int32)  # the interpreter has no scalar conditions in masks
    return (image, n, px, own, N, H, W), y


@inline
def _program(N, H, W, SHAPE: tl.constexpr):
    """Tile and first row of this program; programs of neighbouring channels follow each other."""
    blocks = _blocks(N, SHAPE[3])
    return _tile(tl.program_id(0) // blocks, tl.program_id(0) % blocks, N, H, W, SHAPE)


@inline
def _row(ptr, tile, y, dx, SHAPE: tl.constexpr):
    """Where row y lies, shifted by dx, and how far it is to the next."""
    image, n, px, own, N, H, W = tile
    LAST: tl.constexpr = SHAPE[0]
    pitch = W * N if LAST else W
    return ptr + image + y * pitch + (((px + dx) * N + n) if LAST else (n * (H * W) + px + dx)), pitch


@inline
def _load(ptr, tile, y, dx, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """ROWS rows from y on, shifted by dx; zero outside the map."""
    ptr, pitch = _row(ptr, tile, y, dx, SHAPE)
    inside = (tile[1] < tile[4]) & (tile[2] + dx >= 0) & (tile[2] + dx < tile[6])
    rows = ()
    for row in tl.static_range(ROWS):
        rows += (tl.load(ptr + row * pitch, inside & (y >= -row) & (y < tile[5] - row), 0).to(tl.float32),)
    return rows


@inline
def _store(ptr, rows, tile, y, SHAPE: tl.constexpr):
    TY: tl.constexpr = SHAPE[1]
    ptr, pitch = _row(ptr, tile, y, 0, SHAPE)
    for row in tl.static_range(TY):
        tl.store(ptr + row * pitch, rows[row], tile[3] & (y < tile[5] - row))


@inline
def _weight(ptr, tile):
    """One number per channel."""
    return tl.load(ptr + tile[1], tile[1] < tile[4], 0).to(tl.float32)


@inline
def _fill(acc, value, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """acc and ROWS more tensors that hold a value."""
    value += tl.full((SHAPE[2], SHAPE[3]) if SHAPE[0] else (SHAPE[3], SHAPE[2]), 0, tl.float32)
    for _ in tl.static_range(ROWS):
        acc += (value,)
    return acc


@inline
def _taps(acc, rows, w, step, hop, tile, OUTS: tl.constexpr, ROWS: tl.constexpr):
    """acc, OUTS times ROWS tensors, plus a column of taps over ROWS + 2 rows.

    Output i has its first weight at w + i * step; the next tap lies hop further.
    """
    more = ()
    for out in tl.static_range(OUTS):
        first = w + out * step
        above, middle, below = _weight(first, tile), _weight(first + 3 * hop, tile), _weight(first + 6 * hop, tile)
        for row in tl.static_range(ROWS):
            new = acc[out * ROWS + row] + above * rows[row]
            more += (new + middle * rows[row + 1] + below * rows[row + 2],)
    return more


@inline
def _conv(acc, ptr, w, step, hop, tile, y, OUTS: tl.constexpr, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """acc plus OUTS depthwise 3x3 convolutions of ptr; a hop of -N from the last tap goes from outputs to inputs."""
    for dx in range(3):  # not unrolled: a third of the time to compile, and fewer registers for loads in flight
        acc = _taps(acc, _load(ptr, tile, y - 1, dx - 1, ROWS + 2, SHAPE), w + dx * hop, step, hop, tile, OUTS, ROWS)
    return acc


@inline
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))  # an exp that overflows gives 0


@inline
def _tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@inline
def _gates(x, h, w, b, tile, y, GATES: tl.constexpr, SHAPE: tl.constexpr):
    """Pre-activations of all gates, TY rows of each."""
    N = tile[4]
    TY: tl.constexpr = SHAPE[1]
    acc = ()
    for gate in tl.static_range(GATES):
        acc = _fill(acc, _weight(b + gate * N, tile), TY, SHAPE)
    acc = _conv(acc, x, w, 18 * N, N, tile, y, GATES, TY, SHAPE)
    if h is not None:
        acc = _conv(acc, h, w + 9 * N, 18 * N, N, tile, y, GATES, TY, SHAPE)
    return acc


@inline
def _gru(x, h, w, b, tile, y, SHAPE: tl.constexpr):
    """z, r, n and h of TY rows; without a state r and h are empty."""
    N = tile[4]
    LAST: tl.constexpr = SHAPE[0]
    TY: tl.constexpr = SHAPE[1]
    TX: tl.constexpr = SHAPE[2]
    TC: tl.constexpr = SHAPE[3]
    acc = _fill(_fill((), _weight(b, tile), TY, SHAPE), _weight(b + 2 * N, tile), TY, SHAPE)
    acc = _conv(acc, x, w, 36 * N, N, tile, y, 2, TY, SHAPE)
    z, n, r, hs = acc[:TY], acc[TY:], (), ()
    if h is not None:
        z = _conv(z, h, w + 9 * N, 0, N, tile, y, 1, TY, SHAPE)
        pre = _fill((), _weight(b + N, tile), TY + 2, SHAPE)
        pre = _conv(pre, x, w + 18 * N, 0, N, tile, y - 1, 1, TY + 2, SHAPE)
        pre = _conv(pre, h, w + 27 * N, 0, N, tile, y - 1, 1, TY + 2, SHAPE)
        hs = _load(h, tile, y - 1, 0, TY + 2, SHAPE)
        rh = ()
        for row in tl.static_range(TY + 2):
            r += (_sigmoid(pre[row]),)
            rh += (r[row] * hs[row],)
        r, hs = r[1 : TY + 1], hs[1 : TY + 1]
        n = _taps(n, rh, w + 46 * N, 0, N, tile, 1, TY)
        lane = tl.arange(0, TX)[:, None] if LAST else tl.arange(0, TX)[None, :]
        for dx in tl.static_range(0, 3, 2):
            px = tile[2] + dx - 1
            index = tl.minimum(tl.maximum(lane + dx - 1, 0), TX - 1)
            index = tl.broadcast_to(index, (TX, TC) if LAST else (TC, TX))
            near = ()
            for row in tl.static_range(TY + 2):
                near += (tl.where((px >= 0) & (px < tile[6]), tl.gather(rh[row], index, 0 if LAST else 1), 0.0),)
            n = _taps(n, near, w + (45 + dx) * N, 0, N, tile, 1, TY)
    z_, n_ = (), ()
    for row in tl.static_range(TY):
        z_ += (_sigmoid(z[row]),)
        n_ += (_tanh(n[row]),)
    return z_, r, n_, hs


@jit
def forward_kernel(x, h, c, w, b, h_out, c_out, N, H, W, GATES: tl.constexpr, SHAPE: tl.constexpr):
    """h' and c' of a tile."""
    TY: tl.constexpr = SHAPE[1]
    tile, y = _program(N, H, W, SHAPE)
    new_h, new_c = (), ()
    if GATES == 3:
        z, r, n, hs = _gru(x, h, w, b, tile, y, SHAPE)
        for row in tl.static_range(TY):
            new_h += (z[row] * n[row] if h is None else hs[row] + z[row] * (n[row] - hs[row]),)
    else:
        pre = _gates(x, h, w, b, tile, y, GATES, SHAPE)
        if c is not None:
            old = _load(c, tile, y, 0, TY, SHAPE)
        for row in tl.static_range(TY):
            if GATES == 1:
                new_h += (_tanh(pre[row]),)
            else:
                cell = _sigmoid(pre[row]) * _tanh(pre[3 * TY + row])
                if c is not None:
                    cell += _sigmoid(pre[TY + row]) * old[row]
                new_c += (cell,)
                new_h += (_sigmoid(pre[2 * TY + row]) * _tanh(cell),)
    _store(h_out, new_h, tile, y, SHAPE)
    if GATES == 4:
        _store(c_out, new_c, tile, y, SHAPE)


@inline
def _plane(planes, i, size):
    return planes + i * tl.cast(size, tl.int64)


@jit
def gates_kernel(x, h, c, w, b, dh_out, dc_out, planes, dc, size, N, H, W, GATES: tl.constexpr, SHAPE: tl.constexpr):
    """Gradients of the pre-activations into the first GATES planes of `size` elements, and dc.

    The GRU's reset gate waits for its neighbours in `reset_kernel`; z and r go to planes 3 and 4.
    """
    TY: tl.constexpr = SHAPE[1]
    tile, y = _program(N, H, W, SHAPE)
    dh = _fill((), 0.0, TY, SHAPE) if dh_out is None else _load(dh_out, tile, y, 0, TY, SHAPE)
    d0, d1, d2, d3, dold = (), (), (), (), ()
    if GATES == 3:
        z, r, n, hs = _gru(x, h, w, b, tile, y, SHAPE)
        for row in tl.static_range(TY):
            d0 += (dh[row] * (n[row] if h is None else n[row] - hs[row]) * z[row] * (1 - z[row]),)
            d1 += (z[row] * 0,)
            d2 += (dh[row] * z[row] * (1 - n[row] * n[row]),)
        if h is None:
            _store(_plane(planes, 1, size), d1, tile, y, SHAPE)
        else:
            _store(_plane(planes, 3, size), z, tile, y, SHAPE)
            _store(_plane(planes, 4, size), r, tile, y, SHAPE)
        _store(_plane(planes, 2, size), d2, tile, y, SHAPE)
    else:
        pre = _gates(x, h, w, b, tile, y, GATES, SHAPE)
        if GATES == 4:
            old = _fill((), 0.0, TY, SHAPE) if c is None else _load(c, tile, y, 0, TY, SHAPE)
            dnew = _fill((), 0.0, TY, SHAPE) if dc_out is None else _load(dc_out, tile, y, 0, TY, SHAPE)
        for row in tl.static_range(TY):
            if GATES == 1:
                new = _tanh(pre[row])
                d0 += (dh[row] * (1 - new * new),)
            else:
                i, f = _sigmoid(pre[row]), _sigmoid(pre[TY + row])
                o, g = _sigmoid(pre[2 * TY + row]), _tanh(pre[3 * TY + row])
                squashed = _tanh(f * old[row] + i * g)
                grad = dnew[row] + dh[row] * o * (1 - squashed * squashed)
                d0 += (grad * g * i * (1 - i),)
                d1 += (grad * old[row] * f * (1 - f),)
                d2 += (dh[row] * squashed * o * (1 - o),)
                d3 += (grad * i * (1 - g * g),)
                dold += (grad * f,)
        if GATES == 4:
            _store(_plane(planes, 1, size), d1, tile, y, SHAPE)
            _store(_plane(planes, 2, size), d2, tile, y, SHAPE)
            _store(_plane(planes, 3, size), d3, tile, y, SHAPE)
            if c is not None:
                _store(dc, dold, tile, y, SHAPE)
    _store(planes, d0, tile, y, SHAPE)


@jit
def reset_kernel(h, w, planes, size, N, H, W, SHAPE: tl.constexpr):
    """The GRU's plane 1, the gradient of the reset gate, from that of the candidate."""
    TY: tl.constexpr = SHAPE[1]
    tile, y = _program(N, H, W, SHAPE)
    drh = _conv(_fill((), 0.0, TY, SHAPE), _plane(planes, 2, size), w + 53 * N, 0, -N, tile, y, 1, TY, SHAPE)
    hs = _load(h, tile, y, 0, TY, SHAPE)
    r = _load(_plane(planes, 4, size), tile, y, 0, TY, SHAPE)
    grads = ()
    for row in tl.static_range(TY):
        grads += (drh[row] * hs[row] * r[row] * (1 - r[row]),)
    _store(_plane(planes, 1, size), grads, tile, y, SHAPE)


@jit
def inputs_kernel(w, planes, dh_out, dx, dh, size, N, H, W, GATES: tl.constexpr, SHAPE: tl.constexpr):
    """dx and dh of a tile from the planes."""
    TY: tl.constexpr = SHAPE[1]
    OUTS: tl.constexpr = 1 if dh is None else 2
    tile, y = _program(N, H, W, SHAPE)
    acc = _fill((), 0.0, OUTS * TY, SHAPE)
    if GATES == 3 and dh is not None:
        acc = _conv(acc, _plane(planes, 2, size), w + 44 * N, 9 * N, -N, tile, y, OUTS, TY, SHAPE)
        z = _load(_plane(planes, 3, size), tile, y, 0, TY, SHAPE)
        r = _load(_plane(planes, 4, size), tile, y, 0, TY, SHAPE)
        grad = _load(dh_out, tile, y, 0, TY, SHAPE)
        more = acc[:TY]
        for row in tl.static_range(TY):
            more += (acc[TY + row] * r[row] + grad[row] * (1 - z[row]),)
        acc = more
    for gate in range(2 if GATES == 3 and dh is not None else GATES):
        acc = _conv(acc, _plane(planes, gate, size), w + (gate * 18 + 8) * N, 9 * N, -N, tile, y, OUTS, TY, SHAPE)
    _store(dx, acc[:TY], tile, y, SHAPE)
    if dh is not None:
        _store(dh, acc[TY:], tile, y, SHAPE)


@jit
def weights_kernel(x, h, planes, partial, items, chunk, size, N, H, W, GATES: tl.constexpr, SHAPE: tl.constexpr):
    """One gate's gradients of kernel and bias, summed over `chunk` strips, into partial (chunks, GATES, 19, N)."""
    LAST: tl.constexpr = SHAPE[0]
    TY: tl.constexpr = SHAPE[1]
    TC: tl.constexpr = SHAPE[3]
    SOURCES: tl.constexpr = 1 if h is None else 2
    gate, program = tl.program_id(0) % GATES, tl.program_id(0) // GATES  # gates side by side share x and h in cache
    blocks = _blocks(N, TC)
    block, first = program % blocks, program // blocks * chunk
    acc = _fill((), 0.0, 9 * SOURCES + 1, SHAPE)
    item, end = first, tl.minimum(first + chunk, items)
    while item < end:  # not a range: with NumPy 2.4 the interpreter of Triton 3.6 has none of tensors
        tile, y = _tile(item, block, N, H, W, SHAPE)
        sources = _load(x, tile, y, 0, TY, SHAPE)
        if h is not None:
            hs = _load(h, tile, y, 0, TY, SHAPE)
            if GATES == 3:  # the candidate reads r * h
                r = _load(_plane(planes, 4, size), tile, y, 0, TY, SHAPE)
                for row in tl.static_range(TY):
                    sources += (tl.where(gate == 2, r[row], 1.0) * hs[row],)
            else:
                sources += hs
        more, bias = (), acc[9 * SOURCES]
        for dx in tl.static_range(3):
            rows = _load(_plane(planes, gate, size), tile, y - 1, 1 - dx, TY + 2, SHAPE)
            for dy in tl.static_range(3):
                for source in tl.static_range(SOURCES):
                    total = acc[(dx * 3 + dy) * SOURCES + source]
                    for row in tl.static_range(TY):
                        total += sources[source * TY + row] * rows[row + 2 - dy]
                    more += (total,)
            if dx == 1:
                for row in tl.static_range(TY):
                    bias += rows[row + 1]
        acc = more + (bias,)
        item += 1
    n = block * TC + tl.arange(0, TC)
    out = partial + (first // chunk * GATES + gate).to(tl.int64) * 19 * N + n
    for i in tl.static_range(9 * SOURCES):
        slot = i % SOURCES * 9 + i // SOURCES % 3 * 3 + i // SOURCES // 3
        tl.store(out + slot * N, tl.sum(acc[i], 0 if LAST else 1), n < N)
    tl.store(out + 18 * N, tl.sum(acc[9 * SOURCES], 0 if LAST else 1), n < N)


def _format(x: Tensor) -> torch.memory_format:
    """The layout that everything is read and written in."""
    return NCHW if x.is_contiguous() or not x.is_contiguous(memory_format=CL) else CL


def empty(x: Tensor) -> Tensor:
    """What a kernel returns is of x's shape and layout."""
    return torch.empty_like(x, memory_format=_format(x))


def _power(size: int, most: int) -> int:
    """The power of two that holds size, but at most `most`."""
    return min(1 << (size - 1).bit_length(), most)


def _shape(x: Tensor, ring: bool) -> Tuple[Tuple[int, ...], int]:
    """SHAPE of the tiles, and the warps of a program: 16 elements per thread, as many as registers hold gates for.

    In channels_last a thread takes neighbouring channels, in NCHW a warp takes two rows of 64 pixels or packs planes.
    A map that is no wider than its tile has no ring.
    """
    _, n, height, width = x.shape
    last, rows = _format(x) == CL, _power(height, 4)
    channels = _power(n, 32 if ring else 64)
    columns = _power(width, 512 // channels if last else 64)
    if not last:
        channels = _power(n, 512 // rows // columns)
    return (last, rows, columns, channels, int(ring and width > columns)), max(1, rows * columns * channels // 512)


def _items(x: Tensor, shape: Tuple[int, ...]) -> int:
    """Strips of all images."""
    _, rows, columns, _, ring = shape
    return x.shape[0] * triton.cdiv(x.shape[2], rows) * triton.cdiv(x.shape[3], columns - 2 * ring)


def _launch(kernel, x: Tensor, *args, ring: bool = False, **constants) -> None:
    """Run a kernel with a program per tile of x; args are the kernel's until N, H and W."""
    shape, warps = _shape(x, ring)
    programs = _items(x, shape) * triton.cdiv(x.shape[1], shape[3])
    if programs:
        with torch.cuda.device_of(x):
            kernel[(programs,)](*args, *x.shape[1:], **constants, SHAPE=shape, num_warps=warps, enable_fp_fusion=True)


def unavailable() -> str:
    """Why there are no kernels, in one line; '' if there are."""
    return UNAVAILABLE


def _check(cell: str, x: Tensor, h: Optional[Tensor], c: Optional[Tensor], weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError for shapes and types that the kernels, which only see addresses, would read wrongly."""
    check(cell, x, h, c, weight, bias)
    if x[:1].numel() >= 2**31:
        raise ValueError('the fused CUDA op takes images of fewer than 2**31 elements.')
    if x.device.type != ('cpu' if INTERPRETED else 'cuda'):
        raise ValueError('the fused CUDA op takes tensors on one CUDA device, all of them.')
    tensors = [t for t in (x, h, c) if t is not None]
    if x.dtype not in DTYPES or any(t.dtype != x.dtype for t in tensors):
        raise ValueError('the fused CUDA op takes x, h, c in float32, float16 or bfloat16, all of them in the same.')
    if any(t.dtype not in (x.dtype, torch.float32) for t in (weight, bias)):
        raise ValueError('the fused CUDA op takes weight and bias in the type of x or in float32.')


def _laid_out(x: Tensor, weight: Tensor, *tensors: Optional[Tensor]) -> Any:
    """x dense, the kernel with neighbouring channels side by side, and the other tensors in x's layout."""
    layout = _format(x)
    others = (None if t is None else t.contiguous(memory_format=layout) for t in tensors)
    return x.contiguous(memory_format=layout), weight.permute(0, 2, 3, 4, 1).contiguous(), *others


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
    _check(cell, x, h, c, weight, bias)
    outs = [empty(x) for _ in range(1 + (cell == 'conv_lstm'))]
    gates, gru = GATES[cell], cell == 'conv_gru'
    x, w, h, c = _laid_out(x, weight, h, c)
    _launch(forward_kernel, x, x, h, c, w, bias.contiguous(), outs[0], outs[-1], ring=gru, GATES=gates)
    return [affine_relu(outs[0], scale, shift), *outs[1:]]


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
    _check(cell, x, h, c, weight, bias)
    gates, gru = GATES[cell], cell == 'conv_gru'
    dx, dh, dc = (None if t is None else empty(x) for t in (x, h, c))
    x, w, h, c, dh_out, dc_out = _laid_out(x, weight, h, c, dh_out, dc_out)
    planes, size, n = x.new_empty((gates + 2 * gru) * x.numel()), x.numel(), x.shape[1]
    _launch(gates_kernel, x, x, h, c, w, bias.contiguous(), dh_out, dc_out, planes, dc, size, ring=gru, GATES=gates)
    if gru and h is not None:
        _launch(reset_kernel, x, h, w, planes, size)
    _launch(inputs_kernel, x, w, planes, dh_out, dx, dh, size, GATES=gates)

    shape, warps = _shape(x, False)
    items, blocks = _items(x, shape), triton.cdiv(n, shape[3])
    chunk = max(1, triton.cdiv(items * blocks * gates * warps, WARPS))
    partial = x.new_zeros(triton.cdiv(items, chunk), gates, 19, n, dtype=torch.float32)
    if items:
        with torch.cuda.device_of(x):
            weights_kernel[(len(partial) * blocks * gates,)](
                *(x, h, planes, partial, items, chunk, size, *x.shape[1:]),
                **{'GATES': gates, 'SHAPE': shape, 'num_warps': warps, 'enable_fp_fusion': True},
            )
    total = partial.sum(0)
    dweight = total[:, :18].mT.reshape(weight.shape).to(weight.dtype)
    dbias = total[:, 18].to(bias.dtype, copy=True)
    return [grad for grad in (dx, dweight, dbias, dh, dc) if grad is not None]
