"""`tersor profile --measure`: real times on this device, and what training keeps in memory.

Weights are made up, in the shapes that the config asks for: time depends on shapes. The model runs as transformers runs
it, dense, whatever the file stores: in float32 on a CPU, where it is the fastest dtype as a rule, in bfloat16 on a GPU.
What a stored form that is not dense does to that is measured beside it, on the layers themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.errors import TersorError
from tersor.formats.hardware import Hardware
from tersor.ops.model.activations import saved_bytes, shared_storages, training_block, training_inputs
from tersor.ops.model.bare import BareModel, Kind, run_block
from tersor.ops.model.operators import Pass
from tersor.ops.model.timer import device_name, spread
from tersor.ops.profile.measure.chains import find_chains
from tersor.ops.profile.measure.host import host
from tersor.ops.profile.measure.operators import roofline, time_operators
from tersor.ops.profile.measure.runtime import Fits, measure_rounds, prompt_sizes
from tersor.ops.profile.measure.stand import Stand, choose_blocks
from tersor.ops.profile.measure.stored import measure_stored
from tersor.ops.profile.measure.whole import Check, held_out_pairs, why_not
from tersor.ops.profile.request import Workload

CHAIN_TOKENS = 32
STAGES = (
    "measuring this machine", "timing blocks", "timing operators", "timing the stored form", "counting what training keeps",
)  # fmt: skip
Progress = Callable[[str, int, int], None]


def measure(
    checkpoint: Checkpoint,
    workload: Workload,
    device: torch.device,
    progress: Progress = lambda stage, done, total: None,
) -> dict:
    """The report's `quality["measure"]`. Raises TersorError for a model that cannot be built, run, or held in memory.

    The hardware `host` is measured first, if it is not known yet, and kept for `--hardware host`.
    """
    progress(STAGES[0], 0, 1)
    machine, fresh = host(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    bare = BareModel(checkpoint, device, dtype)
    kinds = bare.kinds()
    data = {
        "device": _device(device, dtype),
        "host": _host(machine, fresh),
        "workload": {"batch": workload.batch, "prompt": workload.prompt, "generate": workload.generate},
    }
    stands = make_stands(bare, kinds, workload)
    data |= _times(bare, kinds, stands, workload, progress)
    progress(STAGES[2], 0, 1)
    data |= _operators(bare, kinds, stands, workload, checkpoint, machine)
    for index in range(len(bare.blocks)):
        bare.empty(index)
    del bare, stands
    progress(STAGES[3], 0, 1)
    data["stored"] = measure_stored(
        checkpoint, workload, device, dtype, lambda done, total: progress(STAGES[3], done, total)
    )
    progress(STAGES[4], 0, 1)
    return data | training_memory(checkpoint, workload)


def make_stands(bare: BareModel, kinds: list[Kind], workload: Workload) -> list[Stand]:
    """The prompts to be timed, on the shell and on some blocks of each kind, which are filled."""
    chosen = choose_blocks(bare, kinds)
    bare.fill_shell()
    for blocks in chosen.values():
        for index in blocks:
            bare.fill(index)
    if not bare.reads_text:
        return [Stand(bare, chosen, workload.batch, 0)]
    longest = workload.prompt + (workload.generate if bare.causal else 0)
    return [Stand(bare, chosen, workload.batch, size) for size in prompt_sizes(bare, longest)]


def _device(device: torch.device, dtype: torch.dtype) -> dict:
    return {
        "name": device_name(device),
        "type": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _host(machine: Hardware, fresh: bool) -> dict:
    copy = machine.notes.get("copy_gbps")
    return {
        "name": machine.name,
        "measured_now": fresh,
        "peak_flops": machine.peak_flops,
        "memory_gbps": machine.memory_gbps,
        "copy_gbps": float(copy) if copy else None,
        "kernel_floor_seconds": machine.kernel_floor_seconds,
    }


def _times(bare: BareModel, kinds: list[Kind], stands: list[Stand], workload: Workload, progress: Progress) -> dict:
    """`runtime`, `held_out` and `blocks`."""
    sizes = [stand.tokens for stand in stands]
    pairs = held_out_pairs(bare, sizes, workload.prompt, workload.generate) if bare.reads_text else []
    reason = why_not(bare) if pairs else "there is no size between those of the fit"
    check = Check(bare, workload.batch, pairs) if reason is None else None
    fits_found, samples = measure_rounds(
        bare,
        kinds,
        stands,
        lambda done, total: progress(STAGES[1], done, total),
        check.run_next if check else lambda number: None,
    )
    fits = Fits(fits_found)
    rows = check.rows(fits) if check else []
    errors = [abs(row["error"]) for row in rows if row["error"] is not None]
    return {
        "runtime": _runtime(bare, fits, workload, sizes),
        "held_out": {"rows": rows, "largest_error": max(errors, default=None), "left_out_because": reason},
        "blocks": [
            {
                "kind": kind.name,
                "layers": len(kind.layers),
                "weights_bytes": kind.parameter_bytes,
                "timed_copies": len(stands[0].chosen[kind.name]),
                **{
                    what: [{"tokens": tokens, **spread(times)} for tokens, times in sorted(points.items())]
                    for what in ("prompt", "step")
                    if (points := samples.get((kind.name, what)))
                },
            }
            for kind in kinds
        ],
    }


def _runtime(bare: BareModel, fits: Fits, workload: Workload, sizes: list[int]) -> dict:
    prompt = workload.prompt if bare.reads_text else sizes[0]
    generated = workload.generate if bare.causal else 0
    middle = prompt + generated / 2

    def interval(value) -> dict:
        seconds, low, high = fits.interval(value)
        return {"seconds": seconds, "interval_seconds": [low, high]}

    total = interval(lambda fit: fit.total(prompt, generated))
    threads = torch.get_num_threads() if bare.device.type == "cpu" else 1
    return {
        "prompt": prompt,
        "generate": generated,
        "rounds": len(fits.fits),
        "sizes": sizes,
        "prompt_seconds": [fits.interval(lambda fit, size=size: fit.prompt(size))[0] for size in sizes],
        "step_seconds": [fits.interval(lambda fit, size=size: fit.step(size))[0] for size in sizes]
        if bare.causal
        else [],
        "first_token": interval(lambda fit: fit.prompt(prompt)),
        "token": interval(lambda fit: fit.step(middle)) if bare.causal else None,
        "total": total,
        "tokens_per_second": workload.batch * generated / total["seconds"] if generated else None,
        "decode_tokens_per_second": workload.batch / fits.interval(lambda fit: fit.step(middle))[0]
        if bare.causal
        else None,
        "prompt_tokens_per_second": workload.batch * prompt / fits.interval(lambda fit: fit.prompt(prompt))[0],
        "device_seconds": total["seconds"] * threads,
    }


def _operators(
    bare: BareModel,
    kinds: list[Kind],
    stands: list[Stand],
    workload: Workload,
    checkpoint: Checkpoint,
    machine: Hardware,
) -> dict:
    """`operators`: for the prompt and for one step, rows with measured and predicted seconds."""
    found: dict = {"roofline_missing_because": None}
    try:
        expected = roofline(checkpoint, bare, machine)
    except TersorError as error:
        expected, found["roofline_missing_because"] = None, str(error)
    stand = stands[-1]
    if bare.reads_text and workload.prompt < stand.tokens:
        stand = Stand(bare, stand.chosen, workload.batch, workload.prompt)
    for name, step in (("prompt", False), ("step", True)):
        if step and not bare.causal:
            found[name] = None
            continue
        rows = time_operators(bare, kinds, stand, step)
        entry = {"tokens": stand.tokens, "rows": rows, "seconds": sum(row["total_seconds"] for row in rows)}
        if expected is not None:
            prediction = expected.predict(
                Pass(workload.batch, 1, stand.tokens) if step else Pass(workload.batch, stand.tokens)
            )
            expected.add(rows, prediction)
            entry["predicted_seconds"] = prediction["seconds"]
        found[name] = entry
    return {"operators": found}


def training_memory(checkpoint: Checkpoint, workload: Workload) -> dict:
    """`activations`, what autograd keeps of a block for the workload's prompt, and `chains`, what it need not keep."""
    bare = BareModel(checkpoint, torch.device("cpu"), torch.bfloat16)
    tokens = max(workload.prompt, 1)
    saved = {}
    for attention in ("sdpa", "eager") if bare.attention == "sdpa" else ("eager",):
        saved[attention] = saved_bytes(checkpoint, tokens, workload.batch, attention=attention)
    chains = []
    for kind in bare.kinds():
        index = kind.layers[0]
        with training_block(bare, index) as block:
            hidden, call = training_inputs(bare, index, CHAIN_TOKENS)
            found = find_chains(run_block(block, hidden, call), CHAIN_TOKENS, shared_storages(block, call))
        bare.empty(index)
        chains += [{"kind": kind.name, "layers": len(kind.layers), **chain} for chain in found]
    return {
        "activations": {"tokens": tokens, "batch": workload.batch, "dtype": "bfloat16", "kinds": saved},
        "chains": chains,
    }
