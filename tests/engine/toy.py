"""A model with a two-stage backbone that trains in milliseconds, and a Runner for it."""

import uuid

import torch
from mmengine.dataset import default_collate
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmbivit.apis import use_safe_loading
from mmbivit.models import BinarySwinTransformer

ARCH = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))


class ToyData(Dataset):
    """Eight fixed random images with fixed random targets."""

    def __init__(self, length=8):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(length, 3, 32, 32, generator=generator)
        self.targets = torch.randn(length, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dict(inputs=self.images[index], data_samples=self.targets[index])


class ToyModel(BaseModel):
    """Regresses one number from the backbone's last feature map."""

    def __init__(self, **backbone):
        super().__init__()
        torch.manual_seed(0)
        default = dict(
            arch=ARCH, out_indices=(1,), mlp_ratio=3, spatial_interaction=dict(ratio=1.0), drop_path_rate=0.0
        )
        self.backbone = BinarySwinTransformer(**default | backbone)
        self.head = nn.Linear(16, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        out = self.head(self.backbone(inputs)[0].mean((2, 3)))[:, 0]
        if mode != "loss":
            return out
        return dict(loss_task=(out.float() - data_samples).square().mean())


def save_teacher(path, arch=ARCH):
    """Write the weights of a random float detector with this backbone."""
    torch.manual_seed(1)
    teacher = BinarySwinTransformer(arch=arch, recipe="float", out_indices=(1,))
    torch.save(dict(state_dict={f"backbone.{key}": value for key, value in teacher.state_dict().items()}), path)


def teacher_cfg(path, **kwargs):
    """Config of the teacher that :func:`save_teacher` wrote."""
    return (
        dict(
            type="mmbivit.BinarySwinTransformer",
            arch=ARCH,
            recipe="float",
            out_indices=(1,),
            init_cfg=dict(type="Pretrained", checkpoint=str(path), prefix="backbone."),
        )
        | kwargs
    )


def make_runner(
    work_dir,
    hook,
    *,
    model=None,
    by_epoch=True,
    length=3,
    hooks=(),
    optim=None,
    checkpoint=None,
    data=None,
    sampler=None,
    **kwargs,
):
    """Build a Runner of ``length`` epochs of four iterations, or of ``length`` iterations."""
    use_safe_loading()  # MMEngine 0.10.7 does not load its own checkpoints with torch >= 2.6
    optimizer = dict(type="AdamW", lr=1e-2, weight_decay=0.0)
    sampler = dict(type=sampler or ("DefaultSampler" if by_epoch else "InfiniteSampler"), shuffle=True)
    loader = dict(batch_size=2, num_workers=0, sampler=sampler, dataset=ToyData(), collate_fn=default_collate)
    return Runner(
        model=model or ToyModel(),
        work_dir=str(work_dir),
        train_dataloader=loader | (data or {}),
        train_cfg=dict(by_epoch=True, max_epochs=length) if by_epoch else dict(by_epoch=False, max_iters=length),
        optim_wrapper=dict(type="OptimWrapper", optimizer=optimizer, clip_grad=dict(max_norm=5)) | (optim or {}),
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=1),
            checkpoint=checkpoint or dict(type="CheckpointHook", interval=1, by_epoch=by_epoch),
        ),
        custom_hooks=[*([dict(type="mmbivit.DecoupledTrainingHook", **hook)] if hook is not None else []), *hooks],
        log_processor=dict(by_epoch=by_epoch, window_size=1),
        experiment_name=uuid.uuid4().hex,
        **dict(randomness=dict(seed=0, deterministic=True)) | kwargs,
    )
