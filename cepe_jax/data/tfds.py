"""Datasets of text that TFDS has prepared, read without TensorFlow and without the code of their builders."""

from collections.abc import Iterator
from pathlib import Path


def versions(data_dir: Path, name: str) -> list[Path]:
    """Return where TFDS put the dataset `name` ("glue/sst2") below `data_dir`: each version, the newest last."""
    found = [path.parent for path in (data_dir / name).glob("*/dataset_info.json")]
    return sorted(found, key=lambda path: [(len(part), part) for part in path.name.split(".")])


def rows(directory: Path, split: str) -> Iterator[dict]:
    """The split's rows, texts as texts. ValueError where it was not prepared as array_record, or has no such split."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    if split not in builder.info.splits:
        raise ValueError(f"{directory}: has no split {split}: it has {', '.join(builder.info.splits)}")
    try:
        source = builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(f'{directory}: prepare it anew, with file_format="array_record" ({error})') from None
    for number in range(len(source)):
        yield {name: value.decode() if isinstance(value, bytes) else value for name, value in source[number].items()}


def label_names(directory: Path, feature: str) -> tuple[str, ...]:
    """The names of the feature's labels by their number, () where it is no label of TFDS."""
    import tensorflow_datasets as tfds

    found = tfds.builder_from_directory(directory).info.features[feature]
    return tuple(found.names) if isinstance(found, tfds.features.ClassLabel) else ()
