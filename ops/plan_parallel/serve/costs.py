"""What one serving instance does: seconds for prompts and tokens, room for sequences, requests a second."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from tersor.formats.cluster import Cluster
from tersor.formats.errors import TersorError
from tersor.ops.model.operators import Pass
from tersor.ops.plan_parallel.communication.links import Links
from tersor.ops.plan_parallel.layout import Layout
from tersor.ops.plan_parallel.model import PlanModel
from tersor.ops.plan_parallel.request import Workload
from tersor.ops.plan_parallel.serve.instance import Instance
from tersor.ops.plan_parallel.serve.kv import sequence_bytes
from tersor.ops.plan_parallel.serve.memory import Memory, Room
from tersor.ops.plan_parallel.serve.steps import PARTS, Step, Steps

TYPICAL_BATCH = 32  # of the step whose time decides where a pipeline is cut
ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True)
class ServeEstimate:
    """Of one layout. `batch` and `max_batch` are sequences of a data-parallel rank, tokens those that are generated.
    `kv_bytes` are of the fullest device. Times hold without a queue."""

    role: str
    fits: bool
    short_bytes: float
    memory: tuple[Memory, ...]
    batch: int
    max_batch: int
    ttft_seconds: float
    tpot_seconds: float
    requests_per_second: float
    tokens_per_second: float
    kv_bytes: float
    bound_by: str
    parts: dict[str, float] = field(default_factory=dict)


class ServeCosts:
    """`imbalance` is how many more tokens the busiest device of an expert layer gets than a mean one."""

    def __init__(self, model: PlanModel, cluster: Cluster, links: Links, workload: Workload, imbalance: float = 1.0):
        """Raises TersorError for a model that generates no text, or a workload that is none."""
        if not model.facts.causal or model.facts.head is None:
            raise TersorError(
                f"{model.checkpoint.path}: {model.facts.architecture} writes no text token by token",
                "--mode serve is for models that do",
            )
        for name in ("prompt", "generate"):
            if getattr(workload, name) < 1:
                raise TersorError(f"--{name} is {getattr(workload, name)}", "it should be at least 1")
        for name in ("rate", "ttft_seconds", "tpot_seconds"):
            value = getattr(workload, name)
            if value is not None and not value > 0:
                option = name.removesuffix("_seconds")
                raise TersorError(f"--{option} is {value}", "it should be above 0")
        self.model, self.cluster, self.links, self.imbalance = model, cluster, links, imbalance
        self.prompt, self.generate = workload.prompt, workload.generate
        self.steps = Steps(model, cluster, links, self._token_pass(TYPICAL_BATCH), imbalance)
        self._room = Room(self.steps, self.context)

    @property
    def context(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt + self.generate

    @cached_property
    def prompt_bytes(self) -> int:
        """The cache of one prompt, over all layers."""
        facts = self.model.facts
        return sum(sequence_bytes(one, self.prompt, facts.cache_bytes_per_number) for one in facts.attention)

    def _token_pass(self, sequences: int) -> Pass:
        return Pass(sequences, 1, self.prompt + self.generate // 2)

    def read(self, instance: Instance, prompts: int) -> Step:
        """The pass over `prompts` prompts of each rank, which gives their first tokens."""
        return self.steps.step(instance, Pass(prompts, self.prompt))

    def write(self, instance: Instance, sequences: int) -> Step:
        """The pass that adds a token to `sequences` sequences of each rank, half way through their answers."""
        return self.steps.step(instance, self._token_pass(sequences))

    def token_seconds(self, instance: Instance, batch: int) -> float:
        """Between two tokens of a sequence when each rank answers `batch` at once. The stages of a pipeline each work on
        another share of them."""
        step = self.write(instance, ceil(batch / instance.layout.pp))
        return max(step.seconds, min(batch, instance.layout.pp) * step.slowest)

    def memory(self, instance: Instance) -> tuple[Memory, ...]:
        return self._room.memory(instance)

    def room(self, instance: Instance) -> tuple[int, float]:
        """(sequences of a rank that fit at their longest, bytes that lack for the first one on the fullest device)"""
        return self._room.room(instance)

    def serve(self, layout: Layout, role: str = "both", batch: int | None = None, dcp: int = 1) -> ServeEstimate:
        """`batch` sequences of each data-parallel rank at once (as many as fit for None), prompts one by one."""
        if role not in ROLES:
            raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")
        instance = Instance(layout, dcp)
        most, short = self.room(instance)
        batch = max(1, most) if batch is None else batch
        reads, writes, steps = role != "decode", role != "prefill" and self.generate > 1, self.generate - 1
        first = self.read(instance, 1)
        token = self.token_seconds(instance, batch) if writes else 0.0
        busy = first.slowest if reads else 0.0  # of a rank, for each request
        shown = self.write(instance, ceil(batch / layout.pp)) if writes else first
        rate = layout.dp / (busy + (steps * token / batch if writes else 0.0)) if reads or writes else 0.0
        memory = self.memory(instance)
        over = max(one.holding(batch) for one in memory) - self.cluster.memory_bytes
        return ServeEstimate(
            role=role,
            fits=batch <= most,
            short_bytes=max(short, over, 0.0),
            memory=memory,
            batch=batch,
            max_batch=most,
            ttft_seconds=first.seconds if reads else 0.0,
            tpot_seconds=token + batch * busy / steps if writes else 0.0,
            requests_per_second=rate,
            tokens_per_second=rate * self.generate,
            kv_bytes=batch * max(one.sequence for one in memory),
            bound_by=shown.bound_by(),
            parts=dict(zip(PARTS, shown.parts, strict=True)),
        )
