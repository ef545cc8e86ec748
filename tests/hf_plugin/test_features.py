"""Whatever generates text with a stock model generates the same text with a patched one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import moebius
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import EIGHT, EMULATED, assert_close, everywhere, greedy, logits, patched, prompt

pytestmark = pytest.mark.usefixtures("prefetching", "dense_kernels")

Decode = Callable[[PreTrainedModel, Tensor], Any]


def sampling(model: PreTrainedModel, ids: Tensor) -> Any:
    torch.manual_seed(3)
    return model.generate(ids, **(EIGHT | {"do_sample": True, "temperature": 1.3, "top_p": 0.9})).tolist()


def beams(model: PreTrainedModel, ids: Tensor) -> Any:
    output = model.generate(ids, **EIGHT, num_beams=3, num_return_sequences=2, return_dict_in_generate=True)
    return output.sequences.tolist()


def assisted(model: PreTrainedModel, ids: Tensor) -> Any:
    return model.generate(ids[:1], **EIGHT, assistant_model=zoo.build("qwen3_moe", seed=5)).tolist()


def prompt_lookup(model: PreTrainedModel, ids: Tensor) -> Any:
    return model.generate(ids[:1].repeat(1, 2), **EIGHT, prompt_lookup_num_tokens=3).tolist()


def left_padded(model: PreTrainedModel, ids: Tensor) -> Any:
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return model.generate(ids * mask, attention_mask=mask, **EIGHT).tolist()


def static_cache(model: PreTrainedModel, ids: Tensor) -> Any:
    return model.generate(ids, **EIGHT, cache_implementation="static").tolist()


def continuous_batching(model: PreTrainedModel, ids: Tensor) -> Any:
    """Two prompts of different length in one batch, from a thread of transformers' own."""
    size = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # as in transformers 5.17
    results = model.generate_batch(
        [ids[0].tolist(), ids[1, :7].tolist()],
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64, **{size: 16}),
    )
    return [output.generated_tokens for output in results.values()]


DECODINGS: dict[str, Decode] = {
    "greedy": helpers.greedy,
    "one-row": lambda model, ids: helpers.greedy(model, ids[:1]),
    **{f.__name__: f for f in (sampling, beams, assisted, prompt_lookup, left_padded, static_cache)},
    "continuous_batching": continuous_batching,
}


@everywhere
@pytest.mark.parametrize("decode", DECODINGS.values(), ids=DECODINGS.keys())
def test_decoding_gives_the_same_tokens(decode: Decode, options: dict[str, Any]) -> None:
    """Catches calls of other shapes, orders or threads that only some ways of decoding make."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = decode(model, ids)
    with patched(model, **options):
        assert decode(model, ids) == want
        stats = moebius.stats(model).to_dict()
    assert stats["hits"] + stats["misses"] > 0, "the experts did not run through the plugin"
    assert (stats["hits"] > 0) == (options["device"] != "cpu")


@everywhere
def test_sampling_depends_on_the_seed(options: dict[str, Any]) -> None:
    """Catches a patched model that samples without drawing: the comparison above would pass on greedy text."""
    model = zoo.build("qwen3_moe")
    with patched(model, **options):
        drawn = sampling(model, prompt(model))
        assert drawn != helpers.greedy(model, prompt(model))


def test_a_patched_assistant() -> None:
    """Catches a patch of the assistant that reaches the model, or drafts of another shape that it cannot take."""
    model, assistant = zoo.build("qwen3_moe"), zoo.build("qwen3_moe", seed=5)
    want = model.generate(prompt(model, 1), **EIGHT, assistant_model=assistant).tolist()
    with patched(assistant, **EMULATED):
        assert model.generate(prompt(model, 1), **EIGHT, assistant_model=assistant).tolist() == want
        assert not moebius.is_patched(model)


@everywhere
def test_pipeline_and_streamers(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches what only text shows: a pipeline that moves or converts the model, streamed text that differs."""
    model, tokenizer = helpers.trained(), helpers.tokenizer()
    text = "def read_lines(path):\n"

    def texts() -> list[str]:
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        piped = pipe(text, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
        capsys.readouterr()
        encoded = tokenizer(text, return_tensors="pt")
        model.generate(**encoded, max_new_tokens=12, do_sample=False, streamer=TextStreamer(tokenizer))
        printed = capsys.readouterr().out
        pieces = TextIteratorStreamer(tokenizer, skip_prompt=True)
        model.generate(**encoded, max_new_tokens=12, do_sample=False, streamer=pieces)
        return [piped, printed, "".join(pieces)]

    want = texts()
    with patched(model, **options):
        assert texts() == want
    assert all(len(t) > 4 for t in want)


@everywhere
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_router_logits_and_auxiliary_loss(name: str, options: dict[str, Any]) -> None:
    """Catches a predictor that calls router modules: their recorder would add entries and change the loss."""
    model = zoo.build(name)
    ids = prompt(model, 1)  # short enough for predictions

    @torch.no_grad()
    def run() -> Any:
        return model(input_ids=ids, labels=ids, output_router_logits=True)

    want = run()
    with patched(model, **options):
        for _ in range(3):  # predictions begin with the second
            got = run()
            assert len(got.router_logits) == len(want.router_logits) > 0
            for ours, stock in zip(got.router_logits, want.router_logits, strict=True):
                assert_close(ours, stock)
            assert_close(got.aux_loss, want.aux_loss)
            assert_close(got.loss, want.loss)
        predicted = moebius.stats(model).to_dict()["predicted"]
    assert (predicted > 0) == (options["device"] != "cpu")


@everywhere
def test_hidden_states_and_attentions(options: dict[str, Any]) -> None:
    """Catches experts that disturb the recorders of other outputs."""
    model = zoo.build("qwen3_moe")
    model.set_attn_implementation("eager")
    ids = prompt(model)
    with torch.no_grad():
        want = model(ids, output_hidden_states=True, output_attentions=True)
        with patched(model, **options):
            got = model(ids, output_hidden_states=True, output_attentions=True)
    for key in ("hidden_states", "attentions"):
        for ours, stock in zip(got[key], want[key], strict=True):
            assert_close(ours, stock)


@everywhere
def test_inference_mode(options: dict[str, Any]) -> None:
    """Catches tensors made under inference_mode that a later call outside it cannot use, and the reverse."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = logits(model, ids)
    with patched(model, **options):
        with torch.inference_mode():
            inside = model(ids).logits.clone()
        assert_close(inside, want)
        assert_close(logits(model, ids), want)
        with torch.inference_mode():
            assert_close(model(ids).logits.clone(), want)


# ---- LoRA on attention


def _with_lora(model: PreTrainedModel) -> Any:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return wrapped.eval()


@everywhere
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_lora_on_attention(first: str, options: dict[str, Any]) -> None:
    """Catches an adapter that has no effect, or another one than on stock, in either order of adapter and patch."""
    stock = zoo.build("qwen3_moe")
    ids = prompt(stock)
    plain, want = logits(stock, ids), logits(_with_lora(stock), ids)
    assert (want - plain).abs().max() > 1e-2 * plain.abs().max()

    model = zoo.build("qwen3_moe")
    if first == "patch":
        wrapped = _with_lora(moebius.patch(model, **options))
    else:
        wrapped = moebius.patch(_with_lora(model), **options)
    assert_close(logits(wrapped, ids), want)
    with wrapped.disable_adapter():
        assert_close(logits(wrapped, ids), plain)
    moebius.unpatch(wrapped)
    assert torch.equal(logits(wrapped, ids), want)


# ---- torch.compile


@pytest.mark.slow
@everywhere
def test_compiled_in_one_graph(options: dict[str, Any]) -> None:
    """Catches Python of ours that the compiler would have to trace, and a graph that outlives unpatch or a patch."""
    torch.compiler.reset()
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    want = logits(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with patched(model, **options):
        assert_close(logits(compiled, ids), want)
        moebius.reset_stats(model)
        assert_close(logits(compiled, ids), want)
        assert moebius.stats(model).to_dict()["tokens"] == ids.numel(), "the compiled graph does not call the experts"
    assert_close(logits(compiled, ids), want)
    with patched(model, device="cpu"):
        assert_close(logits(compiled, ids), want)
        assert moebius.stats(model).to_dict()["tokens"] == ids.numel()


@pytest.mark.slow
@everywhere
def test_compiled_through_autograd_for_any_length(options: dict[str, Any]) -> None:
    """Catches a fake kernel that fixes the number of tokens, and an operator that autograd's tracer refuses."""
    torch.compiler.reset()
    model = zoo.build("qwen3_moe")
    prompts = [prompt(model, 2, length) for length in (12, 7)]
    want = [logits(model, ids) for ids in prompts]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with patched(model, **options):
        for ids, stock in zip(prompts, want, strict=True):
            assert_close(logits(compiled, ids), stock)


def test_generate_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches generate's own compilation, whose graph replay would skip the CPU's part of every layer."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    calls: list[Any] = []
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: calls.append(config) or self.__call__)
    config = GenerationConfig(**EIGHT, cache_implementation="static")
    config.compile_config = _compile_everywhere()
    with patched(model, **EMULATED):
        model.generate(ids, generation_config=config)
        assert not calls
    model.generate(ids, generation_config=config)
    assert calls, "without the patch generate compiles, so that the check above could fail"


def _compile_everywhere() -> Any:
    from transformers import CompileConfig

    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    return config


@everywhere
def test_operator_follows_the_rules_of_torch(options: dict[str, Any]) -> None:
    """Catches a wrong schema, fake kernel or aliasing of `moebius::experts`, which only the compiler would meet."""
    model = zoo.build("qwen3_moe")
    [layer, *_] = helpers.experts_modules(model)
    with patched(model, **options):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        ids = torch.tensor([[0, 1], [7, 3], [2, 2], [-1, 8], [5, 0]])
        number = vars(layer)["_moebius"].id
        torch.library.opcheck(torch.ops.moebius.experts.default, (x, ids, torch.rand(5, 2), number))


@contextmanager
def defaults(name: str) -> Iterator[None]:
    """Torch's defaults as some scripts set them; the meta device stands for a GPU: nothing can be computed there."""
    torch.set_default_device("meta" if name == "device" else None)
    torch.set_default_dtype({"bf16": torch.bfloat16, "fp64": torch.float64}.get(name, torch.float32))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["device", "bf16", "fp64"])
@pytest.mark.parametrize(
    "options",
    [{"device": "cpu"}, {"device": "cpu", "expert_format": "int4", "keep_original": True}, EMULATED],
    ids=["cpu", "int4", "emulated"],
)
def test_other_defaults_of_torch(options: dict[str, Any], name: str) -> None:
    """Catches a tensor of ours whose device or dtype is whatever the script has made torch's default."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    with patched(model, **options):
        want, tokens = logits(model, ids), greedy(model, ids)
    with defaults(name), patched(model, **options):
        for _ in range(3):
            assert_close(logits(model, ids), want)
        assert greedy(model, ids) == tokens
        moebius.stats(model)
