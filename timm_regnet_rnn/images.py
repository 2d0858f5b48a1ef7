"""The one reader of image files: `predict`, `visualize`, the Space and the tests see the same pixels.

Upright as EXIF says, 16-bit grey scaled and not clipped, on white where transparent, and every failure of Pillow's
many decoders one line. Nothing here imports torch.
"""

import warnings
from pathlib import Path
from typing import List, Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UsageError

__all__ = ['formats', 'image_mode', 'image_paths', 'read_image']

# What Pillow identifies and cannot decode by itself: data in science formats, films, programs for Ghostscript.
NO_PICTURES = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF')


def formats() -> Tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in NO_PICTURES)


def image_mode(channels: int) -> str:
    """Pillow's name of images with so many channels; as timm's train.py reads them.

    Raises:
        UsageError: Neither 1 nor 3.
    """
    modes = {1: 'L', 3: 'RGB'}
    if channels not in modes:
        raise UsageError(f'the model takes {channels} channels; images are read with 1 or 3.')
    return modes[channels]


def image_paths(names: Sequence[Union[str, Path]]) -> List[Path]:
    """The files named, and all images in the folders named, each folder in the order of its names.

    Raises:
        UsageError: A path does not exist, or a folder holds no image.
    """
    readable = set(formats())
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in readable}
    paths: List[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(p for p in path.rglob('*') if p.suffix.lower() in suffixes and p.is_file())
            if not found:
                raise UsageError(f'no image in folder {str(path)!r}.')
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise UsageError(f'no file or folder {str(path)!r}.')
    return paths


def _eight_bits(image: Image.Image, png: bool) -> Image.Image:
    """A grey image of more than 8 bits a pixel, brought to 8; Pillow's own conversion clips.

    16-bit integers, which those of PNG always are, are divided by 256. Others say nothing of their range: it is that
    of 8 bits, of 16 bits or, for floating point, from 0 to 1, the smallest that holds the largest value.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if not low >= 0 or not high <= 65535:  # also where they are no numbers
        raise ValueError(f'its values go from {low:g} to {high:g}; grey is read from 0 to 255 or 65535')
    if image.mode == 'F' and high <= 1:
        values = values * 255
    elif image.mode.startswith('I;16') or png or high > 255:
        values = values / 256
    return Image.fromarray(values.astype(np.uint8))


def read_image(path: Union[str, Path], mode: str = 'RGB') -> Image.Image:
    """An image file as it is meant to be seen; of a film, its first frame.

    Args:
        path: The file.
        mode: 'RGB' or 'L'.

    Raises:
        UsageError: It is no image, or a broken or an enormous one; one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a large picture is read, and a too large one is an error
            with Image.open(path, formats=formats()) as file:
                png = file.format == 'PNG'
                image = ImageOps.exif_transpose(file)
                if image.mode.startswith(('I', 'F')):
                    image = _eight_bits(image, png)
                if image.has_transparency_data:
                    image = image.convert('RGBA')
                    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
                return image.convert(mode)
    except UnidentifiedImageError:
        raise UsageError(f'{str(path)!r} is not an image that Pillow can read.') from None
    except Exception as e:  # Pillow's decoders raise SyntaxError, IndexError, struct.error and more on broken files
        reason = ' '.join(str(e).split()) or type(e).__name__
        raise UsageError(f'cannot read {str(path)!r}: {reason[:200]}') from None
