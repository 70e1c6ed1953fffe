"""Detections side by side, from image files, annotation files and checkpoints of any detector."""

import json

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from mmbivit.analysis.figures.detections import Instance
from mmbivit.apis import predict
from mmbivit.report.plots.detections import plot_detections, read_annotations, read_detections, read_images


@pytest.fixture
def images(coco):
    return sorted((coco / "val2017").iterdir())


@pytest.fixture
def annotations(coco):
    return coco / "annotations" / "instances_val2017.json"


def write(tmp_path, content):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    return file


def test_annotations_and_detections_of_two_models(tmp_path, configs, float_checkpoint, images, annotations):
    models = [(title, configs["float"], float_checkpoint) for title in ("one", "two")]
    found = predict(configs["float"], float_checkpoint, images, tmp_path)
    scores = [json.loads(result["json_file"].read_text())["scores"] for result in found]
    threshold = sorted(score for image in scores for score in image)[-2]
    figure = plot_detections(images, models, annotations, score_thr=threshold)
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    shown = [[f"person {s:.1f}".replace("0.", ".") for s in image if s >= threshold] for image in scores]
    assert texts == [["person"], ["person"], *shown, *shown] and sum(map(len, shown)) == 2
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["annotation", "one", "two"]
    for axis, file in zip(figure.axes, images * 3, strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), cv2.imread(str(file))[..., ::-1])
    content = json.loads(annotations.read_text())
    box = figure.axes[1].patches[0]
    assert [box.get_x() + 0.5, box.get_y() + 0.5, box.get_width(), box.get_height()] == content["annotations"][1][
        "bbox"
    ]
    assert figure.get_supxlabel() == f"detections with a score of {threshold:g} or more"


def test_a_class_whose_name_looks_like_a_formula(tmp_path, configs, float_checkpoint, images):
    checkpoint = torch.load(float_checkpoint, weights_only=False)
    checkpoint["meta"]["dataset_meta"]["classes"] = ("$\\nosuch$",)
    torch.save(checkpoint, tmp_path / "odd.pth")
    figure = plot_detections(images[:1], [("one", configs["float"], tmp_path / "odd.pth")], score_thr=0)
    figure.savefig(tmp_path / "detections.png")
    assert figure.axes[0].texts


def test_a_detector_without_masks(tmp_path, configs, images):
    """RetinaNet-like configs have a JSON without masks; here Faster R-CNN, with random weights."""
    config = tmp_path / "faster.py"
    roi_head = "dict(mask_roi_extractor=None, mask_head=None)"
    config.write_text(f"_base_ = {str(configs['float'])!r}\nmodel = dict(type='FasterRCNN', roi_head={roi_head})\n")
    checkpoint = random_checkpoint(config, tmp_path / "faster.pth")
    figure = plot_detections(images[:1], [("boxes", config, checkpoint)], score_thr=0)
    (axis,) = figure.axes
    assert len(axis.patches) == 5 and not axis.collections and len(axis.images) == 1
    assert all(text.get_text().startswith("person ") for text in axis.texts)


def random_checkpoint(config, path):
    from mmengine.registry import MODELS, DefaultScope

    from mmbivit.apis import load_config

    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(load_config(config).model)
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


def test_detections_below_the_threshold_are_left_out_and_classes_named(tmp_path):
    mask, empty = np.zeros((2, 8, 8), np.uint8)
    mask[2:4, 3:6] = 1
    masks = [mask_utils.encode(np.asfortranarray(part)) for part in (mask, mask, empty, mask)]
    masks = [part | dict(counts=part["counts"].decode()) for part in masks]
    found = dict(labels=[1, 0, 0, 7], scores=[0.9, 0.4, 0.5, 0.6], bboxes=[[3, 2, 6, 4]] * 4)
    box = (3, 2, 3, 2)
    file = write(tmp_path, found | dict(masks=masks))
    assert read_detections(file, ["cat", "dog"], 0.5) == [
        Instance("dog", box, masks[0], 0.9),
        Instance("cat", box, None, 0.5),  # whose mask has no pixel
        Instance("7", box, masks[3], 0.6),
    ]
    boxes = read_detections(write(tmp_path, found), ["cat", "dog"], 0.5)
    assert boxes == [Instance("dog", box, None, 0.9), Instance("cat", box, None, 0.5), Instance("7", box, None, 0.6)]


def test_annotations_of_any_ids_with_every_kind_of_mask(tmp_path):
    """Also without one; crowds are left out, and so are other images."""
    mask = np.zeros((10, 20), np.uint8)
    mask[2:6, 3:9] = 1
    rle = mask_utils.encode(np.asfortranarray(mask))
    runs = [int(n) for n in np.diff(np.flatnonzero(np.diff(np.r_[2, mask.T.ravel(), 2])))]
    segmentations = [
        [[3, 2, 9, 2, 9, 6, 3, 6]],
        rle | dict(counts=rle["counts"].decode()),
        dict(size=[10, 20], counts=runs),
        [],
        [[3, 2, 9, 2]],  # too few points
    ]
    common = dict(image_id="b", bbox=[3, 2, 6, 4], area=24, iscrowd=0)
    items = [common | dict(id=n, category_id=(90, 7)[n % 2], segmentation=s) for n, s in enumerate(segmentations)]
    items += [items[0] | dict(id=5, image_id=1), items[1] | dict(id=6, iscrowd=1)]
    del items[3]["segmentation"]
    pictures = [
        dict(id=1, file_name="x/1.png", width=20, height=10),
        dict(id="b", file_name="y/1.png", width=20, height=10),
    ]
    categories = [dict(id=90, name="dog"), dict(id=7, name="cat")]
    path = write(tmp_path, dict(images=pictures, annotations=items, categories=categories))
    image = tmp_path / "y" / "1.png"
    classes, (instances,) = read_annotations(path, {image: np.zeros((10, 20, 3), np.uint8)})
    assert classes == ["dog", "cat"]
    assert [instance.label for instance in instances] == ["dog", "cat", "dog", "cat", "dog"]
    assert {instance.box for instance in instances} == {(3, 2, 6, 4)} and instances[0].score is None
    for instance in instances[:3]:
        np.testing.assert_array_equal(mask_utils.decode(instance.mask), mask)
    assert instances[3].mask is None and instances[4].mask is None


def test_images_that_the_annotations_do_not_fit_are_named(tmp_path, images, annotations):
    other = tmp_path / "other.png"
    cv2.imwrite(str(other), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"instances_val2017.json has 0 images with the name of .*other.png; expected"):
        read_annotations(annotations, read_images([other]))
    same_name = tmp_path / images[0].name
    cv2.imwrite(str(same_name), np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=rf"{images[0].name} has 64 x 64 pixels, .*{images[0].name} 9 x 8$"):
        read_annotations(annotations, read_images([same_name]))
    content = json.loads(annotations.read_text())
    content["images"] = [image | dict(file_name=f"{n}/a.png") for n, image in enumerate(content["images"])]
    with pytest.raises(ValueError, match=r"has 0 images with the name of .*2/a.png"):
        read_annotations(write(tmp_path, content), {tmp_path / "2" / "a.png": np.zeros((64, 64, 3), np.uint8)})
    with pytest.raises(FileNotFoundError, match="missing.json"):
        read_annotations(tmp_path / "missing.json", read_images([other]))


def test_bad_input_is_answered_in_one_line(
    tmp_path, configs, classifier_configs, float_checkpoint, images, annotations
):
    model = ("float", configs["float"], float_checkpoint)
    many = [tmp_path / f"{n}.png" for n in range(9)]
    for file in many:
        cv2.imwrite(str(file), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="^9 images are given; allowed: 8 or fewer side by side$"):
        plot_detections(many, [model])
    twin = tmp_path / images[0].name
    twin.write_bytes(images[0].read_bytes())
    with pytest.raises(ValueError, match="give images of equal names in separate calls"):
        plot_detections([images[0], twin], [model])
    many[0].write_bytes(many[0].read_bytes()[:40])
    with pytest.raises(ValueError, match="^image .*0.png cannot be decoded$"):
        plot_detections(many[:1], [model])
    with pytest.raises(ValueError, match=r"^score_thr=1.5; allowed: a number >= 0 and <= 1$"):
        plot_detections(images, [model], score_thr=1.5)
    with pytest.raises(ValueError, match="^two rows have the title 'float'"):
        plot_detections(images, [model, model])
    with pytest.raises(ValueError, match="^two rows have the title 'annotation'"):
        plot_detections(images, [("annotation", *model[1:])], annotations)
    with pytest.raises(ValueError, match="is the config of a classifier"):
        plot_detections(images, [("a", classifier_configs["float"], float_checkpoint)])
    with pytest.raises(ValueError, match="is of a float network, the config's is binary"):
        plot_detections(images, [("a", configs["binary"], float_checkpoint)])
    with pytest.raises(ValueError, match="is a packed file"):
        plot_detections(images, [("a", configs["float"], "some.safetensors")])
