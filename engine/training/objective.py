"""The loss of a batch, as what processes share the gradients of."""

import torch
from torch import Tensor, nn

from ..model.loss_config import TERMS, LossConfig
from ..model.losses import losses
from ..model.mask_rcnn import MaskRCNN
from .config import TrainConfig
from .distributed import Processes
from .loading import Batch

__all__ = ["Objective"]


class Objective(nn.Module):
    """The losses of a batch as one module, so that several processes can share the gradients; [terms]."""

    def __init__(self, model: MaskRCNN, config: TrainConfig, loss: LossConfig, processes: Processes) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.loss = loss
        self.processes = processes

    def forward(self, batch: Batch, seeds: Tensor) -> Tensor:
        config, device = self.config, batch.image.device
        image = batch.image if config.channels_last else batch.image.contiguous()
        dtype = getattr(torch, config.precision)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            terms = losses(
                self.model,
                image,
                batch.image_sizes,
                batch.targets,
                self.loss,
                seeds=seeds,
                average=self.processes.average,
            )
        return torch.stack([terms[name] for name in TERMS if name in terms])
