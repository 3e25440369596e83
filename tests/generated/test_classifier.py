import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.utils.estimator_checks import check_estimator

from remanence.errors import DataError, SettingError
from remanence.generated import classifier as module
from remanence.generated._pictures import Pictures, find_shape, flatten_images
from remanence.generated.classifier import HyperClassifier, expected_calibration_error
from remanence.generated.continual import ContinualHyperTransformer
from remanence.generated.files import save_hypertransformer
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.target import TargetNet
from remanence.keys import keyed_rng

SIDE = 16
SMALL = {"head": "prototype", "label_codes": "random", "width": 16, "depth": 1, "heads": 2, "shared_features": 8}


def build(channels=4, norm="group", kind=HyperTransformer, in_channels=1, **settings):
    with keyed_rng("tiny"):
        return kind(TargetNet(channels, in_channels, SIDE, norm=norm), **(SMALL | settings))


@pytest.fixture(scope="module")
def model():
    """Untrained: prototypes of random features, which tell strokes apart well enough."""
    return build()


@pytest.fixture(scope="module")
def strokes():
    """60 images of a lying, a standing or a slanting stroke at random places, each with a black and a white pixel."""
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(0, 0.3, (60, SIDE, SIDE)), np.arange(60) % 3
    grid = np.arange(SIDE)
    for image, label, place in zip(images, labels, rng.integers(4, 12, 60), strict=True):
        rows, columns = [(np.full(SIDE, place), grid), (grid, np.full(SIDE, place)), (grid, (grid + place) % SIDE)][label]
        image[rows, columns] = 1.0
        image[0, 0] = 0.0
    return images, np.array(["lying", "standing", "slanting"])[labels]


# --- as scikit-learn wants it ----------------------------------------------------------------------------------


def test_every_check_of_scikit_learn_passes():
    check_estimator(HyperClassifier(), expected_failed_checks={}, on_skip=None)


def test_settings_are_searched_and_cloned(model, strokes):
    images, labels = strokes
    search = GridSearchCV(HyperClassifier(model), {"calibrate": [True, False]}, cv=2).fit(images.reshape(60, -1), labels)
    assert search.best_score_ > 0.5  # chance is 0.33
    assert clone(search.best_estimator_).get_params()["image_shape"] is None


def test_a_fitted_classifier_survives_pickle(model, strokes):
    images, labels = strokes
    fitted = HyperClassifier(model).fit(images, labels)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict_proba(images), fitted.predict_proba(images))


def test_the_room_does_without_scikit_learn():
    code = "import sys, remanence.generated; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what it learns --------------------------------------------------------------------------------------------


def test_strokes_are_told_apart(model, strokes):
    images, labels = strokes
    fitted = HyperClassifier(model).fit(images[:15], labels[:15])
    assert fitted.classes_.tolist() == ["lying", "slanting", "standing"]
    assert fitted.score(images[15:], labels[15:]) > 0.5  # chance is 0.33, and nothing is trained
    assert fitted.weights_.class_names == (("lying", "slanting", "standing"),)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x[:, None], lambda x: x.reshape(len(x), -1), lambda x: x.tolist(), torch.from_numpy, lambda x: list(x[:, None]),
        lambda x: 7 - 3 * (1 - x), lambda x: 1 - x,
    ],
    ids=["channel", "rows", "lists", "tensor", "list of arrays", "other units", "dark on light"],
)  # fmt: skip
def test_the_form_of_the_images_does_not_matter(model, strokes, form):
    images, labels = strokes
    wanted = HyperClassifier(model).fit(images, labels).predict_proba(images[:9])
    given = form(images)
    found = HyperClassifier(model).fit(given, labels.tolist()).predict_proba(given[:9])
    assert np.allclose(found, wanted, atol=1e-5)


def test_bytes_are_taken(model, strokes):
    images, labels = (strokes[0] * 255).astype(np.uint8), torch.arange(60) % 3
    fitted = HyperClassifier(model).fit(images, labels)
    assert fitted.predict(images).dtype == labels.numpy().dtype


def test_two_classes_have_one_decision(model, strokes):
    images, labels = strokes
    keep = labels != "slanting"
    fitted = HyperClassifier(model).fit(images[keep], labels[keep] == "lying")
    decision, probabilities = fitted.decision_function(images), fitted.predict_proba(images)
    assert decision.shape == (60,)
    assert np.allclose(probabilities[:, 1], 1 / (1 + np.exp(-decision)))
    assert np.array_equal(fitted.predict(images), decision > 0)


def test_a_sample_is_answered_by_itself(model, strokes):
    images, labels = strokes
    for each in (model, build(norm="batch")):
        fitted = HyperClassifier(each).fit(images, labels)
        alone = np.concatenate([fitted.decision_function(image[None]) for image in images[:5]])
        assert np.allclose(alone, fitted.decision_function(images)[:5], rtol=1e-10, atol=1e-10)


def test_the_same_input_gives_the_same_result_and_no_generator_moves(model, strokes):
    images, labels = strokes
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what must not move
    first = HyperClassifier(model).fit(images, labels).predict_proba(images)
    second = HyperClassifier(model).fit(images, labels).fit(images, labels).predict_proba(images)
    assert np.array_equal(first, second)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_a_support_of_two_thousand(strokes):
    images, labels = np.tile(strokes[0], (34, 1, 1))[:2000], np.tile(strokes[1], 34)[:2000]
    fitted = HyperClassifier(build(channels=2), calibrate=False).fit(images, labels)
    assert fitted.predict(images).shape == (2000,)


def test_a_folder_stands_for_the_model_in_it(model, strokes, tmp_path):
    images, labels = strokes
    save_hypertransformer(model, tmp_path / "ht")
    for path in (tmp_path / "ht", str(tmp_path / "ht")):
        found = HyperClassifier(path).fit(images, labels).predict_proba(images)
        assert np.array_equal(found, HyperClassifier(model).fit(images, labels).predict_proba(images))


def test_the_module_is_the_calibrated_cnn(model, strokes):
    images, labels = strokes
    fitted = HyperClassifier(model).fit(images, labels)
    assert fitted.temperature_ != 1
    cnn = fitted.to_module()
    assert all(type(part).__module__.startswith("torch.nn") for part in cnn.modules())
    with torch.no_grad():
        found = cnn(fitted.to_images(images)).softmax(1).numpy()
    assert np.allclose(found, fitted.predict_proba(images), atol=1e-5)


# --- calibration -----------------------------------------------------------------------------------------------


def test_folds_in_one_pass_are_folds_one_by_one(model, strokes, monkeypatch):
    images, labels = strokes[0][:14], strokes[1][:14]  # 5, 5 and 4: four folds, not all of one size
    caught = {}
    monkeypatch.setattr(module, "_best_temperature", lambda logits, slots: caught.update(logits=logits, slots=slots) or 1.0)
    HyperClassifier(model).fit(images, labels)
    rows, wanted = [], []
    for train, test in StratifiedKFold(4, shuffle=True, random_state=0).split(images, labels):
        rows.extend(test)
        wanted.append(HyperClassifier(model, calibrate=False).fit(images[train], labels[train]).decision_function(images[test]))
    assert np.array_equal(caught["slots"], np.unique(labels, return_inverse=True)[1][rows])
    assert np.allclose(caught["logits"], np.concatenate(wanted), atol=1e-4)


def test_the_temperature_changes_no_answer(model, strokes):
    images, labels = strokes
    plain, calibrated = (HyperClassifier(model, calibrate=value).fit(images, labels) for value in (False, True))
    assert plain.temperature_ == 1
    assert np.allclose(plain.decision_function(images) / calibrated.temperature_, calibrated.decision_function(images), atol=1e-4)
    assert np.array_equal(plain.predict(images), calibrated.predict(images))


def test_one_shot_leaves_the_temperature_alone(model, strokes):
    images, labels = strokes
    assert HyperClassifier(model).fit(images[:5], labels[:5]).temperature_ == 1  # 2, 2 and 1


def test_the_seed_draws_the_folds(model, strokes):
    images, labels = strokes
    found = {HyperClassifier(model, random_state=seed).fit(images, labels).temperature_ for seed in range(3)}
    assert len(found) == 3


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_the_temperature_is_found(factor):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3000, 4)) * 2
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    assert module._best_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.1)
    before, after = (expected_calibration_error(softmax(logits * by, axis=1), labels) for by in (factor, factor / factor))
    assert after < 0.03
    assert factor == 1 or before > 3 * after


def test_few_held_out_answers_do_not_make_certain():
    assert 0.1 < module._best_temperature(np.eye(4), np.arange(4)) < 1  # all right: the likeliest temperature alone is 0
    assert 1 < module._best_temperature(-9 * np.eye(4), np.arange(4)) < 99


# --- calibration error -----------------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    # bins of a tenth: two at 0.9 with one right; 0.6 right; 0.7 wrong
    assert expected_calibration_error(probabilities, [0, 1, 1, 0], n_bins=10) == pytest.approx((2 * 0.4 + 0.4 + 0.7) / 4)
    assert expected_calibration_error(probabilities, [0, 1, 1, 0], n_bins=1) == pytest.approx(abs(3.1 - 2) / 4)
    assert expected_calibration_error([[1.0, 0.0]], [0]) == 0


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([[0.5, 0.5]], [0], 0), SettingError, "n_bins=0 must be 1 or more"),
        (([0.5, 0.5], [0, 1]), DataError, r"probabilities \(2,\) and labels \(2,\) must be"),
        (([[0.5, 0.5]], [0, 1]), DataError, r"probabilities \(1, 2\) and labels \(2,\)"),
        ((np.zeros((0, 2)), np.zeros(0, int)), DataError, "one sample or more"),
        (([[0.5, 0.5]], [2]), DataError, r"column numbers 0\.\.1; got \[2\]"),
        (([[0.5, 0.5]], [-1]), DataError, r"got \[-1\]"),
        (([[0.5, 0.5]], ["a"]), DataError, r"got \['a'\]"),
    ],
)
def test_calibration_error_refuses(arguments, kind, message):
    with pytest.raises(kind, match=message):
        expected_calibration_error(*arguments)


# --- pictures --------------------------------------------------------------------------------------------------


def test_an_image_keeps_its_aspect_in_the_middle():
    pictures = Pictures.fit(np.array([[1.0] * 8, [0.0] * 8]), (2, 4), 8)
    drawn = pictures.draw(np.ones((1, 8)))[0, 0]
    assert drawn.shape == (8, 8)
    assert torch.equal(drawn[4].round(), torch.ones(8, dtype=torch.float64))
    assert drawn[[0, 7]].sum() == 0


def test_an_image_of_the_right_side_is_left_alone():
    image = np.random.default_rng(0).random((3, 64)) * 0.4
    image[0, :2] = 0, 1
    assert np.array_equal(Pictures.fit(image, (8, 8), 8).draw(image)[:, 0].numpy(), image.reshape(3, 8, 8))


def test_large_images_shrink_without_aliasing():
    checkerboard = (np.indices((32, 32)).sum(0) % 2).reshape(1, -1)
    drawn = Pictures.fit(np.array(checkerboard, dtype=float), (32, 32), 8).draw(np.array(checkerboard, dtype=float))
    assert (drawn - 0.5).abs().max() < 0.1


def test_dark_on_light_is_turned_by_the_training_images():
    light = np.ones((2, 64))
    light[:, :9] = 0
    pictures = Pictures.fit(light, (8, 8), 8)
    assert pictures.is_inverted
    assert pictures.draw(light).sum() == 18
    assert pictures.draw(1 - light).sum() == 2 * 55  # asked about alone, an image is turned just the same


def test_a_feature_stands_over_its_complement():
    table = np.array([[0.0, -100.0], [10.0, 100.0], [2.0, 50.0]])
    drawn = Pictures.fit(table, None, 4).draw(np.array([[2.0, 50.0]]))[0, 0]
    assert torch.allclose(drawn, torch.tensor([[0.2, 0.2, 0.75, 0.75]] * 2 + [[0.8, 0.8, 0.25, 0.25]] * 2, dtype=torch.float64))


def test_odd_tables_are_drawn():
    assert Pictures.fit(np.ones((3, 1)), None, 4).draw(np.ones((1, 1))).isfinite().all()  # a constant feature
    wide = np.random.default_rng(0).random((4, 1000))
    assert Pictures.fit(wide, None, 8).draw(wide).shape == (4, 1, 8, 8)  # more features than pixels
    huge = np.array([[-1.7e308], [1.7e308]])
    assert Pictures.fit(huge, None, 2).draw(np.array([[0.0], [np.finfo(float).max]]))[:, 0, 0, 0].tolist() == [0.5, 1.0]


def test_shapes_are_found():
    assert [find_shape(n, None) for n in (4, 49, 64, 65, 784)] == [None, None, (8, 8), None, (28, 28)]
    assert find_shape(4, [2, np.int64(2)]) == (2, 2)
    assert flatten_images(np.zeros((2, 3)))[1] is None


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [5, (4,), (0, 3), (2.0, 8.0), "16x16"])
def test_image_shape_must_be_a_pair(model, strokes, shape):
    with pytest.raises(SettingError, match="must be \\(height, width\\) in pixels"):
        HyperClassifier(model, image_shape=shape).fit(strokes[0].reshape(60, -1), strokes[1])


def test_image_shape_must_fit_the_features(model, strokes):
    with pytest.raises(SettingError, match="makes 64 pixels, but X has 256 features"):
        HyperClassifier(model, image_shape=(8, 8)).fit(strokes[0].reshape(60, -1), strokes[1])
    with pytest.raises(DataError, match=r"X holds images of \(16, 16\) pixels, and images of \(8, 32\) pixels are expected"):
        HyperClassifier(model, image_shape=(8, 32)).fit(*strokes)


def test_another_shape_is_refused_when_asked(model, strokes):
    fitted = HyperClassifier(model).fit(*strokes)
    with pytest.raises(DataError, match=r"X holds images of \(8, 32\) pixels, and images of \(16, 16\)"):
        fitted.predict(strokes[0].reshape(60, 8, 32))
    table = HyperClassifier(model).fit(strokes[0][:, 0, :12], strokes[1])
    with pytest.raises(DataError, match="and rows of a table are expected"):
        table.predict(strokes[0][:, :3, :4])


def test_colour_is_refused(model, strokes):
    for shape in ((60, 2, 16, 8), (60, 16, 8, 2)):
        with pytest.raises(DataError, match="grey ones are needed"):
            HyperClassifier(model).fit(strokes[0].reshape(shape), strokes[1])


def test_one_class_and_too_many_are_refused(model, strokes):
    with pytest.raises(DataError, match=r"y holds 1 class \(.*lying.*\); a classifier needs two"):
        HyperClassifier(model).fit(strokes[0], ["lying"] * 60)
    with pytest.raises(DataError, match="y holds 21 classes, the model was meta-trained for at most 20"):
        HyperClassifier(model).fit(strokes[0], np.arange(60) % 21)


def test_a_nan_is_refused_by_scikit_learn(model, strokes):
    with pytest.raises(ValueError, match="contains NaN"):
        HyperClassifier(model).fit(np.where(strokes[0] == 1, np.nan, strokes[0]), strokes[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: 3, "model is of type int; give a HyperTransformer"),
        (lambda: build(kind=ContinualHyperTransformer), "model is of type ContinualHyperTransformer"),
        (lambda: build(in_channels=3), "the model reads 3 channels"),
    ],
)
def test_other_models_are_refused(strokes, make, message):
    with pytest.raises(SettingError, match=message):
        HyperClassifier(make()).fit(*strokes)


def test_an_absent_folder_is_named(strokes, tmp_path):
    with pytest.raises(DataError, match=r"holds no hypertransformer\.json"):
        HyperClassifier(tmp_path / "nothing").fit(*strokes)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function", "to_images"])
def test_nothing_is_asked_before_fit(model, strokes, method):
    with pytest.raises(NotFittedError):
        getattr(HyperClassifier(model), method)(strokes[0])


def test_no_module_before_fit(model):
    with pytest.raises(NotFittedError):
        HyperClassifier(model).to_module()
