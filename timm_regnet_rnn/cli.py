"""The command `timm-regnet-rnn`. What needs a model imports it when it is called; see launch.py."""

import argparse
import importlib
import json
import runpy
import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence

from . import __version__, launch, listing
from .errors import Parser, UsageError, did_you_mean, report, run_command

PROG = 'timm-regnet-rnn'
DEFAULT_MODEL = 'regnet_convlstm_20'
MODEL_HELP = 'NAME[.TAG], hf-hub:ORG/NAME, the folder of a run, or a .pth.tar'


@contextmanager
def underway(step: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is done, and since when; the function given names the next step."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn('{task.description}', markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(step, total=None)
        yield lambda step: bar.update(task, description=step)


def cmd_list(args: argparse.Namespace) -> int:
    """Print the models."""
    rows = listing.list_rows(args.pattern, args.pretrained, args.sort)
    if not rows:
        hint = did_you_mean(args.pattern, listing.names())
        what = 'no model with pretrained weights' if args.pretrained else 'no model'
        raise UsageError(f'{what} matches {args.pattern!r}; without a pattern all are listed.{hint}')
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        listing.print_rows(rows)
    return 0


def cmd_predict(args: argparse.Namespace) -> int:
    """Print the most probable classes of images."""
    from huggingface_hub.utils import tqdm

    from .images import image_paths
    from .inference import check_device, create, predictions

    if args.topk < 1:
        raise UsageError(f'--topk must be at least 1, got {args.topk}.')
    device = check_device(args.device)
    paths = image_paths(args.image)
    model = create(args.model, args.checkpoint, args.ema).to(device)
    bar = tqdm(total=len(paths), unit='image', disable=len(paths) < 2 or not sys.stderr.isatty())
    rows, failed = [], False
    with bar:
        for row in predictions(model, paths, args.topk, device):
            if 'error' in row:
                failed = True
                bar.write(f'{PROG}: {row["error"]}', file=sys.stderr)
            elif args.json:
                rows.append(row)
            else:
                lines = [row['path'], *(f'  {100 * p:6.2f} %  {name}' for name, p in row['top'])]
                bar.write('\n'.join(lines), file=sys.stdout)
            bar.update()
    if args.json:
        print(json.dumps(rows, indent=2))
    return 2 if failed else 0


def cmd_visualize(args: argparse.Namespace) -> int:
    """Draw what the regulator does to an image."""
    from . import visualize
    from .inference import check_device, create

    image = Path(args.image)
    if not image.is_file():
        raise UsageError(f'no file {args.image!r}.')
    file = visualize.check_output(args.output or f'{image.stem}.html', image)
    device = check_device(args.device)
    model = create(args.model, args.checkpoint, args.ema).to(device)
    cfg = model.pretrained_cfg
    name = '.'.join(filter(None, (cfg.get('architecture'), cfg.get('tag'))))
    visualize.write(visualize.visualize(model, image, name), file)
    print(file)
    return 0


def cmd_run(args: argparse.Namespace) -> int:
    """Run a script as `python SCRIPT ARGS...` would."""
    script = Path(args.script)
    if not script.is_file():
        raise UsageError(f'no script {args.script!r}.')
    launch.register()
    sys.argv = [args.script, *args.args]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(args.script, run_name='__main__')
    return 0


def cmd_train(args: argparse.Namespace) -> int:
    """Train a model by a recipe with timm's train.py."""
    from .training import Nodes, train

    return train(
        args.recipe,
        args.model,
        args.data_dir,
        args.flags,
        output=args.output,
        results=args.results,
        timm_dir=args.timm_dir,
        nproc=args.nproc,
        nodes=Nodes(args.nnodes, args.node_rank, args.rdzv_endpoint),
        dry_run=args.dry_run,
    )


def cmd_split(args: argparse.Namespace) -> int:
    """Make train/ and val/ out of one folder of classes."""
    from .training.data import hold_out

    counts = hold_out(Path(args.folder), Path(args.to), args.held_out)
    train, val = (sum(numbers) for numbers in zip(*counts.values()))
    print(f'{args.to}: {len(counts)} classes, {train} images in train/, {val} in val/')
    return 0


def cmd_study(args: argparse.Namespace) -> int:
    """Run what has no row yet of a study."""
    from .training.study import study

    return study(
        args.study,
        args.data_dir,
        args.output,
        args.results,
        args.timm_dir,
        args.device,
        jobs=args.jobs,
        executor=args.executor,
        slurm=args.slurm,
        dry_run=args.dry_run,
    )


def cmd_export(args: argparse.Namespace) -> int:
    """Write a model to a file for deployment."""
    with underway('importing PyTorch') as progress:
        from .export import export

        file, difference = export(
            args.name,
            args.output,
            args.format,
            checkpoint=args.checkpoint,
            image_size=args.image_size,
            batch_size=args.batch_size,
            reparameterize=args.reparameterize,
            ema=args.ema,
            progress=progress,
        )
    checked = f"logits within {difference:.0e} of the eager model's"
    if args.format == 'safetensors':
        checked = 'read back bit for bit'
    print(f'{file}: {file.stat().st_size / 1e6:.2f} MB, {checked}')
    return 0


def cmd_pull(args: argparse.Namespace) -> int:
    """Make a folder of each model for a machine without a network."""
    from .inference import check_name
    from .weights.folder import pull_folder

    for name in args.name:
        if not name.startswith('hf-hub:') and not Path(name).exists():
            check_name(name)
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


class _Version(argparse.Action):
    """Prints the versions that an answer to a question about the program needs."""

    def __init__(self, option_strings: List[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help='print the versions and stop')

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        found = []
        for package in ('timm', 'torch'):
            try:
                found.append(f'{package} {version(package)}')
            except PackageNotFoundError:
                found.append(f'no {package}')
        print(f'{PROG} {__version__} ({", ".join(found)})')
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = Parser(
        prog=PROG,
        description='RegNet (arXiv 2101.00590) for timm.',
        epilog=f'example: {PROG} predict photo.jpg; `{PROG} COMMAND --help` has more.',
    )
    parser.add_argument('--version', action=_Version)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name: str, function: Any, help: str, *examples: str, **kwargs: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=f'{help[0].upper()}{help[1:]}.', examples=examples, **kwargs
        )
        sub.set_defaults(function=function, parser=sub)
        return sub

    def weights(sub: argparse.ArgumentParser) -> None:
        sub.add_argument('--checkpoint', metavar='FILE', help='weights of that model, .safetensors or timm .pth.tar')
        sub.add_argument(
            '--ema',
            action=argparse.BooleanOptionalAction,
            help="of a run's two sets of weights the averaged ones; default: they are taken where they are",
        )

    sub = command(
        'list',
        cmd_list,
        'models and pretrained tags: sizes, accuracy, cost and gain beside their ResNets',
        "'*convlstm*'",
        '--pretrained --sort params',
    )
    sub.add_argument('pattern', nargs='?', default='*', help="e.g. '*_convlstm_*'")
    sub.add_argument('--pretrained', action='store_true', help='only tags, which have pretrained weights')
    sub.add_argument(
        '--sort', choices=listing.SORTS, default='name', help='default: %(default)s; top1 and gain: best first'
    )
    sub.add_argument('--json', action='store_true', help='print JSON')

    sub = command(
        'predict',
        cmd_predict,
        'classify images',
        'photo.jpg',
        'photos/ --model regnet_convlstm_50.resnet50_a1_in1k --topk 3',
        'photos/ --model output/RUN --json',
    )
    sub.add_argument('image', nargs='+', metavar='IMAGE', help='image file, or a folder of them')
    sub.add_argument('--model', default=DEFAULT_MODEL, metavar='M', help=f'{MODEL_HELP}; default: %(default)s')
    weights(sub)
    sub.add_argument('--topk', type=int, default=5, metavar='K', help='default: %(default)s')
    sub.add_argument('--device', default='cpu', help='default: %(default)s')
    sub.add_argument('--json', action='store_true', help='print JSON')

    sub = command(
        'visualize',
        cmd_visualize,
        'draw what the regulator remembers of an image, block by block',
        'photo.jpg',
        'photo.jpg --model output/RUN --output photo.png',
    )
    sub.add_argument('image', metavar='IMAGE', help='image file')
    sub.add_argument('--model', default=DEFAULT_MODEL, metavar='M', help=f'{MODEL_HELP}; default: %(default)s')
    sub.add_argument('--output', metavar='FILE', help='.html or .png; default: IMAGE.html in the current folder')
    weights(sub)
    sub.add_argument('--device', default='cpu', help='default: %(default)s')

    sub = command(
        'run',
        cmd_run,
        "run a script, e.g. timm's validate.py, with the models registered",
        'validate.py --model regnet_convlstm_20 --pretrained --data-dir data/cifar10',
    )
    sub.add_argument('script', metavar='SCRIPT')
    sub.add_argument('args', nargs=argparse.REMAINDER, metavar='ARGS')

    sub = command(
        'train',
        cmd_train,
        "train by a recipe with timm's train.py",
        'train_recipes/cifar_paper.yaml --model regnet_convlstm_20 --data-dir data/cifar10_pad4',
        'train_recipes/cifar_paper.yaml --model regnet_convlstm_20 --data-dir data/cifar10_pad4 --seed 1 --dry-run',
        'finetune --model regnet_convlstm_50.resnet50_a1_in1k --data-dir photos',
        usage='%(prog)s RECIPE --model M --data-dir D [options] [any flag of train.py]',
        allow_abbrev=False,
    )
    sub.add_argument('recipe', metavar='RECIPE', help='YAML file, or the name of one of ours, e.g. cifar_paper')
    sub.add_argument('--model', required=True, metavar='M', help='any timm model, with or without a tag')
    sub.add_argument('--data-dir', required=True, metavar='D', help='the data, as train.py reads them')
    sub.add_argument('--output', metavar='DIR', help='folder of the run; given again, the run in it is resumed')
    sub.add_argument('--results', metavar='FILE', help='where the row goes; default: results.csv beside the recipe')
    sub.add_argument(
        '--timm-dir', metavar='DIR', help="checkout of timm; default: $TIMM_DIR, or the installed one's tag"
    )
    sub.add_argument('--nproc', type=int, metavar='N', help='processes; default: one per visible GPU')
    sub.add_argument('--nnodes', type=int, default=1, metavar='N', help='machines, each with a command of its own')
    sub.add_argument('--node-rank', type=int, default=0, metavar='R', help='which of them this is; 0 writes the row')
    sub.add_argument('--rdzv-endpoint', default='', metavar='HOST:PORT', help='a free port of node 0, for all')
    sub.add_argument('--dry-run', action='store_true', help='print the command and stop')

    sub = command(
        'split',
        cmd_split,
        'make train/ and val/ out of one folder of classes',
        'photos --to data',
        'photos --to data --held-out 0.3',
    )
    sub.add_argument('folder', metavar='FOLDER', help='holds a folder of images for every class; stays as it is')
    sub.add_argument('--to', required=True, metavar='DIR', help='the folder to make; links, where the disk has them')
    sub.add_argument('--held-out', type=float, default=0.2, metavar='S', help='share for val/; default: %(default)s')

    sub = command(
        'study',
        cmd_study,
        'run what has no row yet of a comparison: models, seeds, one recipe',
        'cpu_tiny100 --dry-run',
        'train_recipes/studies/paper_cifar10.yaml --jobs 4',
        'paper_cifar10 --executor slurm --slurm partition=gpu --slurm time=600',
    )
    sub.add_argument('study', metavar='STUDY', help='YAML file, or the name of one of ours, e.g. cpu_tiny100')
    sub.add_argument('--data-dir', metavar='D', help="the data; default: the study's")
    sub.add_argument('--output', default='output', metavar='DIR', help='holds a folder per run; default: %(default)s')
    sub.add_argument('--results', metavar='FILE', help='where the rows go; default: results.csv beside the recipe')
    sub.add_argument(
        '--timm-dir', metavar='DIR', help="checkout of timm; default: $TIMM_DIR, or the installed one's tag"
    )
    sub.add_argument('--device', choices=('cpu', 'cuda', 'mps'), help='default: what the machine has')
    sub.add_argument('--jobs', type=int, metavar='N', help='runs at once; default: what GPUs and cores carry')
    sub.add_argument('--executor', choices=('local', 'slurm'), default='local', help='default: %(default)s')
    sub.add_argument(
        '--slurm', action='append', default=[], metavar='KEY=VALUE', help="SLURM's parameters by submitit's names"
    )
    sub.add_argument('--dry-run', action='store_true', help='say what is there and what is to run, and stop')

    sub = command(
        'export',
        cmd_export,
        'write a model as ONNX, torch.export program or safetensors, and check it',
        'regnet_convlstm_20 --format onnx',
        'output/RUN --format torch-export --output net.pt2 --batch-size 1',
    )
    sub.add_argument('name', metavar='MODEL', help=f'{MODEL_HELP}, or local-dir:FOLDER')
    sub.add_argument('--format', required=True, choices=('onnx', 'torch-export', 'safetensors'))
    sub.add_argument('--output', metavar='FILE', help='default: NAME[.TAG] and .onnx, .pt2 or .safetensors')
    weights(sub)
    sub.add_argument('--image-size', type=int, metavar='N', help="height and width; default: the model's test size")
    sub.add_argument('--batch-size', type=batch_size, metavar='N', help="fixed; default: 'dynamic', any size")
    sub.add_argument(
        '--reparameterize',
        action=argparse.BooleanOptionalAction,
        help="fold batch norms and the regulators' convolutions; default, except for safetensors",
    )

    sub = command(
        'pull',
        cmd_pull,
        'fetch weights, verified, for a machine without a network',
        'regnet_convlstm_50 --to lab/',
        'hf-hub:ORG/NAME --to lab/',
    )
    sub.add_argument('name', nargs='+', metavar='NAME', help="NAME[.TAG], hf-hub:ORG/NAME, or a run's folder")
    sub.add_argument('--to', required=True, metavar='DIR', help="'local-dir:DIR/NAME' is then a model for timm")

    for name, help in (  # with parsers of their own
        ('push', 'publish a trained model on the Hugging Face Hub'),
        ('verify', 'fetch released weights and check them against the manifest'),
    ):
        command(name, None, help)

    sub = command(
        'autoload',
        cmd_autoload,
        'register the models in every program that imports timm',
        '--enable',
        '--status',
    )
    action = sub.add_mutually_exclusive_group(required=True)
    for name in ('enable', 'disable', 'status'):
        action.add_argument(f'--{name}', dest='action', action='store_const', const=name)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Args:
        argv: Arguments, those of the process if None.

    Returns:
        Exit status: 0, or 2 after one line on stderr that says what was wrong, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (['push'], ['verify']):  # they have parsers of their own
        launch.register()
        module = importlib.import_module(f'.weights.{argv[0]}', __package__)
        return module.main(argv[1:], prog=f'{PROG} {argv[0]}')
    args, flags = make_parser().parse_known_args(argv)
    args.flags = flags
    if flags and args.command != 'train':
        args.parser.refuse(flags)
    if args.command == 'run':
        try:
            return cmd_run(args)  # the script's own exceptions are its own
        except UsageError as e:
            report(PROG, str(e))
            return 2

    def function() -> int:
        if args.command not in ('list', 'autoload'):
            launch.register()
        return args.function(args)

    return run_command(PROG, function)
