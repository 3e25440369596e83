"""What `Learner.score` makes of a prediction, for classes and for tokens."""

import math

import pytest
import torch

from remanence.learner import Learner, Prediction


class Fixed(Learner):
    """Answers with logits that it was given."""

    store = "weights"

    def __init__(self, logits, classes):
        self.answer = Prediction(torch.as_tensor(logits), torch.as_tensor(classes))

    def learn(self, task):
        raise NotImplementedError

    def predict(self, inputs, task=None, reader=""):
        return self.answer

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_class_scores_are_log_probabilities_and_unknown_classes_minus_infinity():
    learner = Fixed(torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]])), [7, 3])
    assert learner.score(torch.zeros(2, 1), torch.tensor([3, 4])).tolist() == pytest.approx([math.log(0.75), -math.inf])


def test_token_scores_are_summed_over_the_sequence():
    # (2 sequences, 3 tokens, 2 words); the number of words differs from that of tokens and of sequences
    probabilities = torch.tensor([[[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]], [[0.25, 0.75], [0.5, 0.5], [0.4, 0.6]]])
    learner = Fixed(probabilities.log(), [0, 1])
    scores = learner.score(torch.zeros(2, 3), torch.tensor([[0, 1, 0], [1, 1, 1]]))
    assert scores.tolist() == pytest.approx([math.log(0.5 * 0.8 * 0.9), math.log(0.75 * 0.5 * 0.6)], abs=1e-6)
