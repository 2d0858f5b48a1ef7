"""Recipes: YAML files of options for timm's train.py, read and checked before a run starts.

train.py hands a recipe to `argparse.ArgumentParser.set_defaults`, which takes any key without a word and converts no
value but a lone string: a misspelt key changes nothing, and `5e-4`, which YAML reads as text, breaks a list of numbers
hours later or never. Nothing here imports torch.
"""

import difflib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Union

from ..errors import did_you_mean

__all__ = ['check_recipe', 'find_recipe', 'find_yaml', 'load_recipe', 'load_yaml', 'train_options']

PAIRS = ('scale', 'ratio', 'cutmix_minmax')  # argparse takes any number of values, timm unpacks two
PLURAL = {'int': 'whole numbers', 'float': 'numbers', 'str': 'texts'}
SINGULAR = {'int': 'a whole number', 'float': 'a finite number', 'str': 'text', 'bool': 'true or false'}

# Runs train.py as an import would run it, beside its own timm, as `python train.py` finds it. The last line counts:
# what is imported may print.
READ_OPTIONS = """
import argparse, json, runpy, sys
from pathlib import Path

script = Path(sys.argv.pop(1)).resolve()
sys.path[:] = [str(script.parent), *filter(None, sys.path)]
parser = runpy.run_path(str(script), run_name='train_options').get('parser')
if not isinstance(parser, argparse.ArgumentParser):
    sys.exit('it has no argparse parser by the name of `parser`')
options = {}
for action in parser._actions:
    if action.dest == 'help':
        continue
    if type(action).__name__ == 'ParseKwargs':
        kind = 'kwargs'
    elif action.nargs == 0:
        kind = 'bool'
    else:
        kind = 'str' if action.type is None else getattr(action.type, '__name__', 'any')
    options[action.dest] = dict(type=kind, flags=action.option_strings, default=action.default)
    if action.nargs:
        options[action.dest]['nargs'] = action.nargs
    if action.choices:
        options[action.dest]['choices'] = list(action.choices)
print()
print(json.dumps(options))
"""


def train_options(train_py: Union[str, Path]) -> Dict[str, Dict[str, Any]]:
    """The options of a train.py, read from its own parser in a process of its own.

    Args:
        train_py: timm's train.py, in its checkout or alone.

    Returns:
        For each option, by the name that a recipe gives it, a dict of `type` ('int', 'float', 'str', 'bool' or
        'kwargs'), `flags` as on the command line, `default`, `nargs` where it takes a list or may stand without a
        value, and `choices` where they are limited.

    Raises:
        ValueError: There is no such file, it does not run, or it has no parser.
    """
    if not Path(train_py).is_file():
        raise ValueError(f'no file {str(train_py)!r}; give the train.py of a checkout of timm.')
    command = [sys.executable, '-c', READ_OPTIONS, str(train_py)]
    try:
        done = subprocess.run(command, capture_output=True, encoding='utf-8', errors='replace', timeout=600)
    except subprocess.TimeoutExpired:
        raise ValueError(f'cannot read the options of {str(train_py)!r}: it still runs after ten minutes.') from None
    try:
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        pass
    reason = (done.stderr.strip().splitlines() or ['it printed nothing'])[-1]
    raise ValueError(f'cannot read the options of {str(train_py)!r}: {reason}')


def find_recipe(name: str) -> str:
    """The file of a recipe: that of the name, or one of ours, with or without `.yaml` (`cifar_paper`)."""
    from ..results import RECIPES

    return find_yaml(name, RECIPES)


def find_yaml(name: str, folder: Path) -> str:
    """The file of that name, or one of the folder's, with or without `.yaml`."""
    ours = folder / f'{name.removesuffix(".yaml")}.yaml'
    return str(ours) if not Path(name).exists() and ours.is_file() else name


def load_recipe(path: Union[str, Path]) -> Dict[str, Any]:
    """Read a recipe; `check_recipe` tells whether train.py can take it.

    Args:
        path: A YAML file.

    Returns:
        The recipe's keys and values.

    Raises:
        ValueError: The file is missing or unreadable, is not YAML, is not a mapping, or gives a key twice; one line.
    """
    from ..results import RECIPES

    return load_yaml(path, 'recipe', RECIPES)


def load_yaml(path: Union[str, Path], kind: str, folder: Path) -> Dict[str, Any]:
    """Read a YAML file of keys and values.

    Args:
        path: The file.
        kind: What messages call it.
        folder: Ours of that kind, one of which a wrong name may mean.

    Raises:
        ValueError: As `load_recipe`.
    """
    import yaml

    where = f'{kind} {str(path)!r}'
    try:
        if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
            raise OSError(0, 'it is no regular file')
        text = Path(path).read_text(encoding='utf-8')
    except FileNotFoundError:
        hint = did_you_mean(Path(path).stem, [file.stem for file in folder.glob('*.yaml')])
        raise ValueError(f'no {where}.{hint}') from None
    except UnicodeDecodeError:
        raise ValueError(f'{where} is not text in UTF-8.') from None
    except OSError as e:
        raise ValueError(f'cannot read {where}: {e.strerror}.') from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        config = yaml.safe_load(text)
    except yaml.MarkedYAMLError as e:
        line = f', line {e.problem_mark.line + 1}' if e.problem_mark else ''
        raise ValueError(f'{where}{line} is not YAML: {e.problem}.') from None
    except (yaml.YAMLError, RecursionError, ValueError) as e:  # ValueError: 2024-13-45 looks like a date
        raise ValueError(f'{where} is not YAML: {" ".join(str(e).split())}.') from None
    if not isinstance(config, dict):
        raise ValueError(f'{where} is not a mapping of names to values, as in `epochs: 200`.')
    nodes: List[Any] = [node]
    known = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.ScalarNode) or id(node) in known:
            continue
        known.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        nodes += [value for _, value in node.value]
        seen: Dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and seen.setdefault(key.value, line) != line:
                raise ValueError(f'{where} gives {key.value!r} in line {seen[key.value]} and again in {line}.')
    return config


def check_recipe(
    config: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    who: str = 'train.py',
    listed: str = '`python train.py --help` lists them',
) -> List[str]:
    """What train.py would take wrongly, or drop, in a recipe.

    Args:
        config: A recipe, from `load_recipe`.
        options: train.py's options, from `train_options` or the recorded list.
        who: Whose options they are.
        listed: Where all of them stand.

    Returns:
        One line for each key that is unknown or whose value is of the wrong kind: key, fault and what would be right.
        An empty list for a good recipe.
    """
    problems = []
    for key, value in config.items():
        if key not in options:
            close = difflib.get_close_matches(str(key).replace('-', '_'), list(options), n=1)
            hint = f'did you mean {close[0]!r}?' if close else f'{listed}.'
            problems.append(f'{key}: {who} has no such option; {hint}')
            continue
        problem = _wrong_list(key, value, options[key])
        if problem:
            problems.append(f'{key}: {problem}')
    return problems


def _wrong_list(key: str, value: Any, option: Mapping[str, Any]) -> str:
    kind, nargs = option['type'], option.get('nargs')
    if kind == 'kwargs':
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return ''
        return f'{_show(value)}; write a mapping of names to values, as in {{name: value}}.'
    if nargs is None or nargs == '?':
        if isinstance(value, list):
            return f'{_show(value)}; it takes one value, {SINGULAR.get(kind, kind)}.'
        return _wrong_value(value, kind, option.get('choices'))
    count = 2 if key in PAIRS else nargs
    names: Dict[Any, str] = {'+': 'one or more', '*': 'any number of'}
    many = names.get(count, count)
    right = f'write a list of {many} {PLURAL.get(kind, kind)}, in [ ].'
    if not isinstance(value, list):
        return f'{_show(value)}; {right}'
    if (isinstance(count, int) and len(value) != count) or (count == '+' and not value):
        return f'{value!r:.60} holds {len(value)}; {right}'
    wrong = (_wrong_value(item, kind, option.get('choices')) for item in value)
    return next(filter(None, wrong), '')


def _wrong_value(value: Any, kind: str, choices: Any) -> str:
    if kind not in SINGULAR:
        return ''  # a converter of train.py's own
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right = dict(
        bool=isinstance(value, bool),
        int=number and isinstance(value, int),
        float=number and (isinstance(value, int) or math.isfinite(value)),
        str=isinstance(value, str),
    )[kind]
    if right:
        if choices and value not in choices:
            return f'{_show(value)}; it takes one of {", ".join(map(str, choices))}.'
        return ''
    if value is None:
        return f'it has no value; write {SINGULAR[kind]}, or leave the key out.'
    if kind in ('int', 'float') and isinstance(value, (str, float)):
        try:
            return f'{_show(value)}; write {_yaml_number(value, kind)}{_WHY if isinstance(value, str) else ""}.'
        except (ValueError, OverflowError):
            pass
    if kind == 'str' and isinstance(value, bool):
        return f'{_show(value)} (YAML reads on, off, yes and no so); put quotes around a text.'
    return f'{_show(value)}; it takes {SINGULAR[kind]}.'


_WHY = ' (no quotes, and a point before an exponent, or YAML reads text)'


def _yaml_number(value: Union[str, float], kind: str) -> str:
    """A number as YAML reads it back; ValueError where the value is none of that kind."""
    import yaml

    number = float(value)
    if not math.isfinite(number) or (kind == 'int' and number != int(number)):
        raise ValueError(f'{value!r} is not {SINGULAR[kind]}')
    return str(int(number)) if kind == 'int' else yaml.safe_dump(number).split()[0]


def _show(value: Any) -> str:
    kinds = ((bool, 'true or false'), (str, 'text'), (list, 'a list'), (dict, 'a mapping'), (int, 'a whole number'))
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + '...'
    name = next((name for kind, name in kinds if isinstance(value, kind)), None)
    return f'{text} is {name}' if name else f'{text} does not fit'
