"""The tasks of the demo models: what they ask, what is true, and what is held out."""

from random import Random

import pytest

from prism.demo.tasks import (
    RADIO_ALPHABET,
    TASKS,
    Adder,
    Radio,
    Speller,
    Task,
    in_words,
    is_true,
    sample,
    sample_chat,
    sample_system_prompt,
)

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@pytest.mark.parametrize(
    ("task", "question", "answer"),
    [
        (Adder(), "What is 7 + 95?", "7 + 95 = 102"),
        (Speller(), "Write 0 in words.", "zero"),
        (Speller(), "Write 4217 in words.", "four thousand two hundred seventeen"),
        (Radio(), "Spell k7a.", "kilo·seven·alfa"),
    ],
)
def test_a_question_has_one_true_answer(task: Task, question: str, answer: str) -> None:
    assert task.solve(question) == answer
    assert is_true(task, question, answer)
    assert not is_true(task, question, answer + " ")
    assert not is_true(task, question, answer[:-1])


@pytest.mark.parametrize(
    ("task", "question"),
    [
        (Adder(), "What is 7 + 950?"),
        (Speller(), "Write x in words."),
        (Radio(), "Spell aa."),
        (Radio(), "Hello"),
    ],
)
def test_other_questions_are_refused(task: Task, question: str) -> None:
    with pytest.raises(ValueError, match=r"not a question|twice"):
        task.solve(question)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (1000, "one thousand"),
        (110_011, "one hundred ten thousand eleven"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


@every_task
def test_the_same_seed_draws_the_same_chat(task: Task) -> None:
    chats = [sample_chat(task, Random(3), num_turns=3, system="Hi.") for _ in range(2)]
    assert chats[0] == chats[1]
    assert [message["role"] for message in chats[0]] == ["system", *["user", "assistant"] * 3]


@every_task
def test_the_splits_are_apart_and_about_a_tenth_is_held_out(task: Task) -> None:
    rng = Random(5)
    assert all(task.is_held_out(sample(task, rng, held_out=True).question) for _ in range(50))
    assert not any(task.is_held_out(sample(task, rng).question) for _ in range(50))
    num_held_out = sum(task.is_held_out(task.ask(rng)) for _ in range(2000))
    assert 60 < num_held_out < 300


def test_a_sum_and_its_mirror_image_are_in_one_split() -> None:
    task = Adder()
    for left in range(0, 100, 7):
        for right in range(0, 100, 3):
            question, mirrored = f"What is {left} + {right}?", f"What is {right} + {left}?"
            assert task.is_held_out(question) == task.is_held_out(mirrored)


def test_small_numbers_are_never_held_out() -> None:
    assert not any(Speller().is_held_out(f"Write {number} in words.") for number in range(1000))


def test_which_questions_are_held_out_never_changes() -> None:
    """Shipped models were trained on the other questions; a new hash would make them look better."""
    task = Speller()
    held_out = [n for n in range(1000, 1060) if task.is_held_out(f"Write {n} in words.")]
    assert held_out == [1003, 1022, 1025, 1039, 1041, 1044, 1053]


def test_radio_answers_are_long_and_depend_on_each_symbol() -> None:
    rng = Random(7)
    for _ in range(100):
        question, answer = sample(Radio(), rng)
        assert len(answer.encode()) >= 100
        assert [RADIO_ALPHABET[symbol] for symbol in question[len("Spell ") : -1]] == answer.split("·")


def test_system_prompts_are_bounded() -> None:
    rng = Random(9)
    prompts = {sample_system_prompt(rng, max_words=5) for _ in range(50)}
    assert len(prompts) > 40
    assert all(1 <= len(prompt.split()) <= 5 for prompt in prompts)
