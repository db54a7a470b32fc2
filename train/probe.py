"""The linear probe: a linear classifier on what a frozen backbone reads out, fitted to convergence.

Convex and started at zero, so no seed can change it. Features and fit are in float32 whatever `train.precision` is:
captures and accuracies, which read the fitted model out later, are in float32, too, and it takes seconds.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from train.data import ImageSet
from train.models import classifier_name, readout

logger = logging.getLogger(__name__)

PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)  # L2 on the standardised weights; the best on validation is taken
_ITERATIONS = 200


@torch.no_grad()
def cached_features(model: nn.Module, images: ImageSet, device: torch.device, *, batch_size: int = 256) -> torch.Tensor:
    """The readout of every image, without augmentation, float32 [image, feature] on the device."""
    model.eval()
    bar = tqdm(total=len(images), desc="features", unit=" images", disable=None, delay=1)
    features = []
    with bar:
        for indices, inputs in images.batches(images.parts(batch_size), device):
            features.append(readout(model, inputs).float())
            bar.update(len(indices))
    return torch.cat(features)


def fit_probe(
    model: nn.Module, train: ImageSet, validation: ImageSet, *, label_smoothing: float, device: torch.device
) -> list[dict[str, Any]]:
    """Fit the classifier of `model`; no other tensor of it changes by a bit. One dict per penalty, with its accuracies.

    Multinomial logistic regression with label smoothing on standardised features, L-BFGS, for each of four penalties;
    the standardisation is folded into the classifier's weight and bias.
    """
    features, held_out = cached_features(model, train, device), cached_features(model, validation, device)
    labels, held_out_labels = (torch.from_numpy(images.labels).to(device) for images in (train, validation))
    weight, bias, history = fit_classifier(
        features, labels, held_out, held_out_labels, classes=len(train.class_names), label_smoothing=label_smoothing
    )
    head = model.get_submodule(classifier_name(model))
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return history


def fit_classifier(
    features: torch.Tensor,
    labels: torch.Tensor,
    held_out: torch.Tensor,
    held_out_labels: torch.Tensor,
    *,
    classes: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, Any]]]:
    """Weight [class, feature] and bias [class] of `fit_probe`, on features as they are, and its history."""
    mean = features.mean(dim=0)
    # A feature that is the same in every image says nothing and must not be blown up.
    spread = features.std(dim=0, correction=0)
    spread = torch.where(spread > 1e-6 * (mean.abs() + 1e-6), spread, 1.0)
    features, held_out = (features - mean) / spread, (held_out - mean) / spread

    history: list[dict[str, Any]] = []
    start = torch.zeros(classes, features.shape[1] + 1, device=features.device)
    best, solution = -1.0, start
    for penalty in PENALTIES:  # from strong to weak, each from the one before
        start, loss = _minimise(features, labels, start, penalty, label_smoothing)
        score = _score(start, held_out, held_out_labels)
        history.append(
            {
                "penalty": penalty,
                "loss": loss,
                "train_accuracy": _score(start, features, labels),
                "validation_accuracy": score,
            }
        )
        if score > best:
            best, solution = score, start
    weight = solution[:, :-1] / spread
    return weight, solution[:, -1] - weight @ mean, history


def _minimise(
    features: torch.Tensor, labels: torch.Tensor, start: torch.Tensor, penalty: float, label_smoothing: float
) -> tuple[torch.Tensor, float]:
    """Weights and bias [class, feature + 1] at the minimum, and the loss there."""

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat).view_as(start).float().to(start.device).requires_grad_()
        logits = features @ parameters[:, :-1].T + parameters[:, -1]
        loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        loss = loss + penalty / 2 * parameters[:, :-1].square().sum()
        (gradient,) = torch.autograd.grad(loss, parameters)
        return loss.item(), gradient.double().flatten().cpu().numpy()

    solution = optimize.minimize(
        objective, start.double().flatten().cpu().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS}
    )
    return torch.from_numpy(solution.x).view_as(start).float().to(start.device), float(solution.fun)


def _score(parameters: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> float:
    logits = features @ parameters[:, :-1].T + parameters[:, -1]
    return float((logits.argmax(dim=1) == labels).double().mean())
