"""Record the options of timm's train.py, against which the tests check every recipe.

    python train_recipes/record_options.py TIMM_DIR           write options.json
    python train_recipes/record_options.py TIMM_DIR --check   only tell whether it is current

TIMM_DIR is a checkout of timm's repository. The options come from train.py's own parser; none of its text is kept.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from timm_regnet_rnn.training.recipe import train_options

OPTIONS = Path(__file__).with_name('options.json')


def record(timm_dir: Path) -> str:
    """The text of options.json for a checkout, one option a line.

    Raises:
        ValueError: The folder is no checkout of timm, or its train.py does not run.
    """
    train_py, version_py = timm_dir / 'train.py', timm_dir / 'timm' / 'version.py'
    if not timm_dir.is_dir():
        raise ValueError(f'no folder {str(timm_dir)!r}.')
    if not train_py.is_file() or not version_py.is_file():
        raise ValueError(f'{str(timm_dir)!r} is no checkout of timm: it lacks train.py or timm/version.py.')
    version = re.search(r"__version__ = '(.+)'", version_py.read_text(encoding='utf-8'))
    if not version:
        raise ValueError(f'{str(version_py)!r} names no version.')
    options = train_options(train_py)
    lines = ',\n'.join(f'    {json.dumps(name)}: {json.dumps(options[name])}' for name in sorted(options))
    return (
        '{\n'
        f'  "timm_version": {json.dumps(version[1])},\n'
        f'  "train_py_sha256": "{hashlib.sha256(train_py.read_bytes()).hexdigest()}",\n'
        f'  "options": {{\n{lines}\n  }}\n'
        '}\n'
    )


def main() -> int:
    """Write or check options.json; 2 for a folder that cannot be used, 1 for a list that is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('timm_dir', metavar='TIMM_DIR', type=Path, help='a checkout of timm')
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 if options.json differs')
    args = parser.parse_args()
    try:
        text = record(args.timm_dir)
    except ValueError as e:
        print(f'record_options: {e}', file=sys.stderr)
        return 2
    if not args.check:
        OPTIONS.write_text(text, encoding='utf-8')
        return 0
    old = json.loads(OPTIONS.read_text(encoding='utf-8')) if OPTIONS.is_file() else dict(options={})
    new = json.loads(text)
    if old != new:
        names = {
            name for name in {*old['options'], *new['options']} if old['options'].get(name) != new['options'].get(name)
        }
        what = ', '.join(sorted(names)) or 'version or checksum alone'
        print(f'{OPTIONS.name} is not of timm {new["timm_version"]}: differs in {what}.', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
