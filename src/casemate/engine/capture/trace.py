"""A module and a loss to a graph of per-record losses: traced once, on made-up inputs."""

from __future__ import annotations

import inspect
import keyword
import logging
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import torch
from torch import nn
from torch.distributions import Distribution
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from casemate.engine.capture import gradients
from casemate.engine.capture import loss as losses
from casemate.engine.capture.convert import DTYPES, convert
from casemate.graph import check
from casemate.graph.model import LABEL_NAMES, Graph, Packed
from casemate.graph.pack import pack, unpack
from casemate.spec.data import DatasetSchema
from casemate.spec.errors import CasemateError, ModelError
from casemate.spec.job import InputBinding

TORCH_DTYPES: Final = {name: dtype for dtype, name in DTYPES.items()}
Specs: TypeAlias = "dict[str, tuple[str, tuple[int, ...]]]"
# A batch size that is unlikely to be a size of the model: a trace that bakes it in is then seen.
EXAMPLE_BATCH: Final = 13


def capture(
    module: nn.Module,
    loss: nn.Module,
    specs: Specs,
    bindings: Sequence[InputBinding] = (),
    schema: DatasetSchema | None = None,
    dropout: bool = True,
) -> Packed:
    """The checked and packed model of ``module`` with its per-record ``loss``.

    loss: of :func:`casemate.engine.capture.loss.make`. specs: dtype and per-record shape of each
    input. bindings, schema: where given, the columns' declared bounds prove indices in range.
    dropout: whether layers that are in training mode drop out, or none does.
    Raises ``ModelError`` naming the node and the mend.
    """
    refuse_modules(module)
    gradients.refuse_hooks(module)

    def made(training: Collection[nn.Module]) -> Packed:
        graph, weights = trace(module, loss, specs, training)
        packed = pack(graph, weights)
        view = unpack(packed.data)[1]
        bounds = None if schema is None else check.known_bounds(graph, view, bindings, [schema])
        check.check(graph, {n: info for n, (info, _) in view.items()}, bounds=bounds)
        return packed

    layers = [m for m in module.modules() if dropout and m.training and _drops(m)]
    own = [(n, m) for n, m in module.named_modules() if dropout and m.training and _own(m)]
    if not own:
        return made(layers)
    try:
        return made([*layers, *(m for _, m in own)])
    except ModelError:
        # What the module's own code does in training may be more than dropping out.
        packed = made(layers)
    warnings.warn(
        "What the module's own code does in training mode alone cannot be exported, and is left out"
        f" ({len(own)} modules, such as {own[0][0] or 'the module itself'!r}).",
        stacklevel=3,
    )
    return packed


def module_of(given: object) -> nn.Module:
    """``given``, if it is a module. Raises ``ModelError`` ``model.export``."""
    if isinstance(given, nn.Module):
        return given
    raise ModelError(
        "model.export",
        f"{type(given).__name__} is no torch.nn.Module.",
        mend="Give the module that holds the parameters.",
    )


def specs_of(examples: Mapping[str, torch.Tensor]) -> Specs:
    """Dtype and per-record shape of tensors with the batch as axis 0. ``ModelError``."""
    return {name: (dtype_of(name, t.dtype), tuple(t.shape[1:])) for name, t in examples.items()}


@contextmanager
def modes(module: nn.Module, training: Collection[nn.Module] = ()) -> Iterator[None]:
    """Evaluation mode, but for the modules ``training``; put back as it was."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    for m in training:
        m.training = True
    try:
        yield
    finally:
        for m, mode in before:
            m.training = mode


_SPECTRAL: Final = (_SpectralNorm, SpectralNorm)


def _own(m: nn.Module) -> bool:
    """Whether code that is not torch's reads ``training``, and so may do otherwise in it."""
    own = (k for k in type(m).__mro__ if not k.__module__.startswith("torch."))
    functions = (f for k in own for f in vars(k).values() if inspect.isfunction(f))
    return any("training" in f.__code__.co_names for f in functions)


def _drops(m: nn.Module) -> bool:
    """Whether a layer of torch drops out in training mode."""
    rate = m.p if isinstance(m, nn.modules.dropout._DropoutNd) else getattr(m, "dropout", 0)
    return isinstance(rate, float) and rate > 0


def refuse_modules(module: nn.Module) -> None:
    """Refuse modules that mix records or change buffers, by name."""
    for name, m in module.named_modules():
        own = (*m.parameters(recurse=False), *m.buffers(recurse=False))
        if any(isinstance(p, UninitializedParameter | UninitializedBuffer) for p in own):
            raise ModelError(
                "model.export",
                f"{name or 'The module'} ({type(m).__name__}) has no shape yet.",
                mend="Call the module once on example inputs before.",
                where=name,
            )
        hooks = m._forward_pre_hooks.values()
        if m.training and any(isinstance(x, _SPECTRAL) for x in (m, *hooks)):
            raise ModelError(
                "model.export",
                f"{name or 'The module'} has a spectral norm in training mode, which changes a"
                " buffer in each step.",
                mend="Freeze the iteration: run the module a few times, then call .eval() on it.",
                where=name,
            )
        if isinstance(m, nn.modules.instancenorm._InstanceNorm) and (
            m.training and m.track_running_stats
        ):
            raise ModelError(
                "model.export",
                f"{name or 'The module'} ({type(m).__name__}) tracks statistics over the batches.",
                mend="Make it with track_running_stats=False, or freeze it with .eval().",
                where=name,
            )
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (
            m.training or not m.track_running_stats
        ):
            raise ModelError(
                "model.batchnorm",
                f"{name or 'The module'} ({type(m).__name__}) is in training mode: it averages over"
                " the batch, so that records would mix.",
                mend="Replace it by GroupNorm (casemate.client.torch.groupnorm), or freeze it with"
                " .eval().",
                where=name,
            )


def parameters(module: nn.Module) -> tuple[list[str], list[str], bool]:
    """Names of ``forward``'s required and optional parameters, and whether it takes any keyword."""
    kinds = inspect.signature(module.forward).parameters.values()
    named = [p for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in named if p.default is p.empty]
    optional = [p.name for p in named if p.default is not p.empty]
    return required, optional, any(p.kind is p.VAR_KEYWORD for p in kinds)


def _targets(loss: nn.Module, required: Sequence[str], names: Sequence[str]) -> list[str]:
    """The inputs that feed the loss: those with its parameters' names, or with a label's name."""
    own = losses.targets(loss)
    labels = [n for n in names if n in LABEL_NAMES and n not in required]
    return own if own and set(own) <= set(names) and set(labels) <= set(own) else labels


def dtype_of(name: str, dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        raise ModelError(
            "model.dtype",
            f"{name!r} is {dtype}; float32, int64, int32, uint8 and bool are admitted.",
            mend="Convert it, for instance with .float().",
            where=name,
        )
    return DTYPES[dtype]


class _Records(nn.Module):
    """The module with its loss, as a function of tensors to (B,) losses."""

    def __init__(self, module: nn.Module, loss: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.loss, self.names = module, loss, names
        required, optional, any_keyword = parameters(module)
        self.targets = _targets(loss, required, names)
        self.features = [n for n in names if n in required or n not in self.targets]
        self.by_name = any_keyword or set(self.features) <= {*required, *optional}
        self.fixed = {"use_cache": False} if "use_cache" in optional else {}

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        features = {n: given[n] for n in self.features}
        with gradients.Watch():
            if self.by_name:
                outputs = self.module(**features, **self.fixed)
            else:
                outputs = self.module(*features.values())
            losses_: torch.Tensor = self.loss(outputs, *(given[n] for n in self.targets))
        if isinstance(losses_, torch.Tensor):
            gradients.refuse_functions(losses_)
        return losses_


def trace(
    module: nn.Module, loss: nn.Module, specs: Specs, training: Collection[nn.Module] = ()
) -> tuple[Graph, Any]:
    """The graph and weights of the per-record losses of ``module`` on inputs of these ``specs``;
    its modules ``training`` in that mode."""
    _require_names(specs)
    return exported(_Records(module, loss, list(specs)), module, specs, training)


def _require_names(specs: Specs) -> None:
    for name in specs:
        if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name):
            raise ModelError(
                "model.inputs",
                f"{name[:80]!r} cannot name an input.",
                mend="Use an ASCII identifier.",
                where=name[:80],
            )


def exported(
    wrapper: nn.Module,
    module: nn.Module,
    specs: Specs,
    training: Collection[nn.Module] = (),
    outputs: Callable[[], list[str]] = list,
) -> tuple[Graph, Any]:
    """The graph and weights of ``wrapper``, which calls ``module``, as a function of tensors of
    these ``specs``. outputs: names of what it returned, asked once it is traced; none: losses."""
    examples = tuple(
        torch.zeros(EXAMPLE_BATCH, *shape, dtype=TORCH_DTYPES[dtype])
        for dtype, shape in specs.values()
    )
    batch = torch.export.Dim("B", min=2, max=1 << 30)
    # opt_einsum orders products by the example's sizes, which would bake its batch in.
    plain = torch.backends.opt_einsum.flags(enabled=False)
    checks = Distribution._validate_args  # which branch on values, and change none
    with (
        modes(wrapper, training), torch.enable_grad(), warnings.catch_warnings(), plain,
        _no_tracebacks(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        try:
            Distribution.set_default_validate_args(False)
            program = torch.export.export(
                wrapper,
                examples,
                dynamic_shapes=(tuple({0: batch} for _ in examples),),
                strict=False,
            )
            return convert(program, module, list(specs), outputs())
        except CasemateError:
            raise
        except Exception as e:
            raise _explain(e, specs) from e
        finally:
            Distribution.set_default_validate_args(checks)


@contextmanager
def _no_tracebacks() -> Iterator[None]:
    """torch logs a traceback of what is then raised; the error says it in one line."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _explain(error: Exception, specs: Specs) -> ModelError:
    """What a failure of torch.export means for the model's author."""
    text = f"{type(error).__name__}: {error}"
    line = " ".join(str(error).split())[:300].rstrip(".")
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    if any("pack_padded_sequence" in frame.f_code.co_names for frame in frames):
        return ModelError(
            "model.data-dependent",
            "The module packs sequences (pack_padded_sequence), whose layout depends on the data.",
            mend="Run the padded sequences, and take the output at length - 1 by gather.",
        )
    if "DataDependent" in text or "data-dependent" in text or "Could not guard" in text:
        return ModelError(
            "model.data-dependent",
            f"The module's control flow or shapes depend on the data: {line}.",
            mend="Use masks (torch.where) in place of if, .item() and boolean indexing; write the"
            " formula out where a library function does so.",
        )
    if "Constraints violated" in text or "specializ" in text:
        return ModelError(
            "model.batch-fixed",
            f"The module works only for one size of the batch, or mixes records: {line}.",
            mend="Use x.shape[0] or -1 for the batch in view and expand, and never mix records.",
        )
    given = ", ".join(
        f"{name} {dtype} {('batch', *shape)}".replace("'", "")
        for name, (dtype, shape) in specs.items()
    )
    return ModelError(
        "model.export",
        f"The module or its loss cannot be traced on the inputs {given[:300]}: {line}.",
        mend="Check that both run on inputs of these shapes and dtypes, which the columns give.",
    )
