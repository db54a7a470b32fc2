"""Which class of an image is explained: the same one, by its name, in every model that has a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.relevance.results import Role
from train.data import HeadClasses, ImageSet

Outputs = NDArray[np.int64]


@dataclass(frozen=True)
class ClassChoice:
    """What maps are of, the same for every condition.

    `role` is "true": the image's class; "predicted": the one that the condition compared against predicts; "own": the
    one that each model predicts itself, where nothing says which outputs of two heads are one class.
    """

    role: Role
    rows: tuple[int, ...]  # of the images that can be explained
    shared: tuple[str, ...] = ()  # the class names that every head has; () for "own"
    left_out: tuple[str, ...] = ()  # what is not computed and why, one sentence for each

    @property
    def same_class(self) -> bool:
        """Whether all models explain the same class of an image, so that their maps can be compared."""
        return self.role != "own"


@dataclass(frozen=True)
class Targets:
    """The classes of one model's maps, as outputs of its head, [image]."""

    head: HeadClasses
    role: str  # what `target` is to each image: "true" or "predicted"
    target: Outputs
    other: Outputs | None = None  # another class; None where maps of two classes cannot be compared

    def names(self, image: int) -> tuple[str, str]:
        """Target and other class of an image; "" for none."""
        other = "" if self.other is None else self.head.name(int(self.other[image]))
        return self.head.name(int(self.target[image])), other


def choose_targets(labels: Outputs, num_classes: int, seed: int) -> Outputs:
    """A seeded class other than the true one for each image, [image]."""
    steps = np.random.default_rng(seed).integers(1, num_classes, size=len(labels))
    return np.asarray((labels + steps) % num_classes)


def choose_classes(heads: Mapping[str, HeadClasses], images: ImageSet, against: str) -> ClassChoice:
    """What maps can be of, given what is known of the heads.

    Args:
        heads: condition -> its head; one without a head takes no part.
        images: all that are measured.
        against: the condition that the others are compared with.
    """
    headed = {name: head for name, head in heads.items() if head.outputs}
    every = tuple(range(len(images)))
    if not headed:
        return ClassChoice("own", (), (), ("No model has a head, and a relevance map is of a class.",))
    alone = "Maps are of the class that each model predicts, and no measure is compared between classes or conditions"
    unknown = " and ".join(name for name, head in headed.items() if not head.known)
    if unknown:
        return ClassChoice("own", every, (), (f"{alone}: the classes of the head of {unknown} are not known.",))
    names = [set(head.names) for head in headed.values()]
    common = set.intersection(*names)
    shared = tuple(name for name in next(iter(headed.values())).names if name in common)
    single = ("Maps of two classes are not compared, since the heads share one class.",) if len(shared) == 1 else ()
    known = np.array([name in common for name in images.class_names])[np.asarray(images.labels)]
    rows = tuple(np.flatnonzero(known).tolist())
    if rows:
        unexplained = len(every) - len(rows)
        sentence = (
            f"{unexplained:,} of {len(every):,} images are of a class that not every head has, and are not explained."
        )
        return ClassChoice("true", rows, shared, ((sentence,) if unexplained else ()) + single)
    if all(each == common for each in names):
        predictor = _predictor(headed, against)
        sentence = f"No image is of a class that the heads have: maps are of the class that {predictor} predicts."
        return ClassChoice("predicted", every, shared, (sentence, *single))
    return ClassChoice("own", every, (), (f"{alone}: no image is of a class that every head has.",))


def _predictor(headed: Mapping[str, HeadClasses], against: str) -> str:
    return against if against in headed else next(iter(headed))


def find_targets(
    choice: ClassChoice,
    heads: Mapping[str, HeadClasses],
    images: ImageSet,
    rows: Sequence[int],
    seed: int,
    *,
    against: str,
    predict: Callable[[str], Outputs],
) -> dict[str, Targets]:
    """condition → the outputs of its head that are explained, for each condition that has one.

    `seed` is of the other classes; `predict` gives a condition's greatest output for each of `rows`.
    """
    headed = {name: head for name, head in heads.items() if head.outputs}
    if not choice.same_class:
        return {name: Targets(head, "predicted", predict(name)) for name, head in headed.items()}
    place = {name: position for position, name in enumerate(choice.shared)}
    if choice.role == "true":
        labels = np.asarray(images.labels)[list(rows)]
        chosen = [images.class_names[label] for label in labels]
    else:
        predictor = _predictor(headed, against)
        chosen = [headed[predictor].names[output] for output in predict(predictor)]
    true = np.array([place[name] for name in chosen], dtype=np.int64)
    other = choose_targets(true, len(choice.shared), seed) if len(choice.shared) > 1 else None
    targets = {}
    for name, head in headed.items():
        outputs = head.outputs_of(np.arange(len(choice.shared)), choice.shared)
        targets[name] = Targets(head, choice.role, outputs[true], None if other is None else outputs[other])
    return targets
