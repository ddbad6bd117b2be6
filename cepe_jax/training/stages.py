"""A stage of training from its start to its model: what is loaded, what trains, on which examples."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.config import DECODERS, ENCODERS, Compute, preset
from cepe_jax.cost import peak_flops
from cepe_jax.data.examples import TEACHER
from cepe_jax.data.loader import Sequences, batches, examples, names_in, open_mix
from cepe_jax.data.records import NoDataset
from cepe_jax.data.tokenizer import Tokenizer, file_in
from cepe_jax.devices import describe
from cepe_jax.directories import is_remote, write_json
from cepe_jax.distributed import connected, first_says, is_first, meet
from cepe_jax.exits import STOPPED
from cepe_jax.identity import as_json, as_of, refuse_another_run
from cepe_jax.model.cepe import (
    Cepe,
    assemble,
    cross_from_self_attention,
    encoder_from_decoder,
    parts_of,
    split,
)
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.sharding import make_mesh, place_batch, rows_of, shardings_of
from cepe_jax.training.forecast import epochs, forecast
from cepe_jax.training.heldout import HeldOut
from cepe_jax.training.logs import StepFacts
from cepe_jax.training.settings import (
    TrainConfig,
    compute_of,
    flops_of,
    mesh_of,
    micro_batches,
    objective_of,
    of_a_cepe,
    run_identity,
    run_of,
    sizes_of,
    tokens_of_step,
    trained_parts,
)
from cepe_jax.training.trainer import init_state, make_train_step, train
from cepe_jax.weights.checkpoint import Checkpoints, any_in, digests_of
from cepe_jax.weights.directory import check_positions, save
from cepe_jax.weights.huggingface import load, read_config
from cepe_jax.weights.tensors import abstract_parts


def starting_model(config: TrainConfig, compute: Compute, vocab_size: int) -> Cepe | Llama | Encoder:
    """The model of the stage before its first step: presets are initialised at random, directories loaded.

    `vocab_size` is the tokenizer's; an encoder has one more id, the mask. The parts that train are float32.
    """
    key = jax.random.key(config.seed)
    for name, presets in (("decoder", DECODERS), ("encoder", ENCODERS)):
        if (start := getattr(config, name)) and not Path(start).is_dir():
            preset(presets, start)
    match config.stage:
        case "lm" if config.decoder in DECODERS:
            sizes = dataclasses.replace(DECODERS[config.decoder], vocab_size=vocab_size)
            return born_sharded(lambda key: Llama(sizes, compute, key=key), key)
        case "lm":
            return load(config.decoder, compute, trained_parts(config))
        case "mlm" if config.encoder in ENCODERS:
            sizes = dataclasses.replace(ENCODERS[config.encoder], vocab_size=vocab_size + 1, mlm_head=True)
            if config.decoder:
                decoder = load(config.decoder)
                return born_sharded(
                    lambda key, decoder: encoder_from_decoder(decoder, sizes, compute, key=key), key, decoder
                )
            return born_sharded(lambda key: Encoder(sizes, compute, key=key), key)
        case "mlm":
            return load(config.encoder, compute, trained_parts(config))
    if config.cepe:
        return load(config.cepe, compute, config.train)
    decoder = load(config.decoder, compute, tuple({"decoder"} & set(config.train)))
    if config.encoder in ENCODERS:
        sizes = of_a_cepe(dataclasses.replace(ENCODERS[config.encoder], vocab_size=vocab_size + 1), config)
        encoder = born_sharded(lambda key: Encoder(sizes, compute, key=key), key)
    else:
        sizes = of_a_cepe(read_config(config.encoder), config)
        encoder = load(config.encoder, compute, tuple({"encoder"} & set(config.train)), sizes)
    layers, init = config.cross_layers, config.cross_init
    cross = born_sharded(
        lambda key, decoder: cross_from_self_attention(decoder, encoder.config, layers, init, key=key), key, decoder
    )
    return Cepe(decoder, encoder, cross)


def born_sharded(make, *args):
    """`make(*args)`, every array created where it belongs on the mesh."""
    shardings = shardings_of(jax.eval_shape(make, *args), jax.sharding.get_mesh())
    return jax.jit(make, out_shardings=shardings)(*args)


def check_reads_ids(model: Cepe | Llama | Encoder, config: TrainConfig, vocab_size: int) -> None:
    """Raise ValueError if a part of the model has fewer ids than the tokenizer and, in stage mlm, the mask."""
    for name in ("decoder", "encoder"):
        if (part := parts_of(model).get(name)) is None:
            continue
        needed = vocab_size + (config.stage == "mlm")
        if part.config.vocab_size < needed:
            raise ValueError(
                f"the {name}'s vocabulary of {part.config.vocab_size} is below the {needed} ids of {config.data}: "
                f"prepare the data with the model's tokenizer"
            )


def is_taught(source: Sequences) -> bool:
    return source.joined is not None and source.joined.name == TEACHER


def check_teacher(config: TrainConfig, data: Path, sources: Sequence[Sequences]) -> None:
    """ValueError where the datasets in `data` are not what the stage's loss reads, or the decoder cannot teach them.

    The teacher's probabilities are in the datasets, or else the decoder that the stage starts from computes them.
    """
    taught = list(map(is_taught, sources))
    if config.stage != "ceped":
        if any(taught):
            raise ValueError(f"{data}: holds a teacher's probabilities, and stage {config.stage} reads none")
        return
    for source, has_teacher in zip(sources, taught, strict=True):
        if source.joined and not has_teacher:
            raise ValueError(
                f"{source.joined.path}: its contexts are passages, and stage ceped needs what stood before"
            )
        if has_teacher and source.joined.index["top_k"] != config.distill.top_k:
            raise ValueError(
                f"{source.joined.path} has {source.joined.index['top_k']} tokens a position and distill.top_k is "
                f"{config.distill.top_k}: set the one, or make the other again"
            )
    if all(taught):
        print(f"teacher of {data}: probabilities in it")
        return
    if any(taught):
        raise ValueError(f"{data}: a part of mix holds a teacher's probabilities: give all of it one, or none")
    if "decoder" in config.train:
        raise ValueError(
            f"{data}: the decoder is the teacher and cannot train: leave it out, or prepare a teacher's data"
        )
    check_positions(config.cepe or config.decoder, config.examples.span)
    print(f"teacher of {data}: the frozen decoder")


def launch(config: TrainConfig) -> Path:
    """`run_stage` by this process, which is alone or one of the many that its settings or its cluster name.

    SystemExit with status 75 where the run was asked to stop before its end.
    """
    if is_remote(config.out) and not config.dry_run and find_spec("gcsfs") is None:
        raise ValueError(f"{config.out} is in a bucket: pip install gcsfs to write there")
    with connected(config.distributed, config.out / "compiled"):
        ended = run_stage(config)
    return ended or sys.exit(0 if config.dry_run else STOPPED)


def run_stage(config: TrainConfig) -> Path | None:
    """The directory `config.out/model`, trained; a run that was cut off goes on from its newest checkpoint.

    None where the run was asked to stop before its end. A dry run tells what it would take and ends, with None too.
    """
    if config.dry_run:
        tell_ahead(config)
        return None
    model_dir, record = config.out / "model", config.out / "config.json"
    sources = open_mix(config.data, config.mix, config.stage, config.examples)
    tokenizer = sources[0].records.tokenizer
    resolved = as_json(config)
    resolved["dataset"] = {"tokenizer": tokenizer.fingerprint(), "sequences": [source.digest for source in sources]}
    if first_says((model_dir / "config.json").exists()):
        stored = run_identity(json.loads(record.read_text()))
        refuse_another_run(config.out, stored, as_of(stored, run_identity(resolved)))
        print(f"{model_dir} is finished: remove {config.out} to train again")
        return model_dir
    check_teacher(config, config.data, sources)
    weights = list(config.mix.values()) or [1.0]
    data = examples(sources, weights, config.stage, config.examples, config.seed)
    unseen = None if config.evaluation.data is None else held_out_examples(config, tokenizer)
    shares = mesh_of(config, jax.device_count())
    compute = compute_of(config, jax.default_backend())
    mesh = make_mesh(**dataclasses.asdict(shares))
    print(f"{describe()}, mesh {dict(mesh.shape)}, processes: {jax.process_count()}, attention: {compute.attention}")
    sizes = sizes_of(config, tokenizer.vocab_size)
    shardings_of(abstract_parts(sizes, compute), mesh)  # refused before anything is loaded
    with jax.set_mesh(mesh):
        rows = rows_of(jax.process_index(), mesh, config.batch_size)

        def batches_from(first: int, data=data, workers: int = config.workers) -> Iterator[dict[str, jax.Array]]:
            for batch in batches(data, config.batch_size, first, rows, workers):
                yield place_batch(batch, mesh, config.batch_size)

        for start in filter(None, (config.cepe, config.decoder, config.encoder)):
            if Path(start).is_dir():
                tokenizer.check_is_of(start)
        model = starting_model(config, compute, tokenizer.vocab_size)
        check_reads_ids(model, config, tokenizer.vocab_size)
        trainable, frozen = split(model, trained_parts(config))
        counts = [sum(x.size for x in jax.tree.leaves(parts)) for parts in (trainable, frozen)]
        print(f"{config.stage}: {counts[0]:,} parameters train, {counts[1]:,} are frozen")
        schedule = config.optimizer.schedule(config.steps)
        optimizer = config.optimizer.build(schedule)
        facts = StepFacts(
            learning_rates=np.asarray(jax.vmap(schedule)(jnp.arange(config.steps))),
            tokens=tokens_of_step(config),
            flops=config.batch_size * flops_of(config, model.config, all(map(is_taught, sources))).train,
            peak_flops=peak_flops(jax.devices()),
        )
        if is_first() and not any_in(config.out / "checkpoints"):
            config.out.mkdir(parents=True, exist_ok=True)
            write_json(record, resolved)
        meet()
        if not record.exists():
            raise ValueError(f"{record} is missing in process {jax.process_index()}: give an --out that all share")
        objective, accumulate = objective_of(config), micro_batches(config, shares.data * shares.fsdp)
        evaluate = None
        if unseen is not None:
            with contextlib.closing(batches_from(0, unseen, workers=0)) as some:
                evaluate = HeldOut(objective, frozen, list(islice(some, config.evaluation.batches)), accumulate)
        identity = run_identity(resolved) | {"frozen": digests_of(frozen)}
        initial = init_state(trainable, optimizer)
        del model, trainable  # a resumed run would hold them beside the restored ones
        with contextlib.closing(Checkpoints(config.out / "checkpoints", identity)) as checkpoints:
            state = train(
                run_of(config),
                facts,
                initial,
                frozen,
                make_train_step(objective, optimizer, accumulate),
                batches_from,
                lambda step: names_in(sources, weights, config.seed, config.batch_size, step),
                checkpoints,
                evaluate,
            )
        if int(state.step) < config.steps:
            return None
        save(assemble(state.trainable | frozen), model_dir, assets=tokenizer_home(config))
    return model_dir


def held_out_examples(config: TrainConfig, tokenizer: Tokenizer):
    """The examples of the evaluation; ValueError where they are of another tokenizer or kind, or too few."""
    where, wanted = config.evaluation.data, config.evaluation.batches * config.batch_size
    (source,) = open_mix(where, {}, config.stage, config.examples, config.evaluation.split)
    check_teacher(config, where, [source])
    if source.records.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise ValueError(f"{where} was tokenised with another tokenizer than {config.data}: prepare it with the same")
    if len(source) < wanted:
        raise ValueError(
            f"{where} has {len(source)} examples, and evaluation.batches of batch_size want {wanted}: lower batches"
        )
    return examples([source], [1.0], config.stage, config.examples, config.seed)


def tell_ahead(config: TrainConfig) -> None:
    """Print what the run will take: first what sizes alone say, then what the data add, last the resolved settings.

    Data and devices need not be at hand. What else would refuse the run does so once its price is told.
    """
    sources, refusal = [], None
    try:
        sources = open_mix(config.data, config.mix, config.stage, config.examples)
    except (ValueError, OSError) as error:
        refusal = error
    tokenizer = sources[0].records.tokenizer if sources else None
    sizes = sizes_of(config, tokenizer and tokenizer.vocab_size)
    for line in forecast(config, sizes, taught=bool(sources) and all(map(is_taught, sources))):
        print(line)
    try:
        if refusal is not None:
            raise refusal
        check_teacher(config, config.data, sources)
        names = (source.joined or source.records for source in sources)
        examples = {records.path.name: len(source) for records, source in zip(names, sources, strict=True)}
        for line in epochs(config.steps, config.batch_size, examples, list(config.mix.values()) or [1.0]):
            print(line)
        if config.evaluation.data is not None:
            held_out_examples(config, tokenizer)
    except NoDataset as absent:
        print(absent)
    print(json.dumps(as_json(config), indent=1))


def tokenizer_home(config: TrainConfig) -> Path:
    """The directory whose tokenizer, chat template and generation settings go with the trained model."""
    candidates = [Path(path) for path in (config.cepe, config.decoder) if path]
    return next(filter(file_in, candidates), config.data / next(iter(config.mix), ""))
