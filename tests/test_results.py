"""What notebooks leave reads back as it was; what is missing, of other parameters or damaged says what to
run.
"""

import json
import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from helpers import paths, results


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder of its own, with committed figures of one notebook."""
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path)
    monkeypatch.setattr(results, "PROJECT_ROOT", tmp_path)
    committed = results.results_folder("figures", "01_first")
    results.save_results({"seed": 0}, committed)
    return tmp_path


def test_outputs_go_below_the_root_and_inputs_are_found_from_both_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.project_path("runs/mine") == paths.PROJECT_ROOT / "runs" / "mine"
    assert paths.project_path(tmp_path / "here") == tmp_path / "here"
    assert paths.project_path("~/here") == Path(os.path.expanduser("~/here"))
    assert paths.local_path("data/models") == paths.PROJECT_ROOT / "data" / "models"
    (tmp_path / "data" / "models").mkdir(parents=True)
    assert paths.local_path("data/models") == tmp_path / "data" / "models"
    assert paths.local_folder("data/nowhere") is None


def test_figure_is_written_as_png_and_pdf_with_the_same_bytes_each_time(tmp_path):
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    folders = [results.results_folder(tmp_path / "deep", name) for name in ("first", "second")]
    for folder in folders:
        results.save_figure(figure, folder, "line")
    plt.close(figure)
    for name in ("line.png", "line.pdf"):
        first, second = (folder / name for folder in folders)
        assert first.read_bytes() == second.read_bytes()
    with Image.open(folders[0] / "line.png") as image:
        assert image.width > 600 and image.convert("L").getextrema() == (0, 255)


def test_table_reads_back(tmp_path):
    table = pd.DataFrame({"comp": [0.123456789, 1.0]}, index=pd.Index(["Grad-SAM", "Random"], name="method"))
    results.save_table(table, tmp_path, "scores")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scores.csv", index_col="method"), table.round(6))


def test_records_read_back(tmp_path):
    records = pd.DataFrame({"text": ["ä", "b"], "token": [0, 1], "score": [0.1, math.nan]}, index=[5, 3])
    results.save_records(records, tmp_path, "scores")
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "scores.parquet"), records.reset_index(drop=True)
    )


def test_results_read_back(tmp_path):
    found = {"accuracy": {"movies": 0.86}, "models": ["ä"], "seed": 0}
    path = results.save_results(found, tmp_path)
    assert path == tmp_path / "results.json"
    assert json.loads(path.read_text(encoding="utf8")) == found
    assert results.load_results(tmp_path, seed=0, models=["ä"]) == found


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_results_that_are_no_number_are_refused_and_leave_the_old_file(tmp_path, bad):
    path = results.save_results({"accuracy": 0.86}, tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.save_results({"accuracy": bad}, tmp_path)
    assert json.loads(path.read_text(encoding="utf8")) == {"accuracy": 0.86}


def test_results_of_other_parameters_name_both_values_and_what_to_run(tmp_path):
    folder = results.results_folder(tmp_path, "01_first")
    results.save_results({"seed": 0, "n_samples": 8, "device": "cpu"}, folder)
    with pytest.raises(ValueError) as caught:
        results.load_results(folder, seed=1, device="cpu", model_id="bert")
    message = str(caught.value)
    assert "seed 0 and not 1, model_id None and not 'bert'" in message and "device" not in message
    assert "the results of 01_first were made with" in message and "with the same parameters" in message


def test_damaged_results_name_the_file_and_the_remedy(tmp_path):
    folder = results.results_folder(tmp_path, "01_first")
    (folder / "results.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"01_first/results.json is damaged .*; run 01_first again"):
        results.load_results(folder)


def test_earlier_results_are_those_of_this_run_else_the_committed_ones(project, capsys):
    assert results.find_results("runs/by_hand/figures", "01_first") == project / "figures" / "01_first"
    assert capsys.readouterr().out == "01_first: results of the committed figures\n"
    default = results.results_folder("runs/default/figures", "01_first")
    results.save_results({"seed": 0}, default)
    assert results.find_results("runs/by_hand/figures", "01_first") == default
    (default / "results.json").unlink()
    own = results.results_folder("runs/by_hand/figures", "01_first")
    assert results.find_results("runs/by_hand/figures", "01_first") == project / "figures" / "01_first"
    results.save_results({"seed": 1}, own)
    assert results.find_results("runs/by_hand/figures", "01_first") == own
    assert capsys.readouterr().out.endswith("01_first: results of this run\n")


def test_missing_results_name_the_notebook_and_the_command_that_make_them(project):
    with pytest.raises(FileNotFoundError) as caught:
        results.find_results("runs/by_hand/figures", "01_first", "cavs.safetensors")
    assert "there is no cavs.safetensors of 01_first" in str(caught.value)
    assert "`attention run --only 01_first`" in str(caught.value)
