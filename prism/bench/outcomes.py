"""How a request ended, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass

from prism.bench.workload import Planned


@dataclass(frozen=True, slots=True)
class Finished:
    """The whole answer came."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The server answered with an error's status."""

    status: int
    message: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer broke off, or there was none."""

    reason: str


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The client gave up."""

    seconds: float


Outcome = Finished | Refused | Failed | TimedOut


@dataclass(frozen=True, slots=True)
class Record:
    """One request after its end. Times are seconds after the start of the run."""

    request: Planned
    start: float
    """When it left."""
    times: tuple[float, ...]
    """When pieces with tokens came."""
    end: float
    input_tokens: int
    """As the server counted, or as planned if it did not say."""
    output_tokens: int
    """As the server counted, or pieces if it did not say."""
    outcome: Outcome

    @property
    def is_finished(self) -> bool:
        """All of its answer came."""
        return isinstance(self.outcome, Finished)

    @property
    def lateness(self) -> float:
        """How long after its time it left: the client's fault, or that of `--max-concurrency`."""
        return max(0.0, self.start - self.request.at)

    @property
    def ttft(self) -> float:
        """Seconds to the first token; 0 if there was none."""
        return self.times[0] - self.start if self.times else 0.0

    @property
    def latency(self) -> float:
        """Seconds to the last token; 0 if there was none."""
        return self.times[-1] - self.start if self.times else 0.0

    @property
    def tpot(self) -> float | None:
        """Seconds between tokens on average, (latency - ttft) / (output tokens - 1); None of one token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itls(self) -> list[float]:
        """Seconds between pieces; several tokens may come in one."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
