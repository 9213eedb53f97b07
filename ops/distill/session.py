"""Everything that a run of distill works with, put together and checked before the first step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from tersor.formats.checkpoint import Checkpoint
from tersor.formats.dense import DenseView
from tersor.formats.errors import TersorError
from tersor.formats.json_file import read_object
from tersor.formats.locate import locate
from tersor.formats.sparse.view import open_checkpoint
from tersor.ops.distill.data import TrainingData
from tersor.ops.distill.elastic.elastic import Elastic
from tersor.ops.distill.forward_only.build import LEARNING_RATES as FORWARD_ONLY
from tersor.ops.distill.forward_only.build import build_forward_only
from tersor.ops.distill.losses.capture import Capture, attends_causally
from tersor.ops.distill.losses.heads import final_states, read_head
from tersor.ops.distill.losses.layer_map import LayerMap, kept_blocks, layer_map
from tersor.ops.distill.losses.objective import Objective, States, compared
from tersor.ops.distill.losses.parse import check_teacher, parse_loss
from tersor.ops.distill.losses.projections import projections_of_model
from tersor.ops.distill.losses.vocabulary import align, tokens_of
from tersor.ops.distill.nested import nest
from tersor.ops.distill.optimizers.build import LEARNING_RATES, build_optimizer
from tersor.ops.distill.optimizers.lisa import Lisa
from tersor.ops.distill.ranks import Ranks, shard
from tersor.ops.distill.request import Request
from tersor.ops.distill.students.build import build
from tersor.ops.distill.students.from_config import from_config
from tersor.ops.distill.teachers.choose import choose, open_teacher
from tersor.ops.distill.teachers.targets import Wanted
from tersor.ops.model.runtime import bare_model, definition
from tersor.ops.model.skeleton import find_blocks
from torch import Tensor

Progress = Callable[[str, int, int], None]
SORTING_WINDOWS = 16  # of the training text, by whose activations elastic units are sorted
TEACHER_KINDS = {"cached": "cached"}


class Session:
    """Student, teacher, data, losses and optimizer of one process."""

    def __init__(self, request: Request, device: torch.device, ranks: Ranks):
        """Raises TersorError for whatever does not fit together."""
        self.request, self.device, self.ranks = request, device, ranks
        self.facts: dict = {}  # for the report
        self.warnings: list[str] = []
        self.terms = parse_loss(request.loss)
        self.source = _source(request)
        self.view = DenseView(self.source)
        self.data = TrainingData(
            self.source.path, request.data, request.seq_len, request.batch, request.steps, request.seed
        ).part(ranks.rank, ranks.count)
        self.elastic = self._elastic() if request.elastic else None
        self.student = self._student()
        self.model = self.student.model
        self.data.require_vocabulary(len(self.model.get_input_embeddings().weight), self.source.path)
        prefix = _block_list(self.student.view)[0]  # found without weights: quantized layers are not of the usual kind
        blocks = self.model.get_submodule(prefix)
        self.blocks = dict(enumerate(blocks))
        choice = None if request.teacher is None else self._choose_teacher()
        check_teacher(self.terms, None if choice is None else TEACHER_KINDS.get(choice.mode, "model"))
        on_logits = any(term.needs in ("logits", "text") for term in self.terms)
        self.head = read_head(self.model) if on_logits else None
        if self.head is not None and (why := self.head.describe()):
            self.warnings.append(why)
        self._assemble(choice)
        self.nested = nest(self.model) if request.nested and not self.is_forward_only else 0
        if self.elastic is not None:
            self.elastic.bind(self.model)
            self.warnings += self.elastic.warnings
        if request.recompute:
            old = self.model.gradient_checkpointing_enable  # its name in earlier versions of transformers
            getattr(self.model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        if not self.is_forward_only:  # which needs every weight in every process, and keeps no gradients
            shard(self.model, blocks, ranks, device)
        self.parameters = {f"student.{name}": value for name, value in self.student.trainable().items()}
        self.parameters |= {f"loss.{name}": value for name, value in self.objective.named_parameters()}
        self.optimizer, self.lisa = self._optimizer(prefix)

    @property
    def is_forward_only(self) -> bool:
        return self.request.optimizer in FORWARD_ONLY

    def _elastic(self) -> Elastic:
        """Sorts the units of the student, which is then built from the sorted view."""
        request = self.request
        inside = [term.name for term in self.terms if term.needs in ("blocks", "attention")]
        if request.config is not None or self.is_forward_only or inside:
            what = (
                "--config"
                if request.config
                else f"--optimizer {request.optimizer}"
                if self.is_forward_only
                else inside[0]
            )
            raise TersorError(
                f"--elastic does not go with {what}: sub-networks skip blocks, and are compared by their answers",
                "train a checkpoint with gradients and losses on logits: --loss kl",
            )
        elastic = Elastic(
            self.view, self.device, self.data.windows[:SORTING_WINDOWS], seed=request.seed, steps=request.steps,
            seq_len=request.seq_len,
        )  # fmt: skip
        self.view = elastic.view
        return elastic

    def _student(self):
        if self.request.config is None:
            return build(self.view, self.request, self.device)
        config = read_object(self.request.config, "give the config.json of the smaller model")
        return from_config(config, self.view, self.request, self.device, self.request.config)

    def _choose_teacher(self):
        request = self.request
        held = 16 * sum(value.numel() for value in self.student.trainable().values())  # gradients, states, activations
        choice = choose(
            request.teacher,
            request.teacher_mode,
            str(self.device),
            student_bytes=held,
            max_memory_bytes=request.max_memory_bytes,
        )
        self.facts["teacher_mode"] = choice.why
        return choice

    def _assemble(self, choice) -> None:
        """Teacher and objective, each of which has to know something of the other."""
        request, needs = self.request, {term.needs for term in self.terms}
        layers: LayerMap | None = None
        inside = needs & {"blocks", "attention"}
        path = None if choice is None else locate(request.teacher)
        if inside:
            original = open_checkpoint(path)
            count = len(_block_list(DenseView(original))[1])
            kept = kept_blocks(self.source.path, len(self.blocks), original.fingerprint(), count)
            layers = layer_map(request.layer_map, len(self.blocks), count, kept)
            self.facts["layer_map"] = layers.describe()
        pairs = compared(self.terms, layers)
        wanted = Wanted(
            pairs.logits,
            tuple(teacher for _, teacher in pairs.outputs),
            tuple(teacher for _, teacher in pairs.attention),
        )
        self.teacher = None
        if choice is not None:
            self.teacher = open_teacher(
                request.teacher, choice, wanted, self.data, str(self.device), request.max_memory_bytes
            )
        common = None
        if self.teacher is not None and self.teacher.vocabulary is not None and self.head is not None:
            names = None if choice.mode == "cached" else tokens_of(path)
            own = tokens_of(self.source.path)
            alignment = align(own if names else None, names, self.head.rows, self.teacher.vocabulary)
            self.facts["vocabulary"] = alignment.describe()
            common = alignment.common
        self.objective = Objective(
            self.terms,
            temperature=request.temperature,
            top_k=request.top_k,
            common=common,
            layers=layers,
            widths=(self.model.config.get_text_config().hidden_size, getattr(self.teacher, "hidden_size", 0)),
            causal="attention" not in inside or attends_causally(self.model),
            seed=request.seed,
        ).to(self.device)
        projections = projections_of_model(self.model, {index: self.blocks[index] for index, _ in pairs.attention})
        self.capture = Capture(self.blocks, [student for student, _ in pairs.outputs], projections)

    def _optimizer(self, prefix: str):
        request = self.request
        if self.is_forward_only:
            zeros = [f"student.{name}" for name in self.student.zeros]
            own = {name: value for name, value in self.parameters.items() if name.startswith("student.")}
            return build_forward_only(request.optimizer, own, request.seed, zeros), None
        inside = f"student.{prefix}."
        tables = [name for name, value in self.parameters.items() if value.ndim == 2 and not name.startswith(inside)]
        optimizer = build_optimizer(
            request.optimizer, self.parameters, request.lr, request.weight_decay, request.seed, tables
        )
        if not request.lisa:
            return optimizer, None
        blocks = [[name for name in self.parameters if name.startswith(f"{inside}{index}.")] for index in self.blocks]
        return optimizer, Lisa(optimizer, self.parameters, blocks, request.lisa, request.lisa_every, request.seed)

    @property
    def peak_lr(self) -> float:
        rates = FORWARD_ONLY if self.is_forward_only else LEARNING_RATES
        return rates[self.request.optimizer] if self.request.lr is None else self.request.lr

    @property
    def tokens_per_step(self) -> int:
        """That count for the loss, over all processes."""
        return self.request.batch * int(self.data.keep.sum())

    def loss(self, step: int, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the kept tokens of a micro-batch: the weighted loss, and each term by name."""
        ids = ids.to(self.device)
        hidden = None
        with _autocast(self.device):
            targets = None if self.teacher is None else self.teacher.targets(step, ids)
            with self.capture as seen:
                if self.head is not None:
                    hidden = final_states(self.model, self.head, input_ids=ids)
                else:
                    self.model.base_model(input_ids=ids)
            own = States(seen.outputs, seen.attention)
        return self.objective(ids, self.data.kept(ids), hidden, self.head, targets, own, targets)


def _autocast(device: torch.device):
    """bfloat16 products on a GPU; float32 is what a CPU is fast with."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def _source(request: Request) -> Checkpoint:
    """The student's checkpoint, or the teacher's where a smaller model starts from it."""
    if request.student is None and request.config is None:
        raise TersorError("no student", "give a checkpoint, or --config with a smaller model's config.json")
    if request.config is not None and request.teacher is None:
        raise TersorError("--config starts from the teacher's weights, and there is none", "add --teacher CHECKPOINT")
    checkpoint = open_checkpoint(locate(request.teacher if request.config is not None else request.student))
    checkpoint.require_config("which says what model this is")
    return checkpoint


def _block_list(view: DenseView) -> tuple[str, torch.nn.ModuleList]:
    return find_blocks(bare_model(*definition(view), view.checkpoint.path))
