"""A worker in the test's own process: real memory and models, no sockets, no threads, a manual clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from prism.config import Config
from prism.costs import Costs
from prism.errors import DriverError
from prism.memory.driver import Driver
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.memory.tensors import tensor_at
from prism.messages import (
    CancelChoice,
    CommandDone,
    Outputs,
    Rejected,
    Returned,
    Started,
    Submit,
    WeightsWanted,
)
from prism.types import Bytes, GatewayId, Incarnation, MiB, ModelId, SamplingParams, Slo, WorkerId
from prism.weights.client import PackedWeights, pack_here
from prism.weights.copiers import Copier
from prism.weights.link import Traffic
from prism.weights.protocol import WeightSource
from prism.weights.registrations import Pinner, Registrations
from prism.weights.transfers import Transfer
from prism.worker.cpu_device import cpu_device
from prism.worker.device import Backend, Device
from prism.worker.host_chunks import HostChunks
from prism.worker.loading import JobEvent
from prism.worker.loop import Worker
from prism.worker.outside import Outside

SLAB = Bytes(2 * MiB)
GATEWAY = GatewayId("gateway-0.1")


class QueuedJobs:
    """Jobs run when the test pumps them."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], JobEvent]] = []

    def start(self, work: Callable[[], JobEvent]) -> None:
        self.queue.append(work)


class InlineLink:
    """A link without a thread: who waits for a transfer does the copying."""

    def __init__(self, copier: Copier) -> None:
        self.traffic = Traffic(copier)

    def start(self, transfer: Transfer) -> None:
        self.traffic.add(transfer)

    def wait(self, transfer: Transfer) -> None:
        while not transfer.has_ended.is_set():
            assert self.traffic.step() or transfer.has_ended.is_set()


class InlineChunks(HostChunks):
    """Host memory that is there as soon as it is asked for; `fail_at` counts chunks from 0."""

    def __init__(self, budget: int, fail_at: int | None = None, pinner: Pinner | None = None) -> None:
        super().__init__(SLAB, budget // SLAB, pinner)
        self.fail_at = fail_at

    def ask(self, count: int) -> None:
        super().ask(count)
        while self.make():
            pass

    def _take(self, number: int) -> None:
        if number == self.fail_at:
            raise DriverError("cuMemHostRegister", "injected")
        super()._take(number)


class RecordingOutbox:
    """Keeps what was sent."""

    def __init__(self) -> None:
        self.started: dict[str, Started] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finished: dict[tuple[str, int], str] = {}
        self.rejected: dict[str, Rejected] = {}
        self.returned: list[str] = []
        self.wanted: list[str] = []
        self.done: list[CommandDone] = []

    def to_gateway(self, gateway: GatewayId, message: Started | Outputs | Rejected | Returned) -> None:
        match message:
            case Started():
                self.started[message.request_id] = message
            case Rejected():
                assert message.request_id not in self.rejected
                self.rejected[message.request_id] = message
            case Returned():
                self.returned.append(message.request_id)
            case Outputs():
                for token in message.tokens:
                    self._append((token.request_id, token.choice), token.index, [token.token])
                for item in message.items:
                    key = (item.request_id, item.choice)
                    self._append(key, item.index, item.token_ids)
                    if item.finish is not None:
                        self.finished[key] = item.finish.value

    def _append(self, key: tuple[str, int], index: int, token_ids: list[int]) -> None:
        tokens = self.tokens.setdefault(key, [])
        assert index == len(tokens), "a gap or a repetition"
        assert key not in self.finished, "a token after the end"
        tokens += token_ids

    def to_agent(self, message: WeightsWanted) -> None:
        self.wanted.append(message.model)

    def to_controller(self, message: CommandDone) -> None:
        self.done.append(message)


class LocalWorker:
    """See the module's docstring."""

    def __init__(
        self,
        models: dict[str, Path],
        num_slabs: int,
        driver: Driver | None = None,
        model_options: dict[str, dict[str, Any]] | None = None,
        registrations: Registrations | None = None,
        backend: Backend | None = None,
        device: Device | None = None,
        chunks: HostChunks | None = None,
        host_kv: int = 64 * MiB,
        scheduling: dict[str, Any] | None = None,
        sections: dict[str, Any] | None = None,
        calibrated: dict[str, Costs] | None = None,
        **settings: Any,
    ) -> None:
        options = model_options or {}
        self.config = Config.model_validate(
            {
                "models": [{"name": n, "path": str(p)} | options.get(n, {}) for n, p in models.items()],
                "devices": [{"memory": num_slabs * SLAB, "slab": SLAB} | settings],
                "scheduling": scheduling or {},
            }
            | (sections or {})
        )
        self.paths = models
        self.now = 1000.0
        self.jobs = QueuedJobs()
        self.outbox = RecordingOutbox()
        self.device = device or self._cpu_device(
            driver or HostDriver(Bytes(num_slabs * SLAB)), num_slabs, backend
        )
        self.poison()
        self.chunks = chunks or (
            InlineChunks(host_kv, pinner=self.device.backend.pinner) if host_kv else None
        )
        self.link = InlineLink(self.device.backend.copier)
        self.worker = Worker(
            self.config,
            self.config.devices[0],
            self.device,
            Outside(
                outbox=self.outbox,
                jobs=self.jobs,
                fetch=lambda model: self.fetch(model),
                link=self.link,
                clock=lambda: self.now,
                registrations=registrations,
                chunks=self.chunks,
            ),
            name=WorkerId("worker-0"),
            incarnation=Incarnation(1),
            calibrated=calibrated,
        )

    def _cpu_device(self, driver: Driver, num_slabs: int, backend: Backend | None) -> Device:
        pool = SlabPool(driver, SLAB, num_slabs)
        if backend is None:
            return cpu_device(driver, pool, "cpu:0")
        return Device(driver, pool, torch.device("cpu"), "cpu:0", backend)

    def fetch(self, model: ModelId) -> PackedWeights:
        """Packs on the spot."""
        config = self.config.model(model)
        assert config is not None
        path, quantization = str(self.paths[model]), config.quantization
        return pack_here(WeightSource(model=model, path=path, quantization=quantization))

    def poison(self, slabs: Iterable[int] | None = None) -> None:
        """Fill free slabs with NaN."""
        for slab in self.device.pool.free_slabs() if slabs is None else slabs:
            address = self.device.pool.address(slab)  # type: ignore[arg-type]
            tensor_at(address, (SLAB // 4,), torch.float32, None, self.device.device).fill_(float("nan"))

    def submit(
        self, request_id: str, model: str, prompt: list[int], max_tokens: int = 64, **params: Any
    ) -> None:
        """A greedy request that has just arrived; each one is a little later than those before."""
        settings = {"max_tokens": max_tokens, "temperature": 0.0, "seed": 0} | params
        extra = {
            k: settings.pop(k)
            for k in ("alone", "resumed", "attempt", "clip_max_tokens", "tenant", "weight", "slo")
            if k in settings
        }
        self.now += 0.001
        message = Submit(
            **({"request_id": request_id, "attempt": 0, "slo": Slo(2.0, 0.2)} | extra),
            model=model,
            prompt=prompt,
            params=SamplingParams(**settings),
            arrival=self.now,
            latest_end=self.now + 600,
        )
        self.worker.on_submit(GATEWAY, message)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        self.worker.on_cancel(GATEWAY, CancelChoice(request_id=request_id, attempt=0, choice=choice))

    def pump(self) -> bool:
        """One round of the loop with everything that came in; whether there is more to do."""
        for model in self.outbox.wanted:
            self.worker.on_packed(model)
        self.outbox.wanted.clear()
        if self.jobs.queue:
            self.worker.on_job(self.jobs.queue.pop(0)())
        more = self.worker.advance()
        self.check()
        self.now += 0.001
        more = more or self.worker.is_device_busy
        return more or bool(self.jobs.queue) or bool(self.outbox.wanted)

    def run(self, rounds: int = 5000, until: Callable[[], bool] | None = None) -> None:
        """Pump until idle, or until a condition holds."""
        for _ in range(rounds):
            more = self.pump()
            if until is not None and until():
                return
            if not more and not len(self.worker.requests):
                return
            if not more:
                self.now += 0.5  # nothing moves but timers
        raise AssertionError("the worker does not come to rest")

    def check(self) -> None:
        """Conservation, everywhere; and what is kept for the choice of turns is what a fresh look tells."""
        self.worker.check()
        self.worker._stepper.check()

    def close(self) -> None:
        """Give everything back; fails if the worker holds memory that nobody knows of."""
        for model in self.worker.models.values():
            model.is_wanted = False
            if model.is_active:
                self.worker.evict(model)
        while self.jobs.queue or self.worker.is_device_busy:
            self.worker.advance()
            if self.jobs.queue:
                self.worker.on_job(self.jobs.queue.pop(0)())
        for model in self.worker.models.values():
            if model.arena is not None:
                model.arena.close()
        assert self.device.pool.num_free == self.device.num_slabs, self.device.pool.owners()
        if self.chunks is not None:
            self.chunks.close()
        self.device.close()
