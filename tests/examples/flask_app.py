"""A web app that generates pictures, with Flask: `flask --app flask_app run`."""

import os
import secrets
from dataclasses import asdict
from typing import Any

import requests
from flask import Flask, Response, abort, request, send_file

from worker import get, open_output, track
from worker.client.hooks import hook_url
from worker.client.hooks.flask import blueprint

HOOK = os.environ.get("PUBLIC_URL", "http://127.0.0.1:8000") + "/api-hook"  # the URL at which the API calls the handler

app = Flask(__name__)
app.register_blueprint(
    blueprint, url_prefix="/api-hook"
)  # receives the API's webhook, which makes the next poll earlier


@app.post("/pictures")
def submit() -> dict[str, int]:
    """Submit a prompt to the API and track its answer."""
    prompt = request.get_json()["prompt"]
    reference = secrets.token_urlsafe(9)
    order = {"key": os.environ["SD_API_KEY"], "prompt": prompt, "samples": 1, "webhook": hook_url(HOOK, reference)}
    answer = requests.post(f"{os.environ['SD_API_URL']}/text2img", json=order, timeout=30).json()
    return {"id": track(answer, reference=reference)}


@app.get("/pictures/<int:job_id>")
def picture(job_id: int) -> dict[str, Any]:
    """Return the progress of a job. An app with users must check here who owns it."""
    job = get(job_id)
    if job is None:
        abort(404)
    stored = [output.id for output in job.outputs if output.status == "stored"]
    return asdict(job.progress()) | {"status": job.status, "stored": stored}


@app.get("/outputs/<int:output_id>")
def output(output_id: int) -> Response:
    """Return a stored picture."""
    return send_file(open_output(output_id), mimetype="image/png")


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
const request = async (path, options) => (await fetch(path, options)).json();
const within = seconds => seconds === null ? "unknown" : `within ${Math.ceil(seconds)} s`;
form.onsubmit = async event => {
  event.preventDefault();
  pictures.replaceChildren(); bar.value = 0; bar.hidden = false; message.textContent = "Sent.";
  const body = JSON.stringify({prompt: form.prompt.value});
  const {id} = await request("/pictures", {method: "POST", headers: {"Content-Type": "application/json"}, body});
  for (let job = {}; job.phase !== "final"; await new Promise(done => setTimeout(done, 400))) {
    job = await request(`/pictures/${id}`);
    bar.value = Math.max(bar.value, job.fraction);  // never moves back
    message.textContent = job.phase === "waiting" ? `Half of such jobs: ${within(job.median_seconds)}. `
      + `90 %: ${within(job.p90_seconds)}.` : job.phase === "downloading" ? "Ready, downloading." : job.status;
    for (const output of job.stored.slice(pictures.childElementCount)) {
      pictures.append(Object.assign(new Image(), {src: `/outputs/${output}`, alt: form.prompt.value}));
    }
  }
};
</script></body></html>
"""
