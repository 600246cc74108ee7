"""The reasons for a plan: its arithmetic, its alternatives, advice, and its inputs."""

from collections.abc import Iterator, Sequence

from layerstream.pipeline.machine.measurement import Input, Origin
from layerstream.pipeline.planning.plan import Plan, ReaderKind
from layerstream.pipeline.planning.prediction import Advice, Candidate
from layerstream.pipeline.report.document import Block, Section, Sentences, Table
from layerstream.stages.batch import LayerBatch
from layerstream.stages.text import format_bytes, format_decimal, format_seconds

__all__ = ["reasons"]

# A smaller gain counts as none: predictions are not that exact.
_LEAST_GAIN = 0.005
_MATRIX_DIMENSIONS = 2
_MOST_CANDIDATES = 8


def reasons(plan: Plan) -> Iterator[Section]:
    """The sections of the report that give reasons."""
    yield _arithmetic(plan)
    yield _candidates(plan)
    if plan.advice:
        yield _advice(plan)
    yield _inputs(plan)


def _arithmetic(plan: Plan) -> Section:
    """The figures of a sweep that can be checked by dividing."""
    sweep = plan.prediction.decode
    others = [b for b in plan.batches if b.index not in plan.decode_residents]
    read_bytes = plan.expert_bytes_per_step
    read_bytes += sum(b.read_bytes for b in others if b.streamed)
    copied_bytes = plan.expert_bytes_copied_per_step
    copied_bytes += sum(b.copied_bytes for b in others if not b.device_resident)
    stages = (
        ("read", read_bytes, sweep.read_seconds),
        ("transfer", copied_bytes, sweep.transfer_seconds),
        ("compute", sum(map(_matrix_bytes, plan.batches)), sweep.compute_seconds),
    )
    rows = [
        (
            name,
            format_decimal(nbytes),
            format_seconds(seconds),
            f"{format_decimal(nbytes / seconds)}/s" if seconds > 0 else "-",
        )
        for name, nbytes, seconds in stages
    ]
    return Section(
        title="Check it: bytes of a decoding sweep / time that a stage is busy = rates as below",
        blocks=[
            Table(columns=("stage", "bytes", "busy", "bytes / busy"), rows=rows),
            Sentences(lines=list(_remarks(plan))),
        ],
    )


def _matrix_bytes(batch: LayerBatch) -> int:
    return sum(t.nbytes for t in batch.tensors if len(t.shape) >= _MATRIX_DIMENSIONS)


def _remarks(plan: Plan) -> Iterator[str]:
    sweep = plan.prediction.decode
    longest = max(sweep.read_seconds, sweep.transfer_seconds, sweep.compute_seconds)
    yield (
        f"A sweep takes the longest of these, {format_seconds(longest)}, and what stages wait for one another "
        f"and for {len(plan.batches)} hand-offs: {format_seconds(sweep.seconds)}."
    )
    if plan.workload is not None:
        yield "Computing is matrices at the rate for so many tokens, attention over the cache, and Python."
    if plan.kv_cache_on_host:
        yield "Computing takes the KV cache to the device and back as well, at the rate that is not page-locked."
    if plan.reader is ReaderKind.MMAP and not sweep.read_seconds:
        yield "The files are expected in the page cache, so that reading takes no time."


def _candidates(plan: Plan) -> Section:
    rows = [_candidate_row(plan, each) for each in _selected(plan.candidates)]
    columns = (
        "batch size",
        "slots",
        "reader",
        "stay",
        "host RAM",
        *(("VRAM",) if not plan.on_cpu else ()),
        "sweep",
        "request" if plan.workload is not None else "10 sweeps",
        "",
    )
    return Section(
        title="What was weighed: the best of each layer batch size and reader, and the trivial plan",
        blocks=[Table(columns=columns, rows=rows, left=(0, len(columns) - 1))],
    )


def _selected(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates in the report, with the chosen one and the trivial one among them."""
    fastest = {id(each) for each in candidates[:_MOST_CANDIDATES]}
    return [each for each in candidates if id(each) in fastest or each.chosen or each.name]


def _candidate_row(plan: Plan, candidate: Candidate) -> tuple[str, ...]:
    times = candidate.request_seconds / max(plan.prediction.request_seconds, 1e-9)
    return (
        f"{candidate.layer_batch_size}{' (trivial)' if candidate.name else ''}",
        str(candidate.slots),
        candidate.reader,
        f"{candidate.resident_batches} of {candidate.batches}",
        format_bytes(candidate.host_used_bytes),
        *((format_bytes(candidate.vram_used_bytes),) if not plan.on_cpu else ()),
        format_seconds(candidate.sweep_seconds),
        format_seconds(candidate.request_seconds),
        "<- chosen" if candidate.chosen else f"{times:.2f} x the time",
    )


def _advice(plan: Plan) -> Section:
    gains = sorted(((_gain(plan, each), each) for each in plan.advice), key=lambda pair: -pair[0])
    rows = [
        (
            each.change,
            format_seconds(each.sweep_seconds),
            format_seconds(each.request_seconds),
            _gain_text(gain),
        )
        for gain, each in gains
    ]
    request = "request" if plan.workload is not None else "10 sweeps"
    return Section(
        title="What would help, each by itself",
        blocks=[Table(columns=("", "sweep", request, ""), rows=rows, left=(0, 3))],
    )


def _gain_text(gain: float) -> str:
    if gain >= _LEAST_GAIN:
        return f"{1 + gain:.2f} x as fast"
    return "brings nothing" if gain > -_LEAST_GAIN else f"{-gain:.0%} slower"


def _gain(plan: Plan, advice: Advice) -> float:
    """The relative gain in tokens per second, including prompts: 1.0 is twice as many."""
    predicted = plan.prediction
    before = 1 / predicted.request_seconds if predicted.request_seconds else 0.0
    after = 1 / advice.request_seconds if advice.request_seconds else 0.0
    if plan.workload is not None:
        before *= plan.workload.batch_size
        after *= round(advice.tokens_per_second * advice.sweep_seconds)
    return after / before - 1 if before else 0.0


def _inputs(plan: Plan) -> Section:
    rows = [
        (_label(each.name), _value_text(each.name, each.value), _origin_text(each))
        for each in plan.inputs
        if each.value  # an empty page cache is no input
    ]
    blocks: list[Block] = [Table(columns=("", "value", "how it is known"), rows=rows, left=(0, 2))]
    lines = list(plan.notes)
    if any(each.origin is Origin.ASSUMED for each in plan.inputs):
        lines.append(
            "ASSUMED figures are nobody's measurement: trust what depends on them no further than them"
        )
    if any(each.origin is Origin.CONTENDED for each in plan.inputs):
        lines.append(
            "other processes kept this machine busy while it was measured: of copies and computation the best "
            "samples were taken; plan again when it is quiet"
        )
    if lines:
        blocks.append(Sentences(lines=[f"! {line}" for line in lines]))
    return Section(title="What it was made with", blocks=blocks)


_LABELS = {
    "host_available_bytes": "host RAM, free",
    "vram_free_bytes": "VRAM, free",
    "cached_bytes": "files in the page cache",
    "disk_bytes_per_second": "disk, direct reads",
    "mmap_bytes_per_second": "disk, mapped files",
    "host_copy_bytes_per_second": "copies in host RAM",
    "attention_flops_per_second": "attention in a long prompt",
    "step_attention_flops_per_second": "attention of one token",
    "kv_growth_bytes_per_second": "appending to KV caches",
    "blocks_per_second": "Python and launches of blocks",
    "h2d_bytes_per_second": "copies to the device",
    "pageable_h2d_bytes_per_second": "the same, not page-locked",
    "direct_read_cpu_seconds_per_byte": "processor, direct reads",
    "mmap_read_cpu_seconds_per_byte": "processor, mapped files",
    "overhead_seconds_per_batch": "hand-offs of a layer batch",
}


def _label(name: str) -> str:
    if name.startswith("unpacking "):
        return name  # with the encoding's own name
    return _LABELS.get(name, name.replace("_", " "))


def _value_text(name: str, value: float) -> str:
    """``value`` with its unit, which is in the name of its field."""
    if name.endswith("_seconds_per_byte"):
        return f"{value * 1e9:.3g} s/GB"
    if name.endswith("_seconds_per_batch"):
        return format_seconds(value)
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_flops_per_second"):
        return f"{format_decimal(value).removesuffix('B')}FLOP/s"
    if name == "blocks_per_second":
        return f"{value:.4g} blocks/s"
    return f"{format_decimal(value)}/s"


def _origin_text(figure: Input) -> str:
    match figure.origin:
        case Origin.MEASURED:
            how = "measured just now"
        case Origin.CONTENDED:
            how = "measured BESIDE OTHER PROCESSES"
        case Origin.CACHED:
            how = f"measured {format_seconds(figure.age_seconds or 0)} ago"
        case Origin.GIVEN:
            how = "given"
        case Origin.LEARNT:
            how = "learnt from this model's sweeps"
        case Origin.ASSUMED:
            how = "ASSUMED"
    if figure.least is None or figure.most is None:
        return how
    least, most = (_value_text(figure.name, value) for value in (figure.least, figure.most))
    return f"{how} ({least} to {most})"
