"""The contents of a compiled program's text (HLO): its collectives, and the arrays it makes."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_COLLECTIVE = re.compile(r"(.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")

Computations = dict[str, dict[str, str]]  # computation -> instruction -> what it is


def arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each array type that is written in the text."""
    for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text):
        yield dtype, tuple(int(size) for size in shape.split(",") if size)


def instructions(program: str) -> Iterator[str]:
    """Return each instruction of every computation: its result's type, operation, operands."""
    computations, _ = _computations(program)
    for computation in computations.values():
        yield from computation.values()


def collectives(program: str) -> dict[str, dict[str, int]]:
    """By kind of collective, how often a device takes part in one and the bytes of their results, in one execution.

    What is in a loop counts as often as the loop runs. What is done piece by piece beside other work stands in several
    computations under one channel, and counts where it starts; the sums that a shard_map writes are all under one.
    """
    computations, entry = _computations(program)
    times: Counter = Counter()

    @cache
    def communicates(name: str) -> bool:
        whats = computations[name].values()
        return any(_COLLECTIVE.match(what) or any(map(communicates, _called(what))) for what in whats)

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for what in computations[name].values():
            loop = re.search(r"condition=%?([\w.\-]+)", what)
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', what)  # on GPUs the rest is in fusions
            for called in filter(communicates, _called(what)):
                if not loop:
                    visit(called, factor)
                elif known:
                    visit(called, factor * int(known[1]))
                else:
                    visit(called, factor * _trips(computations[loop[1]], computations[called]))

    visit(entry, 1)
    found: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)  # (kind, channel) -> (times, bytes)
    for name, instructions in computations.items():
        for instruction, what in instructions.items():
            if match := _COLLECTIVE.match(what):
                sizes = [_BYTES[dtype] * math.prod(shape) for dtype, shape in arrays(match[1])]
                if match[3] and match[2] != "all-reduce":  # operands, results, and flags of a transfer
                    ends = [size for size, (_, shape) in zip(sizes, arrays(match[1]), strict=True) if shape]
                    sizes = ends[len(ends) // 2 :]
                channel = None if "/shard_map/" in what else re.search(r"channel_id=(\d+)", what)
                place = channel[1] if channel else f"{name} {instruction}"
                found[match[2], place].append((times[name], sum(sizes)))
    total: dict[str, Counter] = defaultdict(Counter)
    for (kind, _), places in found.items():
        number, size = min(places)
        total[kind] += Counter(number=number, bytes=number * size)
    return {kind: dict(numbers) for kind, numbers in sorted(total.items()) if numbers}


def cudnn_workspaces(program: str) -> list[int]:
    """Return the bytes of workspace of each call of cuDNN, 0 of all if cuDNN was not asked about them."""
    calls = [what for what in instructions(program) if 'custom_call_target="__cudnn' in what]
    results = [arrays(what.partition(" custom-call(")[0]) for what in calls]
    return [max((math.prod(shape) for dtype, shape in result if dtype == "u8"), default=0) for result in results]


def _computations(program: str) -> tuple[Computations, str]:
    computations: Computations = defaultdict(dict)
    name = entry = ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
        elif instruction := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
            computations[name]["ROOT" if instruction[1] else instruction[2]] = instruction[3]
    return computations, entry


def _called(what: str) -> list[str]:
    """Return the computations that an instruction calls."""
    return re.findall(r"[\w.\-]+", " ".join(map(" ".join, _CALLED.findall(what))))


def _trips(condition: dict[str, str], body: dict[str, str]) -> int:
    """Return how often a loop runs that counts from 0: `counter < constant`, and what the body adds to the counter."""

    def operands(what: str, operation: str) -> list[str] | None:
        found = re.search(rf" {operation}\((.*?)\)(?:,|$)", what)
        return found and [name.split("%")[-1].strip() for name in re.split(r", (?:/\*.*?\*/)?", found[1])]

    def constant(instructions: dict[str, str], name: str) -> int | None:
        found = re.search(r" constant\((\d+)\)", instructions.get(name, ""))
        return found and int(found[1])

    counter, bound = operands(condition["ROOT"], "compare")
    index = int(re.search(r"index=(\d+)", condition[counter].rpartition("get-tuple-element")[2])[1])
    added = operands(body[operands(body["ROOT"], "tuple")[index]], "add")
    step = next(filter(None, (constant(body, name) for name in added)))
    return math.ceil(constant(condition, bound) / step)
