"""Fetch released weights, and check that they are and compute what the manifest says.

    python verify.py NAME.TAG ...
    python verify.py --all
    python verify.py --all --data-dir DIR --data-dir DIR   # and accuracies, on image folders with the data sets

For each entry: the file from the Hub (or inside the package), its size, sha256 and digest of the tensors; then the
logits on the images stored in checks/, against those stored beside them.
"""

from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config

from ..datasets import DATASETS, dataset_name
from ..errors import Parser, UsageError, one_line, report
from ..training.data import read_classes, split_folder
from .folder import Trained, evaluate, tensor_digest
from .manifest import RELEASED, hub_id
from .pull import pull

HOME = Path(__file__).resolve().parent
TOLERANCE = 1e-4  # of the logits' scale, what arithmetic in another order may change
ACCURACY = 0.05  # points, likewise
DATA_DIR = 'image folder of a data set, once for each: measure the accuracy of what was measured on it too'


def logits(model: torch.nn.Module, images: torch.Tensor, config: Dict[str, Any]) -> torch.Tensor:
    """Logits (B, K) of images (B, C, H, W) of bytes, by plain PyTorch."""
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ('mean', 'std'))
    with torch.inference_mode():
        return model.eval()((images / 255 - mean) / std)


def store_logits(name: str, model: torch.nn.Module, config: Dict[str, Any], checkout: Path) -> None:
    """Keep what a model computes on four views of the README's photograph, in a checkout."""
    channels, height, width = config['input_size']
    photo = Image.open(checkout / 'docs' / 'chelsea.jpg').convert('L' if channels == 1 else 'RGB')
    views = [photo, photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM), photo.crop((0, 0, 150, 150)), photo.rotate(90)]
    pixels = [torch.frombuffer(bytearray(v.resize((width, height)).tobytes()), dtype=torch.uint8) for v in views]
    images = torch.stack(pixels).view(4, height, width, -1).permute(0, 3, 1, 2)
    images = images.repeat(1, -(-channels // images.shape[1]), 1, 1)[:, :channels].contiguous()
    checks = checkout / 'timm_regnet_rnn' / 'weights' / 'checks'
    checks.mkdir(exist_ok=True)
    save_file(dict(images=images, logits=logits(model, images, config).clone()), checks / f'{name}.safetensors')


def verify(name: str, data_dir: Optional[str] = None) -> str:
    """Check one entry of the manifest, with a data set also its accuracy; returns what was checked, in words.

    Raises:
        UsageError: It is not in the manifest, or something is not as it says; names expected and found.
        OSError: The file cannot be had, or is broken.
    """
    if name not in RELEASED:
        raise UsageError(f'{name!r} is not in the manifest, which has {", ".join(RELEASED)}.')
    entry, file = RELEASED[name], pull(hub_id(name))
    for what, value in (('size', file.stat().st_size), ('tensors', tensor_digest(file))):
        if value != entry[what]:
            raise UsageError(f'{name}: {what} is {value}, the manifest says {entry[what]}.')
    model = timm.create_model(name, pretrained=True).eval()
    stored = HOME / 'checks' / f'{name}.safetensors'
    try:
        check = load_file(stored)
        images, expected = check['images'], check['logits']
    except (SafetensorError, KeyError, OSError) as e:
        raise UsageError(
            f'{name}: the stored images and logits in {str(stored)!r} are damaged ({one_line(e)}).'
        ) from None
    config = resolve_data_config(model=model)
    found = logits(model, images, config)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise UsageError(f'{name}: logits differ from the stored ones by {error:.1e} of their scale.')
    words = f'{name}: {entry["size"]} bytes, sha256 {entry["sha256"][:12]}..., logits within {error:.0e}'
    if data_dir:
        metrics = entry['metrics']
        measured = evaluate(Trained(model, name, {}, data_config=config), data_dir, metrics['split'])
        for key in ('top1', 'top5', 'images'):
            if abs(measured[key] - metrics[key]) > ACCURACY:
                raise UsageError(f'{name}: {key} is {measured[key]}, the manifest says {metrics[key]}.')
        words += f', top-1 {measured["top1"]:.2f} %, top-5 {measured["top5"]:.2f} % on {measured["images"]} images'
    return words


def folder_of(name: str, folders: Sequence[str]) -> Optional[str]:
    """The image folder with the data set that an entry was measured on.

    By what prepare_data.py noted in it; a folder without a note is taken by its number of classes.
    """
    entry, found = RELEASED[name], None
    for folder in folders:
        key, dataset = dataset_name(dict(data_dir=folder))
        if dataset == entry['dataset']:
            return folder
        noted = (Path(folder) / 'prepared.json').is_file() or key in DATASETS
        classes, _ = read_classes(split_folder(dict(data_dir=folder), entry['metrics']['split']))
        if not noted and len(classes) == entry['num_classes']:
            found = folder
    return found


def main(argv: Optional[Sequence[str]] = None, prog: str = 'verify.py') -> int:
    """Run the command; returns its exit status, 2 if anything was not as it should be."""
    parser = Parser(
        prog=prog,
        description=(__doc__ or '').splitlines()[0],
        examples=('regnet_convlstm_20.cifar10_jpeg75', '--all'),
    )
    parser.add_argument('names', nargs='*', metavar='NAME.TAG')
    parser.add_argument('--all', action='store_true', help='everything in the manifest')
    parser.add_argument('--data-dir', metavar='DIR', action='append', default=[], help=DATA_DIR)
    args = parser.parse_args(argv)
    if bool(args.names) == args.all:
        parser.error('give names, or --all.')
    failed = False
    for name in RELEASED if args.all else args.names:
        try:
            folder = folder_of(name, args.data_dir) if name in RELEASED and args.data_dir else None
            words = verify(name, folder)
            if args.data_dir and not folder:
                missing = f'no --data-dir has {RELEASED[name]["dataset"]!r}'
                if not args.all:
                    raise UsageError(f'{name}: {missing}, which its accuracy is of.')
                words += f'; accuracy not measured, {missing}'
            print(words)
        except (UsageError, OSError, ValueError, RuntimeError) as e:
            failed = True
            report(prog, one_line(e))
    return 2 if failed else 0
