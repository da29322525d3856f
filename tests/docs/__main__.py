"""Write the generated tables of the manual anew: `python -m tests.docs`."""

from tests.docs.generated import rendered_pages
from tests.docs.manual import DOCS

for topic, text in rendered_pages().items():
    (DOCS / f"{topic}.md").write_text(text, encoding="utf-8")
