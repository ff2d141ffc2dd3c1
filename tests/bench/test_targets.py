"""Models files and addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism.bench.targets import Address, Defaults, Objectives, make_targets, parse_url, read_models
from prism.errors import ConfigError

DEFAULTS = Defaults("http://one:8000", "/v1/completions", objectives=Objectives(1.0, 0.1))


def write(folder: Path, text: str) -> Path:
    path = folder / "models.yaml"
    path.write_text(text)
    return path


def test_what_an_entry_leaves_out_comes_from_the_command_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a: {}\nb: {model: org/b, base_url: 'https://two/x/', endpoint: /v1/chat/completions, tokenizer: /t,"
        " ttft: 200ms}",
    )
    targets = make_targets(["a", "b"], read_models(path), DEFAULTS)
    a, b = targets["a"], targets["b"]
    assert (a.model, a.address, a.path) == ("a", Address("one", 8000, False), "/v1/completions")
    assert (b.model, b.address, b.path) == ("org/b", Address("two", 443, True), "/x/v1/chat/completions")
    assert (a.objectives, b.objectives) == (Objectives(1.0, 0.1), Objectives(0.2, 0.1))
    assert (a.is_chat, b.is_chat, b.tokenizer) == (False, True, Path("/t"))


def test_without_a_file_keys_are_served_names_unless_one_is_given() -> None:
    assert make_targets(["a"], None, DEFAULTS)["a"].model == "a"
    assert make_targets(["a"], None, DEFAULTS._replace(model="x"))["a"].model == "x"


def test_all_mistakes_are_told(tmp_path: Path) -> None:
    entries = read_models(write(tmp_path, "a: {ttft: 5 parsecs}\nb: {base_url: 'ftp://x'}"))
    with pytest.raises(ConfigError) as caught:
        make_targets(["a", "b", "c"], entries, DEFAULTS)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "model a",
        "model b",
        "model c of the trace is not in the models file",
    ]


@pytest.mark.parametrize("text", ["a: {colour: red}", "a: {context: 0}", "- a", "a: ["])
def test_files_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"models\.yaml"):
        read_models(write(tmp_path, text))


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://x"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="is no http"):
        parse_url(url)
