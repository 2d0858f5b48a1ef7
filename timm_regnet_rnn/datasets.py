"""The data sets that recipes and released weights speak of: names, labels and statistics, in this one place."""

from dataclasses import dataclass
from typing import Dict, Tuple

__all__ = ['DATASETS', 'Dataset', 'labels_of']


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
    return next((dataset.labels for dataset in DATASETS.values() if dataset.name == name), ())
