"""Text that comes in pieces is the text of the whole, whatever the tokens."""

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from prism.demo.tokenizer import CHATML, build_tokenizer
from prism.gateway.detokenizer import ByteDetokenizer, Detokenizer, StopFilter
from prism.gateway.token_texts import TokenTexts


def decoder_of(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    return lambda token_ids: tokenizer.decode(list(token_ids), skip_special_tokens=True)


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: words with U+2581, and a token for each byte."""
    words = ["▁a", "▁", "b", "▁▁", "€"]
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary |= {word: 257 + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BYTE_LEVEL = build_tokenizer(CHATML, 64).backend_tokenizer
BYTE_FALLBACK = byte_fallback()
ODD_BYTES = [0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0x41, 0xED, 0xA0, 0xC0, 0xF4, 0x90, 257]


def whole(tokens: Sequence[int], texts: TokenTexts) -> Sequence[int]:
    """Without those at the end that begin a character and do not complete it; each token is a byte there."""
    for count in (1, 2, 3):
        try:
            b"".join(texts.data(token) for token in tokens[-count:]).decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and error.start == 0:
                return tokens[:-count]
    return tokens


@given(st.lists(st.sampled_from(ODD_BYTES) | st.integers(0, 258), max_size=120))
@example([0xED, 0xA0])
def test_pieces_make_the_whole_byte_level(tokens: list[int]) -> None:
    texts = TokenTexts(BYTE_LEVEL)
    detokenizer = Detokenizer(decoder_of(BYTE_LEVEL), texts.data, frozenset(range(256, 259)))
    pieces = [detokenizer.push(token) for token in tokens]
    own = [token for token in tokens if token < 256]
    assert "".join(pieces) + detokenizer.finish() == decoder_of(BYTE_LEVEL)(whole(own, texts))


def odd_byte_level() -> Tokenizer:
    """Tokens of several bytes, torn characters among them, and added ones that are shown."""
    tokenizer = build_tokenizer(CHATML, 64).backend_tokenizer
    tokenizer.add_tokens(["<think>", "\u4e16\u754c", " x"])
    merged = json.loads(tokenizer.to_str())
    odd = (
        "a\u4e2d\u2581",
        "\u0120a",
        "b\u00e2\u0124",
        "\u00ac\u00f0",
    )  # not written in bytes; " a", "b\xe2\x82", ...
    size = len(merged["model"]["vocab"]) + len(merged["added_tokens"])
    merged["model"]["vocab"] |= {text: size + 10 + index for index, text in enumerate(odd)}
    return Tokenizer.from_str(json.dumps(merged))


ODD_BYTE_LEVEL = odd_byte_level()
ODD_TOKENS = sorted(ODD_BYTE_LEVEL.get_vocab(with_added_tokens=True).values())


@given(st.lists(st.sampled_from(ODD_BYTES) | st.sampled_from(ODD_TOKENS) | st.just(9999), max_size=120))
@example([0xED, 0xA0])
@example([0xE2, 0x82])
@example(ODD_TOKENS[-4:])
def test_bytes_make_the_whole(tokens: list[int]) -> None:
    texts = TokenTexts(ODD_BYTE_LEVEL)
    special = frozenset(
        token for token, text in ODD_BYTE_LEVEL.get_added_tokens_decoder().items() if text.special
    )
    assert texts.are_all and special
    for each in (tokens, [*tokens, 0x41]):
        shown = []
        for detokenizer in (
            ByteDetokenizer(texts.data, special),
            Detokenizer(decoder_of(ODD_BYTE_LEVEL), texts.data, special),
        ):
            pieces = [detokenizer.push(token) for token in each]
            shown.append("".join(pieces) + detokenizer.finish())
        assert shown[0] == shown[1]
    assert shown[0] == decoder_of(ODD_BYTE_LEVEL)(each), "what was torn is no end any more"


def test_whose_text_is_more_than_bytes() -> None:
    assert TokenTexts(BYTE_LEVEL).are_all and not TokenTexts(BYTE_FALLBACK).are_all
    stripped = build_tokenizer(CHATML, 64).backend_tokenizer
    stripped.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    assert not TokenTexts(stripped).are_all, "its first space is not shown"
    added = build_tokenizer(CHATML, 64).backend_tokenizer
    added.add_tokens(["\u0120"])
    assert not TokenTexts(added).are_all, "a decoder takes it for a space"


@given(
    st.lists(
        st.sampled_from([byte + 1 for byte in ODD_BYTES if byte < 256]) | st.integers(257, 261), max_size=80
    )
)
def test_pieces_make_the_whole_byte_fallback(tokens: list[int]) -> None:
    texts = TokenTexts(BYTE_FALLBACK)
    byte_tokens = texts.byte_tokens()
    assert len(byte_tokens) == 256
    detokenizer = Detokenizer(decoder_of(BYTE_FALLBACK), texts.data, byte_tokens=byte_tokens)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == decoder_of(BYTE_FALLBACK)(whole(tokens, texts))


def test_a_token_may_hold_text_and_a_part_of_a_character() -> None:
    pieces = {1: b"a", 2: b"b\xe2\x82", 3: b"\xac", 4: b"\xef\xbf\xbd", 5: b"\xff"}
    for tokens, expected in (
        ([1, 2, 3], "ab€"),
        ([1, 2], "ab"),
        ([2, 2], "b\ufffdb"),
        ([1, 5], "a\ufffd"),  # no character begins so
        ([1, 4], "a\ufffd"),  # the model wrote one
    ):
        detokenizer = Detokenizer(
            lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"), lambda token: pieces[token]
        )
        assert "".join([*map(detokenizer.push, tokens), detokenizer.finish()]) == expected


@given(st.text(max_size=60))
def test_no_character_is_torn(text: str) -> None:
    detokenizer = Detokenizer(decoder_of(BYTE_LEVEL), TokenTexts(BYTE_LEVEL).data)
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.finish() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_flood_of_broken_bytes_takes_linear_time() -> None:
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decoder_of(BYTE_LEVEL)(token_ids)

    detokenizer = Detokenizer(decode, TokenTexts(BYTE_LEVEL).data)
    text = "".join(detokenizer.push(0xFF) for _ in range(500)) + detokenizer.finish()
    assert text == "\ufffd" * 500
    assert longest < 50


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """By definition: feed single characters, stop at the first that completes a stop string."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    stop_filter, shown = StopFilter(stops), ""
    for piece in pieces:
        released = stop_filter.push(piece)
        shown += released.text
        if released.stopped:
            break
    else:
        shown += stop_filter.finish()
        released = None
    assert (shown, released is not None) == cut("".join(pieces), stops)


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=5))
def test_nothing_of_a_stop_string_is_ever_shown(text: str, stop: str) -> None:
    stop_filter, shown = StopFilter([stop]), ""
    for character in text:
        released = stop_filter.push(character)
        shown += released.text
        if released.stopped:
            break
    assert cut(text, [stop])[0].startswith(shown)


@pytest.mark.parametrize(
    ("tokenizer", "token", "text", "data"),
    [
        (BYTE_LEVEL, 0x41, "A", b"A"),
        (BYTE_LEVEL, 0x20, " ", b" "),
        (BYTE_LEVEL, 0xE2, "bytes:\\xe2", b"\xe2"),
        (BYTE_LEVEL, 257, "<|im_start|>", b"<|im_start|>"),
        (BYTE_LEVEL, 4000, "", b""),
        (BYTE_FALLBACK, 0xE2 + 1, "bytes:\\xe2", b"\xe2"),
        (BYTE_FALLBACK, 257, " a", b" a"),
    ],
)
def test_single_tokens(tokenizer: Tokenizer, token: int, text: str, data: bytes) -> None:
    texts = TokenTexts(tokenizer)
    assert (texts.text(token), texts.data(token)) == (text, data)
