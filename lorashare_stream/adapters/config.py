"""The parts of an adapter_config.json that decide what its tensors mean.

Its module patterns are regular expressions from strangers: RE2 matches them, in linear time.
"""

from __future__ import annotations

import json
import math
import re
import string
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import re2

from ..errors import AdapterError, UndecidedError
from ..text import listed, printable
from .foreign import tool_of_config
from .keys import factor_key
from .scaling import Scaling

Config = Mapping[str, Any]
_Meant = tuple[str | None, tuple[str, ...]]  # the names that a module has in patterns: as a layer, as parameters of one

# What PEFT 0.21 can write as LoRA; the others change the model in another way than by adding a matrix.
_CONVERTIBLE = {
    "BONE", "C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "TINYLORA", "UNILORA",
    "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
_INITIAL = re.compile(r"pissa(_niter_\d+)?|olora|corda|lora_ga|loftq", re.IGNORECASE)
_PLAIN = {"gaussian", "eva", "orthogonal", "mica"}  # initialisations that leave the base as it is
_PEFT = "0.21"
_DEFAULT = 8  # PEFT's r and lora_alpha, where a configuration has none
# Of its LoraConfig.
_FIELDS = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
    "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config",
}  # fmt: skip
_WITHIN = ".base_layer.out_proj"  # of a MultiheadAttention, beside the name of the whole
_MOST_PAIRS = 10**7  # of names in target_parameters and modules
_MOST_PARAMETERS = 64  # of one module
_MOST_STEPS = 10**9  # of RE2, an instruction at a character; some 10**8 a second at worst
_STEPS_TO_COMPILE, _STEPS_A_CHARACTER = 20_000, 500
_MOST_CHARACTERS = 10_000  # of one pattern
_MOST_MEMORY = 1 << 18  # bytes of a compiled pattern
_WORD = f"{string.ascii_letters}{string.digits}_-"
_LITERAL = re.compile(r"[\w.-]*")
_UNDECIDABLE = re.compile(r"[\n\ud800-\udfff]")  # of names: $ is before a last line break, too; surrogates are no UTF-8
# What both take, and mean differently: POSIX classes, octal numbers or references, counts that are text to RE2.
_DIFFERS = re.compile(r"[\ud800-\udfff]|\[:|\\\d|\{(?!(0|[1-9]\d{0,3})(,(0|[1-9]\d{0,3})?)?\})")
_ASCII_TO_RE2 = re.compile(r"\\[A-Za-z]|\(\?")  # classes and flags: of Unicode to Python
# Variants whose dW is not s B A of the two tensors.
_OTHER_PRODUCTS = {
    "kasa_config": "KaSA puts a diagonal between B and A",
    "use_bdlora": "BD-LoRA's tensors are the blocks of block-diagonal matrices",
    "use_qalora": "QALoRA's lora_A sees averages of the input",
    "arrow_config": "an Arrow router chooses among other adapters",
}


def check_lora(config: Config) -> None:
    """Refuse what is not a PEFT LoRA configuration.

    Raises:
        AdapterError: naming the peft_type or the field.
    """
    if config.get("peft_type") != "LORA":
        raise _other_type(config)
    if config.get("enable_lora"):
        raise AdapterError(
            "a legacy MergedLinear adapter (enable_lora), which current PEFT cannot load",
            key="enable_lora",
            remedy="Convert it with the PEFT release that made it, or leave it out.",
        )
    r, alpha = rank_and_alpha(config)
    if not _is_rank(r):
        _refuse_field("r", r, "a whole number from 1")
    if not _is_alpha(alpha):
        _refuse_field("lora_alpha", alpha, "a number")
    for name, holds in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(holds(value) for value in pattern.values()):
            _refuse_field(name, pattern, "a mapping of module patterns to numbers")
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(p, str) for p in parameters):
        _refuse_field("target_parameters", parameters, "a list of names")


def _other_type(config: Config) -> AdapterError:
    found, expected = config.get("peft_type"), "LORA"
    name = found.upper() if isinstance(found, str) else ""
    if not found and (tool := tool_of_config(config)) is not None:
        problem, remedy = f"an adapter of {tool.name}, not of PEFT", tool.remedy
        found, expected = ", ".join(sorted(tool.fields)), "peft_type LORA"
    elif not found:
        problem = "adapter_config.json has no peft_type"
        remedy = "It was not saved by PEFT, or is damaged: save it again, or leave it out."
    elif name == "LORA":
        problem = "a peft_type that PEFT does not know"
        remedy = "Write it in capital letters in adapter_config.json."
    else:
        problem = f"not a LoRA adapter: peft_type is {printable(repr(found), 60)}"
        remedy = "PEFT cannot convert it to LoRA: leave it out."
        if name in _CONVERTIBLE:
            remedy = "Load it on its base model and convert it with peft.save_as_lora, or leave it out."
    return AdapterError(problem, key="peft_type", found=found, expected=expected, remedy=remedy)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31


def _is_alpha(value: object) -> bool:
    # Bounded, so that squares of scales stay finite; PEFT itself takes zero and negative ones.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def _refuse_field(name: str, found: object, expected: str) -> None:
    raise AdapterError(
        f"adapter_config.json has an unusable {name}",
        key=name,
        found=json.dumps(found) if isinstance(found, str | None) else found,
        expected=expected,
        remedy="Mend the configuration, or leave the adapter out.",
    )


def rank_and_alpha(config: Config) -> tuple[Any, Any]:
    """Rank and alpha, PEFT's defaults where there are none: numbers, of what `check_lora` lets pass."""
    return config.get("r", _DEFAULT), config.get("lora_alpha", _DEFAULT)


def unknown_fields(config: Config) -> str | None:
    """What a user should know of fields that PEFT 0.21 passes over; None if there are none that are set."""
    names = sorted(name for name, value in config.items() if name not in _FIELDS and value)
    if not names:
        return None
    return (
        f"fields of adapter_config.json that PEFT {_PEFT} does not know ({listed(names, 5)}) are kept as they are; "
        "dW is taken to be s B A, and may be another product"
    )


def base_model(config: Config) -> str | None:
    """The base model that the adapter names, or None if it names none."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def initial_part(config: Config) -> str | None:
    """Why the factors hold a part of the base model beside what was learnt, or may do so; None if they do not.

    These initialisations split W into a residual, which becomes the base, and a product of factors, which are then
    trained. PEFT splits it anew whenever it loads the adapter.
    """
    init = config.get("init_lora_weights")
    if not isinstance(init, str) or init.lower() in _PLAIN:
        return None
    hold = "hold" if _INITIAL.fullmatch(init) else f"may hold, as PEFT {_PEFT} does not know how they began,"
    return (
        f"its factors {hold} a part of the base model (init_lora_weights {printable(init, 40)}); "
        "--share-initial compresses such adapters, into another output, at an error relative to that part as well"
    )


def other_scaling(config: Config) -> str | None:
    """Why dW is not s B A of an adapter's tensors, or None if it is."""
    return next((reason for name, reason in _OTHER_PRODUCTS.items() if config.get(name) not in (None, False)), None)


def scalings(config: Config, ranks: Mapping[str, int]) -> tuple[Scaling, ...]:
    """The LoRA scaling of each module.

    PEFT's s is alpha / r, or alpha / sqrt(r) under rsLoRA, with the r and alpha of the module's patterns.

    Args:
        config: one that `check_lora` lets pass.
        ranks: of each module, by its tensors.

    Raises:
        AdapterError: if a rank is not the configured one: PEFT would not load the tensors.
        UndecidedError: if it depends on more than the adapter tells, or on a pattern that RE2 does not decide.

    >>> scalings({"r": 8, "lora_alpha": 16, "alpha_pattern": {"q": 32}}, {"h.0.q": 8, "h.0.v": 8})
    (Scaling(scale=4.0, experts=1, parameters=()), Scaling(scale=2.0, experts=1, parameters=()))
    """
    targets: Sequence[str] = config.get("target_parameters") or ()
    if len(targets) * len(ranks) > _MOST_PAIRS:
        _refuse_field("target_parameters", f"{len(targets)} names", f"fewer, with {len(ranks)} modules")
    meant: dict[str, _Meant] = {}
    names: set[str] = set()
    for module in ranks:
        own, parameters = meant[module] = _meant(targets, module, ranks)
        names.update(parameters if own is None else (own, *parameters))
        if len(parameters) > _MOST_PARAMETERS:
            _refuse_field("target_parameters", f"{len(parameters)} of one module", f"at most {_MOST_PARAMETERS}")
    configured = _configured(config, names)
    return tuple(_scaling(config, configured, module, rank, meant[module]) for module, rank in ranks.items())


def _configured(config: Config, names: Collection[str]) -> dict[str, tuple[int, float]]:
    """PEFT's r and alpha of each name: those of the first pattern that matches, or is the name; else the defaults."""
    r, alpha = rank_and_alpha(config)
    ranks, alphas = (config.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    rank_of, alpha_of = matcher(ranks, names), matcher(alphas, names)
    return {n: (ranks.get(rank_of(n) or n, r), alphas.get(alpha_of(n) or n, alpha)) for n in names}


def _meant(targets: Sequence[str], module: str, modules: Collection[str]) -> _Meant:
    """The names by which PEFT may look a module up in patterns: as a layer, and as parameters of one."""
    # The output projection within a MultiheadAttention has the settings of the whole. Parameters of one module are
    # nested in each other, in an order that only the base model knows. A target without a dot is a parameter of any
    # module, so the module may be a layer as well.
    whole = module.removesuffix(_WITHIN)
    if whole != module and whole in modules:
        return whole, ()
    bare = ".".join(part for part in module.split(".") if part != "base_layer")
    owned = [target.rpartition(".") for target in targets]
    fitting = [(owner, last) for owner, _, last in owned if not owner or f".{bare}".endswith(f".{owner}")]
    certain = any(owner for owner, _ in fitting)
    return None if certain else module, tuple(sorted({f"{bare}.{last}" for _, last in fitting}))


def _scaling(
    config: Config, configured: Mapping[str, tuple[int, float]], module: str, rank: int, meant: _Meant
) -> Scaling:
    own, parameters = meant
    possible = {configured[name] for name in (own, *parameters) if name is not None}
    if len(possible) > 1:
        raise UndecidedError("only the base model tells which parameter a pattern means")
    r, alpha = possible.pop()
    if rank != r and not (parameters and rank % r == 0):
        raise AdapterError(
            "the tensors and adapter_config.json disagree on the rank", key=factor_key(module, "A"), found=rank,
            expected=f"r = {r}", remedy="Mend r or rank_pattern, or leave the adapter out.",
        )  # fmt: skip
    stacked = own is None or rank != r
    scale = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
    return Scaling(scale, rank // r, parameters if stacked else ())


def matcher(patterns: Collection[str], names: Collection[str]) -> Callable[[str], str | None]:
    """The lookup of the first pattern that matches the end of a name at a dot (peft.utils.get_pattern_key), or None.

    Patterns are as PEFT gives them to `re`; `names` are all that will be looked up.

    Raises:
        AdapterError: for a pattern that is no regular expression.
        UndecidedError: where RE2 does not take a pattern, could mean another thing by it than `re`, or would need long.
    """
    plain = all(name and name.isascii() and name.isprintable() for name in names)
    longest, steps = max(map(len, names), default=0), 0
    compiled: list[tuple[str, str, Any]] = []
    for pattern in patterns:
        if _LITERAL.fullmatch(pattern) and len(pattern) > longest:
            continue
        steps += _STEPS_TO_COMPILE + _STEPS_A_CHARACTER * len(pattern) + len(names)
        if steps <= _MOST_STEPS:
            ending, expression = _ending(pattern), _compiled(pattern, plain and pattern.isascii())
            compiled.append((pattern, ending, expression))
            steps += expression.programsize * sum(len(name) for name in names if name.endswith(ending))
        if steps > _MOST_STEPS:
            raise UndecidedError(f"{len(patterns)} patterns are too many for {len(names)} modules")
    if compiled and any(_UNDECIDABLE.search(name) for name in names):
        raise UndecidedError("the name of a module has a line break or a surrogate")

    def first_match(name: str) -> str | None:
        return next((p for p, ending, found in compiled if name.endswith(ending) and found.match(name)), None)

    return first_match


def _ending(pattern: str) -> str:
    """How every name must end that a pattern matches."""
    head = pattern.rstrip(_WORD)
    return "" if "|" in pattern or head.endswith("\\") else pattern[len(head) :]


@lru_cache(maxsize=1 << 10)
def _compiled(pattern: str, plain: bool) -> Any:
    """PEFT's expression for a pattern, which Python has taken as well; `plain`: of, and for, printable ASCII."""
    expression = rf"(.*\.)?({pattern})$"
    reason = "it is too long" if len(pattern) > _MOST_CHARACTERS else None
    if reason is None and not _LITERAL.fullmatch(pattern):
        reason = _difference(pattern, expression, plain)
    if reason is None:
        try:
            options = re2.Options()
            options.max_mem, options.never_capture, options.log_errors = _MOST_MEMORY, True, False
            return re2.compile(expression, options)
        except (re2.error, UnicodeEncodeError) as e:
            reason = e.args[0].decode(errors="replace") if isinstance(e, re2.error) else "it has surrogates"
    raise UndecidedError(
        f"RE2 cannot decide the module pattern {printable(repr(pattern), 60)} ({printable(reason, 60)})"
    )


def _difference(pattern: str, expression: str, plain: bool) -> str | None:
    """Why RE2 could answer otherwise than Python; None if it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(expression)
    except FutureWarning as e:
        return str(e)
    except (re.error, RecursionError, OverflowError) as e:
        remedy = "Mend rank_pattern or alpha_pattern, or leave the adapter out."
        raise AdapterError("a module pattern is no regular expression", key=pattern, found=str(e), remedy=remedy) from e
    differs = _DIFFERS.search(pattern) or (None if plain else _ASCII_TO_RE2.search(pattern))
    return differs and f"{differs[0]} means another thing to Python"
