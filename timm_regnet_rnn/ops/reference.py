"""One step of each regulator cell, and what follows it, in plain PyTorch: the specification of every fused op.

Shapes: x, h and c are (B, N, H, W); the folded gate kernel is (G, N, 2, 3, 3) and its bias (G, N), where N is the
block's inner width and G the number of gates. Tap 0 of the axis of size two reads x, tap 1 reads h. None is the zero
state.
"""

from typing import Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F


def gate(x: torch.Tensor, h: Optional[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One gate's pre-activation, DW3x3(PW(x ∥ h)) with both convolutions folded into one.

    The grouped convolution over the interleaved channels is evaluated as the sum of two depthwise ones: the same
    arithmetic, without writing x ∥ h to memory, and on CPU several times faster than a grouped convolution.

    Args:
        x: Input (B, N, H, W).
        h: Hidden state (B, N, H, W), or None for the zero state.
        weight: Folded kernel (N, 2, 3, 3).
        bias: (N,).
    """
    out = F.conv2d(x, weight[:, :1], bias, padding=1, groups=weight.shape[0])
    if h is not None:
        out = out + F.conv2d(h, weight[:, 1:], None, padding=1, groups=weight.shape[0])
    return out


def affine_relu(h: torch.Tensor, scale: Optional[torch.Tensor], shift: Optional[torch.Tensor]) -> torch.Tensor:
    """ReLU(scale ⊙ h + shift), a batch norm in eval mode and ReLU, with scale and shift (N,); without them h."""
    if scale is None or shift is None:
        return h
    return torch.relu(h * scale[:, None, None] + shift[:, None, None])


def fuse(
    main: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """weight [main, h] + bias, a 1x1 convolution of features and state (B, N, H, W); weight is (N, 2 N), bias (N,)."""
    return F.conv2d(torch.cat((main, h), 1), weight[:, :, None, None], bias)


def batch_norm_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ReLU(BN(x)) of x (B, N, H, W) in training mode; and its mean and (biased) variance (N,), without gradients."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    scale = weight * (var + eps).rsqrt()
    return affine_relu(x, scale, bias - mean * scale), mean.detach(), var.detach()


def conv_rnn_step(
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """h' = tanh(gate_h(x, h)). c passes through untouched."""
    return torch.tanh(gate(x, h, weight[0], bias[0])), c


def conv_gru_step(
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """h' = (1 - z) ⊙ h + z ⊙ tanh(gate_n(x, r ⊙ h)), gates in the order z, r, n. c passes through untouched."""
    z = torch.sigmoid(gate(x, h, weight[0], bias[0]))
    r = torch.sigmoid(gate(x, h, weight[1], bias[1]))
    if h is None:
        h = torch.zeros_like(z)
    n = torch.tanh(gate(x, r * h, weight[2], bias[2]))
    return h + z * (n - h), c


def conv_lstm_step(
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """c' = f ⊙ c + i ⊙ g and h' = o ⊙ tanh(c'), gates in the order i, f, o, g."""
    i = torch.sigmoid(gate(x, h, weight[0], bias[0]))
    f = torch.sigmoid(gate(x, h, weight[1], bias[1]))
    o = torch.sigmoid(gate(x, h, weight[2], bias[2]))
    g = torch.tanh(gate(x, h, weight[3], bias[3]))
    if c is None:
        c = torch.zeros_like(g)  # not skipped: the forget gate stays in the graph, so DDP finds every parameter used
    c = f * c + i * g
    return o * torch.tanh(c), c


def conv_gru_first_step(
    x: torch.Tensor, h: None, c: Optional[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """From the zero state, without what that multiplies: h' = z ⊙ tanh(gate_n(x, 0))."""
    z, n = torch.sigmoid(gate(x, None, weight[0], bias[0])), torch.tanh(gate(x, None, weight[2], bias[2]))
    return z * n, c


def conv_lstm_first_step(
    x: torch.Tensor, h: None, c: None, weight: torch.Tensor, bias: torch.Tensor
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """From the zero state, without what that multiplies: c' = i ⊙ g, h' = o ⊙ tanh(c')."""
    i, o = torch.sigmoid(gate(x, None, weight[0], bias[0])), torch.sigmoid(gate(x, None, weight[2], bias[2]))
    new = i * torch.tanh(gate(x, None, weight[3], bias[3]))
    return o * torch.tanh(new), new


FIRST_STEPS: Dict[str, Callable[..., Tuple[torch.Tensor, Optional[torch.Tensor]]]] = dict(
    conv_gru=conv_gru_first_step, conv_lstm=conv_lstm_first_step
)
