"""The forms of a product agree, and the choice is by time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prism.attention import cpu_linear
from prism.attention.cpu_linear import CpuLinear, fastest, plain, vector, weight_first


@pytest.mark.parametrize(("form", "rows"), [(vector, 1), (weight_first, 2), (weight_first, 16)])
def test_forms_agree(form: cpu_linear.Form, rows: int) -> None:
    x, weight = torch.randn(rows, 96).bfloat16(), torch.randn(160, 96).bfloat16()
    out = form(x, weight)
    assert out.shape == (rows, 160) and out.is_contiguous()
    torch.testing.assert_close(out, plain(x, weight), rtol=0.02, atol=0.02)


def test_the_fastest_form_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(cpu_linear.time, "perf_counter", lambda: now)

    def taking(seconds: float) -> cpu_linear.Form:
        def form(x: Tensor, weight: Tensor) -> Tensor:
            nonlocal now
            now += seconds
            return x

        return form

    slow, quick = taking(2.0), taking(1.0)
    assert fastest((slow, quick), 4) is quick
    assert fastest((quick, slow), 4) is quick


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_tuned_products_with_bias(rows: int) -> None:
    linear = CpuLinear()
    linear.tune()
    x, weight, bias = (
        torch.randn(rows, 96).bfloat16(),
        torch.randn(64, 96).bfloat16(),
        torch.randn(64).bfloat16(),
    )
    torch.testing.assert_close(
        linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias), rtol=0.03, atol=0.1
    )


def test_fp32_does_not_depend_on_the_timing() -> None:
    linear = CpuLinear()
    linear._few = weight_first
    linear._one = vector
    for rows in (1, 4):
        x, weight = torch.randn(rows, 96), torch.randn(64, 96)
        assert torch.equal(linear(x, weight), plain(x, weight))
