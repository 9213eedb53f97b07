"""Sparse products on the device at hand, against what a user would run instead.

    python benchmarks/sparse_kernels.py [--device cpu|cuda] [--size 4096] [--output DIR]

- bitmap: 80 % of the weights zero at random, few tokens, against the dense product (cuBLAS on a GPU);
- vector 32x1: 90 % of the vectors zero, square, against dense and torch's block-sparse (BSR) product, which is given the
  same zeros, and blocks of its own of which as many are zero;
- grouped: tokens to experts, against a loop over padded experts and torch's grouped product;
- 2:4, against dense;
- active: half the *inputs* zero, against dense.

Limits are those of kernel_speed.py: the bytes stored at the bandwidth of a copy, or the operations at the speed of a
dense product. Without a GPU the same table is made on the CPU, at small sizes and in float32.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from kernel_speed import OURS, Case, Limits, measure_case, rounded, show
from measure import RESULTS, machine
from tersor.kernels.active_matmul import active_matmul
from tersor.kernels.grouped_matmul import group_by_expert, grouped_matmul
from tersor.kernels.semi_structured import to_semi_structured
from tersor.ops.model.sparse_samples import label, make
from torch import Tensor

FEW_TOKENS = (1, 4, 8, 16)
EXPERTS, PER_TOKEN = 64, 4
DENSE = "torch dense"


def bitmap_cases(device: torch.device, size: int, dtype: torch.dtype) -> Iterator[Case]:
    """The shapes of an attention and of an MLP matrix."""
    kind = ("sparse-bitmask", None)
    for shape in ((size, size), (7 * size // 2, size)):
        sample = make(kind, shape, 0.8, dtype, device)
        for tokens in FEW_TOKENS:
            x = torch.randn(tokens, size, device=device).to(dtype)
            runs = {
                OURS: lambda x=x, sample=sample: sample.product(x),
                DENSE: lambda x=x, sample=sample: x @ sample.weight.t(),
            }
            nbytes = sample.nbytes + x.nbytes + tokens * shape[0] * dtype.itemsize
            yield Case("bitmap 80 %", f"{tokens}x{size}x{shape[0]}", runs, nbytes, 0, dtype)


def tile_cases(device: torch.device, size: int, dtype: torch.dtype) -> Iterator[Case]:
    """Square products with 90 % of the tiles zero."""
    x = torch.randn(size, size, device=device).to(dtype)
    blocks = make(("block", (32, 32)), (size, size), 0.9, dtype, device)
    for kind in (("vector", (32, 1)), ("vector", (16, 1)), ("vector", (1, 64)), ("block", (32, 32))):
        sample = make(kind, (size, size), 0.9, dtype, device)
        runs = {OURS: lambda sample=sample: sample.product(x), DENSE: lambda sample=sample: x @ sample.weight.t()}
        runs |= {"BSR, same zeros": block_sparse(x, sample.weight)}
        if kind[0] == "vector":
            runs |= {"BSR, 90 % of 32x32": block_sparse(x, blocks.weight)}
        operations = 2 * size * int((sample.weight != 0).sum())
        yield Case(
            f"{label(kind)} 90 %", f"{size}x{size}x{size}", runs, sample.nbytes + 2 * x.nbytes, operations, dtype
        )


def block_sparse(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """torch's product with a BSR weight, which is made by the first call."""

    @cache
    def stored() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that BSR is a beta
            return weight.to_sparse_bsr((32, 32))

    return lambda: torch.nn.functional.linear(x, stored())


def grouped_case(device: torch.device, size: int, dtype: torch.dtype) -> Case:
    """A layer of experts on tokens that are sent unevenly: the k-th expert is chosen about in proportion to 1 / k."""
    tokens, width = size, size // 2
    x = torch.randn(tokens, size, device=device).to(dtype)
    weights = (torch.randn(EXPERTS, width, size, device=device) / size**0.5).to(dtype)
    popularity = (1 / torch.arange(1, EXPERTS + 1, device=device)).expand(tokens, -1)
    expert = torch.multinomial(popularity, PER_TOKEN)
    groups = group_by_expert(expert, EXPERTS)
    counts = groups.expert_ptr.diff()
    longest, sizes, rows = int(counts.max()), counts.tolist(), groups.token.long()
    place = torch.arange(len(rows), device=device) - groups.expert_ptr[:-1].repeat_interleave(counts)
    slot = expert.flatten()[groups.pair.long()] * longest + place

    def padded() -> Tensor:
        batch = x.new_zeros(EXPERTS * longest, size)
        batch[slot] = x[rows]
        return torch.bmm(batch.view(EXPERTS, longest, size), weights.transpose(1, 2)).view(-1, width)[slot]

    def one_by_one() -> Tensor:
        parts = x[rows].split(sizes)
        return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)])

    def torchs() -> Tensor:
        multiply = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
        return multiply(x[rows], weights.transpose(1, 2), offs=groups.expert_ptr[1:])

    runs = {OURS: lambda: grouped_matmul(x, weights, groups.token, groups.expert_ptr)}
    runs |= {"padded to the longest": padded, "expert by expert": one_by_one, "torch grouped_mm": torchs}
    nbytes = weights.nbytes + x.nbytes + len(rows) * width * dtype.itemsize
    shape = f"{len(rows)}x{size}x{width}"
    return Case(f"grouped, {EXPERTS} experts", shape, runs, nbytes, 2 * len(rows) * size * width, dtype)


def semi_structured_cases(device: torch.device, size: int, dtype: torch.dtype) -> Iterator[Case]:
    """More tokens than 16 are torch's own product where there is one for this GPU."""
    sample = make(("sparse-24-bitmask", None), (size, size), 0.5, dtype, device)
    sparse = to_semi_structured(sample.weight)
    for tokens in (16, size):
        x = torch.randn(tokens, size, device=device).to(dtype)
        runs = {OURS: lambda x=x: sample.product(x), DENSE: lambda x=x: x @ sample.weight.t()}
        if sparse is not None:
            runs["torch 2:4"] = lambda x=x: torch.nn.functional.linear(x, sparse)
        nbytes = sample.nbytes + x.nbytes + tokens * size * dtype.itemsize
        yield Case("2:4", f"{tokens}x{size}x{size}", runs, nbytes, tokens * size**2, dtype)


def active_cases(device: torch.device, size: int, dtype: torch.dtype) -> Iterator[Case]:
    """The same half of the inputs is zero for all tokens, as for one; more tokens have fewer zeros in common."""
    columns = (torch.randn(size, size, device=device) / size**0.5).to(dtype)  # W transposed
    for tokens in (1, 4):
        x = torch.randn(tokens, size, device=device).to(dtype)
        x[:, torch.randperm(size, device=device)[: size // 2]] = 0
        runs = {OURS: lambda x=x: active_matmul(x, columns), DENSE: lambda x=x: x @ columns}
        nbytes = columns.nbytes // 2 + 2 * x.nbytes
        yield Case("active 50 %", f"{tokens}x{size}x{size}", runs, nbytes, 0, dtype)


def cases(device: torch.device, size: int) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    yield from bitmap_cases(device, size, dtype)
    yield from tile_cases(device, size, dtype)
    yield grouped_case(device, size, dtype)
    yield from semi_structured_cases(device, size, dtype)
    yield from active_cases(device, size, dtype)


def table(content: dict) -> str:
    """The rows in Markdown."""
    lines = [
        f"# Sparse kernels on {content['device']}",
        "",
        f"{content['date']}, {content['dtype']}, torch {content['machine']['torch']}, {content['threads']} CPU threads; a "
        f"copy reaches {content['copy_gbps']} GB/s. Bytes are those that the format needs at least. Made by "
        "`python benchmarks/sparse_kernels.py`.",
        "",
        "| case | tokens x in x out | implementation | ms | bytes | GB/s | of limit | tersor is faster by |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in content["rows"]:
        cells = [row["family"], row["shape"], row["implementation"]]
        if "skipped" in row:
            cells += [f"not here: {row['skipped'][:60]}", "", "", "", ""]
        else:
            cells.append(f"{row['seconds'] * 1e3:.4g}")
            ours = row["implementation"] == OURS
            cells += (
                [f"{row['bytes']:,}", f"{row['gbps']:.4g}", f"{row['share_of_limit']:.0%}"] if ours else ["", "", ""]
            )
            cells.append(f"{row['tersor_is_faster_by']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--size", type=int, help="of the matrices, a multiple of 64; default 1024 on a CPU, 4096 on a GPU"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the two files")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no GPU here", file=sys.stderr)
        return
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    limits = Limits(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    rows = []
    for case in cases(device, arguments.size or (4096 if device.type == "cuda" else 1024)):
        found = [row | {"bytes": case.bytes} for row in measure_case(case, limits)]
        print(*map(show, found), sep="\n", flush=True)
        rows += [rounded(row) for row in found]
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "device": name,
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "threads": torch.get_num_threads(),
        "copy_gbps": float(f"{limits.bandwidth / 1e9:.4g}"),
        "rows": rows,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    file = arguments.output / f"sparse_kernels.{slug}.json"
    file.write_text(json.dumps(content, indent=2) + "\n")
    file.with_suffix(".md").write_text(table(content))
    print(f"written to {file} and .md", file=sys.stderr)


if __name__ == "__main__":
    main()
