"""The equations of the design, written out slowly and without the package: what the package is tested against.

Everything is float64 and as literal as it can be. Shapes: x, h, c (B, N, H, W); pw (N, 2); dw (N, 3, 3); bias (N,).
"""

import torch
import torch.nn.functional as F


def pointwise(x, h, pw):
    """PW: a 1x1 convolution with one group per channel pair (x_n, h_n)."""
    return torch.stack([pw[n, 0] * x[:, n] + pw[n, 1] * h[:, n] for n in range(x.shape[1])], dim=1)


def depthwise(y, dw, bias):
    """DW: a 3x3 convolution per channel, zero padding 1."""
    height, width = y.shape[-2:]
    padded = F.pad(y, (1, 1, 1, 1))
    out = bias[None, :, None, None]
    for u in range(3):
        for v in range(3):
            out = out + padded[:, :, u : u + height, v : v + width] * dw[None, :, u, v, None, None]
    return out


def gate(x, h, w):
    pw, dw, bias = w
    return depthwise(pointwise(x, h, pw), dw, bias)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def conv_rnn(x, h, c, w):
    return torch.tanh(gate(x, h, w['h'])), c


def conv_gru(x, h, c, w):
    z = sigmoid(gate(x, h, w['z']))
    r = sigmoid(gate(x, h, w['r']))
    n = torch.tanh(gate(x, r * h, w['n']))
    return (1 - z) * h + z * n, c


def conv_lstm(x, h, c, w):
    i, f, o = (sigmoid(gate(x, h, w[k])) for k in 'ifo')
    g = torch.tanh(gate(x, h, w['g']))
    c = f * c + i * g
    return o * torch.tanh(c), c


CELLS = dict(convrnn=conv_rnn, convgru=conv_gru, convlstm=conv_lstm)


def gate_weights(cell):
    """A cell's parameters by gate name."""
    return {name: (cell.pw[k], cell.dw[k], cell.bias[k]) for k, name in enumerate(cell.gates)}


def norm(x, bn):
    """Batch norm in eval mode."""
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return (x - bn.running_mean[None, :, None, None]) * scale[None, :, None, None] + bn.bias[None, :, None, None]


def relu(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def squeeze_excite(x, se):
    if se is None:
        return x
    s = x.mean(dim=(2, 3), keepdim=True)
    s = relu(F.conv2d(s, se.fc1.weight, se.fc1.bias))
    return x * sigmoid(F.conv2d(s, se.fc2.weight, se.fc2.bias))


def shortcut(x, block):
    if block.downsample is None:
        return x
    conv, bn = block.downsample
    return norm(F.conv2d(x, conv.weight, stride=conv.stride), bn)


def pool(x):
    """2x2 average pool, stride 2, rounding up: border windows average what they cover."""
    height, width = x.shape[-2:]
    rows = []
    for i in range(0, height, 2):
        rows.append(torch.stack([x[:, :, i : i + 2, j : j + 2].mean(dim=(2, 3)) for j in range(0, width, 2)], dim=-1))
    return torch.stack(rows, dim=-2)


def basic_block(x1, h, c, block, step, w, carry):
    x2 = relu(norm(F.conv2d(x1, block.conv1.weight, stride=block.stride, padding=1), block.bn1))
    h = torch.zeros_like(x2) if h is None else h
    c = torch.zeros_like(x2) if c is None else c
    raw, c = step(x2, h, c, w)
    h = relu(norm(raw, block.bn_h))
    x3 = relu(norm(F.conv2d(torch.cat([x2, h], 1), block.conv_fuse.weight), block.bn_fuse))
    x4 = norm(F.conv2d(x3, block.conv2.weight, padding=1), block.bn2)
    return relu(shortcut(x1, block) + squeeze_excite(x4, block.se)), h if carry == 'norm' else raw, c


def bottleneck(x1, h, c, block, step, w, carry):
    x2 = relu(norm(F.conv2d(x1, block.conv1.weight), block.bn1))
    read = pool(x2) if block.stride == 2 else x2
    h = torch.zeros_like(read) if h is None else h
    c = torch.zeros_like(read) if c is None else c
    raw, c = step(read, h, c, w)
    h = relu(norm(raw, block.bn_h))
    x3 = relu(norm(F.conv2d(x2, block.conv2.weight, stride=block.stride, padding=1), block.bn2))
    x4 = relu(norm(F.conv2d(torch.cat([x3, h], 1), block.conv_fuse.weight), block.bn_fuse))
    x5 = norm(F.conv2d(x4, block.conv3.weight), block.bn3)
    return relu(shortcut(x1, block) + squeeze_excite(x5, block.se)), h if carry == 'norm' else raw, c
