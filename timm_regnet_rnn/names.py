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
    form = r'(?:(se)?regnet_(conv(?:rnn|gru|lstm))_|(cifar_)?(se)?resnet(_?))([0-9]+)(?:\.(.+))?'
    match = re.fullmatch(form, name)
    depths = (*CIFAR_DEPTHS, *IMAGENET_DEPTHS) if match and match[2] else CIFAR_DEPTHS if match and match[3] else None
    if not match or bool(match[3]) != bool(match[5]) or (depths and int(match[6]) not in depths):
        raise ValueError(f'{name!r} is no name such as regnet_convlstm_20, seregnet_convgru_50.TAG or cifar_resnet_20.')
    return Name(bool(match[1] or match[4]), match[2] or '', int(match[6]), match[7] or '')
