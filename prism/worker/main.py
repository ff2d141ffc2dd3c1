"""The worker process: sockets and threads around the loop's `Worker`."""

from __future__ import annotations

import logging
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from prism import logs, transport
from prism.clock import SystemClock
from prism.config import Config, DeviceConfig, likely_first
from prism.costs import Costs
from prism.errors import DriverError
from prism.messages import (
    Abandon,
    Activate,
    CancelChoice,
    CommandDone,
    Evict,
    Hello,
    Homes,
    Outputs,
    ProcessEnded,
    Ready,
    Rejected,
    Report,
    Returned,
    Role,
    SetLimits,
    Started,
    Stop,
    Submit,
    WeightsFailed,
    WeightsHeld,
    WeightsProgress,
    WeightsReady,
    WeightsWanted,
)
from prism.metrics import Metrics
from prism.profile import read_profile
from prism.transport import Envelope
from prism.types import Bytes, GatewayId, Incarnation, ModelId, WorkerId
from prism.weights.client import PackedWeights, fetch
from prism.weights.link import ThreadLink
from prism.weights.registrations import Registrations, RegistrationThread
from prism.worker import garbage
from prism.worker.device import Device
from prism.worker.gauges import Gauges
from prism.worker.host_chunks import ChunkThread, HostChunks
from prism.worker.housekeeping import Housekeeping
from prism.worker.kernel_thread import KernelThread
from prism.worker.loading import JobEvent
from prism.worker.loop import Worker, index_of
from prism.worker.open_device import open_device
from prism.worker.outside import Outside
from prism.worker.reports import make_report
from prism.worker.stepper import LOOK_SECONDS

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.5
LEAST_READING = 0.002
"""Seconds for which requests may be taken in before steps have a turn, if these have not taken longer: a
thousand that come at once take 0.2 s."""


class ThreadJobs:
    """Runs jobs on threads of their own; `wake` becomes readable when an event is there."""

    def __init__(self) -> None:
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events: queue.SimpleQueue[JobEvent] = queue.SimpleQueue()

    def start(self, work: Callable[[], JobEvent]) -> None:
        """Run `work` beside the loop."""

        def run() -> None:
            self._events.put(work())
            os.eventfd_write(self.wake, 1)

        threading.Thread(target=run, daemon=True).start()

    def finished(self) -> Iterator[JobEvent]:
        """Events that have come in."""
        try:
            os.eventfd_read(self.wake)
        except BlockingIOError:
            return
        while not self._events.empty():
            yield self._events.get()


class Sockets:
    """The worker's connections, as its outbox."""

    def __init__(self, run_dir: Path, name: str, incarnation: int) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.address = transport.socket_address(run_dir, f"{name}.{incarnation}")
        self.router = transport.bind_router(context, self.address)
        self.agent = transport.connect_dealer(
            context,
            transport.socket_address(run_dir, "agent"),
            transport.identity_of(name, incarnation),
        )
        self.peers: dict[str, Role] = {}

    def to_gateway(self, gateway: GatewayId, message: Started | Outputs | Rejected | Returned) -> None:
        """To one gateway."""
        transport.send(self.router, message, gateway)

    def to_agent(self, message: WeightsWanted | Hello | Ready) -> None:
        """To the agent."""
        transport.send(self.agent, message)

    def to_controller(self, message: CommandDone) -> None:
        """To every controller that is connected: there is one at most, and maybe its predecessor."""
        for peer, role in self.peers.items():
            if role is Role.CONTROLLER:
                transport.send(self.router, message, peer)

    def report(self, message: Report) -> None:
        """To everybody who said Hello."""
        for peer in self.peers:
            transport.send(self.router, message, peer)


class Process:
    """Feeds events to the worker and lets it work in between."""

    def __init__(self, worker: Worker, sockets: Sockets, jobs: ThreadJobs, gauges: Gauges) -> None:
        self._worker = worker
        self._sockets = sockets
        self._jobs = jobs
        self._gauges = gauges
        self._clock = SystemClock()
        self._poller = zmq.Poller()
        for source in (sockets.router, sockets.agent, jobs.wake):
            self._poller.register(source, zmq.POLLIN)
        self._is_stopping = False
        self._report_due = 0.0
        self._taken = self._clock.now()
        """When events were taken last: what has passed since is a round of steps."""
        self._housekeeping = Housekeeping(self._check, self._clock.now)
        self._last_states: tuple[str, ...] = ()

    def run(self) -> None:
        """Until told to stop."""
        has_work = True
        self._worker.watch.begin()
        while not self._is_stopping:
            self._take_events(0.0 if has_work else self._idle_seconds())
            has_work = self._worker.advance()
            if not has_work and self._worker.is_device_busy:
                time.sleep(LOOK_SECONDS)
                has_work = True
            if has_work or len(self._worker.requests):
                self._housekeeping.busy()
            else:
                self._housekeeping.idle()
            self._report()
            self._worker.watch.end()

    def stop(self, *_: Any) -> None:
        """From a signal handler."""
        self._is_stopping = True
        os.eventfd_write(self._jobs.wake, 1)

    def _idle_seconds(self) -> float:
        now = self._clock.now()
        timer = self._worker.next_timer()
        until = self._report_due if timer is None else min(timer, self._report_due)
        return max(0.0, until - now)

    def _take_events(self, seconds: float) -> None:
        """Mostly there are none, and asking each source, too, would take three times as long as the poll."""
        round_seconds = self._clock.now() - self._taken
        ready = dict(self._poller.poll(math.ceil(seconds * 1000)))
        if seconds:
            self._worker.watch.waited(seconds)
        if self._jobs.wake in ready:
            for event in self._jobs.finished():
                self._worker.on_job(event)
        if self._sockets.agent in ready:
            for envelope in transport.receive(self._sockets.agent):
                self._on_agent(envelope)
        if self._sockets.router in ready:
            until = self._clock.now() + max(LEAST_READING, round_seconds)
            for envelope in transport.receive(self._sockets.router):
                self._on_peer(envelope)
                if self._clock.now() > until:
                    break
        self._taken = self._clock.now()
        self._worker.watch.passed("messages")

    def _on_agent(self, envelope: Envelope) -> None:
        match envelope.message:
            case WeightsReady(model=model):
                self._worker.on_packed(model)
            case WeightsHeld(model=model, total_bytes=size):
                self._worker.on_held(model, Bytes(size))
            case WeightsFailed(model=model, reason=reason):
                self._worker.on_packing_failed(model, reason)
            case WeightsProgress(model=model, done_bytes=done, total_bytes=total):
                self._worker.models[model].packed_share = done / max(total, 1)
            case ProcessEnded(role=role, name=name, incarnation=incarnation):
                peer = transport.identity_of(name, incarnation)
                self._sockets.peers.pop(peer, None)
                if role is Role.GATEWAY:
                    self._worker.on_gateway_ended(GatewayId(peer))
            case Stop():
                self.stop()
            case _:
                pass  # others that come and go

    def _on_peer(self, envelope: Envelope) -> None:
        sender, message = envelope
        match message:
            case Hello(role=role):
                self._sockets.peers[sender] = role
                self._report_due = 0.0
            case Submit():
                self._worker.on_submit(GatewayId(sender), message)
            case CancelChoice():
                self._worker.on_cancel(GatewayId(sender), message)
            case Homes():
                self._worker.on_homes(message)
            case Activate() | Evict() | SetLimits():
                self._worker.on_command(message)
                self._report_due = 0.0
            case Abandon():
                self._worker.on_abandon(message)
                self._report_due = 0.0
            case _:
                log.error("unexpected message dropped", extra={"sender": sender})

    def _check(self) -> None:
        """The books, and the device's account beside them."""
        self._worker.check()
        self._worker.memory.look()

    def _report(self) -> None:
        """Every `REPORT_SECONDS`, and whenever a model's state has changed."""
        states = tuple(model.state for model in self._worker.models.values())
        now = self._clock.now()
        if now < self._report_due and states == self._last_states:
            return
        self._report_due = now + REPORT_SECONDS
        self._last_states = states
        report = make_report(self._worker, now)
        self._sockets.report(report)
        self._gauges.update(self._worker)
        self._worker.watch.tell()
        garbage.while_busy()


def run(run_dir: Path, name: str, incarnation: int, config: Config) -> int:
    """Serve one device until told to stop; the exit status."""
    logs.setup(config.server.log_level, config.server.log_json)
    device_config = device_of(config, name)
    sockets = Sockets(run_dir, name, incarnation)
    sockets.to_agent(Hello(role=Role.WORKER, name=name, incarnation=incarnation))
    try:
        device = open_device(device_config, config.models)
    except ImportError as error:
        log.error("%s: %s; `prism doctor` says what is missing for devices like this", name, error)
        return 1
    except DriverError as error:
        log.error("%s: the device cannot be opened: %s", name, error)
        return 1
    jobs = ThreadJobs()
    registrations = new_registrations(run_dir / "store.sock", device, config)
    link = ThreadLink(device.backend.copier)
    chunks = new_chunks(device, config)
    fetching = partial(fetch, run_dir / "store.sock")
    outside = Outside(sockets, jobs, fetching, link, SystemClock().now, registrations, chunks)
    worker = Worker(
        config,
        device_config,
        device,
        outside,
        name=WorkerId(name),
        incarnation=Incarnation(incarnation),
        calibrated=calibrated_costs(config),
    )
    metrics = Metrics()
    if incarnation > 1:
        metrics.worker_restarts.labels(name).inc()
    process = Process(worker, sockets, jobs, Gauges(metrics, name))
    signal.signal(signal.SIGTERM, process.stop)
    address = sockets.address
    sockets.to_agent(Ready(role=Role.WORKER, name=name, incarnation=incarnation, address=address))
    registering = None if registrations is None else RegistrationThread(registrations)
    taking = None if chunks is None else ChunkThread(chunks)
    preparing = KernelThread(device.backend, config.models)
    garbage.take_over()
    process.run()
    link.close()
    if taking is not None:
        taking.close()
    if registering is not None:
        registering.close()
    preparing.close()
    return 0


def new_registrations(store: Path, device: Device, config: Config) -> Registrations | None:
    """None if the device gains nothing by them, or if the configuration wants none."""
    budget = config.host_memory.registered
    budget = config.host_memory.budget if budget is None else budget
    pinner = device.backend.pinner
    if pinner is None or budget == 0:
        return None

    def borrow(model: ModelId, *, writable: bool) -> PackedWeights:
        return fetch(store, model, writable=writable, cached=True)

    names = [ModelId(model.name) for model in likely_first(config.models)]
    return Registrations(pinner, borrow, Bytes(budget), names)


def new_chunks(device: Device, config: Config) -> HostChunks | None:
    """None if the configuration has no room for one chunk, which is as large as a slab.

    No more than the machine has: addresses for all of it are reserved at once, and are not without end.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count = min(config.host_memory.kv, machine) // device.slab_bytes
    if config.host_memory.kv and not count:
        log.warning("host_memory.kv is less than a slab of %d bytes: no KV is kept there", device.slab_bytes)
    return HostChunks(device.slab_bytes, count, device.backend.pinner) if count else None


def calibrated_costs(config: Config) -> dict[str, Costs]:
    """Of the models that the configured profile knows by name; the others' follow from their shapes."""
    if config.scheduling.profile is None:
        return {}
    profile = read_profile(Path(config.scheduling.profile))
    return {model.name: profile.costs(model.name) for model in config.models if model.name in profile.models}


def device_of(config: Config, name: str) -> DeviceConfig:
    """The device that a worker of this name serves."""
    return config.devices[index_of(name)]
