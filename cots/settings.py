"""What all configurations have in common: a pydantic model read from YAML, dotted overrides on top, checked once.

An unknown key is an error that names the nearest known one. Environment variables are expanded, in overrides too, and
so is `~` at the beginning of a value; a variable that is not set is left as it is written.
"""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cots.errors import ConfigError


class Settings(BaseModel):
    """Base of all configuration models: unknown keys are errors, field docstrings are descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, frozen=True, allow_inf_nan=False
    )


AnySettings = TypeVar("AnySettings", bound=Settings)


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a YAML configuration as plain values, with the overrides on top, not yet validated.

    Raises:
        ConfigError: the file is missing or no YAML mapping, or an override has no `=`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The configuration {path} is not a UTF-8 text file; give a YAML file.") from error
    try:
        values = _parse(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"The configuration {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration {path} must be a mapping of sections, not a {type(values).__name__}.")
    for override in overrides:
        _apply_override(values, override)
    return values


def validate_config(kind: type[AnySettings], values: dict[str, Any], origin: str) -> AnySettings:
    """Build a settings model from plain values; every problem becomes one line of a ConfigError."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(" ".join(_explain(kind, origin, problem) for problem in error.errors())) from error


def _parse(text: str) -> Any:
    """Variables stand for YAML (a number, a list, part of a path); `~` for the home directory in strings only."""
    return _expand_home(yaml.safe_load(os.path.expandvars(text)))


def _expand_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"The override {override!r} has no value; write it as section.key=value.")
    *parents, leaf = key.split(".")
    place: Any = values
    for name in parents:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise ConfigError(f"The override {override!r} goes through {name!r}, which is not a section.")
    try:
        place[leaf] = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value in the override {override!r} is not valid YAML.") from error


def _explain(kind: type[Settings], origin: str, problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # of several settings together: the message has the values that matter
        return ": ".join(filter(None, (origin, where, f"{problem['ctx']['error']}.")))
    if problem["type"] != "extra_forbidden":
        return (
            f"{origin}: {where}: {problem['msg']} (got {problem['input']!r})."
            if where
            else f"{origin}: {problem['msg']}."
        )
    known = [".".join(path) for path in _paths(kind)]
    nearest = difflib.get_close_matches(where, known, n=1, cutoff=0.0)
    siblings = [name for name in known if name.rpartition(".")[0] == where.rpartition(".")[0]]
    nearest = difflib.get_close_matches(where, siblings, n=1, cutoff=0.6) or nearest
    nearest = [name for name in siblings if _initials(name) == where.rpartition(".")[2]] or nearest  # lr
    return f"{origin}: there is no setting {where!r}; did you mean {nearest[0]!r}?"


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.rpartition(".")[2].split("_"))


def _paths(kind: type[Settings], parents: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All dotted settings below a model, sections included."""
    for name, field in kind.model_fields.items():
        yield (*parents, name)
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Settings):
                yield from _paths(candidate, (*parents, name))
