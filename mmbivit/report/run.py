"""What a work dir tells of its run: config, environment, checkpoint, model."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from torch import nn
from torch.utils.data import Dataset

from mmbivit.apis.checkpoints import load_trained_model
from mmbivit.apis.config import is_classifier, load_config
from mmbivit.binary import BinaryLinear
from mmbivit.checks import UserError
from mmbivit.datasets import set_data_root
from mmbivit.engine import find_resumable_checkpoint
from mmbivit.engine.decoupled_training_hook import find_staged_backbone

__all__ = ["Run", "open_run", "spread"]

_ENVIRONMENT = re.compile(r"^System environment:\n(.*?)^-{20,}$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        work_dir: its folder.
        cfg: the config that MMEngine wrote there, with the data's folder replaced if another was given.
        checkpoint: the weights that are looked at.
        model: the network with them, in evaluation mode.
        environment: what MMEngine's log says of the machine; empty if there is no log.
    """

    work_dir: Path
    cfg: Config
    checkpoint: Path
    model: nn.Module
    environment: str

    @property
    def name(self) -> str:
        """The name of the config."""
        return Path(self.cfg.filename).stem

    @property
    def is_classifier(self) -> bool:
        """Whether the model classifies images; else it detects objects."""
        return is_classifier(self.cfg)

    @property
    def is_binary(self) -> bool:
        """Whether it has binary layers."""
        return any(isinstance(module, BinaryLinear) for module in self.model.modules())

    @property
    def stage(self) -> int | None:
        """The training stage of the weights; ``None`` for a float network."""
        return find_staged_backbone(self.model).stage if self.is_binary else None

    def write_config(self, folder: Path, cfg: Config | None = None) -> Path:
        """Write the config, or one made from it, as a file for functions that take one; returns its path."""
        folder.mkdir(exist_ok=True)
        file = folder / f"{self.name}.py"
        (cfg or self.cfg).dump(str(file))
        return file

    def test_dataset(self) -> Dataset:
        """Build the data set of the test data."""
        loader = self.cfg.get("test_dataloader") or self.cfg.get("val_dataloader")
        if not loader:
            raise UserError(f"{self.cfg.filename} has no test_dataloader, so there are no example images")
        with DefaultScope.overwrite_default_scope(self.cfg.get("default_scope") or "mmengine"):
            return DATASETS.build(copy.deepcopy(loader["dataset"]))

    def images(self, count: int) -> list[Path]:
        """Return so many images of the test data, evenly spread; all of them, if there are fewer."""
        dataset = self.test_dataset()
        describe = getattr(dataset, "get_data_info", dataset.__getitem__)  # mmdet's know the path without loading
        return [Path(describe(i)["img_path"]) for i in spread(count, len(dataset))]


def spread(count: int, size: int) -> list[int]:
    """Return ``count`` indices of ``size`` things, evenly spread; all of them, if there are fewer."""
    count = min(count, size)
    return [i * size // count for i in range(count)]


def open_run(work_dir: str | Path, checkpoint: str | Path | None = None, data_root: str | None = None) -> Run:
    """Load what a work dir of ``tools/train.py`` has.

    Args:
        work_dir: the folder.
        checkpoint: weights to look at; by default the newest that loads.
        data_root: folder of the data set, if it is not where the config says.

    Raises:
        FileNotFoundError: if the folder does not exist, or has no config or no checkpoint.
        ValueError: if the checkpoint is of another model.
    """
    work_dir = Path(work_dir)
    if not work_dir.is_dir():
        raise FileNotFoundError(f"work dir {work_dir} does not exist")
    configs = [path for path in work_dir.iterdir() if path.suffix in (".py", ".yaml", ".yml", ".json")]
    if not configs:
        raise FileNotFoundError(f"{work_dir} has no config: give a work dir that tools/train.py wrote")
    cfg = load_config(max(configs, key=lambda path: path.stat().st_mtime_ns))
    if data_root is not None:
        set_data_root(cfg, data_root)
    checkpoint = checkpoint or find_resumable_checkpoint(work_dir)
    if checkpoint is None:
        raise FileNotFoundError(f"{work_dir} has no checkpoint yet; give one with --checkpoint FILE")
    return Run(work_dir, cfg, Path(checkpoint), load_trained_model(cfg, checkpoint), _environment(work_dir))


def _environment(work_dir: Path) -> str:
    """What the newest log says of the machine that trained."""
    for log in sorted(work_dir.glob("*/*.log"), reverse=True):
        if found := _ENVIRONMENT.search(log.read_text(errors="replace")):
            return found[1].strip("\n")
    return ""
