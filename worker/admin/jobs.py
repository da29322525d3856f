"""The pages of jobs: the list with its filters, one job with its outputs and events, and the actions on jobs."""

from collections.abc import Callable, Sequence
from typing import Any

from flask import flash, g, redirect, request, url_for
from flask_admin import expose
from flask_admin.actions import action
from flask_admin.form import BaseForm
from flask_admin.model import BaseModelView
from sqlalchemy import Row, Table
from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Response

from worker.admin.access import own_path
from worker.admin.confirmation import ask_for_confirmation
from worker.admin.formatting import moment
from worker.admin.job_actions import apply_to_jobs, apply_to_matching, attach_remote, count_changeable, job_ids
from worker.admin.reader import AdminReader
from worker.client.job_actions import FILTER_ACTIONS, JOB_ACTIONS
from worker.client.selection import filter_options
from worker.core.humanize import format_count
from worker.core.lifecycle import FINAL_STATES, JOB_CODES, JOB_STATES, ORDER_STATES, OUTPUT_CODES
from worker.store.jobs import MAX_ID
from worker.store.reports.known_names import known_accounts, known_kinds, unknown_name
from worker.store.reports.pages import Page
from worker.store.reports.pages import jobs_page as browse_jobs
from worker.store.reports.search import JobFilter
from worker.store.schema import jobs

PAGE_ROWS = 50
MAX_TEXT = 255
MAX_LATE = 10 * 365 * 86_400
LATE = ((10, "10 s"), (60, "1 min"), (600, "10 min"), (3_600, "1 h"))
LIST_PARAMETERS = frozenset(
    {"search", "status", "account", "kind", "code", "output_code", "late", "held", "host", "job", "receiver"}
)
FIELDS = (
    ("id", "remote_id", "account", "kind", "status", "reference", "priority", "polls", "fetch_host"),
    ("submitted_at", "tracked_at", "asked_at", "ready_at", "completed_at", "deadline_at", "due_at", "held_at"),
    ("eta", "on_done", "claim_holder", "error_code"),
)  # fmt: skip


class RowsView(BaseModelView):
    """A list of the rows of a table. There are no URLs to create, edit or delete rows."""

    can_create = can_edit = can_delete = False
    can_view_details = True
    column_sortable_list = ()
    page_size = PAGE_ROWS
    table: Table

    def __init__(self, reader: AdminReader, **arguments: Any) -> None:
        self.reader = reader
        super().__init__(self.table, **arguments)

    @classmethod
    def keep_urls(cls, *methods: str) -> None:
        """Keep the URLs of these methods and remove the other URLs of Flask-Admin."""
        cls._urls = [url for url in cls._urls if url[1] in methods]

    def get_pk_value(self, model: Row[Any]) -> int:
        """Return the id of a row."""
        return int(model.id)

    def scaffold_list_columns(self) -> Sequence[str]:
        """Return the columns of the table."""
        return tuple(self.table.c.keys())

    def scaffold_sortable_columns(self) -> dict[str, str]:
        """Return no columns: a table of millions of rows has one order."""
        return {}

    def init_search(self) -> bool:
        """Return `False`: the template has its own search."""
        return False

    def scaffold_form(self) -> Any:
        """Return an empty form: nothing is edited."""
        return BaseForm


def _action_method(name: str) -> Callable[["JobsView", Sequence[str]], str | None]:
    """Return the method that Flask-Admin calls for an action."""

    @action(name, JOB_ACTIONS[name].label)
    def act(view: "JobsView", ids: Sequence[str]) -> str | None:
        return view.act(name, ids)

    method: Callable[[JobsView, Sequence[str]], str | None] = act
    return method


class JobsView(RowsView):
    """The list of jobs, newest first."""

    table = jobs
    list_template = "jobs.html"
    details_template = "job.html"
    column_list = (
        "id", "remote_id", "account", "kind", "status", "polls", "submitted_at", "age", "error_code", "reference",
    )  # fmt: skip

    def get_list(self, *_: Any, **__: Any) -> tuple[None, Sequence[Row[Any]]]:
        """Return one page of the query in the URL. The total is not counted."""
        job_filter = requested_filter()
        with self.reader.connection() as (connection, now):
            problem = unknown_name(connection, job_filter, self.reader.settings)
            page = Page((), None)
            if problem is None:
                page = browse_jobs(connection, job_filter, text=text("search"), before=before_id(), limit=PAGE_ROWS)
            self._template_args.update(accounts=known_accounts(connection), kinds=known_kinds(connection))
        self._template_args.update(
            listing=page,
            problem=problem,
            now=now,
            query=request.args,
            states=JOB_STATES,
            codes=JOB_CODES,
            late_options=LATE,
            output_codes=OUTPUT_CODES,
            job_actions=JOB_ACTIONS.values(),
            filter_actions=[] if problem or text("search") or job_filter == JobFilter() else FILTER_ACTIONS,
        )
        return None, page.rows

    @expose("/details/")
    def details_view(self) -> str:
        """Show one job."""
        page = self.reader.job(requested_id())
        if page is None:
            raise NotFound("there is no such job")
        hidden = "due_at" if page.job.held_at is not None else ""
        fields = [(name, shown(getattr(page.job, name))) for group in FIELDS for name in group if name != hidden]
        possible_actions = possible(page.job, page.events)
        actions = [job_action for job_action in JOB_ACTIONS.values() if job_action.name in possible_actions]
        return str(self.render(self.details_template, page=page, fields=fields, actions=actions))

    @expose("/matching/", methods=("POST",))
    def matching(self) -> str | Response:
        """Ask for confirmation, or apply an action to all jobs that match the filter of the URL."""
        job_filter, name = requested_filter(), request.form.get("action", "")
        action = next((action for action in FILTER_ACTIONS if action == name), None)
        if action is None:
            raise NotFound("there is no such action")
        back = url_for("jobs.index_view", **list_parameters())
        if job_filter == JobFilter():
            flash("Choose a filter first: without one, all jobs would change.", "warning")
        elif request.form.get("confirmed") == "yes":
            flash(apply_to_matching(action, job_filter, self.reader.settings, who=g.login.name), "success")
        else:
            with self.reader.connection() as (connection, _):
                problem = unknown_name(connection, job_filter, self.reader.settings)
                count = "" if problem else count_changeable(connection, action, job_filter)
            if count:
                label, target = f"{JOB_ACTIONS[action].label} {count}", url_for("jobs.matching", **list_parameters())
                rows = [("matching", "yes", f"all jobs that match: {filter_options(job_filter)}")]
                return ask_for_confirmation(
                    self, name, target, rows, meaning=JOB_ACTIONS[action].meaning, button=label, back=back
                )
            flash(f"No matching job can be {JOB_ACTIONS[action].done}.", "warning")
        return redirect(back)

    @expose("/attach/", methods=("POST",))
    def attach(self) -> Response:
        """Name the remote job of an uncertain order."""
        job_id = next(iter(job_ids([request.form.get("rowid", "")])), 0)
        attached, message = attach_remote(job_id, request.form.get("remote_id", "").strip(), who=g.login.name)
        flash(message, "success" if attached else "warning")
        return redirect(url_for("jobs.details_view", id=job_id))

    def act(self, name: str, ids: Sequence[str]) -> str | None:
        """Ask for confirmation, or apply the action if the form is confirmed."""
        job_action, selected = JOB_ACTIONS[name], job_ids(ids)
        if not selected:
            flash("No job was selected.", "warning")
        elif request.form.get("confirmed") != "yes":
            these = "this job" if len(selected) == 1 else f"these {len(selected):,} jobs"
            return ask_for_confirmation(
                self,
                name,
                url_for("jobs.action_view"),
                [("rowid", number, f"job {number}") for number in selected],
                title=f"{job_action.label} {these}?",
                meaning=job_action.meaning,
                button=f"{job_action.label} {format_count(len(selected), 'job')}",
                back=own_path(request.form.get("url", "")),
            )
        else:
            flash(apply_to_jobs(job_action, selected, who=g.login.name), "success")
        return None

    retry, cancel, hold, resume, notify = map(_action_method, ("retry", "cancel", "hold", "resume", "notify"))


JobsView.keep_urls("index_view", "details_view", "action_view", "matching", "attach")


def list_parameters() -> dict[str, Any]:
    """Return the parameters of the URL without the page. They reach `url_for` only as values."""
    return {name: value for name, value in request.args.items() if name in LIST_PARAMETERS and value}


def requested_filter() -> JobFilter:
    """Return the filter of the URL."""
    return JobFilter(
        statuses=_values(one_of("status", JOB_STATES)),
        accounts=_values(text("account")),
        kinds=_values(text("kind")),
        codes=_values(text("code")),
        output_codes=_values(text("output_code")),
        held=request.args.get("held") == "yes",
        late=min(number("late") or 0, MAX_LATE) or None,
    )


def _values(value: str) -> tuple[str, ...]:
    return (value,) if value else ()


def text(name: str) -> str:
    """Return a parameter of the URL, limited to what a column can hold."""
    plain = "".join(letter for letter in request.args.get(name, "") if letter.isprintable())
    return plain.strip()[:MAX_TEXT].encode(errors="ignore").decode()


def one_of(name: str, values: Sequence[str]) -> str:
    """Return a parameter of the URL if it is one of the given values."""
    value = text(name)
    return value if value in values else ""


def number(name: str) -> int | None:
    """Return a parameter of the URL as a whole number, or `None`."""
    value = request.args.get(name, "")
    is_number = value.isascii() and value.isdecimal() and len(value) < 20
    return int(value) if is_number and int(value) <= MAX_ID else None


def before_id() -> int | None:
    """Return the id that the page of the list starts before."""
    return number("before")


def requested_id() -> int:
    """Return the id in the URL. Raises NotFound."""
    row_id = number("id")
    if not row_id:
        raise NotFound("this is not an id")
    return row_id


def shown(value: Any) -> Any:
    """Format a value of a row for a page."""
    return moment(value) if hasattr(value, "isoformat") else "" if value is None else value


def possible(job: Row[Any], events: Sequence[Row[Any]]) -> set[str]:
    """Return the actions that can change a job in its state, with its webhook events."""
    is_final = job.status in FINAL_STATES
    has_webhook = bool(events) or (is_final and job.webhook_url is not None)
    actions = {"notify"} if has_webhook else set()
    if is_final:
        return actions | ({"retry"} if job.status in ("failed", "expired") else set())
    if job.status in ORDER_STATES:
        return actions | {"cancel"} | ({"retry"} if job.status == "uncertain" else set())
    can_be_held = job.status == "pending" and job.held_at is None
    return actions | {"cancel", "resume"} | ({"hold"} if can_be_held else set())
