"""A web app that has pictures painted, with FastAPI: `uvicorn fastapi_app:app`."""

import os
import secrets
from dataclasses import asdict
from typing import Annotated, Any

import requests
from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import HTMLResponse, Response

from worker import get, open_output, track
from worker.client.hooks import hook_url
from worker.client.hooks.fastapi import router

HOOK = os.environ.get("PUBLIC_URL", "http://127.0.0.1:8000") + "/api-hook"  # where the API finds the handler

app = FastAPI()
app.mount("/api-hook", router)  # a hint of the API's own, which saves a wait


@app.post("/pictures")
def submit(prompt: Annotated[str, Body(embed=True)]) -> dict[str, int]:
    """Hands a prompt to the API, and what it answered to fetch-worker. A plain `def`: it runs in a thread."""
    reference = secrets.token_urlsafe(9)
    order = {"key": os.environ["SD_API_KEY"], "prompt": prompt, "samples": 1, "webhook": hook_url(HOOK, reference)}
    answer = requests.post(f"{os.environ['SD_API_URL']}/text2img", json=order, timeout=30).json()
    return {"id": track(answer, reference=reference)}


@app.get("/pictures/{job_id}")
def picture(job_id: int) -> dict[str, Any]:
    """How far it is. An app with users looks here whose it is."""
    job = get(job_id)
    if job is None:
        raise HTTPException(404)
    stored = [output.id for output in job.outputs if output.status == "stored"]
    return asdict(job.progress()) | {"status": job.status, "stored": stored}


@app.get("/outputs/{output_id}")
def output(output_id: int) -> Response:
    """The picture itself, from wherever it is stored."""
    with open_output(output_id) as file:
        return Response(file.read(), media_type="image/png")


@app.get("/")
def page() -> HTMLResponse:
    """The page."""
    return HTMLResponse(PAGE)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Pictures</title>
<style>
body { font: 17px/1.5 system-ui, sans-serif; max-width: 34rem; margin: 3rem auto; padding: 0 1rem; color: #222 }
form { display: flex; gap: .5rem } input { flex: 1 } input, button { font: inherit; padding: .5rem .8rem }
progress { width: 100%; height: 1rem; margin-top: 1.5rem } img { width: 100%; border-radius: .4rem; margin-top: 1rem }
</style></head><body>
<h1>Pictures</h1>
<form><input name="prompt" placeholder="What shall it show?" required autofocus><button>Paint it</button></form>
<progress max="1" value="0" hidden></progress><p role="status"></p><div id="pictures"></div>
<script>
const [form, bar, said, pictures] = ["form", "progress", "p", "#pictures"].map(one => document.querySelector(one));
const asked = async (path, options) => (await fetch(path, options)).json();
const within = seconds => seconds === null ? "nobody knows when" : `within ${Math.ceil(seconds)} s`;
form.onsubmit = async event => {
  event.preventDefault();
  pictures.replaceChildren(); bar.value = 0; bar.hidden = false; said.textContent = "Sent.";
  const body = JSON.stringify({prompt: form.prompt.value});
  const {id} = await asked("/pictures", {method: "POST", headers: {"Content-Type": "application/json"}, body});
  for (let job = {}; job.phase !== "final"; await new Promise(done => setTimeout(done, 400))) {
    job = await asked(`/pictures/${id}`);
    bar.value = Math.max(bar.value, job.fraction);  // a bar never goes back
    said.textContent = job.phase === "waiting" ? `Even chances: ${within(job.median_seconds)}. `
      + `Nine of ten: ${within(job.p90_seconds)}.` : job.phase === "downloading" ? "Painted, on its way." : job.status;
    for (const output of job.stored.slice(pictures.childElementCount)) {
      pictures.append(Object.assign(new Image(), {src: `/outputs/${output}`, alt: form.prompt.value}));
    }
  }
};
</script></body></html>
"""
