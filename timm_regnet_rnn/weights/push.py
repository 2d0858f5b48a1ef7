"""Publish a trained model on the Hugging Face Hub: safetensors, config.json and a model card, in one commit.

    python push.py output/RUN --repo-id ORG/NAME                       # timm's train.py wrote it
    python push.py --tag regnet_convlstm_20.cifar10_jpeg75             # what the manifest has, to its own repository
    python push.py CHECKPOINT --repo-id ORG/NAME --dry-run --folder DIR  # write the folder, send nothing

A checkpoint's figures are those of its run in results.csv, found by the name of its folder or --run; weights of
another epoch than that run's last, or not averaged where it averaged, are refused. --data-dir DIR evaluates the model
before anything is sent. What was sent is fetched into an empty cache afterwards and compared bit for bit. HF_TOKEN
holds the token.
"""

import argparse
import filecmp
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import timm
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from timm.data import resolve_data_config

from .. import __version__, results
from ..errors import EXPECTED, KeyValues, Parser, UsageError, one_line, run_command
from ..files import file_sum, scratch_folder
from ..training.record import read_result
from .card import make_card
from .folder import Trained, evaluate, rebuild, tensor_digest, write_folder
from .manifest import MANIFEST, ORGANISATION, RELEASED, hub_id
from .pull import pull, retry
from .verify import store_logits

TOLERANCE = 0.05  # points of top-1, what arithmetic in another order may change
FAILURES = (HfHubHTTPError, LocalTokenNotFoundError, SafetensorError)
EMBEDDED = 5 << 20  # bytes that weights inside the package may have
FILES = ('model.safetensors', 'config.json', 'README.md')


def find_run(groups: Dict[Any, Any], trained: Trained, checkpoint: Path, name: Optional[str]) -> Optional[results.Run]:
    """The row that the weights were measured for, None if there is none.

    It is the one called `name` in results.csv; without a name that of result.json in the run's folder, or the one in
    results.csv that is called like the folder.

    Raises:
        UsageError: The row named is missing, or is of other weights.
    """
    runs = {run.run: run for rows in groups.values() for same in rows.values() for run in same}
    path = checkpoint.resolve()
    folder = path if path.is_dir() else path.parent
    run = runs.get(folder.name if name is None else name)
    if name is None and (folder / 'result.json').is_file():
        row = {name: '' for name in results.COLUMNS} | read_result(folder / 'result.json')
        run = results.parse({key: str(value) for key, value in row.items()})
    if name and run is None:
        raise UsageError(f'results.csv has no run {name!r}.')
    if run is None:
        return None
    facts: Any = (run.model, run.seed, run.epochs, run.weights == 'ema')
    mine: Any = (trained.name, trained.settings.get('seed'), trained.epochs, trained.averaged)
    if facts != mine:
        mine, facts = ('{} of seed {}, epoch {}, EMA {}'.format(*known) for known in (mine, facts))
        raise UsageError(
            f'{str(checkpoint)!r} is {mine}; its run {run.run!r} was measured with {facts}. Give that one, '
            "or --run '' for a card without the run's figures."
        )
    return run


def check_accuracy(found: float, expected: Dict[str, Optional[float]]) -> None:
    """Refuse a model whose accuracy is not what somebody says it is.

    Raises:
        UsageError: It differs from one of `expected`, percentages by who says so.
    """
    for who, value in expected.items():
        if value is not None and abs(found - value) > TOLERANCE:
            raise UsageError(f'top-1 is {found:.2f} %, but {who} says {value:.2f} %; nothing is sent.')


def holds(api: HfApi, repo_id: str, revision: str, files: List[Path]) -> bool:
    """Whether a revision has these very files already."""
    found = api.get_paths_info(repo_id, [f.name for f in files], revision=revision)
    there: Dict[str, Any] = {info.path: info for info in found}

    def same(file: Path) -> bool:
        info = there.get(file.name)
        if info is None or info.size != file.stat().st_size:
            return False
        if info.lfs:
            return info.lfs.sha256 == file_sum(file)
        return info.blob_id == file_sum(file, git=True)

    return all(map(same, files))


def pull_requests(api: HfApi, repo_id: str) -> List[str]:
    """The open pull requests' revisions."""
    return [ref.ref for ref in api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or ()]


def send(api: HfApi, repo_id: str, files: List[Path], args: argparse.Namespace) -> str:
    """Upload files in one commit, tried again as a whole; a commit whose answer was lost is recognised as done.

    Returns:
        The revision that holds the files.
    """
    revision = args.revision or constants.DEFAULT_REVISION
    try:
        public = not retry(api.repo_info, repo_id).private
        if args.private and public:
            raise UsageError(f'{repo_id!r} exists and is public; --private is for a new repository.')
    except RepositoryNotFoundError:
        if args.create_pr:
            raise UsageError(f'there is no repository {repo_id!r} to open a pull request in.') from None
        retry(api.create_repo, repo_id, private=args.private, exist_ok=True)
    if args.revision and not args.create_pr:
        retry(api.create_branch, repo_id, branch=args.revision, exist_ok=True)
    before = retry(pull_requests, api, repo_id) if args.create_pr else []

    def once() -> Any:
        places = [ref for ref in pull_requests(api, repo_id) if ref not in before] if args.create_pr else [revision]
        for place in places:
            if holds(api, repo_id, place, files):
                return place if args.create_pr else api.repo_info(repo_id, revision=place).sha
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(file.name, file) for file in files],
            commit_message=args.message,
            revision=revision,
            create_pr=args.create_pr,
        )
        return commit.pr_revision if args.create_pr else commit.oid

    return retry(once, patience=600)


def check_sent(repo_id: str, revision: str, files: List[Path]) -> None:
    """Fetch files into an empty cache and compare them bit for bit.

    Raises:
        RuntimeError: One differs.
    """
    with tempfile.TemporaryDirectory() as cache:
        for file in files:
            got = retry(hf_hub_download, repo_id, file.name, revision=revision, cache_dir=cache)
            if not filecmp.cmp(got, file, shallow=False):
                raise RuntimeError(f'{file.name} of {repo_id!r} at {revision} is not what was sent; push it again.')


def record(
    release: str,
    trained: Trained,
    repo_id: str,
    revision: Optional[str],
    weights: Path,
    run: results.Run,
    metrics: Dict[str, Any],
    license: str,
    manifest: Path,
    embed: bool,
) -> None:
    """Enter released weights into a checkout's manifest, and what they compute on stored images into checks/."""
    defaults = timm.get_pretrained_cfg(release.split('.')[0])
    entry = dict(
        repo_id=re.sub(f'^{re.escape(ORGANISATION)}/', '{org}/', repo_id),
        revision=revision,
        sha256=file_sum(weights),
        tensors=tensor_digest(weights),
        size=weights.stat().st_size,
        license=license,
        dataset=run.dataset,
        num_classes=trained.model.num_classes,
        labels=trained.labels or None,
        data_config={k: v for k, v in trained.data_config.items() if getattr(defaults, k) != v},
        recipe=f'train_recipes/{run.recipe}.yaml',
        overrides=run.overrides,
        epochs=run.epochs,
        seed=run.seed,
        weights=run.weights,
        run=run.run,
        metrics=metrics,
    )
    store_logits(release, trained.model, trained.data_config, manifest.parents[2])
    if embed:
        shutil.copyfile(weights, manifest.with_name(f'{release}.safetensors'))
    released = json.loads(manifest.read_text(encoding='utf-8'))
    scratch = manifest.with_suffix('.tmp')
    scratch.write_text(json.dumps({**released, release: entry}, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    os.replace(scratch, manifest)


def load(args: argparse.Namespace) -> Trained:
    """The model that the command line names.

    Raises:
        UsageError: Arguments that do not go together, or a tag that was not released.
    """
    if not args.tag:
        trained = rebuild(Path(args.checkpoint), args.ema, args.model, args.model_kwargs)
    elif args.tag not in RELEASED:
        raise UsageError(f'{args.tag!r} is not in the manifest, which has {", ".join(RELEASED)}.')
    elif args.ema is not None or args.model or args.model_kwargs or args.run or args.release:
        raise UsageError('--tag takes what the manifest says: no --ema, --model, --model-kwargs, --run or --release.')
    else:
        model = timm.create_model(args.tag, pretrained=True).eval()
        trained = Trained(model, args.tag, {}, data_config=resolve_data_config(model=model))
        trained.labels, trained.file = list(RELEASED[args.tag]['labels'] or ()), pull(hub_id(args.tag))
    if args.labels:
        if not Path(args.labels).is_file():
            raise UsageError(f'no file {args.labels!r}.')
        trained.labels = Path(args.labels).read_text(encoding='utf-8').splitlines()
        if len(trained.labels) != trained.model.num_classes:
            raise UsageError(
                f'{args.labels!r} has {len(trained.labels)} lines, the model {trained.model.num_classes} classes.'
            )
    if args.release:
        name = trained.name.split('.')[0]
        if trained.args or not re.fullmatch(rf'{name}\.\w+', args.release):
            raise UsageError(f'--release takes {name}.TAG, for a model of its default arguments; got {args.release!r}.')
        if not (args.manifest.parents[2] / 'pyproject.toml').is_file():
            raise UsageError(
                f'--release writes the manifest of a checkout, and {str(args.manifest)!r} is an installed copy, which '
                'the next install replaces: run `python hub/push.py` of a checkout.'
            )
        if not args.data_dir or args.dry_run or args.create_pr:
            raise UsageError(
                '--release needs --data-dir, for figures of the very weights, and a push that is no trial.'
            )
    return trained


def push(args: argparse.Namespace) -> int:
    """Do what the command line says; returns 0."""
    if bool(args.tag) == bool(args.checkpoint):
        raise UsageError('give a CHECKPOINT or --tag NAME.TAG, one of them.')
    repo_id = args.repo_id or (hub_id(args.tag).split('@')[0] if args.tag in RELEASED else None)
    if args.embed and args.release:
        repo_id = repo_id or f'{ORGANISATION}/{args.release}'
    if not repo_id or not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id):
        raise UsageError(f'--repo-id must be ORG/NAME; got {repo_id!r}.')
    if args.expect_top1 is not None and not args.data_dir:
        raise UsageError('--expect-top1 needs --data-dir, the images to evaluate on.')
    trained = load(args)
    groups = results.read_runs(Path(args.results))
    run = None if args.tag else find_run(groups, trained, Path(args.checkpoint), args.run)
    if args.embed and not args.release:
        raise UsageError('--embed needs --release NAME.TAG.')
    if args.release and run is None:
        raise UsageError('--release needs the row of results.csv that the weights were measured for; --run names it.')
    entry, measured = RELEASED.get(args.tag), None
    if args.data_dir:
        measured = evaluate(trained, args.data_dir, args.val_split)
        stated: Dict[str, Any] = {'--expect-top1': args.expect_top1, 'results.csv': run and run.top1}
        check_accuracy(measured['top1'], {**stated, 'the manifest': entry['metrics']['top1'] if entry else None})
        print(f'top-1 {measured["top1"]:.2f} %, top-5 {measured["top5"]:.2f} % on {measured["images"]} images')
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_folder(trained, folder, args.tag or args.release or '')
        card = make_card(trained, repo_id, run, entry, measured, groups, args.license)
        card.save(folder / 'README.md')
        files = [folder / name for name in FILES]
        for file in files:
            print(f'{file.stat().st_size:>12} {file.name}')
        if args.folder:
            keep(folder, Path(args.folder))
        if args.dry_run:
            print(f'would be sent to {repo_id}, revision {args.revision or "main"}, in one commit; nothing was sent.')
            return 0
        if args.embed:
            if files[0].stat().st_size > EMBEDDED:
                raise UsageError(f'--embed is for weights of at most {EMBEDDED >> 20} MB; push these.')
            assert run is not None and measured is not None
            record(args.release, trained, repo_id, None, files[0], run, measured, args.license, args.manifest, True)
            print(f'{args.release} is inside the package of {str(args.manifest.parents[2])!r}; nothing was sent.')
            return 0
        api = HfApi(library_name='timm_regnet_rnn', library_version=__version__)
        revision = send(api, repo_id, files, args)
        check_sent(repo_id, revision, files)
        if args.release and run is not None and measured is not None:
            facts = (args.release, trained, repo_id, revision, files[0], run, measured, args.license)
            record(*facts, args.manifest, False)
    print(f'{repo_id} at {revision} holds these files, bit for bit.')
    return 0


def keep(folder: Path, target: Path) -> None:
    """Copy a folder, whole or not at all.

    Raises:
        UsageError: There is something of that name.
    """
    if target.exists():
        raise UsageError(f'{str(target)!r} exists; give --folder a new name.')
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent) as scratch:
        shutil.copytree(folder, scratch / 'new')
        os.chmod(scratch / 'new', 0o755)
        os.rename(scratch / 'new', target)


def explain(error: BaseException, repo_id: Optional[str]) -> str:
    """An error in one line that says what to do; it never holds a token."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return f'the Hub refuses to write to {repo_id!r}: HF_TOKEN must hold a valid token that may write there.'
    return f'cannot push to {repo_id!r} ({one_line(error)}).' if status else one_line(error)


def main(argv: Optional[Sequence[str]] = None, prog: str = 'push.py', manifest: Path = MANIFEST) -> int:
    """Run the command; returns its exit status, 2 after one line that says what was wrong.

    Args:
        argv: Arguments, those of the process if None.
        prog: The command's name.
        manifest: What --release writes.
    """
    parser = Parser(
        prog=prog,
        description=(__doc__ or '').splitlines()[0],
        examples=('output/RUN --repo-id ORG/NAME --dry-run', '--tag regnet_convlstm_20.cifar10_jpeg75'),
    )
    add = parser.add_argument
    add('checkpoint', nargs='?', metavar='CHECKPOINT', help="a run's folder, train.py's .pth.tar, or .safetensors")
    add('--tag', metavar='NAME.TAG', help='released weights of the manifest instead')
    add('--repo-id', metavar='ORG/NAME', help='default with --tag: the one in the manifest')
    add(
        '--ema',
        action=argparse.BooleanOptionalAction,
        help="of a run's two sets of weights the averaged ones; default: they are taken where they are",
    )
    add('--model', metavar='NAME', help='the model, if the checkpoint does not say')
    add('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='K=V', help='its arguments')
    add('--labels', metavar='FILE', help='a class name per line')
    add('--results', default=str(results.RECIPES / 'results.csv'), metavar='FILE', help='default: %(default)s')
    add('--run', metavar='RUN', help="its row there; default: that of the run's folder")
    add('--data-dir', metavar='DIR', help='image folder to evaluate on before anything is sent')
    add('--val-split', default='test', metavar='S', help='default: %(default)s')
    add('--expect-top1', type=float, metavar='PERCENT', help='refuse to push if it differs')
    add('--private', action='store_true', help='make the new repository private')
    add('--revision', metavar='BRANCH', help='default: main; made if it is not there')
    add('--create-pr', action='store_true', help='open a pull request instead')
    add('--message', default='Add weights, configuration and model card', metavar='M', help='of the commit')
    add('--folder', metavar='DIR', help='keep what is sent in this new folder')
    add('--dry-run', action='store_true', help='send nothing')
    add(
        '--license',
        default='apache-2.0',
        metavar='ID',
        help='of the weights; default: %(default)s',
    )
    add('--release', metavar='NAME.TAG', help="enter the weights into the checkout's manifest afterwards")
    add('--embed', action='store_true', help='with --release: keep small weights inside the package, send nothing')
    args = parser.parse_args(argv)
    args.manifest = manifest
    repo_id = args.repo_id or args.tag
    return run_command(prog, lambda: push(args), lambda e: explain(e, repo_id), (*EXPECTED, *FAILURES))
