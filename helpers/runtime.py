"""Where a run happens and what it leaves behind: paths, device, batches that fit, cost of passes, files."""

import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from helpers.places import PROJECT_ROOT, project_path  # noqa: F401


def resolve_device(device: str = "auto") -> torch.device:
    """Turn "auto" into the best device at hand, or check that the named one ("cpu", "cuda:0", "mps") exists.

    Raises ValueError for a device that torch does not know or that this machine does not have.
    """
    if device == "auto":
        return (
            torch.accelerator.current_accelerator()
            if torch.accelerator.is_available()
            else torch.device("cpu")
        )
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available here; use 'auto' or 'cpu'") from error


def describe_run(*packages: str) -> str:
    """Return one line that names the hardware and the versions of python and of `packages`."""
    accelerator = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads"
    )
    names = " · ".join(f"{package} {version(package)}" for package in packages)
    return f"{platform.machine()}, {accelerator} · python {platform.python_version()} · {names}"


def in_batches(
    step: Callable, items: Sequence, size: int, weight: Callable | None = None, desc: str | None = None
) -> Iterator[tuple]:
    """Yield (batch, step(batch)) over slices of `items`, in smaller ones from where memory runs out.

    size    of a batch: so many items, or so much of their weight
    weight  weight(item) of an item, of which none after it in the list has more; None for 1 each
    desc    title of a progress bar; None for no bar

    A batch that does not fit is halved, with a warning, and the size stays halved. What was yielded is not
    computed again. Raises the out-of-memory error where not even one item fits, ValueError for a size below
    1.
    """
    if size < 1:
        raise ValueError(f"a batch needs room for one input or more, not {size}")
    start = 0
    with tqdm(total=len(items), desc=desc, disable=desc is None, leave=False) as bar:
        while start < len(items):
            each = weight(items[start]) if weight else 1
            batch = items[start : start + max(1, size // each)]
            try:
                result = step(batch)
            except (RuntimeError, MemoryError) as error:
                if not _is_lack_of_memory(error):
                    raise
                if len(batch) == 1:
                    error.add_note(
                        "not even one input fits; shorten it, or use device='cpu' or precision='bfloat16'"
                    )
                    raise
                size = len(batch) // 2 * each
            else:
                yield batch, result
                start += len(batch)
                bar.update(len(batch))
                continue
            clear_device_cache(garbage_collection=True)  # here the failed batch is not referred to any more
            warnings.warn(
                f"{len(batch)} inputs at a time do not fit into memory; going on with {size // each}",
                stacklevel=2,
            )


@dataclass
class Cost:
    """Seconds of a block of code, the part of them inside forward passes, and the inputs passed each way."""

    seconds: float = 0.0
    forward_seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@contextmanager
def measure_cost(model: torch.nn.Module):
    """Measure the enclosed block: wall-clock seconds, and how many inputs went forward and backward through
    `model`.

    Yields a Cost, complete when the block ends. A batch of 8 counts as 8 forwards.
    """
    device = next(model.parameters()).device

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    cost = Cost()
    started = []

    def before(module, args, kwargs):
        started.append(now())

    def after(module, args, kwargs, output):
        cost.forward_seconds += now() - started.pop()
        cost.forwards += len(output.logits)
        if output.logits.requires_grad:
            output.logits.register_hook(count_backward)

    def count_backward(gradient):
        cost.backwards += len(gradient)

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    start = now()
    try:
        yield cost
    finally:
        cost.seconds = now() - start
        for hook in hooks:
            hook.remove()


def save_figure(figure, folder: Path, name: str) -> None:
    """Write `figure` as PNG for reading and PDF for print into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", bbox_inches="tight", metadata={"CreationDate": None})


def save_table(table, folder: Path, name: str) -> None:
    """Write a DataFrame as CSV into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", float_format="%.6g")


def save_records(records, folder: Path, name: str) -> None:
    """Write a DataFrame with one line an input, or a token, to `folder`/results/`name`.parquet for other
    notebooks.
    """
    path = folder / "results" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    records.to_parquet(path, index=False, compression="zstd")


def load_records(folder: Path, name: str):
    """Read what `save_records` wrote. Raises FileNotFoundError that says which notebook makes it."""
    return pd.read_parquet(_made_by(name, folder / "results" / f"{name}.parquet"))


def save_results(results: dict, folder: Path, name: str) -> Path:
    """Write the headline numbers of a notebook to `folder`/results/`name`.json and return that path."""
    path = folder / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf8")
    return path


def load_results(folder: Path, name: str, **expected) -> dict:
    """Read the headline numbers of a notebook, made with the `expected` parameters.

    Raises FileNotFoundError where the notebook has not run into `folder`, ValueError where it ran with other
    parameters; both say how to make them.
    """
    path = _made_by(name, folder / "results" / f"{name}.json")
    results = json.loads(path.read_text(encoding="utf8"))
    differing = {key: value for key, value in expected.items() if results.get(key) != value}
    if differing:
        found = ", ".join(f"{key} {results.get(key)!r} and not {value!r}" for key, value in differing.items())
        raise ValueError(
            f"{path.name} was made with {found}; run {name} and this notebook with the same parameters"
        )
    return results


def _is_lack_of_memory(error: Exception) -> bool:
    """Tell whether accelerate takes an error for a lack of memory, or it is a form that accelerate does not
    know.
    """
    known = isinstance(error, MemoryError) or should_reduce_batch_size(error)
    return known or any(part in str(error) for part in ("out of memory", "STATUS_ALLOC_FAILED"))


def _made_by(name: str, path: Path) -> Path:
    """Return the path of a result if it is there; `name` starts with the number of the notebook that makes
    it.
    """
    if not path.exists():
        [notebook] = [file.stem for file in sorted((PROJECT_ROOT / "notebooks").glob(f"{name[:2]}_*.ipynb"))]
        raise FileNotFoundError(
            f"{path.name} is not in {path.parent.parent.name}/results; notebook {notebook} makes it: "
            f"`python -m helpers.pipeline run --only {notebook}` with the profile and --output of this run"
        )
    return path
