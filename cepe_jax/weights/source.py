"""A model at a path: opened and loaded, whatever its format, and saved in ours."""

from functools import partial
from pathlib import Path

from cepe_jax.config import FLOAT32, Compute
from cepe_jax.distributed import is_first, meet
from cepe_jax.model.parts import Model
from cepe_jax.parsing import parse_json
from cepe_jax.progress import track
from cepe_jax.weights.build import Source, build, shapes, tensors_of
from cepe_jax.weights.directory import CONFIG, FORMAT, Directory, copy_assets, note_of, write
from cepe_jax.weights.factors import Peft, base_of, is_peft
from cepe_jax.weights.files import existing
from cepe_jax.weights.gguf import SUFFIX, Gguf
from cepe_jax.weights.hf_config import window_of, with_window
from cepe_jax.weights.huggingface import HuggingFace
from cepe_jax.weights.kinds import Config


def open_model(path: Path | str) -> Source:
    """Return the model at `path`: a directory in our format, of Hugging Face's or of PEFT's, or a GGUF file."""
    path = Path(path)
    if path.suffix == SUFFIX:
        return Gguf(path)
    if is_peft(path):
        return Peft(path, open_model(base_of(path)))
    content = existing(path / CONFIG).read_bytes()
    written = parse_json(content, str(path / CONFIG))
    if written.get("format") == FORMAT:
        return Directory(path, written, note_of(path / CONFIG, content))
    return HuggingFace(path, written)


def open_ours(path: Path | str) -> Directory:
    """Return the model in our format at `path`; ValueError for another format."""
    if not isinstance(model := open_model(path), Directory):
        raise ValueError(f"{path} is not in our format: run scripts/convert.py to-jax on it")
    return model


def load(
    path: Path | str, compute: Compute = FLOAT32, master: tuple[str, ...] = (), config: Config | None = None
) -> Model:
    """Return the model at `path`, of one of the kinds in `kinds.py`, its weights in the dtype of activations.

    `master` names parts (such as `encoder` and `cross`) whose weights are float32 instead, to be trained. `config` is
    the architecture to build from these tensors, or from some of them, if it is not the one in the directory. Under a
    mesh (`jax.set_mesh`) arrays are born sharded; of our format each process reads only its slices, of the others whole
    tensors.
    """
    source = open_model(path)
    return build(config or source.config, compute, source.read, master)


def save(model: Model, path: Path | str, assets: Path | str | None = None, length: int = 0, template: str = "") -> None:
    """Write `model` to `path` in our format, with the tokenizer files and Hugging Face facts of directory `assets`.

    `length` is how many tokens its decoder was trained to read, where that is more than the facts say, and `template`
    the text of a chat template, where the assets have none. Of many processes, which all call this, the first writes.
    """
    has_config = assets is not None and (is_peft(Path(assets)) or (Path(assets) / CONFIG).is_file())
    facts = open_model(assets).facts if has_config else {}
    if length > (window_of(facts) or 0):
        facts = with_window(facts, length)
    tensors = track(tensors_of(model), f"writing {path}", len(shapes(model.config)))
    if is_first():
        write(path, model.config, tensors, facts, partial(copy_assets, assets, template=template))
    else:
        for _ in tensors:
            pass  # the first process needs this one's part of each
    meet()


def check_positions(source: Source, length: int) -> None:
    """Raise ValueError if the model says that its decoder was trained for fewer positions."""
    positions = window_of(source.facts)
    if positions is not None and length > positions:
        raise ValueError(
            f"{source.path} reads {positions} tokens, and context and window have {length}: lower one of them"
        )
