"""Which channels of a block may change places, and what moves with them.

Nothing is known of names. In a block whose linear layers put out noise (`BlockProbe`), for a layer R that reads others:

1. rows that column 0 of R depends on and column 1 does not are the channel of column 0: a row of gate and one of up, or
   of v. (The rows of q and k reach all columns of a head.) All columns that they change are the channel's: with
   grouped queries the same one of every query head, at equal distances.
2. the channel of every row, as in `coupling.find`: gradients of the columns whose channel number has bit b set, and of
   those where it is not, for every b. A row that is in both, for some b, is none of a channel.
3. all channels are given the same noise. Those whose columns then show the same numbers are made in the same way: all
   neurons of an FFN, the value channels of one KV head, whose attention is the same. These may change places.
4. the proof: for every bit, the rows of the channels with it are changed. Exactly their columns may change, and no other
   layer's input nor the block's output.

A norm over the values ties all of them together in step 1, so that such a layer has no channels. The stream between the
blocks is another matter: `tersor.ops.model.stream`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tersor.formats.errors import TersorError
from tersor.ops.model.coupling import BlockProbe, codes, expert_pattern, is_a_copy
from tersor.ops.model.skeleton import EXPERTS, Skeleton
from tersor.ops.model.units import Units, block_signature, module_names, probe_pass, units_of

KINDS = ("neurons", "values")
CLOSE = 1e-4
MOST_CLASSES = 1024


@dataclass
class Group:
    """Channels that may change places within their class (`classes` `[channels]`), and all that moves with them."""

    kind: str  # neurons, values or stream
    units: Units
    classes: torch.Tensor


@dataclass
class Channels:
    """Channels of one reading layer by module names: `columns` `[channels, k]`, `rows[writer]` `[channels, k]`."""

    kind: str
    reader: str
    columns: torch.Tensor
    rows: dict[str, torch.Tensor]
    classes: torch.Tensor


def find_groups(skeleton: Skeleton, kinds: tuple[str, ...] = KINDS) -> tuple[list[Group], list[str]]:
    """The groups of all blocks, and for each kind of block what was not found and why. One block is filled at a time."""
    groups: list[Group] = []
    reasons: list[str] = []
    known: dict[tuple, list[Channels]] = {}
    try:
        run = probe_pass(skeleton)
    except TersorError as error:
        return [], [str(error)]
    for index, block in enumerate(skeleton.blocks):
        signature, title = block_signature(block), skeleton.block_name(index)
        if signature not in known:
            known[signature], why = [], []
            try:
                with skeleton.filled(index) as filled:
                    known[signature], why = find_channels(BlockProbe(run, index, filled, title))
            except TersorError as error:
                why = [str(error)]
            found = {channels.kind for channels in known[signature]}
            missing = [kind for kind in kinds if kind not in found]
            if missing:
                seen = f" ({'; '.join(why[:3])})" if why else ""
                reasons.append(f"{title}: no {' and no '.join(missing)} that may change places{seen}")
        names = module_names(skeleton, index)
        for channels in known[signature]:
            if channels.kind in kinds and {channels.reader, *channels.rows} <= names.keys():  # none that was dropped
                units = units_of(skeleton, index, channels.reader, channels.columns, channels.rows, names)
                groups.append(Group(channels.kind, units, channels.classes))
    return groups, reasons


def find_channels(probe: BlockProbe) -> tuple[list[Channels], list[str]]:
    """All channels of a block, and what is in the way of more. Experts of one module are alike: see `coupling.find`."""
    found: dict[str, Channels] = {}
    why: list[str] = []
    with probe.traced() as inputs:
        for name, x in sorted(inputs.items(), key=lambda item: -item[1].numel()):
            pattern = expert_pattern(name)
            if pattern in found:
                continue
            try:
                channels = _channels(probe, name, x)
            except TersorError as error:
                why.append(str(error))
                continue
            if channels is not None:
                found[pattern] = channels
    result: list[Channels] = []
    for channels in found.values():
        try:
            _prove(probe, channels)
        except TersorError as error:
            why.append(str(error))
            continue
        result += [channels, *_other_experts(probe, channels)]
    return sorted(result, key=lambda channels: list(probe.layers).index(channels.reader)), why


def _channels(probe: BlockProbe, name: str, x: torch.Tensor) -> Channels | None:
    """None for a layer that reads no other. Raises TersorError for one whose channels cannot be told apart."""
    total = x.shape[-1]
    if total < 2:
        return None
    first, second = (probe.rows_behind(x, torch.arange(total) == column) for column in (0, 1))
    if not first or is_a_copy(probe, x, first):
        return None
    own = {writer: rows & ~second.get(writer, torch.zeros_like(rows)) for writer, rows in first.items()}
    own = {writer: rows for writer, rows in own.items() if bool(rows.any())}
    if not own:
        raise probe.refuse(name, "its inputs hang together")
    columns = _columns(probe, name, probe.changed(own)[0][name])
    rows, mixed = _rows(probe, x, columns)
    if not rows:
        raise probe.refuse(name, "no row reaches one channel alone")
    classes = _classes(probe, name, columns, rows)
    kind = "values" if mixed or int(classes.max()) > 0 else "neurons"
    return Channels(kind, name, columns, rows, classes)


def _columns(probe: BlockProbe, name: str, reached: torch.Tensor) -> torch.Tensor:
    """Columns of every channel `[channels, k]`, from those of channel 0."""
    total = len(reached)
    places = reached.nonzero()[:, 0]
    k = len(places)
    distance = int(places[1]) if k > 1 else total
    if not torch.equal(places, torch.arange(k) * distance) or total % (k * distance if k > 1 else 1):
        raise probe.refuse(name, f"the columns {places[:5].tolist()} of one channel do not lie at equal distances")
    if k == 1:
        return torch.arange(total)[:, None]
    return torch.arange(total).reshape(-1, k, distance).transpose(1, 2).reshape(-1, k)


def _rows(probe: BlockProbe, x: torch.Tensor, columns: torch.Tensor) -> tuple[dict[str, torch.Tensor], bool]:
    """Step 2: the rows `[channels, k]` of every layer that writes channels; whether other rows reach the columns too."""
    count = len(columns)
    seen: dict[str, dict[int, torch.Tensor]] = {}
    for bit, chosen in codes(count):
        mask = torch.zeros(x.shape[-1], dtype=torch.bool)
        mask[columns[chosen].flatten()] = True
        for writer, rows in probe.rows_behind(x, mask).items():
            seen.setdefault(writer, {})[bit] = rows
    result, mixed = {}, False
    for writer, by_bit in sorted(seen.items()):
        none = torch.zeros(probe.noise[writer].shape[-1], dtype=torch.bool)
        channel, single, reaches = torch.zeros(len(none), dtype=torch.long), ~none, none
        for bit in range(max(1, (count - 1).bit_length())):
            yes, no = by_bit.get(bit, none), by_bit.get(~bit, none)
            single, reaches = single & (yes ^ no), reaches | yes | no
            channel += yes.long() << bit
        mixed = mixed or bool((reaches & ~single).any())
        rows = single.nonzero()[:, 0]
        if not len(rows):
            continue
        rows = rows[torch.argsort(channel[rows], stable=True)]
        per_channel = len(rows) // count
        if not torch.equal(channel[rows], torch.arange(count).repeat_interleave(per_channel)):
            raise probe.refuse(writer, f"its {len(rows)} rows do not spread evenly over {count} channels")
        result[writer] = rows.reshape(count, per_channel)
    return result, mixed


def _classes(probe: BlockProbe, name: str, columns: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Step 3. Raises TersorError where no two channels are made in the same way."""
    noise = {}
    for writer, places in rows.items():
        noise[writer] = probe.noise[writer].detach().clone()
        noise[writer][..., places.flatten()] = noise[writer][..., places[0]].repeat(
            *[1] * (noise[writer].dim() - 1), len(places)
        )
    x = probe.with_noise(noise)[name]
    shown = x[..., columns.to(x.device)].flatten(0, -3).transpose(0, 1).flatten(1)  # [channels, values]
    classes = torch.full((len(columns),), -1)
    scale = shown.abs().max()
    for label in range(MOST_CLASSES):
        left = (classes < 0).nonzero()[:, 0]
        if not len(left):
            break
        alike = (shown[left] - shown[left[0]]).abs().amax(1) <= CLOSE * scale
        classes[left[alike.cpu()]] = label
    if bool((classes < 0).any()) or int(classes.max()) + 1 == len(classes):
        raise probe.refuse(name, "each of its channels is made in a way of its own")
    return classes


def _prove(probe: BlockProbe, channels: Channels) -> None:
    """Step 4. Raises TersorError where something else than the channels' columns changes."""
    for _, chosen in codes(len(channels.columns)):
        rows = {}
        for writer, places in channels.rows.items():
            rows[writer] = torch.zeros(probe.noise[writer].shape[-1], dtype=torch.bool)
            rows[writer][places[chosen].flatten()] = True
        changed, output_changed = probe.changed(rows)
        expected = torch.zeros_like(changed[channels.reader])
        expected[channels.columns[chosen].flatten()] = True
        if not torch.equal(changed.pop(channels.reader), expected):
            raise probe.refuse(channels.reader, "its channels are not independent of each other")
        if other := [name for name, columns in changed.items() if bool(columns.any())]:
            raise probe.refuse(other[0], f"reads the channels of {channels.reader} as well")
        if output_changed:
            raise probe.refuse(channels.reader, "its channels reach the block's output on another way too")


def _other_experts(probe: BlockProbe, channels: Channels) -> list[Channels]:
    """The same channels in the other experts."""
    head, found, rest = channels.reader.partition(f".{EXPERTS}.")
    mine = f"{head}{found}{rest.split('.')[0]}."
    if not found or any(not writer.startswith(mine) for writer in channels.rows):
        return []
    result = []
    for expert, _ in probe.block.get_submodule(f"{head}.{EXPERTS}").named_children():
        other = f"{head}{found}{expert}."
        if other != mine:
            rows = {writer.replace(mine, other, 1): places for writer, places in channels.rows.items()}
            reader = channels.reader.replace(mine, other, 1)
            result.append(Channels(channels.kind, reader, channels.columns, rows, channels.classes))
    return result
