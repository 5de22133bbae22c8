"""The README's example is run, and prints what the README says it prints."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[1] / "README.md"


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
