"""BatchNorm with the statistics of all processes, for processes without GPU."""

import torch
from torch import Tensor, distributed, nn

from mmbivit.checks import UserError

__all__ = ["CpuSyncBatchNorm", "use_cpu_sync_batch_norm"]


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Does for CPUs what :class:`torch.nn.SyncBatchNorm`, which has no CPU implementation, does for GPUs.

    In training, mean and variance are those of the values of all processes, which may have different numbers of them,
    or none; in evaluation it is BatchNorm. Gradients reach the inputs of all processes through both statistics; those
    of ``weight`` and ``bias`` are local, for DDP to average. Every process has to run forward and backward, or the
    others wait until the timeout of ``torch.distributed``. Arguments and keys are those of BatchNorm.

    Shape: ``(B, C, *) -> (B, C, *)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over all dimensions but the second.

        Raises:
            ValueError: in training, if all processes together have a single value per channel.
        """
        if not (self.training and distributed.is_initialized()):
            return super().forward(x)
        values = x if x.dtype == torch.float64 else x.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        local_count = values.new_tensor([x.numel() // x.shape[1]])
        sums = _SumOverRanks.apply(torch.cat([values.sum(axes), local_count]))
        count = float(sums[-1].detach())
        if count == 1:
            raise UserError(
                "BatchNorm in training has one value per channel over all processes; allowed: 2 or more, so raise "
                "the batch_size, or set norm_eval=True to keep the statistics fixed"
            )
        mean = sums[:-1] / max(count, 1)
        centred = values - mean.view(shape)
        # A second pass, because E[x^2] - E[x]^2 loses digits where the mean is large.
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / max(count, 1)
        if self.track_running_stats and count:
            self._update(mean.detach(), variance.detach() * (count / (count - 1)))
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        return out.to(x.dtype)

    def _update(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise UserError(f"BatchNorm needs (B, C, *), got {tuple(x.shape)}")


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient, since every process uses the sum."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradient)


def use_cpu_sync_batch_norm(model: nn.Module) -> None:
    """Turn every :class:`torch.nn.SyncBatchNorm` of a model into :class:`CpuSyncBatchNorm`, in place."""
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = CpuSyncBatchNorm  # parameters, buffers and hooks stay; only the forward is another
