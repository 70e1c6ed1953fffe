"""Run in each of two processes: evaluates and predicts with packed files, and writes down what it saw."""

import io
import json
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from mmengine.dist import is_distributed

from mmbivit.apis import evaluate, evaluation_config

TOOLS = Path(__file__).parents[2] / "tools"


def call(tool: str, *args: object) -> dict[str, object]:
    """Run a tool in this process, and return its exit code and what it printed."""
    sys.argv = [tool, *map(str, args)]
    code, out, err = 0, io.StringIO(), io.StringIO()
    # Pictures with the colours of the palette, which mmdet changes at random.
    colours = patch("mmdet.visualization.local_visualizer.jitter_color", lambda colour: colour)
    with redirect_stdout(out), redirect_stderr(err), colours:
        try:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    return dict(code=code, out=out.getvalue(), err=err.getvalue())


def evaluated(config: str, file: str, folder: Path, **options: str) -> dict[str, float]:
    """Evaluate a packed file as ``tools/test.py`` does; predictions go to ``folder/out.pkl``."""
    cfg = evaluation_config(config, file, work_dir=str(folder), **options)
    cfg.experiment_name = folder.name
    return evaluate(cfg, out=folder / "out.pkl")


def main(folder: Path) -> None:
    """Do what ``folder/plan.json`` says, with the processes on one machine each, then both on one."""
    plan, rank = json.loads((folder / "plan.json").read_text()), os.environ["RANK"]
    ports, seen = iter(plan["ports"]), {}

    def connect_anew() -> None:  # at another port, as the last meeting point may still be open
        os.environ["MASTER_PORT"] = str(next(ports))

    for machines in (2, 1):
        os.environ["LOCAL_WORLD_SIZE"] = str(2 // machines)
        place = folder / (f"machine{rank}" if machines == 2 else "machine")
        place.mkdir(exist_ok=True)
        os.chdir(place)
        for kind in ("detector", "classifier"):
            connect_anew()
            seen[f"{kind} on {machines}"] = evaluated(
                plan[f"{kind}_config"], plan[kind], folder / f"{kind}{machines}", launcher="pytorch"
            )
    for name, args in plan["predictions"].items():
        connect_anew()
        seen[name] = call("deployment/predict_packed.py", *args, "--launcher", "pytorch")
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    assert not is_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
