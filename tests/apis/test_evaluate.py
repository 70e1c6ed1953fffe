"""Options of evaluation, and evaluations."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, MODELS

from mmbivit.apis import evaluate, evaluation_config

BOX, MASK = "coco/bbox_mAP", "coco/segm_mAP"


@pytest.fixture
def config(configs, float_checkpoint, tmp_path):
    """Make an evaluation config of the float detector."""

    def make(**options):
        cfg_options = {"experiment_name": tmp_path.name}
        options = dict(work_dir=str(tmp_path / "work"), cfg_options=cfg_options) | options
        return evaluation_config(configs["float"], float_checkpoint, **options)

    return make


@pytest.fixture
def classifier_config(classifier_configs, float_classifier, tmp_path):
    """Make an evaluation config of the float classifier."""

    def make(checkpoint=float_classifier, name="float", **options):
        cfg_options = {"experiment_name": tmp_path.name}
        options = dict(work_dir=str(tmp_path / "work"), cfg_options=cfg_options) | options
        return evaluation_config(classifier_configs[name], checkpoint, **options)

    return make


def test_checkpoint_replaces_what_the_config_starts_from(configs):
    cfg = evaluation_config(configs["binary"], "some.pth", cfg_options={"resume": True})
    assert (cfg.load_from, cfg.resume, cfg.launcher) == ("some.pth", False, "none")


def test_show_options_configure_the_visualization_hook(config):
    assert "draw" not in config().default_hooks.visualization
    hook = config(show=True, wait_time=0.5).default_hooks.visualization
    assert (hook.draw, hook.show, hook.wait_time, hook.get("test_out_dir")) == (True, True, 0.5, None)
    hook = config(show_dir="pictures").default_hooks.visualization
    assert (hook.draw, hook.get("show"), hook.test_out_dir) == (True, None, "pictures")
    with pytest.raises(ValueError, match=r"--show-dir need default_hooks.visualization"):
        config(show_dir="pictures", cfg_options={"default_hooks.visualization": None})


def test_data_root_reaches_the_test_data(config):
    cfg = config(data_root="elsewhere")
    assert cfg.test_dataloader.dataset.data_root == "elsewhere"
    assert Path(cfg.test_evaluator.ann_file) == Path("elsewhere/annotations/instances_val2017.json")


def test_evaluation_writes_predictions_and_pictures(config, tmp_path):
    metrics = evaluate(config(show_dir=str(tmp_path / "pictures")), out=tmp_path / "out.pkl")

    assert 0 <= metrics[BOX] <= 1
    assert 0 <= metrics[MASK] <= 1
    names = ["000000000001.png", "000000000002.png"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names
    predictions = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert [Path(prediction["img_path"]).name for prediction in predictions] == names
    assert all(len(prediction["pred_instances"]["masks"]) == 5 for prediction in predictions)


def test_tta_detects_boxes_in_image_and_mirror_image(config, tmp_path):
    cfg = config(tta=True)
    assert cfg.model.type == "DetTTAModel"
    assert [transform.type for transform in cfg.test_dataloader.dataset.pipeline] == [
        "LoadImageFromFile",
        "Resize",
        "TestTimeAug",
    ]
    assert "mask_head" not in cfg.model.module.roi_head

    metrics = evaluate(cfg, out=tmp_path / "tta.pkl")
    assert BOX in metrics
    assert MASK not in metrics
    evaluate(config(cfg_options={"experiment_name": "plain"}), out=tmp_path / "plain.pkl")
    with_tta, without = (pickle.loads((tmp_path / name).read_bytes())[0] for name in ("tta.pkl", "plain.pkl"))
    scores = with_tta["pred_instances"]["scores"]
    # The best box of the plain image survives merging; the mirror image adds others.
    assert scores.max() >= without["pred_instances"]["scores"].max() - 1e-6
    assert len(scores) > len(without["pred_instances"]["scores"])


def test_tta_of_the_config_comes_first(config):
    own = dict(type="DetTTAModel", tta_cfg=dict(nms=dict(type="soft_nms"), max_per_img=7))
    cfg = config(tta=True, cfg_options={"tta_model": own, "tta_pipeline": [dict(type="Own")]})
    assert cfg.model.tta_cfg.max_per_img == 7
    assert cfg.test_dataloader.dataset.pipeline == [dict(type="Own")]
    assert "mask_head" in cfg.model.module.roi_head


def test_weights_that_do_not_fit_a_detector_are_named(configs, float_checkpoint, tmp_path):
    content = torch.load(float_checkpoint, weights_only=False)
    weights = content["state_dict"]
    changes = {
        "less": {key: value for key, value in weights.items() if "bbox_head.fc_cls" not in key},
        "unnormed": {key: value for key, value in weights.items() if not key.startswith("backbone.norm0.")},
        "more": weights | {"neck.other": torch.zeros(1)},
        "other": weights | {"rpn_head.rpn_cls.weight": torch.zeros(5, 8, 1, 1)},
    }
    for name, state in changes.items():
        torch.save(content | dict(state_dict=state), tmp_path / f"{name}.pth")

    def refuse(message, name="float", checkpoint=float_checkpoint, tta=False, **cfg_options):
        cfg_options = {"experiment_name": f"{tmp_path.name}_{message}", **cfg_options}
        options = dict(work_dir=str(tmp_path), tta=tta, cfg_options=cfg_options)
        with pytest.raises(ValueError, match=message) as caught:
            evaluate(evaluation_config(configs[name], checkpoint, **options))
        assert "\n" not in str(caught.value)
        assert str(checkpoint) in str(caught.value)

    refuse("is of a float network, the config's is binary", "binary")
    refuse("2 tensors are missing in it, first roi_head.bbox_head.fc_cls", checkpoint=tmp_path / "less.pth")
    refuse("it has no backbone.norm0.weight", checkpoint=tmp_path / "unnormed.pth")
    refuse("1 tensors of it have no place, first neck.other", checkpoint=tmp_path / "more.pth")
    refuse("does not fit the config's model: size mismatch for rpn_head", checkpoint=tmp_path / "other.pth")
    refuse("no place, first roi_head.mask_head", **{"model.roi_head.mask_head": None})
    # With --tta the mask head is left out, and nothing else.
    refuse("1 tensors of it have no place, first neck.other", checkpoint=tmp_path / "more.pth", tta=True)


def test_runner_and_ema_change_no_number(config, tmp_path):
    changes = dict(
        plain={},
        flexible=dict(runner_type="FlexibleRunner"),
        ema=dict(custom_hooks=[dict(type="EMAHook", ema_type="ExponentialMovingAverage")]),
    )
    predictions = []
    for name, more in changes.items():
        evaluate(config(cfg_options={"experiment_name": f"{tmp_path.name}_{name}", **more}), out=tmp_path / "out.pkl")
        predictions.append(pickle.loads((tmp_path / "out.pkl").read_bytes()))
    for plain, *others in zip(*predictions, strict=True):
        for other in others:
            assert torch.equal(plain["pred_instances"]["scores"], other["pred_instances"]["scores"])


def test_bad_input_is_named_before_anything_is_built(configs, config):
    with pytest.raises(FileNotFoundError, match=r"checkpoint no/such.pth does not exist"):
        evaluate(evaluation_config(configs["float"], "no/such.pth"))
    with pytest.raises(ValueError, match=r"--out results.json: .* ends in .pkl"):
        evaluate(config(), out="results.json")
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        evaluate(config(data_root="no/such/folder"))


def test_accuracy_of_a_classifier_is_that_of_its_logits(classifier_config, image_folders, float_classifier, tmp_path):
    # A head that is wrong for some images: the trained one knows all of these.
    checkpoint = torch.load(float_classifier, weights_only=False)
    checkpoint["state_dict"]["head.weight"] = torch.randn(3, 16)
    torch.save(checkpoint, tmp_path / "random_head.pth")
    cfg = classifier_config(tmp_path / "random_head.pth", cfg_options={"experiment_name": "accuracy"})
    metrics = evaluate(cfg, out=tmp_path / "out.pkl")

    model, data = MODELS.build(cfg.model).eval(), DATASETS.build(cfg.test_dataloader.dataset)
    model.load_state_dict(checkpoint["state_dict"])
    ranks, files = [], []
    for item in data:
        batch = model.data_preprocessor(dict(inputs=item["inputs"][None]))
        with torch.no_grad():
            logits = model(batch["inputs"])[0]
        ranks.append(int((logits > logits[item["labels"]]).sum()))
        files.append(item["img_path"])
    assert len(ranks) == 9
    assert 0 < metrics["accuracy/top1"] < 100
    for k in (1, 2):
        assert metrics[f"accuracy/top{k}"] == pytest.approx(100 * np.mean(np.array(ranks) < k))
    predictions = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert [prediction["img_path"] for prediction in predictions] == files
    for prediction, file, rank in zip(predictions, files, ranks, strict=True):
        assert prediction["pred_names"][rank] == Path(file).parent.name


def test_options_for_detectors_are_refused_for_classifiers(classifier_config):
    for option, value in (("tta", True), ("show", True), ("show_dir", "pictures")):
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} is for detectors"):
            classifier_config(**{option: value})


def test_bad_input_of_a_classifier_is_named(classifier_config, classifier_configs, float_checkpoint):
    with pytest.raises(ValueError, match=r"is no checkpoint of the config's classifier: .*first head.weight"):
        evaluate(classifier_config(float_checkpoint, cfg_options={"experiment_name": "detector"}))
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        evaluate(classifier_config(data_root="no/such/folder"))


def test_classifiers_do_not_import_mmdet(classifier_configs, float_classifier, tmp_path):
    code = (
        "import sys\nfrom mmbivit.apis import evaluate, evaluation_config\n"
        f"evaluate(evaluation_config({str(classifier_configs['float'])!r}, {str(float_classifier)!r}, "
        f"work_dir={str(tmp_path)!r}), out={str(tmp_path / 'out.pkl')!r})\n"
        "sys.exit('mmdet' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
