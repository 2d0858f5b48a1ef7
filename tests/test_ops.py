"""Every fused op against the reference, in float64, where it is chosen and where it is not."""

import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import randomize, scaled_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library as torch_library

from timm_regnet_rnn import ops
from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.ops import fused_cpu, reference

CL = torch.channels_last
NAMES = {'conv_rnn': 1, 'conv_gru': 3, 'conv_lstm': 4}
needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='the fused CPU op is compiled by g++')


@pytest.fixture(autouse=True)
def rule():
    """Each test starts with the rule itself, whatever the environment says."""
    before = ops._ops
    ops.set_ops('')
    yield
    ops.set_ops(before)


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


def check(name, tensors, step=None):
    """The fused step against the float64 reference; c counts where the cell has one."""
    only_h = NAMES[name] < 4
    twins = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    outs, grads = run(step or fused_cpu.STEPS[name], tensors, only_h)
    true_outs, true_grads = run(getattr(reference, f'{name}_step'), twins, only_h)
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
@pytest.mark.parametrize('threads', [1, 2, 3])
@pytest.mark.parametrize('name', NAMES)
def test_threads_share_the_gradient_of_the_weight(name, threads):
    """More threads than cores, and than tasks for some."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(name, inputs(name, (2, 16, 4, 6), True))
    finally:
        torch.set_num_threads(before)


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
    outs, grads = run(fused_cpu.STEPS[name], tensors, only_h=NAMES[name] < 4)
    assert all(t.isfinite().all() for t in (outs[0], *grads))
    want, _ = getattr(reference, f'{name}_step')(*(None if t is None else t.double() for t in tensors))
    assert scaled_error(outs[0].double(), want) < 1e-5


@needs_compiler
@pytest.mark.parametrize('state', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_torch_knows_the_op(name, state):
    """Schema, fake kernel, autograd and AOT dispatch, by torch's own check."""
    torch_library.opcheck(getattr(torch.ops.timm_regnet_rnn, name).default, tuple(inputs(name, (2, 16, 3, 5), state)))


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
        (1, good[1][:1]),
        (3, good[3][:, :8]),
        (4, good[4][:, :1]),
        (1, good[1].double()),
        (3, good[3].half()),
    ):
        with pytest.raises(ValueError, match='must be|takes float32'):
            fused_cpu.STEPS[name](*good[:i], bad, *good[i + 1 :])


class Chosen:
    """Counts calls of the fused op."""

    def __init__(self, monkeypatch):
        self.calls = 0
        for name, step in fused_cpu.STEPS.items():
            monkeypatch.setitem(fused_cpu.STEPS, name, self.counting(step))

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
    with pytest.raises(RuntimeError, match='no fused op here: .* channels_last'):
        net.to(memory_format=torch.contiguous_format)(x.contiguous())
    with torch.autocast('cpu', torch.bfloat16), pytest.raises(RuntimeError, match='without autocast'):
        net(x)
    with pytest.raises(RuntimeError, match='float32'):
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


SCRIPT = """
import timm, timm_regnet_rnn, torch
net = timm.create_model('regnet_convlstm_20', layers=(1, 1, 1)).to(memory_format=torch.channels_last)
print(net(torch.randn(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)).shape)
"""


def in_process(tmp_path, **env):
    env = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path), **env}
    return subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True, env=env)


@needs_compiler
def test_compiled_once_and_kept(tmp_path):
    assert in_process(tmp_path).returncode == 0
    (library,) = (tmp_path / 'timm_regnet_rnn').iterdir()
    made = library.stat().st_mtime_ns
    assert in_process(tmp_path, CXX='g++').returncode == 0 and library.stat().st_mtime_ns == made


def test_without_a_compiler(tmp_path):
    done = in_process(tmp_path, CXX='no-such-compiler')
    assert done.returncode == 0, done.stderr
    done = in_process(tmp_path, CXX='no-such-compiler', TIMM_REGNET_RNN_OPS='fused')
    assert done.returncode == 1 and 'there is no fused op here: ' in done.stderr.splitlines()[-1]
    done = in_process(tmp_path, TIMM_REGNET_RNN_OPS='quick')
    assert "must be one of '', 'reference', 'fused'; got 'quick'" in done.stderr
