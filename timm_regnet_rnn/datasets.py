"""The data sets that recipes and released weights speak of: names, labels and statistics, in this one place."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

__all__ = ['DATASETS', 'Dataset', 'class_folders', 'dataset_name', 'labels_of', 'labels_of_folders']


@dataclass(frozen=True)
class Dataset:
    """One data set.

    Attributes:
        name: What tables call it.
        labels: A name per class, in the order of the indices; empty where nobody needs them here.
        mean, std: Of its training images, per channel, for values from 0 to 1.
    """

    name: str
    labels: Tuple[str, ...] = ()
    mean: Tuple[float, ...] = ()
    std: Tuple[float, ...] = ()


_CIFAR10 = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
_FASHION = (
    *('T-shirt/top', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot'),
)
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HELD_OUT = ', {:,} training images held out'

# by the key that prepare_data.py notes in prepared.json
DATASETS: Dict[str, Dataset] = dict(
    cifar10=Dataset('CIFAR-10', _CIFAR10, _CIFAR_MEAN, _CIFAR_STD),
    cifar10_jpeg75=Dataset('CIFAR-10, JPEG q75 mirror', _CIFAR10, _CIFAR_MEAN, _CIFAR_STD),
    cifar100=Dataset('CIFAR-100', (), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    fashion_mnist=Dataset('Fashion-MNIST', _FASHION, (0.2860,), (0.3530,)),
    tiny_imagenet100_32=Dataset(
        'Tiny-ImageNet, first 100 classes, 32x32', (), (0.476, 0.448, 0.393), (0.254, 0.245, 0.257)
    ),
)


def labels_of(name: str) -> Tuple[str, ...]:
    """The labels of a data set by the name that tables give it, () where they are not known."""
    name = re.sub(HELD_OUT.replace('{:,}', r'[\d,]+') + '$', '', name)
    return next((dataset.labels for dataset in DATASETS.values() if dataset.name == name), ())


def class_folders(classes: Sequence[str]) -> List[str]:
    """Folder names that sort, as train.py numbers its labels, in the order of `classes`: with numbers if need be."""
    names = [name.split('/')[0].lower().replace(' ', '_') for name in classes]
    width = len(str(len(names) - 1))
    return names if names == sorted(names) else [f'{i:0{width}d}_{name}' for i, name in enumerate(names)]


def labels_of_folders(folders: Sequence[str]) -> Sequence[str]:
    """The labels of the data set that `class_folders` named its folders for; the folders' names if it is none here."""
    known = (dataset.labels for dataset in DATASETS.values() if dataset.labels)
    return next((labels for labels in known if class_folders(labels) == list(folders)), folders)


def dataset_name(settings: Dict[str, Any]) -> Tuple[str, str]:
    """Key and name of the data set: what prepare_data.py noted, torchvision's, or else the folder's name.

    A set of which training images are held out is another one: fewer train, and others may be what is measured on.
    """
    dataset, folder = settings.get('dataset') or '', settings.get('data_dir')
    if not isinstance(dataset, str) or not isinstance(folder, (str, Path)):
        raise ValueError(f'dataset and data_dir must be texts; got {dataset!r} and {folder!r}.')
    key, held_out = dataset.split('/')[-1], 0
    prepared = Path(folder) / 'prepared.json'
    if not key and prepared.is_file():
        try:
            note = json.loads(prepared.read_text(encoding='utf-8'))
            key, held_out = note['dataset'], note.get('held_out', 0)
            if not isinstance(key, str) or not key or type(held_out) is not int or held_out < 0:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{str(prepared)!r} is damaged: it does not say which data set this is.') from None
    key = re.sub(r'[|<>`\s]+', '_', key or Path(folder).resolve().name)  # fit for a table and a file's name
    name = DATASETS[key].name if key in DATASETS else key
    return (f'{key}-held{held_out}', name + HELD_OUT.format(held_out)) if held_out else (key, name)
