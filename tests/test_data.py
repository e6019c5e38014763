"""Sentences: labels, splits that do not leak, the same rows for the same seed, and errors that name the way
out.
"""

import hashlib
import io
import subprocess
import tarfile
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from helpers import data, fetch
from helpers.data import load_sentences, load_word_ratings

COUNTS = {  # name: sentences in train, positive among them, sentences in test, positive among them
    "movies": (7988, 3961, 2053, 1020),
    "movies_short": (1716, 868, 443, 235),
    "amazon": (2224, 1368, 711, 351),
    "nyt": (2084, 808, 667, 280),
    "tweets": (2683, 1863, 661, 429),
}


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def own_set(tmp_path, monkeypatch):
    """Write rows as a local set: own_set(rows, how) -> folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    folder = tmp_path / "own"

    def write(rows, how="parquet"):
        folder.mkdir()
        rows = Dataset.from_dict(rows)
        if how == "parquet":
            rows.to_parquet(folder / "train.parquet")
            rows.to_parquet(folder / "test.parquet")
        elif how == "csv":
            rows.to_csv(folder / "test.csv")
        elif how == "one split on disk":
            rows.save_to_disk(folder)
        else:
            DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(folder)
        return str(folder)

    return write


def rated_rows(domain):
    """(document, rating, text) of every rated sentence of a domain, as the cached file has them."""
    lines = data.fetch_vader()[domain].read_text(encoding="utf8").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    return [(row_id.split("_")[0], float(rating), text.strip()) for row_id, rating, text in rows]


# VADER's sentences


@pytest.mark.parametrize("name", COUNTS)
def test_sets_have_the_same_sentences_on_every_machine(name):
    train, test = load_sentences(name, "train"), load_sentences(name, "test")
    assert (len(train), sum(train["label"]), len(test), sum(test["label"])) == COUNTS[name]


@pytest.mark.parametrize("name", ["movies", "tweets"])
def test_label_is_the_sign_of_a_rating_outside_the_neutral_band(name):
    ratings = {text: rating for _, rating, text in reversed(rated_rows(name)) if abs(rating) > 0.5}
    for split in ("train", "test"):
        rows = load_sentences(name, split)
        assert rows.column_names == ["text", "label", "rating"]
        assert rows.features["label"].names == ["negative", "positive"]
        label, rating = np.array(rows["label"]), np.array(rows["rating"])
        assert (np.abs(rating) > 0.5).all() and (np.abs(rating) <= 4).all()
        assert (label == (rating > 0)).all()
        assert rating.tolist() == [ratings[text] for text in rows["text"]]


@pytest.mark.parametrize("name", ["movies", "amazon", "nyt", "tweets"])
def test_no_text_and_no_document_is_in_both_splits(name):
    document = {text: document for document, rating, text in reversed(rated_rows(name)) if abs(rating) > 0.5}
    train, test = (list(load_sentences(name, split)["text"]) for split in ("train", "test"))
    assert not {document[text] for text in train} & {document[text] for text in test}
    assert len(set(train)) == len(train) and len(set(test)) == len(test)


def test_no_training_text_of_any_domain_is_held_out_in_any_other():
    names = ("movies", "amazon", "nyt", "tweets")
    train, test = (
        {text.casefold() for name in names for text in load_sentences(name, split)["text"]}
        for split in ("train", "test")
    )
    assert len(train) > 14_000 and not train & test


def test_short_sentences_have_at_most_15_pieces_and_the_others_more(tokenizer):
    short, every = load_sentences("movies_short")["text"], load_sentences("movies")["text"]
    pieces = {text: len(tokenizer.tokenize(text)) for text in every}
    assert {text for text in every if pieces[text] <= 15} == set(short)
    assert max(pieces[text] for text in short) == 15


def test_same_seed_draws_the_same_rows_without_replacement():
    draw = lambda seed: list(load_sentences("movies", n_samples=50, seed=seed)["text"])
    assert draw(3) == draw(3) and draw(3) != draw(4)
    assert len(set(draw(3))) == 50 and set(draw(3)) <= set(load_sentences("movies")["text"])


def test_more_samples_than_there_are_keep_all_rows_in_their_order():
    assert load_sentences("nyt", n_samples=10_000)["text"][:] == load_sentences("nyt")["text"][:]


# VADER's words


def test_words_have_the_mean_and_the_deviation_of_their_ten_ratings():
    table = load_word_ratings()
    assert table.columns.tolist() == ["rating", "deviation"] and table.index.name == "word"
    great = np.array([2, 4, 4, 4, 3, 3, 3, 3, 2, 3])
    assert table.loc["great"].tolist() == pytest.approx([great.mean(), great.std()])
    assert table.loc["horrible", "rating"] == -2.5 and table.loc["repetitive", "deviation"] > 0.6
    assert "the" not in table.index


def test_words_are_the_same_on_every_machine_each_once():
    table = load_word_ratings()
    assert len(table) == 7506 and table.index.is_unique and not table.isna().any(axis=None)
    assert table["rating"].between(-4, 4).all() and table["deviation"].between(0, 4).all()
    assert round(float(table["rating"].abs().sum()), 1) == 11583.2


def test_of_words_that_are_there_twice_the_later_entry_counts(empty_cache):
    empty_cache.mkdir()
    for domain, path in cache_paths(empty_cache).items():
        path.write_text("fine\t0\t0\t[1, 1]\nfine\t0\t0\t[2, 4]\n:D\t0\t0\t[0, 1]" * (domain == "words"))
    table = load_word_ratings()
    assert table.index.tolist() == ["fine", ":D"] and table.loc["fine"].tolist() == [3, 1]


# Sets by name or folder


@pytest.mark.parametrize("how", ["parquet", "csv", "one split on disk", "splits on disk"])
@pytest.mark.parametrize("column", ["text", "sentence"])
def test_local_folder_comes_with_the_same_columns(own_set, how, column):
    rows = load_sentences(own_set({column: ["good", "bad"], "label": [1, 0], "id": [7, 8]}, how), "test")
    assert rows.column_names == ["text", "label", "rating"]
    assert rows[0]["text"] == "good" and rows.features["label"].num_classes == 2
    assert rows[0]["label"] == 1 and np.isnan(rows[0]["rating"])


@pytest.mark.parametrize("labels", [[1, 1], [2, 1], list(range(12))])
def test_numbers_of_labels_stay_also_where_classes_are_many_or_missing(own_set, labels):
    folder = own_set({"text": [f"text {label}" for label in labels], "label": labels})
    assert load_sentences(folder)["label"][:] == labels


@pytest.mark.parametrize("how", ["parquet", "csv", "one split on disk"])
def test_names_of_labels_stay_names(own_set, how):
    rows = load_sentences(own_set({"text": ["a", "b", "c"], "label": ["pos", "neg", "pos"]}, how))
    assert rows["label"][:] == ["pos", "neg", "pos"]


def test_local_folder_can_be_cut_to_short_sentences_and_sampled(own_set):
    folder = own_set({"text": ["good " * 15, "good " * 16, "fine", ""], "label": [1, 1, 0, 0]})
    assert set(load_sentences(folder + "_short")["text"]) == {"good " * 15, "fine"}
    assert len(load_sentences(folder, n_samples=2)) == 2


@pytest.mark.parametrize("hidden", [[-1, -1], None], ids=["hidden test labels", "no test split"])
def test_validation_stands_for_a_test_split_without_labels_as_in_a_copy_of_sst2(tmp_path, hidden):
    parts = {"train": [0, 1], "validation": [1, 0], **({"test": hidden} if hidden else {})}
    for split, labels in parts.items():
        rows = {"idx": [0, 1], "sentence": [f"{split} a", f"{split} b"], "label": labels}
        features = Features(
            idx=Value("int32"), sentence=Value("string"), label=ClassLabel(names=["negative", "positive"])
        )
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"sst2/data/{split}-00000-of-00001.parquet")
    rows = load_sentences(str(tmp_path / "sst2"))
    assert rows["text"][:] == ["validation a", "validation b"] and rows["label"][:] == [1, 0]
    assert load_sentences(str(tmp_path / "sst2_short"), "train")["text"][:] == ["train a", "train b"]


def test_set_without_a_labelled_split_is_refused_by_name(tmp_path):
    Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(tmp_path / "mine/train.parquet")
    with pytest.raises(ValueError, match="mine' has no split 'test' with labels; it has train"):
        load_sentences(str(tmp_path / "mine"))


@pytest.mark.parametrize("file", ["reviews.csv", "reviews.json", "data/reviews.parquet"])
def test_single_file_without_a_split_in_its_name_is_the_test_set(tmp_path, file):
    path = tmp_path / "mine" / file
    path.parent.mkdir(parents=True)
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    getattr(rows, f"to_{path.suffix[1:]}")(path)
    assert load_sentences(str(tmp_path / "mine"))["text"][:] == ["a", "b"]
    with pytest.raises(ValueError, match="no split 'train' with labels; it has test; put a train.csv there"):
        load_sentences(str(tmp_path / "mine"), "train")


def test_file_that_is_called_train_is_no_test_set(tmp_path):
    Dataset.from_dict({"text": ["a"], "label": [1]}).to_csv(tmp_path / "train.csv")
    with pytest.raises(ValueError, match="has no split 'test' with labels; it has train"):
        load_sentences(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("test.parquet", b"PAR1 cut off"),
        ("test.json", b'{"text": ["a"'),
        ("test.csv", b'text,label\n"a,1\n'),
        ("test.csv", b"text,label\na,1\nb,0,3,4\n"),
    ],
)
def test_broken_file_is_named_with_the_remedy(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        ValueError, match=rf"{file} of set .* cannot be read \(.*\); write or download it again"
    ):
        load_sentences(str(tmp_path))


def test_folder_without_data_says_what_belongs_there(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(ValueError, match="holds no parquet, CSV or JSON files; put some there"):
        load_sentences(str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": ["a", None], "label": [1, 0]}, "rows without a text"),
        ({"text": ["a", "b"], "label": [1, None]}, "rows without a label"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, "labels that are no whole numbers"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(own_set, columns, said):
    with pytest.raises(ValueError, match=f"{said}"):
        load_sentences(own_set(columns))


def test_folder_whose_own_name_ends_in_short_is_found(own_set, tmp_path):
    Path(own_set({"text": ["good " * 20], "label": [1]})).rename(tmp_path / "my_short")
    assert len(load_sentences(str(tmp_path / "my_short"))) == 1


def test_set_without_the_needed_columns_is_refused(own_set):
    folder = own_set({"review": ["good"], "label": [1]})
    with pytest.raises(ValueError, match=r"has columns \['review', 'label'\], but \['text'\] is needed"):
        load_sentences(folder)


@pytest.mark.parametrize(
    ("name", "near"), [("movie", "movies"), ("Movies", "movies"), ("sst-2", "sst2"), ("imbd", "imdb")]
)
def test_unknown_set_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"set '{name}' is unknown; did you mean '{near}'"):
        load_sentences(name)


def test_name_near_to_nothing_lists_all_sets():
    with pytest.raises(
        ValueError, match="set 'q' is unknown; use one of movies, amazon, nyt, tweets, movies_short"
    ):
        load_sentences("q")


@pytest.mark.parametrize("split", ["validation", "Test", ""])
def test_unknown_split_is_refused(split):
    with pytest.raises(ValueError, match=f"split '{split}' is unknown; use 'train' or 'test'"):
        load_sentences("movies", split)


@pytest.mark.parametrize("n_samples", [0, -3])
def test_fewer_samples_than_one_are_refused(n_samples):
    with pytest.raises(ValueError, match=f"n_samples must be at least 1, not {n_samples}"):
        load_sentences("movies", n_samples=n_samples)


@pytest.mark.parametrize("name", ["sst2", "sst2_short", "nobody/no-such-set"])
def test_hub_set_without_a_network_says_to_pass_a_local_folder(name):
    with pytest.raises(ConnectionError, match=f"set '{name.removesuffix('_short')}' .*pass a local folder"):
        load_sentences(name)


# Fetching


def test_pip_is_asked_for_one_version_with_its_hash(empty_cache, monkeypatch):
    asked = []

    def pip(command, **options):
        asked.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1, "", "no index")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(ConnectionError, match="could not fetch vaderSentiment==3.3.2.*: no index$"):
        data.fetch_vader()
    [(command, requirement)] = asked
    assert "--require-hashes" in command and "--no-deps" in command
    assert requirement.split() == ["vaderSentiment==3.3.2", f"--hash=sha256:{data.VADER_SHA256}"]
    assert not empty_cache.exists()


def test_archive_that_pip_rejects_names_the_expected_hash(empty_cache, monkeypatch):
    result = subprocess.CompletedProcess([], 1, "", "THESE PACKAGES DO NOT MATCH THE HASHES\n  Got 1234")
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, **options: result)
    with pytest.raises(ValueError, match=f"differs from the expected {data.VADER_SHA256}:\n.*\n  Got 1234"):
        data.fetch_vader()
    assert not empty_cache.exists()


def test_tampered_archive_names_both_hashes_and_leaves_nothing(empty_cache, monkeypatch):
    content = b"not the archive"

    def pip(command, **options):
        Path(command[command.index("--dest") + 1], "vaderSentiment-3.3.2.tar.gz").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=f"has SHA-256 {found}, expected {data.VADER_SHA256}"):
        data.fetch_vader()
    assert not empty_cache.exists()


def pack(members, mode="w:gz"):
    """Return the bytes of a tar archive of {name: bytes}."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def small_archive(tmp_path):
    """An archive laid out like VADER's, a word in each file, with files that nobody asked for."""
    members = {
        f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": stem.encode() for stem in data.VADER_MEMBERS.values()
    }
    outer = {"setup.py": b"raise SystemExit", data.VADER_LEXICON: b"words"}
    inner = pack({**members, "hutto_ICWSM_2014/other.txt": b"other", "../escape.txt": b"escape"})
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(pack({**outer, data.VADER_RESOURCES: inner}))
    return archive


def cache_paths(folder):
    paths = {domain: folder / f"{stem}_GroundTruth.txt" for domain, stem in data.VADER_MEMBERS.items()}
    return {**paths, "words": folder / "vader_lexicon.txt"}


CONTENTS = {**data.VADER_MEMBERS, "words": "words"}  # of the small archive's files


def test_only_the_named_members_are_extracted(small_archive, empty_cache):
    paths = cache_paths(empty_cache)
    data.extract_vader(small_archive, paths)
    assert {path: path.read_text() for path in empty_cache.iterdir()} == {
        path: CONTENTS[name] for name, path in paths.items()
    }
    assert not list(empty_cache.parent.glob("**/escape.txt"))


def test_interrupted_extraction_leaves_no_half_file_that_counts_as_fetched(
    small_archive, empty_cache, monkeypatch
):
    def interrupted(source, target):
        target.write(source.read(3))
        raise KeyboardInterrupt

    paths = cache_paths(empty_cache)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.shutil, "copyfileobj", interrupted)
        data.extract_vader(small_archive, paths)
    assert not any(path.exists() for path in paths.values())
    data.extract_vader(small_archive, paths)
    assert [path.read_text() for path in paths.values()] == list(CONTENTS.values())


def test_fetched_files_are_used_again_without_pip(monkeypatch):
    data.fetch_vader()
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **options: pytest.fail("pip was called"))
    assert set(data.fetch_vader()) == {"movies", "amazon", "nyt", "tweets", "words"}


def test_cache_from_before_the_words_were_read_is_completed(small_archive, empty_cache, monkeypatch):
    earlier = cache_paths(empty_cache)
    words = earlier.pop("words")
    data.extract_vader(small_archive, earlier)

    @contextmanager
    def fetched(*args):
        yield small_archive

    monkeypatch.setattr(data, "fetched_archive", fetched)
    assert data.fetch_vader()["words"] == words and words.read_text() == "words"
