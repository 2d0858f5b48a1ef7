"""How a model's name is read: `[se]regnet_{cell}_{depth}[.tag]`, and the ResNets that RegNets are measured against."""

import re
from typing import NamedTuple

__all__ = ['CIFAR_DEPTHS', 'IMAGENET_DEPTHS', 'Name', 'parse_name']

CIFAR_DEPTHS = (20, 32, 44, 56, 110)  # for images of 32x32
IMAGENET_DEPTHS = (18, 34, 50, 101, 152)


class Name(NamedTuple):
    """The parts of a model's name.

    Attributes:
        se: Whether its blocks have squeeze-and-excitation.
        cell: 'convrnn', 'convgru', 'convlstm', or '' for a ResNet.
        depth: As the paper counts it.
        tag: What stands behind the dot, or ''.
    """

    se: bool
    cell: str
    depth: int
    tag: str

    @property
    def resnet(self) -> str:
        """The name of the ResNet of the same depth, with SE where this one has it."""
        name = f'{"se" if self.se else ""}resnet'
        return f'cifar_{name}_{self.depth}' if self.depth in CIFAR_DEPTHS else f'{name}{self.depth}'


def parse_name(name: str) -> Name:
    """The parts of a name.

    Raises:
        ValueError: It is no name of a RegNet of ours or of its ResNet.
    """
    match = re.fullmatch(r'(?:(se)?regnet_(conv[a-z]+)_|(?:cifar_)?(se)?resnet_?)(\d+)(?:\.(.+))?', name)
    if not match:
        raise ValueError(f'{name!r} is no name such as regnet_convlstm_20, seregnet_convgru_50.TAG or cifar_resnet_20.')
    return Name(bool(match[1] or match[3]), match[2] or '', int(match[4]), match[5] or '')
