# ruff: noqa: N803, N806 - X is the name that scikit-learn calls it by
"""A scikit-learn classifier for twenty images and no GPU: `fit` is one forward pass that writes a small CNN.

    from remanence.generated.classifier import HyperClassifier

    classifier = HyperClassifier().fit(images, labels)       # (N, H, W), (N, 1, H, W) or (N, H * W); labels of any kind
    classifier.predict(more_images)
    cnn = classifier.to_module()                             # a plain nn.Module, calibrated, for `classifier.to_images(more_images)`

Nothing is trained: a HyperTransformer that was meta-trained once reads the labelled images and writes the weights. Probabilities are
calibrated by one temperature, found by cross-validation inside the training images; all folds are written in one batched pass.

This module needs scikit-learn, `remanence.generated` alone does not.

Axes: N samples, F features, n classes, K folds, M samples of a fold, s side of the CNN's images.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import DataError, SettingError
from remanence.generated._pictures import Pictures, find_shape, flatten_images
from remanence.generated.continual import ContinualHyperTransformer
from remanence.generated.files import load_hypertransformer
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.task_weights import TaskWeights

__all__ = ["HyperClassifier", "expected_calibration_error"]

MOST_FOLDS = 5
WIDEST = 100.0
"""Temperatures are sought in 1/100..100."""
_AT_ONCE = 64
"""Images of one call in float64: more of them leave the cache."""


class HyperClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classify small grey images from a handful of labelled ones, or rows of a table drawn as pictures.

    Use it where each class has one to a few examples, nothing else of the kind is at hand to train on, and a model is wanted at once:
    fitting twenty images takes a fraction of a second.

    Where it wins and where it loses (benchmarks/hyper_classifier.py, accuracy in percent beside nearest class means and logistic
    regression on the same pixels): on unseen handwritten characters, what it was meta-trained for, it clearly wins (5 ways, 1 shot: 95.6
    against 43.7 and 47.3). Off characters it does not: on signs of hands it is level with both at 1 shot (36.8, 35.2, 36.0) and loses to
    logistic regression from 5 shots on (55.3 against 57.4; at 20 shots 60.0 against 74.3); on clothes likewise (1 shot 60.8, 59.9 and 61.0;
    20 shots 77.7 against 86.1); on digits of 8 x 8 pixels it loses to both at any number of shots (1 shot 64.5 against 73.6 and
    73.5). A CNN of a few thousand numbers written in one pass cannot use hundreds of images. For tables, use scikit-learn's own
    classifiers; rows are taken so that pipelines work. At one shot nothing can be held out, so that probabilities are those of
    the model as it was meta-trained: their calibration error is 4 points on characters and 14 to 32 elsewhere.

    Args:
        model: who writes the CNN: None for the HyperTransformer that ships with the package, a folder written by
            `remanence.generated.files.save_hypertransformer`, or a HyperTransformer for images of one channel.
        image_shape: (H, W) of the images whose pixels are the features. None: the shape X comes in, else a square of side 8 or more
            where F is one, else X is a table.
        calibrate: find a temperature for `predict_proba`. With False, or where a class has one sample, it stays 1.
        random_state: how samples are drawn into folds; nothing else is random.

    Attributes:
        classes_: (n,) sorted labels.
        weights_: the CNN as `TaskWeights`, its last layer divided by the temperature.
        temperature_: above 1 where the CNN was too sure of itself.
        image_shape_: (H, W), or None for a table.
        n_features_in_: F.

    Pixels are scaled by the smallest and largest value of all training images (a table: of each feature), cut off at 0 and 1; where
    more than half of the range is reached by most pixels the images are inverted, because characters are light on dark. Images are
    centred in a square and resized to side s (bilinear, antialiased); other sides than the model's are therefore legal here, unlike
    elsewhere in this package. A table's features become cells of a grid. Predictions are inductive and computed in float64, so a
    sample's answer does not depend, beyond rounding, on those asked with it.

    Cost: time and memory grow with N, and past some thousand samples with its square; there is no limit, but with so many a trained
    model is better.

    Source: Zhmoginov, Sandler and Vladymyrov 2022 (arXiv 2201.04182); temperature: Guo et al. 2017 (arXiv 1706.04599), section 4.2.
        ours: the temperature from folds written in one pass, with a prior; the layout of tables.

    Example:
        >>> rise, fall = np.eye(8)[::-1], np.eye(8)
        >>> HyperClassifier().fit([rise, fall], ["rise", "fall"]).predict([fall, rise])
        array(['fall', 'rise'], dtype='<U4')
    """

    def __init__(
        self, model: HyperTransformer | str | Path | None = None, image_shape: tuple[int, int] | None = None, calibrate: bool = True,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:  # fmt: skip
        self.model = model
        self.image_shape = image_shape
        self.calibrate = calibrate
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Write a CNN for labelled samples: one forward pass, and one more for the temperature.

        Args:
            X: (N, F), (N, H, W) or (N, 1, H, W), finite numbers of any range.
            y: (N,) labels of two classes or more; any kind that sorts.

        Raises:
            DataError: one class only, more than the model takes, colour, or images of another shape than `image_shape`.
            SettingError: `model` or `image_shape` is not as said above.
            ValueError: scikit-learn's checks of X and y: NaN, lengths that differ, no samples, a target that is continuous.
        """
        X, found = flatten_images(X)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.image_shape_ = find_shape(X.shape[1], found if self.image_shape is None else self.image_shape)
        self._require_shape(found)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        model = _resolve(self.model)
        _require_ways(self.classes_, model)
        self.pictures_ = Pictures.fit(X, self.image_shape_, model.target.image_size)
        images, slots = self.pictures_.draw(X).to(_like(model)), torch.from_numpy(numbers).long()
        self.temperature_ = self._temperature(model, images, slots) if self.calibrate else 1.0
        weights = _write(model, images[None], slots[None], class_names=[list(map(str, self.classes_))])
        self.weights_ = _cooled(weights, self.temperature_)
        return self

    def _temperature(self, model: HyperTransformer, images: Tensor, slots: Tensor) -> float:
        """The temperature under which held-out samples are likeliest; 1 where a class has a single one."""
        n_folds = min(MOST_FOLDS, int(slots.bincount().min()))
        if n_folds < 2:
            return 1.0
        parts = StratifiedKFold(n_folds, shuffle=True, random_state=self.random_state).split(np.zeros(len(slots)), slots.numpy())
        held_out = nn.utils.rnn.pad_sequence([torch.from_numpy(test) for _, test in parts], batch_first=True, padding_value=-1)
        is_real = held_out >= 0
        is_kept = torch.ones(n_folds, len(slots) + 1, dtype=torch.bool).scatter_(1, held_out.where(is_real, len(slots)), False)[:, :-1]
        weights = _write(model, images.expand(n_folds, -1, -1, -1, -1), slots.expand(n_folds, -1), is_kept)
        with torch.no_grad():
            logits = weights.logits(images[held_out].to("cpu"))
        return _best_temperature(logits[is_real].double().numpy(), slots[held_out[is_real]].numpy())

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """Calibrated logits (N, n); with two classes (N,), the second's minus the first's.

        Raises:
            NotFittedError, ValueError: not fitted; X is not as in `fit`.
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Probabilities (N, n), in the order of `classes_`. Raises as `decision_function`."""
        return np.asarray(softmax(self._logits(X), axis=1))

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """The likeliest label of each sample: (N,). Raises as `decision_function`."""
        chosen = self._logits(X).argmax(1)
        return np.asarray(self.classes_[chosen])

    def to_images(self, X: Any) -> Tensor:
        """Samples as the CNN reads them: (N, 1, s, s) float32. Raises as `decision_function`."""
        return self._draw(X).float()

    def to_module(self) -> nn.Module:
        """The CNN, free of this library: (N, 1, s, s) from `to_images` -> logits whose softmax is `predict_proba`.

        Raises:
            NotFittedError: `fit` was not called.
        """
        check_is_fitted(self)
        return self.weights_.to_module()

    def _require_shape(self, found: tuple[int, int] | None) -> None:
        if found not in (None, self.image_shape_):
            wanted = "rows of a table" if self.image_shape_ is None else f"images of {self.image_shape_} pixels"
            raise DataError(f"X holds images of {found} pixels, and {wanted} are expected; give images of one shape throughout.")

    def _draw(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X, found = flatten_images(X)
        self._require_shape(found)
        return self.pictures_.draw(validate_data(self, X, dtype=np.float64, reset=False))

    def _logits(self, X: Any) -> npt.NDArray[np.float64]:
        images = self._draw(X)
        # float32 sums depend on how many images are convolved at once
        weights = replace(self.weights_, tensors={name: value.double() for name, value in self.weights_.tensors.items()})
        with torch.no_grad():
            parts = [weights.logits(part[None])[0] for part in torch.split(images, _AT_ONCE)]
        return np.asarray(torch.cat(parts).numpy(), dtype=np.float64)


def expected_calibration_error(probabilities: npt.ArrayLike, labels: npt.ArrayLike, n_bins: int = 15) -> float:
    """How far stated confidence lies from accuracy: the mean over equal bins of confidence, weighted by how many samples a bin has.

    Args:
        probabilities: (N, n), rows that sum to 1.
        labels: (N,) columns of the right answers, 0..n-1.
        n_bins: of the interval 0..1.

    Returns:
        A share in [0, 1]; 0 is perfect. With few samples it is biased upwards.

    Raises:
        DataError: shapes disagree, there is no sample, or a label names no column.
        SettingError: `n_bins` below 1.

    Source: Naeini, Cooper and Hauskrecht 2015; Guo et al. 2017 (arXiv 1706.04599), equation 3.

    Example:
        >>> round(expected_calibration_error([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2]], [0, 0, 0, 0, 1]), 6)
        0.0
    """
    table, answers = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if n_bins < 1:
        raise SettingError(f"n_bins={n_bins} must be 1 or more; 15 is usual.")
    if table.ndim != 2 or answers.shape != table.shape[:1] or not table.size:
        raise DataError(f"probabilities {table.shape} and labels {answers.shape} must be (N, n) and (N,), with one sample or more.")
    if answers.dtype.kind not in "iu" or answers.min() < 0 or answers.max() >= table.shape[1]:
        raise DataError(f"labels must be column numbers 0..{table.shape[1] - 1}; got {np.unique(answers)[:5]}.")
    confidence = table.max(1)
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    # a bin's share times its gap is |sum of the differences| / N
    gaps = np.bincount(bins, weights=confidence - (table.argmax(1) == answers), minlength=n_bins)
    return float(np.abs(gaps).sum() / len(table))


def _resolve(model: HyperTransformer | str | Path | None) -> HyperTransformer:
    """The model that a setting stands for."""
    if model is None:
        found = _shipped()
    elif isinstance(model, str | Path):
        found = load_hypertransformer(Path(model))
    else:
        found = model
    if not isinstance(found, HyperTransformer) or isinstance(found, ContinualHyperTransformer):
        kind = type(found).__name__
        raise SettingError(f"HyperClassifier: model is of type {kind}; give a HyperTransformer, a folder that holds one, or None.")
    if found.target.in_channels != 1:
        n_channels = found.target.in_channels
        raise SettingError(f"HyperClassifier: the model reads {n_channels} channels; give one that was meta-trained on grey images.")
    return found


@cache
def _shipped() -> HyperTransformer:
    from remanence.generated.files import shipped_hypertransformer

    return load_hypertransformer(shipped_hypertransformer())


def _like(model: HyperTransformer) -> Tensor:
    """A parameter, for its device and dtype."""
    return next(model.parameters())


def _require_ways(classes: npt.NDArray[Any], model: HyperTransformer) -> None:
    if len(classes) < 2:
        raise DataError(f"y holds 1 class ({classes[0]!r}); a classifier needs two or more.")
    if len(classes) > model.max_ways:
        raise DataError(
            f"y holds {len(classes)} classes, the model was meta-trained for at most {model.max_ways}; give fewer classes, or a model "
            f"with larger max_ways."
        )


def _write(
    model: HyperTransformer, images: Tensor, slots: Tensor, is_kept: Tensor | None = None, class_names: list[list[str]] | None = None
) -> TaskWeights:
    """Weights of B tasks on the CPU."""
    with torch.no_grad():
        mask = None if is_kept is None else is_kept.to(images.device)
        weights = model.generate(images, slots.to(images.device), mask, class_names or ())
    return replace(weights, tensors={name: value.cpu() for name, value in weights.tensors.items()})


def _cooled(weights: TaskWeights, temperature: float) -> TaskWeights:
    """The same weights with logits divided by the temperature."""
    changed = {name: value / temperature if name.startswith("logits.") else value for name, value in weights.tensors.items()}
    return replace(weights, tensors=changed)


def _best_temperature(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    """The likeliest temperature given labels (N,) of logits (N, n), its logarithm being standard normal before any was seen.

    Without that, ten held-out answers that happen to be all right would drive it to 0.
    """
    scores, answers = torch.from_numpy(logits), torch.from_numpy(labels)
    limit = float(np.log(WIDEST))

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(scores / np.exp(log_temperature), answers, reduction="sum").item() + log_temperature**2 / 2

    return float(np.exp(minimize_scalar(loss, bounds=(-limit, limit), method="bounded").x))
