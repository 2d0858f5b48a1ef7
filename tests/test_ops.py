"""Every fused op against the reference, in float64, where it is chosen and where it is not."""

import copy
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from conftest import randomize, scaled_error
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import Adahessian
from torch import library as torch_library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from timm_regnet_rnn import ops
from timm_regnet_rnn.complexity import complexity
from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.ops import fused, reference

CL = torch.channels_last
NAMES = {'conv_rnn': 1, 'conv_gru': 3, 'conv_lstm': 4}
needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='the fused CPU op is compiled by g++')


@pytest.fixture(autouse=True)
def rule():
    """Each test starts with the rule itself, whatever the environment says."""
    before = ops.chosen_ops()
    ops.set_ops('')
    yield
    ops.set_ops(before)


@pytest.fixture
def threads(request):
    """As many of torch's threads as the parameter says, for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(name, shape, state, layout=CL, seed=0):
    """x, h, c, weight and bias, with gradients; without a state h and c are None."""
    torch.manual_seed(seed)
    gates, (_, n, *_) = NAMES[name], shape
    tensors = [torch.randn(shape).contiguous(memory_format=layout) for _ in range(3)]
    tensors[1] = tensors[1] if state else None
    tensors[2] = tensors[2] if state and gates == 4 else None
    tensors += [torch.randn(gates, n, 2, 3, 3) / 3, torch.randn(gates, n)]
    return [None if t is None else t.requires_grad_() for t in tensors]


def run(step, tensors, only_h=False):
    """Outputs of a step and the gradients of all its inputs, for a loss that weighs every element otherwise."""
    h, c = step(*tensors)
    loss = sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in ([h] if only_h else [h, c]))
    return [h, c], torch.autograd.grad(loss, [t for t in tensors if t is not None])


def specified(name):
    """The reference's step, with the norm that a fused op can end in."""

    def step(x, h, c, weight, bias, scale=None, shift=None):
        h, c = getattr(reference, f'{name}_step')(x, h, c, weight, bias)
        return reference.affine_relu(h, scale, shift), c

    return step


def check(name, tensors, step=None, truth=None):
    """A fused step against the float64 reference; c counts where the cell has one."""
    only_h = NAMES[name] < 4
    twins = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    outs, grads = run(step or fused.STEPS[name], tensors, only_h)
    true_outs, true_grads = run(truth or specified(name), twins, only_h)
    assert len(grads) == len(true_grads)
    for got, want in zip([*outs[: 1 + (not only_h)], *grads], [*true_outs[: 1 + (not only_h)], *true_grads]):
        assert got.shape == want.shape and scaled_error(got.double(), want) < 1e-5


SHAPES = [
    (2, 16, 8, 8),  # as in the last stage of a CIFAR net
    (1, 16, 1, 1),  # all neighbours lie outside
    (3, 48, 5, 9),  # three blocks of channels; rows that no tile fits
    (1, 32, 7, 4),  # rows of exactly one tile
    (2, 16, 1, 13),  # one row
]


@needs_compiler
@pytest.mark.parametrize('state', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', NAMES)
def test_fused_agrees(name, shape, state):
    check(name, inputs(name, shape, state))


@needs_compiler
@given(
    name=st.sampled_from(list(NAMES)),
    shape=st.tuples(st.integers(1, 3), st.sampled_from([16, 32]), st.integers(1, 11), st.integers(1, 11)),
    state=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_fused_agrees_anywhere(name, shape, state, seed):
    check(name, inputs(name, shape, state, seed=seed))


@needs_compiler
@pytest.mark.parametrize('threads', [1, 2, 3], indirect=True)
@pytest.mark.parametrize('name', NAMES)
def test_threads_share_the_gradient_of_the_weight(name, threads):
    """More threads than cores, and than tasks for some."""
    check(name, inputs(name, (2, 16, 4, 6), True))


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_other_layouts_and_views(name):
    tensors = inputs(name, (2, 16, 6, 5), True)
    for i in (1, 2):  # h and c as they come from a slice
        if tensors[i] is not None:
            tensors[i] = torch.stack([tensors[i].detach()] * 2, -1)[..., 0].requires_grad_()
    tensors[3] = tensors[3].detach().permute(1, 0, 2, 3, 4).contiguous().permute(1, 0, 2, 3, 4).requires_grad_()
    check(name, tensors)


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_saturated_gates_stay_finite(name):
    """Pre-activations far beyond where an exponential of a float overflows."""
    tensors = [None if t is None else (t * 1e4).detach().requires_grad_() for t in inputs(name, (1, 16, 4, 4), True)]
    outs, grads = run(fused.STEPS[name], tensors, only_h=NAMES[name] < 4)
    assert all(t.isfinite().all() for t in (outs[0], *grads))
    want, _ = getattr(reference, f'{name}_step')(*(None if t is None else t.double() for t in tensors))
    assert scaled_error(outs[0].double(), want) < 1e-5


@needs_compiler
@pytest.mark.parametrize('state', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_torch_knows_the_op(name, state):
    """Schema, fake kernel, autograd and AOT dispatch, by torch's own check."""
    op = getattr(torch.ops.timm_regnet_rnn, name).default
    torch_library.opcheck(op, (*inputs(name, (2, 16, 3, 5), state), None, None))


@needs_compiler
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', NAMES)
def test_norm_in_the_step(name, shape):
    """scale and shift: outputs and every gradient, by the op's own backward."""
    norm = [torch.randn(shape[1], requires_grad=True) for _ in range(2)]
    check(name, inputs(name, shape, True) + norm)
    with torch.no_grad():
        check_only = [None if t is None else t.detach() for t in inputs(name, shape, False) + norm]
        torch_library.opcheck(getattr(torch.ops.timm_regnet_rnn, name).default, tuple(check_only))


NO_FUSE = None, None, None, None, 0.0  # what the op with batch norm takes where no fuse convolution follows


def normed(step):
    """(x, h, c, weight, bias, norm's weight and bias) -> (ReLU(BN(h')), c'), by the op or by the specification."""
    return lambda *tensors: ops.step_batch_norm_relu(step, tensors[:5], *tensors[5:], 1e-5)[:2]


def specified_norm(name):
    def step(x, h, c, weight, bias, norm_weight, norm_bias):
        h, c = getattr(reference, f'{name}_step')(x, h, c, weight, bias)
        return reference.batch_norm_relu(h, norm_weight, norm_bias, 1e-5)[0], c

    return step


def normed_inputs(name, shape, state, seed=0):
    tensors = inputs(name, shape, state, seed=seed)
    return [*tensors, torch.rand(shape[1]).add(0.5).requires_grad_(), torch.randn(shape[1], requires_grad=True)]


@needs_compiler
@pytest.mark.parametrize('threads', [1, 3], indirect=True)
@pytest.mark.parametrize('shape', [*SHAPES[:1], *SHAPES[2:], (5, 32, 9, 40)])  # the last: rows longer than a chunk
@pytest.mark.parametrize('name', NAMES)
def test_batch_norm_in_the_step(name, shape, threads):
    """Training mode: outputs, statistics and every gradient."""
    step = getattr(ops, f'{name}_step')
    for state in (False, True):
        tensors = normed_inputs(name, shape, state)
        check(name, tensors, normed(step), specified_norm(name))
        _, _, mean, var = ops.step_batch_norm_relu(step, tensors[:5], *tensors[5:], 1e-5)
        assert not mean.requires_grad and not var.requires_grad
        raw, _ = specified(name)(*(None if t is None else t.detach().double() for t in tensors[:5]))
        torch.testing.assert_close(mean.double(), raw.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.double(), raw.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-7)


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_batch_norm_in_the_step_of_other_layouts_numbers_and_uses(name):
    step = getattr(ops, f'{name}_step')
    tensors = normed_inputs(name, (2, 16, 3, 5), True)
    for i in (0, 1):
        strided = [*tensors[:i], tensors[i].detach().contiguous().requires_grad_(), *tensors[i + 1 :]]
        check(name, strided, normed(step), specified_norm(name))
    saturated = [t if t is None else (t * 1e4).detach().requires_grad_() for t in tensors[:5]] + tensors[5:]
    outs, grads = run(normed(step), saturated, NAMES[name] < 4)
    assert all(t.isfinite().all() for t in (outs[0], *grads))
    for i in (0, 1, 3, 5):  # beyond what the kernels take: the separate ops' numbers
        for value in (float('nan'), float('inf'), 1e30):
            far = [t if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
            far[i][(0,) * far[i].ndim] = value
            far = [t if t is None else t.requires_grad_() for t in far]

            def apart(x, h, c, weight, bias, norm_weight, norm_bias):
                h, c = fused.STEPS[name](x, h, c, weight, bias)
                return fused.batch_norm_relu(h, norm_weight, norm_bias, 1e-5)[0], c

            want, got = (run(f, far, NAMES[name] < 4) for f in (apart, normed(step)))
            for a, b in zip([*want[0], *want[1]], [*got[0], *got[1]]):
                if a is not None:
                    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * max(1.0, finite_scale(a)), equal_nan=True)
    if name == 'conv_lstm':  # c' alone is used
        c = [f(*tensors)[1] for f in (normed(step), specified_norm(name))]
        grads = [torch.autograd.grad(t.square().sum(), tensors[:5]) for t in c]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize('state', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_torch_knows_the_op_with_batch_norm(name, state):
    tensors = normed_inputs(name, (2, 16, 3, 5), state)
    torch_library.opcheck(getattr(torch.ops.timm_regnet_rnn, f'{name}_norm').default, (*tensors, 1e-5, *NO_FUSE))
    twins = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    found = []
    for step, taken in ((normed(getattr(ops, f'{name}_step')), tensors), (specified_norm(name), twins)):
        wanted = [t for t in taken if t is not None]
        (grad,) = torch.autograd.grad(step(*taken)[0].square().sum(), taken[0], create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), wanted))
    for ours, theirs in zip(*found):
        assert scaled_error(ours.double(), theirs) < 1e-3


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_wrong_shapes_and_types_of_the_op_with_batch_norm_are_refused(name):
    good = [None if t is None else t.detach() for t in normed_inputs(name, (2, 16, 4, 4), True)]
    op = getattr(torch.ops.timm_regnet_rnn, f'{name}_norm')
    for i in (0, 1, 3, 4, 5, 6):
        for bad in (good[i][..., :1], good[i].double()):
            with torch.no_grad(), pytest.raises(ValueError, match='must be|takes float32'):
                op(*good[:i], bad, *good[i + 1 :], 1e-5, *NO_FUSE)
        with torch.no_grad(), pytest.raises((ValueError, RuntimeError, NotImplementedError), match='device|meta'):
            op(*good[:i], good[i].to('meta'), *good[i + 1 :], 1e-5, *NO_FUSE)
    y, raw, mean, var, *_ = op(*good, 1e-5, *NO_FUSE)
    backward, rest = getattr(torch.ops.timm_regnet_rnn, f'{name}_norm_backward'), [raw, mean, var, y]
    for i in range(4):
        for bad in (rest[i][:1], rest[i].double()):
            with pytest.raises(ValueError, match='must be|takes float32'):
                backward(*good, 1e-5, *rest[:i], bad, *rest[i + 1 :], None, None)


def normed_fuse(step):
    """(a step's tensors, its norm's two, features or None for x, fuse weight, its norm's two) -> (h, c', features)."""

    def run(*tensors):
        first, second, main = (
            (*tensors[5:7], 1e-5),
            (*tensors[9:], 1e-3),
            tensors[0] if tensors[7] is None else tensors[7],
        )
        h, c, *_, y, _, _ = ops.step_batch_norm_fuse(step, tensors[:5], first, main, tensors[8], second)
        return (h, y) if c is tensors[2] else (h, c, y)

    return run


def specified_norm_fuse(name):
    def run(*tensors):
        h, c = specified_norm(name)(*tensors[:7])
        y = reference.fuse(tensors[0] if tensors[7] is None else tensors[7], h, tensors[8])
        y = reference.batch_norm_relu(y, *tensors[9:], 1e-3)[0]
        return (h, y) if c is tensors[2] else (h, c, y)

    return run


def normed_fuse_inputs(name, shape, state, apart):
    main = torch.randn(shape).contiguous(memory_format=CL).requires_grad_() if apart else None
    tensors, n = normed_inputs(name, shape, state), shape[1]
    fuse = [torch.randn(n, 2 * n) / n**0.5, torch.rand(n).add(0.5), torch.randn(n)]
    return [*tensors, main, *(t.requires_grad_() for t in fuse)]


def gradients_of_all(function, tensors, used=slice(None)):
    """Outputs, and the gradients of all inputs for a loss that weighs every element of the `used` ones otherwise."""
    outs = function(*tensors)
    loss = sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outs[used])
    wanted = [t for t in tensors if t is not None]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*outs, *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads))]


def check_norm_fuse(name, tensors, used=slice(None)):
    """Outputs and gradients against the float64 reference."""
    twins = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    got = gradients_of_all(normed_fuse(getattr(ops, f'{name}_step')), tensors, used)
    want = gradients_of_all(specified_norm_fuse(name), twins, used)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want):
        assert ours.shape == theirs.shape
        assert not (ours.any() or theirs.any()) or scaled_error(ours.double(), theirs) < 2e-5


@needs_compiler
@pytest.mark.parametrize('threads', [1, 3], indirect=True)
@pytest.mark.parametrize('shape', [*SHAPES[:1], *SHAPES[2:], (5, 32, 9, 11), (1, 112, 10, 10)])
@pytest.mark.parametrize('name', NAMES)
def test_batch_norm_and_fuse_convolution_in_the_step(name, shape, threads):
    """Training mode: outputs, statistics, every gradient, and those of each output alone."""
    step = getattr(ops, f'{name}_step')
    for apart in (False, True):
        for state in (False, True):
            check_norm_fuse(name, normed_fuse_inputs(name, shape, state, apart))
        tensors = normed_fuse_inputs(name, shape, True, apart)
        for used in range(3 if name == 'conv_lstm' else 2):
            check_norm_fuse(name, tensors, slice(used, used + 1))
        main = tensors[0] if tensors[7] is None else tensors[7]
        outs = ops.step_batch_norm_fuse(
            step, tensors[:5], (*tensors[5:7], 1e-5), main, tensors[8], (*tensors[9:], 1e-3)
        )
        assert not any(t.requires_grad for i, t in enumerate(outs) if i in (2, 3, 5, 6))
        y = reference.fuse(main.double(), outs[0].double(), tensors[8].double())
        torch.testing.assert_close(outs[5].double(), y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outs[6].double(), y.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-7)


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_batch_norm_and_fuse_convolution_of_other_layouts_and_numbers(name):
    tensors = normed_fuse_inputs(name, (2, 16, 3, 5), True, True)
    for i in (0, 1, 7, 8):
        other = tensors[i].detach()
        other = other.t().contiguous().t() if other.ndim == 2 else other.contiguous()
        check_norm_fuse(name, [*tensors[:i], other.requires_grad_(), *tensors[i + 1 :]])

    def apart(x, h, c, weight, bias, norm_weight, norm_bias, main, fuse_weight, *fuse_norm):
        out, state = fused.STEPS[name](x, h, c, weight, bias)
        out = fused.batch_norm_relu(out, norm_weight, norm_bias, 1e-5)[0]
        y = fused.batch_norm_relu(reference.fuse(main, out, fuse_weight), *fuse_norm, 1e-3)[0]
        return (out, y) if state is c else (out, state, y)

    for i in (0, 1, 3, 7, 8, 10):  # beyond what the kernels take: the separate ops' numbers
        for value in (float('nan'), float('inf'), 1e30):
            far = [t if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
            far[i][(0,) * far[i].ndim] = value
            far = [t if t is None else t.requires_grad_() for t in far]
            got, want = (gradients_of_all(f, far) for f in (normed_fuse(getattr(ops, f'{name}_step')), apart))
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, finite_scale(b)), equal_nan=True)


@needs_compiler
@pytest.mark.parametrize('apart', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_torch_knows_the_op_with_batch_norm_and_fuse_convolution(name, apart):
    """And its gradients' gradients."""
    tensors = normed_fuse_inputs(name, (2, 16, 3, 5), True, apart)
    op = getattr(torch.ops.timm_regnet_rnn, f'{name}_norm').default
    torch_library.opcheck(op, (*tensors[:7], 1e-5, *tensors[7:], 1e-3))
    twins = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    found = []
    for f, taken in ((normed_fuse(getattr(ops, f'{name}_step')), tensors), (specified_norm_fuse(name), twins)):
        grads = torch.autograd.grad(f(*taken)[-1].square().sum(), [taken[0], taken[8]], create_graph=True)
        loss = sum(grad.square().sum() for grad in grads)
        found.append(torch.autograd.grad(loss, [t for t in taken if t is not None]))
    for ours, theirs in zip(*found):
        assert scaled_error(ours.double(), theirs) < 1e-3


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_wrong_shapes_and_types_of_the_op_with_batch_norm_and_fuse_convolution_are_refused(name):
    good = [None if t is None else t.detach() for t in normed_fuse_inputs(name, (2, 16, 4, 4), True, True)]
    op = getattr(torch.ops.timm_regnet_rnn, f'{name}_norm')
    for i in range(7, 11):
        for bad in (good[i][:1], good[i][..., :1], good[i].double()):
            changed = [*good[:i], bad, *good[i + 1 :]]
            with torch.no_grad(), pytest.raises(ValueError, match='must be|takes float32'):
                op(*changed[:7], 1e-5, *changed[7:], 1e-3)
    outs = op(*good[:7], 1e-5, *good[7:], 1e-3)
    h, (y, mean, var) = outs[0], outs[-3:]
    backward = torch.ops.timm_regnet_rnn.fuse_norm_backward
    given = [good[7], h, *good[8:], y, mean, var, y, h]
    assert [t.shape for t in backward(*given[:5], 1e-3, *given[5:])] == [t.shape for t in given[:5]]
    for i in range(10):
        for bad in (given[i][:1], given[i].double()):
            changed = [*given[:i], bad, *given[i + 1 :]]
            with pytest.raises(ValueError, match='must be|takes float32'):
                backward(*changed[:5], 1e-3, *changed[5:])
    more = [*good[:7], 1e-5, *outs[1:4], h, None, h[:1]]
    with pytest.raises(ValueError, match='must be'):
        getattr(torch.ops.timm_regnet_rnn, f'{name}_norm_backward')(*more)


def fusing_inputs(name, shape, state, apart=True):
    """What a step with its norm and the fuse convolution takes; the features are x unless apart."""
    tensors = [None if t is None else t.detach() for t in inputs(name, shape, state)]
    n = shape[1]
    main = torch.randn(shape).contiguous(memory_format=CL) if apart else tensors[0]
    return [*tensors, *(torch.randn(n) for _ in range(2)), main, torch.randn(n, 2 * n) / n**0.5, torch.randn(n)]


def check_fusing(name, tensors):
    """The fused op against the float64 reference, whose types and layout it keeps."""
    before = [None if t is None else t.clone() for t in tensors]
    h, c, y = ops.step_norm_fuse(getattr(ops, f'{name}_step'), tensors[:7], *tensors[7:])
    twins = [None if t is None else t.double() for t in tensors]
    true_h, true_c = specified(name)(*twins[:7])
    pairs = [(h, true_h), (y, reference.fuse(twins[7], true_h, *twins[8:]).relu()), (c, true_c)]
    for got, want in pairs[: 2 + (name == 'conv_lstm')]:
        assert got.is_contiguous(memory_format=CL) and got.shape == want.shape
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5, atol=1e-5 * max(1.0, finite_scale(want)), equal_nan=True
        )
    for kept, t in zip(before, tensors):
        assert t is None or torch.equal(kept.nan_to_num(), t.nan_to_num()), 'inputs are only read'


@needs_compiler
@pytest.mark.parametrize('threads', [1, 3], indirect=True)
@pytest.mark.parametrize('shape', [*SHAPES, (5, 32, 9, 11)])  # the last: 99 pixels an image, ranges of 96
@pytest.mark.parametrize('name', NAMES)
def test_fuse_convolution_in_the_step(name, shape, threads):
    for state in (False, True):
        check_fusing(name, fusing_inputs(name, shape, state))
        check_fusing(name, fusing_inputs(name, shape, state, apart=False))


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_fuse_convolution_of_other_layouts_and_numbers(name):
    for value in (float('inf'), float('nan'), 1e30):
        for which in (0, 1, 7):  # x, h, and the features
            tensors = fusing_inputs(name, (2, 16, 3, 5), True)
            tensors[which][1, 3, 1, 2] = value
            check_fusing(name, tensors)
    tensors = fusing_inputs(name, (2, 16, 3, 5), True)
    for which in (1, 7):
        tensors[which] = tensors[which].contiguous()
    tensors[8] = tensors[8].t().contiguous().t()
    check_fusing(name, tensors)
    with torch.autocast('cpu', torch.bfloat16):  # which the op itself does not follow
        check_fusing(name, tensors)
        tensors[1][1, 3, 1, 2] = 1e30
        check_fusing(name, tensors)


@needs_compiler
@pytest.mark.parametrize('state', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_torch_knows_the_fusing_op(name, state):
    outs = [torch.empty(2, 16, 3, 5).contiguous(memory_format=CL) for _ in range(3)]
    outs[2] = outs[2] if name == 'conv_lstm' else None
    for apart in (False, True):
        tensors = fusing_inputs(name, (2, 16, 3, 5), state)
        tensors[7] = tensors[7] if apart else None
        torch_library.opcheck(getattr(torch.ops.timm_regnet_rnn, f'{name}_fuse').default, (*tensors, *outs))


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_wrong_shapes_and_types_of_the_fusing_op_are_refused(name):
    good = fusing_inputs(name, (2, 16, 4, 4), True)
    outs = [torch.empty_like(good[0]), torch.empty_like(good[0]), torch.empty_like(good[0])]
    outs[2] = outs[2] if name == 'conv_lstm' else None
    op = getattr(torch.ops.timm_regnet_rnn, f'{name}_fuse')
    for i, bad in (
        (7, good[7][:1]),
        (7, good[7].double()),
        (8, good[8][:, :16]),
        (8, good[8].half()),
        (9, good[9][:8]),
        (5, good[5][:8]),
    ):
        with pytest.raises(ValueError, match='must be|takes float32|the others'):
            op(*good[:i], bad, *good[i + 1 :], *outs)
    for bad in (outs[0][:1], outs[0].contiguous(memory_format=torch.contiguous_format), outs[0].double()):
        with pytest.raises(ValueError, match='must be|takes float32'):
            op(*good, bad, *outs[1:])
        with pytest.raises(ValueError, match='must be|takes float32'):
            op(*good, outs[0], bad, outs[2])
    with pytest.raises(ValueError, match="room for h' and c'"):
        op(*good, *outs[:2], torch.empty_like(good[0]) if outs[2] is None else None)
    for i in (0, 7, 8, 9):
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match='device|meta'):
            op(*good[:i], good[i].to('meta'), *good[i + 1 :], *outs)


@needs_compiler
@pytest.mark.parametrize('layout', [CL, torch.contiguous_format])
@pytest.mark.parametrize('how', ['float32', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('name', NAMES)
def test_other_types_and_layouts(name, how, layout):
    """h' is of the type and layout that the reference gives; values and gradients are right within the type."""
    tensors = inputs(name, (2, 16, 6, 5), True, layout)
    if how != 'float32':  # x, h and c of the type; under autocast the weights are not
        kept = 5 if how == 'bfloat16' else 3
        tensors[:kept] = [t if t is None else t.detach().bfloat16().requires_grad_() for t in tensors[:kept]]
    only_h = NAMES[name] < 4
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
        outs, grads = run(fused.STEPS[name], tensors, only_h)
    twins = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    true_outs, true_grads = run(getattr(reference, f'{name}_step'), twins, only_h)
    assert outs[0].dtype == tensors[0].dtype and outs[0].is_contiguous(memory_format=layout)
    given = [t for t in tensors if t is not None]
    assert [g.dtype for g in grads] == [t.dtype for t in given]
    for got, want in zip([*outs[: 1 + (not only_h)], *grads], [*true_outs[: 1 + (not only_h)], *true_grads]):
        # a sum over 60 pixels weighted by gradients that were themselves rounded
        assert scaled_error(got.double(), want) < (1e-5 if how == 'float32' else 2e-2)


def check_norm(x, step):
    n = x.shape[1]
    torch.manual_seed(1)
    tensors = [x.requires_grad_(), torch.rand(n).add(0.5).requires_grad_(), torch.randn(n).requires_grad_()]
    twins = [t.detach().double().requires_grad_() for t in tensors]
    seed = torch.randn(x.shape)
    outs, true_outs = step(*tensors, 1e-5), reference.batch_norm_relu(*twins, 1e-5)
    assert not (outs[1].requires_grad or outs[2].requires_grad)
    grads = torch.autograd.grad((outs[0] * seed).sum(), tensors)
    true_grads = torch.autograd.grad((true_outs[0] * seed.double()).sum(), twins)
    for got, want in zip([*outs, *grads], [*true_outs, *true_grads]):
        assert scaled_error(got.double(), want) < 1e-5


@needs_compiler
@pytest.mark.parametrize('threads', [1, 3], indirect=True)
@pytest.mark.parametrize('shape', [*SHAPES[:1], *SHAPES[2:], (5, 32, 9, 11)])  # the last: 495 rows in tiles of 128
def test_batch_norm_relu(shape, threads):
    check_norm(torch.randn(shape).contiguous(memory_format=CL), fused.batch_norm_relu)
    check_norm(torch.randn(shape), fused.batch_norm_relu)


@needs_compiler
def test_batch_norm_relu_is_torchs():
    """The reference itself against torch; variances where the mean is a thousand times the deviation."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 16, 7, 7, dtype=torch.float64), torch.rand(16).double(), torch.randn(16).double()
    want = torch.relu(torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True))
    torch.testing.assert_close(reference.batch_norm_relu(x, weight, bias, 1e-5)[0], want)
    far = (1000 + torch.randn(8, 16, 9, 9)).contiguous(memory_format=CL)
    _, mean, var = fused.batch_norm_relu(far, torch.ones(16), torch.zeros(16), 1e-5)
    torch.testing.assert_close(mean, far.double().mean((0, 2, 3)).float())
    torch.testing.assert_close(var, far.double().var((0, 2, 3), correction=0).float(), rtol=1e-4, atol=0)
    tensors = far.requires_grad_(), torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
    torch_library.opcheck(torch.ops.timm_regnet_rnn.batch_norm_relu.default, (*tensors, 1e-5))
    with pytest.raises(ValueError, match='N a multiple of 16'):
        fused.batch_norm_relu(far, torch.ones(8), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match='takes float32'):
        fused.batch_norm_relu(far.double(), torch.ones(16), torch.ones(16), 1e-5)


@pytest.mark.parametrize('name', reference.FIRST_STEPS)
def test_first_step_is_the_step_from_zero(name):
    """What programs that leave the process hold: the same numbers, and gradients where anything flows."""
    tensors = [None if t is None else t.detach().double() for t in inputs(name, (2, 3, 4, 5), False)]
    twins = [[None if t is None else t.clone().requires_grad_() for t in tensors] for _ in range(2)]
    only_h = NAMES[name] < 4
    got, grads = run(reference.FIRST_STEPS[name], twins[0], only_h)
    want, true_grads = run(getattr(reference, f'{name}_step'), twins[1], only_h)
    for a, b in zip([*got[: 2 - only_h], *grads], [*want[: 2 - only_h], *true_grads]):
        assert scaled_error(a, b) < 1e-12
    assert not only_h or got[1] is None


@pytest.mark.parametrize('name', NAMES)
def test_reference_gradients(name):
    tensors = [None if t is None else t.detach().double() for t in inputs(name, (1, 2, 3, 3), True)]
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    step = getattr(reference, f'{name}_step')
    assert torch.autograd.gradcheck(lambda *t: tuple(o for o in step(*t) if o is not None), tensors)


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_wrong_shapes_and_types_are_refused(name):
    """The C++ code sees addresses only: it must never be given what it would read beyond its end."""
    good = [None if t is None else t.detach() for t in inputs(name, (2, 16, 4, 4), True)]
    for i, bad in (
        (0, good[0][:, :8]),
        (1, good[1][:1]),
        (3, good[3][:, :8]),
        (4, good[4][:, :1]),
        (1, good[1].double()),
        (3, good[3].half()),
    ):
        with pytest.raises(ValueError, match='must be|takes float32'):
            fused.STEPS[name](*good[:i], bad, *good[i + 1 :])
    backward, norm = getattr(torch.ops.timm_regnet_rnn, f'{name}_backward'), [torch.ones(16)] * 2
    for bad in (good[0][:1], good[0].double()):
        with pytest.raises(ValueError, match='must be|takes float32'):
            backward(*good, bad, None)
        with pytest.raises(ValueError, match='must be|takes float32'):
            backward(*good, None, bad)
        with pytest.raises(ValueError, match='must be|takes float32'):
            torch.ops.timm_regnet_rnn.batch_norm_relu_backward(good[0], *norm, 1e-5, *norm, bad)


class Chosen:
    """Counts calls of the fused op."""

    def __init__(self, monkeypatch):
        self.calls = 0
        for steps in (fused.STEPS, fused.NORMED_STEPS):
            for name, step in steps.items():
                monkeypatch.setitem(steps, name, self.counting(step))

    def counting(self, step):
        def counted(*args):
            self.calls += 1
            return step(*args)

        return counted


@needs_compiler
@pytest.mark.parametrize('cell', CELLS)
def test_the_rule_and_its_override(cell, monkeypatch):
    chosen = Chosen(monkeypatch)
    net = randomize(timm.create_model(f'regnet_{cell}_20', layers=(1, 1, 1))).to(memory_format=CL)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=CL)
    out = {}
    for name in ('', 'reference', 'fused'):
        ops.set_ops(name)
        chosen.calls = 0
        out[name] = net(x)
        assert chosen.calls == (0 if name == 'reference' else 3)
    assert scaled_error(out['fused'], out['reference']) < 1e-4 and torch.equal(out['fused'], out[''])
    for forced in ('fused', ''):  # what has to be converted before the op and after it
        ops.set_ops(forced)
        chosen.calls = 0
        assert scaled_error(net.to(memory_format=torch.contiguous_format)(x.contiguous()), out['reference']) < 1e-4
        with torch.autocast('cpu', torch.bfloat16):
            assert scaled_error(net.to(memory_format=CL)(x).float(), out['reference']) < 0.1
        assert chosen.calls == (0 if cell == 'convrnn' and not forced else 6), 'with one gate it does not pay'
    ops.set_ops('fused')
    with pytest.raises(RuntimeError, match='no fused op here: .* float32 and bfloat16, not torch.float64'):
        net.double()(x.double())
    ops.set_ops('')
    chosen.calls = 0
    net(x.double())
    assert chosen.calls == 0, 'the rule falls back where nothing was asked for'
    with pytest.raises(ValueError, match="must be one of '', 'reference', 'fused'; got 'fast'"):
        ops.set_ops('fast')


@needs_compiler
@pytest.mark.parametrize('cell', CELLS)
def test_a_training_step_is_the_same(cell):
    """Net, loss and gradient of every parameter; with checkpointing, and as one graph of torch.compile."""
    net = randomize(timm.create_model(f'regnet_{cell}_20', layers=(2, 1, 1))).to(memory_format=CL)
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=CL)

    def gradients(model):
        net.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in net.parameters())])

    ops.set_ops('reference')
    want = gradients(net)
    ops.set_ops('fused')
    assert scaled_error(gradients(net), want) < 1e-4
    assert scaled_error(gradients(torch.compile(net, backend='aot_eager', fullgraph=True)), want) < 1e-4
    net.set_grad_checkpointing()
    assert scaled_error(gradients(net), want) < 1e-4


def count_norms(monkeypatch):
    """Counts the calls of what stands for a norm: the ops in training, of which some are a step's, and a step's scale
    in eval mode; and of steps that go on to the fuse convolution, in training with a norm more."""
    calls = {'training': 0, 'step': 0, 'eval': 0, 'fuse': 0}
    norm = fused.batch_norm_relu

    def counted(*args):
        calls['training'] += 1
        return norm(*args)

    monkeypatch.setattr(fused, 'batch_norm_relu', counted)
    for name, step in list(fused.STEPS.items()):

        def counted_step(x, h, c, weight, bias, scale=None, shift=None, step=step):
            calls['eval'] += scale is not None
            return step(x, h, c, weight, bias, scale, shift)

        monkeypatch.setitem(fused.STEPS, name, counted_step)
    for steps, counts in ((fused.NORMED_STEPS, ('training', 'step')), (fused.FUSING_STEPS, ('eval', 'fuse'))):
        for name, step in list(steps.items()):

            def counted_whole(*args, step=step, counts=counts):
                for count in counts:
                    calls[count] += 1
                if counts[1] == 'step' and len(args) > 8:
                    calls['training'] += 1
                    calls['fuse'] += 1
                return step(*args)

            monkeypatch.setitem(steps, name, counted_whole)
    return calls


def small(**kwargs):
    net = randomize(timm.create_model('regnet_convlstm_20', layers=(2, 1, 1), **kwargs)).to(memory_format=CL)
    return net, torch.randn(4, 3, 16, 16).contiguous(memory_format=CL)


@needs_compiler
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('model', ['regnet_convlstm_20', 'regnet_convgru_50'])
def test_eval_mode_is_the_same(model, deploy, monkeypatch):
    """Norm of h within the step, and the fuse convolution too or else as a matrix product; compiled as well."""
    calls = count_norms(monkeypatch)
    net = randomize(timm.create_model(model, layers=(1, 2, 1, 1)[-3 if '20' in model else -4 :])).eval()
    net = (timm.utils.reparameterize_model(net) if deploy else net).to(memory_format=CL)
    x = torch.randn(2, 3, 33, 33).contiguous(memory_format=CL)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            ops.set_ops('reference')
            want = net(x)
            ops.set_ops('')
            assert scaled_error(net(x), want) < 1e-4
            assert calls['eval'] == (4 if '20' in model else 5), 'not where a gradient may be wanted'
            assert calls['fuse'] == (4 if '20' in model else 3), 'nor in wide stages'
    with torch.no_grad():
        assert scaled_error(torch.compile(net, backend='aot_eager', fullgraph=True)(x), want) < 1e-4


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize('training', [False, True])
def test_one_compiled_graph_takes_every_batch(training):
    """One graph for the first batch size, one for all others, none per block; in eval mode norm and fuse are inside."""
    torch.compiler.reset()
    net, _ = small()
    net.train(training)
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 4):
        x = torch.randn(batch, 3, 16, 16).contiguous(memory_format=CL)
        with torch.set_grad_enabled(training):
            want = copy.deepcopy(net)(x)
            assert scaled_error(compiled(x), want) < 1e-4
    assert counter.frame_count == 2
    steps = [n.target for n in counter.graphs[-1].graph.nodes if 'timm_regnet_rnn.conv_lstm' in str(n.target)]
    ours = torch.ops.timm_regnet_rnn
    assert steps == [ours.conv_lstm.default if training else ours.conv_lstm_fuse.default] * 4


@needs_compiler
@pytest.mark.parametrize('training', [False, True])
def test_a_traced_graph_has_the_modules(training):
    """torch.fx sees every norm and activation, whatever would be fused for a tensor."""
    net, x = small()
    net.train(training)
    graph = torch.fx.symbolic_trace(net)
    assert {'layer1.0.bn_h', 'layer1.0.act_h', 'layer1.0.bn_fuse'} <= {node.target for node in graph.graph.nodes}
    with torch.no_grad():
        assert scaled_error(graph(x), net(x)) < 1e-4


@needs_compiler
def test_scripts_and_exports_have_no_op_of_ours():
    net = timm.create_model('regnet_convlstm_20', layers=(1, 1, 1)).eval().to(memory_format=CL)
    x = torch.randn(1, 3, 16, 16).contiguous(memory_format=CL)
    with torch.no_grad():
        scripted = torch.jit.script(net)
        assert 'timm_regnet_rnn::' not in str(scripted.inlined_graph)
        torch.testing.assert_close(scripted(x), net(x), rtol=1e-4, atol=1e-4)
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} <= {''}
    gates = [node.op_type for node in program.model.graph].count('Sigmoid')
    assert gates == 3 * 2, 'each stage has one step, from zero, where the forget gate is multiplied by nothing'


SCRIPT = """
import timm, timm_regnet_rnn, torch
net = timm.create_model('regnet_convlstm_20', layers=(1, 1, 1)).to(memory_format=torch.channels_last)
print(net(torch.randn(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)).shape)
"""


def in_process(tmp_path, **env):
    env = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path), **env}
    return subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, env=env)


def compiler(tmp_path, script):
    """A compiler that is a shell script."""
    file = tmp_path / 'c++'
    file.write_text(f'#!/bin/sh\n{script}\n')
    file.chmod(0o755)
    return str(file)


@pytest.mark.slow
@needs_compiler
def test_compiled_once_and_kept(tmp_path):
    quick = {'CXX': compiler(tmp_path, 'exec g++ "$@" -O0')}
    assert in_process(tmp_path, **quick).returncode == 0
    (library,), (summed,) = ((tmp_path / 'timm_regnet_rnn').glob(f'*{suffix}') for suffix in ('.so', '.sha256'))
    assert b'libgomp' not in library.read_bytes()  # torch's own is in the process already
    made = library.stat().st_mtime_ns
    assert in_process(tmp_path, **quick).returncode == 0 and library.stat().st_mtime_ns == made
    whole = library.read_bytes()
    for broken in (b'', whole[: len(whole) // 3], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        library.write_bytes(broken)
        done = in_process(tmp_path, **quick)
        assert done.returncode == 0 and 'is damaged: compiled again' in done.stderr
        assert library.read_bytes() == whole or len(library.read_bytes()) == len(whole)
    summed.unlink()
    assert 'is damaged' in in_process(tmp_path, **quick).stderr and summed.is_file()
    library.parent.chmod(0o777)  # where anybody could plant a library
    kept = library.stat().st_mtime_ns
    done = in_process(tmp_path, **quick)
    assert done.returncode == 0 and 'others can write to it: the CPU kernels are not kept' in done.stderr
    assert library.stat().st_mtime_ns == kept


@pytest.mark.slow
@needs_compiler
def test_two_processes_compile_once(tmp_path):
    """The second waits for the first, as the processes of a DDP training do."""
    calls = tmp_path / 'calls'
    counting = {'CXX': compiler(tmp_path, f'case "$*" in *" -c "*) echo >> {calls};; esac; exec g++ "$@" -O0')}
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: in_process(tmp_path, **counting), range(2)))
    assert [d.returncode for d in done] == [0, 0] and not any(d.stderr for d in done), done
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.slow
def test_without_a_compiler(tmp_path):
    done = in_process(tmp_path, CXX='no-such-compiler')
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('\n') == 1 and 'three times slower' in done.stderr
    done = in_process(tmp_path, CXX='no-such-compiler', TIMM_REGNET_RNN_OPS='fused')
    assert done.returncode == 1 and 'there is no fused op here: ' in done.stderr.splitlines()[-1]
    done = in_process(tmp_path, TIMM_REGNET_RNN_OPS='quick')
    assert done.returncode == 0 and done.stderr.count('\n') == 1
    assert "TIMM_REGNET_RNN_OPS=quick is none of '', 'reference', 'fused': the default is taken" in done.stderr


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_autograd_keeps_the_inputs_and_nothing_else(name):
    """Gates are computed again in backward: per step x, h and c stay in memory, and the weights they share."""
    tensors, kept = inputs(name, (2, 16, 4, 4), True), set()
    given = {t.untyped_storage().data_ptr() for t in tensors if t is not None}

    def keep(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused.STEPS[name](*tensors)
        assert kept == given
        getattr(reference, f'{name}_step')(*tensors)
        assert kept > given, 'which the reference does not do'


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_what_is_not_a_number_stays_so(name):
    """A diverged net must look diverged."""
    tensors = [None if t is None else t.detach() for t in inputs(name, (1, 16, 3, 5), True)]
    tensors[0][0, 3, 1, 2] = float('nan')
    got, _ = fused.STEPS[name](*tensors)
    want, _ = getattr(reference, f'{name}_step')(*tensors)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()


@pytest.mark.slow
@needs_compiler
def test_without_openmp(tmp_path):
    """As Apple's clang has none: one thread, said once, the same numbers."""
    apples = compiler(tmp_path, 'for a in "$@"; do test "$a" = -fopenmp && exit 1; done; exec g++ "$@"')
    done = in_process(tmp_path, CXX=apples)
    assert done.returncode == 0 and 'has no OpenMP: the regulators of a net run on one thread' in done.stderr


def test_nothing_is_compiled_before_it_is_needed(tmp_path):
    """Importing, creating and saving a net, and asking for the command's help."""
    script = 'import timm, timm_regnet_rnn.training; timm.create_model("regnet_convlstm_20").state_dict()'
    env = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
    subprocess.run([sys.executable, '-c', script], check=True, env=env)
    assert not list(tmp_path.iterdir())


# Transforms: every mode of differentiation gives the reference's numbers.


def net_and_image():
    net = randomize(timm.create_model('regnet_convlstm_20', layers=(1, 1, 1), num_classes=3)).to(memory_format=CL)
    return net, torch.randn(2, 3, 8, 8).contiguous(memory_format=CL)


def directional(function, x, v, eps=1e-3):
    return (function(x + eps * v) - function(x - eps * v)) / (2 * eps)


@needs_compiler
@pytest.mark.parametrize('cell', NAMES)
@pytest.mark.parametrize('training', [False, True])
def test_forward_mode(cell, training):
    """torch.func.jvp and a dual level against finite differences of the net in double precision."""
    net, x = net_and_image()
    net = randomize(timm.create_model(f'regnet_{cell.replace("_", "")}_20', layers=(2, 1, 1), num_classes=3))
    net = net.to(memory_format=CL).train(training)
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.track_running_stats, norm.running_mean, norm.running_var = training, None, None  # functional
        norm.momentum, norm.num_batches_tracked = None, None
    v = torch.randn_like(x)
    twin = copy.deepcopy(net).double()
    want = torch.func.jvp(twin, (x.double(),), (v.double(),))[1]
    assert scaled_error(directional(twin, x.double(), v.double(), 1e-7), want) < 1e-4
    assert scaled_error(torch.func.jvp(net, (x,), (v,))[1], want) < 1e-3
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        assert scaled_error(torch.autograd.forward_ad.unpack_dual(net(dual)).tangent, want) < 1e-3


@needs_compiler
@pytest.mark.parametrize('training', [False, True])
def test_double_backward(training):
    """A gradient penalty, and a Hessian-vector product: the reference's, to the last digits."""
    net, x = net_and_image()
    net.train(training)
    x.requires_grad_()
    found = []
    for name in ('', 'reference'):
        with ops.use(name):
            net.zero_grad()
            (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            grad.square().sum().backward()
            weights = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
            product = torch.autograd.functional.hvp(lambda x: net(x).square().sum(), x.detach(), torch.ones_like(x))[1]
            found.append((grad.detach(), weights, product))
    for ours, theirs in zip(*found):
        assert scaled_error(ours, theirs) < 1e-3


@needs_compiler
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('cell', CELLS)
def test_double_backward_of_the_weights(cell, training):
    """Blocks that follow one another share weights and pass on a state, so a step's inputs depend on one another; the
    gradients themselves and their gradients, with checkpointing too, and the curvature that timm's Adahessian finds."""
    torch.manual_seed(0)
    net = randomize(timm.create_model(f'regnet_{cell}_20', layers=(3, 1, 1), num_classes=5))
    net, x = net.to(memory_format=CL).train(training), torch.randn(4, 3, 24, 24).contiguous(memory_format=CL)
    found = {}
    for name, checkpointing in (('', False), ('', True), ('reference', False)):
        twin = copy.deepcopy(net) if name == '' else copy.deepcopy(net).double()
        twin.set_grad_checkpointing(checkpointing)
        with ops.use(name):
            weights, images = list(twin.parameters()), x.to(next(twin.parameters()).dtype)
            grads = torch.autograd.grad(twin(images).square().mean(), weights, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in grads), weights, allow_unused=True)
            optimizer = Adahessian(weights, lr=0.1)
            twin(images).square().mean().backward(create_graph=optimizer.is_second_order)
            optimizer.step()
            curvature = [p.hess for p in weights]
        found[name, checkpointing] = [
            torch.cat([t.flatten() for t in ts if t is not None]) for ts in (grads, second, curvature)
        ]
        twin.zero_grad()  # its gradients hold the graph, which holds them
    for key in (('', False), ('', True)):
        for ours, theirs in zip(found[key], found['reference', False]):
            assert ours.shape == theirs.shape and scaled_error(ours.double(), theirs) < 1e-3


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_a_backward_pass_under_autocast_computes_as_the_forward_pass_did(name):
    """The op's own gradients, those that are differentiated again, and those that the reference has to make."""
    tensors = normed_fuse_inputs(name, (2, 16, 3, 5), True, True)
    given, function = [t for t in tensors if t is not None], normed_fuse(getattr(ops, f'{name}_step'))
    for scale in (1.0, 1e9):  # beyond what the kernels take
        for recorded in (False, True):
            found = []
            for enabled in (False, True):
                loss = function(*tensors)[-1].sin().sum() * scale
                with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
                    found.append(torch.autograd.grad(loss, given, create_graph=recorded, allow_unused=True))
            for without, under in zip(*found):
                assert under is None and without is None or under.dtype == torch.float32
                if under is not None:
                    torch.testing.assert_close(under, without, rtol=1e-6, atol=1e-6 * scale)
    far = [None if t is None else t.detach().clone() for t in tensors]
    far[7][0, 0, 0, 0] = 1e30
    with torch.no_grad():
        want = function(*far)[-1]
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(function(*far)[-1], want)


@needs_compiler
def test_vmap_and_per_sample_gradients():
    net, x = net_and_image()
    net.eval()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(net, parameters, (image[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        net.zero_grad()
        net(image[None]).square().sum().backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(got[name][i], p.grad, rtol=1e-3, atol=1e-4)
    rows = torch.func.jacrev(lambda x: net(x[None])[0])(x[0])
    columns = torch.func.jacfwd(lambda x: net(x[None])[0])(x[0])
    torch.testing.assert_close(rows, columns, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(lambda x: net(x[None])[0])(x), net(x), rtol=1e-3, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize('name', NAMES)
def test_another_device_is_an_error(name):
    """In the step and in the op itself: never memory that nobody wrote."""
    good = [None if t is None else t.detach() for t in inputs(name, (2, 16, 4, 4), True)]
    for i, t in enumerate(good):
        if t is not None:
            bad = [*good[:i], t.to('meta'), *good[i + 1 :]]
            with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match='device'):
                getattr(torch.ops.timm_regnet_rnn, name)(*bad, None, None)
            if i:
                with torch.no_grad(), pytest.raises(RuntimeError, match='device'):
                    getattr(ops, f'{name}_step')(*bad)


FAR = [float('inf'), -float('inf'), float('nan'), 1e38, -1e38, 3e9, 0.0]


@needs_compiler
@given(
    name=st.sampled_from(list(NAMES)),
    values=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 10**6), st.sampled_from(FAR)), min_size=1, max_size=4),
    state=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_values_that_are_not_finite_or_huge(name, values, state, seed):
    """Outputs and gradients are finite where the reference's are, and equal there."""
    tensors = inputs(name, (1, 16, 3, 4), state, seed=seed)
    with torch.no_grad():
        for which, place, value in values:
            t = tensors[which % 5]
            if t is not None:
                t[np.unravel_index(place % t.numel(), t.shape)] = value
            elif tensors[0] is not None:
                tensors[0][0, place % 16, 0, 0] = value
    with ops.use('reference'):
        want = run(getattr(ops, f'{name}_step'), tensors, NAMES[name] < 4)
    with ops.use('fused'):
        got = run(getattr(ops, f'{name}_step'), tensors, NAMES[name] < 4)
    for ours, theirs in zip([*got[0], *got[1]], [*want[0], *want[1]]):
        if theirs is not None:
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, finite_scale(theirs)), equal_nan=True
            )


def finite_scale(t):
    return t[t.isfinite()].abs().max().item() if t.isfinite().any() else 0.0


@needs_compiler
@pytest.mark.parametrize('value', FAR[:5])
def test_norm_of_values_that_are_not_finite_or_huge(value):
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=CL)
    x[0, 3, 1, 1] = value
    weight, bias = torch.rand(16), torch.randn(16)
    y, mean, _ = fused.batch_norm_relu(x, weight, bias, 1e-5)
    want = torch.relu(torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize('shape', [(0, 16, 5, 5), (1, 16, 0, 8), (0, 16, 0, 0), (2, 16, 3, 0)])
@pytest.mark.parametrize('name', NAMES)
def test_nothing_in_nothing_out(name, shape):
    """In every path, with a gradient of zero for all inputs; a norm in the step changes nothing."""
    step, norm = getattr(ops, f'{name}_step'), [torch.ones(16), torch.ones(16)]
    paths = {choice: step for choice in ('', 'reference', 'fused')}
    paths.update({'script': torch.jit.script(step), 'op': fused.STEPS[name]})
    paths.update({'op and norm': lambda *t: fused.STEPS[name](*t, *norm)})
    paths.update({'norm': lambda *t: ops.step_norm_relu(step, *t, *norm)})
    for path, function in paths.items():
        for state in (False, True):
            tensors = inputs(name, shape, state)
            with ops.use(path if path in ops.OPS else ''):
                outs = [out for out in function(*tensors) if out is not None]
            assert [out.shape for out in outs] == [shape] * (2 if name == 'conv_lstm' else 1), path
            for out in outs:
                grads = torch.autograd.grad(out.sum(), [t for t in tensors if t is not None], retain_graph=True)
                assert not any(grad.any() for grad in grads), path


@needs_compiler
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('model', ['resnet18', *(f'regnet_{cell}_20' for cell in CELLS)])
def test_a_net_takes_an_empty_batch(model, training):
    """As timm's own nets do: no logits, gradients of zero, statistics as they were; scripted and exported as well."""
    net = timm.create_model(model, num_classes=3).to(memory_format=CL).train(training)
    images, nothing = torch.randn(2, 3, 32, 32).contiguous(memory_format=CL), torch.zeros(0, 3, 32, 32)
    net(images)
    before = {name: t.clone() for name, t in net.named_buffers() if 'num_batches' not in name}
    for choice in ('', 'reference', 'fused'):
        with ops.use(choice):
            for batch in (nothing, nothing.contiguous(memory_format=CL)):
                net.zero_grad()
                out = net(batch)
                out.sum().backward()
                assert out.shape == (0, 3) and not any(p.grad.any() for p in net.parameters()), choice
    assert torch.jit.script(net)(nothing).shape == (0, 3)
    assert all(torch.equal(t, before[name]) for name, t in net.named_buffers() if name in before)
    if not training:
        dynamic = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(net, (images,), dynamic_shapes=dynamic)
        assert program.module()(images[:1]).shape == (1, 3) and program.module()(nothing).shape == (0, 3)


@pytest.mark.slow
@needs_compiler
def test_out_of_memory_is_an_exception():
    """A map that fits no memory: torch's own error, and the process lives."""
    script = 'import resource, torch; from timm_regnet_rnn import ops; '
    script += 'x = torch.zeros(1, 16, 4000, 4000).contiguous(memory_format=torch.channels_last); '
    script += 'w = torch.zeros(3, 16, 2, 3, 3); b = torch.zeros(3, 16); torch.set_num_threads(4); '
    script += 'ops.conv_gru_step(x[:, :, :9, :9], None, None, w, b); '
    script += 'size = int(open("/proc/self/statm").read().split()[0]) * 4096; '
    script += 'resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), -1)); '
    script += 'ops.conv_gru_step(x, x, None, w, b)'
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 1 and "can't allocate memory" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.slow
@needs_compiler
def test_saved_programs_need_no_package_of_ours(tmp_path):
    """A trace and an exported program load and run in a process that never heard of us; ours in one is opt-in."""
    net, x = net_and_image()
    net.eval()
    with torch.no_grad():
        want = net(x)
        torch.jit.trace(net, x).save(tmp_path / 'net.pt')
        torch.export.save(torch.export.export(net, (x,)), tmp_path / 'net.pt2')
        torch.save((x, want), tmp_path / 'want.pt')
        with ops.use('fused'):
            assert 'timm_regnet_rnn' in str(torch.export.export(net, (x,)).graph)
    script = 'import sys, torch; x, want = torch.load("want.pt"); '
    script += 'torch.testing.assert_close(torch.jit.load("net.pt")(x), want, rtol=1e-3, atol=1e-3); '
    script += 'torch.testing.assert_close(torch.export.load("net.pt2").module()(x), want, rtol=1e-3, atol=1e-3); '
    script += 'assert "timm_regnet_rnn" not in sys.modules'
    subprocess.run([sys.executable, '-c', script], check=True, cwd=tmp_path)


@needs_compiler
@pytest.mark.parametrize('name', ['regnet_convlstm_20', 'regnet_convgru_20', 'regnet_convrnn_20'])
def test_flops_are_counted(name):
    """torch's own counter finds what `timm-regnet-rnn list` says, and in training twice as much for the gradients."""
    macs = complexity(timm.create_model(name, device='meta').eval())['macs']
    for training in (False, True):
        net = timm.create_model(name).train(training).to(memory_format=CL)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.randn(2, 3, 32, 32).contiguous(memory_format=CL))
        assert counter.get_total_flops() == 2 * 2 * macs, training
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(2, 3, 32, 32).contiguous(memory_format=CL)).sum().backward()
    images = 16 * 3 * 9 * 32 * 32  # the first convolution, whose input has no gradient
    assert counter.get_total_flops() == 2 * 2 * (3 * macs - images)
