"""Datasets that TFDS prepared: read back by what their directory says, and refused in one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.tfds import prepare

from cepe_jax.data.tfds import label_names, rows, versions

FEATURES = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["no", "yes"]), "number": np.int32}
ROWS = [{"text": "é\n", "label": 1, "number": 7}, {"text": "", "label": 0, "number": -1}]


@pytest.fixture
def directory(tmp_path):
    prepare(tmp_path / "some" / "set" / "1.0.0", FEATURES, {"train": ROWS, "test": ROWS[:1]})
    return tmp_path / "some" / "set" / "1.0.0"


def test_rows(directory):
    assert list(rows(directory, "train")) == ROWS
    assert list(rows(directory, "test")) == ROWS[:1]
    assert label_names(directory, "label") == ("no", "yes")
    assert label_names(directory, "number") == ()


def test_versions(directory, tmp_path):
    for version in "10.0.0", "2.0.0", "2.1.0":
        (directory.parent / version).mkdir()
        (directory.parent / version / "dataset_info.json").touch()
    (directory.parent / "11.0.0").mkdir()  # not prepared to the end
    assert [path.name for path in versions(tmp_path, "some/set")] == ["1.0.0", "2.0.0", "2.1.0", "10.0.0"]
    assert versions(tmp_path, "another") == []


def test_refusals(directory):
    with pytest.raises(ValueError, match="1.0.0: .*split validation: .*test"):
        list(rows(directory, "validation"))
    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match='1.0.0: .*file_format="array_record"'):
        list(rows(directory, "train"))


def test_tensorflow_is_not_imported(directory):
    program = (
        "import sys; from pathlib import Path; from cepe_jax.data.tfds import rows;"
        f"assert len(list(rows(Path({str(directory)!r}), 'train'))) == 2; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
