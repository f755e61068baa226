"""The demo's model and data: shapes, sizes, and that the float model reads the digits it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from paring.demo import data_path, load_digits, model_path, upscale

CORNER = np.zeros((1, 8, 8), np.uint8)
CORNER[0, 0, 0] = 16


def test_model_file_has_a_signature_and_a_fair_size():
    assert 300_000 <= model_path().stat().st_size <= 1_200_000
    interpreter = Interpreter(str(model_path()))
    signature = {"inputs": ["image"], "outputs": ["probabilities"]}
    assert interpreter.get_signature_list() == {"serving_default": signature}
    (image,), (answer,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert (list(image["shape"]), image["dtype"]) == ([1, 32, 32, 1], np.float32)
    assert (list(answer["shape"]), answer["dtype"]) == ([1, 10], np.float32)


def test_stored_data_is_small_and_original():
    assert data_path().stat().st_size < 50_000
    with np.load(data_path(), allow_pickle=False) as data:
        assert {name: (array.shape, array.dtype) for name, array in data.items()} == {
            "images": ((599, 8, 8), np.uint8),
            "labels": ((599,), np.uint8),
            "calibration": ((200, 8, 8), np.uint8),
        }
        assert data["images"].max() == data["calibration"].max() == 16
        held = {image.tobytes() for image in data["images"]}
        assert not any(image.tobytes() in held for image in data["calibration"])


def test_loaded_digits_are_what_the_model_takes():
    calibration, images, labels = load_digits()
    assert (calibration.shape, calibration.dtype) == ((200, 32, 32, 1), np.float32)
    assert (images.shape, images.dtype) == ((599, 32, 32, 1), np.float32)
    assert images.min() == 0.0
    assert images.max() <= 1.0
    assert set(labels) == set(range(10))


def test_upscale_is_bilinear_with_centers_at_one_half():
    # Output pixel 0 lies outside the first center (edge repeated); 2 and 3 lie 1/8 and 3/8 of a source pixel past it.
    expected = np.array([1, 1, 0.875, 0.625, 0.375, 0.125, 0, 0], np.float32)
    corner = upscale(CORNER)[0, :, :, 0]
    np.testing.assert_array_equal(corner[0, :8], expected)
    np.testing.assert_array_equal(corner[:8, 0], expected)
    np.testing.assert_allclose(corner[:8, :8], np.outer(expected, expected))


@pytest.mark.timeout(60)
def test_float_model_reads_the_held_out_digits():
    _, images, labels = load_digits()
    interpreter = Interpreter(str(model_path()), num_threads=1)
    run = interpreter.get_signature_runner("serving_default")
    answers = np.array([run(image=image[np.newaxis])["probabilities"][0] for image in images])
    np.testing.assert_allclose(answers.sum(axis=1), 1.0, rtol=1e-5)
    assert np.mean(answers.argmax(axis=1) == labels) > 0.97
