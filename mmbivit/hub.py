"""Networks as folders of the Hugging Face Hub: a model card and one file of tensors and plain words, no pickle.

``model.safetensors`` is a packed file (:mod:`mmbivit.deploy`) or, of a network that is not packed, the same with the
arguments of its backbone (:mod:`mmbivit.deploy.trained`). Nothing else in a folder is read, nothing in it is run, and
what does not fit is refused in one line. ``huggingface_hub`` (the extra ``hub``) is imported where it is needed: to
write a card, to fetch and to upload.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmbivit import __version__
from mmbivit.checks import UserError
from mmbivit.compat import DependencyError
from mmbivit.deploy import load, save
from mmbivit.deploy.header import FORMAT, KINDS, TRAINED_FORMAT, open_packed
from mmbivit.packed import PackedNetwork

if TYPE_CHECKING:
    from mmbivit.analysis import Complexity

__all__ = ["CARD", "FILE", "Card", "Metric", "from_pretrained", "push_to_hub", "save_pretrained"]

FILE, CARD = "model.safetensors", "README.md"
_TASKS = dict(zip(KINDS, ("image-feature-extraction", "image-classification", "object-detection"), strict=True))
_HINT = "write one with mmbivit.hub.save_pretrained"


@dataclass(frozen=True)
class Metric:
    """A result, and where it comes from.

    Args:
        name: such as ``top-1 accuracy, %``.
        value: the number.
        data: what it was measured on, with the split.
        source: how to find or repeat it: the command and its log, or a paper's table.

    Raises:
        ValueError: if one of them is empty, or the value is no number.
    """

    name: str
    value: float
    data: str
    source: str

    def __post_init__(self) -> None:
        _check_texts("a metric", name=self.name, data=self.data, source=self.source)
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not math.isfinite(self.value):
            raise UserError(f"the metric {self.name!r} has the value {self.value!r}; expected a finite number")


@dataclass(frozen=True)
class Card:
    """What a model card says that the network itself does not.

    Args:
        title: the model's name.
        data: what it was trained on.
        method: how: the recipe, the config, the stages.
        metrics: results, each with its source; none where there are none.
        license: of the weights, as the Hub abbreviates it, such as ``apache-2.0``; ``None`` where it is not decided.
        input_shape: channels, height and width of an image, for which operations are counted.
        costs: :func:`mmbivit.analysis.complexity` of the network that a packed one was made from, as packed networks
            are not counted; others are.

    Raises:
        ValueError: if title, data or method is empty.
    """

    title: str
    data: str
    method: str
    metrics: Sequence[Metric] = ()
    license: str | None = None
    input_shape: tuple[int, int, int] = (3, 224, 224)
    costs: "Complexity | None" = None

    def __post_init__(self) -> None:
        _check_texts("a model card", title=self.title, data=self.data, method=self.method)


def save_pretrained(model: nn.Module, folder: str | Path, card: Card, config: Any = None) -> None:
    """Write a network and its model card into a folder, which is made.

    Args:
        model: a backbone or a classifier, or what :func:`mmbivit.deploy.pack` returns, of a detector, too.
        folder: the folder; one that has a model or a card already is left as it is.
        card: what the model card says.
        config: the config that the model was built from: the run's, or its ``model``. A packed backbone needs none;
            with a run's, a classifier keeps the transforms of its test images.

    Raises:
        FileExistsError: if the folder has a model or a card.
        ValueError: for a model that cannot be stored, or a config that is not its own.
    """
    folder = Path(folder)
    for name in (FILE, CARD):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists; give another folder, or remove it")
    _import_hub()
    packed = isinstance(getattr(model, "backbone", model), PackedNetwork)
    costs = card.costs
    if packed:
        save(model, folder / FILE, config)
    else:
        from mmbivit.analysis import complexity
        from mmbivit.deploy.trained import save_trained

        costs = costs or complexity(model, card.input_shape)
        generator = torch.Generator().manual_seed(0)
        save_trained(model, folder / FILE, config, torch.randn(1, *card.input_shape, generator=generator))
    (folder / CARD).write_text(_card_text(folder / FILE, card, costs, packed), encoding="utf-8")


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load a network from a folder or from the Hub, in evaluation and on the CPU.

    A packed backbone needs torch and safetensors alone, a classifier MMEngine and timm, a detector MMDetection.

    Args:
        name: a folder that :func:`save_pretrained` wrote, or ``owner/repository`` on the Hub.
        revision: branch, tag or commit there.
        token: for what is not public there; by default that of ``hf auth login``.
        cache_dir: where files from there are kept.
        local_files_only: take what was fetched before.

    Raises:
        FileNotFoundError: if there is no such folder or repository, it has no ``model.safetensors``, or it cannot be
            fetched.
        ValueError: if the file is truncated, foreign, of a newer format, or does not fit what it says of itself.
    """
    if Path(name).is_dir():
        path = Path(name) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"folder {name} has no {FILE}; {_HINT}. Nothing else is loaded, and no pickle")
    else:
        options = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        path = _fetch(str(name), options)
    with open_packed(path, what=f"{FILE} of mmbivit's", hint=_HINT) as file:
        found = (file.metadata() or {}).get("format")
    if found not in (FORMAT, TRAINED_FORMAT):
        raise UserError(f"{path} is a safetensors file, but not of mmbivit's; {_HINT}")
    if found == TRAINED_FORMAT:
        from mmbivit.deploy.trained import load_trained

        return load_trained(path)
    return load(path)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    card: Card,
    config: Any = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a model of mmbivit",
) -> str:
    """Write a network and its card, as :func:`save_pretrained` does, and upload both in one commit.

    Args:
        model, card, config: see :func:`save_pretrained`.
        repo_id: ``owner/repository``, which is made where it does not exist.
        private: whether one that is made is private.
        token: by default that of ``hf auth login``.
        branch: where the commit goes, the main branch by default.
        create_pr: propose the commit instead.
        commit_message: its message.

    Returns:
        The address of the commit.

    Raises:
        ValueError: as :func:`save_pretrained`, before anything is made on the Hub.
    """
    api = _import_hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, card, config)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise DependencyError(f"mmbivit.hub needs huggingface_hub ({error}): pip install huggingface_hub") from error
    return huggingface_hub


def _fetch(name: str, options: dict[str, Any]) -> Path:
    hub = _import_hub()
    try:
        return Path(hub.hf_hub_download(name, FILE, **options))
    except Exception as error:  # its client raises errors of its own, of HTTP and of the system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{name} is no folder, and its {FILE} cannot be fetched from the Hub: {reason}"
        ) from error


def _check_texts(what: str, **texts: str) -> None:
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{what} needs its {name}; expected a text, got {text!r}")


def _card_text(path: Path, card: Card, costs: "Complexity | None", packed: bool) -> str:
    """Return a model card: the data that the Hub reads, then what people read."""
    with open_packed(path) as file:
        said = file.metadata()
    hub = _import_hub()
    task = _TASKS[said["kind"]]
    results = [
        hub.EvalResult(task, metric.data, metric.data, metric.name, metric.value, metric_name=metric.name)
        for metric in card.metrics
    ]
    data = hub.ModelCardData(
        library_name="mmbivit",
        license=card.license,
        pipeline_tag=task,
        tags=["mmbivit", "vision-transformer", "binary-neural-network", "packed" if packed else "simulated"],
        model_name=card.title,
        eval_results=results or None,
    )
    state = "computes on bits" if packed else "keeps its weights as floats, and is binary where its recipe says so"
    kind = f"{said['kind']} with {said['network']}" if said["kind"] != "backbone" else f"backbone, {said['network']}"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {card.title}",
        f"A {kind}, of mmbivit {__version__}. It {state}.",
        f"## Data\n\n{card.data}",
        f"## Method\n\n{card.method}",
        f"## Metrics\n\n{_metrics_table(card.metrics)}",
        f"## Size and operations\n\n{_costs_table(path, costs)}",
        "## Use\n\n```python\nfrom mmbivit.hub import from_pretrained\n\n"
        'model = from_pretrained("FOLDER OR REPOSITORY")\n```\n\n'
        "The file holds tensors and plain words; loading it runs no code from it.",
    ]
    return "\n\n".join(parts) + "\n"


def _metrics_table(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return "None were measured."
    rows = [f"| {_cell(m.name)} | {m.value:g} | {_cell(m.data)} | {_cell(m.source)} |" for m in metrics]
    return "\n".join(["| metric | value | data | source |", "|---|---|---|---|", *rows])


def _costs_table(path: Path, costs: "Complexity | None") -> str:
    rows = [("file", f"{path.stat().st_size / 1e6:.2f} MB")]
    if costs is None:
        rows.append(("operations", "not counted"))
    else:
        shape = " x ".join(map(str, costs.input_shape))
        rows += [
            ("parameters", f"{costs.params / 1e6:.3f} M"),
            ("weights, 1-bit ones as bits", f"{costs.size_bytes / 1e6:.3f} MB"),
            (f"binary multiply-accumulates (BOPs), {shape}", f"{costs.bops / 1e6:.2f} M"),
            (f"float multiply-accumulates (FLOPs), {shape}", f"{costs.flops / 1e6:.2f} M"),
            ("operations (BOPs / 64 + FLOPs)", f"{costs.ops / 1e6:.2f} M"),
        ]
        if costs.assumption:
            rows.append(("counted", costs.assumption))
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(
        ["| | |", "|---|---|", *lines, *(["", "Counted by `mmbivit.analysis.complexity`."] if costs else [])]
    )


def _cell(text: str) -> str:
    """Return a text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
