# SI-BiViT Swin-T on Tiny-ImageNet: 200 classes of 64 x 64 pixels, enlarged to 224 (Tables 2 and 3 of the paper count
# the same operations for it as for ImageNet). Teacher and start are a float network of Tiny-ImageNet, head included,
# which is trained first: swin_t_tiny_imagenet_float.py.
_base_ = "./sibivit_swin_t_imagenet.py"

data_root = "data/tiny-imagenet-200"
data_hint = "python tools/dataset_converters/tiny_imagenet.py data/tiny-imagenet-200"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:work_dirs/swin_t_tiny_imagenet_float/epoch_300.pth}}"
load_from = float_checkpoint
model = dict(num_classes=200)
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.num_classes = 200
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
