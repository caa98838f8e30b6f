"""The plan: adapters, groups, steps and their bytes, before anything is read, computed or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import log2
from typing import Any, TypeVar

from ..adapters.adapter import Adapter
from ..adapters.dtypes import ITEMSIZE, STORAGE, widest
from ..adapters.layout import Layout
from ..errors import AdapterError, BudgetError, CollectionError, refusal
from ..settings import Settings
from ..text import bytes_shown, digest_of
from .memory import Group, Step, beside_moments, examples, groups_of, modules_of, portions, steps_of

T = TypeVar("T")
LEAST_BYTES = 4096  # of a checkpoint, all files
NUMBER_BITS = 4.3  # of a number of a direction, as it is stored
_META, _GROUP = 850, 380  # bytes of an adapter_meta.json beside its configuration; of the record of a basis


@dataclass(frozen=True)
class Plan:
    """Adapters and settings of a run; groups, steps and sizes follow from them.

    Attributes:
        settings: as asked.
        adapters: the adapters, in the order in which they will be admitted.
        refused: errors of those that are left out.
        absent: errors of adapters in the workspace whose sources cannot be read now, and need not be.
        base_model: name of the common base model; empty if nothing names it.
        bound_base: name of it to which the workspace is bound.
        inner: name -> subfolders of an adapter's folder that hold adapters too, and are not taken.
        doubles: paths of reconstructions whose originals are present too, which are not taken.
        grows: whether moments may exist already, to which is added.
        journal: digest of the journal when the plan was made; None without a workspace.
    """

    settings: Settings
    adapters: tuple[Adapter, ...]
    refused: tuple[AdapterError, ...] = ()
    absent: tuple[AdapterError, ...] = ()
    base_model: str = ""
    bound_base: str = ""
    inner: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    doubles: tuple[str, ...] = ()
    grows: bool = False
    journal: str | None = None

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups, sorted by module, A before B; none where each adapter is coded alone."""
        return groups_of(self.adapters, self.settings) if self.settings.fits else ()

    @cached_property
    def storage(self) -> str:
        """Dtype of components and loadings as safetensors names it: F32, BF16 or F16."""
        if self.settings.limit:
            return "F32"  # a code has none, and is restored in the dtype of each source
        if self.settings.dtype != "auto":
            return STORAGE[self.settings.dtype]
        return widest({r.dtype for e in examples(self.adapters) for m in e.layout.modules for r in (m.a, m.b)})

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The passes."""
        return steps_of(self.adapters, self.groups, self.settings, self.storage, grows=self.grows)

    def step(self, name: str) -> Step:
        """A step by name."""
        return next(s for s in self.steps if s.name == name)

    @property
    def processes(self) -> int:
        """How many tasks run at a time at most."""
        return max(step.concurrency for step in self.steps)

    @cached_property
    def _modules(self) -> dict[str, list[Group]]:
        return modules_of(self.groups)

    def portions(self, modules: Sequence[str]) -> list[tuple[str, ...]]:
        """Modules in portions that are summed together."""
        return portions(modules, self._modules, self.settings, self.step("accumulate"), grows=self.grows)

    @cached_property
    def base_models(self) -> dict[str, int]:
        """Base model that adapters name -> how many name it."""
        return Counter(e.base_model for e in self.adapters if e.base_model is not None)

    # -- keys -------------------------------------------------------------------------------------------------

    @cached_property
    def binding(self) -> dict[str, Any]:
        """Settings and base model on which the numbers of a workspace depend."""
        return self.settings.binding() | {"base_model": self.bound_base}

    @cached_property
    def settings_key(self) -> str:
        """Digest of all but the adapters that decides the checkpoint."""
        s = self.settings
        k, threshold = s.num_components, s.variance_threshold
        return settings_key_of(self.binding, self.base_model, k, threshold, self.storage, s.bought)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that decides the checkpoint: settings that change numbers, and the adapters."""
        return self.fingerprint_as(presumed=self.presumed)

    @cached_property
    def presumed(self) -> bool:
        """Whether configurations on the Hub were not read, so that the base model is the asked or the listed one."""
        return any(e.config is None for e in self.adapters)

    def fingerprint_as(self, *, presumed: bool) -> str:
        """The fingerprint of this plan if its configurations were not, or were, read."""
        s = self.settings
        asked = [s.binding(), s.base_model, s.num_components, s.variance_threshold, s.dtype, *s.bought]
        # The id of a pinned adapter tells its configuration, which a plan need not have read.
        adapters = [
            (e.name, e.source_id, *((e.origin.records,) if e.origin else (e.layout.digest, e.config_digest)))
            for e in self.adapters
        ]
        sizes = [[f.size for f in e.files] for e in self.adapters]
        return digest_of([asked if presumed else self.settings_key, adapters, sizes])

    # -- fetching ---------------------------------------------------------------------------------------------

    @cached_property
    def batches(self) -> tuple[tuple[Adapter, ...], ...]:
        """The adapters in the order of admission, cut where the disk budget would be exceeded.

        One batch if they fit, or without a budget; else half of it is for those that are fetched meanwhile.
        """
        budget, sizes = self.settings.disk_budget, [e.hub_bytes for e in self.adapters]
        if budget is None or sum(sizes) <= budget:
            return (self.adapters,)
        return tuple(tuple(batch) for batch in cut(self.adapters, sizes, budget // 2))

    @cached_property
    def _last_batch(self) -> frozenset[str]:
        return frozenset(e.name for e in self.batches[-1])

    def fetches(self, adapter: Adapter) -> int:
        """How often an adapter is fetched at most: for the moments, and, unless it is still present, for projection.

        Adapters that are added may be projected on the existing bases first. A pickle, which has no header to ask for,
        is fetched once more when the plan is made.
        """
        if adapter.origin is None:
            return 0
        s, several = self.settings, len(self.batches) > 1
        again = (several and adapter.name not in self._last_batch) + (several and self.grows)
        again += several and s.limit not in (None, "max_error")  # a sample is tried, all may be coded twice
        again += several and s.directions  # a sample tells how many
        return 1 + again + (adapter.pickled and s.disk_budget is not None)

    # -- bytes on disk ----------------------------------------------------------------------------------------

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes on disk, and files of the workspace; `plan.file.Sizes` has the meaning of each."""
        s, item = self.settings, NUMBER_BITS / 8 if self.settings.limit else ITEMSIZE[self.storage]
        basis = int(item * sum(g.dim * g.components for g in self.groups))
        loadings = 0 if s.limit else int(item) * sum(g.count * g.components for g in self.groups)
        originals = sum(f.size for e in self.adapters for f in e.files)
        lora = sum(e.layout.lora_bytes for e in self.adapters)
        verbatim = sum(e.layout.extra_bytes for e in self.adapters)
        # Pickles are converted, and kept for the run, unless disk is short.
        converted = 0 if s.disk_budget is not None else sum(e.mapped_bytes for e in self.adapters if e.pickled)
        moments, files = map(sum, zip(self._moments, self._replaced, strict=True))
        small, few = beside_moments(self.groups, self.adapters, s)
        codes, metadata = self._codes(originals, lora), self._metadata()
        return {
            "originals": originals,
            "lora": lora,
            "verbatim": verbatim,
            "moments": moments,
            "converted": converted,
            "workspace": moments + converted + basis + small,
            "workspace_files": files + few,
            "basis": basis,
            "loadings": loadings,
            "codes": codes,
            "metadata": metadata,
            "checkpoint": basis + loadings + codes + metadata + verbatim,
        }

    def _metadata(self) -> int:
        """Bytes of headers, configurations and records of a SHARE checkpoint, nearly; 0 of a coded one."""
        if self.settings.limit is not None:
            return 0
        headers = {e.layout.digest: _headers(e.layout) for e in self.adapters}
        each = sum(_META + len(e.config or "") + headers[e.layout.digest] for e in self.adapters)
        return each + sum(_GROUP + 3 * len(g.module) for g in self.groups) + sum(len(e.name) + 9 for e in self.adapters)

    def _codes(self, originals: int, lora: int) -> int:
        """Bytes of codes at most, nearly: those of flat spectra, by the Gaussian bound and a quarter of a bit."""
        s = self.settings
        if s.limit is None:
            return 0
        if s.max_error is None:
            return min(lora, s.byte_limit(originals) or lora)
        numbers = sum(m.rank * (m.dim("A") + m.dim("B")) for e in self.adapters for m in e.layout.modules)
        return min(lora, int(numbers * (log2(2**0.5 / s.max_error) + 0.25) / 8))

    @cached_property
    def _parts(self) -> list[tuple[int, int]]:
        """Bytes and files of the moments of each portion, the largest first."""
        sizes = [[g.stored_moment for m in part for g in self._modules[m]] for part in self.portions([*self._modules])]
        return sorted(((sum(b for b, _ in part), sum(f for _, f in part)) for part in sizes), reverse=True)

    @property
    def _in_work(self) -> list[tuple[int, int]]:
        return self._parts[: self.step("accumulate").concurrency] if self.groups else []

    @property
    def _moments(self) -> tuple[int, int]:
        """Bytes and files of moments, but for those that are replaced."""
        some = self._in_work if self.settings.discard_moments or not self.groups else self._parts
        return sum(b for b, _ in some), sum(f for _, f in some)

    @property
    def _replaced(self) -> tuple[int, int]:
        """Bytes and files, at a time, of moments that new ones replace, beside which they are written."""
        some = self._in_work if self.grows and not self.settings.discard_moments else []
        return sum(b for b, _ in some), sum(f for _, f in some)

    @property
    def replaced_bytes(self) -> int:
        """Bytes of moments of before that lie beside new ones, at a time; a part of `sizes["moments"]`."""
        return self._replaced[0]

    # -- refusal ----------------------------------------------------------------------------------------------

    @property
    def fewest(self) -> int:
        """How many adapters there must be: two to share, as in lorashare, unless some were admitted before."""
        return 1 if self.grows or self.settings.limit else 2

    def validate(self) -> None:
        """Refuse what headers and arithmetic already show to be impossible.

        Raises:
            CollectionError: naming all adapters that are refused (unless they may be skipped), or if fewer than two
                are left.
            BudgetError: with the smallest memory that suffices.
        """
        if self.refused and self.settings.on_error == "raise":
            raise refusal(
                f"{len(self.refused)} of {len(self.refused) + len(self.adapters)} adapters cannot be compressed",
                self.refused,
                "Leave them out, or go on without them by --on-error skip.",
            )
        check_enough(len(self.adapters) + len(self.absent), self.refused, self.fewest)
        self._check_size()
        self._check_disk_budget()
        step = max(self.steps, key=lambda s: s.least_bytes)
        if step.least_bytes > self.settings.memory:
            raise BudgetError(
                f"the memory budget cannot hold one task of the step {step.name!r}",
                found=bytes_shown(self.settings.memory),
                expected=f"at least {bytes_shown(step.least_bytes)} ({step.least_bytes} bytes)",
                remedy=f"Use --memory {-(-step.least_bytes >> 20) + 1}MiB or more.",
            )

    def _check_size(self) -> None:
        limit = self.settings.byte_limit(self.sizes["originals"])
        if limit is None:
            return
        kinds = {(key, r.dtype, r.shape): r.nbytes for e in self.adapters for key, r in e.layout.extras}
        extras = sum(kinds.values())  # at the least: equal ones are stored once
        if limit <= max(extras // 2, LEAST_BYTES):  # deflated
            ample = extras + self.sizes["lora"] // 50 + 300 * len(self.adapters) + LEAST_BYTES
            raise BudgetError(
                "records, and tensors that are not LoRA, which are kept as they are, take more than the checkpoint may "
                "have", found=f"{bytes_shown(limit)} asked for", expected=f"about {bytes_shown(ample)}",
                remedy=f"Use --max-bytes {ample} or more.",
            )  # fmt: skip

    def _check_disk_budget(self) -> None:
        budget, least = self.settings.disk_budget, 2 * max((e.hub_bytes for e in self.adapters), default=0)
        if budget is not None and len(self.batches) > 1 and least > budget:
            raise BudgetError(
                "the disk budget cannot hold two of the largest adapter, one being fetched while one is added",
                found=bytes_shown(budget),
                expected=f"at least {bytes_shown(least)} ({least} bytes)",
                remedy=f"Use --disk-budget {-(-least >> 20)}MiB or more; ten times as much is faster.",
            )


def _headers(layout: Layout) -> int:
    """Bytes of the safetensors headers of an adapter's two files, nearly."""
    return sum(2 * len(m.name) + 130 for m in layout.modules) + sum(len(key) + 75 for key, _ in layout.extras)


def cut(items: Sequence[T], sizes: Sequence[int], limit: int) -> list[list[T]]:
    """Items in order, in lists whose sizes sum to `limit` at most; an item that exceeds it is alone.

    >>> cut("abcd", [2, 2, 3, 1], 4)
    [['a', 'b'], ['c', 'd']]
    """
    lists: list[list[T]] = []
    held = limit
    for item, size in zip(items, sizes, strict=True):
        if held + size > limit or not lists:
            lists.append([])
            held = 0
        lists[-1].append(item)
        held += size
    return lists


def settings_key_of(
    binding: Mapping[str, Any],
    base_model: str,
    k: int | str,
    threshold: float,
    storage: str,
    bought: Sequence[Any] = (),
) -> str:
    """Digest of all but the adapters that decides a checkpoint; `bought` is of `Settings`."""
    return digest_of([binding, base_model, k, threshold if k == "auto" else None, storage, *bought])


def check_enough(count: int, refused: Iterable[AdapterError], fewest: int) -> None:
    """Raise CollectionError if there are fewer adapters than needed."""
    if count < fewest:
        alone = ", or give a limit such as --max-error 0.25, by which each is coded alone" if fewest > 1 else ""
        raise CollectionError(
            "sharing needs at least two adapters" if fewest > 1 else "no adapter is left",
            problems=tuple(refused),
            found=count,
            expected=f"{fewest} or more",
            remedy=f"Add adapters of the same base model{alone}.",
        )
