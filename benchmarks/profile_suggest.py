"""A mix of schemes from `profile --sensitivity --suggest`, and the same scheme for all layers at no fewer bytes.

    python benchmarks/profile_suggest.py --model cache/smollm2

For each budget: the suggested policy, every uniform scheme of that size, and policies drawn at random among those that fill
the same budget, which must lose if the sensitivities mean anything. All are written by `tersor quantize` with the same
method and text and scored by `tersor evaluate` on a text that none has seen.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import HELDOUT, SCORED, WINDOW, measure, perplexity, save, tersor, use_cores

BUDGETS = {"4.25bits": ("w4a16", 64), "3.25bits": ("w3a16", 64)}
RANDOM = 3  # policies per budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"], choices=["rtn", "gptq"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--text", type=Path, default=HELDOUT)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    threads = use_cores(arguments.threads)

    dense = perplexity(arguments.model, arguments.text)
    rows: dict[str, dict] = {"dense": {"perplexity": dense["perplexity"]}}
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as folder:
        work = Path(folder)
        for budget, (scheme, group) in BUDGETS.items():
            command = tersor(
                "profile", arguments.model, "-o", work / budget, "--sensitivity", "--suggest", budget, "--samples",
                arguments.samples, "--seq-len", WINDOW, "-q",
            )  # fmt: skip
            cost = measure(command)
            rows[f"{budget} profile"] = {"seconds": cost.seconds, "peak_rss_bytes": cost.peak_rss_bytes}
            policies = {"policy": work / budget / "policy.json"}
            report = json.loads((work / budget / "report.json").read_text())
            found = report["quality"]["models"][0]["sensitivity"]
            for seed in range(RANDOM):
                policies[f"random {seed + 1}"] = work / f"{budget}-{seed}.json"
                policies[f"random {seed + 1}"].write_text(json.dumps(random_policy(found, seed)))
            for method in arguments.methods:
                uniform = ["--scheme", scheme, "--group-size", group]
                rows[f"{budget} {method} uniform {scheme} g{group}"] = score(arguments, work, method, uniform)
                for name, path in policies.items():
                    rows[f"{budget} {method} {name}"] = score(arguments, work, method, ["--policy", path])

    print(f"{dense['tokens']} tokens of {arguments.text.name} in windows of {WINDOW}\n")
    print(f"{'':38s}{'bits':>8s}{'linear MB':>11s}{'perplexity':>12s}{'lost':>8s}")
    for name, row in rows.items():
        if "perplexity" in row:
            cells = f"{row['bits']:8.4f}{row['linear_bytes'] / 1e6:11.2f}" if "bits" in row else " " * 19
            print(f"{name:38s}{cells}{row['perplexity']:12.2f}{row['perplexity'] - dense['perplexity']:8.2f}")
    verdicts = {}
    for budget, (scheme, group) in BUDGETS.items():
        for method in arguments.methods:
            start = f"{budget} {method} "
            uniform, policy = rows[f"{start}uniform {scheme} g{group}"], rows[f"{start}policy"]
            chance = min(rows[f"{start}random {seed + 1}"]["perplexity"] for seed in range(RANDOM))
            lost = [row["perplexity"] - dense["perplexity"] for row in (policy, uniform)]
            verdicts[f"{budget} {method}: share of the perplexity that uniform bits lose"] = {
                "value": round(lost[0] / lost[1], 3),
                "goal": "< 1 at no more bytes, and better than chance",
                "reached": lost[0] < lost[1]
                and policy["linear_bytes"] <= uniform["linear_bytes"]
                and policy["perplexity"] < chance,
            }
    print()
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict['value']} (goal {verdict['goal']}): {'reached' if verdict['reached'] else 'MISSED'}")
    path = save(
        "profile_suggest",
        {
            "model": arguments.model.name,
            "calibration": f"{arguments.samples} x {WINDOW} tokens",
            "text": arguments.text.name,
            "text_tokens": dense["tokens"],
            "windows": SCORED,
            "threads": threads,
            "rows": rows,
            "verdicts": verdicts,
        },
    )
    print(f"written to {path}")


def score(arguments: argparse.Namespace, work: Path, method: str, options: list) -> dict:
    """Quantize, evaluate, and how large the linear layers came out."""
    print(f"running {method} {' '.join(map(str, options))} …", file=sys.stderr)
    calibration = ["--samples", arguments.samples, "--seq-len", WINDOW] if method == "gptq" else []
    command = tersor(
        "quantize", arguments.model, "-o", work / "out", "--force", "--method", method, *calibration, *options, "-q"
    )
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((work / "out" / "report.json").read_text())
    linear = [entry for entry in report["tensors"] if entry["action"] == "quantize" or ".layers." in entry["name"]]
    linear = [entry for entry in linear if len(entry["after"]["shape"]) == 2]
    nbytes = sum(entry["after"]["bytes"] for entry in linear)
    weights = sum(entry["after"]["shape"][0] * entry["after"]["shape"][1] for entry in linear)
    found = perplexity(work / "out", arguments.text)
    return {"perplexity": found["perplexity"], "linear_bytes": nbytes, "bits": 8 * nbytes / weights}


def random_policy(found: dict, seed: int) -> dict:
    """The same number of layers of each shape and scheme as in the suggestion, but which ones is drawn."""
    from tersor.ops.profile.sensitivity.suggest import policy_of

    labels, generator = found["suggestion"]["labels"], random.Random(seed)
    alike: dict[tuple, list[str]] = {}
    for name in labels:
        alike.setdefault(tuple(found["tensors"][name]["shape"]), []).append(name)
    drawn = {}
    for names in alike.values():
        shuffled = [labels[name] for name in names]
        generator.shuffle(shuffled)
        drawn |= dict(zip(names, shuffled, strict=True))
    return policy_of(found, {name: drawn[name] for name in labels})


if __name__ == "__main__":
    main()
