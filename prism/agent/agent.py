"""The agent: parent of all processes of one machine, owner of packed weights, authority on who is alive.

start: bind ports -> run directory -> weight store -> children -> packing ahead, once workers have memory
a child says Hello: it is told who is up      a child is Ready: everybody is told
a child ends: everybody is told, and it is started again after a back-off
the controller says that a worker hangs: it is killed
SIGTERM: gateways finish their streams, then the rest is stopped; status 0
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Coroutine

import zmq.asyncio

from prism import transport
from prism.agent.children import Child, ChildSpec
from prism.agent.rundir import RunDir
from prism.config import Config, likely_first
from prism.errors import PrismError
from prism.messages import (
    Hello,
    Hung,
    ProcessEnded,
    ProcessUp,
    Ready,
    Role,
    Stop,
    WeightsFailed,
    WeightsHeld,
    WeightsProgress,
    WeightsReady,
    WeightsWanted,
)
from prism.metrics import forget_process
from prism.types import Bytes, ModelId
from prism.weights.protocol import WeightSource
from prism.weights.store import HostStore

log = logging.getLogger(__name__)

KILL_SECONDS = 2.0
"""What does not end this long after it was told to is killed."""


class Agent:
    """One server on one machine."""

    def __init__(self, config: Config, run_dir: RunDir, api: socket.socket, admin: socket.socket) -> None:
        self._config = config
        self._run_dir = run_dir
        self._context = zmq.asyncio.Context()
        self._router = transport.bind_router(self._context, transport.socket_address(run_dir.path, "agent"))
        self._peers: dict[str, Child] = {}
        self._children = [
            Child(spec, run_dir.path, self._child_ended, self._child_hopeless)
            for spec in child_specs(config, api.fileno(), admin.fileno())
        ]
        self._stopping = asyncio.Event()
        self._status = 0
        self._packs_ahead = config.host_memory.pack_ahead
        self._tasks: set[asyncio.Task[None]] = set()
        self._unpackable: dict[str, WeightsFailed] = {}
        """Of the models whose last packing has failed."""
        self._store = HostStore(
            run_dir.store_socket,
            Bytes(config.host_memory.budget),
            [
                WeightSource(
                    model=ModelId(model.name),
                    path=model.path,
                    load_format=model.load_format,
                    dtype=model.dtype,
                    quantization=model.quantization,
                )
                for model in config.models
            ],
            on_progress=self._packing,
        )

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        await self._store.start()
        supervisors = [asyncio.create_task(child.supervise()) for child in self._children]
        listener = asyncio.create_task(self._listen())
        for task in (*supervisors, listener):
            task.add_done_callback(self._task_ended)
        for model in self._config.models:
            if model.is_loaded_at_start:
                self._start(self._pack(model.name, None))
        await self._stopping.wait()
        await self._stop_children()
        await asyncio.gather(*supervisors, return_exceptions=True)
        listener.cancel()
        for task in self._tasks:
            task.cancel()
        await self._store.close()
        self._context.destroy(linger=0)
        return self._status

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """A bug must not leave a server that looks alive and supervises or hears nobody."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal error: the server stops", exc_info=error)
            self._status = 1
            self._stopping.set()

    # --- messages -----------------------------------------------------------------------------------

    async def _listen(self) -> None:
        async for sender, message in transport.areceive(self._router):
            match message:
                case Hello():
                    self._welcome(sender, message)
                case Ready():
                    self._child_ready(sender, message)
                case Hung():
                    self._kill(message)
                case WeightsWanted(model=model):
                    self._start(self._pack(model, sender))
                case _:
                    log.error("unexpected message dropped", extra={"sender": sender})

    def _child_of(self, sender: str, message: Hello | Ready) -> Child | None:
        """The present process of that name, if it is the one that says so."""
        child = self._find(message)
        if child is None:
            log.error("a stranger said %s: %s", type(message).__name__, sender)
            return None
        return None if child.has_ended else child

    def _find(self, message: Hello | Ready | Hung) -> Child | None:
        """The child of that name, if that is its present incarnation."""
        named = (message.name, message.incarnation)
        return next(
            (child for child in self._children if (child.spec.name, child.incarnation) == named), None
        )

    def _welcome(self, sender: str, hello: Hello) -> None:
        child = self._child_of(sender, hello)
        if child is None:
            return
        self._peers[sender] = child
        for other in self._children:
            if other.ready_since is not None and other is not child:
                transport.asend(self._router, _up(other), sender)
        if _is_worker(child):
            for model, size in self._store.held().items():
                transport.asend(self._router, WeightsHeld(model=model, total_bytes=size), sender)
        if child.spec.role is Role.GATEWAY:
            for failed in self._unpackable.values():
                transport.asend(self._router, failed, sender)

    def _child_ready(self, sender: str, ready: Ready) -> None:
        """Its Hello may still be on its way."""
        child = self._child_of(sender, ready)
        if child is None:
            return
        child.became_ready(ready.address)
        log.info("%s is up", child.spec.name)
        self._tell_everybody(_up(child), but=sender)
        if self._packs_ahead and all(c.ready_since is not None for c in self._children if _is_worker(c)):
            self._packs_ahead = False
            self._start(self._pack_ahead())

    def _tell_everybody(self, message: ProcessUp | ProcessEnded, but: str = "") -> None:
        for peer in self._peers:
            if peer != but:
                transport.asend(self._router, message, peer)

    # --- weights ------------------------------------------------------------------------------------

    async def _pack(self, model: str, wanted_by: str | None) -> None:
        """Pack a model and tell whoever asked for it."""
        answer: WeightsReady | WeightsFailed
        try:
            if not self._store.holds(ModelId(model)):
                log.info("packing %s", model)
            size = await self._store.want(ModelId(model))
            answer = WeightsReady(model=model, total_bytes=size)
            self._packed(model, size)
        except Exception as error:  # whoever asked waits for an answer, whatever went wrong
            bug = None if isinstance(error, PrismError) else error
            log.error("packing %s failed: %s", model, error, exc_info=bug)
            answer = self._packing_failed(model, error)
        if wanted_by is not None and wanted_by in self._peers:
            transport.asend(self._router, answer, wanted_by)

    async def _pack_ahead(self) -> None:
        """Pack what nobody has asked for yet, once; those first that are loaded at start."""
        for config in likely_first(self._config.models):
            model = ModelId(config.name)
            try:
                size = await self._store.pack_ahead(model)
            except Exception as error:  # it concerns this model alone, and nobody waits for it
                bug = None if isinstance(error, PrismError) else error
                log.warning("packing %s ahead failed; a request tries again: %s", model, error, exc_info=bug)
                self._packing_failed(model, error)
                continue
            if size is None:
                log.info("%s is not packed ahead: host memory has no room to spare", model)
            else:
                log.info("%s is packed", model)
                self._packed(model, size)

    def _packed(self, model: str, size: Bytes) -> None:
        held = WeightsHeld(model=model, total_bytes=size)
        self._tell(Role.WORKER, held)
        if self._unpackable.pop(model, None) is not None:
            self._tell(Role.GATEWAY, held)

    def _packing_failed(self, model: str, error: Exception) -> WeightsFailed:
        failed = self._unpackable[model] = WeightsFailed(model=model, reason=str(error))
        self._tell(Role.GATEWAY, failed)
        return failed

    def _packing(self, model: ModelId, done: Bytes, total: Bytes) -> None:
        self._tell(Role.WORKER, WeightsProgress(model=model, done_bytes=done, total_bytes=total))

    def _tell(self, role: Role, message: WeightsProgress | WeightsHeld | WeightsFailed) -> None:
        for peer, child in self._peers.items():
            if child.spec.role is role:
                transport.asend(self._router, message, peer)

    # --- life and death -----------------------------------------------------------------------------

    def _child_ended(self, child: Child) -> None:
        identity = transport.identity_of(child.spec.name, child.incarnation)
        self._peers.pop(identity, None)
        if child.last_pid is not None:
            forget_process(child.last_pid)
        ended = ProcessEnded(role=child.spec.role, name=child.spec.name, incarnation=child.incarnation)
        self._tell_everybody(ended)
        (self._run_dir.path / f"{identity}.sock").unlink(missing_ok=True)

    def _kill(self, hung: Hung) -> None:
        """A worker stands still, unless another one has taken its place. All is as after any death then."""
        child = self._find(hung)
        if child is not None:
            log.error("%s has not reported for %.0f s: it is killed", hung.name, hung.silent_seconds)
            child.signal(signal.SIGKILL)

    def _child_hopeless(self, child: Child) -> None:
        log.error("%s does not start; giving up", child.spec.name)
        self._status = 1
        self._stopping.set()

    async def _stop_children(self) -> None:
        """Gateways first, so that streams can end; then everything else."""
        for child in self._children:
            child.stop()
        grace = self._config.server.shutdown_grace
        peers = {child: peer for peer, child in self._peers.items()}
        gateways = [c for c in self._children if c.spec.role is Role.GATEWAY]
        for child in gateways:
            if child in peers:
                transport.asend(self._router, Stop(grace=grace), peers[child])
            else:  # it is starting and has no streams
                child.signal(signal.SIGTERM)
        await self._wait_ended(gateways, grace + KILL_SECONDS)
        for child in self._children:
            child.signal(signal.SIGTERM)
        await self._wait_ended(self._children, KILL_SECONDS)

    async def _wait_ended(self, children: list[Child], seconds: float) -> None:
        """Wait for processes to end, and kill those that do not."""
        ends = [asyncio.create_task(child.ended()) for child in children]
        await asyncio.wait(ends, timeout=seconds)
        for child in children:
            child.signal(signal.SIGKILL)
        await asyncio.gather(*ends)


def child_specs(config: Config, api_fd: int, admin_fd: int) -> list[ChildSpec]:
    """All processes of one machine."""
    workers = [ChildSpec(Role.WORKER, f"worker-{i}") for i in range(len(config.devices))]
    gateways = [
        ChildSpec(Role.GATEWAY, f"gateway-{i}", listen_fd=api_fd) for i in range(config.server.gateways)
    ]
    return [*workers, ChildSpec(Role.CONTROLLER, "controller", listen_fd=admin_fd), *gateways]


def _is_worker(child: Child) -> bool:
    return child.spec.role is Role.WORKER


def _up(child: Child) -> ProcessUp:
    return ProcessUp(
        role=child.spec.role,
        name=child.spec.name,
        incarnation=child.incarnation,
        address=child.address,
    )
