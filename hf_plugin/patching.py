"""`patch` and `unpatch`: the one line, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from moebius.cpu_experts.record_file import RecordFile
from moebius.gpu_cache.device import open_device
from moebius.gpu_cache.policy import POLICIES
from moebius.hf_plugin import offload
from moebius.hf_plugin.checkpoints import saving
from moebius.hf_plugin.discovery.gates import parent_of
from moebius.hf_plugin.discovery.sites import ExpertsSite, find_sites
from moebius.hf_plugin.options import Options, parse_memory, unknown_option
from moebius.hf_plugin.profile import read_profile
from moebius.hf_plugin.running import file_check, linears, memory_guard
from moebius.hf_plugin.running.defaults import resolve_device
from moebius.hf_plugin.running.held import HeldWeights
from moebius.hf_plugin.running.layer import ATTRIBUTE, PatchedLayer
from moebius.hf_plugin.running.memory_guard import GuardedForward
from moebius.hf_plugin.running.reserve import reserve_for
from moebius.hf_plugin.running.runtime import ModelRuntime
from moebius.kernels.experts import RecordLayout
from moebius.kernels.formats import FLOATS
from moebius.kernels.numba.isa import check_choice
from moebius.predictors.routing import PREDICTORS

Model = TypeVar("Model", bound=nn.Module)

_COMPILES = "_valid_auto_compile_criteria"  # of generation models: whether generate compiles and replays graphs


def patch(model: Model, **options: Any) -> Model:
    """Let the routed experts of `model` run through Moebius; everything else stays as it is.

    The experts' weights move, layer by layer, from the model into host memory laid out for both processors; the rest of
    the model moves to the GPU if one is used. `generate()` and all else work as before, except training. With
    ``device="cpu"`` large dense layers multiply few rows with a kernel of ours (`linears`).

    Args:
        model: a loaded Mixture-of-Experts model of transformers.
        options: the fields of `moebius.Options`.

    Returns:
        The same object.

    Raises:
        ValueError: the model has no routed experts, is already patched, or cannot be patched (the message says why and
            what to do), or an option has a bad value.
        TypeError: an option is unknown.
        RuntimeError: the device asked for is not there.
    """
    chosen = make_options(options)
    if is_patched(model):
        raise ValueError("the model is already patched; call moebius.unpatch(model) first, then patch with new options")
    layers: list[PatchedLayer] = []
    try:
        offload.bring_in(model)
        sites = find_sites(model)
        check_budget(chosen, sites)
        _check_host_memory(chosen, sites)
        formats = [_lossless_format(site, chosen) for site in sites]
        for layer in make_layers(model, sites, formats, chosen):
            layers.append(layer)
            layer.install()
        start(model, layers, chosen)
    except BaseException:
        _give_back(model, layers)
        raise
    return model


def make_layers(
    model: nn.Module, sites: list[ExpertsSite], formats: list[str], options: Options
) -> Iterator[PatchedLayer]:
    """A layer for each site, which has copied the site's weights but not taken its place yet."""
    known: dict[int, HeldWeights] = {}  # by identity of the weights: models may tie the experts of two modules
    for index, (site, format) in enumerate(zip(sites, formats, strict=True)):
        if site.identity not in known:
            known[site.identity] = HeldWeights(site, format, options.keep_original)
        yield PatchedLayer(index, site, parent_of(model, site.name), known[site.identity])


def start(model: nn.Module, layers: list[PatchedLayer], options: Options, file: RecordFile | None = None) -> None:
    """Give installed layers what they share, and the model its place; `file` holds the experts if memory does not."""
    reserve = reserve_for(getattr(model, "config", None), _itemsize(model))
    runtime = ModelRuntime(options, layers, reserve, file)
    for layer in layers:
        layer.runtime = runtime
    _to_device(model, runtime)
    runtime.open()
    if options.device != "cpu":
        GuardedForward(model, runtime).install()
    file_check.install(model, runtime)
    for module in model.modules():
        if options.device == "cpu":
            linears.install(module)
        if hasattr(type(module), _COMPILES):  # a replayed graph would skip the CPU's part of every layer
            module.__dict__[_COMPILES] = _never
    saving.install(model)


def _itemsize(model: nn.Module) -> int:
    """Bytes of the dtype that the model computes in."""
    return next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)


def unpatch(model: Model) -> Model:
    """Give `model` its experts back, byte for byte, and return all memory and threads that Moebius used.

    Raises:
        ValueError: the model is not patched, or a file that has its experts was changed; then nothing is touched.
        RuntimeError: a device failed, as after an illegal memory access; the experts are back all the same.
    """
    layers = _patched_layers(model)
    if not layers:
        raise ValueError("the model is not patched")
    if lossy := [layer.name for layer in layers if not layer.held.lossless]:
        raise ValueError(
            f"the experts of {lossy[0]!r} were loaded straight into a format that does not hold their original values; "
            "load the checkpoint again for the unpatched model"
        )
    for layer in layers:
        layer.store.check_unchanged()
    try:
        _give_back(model, layers)
    except RuntimeError as error:
        error.add_note(
            "moebius: a device failed while memory was given back; the model is unpatched and has its experts, in host "
            "memory where their own device failed, but what else of it was on that device may be lost"
        )
        raise
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any experts of `model` run through Moebius."""
    return bool(_patched_layers(model))


def resize(model: Model, *, gpu_memory: int | float | str) -> Model:
    """Change the cache's budget of a patched `model`; the cache starts empty.

    Args:
        gpu_memory: as in `moebius.Options`.

    Raises:
        ValueError: the model is not patched, has no cache, or the budget is bad; the cache is as before.
    """
    for runtime in runtimes(model):
        runtime.resize(gpu_memory)
    return model


def runtimes(model: nn.Module) -> list[ModelRuntime]:
    """The runtimes of the patched layers in `model`, one where it was patched as a whole.

    Raises:
        ValueError: the model is not patched.
    """
    found = list({id(layer.runtime): layer.runtime for layer in _patched_layers(model)}.values())
    if not found:
        raise ValueError("the model is not patched; call moebius.patch(model) first")
    return found


def _patched_layers(model: nn.Module) -> list[PatchedLayer]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"a {type(model).__name__} is no model: give the torch module itself (of a pipeline its .model), or load "
            "one with moebius.from_pretrained"
        )
    return [layer for module in model.modules() if (layer := module.__dict__.get(ATTRIBUTE)) is not None]


def make_options(options: dict[str, Any]) -> Options:
    """Options from keyword arguments, all checked, with the device resolved."""
    check_choice()
    if unknown := sorted(set(options) - set(Options.__slots__)):
        raise unknown_option(unknown[0])
    chosen = Options(**options)
    for name, value, allowed in (
        ("cache_policy", chosen.cache_policy, tuple(POLICIES)),
        ("predictor", chosen.predictor, tuple(PREDICTORS)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}")
    return replace(chosen, device=resolve_device(chosen.device))


def check_budget(options: Options, sites: list[ExpertsSite]) -> None:
    """Raise what the options alone show to be impossible, before anything is touched."""
    if options.profile is not None:
        read_profile(options.profile).check(options.profile, [site.params.num_experts for site in sites])
    if options.device == "cpu":
        return
    open_device(options.device, options.emulated_link).close()
    sizes = [RecordLayout.of(site.spec, format_name(site, options)).nbytes for site in sites]
    total = sum(size * site.params.num_experts for size, site in zip(sizes, sites, strict=True))
    wanted, least = parse_memory(options.gpu_memory, total), sum(set(sizes))
    if wanted is not None and wanted < least:
        raise ValueError(
            f"gpu_memory={options.gpu_memory!r} is {wanted:,} bytes, less than one expert of each size "
            f"({least:,} bytes); all experts take {total:,} bytes: give more, or use device='cpu'"
        )


def _check_host_memory(options: Options, sites: list[ExpertsSite]) -> None:
    sizes = {
        site.identity: RecordLayout.of(site.spec, format_name(site, options)).nbytes * site.params.num_experts
        for site in sites
    }
    total = sum(sizes.values())
    wanted = parse_memory(options.cpu_memory, total)
    if wanted is not None and wanted < total:
        raise ValueError(
            f"cpu_memory={options.cpu_memory!r} is {wanted:,} bytes, but the experts, already in host memory, take "
            f"{total:,}: load the model with moebius.from_pretrained, which leaves in a file what exceeds the bound"
        )


def format_name(site: ExpertsSite, options: Options) -> str:
    """The storage format of a site's experts."""
    if options.expert_format != "native":
        return options.expert_format
    return site.coded or next(name for name, dtype in FLOATS.items() if dtype == site.dtype)


def _lossless_format(site: ExpertsSite, options: Options) -> str:
    """The storage format of a site's experts, which must give its weights back byte for byte."""
    name = format_name(site, options)
    if not options.keep_original and not all(_survives(t, FLOATS.get(name)) for t in site.tensors().values()):
        raise ValueError(
            f"expert_format={name!r} would change weights of {site.name!r} ({site.dtype}), so that unpatch could not "
            "restore them; give keep_original=True, which keeps the originals in host memory, or expert_format='native'"
        )
    return name


def _survives(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
    if dtype is None or dtype == tensor.dtype:
        return dtype is not None
    integer = torch.int32 if tensor.dtype.itemsize == 4 else torch.int16
    return all(torch.equal(row.view(integer), row.to(dtype).to(row.dtype).view(integer)) for row in tensor)


def _to_device(model: nn.Module, runtime: ModelRuntime) -> None:
    """Move all but the experts to the accelerator: what accelerate has offloaded, or a model on the CPU as a whole."""
    offload.settle(model)
    target = torch.device(runtime.options.device if runtime.options.device != "emulated" else "cpu")
    devices = {p.device.type for p in model.parameters()} - {"meta"}
    runtime.moved = target.type != "cpu" and devices == {"cpu"}
    if runtime.moved:
        model.to(target)


def _give_back(model: nn.Module, layers: list[PatchedLayer]) -> None:
    """Undo what `patch` did, from the last layer on; each step is taken, whatever the others raise."""
    with ExitStack() as steps:  # from the last to the first
        for module in model.modules():
            steps.callback(_restore_methods, module)
        if any("runtime" in layer.__dict__ and layer.runtime.moved for layer in layers):
            steps.callback(model.to, "cpu")
        steps.callback(offload.send_back, model)
        for layer in layers:
            if "runtime" in layer.__dict__:
                steps.callback(layer.runtime.release, layer)
            steps.callback(layer.remove)


def _restore_methods(module: nn.Module) -> None:
    file_check.remove(module)
    linears.remove(module)
    memory_guard.remove(module)
    saving.remove(module)
    if module.__dict__.get(_COMPILES) is _never:
        del module.__dict__[_COMPILES]


def _never(*args: Any, **kwargs: Any) -> bool:
    return False
