"""The recipe of the paper's images names what is broken, and leaves out what is no image."""

import io
import json

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from PIL import Image


def picture(shade):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def textures(tmp_path):
    """A set of four images, of which one is none."""
    contents = [picture(1), b"no image", picture(2), picture(3)[:50]]
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0, 0, 1, 0]}
    features = Features(image=datasets.Image(), label=ClassLabel(names=["striped", "dotted"]))
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "data/train-00000-of-00002.parquet")
    return tmp_path


def test_row_that_is_no_whole_image_is_left_out_with_a_note(recipe, textures, capsys):
    found = list(recipe.read_set(str(textures), {"striped": 3, "dotted": 1}))
    assert found == [("striped", picture(1)), ("dotted", picture(2))]
    said = capsys.readouterr().err
    assert all(f"row {row} of {textures} is no whole image; skipped\n" in said for row in (1, 3))


def test_file_that_is_no_image_is_left_out_with_a_note(recipe, tmp_path, capsys):
    (tmp_path / "zebra").mkdir()
    for name, content in (
        ("a.png", picture(1)),
        ("Thumbs.db", b"?"),
        (".DS_Store", b"?"),
        ("b.png", picture(2)),
    ):
        (tmp_path / "zebra" / name).write_bytes(content)
    found = list(recipe.read_folders(tmp_path, {"zebra": 2}))
    assert found == [("zebra", picture(1)), ("zebra", picture(2))]
    assert capsys.readouterr().err == f"{tmp_path}/zebra/Thumbs.db is no whole image; skipped\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [("data/train-00001-of-00002.parquet", b"PAR1 cut off"), ("data/train-00000-of-00001.parquet", b"")],
)
def test_broken_parquet_is_named_with_the_way_out(recipe, textures, name, content):
    (textures / name).write_bytes(content)
    said = f"^{textures} cannot be read: {name} is broken; replace or remove it$"
    with pytest.raises(ValueError, match=said):
        list(recipe.read_set(str(textures), {"striped": 30}))


@pytest.mark.parametrize("name", ["zebra/metadata.jsonl", "train.json"])
def test_broken_json_is_named_with_the_way_out(recipe, tmp_path, name):
    (tmp_path / "zebra").mkdir()
    (tmp_path / name).write_text(json.dumps({"image": 1})[:-3])
    if name.startswith("zebra"):
        (tmp_path / "zebra/a.png").write_bytes(picture(1))
    with pytest.raises(ValueError, match=f"cannot be read: {name} is broken; replace or remove it$"):
        list(recipe.read_set(str(tmp_path), {"striped": 1}))


def test_set_without_the_columns_is_refused(recipe, tmp_path):
    Dataset.from_dict({"picture": [1], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        ValueError,
        match=r"cannot be read: it needs the columns image and label, and has \['picture', 'label'\]",
    ):
        list(recipe.read_set(str(tmp_path), {"striped": 1}))
