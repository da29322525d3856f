"""The public interface as text: one function for each golden file."""

import ast
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.types import ParamType
from sqlalchemy import Table
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

import worker
import worker.testing
from tests.metrics.exposition import open_metrics, parse, registry_of
from tests.public.commands import command_documents, exit_codes, planted_engine, webhook_body
from worker import errors
from worker.cli.commands import group
from worker.core.webhook import headers
from worker.settings import Settings
from worker.store.schema import VERSION_TABLE, metadata
from worker.testing import plugin

PACKAGE = Path(worker.__file__).parent
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
MODULE = re.compile(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])")  # the module of a type in a signature, which may change
FIELD = re.compile(r"(?:^|\s)([a-z][a-z_]*)=[^\s]*%")
IMPORTS = (
    "worker.alembic:include_name",
    "worker.app:app",
    "worker.client.hooks:hook_url",
    "worker.client.hooks:received",
    "worker.client.hooks:status_of",
    "worker.client.hooks.django:urlpatterns",
    "worker.client.hooks.fastapi:router",
    "worker.client.hooks.flask:blueprint",
    "worker.hooks:hook_url",
    "worker.hooks:received",
    "worker.hooks:status_of",
    "worker.hooks_django:urlpatterns",
    "worker.hooks_fastapi:router",
    "worker.hooks_flask:blueprint",
    "worker.sandbox:Sandbox",
    "worker.sandbox:SandboxOptions",
    "worker.settings:Settings",
    "worker.tasks:cancel",
    "worker.tasks:download",
    "worker.tasks:nudge",
    "worker.tasks:order",
    "worker.tasks:poll",
    "worker.tasks:prune",
    "worker.tasks:retry",
    "worker.tasks:submit",
    "worker.tasks:sweep",
    "worker.tasks:track",
)


def python_names() -> str:
    """Return the names of `worker` and `worker.testing` with signatures, and the hierarchy of errors."""
    lines = []
    for module in (worker, worker.testing):
        homes: dict[str, object] = getattr(module, "_HOME")  # noqa: B009  # private, and the same in both modules
        for name in sorted(homes):
            lines.append(f"{module.__name__}.{name}{_signature(getattr(module, name))}")
    lines += [f"errors: {' < '.join(_parents(error))}" for error in _errors()]
    return _text(lines)


def _signature(value: object) -> str:
    if inspect.isclass(value):
        own = [vars(kind) for kind in value.__mro__ if kind.__module__.partition(".")[0] == "worker"]
        members = {name for names in own for name in (*names, *names.get("__dataclass_fields__", ()))}
        return f": class {', '.join(sorted(name for name in members if not name.startswith('_')))}".rstrip()
    return MODULE.sub("", str(inspect.signature(value))) if callable(value) else f": {type(value).__name__}"


def _errors() -> list[type[object]]:
    return [
        value
        for _, value in sorted(vars(errors).items())
        if inspect.isclass(value) and value.__module__ == errors.__name__
    ]


def _parents(error: type[object]) -> list[str]:
    return [parent.__name__ for parent in error.__mro__ if parent not in (BaseException, object)]


def import_paths() -> str:
    """Return the import paths that apps and configurations use."""
    lines = []
    for path in IMPORTS:
        module, _, name = path.partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # former paths work for one more release
            lines.append(f"{path}: {'there' if hasattr(import_module(module), name) else 'MISSING'}")
    return _text(lines)


def commands() -> str:
    """Return every command with its arguments and options."""
    lines = []
    for name, command in sorted(group.commands.items()):
        lines.append(name)
        lines += [f"    {line}" for line in sorted(_parameter(parameter) for parameter in command.params)]
    return _text(lines)


def _parameter(parameter: click.Parameter) -> str:
    names = " ".join(sorted((*parameter.opts, *parameter.secondary_opts)))
    marks = [_kind(parameter.type)]
    marks += ["many"] if parameter.multiple or parameter.nargs == -1 else []
    marks += ["flag"] if getattr(parameter, "is_flag", False) else []
    marks += ["required"] if parameter.required else []
    default = parameter.to_info_dict()["default"]
    marks += [f"default {default}"] if default not in (None, False, (), []) else []
    return f"{names}: {', '.join(marks)}"


def _kind(kind: ParamType[Any]) -> str:
    choices: Iterable[str] | None = getattr(kind, "choices", None)
    return kind.name if choices is None else "|".join(map(str, choices))


def documents() -> str:
    """Return the structure of each command's JSON document."""
    return _text(
        f"{name}{path}: {kinds}" for name, document in command_documents() for path, kinds in _form(document).items()
    )


def _form(value: Any, path: str = "") -> dict[str, str]:
    """Return the path and types of each value in a JSON document. The items of a list share a path."""
    forms: dict[str, set[str]] = {}
    _collect(value, path, forms)
    return {path: " or ".join(sorted(kinds)) for path, kinds in sorted(forms.items())}


def _collect(value: Any, path: str, forms: dict[str, set[str]]) -> None:
    match value:
        case dict():
            forms.setdefault(path, set()).add("object")
            for name, item in value.items():
                _collect(item, f"{path}.{name}", forms)
        case list():
            forms.setdefault(path, set()).add("list")
            for item in value:
                _collect(item, f"{path}[]", forms)
        case None:
            forms.setdefault(path, set()).add("null")
        case bool():
            forms.setdefault(path, set()).add("true or false")
        case int() | float():
            forms.setdefault(path, set()).add("number")
        case _:
            forms.setdefault(path, set()).add("text")


def command_exits() -> str:
    """Return the exit codes of commands: for success, failure and wrong usage."""
    return _text(f"{' '.join(arguments)}: {code}" for arguments, code in exit_codes())


def metric_names() -> str:
    """Return every metric with its labels."""
    with planted_engine() as engine:
        exposed = parse(open_metrics(registry_of(engine, Settings())))
    return _text(
        f"{name}: {', '.join(sorted(labels)) or 'no labels'}" for name, labels in sorted(exposed.labels.items())
    )


def celery_names() -> str:
    """Return the tasks with arguments, queues, routes and the beat schedule."""
    app: Any = import_module("worker.app").app
    import_module("worker.tasks")
    lines = []
    for name, task in sorted(app.tasks.items()):
        if name.startswith("worker."):
            lines.append(
                f"task {name}{inspect.signature(task.run)} acks_late={task.acks_late} keeps={not task.ignore_result}"
            )
    lines += sorted(f"queue {queue.name} exchange {queue.exchange.name}" for queue in app.conf.task_queues)
    lines += sorted(f"route {name} {route['queue']}" for name, route in app.conf.task_routes.items())
    lines += sorted(f"beat {entry['task']} on {entry['options']['queue']}" for entry in app.conf.beat_schedule.values())
    lines += sorted(f"redis {value}" for value in app.conf.broker_transport_options.values() if isinstance(value, str))
    return _text(line for line in lines)


def tables() -> str:
    """Return the tables and indexes for each kind of database, and Alembic's table."""
    lines = [f"version table {VERSION_TABLE}"]
    dialects: list[Any] = [postgresql, sqlite, mysql]
    for dialect in [module.dialect() for module in dialects]:
        for table in sorted(metadata.sorted_tables, key=lambda table: table.name):
            lines += [f"-- {dialect.name}", *_ddl(table, dialect)]
    return _text(lines)


def _ddl(table: Table, dialect: Any) -> list[str]:
    statements: list[Any] = [CreateTable(table)]
    statements += [CreateIndex(index) for index in sorted(table.indexes, key=lambda index: str(index.name))]
    return [
        line.rstrip()
        for statement in statements
        for line in str(statement.compile(dialect=dialect)).strip().splitlines()
    ]


def settings() -> str:
    """Return each setting with its default."""
    lines = []
    for name, field in sorted(Settings.model_fields.items()):
        lines.append(f"{name.upper()}: {field.get_default(call_default_factory=True)!s}")
    return _text(lines)


def log_fields() -> str:
    """Return the names of the fields in the product's log lines."""
    fields: set[str] = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
                continue
            template = node.args[0] if node.args else None
            if isinstance(template, ast.Constant) and isinstance(template.value, str):
                fields.update(FIELD.findall(template.value))
            for keyword in node.keywords:
                if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict):
                    fields.update(str(key.value) for key in keyword.value.keys if isinstance(key, ast.Constant))
    return _text(sorted(fields))


def webhooks() -> str:
    """Return the structure of a webhook body, for a cancelled job with two outputs, and the header names."""
    body = webhook_body()
    lines = [f"body{path}: {kinds}" for path, kinds in _form(json.loads(body)).items()]
    lines += [f"header {name}" for name in sorted(headers([b"0" * 24], "evt_1", 1, body))]
    return _text(lines)


def fixtures() -> str:
    """Return the pytest fixtures for apps."""
    lines = []
    for name, value in sorted(vars(plugin).items()):
        marker = getattr(value, "_fixture_function_marker", None)
        if marker is not None:
            lines.append(f"{name}: {marker.scope}, {', '.join(inspect.signature(value._fixture_function).parameters)}")
    return _text(lines)


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


FACES: dict[str, Callable[[], str]] = {
    "celery": celery_names,
    "commands": commands,
    "documents": documents,
    "exit_codes": command_exits,
    "fixtures": fixtures,
    "imports": import_paths,
    "log_fields": log_fields,
    "metrics": metric_names,
    "python": python_names,
    "settings": settings,
    "tables": tables,
    "webhooks": webhooks,
}
