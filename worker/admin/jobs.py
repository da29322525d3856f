"""The pages of jobs: the list with its filters, one job with all that belongs to it, and what can be done to them."""

from collections.abc import Sequence
from typing import Any

from flask import flash, request, url_for
from flask_admin import expose
from flask_admin.actions import action
from flask_admin.form import BaseForm
from flask_admin.model import BaseModelView
from sqlalchemy import Row, Table
from werkzeug.exceptions import NotFound

from worker.admin.acts import ACTS, act_on, job_ids
from worker.admin.door import own_path
from worker.admin.reading import Reading
from worker.admin.wording import counted, moment
from worker.core.lifecycle import FINAL_STATES, JOB_STATES
from worker.store.jobs import MAX_ID
from worker.store.reports.pages import jobs_page as browse_jobs
from worker.store.reports.pages import known_accounts, known_kinds
from worker.store.reports.search import JobFilter
from worker.store.schema import jobs

PAGE_ROWS = 50
TEXT_MOST = 255
LATE_MOST = 10 * 365 * 86_400
CODES = ("api_error", "api_failed", "expired", "no_output", "not_found", "output_failed", "unwritable", "worker_crash")
LATE = ((10, "10 s"), (60, "1 min"), (600, "10 min"), (3_600, "1 h"))
FIELDS = (
    ("id", "remote_id", "account", "kind", "status", "reference", "priority", "polls", "fetch_host"),
    ("submitted_at", "tracked_at", "asked_at", "ready_at", "completed_at", "deadline_at", "due_at", "held_at"),
    ("eta", "on_done", "claim_holder", "error_code"),
)  # fmt: skip


class RowsView(BaseModelView):
    """A list of rows of one of the worker's tables. Nothing is made, edited or deleted: those addresses don't exist."""

    can_create = can_edit = can_delete = False
    can_view_details = True
    column_sortable_list = ()
    page_size = PAGE_ROWS
    table: Table

    def __init__(self, reading: Reading, **arguments: Any) -> None:
        self.reading = reading
        super().__init__(self.table, **arguments)

    @classmethod
    def only_these(cls, *methods: str) -> None:
        """Keeps the addresses of these methods and drops the library's others."""
        cls._urls = [found for found in cls._urls if found[1] in methods]

    def get_pk_value(self, model: Row[Any]) -> int:
        """The row's id."""
        return int(model.id)

    def scaffold_list_columns(self) -> Sequence[str]:
        """The columns as they are."""
        return tuple(self.table.c.keys())

    def scaffold_sortable_columns(self) -> dict[str, str]:
        """None: a list of millions has one order."""
        return {}

    def init_search(self) -> bool:
        """The template has a search of its own."""
        return False

    def scaffold_form(self) -> Any:
        """An empty one: nothing is edited."""
        return BaseForm


class JobsView(RowsView):
    """Jobs, newest first."""

    table = jobs
    list_template = "jobs.html"
    details_template = "job.html"
    column_list = (
        "id", "remote_id", "account", "kind", "status", "polls", "submitted_at", "age", "error_code", "reference",
    )  # fmt: skip

    def get_list(self, *_: Any, **__: Any) -> tuple[None, Sequence[Row[Any]]]:
        """One page, by what the address asks for; how many there are in all nobody counts."""
        wanted = wanted_jobs()
        with self.reading.connection() as (connection, now):
            page = browse_jobs(connection, wanted, text=text("search"), before=before_id(), limit=PAGE_ROWS)
            self._template_args.update(accounts=known_accounts(connection), kinds=known_kinds(connection))
        self._template_args.update(
            found=page, now=now, asked=request.args, states=JOB_STATES, codes=CODES, lates=LATE, acts=ACTS.values()
        )
        return None, page.rows

    @expose("/details/")
    def details_view(self) -> str:
        """One job."""
        found = self.reading.job(asked_id())
        if found is None:
            raise NotFound("there is no such job")
        hidden = "due_at" if found.job.held_at is not None else ""
        fields = [(name, shown(getattr(found.job, name))) for group in FIELDS for name in group if name != hidden]
        acts = [act for act in ACTS.values() if act.name in possible(found.job)]
        page: str = self.render(self.details_template, found=found, fields=fields, acts=acts)
        return page

    def _act(self, name: str, ids: Sequence[str]) -> str | None:
        """Asks first; does it once the form says that this was read."""
        act, wanted = ACTS[name], job_ids(ids)
        if not wanted:
            flash("No job was chosen.", "warning")
        elif request.form.get("confirmed") != "yes":
            page: str = self.render(
                "confirm.html",
                title=f"{act.label} {'this job' if len(wanted) == 1 else f'these {len(wanted):,} jobs'}?",
                meaning=act.meaning,
                button=f"{act.label} {counted(len(wanted), 'job')}",
                rows=[("rowid", number, f"job {number}") for number in wanted],
                target=url_for("jobs.action_view"),
                chosen=name,
                back=own_path(request.form.get("url", "")),
            )
            return page
        else:
            flash(act_on(act, wanted), "success")
        return None

    @action("retry", "Retry")
    def retry(self, ids: Sequence[str]) -> str | None:
        """Takes failed and expired jobs up again."""
        return self._act("retry", ids)

    @action("cancel", "Cancel")
    def cancel(self, ids: Sequence[str]) -> str | None:
        """Ends jobs."""
        return self._act("cancel", ids)

    @action("hold", "Hold")
    def hold(self, ids: Sequence[str]) -> str | None:
        """Holds pending jobs."""
        return self._act("hold", ids)

    @action("resume", "Resume")
    def resume(self, ids: Sequence[str]) -> str | None:
        """Has jobs go on at once, whatever keeps them."""
        return self._act("resume", ids)


JobsView.only_these("index_view", "details_view", "action_view")


def wanted_jobs() -> JobFilter:
    """What the address asks for."""
    return JobFilter(
        statuses=_any_or(one_of("status", JOB_STATES)),
        accounts=_any_or(text("account")),
        kinds=_any_or(text("kind")),
        codes=_any_or(text("code")),
        held=request.args.get("held") == "yes",
        late=min(number("late") or 0, LATE_MOST) or None,
    )


def _any_or(word: str) -> tuple[str, ...]:
    return (word,) if word else ()


def text(name: str) -> str:
    """A word of the address, without what no column could hold."""
    plain = "".join(letter for letter in request.args.get(name, "") if letter.isprintable())
    return plain.strip()[:TEXT_MOST].encode(errors="ignore").decode()


def one_of(name: str, known: Sequence[str]) -> str:
    """A word of the address, if it is one of those known."""
    word = text(name)
    return word if word in known else ""


def number(name: str) -> int | None:
    """A whole number of the address, or None."""
    word = request.args.get(name, "")
    plain = word.isascii() and word.isdecimal() and len(word) < 20
    return int(word) if plain and int(word) <= MAX_ID else None


def before_id() -> int | None:
    """Where the list goes on."""
    return number("before")


def asked_id() -> int:
    """The row that is asked for. Raises NotFound."""
    found = number("id")
    if not found:
        raise NotFound("that is no id")
    return found


def shown(value: Any) -> Any:
    """A value of a row as a page has it."""
    return moment(value) if hasattr(value, "isoformat") else "" if value is None else value


def possible(job: Row[Any]) -> set[str]:
    """What can be done to a job in its present state."""
    if job.status in FINAL_STATES:
        return {"retry"} if job.status in ("failed", "expired") else set()
    if job.status == "downloading":
        return {"cancel", "resume"}
    return {"cancel", "resume"} | ({"hold"} if job.held_at is None else set())
