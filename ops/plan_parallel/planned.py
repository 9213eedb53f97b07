"""What a planner hands to `run`: one shape for training and for serving."""

from __future__ import annotations

from dataclasses import dataclass, field

from tersor.formats.page import Section
from tersor.ops.plan_parallel.layout import Layout


@dataclass
class Planned:
    """`layouts` by role: one under the name "" or, where prompts and answers are apart, `prefill` and `decode`. The first is
    what `--execute-check` runs. `instead`: by role and runtime, the best plan that a runtime can run where it cannot run
    the plan itself. `batches`: by role, the sequences that a data-parallel rank serves at once. `document` goes into plan.json, `numbers` into the report and the summary."""

    layouts: dict[str, Layout]
    document: dict
    numbers: dict
    sections: list[Section]
    warnings: list[str] = field(default_factory=list)
    instead: dict[tuple[str, str], Layout] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
