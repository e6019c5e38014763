"""Folders of images are read in order, what cannot be read is said."""

import warnings

import pytest
from PIL import Image
from transformers import BitImageProcessor, ViTImageProcessorPil

from helpers.images import check_folders, input_size, load_image_folder


@pytest.fixture
def folder(tmp_path):
    for name in ("dotted", "striped"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("L" if number else "RGBA", (8 + number, 8), number).save(
                tmp_path / name / f"{number}.png"
            )
    (tmp_path / "striped" / ".DS_Store").write_text("hidden")
    return tmp_path


def test_image_folders_are_read_in_order(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load_image_folder(folder)
    assert list(images) == ["dotted", "striped"]
    assert [image.size[0] for image in images["striped"]] == [8, 9, 10, 11, 12, 13]
    assert {image.mode for image in images["striped"]} == {"RGB"}
    assert len(load_image_folder(folder, max_images=5)["dotted"]) == 5


def test_unreadable_files_are_named_skipped_and_counted(folder):
    content = (folder / "striped" / "1.png").read_bytes()
    (folder / "striped" / "1.png").write_bytes(content[: len(content) // 2])
    (folder / "striped" / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match=r"'striped': skipped 2 unreadable files \(1.png, notes.txt\)"):
        assert len(load_image_folder(folder)["striped"]) == 5
    with pytest.raises(
        ValueError, match=r"'striped' has 5 images and needs at least 6 beside 2 unreadable files \(1.png"
    ):
        load_image_folder(folder, min_images=6)


def test_fewer_images_than_are_needed_cannot_be_asked_for(folder):
    with pytest.raises(
        ValueError, match="at least 5 images of each folder are needed, more than the 2 asked for"
    ):
        load_image_folder(folder, max_images=2)


def test_missing_or_flat_folders_are_refused(folder):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_image_folder(folder / "nowhere")
    with pytest.raises(ValueError, match="striped/<name>"):
        load_image_folder(folder / "striped")


def test_names_that_are_not_asked_for_are_not_read(folder):
    (folder / "broken").mkdir()
    (folder / "broken" / "0.png").write_text("no image, and too few of them")
    assert list(load_image_folder(folder, names=["striped", "nowhere"])) == ["striped"]
    with pytest.raises(ValueError, match="'broken' has 0 images"):
        load_image_folder(folder)


def test_folders_that_are_missing_are_told_with_those_that_are_there(tmp_path):
    for name in ("boxy", "roundish", ".hidden"):
        (tmp_path / name).mkdir()
    check_folders(tmp_path, ["boxy"], "concepts", "concepts_dir")
    said = "concepts names striped, dotted, but concepts_dir '.*' has no .* it has boxy, roundish: name these"
    with pytest.raises(ValueError, match=said):
        check_folders(tmp_path, ["striped", "boxy", "dotted"], "concepts", "concepts_dir")
    with pytest.raises(ValueError, match="holds no folders"):
        check_folders(tmp_path / "boxy", ["striped"], "concepts", "concepts_dir")


def test_the_size_that_a_processor_gives_is_the_crop_s_or_the_square_s():
    assert input_size(ViTImageProcessorPil(size={"height": 112, "width": 112})) == 112
    assert (
        input_size(BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}))
        == 224
    )
    with pytest.raises(ValueError, match="set one side in pixels"):
        input_size(ViTImageProcessorPil(size={"height": 96, "width": 112}))
