"""One model's engine. `schedule -> run -> commit` is one step; several engines live in one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from prism.engine.kv_blocks import KvSpace
from prism.engine.runner import InFlight, Runner
from prism.engine.scheduler import Scheduler, Slots
from prism.engine.sequence import Sequence
from prism.engine.step import Step
from prism.messages import ResumedChoice, TokenLogprob
from prism.types import FinishReason, RequestId, SamplingParams


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What an engine needs to know of a request."""

    request_id: RequestId
    prompt: list[int]
    params: SamplingParams
    arrival: float = 0.0
    resumed: tuple[ResumedChoice, ...] = ()


class End(NamedTuple):
    """Why a choice has ended."""

    finish: FinishReason
    stop_token: int | None
    """The token that ended it, if one did: it is none of its output."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What a step drew for sequences that still want it, in columns: one place for each of them."""

    sequences: list[Sequence]
    numbers: list[int]
    """Of the tokens in their choices' outputs, from 0."""
    tokens: list[int]
    logprobs: dict[int, TokenLogprob]
    """By place, where they were asked for."""
    ends: dict[int, End] = field(default_factory=dict)
    """By place, of choices that end."""

    def __len__(self) -> int:
        return len(self.sequences)


class Engine:
    """Sequences, blocks and runner of one model."""

    def __init__(
        self, kv: KvSpace, runner: Runner, slots: Slots, *, max_len: int, max_batch_size: int
    ) -> None:
        self.kv = kv
        self.runner = runner
        self.max_len = max_len
        self.num_queued = 0
        """Steps that were handed out and have not been committed."""
        self.scheduler = Scheduler(kv, max_batch_size, slots)

    @property
    def is_idle(self) -> bool:
        """No sequence is unfinished."""
        return self.scheduler.num_sequences == 0

    def attach(self, kv: KvSpace) -> None:
        """Start afresh on other blocks; only while idle (the model's memory has left and returned)."""
        assert self.is_idle and not self.num_queued
        self.kv = kv
        self.scheduler.kv = kv

    def add(self, request: EngineRequest) -> None:
        """Take a request in: one sequence for each choice that is not finished yet."""
        resumed = {choice.choice: choice for choice in request.resumed}
        for index in range(request.params.n):
            earlier = resumed.get(index)
            if earlier is None or not earlier.finished:
                output = [] if earlier is None else earlier.token_ids
                self.scheduler.add(self._sequence(request, index, output))

    def _sequence(self, request: EngineRequest, choice: int, output: list[int]) -> Sequence:
        sequence = Sequence(
            request_id=request.request_id,
            choice=choice,
            prompt_len=len(request.prompt),
            tokens=list(request.prompt),
            params=request.params,
            arrival=request.arrival,
            max_len=self.max_len,
        )
        for token in output:
            sequence.append(token)
        return sequence

    def cancel(self, request_id: RequestId, choice: int | None = None) -> int:
        """Drop a request's choice, or all of them; returns how many were unfinished."""
        found = [s for s in self.scheduler.sequences_of(request_id) if choice in (None, s.choice)]
        for sequence in found:
            self.scheduler.remove(sequence)
        return len(found)

    def suspend(self) -> dict[RequestId, list[ResumedChoice]]:
        """Drop all sequences; returns what each unfinished choice had produced, so that it can go on."""
        assert not self.num_queued, "tokens on their way would be lost"
        suspended: dict[RequestId, list[ResumedChoice]] = {}
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.remove(sequence)
            output = sequence.tokens[sequence.prompt_len :]
            choice = ResumedChoice(choice=sequence.choice, token_ids=output, finished=False)
            suspended.setdefault(sequence.request_id, []).append(choice)
        return suspended

    def limit_context(self, max_len: int) -> None:
        """Sequences, present and future ones, end when they reach `max_len` tokens."""
        self.max_len = max_len
        self.scheduler.num_changes += 1
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            sequence.limit(max_len)

    def num_tokens(self, request_id: RequestId) -> int:
        """Tokens of a request's longest unfinished choice."""
        return max((len(s.tokens) for s in self.scheduler.sequences_of(request_id)), default=0)

    # --- one step --------------------------------------------------------------------------------------

    def schedule(self, budget: int) -> Step | None:
        """The next step of at most `budget` tokens."""
        return self.scheduler.schedule(budget)

    def run(self, step: Step, *, is_apart: bool = False) -> InFlight:
        """A step for the device; whoever asks launches it. See `Runner.run`."""
        self.num_queued += 1
        return self.runner.run(step, is_apart=is_apart)

    def drop(self, flight: InFlight) -> None:
        """A step will never be committed; `suspend` must follow, since its sequences count on it.

        What it was to compute is not there: nobody may find it under its keys.
        """
        self.num_queued -= 1
        for chunk in flight.step.chunks:
            chunk.sequence.ready_until = 0
            chunk.sequence.num_computed = min(chunk.sequence.num_computed, chunk.start)

    def commit(self, flight: InFlight) -> Drawn:
        """Account for the oldest queued step, which has run; sequences that ended are gone afterwards."""
        self.num_queued -= 1
        for sequence in (*flight.step.begun, *[chunk.sequence for chunk in flight.step.prompts]):
            sequence.is_started = True  # others have been before
        drawn = _wanted(flight)
        for place, (sequence, token) in enumerate(zip(drawn.sequences, drawn.tokens, strict=True)):
            sequence.num_pending -= 1
            if token in sequence.stops:
                drawn.ends[place] = End(FinishReason.STOP, token)
                continue
            if sequence.needs_history:
                sequence.append(token)
            else:  # most: quicker than a call for each
                sequence.tokens.append(token)
            if len(sequence.tokens) >= sequence.end:
                drawn.ends[place] = End(FinishReason.LENGTH, None)
        for place in drawn.ends:
            self.scheduler.remove(drawn.sequences[place])
        self.scheduler.computed(flight.step)
        return drawn


def _wanted(flight: InFlight) -> Drawn:
    """What was drawn for sequences that have not ended since the step was made."""
    sequences, (tokens, logprobs) = list(flight.sampled), flight.draws()
    assert len(tokens) == len(sequences)
    if [sequence for sequence in sequences if sequence.is_ended]:  # quicker than any()
        rows = [row for row, sequence in enumerate(sequences) if not sequence.is_ended]
        sequences, tokens = [sequences[row] for row in rows], [tokens[row] for row in rows]
        logprobs = {place: logprobs[row] for place, row in enumerate(rows) if row in logprobs}
    numbers = [len(sequence.tokens) - sequence.prompt_len for sequence in sequences]
    return Drawn(sequences, numbers, tokens, logprobs)
