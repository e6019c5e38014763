"""Batches that fit into memory, the cost of passes, and one line that says where a run happened."""

import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from importlib.metadata import version

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm


@dataclass
class Cost:
    """Seconds of a block of code, the part of them inside forward passes, and the inputs passed each way."""

    seconds: float = 0.0
    forward_seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


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


@contextmanager
def measure_cost(model: torch.nn.Module):
    """Measure the enclosed block: seconds, and how many inputs went forward and backward through `model`.

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


def _is_lack_of_memory(error: Exception) -> bool:
    """Tell whether an error is a lack of memory, by accelerate or in a form that it does not know."""
    known = isinstance(error, MemoryError) or should_reduce_batch_size(error)
    return known or any(part in str(error) for part in ("out of memory", "STATUS_ALLOC_FAILED"))
