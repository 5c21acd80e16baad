"""Recipes: what an experiment is, as YAML. The only file that knows YAML.

Enters: a recipe file, its `base:` chain, dotted overrides (`train.epochs=10`). Leaves: a validated, frozen
`Recipe`, or one `UserError` that lists every mistake with its dotted path, the value found and the nearest
valid name.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from cfssl.errors import UserError
from cfssl.experiment import Recipe
from cfssl.files import write_text


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe with its bases and overrides. Raises `UserError` with all mistakes at once."""
    return parse_recipe(_merge(read_layers(path), _dotlist(overrides)), str(path))


def parse_recipe(content: Mapping[str, Any], origin: str) -> Recipe:
    """Validates plain content; `origin` names it in error messages."""
    mistakes = [f"{path} = 'None': write null for nothing" for path in _none_strings(content)]
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        mistakes += [_sentence(entry, content) for entry in error.errors(include_url=False)]
    else:
        mistakes += recipe.problems()
    if mistakes:
        lines = "".join(f"\n  - {mistake}" for mistake in dict.fromkeys(mistakes))
        raise UserError(f"The recipe {origin} has {len(set(mistakes))} mistake(s):{lines}")
    return recipe


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors.

    A file may leave any part of a section to its `base`, so nothing is required here and a section without a
    `name` may be any of its kinds; `cfssl check` sees the merged recipe and asks for what is missing.
    """
    schema = _partial(Recipe.model_json_schema())
    about = "The recipe this one inherits from, relative to this file."
    schema["properties"]["base"] = {"type": "string", "title": "Base", "description": about}
    return schema


def _partial(node: Any) -> Any:
    if isinstance(node, list):
        return [_partial(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    dropped = ("required", "discriminator")
    kept = {key: _partial(value) for key, value in node.items() if key not in dropped}
    return {"anyOf" if key == "oneOf" else key: value for key, value in kept.items()}


def write_recipe(recipe: Recipe, path: Path) -> None:
    """The resolved recipe, every default spelled out."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json"))))


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a recipe merged over its `base`, which is relative to the file that names it."""
    path = path.resolve()
    if path in above:
        chain = " -> ".join(str(step) for step in (*above, path))
        raise UserError(f"The recipes form a circle of bases ({chain}); remove one `base:`.")
    if not path.is_file():
        raise UserError(f"The recipe {path} does not exist{_near_file(path)}; check the path.")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(
            f"The recipe {path} is not valid YAML ({' '.join(str(error).split())}); mend the file."
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"The recipe {path} holds {type(content).__name__}, not sections; see recipes/ for examples."
        )
    own = {str(key): value for key, value in content.items()}
    base = own.pop("base", None)
    return own if base is None else _merge(read_layers(path.parent / str(base), (*above, path)), own)


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`, section by section; an empty mapping clears. A section whose `name` changes is
    replaced whole: settings of one objective mean nothing to another."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            renamed = "name" in value and value["name"] != below.get("name")
            merged[key] = dict(value) if renamed or not value else _merge(below, value)
        else:
            merged[key] = value
    return merged


def _dotlist(overrides: Sequence[str]) -> dict[str, Any]:
    broken = [entry for entry in overrides if "=" not in entry or entry.startswith("=")]
    if broken:
        raise UserError(
            f"The override {broken[0]!r} is not of the form key.path=value; write e.g. train.epochs=10."
        )
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(
            f"The overrides {list(overrides)} cannot be read ({' '.join(str(error).split())})."
        ) from None
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _none_strings(node: Any, path: str = "") -> list[str]:
    if re.fullmatch(
        r"((silver\.)?data|external\.[^.]+)\.missing", path
    ):  # texts of the table, among which "None" may well be one
        return []
    if isinstance(node, Mapping):
        return [
            found
            for key, value in node.items()
            for found in _none_strings(value, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(node, list):
        return [
            found for index, value in enumerate(node) for found in _none_strings(value, f"{path}[{index}]")
        ]
    return [path] if node == "None" else []


def _sentence(error: Any, content: Any) -> str:
    """One pydantic error as `path = value: what is wrong; nearest name`."""
    path, value = _locate(error["loc"], content)
    kind = error["type"]
    if kind == "missing":
        return f"{path} is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(error["loc"][:-1])
        return f"{path} = {value!r}: unknown key{_nearest(str(error['loc'][-1]), known)}"
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in error["ctx"]["expected_tags"].split(",")]
        return f"{path}.name = {error['ctx']['tag']!r}: unknown name{_nearest(error['ctx']['tag'], tags)}"
    if kind == "union_tag_not_found":
        return f"{path}.name is missing"
    expected = error["msg"][0].lower() + error["msg"][1:]
    choices = error.get("ctx", {}).get("expected", "")
    near = (
        _nearest(value, [word.strip(" '") for word in choices.replace(" or ", ",").split(",")])
        if choices and isinstance(value, str)
        else ""
    )
    return f"{path} = {value!r}: {expected.removeprefix('value error, ')}{near}"


def _locate(location: Sequence[Any], content: Any) -> tuple[str, Any]:
    """The dotted path as the user wrote it (union tags of pydantic's location left out) and the value found
    there."""
    path, node = "", content
    for index, part in enumerate(location):
        if isinstance(node, Mapping) and part in node:
            path, node = f"{path}.{part}" if path else str(part), node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            path, node = f"{path}[{part}]", node[part]
        elif index == len(location) - 1 and isinstance(part, str) and isinstance(node, Mapping):
            path, node = f"{path}.{part}" if path else part, None
    return path or "recipe", node


def _known_keys(location: Sequence[Any]) -> list[str]:
    """The keys that the schema allows at a location."""
    schema = Recipe.model_json_schema()

    def options(node: Any) -> list[Any]:
        if "$ref" in node:
            return options(schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
        return [found for entry in node["anyOf"] for found in options(entry)] if "anyOf" in node else [node]

    nodes = [schema]
    for part in location:
        following = []
        for node in nodes:
            for option in options(node):
                tagged = option.get("discriminator", {}).get("mapping", {})
                if part in option.get("properties", {}):
                    following.append(option["properties"][part])
                elif part in tagged:
                    following.append({"$ref": tagged[part]})
                elif "patternProperties" in option:  # a section under names of one's own
                    following += option["patternProperties"].values()
                elif isinstance(part, int) and ("items" in option or "prefixItems" in option):
                    following.append(option.get("items") or option["prefixItems"][part])
        nodes = following or nodes
    return sorted({key for node in nodes for option in options(node) for key in option.get("properties", {})})


def _nearest(word: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), known, 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], 1)
    return f" (did you mean {near[0]}?)" if near else ""
