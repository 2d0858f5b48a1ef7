"""RegNet (arXiv 2101.00590) for timm: ResNets whose blocks share a convolutional RNN along depth.

Importing this package registers its models with timm.
"""

from . import launch

__version__ = '0.1.0'

if not launch.deferred():  # the command itself imports PyTorch only when it needs it
    from . import regnet_rnn
    from .regnet_rnn import *  # noqa: F403
    from .warm_start import from_resnet

    __all__ = ['from_resnet', *regnet_rnn.__all__]
