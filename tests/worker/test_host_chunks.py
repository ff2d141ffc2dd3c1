"""Host memory for KV comes chunk by chunk, or not at all, and then says why."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator

import pytest

from prism.errors import DriverError
from prism.types import Address, Bytes, MiB
from prism.worker import host_chunks
from prism.worker.host_chunks import ChunkThread, HostChunks
from tests.support.pages import CAN_TOUCH
from tests.support.waiting import wait_until

CHUNK = Bytes(32 * MiB)


class RecordingPinner:
    """Fails its `fail_at`th registration, counted from 1."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.num_calls = 0
        self.registered: dict[int, int] = {}

    def register_host(self, address: Address, size: Bytes, *, read_only: bool = False) -> None:
        self.num_calls += 1
        if self.num_calls == self.fail_at:
            raise DriverError("cuMemHostRegister", "CUDA_ERROR_OUT_OF_MEMORY")
        ctypes.memset(address, 1, size)
        self.registered[address] = size

    def unregister_host(self, address: Address) -> None:
        del self.registered[address]


@pytest.fixture
def made() -> Iterator[list[HostChunks]]:
    chunks: list[HostChunks] = []
    yield chunks
    for each in chunks:
        each.close()


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class FaultsPinner(RecordingPinner):
    """Counts the pages that had to be looked up while it was registering, as the driver does it."""

    num_faults = 0

    def register_host(self, address: Address, size: Bytes, *, read_only: bool = False) -> None:
        before = faults()
        super().register_host(address, size, read_only=read_only)
        self.num_faults += faults() - before


@pytest.mark.skipif(not CAN_TOUCH, reason="Linux before 5.14")
def test_pages_are_there_when_they_are_registered(made: list[HostChunks]) -> None:
    """The driver was held for 6 ms, in which no step could be launched, by the system's looking them up."""
    pinner = FaultsPinner()
    chunks = HostChunks(CHUNK, 1, pinner)
    made.append(chunks)
    chunks.ask(1)
    assert chunks.make() and len(pinner.registered) == 2
    assert pinner.num_faults < CHUNK // 4096 // 10


def test_nothing_is_taken_before_it_is_asked_for(made: list[HostChunks]) -> None:
    pinner = RecordingPinner()
    chunks = HostChunks(CHUNK, 4, pinner)
    made.append(chunks)
    assert not chunks.make() and not pinner.registered
    chunks.ask(2)
    chunks.ask(1)
    while chunks.make():
        pass
    assert chunks.num_ready == 2
    assert pinner.registered == {chunks.base + i * 16 * MiB: 16 * MiB for i in range(4)}
    chunks.ask(99)
    assert chunks.num_wanted == 4


def test_a_chunk_that_cannot_be_registered_is_given_back(
    made: list[HostChunks], caplog: pytest.LogCaptureFixture
) -> None:
    pinner = RecordingPinner(fail_at=4)
    chunks = HostChunks(CHUNK, 4, pinner)
    made.append(chunks)
    chunks.ask(4)
    while chunks.make():
        pass
    assert chunks.num_ready == 1 and list(pinner.registered) == [chunks.base, chunks.base + 16 * MiB]
    assert chunks.error is not None and "CUDA_ERROR_OUT_OF_MEMORY" in chunks.error
    chunks.ask(4)
    assert not chunks.make()
    assert len([r for r in caplog.records if "no more host memory" in r.message]) == 1


def test_a_machine_without_memory_is_asked_first(
    made: list[HostChunks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that a control group has no room for are not refused: a process is killed."""
    monkeypatch.setattr(host_chunks, "available_memory", lambda: CHUNK - 1)
    chunks = HostChunks(CHUNK, 4, None)
    made.append(chunks)
    chunks.ask(1)
    assert chunks.make() and chunks.num_ready == 0
    assert chunks.error is not None and "the machine has less" in chunks.error


def test_a_thread_makes_what_is_asked_for(made: list[HostChunks]) -> None:
    """The test looked ten million times without a pause: on a busy machine no other thread had run."""
    chunks = HostChunks(Bytes(2 * MiB), 4, None)
    made.append(chunks)
    thread = ChunkThread(chunks)
    chunks.ask(3)
    wait_until(lambda: chunks.num_ready == 3, "three are made")
    thread.close()
    assert chunks.num_ready == 3 and chunks.error is None


@pytest.mark.parametrize("chunk", [2 * MiB, 16 * MiB, 32 * MiB])
def test_nothing_stays_registered(chunk: int) -> None:
    """Of chunks of 2 MiB only each eighth was unregistered; CUDA then found addresses "already mapped"."""
    pinner = RecordingPinner()
    chunks = HostChunks(Bytes(chunk), 9, pinner)
    chunks.ask(9)
    while chunks.make():
        pass
    assert sum(pinner.registered.values()) == 9 * chunk
    chunks.close()
    assert not pinner.registered
