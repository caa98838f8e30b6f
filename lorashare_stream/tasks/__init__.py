"""The four things that are done to one adapter or one module. Executors map them; each may be done again."""

from .accumulate import accumulate_module
from .fit import fit_module
from .ingest import ingest_adapter
from .job import Job
from .project import check_unchanged, project_adapter

__all__ = ["Job", "accumulate_module", "check_unchanged", "fit_module", "ingest_adapter", "project_adapter"]
