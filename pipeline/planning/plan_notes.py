"""Notes of a plan: its assumptions, and why it is as it is. Pure."""

from collections.abc import Sequence

from layerstream.pipeline.planning.plan import ReaderKind
from layerstream.pipeline.planning.planned_layer import PlannedLayer
from layerstream.pipeline.planning.priced_candidate import PricedCandidate
from layerstream.pipeline.planning.problem import Problem
from layerstream.stages.text import format_bytes, format_seconds

__all__ = ["encodings_in", "notes_on"]


def _reader_note(candidates: Sequence[PricedCandidate]) -> str | None:
    """Which reader was taken, and what the other would have given; None if that is no question."""
    best = candidates[0]
    others = (each for each in candidates if each.placement.reader is not best.placement.reader)
    other = next(others, None)
    mapped = best.placement.reader is ReaderKind.MMAP
    if other is None:
        return "the files are mapped: computation reads them in the page cache" if mapped else None
    seconds = format_seconds(other.prediction.decode.seconds)
    request = format_seconds(other.prediction.request_seconds)
    why = (
        "are mapped, since free memory beside the budget can hold them, whether it does so now or not; read directly"
        if mapped and best.placement.on_cpu
        else "are mapped; read directly"
        if mapped
        else "are read directly; mapped"
    )
    return f"the files {why}, a sweep would take {seconds}, and a request {request}"


def notes_on(problem: Problem, candidates: Sequence[PricedCandidate]) -> tuple[str, ...]:
    """Assumptions, and explanations of the plan."""
    notes, best = list[str](), candidates[0]
    if problem.choices.reader is None and (note := _reader_note(candidates)) is not None:
        notes.append(note)
    if not problem.mappable:
        notes.append(
            "the files are read directly: the address space (ulimit -v) cannot hold a mapping of them"
        )
    if problem.memory is not None and problem.choices.workload is not None:
        how = (
            "measured on the meta device"
            if problem.memory.measured
            else "estimated from config.json"
        )
        workload, longest = problem.choices.workload, problem.memory.prompt_tokens
        notes.append(
            f"KV cache and activations are {how} for {workload.batch_size} x ({workload.prompt_tokens} + "
            f"{workload.new_tokens}) tokens"
            + (f"; the model has positions for {longest} at most" if longest else "")
        )
        if problem.memory.sizes_are_computed:
            notes.append(
                "sizes in a pass, such as the length of a sound, depend on what the model computes: its memory is not known "
                "beforehand, and MAY EXCEED THE BUDGET"
            )
    elif problem.choices.workload is not None:
        notes.append(
            "config.json does not tell the size of KV cache and activations: nothing is reserved for them"
        )
    if encodings := encodings_in(problem.layers):
        how = "tile by tile" if best.placement.on_cpu else "layer batch by layer batch"
        notes.append(
            f"weights stay packed ({', '.join(sorted(encodings))}) and are unpacked {how} in every pass, to what "
            "transformers' from_pretrained computes with"
        )
        unpacked = [b for b in best.placement.batches if b.unpacked_bytes]
        if unpacked:
            nbytes = format_bytes(sum(b.unpacked_bytes for b in unpacked))
            notes.append(
                f"{len(unpacked)} layer batches that stay are kept unpacked as well, in {nbytes}, from their second use on: "
                "there is memory for it, and sweeps do without unpacking them"
            )
        if problem.fused_tokens:
            notes.append(
                f"fused kernels: passes of up to {problem.fused_tokens} tokens multiply packed weights without unpacking them, "
                "and longer ones by tiles: faster and not bit for bit as transformers does; kernels='exact' does"
            )
    return tuple(notes)


def encodings_in(layers: Sequence[PlannedLayer]) -> set[str]:
    """Those of the packed weights in ``layers``."""
    forms = [tensor.packed for layer in layers for tensor in layer.tensors]
    forms += [
        part.packed for layer in layers for source in layer.experts for part in source.tensors
    ]
    return {form.encoding for form in forms if form is not None}
