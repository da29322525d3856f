"""The page of accounts and hosts: whether they are held, why, since when, and holding or resuming them as a whole."""

from flask import flash, redirect, request, url_for
from flask_admin import BaseView, expose
from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Response

from worker.admin.acts import act_on_breaker
from worker.admin.reading import Reading

MEANING = {
    "hold": "Nothing is asked of it until it is resumed, jobs that come later included. It costs the jobs nothing.",
    "resume": "It is tried at once, also where the API holds it.",
}


class BreakersView(BaseView):
    """Accounts and hosts."""

    def __init__(self, reading: Reading, **arguments: str) -> None:
        self.reading = reading
        super().__init__(**arguments)

    @expose("/")
    def index(self) -> str:
        """All of them."""
        page: str = self.render("breakers.html", states=self.reading.breakers())
        return page

    @expose("/act/", methods=("POST",))
    def act(self) -> str | Response:
        """Asks first; holds or resumes one once the form says that this was read."""
        name, scope, breaker = (request.form.get(field, "") for field in ("action", "scope", "name"))
        known = {(state.breaker.scope, state.breaker.name) for state in self.reading.breakers()}
        found = next((one for one in known if one == (scope, breaker)), None)
        if found is None or name not in MEANING:
            raise NotFound("there is no such account or host")
        if request.form.get("confirmed") == "yes":
            flash(act_on_breaker(name, *found), "success")
            return redirect(url_for("gates.index"))
        page: str = self.render(
            "confirm.html",
            title=f"{name.title()} the {scope} {breaker}?",
            meaning=MEANING[name],
            button=name.title(),
            rows=[("scope", scope, ""), ("name", breaker, f"{scope} {breaker}")],
            target=url_for("gates.act"),
            chosen=name,
            back=url_for("gates.index"),
        )
        return page
