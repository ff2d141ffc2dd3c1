#!/usr/bin/env python3
"""Train the demo models on two CPU cores, judge them, and store their golden answers.

Writes prism/demo/models/<name>/ and prism/demo/golden.json in about twenty minutes. The same
seeds, machine and torch give the same models.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from prism.demo.catalog import GOLDEN_PATH, GoldenAnswer, demo_model_path
from prism.demo.tasks import Adder, Message, Radio, Speller, sample_chat, sample_system_prompt
from prism.demo.tokenizer import CHATML, LLAMA, VOCAB_SIZE, build_tokenizer
from prism.demo.training import Model, Recipe, Stage, accuracy, encode_prompt, train

MAX_POSITIONS = 2048
MIN_MARGIN = 0.01  # another order of float sums moves a logit by far less
NUM_JUDGED = 500
NUM_GOLDEN_SINGLE, NUM_GOLDEN_SYSTEM, NUM_GOLDEN_MULTI = 30, 10, 20
SHARED = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}


def adder_recipe() -> Recipe:
    task = Adder()
    config = Qwen3Config(
        hidden_size=128,
        head_dim=64,
        intermediate_size=384,
        num_hidden_layers=3,
        tie_word_embeddings=True,
        **SHARED,
    )
    return Recipe(task, config, CHATML, (Stage(task, 800, 1), Stage(task, 900, 6)))


def speller_recipe() -> Recipe:
    task = Speller()
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        **SHARED,
    )
    return Recipe(task, config, CHATML, (Stage(task, 700, 1), Stage(task, 1100, 6)))


def radio_recipe() -> Recipe:
    """Short codes teach looking a symbol up, long codes and conversations where to look."""
    task = Radio()
    short, full = replace(task, min_symbols=3, max_symbols=12), replace(task, min_symbols=3)
    config = LlamaConfig(
        hidden_size=128,
        head_dim=64,
        intermediate_size=256,
        num_hidden_layers=4,
        tie_word_embeddings=False,
        **SHARED,
    )
    stages = (Stage(short, 700, 1), Stage(full, 700, 1), Stage(full, 1000, 3))
    return Recipe(task, config, LLAMA, stages)


def save(recipe: Recipe, model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Hugging Face directory."""
    path = demo_model_path(recipe.task.name)
    shutil.rmtree(path, ignore_errors=True)
    special_ids = {
        "bos_token_id": recipe.dialect.bos_token_id,
        "eos_token_id": recipe.dialect.eos_token_ids,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(special_ids)
    model.generation_config = GenerationConfig(do_sample=False, **special_ids)
    model.save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)  # written as 0600, which a wheel would keep
    tokenizer.save_pretrained(path, save_jinja_files=False)
    config_path = path / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(path: Path) -> tuple[Model, PreTrainedTokenizerFast]:
    model: Model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(path)


def judge(recipe: Recipe, model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print how many held-out conversations of each length are wholly true."""
    name = recipe.task.name
    rng = Random(f"judge {name}")
    for num_turns in range(1, recipe.max_turns + 1):
        for system in (None, sample_system_prompt(rng)):
            chats = [
                sample_chat(recipe.task, rng, num_turns=num_turns, system=system, held_out=True)
                for _ in range(NUM_JUDGED)
            ]
            share = accuracy(model, tokenizer, chats)
            prompt = "with" if system else "without"
            print(f"{name}: {num_turns} turns {prompt} a system prompt: {share:.1%} true", flush=True)


def golden_chats(recipe: Recipe) -> Iterator[list[Message]]:
    """Held-out conversations, each without its last answer; more than are needed."""
    rng = Random(f"golden {recipe.task.name}")

    def ask(num_turns: int, has_system: bool) -> list[Message]:
        system = sample_system_prompt(rng) if has_system else None
        return sample_chat(recipe.task, rng, num_turns=num_turns, system=system, held_out=True)[:-1]

    yield from (ask(1, False) for _ in range(NUM_GOLDEN_SINGLE))
    yield from (ask(1, True) for _ in range(NUM_GOLDEN_SYSTEM))
    for index in range(NUM_GOLDEN_MULTI):
        yield ask(2 + index % (recipe.max_turns - 1), index % 4 == 3)


@torch.inference_mode()
def answer(model: Model, tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> GoldenAnswer | None:
    """The greedy answer, or None if it does not end or if rounding could change it."""
    prompt = encode_prompt(tokenizer, messages)
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=400,
        return_dict_in_generate=True,
        output_logits=True,
    )
    token_ids = output.sequences[0, len(prompt) :].tolist()
    best, second = torch.cat(output.logits).topk(2).values.unbind(-1)  # [tokens] each
    margin = (best - second).min().item()
    if token_ids[-1] != tokenizer.eos_token_id or margin < MIN_MARGIN:
        return None
    return GoldenAnswer(
        messages=tuple(messages),
        num_prompt_tokens=len(prompt),
        answer=tokenizer.decode(token_ids[:-1]),
        token_ids=tuple(token_ids[:-1]),
        margin=round(margin, 3),
    )


def write_golden(recipe: Recipe, model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Replace the golden answers of one model."""
    name = recipe.task.name
    all_answers = [answer(model, tokenizer, messages) for messages in golden_chats(recipe)]
    answers = [golden for golden in all_answers if golden is not None]
    num_true = sum(golden.is_true(recipe.task) for golden in answers)
    least = min(golden.margin for golden in answers)
    kept = f"{len(answers)} of {len(all_answers)} golden answers kept"
    print(f"{name}: {kept}, {num_true} true, least margin {least}")
    stored = json.loads(GOLDEN_PATH.read_text(encoding="utf-8")) if GOLDEN_PATH.exists() else {}
    stored[name] = [asdict(golden) for golden in answers]
    models = []
    for model_name in sorted(stored):
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in stored[model_name])
        models.append(f"{json.dumps(model_name)}: [\n{lines}\n]")
    GOLDEN_PATH.write_text("{\n" + ",\n".join(models) + "\n}\n", encoding="utf-8")


def main() -> None:
    recipes = {recipe.task.name: recipe for recipe in (adder_recipe(), speller_recipe(), radio_recipe())}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(recipes))
    parser.add_argument("--eval-only", action="store_true", help="judge the models that are there")
    args = parser.parse_args()
    torch.set_num_threads(2)
    for recipe in [recipes[args.only]] if args.only else recipes.values():
        path = demo_model_path(recipe.task.name)
        if not args.eval_only:
            tokenizer = build_tokenizer(recipe.dialect, MAX_POSITIONS)
            save(recipe, train(recipe, tokenizer), tokenizer)
        model, tokenizer = load(path)  # judged as users will load it
        judge(recipe, model, tokenizer)
        if not args.eval_only:
            write_golden(recipe, model, tokenizer)


if __name__ == "__main__":
    main()
