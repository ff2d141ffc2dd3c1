from __future__ import annotations

from typing import Any

import pytest
import torch

from prism.engine import sampler
from prism.engine.sampler import sample
from prism.engine.sequence import Sequence
from prism.types import RequestId, SamplingParams

VOCAB = 50


def row(output: list[int] | None = None, choice: int = 0, **params: Any) -> Sequence:
    """A sequence with a two-token prompt and some output."""
    settings = {"max_tokens": 100, "seed": 1, "temperature": 0.0} | params
    sequence = Sequence(
        request_id=RequestId("r"),
        choice=choice,
        prompt_len=2,
        tokens=[3, 4],
        params=SamplingParams(**settings),
        arrival=0.0,
        max_len=1000,
    )
    for token in output or []:
        sequence.append(token)
    sequence.num_pending = 1
    return sequence


def logits(*rows: dict[int, float]) -> torch.Tensor:
    result = torch.zeros(len(rows), VOCAB)
    for i, values in enumerate(rows):
        for token, value in values.items():
            result[i, token] = value
    return result


def tokens(scores: torch.Tensor, *rows: Sequence) -> list[int]:
    return sample(scores, rows).tokens


def test_greedy_takes_the_highest() -> None:
    assert tokens(logits({7: 1.0}, {9: 2.0}), row(), row()) == [7, 9]


def test_penalties_count_output_only_and_repetition_counts_the_prompt() -> None:
    scores = {3: 2.0, 7: 1.9, 8: 1.8}
    assert tokens(logits(scores), row([7, 7], presence_penalty=1.0)) == [3]
    assert tokens(logits(scores), row([7, 7], repetition_penalty=2.0)) == [8]
    assert tokens(logits({7: 2.0, 8: 1.5}), row([7, 7], frequency_penalty=0.2)) == [7]
    assert tokens(logits({7: 2.0, 8: 1.5}), row([7, 7, 7], frequency_penalty=0.2)) == [8]


def test_bias_and_min_tokens() -> None:
    assert tokens(logits({7: 2.0}), row(logit_bias={9: 5.0})) == [9]
    stopping = {"stop_token_ids": (7,), "min_tokens": 2}
    assert tokens(logits({7: 2.0, 8: 1.0}), row([1], **stopping)) == [8]
    assert tokens(logits({7: 2.0, 8: 1.0}), row([1, 1], **stopping)) == [7]


def test_what_is_kept_between_draws_is_what_a_new_sequence_would_have() -> None:
    """Bias and the tokens seen stay on the device; each draw adds its own."""
    params = {"repetition_penalty": 1.7, "frequency_penalty": 0.3, "logit_bias": {9: 0.5, 4: -2.0}}
    generator = torch.Generator().manual_seed(3)
    kept, output = row(**params), []
    for _ in range(30):
        scores = torch.randn(1, VOCAB, generator=generator)
        token = tokens(scores.clone(), kept)[0]
        again, fresh = scores.clone(), scores.clone()
        tokens(again, kept)
        tokens(fresh, row(output, **params))
        assert torch.equal(again, fresh), "and drawing twice adds nothing"
        kept.append(token)
        output.append(token)
    assert len(set(output)) > 10


def test_draw_does_not_depend_on_the_batch() -> None:
    scores = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    kinds = [{}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.1, "top_p": 0.9}]
    rows = [row([1] * i, temperature=0.8, seed=i, **kind) for i, kind in enumerate(kinds)]
    together = tokens(scores.clone(), *rows)
    alone = [tokens(scores[i : i + 1].clone(), rows[i])[0] for i in range(4)]
    assert together == alone


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.6}, {1, 2}),
        ({"top_p": 0.3}, {1}),
        ({"min_p": 0.5}, {1, 2}),
        ({}, {1, 2, 3}),
    ],
)
def test_filters_keep_the_likeliest(params: dict[str, Any], allowed: set[int]) -> None:
    probs = torch.full((1, VOCAB), 1e-9)
    probs[0, 1], probs[0, 2], probs[0, 3] = 0.5, 0.3, 0.2
    drawn = {tokens(probs.log(), row([9] * i, temperature=1.0, **params))[0] for i in range(200)}
    assert drawn == allowed


def test_draws_follow_the_distribution() -> None:
    probs = torch.full((1, VOCAB), 1e-9)
    probs[0, 1], probs[0, 2] = 0.75, 0.25
    scores = probs.log().expand(4000, VOCAB).clone()
    drawn = tokens(scores, *(row(seed=i, temperature=1.0) for i in range(4000)))
    assert 0.72 < drawn.count(1) / 4000 < 0.78


def test_logprobs_are_of_the_raw_distribution() -> None:
    scores = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    expected = torch.log_softmax(scores, dim=-1)
    rows = [row(logprobs=3, logit_bias={5: 100.0}), row(), row(logprobs=0)]
    drawn = sample(scores.clone(), rows)
    assert drawn.tokens[0] == 5 and drawn.logprobs.keys() == {0, 2}
    assert drawn.logprobs[0].logprob == pytest.approx(expected[0, 5].item())
    values, ids = expected[0].topk(3)
    top = [(int(i), pytest.approx(float(v))) for i, v in zip(ids, values, strict=True)]
    assert drawn.logprobs[0].top == top and drawn.logprobs[2].top == []


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.8, "min_p": 0.01}])
def test_draws_in_groups_are_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """500 random draws from a large vocabulary took more memory than a GPU's allocator has."""
    scores = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(1))
    rows = [row(seed=i, temperature=1.0, **options) for i in range(7)]
    whole = tokens(scores.clone(), *rows)
    monkeypatch.setattr(sampler, "DRAW_NUMBERS", 3 * VOCAB)
    assert tokens(scores.clone(), *rows) == whole
    assert len(set(whole)) > 2
