"""Parameters, multiply-adds and activations of every model and of its ResNet, counted on the meta device.

python benchmarks/model_complexity.py  writes timm_regnet_rnn/model_complexity.json, which the tests check
"""

import json
from pathlib import Path

import timm

from timm_regnet_rnn.complexity import complexity, on_meta
from timm_regnet_rnn.names import parse_name
from timm_regnet_rnn.weights.manifest import RELEASED

FILE = Path(__file__).resolve().parents[1] / 'timm_regnet_rnn' / 'model_complexity.json'


def count() -> dict:
    """The sizes by name: our models, timm's ResNets that they are measured against, and tags of another size, with the
    ResNet at the tag's size."""
    names = timm.list_models(module='regnet_rnn')
    resnets = dict.fromkeys(parse_name(name).resnet for name in names)
    rows = {name: complexity(on_meta(name).eval()) for name in dict.fromkeys([*names, *resnets])}
    for name, entry in RELEASED.items():
        base, _, tag = name.partition('.')
        row = complexity(on_meta(name).eval())
        if row == rows[base]:
            continue
        rows[name] = row
        resnet = on_meta(parse_name(base).resnet, num_classes=entry['num_classes'], in_chans=row['input_size'][0])
        rows[f'{parse_name(base).resnet}.{tag}'] = complexity(resnet.eval(), row['input_size'])
    return rows


if __name__ == '__main__':
    lines = (f'  {json.dumps(name)}: {json.dumps(row)}' for name, row in count().items())
    FILE.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')
