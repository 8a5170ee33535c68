"""Recipes: YAML files of settings, found by name or path, read strictly, and turned into command-line arguments."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from .. import ranks
from ..config import RunConfig, kinds
from ..errors import UserError, unknown
from ..reading import is_pipe, whole

RECIPE_KEYS = [*(field.name for field in dataclasses.fields(RunConfig)), "methods", "seeds", "grid", "space"]
_NOT_MEANT = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}


TYPES = {name: kinds(hint) for name, hint in typing.get_type_hints(RunConfig).items()}


def recipes_folder() -> Path:
    """Where the recipes are: in the installed package, or in the source tree."""
    packaged = Path(__file__).parents[1] / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "recipes"


def one_spelling(name: str) -> str:
    """The name of a setting or of its option, which may also be spelled the American way.

    >>> one_spelling("memorize_args"), one_spelling("--memorize")
    ('memorise_args', '--memorise')
    """
    return re.sub(r"^(-*)memorize(?![^\W_])", r"\1memorise", name)


@ranks.by_first  # as only it has the pipe of a shell
def find_recipe(name: str) -> Path:
    """The file of a recipe, by path or by the name of an included one."""
    if Path(name).is_file() or is_pipe(name):
        return Path(name)
    own = {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}
    if name in own:
        return own[name]
    if name.endswith((".yaml", ".yml")) or "/" in name:
        raise UserError(f"recipe {name}: there is no such file")
    raise unknown("recipe", name, own)


class Loader(yaml.SafeLoader):
    """YAML without surprises: 1:5 is no number to base 60, 2024-01-01 is no date, and a repeated key is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012, as the class above has it
        first: [(tag, pattern) for tag, pattern in known if tag not in _NOT_MEANT]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError):
            kind = str(node.tag).rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"what is tagged as {kind} is none; remove the tag", node.start_mark
            ) from None

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[str, str] = {}
        for key, _ in node.value:
            name = one_spelling(str(key.value))
            if isinstance(key.value, str) and name in seen:
                also = f", also spelled {seen[name]!r}," if seen[name] != key.value else ""
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r}{also} stands twice; remove one", key.start_mark
                )
            seen[name] = str(key.value)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def _whole_number(loader: Loader, node: Any) -> int:
    """010 is ten."""
    if len(str(node.value)) > 4000:  # Python refuses to read a little more than that
        raise yaml.constructor.ConstructorError(None, None, "a number of more than 4000 digits", node.start_mark)
    return int(str(node.value))


def _text(loader: Loader, node: Any) -> str:
    r"""JSON writes a character beyond the BMP as two escapes, "\ud83d\ude00", of which YAML makes two characters."""
    return str(loader.construct_scalar(node)).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
Loader.add_constructor("tag:yaml.org,2002:str", _text)


@ranks.by_first
def _bytes(path: Path) -> bytes:
    return whole(path)


def recipe_arguments(path: Path, known: set[str]) -> list[str]:
    """A recipe's settings as `--name=value`.

    Args:
        known: the command's settings; a setting of another command is skipped.

    Raises:
        UserError: YAML that cannot be read, a key that no command has, or a setting without a value.
    """
    try:
        loader = Loader(_bytes(path).decode("utf-8-sig"))
        node: Any = loader.get_single_node()
        settings = loader.construct_document(node) if node else None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        where, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        reason = " ".join(str(problem).split())
        raise UserError(f"{path}{f':{where.line + 1}' if where else ''}: broken YAML; {reason}") from None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:  # nested without end
        raise UserError(f"{path}: YAML that cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a recipe is a mapping of settings, such as 'lr: 1e-5', but this is {settings!r}")
    nodes = {key.value: (key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    arguments = []
    for given, value in settings.items():
        key = one_spelling(given) if isinstance(given, str) else given
        if key not in RECIPE_KEYS:
            raise unknown("recipe key", key, RECIPE_KEYS, str(path), "dualoptim compare --help lists all settings")
        if key not in known:
            continue  # it is for another command: `evaluate` trains for no steps, `unlearn` has one method
        place, node = nodes[given]
        if value is None and type(None) not in TYPES.get(key, ()):
            raise UserError(f"{path}:{place.start_mark.line + 1}: {given} has no value; give one or leave the line out")
        if str in TYPES.get(key, ()) and isinstance(value, (bool, int, float)):
            value = node.value  # as it stands there: no and 007 are names, too
        try:
            written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):  # a Python object, or one that contains itself
            raise UserError(f"{path}: {key} is {value!r}, of which no setting can be made") from None
        arguments.append(f"--{key.replace('_', '-')}={written}")
    return arguments
