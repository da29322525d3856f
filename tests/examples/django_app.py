"""A web app that generates pictures, with Django: `python django_app.py runserver`."""

import hashlib
import json
import os
import secrets
import sys
from dataclasses import asdict

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import FileResponse, HttpRequest, HttpResponse, JsonResponse
from django.urls import include, path

from worker import Job, NotTrackable, OutputMissing, WorkerError, get, get_output, open_output, order
from worker.client.hooks import hook_url

HOOK = os.environ.get("PUBLIC_URL", "http://127.0.0.1:8000") + "/api-hook"  # the URL at which the API calls the handler


def visitor(request: HttpRequest) -> str:
    """Return a name for the visitor, from a cookie that `page` sets. An app with users takes the user's id."""
    return hashlib.sha256(request.COOKIES.get("visitor", "").encode()).hexdigest()[:16]


def error(text: str, status: int) -> JsonResponse:
    """Answer with the reason, for the page."""
    return JsonResponse({"error": text}, status=status)


def submit(request: HttpRequest) -> JsonResponse:
    """Order a picture; the workers send the order."""
    try:
        prompt = json.loads(request.body)["prompt"]
    except (ValueError, KeyError, TypeError):
        return error("The prompt is missing.", 400)
    reference = f"{visitor(request)}-{secrets.token_urlsafe(9)}"
    payload = {"prompt": prompt, "samples": 1, "webhook": hook_url(HOOK, reference)}
    try:
        return JsonResponse({"id": order("v6/images/text2img", payload, reference=reference)})
    except NotTrackable:
        return error("This can't be ordered.", 422)
    except WorkerError:  # nothing was ordered
        return error("Pictures can't be ordered now. Try again.", 503)


def own_job(request: HttpRequest, job_id: int) -> Job | None:
    """Return a job of this visitor, or None."""
    job = get(job_id)
    return job if job is not None and (job.reference or "").startswith(visitor(request)) else None


def picture(request: HttpRequest, job_id: int) -> JsonResponse:
    """Return the progress of a job."""
    job = own_job(request, job_id)
    if job is None:
        return error("There is no such picture.", 404)
    stored = [output.id for output in job.outputs if output.status == "stored"]
    return JsonResponse(asdict(job.progress()) | {"status": job.status, "error": job.error_message, "stored": stored})


def output(request: HttpRequest, output_id: int) -> HttpResponse:
    """Return a stored picture."""
    output = get_output(output_id)
    if output is None or own_job(request, output.job_id) is None:
        return error("There is no such picture.", 404)
    try:
        file = open_output(output_id)
    except OutputMissing:
        return error("This picture is not stored.", 404)
    headers = {"X-Content-Type-Options": "nosniff"}
    return FileResponse(file, content_type=output.media_type or "application/octet-stream", headers=headers)


def page(request: HttpRequest) -> HttpResponse:
    """Return the page, and give the visitor a cookie."""
    response = HttpResponse(PAGE)
    secret = request.COOKIES.get("visitor") or secrets.token_urlsafe()
    response.set_cookie("visitor", secret, httponly=True, samesite="Lax")
    return response


urlpatterns = [
    path("", page),
    path("pictures", submit),
    path("pictures/<int:job_id>", picture),
    path("outputs/<int:output_id>", output),
    path(
        "api-hook/", include("worker.client.hooks.django")
    ),  # receives the API's webhook, which makes the next poll earlier
]

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

if __name__ == "__main__":
    settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1"], SECRET_KEY=secrets.token_hex())
    execute_from_command_line(sys.argv)
