"""Images in folders and LEAF's writers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdcr_fast.sim import simulate
from fdcr_fast.sim.datasets.folders import femnist, image_folder, tiny_imagenet
from fdcr_fast.sim.datasets.readers import load_dataset
from tests.support import users

GREY = {"bee": 0, "cat": 255}  # what images of a class look like


def paint(path: Path, grey: int, size: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), grey, dtype=np.uint8)).save(path)


def test_classes_are_folders(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for label, grey in GREY.items():
            for k in range(count):
                paint(tmp_path / part / label / f"{k}.png", grey, size=12 + k)
    data = image_folder(tmp_path, size=8, test="val").dataset
    assert data.train_images.shape == (6, 3, 8, 8)
    assert torch.equal(data.train_images.amax((1, 2, 3)), 2.0 * data.train_labels - 1)
    assert (data.test_labels.tolist(), data.num_classes, data.owners) == ([0, 0, 1, 1], 2, None)
    with pytest.raises(ValueError, match="train: inputs differ in shape: sample"):
        _ = image_folder(tmp_path, test="val").dataset
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "dog")
    with pytest.raises(ValueError, match=r"train has the classes \['bee', 'cat'\], val has \['bee', 'dog'\]"):
        image_folder(tmp_path, test="val")
    with pytest.raises(FileNotFoundError, match="give --data-dir"):
        image_folder(None)


def test_missing_files_of_cifar100_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar100: expected cifar-100-python/ in .*; nothing is downloaded"):
        load_dataset("cifar100", tmp_path)


def test_tiny_imagenet(tmp_path: Path) -> None:
    for label, grey in GREY.items():
        paint(tmp_path / "train" / label / "images" / "0.JPEG", grey)
        paint(tmp_path / "val" / "images" / f"val_{label}.JPEG", grey)
    with pytest.raises(FileNotFoundError, match=r"tiny-imagenet: no file .*val_annotations\.txt"):
        tiny_imagenet(tmp_path)
    lines = [f"val_{label}.JPEG\t{label}\t0\t0\t62\t62\n" for label in reversed(GREY)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    data = tiny_imagenet(tmp_path).dataset
    assert data.test_labels.tolist() == [1, 0]
    assert data.test_images.mean((1, 2, 3)).tolist() == [1, -1]
    assert data.train_labels.tolist() == [0, 1]


def test_writers_of_leaf_are_clients(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, sizes in (("train", {"ann": 11, "bob": 14, "cid": 12}), ("test", {"ann": 2, "bob": 3, "cid": 4})):
        (tmp_path / part).mkdir()
        for file, names in (("one", ["ann", "bob"]), ("two", ["cid"])):
            content = {
                name: {"x": rng.random((sizes[name], 784)).tolist(), "y": [k % 3 for k in range(sizes[name])]}
                for name in names
            }
            (tmp_path / part / f"{file}.json").write_text(json.dumps({"users": names, "user_data": content}))
    data = femnist(tmp_path, clients=2)
    assert [len(labels) for _, labels in data.train] == [14, 12], "bob and cid"
    assert data.dataset.test_images.shape == (7, 1, 28, 28)
    assert -1 <= data.dataset.train_images.min() < -0.9
    with pytest.raises(ValueError, match="has 3 users, too few for 4 clients"):
        femnist(tmp_path, clients=4)
    config = users.config(dataset="femnist", data_dir=tmp_path, clients=3, attack="label-flip", rounds=1)
    assert [record.num_samples for record in simulate(config).clients] == [14, 12, 11]
