"""Hooks of mkdocs.yml: README.md is the site's first page, and links out of docs/ go to the repository.

The pages keep the links that work on GitHub. There, `docs/data.md` links to `../examples/sft.yaml`, and README.md to
`docs/data.md`; on the site both would be dead.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Return the page's text with its links changed for the site. Raises ValueError for a link to a missing file."""
    home = page.file.src_uri == "index.md"
    folder = "" if home else posixpath.dirname(f"docs/{page.file.src_uri}")
    if home:
        markdown = (ROOT / "README.md").read_text()

    def changed(match: re.Match[str]) -> str:
        before, path, after = match.groups()
        target = posixpath.normpath(posixpath.join(folder, path))
        if not (ROOT / target).exists():
            if home or not target.startswith("docs/"):
                raise ValueError(f"{page.file.src_uri}: {path} does not exist")
            return match[0]  # mkdocs itself reports it
        if target.startswith("docs/"):
            return f"{before}{posixpath.relpath(target, 'docs') if home else path}{after}"
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{before}{config.repo_url.rstrip('/')}/{kind}/main/{target}{after}"

    return _LINK.sub(changed, markdown)
