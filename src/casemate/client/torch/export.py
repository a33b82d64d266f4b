"""Export: a module and a loss to a graph of per-record losses."""

from __future__ import annotations

import inspect
import keyword
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import torch
from torch import nn
from torch.distributions import Distribution
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from casemate.client import bind
from casemate.client.torch import loss as losses
from casemate.client.torch.convert import DTYPES, convert
from casemate.graph import check
from casemate.graph.model import Graph, InputSpec, Packed
from casemate.graph.pack import pack, unpack
from casemate.spec.data import DatasetSchema
from casemate.spec.errors import CasemateError, ModelError
from casemate.spec.job import InputBinding

TORCH_DTYPES: Final = {name: dtype for dtype, name in DTYPES.items()}
Inputs: TypeAlias = "Mapping[str, str | Sequence[str]]"
# A batch size that is unlikely to be a size of the model: a trace that bakes it in is then seen.
EXAMPLE_BATCH: Final = 13


def export(
    module: nn.Module,
    data: DatasetSchema | Mapping[str, torch.Tensor],
    *,
    loss: Any = None,
    inputs: Inputs | None = None,
) -> tuple[Packed, tuple[InputBinding, ...]]:
    """Pack ``module`` with its per-record ``loss``; and say which columns feed which input.

    ``data``: a dataset's schema, or example tensors by name with the batch as axis 0 (only dtypes
    and shapes are used). An input named as one of ``forward``'s parameters is passed to it; the one
    named ``target``, ``label``, ``labels`` or ``y`` goes to the loss as its target.
    ``loss``: a name (:data:`casemate.client.torch.loss.NAMES`, or ``next_token``), a ``torch.nn``
    loss, or a function of (outputs, target) that gives shape (B,).
    ``inputs``: input to column or columns, where names do not say it.

    Parameters with ``requires_grad`` are trained; others, and buffers, never change. Dropout is
    left out, with a warning. Raises ``ModelError`` naming the node and the mend.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(
            "model.export",
            f"{type(module).__name__} is no torch.nn.Module.",
            mend="Give the module that holds the parameters.",
        )
    made = losses.make(loss)
    specs, bindings = _inputs(module, made, data, inputs or {})
    _refuse_modules(module)
    graph, weights = trace(module, made, specs)
    packed = pack(graph, weights)
    view = unpack(packed.data)[1]
    bounds = None
    if isinstance(data, DatasetSchema):
        bounds = check.known_bounds(graph, view, bindings, [data])
    check.check(graph, {n: info for n, (info, _) in view.items()}, bounds=bounds)
    return packed, bindings


@contextmanager
def _eval(module: nn.Module) -> Any:
    """Evaluation mode (no dropout), put back as it was."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


_SPECTRAL: Final = (_SpectralNorm, SpectralNorm)


def _reads_training(m: nn.Module) -> bool:
    """Whether code of the module's own reads ``training``, and so may do otherwise in it."""
    own = (k for k in type(m).__mro__ if not k.__module__.startswith("torch."))
    functions = (f for k in own for f in vars(k).values() if inspect.isfunction(f))
    return any("training" in f.__code__.co_names for f in functions)


def _refuse_modules(module: nn.Module) -> None:
    dropped: list[str] = []
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
        rate = m.p if isinstance(m, nn.modules.dropout._DropoutNd) else getattr(m, "dropout", 0)
        if m.training and ((isinstance(rate, float) and rate > 0) or _reads_training(m)):
            dropped.append(name)
    if dropped:
        warnings.warn(
            "Dropout is left out of the exported model, and so is all else that is done in training"
            f" mode alone ({len(dropped)} layers, such as {dropped[0] or 'the module'!r}): DP-SGD's"
            " noise regularises already.",
            stacklevel=3,
        )


def _parameters(module: nn.Module) -> tuple[list[str], list[str], bool]:
    """Names of ``forward``'s required and optional parameters, and whether it takes any keyword."""
    kinds = inspect.signature(module.forward).parameters.values()
    named = [p for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in named if p.default is p.empty]
    optional = [p.name for p in named if p.default is not p.empty]
    return required, optional, any(p.kind is p.VAR_KEYWORD for p in kinds)


Specs: TypeAlias = "dict[str, tuple[str, tuple[int, ...]]]"


def _targets(loss: nn.Module, required: Sequence[str], names: Sequence[str]) -> list[str]:
    """The inputs that feed the loss: those with its parameters' names, or with a label's name."""
    own = losses.targets(loss)
    labels = [n for n in names if n in bind.LABEL_NAMES and n not in required]
    return own if own and set(own) <= set(names) and set(labels) <= set(own) else labels


def _inputs(
    module: nn.Module,
    loss: nn.Module,
    data: DatasetSchema | Mapping[str, torch.Tensor],
    given: Inputs,
) -> tuple[Specs, tuple[InputBinding, ...]]:
    """Each input's dtype and per-record shape, and the columns that feed it."""
    if not isinstance(data, DatasetSchema):
        specs = {name: (_dtype(name, t.dtype), tuple(t.shape[1:])) for name, t in data.items()}
        return specs, tuple(InputBinding(input=n, columns=(n,)) for n in specs)
    required, optional, any_keyword = _parameters(module)
    columns = {c.name: c for c in data.columns}
    names = [n for n in required if n not in given]
    names += [n for n in optional if n in columns and n not in bind.LABEL_NAMES]
    if any_keyword and not names and not given:
        names = [c.name for c in data.columns if c.role == "feature"]
    names += list(given)
    own = losses.targets(loss)
    fed = {*names, *own}
    for columns_ in given.values():
        fed.update([columns_] if isinstance(columns_, str) else columns_)
    labels = [c.name for c in data.columns if c.role == "label"]
    said = set(given) & set(bind.LABEL_NAMES) - {*own, *required}
    named = set(own) <= {*names, *columns} and set(labels) <= fed and not said
    if named:
        names += own
    elif labels and not set(names) & set(bind.LABEL_NAMES):
        names.append("target")
    names = list(dict.fromkeys(names))
    # A column may feed the model and its loss both.
    given = {**{n: n for n in names if n in columns}, **given}
    if own and not named and not set(names) & set(bind.LABEL_NAMES):
        raise ModelError(
            "model.inputs",
            "The loss takes a target, and no column of the dataset is one.",
            mend="Mark a column as the label, or name it: inputs={'target': 'column'}; a column may"
            " feed the module too.",
            where="target",
        )
    shell = Graph(
        inputs=tuple(InputSpec(name=n, kind="data", dtype="f32", shape=()) for n in names),
        nodes=(),
        loss="",
    )
    bindings = bind.bind(shell, data, given)
    specs = {}
    for b in bindings:
        found = [columns[c] for c in b.columns if c in columns]
        if len(found) != len(b.columns) or (len(found) > 1 and any(c.shape for c in found)):
            raise ModelError(
                "model.inputs",
                f"Input {b.input!r} cannot be fed by the columns {', '.join(b.columns)[:200]}.",
                mend="Name one column, or several scalar columns of the dataset.",
                where=b.input,
            )
        if len({c.dtype for c in found}) > 1:
            raise ModelError(
                "model.inputs",
                f"Input {b.input!r} is fed by columns of different dtypes.",
                mend="Push the columns as one dtype, or give the module one input for each.",
                where=b.input,
            )
        specs[b.input] = (found[0].dtype, found[0].shape if len(found) == 1 else (len(found),))
    return specs, bindings


def _dtype(name: str, dtype: torch.dtype) -> str:
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
        required, optional, any_keyword = _parameters(module)
        self.targets = _targets(loss, required, names)
        self.features = [n for n in names if n in required or n not in self.targets]
        self.by_name = any_keyword or set(self.features) <= {*required, *optional}
        self.fixed = {"use_cache": False} if "use_cache" in optional else {}

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        features = {n: given[n] for n in self.features}
        if self.by_name:
            outputs = self.module(**features, **self.fixed)
        else:
            outputs = self.module(*features.values())
        losses_: torch.Tensor = self.loss(outputs, *(given[n] for n in self.targets))
        return losses_


def trace(module: nn.Module, loss: nn.Module, specs: Specs) -> tuple[Graph, Any]:
    """The graph and weights of the per-record losses of ``module`` on inputs of these ``specs``."""
    for name in specs:
        if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name):
            raise ModelError(
                "model.inputs",
                f"{name[:80]!r} cannot name an input.",
                mend="Use an ASCII identifier.",
                where=name[:80],
            )
    wrapper = _Records(module, loss, list(specs))
    examples = tuple(
        torch.zeros(EXAMPLE_BATCH, *shape, dtype=TORCH_DTYPES[dtype])
        for dtype, shape in specs.values()
    )
    batch = torch.export.Dim("B", min=2, max=1 << 30)
    # opt_einsum orders products by the example's sizes, which would bake its batch in.
    plain = torch.backends.opt_einsum.flags(enabled=False)
    checks = Distribution._validate_args  # which branch on values, and change none
    with _eval(wrapper), torch.enable_grad(), warnings.catch_warnings(), plain, _no_tracebacks():
        warnings.simplefilter("ignore")
        try:
            Distribution.set_default_validate_args(False)
            program = torch.export.export(
                wrapper,
                examples,
                dynamic_shapes=(tuple({0: batch} for _ in examples),),
                strict=False,
            )
            return convert(program, module, list(specs))
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
