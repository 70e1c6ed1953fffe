"""Classes of image files, compared with a softmax by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmbivit.apis import UnusableImagesError, predict, print_predictions
from mmbivit.models import ImageClassifier
from tests.apis.damaged_images import USABLE, check_problems, write_images
from tests.tiny import CLASSES


@pytest.fixture
def predicted(classifier_configs, float_classifier):
    """Classify images with the float classifier."""

    def run(images, checkpoint=float_classifier, name="float", **options):
        return predict(classifier_configs[name], checkpoint, images, **options)

    return run


@pytest.fixture
def changed(float_classifier, tmp_path):
    """Write the float classifier's checkpoint with a change."""

    def write(change):
        checkpoint = torch.load(float_classifier, weights_only=False)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "changed.pth")
        return tmp_path / "changed.pth"

    return write


def probabilities(checkpoint, file) -> torch.Tensor:
    """Softmax of the logits of one image, without any of our data code."""
    backbone = dict(type="mmbivit.BinarySwinTransformer", arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)))
    model = ImageClassifier(backbone | dict(recipe="float", window_size=4, out_indices=(1,)), 3).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=False)["state_dict"])
    pixels = torch.tensor(np.asarray(Image.open(file).convert("RGB").resize((36, 36), Image.BILINEAR)))
    image = pixels[2:-2, 2:-2].permute(2, 0, 1) / 255  # timm's default: resize to 32 / 0.875, then centre crop
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        return model(((image - mean) / std)[None])[0].softmax(0)


def test_scores_are_the_softmax_and_names_those_of_the_training_data(
    predicted, float_classifier, image_folders, tmp_path
):
    files = [image_folders / "val" / "red" / "red_0.png", image_folders / "val" / "blue" / "blue_1.png"]
    results = predicted(files, out_dir=tmp_path / "out", topk=2)

    assert [json.loads((tmp_path / "out" / "preds" / f"{file.stem}.json").read_text()) for file in files] == results
    for file, result in zip(files, results, strict=True):
        expected = probabilities(float_classifier, file)
        order = expected.argsort(descending=True)[:2].tolist()
        assert (result["img_path"], result["labels"]) == (str(file), order)
        assert result["names"] == [CLASSES[label] for label in order]
        np.testing.assert_allclose(result["scores"], expected[order], rtol=1e-4)  # float32
        assert result["names"][0] == file.parent.name
    assert not (tmp_path / "out" / "vis").exists()


def test_batch_size_and_kind_of_file_change_nothing(predicted, image_folders, tmp_path):
    one, five = (predicted([image_folders / "val" / "red"], batch_size=size) for size in (1, 5))
    for a, b in zip(one, five, strict=True):
        assert (a["img_path"], a["labels"]) == (b["img_path"], b["labels"])
        np.testing.assert_allclose(a["scores"], b["scores"], rtol=1e-4)
    picture = Image.open(image_folders / "val" / "red" / "red_0.png").convert("L")
    picture.save(tmp_path / "grey.png")
    picture.convert("RGB").save(tmp_path / "rgb.bmp")
    grey, rgb = predicted([tmp_path / "grey.png", tmp_path / "rgb.bmp"])
    assert grey["scores"] == rgb["scores"]


def test_topk_is_at_most_the_number_of_classes(predicted, image_folders):
    (result,) = predicted([image_folders / "val" / "red" / "red_0.png"])
    assert len(result["labels"]) == 3
    assert sum(result["scores"]) == pytest.approx(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda checkpoint: checkpoint.pop("meta"),
        lambda checkpoint: checkpoint["meta"].pop("dataset_meta"),
        lambda checkpoint: checkpoint["meta"].update(dataset_meta=dict(classes=("only one",))),
    ],
)
def test_without_names_classes_are_numbers(predicted, changed, image_folders, change):
    (result,) = predicted([image_folders / "val" / "green" / "green_0.png"], checkpoint=changed(change))
    assert result["names"] == [str(label) for label in result["labels"]]
    assert result["labels"][0] == CLASSES.index("green")


def test_equal_names_are_a_problem_only_where_files_are_written(predicted, image_folders, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.open(image_folders / "val" / "red" / "red_0.png").save(tmp_path / folder / "same.png")
    images = [tmp_path / "a", tmp_path / "b"]
    assert len(predicted(images)) == 2
    with pytest.raises(ValueError, match=r"same.png: outputs are named after the image"):
        predicted(images, out_dir=tmp_path / "out")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_good_images_are_classified_and_bad_ones_named(predicted, tmp_path, recwarn, batch_size):
    folder = write_images(tmp_path / "images")
    with pytest.raises(UnusableImagesError) as caught:
        predicted([folder], out_dir=tmp_path / "out", batch_size=batch_size)
    results = caught.value.results
    check_problems(caught.value.problems, folder)
    assert [result["img_path"] for result in results] == [str(folder / name) for name in USABLE]
    for result in results:
        written = (tmp_path / "out" / "preds" / result["img_path"].rpartition("/")[2]).with_suffix(".json")
        assert json.loads(written.read_text()) == result
    assert not any("bomb" in str(warning.message) for warning in recwarn)
    with pytest.raises(UnusableImagesError) as caught:
        predicted([folder / "d_empty.jpg", folder / "e_text.jpg"])
    assert caught.value.results == []


def test_pillows_limit_is_not_ours(predicted, tmp_path, monkeypatch, recwarn):
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    assert len(predicted([tmp_path / "image.png"])) == 1
    with pytest.raises(UnusableImagesError, match=r"image.png has 64 x 48 pixels, more than --max-pixels 3071"):
        predicted([tmp_path / "image.png"], max_pixels=64 * 48 - 1)
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert not any("bomb" in str(warning.message) for warning in recwarn)


def test_checkpoints_of_other_models_are_refused(predicted, changed, float_checkpoint, float_classifier, image_folders):
    images = [image_folders / "val" / "red"]

    def refuse(message, checkpoint, name="float"):
        with pytest.raises(ValueError, match=message) as error:
            predicted(images, checkpoint=checkpoint, name=name)
        assert "\n" not in str(error.value)
        assert str(checkpoint) in str(error.value)

    def without_head(checkpoint):
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in weights.items() if not key.startswith("head.")}

    def with_five_classes(checkpoint):
        checkpoint["state_dict"].update({"head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5)})

    def with_another_head(checkpoint):
        checkpoint["state_dict"]["head.weight"] = torch.zeros(3, 8)

    def with_wide_attention(checkpoint):
        checkpoint["state_dict"]["backbone.stages.0.blocks.0.attn.qkv.weight"] = torch.zeros(48, 16)

    def with_neck(checkpoint):
        checkpoint["state_dict"]["neck.weight"] = torch.zeros(1)

    refuse("2 tensors are missing in it, first head.weight", changed(without_head))
    refuse(
        "does not fit the config's model: .*head has 5 classes, this model num_classes=3", changed(with_five_classes)
    )
    refuse("does not fit the config's model: size mismatch for head.weight", changed(with_another_head))
    refuse("does not fit the config's model: .*is of another arch: .*attn.qkv.weight", changed(with_wide_attention))
    refuse("1 tensors of it have no place, first neck.weight", changed(with_neck))
    refuse("2 tensors are missing in it, first head.weight; .* no place, first ", float_checkpoint)
    refuse("is of a float network, the config's is binary", float_classifier, "binary")


@pytest.mark.parametrize(
    "line", ["val_dataloader = test_dataloader = None", "test_dataloader = dict(dataset=dict(pipeline=[]))"]
)
def test_config_without_a_transform_is_named(classifier_configs, float_classifier, image_folders, line):
    config = classifier_configs["float"].with_name("untransformed.py")
    config.write_text(f'_base_ = "./{classifier_configs["float"].name}"\n{line}\n')
    with pytest.raises(ValueError, match="untransformed.py has no test_dataloader with a pipeline"):
        predict(config, float_classifier, [image_folders / "val" / "red"])


def test_transform_is_found_inside_wrappers_and_in_the_validation_data(
    predicted, classifier_configs, float_classifier, image_folders
):
    config = classifier_configs["float"].with_name("wrapped.py")
    config.write_text(
        f'_base_ = "./{classifier_configs["float"].name}"\ntest_dataloader = None\n'
        'val_dataloader = dict(dataset=dict(_delete_=True, type="RepeatDataset", times=2,'
        ' dataset=dict(type="mmbivit.TimmDataset", data_root="no", pipeline={{_base_.pipeline}})))\n'
    )
    images = [image_folders / "val" / "red"]
    assert predict(config, float_classifier, images) == predicted(images)


def test_table_in_a_pipe_cuts_nothing(capsys):
    path = f"/data/{'long/' * 40}image [red].png"
    result = dict(img_path=path, labels=[1, 0], scores=[0.98765, 0.01235], names=["[b]goldfish", "tench"])
    print_predictions([result], None)
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if path in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [path, "1", "[b]goldfish", "98.77"],
        [path, "2", "tench", "1.23"],
    ]
