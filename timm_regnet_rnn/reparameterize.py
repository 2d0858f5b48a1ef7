"""Folding for deployment: batch norms into the convolutions before them, in place, for inference only.

`timm.utils.reparameterize_model` asks every child of a net for its method `reparameterize`, and never the net itself.
Folded is what is surely the same function: a plain convolution followed by a plain batch norm that nothing listens to.
"""

import weakref
from typing import Any, Dict, Optional, Tuple

import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .layers import SampledConv2d, listened

__all__ = ['fold_norm', 'fold_sequential', 'fold_stem', 'link_stem']


def fold_norm(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    """Fold `parent`'s batch norm into the convolution before it; any other norm or convolution is left as it is.

    A convolution whose weight is computed at each call (pruned, parametrized) cannot take the norm in.
    """
    conv: Any = getattr(parent, conv_name, None)
    norm: Any = getattr(parent, norm_name, None)
    if (
        type(conv) in (nn.Conv2d, SampledConv2d)
        and conv._parameters.get('weight') is not None
        and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and norm.track_running_stats
        and not listened(conv, norm)
    ):
        setattr(parent, conv_name, fuse_conv_bn_eval(conv.eval(), norm.eval()))
        setattr(parent, norm_name, nn.Identity())


def fold_sequential(module: Optional[nn.Module]) -> None:
    """Fold every batch norm of a Sequential that directly follows a convolution."""
    if isinstance(module, nn.Sequential):
        names = list(module._modules)
        for conv_name, norm_name in zip(names, names[1:]):
            fold_norm(module, conv_name, norm_name)


def fold_stem(net: Any) -> None:
    """Fold the batch norms of a net's stem: those inside a deep stem or a convolutional stem pool, and `bn1`."""
    fold_sequential(net.conv1)
    fold_sequential(net.maxpool)
    if isinstance(net.conv1, nn.Sequential):
        net.conv1.append(net.bn1)
        fold_sequential(net.conv1)
        net.bn1 = net.conv1[-1]
        del net.conv1[-1]
    else:
        fold_norm(net, 'conv1', 'bn1')


class StemFold:
    """Calls `fold_stem` on the net that a `conv1` belongs to, which it does not keep alive.

    A copy of the `conv1` alone, or one that was pickled, belongs to none; a net that is copied or unpickled links its
    own anew.
    """

    def __init__(self, net: Optional[nn.Module]) -> None:
        self.net = weakref.ref(net) if net is not None else None

    def __call__(self) -> None:
        net = self.net() if self.net is not None else None
        if net is not None:
            fold_stem(net)

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'StemFold':
        return StemFold(memo.get(id(self.net())) if self.net is not None else None)

    def __reduce__(self) -> Tuple[Any, ...]:
        return StemFold, (None,)


def link_stem(net: Any) -> None:
    """Let `timm.utils.reparameterize_model` fold the stem, through its first child."""
    net.conv1.reparameterize = StemFold(net)
