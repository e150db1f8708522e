"""Normalisation: inside the model, per channel, in the checkpoint."""

import torch
from torch import nn

from bench.models.base import Classifier, Normalize


def test_normalize_by_hand():
    # channel 0: (0.5 − 0.5)/0.25 = 0, (1 − 0.5)/0.25 = 2; channel 1: (0.5 − 0.1)/0.5 = 0.8, (0 − 0.1)/0.5 = −0.2
    x = torch.tensor([[[[0.5, 1.0]], [[0.5, 0.0]]]])
    torch.testing.assert_close(Normalize((0.5, 0.1), (0.25, 0.5))(x), torch.tensor([[[[0.0, 2.0]], [[0.8, -0.2]]]]))


def test_mean_and_std_are_saved_and_not_trained():
    classifier = Classifier(nn.Flatten(), (0.5, 0.1), (0.25, 0.5))
    assert list(classifier.state_dict()) == ["normalize.mean", "normalize.std"]
    assert list(classifier.parameters()) == []


def test_a_classifier_takes_pixels_and_normalises_them_itself():
    x = torch.rand(3, 2, 4, 4)
    mean, std = (0.5, 0.1), (0.25, 0.5)
    torch.testing.assert_close(Classifier(nn.Flatten(), mean, std)(x), Normalize(mean, std)(x).flatten(1))
