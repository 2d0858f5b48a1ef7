"""A Space: what a RegNet makes of an image, and what its regulator remembers of it, block by block."""

import base64
import html
import io
from contextlib import ExitStack
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import gradio as gr
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config

from timm_regnet_rnn.cli import DEFAULT_MODEL, UsageError, class_names, create, list_rows
from timm_regnet_rnn.errors import one_line

EXAMPLES = sorted(map(str, (Path(__file__).parent / 'examples').iterdir()))
CAT = next(path for path in EXAMPLES if 'chelsea' in path)
MODELS = [f'{row["name"]}.{tag}' for row in list_rows() for tag in row['tags']]
DEFAULT = next(name for name in MODELS if name.startswith(f'{DEFAULT_MODEL}.'))
LONGEST_SIDE = 1024  # far above what any of the models sees

INTRO = """# What a regulator remembers

A [RegNet](https://arxiv.org/abs/2101.00590) is a ResNet whose blocks share a *regulator*, a convolutional RNN that runs
along depth: in each block it takes in the block's features, updates its state and hands it to the next block. Drop an
image to see the classes, and that state, block by block.
"""

LEGEND = (
    'One map per block, a row per stage: the state <i>h</i> after the block, averaged over its channels. Yellow is '
    'where the state is largest, violet where it is smallest, on a scale of its own for each map. In every stage the '
    'state starts empty.'
)
NO_REGULATOR = 'This model has no regulator, and so no maps.'

CSS = """
.main { max-width: 1100px !important; padding: 16px clamp(16px, 4vw, 32px) !important; }
#maps .html-container { padding: 0; }
.maps section { margin: 0 0 1.25em; }
.maps h2 { font-size: 1em; font-weight: 600; margin: 0 0 .4em; color: var(--body-text-color); }
.maps h2 span, .maps p, .maps figcaption { font-weight: 400; color: var(--body-text-color); opacity: .72; }
.maps h2 span, .maps figcaption { font-size: .875em; }
.maps .tiles {
  --tile: max(68px, min(200px, calc(100% / var(--columns) - 10px)));
  display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, var(--tile));
}
.maps .top { display: flex; flex-wrap: wrap; gap: 20px; align-items: center; }
.maps .top figure { width: 150px; }
.maps .top p { flex: 1 1 240px; margin: 0; line-height: 1.5; }
.maps figure { margin: 0; }
.maps img { display: block; width: 100%; border-radius: 6px; image-rendering: pixelated; }
"""


@lru_cache(maxsize=2)
def load(name: str) -> torch.nn.Module:
    """A model with its pretrained weights.

    Raises:
        UsageError: It is none of MODELS, or its weights cannot be had.
    """
    if name not in MODELS:
        raise UsageError(f'the model must be one of those listed, got {name!r}.')
    try:
        return create(name, None)
    except (OSError, RuntimeError, ValueError) as e:
        line = one_line(e)
        raise UsageError(f'the weights of {name} cannot be loaded: {line}') from None


def read(path: str) -> Image.Image:
    """An image file as RGB, upright, on white where it is transparent, and of a size that is quick to work with.

    Raises:
        UsageError: The file is not an image, or a broken or an enormous one.
    """
    try:
        with Image.open(path) as image:
            image.draft('RGB', (LONGEST_SIDE, LONGEST_SIDE))
            if image.mode.startswith('I'):  # 16 bits, which Pillow would clip to 8
                image = image.point(lambda v: v * (1 / 256)).convert('L')
            if image.mode in ('1', 'P', 'PA'):  # whose pixels have no mean
                image = image.convert('RGBA')
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            image = ImageOps.exif_transpose(image).convert('RGBA')
    except UnidentifiedImageError:
        raise UsageError('this file is not an image; try a JPEG, PNG or WebP.') from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UsageError(f'this image cannot be read: {e}') from None
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')


@torch.inference_mode()
def run(model: torch.nn.Module, x: torch.Tensor) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
    """Class probabilities of one image (1, C, H, W), and the regulator's state (1, N, H, W) after each block."""
    states = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            block, _, leaf = name.rpartition('.')
            if leaf == 'act_h':
                handle = module.register_forward_hook(lambda _m, _i, h, block=block: states.update({block: h.clone()}))
                hooks.callback(handle.remove)
        return model(x).softmax(-1)[0], states


def tile(pixels: np.ndarray, name: str, caption: str) -> str:
    """A figure from pixels (H, W, C) of 8 bits; the browser enlarges them without smoothing."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure class="{name}"><img alt="{name} {caption}" src="data:image/png;base64,{data}">'
        f'<figcaption>{caption}</figcaption></figure>'
    )


def page(seen: np.ndarray, states: Dict[str, torch.Tensor]) -> str:
    """What the model sees, pixels (H, W, 3), and a row of maps per stage from the states (1, N, H, W) of its blocks."""
    stages = [(stage, list(blocks)) for stage, blocks in groupby(states, lambda block: block.split('.')[0])]
    sections = [
        f'<section class="top">{tile(seen, "input", f"input, {seen.shape[0]}×{seen.shape[1]}")}'
        f'<p>{LEGEND if stages else NO_REGULATOR}</p></section>'
    ]
    for stage, blocks in stages:
        _, channels, height, width = states[blocks[0]].shape
        tiles = []
        for block in blocks:
            h = states[block][0].mean(0)
            h = (h - h.min()) / (h.max() - h.min()).clamp(min=1e-12)
            tiles.append(tile(colormaps['viridis'](h.numpy(), bytes=True), 'map', block))
        sections.append(
            f'<section><h2>{stage} <span>{channels} channels, {height}×{width}</span></h2>'
            f'<div class="tiles">{"".join(tiles)}</div></section>'
        )
    columns = max((len(blocks) for _, blocks in stages), default=1)
    return f'<div class="maps" style="--columns:{columns}">{"".join(sections)}</div>'


def classify(path: str, model: torch.nn.Module) -> Tuple[Dict[str, float], str]:
    """The probability of every class, and the page of maps.

    Raises:
        UsageError: The image cannot be read.
    """
    config = resolve_data_config({}, model=model, use_test_size=True)
    x = create_transform(**config)(read(path))
    probability, states = run(model, x.unsqueeze(0))
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    seen = ((x * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return dict(zip(class_names(model), probability.tolist())), page(seen, states)


def look(image: Optional[Dict[str, Any]], name: str) -> Tuple[str, Optional[Dict[str, float]], str]:
    """What the page shows: a line on the weights, the classes and the maps, or one line that says what went wrong.

    Args:
        image: The uploaded file as Gradio describes it, or None.
        name: One of MODELS.
    """
    about = ''
    try:
        model = load(name)
        about = model.pretrained_cfg['description']
        return (about, *(classify(image['path'], model) if image else (None, '')))
    except UsageError as e:
        line = str(e)[0].upper() + str(e)[1:]
        gr.Warning(html.escape(line))  # seen wherever one has scrolled to; the page's stays
        return about, None, f'<p role="alert">{html.escape(line)}</p>'


with gr.Blocks(title='RegNet: what a regulator remembers', analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
    gr.Markdown(INTRO)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image = gr.Image(CAT, label='Image', height=280, sources=['upload', 'clipboard'], buttons=[])
            gr.Examples(EXAMPLES, image)
            model = gr.Dropdown(MODELS, value=DEFAULT, label='Model', filterable=False)
            description = gr.Markdown()
            classes = gr.Label(num_top_classes=5, label='Top 5')
        with gr.Column(scale=3, min_width=300):
            maps = gr.HTML(elem_id='maps')
    # One event for all three: the hooks live on a model that the cache shares, so only one call may run at a time.
    # Gradio's own reading of the image would end in a traceback where the file is broken; `read` explains it.
    gr.on([demo.load, image.change, model.change], look, [image, model], [description, classes, maps], preprocess=False)

if __name__ == '__main__':
    # Gradio's own 600 of this font lacks the Latin letters.
    theme = gr.themes.Default(
        font=[gr.themes.LocalFont('Source Sans Pro', weights=(400, 700)), 'system-ui', 'sans-serif']
    )
    demo.launch(theme=theme, css=CSS, footer_links=[], ssr_mode=False, max_file_size='50mb')
