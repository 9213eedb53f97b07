"""How small a packed checkpoint is, how fast it is packed and unpacked, and that it is the same model.

    python benchmarks/sparsify_size.py --model cache/smollm2

Sizes are of files: the packed layers against the same layers in bf16, and the whole file, whose embeddings stay. Speeds are
of one thread, bytes of the dense weight a second, beside numpy's packbits and boolean index. Perplexities must be equal to
the last digit, and the way back gives the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from measure import HELDOUT, perplexity, save, tersor, use_cores

MASKS = {"50 %": ["--sparsity", 0.5], "80 %": ["--sparsity", 0.8], "2:4": ["--pattern", "2:4"]}
LIMITS = {"50 %": 0.57, "80 %": 0.27, "2:4": 0.57}
SHAPE = (4096, 4096)  # of the weight whose packing is timed
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()
    use_cores(2)
    sizes = {}
    print(f"{'':14s}{'packed layers':>15s}{'asked':>8s}{'whole file':>12s}{'perplexity':>12s}  back")
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        for name, options in MASKS.items():
            for scheme in (None, "w8a16"):
                row = pack(arguments.model, Path(folder), name, options, scheme)
                sizes[f"{name} {scheme or 'bf16'}"] = row
                limit = f"{LIMITS[name]:.2f}" if scheme is None else ""
                print(
                    f"{name + ' ' + (scheme or 'bf16'):14s}{row['packed_layers']:15.4f}{limit:>8s}{row['file']:12.4f}"
                    f"{row['perplexity']:12.4f}  {'bit for bit' if row['restored'] else 'NOT THE SAME'}"
                )
    speeds = codec_speeds()
    print(f"\n{'GB/s, one thread':34s}{'pack':>8s}{'unpack':>8s}")
    for name, row in speeds.items():
        print(f"{name:34s}{row['pack_gbps']:8.2f}{row['unpack_gbps']:8.2f}")
    path = save(
        "sparsify_size", {"model": arguments.model.name, "text": HELDOUT.name, "sizes": sizes, "speeds": speeds}
    )
    print(f"written to {path}")


def pack(model: Path, folder: Path, name: str, options: list, scheme: str | None) -> dict:
    """Mask, quantize if asked, pack, evaluate both, unpack. Shares are of what was packed."""

    def run(*command) -> dict:
        done = subprocess.run(tersor(*command, "--json", "-q", "--force"), check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    a, c, d = folder / "a", folder / "c", folder / "d"
    run("prune", model, "-o", a, "--method", "magnitude", *options)
    if scheme is not None:
        run("quantize", a, "-o", folder / "b", "--scheme", scheme)
        a = folder / "b"
    report = run("sparsify", a, "-o", c)
    run("convert", c, "-o", d, "--to", "dense")
    layers = [entry for entry in report["tensors"] if entry["action"] == "pack"]
    before, after = perplexity(a)["perplexity"], perplexity(c)["perplexity"]
    if before != after:
        raise SystemExit(f"error: {name}: perplexity {before} before packing, {after} after")
    return {
        "packed_layers": sum(entry["after"]["bytes"] for entry in layers)
        / sum(entry["before"]["bytes"] for entry in layers),
        "file": weights(c).stat().st_size / weights(a).stat().st_size,
        "perplexity": after,
        "seconds": report["seconds"],
        "restored": digest(weights(a)) == digest(weights(d)),
    }


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def codec_speeds() -> dict[str, dict]:
    """Bytes of dense weight a second, in and out, of every format that a random or a tiled mask suits, and of numpy."""
    import torch
    from tersor.formats.sparse.packed import Packed, codec

    torch.set_num_threads(1)
    rows, columns = SHAPE
    generator = torch.Generator().manual_seed(0)
    found = {}
    for dtype, bits, kind in (("BF16", 16, torch.int16), ("I8", 8, torch.uint8)):
        full = torch.randint(1, 100, SHAPE, generator=generator, dtype=torch.int32).to(kind)
        for format, tile, sparsity in (
            ("sparse-bitmask", None, 0.5), ("sparse-bitmask", None, 0.8), ("sparse-24-bitmask", None, 0.5),
            ("vector", (32, 1), 0.9), ("block", (16, 16), 0.9), ("tiled-csl", None, 0.8),
        ):  # fmt: skip
            if format == "tiled-csl" and bits != 16:
                continue
            elements = full * mask(format, tile, sparsity, generator).to(kind)
            module = codec(format)
            packed = Packed(
                "m.weight", format, dtype, SHAPE, rows, columns, bits, module.count(elements, tile), tile=tile
            )
            parts = module.encode(packed, elements)
            label = f"{format}{'' if tile is None else f' {tile[0]}x{tile[1]}'} {dtype}, {sparsity:.0%}"
            found[label] = {
                "pack_gbps": speed(elements.nbytes, lambda p=packed, e=elements, m=module: m.encode(p, e)),
                "unpack_gbps": speed(elements.nbytes, lambda p=packed, t=parts, m=module: m.decode(p, t.__getitem__)),
            }
    found["numpy packbits and index BF16, 50%"] = numpy_speeds(generator)
    return found


def mask(format: str, tile: tuple[int, int] | None, sparsity: float, generator):
    import torch

    rows, columns = SHAPE
    if format == "sparse-24-bitmask":
        return torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1).lt(2).reshape(SHAPE)
    height, width = tile or (1, 1)
    kept = torch.rand(rows // height, columns // width, generator=generator) >= sparsity
    return kept.repeat_interleave(height, 0).repeat_interleave(width, 1)


def numpy_speeds(generator) -> dict:
    """What anybody would write."""
    import numpy
    import torch

    dense = torch.randint(1, 100, SHAPE, generator=generator, dtype=torch.int32).to(torch.int16)
    dense = (dense * (torch.rand(SHAPE, generator=generator) < 0.5)).numpy()
    bits, values = numpy.packbits(dense != 0, axis=-1, bitorder="little"), dense[dense != 0]

    def pack():
        kept = dense != 0
        return numpy.packbits(kept, axis=-1, bitorder="little"), dense[kept]

    def unpack():
        out = numpy.zeros_like(dense)
        out[numpy.unpackbits(bits, axis=-1, bitorder="little").view(bool)] = values
        return out

    return {"pack_gbps": speed(dense.nbytes, pack), "unpack_gbps": speed(dense.nbytes, unpack)}


def speed(nbytes: int, call) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return round(nbytes / statistics.median(times) / 1e9, 2)


if __name__ == "__main__":
    main()
