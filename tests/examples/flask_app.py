"""A web app that generates pictures, with Flask: `flask --app flask_app run`."""

import hashlib
import os
import secrets
from dataclasses import asdict
from typing import Any

from flask import Flask, Response, abort, g, request, send_file
from werkzeug.exceptions import HTTPException

from worker import Job, NotTrackable, OutputMissing, WorkerError, get, get_output, open_output, order
from worker.client.hooks import hook_url
from worker.client.hooks.flask import blueprint

HOOK = os.environ.get("PUBLIC_URL", "http://127.0.0.1:8000") + "/api-hook"  # the URL at which the API calls the handler

app = Flask(__name__)
app.register_blueprint(
    blueprint, url_prefix="/api-hook"
)  # receives the API's webhook, which makes the next poll earlier


@app.errorhandler(HTTPException)
def error(refused: HTTPException) -> tuple[dict[str, str | None], int]:
    """Answer with the reason, for the page."""
    return {"error": refused.description}, refused.code or 500


@app.before_request
def find_visitor() -> None:
    """Give the visitor a name, from a cookie. An app with users takes the user's id."""
    g.secret = request.cookies.get("visitor") or secrets.token_urlsafe()
    g.visitor = hashlib.sha256(g.secret.encode()).hexdigest()[:16]


@app.after_request
def keep_visitor(response: Response) -> Response:
    """Set the cookie."""
    response.set_cookie("visitor", g.secret, httponly=True, samesite="Lax")
    return response


@app.post("/pictures")
def submit() -> dict[str, int]:
    """Order a picture; the workers send the order."""
    prompt = request.get_json().get("prompt") or abort(400, "The prompt is missing.")
    reference = f"{g.visitor}-{secrets.token_urlsafe(9)}"
    payload = {"prompt": prompt, "samples": 1, "webhook": hook_url(HOOK, reference)}
    try:
        return {"id": order("v6/images/text2img", payload, reference=reference)}
    except NotTrackable:
        abort(422, "This can't be ordered.")
    except WorkerError:  # nothing was ordered
        abort(503, "Pictures can't be ordered now. Try again.")


def own_job(job_id: int) -> Job:
    """Return a job of this visitor."""
    job = get(job_id)
    if job is None or not (job.reference or "").startswith(g.visitor):
        abort(404, "There is no such picture.")
    return job


@app.get("/pictures/<int:job_id>")
def picture(job_id: int) -> dict[str, Any]:
    """Return the progress of a job."""
    job = own_job(job_id)
    stored = [output.id for output in job.outputs if output.status == "stored"]
    return asdict(job.progress()) | {"status": job.status, "error": job.error_message, "stored": stored}


@app.get("/outputs/<int:output_id>")
def output(output_id: int) -> Response:
    """Return a stored picture."""
    output = get_output(output_id)
    if output is None:
        abort(404, "There is no such picture.")
    own_job(output.job_id)
    try:
        file = open_output(output_id)
    except OutputMissing:
        abort(404, "This picture is not stored.")
    response = send_file(file, mimetype=output.media_type or "application/octet-stream")
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


@app.get("/")
def page() -> str:
    """Return the page."""
    return PAGE


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Pictures</title>
<style>
body { font: 17px/1.5 system-ui, sans-serif; max-width: 34rem; margin: 3rem auto; padding: 0 1rem; color: #222 }
form { display: flex; gap: .5rem } input { flex: 1 } input, button { font: inherit; padding: .5rem .8rem }
progress { width: 100%; height: 1rem; margin-top: 1.5rem } img { width: 100%; border-radius: .4rem; margin-top: 1rem }
</style></head><body>
<h1>Pictures</h1>
<form><input name="prompt" placeholder="What should it show?" required autofocus><button>Generate</button></form>
<progress max="1" value="0" hidden></progress><p role="status"></p><div id="pictures"></div>
<script>
const [form, bar, message, pictures] = ["form", "progress", "p", "#pictures"].map(name => document.querySelector(name));
const request = async (path, options) => {
  const answer = await fetch(path, options);
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer.json();
};
const within = seconds => seconds === null ? "unknown" : `within ${Math.ceil(seconds)} s`;
const expected = job => `Half of such jobs: ${within(job.median_seconds)}. 90 %: ${within(job.p90_seconds)}.`;
const texts = {
  ordered: job => (job.before ? `${job.before} orders are sent first. ` : "") + expected(job),
  uncertain: () => "The picture service has not confirmed this order. We are looking into it.",
  waiting: expected,
  downloading: () => "Ready, downloading.",
  final: job => job.status === "failed" ? `failed: ${job.error}` : job.status,
};
form.onsubmit = async event => {
  event.preventDefault();
  pictures.replaceChildren(); bar.value = 0; bar.hidden = false; message.textContent = "Sent.";
  try { await show(form.prompt.value) } catch (error) { bar.hidden = true; message.textContent = error.message }
};
const show = async prompt => {
  const headers = {"Content-Type": "application/json"};
  const {id} = await request("/pictures", {method: "POST", headers, body: JSON.stringify({prompt})});
  for (let job = {}; job.phase !== "final"; await new Promise(done => setTimeout(done, 400))) {
    job = await request(`/pictures/${id}`);
    bar.value = Math.max(bar.value, job.fraction);  // never moves back
    message.textContent = texts[job.phase](job);
    for (const output of job.stored.slice(pictures.childElementCount)) {
      pictures.append(Object.assign(new Image(), {src: `/outputs/${output}`, alt: prompt}));
    }
  }
};
</script></body></html>
"""
