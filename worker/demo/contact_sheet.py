"""The contact sheet: an HTML page with all pictures, their timing and their files. Pure: jobs in, HTML out."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from worker.core.humanize import format_bytes, format_count
from worker.demo.display import DemoJob, figures, seconds_text
from worker.storage.local import path_of

_STYLE = """
:root{color-scheme:light dark;--page:#f6f4f0;--card:#fff;--ink:#22201d;--soft:#77716a;--line:#e5e0d8}
@media(prefers-color-scheme:dark){:root{--page:#131417;--card:#1c1e22;--ink:#eceae6;--soft:#9a968f;--line:#2c2f35}}
body{margin:0 auto;max-width:92rem;padding:clamp(1.2rem,4vw,3.5rem);background:var(--page);color:var(--ink);
font:16px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header{display:flex;flex-wrap:wrap;gap:1.2rem 3rem;align-items:end;justify-content:space-between;margin-bottom:2rem}
h1{margin:0;font-size:clamp(1.7rem,3.4vw,2.6rem);line-height:1.1;letter-spacing:-.025em}
header p,.about p,footer{margin:.5rem 0 0;color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:0;font-variant-numeric:tabular-nums}
dl div{display:flex;flex-direction:column-reverse}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;font-size:1.5rem;font-weight:650;letter-spacing:-.02em}
main{display:grid;gap:1.4rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr));margin-bottom:2rem}
article{background:var(--card);border:1px solid var(--line);border-radius:14px;overflow:hidden;
box-shadow:0 1px 2px #0000000a,0 8px 24px -16px #00000030}
.pictures{display:grid;gap:2px;aspect-ratio:1;grid-auto-rows:minmax(0,1fr);grid-template-columns:1fr 1fr}
.pictures a{position:relative;overflow:hidden}.pictures a:first-child:nth-last-child(odd){grid-column:1/-1}
img{position:absolute;inset:0;width:100%;height:100%;object-fit:cover}
.about{padding:1rem 1.15rem 1.1rem}h2{margin:0;font-size:1.02rem;line-height:1.35;text-wrap:balance}
ul{margin:.85rem 0 0;padding:.7rem 0 0;list-style:none;border-top:1px solid var(--line);color:var(--soft);
font:.75rem/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
li{display:flex;justify-content:space-between;gap:1rem}li a{color:inherit}
strong{color:#c2413b}
"""


def contact_sheet(jobs: Sequence[DemoJob], folder: Path, *, seconds: float) -> str:
    """Return the page, to be written to `folder`. Its links are relative, and it loads nothing from other sites."""
    numbers = figures(jobs) | {"whole demo": f"{seconds:.0f} s"}
    numbers_html = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers.items())
    cards = "\n".join(_card(job, folder) for job in jobs)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Contact sheet: {numbers["pictures"]} pictures of {len(jobs)} jobs</title>
<style>{_STYLE}</style></head><body>
<header><div><h1>Contact sheet</h1>
<p>Submitted to the stand-in of the API, polled until ready, every picture stored once.</p></div>
<dl>{numbers_html}</dl></header>
<main>
{cards}
</main>
<footer>Made by <code>fetch-worker demo</code>. The files, logs and tables are in {escape(str(folder))}</footer>
</body></html>
"""


def _card(job: DemoJob, folder: Path) -> str:
    prompt, pictures, rows = escape(job.order.prompt), "", ""
    for output in job.stored:
        path = path_of(output.location)
        link = quote(os.path.relpath(path, folder))
        alt = f"{prompt}, picture {output.position + 1}"
        pictures += f'<a href="{link}"><img loading="lazy" src="{link}" alt="{alt}"></a>'
        rows += f'<li><a href="{link}">{escape(path.name)}</a>'
        rows += f'<span title="SHA-256 {output.sha256}">{format_bytes(output.size_bytes)}</span></li>'
    state = "" if job.status == "completed" else f" · <strong>{escape(job.status)}: {escape(job.reason)}</strong>"
    times = f"seen {seconds_text(job.seen_after)} after it was ready, stored {seconds_text(job.stored_after)}"
    return f"""<article>
<div class="pictures">{pictures}</div>
<div class="about"><h2>{prompt}</h2>
<p>job {job.id or "–"} · API id {escape(job.order.id)}{state}</p>
<p>{format_count(job.polls, "poll")} · {times}</p>
<ul>{rows}</ul></div>
</article>"""
