"""A hook of MkDocs: files outside docs/ that a page links become pages of the site, Markdown as it is, code in full.

On GitHub a link such as ``../nf4/codebook.py`` leads to the file. The site has no such file, so this puts it below
``source/`` and points the link there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
COPIED = (".md", ".png", ".svg")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link outside docs/, and what those pages link."""
    todo = [DOCS / file.src_uri for file in files.documentation_pages()]
    seen = set(todo)
    for page in todo:
        for target in map(_linked(page), LINK.finditer(page.read_text())):
            if target is None or target in seen or target.is_relative_to(DOCS):
                continue
            seen.add(target)
            if target.suffix == ".md":
                todo.append(target)
            if target.suffix in COPIED:
                files.append(File.generated(config, _uri(target), abs_src_path=str(target)))
            else:
                name, language = target.relative_to(ROOT), target.suffix.removeprefix(".")
                text = f"# {name}\n\n````{language}\n{target.read_text()}\n````\n"
                files.append(File.generated(config, _uri(target), content=text))
            files.src_uris[_uri(target)].inclusion = files.src_uris[_uri(target)].inclusion.NOT_IN_NAV
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links out of docs/ to the pages that `on_files` added."""
    uri = page.file.src_uri
    outside = uri.startswith("source/")
    if outside and not uri.endswith("README.md") and page.file.abs_src_path is None:
        return markdown  # code: brackets in it are no links
    here = ROOT / uri.removeprefix("source/") if outside else DOCS / uri
    find = _linked(here)

    def rewritten(match: re.Match[str]) -> str:
        target = find(match)
        if target is None:
            return match[0]
        return os.path.relpath(_uri(target), Path(uri).parent) + (match[2] or "")

    return LINK.sub(rewritten, markdown)


def _linked(page: Path):
    """What finds the file of the repository that a link of this page leads to; None: an address."""

    def find(match: re.Match[str]) -> Path | None:
        target = Path(os.path.normpath(page.parent / match[1]))
        return target if ":" not in match[1] and target.is_file() else None

    return find


def _uri(target: Path) -> str:
    """Where a file of the repository is in the site."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = f"source/{target.relative_to(ROOT).as_posix()}"
    return name if target.suffix in COPIED else f"{name}.md"
