"""What the regulator does to one image: its state, its gates and its share in the features, block by block.

Measured by forward hooks on a model's own modules, so that any regulated model can be looked at, also one that somebody
trained. The numbers per block:
  * hidden: h after BN and ReLU, which the fuse convolution reads, averaged over its channels (H, W);
  * gates: the mean of each sigmoid gate of the cell (paper, section 3.1), i, f and o of ConvLSTM or z and r of ConvGRU;
  * share: of the fuse convolution, which is W_x x + W_h h, the part from h: ‖W_h h‖ / (‖W_h h‖ + ‖W_x x‖) over the
    positions of each output channel, then the mean over the channels. Each counts by itself, since the norm behind the
    convolution makes their scales arbitrary; so a net folded for deployment has the share that it had before.
"""

import base64
import html
import io
import re
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
        share: Percent of the fuse convolution's output that come from the state; None if it is no convolution of
            torch's.
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
        model: The model's name.
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
        columns = max([3, *(len(row) for row in rows)])
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
        axes.set_yticks(range(len(names)), [name[:28] for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel('probability (%)', fontsize=8)
        axes.tick_params(labelsize=8)

        for line, row in zip(middle.subplots(max(1, len(rows)), columns, squeeze=False), rows):
            for axes, block in zip(line, row):
                axes.imshow(block.hidden, cmap='viridis')
                axes.set_title(block.name, fontsize=7)
        for axes in middle.axes:
            axes.axis('off')

        gates = list(dict.fromkeys(gate for block in self.blocks for gate in block.gates))
        sides = bottom.subplots(1, 2 if gates else 1, squeeze=False)[0]
        starts = [self.blocks.index(blocks[0]) for _, blocks in self.stages]
        for start, (_, blocks) in zip(starts, self.stages):  # every stage has a cell, and a beginning, of its own
            ticks = range(start, start + len(blocks))
            for i, gate in enumerate(gates):
                line = [block.gates.get(gate, np.nan) for block in blocks]
                style = dict(color=f'C{i}', marker='o^s'[i], ms=4, mfc='none', label=gate if start == 0 else None)
                sides[0].plot(ticks, line, **style)
            share = [np.nan if block.share is None else block.share for block in blocks]
            sides[-1].bar(ticks, share, color='tab:olive')
        if gates:
            sides[0].set_ylim(0, 1)
            sides[0].set_title('mean of each gate', fontsize=8)
            sides[0].legend(fontsize=7, ncols=3)
        sides[-1].set_ylim(0, 100)
        sides[-1].set_title('of the fuse convolution from h (%)', fontsize=8)
        for axes in sides:
            axes.set_xticks(starts, [stage for stage, _ in self.stages], ha='left')
            axes.tick_params(labelsize=8)
            for start in starts[1:]:
                axes.axvline(start - 0.5, color='#999', lw=0.7, ls=':')
        return figure

    def page(self) -> str:
        """The maps and numbers as a fragment of HTML, with the picture first; `STYLE` goes with it.

        Raises:
            UsageError: matplotlib, whose colours these are, is not installed.
        """
        return self._maps('', f'<p>{self._legend}</p>')

    def document(self) -> str:
        """A whole HTML page that needs no other file and no network; errors as for `page`."""
        name = html.escape(self.model)
        classes = ''.join(f'<li><b>{100 * p:.1f} %</b> {html.escape(name)}</li>' for name, p in self.top())
        title = re.sub('[._]', '<wbr>\\g<0>', name)  # a narrow screen breaks the name where a reader would
        maps = self._maps(f'<ol>{classes}</ol><p>{self._legend}</p>', '')
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{name}</title><style>{DOCUMENT_STYLE}{STYLE}</style></head>'
            f'<body><h1>{title}</h1>{maps}</body></html>\n'
        )

    @property
    def _legend(self) -> str:
        return LEGEND if self.blocks else NO_REGULATOR

    def _maps(self, beside: str, below: str) -> str:
        """The picture with HTML beside it, a section per stage, and HTML below."""
        colormap = _matplotlib().colormaps['viridis']
        height, width = self.image.shape[:2]
        sections = [f'<section class="top">{_tile(self.image, "input", f"input, {height}×{width}")}{beside}</section>']
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
        columns = max((len(blocks) for _, blocks in self.stages), default=1)
        return f'<div class="maps" style="--columns:{columns}">{"".join(sections)}{below}</div>'


LEGEND = (
    'One map per block, a row per stage: the state <i>h</i> after the block, averaged over its channels. Yellow is '
    'where the state is largest, violet where it is smallest, on a scale of its own for each map. In every stage the '
    'state starts empty. Bars: the mean of each gate, from 0 (closed) to 1 (open), and <i>h</i>, how much of the fuse '
    'convolution’s output comes from the state rather than from the block’s features.'
)
NO_REGULATOR = 'This model has no regulator, and so no maps.'
DOCUMENT_STYLE = """
:root { color-scheme: light dark; --body-text-color: light-dark(#222, #eee); }
body { max-width: 1100px; margin: 0 auto; padding: 16px; font: 16px/1.4 system-ui, sans-serif;
  color: var(--body-text-color); background: light-dark(#fff, #181818); }
h1 { font-size: 1.25em; overflow-wrap: anywhere; }
.maps .top { display: flex; flex-wrap: wrap; gap: 12px 24px; align-items: flex-start; }
.top ol { flex: 0 1 auto; margin: 0; padding-left: 1.4em; }
.top p { flex: 1 1 300px; max-width: 640px; font-size: .9em; }
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
    """How much of a fuse convolution's output comes from the last `width` channels of its input (1, C + N, H, W).

    An output channel to which neither contributes is left out; 0 where all are such.
    """
    if not isinstance(conv, nn.Conv2d):
        return None
    features = both.shape[1] - width
    from_x = F.conv2d(both[:, :features], conv.weight[:, :features]).float().transpose(0, 1).flatten(1).norm(dim=1)
    from_h = F.conv2d(both[:, features:], conv.weight[:, features:]).float().transpose(0, 1).flatten(1).norm(dim=1)
    live = from_x + from_h > 0
    return 100 * (from_h / (from_x + from_h))[live].mean().item() if live.any() else 0.0


def watch(model: Model, x: torch.Tensor) -> Tuple[torch.Tensor, List[Block]]:
    """Run a model on one image and look at its blocks.

    Args:
        model: Whatever it is, only its regulated blocks are looked at, in eval mode; it is left as it was.
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
        for module in (module for module in modules.values() if module.training):
            hooks.callback(setattr, module, 'training', True)
        model.eval()
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


def visualize(model: Model, image: Union[str, Path], name: Optional[str] = None) -> Visualization:
    """See what a model, and its regulator, make of an image.

    Args:
        model: A model from `inference.create` or from timm; hooks are on it only as long as this runs.
        image: The image's file.
        name: What to call the model; its architecture if None.

    Returns:
        Arrays and numbers, with methods that draw them.

    Raises:
        UsageError: The image cannot be read, the model is no classifier of timm's, or what it computes is not finite.
    """
    model = getattr(model, '_orig_mod', model)  # what torch.compile took: a compiled graph calls no hooks
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict) or not getattr(model, 'num_classes', 0):
        raise UsageError(f'the model must be a classifier of timm with its settings, got a {type(model).__name__}.')
    config, prepare = preprocessing(model)
    x = prepare(image)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    seen = ((x * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    parameter = next(model.parameters())
    probability, blocks = watch(model, x.unsqueeze(0).to(parameter.device, parameter.dtype))
    name = name or cfg.get('architecture') or type(model).__name__
    if not all(np.isfinite(block.hidden).all() for block in blocks):
        raise UsageError(f'{name!r} computes values that are not finite from this image: its weights are broken.')
    pixels = seen.expand(-1, -1, 3).contiguous().numpy()
    return Visualization(name, pixels, list(zip(class_names(model), probability.tolist())), blocks)


def check_output(name: Union[str, Path], image: Union[str, Path]) -> Path:
    """The file to write.

    Args:
        name: The file.
        image: The image that is looked at.

    Raises:
        UsageError: Its ending is none that `write` knows, there is no such folder, or it is the image.
    """
    file = Path(name)
    if file.suffix.lower() not in ('.html', '.png'):
        raise UsageError(f'the output must end in .html or .png, got {str(file)!r}.')
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f'{str(file)!r} is a folder.' if file.is_dir() else f'no folder {str(file.parent)!r}.')
    if file.exists() and file.samefile(image):
        raise UsageError(f'the output would replace the image {str(image)!r}; --output takes another name.')
    return file


def write(seen: Visualization, file: Path) -> None:
    """Write a visualization as a page or a picture, by the file's ending.

    Raises:
        UsageError: The model has no regulator, or matplotlib is not installed.
        OSError: The file cannot be written.
    """
    if not seen.blocks:
        raise UsageError(
            f"{seen.model!r} has no regulator to look at: it is a ResNet, or built with regulator='none' or 'fuse'; "
            "`timm-regnet-rnn list '*regnet_conv*'` prints models that have one."
        )
    if file.suffix.lower() == '.html':
        data = seen.document().encode()
    else:
        out = io.BytesIO()
        seen.figure().savefig(out, format='png', dpi=150)
        data = out.getvalue()
    place(file, data, lambda scratch: None)
