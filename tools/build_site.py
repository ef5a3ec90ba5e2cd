"""Build the documentation site: `python tools/build_site.py`, or `make docs`.

1. Stage: every notebook of nbs/ goes through nbdev's own processors into a folder (`_proc`), where an exported
   cell becomes a signature with a table of its parameters, followed by its source. The executed notebooks of
   reports/ follow, and a page with the exported source of each module.
2. Render that folder with Quarto where it is installed, else with smalldocs, which reads the same _quarto.yml.
3. Finish: formulas become MathML, which a browser draws without a script and without a network, and a page
   that would load anything from another host is an error. Images get a description.

Nothing is executed here: the signatures are read from the exported modules, the results from the notebooks.
"""

import argparse
import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import yaml
from readme import LINK

ROOT = Path(__file__).resolve().parents[1]
NBS, REPORTS = ROOT / "nbs", ROOT / "reports"
NUMBER = re.compile(r"^\d+[a-z]?_")
SKIPPED_FOLDERS = (".", "_")


# ---------------------------------------------------------------- staging


def notebooks(folder: Path) -> list[Path]:
    "All notebooks under `folder`, in order, without checkpoints and hidden folders."
    found = (path for path in folder.rglob("*.ipynb"))
    return sorted(p for p in found if not any(part.startswith(SKIPPED_FOLDERS) for part in p.relative_to(folder).parts))


def site_path(path: Path) -> Path:
    "Where a file of the repository is staged: `nbs/01_pairs.ipynb` is `pairs.ipynb`; all else keeps its path."
    path = path.relative_to(ROOT)
    if path.parts[0] == "nbs":
        path = Path(*path.parts[1:])
        if path.suffix == ".ipynb":
            path = path.with_name(NUMBER.sub("", path.name))
    return path


def relink(text: str, source: Path, stage: Path) -> str:
    "Rewrite the relative links of a Markdown text of the notebook `source`, and stage the files they point at."

    def one(match: re.Match) -> str:
        before, link, after = match.group(1, 2, 3) if match.group(2) else match.group(4, 5, 6)
        if re.match(r"[a-zA-Z][\w+.-]*:|#|/", link):
            return match.group(0)
        name, anchor = re.match(r"([^#?]*)(.*)", link).groups()
        target = (source.parent / unquote(name)).resolve()
        if not target.exists():  # an executed copy in reports/ keeps the links that its original in nbs/ has
            target = (NBS / unquote(name)).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match.group(0)
        staged = stage / site_path(target)
        if target.is_file() and target.suffix != ".ipynb" and not staged.exists():
            staged.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(target, staged)
        here = stage / site_path(source)
        return before + Path(os.path.relpath(staged, here.parent)).as_posix() + anchor + after

    return LINK.sub(one, text)


def read_source(cell: dict) -> str:
    "The text of a cell, which a notebook may store as a list of lines."
    return "".join(cell.get("source") or "")


EXPORT = re.compile(r"^#\s*\|\s*export\b(?!s)", re.M)
FOLD = re.compile(r"\A#\| code-fold: show\n#\| code-summary: .*\n")
LONG = 20  # lines of an exported cell


def fold(cell: dict, report: bool) -> None:
    "Fold all code of a report; else the source under a signature, and imports. Constants stay in view, unless they stand in a long cell of functions or classes."
    if report and cell["cell_type"] == "code":
        cell["source"] = f"#| code-fold: true\n#| code-summary: \"Code\"\n{read_source(cell)}"
        return
    code, folded = FOLD.subn("", read_source(cell))
    if cell["cell_type"] == "code" and folded:
        try:
            body = ast.parse(code).body
        except SyntaxError:
            body = []
        definitions, others = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef), (ast.Import, ast.ImportFrom, ast.Expr)
        imports = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)
        long = len(code.splitlines()) > LONG and any(isinstance(node, definitions) for node in body)
        if long or all(isinstance(node, definitions + others) for node in body):
            code = f"#| code-fold: true\n#| code-summary: \"{'Imports' if imports else 'Source'}\"\n{code}"
        cell["source"] = code


@cache
def definitions(module: Path) -> dict[str, ast.stmt]:
    "The functions and classes of a module in their order, by name; a method that was added with @patch is `Class.method`."
    found = {}
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            patched = any(ast.unparse(decorator).startswith("patch") for decorator in node.decorator_list)
            found[f"{ast.unparse(node.args.args[0].annotation)}.{node.name}" if patched else node.name] = node
    return found


SOURCE_LINK = re.compile(r"\]\(/blob/[^/]+/\w+/(\w+)\.py#L\w+\)")


def finish_cell(cell: dict, source: Path) -> None:
    "Point the `source` link of each signature at the page of this site that shows the module."

    def link(match: re.Match, name: str, up: str) -> str:
        known = definitions(ROOT / "hybrid_ir" / f"{match.group(1)}.py")
        anchor = name if name in known else name.partition(".")[0]
        return f"]({up}source/{match.group(1)}.md" + (f"#{anchor})" if anchor in known else ")")

    for output in cell.get("outputs", []):
        data = output.get("data") or {}
        if "text/markdown" in data:
            text = "".join(data["text/markdown"])
            name = re.search(r"^#+ (\S+)$", text, re.M)
            up = "../" * (len(site_path(source).parts) - 1)
            data["text/markdown"] = SOURCE_LINK.sub(lambda match: link(match, name.group(1) if name else "", up), text)


HEAD = re.compile(r"\A\s*# \S[^\n]*\n(?:\s*\n)*(?:> [^\n]*\n?)?")


def split_head(cells: list[dict]) -> list[dict]:
    "Give the title and the line under it a cell of their own: nbdev makes that cell the front matter of the page."
    for place, cell in enumerate(cells):
        text = read_source(cell)
        head = HEAD.match(text) if cell["cell_type"] == "markdown" else None
        if head:
            rest = {"cell_type": "markdown", "metadata": {}, "source": text[head.end() :]}
            cell["source"] = head.group(0)
            return [*cells[: place + 1], *([rest] if rest["source"].strip() else []), *cells[place + 1 :]]
    return cells


# Without this, fastcore takes the comment of `**options` for that of the returned value.
KEYWORD_COMMENTS = """
import fastcore.docments as _docments
_locations = _docments._param_locs
_docments._param_locs = lambda source, returns=True, args_kwargs=True: _locations(source, returns, True)
"""


def processors(module: str | None) -> type:
    "nbdev's processors; but signatures come from the exported module, where nbdev would run cells of the notebook, and stand in its order."
    from nbdev.doclinks import NbdevLookup
    from nbdev.processors import FilterDefaults, add_links, add_show_docs, exec_show_docs, mv_exports

    def link_names(cell):
        "Links to the definitions that a text names; in outputs, too, none inside a block of code."
        link = NbdevLookup().linkify
        if cell.cell_type == "markdown":
            cell.source = link(cell.source)
        for data in (output.get("data") or {} for output in cell.get("outputs", [])):
            if "text/markdown" in data:
                data["text/markdown"] = link("".join(data["text/markdown"]))

    class signatures(add_show_docs):
        "The signatures of an exported cell in the order of its definitions, with full names, above the source."

        def begin(self):
            super().begin()
            cells, place = [], 0
            for cell in self.nb.cells:
                if getattr(cell, "has_sd", False):  # nbdev puts them below, the last one first
                    name = re.fullmatch(r"show_doc\((.+)\)", cell.source).group(1)
                    cell.source = f"show_doc({name}, name={name!r})"
                    cells.insert(place, cell)
                else:
                    place = len(cells)
                    cells.append(cell)
            self.nb.cells[:] = cells

    class read_show_docs(exec_show_docs):
        def begin(self):
            super().begin()
            if module:
                self.k.run_cell(f"import {module} as _module\nglobals().update({{k: v for k, v in vars(_module).items() if not k.startswith('__')}})")
                self.k.run_cell(KEYWORD_COMMENTS)

        def __call__(self, cell):
            if cell.cell_type == "code" and re.search(r"^show_doc\(", cell.source or "", re.M):
                self.k.cell(cell)
            if self.k.exc:
                raise RuntimeError(f"{module}: {cell.source}: run nbdev_export first?") from self.k.exc

    class Processors(FilterDefaults):
        def base_procs(self):
            ours = {add_show_docs: signatures, exec_show_docs: read_show_docs, add_links: link_names}
            return [ours.get(proc, proc) for proc in super().base_procs() if proc is not mv_exports]

    return Processors


def stage_notebook(source: Path, stage: Path) -> None:
    "Run one notebook through nbdev's processors: front matter, signatures, links between pages, hidden cells."
    from execnb.nbio import read_nb, write_nb

    target = stage / site_path(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    notebook = json.loads(source.read_text(encoding="utf-8"))
    notebook["cells"] = split_head(notebook["cells"])
    for cell in notebook["cells"]:
        text = read_source(cell)
        if cell["cell_type"] == "code":  # an exported cell is kept under its signature, not left out
            text = EXPORT.sub("#| exports", text)
        else:
            text = relink(text, source, stage)
        cell["source"] = text
    draft = target.with_name(source.name + ".draft")
    draft.write_text(json.dumps(notebook), encoding="utf-8")
    nb = read_nb(draft)
    nb.path_ = str(source)
    draft.unlink()
    module = exported_module(source)
    processors(".".join(module.relative_to(ROOT).with_suffix("").parts) if module else None)()(nb)
    for cell in nb.cells:
        if cell.cell_type == "raw":  # the staged name is the output name already
            cell.source = re.sub(r"^output-file:.*\n", "", cell.source, flags=re.M)
            if "skip_exec: true" in cell.source and source.is_relative_to(NBS):  # its executed copies in reports/ have the same title
                cell.source = re.sub(r"^title: ['\"]?(.*?)['\"]?$", lambda m: f"title: {json.dumps('Notebook: ' + m.group(1), ensure_ascii=False)}", cell.source, flags=re.M)
            if NUMBER.match(source.name):  # nbdev's titles are module names; a sidebar reads better in one style, but mMARCO is a name
                cell.source = re.sub(r"^(title: ['\"]?)([a-z])(?=[^A-Z\n]*$)", lambda m: m.group(1) + m.group(2).upper(), cell.source, flags=re.M)
        fold(cell, report=source.is_relative_to(REPORTS))
        finish_cell(cell, source)
    write_nb(nb, target)


def stage_source(module: Path, page: str, stage: Path) -> None:
    "Write a page with the exported source of one module, a heading for each function and class."
    text = module.read_text(encoding="utf-8")
    lines = text.splitlines()
    parts, done = [], 0
    for name, node in definitions(module).items():
        first = min([node.lineno, *[d.lineno for d in node.decorator_list]]) - 1
        parts += [("", lines[done:first]), (name, lines[first : node.end_lineno])]
        done = node.end_lineno
    parts.append(("", lines[done:]))
    body = [f'---\ntitle: "{module.parent.name}/{module.name}"\ndescription: "The exported source of one module"\ntoc: true\n---\n', f"Exported from the notebook [{Path(page).stem}](../{page}).\n"]
    for name, code in parts:
        code = "\n".join(line for line in code if not line.startswith("# %% ")).strip("\n")
        if code.strip():
            body.append((f"## {name} {{#{name}}}\n\n" if name else "") + f"````python\n{code}\n````\n")
    target = stage / "source" / f"{module.stem}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(body), encoding="utf-8")


def exported_module(notebook: Path) -> Path | None:
    "The module that a notebook exports, if it exports one."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        found = re.search(r"^#\s*\|\s*default_exp\s+(\S+)", read_source(cell), re.M)
        if cell["cell_type"] == "code" and found:
            return ROOT / "hybrid_ir" / (found.group(1).replace(".", "/") + ".py")
    return None


STUDY_PAGES = ("method.ipynb", "reports/summary.ipynb", "speed.ipynb", "cost.ipynb", "nothing_lost.ipynb", "limits.ipynb", "reproduce.ipynb")  # in reading order


def heading(path: Path) -> str:
    "The title of an executed notebook."
    cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    return next(source.splitlines()[0].removeprefix("# ") for source in map(read_source, cells) if source.startswith("# "))


def sidebar(pages: dict[str, list], reports: list[Path]) -> dict:
    "The sidebar in reading order: home, the study, how-to pages, reference, what papermill runs, and one section for each folder of reports."
    contents: list = [{"text": "Home", "href": "index.ipynb"}]
    contents += [{"section": title, "contents": found} for title, found in pages.items() if found]
    folders: dict[str, list] = {}
    for path in reports:
        path = path.relative_to(ROOT)
        if path.as_posix() in STUDY_PAGES:
            continue
        _, reported, benchmark = heading(path).partition(f"{path.parent.name} on ")
        folders.setdefault(path.parent.as_posix(), []).append({"text": benchmark if reported else path.stem.replace("-", " "), "href": path.as_posix()})
    contents += [{"section": "Reports: " + "/".join(folder.split("/")[1:]) if "/" in folder else "Reports", "contents": items} for folder, items in folders.items()]
    return {"website": {"sidebar": {"contents": contents}}}


def stage_site(stage: Path, output: Path) -> None:
    "Fill the folder `stage` with everything that the renderer needs."
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    (stage / "_quarto.yml").write_text((ROOT / "_quarto.yml").read_text(encoding="utf-8"), encoding="utf-8")
    settings = yaml.safe_load((NBS / "nbdev.yml").read_text(encoding="utf-8"))
    settings["project"]["output-dir"] = os.path.relpath(output, stage)
    (stage / "nbdev.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    for name in ("styles.css", "scripts.html", "favicon.svg"):
        shutil.copy2(NBS / name, stage / name)

    os.environ["IN_TEST"] = "1"  # so that nothing is exported while definitions are read
    pages: dict[str, list] = {"The study": list(STUDY_PAGES), "How to": [], "Reference": [], "To run with papermill": []}
    for notebook in notebooks(NBS):
        started = time.perf_counter()
        stage_notebook(notebook, stage)
        page, module = site_path(notebook).as_posix(), exported_module(notebook)
        if module is not None and module.exists():
            stage_source(module, page, stage)
        if page not in ("index.ipynb", *STUDY_PAGES):
            pages["How to" if page.startswith("howto_") else "Reference" if module or NUMBER.match(notebook.name) else "To run with papermill"].append(page)
        print(f"staged {notebook.relative_to(ROOT)} in {time.perf_counter() - started:.1f} s", flush=True)
    reports = notebooks(REPORTS) if REPORTS.exists() else []
    for report in reports:
        stage_notebook(report, stage)
    (stage / "sidebar.yml").write_text(yaml.safe_dump(sidebar(pages, reports), sort_keys=False, allow_unicode=True), encoding="utf-8")


# ---------------------------------------------------------------- rendering


def render(stage: Path, renderer: str) -> None:
    "Render the staged folder with `quarto` or `smalldocs`."
    if renderer == "auto":
        renderer = "quarto" if shutil.which("quarto") else "smalldocs"
    if renderer == "quarto":
        command = ["quarto", "render", "--no-execute", "--metadata", "html-math-method:mathml"]
    else:
        try:
            import smalldocs  # noqa: F401
        except ImportError:
            sys.exit("make docs needs Quarto on Python 3.10 (smalldocs, the pure-Python renderer, needs Python 3.11 or newer)")
        command = [sys.executable, "-m", "smalldocs.cli", "render", "--strict", "."]
    done = subprocess.run(command, cwd=stage)
    if done.returncode:
        sys.exit(f"{renderer} failed ({done.returncode}) on {stage}")


# ---------------------------------------------------------------- formulas, and nothing from elsewhere

FORMULA = re.compile(r'<span class="math (inline|display)">\s*\\[(\[](.*?)\\[)\]]\s*</span>', re.S)
MATH_SCRIPT = re.compile(r"<link[^>]*katex[^>]*>|<script[^>]*(?:katex|mathjax|polyfill)[^>]*>\s*</script>", re.I)
LOADED = re.compile(r"<(?:script|img|iframe|source|audio|video)\b[^>]*?\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)|<link\b(?![^>]*rel=[\"']?(?:canonical|alternate))[^>]*?\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)", re.I)


def formula(match: re.Match, page: Path) -> str:
    "One formula as MathML; a command that the converter does not know is an error, not a red word in the page."
    from latex2mathml.converter import convert

    kind, tex = match.group(1), html.unescape(match.group(2)).strip()
    try:
        mathml = convert(tex, display="block" if kind == "display" else "inline")
    except Exception as error:
        sys.exit(f"{page}: formula {tex!r}: {error!r}")
    mathml = re.sub(r"<mo>(&#x02016;|&#x0007C;|‖|\|)</mo>", r'<mo stretchy="false">\1</mo>', mathml)  # norms keep their size
    # a function's name and its argument are set apart, as TeX does
    mathml = re.sub(r"(<mi>(?:log|ln|exp|max|min|arg|det|sup|inf)</mi>)(?=<m(?:i|n|frac|sub|sup|subsup)\b)", r'\1<mspace width="0.17em"/>', mathml)
    unknown = re.search(r"<m[ion]>\\\w+</m[ion]>", mathml)
    if unknown:
        sys.exit(f"{page}: formula {tex!r}: unknown command {unknown.group(0)[4:-5]}")
    return f'<span class="math {kind}">{mathml}</span>'


def write_font(characters: set[str], target: Path) -> None:
    "Write the part of STIX Two Math (Open Font License) that the site needs, with its table of stretched signs."
    from importlib.resources import files

    from fontTools import subset
    from fontTools.ttLib import TTFont

    font = TTFont(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")
    options = subset.Options(flavor="woff", hinting=False, layout_features=["*"], name_IDs=["*"])
    subsetter = subset.Subsetter(options)
    letters = [*range(0x1D400, 0x1D468), 0x210E, *range(0x1D6A8, 0x1D71C), 0x221A]  # bold, italic, Greek and the sign of a root: made by the browser
    subsetter.populate(unicodes=[*range(0x20, 0x7F), *letters, *(ord(c) for c in characters)])
    subsetter.subset(font)
    font.flavor = "woff"
    font.save(target)


CODE_LINK = re.compile(r'(<a href=")([^"#:]*)#([\w.]+)("[^>]*>\s*<code)')


def settle_anchors(output: Path) -> None:
    "Lead nbdev's link of a method to its class, and of a name without a signature to its page."
    pages = {page: page.read_text(encoding="utf-8") for page in output.rglob("*.html")}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():

        def settle(match: re.Match, page=page) -> str:
            before, link, anchor, after = match.groups()
            target = (page.parent / unquote(link)).resolve() if link else page
            while anchor and target in anchors and anchor not in anchors[target]:
                anchor = anchor.rpartition(".")[0]
            return before + link + (f"#{anchor}" if anchor else "") + after

        settled = CODE_LINK.sub(settle, text)
        if settled != text:
            page.write_text(settled, encoding="utf-8")


PLACES = re.compile(r"<(?:h[1-6]|p)\b[^>]*>(.*?)</(h[1-6]|p)>|<img\b(?![^>]*\balt=)", re.S)


def describe_images(text: str) -> str:
    "Give each image of a page that has no description the heading and the paragraph before it, for those who cannot see it."
    latest = {"p": "", "h": ""}

    def one(match: re.Match) -> str:
        kind = (match.group(2) or "")[:1]
        if not kind:
            described = ". ".join(filter(None, (latest["h"], latest["p"])))
            return f'{match.group(0)} alt="{html.escape(described[:300])}"'
        words = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", match.group(1))).split())
        latest[kind] = words or latest[kind]
        if kind == "h":
            latest["p"] = ""
        return match.group(0)

    return PLACES.sub(one, text)


FONT_IMPORT = re.compile(r"@import\s+url\([\"']?(?:https?:)?//[^)]*\)\s*;?")


def finish(output: Path) -> int:
    "Turn formulas into MathML, check that no page loads anything from another host; return how many formulas."
    count, characters = 0, set()
    for style in output.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        local = FONT_IMPORT.sub("", text)
        if local != text:
            style.write_text(local, encoding="utf-8")
    for page in sorted(output.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        text, found = FORMULA.subn(lambda match, page=page: formula(match, page), text)
        text = MATH_SCRIPT.sub("", text)
        count += found
        for mathml in re.findall(r"<math\b.*?</math>", text, re.S):
            characters.update(html.unescape(re.sub(r"<[^>]+>", "", mathml)))
        outside = [a or b for a, b in LOADED.findall(text)]
        if outside:
            sys.exit(f"{page}: the site must work without a network, and this page loads {outside}")
        page.write_text(describe_images(text), encoding="utf-8")
    settle_anchors(output)
    write_font(characters, output / "math.woff")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=Path, default=ROOT / "_proc", help="folder for the staged notebooks; emptied first")
    parser.add_argument("--output", type=Path, default=ROOT / "_docs", help="folder for the site; emptied first")
    parser.add_argument("--renderer", choices=["auto", "quarto", "smalldocs"], default="auto")
    arguments = parser.parse_args()
    stage, output = arguments.stage.resolve(), arguments.output.resolve()
    os.chdir(ROOT)
    started = time.perf_counter()
    stage_site(stage, output)
    shutil.rmtree(output, ignore_errors=True)
    render(stage, arguments.renderer)
    formulas = finish(output)
    pages = len(list(output.rglob("*.html")))
    print(f"{pages} pages, {formulas} formulas, in {time.perf_counter() - started:.0f} s: {output / 'index.html'}")


if __name__ == "__main__":
    main()
