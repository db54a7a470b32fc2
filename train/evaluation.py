"""How well a model does on a split: accuracy and loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train.data import ImageSet
from train.parallel import SINGLE, Workers
from train.precision import forward_precision

__all__ = ["Evaluation", "evaluate"]


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

    Args:
        label_smoothing: of the loss, so that it compares with a training loss; the accuracy does not know it.
        workers: each takes every n-th batch; all get the same answer.
    """
    training = model.training
    model.eval()
    hits, loss = 0.0, 0.0
    starts = range(workers.rank * batch_size, len(images), workers.count * batch_size)
    for start in starts:
        indices = np.arange(start, min(start + batch_size, len(images)))
        with forward_precision(precision, device):
            logits = model(images.batch(indices).to(device)).float()
        labels = torch.from_numpy(images.labels[indices]).to(device)
        hits += float((logits.argmax(dim=1) == labels).sum())
        loss += float(functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum"))
    model.train(training)
    hits, loss = workers.sum([hits, loss])
    return Evaluation(hits / len(images), loss / len(images))
