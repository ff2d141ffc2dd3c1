"""A whole worker in the benchmark's process: the server's loop, memory and loads, without sockets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism.clock import SystemClock
from prism.config import Config
from prism.messages import CommandDone, Outputs, Rejected, Returned, Started, Submit, WeightsWanted
from prism.types import GatewayId, Incarnation, ModelId, SamplingParams, Slo, WorkerId
from prism.weights.client import PackedWeights, pack_here
from prism.weights.link import ThreadLink
from prism.weights.protocol import WeightSource
from prism.worker import garbage
from prism.worker.loop import Worker
from prism.worker.main import ThreadJobs
from prism.worker.open_device import open_device
from prism.worker.outside import Outside

GATEWAY = GatewayId("benchmark")


class Outbox:
    """Counts what comes out."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.first: dict[str, float] = {}
        self.finished: set[str] = set()
        self.wanted: list[str] = []
        self.done: list[CommandDone] = []

    def to_gateway(self, gateway: GatewayId, message: Started | Outputs | Rejected | Returned) -> None:
        """Tokens and ends; a refusal or return is a mistake of the benchmark."""
        assert not isinstance(message, Rejected | Returned), message
        if isinstance(message, Outputs):
            now = time.perf_counter()
            self.num_tokens += len(message.tokens) + sum(len(item.token_ids) for item in message.items)
            for token in message.tokens:
                self.first.setdefault(token.request_id, now)
            for item in message.items:
                self.first.setdefault(item.request_id, now)
                if item.finish is not None:
                    self.finished.add(item.request_id)

    def to_agent(self, message: WeightsWanted) -> None:
        """Weights are packed in this process."""
        self.wanted.append(message.model)

    def to_controller(self, message: CommandDone) -> None:
        """How commands ended."""
        self.done.append(message)


class BenchWorker:
    """`models` are entries of a configuration; all have `load_format: dummy`."""

    def __init__(self, models: Sequence[dict[str, Any]], device: dict[str, Any]) -> None:
        entries = [{"load_format": "dummy"} | model for model in models]
        self.config = Config.model_validate({"models": entries, "devices": [device]})
        self.paths = {model.name: model.path for model in self.config.models}
        self.outbox, self.jobs, self.clock = Outbox(), ThreadJobs(), SystemClock()
        self.device = open_device(self.config.devices[0], self.config.models)
        self._packed: dict[str, PackedWeights] = {}
        self.link = ThreadLink(self.device.backend.copier)
        self.worker = Worker(
            self.config,
            self.config.devices[0],
            self.device,
            Outside(self.outbox, self.jobs, self._fetch, self.link, self.clock.now),
            name=WorkerId("worker-0"),
            incarnation=Incarnation(1),
        )
        garbage.take_over()

    def _fetch(self, model: ModelId) -> PackedWeights:
        return pack_here(WeightSource(model=model, path=str(Path(self.paths[model])), load_format="dummy"))

    def submit(self, name: str, model: str, prompt: list[int], max_tokens: int) -> None:
        """A greedy request that has just arrived."""
        now = self.clock.now()
        self.worker.on_submit(
            GATEWAY,
            Submit(
                request_id=name,
                attempt=0,
                model=model,
                prompt=prompt,
                params=SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0),
                slo=Slo(60.0, 10.0),
                arrival=now,
                latest_end=now + 3600,
            ),
        )

    def run(self) -> None:
        """Until every request has ended."""
        while len(self.worker.requests):
            self.turn()

    def turn(self) -> None:
        """One round of the loop, as the worker's process makes it."""
        for model in self.outbox.wanted:
            self.worker.on_packed(model)
        self.outbox.wanted.clear()
        for event in self.jobs.finished():
            self.worker.on_job(event)
        if not self.worker.advance():
            time.sleep(20e-6)

    def close(self) -> None:
        """Give all memory back."""
        for model in self.worker.models.values():
            model.is_wanted = False
            if model.is_active:
                self.worker.evict(model)
        while any(model.is_evicting for model in self.worker.models.values()):
            self.turn()
        for model in self.worker.models.values():
            if model.arena is not None:
                model.arena.close()
        self.link.close()
        self.device.close()
