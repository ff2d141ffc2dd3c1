"""The store over its real socket, with real packers."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path

import msgspec
import pytest

from prism.errors import CheckpointError, HostMemoryError
from prism.types import Address, Bytes, MiB, ModelId, Seconds
from prism.weights import packing, server, shelf
from prism.weights.client import PackedWeights, fetch, pack_here
from prism.weights.packer import plan_source
from prism.weights.protocol import Fetch, PackJob, WeightSource, file_bytes
from prism.weights.registrations import Registrations, RegistrationThread
from prism.weights.store import HostStore
from tests.support import checkpoints
from tests.support.waiting import PATIENCE, eventually
from tests.weights.support import checkpoint_source, dummy_source, write_config

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in an event loop of its own."""

    @wraps(test)
    def run(*arguments: object, **keywords: object) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **keywords), PATIENCE))  # type: ignore[arg-type]

    return run


@pytest.fixture
def sources(tmp_path: Path) -> list[WeightSource]:
    return [dummy_source(tmp_path, name) for name in "abc"]


def size_of(source: WeightSource) -> Bytes:
    return file_bytes(plan_source(source).total_bytes)


@asynccontextmanager
async def running(
    tmp_path: Path, sources: list[WeightSource], budget: int = 64 * MiB, **options: object
) -> AsyncIterator[HostStore]:
    host_store = HostStore(tmp_path / "store", Bytes(budget), sources, **options)  # type: ignore[arg-type]
    await host_store.start()
    try:
        yield host_store
    finally:
        await host_store.close()
    assert host_store.used_bytes == 0


async def fetched(tmp_path: Path, model: ModelId, **options: object) -> PackedWeights:
    return await asyncio.to_thread(fetch, tmp_path / "store", model, **options)  # type: ignore[arg-type]


@in_loop
async def test_wanted_weights_are_packed_and_lent(tmp_path: Path, sources: list[WeightSource]) -> None:
    progress: list[tuple[ModelId, Bytes, Bytes]] = []
    async with running(tmp_path, sources, on_progress=lambda *event: progress.append(event)) as host_store:
        layout = plan_source(sources[0])
        assert await host_store.want(A) == layout.total_bytes
        assert progress[0] == (A, 0, layout.total_bytes)
        assert layout.total_bytes - 256 < progress[-1][1] <= layout.total_bytes
        with await fetched(tmp_path, A) as lent, pack_here(sources[0]) as expected:
            assert lent.model == A and lent.fingerprint == layout.fingerprint
            assert (lent.data == expected.data).all()
            assert (lent.checksums == expected.checksums).all()
            assert not lent.data.flags.writeable
        events = len(progress)
        assert await host_store.want(A) == layout.total_bytes
        assert len(progress) == events  # it was there already


@in_loop
async def test_many_who_want_a_model_share_one_packing(tmp_path: Path, sources: list[WeightSource]) -> None:
    starts = []

    def watch(model: ModelId, done: Bytes, total: Bytes) -> None:
        if done == 0:
            starts.append(model)

    async with running(tmp_path, sources, on_progress=watch) as host_store:
        impatient = asyncio.create_task(host_store.want(A))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.gather(*(host_store.want(model) for model in (A, B, A, B, A)))
        assert starts == [A, B]


@in_loop
async def test_the_socket_is_the_users_alone(
    tmp_path: Path, sources: list[WeightSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").touch()  # left by an earlier process
    async with running(tmp_path, sources) as host_store:
        assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o600
        await host_store.want(A)
        monkeypatch.setattr(server, "_peer_uid", lambda _: os.getuid() + 1)
        with pytest.raises(HostMemoryError, match="does not answer"):
            await fetched(tmp_path, A)
    assert not (tmp_path / "store").exists()


@in_loop
async def test_a_model_that_is_not_held_is_said_so(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources):
        with pytest.raises(HostMemoryError, match="b: the weight store does not hold it"):
            await fetched(tmp_path, B)
    with pytest.raises(HostMemoryError, match="does not answer"):
        await fetched(tmp_path, B)


@in_loop
async def test_nonsense_on_the_socket_ends_its_connection_alone(
    tmp_path: Path, sources: list[WeightSource]
) -> None:
    async with running(tmp_path, sources) as host_store:
        await host_store.want(A)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(tmp_path / "store"))
            client.send(b"nonsense")
            client.settimeout(PATIENCE)
            assert await asyncio.to_thread(client.recv, 100) == b""
        (await fetched(tmp_path, A)).close()


@in_loop
async def test_nobody_can_cut_the_file_under_a_reader(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources) as host_store:
        await host_store.want(A)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(tmp_path / "store"))
            client.send(msgspec.json.encode(Fetch(model=A)))
            client.settimeout(PATIENCE)
            _, (fd,), _, _ = await asyncio.to_thread(socket.recv_fds, client, 4096, 1)
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 10)
            os.close(fd)


# --- budget ----------------------------------------------------------------------------------------


@in_loop
async def test_the_least_recently_used_is_evicted(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources, budget=2 * size_of(sources[0])) as host_store:
        await host_store.want(A)
        await host_store.want(B)
        await host_store.want(A)
        await host_store.want(C)
        assert [host_store.holds(model) for model in (A, B, C)] == [True, False, True]
        (await fetched(tmp_path, A)).close()  # fetching is using
        await host_store.want(B)
        assert [host_store.holds(model) for model in (A, B, C)] == [True, True, False]
        assert host_store.used_bytes == 2 * size_of(sources[0])


@in_loop
async def test_what_is_lent_is_not_evicted(tmp_path: Path, sources: list[WeightSource]) -> None:
    budget = 2 * size_of(sources[0])
    async with running(tmp_path, sources, budget=budget, patience=Seconds(0.01)) as host_store:
        await host_store.want(A)
        await host_store.want(B)
        with await fetched(tmp_path, A), await fetched(tmp_path, B):
            with pytest.raises(HostMemoryError, match=rf"c: .* {budget} of {budget} are taken"):
                await host_store.want(C)
            assert host_store.holds(A) and host_store.holds(B)


@in_loop
async def test_who_waits_for_room_gets_what_is_returned(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources, budget=size_of(sources[0])) as host_store:
        await host_store.want(A)
        lent = await fetched(tmp_path, A)
        wanted = asyncio.create_task(host_store.want(B))
        while not host_store._returned._waiters:  # until it waits for room
            await asyncio.sleep(0)
        lent.close()
        await wanted
        assert host_store.holds(B) and not host_store.holds(A)


@in_loop
async def test_a_client_that_dies_keeps_nothing(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources, budget=size_of(sources[0])) as host_store:
        await host_store.want(A)
        code = "import sys, os, signal; from prism.weights.client import fetch; from pathlib import Path\n"
        code += "lent = fetch(Path(sys.argv[1]), 'a'); os.kill(os.getpid(), signal.SIGKILL)"
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path / "store"))
        assert await client.wait() == -signal.SIGKILL
        await host_store.want(B)


@in_loop
async def test_a_model_larger_than_the_budget_evicts_nobody(
    tmp_path: Path, sources: list[WeightSource]
) -> None:
    large = dummy_source(tmp_path, "large", num_hidden_layers=30)
    async with running(tmp_path, [*sources, large], budget=2 * size_of(sources[0])) as host_store:
        await host_store.want(A)
        with pytest.raises(HostMemoryError, match=r"large: .* pass the budget"):
            await host_store.want(ModelId("large"))
        assert host_store.holds(A)


@in_loop
async def test_a_full_machine_is_an_error_before_it_is_a_killed_process(
    tmp_path: Path, sources: list[WeightSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, sources) as host_store:
        await host_store.want(A)
        size = size_of(sources[1])
        monkeypatch.setattr(shelf, "available_memory", lambda: size - size_of(sources[0]) - 1)
        with pytest.raises(HostMemoryError, match=r"b: .* the machine has"):
            await host_store.want(B)
        assert host_store.holds(A)
        monkeypatch.undo()
        await host_store.want(B)


# --- cached loans ----------------------------------------------------------------------------------


@in_loop
async def test_a_cached_loan_is_recalled_when_its_memory_is_wanted(
    tmp_path: Path, sources: list[WeightSource]
) -> None:
    async with running(tmp_path, sources, budget=size_of(sources[0])) as host_store:
        await host_store.want(A)
        lent = await fetched(tmp_path, A, cached=True)
        assert lent.lease_fd is not None and not lent.is_recalled()
        wanted = asyncio.create_task(host_store.want(B))
        while not lent.is_recalled():
            await asyncio.sleep(0)
        assert lent.is_recalled() and not wanted.done() and host_store.holds(A)
        lent.close()
        await wanted
        assert host_store.holds(B) and not host_store.holds(A)


@in_loop
async def test_only_as_many_loans_are_recalled_as_the_memory_takes(
    tmp_path: Path, sources: list[WeightSource]
) -> None:
    async with running(tmp_path, sources, budget=2 * size_of(sources[0])) as host_store:
        await host_store.want(A)
        await host_store.want(B)
        lent = [await fetched(tmp_path, model, cached=True) for model in (B, A)]  # which is no use of them
        wanted = asyncio.create_task(host_store.want(C))
        while not lent[1].is_recalled():
            await asyncio.sleep(0)
        lent[1].close()
        await wanted
        assert not lent[0].is_recalled() and host_store.holds(B)
        lent[0].close()


@in_loop
async def test_a_cached_loan_of_weights_that_a_load_uses_is_not_recalled(
    tmp_path: Path, sources: list[WeightSource]
) -> None:
    budget = size_of(sources[0])
    async with running(tmp_path, sources, budget=budget, patience=Seconds(0.01)) as host_store:
        await host_store.want(A)
        with await fetched(tmp_path, A, cached=True) as cached, await fetched(tmp_path, A):
            with pytest.raises(HostMemoryError, match="b: "):
                await host_store.want(B)
            assert not cached.is_recalled()


@in_loop
async def test_a_store_that_ends_recalls_its_loans(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources) as host_store:
        await host_store.want(A)
        lent = await fetched(tmp_path, A, cached=True)
        assert not lent.is_recalled()
    assert lent.is_recalled()
    lent.close()


class Pinner:
    """Registers on paper."""

    def __init__(self) -> None:
        self.registered: set[Address] = set()

    def register_host(self, address: Address, size: Bytes, *, read_only: bool = False) -> None:
        self.registered.add(address)

    def unregister_host(self, address: Address) -> None:
        self.registered.remove(address)


@in_loop
async def test_registered_weights_make_room_for_others(tmp_path: Path, sources: list[WeightSource]) -> None:
    """The store recalls what a worker's thread keeps registered, and packs in its place."""
    async with running(tmp_path, sources, budget=size_of(sources[0])) as host_store:
        pinner = Pinner()

        def borrow(model: ModelId, *, writable: bool) -> PackedWeights:
            return fetch(tmp_path / "store", model, writable=writable, cached=True)

        registrations = Registrations(pinner, borrow, Bytes(64 * MiB), [A, B])
        thread = RegistrationThread(registrations)
        for model in (A, B):
            registrations.announce(model, await host_store.want(model))
            await eventually(
                lambda m=model: registrations.registered_bytes(m), "it is registered", pause=0.001
            )
        assert host_store.holds(B) and not host_store.holds(A)
        assert len(pinner.registered) == 1
        await asyncio.to_thread(thread.close)
        assert not pinner.registered


# --- ahead -----------------------------------------------------------------------------------------


async def packing_of(host_store: HostStore, model: ModelId) -> None:
    """Until a packer runs for the model."""
    while model not in host_store._packing or not host_store.used_bytes:
        await asyncio.sleep(0)


@in_loop
async def test_what_is_packed_ahead_is_there_when_wanted(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources) as host_store:
        assert await host_store.pack_ahead(A)
        assert host_store.holds(A)
        assert await host_store.pack_ahead(A)
        (await fetched(tmp_path, A)).close()


@in_loop
async def test_packing_ahead_evicts_nothing(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources, budget=2 * size_of(sources[0])) as host_store:
        assert await host_store.pack_ahead(A)
        assert await host_store.pack_ahead(B)
        assert None is await host_store.pack_ahead(C)
        assert host_store.holds(A) and host_store.holds(B)


@in_loop
async def test_packing_ahead_leaves_the_machine_half_of_its_memory(
    tmp_path: Path, sources: list[WeightSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, sources) as host_store:
        size = size_of(sources[0])
        monkeypatch.setattr(shelf, "available_memory", lambda: 2 * size - 2)
        assert None is await host_store.pack_ahead(A)
        await host_store.want(A)
        monkeypatch.setattr(shelf, "available_memory", lambda: 2 * size)
        assert await host_store.pack_ahead(B)


@in_loop
async def test_what_nobody_has_used_is_evicted_first_the_likeliest_last(
    tmp_path: Path, sources: list[WeightSource]
) -> None:
    sources.append(dummy_source(tmp_path, "d"))
    async with running(tmp_path, sources, budget=3 * size_of(sources[0])) as host_store:
        await host_store.want(A)
        assert await host_store.pack_ahead(B) and await host_store.pack_ahead(C)
        await host_store.want(ModelId("d"))
        assert [host_store.holds(model) for model in (A, B, C)] == [True, True, False]


@in_loop
async def test_who_asks_goes_before_what_is_packed_ahead(tmp_path: Path, sources: list[WeightSource]) -> None:
    """The budget holds one model: the packer that works ahead must end, or B waits for it and its memory."""
    starts = []

    def watch(model: ModelId, done: Bytes, total: Bytes) -> None:
        if done == 0:
            starts.append(model)

    budget = size_of(sources[0])
    async with running(tmp_path, sources, budget, on_progress=watch, patience=Seconds(0)) as host_store:
        ahead = asyncio.create_task(host_store.pack_ahead(A))
        await packing_of(host_store, A)
        await host_store.want(B)
        assert None is await ahead
        assert starts[-1] == B and host_store.holds(B)


@in_loop
async def test_a_pack_that_gave_way_is_done_afterwards(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources) as host_store:
        ahead = asyncio.create_task(host_store.pack_ahead(A))
        await packing_of(host_store, A)
        await asyncio.gather(host_store.want(B), host_store.want(C))
        assert await ahead
        assert all(host_store.holds(model) for model in (A, B, C))


@in_loop
async def test_a_pack_that_is_asked_for_meanwhile_goes_on(
    tmp_path: Path, sources: list[WeightSource]
) -> None:
    starts = []

    def watch(model: ModelId, done: Bytes, total: Bytes) -> None:
        if done == 0:
            starts.append(model)

    async with running(tmp_path, sources, on_progress=watch) as host_store:
        ahead = asyncio.create_task(host_store.pack_ahead(A))
        await packing_of(host_store, A)
        await asyncio.gather(host_store.want(A), host_store.want(B))
        assert await ahead
        assert starts == [A, B]


@in_loop
async def test_a_model_that_cannot_be_packed_ahead_is_tried_again_when_wanted(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "a")
    async with running(tmp_path, [checkpoint_source(directory, "a")]) as host_store:
        with pytest.raises(CheckpointError):
            await host_store.pack_ahead(A)
        assert host_store.used_bytes == 0
        checkpoints.save(checkpoints.make_model("llama"), directory)
        await host_store.want(A)


@in_loop
async def test_closing_ends_packing_ahead(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources) as host_store:
        ahead = asyncio.create_task(host_store.pack_ahead(A))
        await packing_of(host_store, A)
    assert None is await ahead


# --- failures --------------------------------------------------------------------------------------


@in_loop
async def test_a_bad_checkpoint_is_reported_and_tried_again(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "a")
    good = dummy_source(tmp_path, "b")
    async with running(tmp_path, [checkpoint_source(directory, "a"), good]) as host_store:
        both = await asyncio.gather(host_store.want(A), host_store.want(A), return_exceptions=True)
        for error in both:
            assert isinstance(error, CheckpointError)
            assert str(error).startswith(f"{directory}: holds neither")
        assert host_store.used_bytes == 0
        await host_store.want(B)
        checkpoints.save(checkpoints.make_model("llama"), directory)
        assert await host_store.want(A) == plan_source(checkpoint_source(directory)).total_bytes


@in_loop
async def test_an_unknown_model_is_an_error(tmp_path: Path, sources: list[WeightSource]) -> None:
    async with running(tmp_path, sources) as host_store:
        with pytest.raises(CheckpointError, match="no such model"):
            await host_store.want(ModelId("nobody"))


@in_loop
async def test_a_packer_that_is_killed_is_an_error_of_its_model(
    tmp_path: Path, sources: list[WeightSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = asyncio.create_subprocess_exec

    async def start_and_kill(*arguments: str, **options: object) -> asyncio.subprocess.Process:
        process = await start(*arguments, **options)  # type: ignore[arg-type]
        process.kill()
        return process

    async with running(tmp_path, sources) as host_store:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start_and_kill)
        with pytest.raises(CheckpointError, match=r"/a: its packer ended with signal 9"):
            await host_store.want(A)
        assert host_store.used_bytes == 0
        monkeypatch.undo()
        await host_store.want(A)


@in_loop
async def test_closing_ends_packers_and_tells_who_waits(
    tmp_path: Path, sources: list[WeightSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = []
    start = asyncio.create_subprocess_exec

    async def started(*arguments: str, **options: object) -> asyncio.subprocess.Process:
        processes.append(await start(*arguments, **options))  # type: ignore[arg-type]
        begun.set()
        return processes[0]

    begun = asyncio.Event()
    monkeypatch.setattr(asyncio, "create_subprocess_exec", started)
    async with running(tmp_path, sources) as host_store:
        waiting = asyncio.create_task(host_store.want(A))
        await begun.wait()
    with pytest.raises(HostMemoryError, match="closed"):
        await waiting
    assert processes[0].returncode == -signal.SIGKILL


@in_loop
async def test_memory_that_a_packer_cannot_reserve_is_no_checkpoint_error(
    tmp_path: Path, sources: list[WeightSource]
) -> None:
    (tmp_path / "read-only").touch()
    fd = os.open(tmp_path / "read-only", os.O_RDONLY)
    job = PackJob(source=sources[0], fd=fd, total_bytes=1)
    with pytest.raises(HostMemoryError, match=r"a: .* bytes of host memory"):
        await packing.run_packer(job, lambda _: None)
    os.close(fd)
