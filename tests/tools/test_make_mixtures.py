"""Synthetic mixtures of experts: their shapes, and routers that prefer some experts."""

import json

import pytest
import torch
from safetensors.torch import load_file

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import group_layers
from layerstream.pipeline.planning.planned_layers import planned_layers
from layerstream.tools.cli import main
from layerstream.tools.commands.make_checkpoint import BUSIEST_TENTH
from layerstream.tools.synthetic.families import FAMILIES
from layerstream.tools.synthetic.shapes import tensors_of

TINY = ["--layers", "2", "--hidden", "64", "--vocab", "300"]

# Family -> layers with experts, experts in each, experts per token.
MIXTURES = {
    "bench-moe": (24, 128, 8),
    "qwen3-30b-a3b": (48, 128, 8),
    "qwen3-235b-a22b": (94, 128, 8),
    "mixtral-8x7b": (32, 8, 2),
    "gpt-oss-120b": (36, 128, 4),
    "deepseek-v3": (58, 256, 8),
}


def make(folder, *arguments, like="qwen3-30b-a3b"):
    assert main(["make-checkpoint", str(folder), "--like", like, *arguments]) == 0
    return folder


def routers(folder):
    tensors = load_file(folder / "model.safetensors")
    names = ("gate.weight", "router.weight")
    return {name: value.float() for name, value in tensors.items() if name.endswith(names)}


@pytest.mark.parametrize(("like", "sizes"), MIXTURES.items(), ids=MIXTURES)
def test_the_planner_finds_all_experts_of_a_sparse_mixture_of_full_size(tmp_path, like, sizes):
    checkpoint = Checkpoint.open(make(tmp_path / "model", "--sparse", like=like))
    layers = planned_layers(checkpoint, group_layers(checkpoint), experts_on_demand=True)
    sources = [source for layer in layers for source in layer.experts]
    assert (len(sources), *{(each.experts, each.per_token) for each in sources}) == (
        sizes[0],
        sizes[1:],
    )
    trunk_bytes = sum(layer.nbytes for layer in layers)
    assert trunk_bytes + sum(source.nbytes for source in sources) == checkpoint.total_bytes
    assert not any(".experts." in tensor.name for layer in layers for tensor in layer.tensors)
    if like != "gpt-oss-120b":  # whose experts share tensors
        for tensor in sources[-1].tensors:
            infos = [
                checkpoint.tensors[tensor.name.replace(".experts.0.", f".experts.{number}.")]
                for number in range(sizes[1])
            ]
            assert [extent.offset for (extent,) in tensor.extents] == [i.offset for i in infos]
            assert [extent.file for (extent,) in tensor.extents] == [i.file for i in infos]


def test_bench_moe_has_six_gigabytes_nearly_all_of_them_experts():
    sizes = {tensor.name: 2 * tensor.numel for tensor in tensors_of(FAMILIES["bench-moe"].config)}
    expert_bytes = sum(size for name, size in sizes.items() if ".experts." in name)
    assert 6e9 < sum(sizes.values()) < 6.5e9
    assert expert_bytes / sum(sizes.values()) > 0.97


@pytest.mark.parametrize("like", MIXTURES)
def test_a_mixture_of_one_layer_still_has_experts(tmp_path, like):
    folder = make(tmp_path / "model", "--layers", "1", "--hidden", "64", like=like)
    (router,) = routers(folder).values()
    assert router.shape == (MIXTURES[like][1], 64)
    layer_types = json.loads((folder / "config.json").read_text()).get("layer_types", ["one"])
    assert len(layer_types) == 1


@pytest.mark.parametrize(("skew", "share"), BUSIEST_TENTH.items())
def test_the_busiest_tenth_of_the_experts_gets_the_share_that_the_help_tells(tmp_path, skew, share):
    transformers = pytest.importorskip("transformers")
    folder = make(tmp_path / "model", *TINY, "--skew", str(skew))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    counts = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _, __, routing: counts.append(torch.bincount(routing[2].flatten()))
        )
    tokens = torch.randint(0, 256, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(tokens)
    busiest = [count.sort(descending=True).values[:13].sum() / count.sum() for count in counts]
    assert sum(busiest).item() / len(busiest) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_skew_changes_only_the_norms_of_routers_rows(tmp_path, dtype):
    even = make(tmp_path / "even", *TINY, "--dtype", dtype)
    skewed = make(tmp_path / "skewed", *TINY, "--dtype", dtype, "--skew", "1")
    before, after = (load_file(folder / "model.safetensors") for folder in (even, skewed))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(routers(even))
    for name, router in routers(skewed).items():
        rows = torch.nn.functional.cosine_similarity(router, routers(even)[name])
        assert rows == pytest.approx(torch.ones(128), abs=1e-3)
        scale = router.square().mean().sqrt() / routers(even)[name].square().mean().sqrt()
        assert scale.item() == pytest.approx(1, rel=0.1)


def test_each_layer_prefers_other_experts_and_the_same_ones_whenever_it_is_written(tmp_path):
    first, again = (
        routers(make(tmp_path / name, *TINY, "--skew", "1", *more))
        for name, more in (("a", ()), ("b", ("--max-shard-size", "1GiB", "--seed", "1")))
    )
    largest = [router.norm(dim=1).topk(13).indices.sort().values for router in first.values()]
    assert not torch.equal(*largest)
    for name in first:
        assert first[name].norm(dim=1).argmax() == again[name].norm(dim=1).argmax()


def test_an_extreme_skew_gives_finite_weights(tmp_path):
    folder = make(tmp_path / "model", *TINY, "--skew", "1e6")
    assert all(router.isfinite().all() for router in routers(folder).values())


def test_skew_is_refused_for_a_family_without_experts(tmp_path, capsys):
    arguments = ["make-checkpoint", str(tmp_path / "model"), "--like", "demo", "--skew", "1"]
    assert main(arguments) == 1
    assert "demo is no mixture of experts" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
