"""Detectors in memory, and what they find in one picture, as the page takes it."""

import base64
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from torch import nn

from mmbivit.analysis import model_size
from mmbivit.apis.config import load_config
from mmbivit.apis.detection import detection_transform
from mmbivit.apis.images import MAX_PIXELS, load_usable
from mmbivit.apis.predict import load_network
from mmbivit.apis.route import find_route, refuse_packed_file
from mmbivit.binary import Quantizer
from mmbivit.checks import UserError
from mmbivit.datasets.checked_pipeline import CheckedPipeline
from mmbivit.engine.quiet import quiet

__all__ = ["Network", "detect_picture", "load_networks"]

PREVIEW_SIDE, PREVIEW_QUALITY = 1600, 90  # pixels of the longer side of the picture that is shown, and JPEG's quality


@dataclass(frozen=True)
class Network:
    """A detector, and what the page says of it.

    Attributes:
        title: of its column.
        size: its megabytes, in words.
        model: the detector, in evaluation mode, with ``dataset_meta``.
        transform: its transform of test images.
    """

    title: str
    size: str
    model: nn.Module
    transform: CheckedPipeline


@quiet()
def load_networks(
    file: str | Path,
    float_detector: tuple[str, str] | None = None,
    binary_detector: tuple[str, str] | None = None,
) -> list[Network]:
    """Load a packed detector and, if they are given, those that it is compared with; all run on the CPU.

    Args:
        file: the packed file.
        float_detector: config and checkpoint of the float detector.
        binary_detector: config and checkpoint of the detector whose bits are simulated.

    Returns:
        The networks in the order of the page's columns: float, binary, packed.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if one is no detector, does not fit its config, or is binary where a float one belongs, and so on.
    """
    networks = []
    for option, title, pair in (
        ("--float", "float", float_detector),
        ("--binary", "binary, simulated", binary_detector),
    ):
        if pair is not None:
            network = _load(title, *pair)
            if any(isinstance(part, Quantizer) for part in network.model.modules()) != (option == "--binary"):
                kind, other = ("binary", "--binary") if option == "--float" else ("float", "--float")
                raise UserError(f"{option}: the detector of {pair[0]} is {kind}; give it with {other}")
            networks.append(network)
    return [*networks, _load("packed", None, file)]


def _load(title: str, config: str | None, checkpoint: str | Path) -> Network:
    if config is not None:
        refuse_packed_file(checkpoint)
    cfg = None if config is None else load_config(config)
    route = find_route(cfg, checkpoint)
    if route.kind != "detector":
        raise UserError(f"{route.source} is of a {route.kind}; the page shows what detectors find")
    model, cfg = load_network(route, cfg, "cpu")
    if route.packed:
        size = f"{Path(checkpoint).stat().st_size / 1e6:.2f} MB, the packed file"
    else:
        size = f"{model_size(model).float_bytes / 1e6:.2f} MB as float32"
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        return Network(title, size, model, detection_transform(cfg))


@quiet()
@torch.no_grad()
def detect_picture(networks: list[Network], content: bytes, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Detect objects in one picture with all networks, one after the other.

    The picture is written to a temporary folder, which is gone afterwards.

    Args:
        networks: of the page's columns.
        content: the file of the picture.
        max_pixels: a picture of more pixels is not decoded.

    Returns:
        ``width`` and ``height`` of the picture, ``picture`` as it is shown (a ``data:`` address), and ``columns``: of
        each network ``milliseconds``, from the transformed picture to boxes and masks, and ``detections``, best first,
        with ``label``, ``score``, ``box`` (x1, y1, x2, y2 in pixels) and ``outline`` (closed polygons, x, y in turn).

    Raises:
        ValueError: if the picture cannot be used; the message is for whoever sent it.
    """
    with TemporaryDirectory(prefix="mmbivit-serve-") as folder:
        file = Path(folder) / "picture"
        file.write_bytes(content)
        problems: dict[Path, str] = {}

        def load(file: Path) -> list[dict[str, Any] | None]:
            return [network.transform(dict(img_path=str(file), img_id=0)) for network in networks]

        (usable,) = load_usable([[file]], load, problems, max_pixels)
        if problems:
            raise UserError(problems[file].replace(str(file), "The picture"))
        # As the detectors see it: turned by EXIF, the first picture of a moving one; with some, in floats.
        picture = networks[0].transform.transforms[0](dict(img_path=str(file)))["img"].astype(np.uint8)
        ((_, inputs),) = usable
        columns = [_detect(network, item) for network, item in zip(networks, inputs, strict=True)]
    height, width = picture.shape[:2]
    return dict(width=width, height=height, picture=_preview(picture), columns=columns)


def _detect(network: Network, inputs: dict[str, Any] | None) -> dict[str, Any]:
    batch = pseudo_collate([inputs])
    start = time.perf_counter()
    (result,) = network.model.test_step(batch)
    milliseconds = 1000 * (time.perf_counter() - start)
    found = result.pred_instances.cpu()
    names = (network.model.dataset_meta or {}).get("classes", ())
    masks = found.masks if "masks" in found else [None] * len(found)
    detections = [
        dict(label=names[label] if label < len(names) else str(label), score=score, box=box, outline=outline(mask))
        for label, score, box, mask in zip(
            found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist(), masks, strict=True
        )
    ]
    detections.sort(key=lambda detection: -detection["score"])
    return dict(milliseconds=milliseconds, detections=detections)


def outline(mask: Any) -> list[list[float]]:
    """Return the border of a mask ``(H, W)``, of holes too, as polygons through the pixels that lie on it."""
    if mask is None:
        return []
    polygons, _ = cv2.findContours(np.asarray(mask, np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [polygon.ravel().tolist() for polygon in polygons]


def _preview(picture: np.ndarray) -> str:
    """Return a picture as a ``data:`` address that every browser shows, no larger than is needed to look at it."""
    scale = min(1.0, PREVIEW_SIDE / max(picture.shape[:2]))
    height, width = (max(1, round(scale * side)) for side in picture.shape[:2])
    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    _, content = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, PREVIEW_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"
