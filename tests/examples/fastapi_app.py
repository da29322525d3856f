"""A web app that generates pictures, with FastAPI: `uvicorn fastapi_app:app`."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from worker import Job, NotTrackable, OutputMissing, WorkerError, get, get_output, open_output, order
from worker.client.hooks import hook_url
from worker.client.hooks.fastapi import router

HOOK = os.environ.get("PUBLIC_URL", "http://127.0.0.1:8000") + "/api-hook"  # the URL at which the API calls the handler

app = FastAPI()
app.mount("/api-hook", router)  # receives the API's webhook, which makes the next poll earlier


@app.exception_handler(HTTPException)
def error(_: Request, refused: HTTPException) -> JSONResponse:
    """Answer with the reason, for the page."""
    return JSONResponse({"error": refused.detail}, refused.status_code)


def visitor(request: Request, response: Response) -> str:
    """Return a name for the visitor, from a cookie. An app with users takes the user's id."""
    secret = request.cookies.get("visitor") or secrets.token_urlsafe()
    response.set_cookie("visitor", secret, httponly=True, samesite="lax")
    return hashlib.sha256(secret.encode()).hexdigest()[:16]


Visitor = Annotated[str, Depends(visitor)]


@app.post("/pictures")
def submit(prompt: Annotated[str, Body(embed=True)], visitor: Visitor) -> dict[str, int]:
    """Order a picture; the workers send the order. A plain `def`: FastAPI runs it in a thread."""
    reference = f"{visitor}-{secrets.token_urlsafe(9)}"
    payload = {"prompt": prompt, "samples": 1, "webhook": hook_url(HOOK, reference)}
    try:
        return {"id": order("v6/images/text2img", payload, reference=reference)}
    except NotTrackable:
        raise HTTPException(422, "This can't be ordered.") from None
    except WorkerError:  # nothing was ordered
        raise HTTPException(503, "Pictures can't be ordered now. Try again.") from None


def own_job(job_id: int, visitor: str) -> Job:
    """Return a job of this visitor."""
    job = get(job_id)
    if job is None or not (job.reference or "").startswith(visitor):
        raise HTTPException(404, "There is no such picture.")
    return job


@app.get("/pictures/{job_id}")
def picture(job_id: int, visitor: Visitor) -> dict[str, Any]:
    """Return the progress of a job."""
    job = own_job(job_id, visitor)
    stored = [output.id for output in job.outputs if output.status == "stored"]
    return asdict(job.progress()) | {"status": job.status, "error": job.error_message, "stored": stored}


@app.get("/outputs/{output_id}")
def output(output_id: int, visitor: Visitor) -> StreamingResponse:
    """Return a stored picture."""
    output = get_output(output_id)
    if output is None:
        raise HTTPException(404, "There is no such picture.")
    own_job(output.job_id, visitor)
    try:
        file = open_output(output_id)
    except OutputMissing:
        raise HTTPException(404, "This picture is not stored.") from None

    def chunks() -> Iterator[bytes]:
        with file:
            while chunk := file.read(65_536):
                yield chunk

    headers = {"X-Content-Type-Options": "nosniff"}
    return StreamingResponse(chunks(), media_type=output.media_type or "application/octet-stream", headers=headers)


@app.get("/")
def page() -> HTMLResponse:
    """Return the page."""
    return HTMLResponse(PAGE)


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
