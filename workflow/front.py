"""Run the notebooks, once or over a grid of parameters, here or on a cluster, and say how they stand."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import fsspec

from workflow import storage
from workflow.jobs import folder_lock, refuse_others, run_jobs, unfinished_jobs
from workflow.parameters import ROOT, plan_grid, plan_run, read_value
from workflow.provenance import place_title, read_provenance
from workflow.runs import gather_metrics, publish_run, record_runs, recorded_runs, run_states

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
OUTPUT = click.option(
    "--output", metavar="FOLDER|URL", help="where notebooks and figures go  [default: below runs/]"
)
AT_ONCE = click.option(
    "--cores", type=click.IntRange(1), default=CORES, help="notebooks at a time  [default: all]"
)
FORCE = click.option("--force", is_flag=True, help="repeat what is finished, too")
MORE = click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="[-- SNAKEMAKE OPTIONS]")


class BadInput(click.ClickException):
    """What was asked for cannot be, and nothing has started."""

    exit_code = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what is wrong with the input, or with the place that a run goes to, into one line and a status."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) or type(error) in (FileNotFoundError, ConnectionError):
            raise BadInput(str(error)) from error
        raise click.ClickException(
            f"{error}; free space, or choose another --output; nothing is lost"
        ) from error


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option(
    "--profile", default="default", show_default=True, help="smoke, default, paper, or a YAML file's path"
)
@click.option(
    "-p", "--parameter", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="may be repeated"
)
@click.option("--only", multiple=True, metavar="NOTEBOOK", help="a notebook's name, may be repeated")
@OUTPUT
@AT_ONCE
@FORCE
@MORE
def run(
    profile: str, pairs: tuple, only: tuple, output: str | None, cores: int, force: bool, more: tuple
) -> None:
    """Run the notebooks of a profile.

    The default profile with nothing overridden runs in runs/default; when all of it is finished, it replaces
    the committed notebooks and figures. Another profile runs in runs/PROFILE, with -p in a folder of its own.

    What is finished is not repeated while notebook, helpers and parameters are the same: whatever cut a run
    off, the same command does the rest.
    """
    with one_line_errors():
        if more and not more[0].startswith("-"):
            raise ValueError(f"what is {more[0]!r} for? Each notebook needs an --only, each parameter a -p")
        overrides = {name: read_value(value) for name, value in pairs}
        runs = {".": {"plan": plan_run(profile, list(only), overrides), "varied": overrides}}
        key = hashlib.sha256(json.dumps(overrides, sort_keys=True, default=str).encode()).hexdigest()[:8]
        own = f"runs/{Path(profile).stem}" + (f"-{key}" if overrides else "")
        publish = profile == "default" and not overrides and not output
        complete(runs, own, output, cores, force, more, publish)


@main.command()
@click.argument("grid", metavar="GRID.yaml")
@OUTPUT
@AT_ONCE
@FORCE
@MORE
def sweep(grid: str, output: str | None, cores: int, force: bool, more: tuple) -> None:
    """Run notebooks over a grid of parameters.

    GRID.yaml names a profile, notebooks, and parameters with lists of values; every combination gets a
    folder. See workflow/grids. A larger grid adds. The numbers of all that is finished are in metrics.csv.
    """
    with one_line_errors():
        complete(plan_grid(grid), f"runs/{Path(grid).stem}", output, cores, force, more)


@main.command()
@click.argument("folder", default=".")
def status(folder: str) -> None:
    """Show how the committed results, or those of a run in FOLDER, stand: finished, running, failed, stale or
    missing. Contents are compared, nothing runs.
    """
    with one_line_errors(), tempfile.TemporaryDirectory() as copy:
        if storage.is_url(folder):
            storage.mirror_folder(folder)
            fs, root = fsspec.url_to_fs(folder)
            fs.get(root.rstrip("/") + "/", copy + "/", recursive=True)
        place = Path(copy) if storage.is_url(folder) else (ROOT / Path(folder).expanduser()).resolve()
        runs = {".": {"plan": plan_run("default")}} if place == ROOT else recorded_runs(place)
        if not runs:
            raise ValueError(f"{folder} holds no run; give the --output of one, such as runs/smoke")
        rows = [("run", "notebook", "state", "seconds", "log of failures")]
        for run, name, state in run_states(runs, place):
            seconds = str((read_provenance(name, place / run) or {}).get("seconds", ""))
            log = Path(folder, run, "logs", f"{name}.log") if state == "failed" else ""
            rows.append((run, name, state, seconds if state in ("finished", "stale") else "", str(log)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@main.command()
@click.argument("source", default=".")
@click.option("--output", help="folder for the pages  [default: runs/report, or SOURCE/report]")
def report(source: str, output: str | None) -> None:
    """Render the committed notebooks, or those of a run in SOURCE, as pages to read."""
    from report.render import render  # nbconvert, which the other commands do not need

    with one_line_errors():
        folder = (ROOT / source).resolve()
        target = output or ("runs/report" if folder == ROOT else folder / "report")
        click.echo(render(folder, (ROOT / target).resolve()))


def complete(
    runs: dict, own: str, output: str | None, cores: int, force: bool, more: tuple = (), publish: bool = False
) -> None:
    """Run what is not finished of `runs`, {run: {"plan": {notebook: parameters}, "varied": parameters}}.

    own      folder that they go to without an `output`
    more     options for Snakemake
    publish  replace the committed notebooks and figures when all of it is finished

    Raises ValueError or OSError before anything starts, ClickException if not all is finished in the end.
    """
    if any("figures_dir" in parameters for about in runs.values() for parameters in about["plan"].values()):
        raise ValueError("figures_dir is where --output puts it; leave it out and give --output")
    url = output if output and storage.is_url(output) else None
    folder = storage.mirror_folder(url) if url else (ROOT / Path(output or own).expanduser()).resolve()
    if folder == ROOT:
        raise ValueError(
            "the committed results are replaced by `run` without --output; choose another --output"
        )
    if url:
        with folder_lock(folder):
            storage.pull(url, folder, runs)
    jobs = unfinished_jobs(runs, folder, force)
    if output and not force:
        refuse_others(jobs, folder)
    if jobs:
        from workflow.preflight import check_at_hand  # asks a hub, for which it loads its library

        check_at_hand({place_title(place): job["parameters"] for place, job in jobs.items()})
    with folder_lock(folder):
        jobs = unfinished_jobs(runs, folder, force)
        record_runs(runs, folder)
        total = sum(len(about["plan"]) for about in runs.values())
        if len(jobs) < total:
            click.echo(f"{total - len(jobs)} of {total} notebooks were finished before")
        try:
            left = run_jobs(jobs, folder, cores, more) if jobs else []
        finally:
            if set(runs) != {"."}:
                click.echo(f"{gather_metrics(folder)} numbers in {url or folder}/metrics.csv")
            if url:
                storage.push(url, folder, runs)
        if left:
            found = f"{len(left)} of {total} notebooks did not finish"
            raise click.ClickException(f"{found}; the same command tries them again")
        click.echo(f"notebooks and figures in {publish_run(folder) if publish else url or folder}")


if __name__ == "__main__":
    main()
