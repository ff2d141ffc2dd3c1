"""The tasks of the demo models: questions without end, each with one true answer.

A question is held out, or not, by a hash of what it asks, so every program agrees on which
questions a model has never seen.
"""

import hashlib
import re
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

Message = dict[str, str]
"""One chat message as the OpenAI API writes it: `{"role": ..., "content": ...}`."""

HELD_OUT_ONE_IN = 10

_UNITS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *(
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ),
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_RADIO_WORDS = [
    *("alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett"),
    *("kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango"),
    *("uniform", "victor", "whiskey", "xray", "yankee", "zulu"),
    *_UNITS[:10],
]
RADIO_ALPHABET = dict(zip("abcdefghijklmnopqrstuvwxyz0123456789", _RADIO_WORDS, strict=True))


class Exchange(NamedTuple):
    """A question and its true answer."""

    question: str
    answer: str


class Task(Protocol):
    """What a demo model does. Tasks are values: all randomness comes from the caller."""

    @property
    def name(self) -> str:
        """Also the name of the demo model."""

    @property
    def description(self) -> str:
        """What the model does, as a verb phrase."""

    def ask(self, rng: Random) -> str:
        """Draw a question of either split."""

    def solve(self, question: str) -> str:
        """The one true answer; ValueError if this task does not ask such questions."""

    def is_held_out(self, question: str) -> bool:
        """Whether the question was kept from training."""


@dataclass(frozen=True)
class Adder:
    """The task with the shortest answers, all digits: one wrong token is one wrong sum."""

    name: str = "adder"
    description: str = "adds two numbers below 100"

    def ask(self, rng: Random) -> str:
        """Draw a question of either split; numbers of one digit are as frequent as those of two."""
        left, right = (rng.randrange(10 ** rng.randint(1, 2)) for _ in range(2))
        return f"What is {left} + {right}?"

    def solve(self, question: str) -> str:
        """The one true answer; ValueError if this task does not ask such questions."""
        left, right = self._operands(question)
        return f"{left} + {right} = {left + right}"

    def is_held_out(self, question: str) -> bool:
        """Whether the question was kept from training."""
        low, high = sorted(self._operands(question))
        if high < 10:
            return False  # too few to infer one from the others
        return _is_held_out(f"{low}+{high}")  # a sum and its mirror image are one fact

    def _operands(self, question: str) -> tuple[int, int]:
        left, right = _parse(r"What is (\d{1,2}) \+ (\d{1,2})\?", question)
        return int(left), int(right)


@dataclass(frozen=True)
class Speller:
    """The task with answers of many lengths, so that requests of a batch end at different steps."""

    name: str = "speller"
    description: str = "writes a number below a million in words"

    def ask(self, rng: Random) -> str:
        """Draw a question of either split."""
        return f"Write {rng.randrange(10 ** rng.randint(1, 6))} in words."

    def solve(self, question: str) -> str:
        """The one true answer; ValueError if this task does not ask such questions."""
        return in_words(self._number(question))

    def is_held_out(self, question: str) -> bool:
        """Whether the question was kept from training."""
        number = self._number(question)
        return number >= 1000 and _is_held_out(str(number))  # smaller ones are the vocabulary

    def _number(self, question: str) -> int:
        (number,) = _parse(r"Write (\d{1,6}) in words\.", question)
        return int(number)


@dataclass(frozen=True)
class Radio:
    """The task with long answers: 24 symbols or more make at least 100 bytes.

    Symbols of a code are distinct, so "the symbol after this one" has one meaning. The separator is
    two bytes long on purpose: text that is cut inside a character shows.
    """

    name: str = "radio"
    description: str = "spells a code of distinct letters and digits over the radio"
    min_symbols: int = 24
    max_symbols: int = 32

    def ask(self, rng: Random) -> str:
        """Draw a question of either split."""
        num_symbols = rng.randint(self.min_symbols, self.max_symbols)
        return f"Spell {''.join(rng.sample(sorted(RADIO_ALPHABET), num_symbols))}."

    def solve(self, question: str) -> str:
        """The one true answer; ValueError if this task does not ask such questions."""
        return "·".join(RADIO_ALPHABET[symbol] for symbol in self._code(question))

    def is_held_out(self, question: str) -> bool:
        """Whether the question was kept from training."""
        return _is_held_out(self._code(question))

    def _code(self, question: str) -> str:
        (code,) = _parse(r"Spell ([a-z0-9]+)\.", question)
        if len(set(code)) < len(code):
            raise ValueError(f"a symbol occurs twice: {code}")
        return code


TASKS: tuple[Task, ...] = (Adder(), Speller(), Radio())


def sample(task: Task, rng: Random, *, held_out: bool = False) -> Exchange:
    """Draw a question of one split, with its answer."""
    while True:
        question = task.ask(rng)
        if task.is_held_out(question) == held_out:
            return Exchange(question, task.solve(question))


def is_true(task: Task, question: str, answer: str) -> bool:
    """Whether the answer is the one true answer to the question, to the letter."""
    return answer == task.solve(question)


def sample_chat(
    task: Task,
    rng: Random,
    *,
    num_turns: int = 1,
    system: str | None = None,
    held_out: bool = False,
) -> list[Message]:
    """A conversation of `num_turns` questions and true answers; it ends with an answer."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for _ in range(num_turns):
        question, answer = sample(task, rng, held_out=held_out)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def sample_system_prompt(rng: Random, max_words: int = 30) -> str:
    """Text that says nothing of use, so that models learn to answer alike whatever precedes."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(1, max_words))]
    return " ".join(words).capitalize() + "."


def in_words(number: int) -> str:
    """A number below a million in English: 4217 -> four thousand two hundred seventeen."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens = _TENS[number // 10 - 2]
        return f"{tens}-{_UNITS[number % 10]}" if number % 10 else tens
    size, unit = (100, "hundred") if number < 1000 else (1000, "thousand")
    head = f"{in_words(number // size)} {unit}"
    return f"{head} {in_words(number % size)}" if number % size else head


def _parse(pattern: str, question: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, question)
    if match is None:
        raise ValueError(f"not a question of this task: {question!r}")
    return match.groups()


def _is_held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_ONE_IN == 0
