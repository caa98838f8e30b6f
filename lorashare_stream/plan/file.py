"""The plan as it is written and shown."""

from __future__ import annotations

from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.keys import group_id
from ..errors import skipped_as_json
from ..schema import FORMAT
from .plan import Plan


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: what `plan -o` writes and `compress --plan` reads back."""
    s = plan.settings
    return {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "presumed": plan.presumed,
        "settings": s.as_dict(),
        "base_model": plan.base_model,
        "base_models": plan.base_models,
        "storage_dtype": plan.storage,
        "sizes": plan.sizes,
        "steps": [
            {
                "name": t.name, "tasks": t.tasks, "read_bytes": t.read_bytes, "peak_bytes": t.peak_bytes,
                "concurrency": t.concurrency,
            }
            for t in plan.steps
        ],
        "groups": [
            {
                "group": group_id(g.module, g.side), "d": g.dim, "n": g.count, "adapters": g.adapters,
                "statistic": "columns" if g.stacked else "second moment", "break_even_k": g.break_even,
            }
            for g in plan.groups
        ],
        "batches": len(plan.batches),
        "adapters": [_entry_as_json(plan, e) for e in plan.adapters],
        "refused": skipped_as_json(plan.refused),
        "absent": skipped_as_json(plan.absent),
    }  # fmt: skip


def _entry_as_json(plan: Plan, e: Adapter) -> dict[str, Any]:
    beside = {"beside": e.beside} if e.beside else {}
    if e.origin is None:
        return {"name": e.name, "path": str(e.folder.absolute()), "source_id": e.source_id, **beside}
    asked, size, fetches = e.origin.asked, e.hub_bytes, plan.fetches(e)
    return {"name": e.name, "asked": asked, "source_id": e.source_id, "bytes": size, "fetches": fetches, **beside}
