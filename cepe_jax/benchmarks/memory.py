"""The longest window that a chip can train, by what is kept of the forward pass, as the compiler counts its memory."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cepe_jax.benchmarks.compiled import CompileConfig, ShapesConfig, compile_step, train_step
from cepe_jax.benchmarks.topologies import topology_of
from cepe_jax.config import RematConfig
from cepe_jax.cost import gib
from cepe_jax.directories import write_json
from cepe_jax.progress import track

RECOMPUTED, OFFLOADED = (RematConfig(form, form) for form in ("full", "offload"))
# The mini-sequence transformer (arXiv 2407.15892) is the third.
FORMS = {
    "everything kept": {"remat": RematConfig(), "loss_chunk": 0, "mlp_chunk": 0},
    "layers recomputed": {"remat": RECOMPUTED, "loss_chunk": 0, "mlp_chunk": 0},
    "and loss and MLP in chunks": {"remat": RECOMPUTED, "loss_chunk": "auto", "mlp_chunk": "auto"},
    "and inputs of layers on the host": {"remat": OFFLOADED, "loss_chunk": "auto", "mlp_chunk": "auto"},
}
MOST = 1 << 24  # tokens, beyond which nothing is tried


@dataclass(frozen=True, kw_only=True)
class LongestConfig(ShapesConfig):
    """A step of training, to be compiled with windows of many lengths.

    It is of one sequence for each share of the batch, and each form of `FORMS` has its own remat and chunks.
    """

    topology: str  # TPUs, as their compiler names them: v5p:2x2x1; GPUs as hosts x GPUs of a host: h100:1x1
    multiple: int = 1024  # tokens of which a window is a multiple; the first one tried is examples.window
    out: Path = Path("out/longest")  # gets longest.json, longest.png, and a JSON file for each step

    def __post_init__(self):
        super().__post_init__()
        if self.multiple < 1 or self.examples.window % self.multiple:
            raise ValueError(f"multiple is {self.multiple}: give a number that divides examples.window")


def longest_window(needed: Callable[[int], int], room: float, first: int, multiple: int) -> tuple[int, dict[int, int]]:
    """Return the longest window that fits, 0 if none does, and the bytes `needed` for each that was tried.

    Bytes grow with the window where chunks divide the multiple. They are nearly linear in it, so that few are tried
    between one that fits and one that does not.
    """
    tried: dict[int, int] = {}
    low, high, window = 0, None, first
    while high is None or high - low > multiple:
        tried[window] = needed(window)
        if tried[window] <= room:
            low = window
        else:
            high = window
        if high is None:
            if 2 * low > MOST:
                break
            window = 2 * low
        else:
            share = (room - tried[low]) / (tried[high] - tried[low]) if low else 0.5
            between = low + int(share * (high - low)) // multiple * multiple
            window = min(max(between, low + multiple), high - multiple)
    return low, tried


def search_and_print(config: LongestConfig) -> None:
    """Search for the longest window of each form that a device's memory holds; write all that was tried, and a plot."""
    topology = topology_of(config.topology)
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(ShapesConfig)}
    mesh = config.mesh.over(len(topology.devices))
    shared |= {"topology": config.topology, "batch": mesh.data * mesh.fsdp, "micro_batch": 1}
    forms = []
    for name, form in track(FORMS.items(), "searching, forms", len(FORMS)):

        def needed(window: int, name=name, form=form) -> int:
            place = config.out / name.replace(" ", "_") / str(window)
            examples = dataclasses.replace(config.examples, window=window)
            step = CompileConfig(**shared | form | {"examples": examples, "out": place})
            return compile_step(step, train_step)["memory"]["peak"]

        longest, tried = longest_window(needed, topology.chip.hbm, config.examples.window, config.multiple)
        forms.append({"form": name, "longest": longest, "bytes": dict(sorted(tried.items()))})
    report = {"topology": config.topology, "hbm": topology.chip.hbm, "forms": forms}
    write_json(config.out / "longest.json", report)
    _plot(report, config.out / "longest.png")
    print(table(report))


def table(report: dict) -> str:
    """Return the report as a table for people."""
    first = report["forms"][0]["longest"]
    lines = ["| kept for the backward pass | longest window | times the first | GiB there |", "|---|---|---|---|"]
    for form in report["forms"]:
        longest = form["longest"]
        times = f"{longest / first:.1f}" if first else ""
        there = gib(form["bytes"][longest]).removesuffix(" GiB") if longest else ""
        lines.append(f"| {form['form']} | {longest:,} | {times} | {there} |")
    return "\n".join(lines)


def _plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for form in report["forms"]:
        windows, sizes = zip(*form["bytes"].items(), strict=True)
        axes.plot(windows, [size / 2**30 for size in sizes], marker=".", label=f"{form['form']}: {form['longest']:,}")
    axes.axhline(report["hbm"] / 2**30, color="grey", linestyle=":", label=f"a chip of {report['topology']}")
    axes.set(xlabel="tokens of the window", ylabel="GiB a chip", ylim=(0, 1.5 * report["hbm"] / 2**30), xscale="log")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
