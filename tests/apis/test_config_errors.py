"""What MMEngine and torch refuse in a config, in one line that names the part."""

import re

import pytest

from mmbivit.apis import train, train_config, user_errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_wrapper.optimizer.type": "Adm"}, "optimizer.type='Adm' is not in the .*; did you mean 'Adam'"),
        ({"optim_wrapper.optimizer.betas": "x"}, r"optim_wrapper: AdamW\(.*betas='x'\) cannot be built: .*'str'"),
        ({"optim_wrapper.optimizer.eps": -1}, "optim_wrapper: AdamW.*Invalid epsilon"),
        ({"optim_wrapper.paramwise_cfg.custom_keys": 5}, "optim_wrapper: .*custom_keys must be a dict"),
        ({"optim_wrapper.paramwise_cfg.bias_lr_mult": "x"}, "optim_wrapper cannot be built"),
        ({"train_dataloader.persistent_workers": True}, "train_dataloader cannot be built: .*num_workers > 0"),
        ({"train_dataloader.prefetch_factor": 2}, "train_dataloader cannot be built: prefetch_factor"),
        ({"train_dataloader.collate_fn": 5}, "train_dataloader cannot be built: collate_fn"),
        ({"train_dataloader.batch_size": 100}, "no batch: 18 images, batch_size=100"),
        ({"train_cfg.dynamic_intervals": 5}, "train_cfg: .*dynamic_intervals=5"),
        ({"train_cfg.by_epoch": True}, "train_cfg cannot be built: Only one of `type` or `by_epoch`"),
        ({"param_scheduler": [dict(type="LinearLR", start_factor=5)]}, "param_scheduler: LinearLR.*start_factor=5"),
        ({"param_scheduler": [dict(type="MultiStepLR")]}, "param_scheduler: MultiStepLR.*'milestones'"),
        ({"default_hooks.checkpoint": dict(type="CheckpointHook", save_best=5)}, r"hooks: .*Hook\(.*save_best=5"),
        ({"default_hooks.logger.interval": 0}, r"hooks: LoggerHook\(interval=0\)"),
        ({"custom_hooks": [dict(type="EMAHook", momentum=2)]}, "momentum=2"),
        ({"custom_hooks": [dict(type="EMAHook", momentum="x")]}, "momentum='x'"),
        ({"visualizer.vis_backends": 5}, "visualizer: .*vis_backends=5"),
        ({"log_level": "x"}, "log_level cannot be built"),
        ({"env_cfg": dict(mp_cfg=dict(mp_start_method="x"))}, "env_cfg cannot be built: .*'x'"),
        ({"randomness": dict(deterministic=True)}, "config cannot be built: .*'seed'"),
        ({"val_cfg": None}, "config cannot be built: val_dataloader, val_cfg, and val_evaluator"),
        ({"runner_type": "x"}, "x is not in the runner registry"),
        ({"train_dataloader.dataset.split": 5}, "split=5"),
    ],
)
def test_what_mmengine_and_torch_refuse_names_the_part_of_the_config(
    classifier_configs, tmp_path, capsys, options, message
):
    with pytest.raises(SystemExit), user_errors():
        options |= {"experiment_name": tmp_path.name}
        train(train_config(classifier_configs["float"], work_dir=str(tmp_path), cfg_options=options))
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, error) and len(error) < 500
