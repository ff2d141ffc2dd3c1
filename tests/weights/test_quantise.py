"""fp8 by table, compared with torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prism.weights.quantise import NotFinite, Quantised, quantise, scales_of, to_f8
from tests.support.checkpoints import quantised


def test_every_upper_half_and_all_ties_round_as_torch_does() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    middles = ((codes[1:] + codes[:-1]) / 2).astype(np.float32)
    around = [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))]
    upper = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    lower = [(upper.view(np.uint32) | low).view(np.float32) for low in (0, 1, 0x7FFF, 0x8000, 0xFFFF)]
    numbers = np.concatenate([codes, *around, *lower])
    numbers = np.concatenate([numbers, -numbers])
    numbers = numbers[np.abs(numbers) <= 448]  # NaN is left out too
    theirs = torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert (to_f8(numbers) == theirs).all()


def test_numbers_beyond_the_largest_become_it() -> None:
    numbers = np.array([449, 500, -1e30], np.float32)
    assert to_f8(numbers).tolist() == [0x7E, 0x7E, 0xFE]


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (100, 3000), (3, 100_000)])
def test_rows_are_scaled_each_by_its_largest_number(shape: tuple[int, int]) -> None:
    rows = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-6, 6, shape[0])[:, None]
    )
    target = Quantised(np.empty(shape, np.uint8), np.empty(shape[0], np.float32))
    quantise(rows.numpy(), target)
    values, scales = quantised(rows)
    assert np.array_equal(target.scales, scales.numpy())
    assert np.array_equal(target.values, values.view(torch.uint8).numpy())


def test_rows_of_zeros_and_of_next_to_nothing() -> None:
    rows = np.array([[0, -0.0], [1e-44, -1e-45], [1e-37, 0]], np.float32)
    scales = scales_of(rows)
    assert scales[0] == 1 and scales[1] == np.finfo(np.float32).tiny == scales[2]
    target = Quantised(np.empty(rows.shape, np.uint8), np.empty(3, np.float32))
    quantise(rows, target)
    assert (target.values[:2] & 0x7F).tolist() == [[0, 0], [0, 0]] and target.values[2, 0] > 0


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(number: float) -> None:
    rows = np.ones((200, 1000), np.float32)
    rows[150, 7] = number
    target = Quantised(np.empty(rows.shape, np.uint8), np.empty(200, np.float32))
    with pytest.raises(NotFinite) as caught:
        quantise(rows, target)
    assert caught.value.row == 150
