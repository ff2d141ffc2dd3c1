"""Text of a choice, token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.gateway.requests import Accepted
from prism.gateway.texts import ChoiceText, Piece
from prism.gateway.tokenizers import TextModel, Vocabularies, load_text_model
from prism.types import FinishReason
from tests.gateway.fakes import make_config, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    config = make_config(write_model(tmp_path_factory.mktemp("model")))
    return load_text_model(config.models[0], Vocabularies())


def pushed(text: ChoiceText, token: int) -> Piece | None:
    return text.push(Accepted(text.choice, [token], None, None, None))


@given(
    tokens=st.lists(st.sampled_from(b"ab\xe2\x82\xac") | st.just(258), max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
    min_tokens=st.integers(0, 6),
)
def test_a_token_alone_is_one_of_several(
    model: TextModel, tokens: list[int], stops: list[str], min_tokens: int
) -> None:
    one, other = (ChoiceText(model, 3, tuple(stops), min_tokens) for _ in range(2))
    for token in tokens:
        piece = one.push_token(token)
        assert piece == pushed(other, token) and one.num_tokens == other.num_tokens
        if piece is not None and piece.finish is not None:
            assert piece.finish is FinishReason.STOP and stops
            return
    end = Accepted(3, [], None, FinishReason.LENGTH, None)
    assert one.push(end) == other.push(end)
