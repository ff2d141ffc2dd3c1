"""Chat templates: code of a model directory, run in jinja's sandbox, in a thread, for a bounded time.

The sandbox keeps a template from the interpreter's insides and from long ranges. A template that loops for
ever is interrupted: an exception is raised inside its thread once its time is over. That works between two
instructions of the template; a single enormous operation (`'a' * 10**10`) ends only with its memory. So a
model directory is trusted not to exhaust memory, and not trusted with anything else.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from prism.errors import InvalidRequest
from prism.gateway.tokenizers import TextModel

T = TypeVar("T")
SECONDS = 5.0
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) | {
    "messages"
}


class TimeIsUp(BaseException):
    """Raised inside a thread by an `Alarm`; a BaseException so that nothing on its way swallows it."""


class Alarm:
    """Interrupts a function that runs in a thread too long. Made on the event loop, which keeps the time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._has_rung = False
        self._timer = self._loop.call_later(seconds, self._ring)

    def cancel(self) -> None:
        """Forget it; on the event loop."""
        self._timer.cancel()

    def _ring(self) -> None:
        with self._lock:
            if self._thread is None:  # has not begun, or has ended and will be cancelled
                self._timer = self._loop.call_later(self.seconds, self._ring)
            else:
                self._has_rung = True
                _raise_in(self._thread, TimeIsUp)

    def run(self, function: Callable[[], T]) -> T:
        """The function's value; raises `TimeIsUp` if its Python code takes too long. In a thread."""
        with self._lock:
            self._thread = threading.get_ident()
        try:
            return function()
        finally:
            self._silence()

    def _silence(self) -> None:
        """No exception comes after this has returned."""
        try:
            with self._lock:
                self._thread = None
            for _ in range(1000 * self._has_rung):  # one that is on its way arrives here
                pass
        except TimeIsUp:
            self._silence()


def _raise_in(thread: int, exception: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(exception))


def render_chat(
    model: TextModel, messages: list[dict[str, str]], variables: dict[str, Any], alarm: Alarm
) -> str:
    """The prompt of a conversation; raises `InvalidRequest` with what the template says."""
    if not model.vocabulary.tokenizer.chat_template:
        text = f"model {model.name!r} has no chat template; use /v1/completions"
        raise InvalidRequest(text, param="messages")

    if taken := sorted(_RESERVED & variables.keys()):
        text = f"the template's variable {taken[0]} cannot be set"
        raise InvalidRequest(text, param=f"chat_template_kwargs.{taken[0]}")

    def render() -> Any:
        return model.vocabulary.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **variables
        )

    try:
        return str(alarm.run(render))
    except TimeIsUp:
        text = f"the chat template of model {model.name!r} took longer than {alarm.seconds:g} s"
        raise InvalidRequest(text, param="messages") from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise InvalidRequest(f"the chat template refused the messages: {error}", param="messages") from error
    except (RecursionError, MemoryError) as error:
        raise InvalidRequest("the chat template needs too much memory", param="messages") from error
