"""What the command line can explain: from the MODEL argument to a callable and its example inputs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedInputError
from ..torch_private import FakeTensorMode

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ATTENTIONS = ("sdpa", "eager")
REAL_PARAMETERS = 50_000_000
FORMS = "a transformers config (folder, .json file or model id), module:callable, or an exported program (.pt2)"


@dataclass(frozen=True)
class ModelOptions:
    """How a model given as a config is built and called.

    Attributes:
        attn: attention implementation of transformers.
        dtype: of parameters and activations, a name in `DTYPES`.
        batch, seq: sizes of the input tokens; with `decode`, `seq` is the length of the cache, filled but for the last place.
        decode: one token against a filled cache, in place of a prefill.
    """

    attn: str = "sdpa"
    dtype: str = "bf16"
    batch: int = 1
    seq: int = 128
    decode: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("attention", self.attn, ATTENTIONS), ("dtype", self.dtype, tuple(DTYPES))):
            if value not in known:
                raise UnsupportedInputError(f"unknown {name} {value!r}. Known: {', '.join(known)}")
        if self.batch < 1 or self.seq < (2 if self.decode else 1):
            raise UnsupportedInputError("batch and sequence must be at least 1, and the sequence at least 2 to decode")


@dataclass(frozen=True)
class Example:
    """Something to explain: a callable, the inputs to call it with, and a line that says what it is."""

    title: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def load(spec: str, options: ModelOptions) -> Example:
    """The example that a MODEL argument names.

    Raises:
        UnsupportedInputError: nothing can be made of it; the message says what was tried.
    """
    path = Path(spec)
    if path.suffix == ".pt2":
        return _load_exported(path)
    if path.suffix == ".json" or path.is_dir():
        return build_from_config(_read_config(path), options)
    if ":" in spec:
        return _load_callable(spec, options)
    if path.exists():
        raise UnsupportedInputError(f"cannot explain {spec}: expected {FORMS}")
    return build_from_config(_fetch_config(spec), options)


def _load_exported(path: Path) -> Example:
    if not path.is_file():
        raise UnsupportedInputError(f"no such file: {path}")
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch.export raises whatever its archive, schema or unpickler raises
        raise UnsupportedInputError(f"{path} is not an exported program that this torch can load: {first_line(error)}") from error
    if program.example_inputs is None:
        raise UnsupportedInputError(f"{path} holds no example inputs")
    args, kwargs = program.example_inputs
    return Example(f"exported program {path.name}", program.module(), tuple(args), dict(kwargs))


# module:callable


def _load_callable(spec: str, options: ModelOptions) -> Example:
    where, _, name = spec.rpartition(":")
    module = _import(where)
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            raise UnsupportedInputError(f"{where} has no {name!r}")
        target = getattr(target, part)
    example = _as_example(spec, target, options)
    if example is None and callable(target):
        try:
            result = target()
        except TypeError as error:
            raise UnsupportedInputError(f"{spec} has no example_inputs, and calling it without arguments failed: {error}") from error
        example = _as_example(spec, result, options)
    if example is None:
        raise UnsupportedInputError(
            f"{spec} must be a function or module with an attribute example_inputs, or a function that takes nothing and returns "
            "a module with example_inputs, (module, args) or (module, args, kwargs)"
        )
    return example


def _import(where: str) -> ModuleType:
    """A module by its name, the current folder included, or by its file."""
    try:
        if where.endswith(".py"):
            path = Path(where)
            if not path.is_file():
                raise UnsupportedInputError(f"no such file: {where}")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
            return module
        with _current_folder_importable():
            return importlib.import_module(where)
    except UnsupportedInputError:
        raise
    except Exception as error:  # the user's module may raise anything
        raise UnsupportedInputError(f"cannot import {where}: {type(error).__name__}: {first_line(error)}") from error


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """`python -m` has the current folder on the path, a console script has not."""
    folder = str(Path.cwd())
    added = folder not in sys.path and "" not in sys.path
    if added:
        sys.path.append(folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)


def _as_example(spec: str, value: Any, options: ModelOptions) -> Example | None:
    """An example made of `(module, args)`, `(module, args, kwargs)` or of something with `example_inputs`; None for anything else."""
    if isinstance(value, tuple) and 2 <= len(value) <= 3 and callable(value[0]):
        args, kwargs = _as_inputs(spec, value[1])
        return Example(spec, _in_eval(value[0]), args, {**kwargs, **(value[2] if len(value) == 3 else {})})
    if callable(value) and hasattr(value, "example_inputs"):
        inputs = value.example_inputs
        args, kwargs = _as_inputs(spec, inputs() if callable(inputs) else inputs)
        return Example(spec, _in_eval(value), args, kwargs)
    if isinstance(value, nn.Module) and hasattr(value, "config") and hasattr(value, "main_input_name"):
        return Example(spec, _in_eval(value), (), language_inputs(value, options))
    return None


def _as_inputs(spec: str, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise UnsupportedInputError(f"example inputs of {spec} must be a tensor, a tuple or a dictionary, not {type(inputs).__name__}")


def _in_eval(target: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(target, nn.Module):
        target.eval()
    return target


# transformers configurations


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedInputError(f"a transformers config needs transformers: pip install npu-fusion[models] ({error})") from error
    return transformers


def _read_config(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UnsupportedInputError(f"no such file: {file}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UnsupportedInputError(f"{file} is not JSON: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    known = _transformers().models.auto.configuration_auto.CONFIG_MAPPING
    if kind not in known:
        raise UnsupportedInputError(f"{file} has model_type {kind!r}, which transformers {_transformers().__version__} does not know")
    try:
        return known[kind].from_dict(values)
    except Exception as error:  # configurations validate themselves with errors of many types
        raise UnsupportedInputError(f"{file} is not a valid {kind} configuration: {first_line(error)}") from error


def _fetch_config(name: str) -> Any:
    try:
        return _transformers().AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UnsupportedInputError(
            f"cannot load {name!r}: no such file, and no configuration of that model id is cached or can be fetched "
            f"({first_line(error)}). Expected {FORMS}"
        ) from error


def build_from_config(config: Any, options: ModelOptions) -> Example:
    """A model of this configuration with random weights, and inputs for one prefill or decode step.

    A large model is made of fake tensors, which have shapes and no data: explaining one of 70 billion parameters takes no memory.
    """
    mode: contextlib.AbstractContextManager[Any] = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            model = _build(config, options)
        fake = _parameters(model) > REAL_PARAMETERS
    except UnsupportedInputError:
        fake = False  # some constructors look at the values of a tensor; what is wrong with the configuration itself comes up again
    if not fake:
        model, mode = _build(config, options), contextlib.nullcontext()
    with mode, torch.no_grad():
        inputs = language_inputs(model, options)
    step = f"decode at {options.seq}" if options.decode else f"prefill of {options.seq}"
    title = (
        f"{type(model).__name__}, {_count(_parameters(model))} parameters, {options.dtype}, batch {options.batch}, {step}, {options.attn}"
    )
    return Example(title, model, (), inputs)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _build(config: Any, options: ModelOptions) -> nn.Module:
    transformers = _transformers()
    errors = []
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            model: nn.Module = auto.from_config(config, dtype=DTYPES[options.dtype], attn_implementation=options.attn)
        except Exception as error:  # model constructors raise errors of many types
            errors.append(f"{auto.__name__}: {first_line(error)}")
        else:
            return model.eval()
    raise UnsupportedInputError(f"transformers cannot build {config.model_type}: {'; '.join(errors)}")


def language_inputs(model: nn.Module, options: ModelOptions) -> dict[str, Any]:
    """Token ids, and with `decode` a cache that a prefill filled: static where the model takes one, else the model's own."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UnsupportedInputError(
            f"{type(model).__name__} takes {model.main_input_name}, not tokens: give module:callable with its inputs"
        )
    device = next(model.parameters()).device
    if not options.decode:
        return {"input_ids": torch.zeros(options.batch, options.seq, dtype=torch.long, device=device), "use_cache": False}
    prompt = torch.zeros(options.batch, options.seq - 1, dtype=torch.long, device=device)
    token = torch.zeros(options.batch, 1, dtype=torch.long, device=device)
    cache = _filled_cache(model, prompt, options.seq)
    return {"input_ids": token, "past_key_values": cache, "use_cache": True}


def _filled_cache(model: Any, prompt: torch.Tensor, length: int) -> Any:
    static: Any = None
    try:
        if getattr(model, "_can_compile_fullgraph", True):
            static = _transformers().StaticCache(config=model.config, max_cache_len=length)
        output = model(input_ids=prompt, past_key_values=static, use_cache=True)
    except Exception as error:  # models without a cache, or with one of their own, fail in ways of their own
        raise UnsupportedInputError(f"{type(model).__name__} cannot fill a cache: {type(error).__name__}: {first_line(error)}") from error
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise UnsupportedInputError(f"{type(model).__name__} returns no cache: it cannot decode")
    return cache


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _count(number: int) -> str:
    for unit, factor in (("billion", 1e9), ("million", 1e6)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:,}"
