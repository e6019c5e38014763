"""Run the notebooks, once or over a grid of parameters, here or on a cluster, and say how they stand."""

import csv
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path

import click
import fsspec
from filelock import FileLock, Timeout

from workflow import storage
from workflow.parameters import ROOT, notebook_default, notebook_names, plan_grid, plan_run, read_value
from workflow.provenance import (
    earlier_notebooks,
    file_digest,
    is_finished,
    notebook_state,
    plan_digests,
    read_provenance,
)

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

    GRID.yaml names a profile, notebooks, and parameters with lists of values; every combination gets a folder.
    See workflow/grids. The numbers of all that is finished are gathered in metrics.csv; a larger grid adds.
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

    own      folder that they go to without an `output`, of which others' finished results are not overwritten
    more     options for Snakemake
    publish  replace the committed notebooks and figures when all of it is finished

    Raises ValueError or FileNotFoundError before anything starts, ClickException if in the end not all is finished.
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
        storage.pull(url, folder, runs)
    jobs = unfinished_jobs(runs, folder, force)
    if output and not force:
        _refuse_others(jobs, folder)
    if jobs:
        from workflow.preflight import check_at_hand  # asks a hub, for which it loads its library

        check_at_hand({f"{job['notebook']}{_where(place)}": job["parameters"] for place, job in jobs.items()})
    with _folder_lock(folder):
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


def unfinished_jobs(runs: dict, folder: Path, force: bool) -> dict[str, dict]:
    """Return {folder of figures, from `folder`: job} of all that is not finished, or of all."""
    jobs = {}
    for run, about in runs.items():
        place = folder / run
        digests = plan_digests(about["plan"], place)
        todo = [name for name in digests if force or not is_finished(name, digests[name], place)]
        path = {name: (Path(run) / "figures" / name).as_posix() for name in digests}
        for name in todo:
            after = [path[other] for other in earlier_notebooks(name) if other in todo]
            about_it = {"notebook": name, "parameters": about["plan"][name], "digest": digests[name]}
            jobs[path[name]] = {**about_it, "after": after, "force": force}
    return jobs


def run_jobs(jobs: dict[str, dict], folder: Path, cores: int, more: tuple) -> list[str]:
    """Run jobs in `folder` through Snakemake, tell what becomes of them, and return those that did not finish."""
    from snakemake.cli import (
        main as snakemake,
    )  # seconds, which a command that finds all finished does not wait for

    path, threads = (
        folder / ".staging" / "jobs.json",
        int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]),
    )
    content = {"jobs": jobs, "folder": str(folder), "threads": threads}
    path.write_text(json.dumps(content, default=str), encoding="utf8")
    options = [
        "--snakefile",
        Path(__file__).with_name("Snakefile"),
        "--directory",
        folder,
        "--configfile",
        path,
    ]
    options += [
        "--cores",
        cores,
        "--forceall",
        "--keep-going",
        "--rerun-incomplete",
        "--drop-metadata",
        "--nolock",
    ]
    options += more or ["--quiet", "all"]
    follower, said = _Follower(jobs, folder), io.StringIO()
    dry = {"-n", "--dry-run", "--dryrun"} & set(more)
    if not dry:
        follower.thread.start()
    try:
        with nullcontext() if more else redirect_stderr(said):
            snakemake([str(option) for option in options])
    except SystemExit as end:
        code = end.code
    if dry:
        sys.exit(code)
    left = follower.stop()
    if left and not follower.failed:
        click.echo(said.getvalue().strip(), err=True)
    return left


class _Follower:
    """Tells what becomes of jobs by the files that they leave, wherever they run."""

    def __init__(self, jobs: dict[str, dict], folder: Path):
        self.jobs, self.folder, self.failed, self.over = jobs, folder, set(), threading.Event()
        self.left = {place: self._records(place) for place in jobs}
        for place in jobs:
            self._log(place).with_suffix(".ipynb").unlink(missing_ok=True)
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        while not self.over.wait(0.5):
            self.look()

    def stop(self) -> list[str]:
        self.over.set()
        self.thread.join()
        self.look()
        for place in self.left.keys() - self.failed:
            behind = [self._name(other) for other in self.jobs[place]["after"] if other in self.left]
            why = f"was held back, because {behind[0]} did not finish" if behind else "was cut off"
            click.echo(f"{self._name(place)} {why}")
        return list(self.left)

    def look(self) -> None:
        """Tell what has ended since the last look, and what is under way."""
        for place in [place for place in self.left if place not in self.failed]:
            provenance, digest = self._records(place)[0], self.jobs[place]["digest"]
            if provenance != self.left[place][0] and json.loads(provenance)["digest"] == digest:
                del self.left[place]
                self._tell(f"{self._name(place)} finished in {json.loads(provenance)['seconds']:.1f} s")
            elif (log := self._log(place)).with_suffix(".ipynb").exists():
                self.failed.add(place)
                said = log.read_text(encoding="utf8").strip().splitlines()[-1:]
                self._tell(f"{self._name(place)} failed: {''.join(said)}; log: {log}")

    def _tell(self, said: str) -> None:
        waiting = [place for place in self.left if place not in self.failed]
        running = [self._name(place) for place in waiting if self._records(place)[1] - self.left[place][1]]
        click.echo(said + (f"; running: {', '.join(running)}" if running else ""))

    def _records(self, place: str) -> tuple[str, set]:
        path = self.folder / place
        file, staged = path / "provenance.json", path.parents[1] / ".staging"
        return file.read_text(encoding="utf8") if file.exists() else "", set(staged.glob(f"{path.name}-*"))

    def _name(self, place: str) -> str:
        return self.jobs[place]["notebook"] + _where(place)

    def _log(self, place: str) -> Path:
        path = self.folder / place
        return path.parents[1] / "logs" / f"{path.name}.log"


def publish_run(run: Path) -> Path:
    """Replace the committed notebooks and figures by those of a run of the default profile, when all of it is
    finished, and return the folder where they now are.
    """
    plan = plan_run("default")
    rest = [name for _, name, state in run_states({".": {"plan": plan}}, run) if state != "finished"]
    if rest:
        click.echo(f"the committed results stay until {', '.join(rest)} is finished, too")
        return run
    for name in plan:
        files = [*read_provenance(name, run)["files"], f"figures/{name}/provenance.json"]
        for path in files:
            _replace(ROOT / path, run / path)
        for path in (ROOT / "figures" / name).rglob("*"):
            if path.is_file() and path.relative_to(ROOT).as_posix() not in files:
                path.unlink()
    return ROOT


def recorded_runs(folder: Path) -> dict[str, dict]:
    """Return the runs that were ever asked for in `folder`; a single one is named ".". Raises ValueError where
    the record is broken.
    """
    try:
        return json.loads((folder / "plan.json").read_text(encoding="utf8"))["runs"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'plan.json'} cannot be read; remove it and give the command again"
        ) from error


def record_runs(runs: dict[str, dict], folder: Path) -> None:
    """Add runs to plan.json of `folder`, at once."""
    known = recorded_runs(folder)
    for run, about in runs.items():
        plan = {**known.get(run, {"plan": {}})["plan"], **about["plan"]}
        known[run] = {"plan": dict(sorted(plan.items())), "varied": about["varied"]}
    written = folder / ".staging" / "plan.json"
    written.write_text(json.dumps({"runs": known}, indent=1, default=str), encoding="utf8")
    written.replace(folder / "plan.json")


def run_states(runs: dict[str, dict], folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (run, notebook, state) of all that `runs` hold in `folder`; `notebook_state` explains the states."""
    for run, about in runs.items():
        plan = {name: about["plan"][name] for name in notebook_names() if name in about["plan"]}
        for name, digest in plan_digests(plan, folder / run).items():
            yield run, name, notebook_state(name, digest, folder / run)


def gather_metrics(folder: Path) -> int:
    """Write metrics.csv of all finished runs in `folder` and return the number of its rows.

    Its columns are run, notebook, a column for each parameter that varies, metric and value: the metrics are
    the numbers of results.json, with dots between the names that lead to them.
    """
    runs = recorded_runs(folder)
    columns = dict.fromkeys(parameter for about in runs.values() for parameter in about["varied"])
    rows = []
    for run, name, state in run_states(runs, folder):
        path = folder / run / "figures" / name / "results.json"
        if state == "finished" and path.exists():
            about = {"run": run, "notebook": name, **runs[run]["varied"]}
            numbers = _numbers(json.loads(path.read_text(encoding="utf8")))
            rows += [{**about, "metric": metric, "value": value} for metric, value in numbers]
    written = folder / ".staging" / "metrics.csv"
    with written.open("w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, ["run", "notebook", *columns, "metric", "value"], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    written.replace(folder / "metrics.csv")
    return len(rows)


def _numbers(part, name: str = "") -> Iterator[tuple]:
    if isinstance(part, dict | list):
        for key, inner in part.items() if isinstance(part, dict) else enumerate(part):
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(part, int | float) and not isinstance(part, bool):
        yield name, part


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Keep other commands waiting for the length of a block; the lock is freed even when its holder is killed."""
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


def _refuse_others(jobs: dict[str, dict], folder: Path) -> None:
    """Raise ValueError where a job would replace finished results of other parameters."""
    for place, job in jobs.items():
        name, run = job["notebook"], (folder / place).parents[1]
        found = read_provenance(name, run)
        if found and is_finished(name, found["digest"], run):
            old, new = found["parameters"], json.loads(json.dumps(job["parameters"], default=str))
            both = {
                key: [part.get(key, notebook_default(name, key)) for part in (old, new)]
                for key in {**old, **new}
            }
            other = [
                f"{key} {there!r} there, {asked!r} asked"
                for key, (there, asked) in both.items()
                if there != asked
            ]
            if other:
                said = f"{run} holds {name} finished with other parameters ({'; '.join(other)})"
                raise ValueError(f"{said}; choose another --output, or add --force to replace it")


def _replace(target: Path, source: Path) -> None:
    """Make a file the copy of another at once, unless it is that already."""
    if not target.is_file() or file_digest(target) != file_digest(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".running-{target.name}")
        shutil.copyfile(source, unfinished)
        unfinished.replace(target)


def _where(place: str) -> str:
    run = Path(place).parents[1].as_posix()
    return "" if run == "." else f" in {run}"


if __name__ == "__main__":
    main()
