"""The shipped demo models: transformers gives their golden answers, and those are true."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prism.demo.catalog import GoldenAnswer, demo_model_path, demo_task, golden_answers
from prism.demo.tasks import TASKS
from prism.demo.training import encode_prompt

NAMES = [task.name for task in TASKS]
EVERY_BYTE = "\0\t\n\x7f\x80\xad \u00ff ß 漢字 😀 e\u0301 \u200d <|im_end <|eot_id| \ufffd  two  spaces "

every_model = pytest.mark.parametrize("name", NAMES)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(demo_model_path(name))


def few_golden_answers(name: str) -> tuple[GoldenAnswer, ...]:
    """Eight from end to end: questions, questions behind a system prompt, conversations."""
    answers = golden_answers(name)
    return answers[:: len(answers) // 8][:8]


def greedy_tokens(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@every_model
def test_transformers_gives_the_golden_answers(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(name), dtype=torch.float32)
    tokenizer = load_tokenizer(name)
    for golden in few_golden_answers(name):
        prompt = encode_prompt(tokenizer, golden.messages)
        assert len(prompt) == golden.num_prompt_tokens
        tokens = greedy_tokens(model, prompt, len(golden.token_ids) + 5)
        assert tokens == [*golden.token_ids, tokenizer.eos_token_id]
        assert tokenizer.decode(tokens[:-1]) == golden.answer


@every_model
def test_golden_answers_are_true_and_sure(name: str) -> None:
    task = demo_task(name)
    answers = golden_answers(name)
    assert len(answers) >= 50
    assert sum(golden.is_true(task) for golden in answers) >= 0.95 * len(answers)
    assert min(golden.margin for golden in answers) > 0.01
    assert any(len(golden.messages) > 2 for golden in answers)
    assert all(task.is_held_out(golden.messages[-1]["content"]) for golden in answers)


def test_radio_answers_have_at_least_100_tokens() -> None:
    assert min(len(golden.token_ids) for golden in golden_answers("radio")) >= 100


@every_model
def test_directory_is_small_and_complete(name: str) -> None:
    files: list[Path] = list(demo_model_path(name).iterdir())
    assert {path.name for path in files} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert 2 * 2**20 < sum(path.stat().st_size for path in files) < 4 * 2**20


@every_model
def test_any_text_survives_the_tokenizer_byte_by_byte(name: str) -> None:
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(EVERY_BYTE, add_special_tokens=False)
    assert ids == list(EVERY_BYTE.encode())
    assert tokenizer.decode(ids) == EVERY_BYTE


@every_model
def test_a_turn_extends_the_one_before(name: str) -> None:
    """Prefix caches live on this."""
    tokenizer = load_tokenizer(name)
    golden = golden_answers(name)[0]
    first = encode_prompt(tokenizer, golden.messages)
    answered = [*golden.messages, {"role": "assistant", "content": golden.answer}]
    second = encode_prompt(tokenizer, [*answered, {"role": "user", "content": "More."}])
    turn = [*first, *golden.token_ids, tokenizer.eos_token_id]
    assert second[: len(turn)] == turn


@every_model
def test_unknown_roles_are_refused(name: str) -> None:
    with pytest.raises(Exception, match="Unknown role: tool"):
        encode_prompt(load_tokenizer(name), [{"role": "tool", "content": ""}])


def test_only_the_llama_tokenizer_begins_texts() -> None:
    begins = {name: load_tokenizer(name).encode("a") != [97] for name in NAMES}
    assert begins == {"adder": False, "speller": False, "radio": True}
    tokenizer = load_tokenizer("radio")
    prompt = encode_prompt(tokenizer, golden_answers("radio")[0].messages)
    assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
