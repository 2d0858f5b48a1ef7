"""Parameters, multiply-adds and activations of a model."""

from typing import Any, Dict, Optional, Sequence

import timm
import torch
import torch.nn as nn

from .conv_rnn import RegulatorCell

__all__ = ['complexity', 'on_meta']


def on_meta(name: str, **kwargs: Any) -> Any:
    """A model of timm on the meta device, without memory for its weights.

    Args:
        name: The model.
        **kwargs: As for `timm.create_model`.
    """
    try:
        return timm.create_model(name, device='meta', **kwargs)
    except TypeError as e:
        if "'device'" not in str(e):
            raise
        return timm.create_model(name, **kwargs).to('meta')  # timm's own up to 1.0.20, and some since, take no device


def complexity(model: nn.Module, input_size: Optional[Sequence[int]] = None) -> Dict[str, Any]:
    """Count parameters, multiply-adds and activations.

    Multiply-adds are those of convolutions, linear layers and gates; activations the values that these give out. A gate
    counts as the paper's two-step convolution, 2 + 9 multiply-adds and two activations per position and channel, also
    where it runs folded.

    Args:
        model: A timm model in eval mode, on the meta device so that nothing is computed.
        input_size: (C, H, W), the model's default if None.

    Returns:
        `params`, `macs`, `activations` and `input_size`.
    """
    macs = activations = 0

    def count(module, _, out):
        nonlocal macs, activations
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            macs += out.numel() * module.weight[0].numel()
            activations += out.numel()
        else:
            macs += len(module.gates) * 11 * out[0].numel()
            activations += len(module.gates) * 2 * out[0].numel()

    counted = (nn.Conv2d, nn.Linear, RegulatorCell)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, counted)]
    known: Any = model
    size = list(input_size or known.pretrained_cfg['input_size'])
    try:
        model(torch.empty(1, *size, device='meta'))
    finally:
        for handle in handles:
            handle.remove()
    params = sum(p.numel() for p in model.parameters())
    return dict(params=params, macs=macs, activations=activations, input_size=size)
