"""What regulated blocks are made of: norm and activation, and the fuse convolution, each fast where that is the same.

A block's modules stay timm's and torch's own (`bn_h`, `act_h`, `conv_fuse`, ...): tools that convert, hook, prune or
replace modules find what they know. Where nothing listens to them, several may be computed at once; `listened` is the
one predicate for that, `ops.fused_on_cpu` the one for the tensors.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, get_act_layer, get_attn, get_norm_layer

from . import ops
from .conv_rnn import RegulatorCell

__all__ = [
    *('SampledConv2d', 'batch_norm_in_op', 'check_layers', 'fuse', 'fuse_in_norm_step', 'fuse_in_step', 'fuse_kernel'),
    *('is_step', 'listened', 'norm_act', 'norm_in_step', 'sample_first', 'scale_and_shift', 'step_norm_act'),
    'step_norm_fuse',
]

WIDEST = 128  # channels for which a step goes on to the fuse convolution


class SampledConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride that takes its samples first: the same function, through another kernel.

    oneDNN's backward pass for the weight of a strided 1x1 convolution writes beyond a buffer's end on AVX-512 where
    there are fewer than 16 input channels in channels_last (seen with torch 2.14; `tests/test_memory.py` guards it).
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        down, right = self.stride
        return F.conv2d(input[:, :, ::down, ::right], weight, bias, groups=self.groups)


def sample_first(net: nn.Module) -> None:
    """Turn the strided 1x1 convolutions of a net that could meet that fault into SampledConv2d, in place."""
    for conv in net.modules():
        if type(conv) is not nn.Conv2d or conv.padding not in ((0, 0), 'valid'):
            continue
        if conv.kernel_size == (1, 1) and conv.stride != (1, 1) and conv.in_channels % 16:
            conv.__class__ = SampledConv2d


def listened(*modules: nn.Module) -> bool:
    """Whether a hook, or a forward that is not of its class, would notice that a module is not called itself."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    hooks = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
    return hooks or any('forward' in m.__dict__ for m in modules)


def is_step(cell: nn.Module) -> bool:
    """Whether calling a regulator is calling its `step` with its `kernel`, and nothing else."""
    return type(cell).forward is RegulatorCell.forward and not listened(cell)


def is_pointwise(conv: Any) -> bool:
    """Whether a convolution is a plain 1x1 one, of all channels at every pixel."""
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.groups) == ((1, 1), (1, 1), 1)
        and conv.padding in ((0, 0), 'valid', 'same')
    )


def is_batch_norm_relu(norm: nn.Module, act: nn.Module) -> bool:
    """Whether the two compute ReLU(BN(x)) with weights and statistics of their own."""
    return (
        type(norm) is nn.BatchNorm2d
        and type(act) is nn.ReLU
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
    )


def norm_act(norm: Any, act: nn.Module, x: torch.Tensor, between: Optional[nn.Module] = None) -> torch.Tensor:
    """act(between(norm(x))); a batch norm and ReLU that are trained are one op where that saves passes over memory.

    Left to itself: a graph that torch.compile fuses, and a single value per channel, which torch refuses.

    Args:
        norm: The norm.
        act: The activation.
        x: Features (B, C, H, W).
        between: timm's drop block, an identity unless it drops.
    """
    called = between is not None and (type(between) is not nn.Identity or listened(between))
    if called or not batch_norm_in_op(x, norm, act):
        x = norm(x)
        return act(x if between is None else between(x))
    x, mean, var = ops.batch_norm_relu(x, norm.weight, norm.bias, norm.eps)
    track(norm, mean, var, x)
    return x


def batch_norm_in_op(x: torch.Tensor, norm: Any, act: nn.Module) -> bool:
    """Whether a batch norm that is trained and ReLU, on features like x, can be part of an op."""
    return (
        norm.training
        and not torch.compiler.is_compiling()
        and is_batch_norm_relu(norm, act)
        and ops.fused_on_cpu(x)
        and x.numel() > x.shape[1]
        and not listened(norm, act)
    )


def track(norm: Any, mean: torch.Tensor, var: torch.Tensor, x: torch.Tensor) -> None:
    """Move a batch norm's statistics by the mean and (biased) variance of features (B, C, H, W)."""
    values = x.numel() // x.shape[1]
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (values / (values - 1)), norm.momentum)


def step_norm_act(
    cell: Any, norm: Any, *tensors: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """A step and ReLU(BN(h')) in training mode as one op, where `is_step` and `batch_norm_in_op` allow it.

    Args:
        cell: The regulator.
        norm: The norm of h.
        tensors: x, h, c, and the folded kernel's weight and bias.

    Returns:
        ReLU(BN(h')) and c'.
    """
    h, c, mean, var = ops.step_batch_norm_relu(cell.step, tensors, norm.weight, norm.bias, norm.eps)
    track(norm, mean, var, h)
    return h, c


def step_norm_fuse(
    cell: Any, norm: Any, main: torch.Tensor, conv: Any, fuse_norm: Any, *tensors: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor]:
    """`step_norm_act`, the fuse convolution, its norm and ReLU as one op, where `fuse_in_norm_step` allows it.

    Args:
        cell, norm: As there.
        main: Features (B, N, H, W).
        conv, fuse_norm: The fuse convolution and its norm.
        tensors: As there.

    Returns:
        ReLU(BN(h')), c', and the features (B, N, H, W).
    """
    first, second = ((n.weight, n.bias, n.eps) for n in (norm, fuse_norm))
    h, c, mean, var, y, fuse_mean, fuse_var = ops.step_batch_norm_fuse(
        cell.step, tensors, first, main, conv.weight.flatten(1), second
    )
    track(norm, mean, var, h)
    track(fuse_norm, fuse_mean, fuse_var, y)
    return h, c, y


def no_grad_on_cpu(x: torch.Tensor) -> bool:
    """Whether x is computed with on the CPU in float32 and channels_last, for no gradient and no compiler."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and ops.fused_on_cpu(x)


def norm_in_step(cell: nn.Module, norm: nn.Module, act: nn.Module, x: torch.Tensor) -> bool:
    """Whether a regulator's step on x can do the work of the norm and activation behind it too: eval, no gradients.

    Under torch.compile as well, which fuses nothing into the step.
    """
    fusable = not norm.training and is_batch_norm_relu(norm, act) and not torch.is_grad_enabled()
    return fusable and ops.fused_on_cpu(x) and is_step(cell) and not listened(norm, act)


def step_reaches(conv: Any, x: torch.Tensor, main: torch.Tensor) -> bool:
    """Whether an op of a step on x can go on to the fuse convolution of [main, h].

    Beyond a width of WIDEST torch's matrix products are faster.
    """
    return (
        is_pointwise(conv)
        and conv.in_channels == 2 * conv.out_channels <= 2 * WIDEST
        and main.shape == x.shape
        and x.numel() > 0
        and ops.native_on_cpu(main)
        and not listened(conv)
    )


def fuse_in_step(conv: Any, norm: nn.Module, act: nn.Module, x: torch.Tensor, main: torch.Tensor) -> bool:
    """Whether a step that `norm_in_step` allowed can go on to the fuse convolution of [main, h], its norm and ReLU."""
    plain = is_batch_norm_relu(norm, act) and not norm.training or type(norm) is nn.Identity and type(act) is nn.ReLU
    return plain and step_reaches(conv, x, main) and not listened(norm, act)


def fuse_in_norm_step(conv: Any, norm: nn.Module, act: nn.Module, x: torch.Tensor, main: torch.Tensor) -> bool:
    """Whether `step_norm_act` can go on to the fuse convolution of [main, h], its norm and ReLU: in training too."""
    return batch_norm_in_op(main, norm, act) and conv.bias is None and step_reaches(conv, x, main)


def fuse_kernel(conv: Any, norm: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """A 1x1 convolution and the batch norm behind it in eval mode, or an identity: weight (C, C') and bias (C,)."""
    weight, bias = conv.weight.flatten(1), conv.bias
    if type(norm) is nn.Identity:
        return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias
    scale, shift = scale_and_shift(norm)
    return weight * scale[:, None], shift if bias is None else torch.addcmul(shift, bias, scale)


def scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch norm in eval mode does to each channel: a factor and a summand (C,)."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)


def fuse(conv: Any, x: torch.Tensor, h: torch.Tensor, normed: bool = False) -> torch.Tensor:
    """The fuse convolution, 1x1 over [x, h], without writing [x, h] to memory where nobody asks for it.

    Args:
        conv: The convolution, (C + N) channels to C; whatever took its place is called with the concatenation.
        x: Features (B, C, H, W).
        h: State (B, N, H, W).
        normed: h is of a step that `norm_in_step` allowed, without gradients.

    Returns:
        Features (B, C, H, W).
    """
    if not is_pointwise(conv) or not isinstance(x, torch.Tensor) or listened(conv):  # a proxy of torch.fx is none
        return conv(torch.cat((x, h), 1))
    width = x.shape[1]
    fast = ops.native_on_cpu(x) if normed else no_grad_on_cpu(x)
    if not fast or not h.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, conv.weight[:, :width], conv.bias).add_(F.conv2d(h, conv.weight[:, width:]))
    # channels_last: matrix products, of which the second adds to the first's result in place; torch.compile adds later
    weight = conv.weight.flatten(1)
    out, state = F.linear(x.permute(0, 2, 3, 1), weight[:, :width], conv.bias), h.permute(0, 2, 3, 1)
    if torch.compiler.is_compiling():
        out = out + F.linear(state, weight[:, width:])
    else:
        out.view(-1, weight.shape[0]).addmm_(state.reshape(-1, h.shape[1]), weight[:, width:].t())
    return out.permute(0, 3, 1, 2)


def check_layers(act_layer: Any, norm_layer: Any, global_pool: str, kwargs: Dict[str, Any]) -> None:
    """Refuse names that timm's factories do not know, which they say by many kinds of errors."""
    attention = (kwargs.get('block_args') or {}).get('attn_layer')
    made: List[Tuple[str, Any, Callable[[Any], Any]]] = [
        ('act_layer', act_layer, get_act_layer),
        ('norm_layer', norm_layer, lambda name: get_norm_layer(name)(8)),
        ('global_pool', global_pool, lambda name: SelectAdaptivePool2d(pool_type=name)),
        ('aa_layer', kwargs.get('aa_layer'), lambda name: None),  # its ResNet takes classes alone
        ('attn_layer', attention, get_attn),
    ]
    for argument, value, make in made:
        try:
            found = not isinstance(value, str) or make(value) is not None or value in ('', 'none')
        except Exception:
            found = False
        if not found:
            raise ValueError(f'{argument}: timm has no {value!r}; give a name it knows, or a class.')
