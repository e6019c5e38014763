"""What a sweep gains from a second worker, and what it costs to give it again when all is finished.

    python -m pytest tests/benchmark_sweep.py

Eight runs of 01_nlp_shapley on the smoke profile, first on one worker, then on two, with one thread to each
run: so the figure is that of the sweep and not of torch's threads. It means something only on two cores that
are otherwise idle.
"""

import os
import subprocess
import sys
import time

import pytest
from helpers.plans import PROJECT_ROOT, plan_sweep

GRID = PROJECT_ROOT / "data" / "sweeps" / "seeds.yaml"


def seconds(output, workers):
    """Give the command of a sweep, and return how long it took."""
    command = [
        sys.executable,
        "-m",
        "helpers.pipeline",
        "sweep",
        GRID,
        "--output",
        output,
        "--workers",
        str(workers),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    subprocess.run(command, cwd=PROJECT_ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    first = {workers: seconds(folder / str(workers), workers) for workers in (1, 2)}
    return {**first, "again": seconds(folder / "2", 2), "folder": folder}


def test_two_workers_are_nearly_twice_as_fast_as_one(times, capsys):
    with capsys.disabled():
        print(
            f"\n  {len(plan_sweep(GRID))} runs: {times[1]:.0f} s on one worker, {times[2]:.0f} s on two",
            flush=True,
        )
    assert times[1] / times[2] >= 1.6


def test_finished_sweep_is_not_repeated(times, capsys):
    with capsys.disabled():
        print(f"\n  the same sweep again: {times['again']:.1f} s", flush=True)
    assert times["again"] < 10


def test_number_of_workers_does_not_change_a_number(times):
    """All but the measured times, of course."""
    tables = [(times["folder"] / str(workers) / "metrics.csv").read_text().splitlines() for workers in (1, 2)]
    one, two = [[line for line in table if "second" not in line] for table in tables]
    assert one == two and len(one) > 100
