"""Finds every regular expression of the package, and generates texts for which backtracking patterns are slow."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import worker

sre: Any = importlib.import_module("re._constants")  # untyped, like the next one
parser: Any = importlib.import_module("re._parser")

METHODS = frozenset({"match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer"})
EXCLUDED = frozenset({"sandbox"})  # the stand-in of the API only gets input from its own user
UNLOADED = frozenset({"django"})  # can't be imported without Django's settings; its source is searched all the same
FOLDER = Path(worker.__file__).parent
ENDINGS = ("", "\0", "a")
VARIANTS = 12  # samples of one pattern
CATEGORIES = {
    sre.CATEGORY_DIGIT: "1",
    sre.CATEGORY_SPACE: " ",
    sre.CATEGORY_WORD: "a",
    sre.CATEGORY_NOT_DIGIT: "a",
    sre.CATEGORY_NOT_SPACE: "a",
    sre.CATEGORY_NOT_WORD: " ",
}


@dataclass(frozen=True)
class Use:
    """A pattern, its place, and the methods that are called on it."""

    place: str
    pattern: "re.Pattern[Any]"
    methods: frozenset[str]

    def run(self, method: str, text: str) -> None:
        """Apply the pattern to a text as the code does."""
        subject: Any = text if isinstance(self.pattern.pattern, str) else text.encode("latin-1", "replace")
        match method:
            case "sub" | "subn":
                self.pattern.sub(lambda match: match[0][:0], subject)
            case "finditer" | "findall":
                for _ in self.pattern.finditer(subject):
                    pass
            case _:
                getattr(self.pattern, method)(subject)


def uses() -> list[Use]:
    """Return all patterns of the package: those in module variables, and those written where they are used."""
    methods = _methods()
    uses_by_pattern: dict[tuple[Any, int], Use] = {}
    for module in _modules():
        for name, value in vars(module).items():
            for number, pattern in enumerate(_patterns(value)):
                methods_used = methods.get(name) or METHODS
                place = f"{module.__name__}.{name}" + (f"[{number}]" if number else "")
                uses_by_pattern.setdefault((pattern.pattern, pattern.flags), Use(place, pattern, methods_used))
    for place, method, pattern in _inline():
        uses_by_pattern.setdefault((pattern.pattern, pattern.flags), Use(place, pattern, frozenset({method})))
    return list(uses_by_pattern.values())


def untested_patterns() -> list[str]:
    """Return the places of patterns that are neither constants nor in a module variable."""
    assigned = {name for module in _modules() for name, value in vars(module).items() if any(_patterns(value))}
    places = []
    for path, tree in _trees():
        names = {id(call): name for value, name in _named_values(tree) for call in ast.walk(value)}
        for call in _calls(tree):
            constant = isinstance(call.args[0], ast.Constant) or getattr(call.args[0], "id", "") in assigned
            if not constant and names.get(id(call)) not in assigned:
                places.append(f"{path.relative_to(FOLDER)}:{call.lineno}")
    return places


def texts(pattern: "re.Pattern[Any]", size: int) -> Iterator[str]:
    """Yield texts of about `size` characters that nearly match, by repeating each repeated part after its prefix."""
    source = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
    tree = list(parser.parse(source, pattern.flags & ~re.UNICODE))
    pumps = set[tuple[str, str]]()
    for with_optional in (True, False):
        samples = list(islice(_samples(tree, with_optional), VARIANTS))
        pumps |= {("", sample) for sample in samples} | {("", sample[:-1]) for sample in samples}
        pumps |= {("", char) for sample in samples for char in sample} | set(_pumps(tree, "", with_optional))
    for prefix, pump in sorted(pumps):
        if pump:
            for ending in ENDINGS:
                yield prefix + pump * (size // len(pump)) + ending


def _samples(nodes: Iterable[Any], with_optional: bool) -> Iterator[str]:
    """Yield short texts that match, except for lookarounds. `with_optional` includes optional parts."""
    nodes = list(nodes)
    if not nodes:
        yield ""
        return
    for tail in islice(_samples(nodes[1:], with_optional), VARIANTS):
        for head in islice(_sample(nodes[0][0], nodes[0][1], with_optional), VARIANTS):
            yield head + tail


def _sample(kind: Any, argument: Any, with_optional: bool) -> Iterator[str]:
    if kind in (sre.LITERAL,):
        yield chr(argument)
    elif kind in (sre.NOT_LITERAL, sre.ANY):
        yield from ("a", " ")
    elif kind is sre.IN:
        yield from _members(argument)
    elif kind is sre.BRANCH:
        for branch in argument[1]:
            yield from islice(_samples(branch, with_optional), 2)
    elif kind is sre.SUBPATTERN:
        yield from _samples(argument[3], with_optional)
    elif kind is sre.ATOMIC_GROUP:
        yield from _samples(argument, with_optional)
    elif kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
        minimum, _, body = argument
        if not with_optional and not minimum:
            yield ""
            return
        for sample in islice(_samples(body, with_optional), 3):
            yield sample * max(1, min(minimum, 40))
    else:
        yield ""


def _members(members: Any) -> Iterator[str]:
    if members[0][0] is sre.NEGATE:
        yield from ("a", "1", " ", "-", ":", "/")
        return
    for kind, argument in members:
        if kind is sre.LITERAL:
            yield chr(argument)
        elif kind is sre.RANGE:
            yield chr(argument[0])
        elif kind is sre.CATEGORY:
            yield CATEGORIES.get(argument, "a")


def _pumps(nodes: Iterable[Any], prefix: str, with_optional: bool) -> Iterator[tuple[str, str]]:
    """Yield (prefix, repeated part) for each repeated part."""
    for kind, argument in nodes:
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            for sample in islice(_samples(argument[2], with_optional), VARIANTS):
                yield prefix, sample
                yield "", prefix + sample
            yield from _pumps(argument[2], prefix, with_optional)
        elif kind is sre.BRANCH:
            for branch in argument[1]:
                yield from _pumps(branch, prefix, with_optional)
        elif kind is sre.SUBPATTERN:
            yield from _pumps(argument[3], prefix, with_optional)
        elif kind in (sre.ASSERT, sre.ASSERT_NOT):
            yield from _pumps(argument[1], prefix, with_optional)
        elif kind is sre.ATOMIC_GROUP:
            yield from _pumps(argument, prefix, with_optional)
        prefix += next(_sample(kind, argument, with_optional), "")


# ── search for patterns ───────────────────────────────────────────────────────────────────────────────────────────────


def _modules() -> Iterator[Any]:
    for info in pkgutil.walk_packages(worker.__path__[:1], "worker."):
        if info.name.split(".")[1] not in {*EXCLUDED, *UNLOADED} and not info.name.endswith("__main__"):
            try:
                yield importlib.import_module(info.name)
            except ImportError:  # an extra that is not installed
                continue


def _patterns(value: object) -> Iterator["re.Pattern[Any]"]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _patterns(item)
    elif isinstance(value, tuple | list | set | frozenset):
        for item in value:
            yield from _patterns(item)


@cache
def _trees() -> list[tuple[Path, ast.Module]]:
    paths = (path for path in sorted(FOLDER.rglob("*.py")) if path.relative_to(FOLDER).parts[0] not in EXCLUDED)
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def _named_values(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                yield node.value, target.id


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    """Yield the calls of functions of `re` that take a pattern."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            module = node.func.value
            if isinstance(module, ast.Name) and module.id == "re" and node.func.attr in METHODS | {"compile"}:
                yield node


def _inline() -> Iterator[tuple[str, str, "re.Pattern[Any]"]]:
    for path, tree in _trees():
        for call in _calls(tree):
            function, source = call.func, call.args[0]
            if isinstance(function, ast.Attribute) and function.attr != "compile" and isinstance(source, ast.Constant):
                flags = re.IGNORECASE if "IGNORECASE" in ast.unparse(call) else 0
                pattern: re.Pattern[Any] = re.compile(str(source.value), flags)
                yield f"{path.relative_to(FOLDER)}:{call.lineno}", function.attr, pattern


def _methods() -> dict[str, frozenset[str]]:
    """Return, for each name of a pattern, the methods that the package calls on it."""
    methods_by_name: dict[str, set[str]] = {}
    for _, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in METHODS:
                value = node.value
                name = value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")
                methods_by_name.setdefault(name, set()).add(node.attr)
    return {name: frozenset(methods) for name, methods in methods_by_name.items()}
