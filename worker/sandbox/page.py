"""HTML page at the root of the stand-in. Pure: jobs in, HTML out."""

from collections.abc import Sequence
from html import escape

from worker.sandbox.charges import Charges
from worker.sandbox.jobs import SandboxJob

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{margin:0 0 .3rem;font-size:1.6rem}pre{padding:.8rem 1rem;border-radius:8px;background:#8882;overflow-x:auto}
.jobs{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));padding:0;list-style:none}
.jobs li{border:1px solid #8884;border-radius:10px;padding:.8rem}.jobs p{margin:0 0 .5rem;overflow-wrap:anywhere}
.jobs img{width:7.2rem;height:7.2rem;border-radius:6px;margin:0 .3rem .3rem 0;background:#8882}
small{opacity:.7}
"""


def render_page(jobs: Sequence[SandboxJob], charges: Charges, *, now: float, root_url: str) -> bytes:
    """Return a page that explains the stand-in and shows counts of the orders and the newest jobs with thumbnails."""
    cards = "".join(_card(job, now) for job in jobs) or "<li>None yet. Send one with the line above.</li>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Stand-in of the image API</title>
<style>{_STYLE}</style></head><body>
<h1>Stand-in of the image API</h1>
<p>It answers like the hosted API and costs nothing. A job is accepted and takes a while. Its pictures are drawn here
from the words of the prompt; other families produce sounds, videos, models and texts.
Try sunset, sea, forest, mountain, night, city, desert, space, meadow or silk.</p>
<pre>curl -H 'Content-Type: application/json' -d '{{"key": "THE KEY", "prompt": "lake at dawn", "samples": 2}}' \\
  {escape(root_url)}/api/v3/text2img
curl -H 'Content-Type: application/json' -d '{{"key": "THE KEY"}}' {escape(root_url)}/api/v3/fetch/THE-ID</pre>
<p>Orders: {charges.charged} charged, {charges.refused} refused, {charges.double} double; at most
{charges.most_queued} queued at once.</p>
<h2>Latest jobs</h2>
<ul class="jobs">{cards}</ul>
</body></html>
""".encode("utf-8", "replace")


def _card(job: SandboxJob, now: float) -> str:
    wait = f", {job.ready_at - now:.0f} s to go" if now < job.ready_at else ""
    pictures = ""
    if job.ready(now):
        pictures = "".join(
            f'<a href="/thumbs/{name}?full">{_output_html(name, index)}</a> ' for index, name in enumerate(job.files)
        )
    summary = f"{job.id} of {job.family.store}: {job.state(now)}{wait}"
    return f"<li><p>{escape(job.prompt)}</p><p><small>{escape(summary)}</small></p>{pictures}</li>"


def _output_html(name: str, index: int) -> str:
    if name.endswith(".png"):
        return f'<img loading="lazy" src="/thumbs/{name}" alt="picture {index + 1}">'
    return f"output {index + 1} (.{name.rpartition('.')[2]})"
