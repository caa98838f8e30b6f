"""The things that are done to one adapter, one module, or some. Executors map them; each may be done again."""

from .accumulate import accumulate_modules
from .appraise import appraise_adapter, has_core, weigh_adapter
from .clean import clean_module
from .fit import fit_module, settle_modules
from .ingest import ingest_adapter
from .job import Job
from .project import check_unchanged, project_adapter

__all__ = [
    "Job",
    "accumulate_modules",
    "appraise_adapter",
    "check_unchanged",
    "clean_module",
    "fit_module",
    "has_core",
    "ingest_adapter",
    "project_adapter",
    "settle_modules",
    "weigh_adapter",
]
