"""What the regulator does to one image: its state, its gates and its share in the features, block by block.

Measured by forward hooks on a model's own modules, so that any regulated model can be looked at, also one that somebody
trained. The numbers per block:
  * hidden: h after BN and ReLU, which the fuse convolution reads, averaged over its channels (H, W);
  * gates: the mean of each sigmoid gate of the cell (paper, section 3.1), i, f and o of ConvLSTM or z and r of ConvGRU;
  * share: of the fuse convolution, which is W_x x + W_h h, the part from h: ‖W_h h‖ / (‖W_h h‖ + ‖W_x x‖).
"""

import base64
import html
import io
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from .conv_rnn import RegulatorCell
from .errors import UsageError
from .files import place
from .inference import Model, class_names, preprocessing, probabilities
from .ops import reference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['Block', 'Visualization', 'check_output', 'visualize', 'write']

SIGMOIDS = 'ifozr'  # the paper's letters of gates that are between 0 and 1; the others are candidates
COLUMNS = 12  # maps in a row of the figure, at most


@dataclass
class Block:
    """What was seen of one block.

    Attributes:
        name: As in the model, 'layer1.0'.
        shape: Of the state, (N, H, W).
        hidden: The state's mean over channels (H, W).
        gates: Mean of each gate over channels and positions; empty for ConvRNN, which has none.
        share: Percent of the fuse convolution's output that come from the state; None if it is no plain convolution.
    """

    name: str
    shape: Tuple[int, ...]
    hidden: np.ndarray
    gates: Dict[str, float]
    share: Optional[float] = None

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.name.rpartition('.')[0]


@dataclass
class Visualization:
    """What a model makes of an image.

    Attributes:
        model: The model's name, with its tag.
        image: The pixels that the model sees (H, W, 3), 8 bits.
        probabilities: The name of each class and its probability.
        blocks: In the order of depth; empty for a model without a regulator.
    """

    model: str
    image: np.ndarray
    probabilities: List[Tuple[str, float]]
    blocks: List[Block] = field(default_factory=list)

    @property
    def stages(self) -> List[Tuple[str, List[Block]]]:
        """The blocks of each stage."""
        return [(stage, list(blocks)) for stage, blocks in groupby(self.blocks, lambda block: block.stage)]

    def top(self, k: int = 5) -> List[Tuple[str, float]]:
        """The most probable classes."""
        return sorted(self.probabilities, key=lambda item: -item[1])[:k]

    def figure(self) -> 'Figure':
        """A matplotlib figure: the image and its classes, a row of maps per stage, gates and shares along depth.

        Raises:
            UsageError: matplotlib is not installed.
        """
        _matplotlib()
        from matplotlib.figure import Figure

        rows = [row for _, blocks in self.stages for row in _chunks(blocks)]
        columns = max([4, *(len(row) for row in rows)])
        heights = [2.3, 1.45 * max(1, len(rows)), 2.3]  # inches
        figure = Figure(figsize=(max(7.0, 1.25 * columns), sum(heights)), layout='constrained')
        parts: Any = figure.subfigures(3, 1, height_ratios=heights)
        top, middle, bottom = parts

        axes, beside = top.subplots(1, 2)
        axes.imshow(self.image)
        axes.set_title(self.model, fontsize=9)
        axes.axis('off')
        axes = beside
        names, values = zip(*self.top())
        axes.barh(range(len(names)), [100 * v for v in values], color='tab:purple')
        axes.set_yticks(range(len(names)), [name[:28] for name in names], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel('probability (%)', fontsize=8)

        for line, row in zip(middle.subplots(max(1, len(rows)), columns, squeeze=False), rows):
            for axes, block in zip(line, row):
                axes.imshow(block.hidden, cmap='viridis')
                axes.set_title(block.name, fontsize=7)
        for axes in middle.axes:
            axes.axis('off')

        ticks = range(len(self.blocks))
        gates = list(dict.fromkeys(gate for block in self.blocks for gate in block.gates))
        sides = bottom.subplots(1, 2 if gates else 1, squeeze=False)[0]
        if gates:
            axes = sides[0]
            for gate in gates:
                axes.plot(ticks, [block.gates.get(gate, np.nan) for block in self.blocks], marker='.', label=gate)
            axes.set_ylim(0, 1)
            axes.set_title('mean gate activity', fontsize=8)
            axes.legend(fontsize=7, ncols=3)
            axes.set_xlabel('block', fontsize=8)
        axes = sides[-1]
        axes.bar(ticks, [np.nan if block.share is None else block.share for block in self.blocks], color='tab:olive')
        axes.set_ylim(0, 100)
        axes.set_title('of the fuse convolution from h (%)', fontsize=8)
        axes.set_xlabel('block', fontsize=8)
        return figure

    def page(self) -> str:
        """The maps and numbers as a fragment of HTML, with the picture first; `STYLE` goes with it.

        Raises:
            UsageError: matplotlib, whose colours these are, is not installed.
        """
        colormap = _matplotlib().colormaps['viridis']
        height, width = self.image.shape[:2]
        sections = [f'<section class="top">{_tile(self.image, "input", f"input, {height}×{width}")}</section>']
        for stage, blocks in self.stages:
            channels, height, width = blocks[0].shape
            tiles = []
            for block in blocks:
                h = block.hidden - block.hidden.min()
                pixels = colormap(h / max(float(h.max()), 1e-12), bytes=True)
                tiles.append(_tile(pixels, 'map', block.name, _bars(block)))
            sections.append(
                f'<section><h2>{html.escape(stage)} <span>{channels} channels, {height}×{width}</span></h2>'
                f'<div class="tiles">{"".join(tiles)}</div></section>'
            )
        sections.append(f'<p>{LEGEND if self.blocks else NO_REGULATOR}</p>')
        columns = max((len(blocks) for _, blocks in self.stages), default=1)
        return f'<div class="maps" style="--columns:{columns}">{"".join(sections)}</div>'

    def document(self) -> str:
        """A whole HTML page that needs no other file and no network; errors as for `page`."""
        name = html.escape(self.model)
        classes = ''.join(f'<li><b>{100 * p:.1f} %</b> {html.escape(name)}</li>' for name, p in self.top())
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{name}</title><style>{DOCUMENT_STYLE}{STYLE}</style></head>'
            f'<body><h1>{name}</h1><ol>{classes}</ol>{self.page()}</body></html>\n'
        )


LEGEND = (
    'One map per block, a row per stage: the state <i>h</i> after the block, averaged over its channels. Yellow is '
    'where the state is largest, violet where it is smallest, on a scale of its own for each map. In every stage the '
    'state starts empty. Bars: the mean of each gate, and <i>h</i>, how much of the fuse convolution’s output comes '
    'from the state rather than from the block’s features.'
)
NO_REGULATOR = 'This model has no regulator, and so no maps.'
DOCUMENT_STYLE = """
:root { color-scheme: light dark; --body-text-color: light-dark(#222, #eee); }
body { max-width: 1100px; margin: 0 auto; padding: 16px; font: 16px/1.4 system-ui, sans-serif;
  color: var(--body-text-color); background: light-dark(#fff, #181818); }
h1 { font-size: 1.25em; overflow-wrap: anywhere; } ol { padding-left: 1.4em; }
"""
STYLE = """
.maps section { margin: 0 0 1.25em; }
.maps h2 { font-size: 1em; font-weight: 600; margin: 0 0 .4em; color: var(--body-text-color); }
.maps h2 span, .maps p, .maps figcaption { font-weight: 400; color: var(--body-text-color); opacity: .8; }
.maps h2 span, .maps figcaption { font-size: .875em; }
.maps .tiles {
  --tile: max(68px, min(200px, calc(100% / var(--columns) - 10px)));
  display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, var(--tile));
}
.maps .top figure { width: 150px; }
.maps p { margin: 0; line-height: 1.5; }
.maps figure { margin: 0; }
.maps img { display: block; width: 100%; border-radius: 6px; image-rendering: pixelated; }
.maps .bar { display: flex; gap: 4px; align-items: center; font-size: 11px; line-height: 1.35; }
.maps .bar i { flex: 0 0 8px; } .maps .bar span { flex: 0 0 28px; text-align: right; }
.maps .bar b { flex: 1; height: 5px; border-radius: 3px;
  background: linear-gradient(90deg, #7e57c2 var(--value), #8884 var(--value)); }
.maps .bar.share b { background: linear-gradient(90deg, #c0a000 var(--value), #8884 var(--value)); }
"""


def _matplotlib() -> Any:
    try:
        import matplotlib

        return matplotlib
    except ImportError:
        raise UsageError("drawing needs matplotlib: pip install 'timm-regnet-rnn[plot]'.") from None


def _chunks(blocks: List[Block]) -> List[List[Block]]:
    return [blocks[i : i + COLUMNS] for i in range(0, len(blocks), COLUMNS)]


def _tile(pixels: np.ndarray, name: str, caption: str, more: str = '') -> str:
    """A figure from pixels (H, W, C) of 8 bits; the browser enlarges them without smoothing."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    data = base64.b64encode(file.getvalue()).decode()
    caption = html.escape(caption)
    return (
        f'<figure class="{name}"><img alt="{name} {caption}" src="data:image/png;base64,{data}">'
        f'<figcaption>{caption}</figcaption>{more}</figure>'
    )


def _bars(block: Block) -> str:
    """The gates and the share of a block."""
    rows = [(gate, 'gate', value, f'{value:.2f}') for gate, value in block.gates.items()]
    if block.share is not None:
        rows.append(('h', 'share', block.share / 100, f'{block.share:.0f}%'))
    return ''.join(
        f'<div class="bar {kind}" title="{block.name} {name}: {text}"><i>{name}</i>'
        f'<b style="--value:{100 * value:.0f}%"></b><span>{text}</span></div>'
        for name, kind, value, text in rows
    )


def _gates(cell: RegulatorCell, x: torch.Tensor, h: Optional[torch.Tensor]) -> Dict[str, float]:
    """The mean of each sigmoid gate of a cell for its input and state (B, N, H, W)."""
    weight, bias = cell.kernel()
    return {
        gate: torch.sigmoid(reference.gate(x, h, weight[i], bias[i])).float().mean().item()
        for i, gate in enumerate(cell.gates)
        if gate in SIGMOIDS
    }


def _share(conv: nn.Module, both: torch.Tensor, width: int) -> Optional[float]:
    """How much of a fuse convolution's output comes from the last `width` channels of its input (B, C + N, H, W)."""
    if type(conv) is not nn.Conv2d:
        return None
    features = both.shape[1] - width
    from_x = F.conv2d(both[:, :features], conv.weight[:, :features]).float().norm().item()
    from_h = F.conv2d(both[:, features:], conv.weight[:, features:]).float().norm().item()
    return 100 * from_h / max(from_x + from_h, 1e-30)


def watch(model: Model, x: torch.Tensor) -> Tuple[torch.Tensor, List[Block]]:
    """Run a model on one image and look at its blocks.

    Args:
        model: In eval mode; whatever it is, only its regulated blocks are looked at.
        x: The image (1, C, H, W).

    Returns:
        Probabilities of the classes (N,), and the blocks.
    """
    blocks: Dict[str, Block] = {}
    gates: Dict[str, float] = {}

    def cell_hook(cell: RegulatorCell, inputs: Tuple[Any, ...], _: Any) -> None:
        gates.clear()
        gates.update(_gates(cell, inputs[0], inputs[1]))

    def hidden_hook(name: str, h: torch.Tensor) -> None:
        hidden = h[0].float().mean(0).cpu().numpy()
        blocks[name] = Block(name, tuple(h.shape[1:]), hidden, dict(gates))

    def fuse_hook(name: str, conv: nn.Module, both: torch.Tensor) -> None:
        blocks[name].share = _share(conv, both, blocks[name].shape[0])

    with ExitStack() as hooks:
        modules = dict(model.named_modules())
        for name, module in modules.items():
            block, _, leaf = name.rpartition('.')
            if isinstance(module, RegulatorCell):
                handle = module.register_forward_hook(cell_hook)
            elif leaf == 'act_h':
                handle = module.register_forward_hook(lambda _m, _i, h, block=block: hidden_hook(block, h))
            elif leaf == 'conv_fuse' and f'{block}.act_h' in modules:
                handle = module.register_forward_hook(lambda conv, i, _, block=block: fuse_hook(block, conv, i[0]))
            else:
                continue
            hooks.callback(handle.remove)
        with torch.inference_mode():
            return probabilities(model, x)[0], list(blocks.values())


def visualize(model: Model, image: Union[str, Path]) -> Visualization:
    """See what a model, and its regulator, make of an image.

    Args:
        model: A model from `inference.create` or from timm, in eval mode.
        image: The image's file.

    Returns:
        Arrays and numbers, with methods that draw them.

    Raises:
        UsageError: The image cannot be read.
    """
    config, prepare = preprocessing(model)
    x = prepare(image)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    seen = ((x * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    parameter = next(model.parameters())
    probability, blocks = watch(model, x.unsqueeze(0).to(parameter.device, parameter.dtype))
    cfg = model.pretrained_cfg
    name = '.'.join(filter(None, (cfg.get('architecture'), cfg.get('tag'))))
    pixels = seen.expand(-1, -1, 3).contiguous().numpy()
    return Visualization(name, pixels, list(zip(class_names(model), probability.tolist())), blocks)


def check_output(name: Union[str, Path]) -> Path:
    """The file to write.

    Raises:
        UsageError: Its ending is none that `write` knows, or there is no such folder.
    """
    file = Path(name)
    if file.suffix not in ('.html', '.png'):
        raise UsageError(f'the output must end in .html or .png, got {str(file)!r}.')
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f'{str(file)!r} is a folder.' if file.is_dir() else f'no folder {str(file.parent)!r}.')
    return file


def write(seen: Visualization, file: Path) -> None:
    """Write a visualization as a page or a picture, by the file's ending.

    Raises:
        UsageError: The model has no regulator, or matplotlib is not installed.
        OSError: The file cannot be written.
    """
    if not seen.blocks:
        raise UsageError(f'{seen.model!r} has no regulator to look at.')
    if file.suffix == '.html':
        data = seen.document().encode()
    else:
        out = io.BytesIO()
        seen.figure().savefig(out, format='png', dpi=150)
        data = out.getvalue()
    place(file, data, lambda scratch: None)
