"""What a plan names is looked for before anything starts: folders, the hub's cache, the hub."""

import datasets
import huggingface_hub
import pytest
from click.testing import CliRunner

from helpers import places
from helpers.pipeline import app
from helpers.plans import plan_run

MODEL, SET = "someone/some-model", "stanfordnlp/imdb"


@pytest.fixture
def out_of_reach(monkeypatch):
    """Neither a hub nor anything of it in a cache."""
    monkeypatch.setattr(places, "_out_of_reach", lambda: "no route to host")
    monkeypatch.setattr(places, "_is_cached", lambda kind, name: False)


def test_paper_profile_out_of_reach_names_all_that_it_needs_once(tmp_path, out_of_reach):
    folders = {name: str(tmp_path) for name in places.FOLDERS}
    with pytest.raises(ConnectionError) as error:
        places.check_at_hand(plan_run("paper", overrides=folders))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("the model hub cannot be reached (no route to host), and these are neither")
    named = [line.split()[:2] for line in lines[1:-1]]
    assert named == [
        ["model", "google/vit-base-patch16-224"],
        ["model", "textattack/bert-base-uncased-SST-2"],
        ["model", "textattack/bert-base-uncased-ag-news"],
        ["model", "textattack/bert-base-uncased-imdb"],
        ["set", "fancyzhe/ag_news"],
        ["set", "stanfordnlp/imdb"],
        ["set", "stanfordnlp/sst2"],
    ]
    assert (
        "(model_id of 02_vit_shapley, model_id of 03_concept_training, model_id of 04_tcav, image_model_id of 05"
        in lines[1]
    )
    assert "hf download NAME --local-dir FOLDER" in lines[-1] and "-p model_ids '[FOLDER, ...]'" in lines[-1]
    assert "FOLDER_short" in lines[-1]


def test_paper_profile_without_its_images_names_the_folders_and_what_makes_them(monkeypatch, tmp_path):
    monkeypatch.setattr(places, "PROJECT_ROOT", tmp_path)
    monkeypatch.setattr(places, "_out_of_reach", lambda: "")
    with pytest.raises(FileNotFoundError) as error:
        places.check_at_hand(plan_run("paper"))
    assert str(error.value).count("\n  folder ") == 2 and "`python data/paper_images.py`" in str(error.value)
    assert (
        "folder data/cache/paper/concepts (concepts_dir of 03_concept_training, concepts_dir of 04_tcav)"
        in str(error.value)
    )


def test_folders_and_what_the_hub_has_are_named_together(out_of_reach):
    plan = {"02": {"images_dir": "nowhere", "model_id": MODEL}}
    with pytest.raises(
        FileNotFoundError, match=rf"(?s)folder nowhere .*paper_images.*\nAnd the model hub .*model {MODEL}"
    ):
        places.check_at_hand(plan)


def test_the_project_needs_nothing_from_outside_by_default(monkeypatch):
    monkeypatch.setattr(places, "_out_of_reach", lambda: pytest.fail("the hub was asked for"))
    for profile in ("default", "smoke"):
        places.check_at_hand(plan_run(profile))
    places.check_at_hand(
        {"01": {"sets": ["movies_short", "tweets"], "model_ids": ["data/models/sentiment_minilm"]}}
    )


def test_local_folders_stand_in_place_of_every_name(monkeypatch, tmp_path):
    monkeypatch.setattr(places, "_out_of_reach", lambda: pytest.fail("the hub was asked for"))
    for name in ("a/model", "a/sst2"):
        (tmp_path / name).mkdir(parents=True)
    here = {"model_ids": [f"{tmp_path}/a/model"], "sets": [f"{tmp_path}/a/sst2", f"{tmp_path}/a/sst2_short"]}
    places.check_at_hand({"01": {**here, "images_dir": str(tmp_path), "concepts_dir": ""}})


def test_run_refuses_before_it_writes_anything(out_of_reach, tmp_path):
    folders = [part for name in places.FOLDERS for part in ("-p", name, str(tmp_path))]
    result = CliRunner().invoke(
        app, ["run", "--profile", "paper", *folders, "--output", str(tmp_path / "runs")]
    )
    assert (
        result.exit_code == 1
        and "\n  model google/vit-base-patch16-224 (model_id of 02_vit_shapley" in result.output
    )
    result = CliRunner().invoke(
        app,
        [
            "run",
            "--only",
            "02_vit_shapley",
            "-p",
            "images_dir",
            "nowhere",
            "--output",
            str(tmp_path / "runs"),
        ],
    )
    assert result.exit_code == 2 and "\n  folder nowhere (images_dir of 02_vit_shapley)" in result.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("parameter", "value", "kind"),
    [
        ("model_id", MODEL, "model"),
        ("sets", ["imdb_short"], "set"),
        ("text_set", SET, "set"),
        ("sets", [SET + "_short"], "set"),
    ],
)
def test_what_the_hub_has_is_asked_of_the_network_unless_it_is_in_the_cache(
    monkeypatch, tmp_path, parameter, value, kind
):
    plan = {"01": {parameter: value}}
    monkeypatch.setattr(places, "_out_of_reach", lambda: "no route to host")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    with pytest.raises(ConnectionError, match=rf"\n  {kind} \S+ \({parameter} of 01\)\n"):
        places.check_at_hand(plan)
    with monkeypatch.context() as patch:
        patch.setattr(places, "_out_of_reach", lambda: "")
        places.check_at_hand(plan)
    (tmp_path / "stanfordnlp___imdb").mkdir()
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file: "a file" if name == MODEL else None
    )
    places.check_at_hand(plan)


def test_model_whose_download_was_cut_off_before_its_weights_is_not_at_hand(monkeypatch):
    monkeypatch.setattr(places, "_out_of_reach", lambda: "no route to host")
    found = {"config.json"}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file: file if file in found else None
    )
    with pytest.raises(ConnectionError, match=f"model {MODEL}"):
        places.check_at_hand({"01": {"model_id": MODEL}})
    found.add("model.safetensors.index.json")
    places.check_at_hand({"01": {"model_id": MODEL}})


def test_hub_that_is_switched_off_or_does_not_answer_is_out_of_reach(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    assert "refused" in places._out_of_reach().lower()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert places._out_of_reach() == "HF_HUB_OFFLINE is set"


def test_what_is_no_name_is_for_others_to_refuse(out_of_reach):
    places.check_at_hand({"01": {"sets": [2024, None], "model_id": ""}})
