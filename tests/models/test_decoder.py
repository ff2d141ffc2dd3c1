"""A decoder's layers stop on the way, so that others have a turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prism.attention.kernels import Stream
from prism.models.decoder import at_once
from tests.support.checkpoints import make_model, prompts, save
from tests.support.decoders import cpu_decoder


@pytest.mark.parametrize(
    ("rows", "needs"),
    [(None, [2, 2, 3, 3, 4, 4]), ([-1], [2, 2, 3, 3, 4, 4]), ([], [2, 2, 3, 3, 4])],
    ids=["all", "last row", "none"],
)
def test_layers_stop_before_each_half(rows: list[int] | None, needs: list[int], tmp_path: Path) -> None:
    """A half needs the groups of weights up to its layer's: the embedding is the first.

    Of no rows the last layer has one half, which stores their KV.
    """
    path = save(make_model("llama", num_hidden_layers=3), tmp_path)
    with cpu_decoder(path) as model:
        tokens = prompts(1, 40, seed=1)[0]
        wanted = None if rows is None else torch.tensor(rows, dtype=torch.long)
        assert list(model.layers(model.add(len(tokens)), tokens, rows=wanted)) == needs


def test_steps_in_turns_have_their_own_results(tmp_path: Path) -> None:
    """One goes half a layer at a time, whatever others do in between."""
    path = save(make_model("qwen3"), tmp_path)
    with cpu_decoder(path) as model:
        texts = prompts(2, 60, seed=3)
        alone = [model.logits(at_once(model.layers(model.add(len(text)), text))) for text in texts]
        steps = {number: model.layers(model.add(len(text)), text) for number, text in enumerate(texts)}
        ended: dict[int, Stream] = {}
        while steps:
            for number, step in tuple(steps.items()):
                try:
                    next(step)
                except StopIteration as stop:
                    ended[number] = stop.value
                    del steps[number]
        for number, expected in enumerate(alone):
            torch.testing.assert_close(model.logits(ended[number]), expected, rtol=0, atol=0)
