"""The stages of the paper as one configuration: what is loaded, what trains, on which examples."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from cepe_jax.config import DECODERS, ENCODERS, Backend, CepeConfig, DecoderConfig, EncoderConfig, Remat, preset
from cepe_jax.cost import Flops, cepe_flops, decoder_flops, encoder_flops, peak_flops, teacher_flops
from cepe_jax.data.examples import TEACHER, ExampleConfig
from cepe_jax.data.loader import Sequences, Stage, batches, examples, names_in, open_mix
from cepe_jax.data.tokenizer import Tokenizer
from cepe_jax.directories import is_remote, refuse_another_run
from cepe_jax.distributed import DistributedConfig, first_says, is_first, joined, meet
from cepe_jax.model.cepe import (
    Cepe,
    CrossInit,
    assemble,
    cross_from_self_attention,
    encoder_from_decoder,
    parts_of,
    split,
)
from cepe_jax.model.encoder import Encoder
from cepe_jax.model.llama import Llama
from cepe_jax.sharding import batch_share, make_mesh, place_batch, shardings_of
from cepe_jax.training.forecast import forecast
from cepe_jax.training.heldout import EvalConfig, HeldOut
from cepe_jax.training.logs import StepFacts
from cepe_jax.training.objectives import Distill, DistillConfig, MaskedLM, NextToken
from cepe_jax.training.trainer import OptimizerConfig, Run, init_state, make_train_step, train
from cepe_jax.weights.checkpoint import Checkpoints, digests_of
from cepe_jax.weights.directory import check_window, save
from cepe_jax.weights.huggingface import load, read_config
from cepe_jax.weights.tensors import Config, abstract_parts

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh."""

    data: int = 1  # copies of the model
    fsdp: int = 0  # devices over which each copy is cut; 0 = all that the others leave
    tensor: int = 1  # devices that share a sequence, by heads

    def __post_init__(self):
        if min(self.data, self.tensor) < 1 or self.fsdp < 0:
            raise ValueError(f"{self}: give numbers of devices above 0")


@dataclass(frozen=True)
class RematConfig:
    """What the backward pass recomputes in each layer: nothing, all but matrix products, all."""

    decoder: Remat = "none"
    encoder: Remat = "none"


@dataclass(frozen=True)
class TrainConfig:
    stage: Stage  # lm: a decoder from scratch; mlm: an encoder; warmup, cepe and ceped: as in the paper
    data: Path  # a dataset of sequences, or the directory of those that `mix` names
    out: epath.Path  # gets checkpoints/, metrics.jsonl, config.json, and at the end model/; may be gs://bucket/...
    steps: int
    batch_size: int  # sequences per step
    decoder: str = ""  # a preset (lm) or a model directory; mlm: the encoder starts from its first layers
    encoder: str = ""  # a preset, which starts at random, or a model directory
    cepe: str = ""  # a model directory, in place of decoder and encoder
    num_cross_layers: int = 0  # of the decoder's last layers; 0 = all
    cross_init: CrossInit = "copy"
    train: tuple[str, ...] = ("encoder", "cross")  # of the warm-up and main stage
    mix: dict[str, float] = field(default_factory=dict)  # dataset below `data` -> weight of its examples
    workers: int = 0  # processes that load data; 0 = threads of this one
    examples: ExampleConfig = ExampleConfig()
    distill: DistillConfig | None = None  # of stage ceped, which needs it
    optimizer: OptimizerConfig = OptimizerConfig()
    micro_batch: int = 0  # sequences that a device (or those of one `mesh.tensor`) computes at once; 0 = all it has
    loss_chunk: int = 0  # positions whose logits exist at once; 0 = all
    mlp_chunk: int = 0  # positions whose MLP activations exist at once; 0 = all
    dtype: Dtype = "float32"  # of activations and of frozen weights; what trains is float32
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"  # splash: TPU; cudnn: GPU, 16 bits
    remat: RematConfig = RematConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    save_every: int = 500  # steps
    log_every: int = 10  # steps
    evaluation: EvalConfig = EvalConfig()
    profile: tuple[int, ...] = ()  # the first and the last step to trace, into out/profile/
    dry_run: bool = False  # tells what the run will be and ends; nothing is loaded or written
    seed: int = 0

    def __post_init__(self):
        needs = {"lm": [["decoder"]], "mlm": [["encoder"], ["decoder", "encoder"]]}.get(
            self.stage, [["cepe"], ["decoder", "encoder"]]
        )
        given = [name for name in ("decoder", "encoder", "cepe") if getattr(self, name)]
        if given not in needs:
            wanted = " or ".join(" and ".join(names) for names in needs)
            raise ValueError(f"stage {self.stage} starts from {wanted}; given: {' and '.join(given) or 'none of them'}")
        if needs == [["cepe"], ["decoder", "encoder"]] and not self.train:
            raise ValueError("train is empty: name encoder, cross or decoder")
        if given != ["decoder", "encoder"] or self.stage == "mlm":
            for name in ("num_cross_layers", "cross_init"):
                if getattr(self, name) != TrainConfig.__dataclass_fields__[name].default:
                    raise ValueError(f"{name} is for a start from decoder and encoder: leave it out")
        if (self.distill is not None) != (self.stage == "ceped"):
            raise ValueError(f"stage is {self.stage}: distill is the loss of stage ceped, give both or neither")
        if self.stage == "ceped" and self.examples.foreign_rate:
            raise ValueError("foreign_rate is not for stage ceped: its teacher reads what stands before the window")
        if any(weight <= 0 for weight in self.mix.values()):
            raise ValueError(f"mix is {self.mix}: give weights above 0")
        for name in ("micro_batch", "loss_chunk", "mlp_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number, or 0 for all")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: give a number of processes, or 0 for threads")
        run_of(self)


def run_of(config: TrainConfig) -> Run:
    return Run(config.out, config.steps, config.save_every, config.log_every, config.evaluation.every, config.profile)


def mesh_of(config: TrainConfig, devices: int) -> MeshConfig:
    """The mesh over all devices; ValueError where they do not divide, or the batch does not over them."""
    mesh = config.mesh
    if mesh.fsdp == 0:
        mesh = dataclasses.replace(mesh, fsdp=max(devices // (mesh.data * mesh.tensor), 1))
    micro_batches(config, mesh.data * mesh.fsdp)
    return mesh


def micro_batches(config: TrainConfig, shares: int) -> int:
    """Into how many micro-batches a step's batch falls, where it is cut into `shares`."""
    rows = shares * (config.micro_batch or 1)
    if config.batch_size % rows:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of mesh.data x mesh.fsdp x micro_batch = {rows}: "
            f"change one of them"
        )
    return config.batch_size // rows if config.micro_batch else 1


def backend_of(config: TrainConfig, platform: str) -> Backend:
    """The attention of this run: the one it names, or the platform's own."""
    return native_backend(platform, config.dtype) if config.attention == "auto" else config.attention


def native_backend(platform: str, dtype: Dtype) -> Backend:
    if platform == "gpu":
        return "cudnn" if dtype == "bfloat16" else "xla"
    return "splash" if platform == "tpu" else "xla"


def sizes_of(config: TrainConfig, vocab_size: int | None = None) -> Config:
    """The config of the stage's model, nothing loaded. `vocab_size`: the tokenizer's; a preset's own when not given."""

    def part(name: str, presets: dict, mask: int):
        start = getattr(config, name)
        if Path(start).is_dir():
            return read_config(start)
        sizes = preset(presets, start)
        return sizes if vocab_size is None else dataclasses.replace(sizes, vocab_size=vocab_size + mask)

    match config.stage:
        case "lm":
            return part("decoder", DECODERS, 0)
        case "mlm":
            return dataclasses.replace(part("encoder", ENCODERS, 1), mlm_head=True)
    if config.cepe:
        return read_config(config.cepe)
    decoder, encoder = part("decoder", DECODERS, 0), part("encoder", ENCODERS, 1)
    layers = config.num_cross_layers or decoder.num_layers
    return CepeConfig(decoder, dataclasses.replace(encoder, mlm_head=False), layers)


def at_run_time(sizes: Config, config: TrainConfig, backend: Backend) -> Config:
    """The sizes, to compute as the configuration says."""
    if isinstance(sizes, CepeConfig):
        parts = {name: at_run_time(getattr(sizes, name), config, backend) for name in ("decoder", "encoder")}
        return dataclasses.replace(sizes, **parts)
    remat = config.remat.encoder if isinstance(sizes, EncoderConfig) else config.remat.decoder
    run_time = {"dtype": config.dtype, "remat": remat, "attention": backend, "mlp_chunk": config.mlp_chunk}
    return dataclasses.replace(sizes, **run_time)


def trained_parts(config: TrainConfig) -> tuple[str, ...]:
    return {"lm": ("decoder",), "mlm": ("encoder",)}.get(config.stage, config.train)


def flops_of(config: TrainConfig, sizes: Config) -> Flops:
    """Of one sequence of the stage."""
    shape = config.examples.window, config.examples.num_chunks, config.examples.chunk_length
    match sizes:
        case DecoderConfig():
            return decoder_flops(sizes, config.examples.window)
        case EncoderConfig():
            return encoder_flops(sizes, 1, config.examples.window)
    flops = cepe_flops(sizes, *shape, config.train)
    if config.stage != "ceped":
        return flops
    return dataclasses.replace(flops, ahead=flops.ahead + teacher_flops(sizes.decoder, shape[0], shape[1] * shape[2]))


def starting_model(config: TrainConfig, vocab_size: int) -> Cepe | Llama | Encoder:
    """The model of the stage before its first step: presets are initialised at random, directories loaded.

    `vocab_size` is the tokenizer's; an encoder has one more id, the mask.
    """
    key = jax.random.key(config.seed)
    for name, presets in (("decoder", DECODERS), ("encoder", ENCODERS)):
        if (start := getattr(config, name)) and not Path(start).is_dir():
            preset(presets, start)
    match config.stage:
        case "lm" if config.decoder in DECODERS:
            sizes = dataclasses.replace(DECODERS[config.decoder], vocab_size=vocab_size)
            return born_sharded(lambda key: Llama(sizes, key=key), key)
        case "lm":
            return load(config.decoder)
        case "mlm" if config.encoder in ENCODERS:
            sizes = dataclasses.replace(ENCODERS[config.encoder], vocab_size=vocab_size + 1, mlm_head=True)
            if config.decoder:
                decoder = load(config.decoder)
                return born_sharded(lambda key, decoder: encoder_from_decoder(decoder, sizes, key=key), key, decoder)
            return born_sharded(lambda key: Encoder(sizes, key=key), key)
        case "mlm":
            return load(config.encoder)
    if config.cepe:
        return load(config.cepe, config.dtype, config.train)
    decoder = load(config.decoder, config.dtype, tuple({"decoder"} & set(config.train)))
    if config.encoder in ENCODERS:
        sizes = dataclasses.replace(ENCODERS[config.encoder], vocab_size=vocab_size + 1)
        encoder = born_sharded(lambda key: Encoder(sizes, key=key), key)
    else:
        encoder = load(config.encoder, config.dtype, tuple({"encoder"} & set(config.train)))
    if encoder.config.mlm_head:
        del encoder.mlm_head
        encoder.config = dataclasses.replace(encoder.config, mlm_head=False)
    layers = config.num_cross_layers or decoder.config.num_layers
    cross = born_sharded(
        lambda key, decoder: cross_from_self_attention(decoder, encoder.config, layers, config.cross_init, key=key),
        key,
        decoder,
    )
    return Cepe(decoder, encoder, cross)


def born_sharded(make, *args):
    """`make(*args)`, every array created where it belongs on the mesh."""
    shardings = shardings_of(jax.eval_shape(make, *args), jax.sharding.get_mesh())
    return jax.jit(make, out_shardings=shardings)(*args)


def prepare_to_run(model: Cepe | Llama | Encoder, config: TrainConfig, vocab_size: int, backend: Backend) -> None:
    """The model computes as the configuration says; ValueError when it cannot read the tokenizer's ids."""
    for name in ("decoder", "encoder"):
        if (part := parts_of(model).get(name)) is None:
            continue
        needed = vocab_size + (config.stage == "mlm")  # the mask id
        if part.config.vocab_size < needed:
            raise ValueError(
                f"the {name}'s vocabulary of {part.config.vocab_size} is below the {needed} ids of {config.data}: "
                f"prepare the data with the model's tokenizer"
            )
        part.config = at_run_time(part.config, config, backend)


def objective_of(config: TrainConfig) -> NextToken | MaskedLM | Distill:
    match config.stage:
        case "mlm":
            return MaskedLM(config.loss_chunk)
        case "ceped":
            return Distill(**vars(config.distill), loss_chunk=config.loss_chunk)
    return NextToken(config.loss_chunk)


def check_teacher(config: TrainConfig, sources: Sequence[Sequences]) -> None:
    """ValueError where the datasets are not what the stage's loss learns from, or the decoder is no teacher for them.

    The teacher's probabilities are in the datasets, or else the decoder that the stage starts from computes them.
    """
    taught = [source.joined is not None and source.joined.name == TEACHER for source in sources]
    if config.stage != "ceped":
        if any(taught):
            raise ValueError(f"{config.data}: holds a teacher's probabilities, and stage {config.stage} reads none")
        return
    for source, is_taught in zip(sources, taught, strict=True):
        if source.joined and not is_taught:
            raise ValueError(
                f"{source.joined.path}: its contexts are passages, and stage ceped needs what stood before"
            )
        if is_taught and source.joined.index["top_k"] != config.distill.top_k:
            raise ValueError(
                f"{source.joined.path} has {source.joined.index['top_k']} tokens a position and distill.top_k is "
                f"{config.distill.top_k}: set the one, or make the other again"
            )
    if all(taught):
        print("teacher: probabilities in the data")
        return
    if any(taught):
        raise ValueError(f"{config.data}: a part of mix holds a teacher's probabilities: give all of it one, or none")
    if "decoder" in config.train:
        raise ValueError("the decoder is the teacher and cannot train: leave it out, or prepare a teacher's dataset")
    check_window(config.cepe or config.decoder, config.examples.span)
    print("teacher: the frozen decoder, in each step")


def launch(config: TrainConfig) -> Path:
    """`run_stage` by this process, which is alone or one of the many that its settings or its cluster name."""
    if is_remote(config.out) and find_spec("gcsfs") is None:
        raise ValueError(f"{config.out} is in a bucket: pip install gcsfs to write there")
    with joined(config.distributed, config.out / "compiled"):
        return run_stage(config)


def run_stage(config: TrainConfig) -> Path:
    """The directory `config.out/model`, trained; a run that was cut off goes on from its newest checkpoint.

    That of the checkpoints where the run was asked to stop before its end. A dry run tells what it would do and ends.
    """
    model_dir, record = config.out / "model", config.out / "config.json"
    sources = open_mix(config.data, config.mix, config.stage, config.examples)
    tokenizer = sources[0].records.tokenizer
    resolved = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    resolved["dataset"] = {"tokenizer": tokenizer.fingerprint(), "sequences": [source.digest for source in sources]}
    if first_says((model_dir / "config.json").exists()):
        refuse_another_run(config.out, identity_of(json.loads(record.read_text())), identity_of(resolved))
        print(f"{model_dir} is finished: remove {config.out} to train again")
        return model_dir
    check_teacher(config, sources)
    weights = list(config.mix.values()) or [1.0]
    data = examples(sources, weights, config.stage, config.examples, config.seed)
    unseen = None if config.evaluation.data is None else held_out_examples(config, tokenizer)
    sizes = mesh_of(config, jax.device_count())
    backend = backend_of(config, jax.default_backend())
    mesh = make_mesh(**dataclasses.asdict(sizes))
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"{devices}, mesh {dict(mesh.shape)}, processes: {jax.process_count()}, attention: {backend}")
    if config.dry_run:
        print(json.dumps(resolved, indent=1))
        tell_ahead(config, sources, weights, tokenizer.vocab_size, devices)
        return config.out
    with jax.set_mesh(mesh):
        share = batch_share(mesh, config.batch_size)

        def batches_from(first: int, data=data, workers: int = config.workers) -> Iterator[dict[str, jax.Array]]:
            for batch in batches(data, config.batch_size, first, share, workers):
                yield place_batch(batch, mesh, config.batch_size)

        for start in filter(None, (config.cepe, config.decoder, config.encoder)):
            if Path(start).is_dir():
                tokenizer.check_is_of(start)
        model = starting_model(config, tokenizer.vocab_size)
        prepare_to_run(model, config, tokenizer.vocab_size, backend)
        trainable, frozen = split(model, trained_parts(config))
        counts = [sum(x.size for x in jax.tree.leaves(parts)) for parts in (trainable, frozen)]
        print(f"{config.stage}: {counts[0]:,} parameters train, {counts[1]:,} are frozen")
        schedule = config.optimizer.schedule(config.steps)
        optimizer = config.optimizer.build(schedule)
        facts = StepFacts(
            learning_rates=np.asarray(jax.vmap(schedule)(jnp.arange(config.steps))),
            tokens=tokens_of_step(config),
            flops=config.batch_size * flops_of(config, model.config).train,
            peak_flops=peak_flops(jax.devices()),
        )
        if is_first() and not (config.out / "checkpoints").exists():
            config.out.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(resolved, indent=1))
        meet()
        if not record.exists():
            raise ValueError(f"{record} is missing in process {jax.process_index()}: give an --out that all share")
        objective, accumulate = objective_of(config), micro_batches(config, sizes.data * sizes.fsdp)
        evaluate = None
        if unseen is not None:
            with contextlib.closing(batches_from(0, unseen, workers=0)) as some:
                evaluate = HeldOut(objective, frozen, list(islice(some, config.evaluation.batches)), accumulate)
        identity = identity_of(resolved) | {"frozen": digests_of(frozen)}
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
            return config.out / "checkpoints"
        save(assemble(state.trainable | frozen), model_dir, assets=tokenizer_home(config))
    return model_dir


def held_out_examples(config: TrainConfig, tokenizer: Tokenizer):
    """The examples of the evaluation; ValueError where they are of another tokenizer, or too few."""
    where, wanted = config.evaluation.data, config.evaluation.batches * config.batch_size
    (source,) = open_mix(where, {}, config.stage, config.examples, config.evaluation.split)
    if source.records.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise ValueError(f"{where} was tokenised with another tokenizer than {config.data}: prepare it with the same")
    if len(source) < wanted:
        raise ValueError(
            f"{where} has {len(source)} examples, and evaluation.batches of batch_size want {wanted}: lower batches"
        )
    return examples([source], [1.0], config.stage, config.examples, config.seed)


def tell_ahead(
    config: TrainConfig, sources: Sequence[Sequences], weights: Sequence[float], vocab_size: int, devices: str
) -> None:
    """Prints what the run will be, from shapes alone."""
    model = sizes_of(config, vocab_size)
    counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in abstract_parts(model).items()}
    trained = sum(count for name, count in counts.items() if name in trained_parts(config))
    print(f"{config.stage}: {trained:,} parameters train, {sum(counts.values()) - trained:,} are frozen")
    names = (source.joined or source.records for source in sources)
    for line in forecast(
        steps=config.steps,
        batch_size=config.batch_size,
        tokens=tokens_of_step(config),
        flops=config.batch_size * flops_of(config, model).train,
        devices=devices,
        peak_flops=peak_flops(jax.devices()),
        examples={records.path.name: len(source) for records, source in zip(names, sources, strict=True)},
        weights=weights,
    ):
        print(line)


def tokens_of_step(config: TrainConfig) -> int:
    """What the decoder or encoder reads in a step, contexts too."""
    examples = config.examples
    return config.batch_size * (examples.window if config.stage in ("lm", "mlm") else examples.span)


def identity_of(resolved: dict) -> dict:
    """What two configurations must share for one to go on where the other stopped: all but places and pace.

    The contents of the places are compared instead.
    """
    places = {"data", "decoder", "encoder", "cepe", "out"}
    pace = {
        "save_every",
        "log_every",
        "evaluation",
        "profile",
        "dry_run",
        "mesh",
        "micro_batch",
        "distributed",
        "workers",
    }
    return {key: value for key, value in resolved.items() if key not in places | pace}


def tokenizer_home(config: TrainConfig) -> Path:
    """The directory whose tokenizer, chat template and generation settings go with the trained model."""
    candidates = [Path(path) for path in (config.cepe, config.decoder) if path]
    with_tokenizer = (p for p in candidates if (p / "tokenizer.model").exists() or (p / "tokenizer.json").exists())
    return next(with_tokenizer, config.data / next(iter(config.mix), ""))
