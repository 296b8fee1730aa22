"""sparse_mla_decode against transformers' DeepSeek V4: window, compressed keys that its indexer picks, and sinks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import sparse_mla_bodies as bodies
import torch
from indexer_bodies import backends
from sparse_mla_bodies import Cache, Keys, Problem
from triton_backend import TritonOps

NUM_HEADS, BATCH, LENGTH = 16, 2, 11
LAYERS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]


class Recorded(NamedTuple):
    """What a layer gave to its attention function; fp32."""

    q: torch.Tensor  # [B, H, S, 512]
    kv: torch.Tensor  # [B, 1, S + compressed, 512]
    mask: torch.Tensor  # [B, 1, S, S + compressed], added to the scores
    sinks: torch.Tensor
    scale: float
    module: Any


@pytest.fixture(scope="module")
def recorded() -> list[Recorded]:
    """All layers of a small random model of DeepSeek V4, one of each kind of attention."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install fusedcomm[test]")
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4", reason="transformers without V4")
    config = transformers.DeepseekV4Config(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=NUM_HEADS,
        q_lora_rank=32,
        num_experts_per_tok=1,
        n_routed_experts=2,
        layer_types=LAYERS,
        mlp_layer_types=["moe"] * 3,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        sliding_window=4,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=2,
        index_head_dim=128,
        index_topk=2,
        hc_mult=2,
    )
    config._attn_implementation = "eager"
    found, eager = [], v4.eager_attention_forward

    def record(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **options: Any) -> Any:
        assert k is v
        found.append(Recorded(q, k, mask.float(), module.sinks.detach(), scaling, module))
        return eager(module, q, k, v, mask, scaling)

    torch.manual_seed(11)
    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        monkeypatch.setattr(v4, "eager_attention_forward", record)
        model = v4.DeepseekV4Model(config).eval()
        for parameter in model.parameters():
            # no matrix may leave all scores alike, no sink may be 0
            torch.nn.init.normal_(parameter, 0.0, 1.0 if parameter.dim() == 1 else 0.2)
        model(torch.randint(0, 64, (BATCH, LENGTH)), use_cache=False)
    assert [r.module.layer_type for r in found] == LAYERS
    return found


@pytest.fixture(scope="module", params=["torch", "interpreter", "gpu"])
def ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    if request.param != "torch" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with backends(request.param) as found:
        yield found


def cache_of(keys: torch.Tensor, block_size: int) -> Cache:
    """Keys ``[n, 512]`` in the slots from 0 on, by the library's writer."""
    stride = -(-block_size * 584 // 576) * 576
    memory = torch.full((-(-len(keys) // block_size) + 1, stride), bodies.NAN_BYTE, dtype=torch.uint8)
    memory = bodies.write("cpu", memory, keys, torch.arange(len(keys)), block_size, 584, torch.float8_e4m3fn)
    return Cache(memory, block_size, 584)


def keys_of(cache: Cache, visible: torch.Tensor) -> Keys:
    """The lists of what each query sees: ``visible [B, S, K]`` of the K keys of its request in the cache."""
    rows = visible.flatten(0, 1)
    slots = torch.arange(visible.shape[2]) + torch.arange(BATCH)[:, None, None] * visible.shape[2]
    slots = slots.expand(visible.shape).flatten(0, 1)
    order = (~rows).to(torch.uint8).argsort(dim=1, stable=True)
    return Keys(cache, slots.gather(1, order).int(), rows.sum(1).int())


@pytest.mark.parametrize("layer", range(3), ids=LAYERS)
def test_transformers_deepseek_v4(ops: TritonOps, recorded: list[Recorded], layer: int) -> None:
    """The queries of all positions as rows of one batch. Both sides have q as bf16 and the keys of our caches."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

    r = recorded[layer]
    assert ((r.mask == 0) | (r.mask < -1e30)).all()  # a bias would be no matter of a list
    visible = (r.mask == 0).squeeze(1)
    assert 1 < visible.sum(-1).max() < visible.shape[-1]
    kv = r.kv.squeeze(1)
    assert (kv.shape[1] > LENGTH) == (layer > 0)
    window, compressed = cache_of(kv[:, :LENGTH].flatten(0, 1), 64), cache_of(kv[:, LENGTH:].flatten(0, 1), 4)
    q = r.q.transpose(1, 2).flatten(0, 1).bfloat16()
    main = keys_of(window, visible[..., :LENGTH])
    extra = keys_of(compressed, visible[..., LENGTH:]) if layer else None
    p = Problem(q, main, extra, r.sinks, r.scale)
    if type(ops).__name__ == "InterpretedOps":  # the last two positions of each request: they see most
        rows = torch.tensor([LENGTH - 2, LENGTH - 1, 2 * LENGTH - 2, 2 * LENGTH - 1])
    else:
        rows = torch.arange(BATCH * LENGTH)
    some = [k and replace(k, indices=k.indices[rows].contiguous(), lens=k.lens[rows]) for k in (main, extra)]
    got = ops.run(bodies.decode, Problem(p.q[rows], some[0], some[1], p.sink, p.scale))

    def theirs(keys: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
        found, _ = v4.eager_attention_forward(
            r.module, queries.double(), keys.unsqueeze(1), keys.unsqueeze(1), r.mask.double(), r.scale, 0.0
        )
        return found.detach().flatten(0, 1)[rows].numpy()

    read = [
        bodies.keys_at(c.memory.numpy(), np.arange(BATCH * n), c.block_size, 584, c.fp8).reshape(BATCH, n, 512)
        for c, n in ((window, LENGTH), (compressed, kv.shape[1] - LENGTH))
    ]
    bodies.assert_close(got, theirs(torch.from_numpy(np.concatenate(read, axis=1)), r.q.bfloat16()))
    # Against their own keys: those of the cache are off by half a unit of three bits, 2^-4 of each value.
    own = theirs(kv.double(), r.q)
    assert np.abs(got.double().numpy() - own).max() <= 0.1 * np.abs(own).max()
