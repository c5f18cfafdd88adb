"""Recipe: every setting of a run in one frozen value, and the only ways to change it: by a function, a YAML file or --set."""

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from cluster.workers import ClusterConfig
from moca_core.data.duplicates import CleanRules
from pipelines.mining.config import MineConfig
from pipelines.steps.average import AverageConfig
from pipelines.steps.base import BaseConfig
from pipelines.steps.corpus import CorpusConfig
from pipelines.steps.evaluate import EvaluateConfig
from pipelines.steps.export import ExportConfig
from pipelines.steps.finetune import FinetuneConfig
from pipelines.steps.pack import PackConfig
from pipelines.steps.pairs import PairsConfig
from pipelines.steps.pretrain import PretrainConfig

RECIPES = ("demo", "study_cpu", "study_gpu", "moca_3b", "moca_7b")


@dataclass(frozen=True)
class TrackingConfig:
    """`uri` of an MLflow server or database (default: SQLite in a local root). Logging and checkpoints every so many steps."""

    uri: str | None = None
    experiment: str = "moca"
    log_every_steps: int = 10
    checkpoint_every_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("log_every_steps", "checkpoint_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"tracking.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Recipe:
    """One section per step, then where it runs (`cluster`) and how it is watched (`tracking`): those two never change a result."""

    corpus: CorpusConfig
    pack: PackConfig
    base: BaseConfig
    pretrain: PretrainConfig
    pairs: PairsConfig
    finetune: FinetuneConfig
    evaluate: EvaluateConfig
    export: ExportConfig
    clean: CleanRules = CleanRules()
    average: AverageConfig = AverageConfig()
    mine: MineConfig = MineConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        """Refuses what no single section can see."""
        if not self.pretrain.steps and "pretrain" in (self.evaluate.models or ()):
            raise ValueError(
                f"evaluate.models={list(self.evaluate.models)} names pretrain, which pretrain.steps=0 leaves out; drop it there"
            )
        if self.average.snapshots and not self.finetune.snapshots:
            raise ValueError(
                "average.snapshots=true with no finetune.snapshots: name the steps after which to take some"
            )
        if self.evaluate.models is not None:
            exported = "average" if self.average.on else "finetune"
            if exported not in self.evaluate.models:
                raise ValueError(f"evaluate.models must name {exported}: it is the model that is exported")
            if "average" in self.evaluate.models and not self.average.on:
                raise ValueError(
                    "evaluate.models names average, and there is none; set average.base_share or average.snapshots"
                )
        for name, value in (
            ("pretrain.rows_per_step", self.pretrain.rows_per_step if self.pretrain.steps else None),
            ("finetune.batch_size", self.finetune.batch_size),
        ):
            if value is not None and value < self.cluster.num_workers:
                raise ValueError(f"{name}={value} must be at least cluster.num_workers={self.cluster.num_workers}")
        if self.mine.negatives and not 1 <= self.finetune.num_negatives <= self.mine.negatives:
            raise ValueError(
                f"mine.negatives={self.mine.negatives} with finetune.num_negatives={self.finetune.num_negatives}: fine-tuning draws "
                "num_negatives of those mined; it must draw one at least, and there must be as many"
            )
        if self.export.max_tokens < max(self.finetune.max_tokens, self.evaluate.max_tokens):
            raise ValueError(
                f"export.max_tokens={self.export.max_tokens} must be at least finetune.max_tokens={self.finetune.max_tokens} "
                f"and evaluate.max_tokens={self.evaluate.max_tokens}: a shorter reader would cut what was trained and scored"
            )


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """The recipe of a name, or of a YAML file whose `recipe:` names the one it starts from; then `stage.key=value` overrides.

    Raises ValueError naming the key, the value and what would be right.
    """
    if name.endswith((".yaml", ".yml")):
        sections = read_yaml(name)
        sections.pop("recipe", None)
        recipe = merge(named_recipe(origin(name)), sections, "")
    else:
        recipe = named_recipe(name)
    changes: dict[str, Any] = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or "." not in key:
            raise ValueError(f"--set {override!r}: stage.key=value is expected, such as pretrain.mlm_ratio=0.3")
        *sections, leaf = key.split(".")
        target = changes
        for section in sections:
            target = target.setdefault(section, {})
        try:
            target[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"--set {override!r}: {value!r} is no YAML ({str(error).splitlines()[0]}); a pattern or a text with *, : or # needs "
                "quotes of its own, such as --set 'finetune.exclude=[\"*_page\"]'"
            ) from None
    return merge(recipe, changes, "")


def origin(name: str) -> str:
    """The named recipe that a recipe starts from, itself where it has a name."""
    return str(read_yaml(name).get("recipe", "demo")) if name.endswith((".yaml", ".yml")) else name


def named_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; use one of {', '.join(RECIPES)} or a .yaml file")
    return import_module(f"pipelines.recipes.{name}").recipe()


def read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).exists():
        raise ValueError(f"recipe file {path} does not exist")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"recipe file {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe file {path} must hold sections such as 'pretrain:', got {values!r}")
    return values


def merge(value: Any, changes: Mapping[str, Any], path: str) -> Any:
    """A copy of a dataclass with some fields changed, however deep; unknown fields and wrong types are refused by name."""
    hints = get_type_hints(type(value))
    known = [f.name for f in fields(value)]
    updates = {}
    for key, change in changes.items():
        where = f"{path}.{key}" if path else key
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"{where}={change!r}: no such setting; {hint}")
        current = getattr(value, key)
        if is_dataclass(current) and isinstance(change, Mapping):
            updates[key] = merge(current, change, where)
        else:
            updates[key] = coerce(change, hints[key], where)
    try:
        return replace(value, **updates)
    except ValueError as error:
        prefix = f"{path}: " if path and path not in str(error) else ""
        raise ValueError(f"{prefix}{error}") from None


def coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` (from YAML) as the field's type. Raises ValueError naming the field, the value and the type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = [arg for arg in args if arg is not type(None)]
        return coerce(value, kind, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}={value!r} must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}={value!r} must be a list")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(coerce(item, arg, f"{where}[{i}]") for i, (item, arg) in enumerate(zip(value, inner, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}={value!r} must be a mapping")
        return {coerce(k, args[0], where): coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if is_dataclass(kind):
        return build(value, kind, where)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 2e-6 as a string
        except ValueError:
            pass
    elif type(value) is kind:
        return value
    raise ValueError(f"{where}={value!r} must be of type {kind.__name__}")


def build(value: Any, kind: type, where: str) -> Any:
    """A new dataclass from a mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r} must be a mapping with {', '.join(f.name for f in fields(kind))}")
    hints = get_type_hints(kind)
    if unknown := [key for key in value if key not in hints]:
        raise ValueError(f"{where}.{unknown[0]}={value[unknown[0]]!r}: no such setting; there are {', '.join(hints)}")
    try:
        return kind(**{key: coerce(item, hints[key], f"{where}.{key}") for key, item in value.items()})
    except TypeError as error:
        raise ValueError(f"{where}={value!r}: {error}") from None
