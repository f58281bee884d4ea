"""Makes pages of the documentation site from what reads well on GitHub: a hook of mkdocs, see mkdocs.yml."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HOME = "index.md"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The README is the home page; its links lead from the directory above."""
    readme = (Path(config.docs_dir).parent / "README.md").read_text()
    files.append(File.generated(config, HOME, content=re.sub(r"(?<=\]\()docs/", "", readme)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository become their text, as the site does not have them."""

    def kept(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if not target.startswith("../"):
            return link[0]
        return f"[{text}]({HOME}{anchor})" if target == "../README.md" else text

    return _LINK.sub(kept, markdown)
