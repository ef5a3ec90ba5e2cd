"""Write README.md from nbs/index.ipynb: `python tools/readme.py`, or with `--check` only compare.

The text is the same on every machine: nbconvert's Markdown, never Quarto's. Relative links and pictures are
rewritten from nbs/ to the root of the repository; pictures that a cell displays go to nbs/images/.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
from nbconvert.exporters import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
DIRECTIVE = re.compile(r"^#\s*\|\s*([\w-]+:?)\s*(.*)\n?", re.M)
LINK = re.compile(r"(\]\()([^)\s]+)(\)|\s)|((?:src|href)=\")([^\"]+)(\")")


def prepare(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "Leave out hidden cells, hidden inputs and nbdev's directives."
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            directives = dict(DIRECTIVE.findall(cell.source))
            if {"hide", "default_exp"} & directives.keys() or directives.get("include:") == "false":
                continue
            cell.source = DIRECTIVE.sub("", cell.source).strip()
            if directives.get("echo:") == "false":
                cell.metadata["transient"] = {"remove_source": True}
            for output in cell.outputs:
                data = output.get("data", {})
                if "text/markdown" in data:  # GitHub draws Markdown tables; it drops styles from HTML
                    data.pop("text/html", None)
                if "text/html" in data:
                    data["text/html"] = re.sub(r"<style.*?</style>\s*", "", data["text/html"], flags=re.S)
        cells.append(cell)
    notebook.cells = cells
    return notebook


def relink(text: str) -> str:
    "Turn links that are relative to nbs/ into links that are relative to the root, where README.md lies."

    def one(match: re.Match) -> str:
        before, link, after = match.group(1, 2, 3) if match.group(2) else match.group(4, 5, 6)
        if re.match(r"[a-zA-Z][\w+.-]*:|#|/", link):
            return match.group(0)
        name, anchor = re.match(r"([^#?]*)(.*)", link).groups()
        target = os.path.normpath(NBS / unquote(name))
        return before + Path(os.path.relpath(target, ROOT)).as_posix().replace(" ", "%20") + anchor + after

    return LINK.sub(one, text)


def readme() -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and the pictures that the cells of the notebook display, by path in nbs/."
    notebook = prepare(nbformat.read(NBS / "index.ipynb", as_version=4))
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources={"output_files_dir": "images"})
    pictures = {}
    for number, (name, content) in enumerate(resources.get("outputs", {}).items(), 1):
        path = f"images/index-{number}{Path(name).suffix}"
        text = text.replace(name, path)
        pictures[path] = content
    text = re.sub(r"!\[(png|svg|jpeg)\]", "![figure]", text)
    text = re.sub(r"[ \t]+$", "", relink(text), flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return "<!-- Written by tools/readme.py from nbs/index.ipynb: edit that. -->\n\n" + text + "\n", pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README.md is not what it would be")
    arguments = parser.parse_args()
    text, pictures = readme()
    files = {ROOT / "README.md": text.encode(), **{NBS / path: content for path, content in pictures.items()}}
    stale = [path for path, content in files.items() if not path.exists() or path.read_bytes() != content]
    if arguments.check:
        if stale:
            sys.exit(f"not in sync with nbs/index.ipynb: {', '.join(str(p.relative_to(ROOT)) for p in stale)}; run `make readme`")
        return
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path])
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
