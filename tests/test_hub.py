"""Folders of the Hub: what is written and comes back, what the model card says, and what is refused."""

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open

import mmbivit
from mmbivit.analysis import complexity
from mmbivit.apis import load_config
from mmbivit.deploy import pack
from mmbivit.hub import CARD, FILE, Card, Metric, from_pretrained, push_to_hub, save_pretrained
from mmbivit.models import BinaryNesT, BinarySwinTransformer, BinaryVisionTransformer, BinaryViT, ImageClassifier
from tests.deploy.networks import randomise

SIZE = 32
SHAPE = (3, SIZE, SIZE)
METRIC = Metric("top-1 accuracy, %", 61.25, "cluttered digits, validation", "tools/test.py | 2026-11-30 | run 3")
CARDS = Card("Tiny digits", "Cluttered digits, 3 classes", "sibivit, two stages", [METRIC], "apache-2.0", SHAPE)
SI = dict(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0))
SWIN = dict(
    type="mmbivit.BinarySwinTransformer",
    arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)),
    window_size=4,
    out_indices=(0, 1),
    **SI,
)
BACKBONES = {
    "swin": (BinarySwinTransformer, SWIN),
    "float": (BinarySwinTransformer, dict(SWIN, recipe="float", spatial_interaction=None)),
    "recipe": (
        BinarySwinTransformer,
        dict(SWIN, recipe=dict(base="bivit", places=dict(fc2=dict(activations="elastic")))),
    ),
    "vit": (
        BinaryVisionTransformer,
        dict(
            type="BinaryVisionTransformer",
            arch=dict(embed_dims=8, depths=(2,), num_heads=(2,)),
            patch_size=8,
            pretrain_img_size=SIZE,
            **SI,
        ),
    ),
    "nest": (
        BinaryNesT,
        dict(
            type="mmbivit.BinaryNesT",
            arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)),
            pretrain_img_size=SIZE,
            out_indices=(1,),
            **SI,
        ),
    ),
    "binaryvit": (
        BinaryViT,
        dict(
            type="mmbivit.BinaryViT",
            arch=dict(
                embed_dims=8,
                depths=(1, 1, 1, 1),
                num_heads=(1, 1, 1, 1),
                hidden_dims=(8, 16, 32, 64),
                reductions=(8, 4, 1, 1),
            ),
        ),
    ),
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    cls, config = BACKBONES[name]
    return randomise(cls(**{key: value for key, value in config.items() if key != "type"}))


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(images)
    return [found] if isinstance(found, torch.Tensor) else list(found)


def assert_same(model: torch.nn.Module, loaded: torch.nn.Module) -> None:
    assert type(loaded) is type(model) and not loaded.training
    pairs = zip(outputs(model), outputs(loaded), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of a backbone that is not packed."""
    folder = tmp_path_factory.mktemp("hub") / "backbone"
    save_pretrained(build("swin"), folder, CARDS, SWIN)
    return folder


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_comes_back_to_the_last_bit(name, tmp_path):
    model, config = build(name), BACKBONES[name][1]
    state = torch.random.get_rng_state()
    save_pretrained(model, tmp_path / "folder", CARDS, config)
    assert torch.equal(state, torch.random.get_rng_state())
    loaded = from_pretrained(tmp_path / "folder")
    assert_same(model, loaded)
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {FILE, CARD}
    assert loaded.training_plan == model.training_plan and int(loaded.training_stage) == int(model.training_stage)


def test_a_packed_backbone_comes_back_without_a_config(tmp_path):
    packed = pack(build("swin"))
    save_pretrained(packed, tmp_path, CARDS)
    assert_same(packed, from_pretrained(str(tmp_path)))


@pytest.mark.parametrize("as_bits", [False, True])
def test_a_classifier_comes_back_with_its_names_and_transforms(as_bits, classifier, classifier_configs, tmp_path):
    model, config = classifier[0], load_config(classifier_configs["binary"])
    stored = pack(model) if as_bits else model
    save_pretrained(stored, tmp_path, CARDS, config)
    loaded = from_pretrained(tmp_path)
    assert_same(stored, loaded)
    assert loaded.dataset_meta["classes"] == ("blue", "green", "red")
    (step,) = loaded.cfg.test_dataloader.dataset.pipeline
    assert step["type"] == "mmbivit.TimmTransform" and step["input_size"] == 32
    prediction = loaded.test_step(dict(inputs=torch.zeros(1, *SHAPE, dtype=torch.uint8), img_path=["a.png"]))[0]
    assert set(prediction["pred_names"]) == {"blue", "green", "red"}


@pytest.mark.parametrize("as_bits", [False, True])
def test_a_classifier_for_images_of_one_size_comes_back(as_bits, tmp_path):
    backbone = dict(BACKBONES["vit"][1], type="mmbivit.BinaryVisionTransformer", out_type="cls_token")
    model = ImageClassifier(backbone, 4).eval()
    randomise(model.backbone)
    stored = pack(model) if as_bits else model
    save_pretrained(stored, tmp_path, CARDS, dict(type="mmbivit.ImageClassifier", backbone=backbone, num_classes=4))
    assert_same(stored, from_pretrained(tmp_path))


def test_a_network_of_the_first_training_stage_comes_back_in_it(tmp_path):
    model = build("swin")
    last = outputs(model)
    model.set_stage(1)
    save_pretrained(model, tmp_path, CARDS, SWIN)
    loaded = from_pretrained(tmp_path)
    assert loaded.stage == 1 and not torch.equal(outputs(loaded)[0], last[0])
    assert_same(model, loaded)


def test_a_packed_detector_comes_back(detector, configs, tmp_path):
    packed = pack(detector[0])
    save_pretrained(packed, tmp_path, CARDS, load_config(configs["binary"]))
    loaded = from_pretrained(tmp_path)
    assert loaded.dataset_meta["classes"] == ("person",)
    state = packed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_the_card_says_what_the_model_is_and_where_numbers_come_from(folder):
    card = ModelCard.load(folder / CARD)
    assert card.data.library_name == "mmbivit" and card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-feature-extraction" and "simulated" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value) == (METRIC.name, METRIC.value)
    costs = complexity(build("swin"), SHAPE)
    text = card.content
    assert yaml.safe_load(text.split("---")[1])["model-index"][0]["name"] == "Tiny digits"
    for line in (
        "| top-1 accuracy, % | 61.25 | cluttered digits, validation | tools/test.py \\| 2026-11-30 \\| run 3 |",
        f"| file | {(folder / FILE).stat().st_size / 1e6:.2f} MB |",
        f"| binary multiply-accumulates (BOPs), 3 x 32 x 32 | {costs.bops / 1e6:.2f} M |",
        f"| float multiply-accumulates (FLOPs), 3 x 32 x 32 | {costs.flops / 1e6:.2f} M |",
        f"| operations (BOPs / 64 + FLOPs) | {costs.ops / 1e6:.2f} M |",
        "Cluttered digits, 3 classes",
        "sibivit, two stages",
    ):
        assert line in text


def test_a_card_says_what_is_not_known(tmp_path):
    packed = pack(build("swin"))
    save_pretrained(packed, tmp_path / "without", Card("A", "b", "c"))
    text = (tmp_path / "without" / CARD).read_text()
    assert "None were measured." in text and "| operations | not counted |" in text and "license" not in text
    costs = complexity(build("swin"), SHAPE)
    save_pretrained(packed, tmp_path / "with", Card("A", "b", "c", costs=costs))
    assert f"| {costs.bops / 1e6:.2f} M |" in (tmp_path / "with" / CARD).read_text()


@pytest.mark.parametrize("values", [("", 1.0, "d", "s"), ("n", 1.0, "d", " "), ("n", float("nan"), "d", "s")])
def test_a_metric_needs_its_source_and_a_number(values):
    with pytest.raises(mmbivit.UserError, match="metric"):
        Metric(*values)
    with pytest.raises(mmbivit.UserError, match="needs its method"):
        Card("A", "b", "")


def test_nothing_is_overwritten(folder):
    before = (folder / FILE).read_bytes()
    with pytest.raises(FileExistsError, match="give another folder"):
        save_pretrained(build("swin"), folder, CARDS, SWIN)
    assert (folder / FILE).read_bytes() == before


@pytest.mark.parametrize(
    "config, reason",
    [
        (None, "stored with its config"),
        (dict(SWIN, type="mmbivit.BinaryNesT"), "stored with its config"),
        (dict(SWIN, out_indices=(1,)), "is not the one .* there is no norm0"),
        (dict(SWIN, mlp_ratio=4), "is not the one .* shape"),
        (dict(SWIN, shift_single_window=False, mask_padding=False, recipe=dict(attention="softmax_select")), "differ"),
        (dict(SWIN, recipe=mmbivit.binary.RECIPES["sibivit"]), "cannot be stored as JSON"),
        (dict(SWIN, spatial_interaction=dict(ratio=1.0, checkpoint="x")), "nothing of files"),
    ],
)
def test_a_config_of_another_network_is_refused(config, reason, tmp_path):
    with pytest.raises(mmbivit.UserError, match=reason):
        save_pretrained(build("swin"), tmp_path, CARDS, config)
    assert not list(tmp_path.iterdir())


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(mmbivit.UserError, match="a Conv2d cannot be stored"):
        save_pretrained(torch.nn.Conv2d(3, 8, 1), tmp_path, CARDS, dict(type="Conv2d"))


def test_of_a_run_what_initialises_it_is_left_out(tmp_path):
    config = dict(model=dict(SWIN, init_cfg=dict(type="Pretrained", checkpoint="secret.pth")))
    save_pretrained(build("swin"), tmp_path, CARDS, config)
    assert b"secret" not in (tmp_path / FILE).read_bytes()
    assert_same(build("swin"), from_pretrained(tmp_path))


def changed(folder: Path, to: Path, tensors: dict | None = None, **metadata: object) -> Path:
    """Write the folder again with other metadata, given as JSON values, or tensors."""
    with safe_open(folder / FILE, "pt") as opened:
        old = opened.metadata()
    new = old | {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    state = safetensors.torch.load_file(folder / FILE) | (tensors or {})
    safetensors.torch.save_file(state, to / FILE, new)
    return to


def refusal(folder: Path) -> str:
    with pytest.raises(mmbivit.UserError) as caught:
        from_pretrained(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


def architecture(folder: Path) -> dict:
    with safe_open(folder / FILE, "pt") as opened:
        return json.loads(opened.metadata()["architecture"])


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(init_cfg=dict(type="Pretrained", checkpoint="https://x.invalid/a")), "nothing of files"),
        (dict(pretrained="a.pth"), "nothing of files"),
        (dict(recipe=dict(type="os.system")), "has a 'type'"),
        (dict(recipe="../../etc/passwd"), "no paths"),
        (dict(recipe="another"), "recipe='another' is unknown"),
        (dict(recipe=dict(input_quantizer="eval")), "allowed: a class or function"),
        (dict(colour="red"), "unexpected keyword argument 'colour'"),
        (dict(arch=dict(embed_dims=8, depths=[1000] * 8, num_heads=[1] * 8)), "more layers than it has tensors"),
        (dict(arch=dict(embed_dims=999_000, depths=[1, 1], num_heads=[1, 1])), "does not fit|cannot be built"),
        (dict(mlp_ratio=4), "does not fit the architecture"),
        (dict(out_indices=[1]), "does not fit the architecture"),
    ],
)
def test_hostile_arguments_are_refused(folder, tmp_path, change, reason):
    said = architecture(folder) | change
    assert re.search(reason, refusal(changed(folder, tmp_path, architecture=said)))


def test_a_network_that_takes_far_more_memory_than_its_file_is_refused(folder, tmp_path):
    said = architecture(folder) | dict(window_size=64, arch=dict(embed_dims=8, depths=[1, 3], num_heads=[1, 2]))
    assert "more memory than the file has bytes" in refusal(changed(folder, tmp_path, architecture=said))


@pytest.mark.parametrize(
    "metadata, reason",
    [
        (dict(network="PackedSwinTransformer"), "does not know"),
        (dict(network="DropPath"), "does not know"),
        (dict(kind="detector", model={}), "does not know"),
        (dict(kind="classifier", model={"num_classes": 3}), "'model' of a classifier has to have"),
        (dict(format_version="2"), "update mmbivit"),
        (dict(format="transformers"), "is a safetensors file, but not of mmbivit's"),
        (dict(format="mmbivit.packed"), "does not know"),
        (dict(architecture='{"a": 1e99}'), "out of range"),
        (dict(architecture="[" * 100_000), "cannot be read"),
    ],
)
def test_foreign_metadata_is_refused(folder, tmp_path, metadata, reason):
    assert reason in refusal(changed(folder, tmp_path, **metadata))


def test_damaged_files_are_refused(folder, tmp_path):
    whole = (folder / FILE).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    for content in (b"", whole[:7], whole[: size // 2], whole[:-1], whole + b"x", b"\xff" * 64, b"PK\3\4" + whole):
        (tmp_path / FILE).write_bytes(content)
        assert "is no model.safetensors of mmbivit's, or not all of one" in refusal(tmp_path)
    torch.save(dict(weight=torch.zeros(3)), tmp_path / FILE)
    assert "a checkpoint of PyTorch" in refusal(tmp_path)


def test_a_pickle_is_not_even_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save(dict(a=Evil()), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{" * 10)
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors; .* no pickle"):
        from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_the_hub_has_is_fetched_and_checked(folder, tmp_path, monkeypatch):
    asked = []

    def download(name, file, **options):
        asked.append((name, file, options["revision"]))
        return shutil.copy(folder / file, tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same(build("swin"), from_pretrained("somebody/something", revision="v1"))
    assert asked == [("somebody/something", FILE, "v1")]


@pytest.mark.parametrize("name", ["somebody/something", "no such folder", "a/b/c"])
def test_what_cannot_be_fetched_is_one_line(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder, and its model.safetensors cannot be fetched") as caught:
        from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)


def test_an_upload_has_the_model_and_its_card_in_one_commit(folder, monkeypatch):
    done = []

    class Api(huggingface_hub.HfApi):
        def create_repo(self, repo_id, **options):
            done.append((repo_id, options["private"]))
            return huggingface_hub.RepoUrl(f"https://hub.invalid/{repo_id}", endpoint="https://hub.invalid")

        def upload_folder(self, *, repo_id, folder_path, **options):
            done.append({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
            return "https://hub.invalid/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(mmbivit.UserError):
        push_to_hub(build("swin"), "me/model", CARDS, dict(SWIN, mlp_ratio=4))
    assert not done  # no empty repository is left behind
    assert push_to_hub(build("swin"), "me/model", CARDS, SWIN, private=True).endswith("/1")
    repository, files = done
    assert repository == ("me/model", True)
    assert files.keys() == {FILE, CARD} and len(files[FILE]) == (folder / FILE).stat().st_size


def test_a_packed_backbone_needs_torch_alone(tmp_path):
    save_pretrained(pack(build("swin")), tmp_path, CARDS)
    script = (
        "import sys\n"
        "for name in ('mmengine', 'mmdet', 'mmcv', 'timm', 'huggingface_hub'): sys.modules[name] = None\n"
        f"from mmbivit.hub import from_pretrained\nprint(type(from_pretrained({str(tmp_path)!r})).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.split() == ["PackedSwinTransformer"], result.stderr


def test_the_index_of_models_lists_only_what_has_weights():
    index = yaml.safe_load((Path(__file__).parents[1] / "model-index.yml").read_text())
    assert all(model.get("Weights") for model in index["Models"])
