"""One call explains by name, the class and its rival are what the logits say, a form explains at once."""

import json
import os
import re
import subprocess
import sys

import ipywidgets
import numpy as np
import pytest
import torch
from conftest import SENTENCES
from PIL import Image

from helpers.attention import read_attention
from helpers.concept_world import draw_scenes
from helpers.explain import BEST, METHODS, decide, describe_reference, explain, gather_images, show_form
from helpers.images import patch_players
from helpers.paths import PROJECT_ROOT
from helpers.relevance import gradient_times_input, reference_logits
from helpers.shapley import best_attention_game, shapley_attributions
from helpers.text import encode, token_players
from workflow.execute import complete_notebook
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


def test_the_reference_is_named_with_its_class_for_the_method_that_has_one(model, inputs, tokenizer):
    """Words whose embeddings are the average by hand have the logits that the lines are told from."""
    players, names = token_players(inputs, tokenizer), [f"text {row}" for row in range(len(SENTENCES))]
    table = model.get_input_embeddings().weight
    embeddings = torch.where(players[..., None], table.mean(0), table[inputs["input_ids"]])
    by_hand = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits.softmax(-1)
    called = by_hand.argmax(-1)
    others = (called + 1) % 3
    labels = model.config.id2label
    lines = describe_reference(model, inputs, players, others, BEST, names)
    assert sum(line.split(":")[0].count("text") for line in lines) == len(SENTENCES)
    for row, name in enumerate(names):
        [line] = [line for line in lines if name in line.split(":")[0]]
        assert f"average words, which this model calls {labels[int(called[row])]} (" in line
        assert f", not {labels[int(others[row])]} (" in line and "already" not in line
        shares = [float(share) for share in re.findall(r"\d\.\d\d", line)]
        assert min(shares) - 0.006 < by_hand[row, called[row]] < max(shares) + 0.006
    alone = describe_reference(model, inputs, players, called, BEST, names)
    assert all("already calls" in line and "moves the decision away from it" in line for line in alone)
    one = {name: part[:1] for name, part in inputs.items()}
    [line] = describe_reference(model, one, players[:1], others[:1])
    first, second = (f"{by_hand[0, at[0]]:.2f}" for at in (called, others))
    assert line == (
        f"text 0: compared with average words, which this model calls {labels[int(called[0])]} ({first}), "
        f"not {labels[int(others[0])]} ({second})."
    )
    assert [describe_reference(model, inputs, players, called, m) for m in METHODS[1:]] == [[]] * 7


def test_the_reference_of_an_image_is_its_average_patch(image_model):
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    players = patch_players(image_model, inputs)
    hook = image_model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.mean(1, keepdim=True).expand_as(output)
    )
    by_hand = image_model(**inputs).logits
    hook.remove()
    torch.testing.assert_close(reference_logits(image_model, inputs, players), by_hand)
    found = describe_reference(
        image_model, inputs, players, by_hand.argmax(-1), BEST, ["one.png", "my/two.png"]
    )
    assert "average patches" in found[0] and "one.png" in found[0] and "two.png" in found[-1]
    assert "my/" not in found[-1]
    assert not image_model.get_input_embeddings()._forward_hooks


def test_images_of_files_and_folders(tmp_path):
    (tmp_path / "folder").mkdir()
    for number, name in enumerate(("one.png", "folder/two.png", "folder/three.jpg")):
        Image.new("RGB", (8 + number, 8), "red").save(tmp_path / name)
    places = [f"{tmp_path}/one.png", f"{tmp_path}/folder/"]
    found, notes = gather_images(places, 9)
    assert [image.width for image in found.values()] == [8, 10, 9]  # a folder's by name
    assert list(found) == [f"{tmp_path}/{name}" for name in ("one.png", "folder/three.jpg", "folder/two.png")]
    assert not notes and gather_images([], 2) == ({}, [])
    (tmp_path / "folder/.hidden").touch()
    shown, notes = gather_images([*places, places[0]], 2)
    assert len(shown) == 2 and notes == ["2 of 3 files are shown and used; `n_images` says how many."]
    assert len(gather_images(places, 3)[0]) == 3 and not gather_images(places, 3)[1]
    with pytest.raises(FileNotFoundError, match="image 'nowhere.png' does not exist"):
        gather_images(["nowhere.png"], 9)


@pytest.mark.parametrize("n_images", [0, -1, "many", 2.0, True])
@pytest.mark.parametrize("places", [[], ["folder"], ["one.png"]])
def test_a_number_of_images_that_is_none_is_refused_by_its_name(places, n_images):
    with pytest.raises(ValueError, match=f"n_images must be a whole number from 1, not {n_images!r}"):
        gather_images(places, n_images)


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
        assert said.count("colours: compared with average words, which this model ") == (method == BEST)
        assert "\n\n" not in said


@pytest.mark.parametrize(
    ("text", "wanted", "said"), [("", "", "no token"), ("a film", "bad", "'bad' is none")]
)
def test_form_says_in_one_line_what_is_wrong(form, capsys, text, wanted, said):
    form[0](text, wanted, BEST)
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == 1


# make quickstart


@pytest.fixture
def make_quickstart(tmp_path, monkeypatch):
    """Run the target with an `attention` that records what it is asked: (what make says, the records)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    record = f"print(json.dumps(sys.argv[1:]), file=open({str(tmp_path / 'asked')!r}, 'a'))"
    (tmp_path / "bin/attention").write_text(f"#!{sys.executable}\nimport json, sys\n{record}\n")
    (tmp_path / "bin/attention").chmod(0o755)
    (tmp_path / "ready").touch()
    (tmp_path / "asked").touch()
    command = ["make", "--no-print-directory", "-o", f"{tmp_path}/ready", f"VENV={tmp_path}", "quickstart"]
    monkeypatch.delenv("TEXT", raising=False)

    def made(*given):
        said = subprocess.run([*command, *given], cwd=PROJECT_ROOT, capture_output=True, text=True)
        return said, list(map(json.loads, (tmp_path / "asked").read_text().splitlines()))

    return made


PAGE = f"the page: {PROJECT_ROOT}/runs/quickstart/report/00_quickstart.html\n"


@pytest.mark.parametrize("text", ["a film", 'It\'s "not" bad: $(HOME) costs $5 & `ls` \\ ok; # 100 %'])
def test_make_hands_on_every_sentence_as_it_is(make_quickstart, text):
    said, (run, report) = make_quickstart(f"TEXT={text}")
    assert run[:3] == ["run", "--only", "00_quickstart"] and json.loads(run[-1]) == [text]
    assert report == ["report", run[run.index("--output") + 1]] == ["report", "runs/quickstart"]
    assert (said.returncode, said.stdout) == (0, PAGE)


def test_make_without_a_sentence_says_that_the_examples_are_explained(make_quickstart):
    said, (run, report) = make_quickstart()
    assert "-p" not in run and report[0] == "report"
    assert said.stdout == f"no TEXT: the two example sentences are explained\n{PAGE}"


@pytest.mark.parametrize("text", ["", "   ", "\t\n "])
@pytest.mark.parametrize("by_environment", [True, False])
def test_make_refuses_a_blank_sentence_before_anything_runs(
    make_quickstart, monkeypatch, text, by_environment
):
    if by_environment:
        monkeypatch.setenv("TEXT", text)
    said, asked = make_quickstart(*([] if by_environment else [f"TEXT={text}"]))
    assert said.returncode and not asked and 'TEXT is blank; make quickstart TEXT="your ' in said.stderr


@pytest.mark.slow
def test_quick_start_says_what_of_several_images_it_shows_and_scores(tmp_path):
    scenes = draw_scenes(3, 0, ["zebra", "van", "zebra"], size=112).images
    places = [f"{tmp_path}/{number}.png" for number in range(3)]
    for place, scene in zip(places, scenes, strict=True):
        Image.fromarray(np.asarray(scene)).save(place)
    own = {"images": places, "n_images": 2, "n_concept": 8, "n_random": 9}
    complete_notebook("00_quickstart", own, tmp_path)
    cells = json.loads((tmp_path / "notebooks/00_quickstart.ipynb").read_text(encoding="utf8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "data" in output]
    said = "\n".join("".join(output["data"].get("text/markdown", "")) for output in outputs)
    assert "text 0: compared with average words, which this model calls " in said
    assert "0.png" in said and ": compared with average patches, which this model " in said
    assert "2 of 3 files are shown" in said and "on 1 of 2 images, those with this class, " in said
