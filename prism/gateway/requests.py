"""The life of one request, from `Submit` to its one end; pure.

    held --submit_to--> placed --all choices finished--> ended (Finished)
     ^                    |
     '---- lose ----------'            any state --fail--> ended (Failed)

A token is accepted once: it must come from the placement's worker and incarnation, carry the present
attempt, and continue its choice. What an earlier attempt says is stale; a hole is an internal error.

Who is a suspect. A request that had started when its worker died may have killed it.

1. A death without a new token since the previous (re)submission is a strike; a new token takes all
   strikes away.
2. After 2 strikes the request is sent with `alone`: nothing else may run beside it.
3. After 3 strikes it fails, and so does one that saw more than 20 deaths with progress in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from prism.errors import EngineFailure, WireError
from prism.messages import Output, ResumedChoice, Submit, Token, TokenLogprob
from prism.types import FinishReason, Incarnation, ModelId, RequestId, SamplingParams, Slo, Tenant, WorkerId

STRIKES_ALONE = 2
STRIKES_OUT = 3
MAX_DEATHS = 20


class Placement(NamedTuple):
    """Where a request runs."""

    worker: WorkerId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Finished:
    """All choices have their finish reason."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended before; `error` is what its client gets."""

    error: WireError


Ending = Finished | Failed


@dataclass(frozen=True, slots=True)
class Accepted:
    """New tokens of one choice, never seen before."""

    choice: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish: FinishReason | None
    stop_token: int | None


@dataclass(frozen=True, slots=True)
class Stale:
    """Of an earlier attempt or incarnation, or said before: nothing happens."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Tokens are missing before these, which must never happen."""

    reason: str


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    is_finished: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """One prompt with its `params.n` choices."""

    request_id: RequestId
    model: ModelId
    prompt: list[int]
    params: SamplingParams
    slo: Slo
    arrival: float
    latest_start: float
    """It fails if it has no token and does not run by then."""
    latest_end: float
    clip_max_tokens: bool = False
    tenant: Tenant | None = None
    """Whose it is; None where no API keys are configured."""
    attempt: int = 0
    placement: Placement | None = None
    is_started: bool = False
    """It ran in the present attempt."""
    has_tokens: bool = False
    """At least one token was accepted, in whichever attempt."""
    strikes: int = 0
    num_deaths: int = 0
    ending: Ending | None = None
    choices: list[_Choice] = field(init=False)
    _progressed: bool = False

    def __post_init__(self) -> None:
        self.choices = [_Choice() for _ in range(self.params.n)]

    @property
    def is_running(self) -> bool:
        """A worker is at it."""
        return self.placement is not None and self.is_started

    @property
    def alone(self) -> bool:
        """Nothing else may run beside it."""
        return self.strikes >= STRIKES_ALONE

    @property
    def deadline(self) -> float:
        """When the next token is due, for the order of resubmissions: objectives count from arrival."""
        longest = max(len(choice.token_ids) for choice in self.choices)
        return self.arrival + self.slo.ttft + self.slo.tpot * longest

    # --- to a worker and back -----------------------------------------------------------------------

    def submit_to(self, placement: Placement) -> Submit:
        """Place the request; the message that says so."""
        assert self.ending is None and self.placement is None
        self.placement = placement
        self.attempt += 1
        self.is_started = self._progressed = False
        resumed = [
            ResumedChoice(choice=index, token_ids=list(choice.token_ids), finished=choice.is_finished)
            for index, choice in enumerate(self.choices)
            if choice.token_ids or choice.is_finished
        ]
        return Submit(
            request_id=self.request_id,
            attempt=self.attempt,
            model=self.model,
            prompt=self.prompt,
            params=self.params,
            slo=self.slo,
            arrival=self.arrival,
            latest_end=self.latest_end,
            resumed=resumed,
            clip_max_tokens=self.clip_max_tokens,
            alone=self.alone,
            tenant=None if self.tenant is None else self.tenant.name,
            weight=1.0 if self.tenant is None else self.tenant.weight,
        )

    def is_from_here(self, placement: Placement, attempt: int) -> bool:
        """A message of this worker about this attempt concerns the request as it stands."""
        return self.ending is None and self.placement == placement and self.attempt == attempt

    def start(self, placement: Placement, attempt: int) -> bool:
        """The worker runs it; False if that is stale."""
        if not self.is_from_here(placement, attempt) or self.is_started:
            return False
        self.is_started = True
        return True

    def goes_on(self, placement: Placement, token: Token) -> bool:
        """Whether a token is the next one of its choice, as most are; then it is accepted. See `accept`."""
        if not (self.is_from_here(placement, token.attempt) and 0 <= token.choice < len(self.choices)):
            return False
        choice = self.choices[token.choice]
        if choice.is_finished or token.index != len(choice.token_ids):
            return False
        choice.token_ids.append(token.token)
        self._has_progressed()
        return True

    def accept(self, placement: Placement, output: Output) -> Accepted | Stale | Gap:
        """What of `output` is new. Ends nothing by itself: the caller calls `finish_choice`."""
        if not self.is_from_here(placement, output.attempt):
            return Stale()
        if not 0 <= output.choice < len(self.choices):
            return Gap(f"choice {output.choice} of {len(self.choices)}")
        choice = self.choices[output.choice]
        if choice.is_finished:
            return Stale()
        known = len(choice.token_ids) - output.index
        if known < 0 or (output.finish is not None and known > len(output.token_ids)):
            return Gap(f"choice {output.choice}: token {output.index} after {len(choice.token_ids)} tokens")
        if output.logprobs is not None and len(output.logprobs) != len(output.token_ids):
            return Gap(f"choice {output.choice}: {len(output.logprobs)} log-probabilities")
        fresh = output.token_ids[known:]
        if not fresh and output.finish is None:
            return Stale()
        choice.token_ids += fresh
        self._has_progressed()
        logprobs = None if output.logprobs is None else output.logprobs[known:]
        return Accepted(output.choice, fresh, logprobs, output.finish, output.stop_token)

    def _has_progressed(self) -> None:
        self.is_started = self.has_tokens = True  # a token proves the start, whatever was lost
        self._progressed, self.strikes = True, 0

    def finish_choice(self, choice: int) -> None:
        """A choice has ended, by its worker's word or by a stop string; the last one ends the request."""
        assert self.ending is None and not self.choices[choice].is_finished
        self.choices[choice].is_finished = True
        if all(each.is_finished for each in self.choices):
            self.ending, self.placement = Finished(), None

    def fail(self, error: WireError) -> None:
        """End it, whatever it was doing."""
        assert self.ending is None
        self.ending, self.placement = Failed(error), None

    def hand_back(self) -> None:
        """Its worker gave it up for another; nobody is to blame."""
        assert self.ending is None and self.placement is not None
        self.placement = None

    def lose(self) -> bool:
        """Its worker died under it, or lost tokens of it; it is held again or fails.

        True if the request is under suspicion of having killed a worker while it ran alone.
        """
        assert self.ending is None and self.placement is not None
        self.placement = None
        if not self.is_started:
            return False
        was_alone = self.alone
        self.num_deaths += 1
        self.strikes = 0 if self._progressed else self.strikes + 1
        if self.strikes >= STRIKES_OUT or self.num_deaths > MAX_DEATHS:
            text = f"the worker failed {self.num_deaths} times while it ran this request"
            self.fail(EngineFailure(text).wire())
        return was_alone and not self._progressed
