"""Does a map point at what the prediction depends on? Patches go in the map's order, and the model is asked again.

Deletion (positive perturbation) replaces the most relevant patches first: a good map makes the probability of the class
fall fast. Insertion starts from the baseline image and puts the most relevant patches back first: a good map makes it
rise fast. Keeping the top share is the same image as taking away the rest, so insertion is negative perturbation (the
least relevant first) read backwards, and both curves are all there is.

Every condition sees the same images with the same baseline image; the baseline is a function of the image alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engine.capture import evaluating, logits_of
from engine.config import BASELINES
from engine.statistics import Floats
from train.errors import InputError

# Standard deviation of the blur as a share of the image's longer side: on 224 px it is 22 px, and no object is left.
_BLUR = 0.1


@dataclass(frozen=True)
class Curves:
    """Probability of each image's class as patches go or come, most relevant first."""

    fractions: Floats  # [step], shares of patches, from 0 to 1
    deletion: Floats  # [image, step], that share replaced by the baseline
    insertion: Floats  # [image, step], that share on the baseline

    def measures(self) -> dict[str, Floats]:
        """Areas and ends of the curves, [image], all of them probabilities.

        `deletion_auc`, `insertion_auc`: areas under both; `faithfulness`: insertion − deletion, on average 0 for an
        order that knows nothing; `p_whole`, `p_none`: of the image, and with every patch replaced.
        """
        weights = np.convolve(np.diff(self.fractions), [0.5, 0.5])
        # Shares are evenly spaced, so a curve and its reverse have one area; so written, to the last digit.
        deletion, insertion = (((y + y[:, ::-1]) / 2 * weights).sum(axis=1) for y in (self.deletion, self.insertion))
        areas = {"deletion_auc": deletion, "insertion_auc": insertion, "faithfulness": insertion - deletion}
        return areas | {"p_whole": self.deletion[:, 0], "p_none": self.deletion[:, -1]}

    def with_reverse(self) -> Curves:
        """The mean of these curves and those of the reverse order, which are these read backwards.

        Of a random order: both are equally likely, so the mean has the same expectation; it needs no further forward
        pass, and the area under insertion is that under deletion in every image.
        """
        return Curves(
            self.fractions,
            (self.deletion + self.insertion[:, ::-1]) / 2,
            (self.insertion + self.deletion[:, ::-1]) / 2,
        )


def baseline_images(images: torch.Tensor, kind: str) -> torch.Tensor:
    """What stands in for a patch of normalised images [image, channel, row, col] that is taken away.

    "blur": the image under a Gaussian of a tenth of its longer side; "mean": the data set's mean, which normalisation
    puts at 0.
    """
    if kind == "mean":
        return torch.zeros_like(images)
    if kind != "blur":
        raise InputError(f"relevance.baseline is {kind!r}; expected one of {', '.join(BASELINES)}")
    channels, height, width = images.shape[1:]
    sigma = _BLUR * max(height, width)
    reach = int(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / sigma) ** 2)
    taps = (taps / taps.sum()).to(images.dtype)
    down = taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    padded = F.pad(images, (0, 0, reach, reach), mode="replicate")
    blurred = F.conv2d(padded, down, groups=channels)
    padded = F.pad(blurred, (reach, reach, 0, 0), mode="replicate")
    return F.conv2d(padded, down.transpose(2, 3), groups=channels)


def random_maps(shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Maps that know nothing, for the control: seeded uniform noise [image, row, col]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def perturbation_curves(
    model: torch.nn.Module,
    images: torch.Tensor,
    baseline: torch.Tensor,
    targets: torch.Tensor,
    maps: torch.Tensor,
    *,
    steps: int = 7,
    batch_size: int = 64,
    seed: int = 0,
) -> Curves:
    """Deletion and insertion curves of one map [row, col] on the patch grid per image: softmax at `targets`.

    Equal values of a map have no order: they are taken in a seeded random one, or a map of zeros would remove the image
    from its top left corner. `steps` shares between 0 and 1 are evaluated, evenly spaced and rounded to whole patches.
    """
    if steps < 1:
        raise InputError(f"relevance.steps is {steps}; expected at least 1")
    if maps.shape[0] != images.shape[0]:
        raise InputError(f"{maps.shape[0]} maps for {images.shape[0]} images; expected one per image")
    fractions = np.linspace(0.0, 1.0, steps + 2)
    patches = maps.shape[1] * maps.shape[2]
    taken = np.rint(fractions[1:-1] * patches).astype(int)
    kept = patches - taken[::-1]  # as many as are left when deletion goes the other way
    rank = _ranks(maps, seed)
    grid = tuple(maps.shape[1:])

    def probabilities(own: torch.Tensor) -> Floats:
        """Of images whose patches are the image's where `own` [image, patch] and the baseline's elsewhere."""
        of_batches = []
        for rows in torch.arange(len(images)).split(batch_size):
            mask = own[rows].reshape(-1, 1, *grid).to(images)
            mask = F.interpolate(mask, size=images.shape[-2:], mode="nearest")
            logits = logits_of(model(mask * images[rows] + (1 - mask) * baseline[rows]))
            chances = logits.double().softmax(dim=-1)
            of_batches.append(chances.gather(1, targets[rows].to(chances.device)[:, None])[:, 0].cpu())
        return torch.cat(of_batches).numpy()

    with evaluating(model), torch.inference_mode():
        whole, none = probabilities(rank >= 0), probabilities(rank < 0)
        deletion = np.stack([whole, *(probabilities(rank >= count) for count in taken.tolist()), none], axis=1)
        insertion = np.stack([none, *(probabilities(rank < count) for count in kept.tolist()), whole], axis=1)
    return Curves(fractions, deletion, insertion)


def _ranks(maps: torch.Tensor, seed: int) -> torch.Tensor:
    """Rank of each patch, 0 the most relevant, ties in a random order, [image, patch]."""
    values = maps.flatten(1).double().cpu()
    shuffled = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    order = values.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, order).argsort(dim=1)  # the inverse of a permutation
