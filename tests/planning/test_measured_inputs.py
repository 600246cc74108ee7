"""What is measured for models that read images and sounds, or ask for values; and what is reserved where nothing is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import CPU
from support.models import CASES, save_model
from support.plans import plan_of

from layerstream.pipeline import Checkpoint, Workload
from layerstream.pipeline.modeling.activation_memory import measure_memory
from layerstream.pipeline.modeling.assembly import Assembly
from layerstream.pipeline.modeling.config import load_config
from layerstream.pipeline.modeling.live_bytes import LiveBytes
from layerstream.pipeline.modeling.meta_pass import meta_pass
from layerstream.pipeline.modeling.prompt_inputs import PromptInputs
from layerstream.pipeline.modeling.tracing import trace_model
from layerstream.pipeline.planning.planner import make_plan
from layerstream.pipeline.planning.workload_memory import estimate_memory
from layerstream.pipeline.scheduling.request_cost import Estimator
from layerstream.pipeline.scheduling.request_memory import RequestMemory

PROMPT = 24
DECODER = {"decoder_attention_heads": 4, "decoder_ffn_dim": 64, "decoder_layers": 1}
ENCODER = {"encoder_attention_heads": 4, "encoder_ffn_dim": 64, "encoder_layers": 1}
LED = transformers.LEDConfig(d_model=32, vocab_size=100, attention_window=16, **ENCODER, **DECODER)
VITS = transformers.VitsConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=1, ffn_dim=64, num_attention_heads=2, flow_size=32, spectrogram_bins=9,
    upsample_initial_channel=64, wavenet_dilation_rate=1, prior_encoder_num_flows=2, prior_encoder_num_wavenet_layers=1,
)  # fmt: skip
PROPHETNET = transformers.ProphetNetConfig(
    hidden_size=32, vocab_size=100, max_position_embeddings=32, num_encoder_layers=1, num_decoder_layers=1,
    num_encoder_attention_heads=4, num_decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
)  # fmt: skip


def built(case: str, *, device: str, **settings: Any) -> Any:
    """The tiny model of ``case``."""
    name, config, defaults = CASES[case]
    made = getattr(transformers, config)(**{**defaults, **settings})
    with torch.device(device):
        model = getattr(transformers, name)._from_config(made, dtype=torch.bfloat16)
    return model.eval()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", ["vit", "resnet", "whisper", "wav2vec2", "clip", "llava"])
@torch.no_grad()
def test_images_and_sounds_are_counted_as_a_real_pass_takes_them(case: str, batch: int) -> None:
    settings = {"image_token_id": 99} if case == "llava" else {}
    workload = Workload(batch_size=batch, prompt_tokens=PROMPT, new_tokens=1)
    memory = measure_memory(built(case, device="meta", **settings), workload)
    assert memory is not None
    assert memory.measured
    model = built(case, device="cpu", **settings)
    inputs = PromptInputs.choices(model, workload)[0].prompt()
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert value.shape[0] == batch
            inputs[name] = torch.ones_like(value, device="cpu")
    if case == "llava":
        inputs["input_ids"][:, : (32 // 8) ** 2] = 99
    if batch > 1 and "attention_mask" in inputs:
        inputs["attention_mask"][0, 0] = 0
    with LiveBytes() as live:
        model(**inputs)
    assert live.peak_bytes <= memory.peak_bytes <= 1.2 * live.peak_bytes + 4096


@pytest.mark.parametrize(
    ("name", "config", "tokens", "fewer"),
    [
        ("LEDForConditionalGeneration", LED, PROMPT, False),
        ("ProphetNetForCausalLM", PROPHETNET, 29, True),
        ("ProphetNetForConditionalGeneration", PROPHETNET, 29, False),
    ],
)
@torch.no_grad()
def test_models_that_ask_for_values_or_lack_positions_are_measured(
    name: str, config: Any, tokens: int, fewer: bool
) -> None:
    workload = Workload(batch_size=2, prompt_tokens=2 * PROMPT, new_tokens=1)
    with torch.device("meta"):
        on_meta = getattr(transformers, name)._from_config(config).eval()
    memory = measure_memory(on_meta, workload)
    assert memory is not None
    assert memory.measured
    real = getattr(transformers, name)._from_config(config).eval()
    ids = torch.ones((2, tokens), dtype=torch.long)
    with LiveBytes() as live:
        decoder = {} if "Causal" in name else {"decoder_input_ids": ids[:, :1]}
        real(input_ids=ids, **decoder)
    assert memory.peak_bytes >= live.peak_bytes
    assert memory.prompt_tokens == (tokens if fewer else None)


def test_a_request_of_all_positions_takes_what_is_reserved_for_a_longer_workload(
    tmp_path: Path,
) -> None:
    checkpoint = Checkpoint.open(save_model(tmp_path, "bert", max_position_embeddings=64))
    model = built("bert", device="meta", max_position_embeddings=64)
    workload = Workload(batch_size=2, prompt_tokens=700, new_tokens=4)
    memory = measure_memory(model, workload)
    assert memory is not None
    assert memory.prompt_tokens == 64 - 2
    plan = make_plan(checkpoint, CPU, workload=workload, memory=memory)
    assert any("positions for 62 at most" in note for note in plan.notes)
    estimator = Estimator(
        model, checkpoint.config, workload=workload, memory=RequestMemory(shared_bytes=1 << 40), plan=plan, measured=memory
    )  # fmt: skip
    cost = estimator.forward((), {"input_ids": torch.ones((2, 62), dtype=torch.long)})
    assert plan.workload_bytes <= cost.memory.shared_bytes <= 1.1 * plan.workload_bytes
    shorter = estimator.forward((), {"input_ids": torch.ones((2, 31), dtype=torch.long)})
    assert shorter.memory.shared_bytes < cost.memory.shared_bytes


@pytest.mark.parametrize(("config", "computed"), [(VITS, True), (LED, False)])
def test_a_model_that_computes_the_length_of_its_output_is_marked(
    config: Any, computed: bool
) -> None:
    """No budget can be promised: its sound of 238 MiB took 732."""
    name = "VitsModel" if computed else "LEDForConditionalGeneration"
    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(config).eval()
    workload = Workload(batch_size=1, prompt_tokens=PROMPT, new_tokens=1)
    memory = measure_memory(model, workload)
    assert memory is not None
    assert memory.sizes_are_computed is computed
    plan = plan_of([1 << 20] * 4, workload=workload, memory=memory)
    assert any("MAY EXCEED THE BUDGET" in note for note in plan.notes) is computed


def test_what_is_computed_from_sizes_has_its_value_on_the_meta_device() -> None:
    def halves(x: torch.Tensor) -> torch.Tensor:
        return x.view(int(torch.div(x.shape[0], 2, rounding_mode="trunc")), 2)

    assert meta_pass(halves, {"x": torch.ones(12, device="meta")}).shape == (6, 2)


def test_a_mask_as_index_takes_every_element() -> None:
    x = torch.ones((3, 4), device="meta")
    assert meta_pass(lambda x: x[x > 0], {"x": x}).shape == (12,)
    assert meta_pass(lambda x: x[x[:, 0] > 0], {"x": x}).shape == (3, 4)


def test_copies_that_kernels_make_count_while_they_run() -> None:
    def peak(x: torch.Tensor) -> int:
        with LiveBytes() as live:
            torch.softmax(x, dim=-1)
        return live.peak_bytes

    x = torch.ones((8, 16, 32))
    assert peak(x.transpose(0, 1)) == 2 * peak(x)
    with LiveBytes() as live:
        torch.nn.functional.conv1d(x, torch.ones(4, 16, 1))
    assert live.peak_bytes >= x.nbytes


@pytest.mark.parametrize(("device", "code_bytes"), [("cpu", 20_000_000), ("cuda", 0)])
def test_code_that_a_processor_compiles_for_a_convolution_takes_no_vram(
    device: str, code_bytes: int
) -> None:
    x = torch.ones((1, 1, 400_000), dtype=torch.bfloat16, device="meta")
    weight = torch.ones((1, 1, 3), dtype=torch.bfloat16, device="meta")
    with LiveBytes(device=torch.device(device)) as live:
        result = torch.nn.functional.conv1d(x, weight)
    kept = live.now_bytes - result.nbytes
    assert kept > code_bytes if code_bytes else kept == 0


@torch.no_grad()
def test_a_model_without_measurement_has_all_scores_of_eager_attention_reserved() -> None:
    with torch.device("cpu"):
        model = transformers.BertModel._from_config(
            transformers.BertConfig(**CASES["bert"].settings), attn_implementation="eager"
        ).eval()
    workload = Workload(batch_size=2, prompt_tokens=256, new_tokens=1)
    ids = torch.ones((2, 256), dtype=torch.long)
    with LiveBytes() as live:
        model(input_ids=ids)
    config = model.config.to_dict()
    eager, fused = (estimate_memory(config, workload, eager=each) for each in (True, False))
    assert eager is not None
    assert fused is not None
    assert fused.prefill_bytes < live.peak_bytes <= eager.prefill_bytes


class Unmeasured(transformers.BertModel):
    """A model that cannot be run without values."""

    _supports_sdpa = False

    def forward(self, input_ids: Any) -> Any:
        """Refuse tensors without values."""
        if input_ids.is_meta:
            raise RuntimeError("no values")
        return super().forward(input_ids)


def test_the_plan_says_that_what_is_not_measured_is_estimated(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert", model="BertModel")
    checkpoint = Checkpoint.open(folder)
    config, _ = load_config(folder)
    workload = Workload(batch_size=2, prompt_tokens=PROMPT)
    traced = trace_model(checkpoint, config=config, model_class=Unmeasured)
    memory = Assembly(traced, checkpoint, workload).memory
    assert memory == estimate_memory(checkpoint.config, workload, eager=True)
    assert memory is not None
    plan = make_plan(checkpoint, CPU, workload=workload, memory=memory)
    assert plan.workload_bytes >= memory.reserved_bytes
    assert any("estimated from config.json" in note for note in plan.notes)
