# SI-BiViT Swin-T on Tiny-ImageNet: 200 classes of 64 x 64 pixels, enlarged to 224 (Tables 2 and 3 of the paper count
# the same operations for it as for ImageNet). Teacher and start are ImageNet's float backbone; the head is random.
_base_ = "./sibivit_swin_t_imagenet.py"

data_root = "data/tiny-imagenet-200"
data_hint = "python tools/dataset_converters/tiny_imagenet.py data/tiny-imagenet-200"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

load_from = None
model = dict(num_classes=200, backbone=dict(init_cfg=dict(type="Pretrained", checkpoint={{_base_.float_checkpoint}})))
