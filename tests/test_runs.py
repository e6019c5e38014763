"""A run is addressed by its content: what is finished stays, the rest is done by the same command, come what
may.
"""

import errno
import json
import os
import threading
import time

import fsspec
import nbformat
import pytest
from filelock import FileLock
from nbformat.v4 import new_output
from tiny_project import COUNT, counted, invoke, start, write_notebook

pytest_plugins = ["tiny_project"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def manifest_of(folder, name):
    return json.loads((folder / "notebooks" / f"{name}.json").read_text())


def edit(path, change):
    """Change a notebook in its file."""
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


@pytest.fixture
def out(project):
    return project.root / "out"


def reads_first(project):
    """Make 02_second read what 01_first writes, and return its path."""
    read = "print(Path(figures_dir, 'results', '01_first.json').read_text())"
    return write_notebook(project.root, "02_second", COUNT.format(name="02_second"), read)


# Addresses


def test_address_changes_with_all_that_is_computed_from(project):
    path = project.root / "notebooks" / "01_first.ipynb"
    address = lambda **parameters: project.manifests.notebook_address("01_first", parameters, {})
    found = [address(), address(seed=1), address(seed=2)]
    edit(path, lambda notebook: notebook.cells[0].update(source="# Other words"))
    found.append(address())
    edit(path, lambda notebook: notebook.cells[2].update(source=notebook.cells[2].source + "\n1 + 1"))
    found.append(address())
    edit(path, lambda notebook: notebook.cells[1].metadata.update(tags=["parameters", "more"]))
    found.append(address())
    (project.root / "helpers" / "extra.py").write_text("x = 1")
    found.append(address())
    (project.root / "helpers" / "extra.py").write_text("x = 2")
    found.append(address())
    assert len(set(found)) == len(found) == 8


def test_address_does_not_change_with_outputs_or_time(project):
    path = project.root / "notebooks" / "01_first.ipynb"
    before = project.manifests.notebook_address("01_first", {"seed": 1, "level": 0.5}, {})

    def run_it(notebook):
        notebook.cells[2].update(outputs=[new_output("stream", text="done")], execution_count=7)
        notebook.metadata["kernelspec"]["display_name"] = "other"

    edit(path, run_it)
    os.utime(path, (1, 1))
    assert project.manifests.notebook_address("01_first", {"level": 0.5, "seed": 1}, {}) == before


def test_address_chains_those_that_a_notebook_reads_from_and_no_others(project, out):
    addresses = lambda **first: project.manifests.run_addresses({"01_first": first, "02_second": {}}, out)
    apart = [addresses()["02_second"], addresses(seed=1)["02_second"]]
    reads_first(project)
    chained = [addresses()["02_second"], addresses(seed=1)["02_second"]]
    assert apart[0] == apart[1] and chained[0] != chained[1]


def test_a_notebook_alone_chains_what_lies_in_its_folder(project, quick, out):
    reads_first(project)
    for seed in (1, 1, 2):
        assert (
            invoke(project, "run", "--output", out, "--only", "01_first", "-p", "seed", seed).exit_code == 0
        )
        assert invoke(project, "run", "--output", out, "--only", "02_second").exit_code == 0
    assert counted(project) == ["01_first 10 1", "02_second 10 0", "01_first 10 2", "02_second 10 0"]


# Nothing finished is repeated


def test_same_command_repeats_nothing_and_touches_nothing(project, quick, out):
    assert invoke(project, "run", "--output", out).exit_code == 0
    before = {
        path: path.stat().st_mtime_ns
        for path in out.rglob("*")
        if path.is_file() and path.name != "plan.json"
    }
    result = invoke(project, "run", "--output", out)
    assert result.exit_code == 0 and result.output.count("was finished before") == 2
    assert counted(project) == ["01_first 10 0", "02_second 10 0"]
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before


def test_other_parameters_and_force_run_again(project, quick, out):
    command = ["run", "--output", out, "--only", "01_first"]
    for more in ([], ["-p", "seed", 1], ["-p", "seed", 1, "--force"], []):
        assert invoke(project, *command, *more).exit_code == 0
    assert counted(project) == ["01_first 10 0", "01_first 10 1", "01_first 10 1", "01_first 10 0"]


@pytest.mark.parametrize(
    "damage", ["results changed", "results gone", "notebook changed", "half a manifest", "no manifest"]
)
def test_what_is_not_as_it_was_written_is_not_taken_for_finished(project, quick, out, damage):
    command = ["run", "--output", out, "--only", "01_first"]
    invoke(project, *command)
    results, executed = out / "figures" / "results" / "01_first.json", out / "notebooks" / "01_first.ipynb"
    manifest = executed.with_suffix(".json")
    whole = results.read_bytes()
    {
        "results changed": lambda: results.write_bytes(whole[:-1] + b" "),
        "results gone": results.unlink,
        "notebook changed": lambda: executed.write_text(executed.read_text()[:-2]),
        "half a manifest": lambda: manifest.write_text(manifest.read_text()[:100]),
        "no manifest": manifest.unlink,
    }[damage]()
    assert invoke(project, *command).exit_code == 0
    assert counted(project) == ["01_first 10 0"] * 2 and results.read_bytes() == whole


def test_leftovers_of_a_killed_run_are_cleared_and_other_files_stay(project, quick, out):
    command = ["run", "--output", out, "--only", "01_first"]
    invoke(project, *command)
    (out / "notebooks" / "01_first.json").unlink()
    for name in ("01_old.png", "results/01_half.parquet", "02_theirs.png", "mine.png"):
        (out / "figures" / name).write_text("x")
    assert invoke(project, *command).exit_code == 0
    found = {path.name for path in (out / "figures").rglob("*") if path.is_file()}
    assert found == {"01_first.json", "02_theirs.png", "mine.png"}


def test_one_seed_gives_identical_results_and_another_does_not(project, quick, out):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert invoke(project, "run", "--output", out / folder, "-p", "seed", seed).exit_code == 0
    a, b, c = [(out / folder / "figures" / "results" / "01_first.json").read_bytes() for folder in "abc"]
    assert a == b != c


def test_manifest_says_what_ran_with_what_and_how_long(project, quick, out):
    invoke(project, "run", "--output", out, "-p", "n_samples", 3, "--only", "01_first")
    found = manifest_of(out, "01_first")
    said = {"notebook": "01_first", "status": "finished", "parameters": {"n_samples": 3}, "seed": 0}
    assert {key: found[key] for key in said} == said
    assert found["python"].startswith("3.") and found["packages"]["papermill"]
    assert set(found["git"]) == {"commit", "dirty"}
    assert found["started"] <= found["ended"] and 0 <= found["seconds"] < 10 and len(found["address"]) == 64
    assert set(found["outputs"]) == {"notebooks/01_first.ipynb", "figures/results/01_first.json"}


def test_manifest_says_whether_the_sources_were_committed(project, quick, out):
    git = f"git -C {project.root} -c user.name=a -c user.email=a@b.c"
    (project.root / ".gitignore").write_text("*")
    assert os.system(f"{git} init -q && {git} add --force helpers && {git} commit -qm all") == 0
    invoke(project, "run", "--output", out, "--only", "01_first")
    found = manifest_of(out, "01_first")["git"]
    assert len(found["commit"]) == 40 and found["dirty"] is False
    with (project.root / "helpers" / "plans.py").open("a") as file:
        file.write("\n")
    invoke(project, "run", "--output", out, "--only", "01_first")
    assert manifest_of(out, "01_first")["git"]["dirty"] is True


# Killed, crashed, failed


def test_killed_run_is_finished_by_the_same_command(project, out):
    hold = "import os, time\nPath('pid').write_text(str(os.getpid()))\nwhile Path('hold').exists(): time.sleep(0.02)"
    write_notebook(project.root, "02_second", COUNT.format(name="02_second"), hold)
    (project.root / "hold").touch()
    running = start(project, "run", "--output", out)
    try:
        wait_for(lambda: (project.root / "pid").exists() and (project.root / "pid").read_text())
    finally:
        running.kill()
        running.communicate()
    kernel = int((project.root / "pid").read_text())
    finished = os.stat(out / "notebooks" / "01_first.json")
    wait_for(lambda: not os.path.exists(f"/proc/{kernel}"))
    (project.root / "hold").unlink()
    assert [row[2] for row in project.manifests.run_states(out)] == ["finished", "missing"]
    assert invoke(project, "run", "--output", out).exit_code == 0
    assert counted(project) == ["01_first 10 0", "02_second 10 0", "02_second 10 0"]
    after = os.stat(out / "notebooks" / "01_first.json")
    assert (after.st_ino, after.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)
    assert [row[2] for row in project.manifests.run_states(out)] == ["finished", "finished"]


def test_crash_of_a_kernel_is_one_failure(project, out):
    write_notebook(project.root, "01_first", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    result = invoke(project, "run", "--output", out)
    assert result.exit_code == 1 and "01_first failed: DeadKernelError: Kernel died" in result.output
    assert counted(project) == ["02_second 10 0"]


def test_failure_holds_back_only_what_reads_from_it(project, quick, out):
    write_notebook(project.root, "01_first", "raise RuntimeError('out of luck')")
    reads_first(project)
    write_notebook(project.root, "03_third")
    result = invoke(project, "run", "--output", out)
    assert result.exit_code == 1 and counted(project) == ["03_third 10 0"]
    assert (
        f"01_first failed in cell 2: RuntimeError: out of luck; log: {out}/notebooks/01_first.log"
        in result.output
    )
    assert "02_second was held back, because 01_first did not finish" in result.output
    assert "Error: 2 of 3 notebooks did not finish; the same command tries them again" in result.output
    assert [row[2] for row in project.manifests.run_states(out)] == ["failed", "missing", "finished"]
    assert manifest_of(out, "01_first")["error"] == "failed in cell 2: RuntimeError: out of luck"
    write_notebook(project.root, "01_first")
    assert invoke(project, "run", "--output", out).exit_code == 0
    assert counted(project) == ["03_third 10 0", "01_first 10 0", "02_second 10 0"]


def test_sources_that_changed_since_the_command_began_are_refused(project, quick, out):
    touch = "Path('helpers/extra.py').write_text('x = 1')"
    write_notebook(project.root, "01_first", COUNT.format(name="01_first"), touch)
    result = invoke(project, "run", "--output", out)
    assert (
        result.exit_code == 1
        and "02_second failed: its source is not what the command began with" in result.output
    )
    assert counted(project) == ["01_first 10 0"]


# In place


def test_in_place_everything_runs_again(project, quick):
    for _ in range(2):
        assert invoke(project, "run").exit_code == 0
    assert counted(project) == ["01_first 10 0", "02_second 10 0"] * 2


def test_in_place_a_cut_off_run_goes_on_and_the_next_begins_afresh(project, quick):
    stop = "if not Path('go').exists(): raise KeyboardInterrupt"
    write_notebook(project.root, "02_second", COUNT.format(name="02_second"), stop)
    assert invoke(project, "run").exit_code == 1
    (project.root / "go").touch()
    assert invoke(project, "run").exit_code == 0
    assert counted(project) == ["01_first 10 0", "02_second 10 0", "02_second 10 0"]
    assert invoke(project, "run").exit_code == 0
    assert counted(project)[3:] == ["01_first 10 0", "02_second 10 0"]


def test_in_place_one_command_at_a_time(project, quick):
    with project.manifests.lock("collection", project.manifests.IN_PLACE):
        result = invoke(project, "run")
    assert result.exit_code == 1 and "another command is refreshing the collection" in result.output
    assert counted(project) == []


# Two at once


def test_two_commands_for_one_run_take_turns(project, quick, out):
    write_notebook(project.root, "01_first", COUNT.format(name="01_first"), "import time\ntime.sleep(0.3)")
    addresses = project.manifests.run_addresses({"01_first": {}}, out)
    found = []
    complete = lambda: found.append(project.runs.complete_notebook("01_first", {}, out, addresses, []))
    both = [threading.Thread(target=complete) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [manifest["status"] for manifest in found] == ["finished"] * 2 and "kept" in found[1]
    assert counted(project) == ["01_first 10 0"]


def test_status_shows_states_seconds_and_logs(project, quick, out):
    write_notebook(project.root, "02_second", "1 / 0")
    for name in ("03_third", "04_fourth", "05_fifth"):
        write_notebook(project.root, name)
    invoke(project, "run", "--output", out)
    edit(
        project.root / "notebooks" / "03_third.ipynb",
        lambda notebook: notebook.cells[0].update(source="# New"),
    )
    (out / "notebooks" / "05_fifth.json").unlink()
    with FileLock(out / ".locks" / "04_fourth.lock"):
        lines = invoke(project, "status", out).output.splitlines()
    rows = {line.split()[1]: line.split() for line in lines[1:]}
    states = [row[2] for row in rows.values()]
    assert list(rows) == ["01_first", "02_second", "03_third", "04_fourth", "05_fifth"]
    assert states == ["finished", "failed", "stale", "running", "missing"]
    assert rows["02_second"][-1] == f"{out}/notebooks/02_second.log" and 0 <= float(rows["01_first"][3]) < 10


def test_status_of_a_folder_without_runs_says_what_to_give(project):
    result = invoke(project, "status", "nowhere")
    assert result.exit_code == 2 and "nowhere holds no run; give the --output" in " ".join(
        result.output.split()
    )


# Disks and other storage


@pytest.mark.parametrize("where", ["notebook", "manifest"])
def test_full_disk_is_told_and_loses_nothing_finished(project, quick, out, monkeypatch, where):
    invoke(project, "run", "--output", out, "--only", "01_first")
    write, execute = project.runs.write_manifest, project.runs._execute

    def full(what):
        def fail(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device", what)

        return fail

    if where == "notebook":
        monkeypatch.setattr(project.runs, "_execute", full("notebook"))
    monkeypatch.setattr(project.runs, "write_manifest", full("manifest"))
    result = invoke(project, "run", "--output", out)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "01_first was finished before" in result.output
    assert f"02_second failed: OSError: [Errno 28] No space left on device: '{where}'; free" in result.output
    monkeypatch.setattr(project.runs, "write_manifest", write)
    monkeypatch.setattr(project.runs, "_execute", execute)
    assert invoke(project, "run", "--output", out).exit_code == 0
    assert counted(project).count("01_first 10 0") == 1


def test_device_that_is_always_full_fails_the_run_in_one_line(project, quick, out):
    (out / "notebooks").mkdir(parents=True)
    (out / "notebooks" / "01_first.log").symlink_to("/dev/full")
    write_notebook(project.root, "01_first", "raise RuntimeError('x' * 100_000)")
    result = invoke(project, "run", "--output", out, "--only", "01_first")
    assert result.exit_code == 1 and "01_first failed: OSError: [Errno 28] No space left" in result.output


@pytest.mark.parametrize("error", [NotADirectoryError, PermissionError])
def test_output_that_cannot_be_written_to_is_refused_first(project, quick, out, monkeypatch, error):
    def denied(path, content):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    if error is NotADirectoryError:
        out.write_text("a file")
    else:
        monkeypatch.setattr(project.manifests, "replace_file", denied)
    result = invoke(project, "run", "--output", out / "deeper")
    assert result.exit_code == 1 and str(out) in result.output and "choose another --output" in result.output
    assert "Traceback" not in result.output and counted(project) == []


@pytest.mark.parametrize("file", ["plan.json", "notebooks/02_second.json"])
def test_output_of_another_version_is_refused_first(project, quick, out, file):
    (out / "notebooks").mkdir(parents=True)
    (out / file).write_text(json.dumps({"format": 99}))
    result = invoke(project, "run", "--output", out)
    assert result.exit_code == 2 and counted(project) == []
    said = f"{out} was written by another version ({file} has not format 1); choose another --output"
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_url_gets_all_of_a_run_and_is_resumed(project, quick, scheme):
    url = f"{scheme}://{project.root}/far/away"
    read = (
        "from pathlib import Path\nassert 'mean' in Path(figures_dir, 'results', '01_first.json').read_text()"
    )
    count = COUNT.format(name="02_second")
    write_notebook(
        project.root, "02_second", count, read, "if not Path('go').exists(): raise RuntimeError('not yet')"
    )
    result = invoke(project, "run", "--output", url)
    assert (
        result.exit_code == 1
        and f"RuntimeError: not yet; log: {url}/notebooks/02_second.log" in result.output
    )
    assert [row[2] for row in project.manifests.run_states(url)] == ["finished", "failed"]
    (project.root / "go").touch()
    result = invoke(project, "run", "--output", url)
    assert result.exit_code == 0, result.output
    assert counted(project) == ["01_first 10 0", "02_second 10 0", "02_second 10 0"]
    assert invoke(project, "status", url).output.count("finished") == 2
    fs, root = fsspec.url_to_fs(url)
    found = {path.removeprefix(root + "/") for path in fs.find(root)}
    notebooks = {
        f"notebooks/{name}.{end}" for name in ("01_first", "02_second") for end in ("ipynb", "log", "json")
    }
    assert notebooks | {"plan.json", "figures/results/01_first.json"} == found
    assert not [path for path in project.manifests.STAGING.rglob("*.ipynb")]
    fs.rm_file(f"{root}/figures/results/01_first.json")
    assert [row[2] for row in project.manifests.run_states(url)] == ["stale", "finished"]


def test_upload_that_fails_is_repeated_without_running_again(project, quick, monkeypatch):
    url = f"file://{project.root}/far"
    local = type(fsspec.filesystem("file"))
    put = local.put_file

    def broken(self, *arguments, **options):
        raise ConnectionResetError(errno.ECONNRESET, "connection reset")

    monkeypatch.setattr(local, "put_file", broken)
    result = invoke(project, "run", "--output", url, "--only", "01_first")
    assert result.exit_code == 1 and "01_first failed: ConnectionResetError" in result.output
    assert [row[2] for row in project.manifests.run_states(url)] == ["missing"]
    monkeypatch.setattr(local, "put_file", put)
    assert invoke(project, "run", "--output", url, "--only", "01_first").exit_code == 0
    assert counted(project) == ["01_first 10 0"]
