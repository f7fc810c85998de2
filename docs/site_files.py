"""Hook of MkDocs: pages and pictures of the site that lie outside of this folder, and links to them."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", f"{RESULTS}/NOTES.md": "notes.md"}


def on_files(files, config):
    """Add the pages and the pictures."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in (ROOT / RESULTS).glob("*.png"):
        files.append(File.generated(config, f"images/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to where the site has what they lead to."""
    for source, target in PAGES.items():
        markdown = re.sub(rf"\]\((\.\./)*{source}", f"]({target}", markdown)
    markdown = re.sub(rf"\]\((\.\./)*{RESULTS}/(\w[\w-]*\.png)\)", r"](images/\2)", markdown)
    markdown = re.sub(r"\]\((\.\./)*docs/", "](", markdown)
    return re.sub(r"\[([^\]]+)\]\((tests|models|whiten_layers)/[^)]*\)", r"\1", markdown)  # code, which is not there
