"""The projector's files, read as TensorBoard reads them."""

from __future__ import annotations

import io

import numpy as np
from google.protobuf import text_format
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from fedlabel.record.projector import projector_files


def test_points_columns_and_thumbnails_are_in_one_order() -> None:
    points = np.arange(6.0).reshape(3, 2)
    images = np.stack([np.full((3, 4, 5), 10 * i, dtype=np.uint8) for i in range(3)])
    files = projector_files("points", points, {"class": ["a", "b\tc", "d\n"], "client": [0, 1, 2]}, images)
    (embedding,) = text_format.Parse(str(files["projector_config.pbtxt"]), ProjectorConfig()).embeddings
    assert [*embedding.tensor_shape] == [3, 2]
    data = files[embedding.tensor_path]
    assert isinstance(data, bytes)
    np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(3, 2), points)
    assert files[embedding.metadata_path] == "class\tclient\na\t0\nb c\t1\nd\t2\n"
    assert [*embedding.sprite.single_image_dim] == [5, 4]  # width, height
    sprite = files[embedding.sprite.image_path]
    assert isinstance(sprite, bytes)
    sheet = np.asarray(Image.open(io.BytesIO(sprite)))
    assert sheet.shape == (8, 10, 3)
    assert [sheet[0, 0, 0], sheet[3, 9, 0], sheet[4, 0, 0], sheet[7, 9, 0]] == [0, 10, 20, 0]
    assert list(files)[-1] == "projector_config.pbtxt"  # it names the others


def test_large_grey_pictures_become_small_ones_and_tables_have_none() -> None:
    files = projector_files("x", np.zeros((1, 2)), {"a": [0], "b": [0]}, np.zeros((1, 1, 96, 64), dtype=np.uint8))
    sprite = files["projector/sprite.png"]
    assert isinstance(sprite, bytes)
    assert Image.open(io.BytesIO(sprite)).size == (22, 32)
    assert "projector/sprite.png" not in projector_files("x", np.zeros((1, 2)), {"a": [0], "b": [0]}, None)
