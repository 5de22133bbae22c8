"""The README's example prints what the README says, and the documents name files that are there."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("experiments/**/README.md"),
]


def notebook_example() -> tuple[str, str]:
    """Return the code of the notebook example and its output, as they stand in the README."""
    section = README.read_text(encoding="utf-8").partition("## In a notebook")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    output = re.search(r"prints\n\n```\n(.*?)```", section, re.DOTALL).group(1)
    return code, output


def test_the_notebook_example_prints_what_the_readme_says(capsys):
    pytest.importorskip("sklearn")
    code, expected = notebook_example()
    with jax.numpy_rank_promotion("allow"):  # as in a notebook
        exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == [
        line.split()[0] for line in expected.splitlines()
    ]
    numbers = [
        [float(number) for number in re.findall(r"\d+\.\d", text)] for text in (printed, expected)
    ]
    # Another processor may round otherwise and end in another minimum here and there.
    assert sum(numbers[0]) == pytest.approx(sum(numbers[1]), rel=0.05)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_that_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    # In a path of code a capital is a name to fill in.
    paths = re.findall(r"(?<![\w/.-])((?:\w+/)+\w+\.py)\b", text)
    roots = (ROOT, ROOT / "moth_jax", ROOT / "experiments", page.parent)
    named = [path for path in paths if not re.search("[A-Z]", path)]
    assert [path for path in named if not any((r / path).exists() for r in roots)] == []
