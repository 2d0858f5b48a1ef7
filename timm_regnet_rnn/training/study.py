"""`timm-regnet-rnn study`: a comparison as a YAML file, of which what has no row yet is run.

The file says which models, recipe, data and seeds; `jobs` runs them. The table and the seeds of a run are told as
results.py tells them, so a run that was made by `train` counts.
"""

import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .. import results
from ..errors import UsageError, one_line, report
from .data import Data, check_data
from .jobs import PROG, Run, make_executor, read_rows, work
from .recipe import check_recipe, find_yaml, load_yaml, train_options
from .record import newest_checkpoint, run_key
from .run import plan
from .train_py import find_train_py

__all__ = ['STUDIES', 'study']

STUDIES = results.RECIPES / 'studies'
# What a group of runs may say, and the study for all groups; kinds as `check_recipe` has them.
GROUP: Dict[str, Dict[str, Any]] = dict(
    models=dict(type='models', nargs='+'),
    recipe=dict(type='str'),
    data_dir=dict(type='str'),
    num_classes=dict(type='int'),
    seeds=dict(type='int', nargs='+'),
    nproc=dict(type='int'),
    overrides=dict(type='kwargs'),
)
STUDY: Dict[str, Dict[str, Any]] = dict(
    GROUP, groups=dict(type='groups', nargs='+'), jobs=dict(type='int'), slurm=dict(type='kwargs')
)
MODEL: Dict[str, Dict[str, Any]] = dict(model=dict(type='str'), model_kwargs=dict(type='kwargs'))
OWN_KEYS = ('model', 'model_kwargs', 'num_classes', 'seed', 'data_dir')  # of the study, so no overrides
SMALL, SMALL_NETS = 64, 4  # nets for images of this side and below leave a GPU idle: so many of them share one


def check_keys(values: Any, kinds: Mapping[str, Mapping[str, Any]], where: str) -> Dict[str, Any]:
    """The values, if they are a mapping of known keys to values of the right kind.

    Raises:
        UsageError: Names the first that is not.
    """
    if not isinstance(values, dict):
        raise UsageError(f'{where} must be a mapping of {", ".join(kinds)}; got {values!r:.60}.')
    problems = check_recipe(values, kinds, 'a study', f'there are {", ".join(kinds)}')
    if problems:
        raise UsageError(f'{where}: {problems[0]}')
    return values


def read_groups(config: Dict[str, Any], where: str) -> List[Dict[str, Any]]:
    """The groups of runs, each with what the study says for all.

    Raises:
        UsageError: A key is unknown, missing, or of the wrong kind.
    """
    check_keys(config, STUDY, where)
    common = {key: value for key, value in config.items() if key in GROUP}
    groups = []
    for i, group in enumerate(config.get('groups', [{}])):
        here = f'{where}, group {i + 1}' if 'groups' in config else where
        check_keys(group, GROUP, here)
        overrides = {**common.get('overrides', {}), **group.get('overrides', {})}
        group = {**common, **group, 'overrides': overrides}
        for key in ('models', 'recipe', 'data_dir', 'seeds'):
            if key not in group:
                raise UsageError(f'{here} lacks the key {key!r}.')
        models = [dict(model=model) if isinstance(model, str) else model for model in group['models']]
        for model in models:
            if 'model' not in check_keys(model, MODEL, f'{here}, models'):
                raise UsageError(f"{here}, models: {model!r:.60} lacks the key 'model'.")
        groups.append({**group, 'models': models})
    return groups


def override_flags(overrides: Mapping[str, Any], options: Dict[str, Dict[str, Any]], where: str) -> List[str]:
    """Overrides as words of train.py's command line.

    Raises:
        UsageError: train.py has no such option, takes no such value, or has no flag for it.
    """
    problems = check_recipe(overrides, options)
    if problems:
        raise UsageError(f'{where}, overrides: {problems[0]}')
    words = []
    for name, value in overrides.items():
        flag = next((flag for flag in options[name]['flags'] if flag.startswith('--')), None)
        if name in OWN_KEYS or flag is None:
            raise UsageError(f'{where}, overrides: {name} is no override.')
        if value is False:
            raise UsageError(f'{where}, overrides: {name}: train.py has no flag for false; leave the key out.')
        words.append(flag)
        if isinstance(value, dict):
            words += [f'{key}={item}' for key, item in value.items()]
        elif value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def plan_runs(
    groups: Sequence[Mapping[str, Any]],
    where: str,
    results_file: Optional[str],
    output: str,
    timm_dir: Optional[str],
    device: Optional[str],
    here: bool,
) -> List[Run]:
    """Every run of a study, checked as `train` checks it.

    Args:
        groups: From `read_groups`.
        where: The study, for messages.
        results_file, output, timm_dir, device: As in `study`.
        here: Whether this machine trains.

    Raises:
        ValueError: A run cannot work, or two are the same; in one line.
    """
    train_py = find_train_py(timm_dir)
    options = train_options(train_py)
    counted: Dict[Any, Data] = {}

    def data_of(settings: Dict[str, Any]) -> Data:
        names = ('dataset', 'data_dir', 'train_split', 'val_split', 'input_size', 'scale', 'ratio', 'num_classes')
        key = repr([settings[name] for name in names])
        if key not in counted:
            counted[key] = check_data(settings)
        return counted[key]

    runs: List[Run] = []
    names: Dict[str, results.Key] = {}
    for group in groups:
        overrides = override_flags(group['overrides'], options, where)
        for seed, model in ((seed, model) for seed in group['seeds'] for model in group['models']):
            flags = [*overrides, '--seed', str(seed)]
            if 'num_classes' in group:
                flags += ['--num-classes', str(group['num_classes'])]
            if model.get('model_kwargs'):
                kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in model['model_kwargs'].items()}
                flags += ['--model-kwargs', *(f'{key}={value}' for key, value in kwargs.items())]
            if device:
                flags += ['--device', device]
            what: Tuple[str, str, str, List[str]] = group['recipe'], model['model'], group['data_dir'], flags
            nproc = group.get('nproc', 1)
            run = plan(*what, train_py, options, None, results_file, nproc, root=output, here=here, data_of=data_of)
            key = run_key(run.settings, run.recipe, run.given, run.processes, run.epochs)
            if run.name in names or key in names.values():
                raise UsageError(f'{where} has the run {run.name!r} twice.')
            names[run.name] = key
            arguments: Dict[str, Any] = dict(zip(('recipe', 'model', 'data_dir', 'flags'), what))
            arguments.update(output=str(run.folder), results=str(run.table), timm_dir=timm_dir, nproc=nproc)
            runs.append(Run(run, key, arguments, nproc))
    return runs


def visible_gpus(runs: Sequence[Run]) -> List[str]:
    """The GPUs that the runs train on, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not any(run.plan.settings['device'].startswith('cuda') for run in runs):
        return []
    count = torch.cuda.device_count()
    given = os.environ.get('CUDA_VISIBLE_DEVICES', '')
    return [name.strip() for name in given.split(',')][:count] if given else [str(i) for i in range(count)]


def room(runs: Sequence[Run], gpus: Sequence[str], cores: int) -> int:
    """How many runs this machine carries at once: by its GPUs, and by the cores that decode images for them."""
    nproc = max(run.nproc for run in runs)
    if not gpus:
        return max(1, cores // nproc)
    sides = [max(run.plan.settings['input_size'] or [SMALL + 1]) for run in runs]
    nets = SMALL_NETS if max(sides) <= SMALL else 1
    workers = max(run.plan.settings['workers'] for run in runs)
    return max(1, min(len(gpus) * nets, cores // (workers + 1)) // nproc)


def slurm_parameters(
    runs: Sequence[Run], jobs: Optional[int], device: Optional[str], given: Mapping[str, Any], words: Sequence[str]
) -> Dict[str, Any]:
    """SLURM's parameters, by submitit's names: what the runs need, a day, and what was given.

    Args:
        runs: All of the study.
        jobs: How many at once, no limit of ours if None.
        device: As in `study`.
        given: The study's.
        words: `KEY=VALUE` from the command line.

    Raises:
        UsageError: A word is none.
    """
    import yaml

    nproc, workers = (max(run.nproc for run in runs), max(run.plan.settings['workers'] for run in runs))
    found: Dict[str, Any] = dict(time=24 * 60, cpus_per_task=nproc * (workers + 1), array_parallelism=jobs or len(runs))
    if device != 'cpu':
        found['gpus_per_node'] = nproc
    found.update(given)
    for word in words:
        key, equals, value = word.partition('=')
        if not equals or not key:
            raise UsageError(f'--slurm takes KEY=VALUE, as in --slurm partition=gpu; got {word!r}.')
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[key] = value
    return found


def describe(run: Run) -> str:
    """What a dry run says of it."""
    if run.state == 'there':
        return f'there    {run.plan.name}: top-1 {run.top1:.2f} %'
    _, done = newest_checkpoint(run.plan.folder)
    epochs = f' ({done} of {run.plan.epochs} epochs done)' if done else ''
    return f'{"at work  " if run.locked() else "to run   "}{run.plan.name}{epochs}'


def tables(runs: Sequence[Run], files: Sequence[Path]) -> str:
    """Markdown tables of the study: every run of its settings that has a row, then the differences by seed.

    Raises:
        ValueError, OSError: A row or a learning curve is damaged or missing; in one line.
    """
    wanted, parts = {run.key[0] for run in runs}, []
    for file in files:
        found = results.read_runs(file, results.parse) if file.is_file() and file.stat().st_size else {}
        groups = {group: rows for group, rows in found.items() if group in wanted}
        if groups:
            curves = results.read_curves(groups, file.parent / 'curves')
            parts += [results.table({group: rows}) for group, rows in groups.items()]
            parts.append(results.differences(groups, curves))
    return '\n\n'.join(parts)


def study(
    path: str,
    data_dir: Optional[str] = None,
    output: str = 'output',
    results_file: Optional[str] = None,
    timm_dir: Optional[str] = None,
    device: Optional[str] = None,
    jobs: Optional[int] = None,
    executor: str = 'local',
    slurm: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """Run what has no row yet of a study, go on with what was cut, and print the tables.

    Args:
        path: YAML file, or the name of one of ours, e.g. 'cpu_tiny100'.
        data_dir: In place of the study's.
        output: Holds the folders of the runs.
        results_file: CSV file for the rows; None for `results.csv` beside the recipe, see `results_file` in run.py.
        timm_dir: A checkout of timm, see `find_train_py`.
        device: Of all runs; None for what the machine has.
        jobs: How many at once; None for the study's own number, or what the machine carries.
        executor: 'local', or 'slurm'.
        slurm: Parameters of SLURM as `KEY=VALUE`; they win over the study's.
        dry_run: Say what is there and what is to run, and stop.

    Returns:
        Exit status: 0, 1 if a run failed or there are no tables, 130 after Ctrl-C.

    Raises:
        ValueError: What was asked for cannot work; in one line.
    """
    file = find_yaml(path, STUDIES)
    where = f'study {file!r}'
    config = load_yaml(file, 'study', STUDIES)
    groups = read_groups(config, where)
    if data_dir and len({group['data_dir'] for group in groups}) > 1:
        raise UsageError(f'{where} reads several folders, so --data-dir cannot stand for them.')
    groups = [{**group, 'data_dir': data_dir or group['data_dir']} for group in groups]
    jobs = config.get('jobs') if jobs is None else jobs
    if jobs is not None and jobs < 1:
        raise UsageError(f'--jobs must be at least 1, got {jobs}.')
    local = executor == 'local'
    if local and slurm:
        raise UsageError('--slurm is for --executor slurm.')
    runs = plan_runs(groups, where, results_file, output, timm_dir, device, local)
    files = list(dict.fromkeys(run.plan.table for run in runs))
    rows = read_rows(files)
    for run in runs:
        if run.key in rows:
            run.state, run.top1 = 'there', rows[run.key].top1
    todo = [run for run in runs if run.state != 'there']
    for warning in dict.fromkeys(run.plan.warning for run in todo if run.plan.warning):
        print(f'{PROG}: warning: {warning}', file=sys.stderr)
    if dry_run:
        there = ', '.join(map(str, files))
        print(*map(describe, runs), f'{len(runs)} runs, {len(todo)} to run; rows in {there}', sep='\n')
        return 0
    if todo:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        gpus = visible_gpus(todo) if local else []
        most = (jobs or room(todo, gpus, cores)) if local else len(todo)
        threads = max(1, cores // min(most, len(todo)))
        parameters = {} if local else slurm_parameters(todo, jobs, device, config.get('slurm', {}), slurm)
        submitter = make_executor(executor, Path(output) / '.jobs', Path(file).stem, parameters)
        if not work(runs, files, submitter, most, gpus, threads):
            done = sum(run.state in ('there', 'done') for run in runs)
            report(PROG, f'stopped with {done} of {len(runs)} runs done; the same command goes on.')
            return 130
    failures = [f'{run.plan.name}: {run.why}' for run in runs if run.state == 'failed']
    try:
        show(tables(runs, files))
    except (OSError, ValueError) as e:
        failures.append(f'no tables: {one_line(e)}')
    for line in failures:
        report(PROG, line)
    return 1 if failures else 0


def show(text: str) -> None:
    """Print Markdown, as tables on a terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    if console.is_terminal:
        console.print(Markdown(text))
    elif text:
        print(text)
