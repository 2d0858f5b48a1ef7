"""The command `timm-regnet-rnn`: list, predict, train, export, pull, and run a script with the models registered."""

import argparse
import fnmatch
import json
import runpy
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from .errors import Parser, UsageError, report, run_command

DEFAULT_MODEL = 'regnet_convlstm_20'


def list_rows(pattern: str = '*') -> List[Dict[str, Any]]:
    """Name, parameters, multiply-adds at the default input size and pretrained tags of every model that matches."""
    import timm

    from . import regnet_rnn

    complexity = json.loads((Path(__file__).parent / 'model_complexity.json').read_text(encoding='utf-8'))
    rows = []
    for name in timm.list_models(module='regnet_rnn'):
        if fnmatch.fnmatch(name, pattern):
            cfgs = regnet_rnn.default_cfgs[name]
            tags = [tag for tag in cfgs.tags if tag and cfgs.cfgs[tag].has_weights]
            rows.append(dict(name=name, **complexity[name], tags=tags))
    return rows


def cmd_list(args: argparse.Namespace) -> int:
    """Print the models."""
    rows = list_rows(args.pattern)
    if not rows:
        raise UsageError(f'no model matches {args.pattern!r}; without a pattern all are listed.')
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max(len(row['name']) for row in rows)
    print(f'{"name":{width}}  {"params M":>8}  {"macs G":>7}  {"input":>11}  pretrained tags')
    for row in rows:
        size = 'x'.join(map(str, row['input_size']))
        print(
            f'{row["name"]:{width}}  {row["params"] / 1e6:8.2f}  {row["macs"] / 1e9:7.3f}  {size:>11}  '
            f'{", ".join(row["tags"])}'
        )
    return 0


def image_paths(names: Sequence[str]) -> List[Path]:
    """The files named, and all images in the folders named.

    Raises:
        UsageError: A path does not exist, or a folder holds no image.
    """
    from timm.data.readers.img_extensions import get_img_extensions

    paths: List[Path] = []
    for name in map(Path, names):
        if name.is_dir():
            found = sorted(p for p in name.rglob('*') if p.suffix.lower() in get_img_extensions() and p.is_file())
            if not found:
                raise UsageError(f'no image in folder {str(name)!r}.')
            paths += found
        elif name.is_file():
            paths.append(name)
        else:
            raise UsageError(f'no file or folder {str(name)!r}.')
    return paths


def class_names(model) -> List[str]:
    """One readable name per class: the weights' own, else ImageNet's, else numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [f'class {i}' for i in range(model.num_classes)]


def predictions(model, paths: Sequence[Path], topk: int, device: str) -> Iterator[Dict[str, Any]]:
    """Classify images one by one.

    Yields:
        For each path a dict of `path` and either `top`, a list of (class name, probability) from the most probable
        down, or `error`, one line that says why the file could not be read.
    """
    import torch
    from PIL import Image, UnidentifiedImageError
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, model=model, use_test_size=True)
    transform = create_transform(**config)
    names = class_names(model)
    mode = {1: 'L', 3: 'RGB'}.get(config['input_size'][0])
    if mode is None:
        raise UsageError(f'the model takes {config["input_size"][0]} channels; predict reads images of 1 or 3.')
    for path in paths:
        try:
            with Image.open(path) as image:
                x = transform(image.convert(mode)).unsqueeze(0).to(device)
        except UnidentifiedImageError:
            yield dict(path=str(path), error=f'{str(path)!r} is not an image that Pillow can read.')
            continue
        except (OSError, ValueError, Image.DecompressionBombError) as e:
            yield dict(path=str(path), error=f'cannot read {str(path)!r}: {e}')
            continue
        with torch.inference_mode():
            probability = model(x).float().softmax(-1)[0]
        value, index = probability.topk(min(topk, len(names)))
        yield dict(path=str(path), top=[(names[i], v) for i, v in zip(index.tolist(), value.tolist())])


def create(name: str, checkpoint: Optional[str]):
    """A model in eval mode, with its pretrained weights or those of a local file."""
    import timm
    from timm.models import is_model, is_model_pretrained

    if name.startswith(('hf-hub:', 'local-dir:')):
        from .weights import pull

        pull.check_source(name)
        if checkpoint is None:
            return timm.create_model(name, pretrained=True).eval()
    elif not is_model(name):
        raise UsageError(f'unknown model {name!r}; `timm-regnet-rnn list` prints the names.')
    if checkpoint is not None:
        overlay = dict(file=checkpoint, hf_hub_id=None, source=None)
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    else:
        if not is_model_pretrained(name):
            raise UsageError(
                f'{name!r} has no pretrained weights; `timm-regnet-rnn list` prints the tags that have, '
                'and --checkpoint takes a file.'
            )
        model = timm.create_model(name, pretrained=True)
    return model.eval()


def cmd_predict(args: argparse.Namespace) -> int:
    """Print the most probable classes of images."""
    from huggingface_hub.utils import tqdm

    if args.topk < 1:
        raise UsageError(f'--topk must be at least 1, got {args.topk}.')
    paths = image_paths(args.image)
    model = create(args.model, args.checkpoint).to(args.device)
    bar = tqdm(total=len(paths), unit='image', disable=len(paths) < 2 or not sys.stderr.isatty())
    rows, failed = [], False
    with bar:
        for row in predictions(model, paths, args.topk, args.device):
            if 'error' in row:
                failed = True
                bar.write(f'timm-regnet-rnn: {row["error"]}', file=sys.stderr)
            elif args.json:
                rows.append(row)
            else:
                lines = [row['path'], *(f'  {100 * p:6.2f} %  {name}' for name, p in row['top'])]
                bar.write('\n'.join(lines), file=sys.stdout)
            bar.update()
    if args.json:
        print(json.dumps(rows, indent=2))
    return 2 if failed else 0


def cmd_run(args: argparse.Namespace) -> int:
    """Run a script as `python SCRIPT ARGS...` would."""
    script = Path(args.script)
    if not script.is_file():
        raise UsageError(f'no script {args.script!r}.')
    sys.argv = [args.script, *args.args]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(args.script, run_name='__main__')
    return 0


def cmd_train(args: argparse.Namespace) -> int:
    """Train a model by a recipe with timm's train.py."""
    from .training import train

    return train(
        args.recipe,
        args.model,
        args.data_dir,
        args.flags,
        output=args.output,
        results=args.results,
        timm_dir=args.timm_dir,
        nproc=args.nproc,
        dry_run=args.dry_run,
    )


def cmd_export(args: argparse.Namespace) -> int:
    """Write a model to a file for deployment."""
    from .export import export

    file, difference = export(
        args.name,
        args.output,
        args.format,
        checkpoint=args.checkpoint,
        image_size=args.image_size,
        batch_size=args.batch_size,
        reparameterize=args.reparameterize,
    )
    checked = f"logits within {difference:.0e} of the eager model's"
    if args.format == 'safetensors':
        checked = 'read back bit for bit'
    print(f'{file}: {file.stat().st_size / 1e6:.2f} MB, {checked}')
    return 0


def cmd_pull(args: argparse.Namespace) -> int:
    """Make a folder of each model for a machine without a network."""
    from .weights.pull import pull_folder

    for name in args.name:
        print(f'local-dir:{pull_folder(name, args.to)}')
    return 0


def cmd_autoload(args: argparse.Namespace) -> int:
    """Enable, disable or show autoload."""
    from . import autoload

    if args.action == 'enable':
        print(f'enabled: {autoload.enable()}')
    elif args.action == 'disable':
        path = autoload.disable()
        print(f'disabled: removed {path}' if path else 'disabled: it was not enabled')
    else:
        path = autoload.enabled_in()
        print(f'enabled: {path}' if path else 'disabled')
    return 0


def batch_size(text: str) -> Optional[int]:
    """The number, or None for 'dynamic'."""
    return None if text == 'dynamic' else int(text)


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = Parser(prog='timm-regnet-rnn', description='RegNet (arXiv 2101.00590) for timm.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    sub = commands.add_parser('list', help='names, parameters, multiply-adds and pretrained tags')
    sub.add_argument('pattern', nargs='?', default='*', help="e.g. '*_convlstm_*'")
    sub.add_argument('--json', action='store_true', help='print JSON')
    sub.set_defaults(function=cmd_list)

    sub = commands.add_parser('predict', help='classify images')
    sub.add_argument('image', nargs='+', metavar='IMAGE', help='image file, or a folder of them')
    sub.add_argument('--model', default=DEFAULT_MODEL, metavar='NAME[.TAG]', help='default: %(default)s')
    sub.add_argument('--checkpoint', metavar='FILE', help='weights of that model, .safetensors or timm .pth.tar')
    sub.add_argument('--topk', type=int, default=5, metavar='K', help='default: %(default)s')
    sub.add_argument('--device', default='cpu', help='default: %(default)s')
    sub.add_argument('--json', action='store_true', help='print JSON')
    sub.set_defaults(function=cmd_predict)

    sub = commands.add_parser('run', help="run a script, e.g. timm's validate.py, with the models registered")
    sub.add_argument('script', metavar='SCRIPT')
    sub.add_argument('args', nargs=argparse.REMAINDER, metavar='ARGS')
    sub.set_defaults(function=cmd_run)

    sub = commands.add_parser(
        'train',
        help="train by a recipe with timm's train.py",
        usage='%(prog)s RECIPE --model M --data-dir D [options] [any flag of train.py]',
        allow_abbrev=False,
    )
    sub.add_argument('recipe', metavar='RECIPE', help='YAML file, e.g. train_recipes/cifar_paper.yaml')
    sub.add_argument('--model', required=True, metavar='M', help='any timm model, with or without a tag')
    sub.add_argument('--data-dir', required=True, metavar='D', help='the data, as train.py reads them')
    sub.add_argument('--output', metavar='DIR', help='folder of the run; given again, the run in it is resumed')
    sub.add_argument('--results', metavar='FILE', help='where the row goes; default: results.csv beside the recipe')
    sub.add_argument(
        '--timm-dir', metavar='DIR', help="checkout of timm; default: $TIMM_DIR, or the installed one's tag"
    )
    sub.add_argument('--nproc', type=int, metavar='N', help='processes; default: one per visible GPU')
    sub.add_argument('--dry-run', action='store_true', help='print the command and stop')
    sub.set_defaults(function=cmd_train)

    sub = commands.add_parser('export', help='write a model as ONNX, torch.export program or safetensors, and check it')
    sub.add_argument('name', metavar='NAME[.TAG]', help='or hf-hub:ORG/NAME, or local-dir:FOLDER')
    sub.add_argument('--format', required=True, choices=('onnx', 'torch-export', 'safetensors'))
    sub.add_argument('--output', metavar='FILE', help='default: NAME[.TAG] and .onnx, .pt2 or .safetensors')
    sub.add_argument('--checkpoint', metavar='FILE', help='weights of that model, .safetensors or timm .pth.tar')
    sub.add_argument('--image-size', type=int, metavar='N', help="height and width; default: the model's test size")
    sub.add_argument('--batch-size', type=batch_size, metavar='N', help="fixed; default: 'dynamic', any size")
    sub.add_argument(
        '--reparameterize',
        action=argparse.BooleanOptionalAction,
        help="fold batch norms and the regulators' convolutions; default, except for safetensors",
    )
    sub.set_defaults(function=cmd_export)

    sub = commands.add_parser('pull', help='fetch weights, verified, for a machine without a network')
    sub.add_argument('name', nargs='+', metavar='NAME', help='NAME[.TAG] or hf-hub:ORG/NAME')
    sub.add_argument('--to', required=True, metavar='DIR', help="'local-dir:DIR/NAME' is then a model for timm")
    sub.set_defaults(function=cmd_pull)

    sub = commands.add_parser('autoload', help='register the models in every program that imports timm')
    action = sub.add_mutually_exclusive_group(required=True)
    for name in ('enable', 'disable', 'status'):
        action.add_argument(f'--{name}', dest='action', action='store_const', const=name)
    sub.set_defaults(function=cmd_autoload)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Args:
        argv: Arguments, those of the process if None.

    Returns:
        Exit status: 0, or 2 after one line on stderr that says what was wrong.
    """
    parser = make_parser()
    args, args.flags = parser.parse_known_args(argv)
    if args.flags and args.command != 'train':
        parser.error(f'unrecognized arguments: {" ".join(args.flags)}')
    if args.command == 'run':
        try:
            return cmd_run(args)  # the script's own exceptions are its own
        except UsageError as e:
            report('timm-regnet-rnn', str(e))
            return 2
    return run_command('timm-regnet-rnn', lambda: args.function(args))
