"""Passes are counted as they happen, and what a run leaves behind is readable."""

import time
import weakref

import pytest
import torch
from conftest import SENTENCES

from helpers import models, runtime
from helpers.attention import read_attention
from helpers.models import fast_attention
from helpers.text import encode


@pytest.mark.parametrize(("gradients", "backwards"), [(False, 0), (True, 3)])
def test_reading_attention_costs_one_forward_and_at_most_one_backward_an_input(
    model, tokenizer, gradients, backwards
):
    inputs = encode(SENTENCES, tokenizer, model)
    with runtime.measure_cost(model) as cost:
        read_attention(model, inputs, gradients=gradients)
    assert (cost.forwards, cost.backwards) == (3, backwards)
    assert 0 < cost.forward_seconds < cost.seconds


def test_passes_are_counted_only_inside_the_block_and_under_inference_mode(model, tokenizer):
    inputs = encode(SENTENCES[:1], tokenizer, model)
    model(**inputs)
    with torch.inference_mode(), fast_attention(model), runtime.measure_cost(model) as cost:
        model(**inputs)
        model(**inputs)
    model(**inputs)
    assert (cost.forwards, cost.backwards) == (2, 0)


def test_seconds_are_wall_clock_and_stand_also_after_an_error(model):
    with pytest.raises(KeyError), runtime.measure_cost(model) as cost:
        time.sleep(0.02)
        raise KeyError
    assert 0.02 <= cost.seconds < 1 and not model._forward_hooks and not model._forward_pre_hooks


# Batches


def full_above(limit, weights=None, error=None):
    """Return a step that has room for so much, and the list of the batches that it was given."""
    given, error = [], error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def step(batch):
        given.append(list(batch))
        if sum(weights[item] if weights else 1 for item in batch) > limit:
            raise error
        return [10 * item for item in batch]

    return step, given


def test_batches_are_slices_in_order_and_the_rest_comes_last():
    step, given = full_above(100)
    assert list(runtime.in_batches(step, list(range(7)), 3)) == [
        ([0, 1, 2], [0, 10, 20]),
        ([3, 4, 5], [30, 40, 50]),
        ([6], [60]),
    ]
    assert given == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch for batch, _ in runtime.in_batches(step, range(4), 3)] == [range(3), range(3, 4)]
    assert not list(runtime.in_batches(step, [], 3))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 9"
        ),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_batch_that_does_not_fit_is_halved_with_a_note_and_nothing_done_is_repeated(error):
    step, given = full_above(2, error=error)
    with pytest.warns(UserWarning, match="inputs at a time do not fit into memory; going on with") as notes:
        found = [value for _, values in runtime.in_batches(step, list(range(9)), 8) for value in values]
    assert found == list(range(0, 90, 10))
    assert given == [list(range(8)), [0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert [str(note.message)[:1] + str(note.message)[-1:] for note in notes] == ["84", "42"]


def test_weighted_batches_hold_no_more_than_the_size_and_halve_it_for_good():
    weights = dict(enumerate([6, 6, 6, 3, 3, 2, 1, 1, 1, 1]))
    step, given = full_above(100, weights)
    list(runtime.in_batches(step, list(weights), 12, weights.get))
    assert given == [[0, 1], [2, 3], [4, 5, 6, 7], [8, 9]]
    step, given = full_above(6, weights)
    with pytest.warns(UserWarning, match="^2 inputs at a time do not fit into memory; going on with 1$"):
        list(runtime.in_batches(step, list(weights), 12, weights.get))
    assert given == [[0, 1], [0], [1], [2], [3, 4], [5, 6, 7], [8, 9]]


def test_one_input_that_does_not_fit_is_an_error_that_says_what_to_do():
    step, _ = full_above(0)
    with pytest.raises(torch.OutOfMemoryError) as error, pytest.warns(UserWarning):
        list(runtime.in_batches(step, [1, 2], 2))
    assert error.value.__notes__ == [
        "not even one input fits; shorten it, or use device='cpu' or precision='bfloat16'"
    ]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    step, given = full_above(0, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(runtime.in_batches(step, [1, 2], 2))
    assert given == [[1, 2]]


def test_size_without_room_for_one_input_is_refused():
    with pytest.raises(ValueError, match="room for one input or more, not 0"):
        list(runtime.in_batches(list, [1], 0))


def test_tensors_of_the_failed_batch_are_let_go_before_the_next():
    made, left = [], []

    def step(batch):
        left.append(sum(reference() is not None for reference in made))
        tensor = torch.zeros(len(batch))
        made.append(weakref.ref(tensor))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.warns(UserWarning):
        list(runtime.in_batches(step, [1, 2], 2))
    assert left == [0, 0, 0]


# Cost


def test_costs_add_up():
    total = runtime.Cost(1.0, 0.5, 3, 2) + runtime.Cost(0.25, 0.25, 1, 0)
    assert total == runtime.Cost(1.25, 0.75, 4, 2)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"device '{device}' is not available here; use 'auto' or 'cpu'"):
        models.resolve_device(device)


def test_cpu_and_auto_are_always_there():
    assert models.resolve_device("cpu") == torch.device("cpu")
    assert torch.zeros(1, device=models.resolve_device("auto")).sum() == 0


def test_run_is_described_by_the_versions_that_are_installed():
    line = runtime.describe_run("torch", "numpy")
    assert f"torch {runtime.version('torch')}" in line and "python 3." in line and "\n" not in line
