"""README and docs/: their Python blocks run, their links lead somewhere, and the API names what is public.

Blocks of one page run in one namespace, in their order. What a page takes for given stands before a block in a comment
that no reader sees, `<!-- given` and code; a block behind `<!-- not run: why -->` is left out.
"""

from __future__ import annotations

import importlib
import re
import runpy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import accounting
import clipless_dp

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path for path in (ROOT / "README.md", *DOCS.rglob("*.md")) if path.parent.name not in ("repository", "_build")
)
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
NOT_RUN = 9
"""Blocks that need data, a download, another process or minutes. Let it fall; it should not rise."""
PARTS = re.compile(
    r"^<!-- given\n(?P<given>.*?)^-->\n|^<!-- not run: (?P<why>.+?) -->\n|^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """Python of a page, the line it begins in, and why it does not run, if it does not."""

    code: str
    line: int
    why: str | None = None
    given: bool = False


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found, why = [], None
    for part in PARTS.finditer(text):
        line = text.count("\n", 0, part.start()) + 2
        if part["why"] is not None:
            why = part["why"]
        elif part["given"] is not None:
            found.append(Block(part["given"], line, given=True))
        else:
            found.append(Block(part["code"], line, why))
            why = None
    return found


BLOCKS = {page.relative_to(ROOT).as_posix(): blocks_of(page) for page in PAGES}
ELSEWHERE = {
    "README.md": "below",
    "docs/index.md": "the block of the README",
    "docs/extending.md": "tests/testing/test_layer_test_case.py, which takes its rules out again",
    "docs/integrations.md": "tests/integrations/test_huggingface_trainer.py",
}
"""Pages whose blocks run in a test that also looks at what they do."""
LONG = {"docs/one-class.md", "docs/robustness.md", "docs/features.md", "docs/fine-tuning.md"}
"""Pages that train for seconds."""
WITH_CODE = [name for name, blocks in BLOCKS.items() if blocks and name not in ELSEWHERE]


def needs(*blocks: Block) -> None:
    """Skips a page of which a package is not there."""
    code = "\n".join(block.code for block in blocks)
    packages = re.findall(r"^(?:from|import) (transformers|opacus|matplotlib|pandas|peft)\b", code, re.MULTILINE)
    for package in (*packages, *["sklearn"] * ('load_dataset("digits")' in code)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip(package)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in WITH_CODE])
def test_the_blocks_of_a_page_run_one_after_the_other(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": "page"}
    running = [block for block in BLOCKS[name] if block.why is None]
    needs(*running)
    with warnings.catch_warnings():
        # What pages show is too small and too short to be good training.
        warnings.simplefilter("ignore")
        for block in running:
            # Line numbers of the page, so that a failure points at it.
            exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / name), "exec"), space)
    assert all((tmp_path / picture).is_file() for picture in pictures_of(name))


def pictures_of(name: str) -> set[str]:
    """What the blocks of a tutorial draw; the page shows them as a whole run drew them."""
    saved = r'^figure\.savefig\("([\w-]+\.png)"'
    return {found for block in BLOCKS[name] for found in re.findall(saved, block.code, re.MULTILINE)}


def test_blocks_that_do_not_run_are_few():
    assert sum(block.why is not None for blocks in BLOCKS.values() for block in blocks) == NOT_RUN


def test_each_fence_of_python_and_each_remark_to_this_test_is_understood():
    for name, blocks in BLOCKS.items():
        text = (ROOT / name).read_text("utf-8")
        assert text.count("```python") + text.count("<!-- given") == len(blocks), name
        assert text.count("<!-- not run") == sum(block.why is not None for block in blocks), name


def test_the_readme_is_short_and_its_block_prints_accuracy_epsilon_and_lipschitz_constant(
    tmp_path, monkeypatch, capsys
):
    needs(*BLOCKS["README.md"])
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count("\n") <= 90
    (block,) = BLOCKS["README.md"]
    assert block.code.count("\n") <= 15
    torch.manual_seed(0)
    exec(block.code, {"__name__": "readme"})
    printed = re.search(
        r"accuracy ([\d.]+)%, ε = ([\d.]+) at δ = 0.0001, Lipschitz constant ([\d.]+)", capsys.readouterr().out
    )
    # 86 to 87 % as a rule, and 10 % by chance.
    assert float(printed[1]) > 75
    assert 2.9 < float(printed[2]) <= 3.0
    assert float(printed[3]) == 1.0


def test_the_first_page_of_the_site_shows_the_block_of_the_readme():
    assert [block.code for block in BLOCKS["docs/index.md"]] == [block.code for block in BLOCKS["README.md"]]


def test_the_pictures_of_the_pages_are_made_from_the_results(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(DOCS / "figures.py"), run_name="figures")
    monkeypatch.setitem(script["main"].__globals__, "FIGURES", tmp_path)
    script["main"]()
    of_tutorials = {picture for name in WITH_CODE for picture in pictures_of(name)}
    assert of_tutorials == {f"{page.stem}.png" for page in TUTORIALS}
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn | of_tutorials == {path.name for path in (DOCS / "figures").iterdir()}


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_shows_its_picture_and_is_shortened_where_a_reader_chooses_its_length(page):
    text = page.read_text("utf-8")
    assert f"](../figures/{page.stem}.png)" in text
    # What this test runs instead is assigned by the reader's block right before it.
    for chosen, shorter in re.findall(
        r"^```python\n([^`]*)^```\n\n<!-- given\n(.*?)^-->", text, re.MULTILINE | re.DOTALL
    ):
        assert set(re.findall(r"^([\w, ]+) = ", shorter.splitlines()[0])) <= set(re.findall(r"^([\w, ]+) = ", chosen))


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", BLOCKS)
def test_links_within_the_repository_lead_to_a_file_and_a_heading(name):
    page = ROOT / name
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{name}: {target}"


def documented() -> set[int]:
    """The objects that pages of the API show, by identity."""
    found = set()
    for path in (DOCS / "api").glob("*.md"):
        module = ""
        for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)$", path.read_text("utf-8"), re.MULTILINE):
            if kind == "currentmodule":
                module = name
            elif kind != "automodule":
                found.add(id(getattr(importlib.import_module(module), name)))
            else:
                shown = importlib.import_module(name)
                own = [one for one, thing in vars(shown).items() if getattr(thing, "__module__", None) == name]
                names = getattr(shown, "__all__", own)
                found |= {id(shown)} | {id(getattr(shown, one)) for one in names}
    return found


@pytest.mark.parametrize("package", [clipless_dp, accounting], ids=["clipless_dp", "accounting"])
def test_the_api_pages_have_each_public_name_and_each_has_a_docstring(package):
    shown = documented()
    for name in set(package.__all__) - {"__version__"}:
        thing = getattr(package, name)
        assert id(thing) in shown, name
        assert isinstance(thing, str) or thing.__doc__, name


def test_pages_and_citation_tell_the_versions_that_the_package_declares():
    declared = (ROOT / "pyproject.toml").read_text("utf-8")
    needed = {
        "torch": re.search(r'"torch>=([\d.]+)"', declared)[1],
        "Python": re.search(r'requires-python = ">=([\d.]+)"', declared)[1],
    }
    told = [found for page in PAGES for found in re.findall(r"(Python|torch) ≥ ([\d.]*\d)", page.read_text("utf-8"))]
    assert len(told) >= 6
    assert {version for name, version in told if name == "torch"} == {needed["torch"]}
    assert {version for name, version in told if name == "Python"} == {needed["Python"]}
    version = re.search(r'^version = "(.+)"', declared, re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
