"""Small models measured on the CPU, with the worker's own classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism.calibration import calibrate, steps
from prism.calibration.driving import Driver, NoRoom, add_request, random_prompt
from prism.calibration.loads import Decodes
from prism.calibration.models import LoadedModel, RandomWeights
from prism.calibration.overlap import steps_per_second
from prism.calibration.plan import DecodeSize, Limits, PromptSize
from prism.config import Config
from prism.errors import ConfigError, DriverError, OutOfSlabs
from prism.profile import read_profile
from prism.types import MiB, SamplingParams
from prism.worker.cost_book import Work, shape_of, work_of
from prism.worker.device import Device
from prism.worker.models import read_profile as read_model
from prism.worker.open_device import open_device
from tests.support.checkpoints import make_model, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("llama"), tmp_path_factory.mktemp("models") / "llama")


def config_of(folder: Path, **device: Any) -> Config:
    models = [{"name": "a", "path": str(folder)}, {"name": "b", "path": str(folder)}]
    settings = {"memory": 32 * MiB, "slab": 2 * MiB, "threads": 1, "max_batch_size": 4} | device
    return Config.model_validate({"models": models, "devices": [settings]})


@pytest.fixture
def device(folder: Path) -> Iterator[Device]:
    config = config_of(folder)
    with closing(open_device(config.devices[0], config.models)) as device:
        yield device
        assert device.pool.owners() == {}, "memory was not given back"


def open_model(device: Device, folder: Path, name: str = "a", kv_slabs: int = 4) -> LoadedModel:
    model = config_of(folder).models[0]
    return LoadedModel(device, model, name=name, max_batch_size=4, kv_slabs=kv_slabs)


@pytest.fixture
def model(device: Device, folder: Path) -> Iterator[LoadedModel]:
    with (
        closing(RandomWeights(config_of(folder).models[0], device)) as weights,
        open_model(device, folder) as m,
    ):
        time = m.load(weights)
        assert 0 < time.copy <= time.whole
        yield m


def limits(model: LoadedModel) -> Limits:
    return Limits(4, 64, 512, model.num_blocks, model.profile.kv.tokens_per_block)


def test_a_model_can_be_loaded_again(device: Device, folder: Path) -> None:
    with (
        closing(RandomWeights(config_of(folder).models[0], device)) as weights,
        open_model(device, folder) as m,
    ):
        assert [m.load(weights).whole > 0 for _ in range(3)] == [True] * 3


def test_what_does_not_fit_takes_nothing(device: Device, folder: Path) -> None:
    taken = device.pool.take("somebody", device.pool.num_free)  # type: ignore[arg-type]
    with pytest.raises(OutOfSlabs):
        open_model(device, folder)
    device.pool.give_back("somebody", taken)  # type: ignore[arg-type]


def test_decodes_are_those_of_full_batches(model: LoadedModel) -> None:
    (point,) = steps.measure_decodes(model, DecodeSize(3, 16), limits(model))
    assert (point.kind, point.work.tokens, point.work.pairs) == ("decode", 3, 0)
    assert point.num_steps == steps.MAX_STEPS
    middle = steps.WARM_STEPS + (steps.MAX_STEPS - 1) / 2
    assert point.work.context == round(3 * (16 + 1 + middle))
    assert point.seconds > 0
    assert_clean(model)


def test_a_batch_that_never_runs_is_no_point(model: LoadedModel) -> None:
    """It waited for ever for steps of five sequences from an engine that takes four."""
    assert steps.measure_decodes(model, DecodeSize(5, 480), limits(model)) == []
    assert_clean(model)


@pytest.mark.parametrize("start", [0, 128])
def test_chunks_have_the_wanted_size_and_place(model: LoadedModel, start: int) -> None:
    start -= start % limits(model).tokens_per_block
    (point,) = steps.measure_prompts(model, PromptSize(32, start), limits(model))
    assert point.work == Work(32, 32 * (start + 16), 0)
    assert point.num_steps == steps.NUM_PROMPTS - 1
    assert_clean(model)


def assert_clean(model: LoadedModel) -> None:
    assert model.engine.is_idle
    assert (model.kv.num_used, model.kv.num_cached) == (0, 0)
    model.kv.check()


def test_a_mixed_steps_work(model: LoadedModel) -> None:
    random = np.random.default_rng(0)
    for name, length in (("a", 20), ("b", 30)):
        add_request(model, name, random_prompt(random, length), 8)
    driver = Driver([model], 25)
    ran = []
    while not driver.is_idle:
        ran += driver.turn()
    assert [work_of(r.step) for r in ran[:3]] == [
        Work(25, 20 * 10 + 5 * 2.5, 0),
        Work(25, 24 * (5 + 12), 21),
        Work(2, 1 * 0, 22 + 30),
    ]
    assert sum(work_of(r.step).tokens for r in ran) == 20 + 30 + 2 * 7
    assert all(r.seconds > 0 for r in ran)
    driver.end()
    assert_clean(model)


def test_requests_draw_at_random_as_they_do_by_default(model: LoadedModel) -> None:
    """Profiles were of likeliest tokens: steps of small models were quicker than a server's by 4 to 10 %."""
    add_request(model, "a", [1, 2, 3], 8)
    (sequence,) = model.engine.scheduler.waiting
    assert sequence.params == SamplingParams(max_tokens=8, seed=sequence.params.seed)
    assert sequence.params.temperature == 1.0
    Driver([model], 16).end()


def test_loads_are_measured_beside_steps(
    device: Device, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a server, whose loop wants the interpreter meanwhile: alone they are twice as quick."""
    calls: list[bool] = []
    load = LoadedModel.load

    def watched(model: LoadedModel, weights: RandomWeights, meanwhile: Any = None) -> Any:
        calls.append(meanwhile is not None)
        return load(model, weights, meanwhile)

    monkeypatch.setattr(LoadedModel, "load", watched)
    config, said = config_of(folder), list[str]()
    calibration = calibrate._Calibration(device, config.devices[0], config.models, said.append)
    with closing(RandomWeights(config.models[0], device)) as weights:
        times = calibration._loads(config.models[0], weights)
    assert calls == [False, *[True] * (1 + calibrate.NUM_LOADS)] and len(times) == calibrate.NUM_LOADS
    assert not any("without steps" in line for line in said)


def test_a_load_goes_on_beside_decodes(device: Device, folder: Path) -> None:
    with (
        closing(RandomWeights(config_of(folder).models[0], device)) as weights,
        open_model(device, folder, "a") as a,
        open_model(device, folder, "b") as b,
    ):
        a.load(weights)
        with closing(Decodes(a)) as decodes:
            before = decodes.num_steps
            assert b.load(weights, decodes.turn).whole > 0
            assert decodes.num_steps > before
        assert_clean(a)


def test_where_only_one_model_fits_its_load_is_measured_alone(device: Device, folder: Path) -> None:
    config, said = config_of(folder), list[str]()
    calibration = calibrate._Calibration(device, config.devices[0], config.models, said.append)
    with (
        closing(RandomWeights(config.models[0], device)) as weights,
        open_model(device, folder, "large", kv_slabs=device.pool.num_free - 4),
    ):
        assert len(calibration._loads(config.models[0], weights)) == calibrate.NUM_LOADS
    assert any(line.startswith("loads are measured without steps beside them: ") for line in said)


def test_a_step_without_room_is_no_endless_wait(device: Device, folder: Path) -> None:
    with (
        closing(RandomWeights(config_of(folder).models[0], device)) as weights,
        open_model(device, folder, kv_slabs=0) as m,
    ):
        m.load(weights)
        with pytest.raises(NoRoom):
            steps.measure_decodes(m, DecodeSize(1, 16), limits(m))


def test_several_models_side_by_side(device: Device, folder: Path) -> None:
    with (
        closing(RandomWeights(config_of(folder).models[0], device)) as weights,
        open_model(device, folder, "a") as a,
        open_model(device, folder, "b") as b,
    ):
        for each in (a, b):
            each.load(weights)
        both, one = steps_per_second([a, b]), steps_per_second([a])
        assert both > 0 and one > 0
        for each in (a, b):
            assert_clean(each)


def test_a_profile_is_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    status = calibrate.run_profile(config_of(folder), 0, tmp_path / "p.json", said.append)
    assert status == 0
    profile = read_profile(tmp_path / "p.json")
    assert profile.models["a"] == profile.models["b"]  # one shape, measured once
    config = config_of(folder)
    described = read_model(config.models[0], config.devices[0].slab)
    assert profile.models["a"].shape.shape() == shape_of(described)
    assert not any(line.startswith("b: ") for line in said)
    costs = profile.costs("a")
    assert [n for n, _ in costs.steps.knots][:3] == [1, 2, 4]
    assert 0 < costs.steps.decode(1, 100) < costs.steps.prefill(500) < 60
    assert profile.device.rates.flops > 0 and profile.device.overlap == {}
    out = capsys.readouterr().out
    assert "MEASURED  PREDICTED" in out and "error" in out


def test_what_cannot_be_measured_is_told(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = config_of(folder, memory=4 * MiB)
    raw = config.model_dump() | {"models": [{"name": "a", "path": str(folder), "dtype": "fp32"}]}
    raw["models"].append({"name": "gone", "path": str(tmp_path)})
    config = Config.model_validate(raw)
    calibrate.run_profile(config, 0, tmp_path / "p.json", said.append)
    assert any(line.startswith("gone is left out: ") for line in said)


def test_a_device_that_cannot_be_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Device:
        raise DriverError("cuInit", 100)

    monkeypatch.setattr(calibrate, "open_device", refuse)
    with pytest.raises(ConfigError, match=r"cpu:0 cannot be opened .*cuInit failed: 100"):
        calibrate.run_profile(config_of(folder), 0, tmp_path / "p.json", print)


def test_a_device_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the configuration has 1 devices"):
        calibrate.run_profile(config_of(folder), 1, tmp_path / "p.json", print)


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--output .* there is no folder"):
        calibrate.run_profile(config_of(folder), 0, tmp_path / "file" / "p.json", said.append)
    assert not said
