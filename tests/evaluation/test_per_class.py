"""Average precision per class, against cases worked by hand and against COCO's own mean."""

import json

import pytest

from mmbivit.evaluation import precision_per_class


def annotation(number, image, category, box, crowd=0):
    return dict(id=number, image_id=image, category_id=category, bbox=box, area=box[2] * box[3], iscrowd=crowd)


def detection(image, category, box, score):
    return dict(image_id=image, category_id=category, bbox=box, score=score)


@pytest.fixture
def files(tmp_path):
    """Class cat is found in two of two, dog in one of two, bird never; fish is not annotated; ids are not in order."""
    boxes = [[10, 10, 40, 40], [60, 60, 30, 30]]
    truth = dict(
        images=[dict(id=1, width=100, height=100), dict(id=2, width=100, height=100)],
        categories=[dict(id=7, name="cat"), dict(id=3, name="dog"), dict(id=9, name="bird"), dict(id=4, name="fish")],
        annotations=[
            annotation(1, 1, 7, boxes[0]),
            annotation(2, 2, 7, boxes[1]),
            annotation(3, 1, 3, boxes[1]),
            annotation(4, 2, 3, boxes[0]),
            annotation(5, 1, 9, boxes[0]),
            annotation(6, 2, 9, boxes[0], crowd=1),
        ],
    )
    found = [
        detection(1, 7, boxes[0], 0.9),
        detection(2, 7, boxes[1], 0.8),
        # An IoU of 0.8 with the annotated 30 x 30: right for 7 of the 10 thresholds, 0.50 to 0.80.
        detection(1, 3, [60, 60, 30, 24], 0.7),
        detection(1, 4, boxes[0], 0.5),
    ]
    for name, content in (("truth", truth), ("found", found)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path / "truth.json", tmp_path / "found.json"


def test_values_worked_by_hand(files):
    cat, dog, bird, fish = precision_per_class(*files, "bbox")
    assert (cat.name, cat.objects, cat.ap, cat.ap50) == ("cat", 2, 1.0, 1.0)
    # Half of the dogs are found: of the 101 recalls 0, 0.01 .. 1, the first 51 are reached with precision 1.
    assert (dog.objects, dog.ap50) == (2, pytest.approx(51 / 101))
    assert dog.ap == pytest.approx(51 / 101 * 7 / 10)
    assert (bird.objects, bird.ap, bird.ap50) == (1, 0.0, 0.0)
    assert (fish.objects, fish.ap, fish.ap50) == (0, None, None)


def test_classes_are_those_asked_for_in_their_order(files, capsys):
    assert [item.name for item in precision_per_class(*files, "bbox", ("bird", "cat"))] == ["bird", "cat"]
    assert capsys.readouterr().out == ""


def test_what_is_not_there_is_named(files, tmp_path):
    with pytest.raises(ValueError, match=r"class cow is not in .*truth.json, which has cat, dog, bird, fish"):
        precision_per_class(*files, "bbox", ("cow",))
    with pytest.raises(FileNotFoundError, match="none.json does not exist"):
        precision_per_class(files[0], tmp_path / "none.json", "bbox")
