"""What decodes bring to the device, and what their draws depend on."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from random import Random

import numpy as np
import pytest
import torch

from prism.engine.gpu import draw_table
from prism.engine.gpu.columns import DecodeRows, TableNotes, slots_of, stage_columns
from prism.engine.gpu.draw_table import DrawPlaces, DrawTable
from prism.engine.gpu.staging import Staging
from prism.engine.randomness import uniforms
from prism.engine.sequence import Sequence
from prism.engine.step import Chunk
from prism.types import BlockId, RequestId, SamplingParams
from tests.support.steps import step_of

STRIDE = 8


def decode(slot: int, position: int, blocks: Seq[int], tabled: int, seed: int = 0, **params: float) -> Chunk:
    """A sequence with a prompt of two tokens that computes the token at `position`."""
    settings = SamplingParams(max_tokens=99, **({"temperature": 0.0} | params), seed=seed)
    tokens = list(range(100, 101 + position))
    sequence = Sequence(RequestId(str(slot)), 0, 2, tokens, settings, 0.0, max_len=999)
    sequence.slot, sequence.num_tabled = slot, tabled
    sequence.blocks = [BlockId(block) for block in blocks]
    sequence.num_computed, sequence.num_pending = position + 1, 1
    return Chunk(sequence, position, 1, True)


class Words(Staging):
    """Its buffer is at hand."""

    def __init__(self) -> None:
        self.buffer = torch.full((256,), 77, dtype=torch.int32)
        super().__init__(self.buffer.numpy())

    def send(self) -> torch.Tensor:
        return self.buffer[: self.num_words]


class FakeLane:
    def __init__(self) -> None:
        self.tables = torch.zeros(9, STRIDE, dtype=torch.int32)
        self.last_tokens = torch.zeros(9, dtype=torch.int32)


def test_columns_are_padded() -> None:
    step = step_of([decode(4, 17, [70, 71], 2), decode(2, 3, [50], 1)])
    words, rows = Words(), DecodeRows()
    rows.look(step)
    stage_columns(words, step, rows, 4)
    slots, positions, blocks = words.send()[:12].view(3, 4).tolist()
    assert (slots, positions, blocks) == ([4, 2, 0, 0], [17, 3, -1, -1], [71, 50, 0, 0])


def test_tables_learn_what_they_lack() -> None:
    """The step notes a decode's last block itself, if that is all that the table lacks."""
    chunks = [decode(1, 33, [10, 11, 12], 2), decode(2, 33, [20, 21, 22], 0), decode(3, 1, [30], 1)]
    step, words, lane = step_of(chunks), Words(), FakeLane()
    chunks[2].sequence.is_token_placed = True
    notes = TableNotes(words, step, STRIDE, newest_known=True)
    notes.apply(words.send(), lane)  # type: ignore[arg-type]
    assert lane.tables[1].sum() == 0 and lane.tables[2, :3].tolist() == [20, 21, 22]
    assert [chunk.sequence.num_tabled for chunk in chunks] == [3, 3, 1]
    assert lane.last_tokens.tolist() == [0, 133, 133, 0, 0, 0, 0, 0, 0]


def test_beside_prompts_all_blocks_are_entered() -> None:
    chunks = [decode(1, 33, [10, 11, 12], 2), Chunk(decode(5, 9, [7, 8], 0).sequence, 0, 10, False)]
    words, lane = Words(), FakeLane()
    notes = TableNotes(words, step_of(chunks), STRIDE, newest_known=False)
    notes.apply(words.send(), lane)  # type: ignore[arg-type]
    assert lane.tables[1, :3].tolist() == [0, 0, 12] and lane.tables[5, :2].tolist() == [7, 8]


def test_draws_are_those_of_their_sequences() -> None:
    """Each row draws with its own seed, at its own place, whatever its slot was used for before."""
    table = DrawTable(9)
    table.enter([decode(3, 5, [1], 1, seed=9, temperature=2.0, top_k=7).sequence])
    chunks = [
        decode(3, 20, [1, 2], 2, seed=1 << 40, temperature=0.5, top_p=0.9),
        decode(1, 4, [3], 1),
        decode(8, 2, [4], 1, seed=3, temperature=1.0, top_k=5, min_p=0.25),
    ]
    sequences = [chunk.sequence for chunk in chunks]
    table.enter(sequences)
    words, slots = Words(), slots_of(sequences)
    words.ints([7] * 9)
    table.stage(words, slots, np.array([21, 5, 3], np.int32), 5)
    drawn = DrawPlaces.behind(9, 5)
    assert not table.needs_host(slots)
    sent, random = words.send(), [sequences[0], sequences[2]]
    assert sent[drawn.rows].tolist() == [0, 2, -1, -1, -1] and len(sent) == drawn.uniforms.stop + 2
    expected = uniforms([s.random_stream for s in random], [s.draw_index for s in random])
    assert sent[drawn.uniforms].view(torch.float64)[:2].tolist() == expected.tolist()
    for name, values in (("temperature", [0.5, 1.0]), ("top_p", [0.9, 1.0]), ("min_p", [0.0, 0.25])):
        assert torch.allclose(sent[getattr(drawn, name)].view(torch.float32)[:2], torch.tensor(values))
    assert sent[drawn.top_k].tolist()[:2] == [0, 5]


@pytest.mark.parametrize("most", [0, draw_table.MOST_AHEAD])
def test_draws_are_right_however_rows_go_on(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """What is kept of them: rows sit out, begin again earlier, become others'."""
    monkeypatch.setattr(draw_table, "MOST_AHEAD", most)
    random, table = Random(0), DrawTable(9)
    rows: dict[int, Sequence] = {}
    lengths: dict[int, int] = {}
    for number in range(600):
        for slot in range(1, 9):
            if slot not in rows or random.random() < 0.02:
                heat = random.choice([0.0, 0.5, 1.0])
                rows[slot] = decode(slot, 5, [1], 1, seed=number, temperature=heat).sequence
                lengths[slot] = rows[slot].prompt_len + random.randrange(100)
                table.enter([rows[slot]])
        slots = [slot for slot in rows if random.random() < 0.9] or [1]
        words, places = Words(), np.array([lengths[slot] for slot in slots], np.int32)
        size = len(slots) + random.randrange(3)
        table.stage(words, np.array(slots, np.intp), places, size)
        drawn, sent = DrawPlaces.behind(0, size), words.send()
        hot = [place for place, slot in enumerate(slots) if rows[slot].params.temperature]
        assert sent[drawn.rows].tolist() == hot + [-1] * (size - len(hot))
        sequences = [rows[slots[place]] for place in hot]
        positions = [
            places[place] - sequence.prompt_len for place, sequence in zip(hot, sequences, strict=True)
        ]
        numbers = uniforms([sequence.random_stream for sequence in sequences], positions)
        assert sent[drawn.uniforms].view(torch.float64)[: len(hot)].tolist() == numbers.tolist()
        heats = [sequence.params.temperature for sequence in sequences]
        assert sent[drawn.temperature].view(torch.float32)[: len(hot)].tolist() == heats
        for slot in slots:
            lengths[slot] += 1


def test_who_needs_the_host_is_known_by_slot() -> None:
    table = DrawTable(9)
    table.enter([decode(3, 5, [1], 1, presence_penalty=0.5).sequence, decode(4, 5, [2], 1).sequence])
    assert table.needs_host(np.array([4, 3])) and not table.needs_host(np.array([4]))
    table = DrawTable(9)
    table.enter([decode(3, 5, [1], 1, temperature=1.0, presence_penalty=0.5).sequence])
    words = Words()
    table.stage(words, np.array([3]), np.array([6], np.int32), 1)
    assert words.send()[DrawPlaces.behind(0, 1).rows].tolist() == [-1], "its token is drawn by the host"
