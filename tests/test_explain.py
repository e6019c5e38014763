"""One call explains by name, the class and its rival are what the logits say, a form explains at once."""

import json
import os
import subprocess
import sys

import ipywidgets
import pytest
import torch
from conftest import SENTENCES
from PIL import Image

from helpers.attention import read_attention
from helpers.explain import BEST, METHODS, decide, explain, gather_images, show_form
from helpers.images import patch_players
from helpers.paths import PROJECT_ROOT
from helpers.relevance import gradient_times_input
from helpers.shapley import best_attention_game, shapley_attributions
from helpers.text import encode, token_players
from workflow.parameters import NOTEBOOKS, RANGES


@pytest.fixture
def inputs(model, tokenizer):
    return encode(SENTENCES, tokenizer, model)


@pytest.mark.parametrize("method", METHODS)
def test_each_name_gives_its_method_and_nothing_off_the_players(model, tokenizer, inputs, method):
    players, target = token_players(inputs, tokenizer), torch.tensor([2, 0, 1])
    values = explain(model, inputs, players, target, method)
    if method == BEST:
        expected = best_attention_game(model, inputs, players, target)
    elif method == "AttnLRP":
        expected = gradient_times_input(model, inputs, target, "attnlrp") * players
    else:
        maps = read_attention(model, inputs, target, gradients=True)
        expected = shapley_attributions(maps, players)[method]
    torch.testing.assert_close(values, expected)
    assert not values[~players].any() and values[players].any()


def test_the_recommended_method_is_the_first_and_the_one_that_is_used(model, tokenizer, inputs):
    players = token_players(inputs, tokenizer)
    torch.testing.assert_close(explain(model, inputs, players), best_attention_game(model, inputs, players))
    assert METHODS[0] == BEST and list(METHODS) == RANGES["00_quickstart.method"]["enum"]


def test_images_are_explained_by_the_same_call(image_model):
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    players = patch_players(image_model, inputs)
    found = {method: explain(image_model, inputs, players, 1, method) for method in METHODS}
    assert all(values.shape == players.shape and not values[:, 0].any() for values in found.values())


def test_unknown_method_is_refused_with_the_known_ones(model, tokenizer, inputs):
    with pytest.raises(ValueError, match="'Magic' is unknown; use one of Shapley-Rel-Att-Contrast, AttnLRP"):
        explain(model, inputs, token_players(inputs, tokenizer), method="Magic")


def test_class_and_rival_are_the_two_most_probable_unless_another_is_named(model, inputs):
    logits = model(**inputs).logits
    ranked = logits.argsort(-1, descending=True)
    p, chosen, rival = decide(model, inputs)
    torch.testing.assert_close(p, logits.softmax(-1))
    assert chosen.tolist() == ranked[:, 0].tolist() and rival.tolist() == ranked[:, 1].tolist()
    _, chosen, rival = decide(model, inputs, "runner-up")
    assert chosen.tolist() == ranked[:, 1].tolist() and rival.tolist() == ranked[:, 0].tolist()
    _, chosen, rival = decide(model, inputs, "Neutral")
    assert chosen.tolist() == [2, 2, 2]
    assert rival.tolist() == [first if first != 2 else second for first, second, _ in ranked.tolist()]
    with pytest.raises(ValueError, match="'neutrl' is none of this model's 3 labels"):
        decide(model, inputs, "neutrl")


def test_images_of_files_and_folders(tmp_path):
    (tmp_path / "folder").mkdir()
    for number, name in enumerate(("one.png", "folder/two.png", "folder/three.jpg")):
        Image.new("RGB", (8 + number, 8), "red").save(tmp_path / name)
    places = [f"{tmp_path}/one.png", f"{tmp_path}/folder/"]
    found = gather_images(places, 9)
    assert [image.width for image in found.values()] == [8, 10, 9]  # a folder's by name
    assert list(found) == [f"{tmp_path}/{name}" for name in ("one.png", "folder/three.jpg", "folder/two.png")]
    assert len(gather_images(places, 2)) == 2 and gather_images([], 2) == {}
    with pytest.raises(FileNotFoundError, match="image 'nowhere.png' does not exist"):
        gather_images(["nowhere.png"], 9)


# The form of the quick start


@pytest.fixture
def form(model, tokenizer, monkeypatch):
    """What the notebook's cell shows in JupyterLab: (function, its controls)."""
    cells = json.loads((NOTEBOOKS / "00_quickstart.ipynb").read_text(encoding="utf8"))["cells"]
    [source] = ["".join(cell["source"]) for cell in cells if "    show_form(" in "".join(cell["source"])]
    shown = []

    def interact(function, **controls):
        ipywidgets.interactive(function, **controls)  # which knows what it can make of them
        shown.append((function, controls))

    monkeypatch.setattr(ipywidgets, "interact", interact)
    monkeypatch.setattr("helpers.explain.display", lambda html: print(html.data))
    names = {"show_form": show_form, "model": model, "tokenizer": tokenizer, "texts": SENTENCES, "os": os}
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    exec(source, dict(names))
    assert not shown, "the form is in the way where there is no front end"
    monkeypatch.setenv("JPY_SESSION_NAME", "00_quickstart.ipynb")
    exec(source, dict(names))
    [found] = shown
    return found


def test_form_explains_what_is_typed_for_every_class_and_method(form, capsys):
    show, controls = form
    assert controls["text"].value == SENTENCES[0]
    assert {"predicted", "runner-up", "neutral"} <= set(controls["wanted"].options)
    assert (controls["wanted"].value, controls["method"].value) == ("", BEST)
    for method in controls["method"].options:
        show("an unbelievably <b>clever</b> film", "neutral", method)
        said = capsys.readouterr().out
        assert said.startswith("neutral: probability 0.") and said.count("<span") == 11
        assert ">unbelievably<" in said and "<b>" not in said and "&lt;" in said


@pytest.mark.parametrize(
    ("text", "wanted", "said"), [("", "", "no token"), ("a film", "bad", "'bad' is none")]
)
def test_form_says_in_one_line_what_is_wrong(form, capsys, text, wanted, said):
    form[0](text, wanted, BEST)
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == 1


# make quickstart


@pytest.mark.parametrize("text", ["", "a film", 'It\'s "not" bad: $(HOME) costs $5 & `ls` \\ ok; # 100 %'])
def test_make_hands_on_every_sentence_as_it_is(tmp_path, text):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    record = f"print(json.dumps(sys.argv[1:]), file=open({str(tmp_path / 'asked')!r}, 'a'))"
    (tmp_path / "bin/attention").write_text(f"#!{sys.executable}\nimport json, sys\n{record}\n")
    (tmp_path / "bin/attention").chmod(0o755)
    (tmp_path / "ready").touch()
    command = ["make", "--no-print-directory", "-o", f"{tmp_path}/ready", f"VENV={tmp_path}", "quickstart"]
    said = subprocess.run(
        [*command, f"TEXT={text}"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    run, report = map(json.loads, (tmp_path / "asked").read_text().splitlines())
    assert run[:3] == ["run", "--only", "00_quickstart"] and report == [
        "report",
        run[run.index("--output") + 1],
    ]
    assert ("-p" in run) == bool(text) and (not text or json.loads(run[-1]) == [text])
    assert said.stdout == f"the page: {PROJECT_ROOT}/{report[1]}/report/00_quickstart.html\n"
