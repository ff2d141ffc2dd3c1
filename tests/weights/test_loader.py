"""Bytes arrive whole, in order, and never unnoticed otherwise."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from prism.errors import CheckpointError
from prism.types import Bytes
from prism.weights import copiers
from prism.weights.checksum import CHUNK_BYTES
from prism.weights.client import PackedWeights, pack_here
from prism.weights.loader import LoadJob, LoadOutcome
from tests.weights.support import dummy_source


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedWeights]:
    """Some 21 MB: six chunks, the last one short."""
    source = dummy_source(
        tmp_path_factory.mktemp("weights"), vocab_size=6000, hidden_size=512, intermediate_size=1024
    )
    with pack_here(source) as packed:
        assert 5 * CHUNK_BYTES < packed.total_bytes < 6 * CHUNK_BYTES
        yield packed
        gc.collect()


def new_target(packed: PackedWeights, extra: int = 0) -> torch.Tensor:
    return torch.zeros(packed.total_bytes + extra, dtype=torch.uint8)


@pytest.mark.parametrize("num_chunks", [1, 2, 100])
def test_all_bytes_arrive_and_no_others(packed: PackedWeights, num_chunks: int) -> None:
    target = new_target(packed, extra=4096)
    job = LoadJob(packed, target, Bytes(num_chunks * CHUNK_BYTES))
    assert job.progress == 0
    assert job.run() is LoadOutcome.LOADED
    assert job.progress == job.total_bytes == packed.total_bytes
    assert (target[: packed.total_bytes].numpy() == packed.data).all()
    assert not target[packed.total_bytes :].any()


def test_progress_never_runs_ahead_of_the_bytes(
    packed: PackedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = new_target(packed)
    job = LoadJob(packed, target, CHUNK_BYTES)
    seen = []

    def watch(chunk: np.ndarray, factors: np.ndarray) -> int:
        seen.append(job.progress)
        assert (target[: job.progress].numpy() == packed.data[: job.progress]).all()
        return real(chunk, factors)

    real = copiers.checksum
    monkeypatch.setattr(copiers, "checksum", watch)
    job.run()
    assert seen == [i * CHUNK_BYTES for i in range(6)]


def test_a_cancelled_load_stops_between_chunks(
    packed: PackedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = LoadJob(packed, new_target(packed), CHUNK_BYTES)

    def cancel_in_the_third(chunk: np.ndarray, factors: np.ndarray) -> int:
        if job.progress == 2 * CHUNK_BYTES:
            job.cancel()
        return 0

    monkeypatch.setattr(copiers, "checksum", cancel_in_the_third)
    assert job.run() is LoadOutcome.CANCELLED
    assert job.progress == 3 * CHUNK_BYTES


def test_a_load_cancelled_beforehand_copies_nothing(packed: PackedWeights) -> None:
    target = new_target(packed)
    job = LoadJob(packed, target)
    job.cancel()
    assert job.run() is LoadOutcome.CANCELLED
    assert job.progress == 0 and not target.any()


@pytest.mark.parametrize("place", [0, CHUNK_BYTES - 1, 3 * CHUNK_BYTES + 77, -1])
def test_a_byte_that_changes_on_the_way_is_noticed(
    packed: PackedWeights, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """The checksum is that of the bytes on the device, not of those that were read."""
    target = new_target(packed)
    place %= packed.total_bytes
    copy = np.copyto

    def flip_behind(to: np.ndarray, source: np.ndarray) -> None:
        copy(to, source)
        if to.ctypes.data <= target.data_ptr() + place < to.ctypes.data + len(to):
            target[place] ^= 1

    monkeypatch.setattr(np, "copyto", flip_behind)
    begin = place // CHUNK_BYTES * CHUNK_BYTES
    with pytest.raises(CheckpointError, match=rf"packed m: 1 of 6 chunks .* at byte {begin}$"):
        LoadJob(packed, target).run()


def test_a_target_that_does_not_fit_is_a_bug(packed: PackedWeights) -> None:
    for target, chunk in (
        (new_target(packed)[1:], CHUNK_BYTES),
        (new_target(packed).view(-1, 2), CHUNK_BYTES),
        (new_target(packed).view(torch.int8), CHUNK_BYTES),
        (new_target(packed), Bytes(CHUNK_BYTES - 8)),
    ):
        with pytest.raises(AssertionError):
            LoadJob(packed, target, chunk)


@pytest.mark.gpu
@pytest.mark.parametrize("source_is_pinned", [False, True])
def test_a_gpu_receives_and_checks_the_same_bytes(packed: PackedWeights, source_is_pinned: bool) -> None:
    target = new_target(packed).cuda()
    job = LoadJob(packed, target, CHUNK_BYTES, source_is_pinned=source_is_pinned)
    assert job.run() is LoadOutcome.LOADED
    assert (target.cpu().numpy() == packed.data).all()


@pytest.mark.gpu
def test_a_gpu_notices_damage(packed: PackedWeights, tmp_path: Path) -> None:
    target = new_target(packed).cuda()
    with pack_here(dummy_source(tmp_path, vocab_size=6000, hidden_size=512, intermediate_size=1024)) as own:
        own._file = own._file.copy()  # type: ignore[union-attr]
        own.checksums[2] += np.uint64(1)
        with pytest.raises(CheckpointError, match="1 of 6 chunks"):
            LoadJob(own, target).run()
