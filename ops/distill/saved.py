"""The state of an unfinished run, in `OUT.training/`: what `--resume` goes on from, with the bytes of a run never interrupted.

Each save is a folder `step-N` that is complete before `latest.json` names it, so that a kill at any moment leaves a whole
one. Parameters and optimizer state are safetensors, a file for each process; losses and numbers are JSON.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tersor.formats.errors import TersorError
from tersor.formats.json_file import read_object
from tersor.ops.distill.optimizers.base import local
from tersor.ops.distill.ranks import Ranks

LATEST = "latest.json"
SCHEMA = "tersor.training/1"
WAY_OUT = "use --force to begin again, or give the arguments of the run that was interrupted"


def folder_of(output: Path) -> Path:
    return output.with_name(output.name + ".training")


class Saved:
    """Saves of one run. `key` is what decides its bytes: a save of another run is refused."""

    def __init__(self, output: Path, key: dict, ranks: Ranks, resume: bool, force: bool):
        """Raises TersorError when there is a save that neither --resume nor --force speaks of, or one of another run."""
        self.folder, self.ranks = folder_of(output), ranks
        self.key = json.loads(json.dumps(key, default=str)) | {"processes": ranks.count}
        self.latest: dict | None = None
        if (self.folder / LATEST).exists() and not resume:
            if not force:
                raise TersorError(
                    f"{self.folder}: holds an unfinished run", "go on with --resume, or begin again with --force"
                )
            if ranks.is_first:
                shutil.rmtree(self.folder)
        elif resume:
            self.latest = self._read()
        ranks.wait()

    def _read(self) -> dict | None:
        path = self.folder / LATEST
        if not path.is_file():
            return None
        latest = read_object(path, WAY_OUT)
        if latest.get("schema") != SCHEMA or not isinstance(latest.get("key"), dict):
            raise TersorError(f"{path}: is no {SCHEMA}", WAY_OUT)
        for name in self.key.keys() | latest["key"].keys():
            if self.key.get(name) != latest["key"].get(name):
                raise TersorError(
                    f"{path}: the interrupted run had {name} {latest['key'].get(name)!r}, this one {self.key.get(name)!r}",
                    WAY_OUT,
                )
        return latest

    @property
    def step(self) -> int | None:
        """The step after which the state was saved last."""
        return None if self.latest is None else self.latest["step"]

    def load(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        """Give `parameters` their saved values. Returns the other tensors of this process."""
        file = self.folder / f"step-{self.latest['step']}" / f"rank-{self.ranks.rank}.safetensors"
        try:
            tensors = load_file(file)
        except Exception as error:  # safetensors raises its own
            raise TersorError(f"{file}: {error}", WAY_OUT) from error
        for name, parameter in parameters.items():
            value = tensors.pop(f"parameter/{name}", None)
            if value is None or value.shape != local(parameter.detach()).shape:
                raise TersorError(f"{file}: has no value for {name!r}", WAY_OUT)
            local(parameter.detach()).copy_(value)
        return tensors

    def save(
        self,
        step: int,
        parameters: Mapping[str, torch.nn.Parameter],
        tensors: Mapping[str, torch.Tensor],
        content: dict,
    ) -> None:
        """Keep the state after `step` and forget the one before."""
        target = self.folder / f"step-{step}"
        target.mkdir(parents=True, exist_ok=True)
        everything = {f"parameter/{name}": local(value.detach()) for name, value in parameters.items()}
        everything |= tensors
        file = target / f"rank-{self.ranks.rank}.safetensors"
        save_file({name: value.cpu().contiguous().clone() for name, value in everything.items()}, file)
        _sync(file)
        self.ranks.wait()
        self.latest = latest = {"schema": SCHEMA, "key": self.key, "step": step, **content}
        if self.ranks.is_first:
            new = self.folder / f"{LATEST}.new"
            new.write_text(json.dumps(latest), "utf-8")
            _sync(new)
            os.replace(new, self.folder / LATEST)
            for other in self.folder.glob("step-*"):
                if other != target:
                    shutil.rmtree(other)
        self.ranks.wait()

    def forget_nothing(self) -> None:
        """Leave no folder behind in which nothing was saved."""
        if self.step is None and self.ranks.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self) -> None:
        """The run is done."""
        self.ranks.wait()
        if self.ranks.is_first and self.folder.exists():
            shutil.rmtree(self.folder)


def _sync(file: Path) -> None:
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())
