"""Many runs at once, on the cores of this machine or on a Dask cluster, and their numbers in one table."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
import fsspec
from dask.system import CPU_COUNT
from distributed import Client, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed

from helpers.manifests import (
    log_path,
    read_plan,
    run_addresses,
    run_folder,
    run_states,
    upstream_notebooks,
    write_text,
)
from helpers.runs import complete_notebook

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
GPU = {"GPU": 1}  # what a notebook asks of a worker, and what `dask worker --resources GPU=1` offers


@contextmanager
def local_workers(count: int | None, tasks: int, gpu: bool = False):
    """Start worker processes here for the length of a block, which share the cores, or own a GPU each. Yields
    a client.

    count   of workers; None for one a core, or a GPU
    tasks   that wait for them, and are not fewer than the workers
    gpu     give each worker a GPU of its own

    A worker that dies is replaced, and what it was at starts again elsewhere, up to three times.
    Raises ValueError where there are fewer GPUs than workers.
    """
    gpus = _gpus() if gpu else []
    count = min(count or max(1, len(gpus) if gpu else CPU_COUNT), tasks)
    if gpu and count > len(gpus):
        found = f"{count} workers need a GPU each, and here are {len(gpus)}"
        raise ValueError(f"{found}; give fewer --workers, or no --gpu")
    share = os.environ.get(
        "OMP_NUM_THREADS", str(max(1, CPU_COUNT // count))
    )  # what is set for one is meant for all
    threads = {name: os.environ.get(name, share) for name in THREADS}
    quiet, workers = {"host": "127.0.0.1", "dashboard": False}, {}
    common = {**quiet, "nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    common["config"] = {
        "distributed.worker.profile.enabled": False
    }  # it would sample what waits for a notebook
    for index in range(count):
        own = (
            {"env": {**threads, "CUDA_VISIBLE_DEVICES": gpus[index]}, "resources": GPU}
            if gpu
            else {"env": threads}
        )
        workers[index] = {"cls": Nanny, "options": {**common, **own}}
    scheduler = {"cls": Scheduler, "options": {**quiet, "port": 0, "dashboard_address": "127.0.0.1:0"}}
    patience = {
        "distributed.deploy.lost-worker-timeout": "1 hour"
    }  # a worker that restarts slowly is still awaited
    with dask.config.set(patience), SpecCluster(workers, scheduler, silence_logs=logging.CRITICAL) as cluster:
        with Client(cluster) as client:
            yield client


@contextmanager
def cluster_workers(address: str, gpu: bool = False):
    """Use the workers of a running scheduler for the length of a block. Yields a client.

    Raises ConnectionError within seconds where nothing answers at that address.
    """
    try:
        client = Client(address, timeout=5)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at {address!r}; start one with `dask scheduler` and give the address that it "
            "prints, such as tcp://host:8786"
        ) from error
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if not any(worker["resources"].get("GPU") for worker in workers) if gpu else not workers:
            logging.warning(
                "no worker%s is there yet; waiting for one", " with the resource GPU=1" if gpu else ""
            )
        yield client


def complete_sweep(
    runs: dict[str, dict], folder: str | Path, client: Client, gpu: bool = False
) -> Iterator[tuple]:
    """Complete every notebook of every run on the client's workers; yield (run, manifest) as they come.

    runs     as `plan_sweep` returns them
    folder   where each run gets a folder of its name; workers on other machines must see it too
    gpu      give notebooks only to workers that offer a GPU, one each

    A notebook starts when those that it reads from are finished; a failure holds back nothing else.
    """
    asked = {}
    for run, about in runs.items():
        place, futures = run_folder(folder, run), {}
        addresses = run_addresses(about["plan"], place)
        for name, parameters in about["plan"].items():
            earlier = [futures[other] for other in upstream_notebooks(name) if other in futures]
            what = name, parameters, str(place), addresses, earlier
            futures[name] = client.submit(
                _complete_on_worker, *what, pure=False, resources=GPU if gpu else None
            )
            asked[futures[name]] = run, name, place
    for future in as_completed(asked):
        run, name, place = asked[future]
        error = future.exception()
        if error is None:
            yield run, future.result()
        else:
            lost = isinstance(error, KilledWorker)
            what = "it took one worker after another with it" if lost else f"{type(error).__name__}: {error}"
            yield (
                run,
                {
                    "notebook": name,
                    "status": "failed",
                    "error": f"failed: {what}",
                    "log": log_path(name, place),
                },
            )


def gather_metrics(folder: str | Path) -> int:
    """Write metrics.csv of all finished runs in `folder` and return the number of its rows.

    Its columns are run, notebook, a column for each parameter that varies, metric and value: the metrics are
    the numbers of results/NOTEBOOK.json, with dots between the names that lead to them.
    """
    fs, root = fsspec.url_to_fs(str(folder))
    varied = {run: about["varied"] for run, about in read_plan(folder).items()}
    rows = []
    for run, name, state, manifest in run_states(folder):
        path = f"figures/results/{name}.json"
        if state == "finished" and path in manifest["outputs"]:
            for metric, value in _numbers(json.loads(fs.cat_file(str(run_folder(root, run)) + f"/{path}"))):
                rows.append({"run": run, "notebook": name, **varied[run], "metric": metric, "value": value})
    text = io.StringIO()
    parameters = dict.fromkeys(parameter for values in varied.values() for parameter in values)
    table = csv.DictWriter(text, ["run", "notebook", *parameters, "metric", "value"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(folder, "metrics.csv", text.getvalue())
    return len(rows)


def _complete_on_worker(*what) -> dict:
    """Complete a notebook in a kernel that keeps the memory it has freed: Dask lets workers give it back at
    once, which makes every tensor cost page faults, a quarter of the time of two notebooks at once.
    """
    os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)
    return complete_notebook(*what)


def _numbers(part, name: str = "") -> Iterator[tuple]:
    if isinstance(part, dict | list):
        for key, inner in part.items() if isinstance(part, dict) else enumerate(part):
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(part, int | float) and not isinstance(part, bool):
        yield name, part


def _gpus() -> list[str]:
    """Return the GPUs here as CUDA_VISIBLE_DEVICES names them."""
    import torch  # seconds, which a sweep without GPUs does not wait for

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]
