"""A grid is checked before it starts; a sweep finishes what can be finished, whoever dies, and gathers its
numbers.
"""

import json
import os
import time

import pandas as pd
import pytest
from distributed import Scheduler, SpecCluster, Worker
from tiny_project import COUNT, RESULT, counted, invoke, start, write_notebook, write_profile

pytest_plugins = ["tiny_project"]


@pytest.fixture
def grid(project):
    """A function that writes a grid and returns its path."""

    def write(text):
        path = project.root / "grid.yaml"
        path.write_text(text, encoding="utf8")
        return path

    return write


@pytest.fixture
def scheduler():
    """The address of a Dask scheduler with two workers in this process, one of which offers a GPU."""
    local = {"host": "127.0.0.1", "port": 0, "dashboard": False}
    options = {"plain": {"nthreads": 1}, "with_gpu": {"nthreads": 1, "resources": {"GPU": 1}}}
    workers = {name: {"cls": Worker, "options": {**local, **about}} for name, about in options.items()}
    head = {"cls": Scheduler, "options": {**local, "dashboard_address": "127.0.0.1:0"}}
    with SpecCluster(workers, head, silence_logs=50) as cluster:
        yield cluster.scheduler_address


def states(project, folder="runs/grid"):
    found = project.manifests.run_states(project.root / folder)
    return sorted((run.split("-")[0], name, state) for run, name, state, _ in found)


# Grids


def test_grid_is_the_product_of_its_lists_and_single_runs(project, grid):
    write_profile(project.root, "small", "all: {level: 0.25}")
    path = grid("""
        profile: small
        notebooks: 01_first
        parameters: {n_samples: [4, 6], sets: [[a], [b, c]]}
        runs: [{notebooks: [02_second, 01_first], parameters: {seed: 7}}, {parameters: {seed: 8}}]
    """)
    runs = project.plans.plan_sweep(path)
    assert [about["varied"] for about in runs.values()] == [
        {"n_samples": 4, "sets": ["a"]},
        {"n_samples": 4, "sets": ["b", "c"]},
        {"n_samples": 6, "sets": ["a"]},
        {"n_samples": 6, "sets": ["b", "c"]},
        {"seed": 7},
        {"seed": 8},
    ]
    chosen = [list(about["plan"]) for about in runs.values()]
    assert chosen == [["01_first"]] * 4 + [["01_first", "02_second"], ["01_first"]]
    assert all(about["plan"]["01_first"] == {"level": 0.25, **about["varied"]} for about in runs.values())


def test_runs_have_names_that_can_be_read_and_stay(project, grid):
    first = list(project.plans.plan_sweep(grid("parameters: {n_samples: [4], name: ['a/b c']}")))
    more = list(project.plans.plan_sweep(grid("parameters: {n_samples: [3, 4], name: ['a/b c', 'a_b_c']}")))
    assert first[0].startswith("n_samples=4,name=a_b_c-") and first[0] in more and len(set(more)) == 4
    write_profile(project.root, "small", "all: {level: 0.25}")
    other = grid("profile: small\nparameters: {n_samples: [4], name: ['a/b c']}")
    assert first[0] not in project.plans.plan_sweep(other)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "grid.yaml is empty; name parameters with lists of values, or runs"),
        ("notebooks: [01_first]", "grid.yaml is empty"),
        ("parameters: {}", "grid.yaml is empty"),
        ("parameters: {seed: []}", "grid.yaml: 'seed' must be a list of values to try, not []"),
        ("parameters: {seed: 3}", "grid.yaml: 'seed' must be a list of values to try, not 3"),
        ("parameters: {sed: [1]}", "grid.yaml: parameter 'sed' is unknown; did you mean 'seed'?"),
        ("parameters: {seed: [1, x]}", "grid.yaml: parameter 'seed' must be int, not 'x'"),
        (
            "parameters: {sets: [a, b]}",
            "'sets' must be list, not 'a'; in a grid, each of its values is a list",
        ),
        (
            "notebooks: [01_frist]\nparameters: {seed: [1]}",
            "notebook '01_frist' is unknown; did you mean '01_first'?",
        ),
        ("runs: [{parameters: {seed: x}}]", "grid.yaml: parameter 'seed' must be int, not 'x'"),
        (
            "runs: [{parameter: {seed: 1}}]",
            "key of grid.yaml 'parameter' is unknown; did you mean 'parameters'?",
        ),
        (
            "runs: [01_first]",
            "grid.yaml must map some of notebooks, parameters to their values, not be '01_first'",
        ),
        ("parametres: {seed: [1]}", "key of grid.yaml 'parametres' is unknown; did you mean 'parameters'?"),
        ("- seed", "grid.yaml must map some of profile, notebooks, parameters, runs"),
        ("profile: [smoke]\nparameters: {seed: [1]}", "grid.yaml: 'profile' must be a str, not ['smoke']"),
        ("profile: smok\nparameters: {seed: [1]}", "profile 'smok' does not exist; use one of default"),
        (
            "parameters:\n  seed: [1, 2\n",
            "grid.yaml is not valid YAML: line 3, column 1: expected ',' or ']'",
        ),
    ],
)
def test_bad_grid_is_one_line_and_writes_nothing(project, grid, text, said):
    result = invoke(project, "sweep", grid(text))
    assert (
        result.exit_code == 2 and said in " ".join(result.output.split()) and "Traceback" not in result.output
    )
    assert not (project.root / "runs").exists()


def test_missing_grid_is_said(project):
    result = invoke(project, "sweep", "nowhere.yaml")
    assert result.exit_code == 2 and "grid 'nowhere.yaml' does not exist" in result.output


def test_committed_grids_fit_the_committed_notebooks():
    from helpers.plans import PROJECT_ROOT, plan_sweep

    grids = list((PROJECT_ROOT / "data" / "sweeps").glob("*.yaml"))
    assert grids and all(len(plan_sweep(grid)) > 1 for grid in grids)


# Sweeps


def test_sweep_on_a_cluster_is_gathered_and_not_repeated(project, quick, grid, scheduler):
    command = ["sweep", grid("parameters: {n_samples: [4, 6], seed: [0, 1]}"), "--scheduler", scheduler]
    assert invoke(project, *command).exit_code == 0
    assert len(counted(project)) == 8
    both = ("01_first", "02_second")
    expected = [
        (f"n_samples={n},seed={seed}", name, "finished") for n in (4, 6) for seed in (0, 1) for name in both
    ]
    assert states(project) == expected
    table = pd.read_csv(project.root / "runs" / "grid" / "metrics.csv")
    assert list(table) == ["run", "notebook", "n_samples", "seed", "metric", "value"] and len(table) == 24
    assert set(table.metric) == {"mean", "rows.a b.0", "rows.a b.1"}
    means = table[table.metric == "mean"].pivot_table(index="seed", columns="n_samples", values="value")
    assert means[6].div(means[4]).round(12).tolist() == [1.5, 1.5] and means[4][0] != means[4][1]
    assert invoke(project, *command[:2]).exit_code == 0  # not even a worker starts
    invoke(project, "sweep", grid("parameters: {n_samples: [4], seed: [0, 1, 2]}"), "--scheduler", scheduler)
    assert counted(project)[8:] in (["01_first 4 2", "02_second 4 2"], ["02_second 4 2", "01_first 4 2"])
    assert pd.read_csv(project.root / "runs" / "grid" / "metrics.csv").run.nunique() == 5


def test_kernels_of_a_sweep_keep_the_memory_they_have_freed(project, quick, grid, scheduler, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")  # as Dask starts its workers
    write_notebook(project.root, "01_first", "import os\nassert 'MALLOC_TRIM_THRESHOLD_' not in os.environ")
    result = invoke(
        project, "sweep", grid("notebooks: 01_first\nparameters: {seed: [0]}"), "--scheduler", scheduler
    )
    assert result.exit_code == 0, result.output


def test_what_reads_from_another_runs_after_it_and_a_failure_holds_back_nothing_else(
    project, quick, grid, scheduler
):
    fail = "if seed == 1: raise RuntimeError('bad seed')"
    write_notebook(
        project.root, "01_first", COUNT.format(name="01_first"), RESULT.format(name="01_first"), fail
    )
    read = "assert Path(figures_dir, 'results', '01_first.json').exists()"
    write_notebook(project.root, "02_second", COUNT.format(name="02_second"), read)
    write_notebook(project.root, "03_third")
    result = invoke(project, "sweep", grid("parameters: {seed: [0, 1, 2]}"), "--scheduler", scheduler)
    assert result.exit_code == 1 and "Error: 2 of 9 notebooks did not finish" in result.output
    [line] = [line for line in result.output.splitlines() if "bad seed" in line]
    assert "01_first failed in cell 4: RuntimeError: bad seed; log: " in line and os.path.exists(
        line.split("log: ")[1]
    )
    assert "02_second was held back, because 01_first did not finish" in result.output
    ended = [("seed=1", "01_first", "failed"), ("seed=1", "02_second", "missing")]
    assert [row for row in states(project) if row[2] != "finished"] == ended and len(states(project)) == 9
    table = pd.read_csv(project.root / "runs" / "grid" / "metrics.csv")
    assert set(table[table.seed == 1].notebook) == {"03_third"} and set(table.seed) == {0, 1, 2}


def test_unreachable_scheduler_is_told_in_seconds_and_loses_nothing(project, quick, grid, scheduler):
    path = grid("parameters: {seed: [0]}")
    invoke(project, "sweep", path, "--scheduler", scheduler)
    begun = time.monotonic()
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        result = invoke(project, "sweep", path, "--force", "--scheduler", address)
        assert (
            result.exit_code == 1 and f"no Dask scheduler answers at '{address}'; start one" in result.output
        )
    assert time.monotonic() - begun < 20
    assert {state for *_, state in states(project)} == {"finished"}


def test_workers_of_this_machine_share_its_cores_and_own_a_gpu_each(project, monkeypatch):
    for name in project.sweeps.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    monkeypatch.setattr(project.sweeps, "CPU_COUNT", 12)
    with project.sweeps.local_workers(2, 5, gpu=True) as client:
        gpus, threads = [client.run(os.getenv, name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
        assert sorted(gpus.values()) == ["3", "7"] and set(threads.values()) == {"6"}
        assert client.submit(abs, -1, resources=project.sweeps.GPU).result(timeout=10) == 1
    with pytest.raises(ValueError, match="3 workers need a GPU each, and here are 2; give fewer --workers"):
        with project.sweeps.local_workers(3, 5, gpu=True):
            pass


def test_threads_set_for_openmp_hold_for_every_library(project, monkeypatch):
    for name in project.sweeps.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    monkeypatch.setattr(project.sweeps, "CPU_COUNT", 12)
    with project.sweeps.local_workers(1, 5) as client:
        found = [set(client.run(os.getenv, name).values()) for name in project.sweeps.THREADS]
    assert found == [{"3"}, {"2"}, {"3"}, {"3"}]


@pytest.mark.parametrize(("more", "workers"), [(["--gpu"], {"with_gpu"}), ([], {"with_gpu", "plain"})])
def test_a_notebook_that_needs_a_gpu_goes_to_a_worker_that_offers_one(
    project, quick, grid, scheduler, more, workers
):
    code = "import time\nfrom distributed import get_worker\nn_samples = get_worker().name\ntime.sleep(0.1)"
    write_notebook(project.root, "01_first", code, COUNT.format(name="01_first"))
    path = grid("notebooks: [01_first]\nparameters: {seed: [0, 1, 2, 3]}")
    assert invoke(project, "sweep", path, "--scheduler", scheduler, *more).exit_code == 0
    assert {line.split()[1] for line in counted(project)} == workers and len(counted(project)) == 4


def test_sweep_survives_its_workers_and_its_own_death(project, grid):
    die = """import os, signal, time
if seed == 1 and not Path("died").exists():
    Path("died").touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)"""
    hold = "while seed == 3 and Path('hold').exists():\n    Path('held').touch()\n    time.sleep(0.05)"
    write_notebook(
        project.root, "01_first", COUNT.format(name="01_first"), die, hold, RESULT.format(name="01_first")
    )
    path = grid("notebooks: [01_first]\nparameters: {seed: [0, 1, 2, 3]}")
    (project.root / "hold").touch()
    running = start(project, "sweep", path, "--workers", "2")
    try:
        end = time.monotonic() + 150
        while (
            sum(state == "finished" for *_, state in states(project)) < 3
            or not (project.root / "held").exists()
        ):
            assert time.monotonic() < end and running.poll() is None, states(project)
            time.sleep(0.1)
    finally:
        running.kill()
        running.communicate()
    (project.root / "hold").unlink()
    both = [start(project, "sweep", path, "--workers", "1") for _ in range(2)]
    said = [process.communicate(timeout=150)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(counted(project)) == [f"01_first 10 {seed}" for seed in (0, 1, 1, 2, 3, 3)]
    assert {state for *_, state in states(project)} == {"finished"}
    assert pd.read_csv(project.root / "runs" / "grid" / "metrics.csv").seed.nunique() == 4
    assert all("Warning" not in text for text in said), "\n".join(said)


def test_plans_of_two_commands_for_one_folder_are_both_kept(project):
    folder = project.root / "runs" / "both"
    for run in ("a", "b"):
        project.manifests.record_plan(
            folder, {run: {"plan": {"01_first": {"seed": 1}}, "varied": {"seed": 1}}}
        )
    assert json.loads((folder / "plan.json").read_text()) == {
        "format": 1,
        "runs": {run: {"plan": {"01_first": {"seed": 1}}, "varied": {"seed": 1}} for run in ("a", "b")},
    }
