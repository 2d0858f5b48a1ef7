"""A Space: what a RegNet makes of an image, and what its regulator remembers of it, block by block."""

import argparse
import html
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import gradio as gr
import torch

from timm_regnet_rnn.cli import DEFAULT_MODEL
from timm_regnet_rnn.errors import Parser, UsageError, one_line
from timm_regnet_rnn.inference import create
from timm_regnet_rnn.listing import full_name, list_rows
from timm_regnet_rnn.visualize import STYLE, visualize

EXAMPLES = sorted(map(str, (Path(__file__).parent / 'examples').iterdir()))
CAT = next(path for path in EXAMPLES if 'chelsea' in path)


def arguments() -> argparse.Namespace:
    """The command line; a Space has none."""
    parser = Parser(prog='app.py', description=__doc__)
    parser.add_argument(
        '--model', action='append', default=[], metavar='M', help='offer this too: the folder of a run, or a .pth.tar'
    )
    return parser.parse_args()


def label(row: Dict[str, Any]) -> str:
    """A model in a list: what it was trained for before its name, which a search finds either way."""
    top1 = '' if row['top1'] is None else f', {row["top1"]:.1f} %'
    return f'{row["name"]} · {row["tag"].replace("_", " ")}{top1}'


OWN = arguments().model if __name__ == '__main__' else []
RELEASED = [(label(row), full_name(row)) for row in list_rows(pretrained=True)]
MODELS = [*((name, name) for name in OWN), *RELEASED]
DEFAULT = OWN[0] if OWN else next(name for _, name in MODELS if name.startswith(f'{DEFAULT_MODEL}.'))

INTRO = """# What a regulator remembers

A [RegNet](https://arxiv.org/abs/2101.00590) is a ResNet whose blocks share a *regulator*, a convolutional RNN that runs
along depth: in each block it takes in the block's features, updates its state and hands it to the next block. Drop an
image to see the classes, and that state, block by block.
"""

CSS = f"""
.main {{ max-width: 1100px !important; padding: 16px clamp(16px, 4vw, 32px) !important; }}
#maps .html-container {{ padding: 0; }}
{STYLE}
"""


@lru_cache(maxsize=2)
def load(name: str) -> torch.nn.Module:
    """A model with its pretrained weights.

    Raises:
        UsageError: It is none of MODELS, or its weights cannot be had.
    """
    if name not in dict(MODELS).values():
        raise UsageError(f'the model must be one of those listed, got {name!r}.')
    try:
        return create(name)
    except (OSError, RuntimeError, ValueError) as e:
        raise UsageError(f'the weights of {name} cannot be loaded: {one_line(e)}') from None


def look(image: Optional[Dict[str, Any]], name: str) -> Tuple[str, Optional[Dict[str, float]], str]:
    """What the page shows: a line on the weights, the classes and the maps, or one line that says what went wrong.

    Args:
        image: The uploaded file as Gradio describes it, or None.
        name: One of MODELS.
    """
    about = ''
    try:
        model = load(name)
        about = model.pretrained_cfg.get('description') or ''
        if not image:
            return about, None, ''
        seen = visualize(model, image['path'])
        return about, dict(seen.top()), seen.page()
    except UsageError as e:
        line = str(e).replace(repr(image['path']), 'this file') if image else str(e)
        line = line[0].upper() + line[1:]
        return about, None, f'<p role="alert">{html.escape(line)}</p>'


with gr.Blocks(title='RegNet: what a regulator remembers', analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
    gr.Markdown(INTRO)
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            image = gr.Image(CAT, label='Image', height=280, sources=['upload', 'webcam', 'clipboard'], buttons=[])
            maps = gr.HTML(elem_id='maps')
        with gr.Column(scale=2, min_width=300):
            gr.Examples(EXAMPLES, image)
            model = gr.Dropdown(MODELS, value=DEFAULT, label='Model, type to filter')
            description = gr.Markdown()
            classes = gr.Label(num_top_classes=5, label='Top 5')
    # One event for all three: the hooks live on a model that the cache shares, so only one call may run at a time.
    # Gradio's own reading of the image would end in a traceback where the file is broken; `read` explains it.
    gr.on([demo.load, image.change, model.change], look, [image, model], [description, classes, maps], preprocess=False)

if __name__ == '__main__':
    # Gradio's own 600 of this font lacks the Latin letters.
    theme = gr.themes.Default(
        font=[gr.themes.LocalFont('Source Sans Pro', weights=(400, 700)), 'system-ui', 'sans-serif']
    )
    demo.launch(theme=theme, css=CSS, footer_links=[], ssr_mode=False, max_file_size='50mb')
