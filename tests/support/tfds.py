"""A dataset as TFDS prepares it."""

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer


def prepare(directory, features, splits):
    """The files of a version's directory, DATA_DIR/NAME/.../VERSION, by TFDS's own serialisation."""
    directory.mkdir(parents=True)
    features, infos = tfds.features.FeaturesDict(features), []
    serializer = ExampleSerializer(features.get_serialized_info())
    for split, rows in splits.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name=directory.parts[-3], split=split, filetype_suffix="array_record", data_dir=directory
        )
        writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
        for row in rows:
            writer.write(serializer.serialize_example(features.encode_example(row)))
        writer.close()
        infos.append(tfds.core.SplitInfo(split, shard_lengths=[len(rows)], num_bytes=1, filename_template=template))
    tfds.folder_dataset.write_metadata(data_dir=directory, features=features, split_infos=infos, check_data=False)
