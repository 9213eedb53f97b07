"""What people read of a plan: the choice and its reasons, the schedule drawn, memory by rank, and what else there was."""

from __future__ import annotations

from dataclasses import asdict

from tersor.formats.cluster import Cluster
from tersor.formats.page import Bars, Facts, Notes, Plot, Section, Table
from tersor.formats.units import count, latency, number, percent, size
from tersor.ops.plan_parallel.cost.step import Estimate
from tersor.ops.plan_parallel.layout import Layout, write_stages
from tersor.ops.plan_parallel.schedule import draw
from tersor.ops.plan_parallel.schedule.pipeline import Timeline
from tersor.ops.plan_parallel.search.compare import PARTS
from tersor.ops.plan_parallel.search.price import Candidate
from tersor.ops.plan_parallel.search.train import SearchResult

DEGREES = {
    "tp": "tensor parallel", "pp": "pipeline parallel", "dp": "data parallel", "cp": "context parallel",
    "ep": "expert parallel", "etp": "expert tensor parallel", "replicate": "groups with the same shards",
}  # fmt: skip
STATES = ("weights", "gradients", "optimizer", "logits", "buffers", "margin")


def training(
    best: Candidate,
    result: SearchResult,
    timeline: Timeline | None,
    sentences: list[str],
    document: dict,
    cluster: Cluster,
) -> list[Section]:
    """`document` is what plan.json holds of the plan."""
    layout, estimate = best
    sections = [
        _choice(layout, estimate, sentences),
        _time(estimate),
        _memory(estimate, timeline, cluster),
        _others(document, result),
    ]
    if timeline is not None:
        sections.insert(2, Section("Schedule", [draw.schedule(timeline)]))
    if document["inside_blocks"]:
        sections.insert(-1, _inside(document["inside_blocks"]))
    return sections


def _inside(found: list[dict]) -> Section:
    """How the operators of a block are cut over the tensor-parallel ranks."""
    items: list = []
    for kind in found:
        blocks = kind["blocks"]
        which = f"block {blocks[0]}" if len(blocks) == 1 else f"{len(blocks)} blocks, as block {blocks[0]}"
        if kind["why"]:
            items.append(Notes([f"{which}: {kind['why']}"]))
            continue
        columns = ["operator", "annotation", "cut along", "collectives before it"]
        note = f"{latency(kind['seconds'])} a micro-batch, forward and backward, with collectives in the open."
        items.append(Table(which.capitalize(), columns, kind["rows"], 4, note, folded=True))
    lead = (
        "The cheapest choice for all operators of a block together, found from what each may be cut along and the cheapest "
        "collectives between them; no pattern is built in. Times of the plan are priced with Megatron-LM's pattern, and shards "
        "follow the rules of the family: where this differs, it is what another runtime might gain."
    )
    return Section("Inside a block", items, lead)


def _choice(layout: Layout, estimate: Estimate, sentences: list[str]) -> Section:
    pairs = [(word, str(getattr(layout, name))) for name, word in DEGREES.items() if getattr(layout, name) > 1]
    pairs += [("ZeRO stage", str(layout.zero)), ("micro-batch", f"{layout.micro_batch} sequences")]
    pairs.append(("micro-batches a step", f"{estimate.micro_batches:,}"))
    if layout.pp > 1:
        chunks = f", {layout.chunks} model chunks a rank" if layout.chunks > 1 else ""
        pairs += [("schedule", layout.schedule + chunks), ("blocks of each stage", write_stages(layout.stages))]
    pairs.append(("recomputed", layout.recompute))
    if layout.offload != "none":
        pairs.append(("kept off the device", f"{layout.offload}, in {layout.tier}"))
    lead = (
        f"{layout.describe()}: {latency(estimate.step_seconds)} a step, {count(estimate.tokens_per_second)} tokens/s, "
        f"{percent(estimate.mfu)} of the peak, predicted."
    )
    return Section("The plan", [Facts(pairs), Notes(sentences)], lead)


def _time(estimate: Estimate) -> Section:
    parts = sorted(estimate.parts.items(), key=lambda part: -part[1])
    rows = [
        [PARTS.get(name, name), latency(seconds), percent(seconds / estimate.step_seconds)]
        for name, seconds in parts
        if seconds > 0
    ]
    note = "On the pipeline rank that decides. What hides behind computing does not count."
    return Section("Where a step goes", [Table("Seconds of a step", ["part", "time", "share"], rows, note=note)])


def _memory(estimate: Estimate, timeline: Timeline | None, cluster: Cluster) -> Section:
    limit = cluster.memory_bytes
    ranks = {stage.rank: stage.memory for stage in estimate.stages}
    bars = [
        (f"rank {rank}", size(memory.total), [(part, value) for part, value in asdict(memory).items() if value > 0])
        for rank in draw.chosen(len(ranks), draw.ROWS)
        for memory in [ranks[rank]]
    ]
    items: list = [Bars("Most memory of each pipeline rank", f"A device has {size(limit)} to give.", bars)]
    if timeline is not None:
        flying = timeline.in_flight
        sizes = [
            stage.memory.activations / max(flying[stage.rank] * estimate.layout.chunks, 1e-9)
            for stage in estimate.stages
        ]
        kept = [{part: getattr(ranks[rank], part) for part in STATES} for rank in sorted(ranks)]
        items.append(draw.memory_curves(timeline, sizes, kept, limit))
    room = limit - estimate.peak_bytes
    lead = f"The fullest device takes {size(estimate.peak_bytes)} of {size(limit)}; {size(room)} are free."
    return Section("Memory", items, lead)


def _others(document: dict, result: SearchResult) -> Section:
    rows = [
        [plan["layout"], plan["why"], latency(plan["step_seconds"]), size(plan["peak_bytes"])]
        for plan in document["others"]
    ]
    items: list = []
    if rows:
        items.append(Table("Other ways to divide the devices", ["layout", "why it lost", "a step", "memory"], rows, 2))
    changed = [[choice, what] for choice, what in document["neighbours"].items()]
    if changed:
        items.append(Table("One choice changed", ["choice", "what it would do"], changed, numeric_from=2))
    asked = [f"why not {answer}" for answer in document["why_not"].values()]
    if asked:
        items.append(Notes(asked))
    if len(document["pareto"]) > 1:
        points = [(plan["step_seconds"], plan["peak_bytes"], plan["layout"]) for plan in document["pareto"]]
        note = "Plans that no other beats in both time and memory; times before schedules are run block by block."
        items.append(
            Plot(
                "Time against memory",
                note,
                "a step",
                "fullest device",
                points={"plans": points},
                unit_x="duration",
                unit_y="size",
            )
        )
    counted = result.counted
    lead = (
        f"{counted.considered:,} layouts were considered in {latency(counted.seconds)}: {counted.estimated:,} priced, "
        f"{counted.pruned:,} left out because no price of theirs could be better."
    )
    return Section("What else there was", items, lead)


def serving(result, sentences: list[str], document: dict) -> list[Section]:
    """`result` is the ServeResult."""
    plan = result.best[0]
    groups = [
        [
            group["role"], str(group["replicas"]), *(str(group[name]) for name in ("tp", "pp", "dp", "ep")),
            str(group["batch"]), group["held_by"],
        ]
        for group in document["predicted"]["groups"]
    ]  # fmt: skip
    columns = ["role", "instances", "tp", "pp", "dp", "ep", "sequences at once", "held by"]
    lead = (
        f"{plan.describe()}: the first token after {latency(plan.ttft_seconds)}, then one every {latency(plan.tpot_seconds)}; "
        f"{number(plan.requests_per_second)} requests and {count(plan.tokens_per_second)} tokens a second, predicted."
    )
    sections = [Section("The plan", [Table("Instances", columns, groups), Notes(sentences)], lead)]
    rows = [
        [
            other["layout"], other["why"], latency(other["ttft_seconds"]), latency(other["tpot_seconds"]),
            number(other["requests_per_second"]), str(other["devices"]),
        ]
        for other in document["others"]
    ]  # fmt: skip
    items: list = []
    if rows:
        columns = ["plan", "why it lost", "first token", "next tokens", "requests/s", "devices"]
        items.append(Table("Other plans", columns, rows, 2))
    if len(document["pareto"]) > 1:
        points = [
            (point["tpot_seconds"], point["tokens_per_second_per_device"], point["layout"])
            for point in document["pareto"]
        ]
        items.append(
            Plot(
                "Speed for a user against use of the devices", "Prompts and answers together, by batch.", "between tokens",
                "tokens/s of a device", points={"instances": points}, unit_x="duration", log_x=True, log_y=True,
            )
        )  # fmt: skip
    asked = [f"why not {answer}" for answer in document["why_not"].values()]
    if asked:
        items.append(Notes(asked))
    words = f"{result.considered:,} instances were considered in {latency(result.seconds)}, {result.fitting:,} fit."
    return [*sections, Section("What else there was", items, words)]


def experts(found: dict) -> Section:
    """`found` is what plan.json holds of the placement of experts: the numbers of experts.crossings.judge."""
    rows = []
    for label, numbers in (
        ("tokens held out" if found["held_out"] else "the counts", found),
        ("shuffled tokens, a control", found.get("control")),
    ):
        if numbers:
            before, after = numbers["before"], numbers["after"]
            rows.append([label, number(before["cost"]), number(after["cost"]), percent(numbers["saved_share"])])
    columns = ["judged by", "in the order of the checkpoint", "in the order found", "saved"]
    note = "What a token pays from one layer to the next: 1 to another device of the node, 2 to another node."
    best = "No order is better." if found["exact"] else "It was found by search; a better one may exist."
    return Section(
        "Experts",
        [
            Table("Experts on other devices", columns, rows, note=note),
            Notes([best, f"The order is in {found['map']}."]),
        ],
    )


def exports(found: dict) -> Section:
    """`found` is export.write.summary."""
    rows = [
        [
            runtime,
            "–" if "files" not in entry else entry.get("layout", "this plan"),
            ", ".join(entry.get("files", [])),
            " ".join(entry.get("notes") or entry.get("unsupported") or []),
        ]
        for runtime, entry in found.items()
    ]
    return Section(
        "Files for runtimes",
        [Table("In exports/", ["runtime", "plan", "files", "what it does otherwise, or why not"], rows, 4)],
    )


def check(found: dict) -> Section:
    """`found` is what plan.json holds of --execute-check."""
    rows = [
        [
            run["layout"],
            number(run["loss"], 6),
            f"{run['loss_difference']:.1e}",
            f"{run['gradient_difference']:.1e}",
            run["worst"],
        ]
        for run in found["runs"]
    ]
    columns = ["layout", "loss", "loss differs by", "gradients by", "most at"]
    placed = [[name, where] for name, where in found["layouts"].items()]
    items = [
        Table("Runs on a shrunken copy, against one process", columns, rows),
        Table("Where parameters lay in the first run", ["parameter", "placement"], placed, 2, folded=True),
        Notes(found["notes"]),
    ]
    lead = (
        "The shrunken plan gives the loss and the gradients of one process."
        if found["passed"]
        else "It does not give the same numbers."
    )
    return Section("Proof by running", items, lead)
