"""The runs of a study at work: jobs through submitit, on this machine or on SLURM, and what is shown of them.

A job is `train`. It takes up a run where its folder left off, so nothing about a study has to be kept: what has a row
is done, what has a checkpoint goes on, and a run whose folder is locked is under way in somebody else's job.
"""

import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence

from filelock import FileLock, Timeout
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import results
from ..errors import UsageError, one_line, run_command
from .record import learning_curve
from .run import Plan, train

__all__ = ['Run', 'make_executor', 'read_rows', 'work']

PROG = 'timm-regnet-rnn'
PERIOD = 1.0  # seconds between two looks at the jobs
GRACE = 15.0  # seconds for jobs to end after Ctrl-C


class Train:
    """`train` as submitit calls it; cut off by the cluster's time limit, or preempted, it is queued again."""

    def __call__(self, arguments: Dict[str, Any], env: Dict[str, str]) -> int:
        """Exit status of `train`."""
        os.environ.update(env)
        return run_command(PROG, lambda: train(**arguments))

    def checkpoint(self, arguments: Dict[str, Any], env: Dict[str, str]) -> Any:
        """The job that goes on: the same one."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, arguments, env)


@dataclass
class Run:
    """A run of a study.

    Attributes:
        plan: What it is.
        key: What its row is told by.
        arguments: Of `train`.
        nproc: Its processes on one machine.
        state: 'there' from the beginning, 'waiting', 'running' in a job of ours or another's, 'done' or 'failed'.
        job: submitit's, while it runs in one of ours.
        gpus: Those that its job sees.
        epoch, top1: Of its last whole epoch.
        since: When the job was first seen at work, and the epochs done by then.
        latest: When the newest epoch was seen.
        why: A line on what failed.
    """

    plan: Plan
    key: results.Key
    arguments: Dict[str, Any]
    nproc: int = 1
    state: str = 'waiting'
    job: Any = None
    gpus: Sequence[str] = ()
    epoch: int = 0
    top1: Optional[float] = None
    since: Any = field(default=None, repr=False)
    latest: float = 0.0
    why: str = ''

    def look(self) -> None:
        """Read how far it is from its folder."""
        try:
            curve = learning_curve(self.plan.folder)
        except (OSError, ValueError):  # `train` says it
            curve = []
        epoch = len(curve)
        if epoch != self.epoch:
            self.epoch, self.top1, self.latest = epoch, curve[-1]['top1'] if curve else None, time.monotonic()
        if self.since is None and self.state == 'running' and (self.job is None or self.job.state == 'RUNNING'):
            self.since = time.monotonic(), epoch

    def time_left(self) -> str:
        """Hours, minutes and seconds left at the speed so far, '' while that is not known."""
        if self.state != 'running' or self.since is None or self.epoch <= self.since[1]:
            return ''
        pace = (self.latest - self.since[0]) / (self.epoch - self.since[1])
        seconds = max(0, round(pace * (self.plan.epochs - self.epoch) - (time.monotonic() - self.latest)))
        return f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}'

    def locked(self) -> bool:
        """Whether a process trains in its folder."""
        lock = self.plan.folder / '.lock'
        if not lock.is_file():
            return False
        try:
            with FileLock(str(lock), timeout=0):
                return False
        except Timeout:
            return True

    def failure(self) -> str:
        """The line that its job, which left no row, ended with."""
        if (self.plan.folder / 'result.json').is_file():
            return f'its row went into another file of results; delete {self.plan.folder}/result.json to write it anew.'
        try:
            log = (self.job.stderr() or '').strip().splitlines()
        except OSError:
            log = []
        said = [line.removeprefix(f'{PROG}: ') for line in log if line.startswith(f'{PROG}: ')]
        lines = [line for line in said if not line.startswith('warning: ')] or log[-1:]
        return lines[-1] if lines else f'its job ended without a word; see {self.job.paths.stdout}.'


def read_rows(tables: Sequence[Path]) -> Dict[results.Key, results.Run]:
    """The rows of files of results by what tells them from others.

    Raises:
        ValueError: A file or a row is damaged; in one line.
    """
    found: Dict[results.Key, results.Run] = {}
    for file in tables:
        groups = results.read_runs(file, results.parse) if file.is_file() and file.stat().st_size else {}
        found.update((run.key, run) for rows in groups.values() for runs in rows.values() for run in runs)
    return found


def make_executor(cluster: str, folder: Path, name: str, parameters: Mapping[str, Any]) -> Any:
    """submitit's executor.

    Args:
        cluster: 'local' or 'slurm'.
        folder: For its files; on a cluster all machines must see it.
        name: Of the jobs, as a queue lists them.
        parameters: SLURM's, by submitit's names.

    Raises:
        UsageError: submitit is not there, there is no SLURM, or it knows no such parameter.
    """
    try:
        import submitit
    except ImportError:
        raise UsageError("a study runs through submitit: pip install 'timm-regnet-rnn[cluster]'.") from None
    # a job is queued again as often as the time limit cuts it off: each time it has come nearer to its end
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=1000)
    try:
        executor.update_parameters(name=name)
        if cluster == 'local':
            executor.update_parameters(timeout_min=60 * 24 * 365)
        else:
            executor.update_parameters(**{f'slurm_{key}': value for key, value in parameters.items()})
    except (NameError, AssertionError, TypeError, ValueError) as e:
        raise UsageError(f'SLURM parameters: {one_line(e)}') from None
    return executor


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Let the processes started inside write their errors into a log.

    submitit's local jobs have a parent process each, which ends with a traceback on the terminal at Ctrl-C.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    ours = os.dup(2)
    try:
        with log.open('a') as file:
            os.dup2(file.fileno(), 2)
            yield
    finally:
        os.dup2(ours, 2)
        os.close(ours)


def start(runs: Sequence[Run], busy: Sequence[Run], executor: Any, gpus: Sequence[str], threads: int) -> None:
    """Submit runs; on this machine each to the GPUs that fewest of the busy ones have."""
    from submitit.core.utils import FailedJobError
    from submitit.helpers import environment_variables

    load = {gpu: sum(gpu in run.gpus for run in busy) for gpu in gpus}
    env: List[Dict[str, str]] = []
    for run in runs:
        run.gpus = sorted(load, key=lambda gpu: load[gpu])[: run.nproc]
        load.update({gpu: load[gpu] + 1 for gpu in run.gpus})
        env.append({'CUDA_VISIBLE_DEVICES': ','.join(run.gpus)} if run.gpus else {})
    try:
        threads_env = os.environ.get('OMP_NUM_THREADS', str(threads))
        with quiet(executor.folder / 'submitit.log'), environment_variables(OMP_NUM_THREADS=threads_env):
            jobs = executor.map_array(Train(), [run.arguments for run in runs], env)
    except FailedJobError as e:
        raise RuntimeError(f'the jobs cannot be submitted: {one_line(e)}') from None
    for run, job in zip(runs, jobs):
        run.job, run.state, run.since = job, 'running', None


def work(
    runs: Sequence[Run], tables: Sequence[Path], executor: Any, jobs: int, gpus: Sequence[str], threads: int
) -> bool:
    """Run what waits, and show it, until nothing does.

    Args:
        runs: All runs of the study.
        tables: The files of results.
        executor: From `make_executor`.
        jobs: How many at once.
        gpus: Of this machine, for jobs on it.
        threads: For each job.

    Returns:
        False if Ctrl-C stopped it; the jobs are ended then.
    """
    console = Console(highlight=False)

    def say(run: Run) -> None:
        """A line for each change where nobody watches."""
        if not console.is_terminal:
            end = dict(done=f': top-1 {run.top1 or 0:.2f} %', failed=f': {run.why}').get(run.state, '')
            print(f'{run.state} {run.plan.name}{end}', flush=True)

    try:
        live = Live(console=console, get_renderable=lambda: board(runs), refresh_per_second=1)
        with live if console.is_terminal else nullcontext():
            while advance(runs, tables, say, lambda ready, busy: start(ready, busy, executor, gpus, threads), jobs):
                time.sleep(PERIOD)
    except KeyboardInterrupt:
        stop([run for run in runs if run.job is not None])
        return False
    return True


def advance(
    runs: Sequence[Run],
    tables: Sequence[Path],
    say: Callable[[Run], None],
    submit: Callable[[Sequence[Run], Sequence[Run]], None],
    jobs: int,
) -> bool:
    """One look at all runs: note what has ended, and submit as many as there is room for. False if nothing is left."""
    for run in runs:
        if run.state == 'running':
            run.look()
            over = run.job.done() if run.job is not None else not run.locked()
            if not over:
                continue
            try:
                row = read_rows(tables).get(run.key)
            except ValueError as e:  # damaged since; its own job says the same
                row, run.why = None, one_line(e)
            if row:
                run.state, run.top1, run.epoch, run.job = 'done', row.top1, row.epochs, None
            elif run.job is None or run.locked():  # the job met one of an earlier study, or that one was cut off
                run.state, run.job = 'waiting', None
            else:
                run.state, run.why, run.job = 'failed', run.why or run.failure(), None
            if run.state != 'waiting':
                say(run)
    for run in runs:
        if run.state == 'waiting' and run.locked():
            run.state = 'running'
            say(run)
    busy = [run for run in runs if run.state == 'running']
    ready = [run for run in runs if run.state == 'waiting'][: max(0, jobs - len(busy))]
    if ready:
        submit(ready, busy)
        for run in ready:
            say(run)
    return bool(busy or ready)


def stop(runs: Sequence[Run]) -> None:
    """End jobs. Those of this machine may have had the same Ctrl-C, so they get a moment before they are told."""
    for told, seconds in ((False, GRACE / 5), (True, GRACE)):
        end = time.monotonic() + seconds
        alive = [run for run in runs if not run.job.done()]
        if told:
            for run in alive:
                run.job.cancel(check=False)
        while alive and time.monotonic() < end:
            time.sleep(0.1)
            alive = [run for run in alive if not run.job.done()]


def board(runs: Sequence[Run]) -> Group:
    """What a terminal shows: numbers of all, and the runs that are or were at work, in the order of interest."""
    count = {state: sum(run.state == state for run in runs) for state in ('there', 'done', 'failed', 'running')}
    waiting = len(runs) - sum(count.values())
    words = f'{count["there"] + count["done"]} of {len(runs)} done, {count["running"]} running, {waiting} waiting'
    words += f', {count["failed"]} failed' if count['failed'] else ''
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style='bold')
    table.add_column('run', overflow='fold')
    for title in ('epoch', 'top-1', 'time left'):
        table.add_column(title, justify='right', no_wrap=True)
    for state, colour in (('running', ''), ('failed', 'red'), ('done', 'green')):
        for run in (run for run in runs if run.state == state):
            top1 = '' if run.top1 is None else f'{run.top1:.2f}'
            left = run.time_left() if state == 'running' else state
            table.add_row(Text(run.plan.name, style=colour), f'{run.epoch}/{run.plan.epochs}', top1, left)
    return Group(Text(words), table)
