"""RegNets against their ResNets, and the regulator's step against plain PyTorch and the memory's bandwidth.

    python -m benchmarks.speed [--device cpu|cuda] [--threads 1] [--rounds 7] [--only TEXT] [--profile]
    python -m benchmarks.speed --engines      # what people deploy with: ONNX Runtime, OpenVINO, torch.compile
    python -m benchmarks.speed --device cuda --quick   # what a GPU has to show, in under five minutes

One process, everything in turn: a ratio is taken within a round, so a machine that is busy at times slows both sides
of it. The tables give the median over rounds and the range; images/s and milliseconds are those of this device.
Data are random, layout is channels_last. `fused` and `reference` are the implementations of the regulator's step;
`compiled` is torch.compile, `graphs` the same with CUDA graphs (mode='reduce-overhead'); `deployed` has every norm that
follows a convolution folded into it, in the ResNet too. An engine reads what `timm-regnet-rnn export` writes, and each
net runs with the fastest of the engine's settings for that many threads.
"""

import argparse
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Callable, Dict, Iterator, List, Optional, Tuple
from unittest import mock

import timm
import torch
from torch.nn.functional import cross_entropy

from timm_regnet_rnn import ops
from timm_regnet_rnn.complexity import complexity
from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.export import _to_onnx
from timm_regnet_rnn.ops import fused_cuda
from timm_regnet_rnn.training.record import device_name

Step = Callable[[], None]
CL = torch.channels_last


@dataclass(frozen=True)
class Case:
    """One RegNet beside its ResNet.

    Attributes:
        work: 'training', 'inference', or 'inference, ' and an engine of ENGINES.
        regnet: The model.
        batch: Images at once.
        dtype: 'float32', or 'bfloat16' by autocast.
        form: 'eager', 'compiled', 'graphs' or 'deployed'.
        op: Implementation of the step, 'fused' or 'reference'.
    """

    work: str
    regnet: str
    batch: int
    dtype: str = 'float32'
    form: str = 'eager'
    op: str = 'fused'

    @property
    def resnet(self) -> str:
        """The model it is measured against."""
        depth = self.regnet.split('_')[-1]
        return f'cifar_resnet_{depth}' if int(depth) in (20, 32, 44, 56, 110) else f'resnet{depth}'

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return 32 if self.resnet.startswith('cifar') else 224

    def __str__(self) -> str:
        return f'{self.work}, {self.form}, {self.dtype}, batch {self.batch}, {self.size}x{self.size}'


DEPLOYED = Case('inference', 'regnet_convlstm_50', 8, form='deployed')
TRAINED = Case('training', 'regnet_convlstm_20', 128)
CPU_CASES = [
    *(replace(TRAINED, regnet=f'regnet_{cell}_20') for cell in CELLS),
    replace(TRAINED, op='reference'),
    replace(TRAINED, dtype='bfloat16'),
    *(replace(DEPLOYED, regnet=f'regnet_{cell}_50') for cell in CELLS),
    replace(DEPLOYED, op='reference'),
    replace(DEPLOYED, batch=1),
    replace(DEPLOYED, dtype='bfloat16'),
    replace(DEPLOYED, work='inference, ONNX Runtime', op='reference'),
    Case('inference', 'regnet_convlstm_20', 128, form='compiled'),
]
ENGINE_CASES = [
    replace(DEPLOYED, work='inference, ONNX Runtime', op='reference'),
    replace(DEPLOYED, work='inference, OpenVINO', op='reference'),
    replace(DEPLOYED, form='compiled'),
    Case('inference', 'regnet_convlstm_20', 128, form='compiled'),
]
GPU = Case('training', 'regnet_convlstm_50', 256, 'bfloat16')
GPU_CASES = [
    *(replace(GPU, regnet=f'regnet_{cell}_50') for cell in CELLS),
    replace(GPU, op='reference'),
    replace(GPU, form='compiled'),
    replace(GPU, dtype='float32', batch=128),
    replace(GPU, work='inference'),
    replace(GPU, work='inference', form='compiled'),
    replace(GPU, work='inference', form='compiled', batch=1),
    replace(GPU, work='inference', form='deployed'),
    Case('training', 'regnet_convlstm_20', 1024, 'bfloat16'),
]
QUICK_CASES = {  # without what takes minutes to compile
    'cpu': [replace(TRAINED, batch=16), Case('inference', 'regnet_convlstm_20', 8, form='graphs')],
    'cuda': [
        GPU,
        replace(GPU, op='reference'),
        replace(GPU, work='inference', form='deployed'),
        replace(GPU, work='inference', form='graphs', batch=1),
        Case('training', 'regnet_convlstm_20', 1024, 'bfloat16'),
    ],
}
# Shapes of the step: a first and a last stage of a net for ImageNet, and a CIFAR net's.
CPU_SHAPES = [(8, 64, 56, 56), (8, 512, 7, 7), (128, 16, 32, 32)]
GPU_SHAPES = [(256, 64, 56, 56), (256, 512, 7, 7), (1024, 16, 32, 32)]


def make_model(case: Case, regulated: bool, device: str) -> torch.nn.Module:
    """The RegNet of a case, or its ResNet, in the form asked for."""
    kwargs = {} if regulated else dict(regulator='none')  # our ResNet: the norms of timm's do not fold
    model = timm.create_model(case.regnet, **kwargs)
    model = model.to(device, memory_format=CL).train(case.work == 'training')
    if case.form == 'deployed':
        model = timm.utils.reparameterize_model(model)
    return model


def make_step(case: Case, model: torch.nn.Module, device: str, size: Optional[int] = None) -> Step:
    """A training step or a forward pass on fixed random data, of the model's own image size if `size` is None."""
    size = size or case.size
    x = torch.randn(case.batch, 3, size, size, device=device).contiguous(memory_format=CL)
    for engine, settings in ENGINES.items():
        if engine in case.work:
            return fastest(settings(model, x))
    mode = 'reduce-overhead' if case.form == 'graphs' else None
    net = torch.compile(model, mode=mode) if case.form in ('compiled', 'graphs') else model
    cast = torch.autocast(device, torch.bfloat16, enabled=case.dtype == 'bfloat16')
    if case.work == 'inference':

        def step() -> None:
            with torch.inference_mode(), cast:
                net(x)

        return step
    y = torch.randint(model.num_classes, (case.batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with cast:
            loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()

    return step


def exported(model: torch.nn.Module, x: torch.Tensor) -> bytes:
    """The ONNX file of a model, for any batch."""
    with ops.use('reference'), torch.no_grad():
        return _to_onnx(model, x.contiguous(), torch.export.Dim('batch', min=1), {})


def onnx_runtime(model: torch.nn.Module, x: torch.Tensor) -> List[Step]:
    """Forward passes with as many threads as torch has: threads that wait busily, and threads that sleep."""
    import onnxruntime

    data, feed = exported(model, x), {'image': x.contiguous().numpy()}

    def run(spinning: str) -> Step:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry('session.intra_op.allow_spinning', spinning)
        session = onnxruntime.InferenceSession(data, options, providers=['CPUExecutionProvider'])
        return lambda: session.run(None, feed)

    return [run(spinning) for spinning in ('1', '0')]


def openvino(model: torch.nn.Module, x: torch.Tensor) -> List[Step]:
    """Forward passes with as many threads as torch has: pinned to cores, and not."""
    import openvino

    core, feed = openvino.Core(), {0: x.contiguous().numpy()}
    net = core.read_model(exported(model, x))

    def run(pinned: bool) -> Step:
        settings = dict(
            PERFORMANCE_HINT='LATENCY', INFERENCE_NUM_THREADS=torch.get_num_threads(), ENABLE_CPU_PINNING=pinned
        )
        request = core.compile_model(net, 'CPU', settings).create_infer_request()
        return lambda: request.infer(feed)

    return [run(pinned) for pinned in (True, False)]


ENGINES: Dict[str, Callable[[torch.nn.Module, torch.Tensor], List[Step]]] = {
    'ONNX Runtime': onnx_runtime,
    'OpenVINO': openvino,
}


def fastest(steps: List[Step]) -> Step:
    """The step whose best of three, after one to warm up, is least."""
    return min(steps, key=lambda step: min([seconds(step, '', 'cpu') for _ in range(4)][1:]))


def seconds(step: Step, op: str, device: str) -> float:
    """How long a step takes with one implementation of the regulator's op."""
    ops.set_ops('reference' if op == 'reference' else '')
    if device == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def interleaved(steps: Dict[str, Tuple[Step, str]], rounds: int, device: str) -> Dict[str, List[float]]:
    """Seconds of each step in each round, after two rounds to warm up."""
    found: Dict[str, List[float]] = {name: [] for name in steps}
    for turn in range(-2, rounds):
        for name, (step, op) in steps.items():
            taken = seconds(step, op, device)
            if turn >= 0:
                found[name].append(taken)
    return found


def spread(ratios: List[float]) -> str:
    """Median and range."""
    return f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'


def memory(case: Case, regulated: bool, device: str) -> float:
    """Bytes of a training step of a net of its own: the peak on a GPU, on a CPU what autograd saves."""
    ops.set_ops('reference' if case.op == 'reference' else '')
    if device == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = make_step(case, make_model(case, regulated, device), device)
        step()
        step()  # with the optimizer's state
        return torch.cuda.max_memory_allocated() - before
    model = make_model(case, regulated, device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: Dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        make_step(case, model, device)()
    return sum(saved.values())


def model_rows(cases: List[Case], rounds: int, device: str) -> Iterator[str]:
    """The table of models; cases with the same ResNet, batch and form are measured in the same rounds."""
    yield '| what | model | op | images/s | to its ResNet | multiply-adds allow | training memory to its ResNet |'
    yield '|---|---|---|---|---|---|---|'
    groups: Dict[Tuple, List[Case]] = {}
    for case in cases:
        groups.setdefault((str(case), case.resnet), []).append(case)
    for group in groups.values():
        torch.compiler.reset()
        steps = {'': (make_step(group[0], make_model(group[0], False, device), device), '')}
        for case in group:
            steps[case] = make_step(case, make_model(case, True, device), device), case.op
        found = interleaved(steps, rounds, device)
        for case in group:
            with torch.device('meta'):
                macs = [complexity(timm.create_model(name).eval())['macs'] for name in (case.resnet, case.regnet)]
            ratio = spread([base / own for base, own in zip(found[''], found[case])])
            held = ''
            if case.work == 'training' and case.form == 'eager':
                held = f'{memory(case, True, device) / memory(case, False, device):.2f}'
            speed = case.batch / statistics.median(found[case])
            yield (
                f'| {case} | `{case.regnet}` | {case.op} | {speed:.1f} | {ratio} | {macs[0] / macs[1]:.2f} | {held} |'
            )


def op_rows(shapes: List[Tuple[int, ...]], rounds: int, device: str) -> Iterator[str]:
    """The table of the step: against plain PyTorch, and against a copy that moves as many bytes as it must."""
    yield '| step | state (B, N, H, W) | milliseconds | over plain PyTorch | of a copy of the same bytes |'
    yield '|---|---|---|---|---|'
    dtype = torch.bfloat16 if device == 'cuda' else torch.float32
    for shape in shapes:
        for cell, kind in CELLS.items():
            tensors = [torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=CL) for _ in range(3)]
            weight, bias = (t.detach() for t in kind(shape[1], device=device).kernel())
            x, h, c = tensors[0], tensors[1], tensors[2] if cell == 'convlstm' else None
            moved = 5 if cell == 'convlstm' else 3  # reads x, h and c, writes h and c
            source = torch.randn(moved * x.numel() // 2, device=device, dtype=dtype)
            target = torch.empty_like(source)

            def forward(kind=kind, args=(x, h, c, weight, bias)) -> None:
                with torch.inference_mode():
                    kind.step(*args)

            steps = {
                'fused': (forward, 'fused'),
                'reference': (forward, 'reference'),
                'copy': (lambda target=target, source=source: target.copy_(source), ''),
            }
            found = interleaved(steps, 3 * rounds, device)
            gain = spread([a / b for a, b in zip(found['reference'], found['fused'])])
            bound = spread([a / b for a, b in zip(found['copy'], found['fused'])])
            yield f'| {cell} | {shape} | {1000 * statistics.median(found["fused"]):.3f} | {gain} | {bound} |'


def warps_rows(shapes: List[Tuple[int, ...]], rounds: int, device: str) -> Iterator[str]:
    """The table that says whether a GPU wants more or fewer warps a program than `fused_cuda` gives: its speed then."""
    yield '| step | state (B, N, H, W) | half the warps | double |'
    yield '|---|---|---|---|'
    rule = fused_cuda._shape
    dtype = torch.bfloat16 if device == 'cuda' else torch.float32
    for shape in shapes:
        x, h, c = (torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=CL) for _ in range(3))
        for cell, kind in CELLS.items():
            weight, bias = (t.detach() for t in kind(shape[1], device=device).kernel())

            def step(factor: float, kind=kind, args=(x, h, c if cell == 'convlstm' else None, weight, bias)) -> None:
                def scaled(*like):
                    tiles, warps = rule(*like)
                    return tiles, max(1, int(factor * warps))

                with torch.inference_mode(), mock.patch.object(fused_cuda, '_shape', scaled):
                    kind.step(*args)

            found = interleaved(
                {str(factor): (lambda factor=factor, step=step: step(factor), 'fused') for factor in (0.5, 1, 2)},
                3 * rounds,
                device,
            )
            half, double = (spread([a / b for a, b in zip(found['1'], found[k])]) for k in ('0.5', '2'))
            yield f'| {cell} | {shape} | {half} | {double} |'


def profile(cases: List[Case], device: str, steps: int = 3) -> None:
    """Print where a step's time goes, operator by operator, for the RegNet beside its ResNet."""
    clock = 'self_cpu_time_total' if device == 'cpu' else 'self_device_time_total'  # microseconds
    for case in cases:
        spent: List[Dict[str, float]] = []
        for regulated in (False, True):
            step = make_step(case, make_model(case, regulated, device), device)
            seconds(step, case.op, device)
            with torch.profiler.profile() as found:
                for _ in range(steps):
                    seconds(step, case.op, device)
            spent.append({e.key: getattr(e, clock) / 1000 / steps for e in found.key_averages()})
        print(
            f'\n{case}: milliseconds a step\n\n| operator | {case.resnet} | {case.regnet}, {case.op} |\n|---|---|---|'
        )
        resnet, regnet = ({**times, 'all': sum(times.values())} for times in spent)
        for key in sorted(regnet, key=regnet.get, reverse=True)[:16]:
            print(f'| {key} | {resnet.get(key, 0):.1f} | {regnet[key]:.1f} |')


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='default: %(default)s')
    parser.add_argument('--rounds', type=int, help='default: 7, or 3 if --quick')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='default: %(default)s')
    parser.add_argument('--engines', action='store_true', help='ONNX Runtime, OpenVINO and torch.compile on the CPU')
    parser.add_argument('--quick', action='store_true', help='few cases and three rounds')
    parser.add_argument('--only', default='', metavar='TEXT', help="cases whose description has it, e.g. 'bfloat16'")
    parser.add_argument('--profile', action='store_true', help='print where the time goes instead')
    args = parser.parse_args()
    args.rounds = (3 if args.quick else 7) if args.rounds is None else args.rounds
    if args.rounds < 1 or args.threads < 1:
        parser.error('--rounds and --threads must be at least 1')
    if args.engines and (args.quick or args.profile or args.device != 'cpu'):
        parser.error('--engines is for the CPU, and neither --quick nor --profile')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('torch sees no GPU; --device cpu')
    warnings.filterwarnings('ignore', message='.*torch.compile|.*TF32|.*deprecated')
    torch.set_num_threads(args.threads)
    cases, shapes = (GPU_CASES, GPU_SHAPES) if args.device == 'cuda' else (CPU_CASES, CPU_SHAPES)
    if args.engines:
        missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime', 'openvino') if find_spec(name) is None]
        if missing:
            parser.error(f'--engines needs {", ".join(missing)}: pip install {" ".join(missing)}')
        cases = ENGINE_CASES
    elif args.quick:
        cases, shapes = QUICK_CASES[args.device], shapes if args.device == 'cuda' else [(2, 16, 8, 8)]
    cases = [case for case in cases if args.only in f'{case} {case.regnet} {case.op}']
    if args.profile:
        return profile(cases, args.device)
    begin = time.monotonic()
    torch_version = torch.__version__.split('+')[0]
    print(f'{device_name(args.device)}, {args.threads} threads, torch {torch_version}, {args.rounds} rounds\n')
    for line in model_rows(cases, args.rounds, args.device):
        print(line, flush=True)
    if not (args.only or args.engines):
        for table in (op_rows, warps_rows) if args.quick else (op_rows,):
            print()
            for line in table(shapes, args.rounds, args.device):
                print(line, flush=True)
    print(f'\n{time.monotonic() - begin:.0f} s')


if __name__ == '__main__':
    main()
