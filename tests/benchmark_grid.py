"""What a grid gains from a second core, and what it costs to give it again when all is finished.

    python -m pytest tests/benchmark_grid.py

Eight runs of 01_nlp_shapley on the smoke profile, one at a time, then two. It means something only on two
cores that are otherwise idle.
"""

import subprocess
import sys
import time

import pytest

from workflow.parameters import ROOT, plan_grid

GRID = ROOT / "workflow" / "grids" / "seeds.yaml"


def seconds(output, cores):
    """Give the command of a grid, and return how long it took."""
    command = [
        sys.executable,
        "-m",
        "workflow.front",
        "sweep",
        GRID,
        "--output",
        output,
        "--cores",
        str(cores),
    ]
    begun = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grids")
    first = {cores: seconds(folder / str(cores), cores) for cores in (1, 2)}
    return {**first, "again": seconds(folder / "2", 2), "folder": folder}


def test_two_cores_are_nearly_twice_as_fast_as_one(times, capsys):
    with capsys.disabled():
        print(
            f"\n  {len(plan_grid(GRID))} runs: {times[1]:.0f} s on one core, {times[2]:.0f} s on two",
            flush=True,
        )
    assert times[1] / times[2] >= 1.6


def test_finished_grid_is_not_repeated(times, capsys):
    with capsys.disabled():
        print(f"\n  the same grid again: {times['again']:.1f} s", flush=True)
    assert times["again"] < 10


def test_number_of_cores_does_not_change_a_number(times):
    """All but the measured times, of course."""
    tables = [(times["folder"] / str(cores) / "metrics.csv").read_text().splitlines() for cores in (1, 2)]
    one, two = [[line for line in table if "second" not in line] for table in tables]
    assert one == two and len(one) > 100
