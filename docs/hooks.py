"""What mkdocs needs to make pages of files that lie elsewhere in the repository, and are read there as well.

A link between two files of the repository is right in both places: here it becomes a link between their pages, and
where a file is no page, its text alone.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
#: By file of the repository, its page.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "costs.md",
    **{board: board for board in sorted(f"leaderboards/{path.name}" for path in (ROOT / "leaderboards").glob("*.md"))},
}


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    source = {of: source for source, of in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found["text"], found["target"], found["anchor"] or ""
        place = normpath(join(dirname(source), target)) if target else source
        if place not in PAGES and not place.startswith("docs/"):
            return (
                text.strip("![]") if (ROOT / place).exists() else found[0]
            )  # what is missing stays, and fails the build
        to = PAGES.get(place, place.removeprefix("docs/"))
        return f"{text}({relpath(to, dirname(page.file.src_uri) or '.')}{anchor})"

    # not URLs; code in backticks holds no links of ours
    pattern = r"(?P<text>!?\[[^\]]*\])\((?P<target>(?![a-z]+:)[^)#\s]*)(?P<anchor>#[^)\s]*)?\)"
    return re.sub(pattern, link, markdown).replace("<details>", '<details markdown="1">')
