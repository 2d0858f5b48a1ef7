"""Plot how the cost of a regulator grows with depth, width, image size and batch.

    python -m benchmarks.scaling [--device cpu|cuda] [--threads 1] [--rounds 5] [--to benchmarks/scaling.svg]

Time of a RegNet over that of its ResNet, for nets of the CIFAR kind, each point measured in turn with its ResNet: the
median over rounds and the range; dashed, what the multiply-adds alone would cost. Eager, float32, channels_last.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch

from benchmarks.speed import Case, interleaved, make_step
from timm_regnet_rnn.complexity import complexity, on_meta
from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.training.record import device_name

# Axis -> label and values; what is not varied stays at depth 20, width 16, 32x32 and a batch of 32.
AXES: Dict[str, Any] = dict(
    depth=('depth', (20, 32, 56, 110)),
    width=('width of the first stage', (16, 32, 64)),
    size=('height and width of images', (16, 32, 64)),
    batch=('batch', (1, 8, 32, 128)),
)
DEFAULTS = dict(depth=20, width=16, size=32, batch=32)
COLOURS = dict(convrnn='#0072b2', convgru='#009e73', convlstm='#d55e00')


def measure(
    work: str, rounds: int, device: str, depth: int, width: int, size: int, batch: int
) -> Dict[str, List[float]]:
    """Times over the ResNet's, by cell, one a round; and under `allowed CELL` what the multiply-adds say."""
    names = {'': f'cifar_resnet_{depth}', **{cell: f'regnet_{cell}_{depth}' for cell in CELLS}}
    kwargs = dict(channels=(width, 2 * width, 4 * width))
    steps, macs = {}, {}
    for cell, name in names.items():
        model = timm.create_model(name, **kwargs).to(device, memory_format=torch.channels_last)
        steps[cell] = make_step(Case(work, name, batch), model.train(work == 'training'), device, size), 'fused'
        macs[cell] = complexity(on_meta(name, **kwargs).eval(), (3, size, size))['macs']
    found = interleaved(steps, rounds, device)
    ratios = {cell: [own / base for own, base in zip(found[cell], found[''])] for cell in CELLS}
    return ratios | {f'allowed {cell}': [macs[cell] / macs['']] for cell in CELLS}


def draw(file: Path, rounds: int, device: str) -> None:
    """Measure all points and draw them."""
    from matplotlib.figure import Figure

    figure = Figure((12, 6), layout='constrained')
    panels = figure.subplots(2, len(AXES), sharey=True, squeeze=False)
    for row, work in zip(panels, ('inference', 'training')):
        for axes, (axis, (label, values)) in zip(row, AXES.items()):
            points = [measure(work, rounds, device, **{**DEFAULTS, axis: value}) for value in values]
            for cell, colour in COLOURS.items():
                middle = [statistics.median(point[cell]) for point in points]
                low, high = ([pick(point[cell]) for point in points] for pick in (min, max))
                axes.plot(values, middle, 'o-', color=colour, ms=4, label=cell)
                axes.fill_between(values, low, high, color=colour, alpha=0.15, lw=0)
                axes.plot(values, [point[f'allowed {cell}'][0] for point in points], '--', color=colour, lw=0.8)
            axes.set_xscale('log', base=2)
            axes.set_xticks(values, values)
            axes.minorticks_off()
            axes.set_xlabel(label)
        row[0].set_ylabel(f'{work}: time over the ResNet')
        row[0].set_ylim(bottom=1)
    panels[0][0].legend(frameon=False)
    setting = ', '.join(f'{name} {value}' for name, value in DEFAULTS.items())
    figure.suptitle(f'Otherwise {setting}. {device_name(device)}, torch {torch.__version__.split("+")[0]}', size=9)
    figure.savefig(file)
    print(file)


def main() -> None:
    """Measure and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='default: %(default)s')
    parser.add_argument('--rounds', type=int, default=5, help='default: %(default)s')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='default: %(default)s')
    parser.add_argument('--to', type=Path, default=Path('benchmarks/scaling.svg'), help='default: %(default)s')
    args = parser.parse_args()
    if not args.to.parent.is_dir():
        parser.error(f'--to: no folder {str(args.to.parent)!r}')
    torch.set_num_threads(args.threads)
    draw(args.to, args.rounds, args.device)


if __name__ == '__main__':
    main()
