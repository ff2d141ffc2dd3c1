"""What is measured and logged of one request."""

from __future__ import annotations

import logging

from prism.gateway.requests import Ending, Failed, Request
from prism.metrics import Metrics
from prism.types import FinishReason

log = logging.getLogger(__name__)


class Observer:
    """Turns a request's events into metrics and one line of log at its end."""

    def __init__(self, metrics: Metrics, request: Request, request_id: str) -> None:
        """`request_id` is the HTTP request's."""
        self._metrics = metrics
        self._model = model = request.model
        self._tenant = request.tenant
        self._request_id = request_id
        self._num_prompt = len(request.prompt)
        self._arrival = request.arrival
        self._start: float | None = None
        self._first_token: float | None = None
        self._last_tokens: dict[int, float] = {}
        self._num_tokens = 0
        self._num_resubmissions = 0
        self._generated = metrics.generation_tokens.labels(
            model
        )  # looking a label up costs as much as a token
        self._latency = metrics.inter_token_latency_seconds.labels(model)

    def started(self, queue_seconds: float, now: float) -> None:
        """It runs for the first time."""
        self._start = now
        self._metrics.prompt_tokens.labels(self._model).inc(self._num_prompt)
        self._metrics.request_queue_time_seconds.labels(self._model).observe(queue_seconds)

    def tokens(self, choice: int, num_tokens: int, now: float) -> None:
        """New tokens of a choice; several that came together share the time since those before."""
        self._num_tokens += num_tokens
        self._generated.inc(num_tokens)
        if self._first_token is None:
            self._first_token = now
            metrics, model = self._metrics, self._model
            metrics.time_to_first_token_seconds.labels(model).observe(now - self._arrival)
            if self._start is not None:
                metrics.request_prefill_time_seconds.labels(model).observe(now - self._start)
        if (last := self._last_tokens.get(choice)) is not None:
            for _ in range(num_tokens):
                self._latency.observe((now - last) / num_tokens)
        self._last_tokens[choice] = now

    def finished(self, reason: FinishReason) -> None:
        """A choice has its finish reason."""
        self._metrics.request_success.labels(self._model, reason.value).inc()

    def resubmitted(self) -> None:
        """Its worker died."""
        self._num_resubmissions += 1
        self._metrics.resubmissions.labels(self._model).inc()

    def ended(self, ending: Ending, now: float) -> None:
        """The one end."""
        seconds = now - self._arrival
        fields: dict[str, object] = {
            "request_id": self._request_id,
            "model": self._model,
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_tokens,
            "seconds": round(seconds, 4),
        }
        if self._tenant is not None:
            fields["tenant"] = self._tenant.name
        if self._first_token is not None:
            fields["ttft"] = round(self._first_token - self._arrival, 4)
            decode = now - self._first_token
            self._metrics.request_decode_time_seconds.labels(self._model).observe(decode)
        if self._num_resubmissions:
            fields["resubmissions"] = self._num_resubmissions
        if isinstance(ending, Failed):
            code = ending.error.code or str(ending.error.status)
            self._metrics.request_failure.labels(self._model, code).inc()
            level = logging.INFO if code == "cancelled" else logging.WARNING
            log.log(level, "request failed: %s", ending.error.message, extra=fields | {"code": code})
        else:
            self._metrics.e2e_request_latency_seconds.labels(self._model).observe(seconds)
            log.info("request finished", extra=fields)
