"""Generate the reference of the keys and of the command line from the program itself.

    python docs/reference.py

makes ``docs/configuration.md``, ``docs/command-line.md``, ``configs/config_all_keys.yaml`` and ``configs/schema.json``
from the models in ``cryosiam_dask/config.py`` and the commands in ``cryosiam_dask/cli.py``. `tests/test_docs.py` fails
if a file is outdated.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from cryosiam_dask.cli import app
from cryosiam_dask.config import UNUSED_KEYS, About, Configuration

ROOT = Path(__file__).parents[1]
_MADE_BY = "made by docs/reference.py: change the models in cryosiam_dask/config.py or cryosiam_dask/cli.py instead"
#: What pydantic leaves of a rule that follows a validator.
_KEYWORDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def main() -> None:
    """Write the files."""
    for name, text in generated().items():
        (ROOT / name).write_text(text, encoding="utf-8")


def generated() -> dict[str, str]:
    """Return the contents of the files by path."""
    return {
        "docs/configuration.md": _configuration_page(),
        "docs/command-line.md": _command_line_page(),
        "configs/config_all_keys.yaml": _all_keys(),
        "configs/schema.json": json.dumps(_schema(), indent=1, ensure_ascii=False) + "\n",
    }


# ------------------------------------------------------------------------------------------------------ configuration


def _schema() -> dict[str, Any]:
    """JSON schema of a YAML file for one model, with the keys of CryoSiam that mean nothing here."""
    schema = _standard(Configuration.model_json_schema(by_alias=True))
    for section, model in (("", schema), ("parameters", schema["$defs"]["Parameters"]),
                           ("parameters.network", schema["$defs"]["Network"])):  # fmt: skip
        for key in sorted(UNUSED_KEYS[section]):
            model["properties"][key] = {"description": "A key of CryoSiam that has no effect here."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": _MADE_BY, **schema}


def _standard(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {_KEYWORDS.get(key, key): _standard(value) for key, value in schema.items() if key != "title"} | (
            {"title": schema["title"]} if isinstance(schema.get("title"), dict) else {}
        )
    return [_standard(each) for each in schema] if isinstance(schema, list) else schema


def _sections(model: Any = Configuration, name: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield each section: its key, its model, and the JSON schema of each of its own keys."""
    schema = _standard(model.model_json_schema(by_alias=True))
    below = {
        key: field.annotation for key, field in model.model_fields.items() if hasattr(field.annotation, "model_fields")
    }
    yield name, model, {key: value for key, value in schema["properties"].items() if key not in below}
    for key, inner in below.items():
        yield from _sections(inner, f"{name}.{key}" if name else key)


def _field(model: Any, key: str) -> Any:
    return next(field for name, field in model.model_fields.items() if key in (name, field.alias))


def _about(model: Any, key: str) -> About:
    return next((each for each in _field(model, key).metadata if isinstance(each, About)), About())


def _value(value: Any) -> str:
    """Format a value as in YAML."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, (list, tuple)):
        return f"[ {', '.join(map(_value, value))} ]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type(schema: Mapping[str, Any]) -> str:
    """Describe in words what a JSON schema allows."""
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(map(_type, choices))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum") or [schema["const"]])
    if schema["type"] == "array":
        return f"list of {_type(schema['items']).replace('whole number', 'whole numbers').replace('text', 'texts')}"
    words = {"boolean": "`True` or `False`", "integer": "whole number", "number": "number", "null": "`null`",
             "string": schema.get("format", "text")}  # fmt: skip
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[rule]:g}" for rule, sign in signs.items() if rule in schema]
    return words[schema["type"]] + (f" {', '.join(limits)}" if limits else "")


def _configuration_page() -> str:
    lines = [f"<!-- {_MADE_BY} -->", "", *_INTRODUCTION.splitlines(), ""]
    for name, model, keys in _sections():
        if not keys:
            continue
        lines += [f"## `{name}`" if name else "## Top level", "", model.__doc__.splitlines()[0], ""]
        lines += ["| Key | Meaning | Value | Default | For | In CryoSiam |", "|---|---|---|---|---|---|"]
        for key, schema in keys.items():
            about = _about(model, key)
            default = "required" if _field(model, key).is_required() else f"`{_value(schema['default'])}`"
            value = _type(schema) + (f" ({about.unit})" if about.unit else "")
            meaning = " ".join(schema["description"].split())
            if about.example and about.example not in meaning:
                meaning += f" Example: `{about.example}`"
            known = "–" if about.own else "yes"
            cells = (f"`{key}`", meaning, value, default, about.model or "both", known)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    unused = [f"`{f'{section}.{key}'.lstrip('.')}`" for section, keys in UNUSED_KEYS.items() for key in sorted(keys)]
    text = (
        f"{', '.join(unused[:-1])} and {unused[-1]} are keys of CryoSiam's files that are accepted without effect; a "
        "run notes them. `--device` and `--workers` choose the devices instead."
    )
    lines += ["## Keys without effect", "", *textwrap.wrap(text, 120)]
    return "\n".join(lines) + "\n"


_INTRODUCTION = """\
# Every key of the YAML file

Every command accepts the YAML file of one model, such as [CryoSiam's own files](from-cryosiam.md), or
[one file for all models](usage.md#all-models-in-one-pass), with these keys below `denoise`, `lamella` and `semantic`.
Three keys are required. Relative paths start from the folder in which the command is started. An unknown key is an
error that names the most similar known key.

`configs/config_all_keys.yaml` lists all of them with their defaults, to copy from. Editors that support YAML schemas
(VS Code with its YAML extension, and others) complete the keys and show these texts if a file begins with

```yaml
# yaml-language-server: $schema=configs/schema.json
```

with the path from the file to `configs/schema.json`."""


def _all_keys() -> str:
    lines = [
        "# yaml-language-server: $schema=schema.json",
        "# Every key of cryosiam-dask, with its default or, if there is none, an example.",
        "# Relative paths start from the folder in which the command is started.",
        f"# ({_MADE_BY[0].upper()}{_MADE_BY[1:]}.)",
    ]
    for name, model, keys in _sections():
        indent = "  " * (name.count(".") + 1 if name else 0)
        if name:
            lines += ["", f"{indent[2:]}{name.rpartition('.')[2]}:"]
        for key, schema in keys.items():
            about, required = _about(model, key), _field(model, key).is_required()
            text = " ".join(schema["description"].replace("`", "").split())
            if about.unit:
                text += f" Unit: {about.unit}."
            if required:
                text = f"Required. {text}"
            if not (name and key == next(iter(keys))):
                lines.append("")
            lines += textwrap.wrap(text, 118, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            if about.example and not required and about.example not in text:
                lines.append(f"{indent}# Example: {about.example}")
            lines.append(f"{indent}{key}: {_value(about.example if required else schema['default'])}")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------- command line


def _command_line_page() -> str:
    group: Any = typer.main.get_command(app)
    lines = [f"<!-- {_MADE_BY} -->", "", "# Every command", "", *_COMMANDS.splitlines(), ""]
    with typer.Context(group, info_name="cryosiam-dask", **group.context_settings) as parent:
        for name in group.list_commands(parent):
            command = group.get_command(parent, name)
            with typer.Context(command, info_name=name, parent=parent) as context:
                usage = " ".join(command.collect_usage_pieces(context))
                lines += [f"## {name}", "", "```text", f"cryosiam-dask {name} {usage}", "```", *_prose(command), ""]
                lines += ["| Option | Meaning |", "|---|---|"]
                lines += [_row(*param.get_help_record(context)) for param in command.params]
                lines.append("")
    return "\n".join(lines)


_COMMANDS = """\
`cryosiam-dask COMMAND --help` prints the same. Commands and options also accept CryoSiam's spelling with underscores:
`semantic_predict --config_file=…`. [Exit statuses](usage.md#exit-status) are the same for all commands."""


def _prose(command: Any) -> Iterator[str]:
    """Yield the help text, with its examples as code."""
    for paragraph in "\n\n".join(filter(None, (command.help, command.epilog))).split("\n\n"):
        text = " ".join(paragraph.split())
        if text.startswith("Example: "):
            yield from ("", "```bash", text.removeprefix("Example: "), "```")
        else:
            yield from ("", text)


def _row(option: str, meaning: str) -> str:
    return f"| `{option.replace('|', ', ')}` | {meaning.replace('|', ', ').replace('[', '(').replace(']', ')')} |"


if __name__ == "__main__":
    main()
