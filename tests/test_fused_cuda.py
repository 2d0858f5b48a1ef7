"""The fused CUDA op against the reference in float64, in Triton's interpreter, and on a GPU where there is one.

Triton decides at its import whether it interprets, so the functions check_* run in a pytest process of their own.
"""

import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from conftest import scaled_error
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import library as torch_library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from timm_regnet_rnn.ops import fused, fused_cuda, reference

pytestmark = pytest.mark.slow

triton = pytest.importorskip('triton')

NCHW, CL = torch.contiguous_format, torch.channels_last
NAMES = {'conv_rnn': 1, 'conv_gru': 3, 'conv_lstm': 4}
DEVICE = 'cpu' if os.environ.get('TRITON_INTERPRET') == '1' else 'cuda'
if DEVICE == 'cpu':  # in the process that interprets, tensors of the CPU go to Triton's kernels
    fused.KERNELS['cpu'] = 'fused_cuda'


def run_checks(name, **env):
    """This file's check_* functions of one cell in a process with other variables."""
    env = {**os.environ, 'PYTEST_ADDOPTS': '', 'OMP_NUM_THREADS': '1', **env}
    command = [sys.executable, '-m', 'pytest', '-qx', '-p', 'no:xdist', '-p', 'no:cacheprovider', '-k', name]
    done = subprocess.run(
        [*command, '-o', 'python_functions=check_*', __file__], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('name', NAMES)
def test_interpreted(name):
    run_checks(name, TRITON_INTERPRET='1')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', NAMES)
def test_on_a_gpu(name):
    run_checks(name)


KERNELS = {
    'conv_rnn': ('forward', 'gates', 'inputs', 'weights'),
    'conv_gru': ('forward', 'gates', 'reset', 'inputs', 'weights'),
    'conv_lstm': ('forward', 'gates', 'inputs', 'weights'),
}


@pytest.mark.parametrize('name,layout', [('conv_rnn', NCHW), ('conv_gru', CL), ('conv_lstm', CL)], ids=str)
def test_compiled_for_hopper(name, layout, tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does. Triton brings its own assembler, so no GPU is needed."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    x = torch.empty(2, 32, 1, 16).contiguous(memory_format=layout)
    for kind in KERNELS[name]:
        kernel = getattr(fused_cuda, f'{kind}_kernel')
        shape, warps = fused_cuda._shape(x, ring=name == 'conv_gru' and kind in ('forward', 'gates'))
        constants = {'SHAPE': shape, 'GATES': NAMES[name]}
        if name != 'conv_lstm':
            constants.update(c=None, dc=None, dc_out=None)
        constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
        types = {arg: '*bf16' for arg in kernel.arg_names}
        types.update(
            dict.fromkeys(('w', 'b', 'partial'), '*fp32'), **dict.fromkeys(('items', 'chunk', 'N', 'H', 'W'), 'i32')
        )
        types['size'] = 'i64'
        types = {arg: 'constexpr' if arg in constants else types[arg] for arg in kernel.arg_names}
        constants = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
        aligned = {
            (i,): [['tt.divisibility', 16]]
            for i, arg in enumerate(types)
            if types[arg][0] == '*' or arg in ('N', 'size')
        }
        source = triton.compiler.ASTSource(kernel, types, constants, aligned)
        target = triton.backends.compiler.GPUTarget('cuda', 90, 32)
        done = triton.compile(source, target=target, options={'num_warps': warps, 'enable_fp_fusion': True})
        assert done.asm['cubin'][:4] == b'\x7fELF'
        if layout == CL:
            assert '.global.b16' not in done.asm['ptx'], 'neighbouring channels move together'


class OnTheDevice(TorchDispatchMode):
    """Refuses every op that leaves the device: its results would have to be waited for."""

    def __init__(self, device='cuda'):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            assert not isinstance(t, torch.Tensor) or t.device.type == self.device, func
        return out


def launches(monkeypatch):
    """A list that takes the kernels' launches instead of a GPU."""
    found = []

    class Recorder:
        def __init__(self, kernel):
            self.name = kernel.__name__

        def __getitem__(self, grid):
            return lambda **args: found.append((self.name, grid, args))

    monkeypatch.setattr(torch.cuda, 'device_of', lambda tensor: nullcontext())
    for kind in KERNELS['conv_gru']:
        monkeypatch.setattr(fused_cuda, f'{kind}_kernel', Recorder(getattr(fused_cuda, f'{kind}_kernel')))
    return found


def on_fake_gpu(name, state, layout):
    gates, n = NAMES[name], 64
    tensors = [torch.empty(8, n, 28, 28, device='cuda').contiguous(memory_format=layout) for _ in range(3)]
    tensors[1] = tensors[1] if state else None
    tensors[2] = tensors[2] if state and gates == 4 else None
    weights = [torch.empty(gates, n, *tail, device='cuda') for tail in ((2, 3, 3), ())]
    return tensors + weights, torch.empty(n, device='cuda'), tensors[0], tensors[0] if gates == 4 else None


@pytest.mark.parametrize('layout', [NCHW, CL], ids=str)
@pytest.mark.parametrize('state', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_a_cuda_graph_can_hold_the_launches(name, state, layout, monkeypatch):
    """Tensors without values take the way of forward and backward up to the launches.

    So no value is read back, nothing waits for the GPU, grids are numbers known beforehand, and all memory is torch's.
    """
    found = launches(monkeypatch)
    with FakeTensorMode(), OnTheDevice():
        tensors, vector, *grads = on_fake_gpu(name, state, layout)
        fused_cuda.forward(name, *tensors, vector, vector)
        fused_cuda.backward(name, *tensors, *grads)
    reset = ['reset_kernel'] if name == 'conv_gru' and state else []
    assert [kind for kind, _, _ in found] == [
        *('forward_kernel', 'gates_kernel', *reset, 'inputs_kernel', 'weights_kernel')
    ]
    for _, (programs,), args in found:
        assert type(programs) is int and programs > 0
        assert all(t is None or isinstance(t, (torch.Tensor, int, fused_cuda.Shape)) for t in args.values()), args


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('cell', ['convrnn', 'convgru', 'convlstm'])
def test_a_cuda_graph_can_hold_a_net(cell, training):
    """A net around the ops reads no value back either; backward on the CPU, as autograd asks a driver for the GPU."""
    for device in ('cuda', 'cpu') if training else ('cuda',):
        with FakeTensorMode(), torch.device(device):
            net = timm.create_model(f'regnet_{cell}_20', layers=(2, 1, 1)).train(training)
            x = torch.empty(2, 3, 16, 16).contiguous(memory_format=CL)
            with OnTheDevice(device):
                out = net(x)
                if device == 'cpu':
                    out.square().mean().backward()
                    assert all(p.grad is not None for p in net.parameters())


def test_few_kernels_are_compiled_for_a_net(monkeypatch):
    """One configuration for a shape, nothing tuned at run time, and the shapes of a net share most of them."""
    found = launches(monkeypatch)
    with FakeTensorMode():
        for width, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
            for state in (False, True):
                x = torch.empty(8, width, side, side, device='cuda').contiguous(memory_format=CL)
                h = x if state else None
                weights = (torch.empty(4, width, *tail, device='cuda') for tail in ((2, 3, 3), ()))
                tensors = (x, h, h, *weights)
                fused_cuda.forward('conv_lstm', *tensors, None, None)
                fused_cuda.backward('conv_lstm', *tensors, x, x if state else None)
    compiled = {
        (
            kind,
            *(
                (k, v if isinstance(v, fused_cuda.Shape) or k in ('GATES', 'num_warps') else v is None)
                for k, v in args.items()
            ),
        )
        for kind, _, args in found
    }
    assert len(found) == 32 and len(compiled) <= 24


def test_tensors_of_the_cpu_are_refused():
    tensors = torch.ones(1, 1, 2, 2), None, None, torch.ones(1, 1, 2, 3, 3), torch.ones(1, 1)
    with pytest.raises(ValueError, match='one CUDA device'):
        fused_cuda.forward('conv_rnn', *tensors, None, None)


def test_without_triton():
    script = 'import sys; sys.modules["triton"] = None; from timm_regnet_rnn.ops import fused_cuda as op; '
    script += 'print(op.unavailable())'
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.stdout.strip() == 'Triton is not installed', done.stderr


@pytest.fixture(autouse=True)
def poison():
    """What an op allocates is NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(name, shape, state=True, layout=NCHW, dtype=torch.float32, weight_dtype=torch.float32):
    """x, h, c, weight and bias, with gradients; without a state h and c are None."""
    gates, (_, n, *_) = NAMES[name], shape
    tensors = [torch.randn(shape, device=DEVICE).to(dtype, memory_format=layout) for _ in range(3)]
    tensors[1] = tensors[1] if state else None
    tensors[2] = tensors[2] if state and gates == 4 else None
    tensors += [(torch.randn(gates, n, *tail, device=DEVICE) / 3).to(weight_dtype) for tail in ((2, 3, 3), ())]
    return [None if t is None else t.requires_grad_() for t in tensors]


def run(step, tensors, name):
    """Outputs of a step and the gradients of all its inputs, for gradients of the outputs that differ everywhere."""
    outs = step(*tensors)[: 1 + (NAMES[name] == 4)]
    grads = [torch.linspace(-1, 1, out.numel()).bfloat16().view(out.shape).to(out) for out in outs]
    return [*outs, *torch.autograd.grad(outs, [t for t in tensors if t is not None], grads)]


def compare(name, tensors, step=None):
    """The fused step against the float64 reference of the same rounded inputs; returns what the step gave."""
    twins = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    got = run(step or fused.STEPS[name], tensors, name)
    want = run(getattr(reference, f'{name}_step'), twins, name)
    assert len(got) == len(want)
    tolerance = max(1e-5, 2 * torch.finfo(tensors[0].dtype).eps)
    for g, w in zip(got, want):
        assert g.shape == w.shape and scaled_error(g.double(), w) < tolerance
    return got


CASES = [
    ((1, 3, 5, 7), True, NCHW),  # strips that the map does not fill, planes packed in a program
    ((1, 3, 2, 3), False, CL),
    ((1, 6, 3, 2), True, CL),
    ((2, 2, 1, 1), True, NCHW),  # all neighbours lie outside
    ((1, 65, 1, 2), True, CL),  # two blocks of channels
    ((1, 32, 1, 18), True, CL),  # two tiles in a row: the GRU's overlap
    ((1, 2, 1, 65), True, NCHW),
]


@pytest.mark.parametrize('shape,state,layout', CASES, ids=str)
@pytest.mark.parametrize('name', NAMES)
def check_agrees(name, shape, state, layout):
    tensors = inputs(name, shape, state, layout)
    got = compare(name, tensors)
    assert all(g.is_contiguous(memory_format=layout) for g in got if g.shape == tensors[0].shape)


@pytest.mark.parametrize(
    'dtype,weight_dtype', [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str
)
@pytest.mark.parametrize('name', NAMES)
def check_half_precision(name, dtype, weight_dtype):
    tensors = inputs(name, (1, 2, 2, 5), True, CL, dtype, weight_dtype)
    got = compare(name, tensors)
    wanted = [t.dtype for t in tensors if t is not None]
    assert [g.dtype for g in got] == [dtype] * (len(got) - len(wanted)) + wanted


@pytest.mark.parametrize('name', ['conv_lstm'])
def check_autocast(name):
    """States are cast to autocast's type, weights are not, and every gradient has its tensor's type."""
    tensors = inputs(name, (1, 2, 1, 3))
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(fused.STEPS[name], tensors, name)
    rounded = [None if t is None else t.detach() for t in tensors]
    rounded = [None if t is None else t.bfloat16() if t.ndim == 4 else t for t in rounded]
    want = run(fused.STEPS[name], [None if t is None else t.requires_grad_() for t in rounded], name)
    assert got[0].dtype == torch.bfloat16 and got[-1].dtype == torch.float32 == got[-2].dtype
    assert all(torch.equal(g, w.to(g.dtype)) for g, w in zip(got, want))


@pytest.mark.parametrize('name', NAMES)
def check_other_layouts_and_views(name):
    """h of the other layout, c of a slice, x of neither layout, permuted weights."""
    tensors = [None if t is None else t.detach() for t in inputs(name, (1, 2, 2, 3))]
    tensors[0] = tensors[0].transpose(2, 3).contiguous().transpose(2, 3)
    tensors[1] = tensors[1].contiguous(memory_format=CL)
    tensors[2] = None if tensors[2] is None else torch.stack([tensors[2]] * 2, -1)[..., 0]
    tensors[3] = tensors[3].permute(1, 0, 2, 3, 4).contiguous().permute(1, 0, 2, 3, 4)
    compare(name, [None if t is None else t.requires_grad_() for t in tensors])


@pytest.mark.parametrize('name', ['conv_rnn'])
def check_sums_over_many_strips(name, monkeypatch):
    """Fewer programs than strips: each sums over several, the last over fewer; twice the same to the last bit."""
    monkeypatch.setattr(fused_cuda, 'WARPS', 2 * NAMES[name])
    tensors = inputs(name, (3, 2, 1, 3))
    assert all(map(torch.equal, compare(name, tensors), run(fused.STEPS[name], tensors, name)))


@pytest.mark.parametrize('name', NAMES)
def check_saturated_gates_stay_finite(name):
    """Pre-activations far beyond where an exponential of a float overflows."""
    tensors = [None if t is None else (t * 1e4).detach().requires_grad_() for t in inputs(name, (1, 2, 1, 3))]
    got = run(fused.STEPS[name], tensors, name)
    want, _ = getattr(reference, f'{name}_step')(*(None if t is None else t.double() for t in tensors))
    assert all(g.isfinite().all() for g in got) and scaled_error(got[0].double(), want) < 1e-5


INF, NAN = float('inf'), float('nan')


@pytest.mark.parametrize('name', NAMES)
def check_values_that_are_not_finite_or_huge(name):
    """Finite, infinite and NaN where the reference is; what is lost there is lost here in any case.

    More may be lost in two places, where a kernel multiplies the zeros around a map and torch's convolutions leave them
    out: next to the border by a weight that is not finite, and in a kernel's gradient by an x or h that is not.
    """
    spots = st.tuples(st.integers(0, 4), st.integers(0, 10**6), st.sampled_from([INF, -INF, NAN, 1e38, -1e38]))

    @given(
        places=st.lists(spots, min_size=1, max_size=2),
        state=st.booleans() if name != 'conv_gru' else st.just(True),  # without one r is never computed
        layout=st.sampled_from([NCHW, CL]),
    )
    @example([(4, 2, NAN)], name == 'conv_gru', NCHW)  # the LSTM's forget gate
    @example([(0, 0, INF), (0, 1, INF)], True, NCHW)  # the GRU's r is NaN above the map, with the weights of this seed
    @example([(3, 0, INF)], True, CL)
    @settings(max_examples=4, deadline=None, database=None, derandomize=True)
    def compare_places(places, state, layout):
        torch.manual_seed(9)
        tensors = inputs(name, (1, 2, 3, 4), state, layout)
        with torch.no_grad():
            for t in tensors:
                if t is not None:
                    t.clamp_(-1.5, 1.5)  # so that sums of two huge products overflow in every order or in none
            for which, place, value in places:
                t = tensors[which] if tensors[which] is not None else tensors[0]
                t[np.unravel_index(place % t.numel(), t.shape)] = value
        states = [t for t in tensors[:2] if t is not None]
        got = run(fused.STEPS[name], tensors, name)
        want = run(getattr(reference, f'{name}_step'), tensors, name)
        for ours, theirs in zip(got, want):
            more = not tensors[3].isfinite().all() or (ours.ndim == 5 and not all(t.isfinite().all() for t in states))
            kept = ours.isfinite() if more else torch.ones_like(ours, dtype=torch.bool)
            size = theirs.nan_to_num(0, 0, 0).abs().max().clamp(min=1).item()
            torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-4, atol=1e-4 * size, equal_nan=True)

    compare_places()


@pytest.mark.parametrize('name', ['conv_rnn', 'conv_lstm'])
def check_torch_knows_the_op(name):
    """Schema, autograd and fake kernel by torch's own check; checkpoints; one graph of torch.compile."""
    tensors, step = inputs(name, (1, 2, 1, 2), layout=CL), fused.STEPS[name]
    utils = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    torch_library.opcheck(getattr(torch.ops.timm_regnet_rnn, name).default, (*tensors, None, None), test_utils=utils)
    want = run(step, tensors, name)
    for other in (
        lambda *t: checkpoint(step, *t, use_reentrant=False),
        torch.compile(step, backend='aot_eager', fullgraph=True),
    ):
        assert all(map(torch.equal, run(other, tensors, name), want))


@pytest.mark.parametrize('name', NAMES)
def check_wrong_shapes_and_types_are_refused(name):
    """The kernels see addresses only: they must never be given what they would read beyond its end."""
    good = [None if t is None else t.detach() for t in inputs(name, (2, 2, 4, 4))]
    for i, bad in (
        (1, good[1][:1]),
        (3, good[3][:, :1]),
        (4, good[4][:, :1]),
        (1, good[1].half()),
        (0, good[0].double()),
        (3, good[3].half()),
    ):
        with pytest.raises(ValueError, match='must be|takes'):
            fused.STEPS[name](*good[:i], bad, *good[i + 1 :])


@pytest.mark.parametrize('name', NAMES)
def check_nothing_in_nothing_out(name):
    for shape in ((0, 2, 3, 3), (1, 2, 0, 8), (0, 2, 0, 0), (2, 2, 3, 0)):
        for state in (False, True):
            tensors = inputs(name, shape, state)
            got = run(fused.STEPS[name], tensors, name)
            outs = len(got) - sum(t is not None for t in tensors)
            assert all(out.shape == shape for out in got[:outs]) and not any(grad.any() for grad in got[outs:])
