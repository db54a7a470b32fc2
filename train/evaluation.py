"""How well a model does on a split: accuracy and loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from train.data import ImageSet
from train.parallel import SINGLE, Workers
from train.precision import float32_convolutions, forward_precision
from train.transfer import uploaded


@dataclass(frozen=True)
class Evaluation:
    """Accuracy, the share of images whose largest logit is their label, and mean cross-entropy in nat."""

    accuracy: float
    loss: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    device: torch.device,
    *,
    precision: str = "fp32",
    batch_size: int = 256,
    label_smoothing: float = 0.0,
    workers: Workers = SINGLE,
) -> Evaluation:
    """Look at every image once, in evaluation mode, in order and without augmentation.

    Each worker takes every n-th batch; all get the same answer. The loss is smoothed to compare with a training loss.
    """
    training = model.training
    model.eval()
    tally = torch.zeros(2, device=device, dtype=torch.float64)  # hits, loss
    for indices, inputs in images.batches(images.parts(batch_size, workers.rank, workers.count), device):
        with float32_convolutions(), forward_precision(precision, device):
            logits = model(inputs).float()
        labels = uploaded(torch.from_numpy(images.labels[indices]), device)
        loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
        tally += torch.stack([(logits.argmax(dim=1) == labels).sum().double(), loss.double()])
    model.train(training)
    hits, loss_sum = workers.add_up(tally).tolist()
    return Evaluation(hits / len(images), loss_sum / len(images))
