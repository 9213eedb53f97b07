"""A plan and its model, made small: a few processes on the CPU run it in seconds.

The layout keeps every kind of parallelism that the plan has. Where there are too few processes for all of them at once, it
becomes several layouts that cover them together. The model keeps its family and what its parallelism hangs on: several
heads share keys and values as before, experts, latent attention, kinds of layers, a tied head.
"""

from __future__ import annotations

from dataclasses import replace

from tersor.formats.errors import TersorError
from tersor.ops.model.facts import ALIASES, TEXT_CONFIGS
from tersor.ops.plan_parallel.export.common import LOST_GRADIENTS, loses_gradients
from tersor.ops.plan_parallel.layout import Layout

HEAD_DIM, MOST_SHARING, WINDOW = 16, 4, 16
# Keys that mean nothing to a random model of this size, or are in the way.
DROPPED = (
    "quantization_config", "torch_dtype", "dtype", "_name_or_path", "transformers_version", "auto_map", "vision_config",
    "num_nextn_predict_layers", "model_type", "architectures", "layer_types", "max_window_layers",
)  # fmt: skip


def shrink_layouts(layout: Layout, processes: int) -> tuple[list[Layout], list[str]]:
    """Layouts of `processes` ranks each that cover the plan's kinds of parallelism, and what they leave out.

    Raises TersorError for too few processes or too many.
    """
    if not 2 <= processes <= 16:
        raise TersorError(f"{processes} processes for a check", "use 2 to 16; 4 is usual")
    notes = []
    wanted = [
        axis for axis, degree in (("tp", layout.tp), ("pp", layout.pp), ("dp", layout.dp * layout.cp)) if degree > 1
    ]
    if layout.cp > 1:
        notes.append("Context parallelism is not run: its ranks take data instead.")
    if not wanted:
        wanted = ["dp"]
        notes.append("The plan is for one device: the check runs data parallelism.")
    options = [
        degrees
        for degrees in _factors(processes, len(wanted))
        if all(
            degree == 1 or axis != "tp" or layout.tp % degree == 0 for axis, degree in zip(wanted, degrees, strict=True)
        )
    ] or [(1,) * (len(wanted) - 1) + (processes,)]
    chosen: list[dict[str, int]] = []
    missing = set(range(len(wanted)))
    while missing:
        best = max(
            options, key=lambda degrees: (len(_covered(degrees) & missing), len(_covered(degrees)), *_evenness(degrees))
        )
        if not _covered(best) & missing:
            break
        chosen.append(dict(zip(wanted, best, strict=True)))
        missing -= _covered(best)
    if layout.dp * layout.cp > 1 and layout.zero == 1:
        notes.append("FSDP2 has no ZeRO 1: gradients are sharded with the optimizer states (zero=2).")
    found = [_small(layout, degrees) for degrees in chosen]
    if any(map(loses_gradients, found)):
        notes.append(f"zero=2 in place of 3: {LOST_GRADIENTS}.")
        found = [replace(small, zero=2) if loses_gradients(small) else small for small in found]
    return found, notes


def _covered(degrees: tuple[int, ...]) -> set[int]:
    return {axis for axis, degree in enumerate(degrees) if degree > 1}


def _evenness(degrees: tuple[int, ...]) -> tuple[int, ...]:
    """Larger for degrees that are close to each other, then for more on the first axes."""
    return (-max(degrees), *degrees)


def _factors(number: int, axes: int) -> list[tuple[int, ...]]:
    if axes == 1:
        return [(number,)]
    return [(d, *rest) for d in range(1, number + 1) if number % d == 0 for rest in _factors(number // d, axes - 1)]


def _small(layout: Layout, degrees: dict[str, int]) -> Layout:
    tp, pp, dp = (degrees.get(axis, 1) for axis in ("tp", "pp", "dp"))
    ep = 1
    if layout.ep > 1:  # transformers lays whole experts over ranks that have tp among them
        ep = next((n for n in range(dp * tp, 1, -1) if n % tp == 0 and dp * tp % n == 0 and n <= max(layout.ep, tp)), 1)
    schedule = layout.schedule if pp > 1 else "1f1b"
    chunks = {"interleaved": 2, "zbv": 2}.get(schedule, 1)
    stages = [1] * (pp * chunks)
    if layout.stages and len(set(layout.stages)) > 1:
        longest = layout.stages.index(max(layout.stages))
        stages[longest * len(stages) // len(layout.stages)] += 1
    if len(stages) == 1:
        stages = [2]
    return replace(
        layout, tp=tp, pp=pp, dp=dp, cp=1, ep=ep, etp=tp if layout.etp > 1 and ep == 1 else 1,
        replicate=2 if layout.replicate > 1 and dp % 2 == 0 and dp > 2 and ep == 1 else 1,
        zero=2 if layout.zero == 1 else layout.zero, micro_batch=min(layout.micro_batch, 2), schedule=schedule, chunks=chunks,
        stages=tuple(stages), recompute="full" if layout.recompute == "full" else "none", offload="none", tier="cpu",
    )  # fmt: skip


def micro_batches(layout: Layout) -> int:
    """Enough to fill the pipeline, and a multiple of its ranks, which looping schedules need."""
    return 2 * layout.pp if layout.pp > 1 else 2


def shrink_config(config: dict, layouts: list[Layout]) -> dict:
    """config.json of a model of the same kind that all of `layouts` can cut. Sizes that a family does not have stay away."""
    inner = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    source = {**config, **inner} if inner is not None else dict(config)
    family = source["model_type"]
    small = {key: value for key, value in source.items() if key not in (*DROPPED, *TEXT_CONFIGS)}
    tp = max(layout.tp for layout in layouts)
    if any(tp % layout.tp for layout in layouts):
        raise TersorError("layouts of a check whose tp do not divide each other", "check them one by one")
    ep = max(layout.ep for layout in layouts)
    blocks = max(sum(layout.stages) for layout in layouts)
    heads, kv_heads = _heads(source, tp)
    hidden = heads * HEAD_DIM
    _set(small, "layers", blocks)
    _set(small, "hidden", hidden)
    _set(small, "heads", heads)
    _set(small, "kv_heads", kv_heads)
    for key in ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if small.get(key) is not None:
            small[key] = 2 * hidden if "moe" not in key else 16 * tp
    if small.get("word_embed_proj_dim") is not None:
        small["word_embed_proj_dim"] = hidden
    small["vocab_size"] = 64 * tp + (source.get("vocab_size", 0) % tp > 0)
    if small.get("head_dim") is not None:
        small["head_dim"] = HEAD_DIM
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        small[key] = None if family != "phi3" else 0
    _experts(small, source, ep)
    _latent(small)
    _positions(small)
    kinds = source.get("layer_types")
    if isinstance(kinds, list) and kinds:  # of every part of the model some
        small["layer_types"] = [kinds[index * len(kinds) // blocks] for index in range(blocks)]
    if small.get("sliding_window"):
        small["sliding_window"] = WINDOW
    return {"model_type": family, **small}


def _set(small: dict, what: str, value: int) -> None:
    for key in ALIASES[what]:
        if small.get(key) is not None:
            small[key] = value


def _heads(source: dict, tp: int) -> tuple[int, int]:
    """(heads, heads of keys and values): as many share keys and values as before, up to a limit."""

    def of(what: str) -> int | None:
        return next((source[key] for key in ALIASES[what] if isinstance(source.get(key), int)), None)

    heads = of("heads")
    if heads is None:
        raise TersorError("config.json: no number of heads", "the check needs a model with attention")
    kv_heads = of("kv_heads") or heads
    sharing = max(1, min(heads // kv_heads, MOST_SHARING))
    few = tp if kv_heads > 1 else 1
    few *= 2 if few * sharing < 2 else 1
    return few * sharing if kv_heads > 1 else max(sharing, tp), few


def _experts(small: dict, source: dict, ep: int) -> None:
    if not any(source.get(key) for key in ALIASES["experts"]):
        return
    count = 4 * max(ep, 1) if ep < 4 else 2 * ep
    _set(small, "experts", count)
    for key in ALIASES["experts_per_token"]:
        if small.get(key):
            small[key] = min(small[key], 2)
    if small.get("n_group"):
        small["n_group"], small["topk_group"] = (2, 1) if small["n_group"] > 1 else (1, 1)
    if small.get("first_k_dense_replace"):
        small["first_k_dense_replace"] = 1


def _latent(small: dict) -> None:
    if small.get("kv_lora_rank"):
        small |= {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
        small |= {"q_lora_rank": 32} if small.get("q_lora_rank") else {}
        small |= {"head_dim": 8} if "head_dim" in small else {}


def _positions(small: dict) -> None:
    """Long-context scaling with a number for every dimension does not fit smaller heads."""
    for key in ("rope_scaling", "rope_parameters"):
        settings = small.get(key)
        if isinstance(settings, dict) and any(isinstance(value, list | dict) for value in settings.values()):
            del small[key]
