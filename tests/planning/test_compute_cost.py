"""The predicted time of computing a layer: its matrices, attention, and Python."""

import dataclasses

import pytest
from support.checkpoints import CPU, GPU

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.machine.measurement import ComputeRate
from layerstream.pipeline.planning.assumptions import rates_of
from layerstream.pipeline.planning.compute_cost import ComputeCost, PassShape
from layerstream.pipeline.planning.planned_layer import PlannedLayer, TensorSource
from layerstream.stages.batch import Extent

CONFIG = {"hidden_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 1}
KNOWN = {
    # 10 GB of weights per second, or 640 GFLOP/s
    "compute": (
        ComputeRate(tokens=1, bytes_per_second=1e10),
        ComputeRate(tokens=64, bytes_per_second=1e10),
    ),
    "attention_flops_per_second": 2e11,
    "step_attention_flops_per_second": 5e9,
    "kv_growth_bytes_per_second": 4e9,
    "blocks_per_second": 5000.0,
}


def block(nbytes: int) -> PlannedLayer:
    tensor = TensorSource(
        name="w",
        dtype="bfloat16",
        shape=(nbytes // 256, 128),
        extents=(Extent(file=0, offset=0, nbytes=nbytes),),
    )
    return PlannedLayer(name="layers.0", kind=LayerKind.BLOCK, tensors=(tensor,))


def seconds(nbytes: int, *, tokens: int, context: int = 0, hardware=CPU, **known) -> float:
    rates = rates_of(dataclasses.replace(hardware, **{**KNOWN, **known}))
    shape = PassShape(sequences=1, tokens=tokens, context=context, prompt=tokens > 1)
    return ComputeCost(CONFIG, rates).seconds(block(nbytes), shape)


def test_a_small_block_takes_the_time_of_its_python_and_a_large_one_that_of_its_matrices():
    overhead = seconds(256, tokens=1)
    assert overhead == pytest.approx(2 / 5000, rel=1e-2)
    assert overhead < seconds(256, tokens=1, blocks_per_second=1000.0)
    assert seconds(10**9, tokens=1) == pytest.approx(0.1, rel=1e-2)


def test_a_gpu_computes_while_kernels_are_launched_and_a_processor_does_both():
    matrices = 40 * 10**6  # 4 ms
    launches = {"blocks_per_second": 1000.0}  # 2 ms
    on_cpu = seconds(matrices, tokens=1, **launches)
    on_gpu = seconds(matrices, tokens=1, hardware=GPU, **launches)
    assert on_cpu - on_gpu == pytest.approx(2e-3)
    assert seconds(256, tokens=1, hardware=GPU, **launches) == 2e-3


def test_attention_grows_with_pairs_of_tokens_at_a_rate_of_its_own():
    one = seconds(256, tokens=1024, context=1024)
    other = seconds(256, tokens=1024, context=1024, attention_flops_per_second=1e11)
    pairs = 1024 * 1024
    assert other - one == pytest.approx(4 * pairs * 1024 / 2e11)


def test_a_step_attends_with_one_token_and_copies_its_cache_to_append_to_it():
    overhead = seconds(256, tokens=1)
    attention = 4 * 1024 * 1024 / 5e9
    copies = 2 * 1024 * 2 * 1024 / 4e9  # keys and values of 1024 elements in two bytes
    assert seconds(256, tokens=1, context=1024) - overhead == pytest.approx(attention + copies)


def test_operations_per_element_take_a_share_of_multiplying_and_none_of_reading_weights():
    multiplication = 0.1 / 64  # one token's share, with weights of 1 GB
    assert seconds(10**9, tokens=1) - 0.1 - 2 / 5000 < multiplication
    long = seconds(10**9, tokens=640) - 2 / 5000
    assert 1.1 < long / 1.0 < 1.4


STEP = PassShape(sequences=1, tokens=1, context=4096, prompt=False)


@pytest.mark.parametrize(
    ("config", "attention", "cached"),
    [
        ({"d_model": 1024, "n_heads": 8, "n_layers": 1}, 1024, 2048),  # MPT
        (
            {"hidden_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 1}
            | {"multi_query": True},
            1024,
            256,
        ),  # Falcon, with one head of keys and values
        (
            {"hidden_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 1}
            | {
                "kv_lora_rank": 64,
                "qk_rope_head_dim": 16,
                "qk_nope_head_dim": 48,
                "v_head_dim": 32,
            },
            8 * (64 + 32) // 2,
            80,
        ),  # latent attention caches a vector for all heads
    ],
    ids=["mpt", "falcon", "latent"],
)
def test_attention_and_cache_are_priced_by_the_shape_that_memory_is_estimated_by(
    config, attention, cached
):
    rates = rates_of(dataclasses.replace(CPU, **KNOWN))
    found = ComputeCost(config, rates).seconds(block(256), STEP)
    nothing = ComputeCost(config, rates).seconds(block(256), dataclasses.replace(STEP, context=0))
    expected = 4 * 4096 * attention / 5e9 + 2 * 4096 * cached / 4e9
    assert found - nothing == pytest.approx(expected)
