"""A worker whose clock is its device's: steps and loads take what costs say, and nothing else takes time.

All else is the worker's own: scheduler, turns, admission, memory, residency. Nothing is computed. So what it
does can be held against what the simulator says, to the microsecond.
"""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from prism.attention.kernels import KvView
from prism.config import Config
from prism.costs import Costs, StepCosts
from prism.engine.runner import Runner
from prism.engine.sampler import Sampled
from prism.engine.sequence import Sequence as Choice
from prism.engine.step import Step
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.messages import Homes, Outputs, Rejected, Returned, Started, Submit
from prism.models.decoder import Decoder
from prism.types import Bytes, GatewayId, Incarnation, LaneId, ModelId, SamplingParams, Slo, WorkerId
from prism.weights.client import PackedWeights, pack_here
from prism.weights.protocol import WeightSource
from prism.worker.cpu_device import TorchBackend
from prism.worker.device import Device
from prism.worker.loading import JobEvent, Load
from prism.worker.loop import Worker
from prism.worker.outside import Outside
from tests.support.local_worker import GATEWAY, InlineLink, RecordingOutbox

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def write_model(folder: Path, vocab_size: int) -> Path:
    """A model of 3.4 million parameters and 256 for each token; those of one worker differ by that."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": vocab_size}))
    return folder


class Asked(NamedTuple):
    """A request; `at` in seconds from the beginning."""

    name: str
    at: float
    model: ModelId
    prompt: int
    output: int


class VirtualFlight:
    """A step that has run when it has been launched; what comes meanwhile comes in between."""

    def __init__(self, worker: VirtualWorker, step: Step, seconds: float) -> None:
        self.step = step
        self.sampled: tuple[Choice, ...] = step.sampled
        self.is_begun = self.is_launched = False
        self._worker = worker
        self._end = worker.now + seconds

    def launch(self, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        if self.is_launched:
            return False
        self.is_begun = True
        worker = self._worker
        worker.now = min(self._end, max(worker.now, worker.next_event()))
        self.is_launched = worker.now == self._end
        return True

    def is_done(self) -> bool:
        return self.is_launched

    def draws(self) -> Sampled:
        return Sampled([7] * len(self.sampled), {})


class VirtualRunner:
    """Computes nothing."""

    def __init__(self, worker: VirtualWorker, kv: KvView, costs: StepCosts) -> None:
        self.kv = kv
        self._worker = worker
        self._costs = costs

    def run(self, step: Step, *, is_apart: bool = False) -> VirtualFlight:
        for chunk in step.chunks:
            chunk.sequence.num_tabled = len(chunk.sequence.blocks)
            chunk.sequence.is_token_placed = True
        pairs = sum(length * (start + length / 2) for _, start, length, _ in step.prompts)
        tokens = len(step.decodes) + step.num_prompt_tokens
        return VirtualFlight(self._worker, step, self._costs.step(tokens, pairs, step.context))


class VirtualBackend(TorchBackend):
    """Tells models by their vocabularies."""

    def __init__(self, worker: VirtualWorker, costs: Mapping[int, StepCosts]) -> None:
        super().__init__(torch.device("cpu"))
        self._worker = worker
        self._costs = costs

    def runner(self, model: Decoder, kv: KvView, lane: LaneId) -> Runner:
        return VirtualRunner(self._worker, kv, self._costs[model.spec.vocab_size])


class VirtualJobs:
    """Loads come one after the other, as long as they take; all else takes no time."""

    def __init__(self, worker: VirtualWorker, costs: Mapping[ModelId, Costs]) -> None:
        self._worker = worker
        self._costs = costs
        self._is_free_at = 0.0
        self._numbers = count()
        self._ends: list[tuple[float, int, Callable[[], JobEvent]]] = []

    def start(self, work: Callable[[], JobEvent]) -> None:
        end, owner = self._worker.now, getattr(work, "__self__", None)
        if isinstance(owner, Load):
            end = max(end, self._is_free_at) + self._costs[owner._plan.model].activation
            self._is_free_at = end
        heapq.heappush(self._ends, (end, next(self._numbers), work))

    @property
    def next_end(self) -> float:
        return self._ends[0][0] if self._ends else float("inf")

    def ended(self) -> Callable[[], JobEvent]:
        return heapq.heappop(self._ends)[-1]


class TimedOutbox(RecordingOutbox):
    """Notes when tokens come."""

    def __init__(self, worker: VirtualWorker) -> None:
        super().__init__()
        self._worker = worker
        self.times: dict[str, list[float]] = {}

    def to_gateway(self, gateway: GatewayId, message: Started | Outputs | Rejected | Returned) -> None:
        super().to_gateway(gateway, message)
        if isinstance(message, Outputs):
            for name in [*(t.request_id for t in message.tokens), *(i.request_id for i in message.items)]:
                self.times.setdefault(name, []).append(self._worker.now)


class VirtualWorker:
    """See the module's docstring. `folders` are the models' (`write_model`)."""

    def __init__(
        self, config: Config, folders: Mapping[ModelId, Path], costs: Mapping[ModelId, Costs]
    ) -> None:
        self.now = 1000.0
        self.outbox, self.jobs = TimedOutbox(self), VirtualJobs(self, costs)
        self._folders = folders
        self._coming = deque[Asked]()
        self._begin = self.now
        device, vocabularies = config.devices[0], {}
        for name, folder in folders.items():
            vocabularies[json.loads((folder / "config.json").read_text())["vocab_size"]] = costs[name].steps
        driver = HostDriver(Bytes(device.memory))
        pool = SlabPool(driver, device.slab, device.memory // device.slab)
        backend = VirtualBackend(self, vocabularies)
        self.worker = Worker(
            config,
            device,
            Device(driver, pool, torch.device("cpu"), "cpu:0", backend),
            Outside(self.outbox, self.jobs, self._fetch, InlineLink(backend.copier), lambda: self.now),
            name=WorkerId("worker-0"),
            incarnation=Incarnation(1),
            calibrated={str(name): each for name, each in costs.items()},
        )

    def _fetch(self, model: ModelId) -> PackedWeights:
        source = WeightSource(model=model, path=str(self._folders[model]), load_format="dummy")
        return pack_here(source)

    def next_event(self) -> float:
        """When a request or a load comes."""
        return min(self._next_arrival, self.jobs.next_end)

    @property
    def _next_arrival(self) -> float:
        return self._begin + self._coming[0].at if self._coming else float("inf")

    def serve(self, asked: Sequence[Asked], slos: Mapping[ModelId, Slo]) -> dict[str, list[float]]:
        """When each request had its tokens, in seconds from the beginning."""
        self._coming, self._begin, random = deque(asked), self.now, Random(0)
        worker, names = self.worker, list(self._folders)
        for name in names:
            worker.on_held(name, Bytes(1))
        worker.on_homes(Homes(epoch=1, models=[str(name) for name in names]))
        while True:
            while self._next_arrival <= self.now:
                self._submit(self._coming.popleft(), slos, random)
            for model in self.outbox.wanted:
                worker.on_packed(model)
            self.outbox.wanted.clear()
            while self.jobs.next_end <= self.now:
                worker.on_job(self.jobs.ended()())
            begin = self.now
            if worker.advance() or self.now > begin or self.outbox.wanted or self.jobs.next_end <= self.now:
                continue
            if not self._coming and not len(worker.requests):
                worker.check()
                times = self.outbox.times
                return {name: [time - self._begin for time in each] for name, each in times.items()}
            timer = worker.next_timer()
            self.now = min(self.next_event(), float("inf") if timer is None else max(timer, self.now + 1e-6))

    def _submit(self, asked: Asked, slos: Mapping[ModelId, Slo], random: Random) -> None:
        prompt = [random.randrange(100) for _ in range(asked.prompt)]
        params = SamplingParams(max_tokens=asked.output, temperature=0.0, seed=0)
        self.worker.on_submit(
            GATEWAY,
            Submit(
                request_id=asked.name,
                attempt=0,
                model=asked.model,
                prompt=prompt,
                params=params,
                slo=slos[asked.model],
                arrival=self._begin + asked.at,
                latest_end=self._begin + asked.at + 600,
            ),
        )
