"""What a decode step costs the worker's loop in Python, measured without a GPU.

Usage: python benchmarks/engine/host.py [--batches 64,512] [--steps 160] [--temperature 1.0] [--churn]
       [--pause MS] [--profile]

The worker is the real one: scheduler, blocks, bookkeeping, messages. Steps of its small model draw random
tokens at once, which are told when the step behind them has been queued, as those of a busy GPU are. Inputs
are staged as for a GPU, into memory of the host. Launches and kernels are not in these figures.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism.attention.kernels import KvView
from prism.config import Config
from prism.engine.gpu.columns import DecodeRows, TableNotes, slots_of, stage_columns
from prism.engine.gpu.draw_table import DrawTable
from prism.engine.gpu.staging import Staging
from prism.engine.sampler import Sampled
from prism.engine.sequence import Sequence
from prism.engine.step import Step
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.messages import Submit, encode
from prism.models.decoder import Decoder
from prism.types import Bytes, GatewayId, Incarnation, LaneId, MiB, ModelId, SamplingParams, Slo, WorkerId
from prism.weights.client import PackedWeights, pack_here
from prism.weights.copiers import Copier
from prism.weights.link import Traffic
from prism.weights.protocol import WeightSource
from prism.weights.transfers import Transfer
from prism.worker import garbage
from prism.worker.cpu_device import TorchBackend
from prism.worker.device import Device
from prism.worker.loop import Worker
from prism.worker.outside import Outside

SLAB = Bytes(2 * MiB)
GATEWAY = GatewayId("gateway-0.1")
MODEL = ModelId("small")
VOCAB = 128256
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 128001,
}
STOPS = (128001, 128008, 128009)

clock = time.perf_counter


class Times:
    """Seconds of the present step by phase; what is timed inside of another phase is not counted there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, counted."""

        def counted(*args: Any, **options: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            begin = clock()
            result = call(*args, **options)
            spent = clock() - begin
            self.seconds[phase] += spent - self._inner
            self._inner = outer + spent
            return result

        return counted


class InstantFlight:
    """A step that has run once the next one is queued, or nobody has anything to queue."""

    def __init__(self, runner: InstantRunner, step: Step, sampled: tuple[Sequence, ...]) -> None:
        self.step = step
        self.sampled = sampled
        self.is_begun = self.is_launched = False
        self._runner = runner
        self._number = runner.num_steps
        self._num_looks = 0

    def launch(self, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        """See `InFlight.launch`."""
        has_advanced = not self.is_launched
        self.is_begun = self.is_launched = True
        return has_advanced

    def is_done(self) -> bool:
        """See `InFlight.is_done`."""
        self._num_looks += 1
        return self._runner.num_steps > self._number or self._num_looks > 4

    def draws(self) -> Sampled:
        """See `InFlight.draws`."""
        return Sampled(self._runner.tokens[: len(self.sampled)].tolist(), {})


class InstantRunner:
    """Stages what a GPU's step needs, and draws without computing anything."""

    def __init__(self, kv: KvView, max_batch: int) -> None:
        self.kv = kv
        self.num_steps = 0
        self.tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 128000, max_batch))
        self._rows = DecodeRows()
        self._draws = DrawTable(4 * max_batch + 1)
        self._pinned = np.empty(1 << 18, np.int32)

    def run(self, step: Step, *, is_apart: bool = False) -> InstantFlight:
        """See `Runner.run`."""
        self.num_steps += 1
        sampled = step.sampled
        staging = Staging(self._pinned)
        if step.has_prompts:
            self._rows.forget()
            slots = slots_of(sampled)
        else:
            self._rows.look(step)
            slots = self._rows.slots
            stage_columns(staging, step, self._rows, len(slots))
        first = sampled if step.has_prompts else step.begun
        new = [sequence for sequence in first if not sequence.is_token_placed]
        self._draws.enter(new)
        lengths = np.array([sequence.num_computed for sequence in sampled], np.int32)
        self._draws.stage(staging, slots, lengths, len(slots))
        TableNotes(staging, step, 256, newest_known=not step.has_prompts)
        for sequence in new:
            sequence.is_token_placed = True
        return InstantFlight(self, step, sampled)


class InstantBackend(TorchBackend):
    """A CPU with runners of this kind."""

    max_entries = 1 << 15

    def __init__(self, times: Times, max_batch: int) -> None:
        super().__init__(torch.device("cpu"))
        self.max_sequences = 4 * max_batch
        self._times = times
        self._max_batch = max_batch

    def runner(self, model: Decoder, kv: KvView, lane: LaneId) -> Any:
        """See `Backend.runner`."""
        return InstantRunner(kv, self._max_batch)


class InlineLink:
    """Copies when it is waited for."""

    def __init__(self, copier: Copier) -> None:
        self._traffic = Traffic(copier)

    def start(self, transfer: Transfer) -> None:
        """See `Link.start`."""
        self._traffic.add(transfer)

    def wait(self, transfer: Transfer) -> None:
        """See `Link.wait`."""
        while not transfer.has_ended.is_set():
            self._traffic.step()


class Outbox:
    """Encodes what is sent, as sockets do; keeps nothing."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def to_gateway(self, gateway: GatewayId, message: Any) -> None:
        """See `Outbox.to_gateway`."""
        self.num_bytes += len(encode(message))

    def to_agent(self, message: Any) -> None:
        """See `Outbox.to_agent`."""

    def to_controller(self, message: Any) -> None:
        """See `Outbox.to_controller`."""


class Jobs:
    """Runs them on the spot; their ends are events for the next round."""

    def __init__(self) -> None:
        self.ended: list[Any] = []

    def start(self, work: Callable[[], Any]) -> None:
        """See `Jobs.start`."""
        self.ended.append(work())


class Host:
    """A worker with one model, and the phases of its steps."""

    def __init__(self, folder: Path, batch: int) -> None:
        (folder / "config.json").write_text(json.dumps(SHAPE))
        self.times = Times()
        self.jobs = Jobs()
        self.outbox = Outbox()
        self._num_requests = 0
        self._random = np.random.default_rng(0)
        num_slabs = 1024
        config = Config.model_validate(
            {
                "models": [{"name": MODEL, "path": str(folder), "preload": True}],
                "devices": [
                    {
                        "memory": num_slabs * SLAB,
                        "slab": SLAB,
                        "max_batch_size": batch,
                        "max_batch_tokens": 8192,
                    }
                ],
            }
        )
        pool = SlabPool(HostDriver(Bytes(num_slabs * SLAB)), SLAB, num_slabs)
        backend = InstantBackend(self.times, batch)
        device = Device(pool._driver, pool, torch.device("cpu"), "cpu:0", backend)
        self.worker = Worker(
            config,
            config.devices[0],
            device,
            Outside(
                outbox=self.outbox,
                jobs=self.jobs,
                fetch=lambda _: self._pack(folder),
                link=InlineLink(backend.copier),
                clock=time.time,
            ),
            name=WorkerId("worker-0"),
            incarnation=Incarnation(1),
        )
        self._load()
        self._instrument()

    def _pack(self, folder: Path) -> PackedWeights:
        return pack_here(WeightSource(model=MODEL, path=str(folder), load_format="dummy"))

    def _load(self) -> None:
        model = self.worker.models[MODEL]
        while not model.is_active:
            self.worker.advance()
            self.worker.on_packed(MODEL)
            for event in self.jobs.ended:
                self.worker.on_job(event)
            self.jobs.ended.clear()
            assert model.error is None, model.error

    def _instrument(self) -> None:
        engine = self.worker.models[MODEL].engine
        assert engine is not None
        timed: Any = self.times.timed
        for owner, name, phase in (
            (engine.scheduler, "wants", "schedule"),
            (engine, "schedule", "schedule"),
            (engine, "run", "inputs"),
            (engine, "commit", "commit"),
            (self.worker._stepper, "_account", "publish"),
            (self.outbox, "to_gateway", "publish"),
            (self.worker, "advance", "rest"),
        ):
            setattr(owner, name, timed(phase, getattr(owner, name)))
        self._engine: Any = engine

    def submit(self, max_tokens: int, temperature: float) -> None:
        """One more request, that has just come."""
        now, number = time.time(), self._num_requests
        self._num_requests += 1
        prompt = self._random.integers(0, 128000, 16 + number % 64).tolist()
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=number, stop_token_ids=STOPS
        )
        submit = Submit(
            request_id=f"chatcmpl-{number:032d}",
            attempt=0,
            model=MODEL,
            prompt=prompt,
            params=params,
            slo=Slo(60.0, 0.1),
            arrival=now,
            latest_end=now + 600,
        )
        self.worker.on_submit(GATEWAY, submit)

    def run(
        self, batch: int, num_steps: int, temperature: float, *, churn: bool, pause: float
    ) -> list[dict[str, float]]:
        """Seconds by phase of each step of (nearly) `batch` sequences.

        All begin at once and draw `num_steps` tokens each; with `churn` those that have ended are replaced.
        Behind each step the loop turns for `pause` seconds, as it does while a GPU computes.
        """
        steps, runner, usage = [], self._engine.runner, self.worker.models[MODEL].usage
        least = 0.95 * batch if churn else batch
        for i in range(batch):
            self.submit(1 + i * num_steps // batch if churn else num_steps, temperature)
        while len(self.worker.requests) and runner.num_steps < (5 if churn else 1) * num_steps:
            while churn and len(self.worker.requests) < batch:
                self.submit(num_steps, temperature)
            before = runner.num_steps, usage.decoded_tokens
            self.times.seconds.clear()
            self.worker.advance()
            if runner.num_steps == before[0] + 1 and usage.decoded_tokens - before[1] >= least:
                steps.append(dict(self.times.seconds))
            end = clock() + pause * (runner.num_steps - before[0])
            while clock() < end:
                pass
        self.worker.check()
        return steps


def figures(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians in milliseconds."""
    if not steps:
        raise SystemExit(
            "no step had all sequences: with more --steps the first do not end before the last begin"
        )
    phases = ("schedule", "inputs", "commit", "publish", "rest")
    found = {
        phase: round(statistics.median(step.get(phase, 0.0) for step in steps) * 1e3, 3) for phase in phases
    }
    total = statistics.median(sum(step.values()) for step in steps)
    return found | {"total": round(total * 1e3, 3), "steps": len(steps)}


def main() -> None:
    """Prints one line for each batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="64,512")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--churn", action="store_true", help="some end at each step, and others come")
    parser.add_argument("--pause", type=float, default=0.0, help="milliseconds that a GPU would compute")
    parser.add_argument("--profile", action="store_true", help="functions by their own time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for batch in map(int, options.batches.split(",")):
        with tempfile.TemporaryDirectory() as name:
            host = Host(Path(name), batch)
            garbage.take_over()
            profile = cProfile.Profile()
            if options.profile:
                profile.enable()
            pause = options.pause / 1e3
            steps = host.run(batch, options.steps, options.temperature, churn=options.churn, pause=pause)
            profile.disable()
        print(json.dumps({"batch": batch} | figures(steps)), flush=True)
        if options.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
