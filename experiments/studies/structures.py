"""Differences between every architecture here and PyTorch's, and what converting one takes.

    python experiments/studies/structures.py --out=experiments/results/structures.json

From random weights and batch-norm statistics: the largest difference of logits in float32 at full
size, and of the gradients by the image in float64 at a smaller one, both relative to the largest
value; seconds from the PyTorch module to arrays on the device. Rows are those of
`tests/helpers/structures.py`. Each is added to the file when it is done, so `--only` goes through
them one at a time. The table of all rows in the file is printed at the end. Needs the `torch` and
`test` extras.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

from absl import app, flags, logging

ROOT = Path(__file__).resolve().parents[2]

OUT = flags.DEFINE_string("out", "experiments/results/structures.json", "Where the rows go.")
ONLY = flags.DEFINE_list("only", [], "Names of the rows to measure; all if none is given.")

HEADER = """\
| structure | how | pixels | logits, float32 | pixels | gradients, float64 | seconds to convert |
|---|---|---|---|---|---|---|"""


def measured(structure) -> dict:
    """Return the row of one architecture, for JSON."""
    from tests.helpers import structures

    module = structures.build_random(structure)
    return {
        "how": structure.how,
        "seconds": structures.conversion_seconds(structure, module),  # first: nothing is traced yet
        "size": structure.size,
        "logits": structures.logits_difference(structure, module),
        "small": structure.small,
        "gradients": structures.gradient_difference(structure, module),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch")},
    }


def table(rows: dict[str, dict]) -> str:
    """Return the rows as a Markdown table.

    >>> row = {"how": "native", "size": 224, "logits": 2e-6, "small": 64, "gradients": 3e-15}
    >>> print(table({"resnet18": {**row, "seconds": 2.345}}).splitlines()[-1])
    | resnet18 | native | 224 | 2.0e-06 | 64 | 3.0e-15 | 2.3 |
    """
    lines = [
        f"| {name} | {row['how']} | {row['size']} | {row['logits']:.1e} | {row['small']} "
        f"| {row['gradients']:.1e} | {row['seconds']:.1f} |"
        for name, row in rows.items()
    ]
    return "\n".join([HEADER, *lines])


def main(_):
    sys.path.insert(0, str(ROOT))
    from tests.helpers.structures import STRUCTURES

    chosen = [s for s in STRUCTURES if not ONLY.value or s.name in ONLY.value]
    unknown = set(ONLY.value) - {s.name for s in chosen}
    if unknown:
        names = ", ".join(s.name for s in STRUCTURES)
        raise app.UsageError(f"no structure {', '.join(sorted(unknown))}; there are {names}")
    out = Path(OUT.value)
    rows = json.loads(out.read_text()) if out.exists() else {}
    for structure in chosen:
        logging.info("measuring %s", structure.name)
        rows[structure.name] = measured(structure)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table({s.name: rows[s.name] for s in STRUCTURES if s.name in rows}))


if __name__ == "__main__":
    app.run(main)
