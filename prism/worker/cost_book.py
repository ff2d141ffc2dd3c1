"""What each model's work costs on this device, as far as is known: predicted, then corrected by what was
seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from prism.costs import Corrections, Costs, DeviceRates, Shape, from_shape
from prism.engine.step import Step
from prism.types import Bytes, ModelId
from prism.worker.models import Profile

DOUBT = 0.1
"""Of a step's least time, if it has prompts: of one size and another the profile may be off by so much."""
RISE = 0.02
"""Of the way from the shortest time of late to that of a step which took longer."""
REFRESH = 16
"""Measurements after which the corrected costs are made anew."""


class Expected(NamedTuple):
    """Of a step that is about to run."""

    kind: str
    num_tokens: int
    seconds: float
    """By the profile, or by shape and rates, before corrections; 0 if the model is unknown."""
    least: float
    """It takes no less, going by the shortest of its kind; 0 before any has run."""


@dataclass(slots=True)
class Steps:
    """Those of one kind that have run; all of it only grows."""

    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    predicted: float = 0.0
    """By the profile, or by shape and rates, before corrections."""

    def add(self, num_tokens: int, seconds: float, predicted: float) -> None:
        """One more has run."""
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.seconds += seconds
        self.predicted += predicted


@dataclass(slots=True)
class Compared:
    """Work of one kind that has been done, and what the profile says of it; all of it only grows."""

    count: int = 0
    seconds: float = 0.0
    predicted: float = 0.0

    def add(self, seconds: float, predicted: float) -> None:
        """One more has been done."""
        self.count += 1
        self.seconds += seconds
        self.predicted += predicted


class Alone:
    """What a model's work takes: steps that had the device to themselves, and loads that had the link.

    Steps beside loads count, and so do loads beside steps.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs.digest
        """Of those that predict."""
        self.kinds = {"decode": Compared(), "prompt": Compared(), "load": Compared()}


class _Page:
    """One model."""

    def __init__(self, start: Costs, *, is_measured: bool) -> None:
        self.start = start
        self.alone = Alone(start) if is_measured else None
        """Shapes tell too little to be compared with."""
        self.steps = {"decode": Steps(), "prompt": Steps()}
        self.least = {"decode": 0.0, "prompt": 0.0}
        """Shortest times of late, in those predicted by `start`."""
        self.corrections = Corrections()
        self.costs = start
        self._num_seen = 0

    def ran(self, kind: str, predicted: float, seconds: float) -> None:
        """A step has taken so long."""
        ratio, least = seconds / max(predicted, 1e-9), self.least[kind]
        self.least[kind] = least + RISE * (ratio - least) if 0 < least < ratio else ratio
        if kind == "prompt":
            self.corrections.saw_prompt(predicted, seconds)
        else:
            self.corrections.saw_decode(predicted, seconds)
        self.seen()

    def seen(self) -> None:
        """A measurement has been taken in."""
        self._num_seen += 1
        if self._num_seen % REFRESH == 0 or self._num_seen < REFRESH:
            self.costs = self.corrections.apply(self.start)


class CostBook:
    """Costs by model. `calibrated` are those of a profile; for other models they follow from the shape."""

    def __init__(self, rates: DeviceRates, calibrated: Mapping[str, Costs]) -> None:
        self._rates = rates
        self._calibrated = calibrated
        self._pages: dict[ModelId, _Page] = {}

    def learn(self, model: ModelId, profile: Profile) -> None:
        """The model's shape is known now."""
        if model not in self._pages:
            known = self._calibrated.get(model)
            start = known or from_shape(shape_of(profile), self._rates)
            self._pages[model] = _Page(start, is_measured=known is not None)

    def of(self, model: ModelId) -> Costs | None:
        """What is believed now; None while not even the shape is known."""
        page = self._pages.get(model)
        return None if page is None else page.costs

    def expect(self, model: ModelId, step: Step) -> Expected:
        """What a step is going to take.

        At least, that is what the shortest of its kind have taken of late: those that had the device to
        themselves. A step that ends sooner than was thought tells at once, those that take longer little by
        little, since they may have had neighbours.
        """
        page, kind, work = self._pages.get(model), kind_of(step), work_of(step)
        if page is None:
            return Expected(kind, work.tokens, 0.0, 0.0)
        seconds = page.start.steps.step(*work)
        doubt = DOUBT if kind == "prompt" else 0.0
        return Expected(kind, work.tokens, seconds, (1 - doubt) * page.least[kind] * seconds)

    def ran(self, model: ModelId, step: Expected, seconds: float, *, is_timed: bool = True) -> None:
        """A step has taken so long, whatever ran beside it; roughly, unless `is_timed`."""
        page = self._pages.get(model)
        if page is None:
            return
        page.steps[step.kind].add(step.num_tokens, seconds, step.seconds)
        if is_timed and seconds > 0:
            page.ran(step.kind, step.seconds, seconds)

    def steps(self, model: ModelId) -> Mapping[str, Steps]:
        """Steps of a model that have run, by kind: `decode`, and `prompt` for those with a prompt's chunk."""
        page = self._pages.get(model)
        return {} if page is None else page.steps

    def ran_alone(self, model: ModelId, step: Expected, seconds: float) -> None:
        """A step, told to `ran` before, had the device to itself, and its beginning and end were seen."""
        alone = self.alone(model)
        if alone is not None:
            alone.kinds[step.kind].add(seconds, step.seconds)

    def alone(self, model: ModelId) -> Alone | None:
        """None if the profile does not know the model."""
        page = self._pages.get(model)
        return None if page is None else page.alone

    def loaded(self, model: ModelId, seconds: float, *, is_alone: bool = False) -> None:
        """The model's weights have come within so long, perhaps with the link to themselves."""
        page = self._pages.get(model)
        if page is None:
            return
        page.corrections.saw_load(page.start.activation, seconds)
        page.seen()
        if is_alone and page.alone is not None:
            page.alone.kinds["load"].add(seconds, page.start.activation)


def kind_of(step: Step) -> str:
    """`prompt` if any of a prompt is in it, else `decode`."""
    return "prompt" if step.has_prompts else "decode"


class Work(NamedTuple):
    """What a step's time depends on; see `StepCosts.step`."""

    tokens: int
    pairs: float
    context: int


def work_of(step: Step) -> Work:
    """Of any step."""
    num_decodes = len(step.decodes)
    if not step.prompts:
        return Work(num_decodes, 0.0, step.context)
    pairs = sum(length * (start + length / 2) for _, start, length, _ in step.prompts)
    return Work(num_decodes + step.num_prompt_tokens, pairs, step.context)


def chunk_seconds(costs: Costs, step: Step) -> list[float]:
    """A step's time by chunk: tokens have equal parts of the matrix products, and each its own context."""
    steps = costs.steps
    num_tokens = len(step.decodes) + step.num_prompt_tokens
    per_token = steps.gemm(num_tokens, has_prompts=step.has_prompts) / max(num_tokens, 1)
    decodes: list[float] = (per_token + steps.per_context * (step.positions + 1)).tolist()
    prompts = [
        length * (per_token + steps.per_pair * (start + length / 2)) for _, start, length, _ in step.prompts
    ]
    return decodes + prompts


def shape_of(profile: Profile) -> Shape:
    """What costs follow from."""
    spec, layout = profile.spec, profile.weights
    embedding = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
    return Shape(
        num_parameters=layout.num_parameters - embedding,
        weight_bytes=layout.total_bytes,
        read_bytes=Bytes(layout.total_bytes - embedding * spec.dtype.itemsize),
        kv_bytes_per_token=spec.kv_bytes_per_token,
        num_layers=spec.num_layers,
        attention_width=spec.num_heads * spec.head_dim,
        position_bytes=spec.position_bytes,
    )
