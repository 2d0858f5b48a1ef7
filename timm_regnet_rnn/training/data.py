"""The data of a run, seen as train.py will see them, before it does."""

import math
import warnings
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple

from ..errors import one_line

__all__ = ['Data', 'check_data']


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
    synonyms = [('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation')]
    for candidate in (name, *(word for words in synonyms if name in words for word in words)):
        if (root / candidate).is_dir():
            return root / candidate
    raise ValueError(
        f'no folder {name!r} in {str(root)!r}; it must hold a folder per split, with a folder per class in it.'
    )


def read_classes(folder: Path) -> Tuple[Dict[str, int], Dict[str, Path]]:
    """The classes of a split as timm's own reader finds them: an image is of the folder that it lies in.

    Returns:
        Images and the first image of every class, in the order of the classifier's outputs; folders without images are
        no classes.

    Raises:
        ValueError: There is no image; or one lies in a folder of a class folder, whose name timm would take for its
            class, or beside the class folders.
    """
    from timm.data.readers.reader_image_folder import find_images_and_targets

    images, index = find_images_and_targets(str(folder))
    if not images:
        raise ValueError(f'no image in {str(folder)!r}.')
    names = {i: name for name, i in index.items()}
    counts: Dict[str, int] = {}
    first: Dict[str, Path] = {}
    for file, target in images:
        parts = Path(file).relative_to(folder).parts
        if len(parts) == 1:
            raise ValueError(f'{file!r} lies beside the class folders: timm would make it a class of its own.')
        if len(parts) > 2:
            raise ValueError(
                f'{file!r} lies in a folder of class {parts[0]!r}: timm would take {names[target]!r} for its class; '
                'move the images up, one folder per class.'
            )
        counts[parts[0]] = counts.get(parts[0], 0) + 1
        first.setdefault(parts[0], Path(file))
    return {name: counts[name] for name in index}, first


def check_data(settings: Dict[str, Any], classes_of_model: Optional[int] = None) -> Data:
    """Refuse data that train.py would misread, or that do not fit the recipe.

    Args:
        settings: train.py's options.
        classes_of_model: What the model has where the settings say nothing of it.

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
    wanted, classes = settings['num_classes'] or classes_of_model, len(names)
    if wanted not in (None, classes):
        who = 'recipe' if settings['num_classes'] else 'model'
        raise ValueError(
            f'the data have {classes} classes, the {who} {wanted}; give --num-classes {classes}, '
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
