"""The steps of a run: gradients or forward passes only, saves, interruption."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tersor.formats.errors import TersorError
from tersor.ops.distill.forward_only.log import LogWriter
from tersor.ops.distill.optimizers.base import local
from tersor.ops.distill.optimizers.schedule import learning_rate, set_learning_rate
from tersor.ops.distill.optimizers.state import pack_state, unpack_state
from tersor.ops.distill.saved import Saved
from tersor.ops.distill.session import Session

Progress = Callable[..., None]  # stage, done, total, note


@dataclass
class History:
    """What happened: a line per step with `step loss lr gradient_norm` and every term, and the time of all steps."""

    lines: list[dict] = field(default_factory=list)
    seconds: float = 0.0


def run(
    session: Session,
    saved: Saved,
    log: Path | None,
    progress: Progress,
    board: Callable[[dict], None] = lambda line: None,
) -> History:
    """All steps, from the last save on; `board` sees the numbers of each.

    Raises KeyboardInterrupt, state saved, when a signal asked for it; TersorError for a loss that is no number, state saved
    as it was before that step.
    """
    loop = Loop(session, saved, log)
    with _signals() as stop:
        loop.run(stop, progress, board)
    return loop.history


class Loop:
    """The steps of one run and what they left behind: `history`, and `done` of them."""

    def __init__(self, session: Session, saved: Saved, log: Path | None):
        self.session, self.saved, self.request = session, saved, session.request
        self.history, self.done, self.save_is_due = History(), 0, False
        if saved.latest is not None:
            self._restore()
        self.log = None
        if session.is_forward_only and log is not None and session.ranks.is_first:
            base = session.source.fingerprint()
            self.log = LogWriter(log, base, session.request.optimizer, session.optimizer.settings(), self.done)

    def _restore(self) -> None:
        latest = self.saved.latest
        self.done = latest["step"]
        self.history = History(latest["lines"], latest["seconds"])
        tensors = self.saved.load(self.session.parameters)
        if self.session.elastic is not None:
            self.session.elastic.sampler.load_state_dict(latest["elastic"])
        if not self.session.is_forward_only:
            unpack_state(self.session.optimizer, tensors, latest["numbers"][str(self.session.ranks.rank)])

    def run(self, stop: list[int], progress: Progress, board: Callable[[dict], None]) -> None:
        steps, request, ranks = self.request.steps, self.request, self.session.ranks
        for step in range(self.done + 1, steps + 1):
            progress("training", step - 1, steps, self._note())
            began = time.perf_counter()
            line = self._forward_only(step) if self.session.is_forward_only else self.step(step)
            self.history.seconds += time.perf_counter() - began
            self.history.lines.append(line)
            board(line)
            self.done = step
            interrupted = ranks.any(bool(stop))
            if interrupted:
                self._save()
                raise KeyboardInterrupt
            self.save_is_due = bool(request.save_every) and step % request.save_every == 0
        progress("training", steps, steps, self._note())
        if self.log is not None:
            self.log.close()

    def _note(self) -> str:
        """For the progress line."""
        if not self.history.lines:
            return ""
        speed = len(self.history.lines) * self.session.tokens_per_step / self.history.seconds
        return f"loss {self.history.lines[-1]['loss']:.4g}, {speed:.0f} tokens/s"

    def _save(self) -> None:
        tensors, numbers = ({}, {}) if self.session.is_forward_only else pack_state(self.session.optimizer)
        everyone: list = [numbers]
        if self.session.ranks.count > 1:
            everyone = [None] * self.session.ranks.count
            torch.distributed.all_gather_object(everyone, numbers)
        content = {
            "lines": self.history.lines,
            "seconds": self.history.seconds,
            "numbers": {str(rank): found for rank, found in enumerate(everyone)},
            "elastic": None if self.session.elastic is None else self.session.elastic.sampler.state_dict(),
        }
        self.saved.save(self.done, self.session.parameters, tensors, content)

    def _rate(self, step: int) -> float:
        request = self.request
        return learning_rate(request.schedule, step, request.steps, self.session.peak_lr, request.warmup)

    def _micro_batches(self, step: int) -> tuple[torch.Tensor, ...]:
        ids = self.session.data.ids(step - 1)
        return ids.split(self.request.micro_batch or len(ids))

    def step(self, step: int) -> dict:
        """One step with gradients. The loss is the mean over the tokens of the global batch, however that is cut."""
        session, rate = self.session, self._rate(step)
        set_learning_rate(session.optimizer, rate)
        if session.lisa is not None:
            session.lisa.before_step(step)
        if session.elastic is None:
            total, found = self._pass(step)
        else:
            total, found = self._sub_networks(step)
        session.student.before_step()
        norm = _gradient_norm(session)
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._give_up(step, total, norm)
        if self.save_is_due:  # now that the weights have shown that they give a loss
            self._save()
            self.save_is_due = False
        _scale_gradients(session, norm, self.request.clip_norm)
        session.optimizer.step()
        session.optimizer.zero_grad(set_to_none=True)
        session.student.after_step()
        return {"step": step, "loss": total, "lr": rate, "gradient_norm": norm, **({} if len(found) < 2 else found)}

    def _pass(self, step: int, share: float = 1.0) -> tuple[float, dict[str, float]]:
        """Add `share` of the gradients of one pass over the batch. Returns the loss, and each of its terms if several."""
        session = self.session
        tokens, total, terms = session.tokens_per_step, torch.zeros((), dtype=torch.float64), {}
        for ids in self._micro_batches(step):
            loss, parts = session.loss(step - 1, ids)
            # FSDP2 takes the mean of the processes' gradients; each has a part of the sum.
            (loss * (share * session.ranks.count / tokens)).backward()
            total += loss.detach().double().cpu()
            for name, value in parts.items():
                terms[name] = terms.get(name, 0) + value.detach().double().cpu()
        return float(session.ranks.sum(total)) / tokens, {
            name: float(session.ranks.sum(value)) / tokens for name, value in terms.items()
        }

    def _sub_networks(self, step: int) -> tuple[float, dict[str, float]]:
        """The sandwich of an elastic run: the mean over the sub-networks that are drawn, and the loss of the largest."""
        elastic = self.session.elastic
        draws, losses = elastic.sample(), []
        for draw in draws:
            with elastic.running(draw.network):
                losses.append(self._pass(step, 1 / len(draws))[0])
        elastic.record(losses)
        by_role = {draw.role: loss for draw, loss in zip(draws, losses, strict=True)}
        return sum(losses) / len(losses), {role: by_role[role] for role in ("largest", "smallest") if role in by_role}

    def _forward_only(self, step: int) -> dict:
        session, rate = self.session, self._rate(step)

        def loss() -> float:
            total = sum(session.loss(step - 1, ids)[0].double().cpu() for ids in self._micro_batches(step))
            return float(session.ranks.sum(total)) / session.tokens_per_step

        if self.save_is_due:
            self._save()
            self.save_is_due = False
        numbers = session.optimizer.step(loss, rate, step)
        session.student.after_step()
        if self.log is not None:
            self.log.write(numbers)
        return {"step": step, "loss": numbers["loss"], "lr": rate, "scalar": numbers["scalar"]}

    def _give_up(self, step: int, loss: float, norm: float) -> None:
        what = (
            f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}, the loss {loss:.4g}"
        )
        kept = self.saved.step
        if kept is None:
            raise TersorError(
                f"step {step}: {what}", "lower --lr or --clip-norm; with --save-every a good state is kept"
            )
        raise TersorError(
            f"step {step}: {what}; the last good state, after step {kept}, is in {self.saved.folder}",
            "go on from there with --resume and a lower --lr or --clip-norm",
        )


def _gradient_norm(session: Session) -> float:
    """Over all processes."""
    squares = torch.zeros((), dtype=torch.float64)
    for parameter in session.parameters.values():
        if parameter.grad is not None:
            part = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32).double().cpu().square()
            squares += part if hasattr(parameter, "to_local") else part / session.ranks.count
    return math.sqrt(float(session.ranks.sum(squares)))


def _scale_gradients(session: Session, norm: float, limit: float) -> None:
    """So that their norm is `limit` at most; 0 leaves them."""
    if limit and norm > limit:
        for parameter in session.parameters.values():
            if parameter.grad is not None:
                local(parameter.grad).mul_(limit / norm)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted, so that the step that runs is finished and saved; a second one stops at once."""
    seen: list[int] = []
    before = {}

    def note(number, frame) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, note)
        except ValueError:  # not the main thread
            continue
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
