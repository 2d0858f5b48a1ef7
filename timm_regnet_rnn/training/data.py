"""The data of a run, seen as train.py will see them, before it does."""

import math
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

from ..errors import UsageError, one_line
from ..files import scratch_folder

__all__ = ['Data', 'check_data', 'hold_out']

SYNONYMS = [('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation')]  # timm's


class Data(NamedTuple):
    """What training will read.

    Attributes:
        images: Their number, 0 where it is not known before they are fetched.
        names: The names of the classes in the order of the classifier's outputs; empty where they are not known.
    """

    images: int = 0
    names: Tuple[str, ...] = ()


def split_folder(settings: Dict[str, Any], split: str) -> Path:
    """The folder that train.py takes for a split of a folder data set: the one of that name, or a synonym's.

    Raises:
        ValueError: There is none; train.py would then read the root as one big split.
    """
    root, name = Path(settings['data_dir']), split.split('[')[0]
    for candidate in (name, *(word for words in SYNONYMS if name in words for word in words)):
        if (root / candidate).is_dir():
            return root / candidate
    advice = ''
    if settings.get('val_split') in SYNONYMS[1]:  # what `split` makes is what the recipe reads
        source = next((root / word for word in SYNONYMS[0] if (root / word).is_dir()), root)
        advice = f' `timm-regnet-rnn split {source} --to NEW` makes both out of one folder of classes.'
    raise ValueError(
        f'no folder {name!r} in {str(root)!r}; it must hold a folder per split, with a folder per class in it.{advice}'
    )


def read_classes(folder: Path) -> Tuple[Dict[str, int], Dict[str, Path]]:
    """The classes of a split, see `find_images`.

    Returns:
        Images and the first image of every class, in the order of the classifier's outputs.

    Raises:
        ValueError: As `find_images`.
    """
    images = find_images(folder)
    return {name: len(files) for name, files in images.items()}, {n: Path(files[0]) for n, files in images.items()}


def find_images(folder: Path) -> Dict[str, List[str]]:
    """The images of a split as timm's own reader finds them: an image is of the folder that it lies in.

    Returns:
        The files of every class, in the order of the classifier's outputs; folders without images are no classes.

    Raises:
        ValueError: There is no image; or one lies in a folder of a class folder, whose name timm would take for its
            class, or beside the class folders.
    """
    from timm.data.readers.reader_image_folder import find_images_and_targets

    images, index = find_images_and_targets(str(folder))
    if not images:
        raise ValueError(f'no image in {str(folder)!r}.')
    names = {i: name for name, i in index.items()}
    found: Dict[str, List[str]] = {name: [] for name in index}
    for file, target in images:
        parts = Path(file).relative_to(folder).parts
        if len(parts) == 1:
            raise ValueError(f'{file!r} lies beside the class folders: timm would make it a class of its own.')
        if len(parts) > 2:
            raise ValueError(
                f'{file!r} lies in a folder of class {parts[0]!r}: timm would take {names[target]!r} for its class; '
                'move the images up, one folder per class.'
            )
        found[parts[0]].append(file)
    return found


def hold_out(source: Path, to: Path, share: float = 0.2) -> Dict[str, Tuple[int, int]]:
    """Make train/ and val/ out of one folder of classes: of each class a share, chosen by lot, is held out.

    The lot is the same each time. Files are hard links where the disk has them, else copies; `source` stays as it is.

    Args:
        source: A folder per class, with images in it.
        to: A folder that is not there yet; all of it is made, or nothing.
        share: Between 0 and 1; at least one image of each class is held out, and one is not.

    Returns:
        Images to train on and images held out, of every class.

    Raises:
        ValueError: There is such a folder already, no share, a class of one image, or what timm would misread.
        OSError: The folder cannot be written.
    """
    if not 0 < share < 1:
        raise UsageError(f'the share to hold out must be between 0 and 1, got {share}.')
    if not source.is_dir():
        raise UsageError(f'no folder {str(source)!r}.')
    if to.exists():
        raise UsageError(f'{str(to)!r} exists; give --to another one.')
    if source.resolve() in to.resolve().parents:
        raise UsageError(f'{str(to)!r} would lie in {str(source)!r}, among its classes; give --to another one.')
    splits = sorted(word for words in (*SYNONYMS, ('test',)) for word in words if (source / word).is_dir())
    if splits:
        raise UsageError(f'{str(source)!r} holds splits, not classes: {", ".join(splits)}; give the folder of classes.')
    images = find_images(source)
    if len(images) < 2:
        raise UsageError(
            f'{str(source)!r} must hold a folder for each of two classes or more, got {next(iter(images))!r}.'
        )
    alone = [name for name, files in images.items() if len(files) < 2]
    if alone:
        raise UsageError(f'class {alone[0]!r} has one image; to hold one out it takes two at least.')
    odd = [file for files in images.values() for file in files if not os.path.isfile(file)]
    if odd:
        raise UsageError(f'{odd[0]!r} is no regular file.')
    counts: Dict[str, Tuple[int, int]] = {}
    to.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(to.parent) as scratch:
        for name, files in images.items():
            held = min(len(files) - 1, max(1, round(share * len(files))))
            counts[name] = len(files) - held, held
            random.Random(0).shuffle(files)
            for i, file in enumerate(files):
                place = scratch / 'new' / ('val' if i < held else 'train') / name / Path(file).name
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(os.path.realpath(file), place)
                except OSError:
                    shutil.copyfile(file, place)
        os.rename(scratch / 'new', to)
    return counts


def check_data(settings: Dict[str, Any]) -> Data:
    """Refuse data that train.py would misread, or that do not fit the recipe.

    Args:
        settings: train.py's options.

    Raises:
        ValueError: In one line.
    """
    name, splits = settings['dataset'], (settings['train_split'], settings['val_split'])
    root = Path(settings['data_dir'])
    if not root.is_dir() and not settings['dataset_download']:
        raise ValueError(f'no data folder {str(root)!r}.')
    if '/' in name:
        if not name.startswith('torch/') or settings['dataset_download']:
            return Data()
        from timm.data import create_dataset

        try:
            data = create_dataset(name, root=str(root), split=splits[0], is_training=True)
            image, names, count = data[0][0], tuple(data.classes), len(data)
        except AssertionError:
            raise ValueError(f'timm knows no data set {name!r}.') from None
        except (RuntimeError, FileNotFoundError) as e:
            raise ValueError(f'no {name} in {str(root)!r} ({one_line(e)}); --dataset-download fetches it.') from None
    else:
        from PIL import Image

        found = [read_classes(split_folder(settings, split)) for split in splits]
        folders = [counts for counts, _ in found]
        if folders[0].keys() != folders[1].keys():
            odd = sorted(folders[0].keys() ^ folders[1].keys())[0]
            raise ValueError(f'{splits[0]!r} and {splits[1]!r} hold different classes, {odd!r} for one.')
        names, count = tuple(folders[0]), sum(folders[0].values())
        file = next(iter(found[0][1].values()))
        try:
            if not file.is_file():
                raise ValueError('it is no regular file')
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # a large picture is read, and a too large one is an error
                with Image.open(file) as image:
                    image.load()
        except Exception as e:  # Pillow's decoders raise SyntaxError, IndexError, struct.error and more on broken files
            raise ValueError(f'cannot read {str(file)!r}: {one_line(e)}.') from None
    wanted, classes = settings['num_classes'], len(names)
    if wanted not in (None, classes):
        raise ValueError(
            f'the data have {classes} classes, the recipe {wanted}; give --num-classes {classes}, '
            'or the folder the recipe is for.'
        )
    scale, ratio, size = settings['scale'], settings['ratio'], settings['input_size']
    if size and scale[0] == scale[1] and scale[0] < 1 and ratio[0] == ratio[1] == 1:  # an exact crop of a padded image
        side = size[-1] / math.sqrt(scale[0])
        if any(abs(s - side) > 0.5 for s in image.size):
            raise ValueError(
                f'the recipe crops {size[-1]}x{size[-1]} out of training images of {side:.0f}x{side:.0f}; these are '
                f'{image.size[0]}x{image.size[1]}. `prepare_data.py --pad {(side - size[-1]) / 2:.0f}` makes them.'
            )
    return Data(count, names)
