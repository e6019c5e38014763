"""What has to run, as jobs for Snakemake: {folder of figures, from the folder of all runs: job}."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path

import click
from filelock import FileLock, Timeout

from workflow.parameters import notebook_default
from workflow.provenance import (
    earlier_notebooks,
    failure_path,
    is_finished,
    place_title,
    plan_digests,
    read_provenance,
)


def unfinished_jobs(runs: dict[str, dict], folder: Path, force: bool = False) -> dict[str, dict]:
    """Return the jobs of all that is not finished in `folder`, or of all. Nothing is written."""
    jobs = {}
    for run, about in runs.items():
        digests = plan_digests(about["plan"], folder / run)
        todo = [name for name in digests if force or not is_finished(name, digests[name], folder / run)]
        place = {name: (Path(run) / "figures" / name).as_posix() for name in todo}
        for name in todo:
            jobs[place[name]] = {
                "parameters": about["plan"][name],
                "digest": digests[name],
                "after": [place[other] for other in earlier_notebooks(name) if other in place],
                "force": force,
            }
    return jobs


def refuse_others(jobs: dict[str, dict], folder: Path) -> None:
    """Raise ValueError where a job would replace finished results of other parameters."""
    for place, job in jobs.items():
        name, run, found = _located(place, folder)
        if not found or not is_finished(name, found["digest"], run):
            continue
        there, asked = found["parameters"], json.loads(json.dumps(job["parameters"], default=str))
        other = []
        for key in {**there, **asked}:
            old, new = (part.get(key, notebook_default(name, key)) for part in (there, asked))
            other += [f"{key} {old!r} there, {new!r} asked"] if old != new else []
        if other:
            said = f"{run} holds {name} finished with other parameters ({'; '.join(other)})"
            raise ValueError(f"{said}; choose another --output, or add --force to replace it")


def run_jobs(jobs: dict[str, dict], folder: Path, cores: int, more: tuple = ()) -> list[str]:
    """Run jobs through Snakemake with more of its options; return those that did not finish."""
    from snakemake.cli import main as snakemake  # a command that finds all finished does not wait for it

    threads, before = os.environ.get("OMP_NUM_THREADS", "1").split(",")[0], {}
    content = {"jobs": jobs, "folder": str(folder), "threads": int(threads)}
    written = folder / ".staging" / "jobs.json"
    written.write_text(json.dumps(content, default=str), encoding="utf8")
    for place in jobs:
        name, run, before[place] = _located(place, folder)
        failure_path(name, run).unlink(missing_ok=True)
    options = ["--snakefile", Path(__file__).with_name("Snakefile"), "--directory", folder]
    options += ["--configfile", written, "--cores", cores, "--forceall", "--keep-going", "--nolock"]
    options += ["--rerun-incomplete", "--drop-metadata", *(more or ["--quiet", "all"])]
    said = io.StringIO()
    try:
        with nullcontext() if more else redirect_stderr(said):
            snakemake([str(option) for option in options])
    except SystemExit:
        if {"-n", "--dry-run", "--dryrun"} & set(more):
            raise
    found = {place: _located(place, folder) for place in jobs}
    done = [place for place in jobs if found[place][2] not in (None, before[place])]
    left = [
        place for place in jobs if place not in done or found[place][2]["digest"] != jobs[place]["digest"]
    ]
    failed = [place for place in left if failure_path(*found[place][:2]).exists()]
    for place in left:
        behind = [place_title(other) for other in jobs[place]["after"] if other in left]
        why = f"was held back, because {behind[0]} did not finish" if behind else "was cut off"
        if place not in failed:
            click.echo(f"{place_title(place)} {why}")
    if left and not failed:
        click.echo(said.getvalue().strip(), err=True)
    return left


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other commands waiting for the length of a block; the lock dies with its holder."""
    (folder / ".staging").mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".staging" / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        click.echo(f"another command is at work in {folder}; waiting for its end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _located(place: str, folder: Path) -> tuple[str, Path, dict | None]:
    """Return a job's notebook, the folder of its run, and the provenance of what is finished there."""
    path = folder / place
    return path.name, path.parents[1], read_provenance(path.name, path.parents[1])
