"""Parameters and multiply-adds of every model, counted on the meta device.

    python benchmarks/model_complexity.py  writes timm_regnet_rnn/model_complexity.json, which the tests check

Multiply-adds are those of convolutions, linear layers and gates, at the default input size. A gate counts as the
paper's two-step convolution, 2 + 9 per position and channel, also where it runs folded.
"""

import json
from pathlib import Path

import timm
import torch
import torch.nn as nn

import timm_regnet_rnn
from timm_regnet_rnn.conv_rnn import CELLS
from timm_regnet_rnn.regulated_resnet import RegulatedBasicBlock, RegulatedBottleneck

FILE = Path(timm_regnet_rnn.__file__).parent / 'model_complexity.json'


def complexity(model: nn.Module) -> dict:
    """Parameters, multiply-adds and input size of a model on the meta device, in eval mode."""
    macs = 0

    def count(module, _, out):
        nonlocal macs
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            macs += out.numel() * module.weight[0].numel()
        else:
            gates = next(len(cell.gates) for cell in CELLS.values() if cell.step is module.step)
            macs += gates * 11 * out[1].numel()

    counted = (nn.Conv2d, nn.Linear, RegulatedBasicBlock, RegulatedBottleneck)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, counted)]
    size = model.pretrained_cfg['input_size']
    model(torch.empty(1, *size, device='meta'))
    for handle in handles:
        handle.remove()
    return dict(params=sum(p.numel() for p in model.parameters()), macs=macs, input_size=list(size))


def main() -> None:
    """Write the file."""
    names = timm.list_models(module='regnet_rnn')
    rows = {name: complexity(timm.create_model(name, device='meta').eval()) for name in names}
    lines = (f'  {json.dumps(name)}: {json.dumps(row)}' for name, row in rows.items())
    FILE.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
