"""Command-line options made from dataclasses, and a parser whose errors say what to type instead.

Owns the mapping from a field's type to its option, the spelling rules, and the pages of `--help`. Knows none of
the options itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from minivllm.utils.text import nearest, one_line, parse_size

_NUMBER = re.compile(r"-\d+(\.\d+)?[a-zA-Z]*")


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser that takes `_` for `-`, never abbreviates, and suggests the nearest option.

    An option that takes a JSON object may be given by its parts: `--a.b.c 1` is `--a '{"b": {"c": 1}}'`, also with a
    short name for --a, and `--a.b+ x` appends to a list. `--config file.yaml` reads options from a file; what the
    command line says wins, and `namespace.from_config` names what came from the file.

    `refuse(option, value)` is asked about every option that is not ours, with the word behind it or None: it gives
    a sentence (the error), how many words behind the option to ignore with it, or None (it does not know it either).
    Its help is short; `common` are the options it then shows, and `--help=all` or `--help=WORD` gives the rest.
    """

    def __init__(
        self,
        *args: Any,
        refuse: Callable[[str, str | None], str | int | None] = lambda option, value: None,
        common: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.refuse = refuse
        self.common = common
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Formatter)
        kwargs.setdefault("usage", "%(prog)s [options]")  # the options by name would fill the screen
        kwargs["add_help"] = False
        super().__init__(*args, **kwargs)
        self.add_argument("-h", "--help", action=_HelpAction, help="Show help: all of it, one group, or about a word.")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = self._joined(self._spelt(list(sys.argv[1:] if args is None else args)))
        if "--config" not in self._option_string_actions:
            return super().parse_known_args(args, namespace)
        args, path = _without_option(args, "--config")
        from_file = [] if path is None else self._from_file(path, set(map(_name, args)))
        namespace, rest = super().parse_known_args([*from_file, *args], namespace)
        namespace.config = path
        namespace.from_config = frozenset(map(_name, from_file))
        return namespace, rest

    def _from_file(self, path: str, given: set[str]) -> list[str]:
        """The options of a YAML file that are not given otherwise, as words of a command line."""
        import yaml

        try:
            with open(path, encoding="utf-8") as file:
                options = yaml.safe_load(file)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"--config {path} cannot be read: {error}")
        if not isinstance(options, dict):
            self.error(f"--config {path} must hold one option a line, such as max-model-len: 4096")
        words = []
        for name, value in options.items():
            words += self._joined(self._spelt([_as_word(str(name), value)] if value is not None else []))
        for word in words:
            if not word.startswith("--"):
                self.error(f"--config {path}: {word} is not an option; write long names without dashes")
        return [word for word in words if self._merges(_name(word)) or not given & _negations(_name(word))]

    def _merges(self, option: str) -> bool:
        return isinstance(self._option_string_actions.get(option), _JsonAction)

    def _joined(self, args: list[str]) -> list[str]:
        """The arguments with `--a.b value` put together to `--a={"b": value}`."""
        result: list[str] = []
        queue = list(args)
        while queue:
            word = queue.pop(0)
            if word == "--":
                return result + [word, *queue]
            option, equals, value = word.partition("=")
            if not option.startswith("--") or "." not in option:
                result.append(word)
                continue
            head, *path = option.split(".")
            if not equals:
                if not queue:
                    self.error(f"{option} needs a value")
                value = queue.pop(0)
            result.append(f"{head}={json.dumps(_nested(path, value))}")
        return result

    def _spelt(self, args: list[str]) -> list[str]:
        """The arguments with our spelling of every option. Unknown options end the program here, while it is
        still known which word is an option and which its value."""
        result: list[str] = []
        queue = list(args)
        while queue:
            word = queue.pop(0)
            if word == "--":
                return result + [word, *queue]
            if not word.startswith("-") or word == "-" or _NUMBER.fullmatch(word):
                result.append(word)
                continue
            option, equals, value = self._with_long_name(word).partition("=")
            head, dot, part = option.partition(".")
            ours = head.replace("_", "-") + dot + part if option.startswith("--") else option
            known = ours in self._option_string_actions
            if dot and isinstance(self._option_string_actions.get(ours.partition(".")[0]), _JsonAction):
                known = True
            if known or not (option.startswith("--") or self._is_foreign(option)):
                result.append(ours + equals + value)
                continue
            behind = None if equals or not queue or queue[0].startswith("--") else queue[0]
            num_ignored = self._refuse(option, ours, value if equals else behind)
            del queue[: num_ignored if behind is not None else 0]
        return result

    def _with_long_name(self, word: str) -> str:
        """`-x.b` as `--a.b`, if -x is short for an --a that takes a JSON object."""
        head, dot, rest = word.partition(".")
        action = self._option_string_actions.get(head)
        return action.option_strings[-1] + dot + rest if dot and isinstance(action, _JsonAction) else word

    def _is_foreign(self, option: str) -> bool:
        """Whether a word with one dash is another program's short option rather than -xVALUE of ours."""
        return self.refuse(option, None) is not None or option[:2] not in self._option_string_actions

    def _refuse(self, option: str, ours: str, value: str | None) -> int:
        """Error out, or say how many words behind the option are ignored with it."""
        answer = self.refuse(ours, value)
        if isinstance(answer, int):
            return answer
        if answer is not None:
            self.error(answer.replace(ours, option, 1))
        guess = nearest(ours, (name for name in self._option_string_actions if name.startswith("--")))
        self.error(f"unknown option {option}" + (f"; did you mean {guess}?" if guess else "; see --help=all"))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minivllm: error: {one_line(message)}\n")

    def help_about(self, word: str) -> str:
        """Help text: short (""), "all", one group's, or of the options that contain a word."""
        if word in ("", "all") and not (word == "" and self.common):
            return self.format_help()
        chosen = [a for a in self._actions if self._is_chosen(a, word)]
        if not chosen:
            return f"no option of {self.prog} mentions {word!r}; see --help=all\n"
        formatter = self._get_formatter()
        if not word:
            formatter.add_usage(self.usage, self._actions, [])
            formatter.add_text(self.description)
        for group in self._action_groups:
            members = [a for a in group._group_actions if a in chosen]
            formatter.start_section(group.title)
            formatter.add_arguments(members)
            formatter.end_section()
        if not word:
            formatter.add_text("These are the common options. --help=all shows every one, --help=WORD those about it.")
        return formatter.format_help()

    def _is_chosen(self, action: argparse.Action, word: str) -> bool:
        if not word:
            return not action.option_strings or any(option in self.common for option in action.option_strings)
        group = next((g.title for g in self._action_groups if action in g._group_actions), "")
        if word.lower() == (group or "").lower():
            return True
        if word.lower() == (group or "").lower().removesuffix("config"):  # vLLM's names: Frontend, Cache, …
            return True
        word = word.lower().lstrip("-").replace("_", "-")
        return any(word in option for option in action.option_strings) or word in (action.help or "").lower()


class _HelpAction(argparse.Action):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs="?", const="", default=argparse.SUPPRESS, metavar="all|GROUP|WORD", **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.help_about(values), end="")
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """Help lines that end with the default, when there is one to speak of."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34, **{"width": 110, **kwargs})

    def _get_help_string(self, action: argparse.Action) -> str:
        # Older Pythons write the default of a --[no-] option into its help themselves.
        text = (action.help or "").removesuffix(" (default: %(default)s)").replace("%", "%%")
        if action.default in (None, argparse.SUPPRESS, "", [], {}) or not action.option_strings:
            return text
        return f"{text} (default: {json.dumps(action.default) if isinstance(action.default, list) else action.default})"


class _ListAction(argparse.Action):
    """Several words, or one JSON list."""

    item, items = str, "strings"

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) == 1 and values[0].lstrip().startswith("["):
            try:
                values = json.loads(values[0])
            except ValueError as error:
                raise argparse.ArgumentError(self, f"{values[0]!r} is not JSON: {error}") from None
            if not all(type(value) is self.item for value in values):
                raise argparse.ArgumentError(self, f"the JSON list must hold {self.items}")
        try:
            setattr(namespace, self.dest, [self.item(value) for value in values])
        except ValueError:
            raise argparse.ArgumentError(self, f"{' '.join(values)!r} are not all {self.items}") from None


class _NumbersAction(_ListAction):
    """The same of whole numbers."""

    item, items = int, "whole numbers"


class _RepeatedAction(_ListAction):
    """The same, and given several times it adds."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, [*before, *getattr(namespace, self.dest)])


class _JsonAction(argparse.Action):
    """A JSON object; given several times, or by its parts, they are put together, the last word on each key wins."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else _merged(before, values))


def _merged(old: Any, new: Any) -> Any:
    """Objects key by key, and a list behind a list (what `--a.b+` makes); else the new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merged(old[key], value) if key in old else value for key, value in new.items()}}
    return old + new if isinstance(old, list) and isinstance(new, list) else new


def _nested(path: Sequence[str], value: str) -> Any:
    """A value as typed, in an object for each name of the path; `name+` makes a list of words between commas."""
    if not path:
        try:
            return json.loads(value)
        except ValueError:
            return value
    name, *rest = path
    if name.endswith("+"):
        return {name[:-1]: [_nested(rest, item) for item in value.split(",")]}
    return {name: _nested(rest, value)}


def _without_option(args: list[str], option: str) -> tuple[list[str], str | None]:
    """The arguments without an option and its value, and the value, if it was there."""
    for i, word in enumerate(args):
        if word == "--":
            break
        if word == option and i + 1 < len(args):
            return args[:i] + args[i + 2 :], args[i + 1]
        if word.startswith(f"{option}="):
            return args[:i] + args[i + 1 :], word.partition("=")[2]
    return args, None


def _as_word(name: str, value: Any) -> str:
    """`name: value` of a YAML file as one word of a command line."""
    if value is True:
        return f"--{name}"
    if value is False:
        return f"--no-{name}"
    return f"--{name}={json.dumps(value) if isinstance(value, (list, dict)) else value}"


def _name(word: str) -> str:
    """The option in a word of a command line."""
    return word.partition("=")[0]


def _negations(option: str) -> set[str]:
    """An option and its --no- form."""
    bare = option.removeprefix("--no-").removeprefix("--")
    return {f"--{bare}", f"--no-{bare}"}


def add_dataclass_arguments(
    parser: argparse.ArgumentParser, config_class: type, *, docs: dict[str, str], title: str, description: str
) -> None:
    """One option for each field of a dataclass, in a group of its own. `docs` gives each its help.

    A field's metadata may name a `short` option beside it.
    """
    group = parser.add_argument_group(title, description)
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        option = "--" + field.name.replace("_", "-")
        kind = _option(hints[field.name], field)
        names = [name for name in (field.metadata.get("short"), option) if name]
        group.add_argument(*names, default=default_of(field), help=docs.get(field.name), **kind)


def default_of(field: dataclasses.Field) -> Any:
    """A field's default; a fresh one where it has a factory."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _option(hint: Any, field: dataclasses.Field) -> dict[str, Any]:
    """What `add_argument` wants for a field of this type; one marked "repeatable" may be given several times."""
    members = [member for member in _members(hint) if member is not type(None)]
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    if members == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if len(words) and len(members) == 1:
        return {"choices": words, "metavar": "{" + ",".join(map(str, words)) + "}"}
    kinds = [get_origin(member) or member for member in members if get_origin(member) is not Literal]
    if kinds == [list] and get_args(members[0]) == (int,):
        return {"action": _NumbersAction, "nargs": "+", "metavar": "N"}
    if kinds == [list]:
        action = _RepeatedAction if field.metadata.get("repeatable") else _ListAction
        return {"action": action, "nargs": "+", "metavar": "NAME"}
    if kinds == [dict]:
        return {"action": _JsonAction, "type": json_object, "metavar": "JSON"}
    if kinds == [int]:
        return {"type": _one_of(words, size), "metavar": "N"}
    if kinds == [float]:
        return {"type": number, "metavar": "X"}
    assert kinds == [str], f"no option for a field of type {hint}"
    return {"type": str, "metavar": "TEXT"}


def _members(hint: Any) -> Iterable[Any]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def size(text: str) -> int:
    """A whole number, perhaps with a suffix (see utils.text.parse_size)."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"key\": 1}}'")
    return value


def _one_of(words: Sequence[str], otherwise: Callable[[str], Any]) -> Callable[[str], Any]:
    """Read one of these words, or something else."""
    return lambda text: text if text in words else otherwise(text)
