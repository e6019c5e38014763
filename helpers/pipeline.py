"""Run the notebooks through papermill, once or over a grid of parameters, here or on a cluster."""

from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path

import click
import fsspec
from filelock import Timeout
from tqdm import tqdm

from helpers.manifests import IN_PLACE, forget, is_url, lock, record_plan, run_states, unfinished_runs
from helpers.paths import check_at_hand
from helpers.plans import (  # noqa: F401
    NOTEBOOKS,
    PROFILES,
    PROJECT_ROOT,
    load_profile,
    notebook_names,
    notebook_parameters,
    plan_run,
    plan_sweep,
    read_value,
)
from helpers.runs import clean_notebook, complete_plan, run_notebook  # noqa: F401

FIGURES = PROJECT_ROOT / "figures"


@click.group(help=__doc__)
def app() -> None:
    pass


@app.command()
@click.option(
    "--profile", default="default", show_default=True, help="smoke, default or paper, or a YAML file's path"
)
@click.option(
    "-p", "--parameter", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="may be repeated"
)
@click.option("--only", multiple=True, metavar="NOTEBOOK", help="a notebook's name, may be repeated")
@click.option(
    "--output", help="folder, or URL known to fsspec, for notebooks and figures  [default: see above]"
)
@click.option("--force", is_flag=True, help="repeat what is finished, too")
def run(profile: str, pairs: tuple, only: tuple, output: str | None, force: bool) -> None:
    """Run the notebooks of a profile in order.

    The default profile with nothing overridden refreshes the collection in place; anything else goes to
    --output, or to runs/PROFILE.

    What is finished there is not repeated while notebook, helpers and parameters are the same: whatever cut a
    run off, the same command does the rest. In place everything runs again, unless the last command was cut
    off or a notebook failed: then the rest does. Logs and manifests of the collection are in runs/in-place.
    """
    with one_line_errors():
        overrides = {name: read_value(value) for name, value in pairs}
        plan = plan_run(profile, list(only), overrides)
        check_at_hand(plan)
        in_place = profile == "default" and not pairs
        folder = output_folder(output or ("." if in_place else f"runs/{Path(profile).stem}"), in_place)
        runs = {".": {"plan": plan, "varied": overrides}}
        with refreshing(plan) if folder == str(IN_PLACE) else nullcontext():
            prepare(runs, folder)
            if force:
                forget(runs, folder)
            follow(((".", manifest) for manifest in complete_plan(plan, folder)), len(plan))
            click.echo(f"notebooks and figures in {PROJECT_ROOT if folder == str(IN_PLACE) else folder}")


@app.command()
@click.argument("grid", metavar="GRID.yaml")
@click.option(
    "--output", help="folder, or URL known to fsspec, with a folder for each run  [default: runs/GRID]"
)
@click.option(
    "--workers", type=click.IntRange(1), help="processes on this machine  [default: one a core, or a GPU]"
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="of a Dask cluster that does the work, such as tcp://host:8786"
)
@click.option(
    "--gpu", is_flag=True, help="a GPU for each notebook; on a cluster from `dask worker --resources GPU=1`"
)
@click.option("--force", is_flag=True, help="repeat what is finished, too")
def sweep(
    grid: str, output: str | None, workers: int | None, scheduler: str | None, gpu: bool, force: bool
) -> None:
    """Run notebooks over a grid of parameters, many at once.

    GRID.yaml names a profile to begin with, notebooks, and parameters with lists of values; every combination
    gets a folder. See data/sweeps. The numbers of all of them are gathered in metrics.csv.

    What is finished is not repeated: whatever cut a sweep off, the same command does the rest, and a larger
    grid adds to it. A failed notebook holds back only those that read from it; a lost worker costs only what
    it was at.
    """
    from helpers import sweeps  # Dask, which the other commands do not need

    with one_line_errors():
        runs = plan_sweep(grid)
        folder = output_folder(output or f"runs/{Path(grid).stem}")
        total = sum(len(about["plan"]) for about in runs.values())
        prepare(runs, folder)
        kept, rest = ([], runs) if force else unfinished_runs(runs, folder)
        tasks = sum(len(about["plan"]) for about in rest.values())
        if not tasks:
            cluster = nullcontext()
        elif scheduler:  # whose workers may reach and hold other things than this machine
            cluster = sweeps.cluster_workers(scheduler, gpu)
        else:
            check_at_hand(
                {
                    f"{name} in {run}": part
                    for run, about in rest.items()
                    for name, part in about["plan"].items()
                }
            )
            cluster = sweeps.local_workers(workers, tasks, gpu)
        with cluster as client:
            if force:
                forget(runs, folder)
            try:
                follow(chain(kept, sweeps.complete_sweep(rest, folder, client, gpu) if tasks else ()), total)
            finally:
                click.echo(f"{sweeps.gather_metrics(folder)} numbers in {folder}/metrics.csv")


@app.command()
@click.argument("folder")
def status(folder: str) -> None:
    """Show what became of all that was run into FOLDER: finished, failed, running, stale or missing.

    A run is stale when its notebook, the helpers or its files have changed since, missing when it never began
    or was cut off. That of the collection itself is in runs/in-place.
    """
    with one_line_errors():
        rows = [("run", "notebook", "state", "seconds", "log of failures")]
        for name, notebook, state, manifest in run_states(output_folder(folder, in_place=True)):
            log = manifest["log"] if state == "failed" else ""
            rows.append((name, notebook, state, str(manifest.get("seconds", "")), log))
        if len(rows) == 1:
            raise click.UsageError(
                f"{folder} holds no run; give the --output of a run or a sweep, such as runs/smoke"
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@app.command()
@click.argument("source", default=".")
@click.option(
    "--output", help="folder for the pages  [default: runs/report for the collection, else SOURCE/report]"
)
def report(source: str, output: str | None) -> None:
    """Render the executed notebooks of the collection, or of a run's folder SOURCE, as pages to read."""
    from helpers.report import render  # nbconvert, which the other commands do not need

    with one_line_errors():
        folder = PROJECT_ROOT / source
        target = output or ("runs/report" if folder.resolve() == PROJECT_ROOT else folder / "report")
        click.echo(render(folder.resolve(), (PROJECT_ROOT / target).resolve()))


def output_folder(output: str, in_place: bool = False) -> str:
    """Return where a run goes: a URL as it is, any other folder from the project root, for the root itself
    IN_PLACE.

    Raises ValueError for a URL that cannot be written to, and for the root unless `in_place` allows it.
    """
    if is_url(output):
        try:
            fsspec.url_to_fs(output)
        except (ImportError, ValueError) as error:
            raise ValueError(f"output {output!r} cannot be used: {error}") from error
        return output
    folder = (PROJECT_ROOT / Path(output).expanduser()).resolve()
    if folder in (PROJECT_ROOT, IN_PLACE):
        if not in_place:
            asked = "only the default profile with nothing overridden refreshes the collection"
            raise ValueError(f"{asked}; choose another --output")
        return str(IN_PLACE)
    return str(folder)


def prepare(runs: dict[str, dict], folder: str) -> None:
    """Note in `folder` what is going to run. Raises ValueError or OSError where that cannot be."""
    try:
        record_plan(folder, runs)
    except (ValueError, OSError):
        raise
    except Exception as error:  # every storage has errors of its own
        raise OSError(f"{type(error).__name__}: {error}: {folder}") from error


def follow(manifests, total: int) -> None:
    """Report every (run, manifest) as it comes. Raises ClickException in the end if not all are finished."""
    unfinished = []
    with tqdm(total=total, unit="notebook", disable=None) as bar:
        for name, manifest in manifests:
            what = manifest["notebook"] if name == "." else f"{name}: {manifest['notebook']}"
            if manifest["status"] != "finished":
                unfinished.append(what)
                said = f"{manifest['error']}; log: {manifest['log']}"
            else:
                said = (
                    "was finished before"
                    if "kept" in manifest
                    else f"finished in {manifest['seconds']:.1f} s"
                )
            with bar.external_write_mode():
                click.echo(f"{what} {said}")
            bar.update()
    if unfinished:
        found = f"{len(unfinished)} of {total} notebooks did not finish"
        raise click.ClickException(f"{found}; the same command tries them again")


@contextmanager
def refreshing(plan: dict[str, dict]):
    """Keep others off the collection for a block; it starts afresh unless the block before did not come to
    its end.
    """
    unfinished = IN_PLACE / "unfinished"
    try:
        with lock("collection", IN_PLACE).acquire(timeout=0):
            if not unfinished.exists():
                forget({".": {"plan": plan}}, str(IN_PLACE))
            unfinished.touch()
            yield
            unfinished.unlink()
    except Timeout as error:
        found = "another command is refreshing the collection"
        raise click.ClickException(f"{found}; wait for it, or give an --output") from error


@contextmanager
def one_line_errors():
    """Turn what may be wrong with the input, or with the place that a run goes to, into one line and an exit
    status.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    except ConnectionError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        advice = "free space, or choose another --output; finished notebooks are kept"
        raise click.ClickException(f"{error}; {advice}") from error


if __name__ == "__main__":
    app()
