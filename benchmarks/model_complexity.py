"""Parameters and multiply-adds of every model, counted on the meta device.

python benchmarks/model_complexity.py  writes timm_regnet_rnn/model_complexity.json, which the tests check
"""

import json
from pathlib import Path

import timm

from timm_regnet_rnn.complexity import complexity

FILE = Path(__file__).resolve().parents[1] / 'timm_regnet_rnn' / 'model_complexity.json'


def main() -> None:
    """Write the file."""
    names = timm.list_models(module='regnet_rnn')
    rows = {name: complexity(timm.create_model(name, device='meta').eval()) for name in names}
    lines = (f'  {json.dumps(name)}: {json.dumps(row)}' for name, row in rows.items())
    FILE.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
