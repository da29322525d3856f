"""The contact sheet: an HTML page with all pictures, their timing and their files. Pure: jobs in, HTML out."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from worker.demo.display import DemoJob, DemoOutput, mean, seconds_text
from worker.storage.local import path_of

_STYLE = """
:root{color-scheme:light dark;--page:#f6f4f0;--card:#fff;--ink:#22201d;--soft:#77716a;--line:#e5e0d8;--mark:#2f7d5b}
@media(prefers-color-scheme:dark){
:root{--page:#131417;--card:#1c1e22;--ink:#eceae6;--soft:#9a968f;--line:#2c2f35;--mark:#6cc7a0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:92rem;padding:clamp(1.2rem,4vw,3.5rem);background:var(--page);color:var(--ink);
font:16px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header{display:flex;flex-wrap:wrap;gap:1.2rem 3rem;align-items:end;justify-content:space-between;
margin-bottom:clamp(1.5rem,3vw,2.6rem)}
h1{margin:0;font-size:clamp(1.7rem,3.4vw,2.6rem);line-height:1.1;letter-spacing:-.025em;font-weight:700}
header p{margin:.5rem 0 0;color:var(--soft)}
.figures{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:0}
.figures div{display:flex;flex-direction:column-reverse}
.figures dt{color:var(--soft);font-size:.8rem}
.figures dd{margin:0;font-size:1.5rem;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
main{display:grid;gap:clamp(1rem,1.8vw,1.6rem);grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr))}
article{display:flex;flex-direction:column;background:var(--card);border:1px solid var(--line);border-radius:14px;
overflow:hidden;box-shadow:0 1px 2px #0000000a,0 8px 24px -16px #00000030}
.pictures{display:grid;gap:2px;aspect-ratio:1;min-height:0;overflow:hidden;grid-auto-rows:minmax(0,1fr)}
.pictures.of-2{grid-template-columns:1fr 1fr}.pictures.of-3,.pictures.of-4{grid-template-columns:1fr 1fr}
.pictures.of-3 a:first-child{grid-column:1/-1}
.pictures a{position:relative;overflow:hidden}
.pictures a:focus-visible{outline:3px solid var(--mark);outline-offset:-3px}
img{position:absolute;inset:0;width:100%;height:100%;object-fit:cover;transition:transform .4s}
a:hover img{transform:scale(1.035)}
@media(prefers-reduced-motion:reduce){img{transition:none}}
.none{display:grid;place-content:center;padding:1.5rem;color:var(--soft);text-align:center}
.about{display:flex;flex-direction:column;flex:1;padding:1rem 1.15rem 1.1rem}
h2{margin:0 0 .15rem;font-size:1.02rem;line-height:1.35;font-weight:620;text-wrap:balance}
.id{margin:0 0 .85rem;color:var(--soft);font-size:.82rem}
dl.took{display:grid;grid-template-columns:repeat(3,auto);justify-content:space-between;gap:.5rem;margin:0 0 .85rem}
dl.took div{display:flex;flex-direction:column-reverse}
.took dt{color:var(--soft);font-size:.74rem}
.took dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
ul{margin:0;padding:.7rem 0 0;list-style:none;border-top:1px solid var(--line);color:var(--soft);
font:.75rem/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
li{display:flex;justify-content:space-between;gap:1rem}
li a{color:inherit;text-decoration:none}li a:hover{text-decoration:underline}
.bad{color:#c2413b;font-weight:600}
footer{margin-top:clamp(1.5rem,3vw,2.6rem);color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
"""


def contact_sheet(jobs: Sequence[DemoJob], folder: Path, *, seconds: float) -> str:
    """Return the page, to be written to `folder`. Its links are relative, and it loads nothing from other sites."""
    pictures = sum(job.stored for job in jobs)
    polls = sum(job.polls for job in jobs)
    done = [job for job in jobs if job.status == "completed"]
    figures = [
        ("jobs completed", f"{len(done)}/{len(jobs)}" if len(done) < len(jobs) else str(len(done))),
        ("pictures", str(pictures)),
        ("polls per job", f"{polls / max(len(jobs), 1):.1f}"),
        ("mean, ready to seen", seconds_text(mean([job.seen_after for job in jobs]))),
        ("mean, ready to stored", seconds_text(mean([job.stored_after for job in jobs]))),
        ("whole demo", f"{seconds:.0f} s"),
    ]
    figures_html = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    cards = "\n".join(_card(job, folder) for job in jobs)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Contact sheet: {pictures} pictures of {len(jobs)} jobs</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<div><h1>Contact sheet</h1>
<p>Submitted to the stand-in of the API, polled until ready, every picture stored once.</p></div>
<dl class="figures">{figures_html}</dl>
</header>
<main>
{cards}
</main>
<footer>Made by <code>fetch-worker demo</code>. The files, logs and tables are in {escape(str(folder))}</footer>
</body>
</html>
"""


def _card(job: DemoJob, folder: Path) -> str:
    stored = [file for file in job.files if file.location is not None]
    prompt = escape(job.submitted.prompt)
    links = "".join(
        f'<a href="{_link(file, folder)}"><img loading="lazy" src="{_link(file, folder)}"'
        f' alt="{prompt}, picture {file.position + 1}"></a>'
        for file in stored
    )
    rows = "".join(
        f'<li><a href="{_link(file, folder)}">{escape(path_of(str(file.location)).name)}</a>'
        f'<span title="SHA-256 {file.sha256}">{(file.size_bytes or 0) / 1024:.0f} KiB</span></li>'
        for file in stored
    )
    pictures = f'<div class="pictures of-{len(stored)}">{links}</div>' if stored else _empty(job)
    state = "" if job.status == "completed" else f' · <span class="bad">{escape(job.status)}</span>'
    hashes = f"<ul>{rows}</ul>" if rows else ""
    return f"""<article>
{pictures}
<div class="about"><h2>{prompt}</h2>
<p class="id">job {job.id or "–"} · API id {escape(job.submitted.remote_id)}{state}</p>
<dl class="took"><div><dt>polls</dt><dd>{job.polls}</dd></div>
<div><dt>ready to seen</dt><dd>{seconds_text(job.seen_after)}</dd></div>
<div><dt>ready to stored</dt><dd>{seconds_text(job.stored_after)}</dd></div></dl>
{hashes}</div>
</article>"""


def _empty(job: DemoJob) -> str:
    return f'<div class="pictures none">no picture: {escape(job.reason)}</div>'


def _link(file: DemoOutput, folder: Path) -> str:
    """Return the file's URL relative to the page."""
    return quote(os.path.relpath(path_of(str(file.location)), folder))
