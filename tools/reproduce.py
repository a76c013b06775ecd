"""Compares REINFORCE++ with PPO, GRPO and others, by the protocol of docs/reproduction.md.

    python tools/reproduce.py run [speed] [length] [math] [--seeds 1 2 3] [--quick]
    python tools/reproduce.py report [--quick]

`run` runs the experiments, all three by default, and reports. Everything is written below RUN (an
environment variable, default runs/reproduction). Finished runs stay as they are, interrupted ones
resume. `report` draws the pictures and fills the tables of the document from the results alone, one
JSONL file per experiment in docs/reproduction.

--quick: one seed and very few steps, to see that everything works. Results and a filled copy of the
document go to RUN/quick; docs stays as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from reproduction.protocol import COMMANDS, EXPERIMENTS, QUICK, ROOT, Scale
from reproduction.statistics import MOST_VALUES

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import REFUSED, RunFailure


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(argv)
    run = Path(os.environ.get("RUN", "runs/reproduction")).absolute()
    documents = run / "quick" if options.quick else ROOT / "docs"
    try:
        if options.action == "run":
            run_experiments(run, documents, options)
        report(documents)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except RunFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="speed, length, math")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 1 2 3")
    parser.add_argument("--quick", action="store_true", help="a short run, written to RUN/quick")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.names) - set(COMMANDS))
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}, only {', '.join(COMMANDS)}")
    scale = QUICK if options.quick else Scale()
    seeds = options.seeds or scale.seeds
    if set(seeds) & set(scale.selection_seeds):
        parser.error(f"--seeds {scale.selection_seeds[0]}: this seed chooses the learning rates")
    if len(set(seeds)) != len(seeds) or len(seeds) > MOST_VALUES:
        parser.error(f"--seeds: up to {MOST_VALUES} different seeds")
    options.scale = replace(scale, seeds=tuple(seeds))
    return options


def run_experiments(run: Path, documents: Path, options: argparse.Namespace) -> None:
    """Runs what the command line names; the results go to `documents`/reproduction."""
    from reproduction.campaign import Campaign
    from reproduction.execute import Runner, first_cores

    wanted = [name for key in options.names or COMMANDS for name in COMMANDS[key]]
    campaign = Campaign(Runner(run, first_cores(2)), options.scale, documents / "reproduction")
    campaign.run(experiment for experiment in EXPERIMENTS if experiment.name in wanted)


def report(documents: Path) -> None:
    """Fills the tables of the document and draws the pictures, from the results in
    `documents`/reproduction."""
    from reproduction import document, drawing
    from reproduction.results import read_rows

    folder = documents / "reproduction"
    sections = {}
    for name in ("choose", "models", *(experiment.name for experiment in EXPERIMENTS)):
        rows = read_rows(folder / f"{name}.jsonl")
        if not rows:
            continue
        sections[name] = document.section(name, rows)
        if name in drawing.PANELS:
            drawing.draw(name, rows, folder / f"{name}.png")
    out = documents / "reproduction.md"
    document.write_document(ROOT / "docs/reproduction.md", out, sections)
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
