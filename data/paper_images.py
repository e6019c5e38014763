"""Gather the images of the paper's study of concepts, once, into the folders that the paper profile names.

    python data/paper_images.py                                  from the hub; its ImageNet asks for `hf auth
                                                                 login`
    python data/paper_images.py --classes my/imagenet/train      from a copy of ImageNet, in folders
    n02391049/*.JPEG

Textures are of DTD (Cimpoi et al. 2014), classes of ImageNet (Russakovsky et al. 2015), flat colours are
drawn. The hub's ImageNet is read in order until every class has enough images, about a quarter of it. Folders
that are there are kept.
"""

import io
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import datasets
import pyarrow.parquet
from PIL import Image
from tqdm import tqdm

from helpers.concept_world import draw_concept_images
from helpers.paths import local_folder, project_path
from workflow.front import one_line_errors

TEXTURES = {name: name for name in ("striped", "dotted", "zigzagged")}  # folder: the label in the set
CLASSES = {"zebra": "zebra", "dalmatian": "dalmatian", "dog sled": "dogsled", "fire engine": "fire engine"}
CONCEPT_CLASSES = {"siberian_husky": "Siberian husky", "zebra": "zebra", "corgi": "Pembroke"}
COLOURS = ("red", "blue", "green", "yellow")
WORDNET = {  # of the labels above, as ImageNet's own folders are named
    "zebra": "n02391049",
    "dalmatian": "n02110341",
    "dogsled": "n03218198",
    "fire engine": "n03345487",
    "Siberian husky": "n02110185",
    "Pembroke": "n02113023",
}


def numbers_of(source: str, feature, labels) -> dict[int, str]:
    """Return {class number: label}; a class may go by a synonym between the commas of its name, or by its
    WordNet id.
    """
    found = {}
    for number, name in enumerate(feature.names):
        synonyms = {part.strip().lower().replace("_", " ") for part in (name, *name.split(","))}
        for label in labels:
            if synonyms & {label.lower(), WORDNET.get(label)}:
                found[number] = label
    if missing := sorted(set(labels) - set(found.values())):
        raise click.UsageError(
            f"{source} has no class {', '.join(missing)}; it has {', '.join(feature.names[:10])}, ..."
        )
    return found


def read_set(source: str, counts: dict[str, int]) -> Iterator[tuple[str, bytes]]:
    """Yield (label, file) of a set with the columns image and label, split by split, until each label has its
    count.
    """
    left = dict(counts)
    with tqdm(total=sum(left.values()), desc=source, unit="image") as bar, named_in_errors(source):
        for rows in datasets.load_dataset(source, streaming=True).values():
            if not {"image", "label"} <= set(columns := rows.column_names or []):
                raise ValueError(f"it needs the columns image and label, and has {columns}")
            known = numbers_of(source, rows.features["label"], left)
            for number, row in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
                label = known.get(row["label"])
                if not left.get(label, 0):
                    continue
                content = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
                if is_image(content, f"row {number} of {source}"):
                    left[label] -= 1
                    bar.update()
                    yield label, content
                if not any(left.values()):
                    return


@contextmanager
def named_in_errors(source: str):
    """Turn the error of a set that cannot be read into one that names its broken files, and the way out."""
    try:
        yield
    except (ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        broken = ", ".join(broken_files(Path(source)))
        said = f"{broken} is broken; replace or remove it" if broken else str(error)
        raise ValueError(f"{source} cannot be read: {said}") from error


def broken_files(folder: Path) -> Iterator[str]:
    """Yield the paths of a folder's parquet and JSON files that cannot be read."""
    for path in sorted(folder.rglob("*") if folder.is_dir() else ()):
        try:
            if path.suffix == ".parquet":
                pyarrow.parquet.read_metadata(path)
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".jsonl":
                list(map(json.loads, path.read_bytes().splitlines()))
        except (ValueError, OSError):
            yield path.relative_to(folder).as_posix()


def is_image(content: bytes, name: str) -> bool:
    """Return whether this is a whole image; if not, say that it is skipped."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        tqdm.write(f"{name} is no whole image; skipped", file=sys.stderr)
        return False
    return True


def folder_names(label: str) -> list[str]:
    return list(dict.fromkeys([label, label.replace(" ", "_"), WORDNET.get(label, label)]))


def read_folders(folder: Path, counts: dict[str, int]) -> Iterator[tuple[str, bytes]]:
    """Yield (label, file) from folders that are named by label or WordNet id."""
    for label, count in counts.items():
        named = [folder / name for name in folder_names(label)]
        found = [path for path in named if path.is_dir()]
        if not found:
            raise click.UsageError(f"{folder} has no folder {' or '.join(folder_names(label))}")
        files = sorted(path for path in found[0].iterdir() if path.is_file() and path.name[0] != ".")
        images = ((label, path.read_bytes()) for path in files if is_image(path.read_bytes(), str(path)))
        yield from itertools.islice(images, count)


def gather(source: str, wanted: list[tuple[Path, str, int]]) -> None:
    """Fill folders (folder, label, images) from a set; folders of one label get different images."""
    missing = dict.fromkeys(label for folder, label, _ in wanted if not folder.is_dir())
    if not missing:
        return
    wanted = [(folder, label, count) for folder, label, count in wanted if label in missing]
    counts = {label: sum(count for _, other, count in wanted if other == label) for label in missing}
    tree = local_folder(source)
    is_tree = tree and any((tree / name).is_dir() for label in counts for name in folder_names(label))
    files = {label: [] for label in counts}
    for label, content in read_folders(tree, counts) if is_tree else read_set(str(tree or source), counts):
        files[label].append(content)
    for folder, label, count in wanted:  # a folder that is there already keeps its share, and its images
        taken, files[label] = files[label][:count], files[label][count:]
        if len(taken) < count:
            click.echo(
                f"{source} has {len(taken)} images of {label} left for {folder.name}, {count} were asked for"
            )
        save(folder, taken, "jpg")


def save(folder: Path, files: list[bytes], suffix: str) -> None:
    """Write a folder of images that appears when all of them are in it, unless it is there already."""
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for number, content in enumerate(files):
            (unfinished / f"{number:04d}.{suffix}").write_bytes(content)
        unfinished.rename(folder)


def as_png(image) -> bytes:
    """Return an image (height, width, 3) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@click.command(help=__doc__)
@click.option("--textures", default="tanganke/dtd", show_default=True, help="hub id or folder")
@click.option("--classes", default="ILSVRC/imagenet-1k", show_default=True, help="hub id or folder")
@click.option("--n-concept", default=120, show_default=True, help="images of each concept")
@click.option(
    "--n-target",
    default=200,
    show_default=True,
    help="images of each explained class, others than the concepts'",
)
@click.option(
    "--output", default="data/cache/paper", show_default=True, help="folder, below the project root"
)
def main(textures: str, classes: str, n_concept: int, n_target: int, output: str) -> None:
    with one_line_errors():
        concepts, targets = project_path(output) / "concepts", project_path(output) / "targets"
        for colour in COLOURS:
            save(
                concepts / colour, [as_png(image) for image in draw_concept_images(colour, n_concept)], "png"
            )
        gather(textures, [(concepts / name, label, n_concept) for name, label in TEXTURES.items()])
        wanted = [(targets / name, label, n_target) for name, label in CLASSES.items()]
        gather(
            classes, wanted + [(concepts / name, label, n_concept) for name, label in CONCEPT_CLASSES.items()]
        )
        for folder in sorted([*concepts.iterdir(), *targets.iterdir()]):
            click.echo(f"{folder.parent.name}/{folder.name}: {len(list(folder.iterdir()))} images")


if __name__ == "__main__":
    main()
