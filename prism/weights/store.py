"""The host weight store: packed weights of several models in memory files, within a budget.

    unknown ──want──> queued ──a packer is free, room is made──> packing ──> held ──> evicted
       ^  └──pack_ahead──> nobody asks for any, it fits ────────>   |          └─ the least recently used, and
       └───────────── failed: everyone who waits is told why ───────┘             never while a client uses it

Lives in the agent's event loop, which never waits for disk or memory: packing is done by child processes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
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
from prism.weights.shelf import Recall, Shelf

ProgressCallback = Callable[[ModelId, Bytes, Bytes], None]
"""Model, bytes in place, bytes in all."""
_PATIENCE = Seconds(30.0)


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
        self._shelf = Shelf(budget)
        self._sources = {source.model: source for source in sources}
        self._on_progress = on_progress
        self._patience = patience
        self._packers = asyncio.Semaphore(num_packers)  # first come, first served
        self._packing: dict[ModelId, asyncio.Task[Bytes | None]] = {}
        self._ahead: ModelId | None = None  # the one of them that nobody has asked for
        self._tasks: set[asyncio.Task[Bytes | None]] = set()  # also those that have given way
        self._is_closed = False
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
        for model in self._shelf.models():
            self._shelf.drop(model)

    @property
    def used_bytes(self) -> Bytes:
        """Memory of everything held or being packed."""
        return Bytes(self._shelf.used)

    def holds(self, model: ModelId) -> bool:
        """Whether the model can be fetched now."""
        return model in self._shelf

    def held(self) -> dict[ModelId, Bytes]:
        """All models that can be fetched now, with the bytes of their weights."""
        return self._shelf.models()

    async def want(self, model: ModelId) -> Bytes:
        """Have the model packed; returns the bytes of its weights.

        Raises `CheckpointError` or `HostMemoryError`, as does every other call that waits for the same
        attempt; the next call tries again. Being cancelled leaves the packing to itself.
        """
        if self._ahead == model:
            self._ahead = None
        if model in self._shelf:
            return self._shelf.touch(model)
        packing = self._packing.get(model)
        if packing is None or packing.done():
            self._give_way()
            packing = self._start_packing(model)
        return await self._join(packing)

    async def pack_ahead(self, model: ModelId) -> Bytes | None:
        """Pack a model that nobody has asked for; the bytes of its weights, or None if it does not fit.

        It evicts nothing. Whoever asks goes first: it waits for them, and when they come meanwhile its packer
        is ended and started again later. Raises what `want` raises.
        """
        while not self._is_closed:
            if packing := [task for task in self._packing.values() if not task.done()]:
                await asyncio.wait(packing)
                continue
            if model in self._shelf:
                return self.held()[model]
            self._ahead = model
            task = self._start_packing(model)
            await asyncio.wait([task])
            if not task.cancelled():
                return task.result()
        return None

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
            elif size > self._shelf.ample_room():
                self._ahead = None
                return None
            self._shelf.used += size
            fd = -1
            try:
                fd = _sealed_file(size)
                await self._run_packer(source, fd, layout)
            except BaseException:
                self._shelf.used -= size
                if fd >= 0:
                    os.close(fd)
                await self._notify()
                raise
        manifest = Manifest(model=model, total_bytes=layout.total_bytes, fingerprint=layout.fingerprint)
        self._shelf.put(manifest, fd, size, is_used=self._ahead != model)
        await self._notify()
        return layout.total_bytes

    async def _run_packer(self, source: WeightSource, fd: int, layout: Layout) -> None:
        """Run the packer's process, counting the pages that it has yet to take."""
        waiting = file_bytes(layout.total_bytes)
        self._shelf.unreserved += waiting

        def on_progress(done: Bytes) -> None:
            nonlocal waiting
            self._shelf.unreserved, waiting = self._shelf.unreserved - waiting, Bytes(0)
            self._on_progress(source.model, done, layout.total_bytes)

        try:
            job = PackJob(source=source, fd=fd, total_bytes=layout.total_bytes)
            await run_packer(job, on_progress)
        finally:
            self._shelf.unreserved -= waiting

    # --- room --------------------------------------------------------------------------------------

    async def _make_room(self, model: ModelId, size: Bytes) -> None:
        """Evict until `size` bytes fit budget and machine, waiting for a while if all else is in use."""
        shelf = self._shelf
        if size > shelf.budget:
            raise HostMemoryError(f"{model}: {size} bytes of weights pass the budget of {shelf.budget}")

        def is_over() -> bool:
            """Nothing is evicted before enough can be."""
            return shelf.evict_for(size) if shelf.reachable() >= size else not shelf.is_in_use()

        try:
            async with asyncio.timeout(self._patience), self._returned:
                await self._returned.wait_for(is_over)
        except TimeoutError:
            pass
        if shelf.room() < size:
            raise HostMemoryError(
                f"{model}: {size} bytes of weights wanted; {shelf.used} of {shelf.budget} are taken, and the "
                f"machine has {available_memory() - shelf.unreserved} left"
            )

    # --- lending (called by the server) ------------------------------------------------------------

    def lend(self, model: ModelId, recall: Recall | None) -> tuple[Manifest, int] | None:
        """See `Lender.lend`."""
        return self._shelf.lend(model, recall)

    async def take_back(self, model: ModelId, recall: Recall | None) -> None:
        """See `Lender.take_back`."""
        self._shelf.take_back(model, recall)
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
