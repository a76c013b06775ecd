"""Command line and YAML files in, one checked Config out.

Files come from ``--config FILE``; if several are given, later ones win. ``--section.key value`` and
Megatron's own flag names override all files, wherever they stand on the command line. jsonargparse
converts the types, merges the sources and prints the docstrings of the fields for ``--help``. This
module adds aliases and strict keys, so that every mistake is one line with the nearest known name.
No setting is read from the environment: torchrun's RANK only decides which process prints.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from megatron_rpp.config import Config
from megatron_rpp.config.infer_settings import infer_settings
from megatron_rpp.config.megatron_flags import aliases_of, list_aliases
from megatron_rpp.config.yaml_files import dump_yaml, read_yaml
from megatron_rpp.lifecycle.config_error import ConfigError


class Arguments(NamedTuple):
    """What the command line asks for."""

    config: Config
    dry_run: bool


Program = Literal["train", "sft", "reward_model"]


def parse(argv: list[str] | None = None, program: Program = "train") -> Arguments:
    """Parses ``argv`` (None = the arguments of this process).

    Exits with code 0 after ``--help`` and ``--print-config``. On any mistake, prints one line on
    stderr and exits with code 2. All ranks parse the same words and exit alike; only rank 0 prints.
    """
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            arguments, print_config = _parse(sys.argv[1:] if argv is None else argv, program)
        except (ValueError, argparse.ArgumentError) as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            raise SystemExit(2) from None
        if print_config:
            print(dump_yaml(asdict(arguments.config)), end="")
            raise SystemExit(0)
    return arguments


def _parse(argv: list[str], program: str) -> tuple[Arguments, bool]:
    """The arguments, and whether to print them and exit."""
    aliases = aliases_of(program)
    parser = _settings_parser(program)
    program_parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    _add_program_options(program_parser)
    options, words = program_parser.parse_known_args(argv)
    if {"-h", "--help"} & set(words):
        parser.parse_args(["--help"])
    words = list(_settings(words, aliases))
    values = _defaults(program).clone()
    for file in options.config:
        content = _checked(read_yaml(file), Config, file)
        values = _converted(
            f"config file '{file}': ", parser.parse_object, source=content, below=values
        )
    values = _converted("", parser.parse_args, source=words, below=values)
    if options.micro_batch_size is not None:
        _set_microbatch(values, options.micro_batch_size, words)
    settings = values.as_dict()
    infer_settings(settings, Config().model, scalar=program == "reward_model")
    config = _build(Config, settings)
    return Arguments(config, options.dry_run), options.print_config


def _hints(section: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, type) of every setting; sections themselves are left out."""
    for name, hint in get_type_hints(section).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _hints(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


_TYPES = dict(_hints())


@cache  # reading the docstrings of all fields takes longer than parsing
def _settings_parser(program: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m megatron_rpp.{program}",
        usage="%(prog)s --config FILE [--section.key value ...]",
        epilog=list_aliases(aliases_of(program)),
        formatter_class=_HelpFormatter,
        exit_on_error=False,
    )
    _add_program_options(parser)
    _add_settings(parser, Config(), "The whole run.")
    return parser


@cache
def _defaults(program: str) -> jsonargparse.Namespace:
    return _settings_parser(program).get_defaults()


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows type and default after each help text, and keeps the lines of the list of aliases."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _add_program_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML file of settings; may be given more than once, later files win",
    )
    parser.add_argument(
        "--print-config",
        "--print_config",
        action="store_true",
        help="print all settings as YAML, which --config can read back, and exit",
    )
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="build everything but run no step; train also checks the cluster",  # fmt: skip
    )
    parser.add_argument(
        "--micro-batch-size",
        metavar="N",
        type=int,
        help="sequences per micro-batch, as in Megatron; micro-batches are planned by a token "
        "budget here, so this sets train.max_tokens_per_microbatch = N x model.max_length",
    )


def _add_settings(
    parser: jsonargparse.ArgumentParser, section: object, about: str, *, prefix: str = ""
) -> None:
    """Adds one group per section; nested sections follow the fields of their parent."""
    hints, nested = get_type_hints(type(section)), []
    group = parser.add_argument_group(prefix.rstrip(".") or "settings", about)
    for text in docstring_parser.parse_from_object(type(section)).params:
        value = getattr(section, text.arg_name)
        about = " ".join((text.description or "").split())
        name = f"{prefix}{text.arg_name}"
        if is_dataclass(value):
            nested.append((value, about, f"{name}."))
        else:
            group.add_argument(f"--{name}", type=hints[text.arg_name], default=value, help=about)
    for value, about, name in nested:
        _add_settings(parser, value, about, prefix=name)


def _settings(words: list[str], aliases: dict[str, str]) -> Iterator[str]:
    """Rewrites the words as ``--section.key=value``, so that -1e-3 can be a value too."""
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            raise ConfigError(
                f"unexpected argument '{word}': write settings as --section.key value"
            )
        flag, equals, value = word[2:].partition("=")
        name = aliases.get(flag, flag)
        if "=" in name:
            if equals:
                raise ConfigError(f"--{flag} is a switch and takes no value, got '{value}'")
            yield f"--{name}"
            continue
        if not _is_known(name.removesuffix("+")):
            raise ConfigError(_unknown_key(flag, "on the command line", [*_TYPES, *aliases]))
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{flag} needs a value, got none")
        if name == "data.train" and value[:1] in ("[", "-") and os.path.exists(value):
            value = json.dumps([value])  # a file named [math] is not a list of files
        yield f"--{name}={value}"


def _is_known(name: str) -> bool:
    """Whether this names a setting, or an entry of a mapping such as task.params.min_terms."""
    return name in _TYPES or get_origin(_TYPES.get(name.rpartition(".")[0])) is dict


def _unknown_key(name: str, where: str, known: list[str]) -> str:
    """The error message. The same field in another section beats a similar spelling."""
    field = name.rpartition(".")[2]
    same = [key for key in known if key.rpartition(".")[2] == field]
    near = difflib.get_close_matches(name, same or known, n=1, cutoff=0.0 if same else 0.6)
    hint = f"did you mean '{near[0]}'?" if near else "--help lists the known ones"
    if fields := [key for key in known if key.startswith(f"{name}.")]:
        hint = f"it is a section, set a key of it, such as '{fields[0]}'"
    if name in near:
        hint = "write the field on an indented line below its section"
    return f"unknown key '{name}' {where}: {hint}"


def _checked(content: dict, section: type, file: str, *, prefix: str = "") -> dict[str, Any]:
    """The ``content`` of a file after its keys were checked; empty sections are left out."""
    hints, checked = get_type_hints(section), {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in hints:
            known = [*(f"{prefix}{hint}" for hint in hints), *_TYPES]
            raise ConfigError(_unknown_key(name, f"in config file '{file}'", known))
        if not is_dataclass(hints[key]):
            checked[key] = value
        elif isinstance(value, dict):
            checked[key] = _checked(value, hints[key], file, prefix=f"{name}.")
        elif value is not None:
            raise ConfigError(
                f"config file '{file}': '{name}' is a section, write its keys on indented lines "
                f"below it, got {value!r}"
            )
    return checked


def _converted(where: str, read: Any, *, source: Any, below: jsonargparse.Namespace) -> Any:
    """Reads ``source`` over the values ``below``; a value of the wrong type is a ConfigError."""
    try:
        values = read(source, namespace=below, defaults=False)
    except argparse.ArgumentError as error:
        key = re.search(r'Parser key "([^"]+)"', str(error))
        value = re.search(r"(?:Got value|Given value): (.*)", str(error), re.DOTALL)
        if key is None or value is None or key[1] not in _TYPES:
            raise ConfigError(f"{where}{error}") from error
        expected = _describe(_TYPES[key[1]])
        raise ConfigError(f"{where}{key[1]} must be {expected}, got {value[1]}") from error
    for name, hint in _TYPES.items():
        if values[name] is None and type(None) not in get_args(hint):
            raise ConfigError(f"{where}{name} must be {_describe(hint)}, got null")
    return values


def _describe(hint: Any) -> str:
    words = {
        bool: "true or false", int: "an integer", float: "a number", str: "a text",
        dict: "a mapping {name: value}",
    }  # fmt: skip
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return "one of " + ", ".join(arguments)
    if kind is list:
        return f"a list [...], each {_describe(arguments[0])}"
    if {str, list[str]} == set(arguments):
        return f"{_describe(str)} or {_describe(list[str])}"
    if type(None) in arguments:
        return f"{_describe(arguments[0])} or null"
    return words[kind or hint]


def _set_microbatch(values: jsonargparse.Namespace, sequences: int, words: list[str]) -> None:
    """Turns Megatron's micro-batch size into a token budget. Like any flag, it overrides files."""
    setting = "train.max_tokens_per_microbatch"
    if sequences < 1:
        raise ConfigError(f"--micro-batch-size must be at least 1, got {sequences}")
    if any(word.startswith(f"--{setting}=") for word in words):
        raise ConfigError(
            f"--micro-batch-size {sequences} and --{setting} set the same budget: give one of them"
        )
    values[setting] = sequences * values["model.max_length"]


def _build(section: type, values: dict[str, Any], path: tuple[str, ...] = ()) -> Any:
    """Builds the dataclass ``section``, found at ``path``, from its nested ``values``."""
    arguments = {}
    for name, hint in get_type_hints(section).items():
        nested = isinstance(hint, type) and is_dataclass(hint)
        arguments[name] = _build(hint, values[name], (*path, name)) if nested else values[name]
    try:
        return section(**arguments)
    except ConfigError as error:
        # A nested section such as sft.optimizer knows only its own name ("optimizer.lr must ...").
        raise ConfigError("".join(f"{owner}." for owner in path[:-1]) + str(error)) from error
