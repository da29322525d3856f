"""Every link leads somewhere, and every setting, command, option, metric, state and error code has its place."""

import re
import tomllib
from importlib import import_module
from typing import Any, get_args, get_type_hints

import pytest

from tests.docs.generated import rendered_pages
from tests.docs.manual import DOCS, LINK, PAGES, README, ROOT, TEXTS, anchors, blocks, prose, rows, section
from worker import testing
from worker.cli.commands import group
from worker.core import lifecycle
from worker.core.lifecycle import JOB_CODES, JOB_STATES, OUTPUT_CODES
from worker.core.pacing.estimate import Progress
from worker.operations.troubles import CODES
from worker.settings import Settings
from worker.store.schema import jobs, outputs
from worker.testing import Answers, FetchApi

MOST_WORDS = 1_000  # of the README: it is read to decide whether to try the product
LONGEST_SUMMARY = 82  # characters of a page's first sentence, which `docs` lists
COMMAND = re.compile(r"fetch-worker ([a-z][a-z-]+)(.*)")
CODE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<!\S)--[a-z][a-z-]+")


def _attempt_codes() -> set[str]:
    """Return the codes that the outcome of a download attempt can have."""
    kinds = [kind for kind in vars(lifecycle).values() if isinstance(kind, type)]
    return {code for kind in kinds for code in get_args(get_type_hints(kind).get("code"))}


def _first_cells(text: str) -> list[str]:
    return [name for row in rows(text) for name in re.findall(r"`([^`]+)`", row[0])]


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize("topic", PAGES)
def test_a_page_begins_with_a_title_and_one_sentence(topic: str) -> None:
    title, empty, summary, after = PAGES[topic].split("\n", 4)[:4]

    assert title.startswith("# ")
    assert (empty, after) == ("", "")
    assert summary.endswith(".")
    assert len(summary) <= LONGEST_SUMMARY


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name: str) -> None:
    folder = ROOT if name == "README" else DOCS
    for target in LINK.findall(prose(TEXTS[name])):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        assert not path or (folder / path).exists(), target
        text = (folder / path).read_text(encoding="utf-8") if path else TEXTS[name]
        assert not anchor or anchor in anchors(text), target


def test_every_page_is_in_the_index_and_in_the_readme_with_its_command() -> None:
    topics = set(PAGES) - {"index"}

    assert {link.removesuffix(".md") for link in LINK.findall(PAGES["index"])} == topics
    for topic in topics:
        assert re.search(rf"\]\(worker/docs/{topic}\.md\)[ ,|]+`fetch-worker docs {topic}`", README), topic


def test_pages_link_only_to_files_that_the_wheel_brings() -> None:
    for topic, text in PAGES.items():
        assert [link for link in LINK.findall(text) if link.startswith("..")] == [], topic


def test_the_generated_tables_are_those_of_the_code() -> None:
    for topic, text in rendered_pages().items():
        assert PAGES[topic] == text, f"{topic}.md is out of date: run `python -m tests.docs`"


def test_the_settings_page_has_every_setting_once_with_its_default() -> None:
    settings = rows(PAGES["settings"])
    names = [name for row in settings for name in re.findall(r"`([^`]+)`", row[0])]

    assert sorted(names) == sorted(name.upper() for name in Settings.model_fields)
    for variables, default, meaning in settings:
        assert meaning, variables
        for name in re.findall(r"`([^`]+)`", variables):
            value = Settings.model_fields[name.lower()].default
            if isinstance(value, bool):
                value = "on" if value else "off"
            if isinstance(value, int | float) or (isinstance(value, str) and value and name != "USER_AGENT"):
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                assert f"`{shown}`" in default, f"{name}: {shown}"


def _command_lines(text: str) -> list[str]:
    """Return each line of a shell example and each piece of code in the prose that begins with the command."""
    pieces = CODE.findall(prose(text)) + [line for block in blocks("sh", text) for line in block.splitlines()]
    return [piece for piece in pieces if piece.startswith("fetch-worker ")]


def test_every_command_that_is_named_exists_with_its_options() -> None:
    named = set()
    for name, text in TEXTS.items():
        for line in _command_lines(text):
            match = COMMAND.match(line)
            assert match is not None, line
            command = group.commands[match[1]]
            named.add(match[1])
            options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
            unknown = set(OPTION.findall(match[2].partition("#")[0])) - options - {"--help"}
            assert not unknown or match[1] == "sandbox", f"{name}: {line}"
    assert named == set(group.commands)


def test_every_extra_is_listed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = _first_cells(section("The processes", PAGES["deploying"]))

    assert set(extras) - {"all"} <= set(named)


def test_every_state_of_a_job_is_explained() -> None:
    assert _first_cells(section("States of a job", PAGES["operating"])) == list(JOB_STATES)


def test_every_error_code_of_a_job_is_explained() -> None:
    assert set(_first_cells(section("Error codes of jobs", PAGES["operating"]))) == set(JOB_CODES)


def test_every_error_code_of_an_output_is_explained() -> None:
    assert {"storage", "truncated", "too_large"} <= _attempt_codes() <= set(OUTPUT_CODES)

    assert set(_first_cells(section("Error codes of outputs", PAGES["operating"]))) == set(OUTPUT_CODES)


def test_every_trouble_is_explained_worst_first() -> None:
    assert re.findall(r"^### (.*)$", section("Troubles", PAGES["operating"]), re.MULTILINE) == list(CODES)


def test_the_transitions_name_every_state_and_no_other() -> None:
    transitions = rows(section("States and transitions", PAGES["how-it-works"]))
    ends = {word for before, _, after in transitions for word in (*CODE.findall(before), *CODE.findall(after)[:1])}

    assert ends == set(JOB_STATES)


def test_the_claim_query_names_columns_of_the_table() -> None:
    (query,) = blocks("sql", PAGES["how-it-works"])
    names = set(re.findall(r"(?<![:\w])[a-z]+(?:_[a-z]+)+", query))

    assert names - {"fetch_jobs"} <= set(jobs.c.keys())


def test_the_columns_that_apps_may_read_exist() -> None:
    part = section("Columns that you may read", PAGES["beside-your-app"])

    for name, table in (("fetch_jobs", jobs), ("fetch_outputs", outputs)):
        listed = part.split(f"- `{name}`: ")[1].split("\n- ")[0].split("\n\n")[0]
        assert set(CODE.findall(listed)) <= set(table.c.keys())


def test_every_public_name_of_the_test_kit_is_explained() -> None:
    names = {name for name in vars(Answers) if name not in ("copy", "next")} | set(testing._HOME)
    names |= {name for name in vars(FetchApi) if name not in ("expect", "ready")}
    names |= {"run", "run_all", "advance", "told", "webhooks", "celery", "engine", "now", "api", "worker"}
    mentioned = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", PAGES["test-kit"]))))

    assert {name for name in names if not name.startswith("_")} - mentioned == set()


def test_every_task_is_in_the_table_of_tasks_with_its_queue() -> None:
    app: Any = import_module("worker.app").app
    import_module("worker.tasks")
    queues = {}
    for task, _, queue, _ in rows(section("Tasks", PAGES["how-it-works"])):
        queues.update(dict.fromkeys(CODE.findall(task), queue.strip("`")))

    assert set(queues) == {name for name in app.tasks if name.startswith("worker.")}
    for name, queue in queues.items():
        assert queue == app.conf.task_routes.get(name, {"queue": app.conf.task_default_queue})["queue"]


def test_every_package_has_its_place_in_the_page_for_developers() -> None:
    named = _first_cells(section("Where things are", PAGES["changing-the-code"]))
    there = {path.stem for path in DOCS.parent.iterdir() if path.suffix == ".py" or path.is_dir()}

    assert set(named) == {name for name in there if not name.startswith("_")}


def test_the_fields_of_progress_are_explained() -> None:
    named = _first_cells(section("Show the progress", PAGES["web-apps"]))

    assert set(named) == set(Progress.__dataclass_fields__)
