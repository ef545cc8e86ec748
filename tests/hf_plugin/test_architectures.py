"""Every MoE architecture of transformers, tiny and random: exact wherever its experts run, and restored by unpatch."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

import moebius
from tests import zoo

pytestmark = pytest.mark.usefixtures("prefetching", "dense_kernels")

TOLERANCE = 1e-5  # of the largest logit, float32
TIE = 1e-4  # logits: below this margin between its two best tokens, stock's own choice is rounding
NEW_TOKENS = 8

# Architectures that `patch` refuses by a clear error. To support one, delete it here.
REFUSED = ("doge", "jetmoe", "nllb_moe", "switch_transformers")

BF16_SINCE = {"deepseek_v4": "5.23"}  # the transformers from which on stock is known to run in bfloat16

# One of each layout, activation and adapter; the others run as slow tests.
FAST = (
    *("aria_text", "dbrx", "deepseek_v4", "gpt_oss", "llama4"),
    *("longcat_flash", "mixtral", "muse_spark", "nemotron_h", "qwen3_moe"),
)

# A quarter of the experts of a tiny model is two slots per layer of eight experts, and never less than one expert.
PLACEMENTS: dict[str, dict[str, Any]] = {
    f"{device}{memory or ''}{'-prefetch' if prefetch else ''}": {"device": device, "prefetch": prefetch}
    | ({} if memory is None else {"gpu_memory": memory})
    for device, memory in (("cpu", None), ("emulated", 0.25), ("emulated", 0.5), ("emulated", 1.0))
    for prefetch in (False, True)
}


def _entries(names: list[str]) -> list[Any]:
    return [pytest.param(name, id=name, marks=() if name in FAST else pytest.mark.slow) for name in names]


SUPPORTED = _entries([name for name in zoo.ENTRIES if name not in REFUSED])

started: Counter[str] = Counter()  # checks begun and passed, per entry: what the table at the end is made of
passed: Counter[str] = Counter()


@contextmanager
def recorded(name: str) -> Iterator[None]:
    started[name] += 1
    yield
    passed[name] += 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything about a model that unpatch has to give back; two snapshots compare field by field."""

    tensors: dict[str, Tensor]  # parameters and buffers, cloned, tied ones under each of their names
    facts: list[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], bool]]  # in order, of the same tensors
    ties: dict[str, str]  # each name to the first name of the same object
    state_dict: list[str]
    modules: dict[str, tuple[type, frozenset[str], int]]  # class, instance attributes, number of hooks
    experts_implementation: dict[str, str | None]  # by the module that holds the config
    generation: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> Snapshot:
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        first: dict[int, str] = {}
        modules = dict(model.named_modules())
        configs = {name: module.config for name, module in modules.items() if hasattr(module, "config")}
        return cls(
            tensors={name: tensor.detach().clone() for name, tensor in named},
            facts=[(name, t.dtype, tuple(t.shape), t.stride(), t.requires_grad) for name, t in named],
            ties={name: first.setdefault(id(tensor), name) for name, tensor in named},
            state_dict=list(model.state_dict()),
            modules={name: (type(module), frozenset(vars(module)), _hooks(module)) for name, module in modules.items()},
            experts_implementation={n: getattr(c, "_experts_implementation", None) for n, c in configs.items()},
            generation=repr(getattr(model, "generation_config", None)),
        )

    def changes(self, after: Snapshot) -> list[str]:
        """What differs, by name: fields, and tensors whose bits are not the same."""
        bits = [n for n, t in self.tensors.items() if n in after.tensors and not _same_bits(t, after.tensors[n])]
        rest = [f.name for f in fields(self) if f.name != "tensors" and getattr(self, f.name) != getattr(after, f.name)]
        return [*rest, *bits]


def _hooks(module: nn.Module) -> int:
    return sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks") and value)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(_bits(a), _bits(b)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # one architecture draws random numbers in its forward
    return model(**inputs).logits


@torch.no_grad()
def greedy(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Greedy tokens [batch, NEW_TOKENS], and the margin of the best over the second best logit at each."""
    output = model.generate(
        inputs["input_ids"],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(output.logits, dim=1).topk(2).values
    return output.sequences[:, -NEW_TOKENS:], best[..., 0] - best[..., 1]


class Case:
    """One entry's stock model with its stock outputs, shared by all placements."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = zoo.build(name)
        self.inputs = zoo.inputs(self.model)
        self.logits = forward(self.model, self.inputs)
        generates = zoo.ENTRIES[name].generates and not zoo.ENTRIES[name].stochastic
        self.greedy = greedy(self.model, self.inputs) if generates else None
        self.before = Snapshot.of(self.model)

    def pristine(self) -> PreTrainedModel:
        """The stock model; built anew where a failed test left it changed, so that one bug fails one test."""
        if moebius.is_patched(self.model) or self.before.changes(Snapshot.of(self.model)):
            self.model = zoo.build(self.name)
            self.before = Snapshot.of(self.model)
        return self.model


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    _skip_if_missing(request.param)
    return Case(request.param)


def _skip_if_missing(name: str) -> None:
    if name in zoo.missing():
        pytest.skip(f"the installed transformers has no {zoo.ENTRIES[name].model} that runs")


def assert_exact(got: Tensor, want: Tensor, when: str) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= TOLERANCE, f"logits of the {when} differ by {error:.1e} of the largest"


def assert_same_tokens(got: Tensor, want: Tensor, margins: Tensor, where: str) -> None:
    for row, differs in enumerate((got != want).tolist()):
        if True in differs:
            first = differs.index(True)
            margin = margins[row, first].item()
            assert margin < TIE, f"greedy token {first} of row {row} differs, where stock's margin is {margin:.1e}"
            warnings.warn(
                f"{where}: a tie of {margin:.1e} at token {first} of row {row} fell the other way", stacklevel=2
            )


@pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("case", SUPPORTED, indirect=True)
def test_exact_anywhere_and_restored(case: Case, options: dict[str, Any]) -> None:
    """Catches wrong layouts, activations, biases, scalings and slots, cold and warm, and anything unpatch leaves."""
    model = case.pristine()
    with recorded(case.name):
        moebius.patch(model, **options)
        assert moebius.is_patched(model)
        cold, warm = forward(model, case.inputs), forward(model, case.inputs)
        stats = moebius.stats(model).to_dict()
        generated = case.greedy and greedy(model, case.inputs)
        moebius.unpatch(model)

        assert not moebius.is_patched(model)
        assert_exact(cold, case.logits, "first forward")
        assert_exact(warm, case.logits, "second forward")
        if case.greedy and generated:
            assert_same_tokens(generated[0], *case.greedy, f"{case.name} {options}")
        assert_experts_ran(stats, options)
        assert case.before.changes(Snapshot.of(model)) == []
        assert _same_bits(forward(model, case.inputs), case.logits)


def assert_experts_ran(stats: dict[str, Any], options: dict[str, Any]) -> None:
    """Catches a patch that leaves the experts to the stock code, and a cache that is never hit or never there."""
    assert stats["tokens"] > 0
    assert stats["hits"] + stats["misses"] > 0
    if options["device"] == "cpu":
        assert stats["hits"] == 0
    elif options["gpu_memory"] == 1.0:
        assert stats["hits"] > 0


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_mixed_up_expert_shows(name: str) -> None:
    """Catches a zoo model whose experts do not matter: every comparison above would pass without them."""
    _skip_if_missing(name)
    model = zoo.build(name)
    want = forward(model, zoo.inputs(model))
    for path, module in model.named_modules():
        for parameter in module.parameters() if path.endswith(".experts") else ():
            parameter.data = parameter.data.roll(1, dims=0)
    error = (forward(model, zoo.inputs(model)) - want).abs().max() / want.abs().max()
    assert error > 1000 * TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_a_clear_error(name: str) -> None:
    """Catches a half-patched model, and an error that does not tell which module could not be handled."""
    _skip_if_missing(name)
    model = zoo.build(name)
    inputs = zoo.inputs(model)
    want = forward(model, inputs)
    before = Snapshot.of(model)
    with recorded(name):
        with pytest.raises(ValueError, match=type(model).__name__) as error:
            moebius.patch(model, device="emulated", gpu_memory=0.5)
        assert len(str(error.value)) > 60, "an error says what was found, what is allowed and what to do"
        assert not moebius.is_patched(model)
        assert before.changes(Snapshot.of(model)) == []
        assert _same_bits(forward(model, inputs), want)


# bfloat16. Rounding now and then takes a router across a tie, and a token then gets another expert, in stock and ours:
# only prompts that all three runs route alike can tell an arithmetic error from such a step.

BF16_PROMPTS = 12
FLOOR = 1e-3  # of the largest logit: a quarter of bfloat16's unit in the last place


class Run(NamedTuple):
    logits: Tensor  # float64
    routing: list[Tensor]

    def routed_like(self, other: Run) -> bool:
        """Whether ids are the same, and weights and router outputs too but for rounding."""
        return all(
            bool(((a - b).abs() < 0.1).all()) if a.is_floating_point() else bool(torch.equal(a, b))
            for a, b in zip(self.routing, other.routing, strict=True)
        )


def run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Run:
    """A forward that also collects ids and weights given to experts modules, and outputs of modules called router."""
    seen: list[Tensor] = []

    def record(values: Any) -> None:
        seen.extend(value.detach().clone() for value in values if isinstance(value, Tensor))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                hooks.enter_context(module.register_forward_pre_hook(lambda _, args: record(args[1:3])))
            elif name.endswith(".router"):
                hooks.enter_context(module.register_forward_hook(lambda _, args, output: record(output)))
        logits = forward(model, inputs)
    return Run(logits.double(), seen)


def precise_copy(model: PreTrainedModel, inputs: dict[str, Tensor]) -> PreTrainedModel:
    """The model in float64, or in float32 where the architecture's own code insists on that (inkling2)."""
    for dtype in (torch.float64, torch.float32):
        reference = copy.deepcopy(model).to(dtype)
        reference.set_experts_implementation("eager")  # torch's grouped product takes no float64
        try:
            forward(reference, inputs)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
        else:
            return reference
    raise AssertionError("neither a float64 nor a float32 copy of the model runs")


@pytest.mark.filterwarnings("ignore:Casting complex values")  # rotary tables of an idle vision tower, in the copy
@pytest.mark.parametrize("name", SUPPORTED)
def test_bf16_error_at_most_twice_stock(name: str) -> None:
    """Catches sums kept in bfloat16, and roundings that stock does not have."""
    _skip_if_missing(name)
    if Version(transformers.__version__) < Version(BF16_SINCE.get(name, "5.17")):
        pytest.skip(f"the installed transformers cannot run {name} in bfloat16")
    model = zoo.build(name, dtype=torch.bfloat16)
    prompts = [zoo.inputs(model, batch=1, length=6, seed=seed) for seed in range(BF16_PROMPTS)]
    reference = precise_copy(model, prompts[0])
    runs = [(prompt, run(reference, prompt), run(model, prompt)) for prompt in prompts]
    runs = [(prompt, precise, stock) for prompt, precise, stock in runs if stock.routed_like(precise)]
    for options in ({"device": "cpu"}, {"device": "emulated", "gpu_memory": 0.5}):
        moebius.patch(model, **options)
        ours = [run(model, prompt) for prompt, _, _ in runs]
        moebius.unpatch(model)
        alike = [(p, s, o) for (_, p, s), o in zip(runs, ours, strict=True) if o.routed_like(p)]
        assert 4 * len(alike) >= len(runs) > 0, (
            f"{len(runs)} of {BF16_PROMPTS} prompts routed as in float64 by stock, {len(alike)} of them by ours"
        )
        precise, stock, mine = (torch.stack([r.logits for r in column]) for column in zip(*alike, strict=True))
        allowed = 2 * (stock - precise).abs().max() + FLOOR * precise.abs().max()
        assert (mine - precise).abs().max() <= allowed, options


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what this run has checked, so that an architecture left out is seen."""
    everything = {zoo.architecture(name) for name in zoo.ENTRIES}
    missing = {zoo.architecture(name) for name in zoo.missing()}
    failed = {zoo.architecture(name) for name in started if passed[name] < started[name]}
    refused = {name for name in REFUSED if passed[name]} - failed
    exact = {zoo.architecture(name) for name in passed} - refused - failed
    rest = everything - exact - refused - missing - failed
    with capsys.disabled():
        print(f"\n{len(everything)} architectures: {len(exact)} exact, {len(refused)} refused, {len(missing)} missing")
        for what, names in (("refused", refused), ("missing", missing), ("failed", failed), ("not in this run", rest)):
            if names:
                print(f"  {len(names)} {what}: {', '.join(sorted(names))}")
    assert not failed
