"""Model directories are read once, in the order in which somebody asks for them."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from prism.config import Config, ModelConfig
from prism.errors import Unavailable
from prism.gateway import tokenizers
from prism.gateway.detokenizer import ByteDetokenizer
from prism.gateway.tokenizers import TextModel, TextModels, Vocabularies, load_text_model

pytestmark = pytest.mark.anyio


def copy_of(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


def of_models(**paths: Path) -> Config:
    return Config.model_validate(
        {"models": [{"name": name, "path": str(path)} for name, path in paths.items()]}
    )


def test_directories_with_the_same_files_share_a_vocabulary(model_dir: Path, tmp_path: Path) -> None:
    vocabularies = Vocabularies()
    one = vocabularies.read(model_dir)
    assert vocabularies.read(copy_of(model_dir, tmp_path / "copy")) is one
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"other weights")
    assert vocabularies.read(tmp_path / "copy") is one


def test_texts_of_byte_level_tokens_are_bytes(model_dir: Path) -> None:
    """The quicker way is taken."""
    assert isinstance(Vocabularies().read(model_dir).detokenizer(), ByteDetokenizer)


def test_another_template_is_another_vocabulary(model_dir: Path, tmp_path: Path) -> None:
    vocabularies = Vocabularies()
    one = vocabularies.read(model_dir)
    template = copy_of(model_dir, tmp_path / "copy") / "chat_template.jinja"
    template.write_text("{{ messages[0].role }}")
    assert vocabularies.read(tmp_path / "copy").tokenizer.chat_template == "{{ messages[0].role }}"
    assert vocabularies.read(model_dir) is one


async def test_who_is_asked_for_is_read_first(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    may_read = threading.Event()

    def load(config: ModelConfig, vocabularies: Vocabularies) -> TextModel:
        order.append(config.name)  # before the wait: of two that are woken one may be long done with the next
        assert may_read.wait(30)
        return load_text_model(config, vocabularies)

    monkeypatch.setattr(tokenizers, "load_text_model", load)
    models = TextModels(of_models(**{f"m{i}": model_dir for i in range(9)}))
    models.start()
    await asyncio.sleep(0)  # each reader has taken one
    asked = [asyncio.create_task(models.get(name, 30)) for name in ("m7", "m3", "m7", "m8")]
    await asyncio.sleep(0)
    may_read.set()
    assert [(await each).name for each in asked] == ["m7", "m3", "m7", "m8"]
    first = tokenizers.NUM_READERS
    assert sorted(order[first : first + 2]) == ["m3", "m7"] and order.index("m8") <= first + 3
    assert {(await models.get(name, 30)).name for name in models.names} == set(models.names)
    models.close()


async def test_nobody_waits_longer_than_asked(model_dir: Path) -> None:
    models = TextModels(of_models(a=model_dir))
    with pytest.raises(Unavailable, match="'a' is still being read"):  # readers have not started
        await models.get("a", 0.01)
    models.start()
    assert (await models.get("a", 30)).name == "a"
    models.close()


async def test_a_broken_directory_makes_its_own_model_unavailable(model_dir: Path, tmp_path: Path) -> None:
    broken = copy_of(model_dir, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    models = TextModels(of_models(a=broken, b=model_dir, c=tmp_path / "nowhere"))
    models.start()
    for name, text in (("a", "no usable tokenizer"), ("c", "no such file")):
        with pytest.raises(Unavailable, match=text):
            await models.get(name, 30)
        assert text in (models.failure(models.names["abc".index(name)]) or "")
    assert (await models.get("b", 30)).name == "b" and models.failure(models.names[1]) is None
    models.close()
