"""Options of evaluation, and evaluations."""

import pickle
from pathlib import Path

import pytest

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
    plain = config(cfg_options={"experiment_name": "plain", "model.roi_head.mask_head": None})
    plain.test_evaluator.metric = "bbox"
    evaluate(plain, out=tmp_path / "plain.pkl")
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


def test_bad_input_is_named_before_anything_is_built(configs, config):
    with pytest.raises(FileNotFoundError, match=r"checkpoint no/such.pth does not exist"):
        evaluate(evaluation_config(configs["float"], "no/such.pth"))
    with pytest.raises(ValueError, match=r"--out results.json: .* ends in .pkl"):
        evaluate(config(), out="results.json")
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        evaluate(config(data_root="no/such/folder"))
