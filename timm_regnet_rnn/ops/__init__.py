"""One step of a regulator as an op per cell, its norm, and the one rule that chooses their implementation.

`TIMM_REGNET_RNN_OPS` (or `set_ops`) overrides the rule: 'reference' takes plain PyTorch everywhere, 'fused' makes it an
error where no fused implementation can be had; unset, the fused one is taken wherever there is one.

Shapes throughout: x, h and c are (B, N, H, W), the folded gate kernel is (G, N, 2, 3, 3) and its bias (G, N), with the
gates in the cell's order; h and c are None for the zero state. With `scale` and `shift` (N,), a batch norm in eval
mode, a step returns ReLU(scale ⊙ h' + shift) in place of h'.
"""

import os
from contextlib import contextmanager
from functools import partial
from typing import Callable, Iterator, Optional, Tuple

import torch

from . import reference

__all__ = [
    'conv_rnn_step',
    'conv_gru_step',
    'conv_lstm_step',
    'batch_norm_relu',
    'fused_on_cpu',
    'set_ops',
    'step_norm_relu',
    'use',
]

OPS = ('', 'reference', 'fused')
LANES = 16  # channels that the fused CPU op takes together
State = Tuple[torch.Tensor, Optional[torch.Tensor]]


def set_ops(name: str) -> None:
    """Choose the implementation for this process: 'reference', 'fused', or '' for the rule.

    Raises:
        ValueError: Another name.
    """
    global _ops
    if name not in OPS:
        raise ValueError(f'TIMM_REGNET_RNN_OPS must be one of {", ".join(map(repr, OPS))}; got {name!r}.')
    _ops = name


set_ops(os.environ.get('TIMM_REGNET_RNN_OPS', ''))


@contextmanager
def use(name: str) -> Iterator[None]:
    """Choose the implementation within a `with` block: 'reference', 'fused', or '' for the rule.

    Raises:
        ValueError: Another name.
    """
    chosen = _ops
    set_ops(name)
    try:
        yield
    finally:
        set_ops(chosen)


def step_norm_relu(
    step: Callable[..., State],
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> State:
    """A step whose h' goes through ReLU(scale ⊙ h' + shift), a batch norm in eval mode with scale and shift (N,)."""
    return step(x, h, c, weight, bias, scale, shift)


@torch.jit.unused
def fused_step(name: str, x: torch.Tensor) -> Optional[Callable[..., State]]:
    """The dispatch rule: the fused implementation of a step for inputs like x, or None for the reference.

    Raises:
        RuntimeError: 'fused' was asked for and is not to be had.
    """
    if _ops == 'reference' or torch.onnx.is_in_onnx_export():
        return None
    if not isinstance(x, torch.Tensor) or x.device.type == 'meta':  # a proxy of torch.fx, or nothing to compute
        return None
    if x.device.type == 'cuda':
        from . import fused_cuda

        reason = fused_cuda.UNAVAILABLE
        if not reason and x.dtype not in fused_cuda.DTYPES:
            reason = f'the fused op computes in float32, float16 or bfloat16, not in {x.dtype}'
        if not reason:
            return partial(_step_and_norm, fused_cuda.STEPS[name])
    elif x.device.type != 'cpu':
        reason = f'the fused ops are for the CPU and CUDA, not for {x.device.type}'
    elif x.dtype not in (torch.float32, torch.bfloat16):
        reason = f'the fused op takes float32 and bfloat16, not {x.dtype}'
    elif x.shape[1] % LANES:
        reason = f'the fused op takes widths that are multiples of {LANES}, not {x.shape[1]}'
    elif name == 'conv_rnn' and not _ops and not native_on_cpu(x):
        return None  # converting costs what the op saves where there is only one gate
    else:
        from . import fused_cpu  # compiles at its first import

        reason = fused_cpu.UNAVAILABLE
        if not reason:
            return fused_cpu.STEPS[name]
    if _ops == 'fused':
        raise RuntimeError(f'TIMM_REGNET_RNN_OPS=fused, but there is no fused op here: {reason}.')
    return None


def _step_and_norm(step, x, h, c, weight, bias, scale=None, shift=None) -> State:
    h, c = step(x, h, c, weight, bias)
    return reference.affine_relu(h, scale, shift), c


def native_on_cpu(x: torch.Tensor) -> bool:
    """Whether x is what the fused CPU ops compute with: anything else is converted before and after."""
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
    return plain and x.is_contiguous(memory_format=torch.channels_last)


@torch.jit.unused
def fused_on_cpu(x: torch.Tensor) -> bool:
    """Whether the fused CPU ops take x as it is; then `batch_norm_relu`, `scale` and `shift` save passes."""
    if not isinstance(x, torch.Tensor) or x.device.type != 'cpu' or not native_on_cpu(x):
        return False
    return fused_step('conv_lstm', x) is not None


def batch_norm_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ReLU(BN(x)) in training mode; and the mean and (biased) variance of x, (N,), without gradients."""
    if fused_on_cpu(x):
        from . import fused_cpu

        return fused_cpu.batch_norm_relu(x, weight, bias, eps)
    return reference.batch_norm_relu(x, weight, bias, eps)


def conv_rnn_step(
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: Optional[torch.Tensor] = None,
    shift: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """h' = tanh(gate_h(x, h)). c passes through untouched."""
    if not torch.jit.is_scripting():
        fused = fused_step('conv_rnn', x)
        if fused is not None:
            return fused(x, h, c, weight, bias, scale, shift)
    return reference.conv_rnn_step(x, h, c, weight, bias, scale, shift)


def conv_gru_step(
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: Optional[torch.Tensor] = None,
    shift: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """h' = (1 - z) ⊙ h + z ⊙ tanh(gate_n(x, r ⊙ h)), gates in the order z, r, n. c passes through untouched."""
    if not torch.jit.is_scripting():
        fused = fused_step('conv_gru', x)
        if fused is not None:
            return fused(x, h, c, weight, bias, scale, shift)
    return reference.conv_gru_step(x, h, c, weight, bias, scale, shift)


def conv_lstm_step(
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: Optional[torch.Tensor] = None,
    shift: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """c' = f ⊙ c + i ⊙ g and h' = o ⊙ tanh(c'), gates in the order i, f, o, g."""
    if not torch.jit.is_scripting():
        fused = fused_step('conv_lstm', x)
        if fused is not None:
            return fused(x, h, c, weight, bias, scale, shift)
    return reference.conv_lstm_step(x, h, c, weight, bias, scale, shift)
