"""The host weight store: packed weights of several models in memory files, within a budget.

    unknown ──want──> queued ──a packer is free, room is made──> packing ──> held ──> evicted
       ^  └──pack_ahead──> nobody asks for any, it fits ────────>   |          └─ the least recently used, and
       └───────────── failed: everyone who waits is told why ───────┘             never while a client uses it

Lives in the agent's event loop, which never waits for disk or memory: packing is done by child processes.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SHRINK, fcntl
from pathlib import Path

from prism.errors import CheckpointError, HostMemoryError
from prism.memory import memfd
from prism.memory.available import available_memory
from prism.types import Bytes, ModelId, Seconds
from prism.weights.layout import Layout
from prism.weights.packer import plan_source
from prism.weights.packing import run_packer
from prism.weights.protocol import Manifest, PackJob, WeightSource, file_bytes
from prism.weights.server import LendingServer

ProgressCallback = Callable[[ModelId, Bytes, Bytes], None]
"""Model, bytes in place, bytes in all."""
_PATIENCE = Seconds(30.0)


@dataclass(slots=True)
class _Held:
    """A packed model."""

    manifest: Manifest
    fd: int
    size: Bytes
    num_leases: int = 0


def _ignore(model: ModelId, done: Bytes, total: Bytes) -> None:
    """No one watches."""


class HostStore:
    """Packs on demand, keeps what fits, lends it to local processes of the same user."""

    def __init__(
        self,
        socket_path: Path,
        budget: Bytes,
        sources: Iterable[WeightSource],
        *,
        on_progress: ProgressCallback = _ignore,
        num_packers: int = 1,
        patience: Seconds = _PATIENCE,
    ) -> None:
        """`patience` bounds how long a model waits for others' memory to come out of use."""
        self._budget = budget
        self._sources = {source.model: source for source in sources}
        self._on_progress = on_progress
        self._patience = patience
        self._packers = asyncio.Semaphore(num_packers)  # first come, first served
        self._held: OrderedDict[ModelId, _Held] = OrderedDict()  # least recently used first
        self._packing: dict[ModelId, asyncio.Task[Bytes | None]] = {}
        self._ahead: ModelId | None = None  # the one of them that nobody has asked for
        self._tasks: set[asyncio.Task[Bytes | None]] = set()  # also those that have given way
        self._is_closed = False
        self._used = 0  # bytes of files held or being packed
        self._unreserved = 0  # those of them whose pages a packer has yet to take
        self._returned = asyncio.Condition()
        self._server = LendingServer(socket_path, self)

    async def start(self) -> None:
        """Listen; raises `OSError` when the socket cannot be made."""
        self._server.start()

    async def close(self) -> None:
        """Stop packing and lending, and give the memory back (what clients have mapped stays theirs)."""
        self._is_closed = True
        await self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for model in list(self._held):
            self._drop(model)

    @property
    def used_bytes(self) -> Bytes:
        """Memory of everything held or being packed."""
        return Bytes(self._used)

    def holds(self, model: ModelId) -> bool:
        """Whether the model can be fetched now."""
        return model in self._held

    async def want(self, model: ModelId) -> Bytes:
        """Have the model packed; returns the bytes of its weights.

        Raises `CheckpointError` or `HostMemoryError`, as does every other call that waits for the same
        attempt; the next call tries again. Being cancelled leaves the packing to itself.
        """
        if self._ahead == model:
            self._ahead = None
        if model in self._held:
            self._held.move_to_end(model)
            return Bytes(self._held[model].manifest.total_bytes)
        packing = self._packing.get(model)
        if packing is None or packing.done():
            self._give_way()
            packing = self._start_packing(model)
        return await self._join(packing)

    async def pack_ahead(self, model: ModelId) -> bool:
        """Pack a model that nobody has asked for, if it fits without evicting any; whether it is held now.

        Whoever asks goes first: it waits for them, and when they come meanwhile its packer is ended and
        started again later. Raises what `want` raises.
        """
        while not self._is_closed:
            if packing := [task for task in self._packing.values() if not task.done()]:
                await asyncio.wait(packing)
                continue
            if model in self._held:
                return True
            self._ahead = model
            task = self._start_packing(model)
            await asyncio.wait([task])
            if not task.cancelled():
                return task.result() is not None
        return False

    async def _join(self, packing: asyncio.Task[Bytes | None]) -> Bytes:
        try:
            size = await asyncio.shield(packing)
        except asyncio.CancelledError:
            if packing.cancelled():  # not who waits was cancelled, but the store is closing
                raise HostMemoryError("the weight store is closed") from None
            raise
        assert size is not None, "only what nobody has asked for is left undone"
        return size

    # --- packing -----------------------------------------------------------------------------------

    def _start_packing(self, model: ModelId) -> asyncio.Task[Bytes | None]:
        task = self._packing[model] = asyncio.create_task(self._pack(model))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._packed(model, task))
        return task

    def _give_way(self) -> None:
        """Somebody asks: a packer that works ahead ends, so that neither it nor its memory is waited for."""
        if self._ahead is not None:
            self._packing.pop(self._ahead).cancel()
            self._ahead = None

    def _packed(self, model: ModelId, task: asyncio.Task[Bytes | None]) -> None:
        self._tasks.discard(task)
        if self._packing.get(model) is task:
            del self._packing[model]
            if self._ahead == model:
                self._ahead = None
        if not task.cancelled():
            task.exception()  # everyone who waited may be gone: that is no reason for a warning

    async def _pack(self, model: ModelId) -> Bytes | None:
        """Bytes of the weights; None if nobody has asked for them and they do not fit."""
        source = self._sources.get(model)
        if source is None:
            raise CheckpointError("no such model is configured", file=str(model))
        async with self._packers:
            layout = await asyncio.to_thread(plan_source, source)
            size = file_bytes(layout.total_bytes)
            if self._ahead != model:
                await self._make_room(model, size)
            elif not self._fits_ahead(size):
                self._ahead = None
                return None
            self._used += size
            fd = -1
            try:
                fd = _sealed_file(size)
                await self._run_packer(source, fd, layout)
            except BaseException:
                self._used -= size
                if fd >= 0:
                    os.close(fd)
                await self._notify()
                raise
        manifest = Manifest(model=model, total_bytes=layout.total_bytes, fingerprint=layout.fingerprint)
        self._held[model] = _Held(manifest, fd, size)
        if self._ahead == model:  # what nobody has used yet is evicted first, the least likely one before all
            self._held.move_to_end(model, last=False)
        await self._notify()
        return layout.total_bytes

    async def _run_packer(self, source: WeightSource, fd: int, layout: Layout) -> None:
        """Run the packer's process, counting the pages that it has yet to take."""
        waiting = file_bytes(layout.total_bytes)
        self._unreserved += waiting

        def on_progress(done: Bytes) -> None:
            nonlocal waiting
            self._unreserved, waiting = self._unreserved - waiting, Bytes(0)
            self._on_progress(source.model, done, layout.total_bytes)

        try:
            job = PackJob(source=source, fd=fd, total_bytes=layout.total_bytes)
            await run_packer(job, on_progress)
        finally:
            self._unreserved -= waiting

    # --- room --------------------------------------------------------------------------------------

    async def _make_room(self, model: ModelId, size: Bytes) -> None:
        """Evict until `size` bytes fit budget and machine, waiting for a while if all else is in use."""
        if size > self._budget:
            raise HostMemoryError(f"{model}: {size} bytes of weights pass the budget of {self._budget}")
        try:
            async with asyncio.timeout(self._patience), self._returned:
                await self._returned.wait_for(lambda: self._reachable() >= size or not self._is_in_use())
        except TimeoutError:
            pass
        if self._reachable() < size:
            raise HostMemoryError(
                f"{model}: {size} bytes of weights wanted; {self._used} of {self._budget} are taken, and the "
                f"machine has {available_memory() - self._unreserved} left"
            )
        for idle in self._idle():
            if size <= self._room():
                break
            self._drop(idle)

    def _room(self) -> int:
        """Bytes that can be taken as things are."""
        return min(self._budget - self._used, available_memory() - self._unreserved)

    def _fits_ahead(self, size: Bytes) -> bool:
        """Whether there is ample room: what nobody asked for leaves the machine half of what it has left."""
        return size <= min(self._budget - self._used, (available_memory() - self._unreserved) // 2)

    def _reachable(self) -> int:
        """Bytes that could be taken if all that nobody uses were evicted."""
        return self._room() + sum(self._held[model].size for model in self._idle())

    def _idle(self) -> list[ModelId]:
        """Held models that nobody uses, least recently used first."""
        return [model for model, held in self._held.items() if not held.num_leases]

    def _is_in_use(self) -> bool:
        """Whether anything may come out of use: packed models that are lent, or others being packed."""
        return self._used > sum(self._held[model].size for model in self._idle())

    def _drop(self, model: ModelId) -> None:
        held = self._held.pop(model)
        os.close(held.fd)
        self._used -= held.size

    # --- lending (called by the server) ------------------------------------------------------------

    def lend(self, model: ModelId) -> tuple[Manifest, int] | None:
        """Manifest and descriptor of a model, which is not evicted until `take_back`; None if not held."""
        held = self._held.get(model)
        if held is None:
            return None
        held.num_leases += 1
        self._held.move_to_end(model)
        return held.manifest, held.fd

    async def take_back(self, model: ModelId) -> None:
        """A client has done with the model."""
        if (held := self._held.get(model)) is not None:
            held.num_leases -= 1
        await self._notify()

    async def _notify(self) -> None:
        """Memory came out of use: who waits for room looks again."""
        async with self._returned:
            self._returned.notify_all()


def _sealed_file(size: Bytes) -> int:
    """A memory file of this size whose size nobody can change, so that no reader is ever cut off."""
    fd = memfd.create_memfd("prism-weights")
    try:
        os.ftruncate(fd, size)
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
    except OSError as error:
        os.close(fd)
        raise HostMemoryError(f"a memory file of {size} bytes: {error.strerror}") from error
    return fd
