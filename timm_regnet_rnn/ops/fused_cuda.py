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

What is not finite in the reference is not finite here, but for one case: without a state the GRU's reset gate is not
computed, so that a NaN in it alone shows a step later. More may be lost than there: zeros around a map are multiplied,
and times an infinite weight, or x or h in a kernel's gradient, are NaN where most of torch's convolutions skip them.

Backward writes the gradients of the pre-activations once, for two kernels to convolve. A single pass would compute
them in a ring, half again of an LSTM's 72 multiply-adds per element and more with its neighbours along the row, where
72 already take as long as moving 10 bytes on an H200 (4.8 TB/s, 33 T multiply-adds per second). For the same reason the
forward step of an LSTM in bfloat16, which moves 10 bytes, is bound by arithmetic rather than by memory.
"""

from types import SimpleNamespace
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .fused import GATES, check, check_maps
from .reference import affine_relu

try:
    import triton
    import triton.language as tl

    jit, UNAVAILABLE, INTERPRETED = triton.jit, '', triton.knobs.runtime.interpret
except ImportError:  # the kernels below stay plain functions that nobody calls
    tl = SimpleNamespace(constexpr=lambda value: value)
    jit, UNAVAILABLE, INTERPRETED = lambda kernel: kernel, 'Triton is not installed', False
inline = (lambda function: function) if INTERPRETED else jit  # the interpreter takes milliseconds to enter a function
const = (lambda value: value) if INTERPRETED else tl.constexpr

__all__ = ['CONVERTS', 'backward', 'empty', 'forward', 'unavailable']

CONVERTS = False  # the kernels take every layout and type of DTYPES

NCHW, CL = torch.contiguous_format, torch.channels_last
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WARPS = 4096  # aimed at by the sum over pixels: enough for 132 multiprocessors, and the same on every device

# The kernel is [G, 2, 9, N] here: gates, the halves that read x and h, taps, channels.
X_HALF, H_HALF = const(0), const(1)
TAPS = const(9)  # 3x3, row by row
FIRST, LAST = const(0), const(8)
DOWN = const(3)  # taps from a row to the next
GATE = const(18)  # taps from a gate to the next
UPDATE, RESET, CANDIDATE = const(0), const(1), const(2)  # the GRU's gates
FORGET, OUTPUT, CONTENT = const(1), const(2), const(3)  # the LSTM's after the input gate
Z_PLANE, R_PLANE = const(3), const(4)  # where backward keeps the GRU's z and r, behind the gates' gradients


class Shape(NamedTuple):
    """How a kernel cuts maps into tiles; known when it is compiled."""

    channels_last: bool
    TY: int  # rows
    TX: int  # columns
    TC: int  # channels
    ring: int  # 1 if the first and last column belong to the neighbours, else 0


class Tile(NamedTuple):
    """A strip of rows of one image, for one block of channels.

    P below is [TX, TC] in channels_last and [TC, TX] in NCHW, so that the last axis is contiguous.
    """

    image: Any  # first element
    n: Any  # channels, broadcasts to [P]
    px: Any  # columns, broadcasts to [P]
    own: Any  # [P], which of them are its own and not the ring's
    N: Any  # channels, rows and columns of the map
    H: Any
    W: Any


@inline
def _blocks(size, block):
    return (size + block - 1) // block


@inline
def _lane(SHAPE: tl.constexpr):
    """Columns from 0 on."""
    return tl.arange(0, SHAPE.TX)[:, None] if SHAPE.channels_last else tl.arange(0, SHAPE.TX)[None, :]


@inline
def _tile(item, block, N, H, W, SHAPE: tl.constexpr):
    """Tile and first row of a work item: a strip of an image, for one block of channels."""
    columns = _blocks(W, SHAPE.TX - 2 * SHAPE.ring)
    lane = _lane(SHAPE)
    n = block * SHAPE.TC + (tl.arange(0, SHAPE.TC)[None, :] if SHAPE.channels_last else tl.arange(0, SHAPE.TC)[:, None])
    px = item % columns * (SHAPE.TX - 2 * SHAPE.ring) - SHAPE.ring + lane
    own = (n < N) & (px < W) & (lane >= SHAPE.ring) & (lane < SHAPE.TX - SHAPE.ring)  # [P]
    strip = item // columns
    strips = _blocks(H, SHAPE.TY)
    image = (strip // strips).to(tl.int64) * N * H * W
    y = strip % strips * SHAPE.TY + tl.zeros((1, 1), tl.int32)  # the interpreter has no scalar conditions in masks
    return Tile(image, n, px, own, N, H, W), y


@inline
def _program(N, H, W, SHAPE: tl.constexpr):
    """Tile and first row of this program; programs of neighbouring channels follow each other."""
    blocks = _blocks(N, SHAPE.TC)
    return _tile(tl.program_id(0) // blocks, tl.program_id(0) % blocks, N, H, W, SHAPE)


@inline
def _row(ptr, tile, y, dx, SHAPE: tl.constexpr):
    """Where row y lies, shifted by dx, [P], and how far it is to the next."""
    n, px, N, H, W = tile.n, tile.px, tile.N, tile.H, tile.W
    pitch = W * N if SHAPE.channels_last else W
    row = ptr + tile.image + y * pitch
    return row + (((px + dx) * N + n) if SHAPE.channels_last else (n * (H * W) + px + dx)), pitch


@inline
def _load(ptr, tile, y, dx, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """ROWS rows from y on, shifted by dx, [ROWS][P]; zero outside the map."""
    ptr, pitch = _row(ptr, tile, y, dx, SHAPE)
    inside = (tile.n < tile.N) & (tile.px + dx >= 0) & (tile.px + dx < tile.W)
    rows = ()
    for row in tl.static_range(ROWS):
        rows += (tl.load(ptr + row * pitch, inside & (y >= -row) & (y < tile.H - row), 0).to(tl.float32),)
    return rows


@inline
def _store(ptr, rows, tile, y, SHAPE: tl.constexpr):
    """Write rows [TY][P] from row y on, where they are the tile's own."""
    TY: tl.constexpr = SHAPE.TY
    ptr, pitch = _row(ptr, tile, y, 0, SHAPE)
    for row in tl.static_range(TY):
        tl.store(ptr + row * pitch, rows[row], tile.own & (y < tile.H - row))


@inline
def _channels(ptr, tile):
    """One number per channel, broadcasts to [P]."""
    return tl.load(ptr + tile.n, tile.n < tile.N, 0).to(tl.float32)


@inline
def _rows(value, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Rows [ROWS][P] that hold a value."""
    value += tl.full((SHAPE.TX, SHAPE.TC) if SHAPE.channels_last else (SHAPE.TC, SHAPE.TX), 0, tl.float32)
    rows = ()
    for _ in tl.static_range(ROWS):
        rows += (value,)
    return rows


@inline
def _zeros(OUTS: tl.constexpr, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Zeros [OUTS][ROWS][P]."""
    outs = ()
    for _ in tl.static_range(OUTS):
        outs += (_rows(0.0, ROWS, SHAPE),)
    return outs


@inline
def _tap(w, gate, half, t, N):
    """Where tap t of a gate's half lies in the kernel w, [N]."""
    return w + (gate * GATE + half * TAPS + t) * N


@inline
def _taps(acc, rows, w, tile, ROWS: tl.constexpr, hop, step=0):
    """acc [OUTS][ROWS][P] plus a column of taps over rows [ROWS + 2][P].

    Output i has its first weight at w + i * step; the next tap lies hop further.
    """
    OUTS: tl.constexpr = len(acc)
    more = ()
    for out in tl.static_range(OUTS):
        first = w + out * step
        above, middle = _channels(first, tile), _channels(first + DOWN * hop, tile)
        below = _channels(first + 2 * DOWN * hop, tile)
        sums = ()
        for row in tl.static_range(ROWS):
            new = acc[out][row] + above * rows[row]
            sums += (new + middle * rows[row + 1] + below * rows[row + 2],)
        more += (sums,)
    return more


@inline
def _conv(acc, ptr, w, tile, y, ROWS: tl.constexpr, SHAPE: tl.constexpr, hop, step=0):
    """acc [OUTS][ROWS][P] plus depthwise 3x3 convolutions of ptr.

    Output i has its first weight at w + i * step; the next tap lies hop further, which is -N from the last tap on to go
    from outputs to inputs.
    """
    for dx in range(3):  # not unrolled: a third of the time to compile, and fewer registers for loads in flight
        rows = _load(ptr, tile, y - 1, dx - 1, ROWS + 2, SHAPE)
        acc = _taps(acc, rows, w + dx * hop, tile, ROWS, hop, step)
    return acc


@inline
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))  # an exp that overflows gives 0


@inline
def _tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@inline
def _gates(x, h, w, b, tile, y, GATES: tl.constexpr, SHAPE: tl.constexpr):
    """Pre-activations of all gates, [GATES][TY][P]."""
    N = tile.N
    TY: tl.constexpr = SHAPE.TY
    acc = ()
    for gate in tl.static_range(GATES):
        acc += (_rows(_channels(b + gate * N, tile), TY, SHAPE),)
    acc = _conv(acc, x, _tap(w, 0, X_HALF, FIRST, N), tile, y, TY, SHAPE, hop=N, step=GATE * N)
    if h is not None:
        acc = _conv(acc, h, _tap(w, 0, H_HALF, FIRST, N), tile, y, TY, SHAPE, hop=N, step=GATE * N)
    return acc


@inline
def _gru(x, h, w, b, tile, y, SHAPE: tl.constexpr):
    """z, r, n and h, [TY][P] each; without a state r and h are empty."""
    N = tile.N
    TY: tl.constexpr = SHAPE.TY
    axis: tl.constexpr = 0 if SHAPE.channels_last else 1
    acc = (_rows(_channels(b + UPDATE * N, tile), TY, SHAPE), _rows(_channels(b + CANDIDATE * N, tile), TY, SHAPE))
    acc = _conv(
        acc, x, _tap(w, UPDATE, X_HALF, FIRST, N), tile, y, TY, SHAPE, hop=N, step=(CANDIDATE - UPDATE) * GATE * N
    )
    z, n = acc
    r, hs = (), ()
    if h is not None:
        (z,) = _conv((z,), h, _tap(w, UPDATE, H_HALF, FIRST, N), tile, y, TY, SHAPE, hop=N)
        pre = (_rows(_channels(b + RESET * N, tile), TY + 2, SHAPE),)
        pre = _conv(pre, x, _tap(w, RESET, X_HALF, FIRST, N), tile, y - 1, TY + 2, SHAPE, hop=N)
        (pre,) = _conv(pre, h, _tap(w, RESET, H_HALF, FIRST, N), tile, y - 1, TY + 2, SHAPE, hop=N)
        hs = _load(h, tile, y - 1, 0, TY + 2, SHAPE)
        rh = ()  # [TY + 2][P]
        for row in tl.static_range(TY + 2):
            r += (_sigmoid(pre[row]),)
            inside = (y > -row) & (y <= tile.H - row)  # r may be NaN outside the map, where h is zero
            rh += (tl.where(inside, r[row] * hs[row], 0.0),)
        r, hs = r[1 : TY + 1], hs[1 : TY + 1]
        acc = _taps((n,), rh, _tap(w, CANDIDATE, H_HALF, FIRST + 1, N), tile, TY, hop=N)
        for dx in tl.static_range(0, 3, 2):
            px = tile.px + dx - 1
            index = tl.minimum(tl.maximum(_lane(SHAPE) + dx - 1, 0), SHAPE.TX - 1)
            index = tl.broadcast_to(index, (SHAPE.TX, SHAPE.TC) if SHAPE.channels_last else (SHAPE.TC, SHAPE.TX))
            near = ()  # [TY + 2][P], the column before or after
            for row in tl.static_range(TY + 2):
                near += (tl.where((px >= 0) & (px < tile.W), tl.gather(rh[row], index, axis), 0.0),)
            acc = _taps(acc, near, _tap(w, CANDIDATE, H_HALF, FIRST + dx, N), tile, TY, hop=N)
        (n,) = acc
    z_, n_ = (), ()
    for row in tl.static_range(TY):
        z_ += (_sigmoid(z[row]),)
        n_ += (_tanh(n[row]),)
    return z_, r, n_, hs


@jit
def forward_kernel(x, h, c, w, b, h_out, c_out, N, H, W, GATES: tl.constexpr, SHAPE: tl.constexpr):
    """h' and c' of a tile."""
    TY: tl.constexpr = SHAPE.TY
    tile, y = _program(N, H, W, SHAPE)
    new_h, new_c = (), ()  # [TY][P]
    if GATES == 3:
        z, r, n, hs = _gru(x, h, w, b, tile, y, SHAPE)
        for row in tl.static_range(TY):
            new_h += (z[row] * n[row] if h is None else hs[row] + z[row] * (n[row] - hs[row]),)
    elif GATES == 1:
        (n,) = _gates(x, h, w, b, tile, y, GATES, SHAPE)
        for row in tl.static_range(TY):
            new_h += (_tanh(n[row]),)
    else:
        i, f, o, g = _gates(x, h, w, b, tile, y, GATES, SHAPE)
        old = _rows(0.0, TY, SHAPE) if c is None else _load(c, tile, y, 0, TY, SHAPE)
        for row in tl.static_range(TY):
            cell = _sigmoid(i[row]) * _tanh(g[row])
            cell += _sigmoid(f[row]) * old[row]  # of a zero c too: a NaN in f must show
            new_c += (cell,)
            new_h += (_sigmoid(o[row]) * _tanh(cell),)
    _store(h_out, new_h, tile, y, SHAPE)
    if GATES == 4:
        _store(c_out, new_c, tile, y, SHAPE)


@inline
def _plane(planes, i, size):
    return planes + i * tl.cast(size, tl.int64)


@jit
def gates_kernel(x, h, c, w, b, dh_out, dc_out, planes, dc, size, N, H, W, GATES: tl.constexpr, SHAPE: tl.constexpr):
    """Gradients of the pre-activations into the first GATES planes of `size` elements, and dc.

    The GRU's reset gate waits for its neighbours in `reset_kernel`; z and r go to planes of their own.
    """
    TY: tl.constexpr = SHAPE.TY
    tile, y = _program(N, H, W, SHAPE)
    dh = _rows(0.0, TY, SHAPE) if dh_out is None else _load(dh_out, tile, y, 0, TY, SHAPE)
    d0, d1, d2, d3, dold = (), (), (), (), ()  # [TY][P], in the order of the gates
    if GATES == 3:
        z, r, n, hs = _gru(x, h, w, b, tile, y, SHAPE)
        for row in tl.static_range(TY):
            d0 += (dh[row] * (n[row] if h is None else n[row] - hs[row]) * z[row] * (1 - z[row]),)
            d1 += (z[row] * 0,)
            d2 += (dh[row] * z[row] * (1 - n[row] * n[row]),)
        if h is None:
            _store(_plane(planes, RESET, size), d1, tile, y, SHAPE)
        else:
            _store(_plane(planes, Z_PLANE, size), z, tile, y, SHAPE)
            _store(_plane(planes, R_PLANE, size), r, tile, y, SHAPE)
        _store(_plane(planes, CANDIDATE, size), d2, tile, y, SHAPE)
    elif GATES == 1:
        (pre,) = _gates(x, h, w, b, tile, y, GATES, SHAPE)
        for row in tl.static_range(TY):
            new = _tanh(pre[row])
            d0 += (dh[row] * (1 - new * new),)
    else:
        pre_i, pre_f, pre_o, pre_g = _gates(x, h, w, b, tile, y, GATES, SHAPE)
        old = _rows(0.0, TY, SHAPE) if c is None else _load(c, tile, y, 0, TY, SHAPE)
        dnew = _rows(0.0, TY, SHAPE) if dc_out is None else _load(dc_out, tile, y, 0, TY, SHAPE)
        for row in tl.static_range(TY):
            i, f, o, g = _sigmoid(pre_i[row]), _sigmoid(pre_f[row]), _sigmoid(pre_o[row]), _tanh(pre_g[row])
            squashed = _tanh(f * old[row] + i * g)
            grad = dnew[row] + dh[row] * o * (1 - squashed * squashed)
            d0 += (grad * g * i * (1 - i),)
            d1 += (grad * old[row] * f * (1 - f),)
            d2 += (dh[row] * squashed * o * (1 - o),)
            d3 += (grad * i * (1 - g * g),)
            dold += (grad * f,)
        _store(_plane(planes, FORGET, size), d1, tile, y, SHAPE)
        _store(_plane(planes, OUTPUT, size), d2, tile, y, SHAPE)
        _store(_plane(planes, CONTENT, size), d3, tile, y, SHAPE)
        if c is not None:
            _store(dc, dold, tile, y, SHAPE)
    _store(planes, d0, tile, y, SHAPE)


@jit
def reset_kernel(h, w, planes, size, N, H, W, SHAPE: tl.constexpr):
    """The plane of the GRU's reset gate, from that of the candidate."""
    TY: tl.constexpr = SHAPE.TY
    tile, y = _program(N, H, W, SHAPE)
    dn, back = _plane(planes, CANDIDATE, size), _tap(w, CANDIDATE, H_HALF, LAST, N)
    (drh,) = _conv(_zeros(1, TY, SHAPE), dn, back, tile, y, TY, SHAPE, hop=-N)
    hs = _load(h, tile, y, 0, TY, SHAPE)
    r = _load(_plane(planes, R_PLANE, size), tile, y, 0, TY, SHAPE)
    grads = ()  # [TY][P]
    for row in tl.static_range(TY):
        grads += (drh[row] * hs[row] * r[row] * (1 - r[row]),)
    _store(_plane(planes, RESET, size), grads, tile, y, SHAPE)


@jit
def inputs_kernel(w, planes, dh_out, dx, dh, size, N, H, W, GATES: tl.constexpr, SHAPE: tl.constexpr):
    """dx and dh of a tile from the planes."""
    TY: tl.constexpr = SHAPE.TY
    tile, y = _program(N, H, W, SHAPE)
    acc = _zeros(1 if dh is None else 2, TY, SHAPE)  # [x or h][TY][P]
    through_reset: tl.constexpr = GATES == 3 and dh is not None
    if through_reset:  # the candidate's gradient goes first, which is that of r * h
        dn = _plane(planes, CANDIDATE, size)
        acc = _conv(acc, dn, _tap(w, CANDIDATE, X_HALF, LAST, N), tile, y, TY, SHAPE, hop=-N, step=TAPS * N)
        z = _load(_plane(planes, Z_PLANE, size), tile, y, 0, TY, SHAPE)
        r = _load(_plane(planes, R_PLANE, size), tile, y, 0, TY, SHAPE)
        grad = _load(dh_out, tile, y, 0, TY, SHAPE)
        dhs = ()
        for row in tl.static_range(TY):
            dhs += (acc[1][row] * r[row] + grad[row] * (1 - z[row]),)
        acc = (acc[0], dhs)
    for gate in range(CANDIDATE if through_reset else GATES):
        acc = _conv(
            acc, _plane(planes, gate, size), _tap(w, gate, X_HALF, LAST, N), tile, y, TY, SHAPE, hop=-N, step=TAPS * N
        )
    _store(dx, acc[0], tile, y, SHAPE)
    if dh is not None:
        _store(dh, acc[1], tile, y, SHAPE)


@jit
def weights_kernel(x, h, planes, partial, items, chunk, size, N, H, W, GATES: tl.constexpr, SHAPE: tl.constexpr):
    """One gate's gradients of kernel and bias, summed over `chunk` strips, into partial [chunks, GATES, 19, N]."""
    TY: tl.constexpr = SHAPE.TY
    SOURCES: tl.constexpr = 1 if h is None else 2
    gate, program = tl.program_id(0) % GATES, tl.program_id(0) // GATES  # gates side by side share x and h in cache
    blocks = _blocks(N, SHAPE.TC)
    block, first = program % blocks, program // blocks * chunk
    taps = _zeros(3, SOURCES, SHAPE), _zeros(3, SOURCES, SHAPE), _zeros(3, SOURCES, SHAPE)  # [column][row][x or h][P]
    (bias,) = _rows(0.0, 1, SHAPE)
    item, end = first, tl.minimum(first + chunk, items)
    while item < end:  # not a range: with NumPy 2.4 the interpreter of Triton 3.6 has none of tensors
        tile, y = _tile(item, block, N, H, W, SHAPE)
        sources = (_load(x, tile, y, 0, TY, SHAPE),)  # [SOURCES][TY][P]
        if h is not None:
            hs = _load(h, tile, y, 0, TY, SHAPE)
            if GATES == 3:  # the candidate reads r * h
                r = _load(_plane(planes, R_PLANE, size), tile, y, 0, TY, SHAPE)
                rh = ()
                for row in tl.static_range(TY):
                    rh += (tl.where(gate == CANDIDATE, r[row], 1.0) * hs[row],)
                sources += (rh,)
            else:
                sources += (hs,)
        more = ()
        for dx in tl.static_range(3):
            grads = _load(_plane(planes, gate, size), tile, y - 1, 1 - dx, TY + 2, SHAPE)
            column = ()
            for dy in tl.static_range(3):
                sums = ()
                for source in tl.static_range(SOURCES):
                    total = taps[dx][dy][source]
                    for row in tl.static_range(TY):
                        total += sources[source][row] * grads[row + 2 - dy]
                    sums += (total,)
                column += (sums,)
            more += (column,)
            if dx == 1:
                for row in tl.static_range(TY):
                    bias += grads[row + 1]
        taps = more
        item += 1
    axis: tl.constexpr = 0 if SHAPE.channels_last else 1
    n = block * SHAPE.TC + tl.arange(0, SHAPE.TC)
    out = partial + (first // chunk * GATES + gate).to(tl.int64) * (GATE + 1) * N + n
    for dx in tl.static_range(3):
        for dy in tl.static_range(3):
            for source in tl.static_range(SOURCES):
                total = tl.sum(taps[dx][dy][source], axis)  # [TC]
                tl.store(_tap(out, 0, source, dy * DOWN + dx, N), total, n < N)
    tl.store(out + GATE * N, tl.sum(bias, axis), n < N)


def _format(x: Tensor) -> torch.memory_format:
    """The layout that everything is read and written in."""
    return NCHW if x.is_contiguous() or not x.is_contiguous(memory_format=CL) else CL


def empty(x: Tensor) -> Tensor:
    """What a kernel returns is of x's shape and layout."""
    return torch.empty_like(x, memory_format=_format(x))


def _power(size: int, most: int) -> int:
    """The power of two that holds size, but at most `most`."""
    return min(1 << (size - 1).bit_length(), most)


def _shape(x: Tensor, ring: bool) -> Tuple[Shape, int]:
    """Shape of the tiles, and the warps of a program: 16 elements per thread, as many as registers hold gates for.

    In channels_last a thread takes neighbouring channels, in NCHW a warp takes two rows of 64 pixels or packs planes.
    A map that is no wider than its tile has no ring.
    """
    _, n, height, width = x.shape
    channels_last, rows = _format(x) == CL, _power(height, 4)
    channels = _power(n, 32 if ring else 64)
    columns = _power(width, 512 // channels if channels_last else 64)
    if not channels_last:
        channels = _power(n, 512 // rows // columns)
    shape = Shape(channels_last, TY=rows, TX=columns, TC=channels, ring=int(ring and width > columns))
    return shape, max(1, rows * columns * channels // 512)


def _items(x: Tensor, shape: Shape) -> int:
    """Strips of all images."""
    columns = shape.TX - 2 * shape.ring
    return x.shape[0] * triton.cdiv(x.shape[2], shape.TY) * triton.cdiv(x.shape[3], columns)


def _launch(kernel, like, ring=False, programs=None, **args) -> None:
    """Run a kernel on maps like those of a tensor, by default with a program per tile."""
    _, N, H, W = like.shape
    shape, warps = _shape(like, ring)
    if programs is None:
        programs = _items(like, shape) * triton.cdiv(N, shape.TC)
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](**args, N=N, H=H, W=W, SHAPE=shape, num_warps=warps, enable_fp_fusion=True)


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
    step = dict(x=x, h=h, c=c, w=w, b=bias.contiguous(), GATES=gates)
    _launch(forward_kernel, like=x, ring=gru, **step, h_out=outs[0], c_out=outs[-1])
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
    check_maps(x, dh_out, dc_out)
    gates, gru = GATES[cell], cell == 'conv_gru'
    dx, dh, dc = (None if t is None else empty(x) for t in (x, h, c))
    x, w, h, c, dh_out, dc_out = _laid_out(x, weight, h, c, dh_out, dc_out)
    planes, size, N = x.new_empty((gates + 2 * gru) * x.numel()), x.numel(), x.shape[1]
    step, kept = dict(x=x, h=h, c=c, w=w, b=bias.contiguous(), GATES=gates), dict(planes=planes, size=size)
    _launch(gates_kernel, like=x, ring=gru, **step, **kept, dh_out=dh_out, dc_out=dc_out, dc=dc)
    if gru and h is not None:
        _launch(reset_kernel, like=x, **kept, h=h, w=w)
    _launch(inputs_kernel, like=x, **kept, w=w, dh_out=dh_out, dx=dx, dh=dh, GATES=gates)

    shape, warps = _shape(x, False)
    items, blocks = _items(x, shape), triton.cdiv(N, shape.TC)
    chunk = max(1, triton.cdiv(items * blocks * gates * warps, WARPS))
    chunks, taps = triton.cdiv(items, chunk), weight[0, 0].numel()
    partial = x.new_zeros(chunks, gates, taps + 1, N, dtype=torch.float32)
    sums = dict(partial=partial, items=items, chunk=chunk)
    _launch(weights_kernel, like=x, programs=chunks * blocks * gates, **kept, **sums, x=x, h=h, GATES=gates)
    dweight, dbias = partial.sum(0).split((taps, 1), 1)  # [GATES, 18, N], [GATES, 1, N]
    dweight = dweight.mT.reshape(weight.shape).to(weight.dtype)
    dbias = dbias[:, 0].to(bias.dtype, copy=True)
    return [grad for grad in (dx, dweight, dbias, dh, dc) if grad is not None]
