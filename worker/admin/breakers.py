"""The page of accounts and hosts: shows their holds, and holds or resumes them."""

from flask import flash, g, redirect, request, url_for
from flask_admin import BaseView, expose
from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Response

from worker.admin.confirmation import ask_for_confirmation
from worker.admin.job_actions import apply_to_breaker
from worker.admin.reader import AdminReader

MEANING = {
    "hold": "No request is sent until it is resumed, also for future jobs. Held jobs do not expire.",
    "resume": "It is tried at once, also if the API refused it.",
}


class BreakersView(BaseView):
    """The page of accounts and hosts."""

    def __init__(self, reader: AdminReader, **arguments: str) -> None:
        self.reader = reader
        super().__init__(**arguments)

    @expose("/")
    def index(self) -> str:
        """Show all accounts and hosts."""
        return str(self.render("breakers.html", states=self.reader.breakers()))

    @expose("/act/", methods=("POST",))
    def act(self) -> str | Response:
        """Ask for confirmation, or hold or resume an account or host if the form is confirmed."""
        name, scope, breaker = (request.form.get(field, "") for field in ("action", "scope", "name"))
        keys = {(state.breaker.scope, state.breaker.name) for state in self.reader.breakers()}
        existing = next((key for key in keys if key == (scope, breaker)), None)
        if existing is None or name not in MEANING:
            raise NotFound("there is no such account or host")
        if request.form.get("confirmed") == "yes":
            flash(apply_to_breaker(name, *existing, who=g.login.name), "success")
            return redirect(url_for("gates.index"))
        rows = [("scope", scope, ""), ("name", breaker, f"{scope} {breaker}")]
        return ask_for_confirmation(
            self,
            name,
            url_for("gates.act"),
            rows,
            title=f"{name.title()} the {scope} {breaker}?",
            meaning=MEANING[name],
            button=name.title(),
            back=url_for("gates.index"),
        )
