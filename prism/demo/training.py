"""How the demo models are trained and judged: conversations with a loss on the answers only."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prism.demo.tasks import Message, Task, sample_chat, sample_system_prompt
from prism.demo.tokenizer import Dialect

IGNORED = -100
SYSTEM_PROMPT_SHARE = 0.1
Model = Any  # transformers' classes are untyped


@dataclass(frozen=True)
class Stage:
    """A part of training: conversations of up to `max_turns` questions of one task."""

    task: Task
    num_steps: int
    max_turns: int


@dataclass(frozen=True)
class Recipe:
    """How one model is made. Stages go from easy to hard: mixed from the start, none is learned."""

    task: Task
    config: Any
    dialect: Dialect
    stages: tuple[Stage, ...]
    learning_rate: float = 3e-3
    tokens_per_step: int = 3072
    seed: int = 1

    @property
    def num_steps(self) -> int:
        """Of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    @property
    def max_turns(self) -> int:
        """Of the longest conversation."""
        return max(stage.max_turns for stage in self.stages)


class EncodedChat(NamedTuple):
    """Tokens to read and tokens to predict."""

    ids: list[int]
    labels: list[int]
    """The ids of answers and their ends, IGNORED elsewhere."""


class Batch(NamedTuple):
    """Conversations padded to one length."""

    ids: torch.Tensor  # [chats, positions]
    labels: torch.Tensor  # [chats, positions]


def encode_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation up to where the next answer begins."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def encode_chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> EncodedChat:
    """A conversation as a server sees it grow: each prompt extends the last prompt and its answer."""
    ids: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_prompt(tokenizer, messages[:index])
        assert prompt[: len(ids)] == ids, "a turn must extend the one before"
        answer = tokenizer.encode(message["content"], add_special_tokens=False)
        answer.append(tokenizer.eos_token_id)
        labels += [IGNORED] * (len(prompt) - len(ids)) + answer
        ids = prompt + answer
    return EncodedChat(ids, labels)


def make_batches(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[Sequence[Message]], max_tokens: int
) -> list[Batch]:
    """Batches of like lengths, padded at the right, where causal attention never looks."""
    encoded = [encode_chat(tokenizer, chat) for chat in chats]
    groups: list[list[EncodedChat]] = [[]]
    for chat in sorted(encoded, key=lambda chat: len(chat.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(chat.ids) > max_tokens:
            groups.append([])
        groups[-1].append(chat)
    return [_pad(group) for group in groups]


def _pad(chats: Sequence[EncodedChat]) -> Batch:
    length = max(len(chat.ids) for chat in chats)
    ids = [chat.ids + [0] * (length - len(chat.ids)) for chat in chats]
    labels = [chat.labels + [IGNORED] * (length - len(chat.ids)) for chat in chats]
    return Batch(torch.tensor(ids), torch.tensor(labels))


def training_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rng: Random) -> Iterator[Batch]:
    """One batch per step, stage after stage. Lengths are sorted within a thousand conversations."""
    for stage in recipe.stages:
        num_left = stage.num_steps
        while num_left > 0:
            chats = [_sample_training_chat(stage, rng) for _ in range(1000)]
            batches = make_batches(tokenizer, chats, recipe.tokens_per_step)
            rng.shuffle(batches)
            yield from batches[:num_left]
            num_left -= len(batches)


def _sample_training_chat(stage: Stage, rng: Random) -> list[Message]:
    system = sample_system_prompt(rng) if rng.random() < SYSTEM_PROMPT_SHARE else None
    return sample_chat(stage.task, rng, num_turns=rng.randint(1, stage.max_turns), system=system)


def train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Model:
    """A model made from nothing but the recipe."""
    torch.manual_seed(recipe.seed)
    model: Model = AutoModelForCausalLM.from_config(recipe.config, dtype=torch.float32)
    optimizers = _make_optimizers(model)
    started = time.monotonic()
    for step, batch in enumerate(training_batches(recipe, tokenizer, Random(recipe.seed))):
        loss = _loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, recipe.num_steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"{step}/{recipe.num_steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True)
    return model.eval()


def _make_optimizers(model: Model) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, AdamW for the rest.

    A trial with AdamW alone, one stage and the usual initial range gave 53 % true sums after 1,500
    steps; Muon, two stages and a larger initial range together give 99 %.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "layers." in name else others).append(weight)
    return (
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    )


def _schedule(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _loss(model: Model, batch: Batch) -> torch.Tensor:
    logits = _next_token_logits(model, batch).flatten(0, 1)
    labels = batch.labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)


def _next_token_logits(model: Model, batch: Batch) -> torch.Tensor:
    """What is predicted after each position but the last, [chats, positions - 1, vocabulary]."""
    logits: torch.Tensor = model(input_ids=batch.ids, use_cache=False).logits
    return logits[:, :-1]


@torch.inference_mode()
def accuracy(model: Model, tokenizer: PreTrainedTokenizerFast, chats: Sequence[Sequence[Message]]) -> float:
    """The share of conversations in which the greedy answer to every question is the true one."""
    num_true = 0
    for batch in make_batches(tokenizer, chats, max_tokens=16384):
        labels = batch.labels[:, 1:]
        is_right = (_next_token_logits(model, batch).argmax(-1) == labels) | (labels == IGNORED)
        num_true += int(is_right.all(-1).sum())
    return num_true / len(chats)
