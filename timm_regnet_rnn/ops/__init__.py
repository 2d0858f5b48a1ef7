"""One step of a regulator as an op per cell, its norm, and the one rule that chooses their implementation.

`TIMM_REGNET_RNN_OPS` (or `set_ops`, or a `with use(...)`) overrides the rule: 'reference' takes plain PyTorch
everywhere, 'fused' makes it an error where no fused implementation can be had; unset, the fused one is taken wherever
there is one. What leaves the process (a trace, an exported program, ONNX) holds plain PyTorch, so that it loads where
this package is not; so do the transforms of torch.func and forward-mode derivatives. Nothing is compiled before the
first step that a fused op takes.

Shapes throughout: x, h and c are (B, N, H, W), the folded gate kernel is (G, N, 2, 3, 3) and its bias (G, N), with the
gates in the cell's order; h and c are None for the zero state.
"""

import logging
import os
from contextlib import contextmanager
from functools import partial
from typing import Callable, Iterator, Optional, Sequence, Tuple

import torch

from . import reference

__all__ = [
    'conv_rnn_step',
    'conv_gru_step',
    'conv_lstm_step',
    'batch_norm_relu',
    'chosen_ops',
    'fused_on_cpu',
    'set_ops',
    'step_batch_norm_fuse',
    'step_batch_norm_relu',
    'step_norm_fuse',
    'step_norm_relu',
    'use',
]

OPS = ('', 'reference', 'fused')
DTYPES = dict(cpu=(torch.float32, torch.bfloat16), cuda=(torch.float32, torch.float16, torch.bfloat16))
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


def _from_environment() -> str:
    name = os.environ.get('TIMM_REGNET_RNN_OPS', '')
    if name in OPS:
        return name
    logging.getLogger('timm_regnet_rnn').warning(
        'TIMM_REGNET_RNN_OPS=%s is none of %s: the default is taken.', name, ', '.join(map(repr, OPS))
    )
    return ''


_ops = _from_environment()


def chosen_ops() -> str:
    """The implementation chosen for this process: 'reference', 'fused', or '' for the rule."""
    return _ops


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


def _leaves() -> bool:
    """Whether what is computed is recorded into a program that leaves the process."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def _transformed() -> bool:
    """Whether a transform of torch.func or forward mode differentiates, for which the fused ops have no rule."""
    if torch.compiler.is_compiling():  # then torch.compile takes the transform apart
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _nothing(
    has_c: bool,
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: Optional[torch.Tensor] = None,
    shift: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """A step on no pixels, which a convolution refuses: no numbers, of which every input's gradient is zero."""
    out = x * (weight.sum() + bias.sum())
    if h is not None:
        out = out + h
    if not has_c:
        return out, c
    if c is not None:
        out = out + c
    return out, out.clone()


@torch.jit.unused
def fused_step(name: str, x: torch.Tensor, *others: Optional[torch.Tensor]) -> Optional[Callable[..., State]]:
    """The dispatch rule: the fused implementation of a step for inputs like these, or None for the reference.

    Raises:
        RuntimeError: 'fused' was asked for and is not to be had; or the tensors are on several devices.
    """
    if not isinstance(x, torch.Tensor):  # a proxy of torch.fx is none
        return None
    if _leaves():
        # engines take zeros that are multiplied for work to do, and leave their fast layouts
        if _ops != 'fused' or torch.onnx.is_in_onnx_export():
            return reference.FIRST_STEPS.get(name) if others[0] is None and others[1] is None else None
    elif any(t is not None and t.device != x.device for t in others):  # torch's own convolution takes meta for any
        raise RuntimeError('expected x, h, c, weight and bias to be on one device.')
    elif not x.numel():
        return partial(_nothing, name == 'conv_lstm')
    device = x.device.type
    if _ops == 'reference' or device == 'meta':
        return None
    if _transformed():
        reason = 'it has no rule for transforms of torch.func and forward-mode derivatives'
    elif x.dtype not in DTYPES.get(device, (x.dtype,)):
        reason = f'the fused op takes {" and ".join(str(t)[6:] for t in DTYPES[device])}, not {x.dtype}'
    elif device == 'cpu' and x.shape[1] % LANES:
        reason = f'the fused op takes widths that are multiples of {LANES}, not {x.shape[1]}'
    elif device == 'cpu' and name == 'conv_rnn' and not _ops and not native_on_cpu(x):
        return None  # converting costs what the op saves where there is only one gate
    else:
        reason = ''
    if not reason:
        from . import fused

        reason = fused.unavailable(device)
        if not reason:
            return fused.STEPS[name]
    if _ops == 'fused':
        raise RuntimeError(f'TIMM_REGNET_RNN_OPS=fused, but there is no fused op here: {reason}.')
    return None


def native_on_cpu(x: torch.Tensor) -> bool:
    """Whether x is what the fused CPU ops compute with: anything else is converted before and after."""
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
    return plain and x.is_contiguous(memory_format=torch.channels_last)


@torch.jit.unused
def fused_on_cpu(x: torch.Tensor) -> bool:
    """Whether the fused CPU ops take x as it is; then `batch_norm_relu` and `step_norm_relu` save passes."""
    if not isinstance(x, torch.Tensor) or x.device.type != 'cpu' or _leaves() or _transformed():
        return False
    if not native_on_cpu(x):
        return False
    return fused_step('conv_lstm', x) is not None


def batch_norm_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ReLU(BN(x)) in training mode; and the mean and (biased) variance of x, (N,), without gradients."""
    if fused_on_cpu(x):
        from . import fused

        return fused.batch_norm_relu(x, weight, bias, eps)
    return reference.batch_norm_relu(x, weight, bias, eps)


def step_batch_norm_relu(
    step: Callable[..., State],
    tensors: Sequence[Optional[torch.Tensor]],
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor]:
    """A step of its five tensors, then `batch_norm_relu` of h', for what `fused_on_cpu` takes.

    Returns:
        ReLU(BN(h')), c', and the mean and (biased) variance of h', (N,), without gradients.
    """
    from . import fused

    return fused.NORMED_STEPS[step.__name__.removesuffix('_step')](*tensors, weight, bias, eps)  # type: ignore[return-value]


def step_batch_norm_fuse(
    step: Callable[..., State],
    tensors: Sequence[Optional[torch.Tensor]],
    norm: Tuple[torch.Tensor, torch.Tensor, float],
    main: torch.Tensor,
    fuse_weight: torch.Tensor,
    fuse_norm: Tuple[torch.Tensor, torch.Tensor, float],
) -> Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`step_batch_norm_relu`, then `batch_norm_relu` of fuse_weight [main, h], a 1x1 convolution.

    Args:
        step: The cell's.
        tensors: x, h, c, weight and bias of the step.
        norm, fuse_norm: Weight (N,), bias (N,) and epsilon of a batch norm.
        main: Features (B, N, H, W).
        fuse_weight: (N, 2 N).

    Returns:
        What `step_batch_norm_relu` does; the features (B, N, H, W), and mean and (biased) variance before their norm.
    """
    from . import fused

    step_norm_fuse = fused.NORMED_STEPS[step.__name__.removesuffix('_step')]
    return step_norm_fuse(*tensors, *norm, main, fuse_weight, *fuse_norm)  # type: ignore[return-value]


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
    fused = fused_step(step.__name__.removesuffix('_step'), x, h, c, weight, bias, scale, shift)
    if fused is not None:
        return fused(x, h, c, weight, bias, scale, shift)
    h, c = step(x, h, c, weight, bias)
    return reference.affine_relu(h, scale, shift), c


def step_norm_fuse(
    step: Callable[..., State],
    tensors: Sequence[Optional[torch.Tensor]],
    main: torch.Tensor,
    fuse_weight: torch.Tensor,
    fuse_bias: torch.Tensor,
) -> Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor]:
    """`step_norm_relu` of its seven tensors, and ReLU(fuse_weight [main, h'] + fuse_bias).

    For what `fused_on_cpu` takes, without gradients; main is (B, N, H, W), fuse_weight (N, 2 N).
    """
    from . import fused

    return fused.FUSING_STEPS[step.__name__.removesuffix('_step')](*tensors, main, fuse_weight, fuse_bias)


def conv_rnn_step(
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """h' = tanh(gate_h(x, h)). c passes through untouched."""
    if not torch.jit.is_scripting():
        fused = fused_step('conv_rnn', x, h, c, weight, bias)
        if fused is not None:
            return fused(x, h, c, weight, bias)
    elif x.numel() == 0:
        return _nothing(False, x, h, c, weight, bias)
    return reference.conv_rnn_step(x, h, c, weight, bias)


def conv_gru_step(
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """h' = (1 - z) ⊙ h + z ⊙ tanh(gate_n(x, r ⊙ h)), gates in the order z, r, n. c passes through untouched."""
    if not torch.jit.is_scripting():
        fused = fused_step('conv_gru', x, h, c, weight, bias)
        if fused is not None:
            return fused(x, h, c, weight, bias)
    elif x.numel() == 0:
        return _nothing(False, x, h, c, weight, bias)
    return reference.conv_gru_step(x, h, c, weight, bias)


def conv_lstm_step(
    x: torch.Tensor,
    h: Optional[torch.Tensor],
    c: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """c' = f ⊙ c + i ⊙ g and h' = o ⊙ tanh(c'), gates in the order i, f, o, g."""
    if not torch.jit.is_scripting():
        fused = fused_step('conv_lstm', x, h, c, weight, bias)
        if fused is not None:
            return fused(x, h, c, weight, bias)
    elif x.numel() == 0:
        return _nothing(True, x, h, c, weight, bias)
    return reference.conv_lstm_step(x, h, c, weight, bias)
