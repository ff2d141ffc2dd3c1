"""A worker on a GPU: graphs, lanes, moving memory; each token is one that transformers might have drawn."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import VOCAB, make_model, prompts, save

pytestmark = pytest.mark.gpu

SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for seed, family in enumerate(("llama", "qwen2", "qwen3")):
        extra = {} if family == "qwen3" else {"head_dim": 64}
        model = make_model(family, seed=seed, max_position_embeddings=4096, **SHAPE, **extra)
        if family == "qwen3":
            model = make_model(family, seed=seed, max_position_embeddings=4096, **SHAPE)
        path = save(
            model.bfloat16(), folder / family
        )  # loaded anew: a cast would round rotary frequencies too
        made[family] = (type(model).from_pretrained(path, dtype=torch.float32).cuda(), path)
    return made


@torch.inference_mode()
def margins(model: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """How far each drawn token was from the likeliest, in standard deviations of the logits."""
    tokens = torch.tensor([prompt + output], device="cuda")
    logits = model(tokens).logits[0, len(prompt) - 1 : -1]
    drawn = logits.gather(1, tokens[0, len(prompt) :, None]).squeeze(1)
    return (logits.amax(1) - drawn) / logits.std(1)


@pytest.mark.parametrize("lanes", [1, 2])
def test_many_requests_of_three_models(models: dict, lanes: int) -> None:
    from tests.support.gpu_worker import gpu_worker

    local = gpu_worker({name: path for name, (_, path) in models.items()}, lanes=lanes)
    many = {name: prompts(24, 700, seed=i) for i, name in enumerate(models)}
    for name, some in many.items():
        for i, prompt in enumerate(some):
            local.submit(f"{name}{i}", name, prompt, max_tokens=40 + i)
    local.run(rounds=10**6)
    for name, some in many.items():
        for i, prompt in enumerate(some):
            output = local.outbox.tokens[f"{name}{i}", 0]
            assert len(output) == 40 + i and max(output) < VOCAB
            far = margins(models[name][0], prompt, output)  # of a wrong token: 2 to 4
            assert float(far.max()) < 0.5 and float((far > 0).float().mean()) < 0.3, (name, i)
    local.close()


def test_draws_of_all_kinds_depend_on_the_request_alone(models: dict) -> None:
    """Alone or in a batch the first tokens are the same, as far as bf16 sums are: one may differ."""
    from tests.support.gpu_worker import gpu_worker

    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 3},
        {"temperature": 0.7, "seed": 4, "top_k": 5},
        {"temperature": 0.7, "seed": 5, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.7, "seed": 6, "frequency_penalty": 0.5, "n": 2},
        {"temperature": 0.0, "logprobs": 3},
    ]
    prompt = prompts(1, 300, seed=5)[0]
    texts: list[dict] = []
    for together in (False, True):
        local = gpu_worker({"llama": models["llama"][1]}, lanes=1)
        for i, kind in enumerate(kinds):
            local.submit(str(i), "llama", prompt, max_tokens=12, **kind)
            if not together:
                local.run(rounds=10**6)
        local.run(rounds=10**6)
        texts.append(local.outbox.tokens)
        local.close()
    same = sum(texts[0][key][:3] == texts[1][key][:3] for key in texts[0])
    assert texts[0].keys() == texts[1].keys() and same >= len(texts[0]) - 1


def test_evictions_under_pressure_keep_texts(models: dict) -> None:
    """Three models on memory for two, again and again: graphs outlive the evictions, nothing leaks."""
    from tests.support.gpu_worker import gpu_worker

    local = gpu_worker({name: path for name, (_, path) in models.items()}, lanes=2, spare_slabs=22)
    first: dict = {}
    for turn in range(4):
        for name in models:
            prompt = prompts(1, 200, seed=7)[0]
            local.submit(f"{name}{turn}", name, prompt, max_tokens=30)
            local.run(rounds=10**6)
            text = local.outbox.tokens[f"{name}{turn}", 0]
            assert first.setdefault(name, text) == text
    assert sum(model.num_evictions for model in local.worker.models.values()) >= 3
    local.close()


def test_what_idle_and_evicted_models_hold(models: dict) -> None:
    """Idle: weights, and a cache that could go at once, with a slab at most beyond it. Evicted: graphs alone.

    The device's own account counts all processes, so nobody else may use it meanwhile.
    """
    from tests.support.gpu_worker import gpu_worker, rest

    local = gpu_worker({name: path for name, (_, path) in models.items()}, lanes=2)
    pool = local.device.pool

    def serve(turn: int) -> int:
        """Bytes of the device that nobody counts, once all of them have been asked."""
        for name in models:
            for i, prompt in enumerate(prompts(4, 300, seed=turn)):
                local.submit(f"{name}{turn}.{i}", name, prompt, max_tokens=20)
        local.run(rounds=10**6)
        rest(local)
        return local.device.ledger().unaccounted(local.device.driver.memory_info())

    serve(0)  # kernels come as they are used
    before = serve(1)
    for model in local.worker.models.values():
        assert model.kv is not None and model.kv.num_used == 0 < model.kv.num_cached
        assert model.kv.num_slabs <= -(-model.kv.num_cached // model.kv.layout.blocks_per_slab) + 1
        local.worker.evict(model)
    rest(local)
    local.run(rounds=10**3)
    assert pool.num_free == local.device.num_slabs
    graphs = local.device.backend.graph_usage
    assert graphs.num_graphs > 0 and graphs.num_bytes <= graphs.num_graphs * 2**20
    after = local.device.ledger().unaccounted(local.device.driver.memory_info())
    assert after - before <= 4 * 2**20
    local.close()


def test_steps_wait_for_nothing(models: dict) -> None:
    """The host makes, launches and reads steps without torch ever waiting for the device.

    But for models with unusual heads, like the Qwen3 here, whose steps do wait.
    """
    from tests.support.gpu_worker import gpu_worker, rest

    served = ("llama", "qwen2")
    local = gpu_worker({name: models[name][1] for name in served}, lanes=2)

    def serve(turn: str) -> None:
        for name in served:
            for i, prompt in enumerate(prompts(4, 300, seed=3)):
                kind = {"temperature": 0.8, "top_p": 0.9} if i % 2 else {}
                local.submit(f"{turn}.{name}.{i}", name, prompt, max_tokens=40, **kind)
        local.run(rounds=10**6)

    serve("first")
    rest(local)
    try:
        with warnings.catch_warnings(action="ignore"):  # that the mode does not know all that waits
            torch.cuda.set_sync_debug_mode("error")
        serve("again")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(local.outbox.finished) == 2 * 4 * len(served)
    local.close()


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_no_kernel_is_compiled_while_models_serve(models: dict, quantization: str) -> None:
    """Odd places of a step's inputs made Triton compile kernels anew, half a second each, on the loop."""
    import triton

    from prism.messages import Activate
    from tests.support.gpu_worker import gpu_worker

    compiled: list[str] = []
    options = {name: {"quantization": quantization} for name in models}
    local = gpu_worker({name: path for name, (_, path) in models.items()}, lanes=2, model_options=options)
    triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event["fn"].name)
    try:
        for number, name in enumerate(models):
            local.worker.on_command(Activate(epoch=1, command_id=number, model=name, pinned=None))
        local.run(rounds=10**6, until=lambda: all(m.is_active for m in local.worker.models.values()))
        compiled.clear()
        for name in models:
            for i, prompt in enumerate(prompts(40, 900, seed=3)):
                kind = {"temperature": 0.8, "top_p": 0.9} if i % 3 else {}
                local.submit(f"{name}{i}", name, prompt, max_tokens=5 + i, **kind)
        local.run(rounds=10**6)
        assert not compiled
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    local.close()


def test_likely_graphs_wait_for_kernels_that_are_loaded_ahead(models: dict) -> None:
    """Those that steps lack do not."""
    from tests.support.gpu_worker import gpu_worker, rest

    local = gpu_worker({"llama": models["llama"][1]}, lanes=1)
    backend, model = local.device.backend, local.worker.models["llama"]
    local.submit("a", "llama", prompts(1, 300, seed=5)[0], max_tokens=2)
    local.run(rounds=10**6)
    assert model.profile is not None
    preparing = backend.prepare_ahead(model.profile.spec)
    for _ in range(2):  # kernels that a load prepares, and some of the others
        next(preparing)
    assert model.engine is not None
    backend.forget(model.engine.runner)
    backend.expect(model.engine.runner)
    assert not backend.work_aside(1.0, urgent_only=False)
    local.submit("b", "llama", prompts(1, 300, seed=6)[0], max_tokens=60)
    local.run(rounds=10**6)
    lacked = backend.graph_usage.num_graphs
    assert lacked, "a step that lacks a graph has it captured in any case"
    for _ in preparing:
        pass
    rest(local)
    assert backend.graph_usage.num_graphs > lacked + 10
    local.close()


def test_tables_of_many_long_contexts_come_in_pieces(tmp_path: Path) -> None:
    """64 choices on one prompt of 16,000 tokens enter 64,000 blocks, twice what one step may."""
    from prism.engine.gpu.lane import MAX_ENTRIES
    from tests.support.gpu_worker import gpu_worker

    shape = SHAPE | {"head_dim": 64, "num_hidden_layers": 2}
    model = make_model("llama", seed=5, max_position_embeddings=16384, **shape)
    path = save(model.bfloat16(), tmp_path / "long")
    local = gpu_worker({"long": path}, lanes=1, spare_slabs=60)
    prompt = torch.randint(0, VOCAB, (16_000,), generator=torch.Generator().manual_seed(3)).tolist()
    local.submit("r", "long", prompt, max_tokens=20, n=64)
    local.run(rounds=10**6)
    layout = local.worker.models["long"].kv
    assert layout is not None and 64 * layout.layout.num_blocks(16_000) > MAX_ENTRIES
    texts = [local.outbox.tokens["r", choice] for choice in range(64)]
    assert all(len(text) == 20 for text in texts)
    torch.cuda.set_per_process_memory_fraction(1.0)  # the reference is not bound by the worker's reserve
    reference = type(model).from_pretrained(path, dtype=torch.float32).cuda()
    far = margins(reference, prompt, texts[63])
    assert float(far.max()) < 0.5
    same = sum(text[:4] == texts[0][:4] for text in texts)
    assert same >= 60, "of equal prompts with greedy draws; in bf16 the batch's size may turn a near tie"
    local.close()
