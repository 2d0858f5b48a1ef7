"""RegNets against their ResNets on CPU, in one process and interleaved: training, and inference as deployed.

    python benchmarks/speed.py [--rounds 9] [--threads N]

Prints a Markdown table. A ratio is images per second over the ResNet's, taken round by round: both nets run within
moments of each other, so that a machine that is busy at times slows both. Median and range over rounds; beside it the
ratio that the multiply-adds alone allow. Channels_last, float32, random data.
"""

import argparse
import statistics
import time
from typing import Callable, Dict, List

import timm
import torch

from timm_regnet_rnn import ops
from timm_regnet_rnn.complexity import complexity
from timm_regnet_rnn.record import device_name

TRAINING = ('cifar_resnet_20', ('regnet_convrnn_20', 'regnet_convgru_20', 'regnet_convlstm_20'), 128, 32)
INFERENCE = ('resnet50', ('regnet_convrnn_50', 'regnet_convgru_50', 'regnet_convlstm_50'), 8, 224)


def images(batch: int, size: int) -> torch.Tensor:
    """Random images (batch, 3, size, size) in channels_last."""
    return torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


def training_step(name: str, batch: int, size: int) -> Callable[[], None]:
    """One SGD step of a model on fixed random data."""
    model = timm.create_model(name).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = images(batch, size), torch.randint(model.num_classes, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def inference_step(name: str, batch: int, size: int) -> Callable[[], None]:
    """One forward pass of a model as deployed, with every norm folded into its convolution; ResNets too."""
    kwargs = {} if 'regnet' in name else dict(regulator='none')  # our ResNet, since timm's does not fold its norms
    twin = name if kwargs == {} else f'regnet_convlstm_{name.removeprefix("resnet")}'
    model = timm.utils.reparameterize_model(timm.create_model(twin, **kwargs).eval())
    model = model.to(memory_format=torch.channels_last)
    x = images(batch, size)

    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


def rates(steps: Dict[str, Callable[[], None]], batch: int, rounds: int) -> Dict[str, List[float]]:
    """Images per second of each step in each round, after one round to warm up."""
    found: Dict[str, List[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                found[name].append(batch / (time.perf_counter() - start))
    return found


def table(rounds: int) -> List[str]:
    """The lines of the table."""
    lines = [
        '| | model | op | images/s | to its ResNet: median (range) | multiply-adds allow |',
        '|---|---|---|---|---|---|',
    ]
    for kind, make, (resnet, models, batch, size) in (
        ('training', training_step, TRAINING),
        ('inference', inference_step, INFERENCE),
    ):
        steps, macs = {(resnet, ''): make(resnet, batch, size)}, {}
        for name in (resnet, *models):
            macs[name] = complexity(timm.create_model(name, device='meta').eval())['macs']
        for name in models:
            step = make(name, batch, size)
            for op in ('reference', 'fused'):
                steps[name, op] = lambda op=op, step=step: (ops.set_ops(op), step())
        found = rates(steps, batch, rounds)
        for (name, op), values in found.items():
            ratios = [value / base for value, base in zip(values, found[resnet, ''])]
            median = statistics.median(ratios)
            ratio = f'{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})' if op else ''
            allowed = f'{macs[resnet] / macs[name]:.2f}' if op else ''
            what = f'{kind}, batch {batch}, {size}x{size}'
            lines.append(f'| {what} | `{name}` | {op} | {statistics.median(values):.1f} | {ratio} | {allowed} |')
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=9, help='default: %(default)s')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='default: %(default)s')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = table(args.rounds)
    print(f'{device_name("cpu")}, torch {torch.__version__}, {args.rounds} rounds:\n')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
