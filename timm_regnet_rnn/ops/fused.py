"""The fused steps as ops of torch's library `timm_regnet_rnn`, one per cell, whatever the device.

An op has one schema, one fake kernel and one formula for autograd, a step one rule for autocast; kernels are those of
fused_cpu.py and fused_cuda.py, imported (and the first one compiled) when the first tensor of their device arrives.
Forward saves its inputs only, and backward computes the gates again. A backward pass that is differentiated itself
(`create_graph=True`) goes through the reference, which torch can differentiate as often as it likes.

Shapes are those of the package's docstring.
"""

import importlib
import math
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from . import reference

__all__ = ['FUSING_STEPS', 'NORMED_STEPS', 'STEPS', 'batch_norm_relu', 'unavailable']

KERNELS = {'cpu': 'fused_cpu', 'cuda': 'fused_cuda'}  # device type -> module of this package
GATES = {'conv_rnn': 1, 'conv_gru': 3, 'conv_lstm': 4}
Maybe = Optional[Tensor]
_modules: Dict[str, Any] = {}


def kernels(device: str) -> Any:
    """The module with the kernels of a type of device."""
    if device not in _modules:  # a step asks several times
        _modules[device] = importlib.import_module(f'.{KERNELS[device]}', __package__)
    return _modules[device]


@torch.compiler.assume_constant_result
def unavailable(device: str) -> str:
    """Why there are no kernels for a type of device, '' if there are."""
    return (
        kernels(device).unavailable() if device in KERNELS else f'the fused ops are for the CPU and CUDA, not {device}'
    )


@torch.compiler.assume_constant_result
def converts(device: str) -> bool:
    """Whether the kernels of a type of device take float32 in channels_last alone."""
    return kernels(device).CONVERTS


def check(cell: str, x: Tensor, h: Maybe, c: Maybe, weight: Tensor, bias: Tensor, lanes: int = 1) -> None:
    """Refuse what a kernel, which only sees addresses, would read wrongly.

    Args:
        lanes: What the number of channels must be a multiple of.

    Raises:
        ValueError: Shapes or devices do not fit each other.
    """
    gates, n = GATES[cell], x.shape[1] if x.ndim == 4 else 0
    states = all(state is None or state.shape == x.shape for state in (h, c))
    if not (n and n % lanes == 0 and states and weight.shape == (gates, n, 2, 3, 3) and bias.shape == (gates, n)):
        shapes = ', '.join('None' if t is None else str(tuple(t.shape)) for t in (x, h, c, weight, bias))
        multiple = f'N a multiple of {lanes}, ' if lanes > 1 else ''
        raise ValueError(
            f'x, h, c must be (B, N, H, W), {multiple}weight ({gates}, N, 2, 3, 3), bias ({gates}, N); got {shapes}.'
        )
    check_devices(x, h, c, weight, bias)


def check_maps(x: Tensor, *maps: Maybe) -> None:
    """Raise ValueError unless the maps, where given, are of x's shape, and on its device."""
    for t in maps:
        if t is not None and t.shape != x.shape:
            raise ValueError(f'what belongs to x {tuple(x.shape)} must be of its shape, got {tuple(t.shape)}.')
    check_devices(x, *maps)


def check_devices(*tensors: Maybe) -> None:
    """Raise ValueError unless all tensors are on one device."""
    devices = sorted({str(t.device) for t in tensors if t is not None})
    if len(devices) > 1:
        raise ValueError(f'expected all tensors to be on one device, but found {" and ".join(devices)}.')


def through_reference(
    function: Callable[..., Sequence[Maybe]], tensors: Sequence[Maybe], grads: Sequence[Maybe]
) -> List[Maybe]:
    """Gradients of an op's inputs by the reference; they can be differentiated where the inputs can.

    Of each input's own use alone: that h came of the same weight, and x of h, is for autograd to follow, not for an op.
    In the inputs' types, as the op computed: a backward pass may run under autocast where the forward pass did not.

    Args:
        function: The op in plain PyTorch, inputs to outputs.
        tensors: The inputs, of which the first is there.
        grads: Of the outputs, None for zero.
    """
    x: Any = tensors[0]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        inputs = [t if t is None or not t.requires_grad else t.view_as(t) for t in tensors]
        outs = function(*inputs)
        pairs = [(o, g) for o, g in zip(outs, grads) if o is not None and g is not None and o.requires_grad]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        if not pairs or not wanted:
            return [None] * len(inputs)
        used, seeds = zip(*pairs)
        found = iter(torch.autograd.grad(used, wanted, seeds, create_graph=True, allow_unused=True))
        return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _flops(gates: int, passes: int, x: Sequence[int], *_: Any, **__: Any) -> int:
    """Floating point operations of a step: a gate is the paper's two convolutions, 2 + 9 multiply-adds per element."""
    return 2 * 11 * gates * passes * math.prod(x)


def _register(cell: str) -> Callable[..., Tuple[Tensor, Maybe]]:
    """The ops `{cell}` and `{cell}_backward`, and the step that calls them."""
    has_c = cell == 'conv_lstm'

    def plain(x, h, c, weight, bias, scale, shift):
        out, state = getattr(reference, f'{cell}_step')(x, h, c, weight.to(x.dtype), bias.to(x.dtype))
        return reference.affine_relu(out, scale, shift), state

    def forward(
        x: Tensor,
        h: Optional[Tensor],
        c: Optional[Tensor],
        weight: Tensor,
        bias: Tensor,
        scale: Optional[Tensor],
        shift: Optional[Tensor],
    ) -> List[Tensor]:
        return kernels(x.device.type).forward(cell, x, h, c, weight, bias, scale, shift)

    def backward(
        x: Tensor,
        h: Optional[Tensor],
        c: Optional[Tensor],
        weight: Tensor,
        bias: Tensor,
        dh_out: Optional[Tensor],
        dc_out: Optional[Tensor],
    ) -> List[Tensor]:
        return kernels(x.device.type).backward(cell, x, h, c, weight, bias, dh_out, dc_out)

    devices = tuple(KERNELS)
    op = library.custom_op(f'timm_regnet_rnn::{cell}', forward, mutates_args=(), device_types=devices)
    op_backward = library.custom_op(
        f'timm_regnet_rnn::{cell}_backward', backward, mutates_args=(), device_types=devices
    )

    @op.register_fake
    def _(x, h, c, weight, bias, scale, shift):
        check_devices(x, h, c, weight, bias, scale, shift)
        return [kernels(x.device.type).empty(x) for _ in range(1 + has_c)]

    @op_backward.register_fake
    def _(x, h, c, weight, bias, dh_out, dc_out):
        check_devices(x, h, c, weight, bias, dh_out, dc_out)
        empty = kernels(x.device.type).empty
        states = [empty(x) for state in (h, c) if state is not None]
        return [empty(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape), *states]

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    def differentiate(ctx, grads):
        tensors = x, h, c, weight, bias, scale, shift = ctx.saved_tensors  # a checkpoint gives them once
        dh_out, dc_out, dscale, dshift = grads[0], grads[1] if has_c else None, None, None
        if torch.is_grad_enabled():  # this pass is to be differentiated in its turn
            return tuple(through_reference(plain, tensors, (dh_out, dc_out)))
        if scale is not None and dh_out is not None:  # rare, so h' is computed again rather than kept
            raw = op(x, h, c, weight, bias, None, None)[0]
            dh_out = dh_out * (raw * scale[:, None, None] + shift[:, None, None] > 0)
            dscale, dshift = (dh_out * raw).sum((0, 2, 3)), dh_out.sum((0, 2, 3))
            dh_out = dh_out * scale[:, None, None]
        dx, dweight, dbias, *states = op_backward(x, h, c, weight, bias, dh_out, dc_out)
        dh = None if h is None else states.pop(0)
        return dx, dh, None if c is None else states.pop(0), dweight, dbias, dscale, dshift

    op.register_autograd(differentiate, setup_context=setup_context)
    packets = (getattr(torch.ops.timm_regnet_rnn, name) for name in (cell, f'{cell}_backward'))
    for packet, passes in zip(packets, (1, 2)):  # backward: the gradients of the inputs, and of the kernel
        register_flop_formula(packet)(partial(_flops, GATES[cell], passes))

    def step(x, h, c, weight, bias, scale=None, shift=None):
        """On the CPU bfloat16 and NCHW are converted, which is little work beside the step; c' is channels_last then.

        Under autocast x, h and c are cast to its type; on the CPU h' is, and the step itself is in float32.
        """
        device, state = x.device.type, c if has_c else None
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if not converts(device):
            if autocast:
                x, h, state = (None if t is None else t.to(dtype) for t in (x, h, state))
            outs = op(x, h, state, weight, bias, scale, shift)
            return outs[0], outs[1] if has_c else c
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        if dtype != torch.float32:
            tensors = (x, h, state, weight, bias, scale, shift)
            x, h, state, weight, bias, scale, shift = (None if t is None else t.float() for t in tensors)
        outs = [out.to(dtype) for out in op(x, h, state, weight, bias, scale, shift)]
        return outs[0].contiguous(memory_format=layout), outs[1] if has_c else c

    return step


STEPS: Dict[str, Callable[..., Tuple[Tensor, Maybe]]] = {cell: _register(cell) for cell in GATES}


def _register_fusing(cell: str) -> Callable[..., Tuple[Tensor, Maybe, Tensor]]:
    """The op `{cell}_fuse`, for inference on the CPU: a step, its norm, and the fuse convolution with norm and ReLU.

    It writes to tensors that it is given, for which torch.compile finds room that is free again.
    """
    has_c = cell == 'conv_lstm'

    def forward(
        x: Tensor,
        h: Optional[Tensor],
        c: Optional[Tensor],
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        main: Optional[Tensor],
        fuse_weight: Tensor,
        fuse_bias: Tensor,
        y: Tensor,
        h_out: Tensor,
        c_out: Optional[Tensor],
    ) -> None:
        tensors, outs = (x, h, c, weight, bias, scale, shift), [h_out] if c_out is None else [h_out, c_out]
        kernels('cpu').forward_fuse(cell, tensors, x if main is None else main, fuse_weight, fuse_bias, y, outs)

    written = ('y', 'h_out', 'c_out')
    op = library.custom_op(f'timm_regnet_rnn::{cell}_fuse', forward, mutates_args=written, device_types='cpu')

    @op.register_fake
    def _(*tensors):
        check_devices(*tensors)

    @register_flop_formula(getattr(torch.ops.timm_regnet_rnn, f'{cell}_fuse'))
    def _(x, *_: Any, **__: Any) -> int:
        return _flops(GATES[cell], 1, x) + 4 * x[1] * math.prod(x)

    def step(x, h, c, weight, bias, scale, shift, main, fuse_weight, fuse_bias):
        main = None if main is x else main  # torch.compile makes a copy of a tensor that is there twice
        y, h_out, *outs = (torch.empty_like(x) for _ in range(2 + has_c))  # inductor fills those of another layout
        c_in, c_out = (c, outs[0]) if has_c else (None, None)
        op(x, h, c_in, weight, bias, scale, shift, main, fuse_weight, fuse_bias, y, h_out, c_out)
        return h_out, c_out if has_c else c, y

    return step


FUSING_STEPS: Dict[str, Callable[..., Tuple[Tensor, Maybe, Tensor]]] = {cell: _register_fusing(cell) for cell in GATES}


@library.custom_op('timm_regnet_rnn::batch_norm_relu', mutates_args=(), device_types='cpu')
def _batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    return kernels('cpu').batch_norm_relu(x, weight, bias, eps)


@library.custom_op('timm_regnet_rnn::batch_norm_relu_backward', mutates_args=(), device_types='cpu')
def _batch_norm_relu_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor, var: Tensor, dy: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    return kernels('cpu').batch_norm_relu_backward(x, weight, bias, eps, mean, var, dy)


@_batch_norm_relu.register_fake
def _(x, weight, bias, eps):
    check_devices(x, weight, bias)
    return kernels('cpu').empty(x), torch.empty_like(weight), torch.empty_like(weight)


@_batch_norm_relu_backward.register_fake
def _(x, weight, bias, eps, mean, var, dy):
    check_devices(x, weight, bias, mean, var, dy)
    return kernels('cpu').empty(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup_norm(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _differentiate_norm(ctx, dy, _, __):
    x, weight, bias, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():  # this pass is to be differentiated in its turn
        return *through_reference(partial(reference.batch_norm_relu, eps=ctx.eps), (x, weight, bias), (dy,)), None
    return *_batch_norm_relu_backward(x, weight, bias, ctx.eps, mean, var, dy), None


_batch_norm_relu.register_autograd(_differentiate_norm, setup_context=_setup_norm)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    """ReLU(BN(x)) in training mode, and the mean and (biased) variance of x, (N,), without gradients."""
    return _batch_norm_relu(x, weight, bias, eps)


@library.custom_op('timm_regnet_rnn::fuse_norm_backward', mutates_args=(), device_types='cpu')
def _fuse_norm_backward(
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
    return kernels('cpu').fuse_norm_backward(main, h, fuse_weight, weight, bias, eps, y, mean, var, dout, more)


@_fuse_norm_backward.register_fake
def _(main, h, fuse_weight, weight, bias, eps, y, mean, var, dout, more):
    check_devices(main, h, fuse_weight, weight, bias, y, mean, var, dout, more)
    empty = kernels('cpu').empty
    return empty(h), empty(h), *(t.new_empty(t.shape) for t in (fuse_weight, weight, bias))


@register_flop_formula(torch.ops.timm_regnet_rnn.fuse_norm_backward)
def _(main: Sequence[int], *_: Any, **__: Any) -> int:
    return 8 * main[1] * math.prod(main)


def _register_normed(cell: str) -> Callable[..., Tuple[Tensor, ...]]:
    """The ops `{cell}_norm` and `{cell}_norm_backward`, for training on the CPU: a step and its norm in training mode.

    The first returns h = ReLU(BN(h')), and h', its mean and variance for backward, and c'. Given the fuse convolution's
    weight and what its norm needs it goes on, and also returns ReLU(BN(fuse_weight [main, h])), and, for backward, that
    convolution, its mean and variance; without main the features are x. So both gradients of h, and of x, are summed as
    they are made.
    """
    has_c = cell == 'conv_lstm'
    count = 4 + has_c  # outputs of the step and its norm

    def forward(
        x: Tensor,
        h: Optional[Tensor],
        c: Optional[Tensor],
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        main: Optional[Tensor],
        fuse_weight: Optional[Tensor],
        fuse_norm_weight: Optional[Tensor],
        fuse_norm_bias: Optional[Tensor],
        fuse_eps: float,
    ) -> List[Tensor]:
        module, tensors = kernels('cpu'), (x, h, c, weight, bias, norm_weight, norm_bias)
        outs = module.forward_norm(cell, tensors, eps)
        if fuse_weight is not None:
            features = x if main is None else main
            outs += module.fuse_norm(features, outs[0], fuse_weight, fuse_norm_weight, fuse_norm_bias, fuse_eps)
        return outs

    def backward(
        x: Tensor,
        h: Optional[Tensor],
        c: Optional[Tensor],
        weight: Tensor,
        bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        raw: Tensor,
        mean: Tensor,
        var: Tensor,
        dy: Tensor,
        dc_out: Optional[Tensor],
        more: Optional[Tensor],
    ) -> List[Tensor]:
        tensors = x, h, c, weight, bias, norm_weight, norm_bias
        return kernels('cpu').backward_norm(cell, tensors, eps, raw, mean, var, dy, dc_out, more)

    name = f'timm_regnet_rnn::{cell}_norm'
    op = library.custom_op(name, forward, mutates_args=(), device_types='cpu')
    op_backward = library.custom_op(f'{name}_backward', backward, mutates_args=(), device_types='cpu')

    @op.register_fake
    def _(x, h, c, weight, bias, norm_weight, norm_bias, eps, main, fuse_weight, *fuse_norm):
        check_devices(x, h, c, weight, bias, norm_weight, norm_bias, main, fuse_weight, *fuse_norm[:2])
        y, raw, *outs = (kernels('cpu').empty(x) for _ in range(2 + has_c))
        statistics = torch.empty_like(norm_weight), torch.empty_like(norm_weight)
        outs = [y, raw, *statistics, *outs]
        if fuse_weight is not None:
            outs += [torch.empty_like(t) for t in (y, raw, *statistics)]
        return outs

    @op_backward.register_fake
    def _(x, h, c, weight, bias, norm_weight, norm_bias, eps, raw, mean, var, dy, dc_out, more):
        check_devices(x, h, c, weight, bias, norm_weight, norm_bias, raw, mean, var, dy, dc_out, more)
        dx, *states = (kernels('cpu').empty(t) for t in (x, h, c) if t is not None)
        return [dx, *(torch.empty_like(t) for t in (weight, bias, norm_weight, norm_bias)), *states]

    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps, main, fuse_weight, fuse_norm_weight, fuse_norm_bias, ctx.fuse_eps = inputs
        ctx.set_materialize_grads(False)
        kept = [*output[1:4], *output[count + 1 :]]
        ctx.mark_non_differentiable(*kept)
        h = None if fuse_weight is None else output[0]
        ctx.save_for_backward(*tensors, main, fuse_weight, fuse_norm_weight, fuse_norm_bias, h, *kept)

    def plain(eps, fuse_eps, *tensors):
        x, h, c, weight, bias, norm_weight, norm_bias, main, fuse_weight, fuse_norm_weight, fuse_norm_bias = tensors
        out, state = getattr(reference, f'{cell}_step')(x, h, c, weight, bias)
        out, features = reference.batch_norm_relu(out, norm_weight, norm_bias, eps)[0], None
        if fuse_weight is not None:
            features = reference.fuse(x if main is None else main, out, fuse_weight)
            features = reference.batch_norm_relu(features, fuse_norm_weight, fuse_norm_bias, fuse_eps)[0]
        return out, state, features

    def differentiate(ctx, grads):
        saved = ctx.saved_tensors
        (*tensors, h_out, raw, mean, var), fused_maps = saved[:15], saved[15:]
        dh_out, dc_out, dfused = grads[0], grads[4] if has_c else None, grads[count] if fused_maps else None
        if torch.is_grad_enabled():
            found = through_reference(partial(plain, ctx.eps, ctx.fuse_eps), tensors, (dh_out, dc_out, dfused))
            return *found[:7], None, *found[7:], None
        step, (main, *fuse) = tensors[:7], tensors[7:]
        dmain, dfuse = None, [None] * 3
        if dfused is not None:
            features = step[0] if main is None else main
            dmain, dh_out, *dfuse = _fuse_norm_backward(
                features, h_out, *fuse, ctx.fuse_eps, *fused_maps, dfused, dh_out
            )
        dh_out = torch.zeros_like(raw) if dh_out is None else dh_out
        more = dmain if main is None else None
        dx, dweight, dbias, *others = op_backward(*step, ctx.eps, raw, mean, var, dh_out, dc_out, more)
        norm_grads, states = others[:2], others[2:]
        dh, dc = (None if t is None else states.pop(0) for t in step[1:3])
        return dx, dh, dc, dweight, dbias, *norm_grads, None, None if main is None else dmain, *dfuse, None

    op.register_autograd(differentiate, setup_context=setup_context)

    @register_flop_formula(getattr(torch.ops.timm_regnet_rnn, f'{cell}_norm'))
    def _(x, *tensors: Any, **__: Any) -> int:
        fuses = tensors[8] is not None
        return _flops(GATES[cell], 1, x) + 4 * fuses * x[1] * math.prod(x)

    packet = getattr(torch.ops.timm_regnet_rnn, f'{cell}_norm_backward')
    register_flop_formula(packet)(partial(_flops, GATES[cell], 2))

    def step(x, h, c, weight, bias, norm_weight, norm_bias, eps, main=None, *fuse):
        """h, c', mean and variance; with main and what the op takes after it also features, and mean and variance."""
        main, after = None if main is x else main, fuse or (None, None, None, 0.0)
        outs = op(x, h, c if has_c else None, weight, bias, norm_weight, norm_bias, eps, main, *after)
        h_out, _, mean, var = outs[:4]
        found = (h_out, outs[4] if has_c else c, mean, var)
        return found if not fuse else (*found, outs[count], *outs[count + 2 :])

    return step


NORMED_STEPS: Dict[str, Callable[..., Tuple[Tensor, ...]]] = {cell: _register_normed(cell) for cell in GATES}
