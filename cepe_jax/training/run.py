"""A run of training, from its settings to its model."""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cepe_jax.config import Compute
from cepe_jax.cost import peak_flops
from cepe_jax.data.examples import Example
from cepe_jax.data.loader import Sequences, batches, examples, names_in, open_mix
from cepe_jax.data.records import NoDataset
from cepe_jax.data.template import Template, has_template
from cepe_jax.data.tokenizer import Tokenizer, file_in
from cepe_jax.data.tokenizer_files import local_files
from cepe_jax.devices import describe
from cepe_jax.directories import check_reachable, is_remote, one_writer_in, write_json
from cepe_jax.distributed import connected, first_says, is_first, meet
from cepe_jax.exits import STOPPED
from cepe_jax.identity import as_json, as_of, refuse_another_run
from cepe_jax.model.parts import Model, split
from cepe_jax.sharding import make_mesh, num_shards, place_batch, rows_of, shardings_of
from cepe_jax.training.forecast import epochs, forecast
from cepe_jax.training.heldout import HeldOut
from cepe_jax.training.logs import StepFacts
from cepe_jax.training.objectives import Batch
from cepe_jax.training.settings import (
    TrainConfig,
    check_attention,
    compute_of,
    mesh_of,
    micro_batches,
    models_given,
    recipe_of,
    run_identity,
    run_of,
    sizes_of,
    start_of,
    tokens_of_step,
    trained_length,
)
from cepe_jax.training.stages import STAGES, with_new_factors
from cepe_jax.training.trainer import all_finite, init_state, make_train_step, train
from cepe_jax.weights.build import abstract_parts
from cepe_jax.weights.checkpoint import Checkpoints, any_in, digests_of
from cepe_jax.weights.kinds import Config
from cepe_jax.weights.source import save

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"  # below a run's directory


def launch(config: TrainConfig) -> Path:
    """Return the trained model's directory. This process is alone or one of the many that settings or cluster name.

    SystemExit with status 75 if the run was asked to stop before its end.
    """
    for place in (config.out, config.data):
        check_reachable(place)
    with (
        connected(config.distributed, config.out / "compiled"),
        one_writer_in(config.out) if is_first() else contextlib.nullcontext(),  # many processes are one writer
    ):
        ended = run_stage(config)
    return ended or sys.exit(STOPPED)


def run_stage(config: TrainConfig) -> Path | None:
    """Return the directory `config.out/model`, trained; a run that was cut off goes on from its newest checkpoint.

    None if the run was asked to stop before its end.
    """
    sources = open_mix(config.data, config.mix, recipe_of(config))
    tokenizer, model_dir = sources[0].records.tokenizer, config.out / "model"
    dataset = {"tokenizer": tokenizer.fingerprint(), "sequences": [source.digest for source in sources]}
    resolved = as_json(config) | {"dataset": dataset}
    if first_says((model_dir / "config.json").exists()):
        stored = run_identity(json.loads((config.out / "config.json").read_text()))
        refuse_another_run(config.out, stored, as_of(stored, run_identity(resolved)))
        log.info("%s is finished: remove %s to train again", model_dir, config.out)
        return model_dir
    STAGES[config.stage].check(config, config.data, sources)
    template = agreed_template(config, sources)
    unseen = None if config.evaluation.data is None else held_out_examples(config, tokenizer)
    mesh = make_mesh(**dataclasses.asdict(mesh_of(config, jax.device_count())))
    sizes, compute = sizes_of(config, tokenizer.vocab_size), compute_of(config, jax.default_backend())
    check_attention(config, compute.attention)
    processes = jax.process_count()
    log.info("%s, mesh %s, processes: %d, attention: %s", describe(), dict(mesh.shape), processes, compute.attention)
    shardings_of(abstract_parts(sizes, compute), mesh)  # refused before anything is loaded
    with jax.set_mesh(mesh):
        model = starting_model(config, sizes, compute, tokenizer)
        note_settings(config.out / "config.json", resolved)
        model = trained(config, model, run_identity(resolved), sources, unseen)
        if model is None:
            return None
        save(model, model_dir, tokenizer_home(config), trained_length(config), template)
    return model_dir


def starting_model(config: TrainConfig, sizes: Config, compute: Compute, tokenizer: Tokenizer) -> Model:
    """Return the model before the first step; the parts that train are float32.

    ValueError if it has another tokenizer than the data, or fewer ids than the examples.
    """
    for name in models_given(config):
        if Path(start := getattr(config, name)).is_dir():
            tokenizer.check_is_of(start)
    start = start_of(config)
    given = start.config(config, tokenizer.vocab_size)  # without new factors
    own = tuple(name for name in config.train if name in abstract_parts(given))
    model = with_new_factors(start.model(config, given, compute, own), sizes, config.seed)
    needed = tokenizer.vocab_size + STAGES[config.stage].more_ids
    for name in sorted({"decoder", "encoder"} & set(model.parts)):  # one message, whatever the order of a set
        if (known := model.parts[name].config.vocab_size) < needed:
            raise ValueError(
                f"the {name}'s vocabulary of {known} is below the {needed} ids of {config.data}: prepare the data with "
                f"the model's tokenizer"
            )
    return model


def agreed_template(config: TrainConfig, sources: Sequence[Sequences]) -> str:
    """Return the text of the chat template that the model gets from its data, "" if it has one or the data have none.

    ValueError unless the template of the trained model is that which wrote the data, where one did.
    """
    written = [(source.records, source.records.index["identity"].get("template")) for source in sources]
    written = [(records, digest) for records, digest in written if digest is not None]
    if not written:
        return ""
    home, text = Tokenizer(tokenizer_home(config)), ""
    if not has_template(home):
        text = Template(written[0][0].tokenizer).source
    own = Template(home, text=text).digest
    for records, digest in written:
        if digest != own:
            where = written[0][0].path if text else home.path.parent
            raise ValueError(
                f"{where} has another chat template than wrote {records.path}: copy that one there, or prepare the "
                f"data again with --tokenizer={where}"
            )
    return text


def note_settings(record: Path, resolved: dict) -> None:
    """Write the resolved settings to `record`, if the run has no checkpoint yet. Of many processes the first writes."""
    if is_first() and not any_in(record.parent / CHECKPOINTS):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, resolved)
    meet()
    if not record.exists():
        raise ValueError(f"{record} is missing in process {jax.process_index()}: give an --out that all share")


def trained(
    config: TrainConfig, model: Model, identity: dict, sources: Sequence[Sequences], unseen: Sequence[Example] | None
) -> Model | None:
    """Return the model after the run's steps on the present mesh, None if the run was asked to stop before.

    `identity` is what a checkpoint must have in common with the run. `unseen` are the examples of the evaluation.
    """
    stage, sizes, kind, mesh = STAGES[config.stage], model.config, type(model), jax.sharding.get_mesh()
    trainable, frozen = split(model, config.train)
    if not jax.jit(all_finite)(trainable | frozen):
        raise ValueError(f"{' or '.join(models_given(config))}: weights are not finite: convert the model again")
    counts = [sum(x.size for x in jax.tree.leaves(parts)) for parts in (trainable, frozen)]
    log.info("%s: %s parameters train, %s are frozen", config.stage, *(f"{count:,}" for count in counts))
    weights = list(config.mix.values()) or [1.0]
    by_size = config.mix_by == "size"
    data = examples(sources, weights, recipe_of(config), config.seed, by_size)
    objective = stage.objective(config)
    accumulate = micro_batches(config, num_shards("batch"))
    evaluate = None
    if unseen is not None:
        with contextlib.closing(placed_batches(unseen, config.batch_size, mesh)) as some:
            kept = list(islice(some, config.evaluation.batches))
        evaluate = HeldOut(objective, kind, frozen, kept, accumulate)
    schedule = config.optimizer.schedule(config.steps)
    optimizer = config.optimizer.build(schedule)
    facts = StepFacts(
        learning_rates=np.asarray(jax.vmap(schedule)(jnp.arange(config.steps))),
        tokens=tokens_of_step(config),
        flops=config.batch_size * stage.flops(config, sizes, sources).train,
        peak_flops=peak_flops(jax.devices()),
    )
    state = init_state(trainable, optimizer)
    del model, trainable  # a resumed run would hold them beside the restored ones
    identity = identity | {"frozen": digests_of(frozen)}
    with contextlib.closing(Checkpoints(config.out / CHECKPOINTS, identity, config.keep or None)) as checkpoints:
        state = train(
            run_of(config),
            facts,
            state,
            frozen,
            make_train_step(objective, optimizer, kind, accumulate),
            lambda first: placed_batches(data, config.batch_size, mesh, first, config.workers),
            lambda step: names_in(sources, weights, config.seed, config.batch_size, step, by_size),
            checkpoints,
            evaluate,
        )
    return kind.from_parts(state.trainable | frozen) if int(state.step) == config.steps else None


def placed_batches(
    data: Sequence[Example], batch_size: int, mesh: jax.sharding.Mesh, first: int = 0, workers: int = 0
) -> Iterator[Batch]:
    """Yield the global batches from number `first` on, on the devices of the mesh."""
    for batch in batches(data, batch_size, first, rows_of(jax.process_index(), mesh, batch_size), workers):
        yield place_batch(batch, mesh, batch_size)


def held_out_examples(config: TrainConfig, tokenizer: Tokenizer) -> Sequence[Example]:
    """Return the examples of the evaluation; ValueError if they are of another tokenizer or kind, or too few."""
    where, wanted = config.evaluation.data, config.evaluation.batches * config.batch_size
    (source,) = open_mix(where, {}, recipe_of(config), config.evaluation.split)
    STAGES[config.stage].check(config, where, [source])
    if source.records.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise ValueError(f"{where} was tokenised with another tokenizer than {config.data}: prepare it with the same")
    if len(source) < wanted:
        raise ValueError(
            f"{where} has {len(source)} examples, and evaluation.batches of batch_size want {wanted}: lower batches"
        )
    return examples([source], [1.0], recipe_of(config), config.seed)


def dry_run(config: TrainConfig) -> Iterator[str]:
    """Yield lines on what the run will take: by sizes alone, then by the data; last the resolved settings.

    Data and devices need not be at hand. Any other reason to refuse the run is raised once its price is told.
    """
    sources, refusal = [], None
    try:
        sources = open_mix(config.data, config.mix, recipe_of(config))
    except (ValueError, OSError) as error:
        refusal = error
    tokenizer = sources[0].records.tokenizer if sources else None
    sizes = sizes_of(config, tokenizer and tokenizer.vocab_size)
    yield from forecast(config, sizes, sources)
    try:
        if refusal is not None:
            raise refusal
        STAGES[config.stage].check(config, config.data, sources)
        examples, weights = {source.path.name: len(source) for source in sources}, list(config.mix.values()) or [1.0]
        if config.mix_by == "size":
            weights = [weight * count for weight, count in zip(weights, examples.values(), strict=True)]
        yield from epochs(config.steps, config.batch_size, examples, weights)
        if config.evaluation.data is not None:
            held_out_examples(config, tokenizer)
    except NoDataset as absent:
        yield str(absent)
    yield json.dumps(as_json(config), indent=1)


def tokenizer_home(config: TrainConfig) -> Path:
    """Return the directory whose tokenizer, chat template and generation settings go with the trained model."""
    candidates = [Path(path) for path in (config.cepe, config.decoder) if path]
    home = next(filter(file_in, candidates), config.data / next(iter(config.mix), ""))
    return local_files(home) if is_remote(home) else home
