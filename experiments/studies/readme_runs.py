"""The README's runs on the digits, one after the other, and what they say.

    python experiments/studies/readme_runs.py --workdir=DIR

Each is the command as it stands there, in a folder below `--workdir`; where one is there already,
the command goes on or says again what it said. On two CPU cores all take ten minutes.
"""

import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

from moth_jax.run.origin import origin
from moth_jax.storage.files import read_json, write_json

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
OUT = flags.DEFINE_string("out", "experiments/results/readme_runs", "Folder of the result.")

BACKDOOR = (
    *("--config.phase=harden", "--config.clean_share=0.2", "--config.backdoor.kind=patch"),
    *("--config.backdoor.target=7", "--config.backdoor.size=2", "--config.backdoor.margin=0"),
)
NEAREST = "--config.harden.scheduler=nearest"
# In the order in which they need each other; {} is the folder of all.
RUNS = {
    "digits": (),
    "backdoor": (*BACKDOOR, NEAREST),
    "paper's scheduler": BACKDOOR,
    "recovered": (
        *(*BACKDOOR, NEAREST, "--config.method=fine_tuning"),
        "--config.model.checkpoint={}/backdoor/hardened",
    ),
    "scan": (
        *("--config.phase=scan", "--config.scan.num_steps=100"),
        "--config.model.checkpoint={}/backdoor/original",
    ),
}


def run(name: str, options: tuple[str, ...]) -> dict:
    """Return what the command says at its end, with the device that it names."""
    folder = Path(WORKDIR.value).expanduser().resolve()
    workdir = folder / name.replace(" ", "_")
    given = [option.format(folder) for option in options]
    line = [sys.executable, "-m", "moth_jax.main", "--config=configs/digits.py"]
    started = time.perf_counter()
    done = subprocess.run(
        [*line, f"--workdir={workdir}", *given],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    if done.returncode:
        sys.exit(f"{done.stderr}{name} ended with exit code {done.returncode}")
    # Each line begins with the time of day; the figures, with the accuracy.
    said = [line[len("00:00:00 ") :] for line in done.stderr.splitlines()]
    first = max(i for i, line in enumerate(said) if line.startswith("test accuracy"))
    result = read_json(workdir / ("scan.json" if name == "scan" else "summary.json"))
    return {
        "options": [option.format("DIR") for option in options],
        "device": result.get("device"),
        "seconds": time.perf_counter() - started,
        "says": [line for line in said[first:] if not line.startswith("report")],
    }


def main(_) -> None:
    runs = {}
    for name, options in RUNS.items():
        runs[name] = run(name, options)
        print(f"{name}\n", *(f"    {text}\n" for text in runs[name]["says"]), sep="", flush=True)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    result = {
        **origin(),
        "runs": runs,
    }
    write_json(out / "cpu.json", result)


if __name__ == "__main__":
    app.run(main)
