"""Plans in words: what fills a step and a memory, and how two plans differ."""

from __future__ import annotations

from dataclasses import fields, replace

from tersor.formats.units import latency, percent, size
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.search.price import Candidate

SMALL = 0.005  # of a step: differences below are not worth a word
PARTS = {
    "compute": "computing",
    "tp": "tensor-parallel collectives",
    "cp": "exchange of keys and values (cp)",
    "ep": "sending tokens to experts",
    "dp": "gradients and weights that are not hidden (dp)",
    "pp": "sends between stages",
    "bubble": "waiting in the pipeline",
    "optimizer": "the optimizer's step",
    "offload": "copies to and from the host",
}
MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "margin")


def describe_parts(estimate) -> str:
    """`computing 71 %, waiting in the pipeline 9 %, ...` of a step."""
    parts = sorted(estimate.parts.items(), key=lambda part: -part[1])
    shown = [(name, seconds) for name, seconds in parts if seconds > SMALL * estimate.step_seconds]
    return ", ".join(f"{PARTS.get(name, name)} {percent(seconds / estimate.step_seconds)}" for name, seconds in shown)


def fullest(candidate: Candidate) -> tuple[int, object]:
    """(stage, its estimate) of the stage that takes the most memory."""
    return max(enumerate(candidate.estimate.stages), key=lambda entry: (entry[1].memory.total, -entry[0]))


def describe_memory(candidate: Candidate, limit: float) -> str:
    """Which rank is the fullest, and what fills it."""
    stage, estimate = fullest(candidate)
    layout = candidate.layout
    rank = layout.rank_of_stage(stage)[0] * layout.dp * layout.cp * layout.tp
    memory = estimate.memory
    largest = sorted(((getattr(memory, name), name) for name in MEMORY), reverse=True)
    words = ", ".join(f"{name} {size(nbytes)}" for nbytes, name in largest if nbytes > 0.01 * memory.total)
    return f"rank {rank} (stage {stage}) needs {size(candidate.estimate.peak_bytes)} of {size(limit)}: {words}"


def named(layout: Layout) -> str:
    """As a user writes it, without the blocks of every stage."""
    return replace(layout, stages=()).describe()


def changes(layout: Layout, other: Layout) -> str:
    """What `other` has that `layout` has not, as a user writes it."""
    parts = []
    for entry in fields(Layout):
        value = getattr(other, entry.name)
        if value != getattr(layout, entry.name) and entry.name != "stages":
            parts.append(f"{entry.name}={value}")
    if not parts and other.stages != layout.stages:
        parts.append(f"stages={'+'.join(map(str, other.stages))}")
    return ",".join(parts) or "nothing else"


def why_slower(best: Candidate, other: Candidate) -> str:
    """One sentence on two plans that fit: how much longer (or less) a step of `other` takes, and which parts of it."""
    mine, its = best.estimate, other.estimate
    lost = its.step_seconds - mine.step_seconds
    share = lost / mine.step_seconds
    differences = {
        name: its.parts.get(name, 0.0) - mine.parts.get(name, 0.0) for name in dict.fromkeys((*mine.parts, *its.parts))
    }
    ordered = sorted(differences.items(), key=lambda part: -abs(part[1]))
    shown = [
        f"{PARTS.get(name, name)} {'+' if seconds > 0 else '-'}{latency(abs(seconds))}"
        for name, seconds in ordered
        if abs(seconds) > SMALL * mine.step_seconds
    ]
    more = its.peak_bytes - mine.peak_bytes
    memory = f"takes {size(abs(more))} {'more' if more > 0 else 'less'} memory" if more else "takes the same memory"
    if abs(share) <= SMALL:
        return f"as fast to {percent(SMALL)}, and {memory}"
    because = f": {', '.join(shown)}" if shown else ""
    return f"a step takes {percent(abs(share))} {'longer' if share > 0 else 'less'}{because}; {memory}"
