"""Calibration from top to bottom: a float model and some text in, a quantized model out."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flax.traverse_util import flatten_dict

from infer.calibrate.layers import Method, Walk, calibrated_stack, sets
from infer.calibrate.methods import METHODS, Part, by_awq, by_gptq, by_smoothquant, plainly
from infer.calibrate.texts import batches_of, rows_of
from model.errors import InputError, nearest
from model.heads import abstract
from model.layers import param_info
from model.peft.attach import is_adapted
from model.quant import NAMES, Format, Quantized
from model.quant_tree import quantize_params

if TYPE_CHECKING:
  from model import Model

STRENGTH = 0.5


@dataclasses.dataclass(frozen=True)
class Report:
  """What calibration did.

  Attributes:
    samples, length: rows of the text that were read, and their tokens; 0: none were.
    parts: all matrices, in the order in which they compute.
  """

  format: str
  method: str
  samples: int
  length: int
  parts: list[Part]


def calibrate(
  m: "Model", texts: str | Sequence[str], *, format: str = "int4", method: str = "gptq",
  samples: int | None = None, length: int | None = None, alpha: float | None = None,
) -> "Model":  # fmt: skip
  """The model, quantized so that its layers' outputs on some text change little.

  Deterministic: equal arguments give equal parameters. Layers are quantized in order, each for what
  the quantized ones before it give. Matrices outside of layers are rounded plainly.

  Args:
    m: a float model of any shape.
    texts: one text or several, of the kind that the model will read; a decoder behind an encoder
      reads what the model writes of them.
    format: as `model.load` takes it.
    method: `gptq` rounds each matrix input by input and lets later inputs make good for errors.
      `awq` scales channels that matter where the layer can take the scales elsewhere (from norms,
      values to outputs, up to down projections). `smoothquant`, of formats that round activations,
      scales the same channels so that activations lose their outliers. `plain` rounds to the
      nearest values.
    samples, length: rows of the text and their tokens; None: up to 64 of 512.
    alpha: of SmoothQuant: the share of a channel's range that its weights take over, from 0 to 1;
      None: 0.5.

  Raises:
    InputError: for an unknown name, a method that does not fit the format, a model that is
      quantized already or has no tokenizer, no text or too little, or an impossible number.
  """
  return calibrated(
    m, texts, format=format, method=method, samples=samples, length=length, alpha=alpha
  )[0]


def calibrated(
  m: "Model", texts: str | Sequence[str] | None, *, format: str, method: str,
  samples: int | None = None, length: int | None = None, alpha: float | None = None,
) -> tuple["Model", Report]:  # fmt: skip
  """The same, with a report. `plain` needs no text; with some, its errors are told."""
  check(format, method, alpha, texts is not None, samples, length)
  if is_adapted(m.params):
    raise InputError("the model has an adapter: quantize m.merged(), or load it with quantize=.")
  rows = None if texts is None else rows_of(m, texts, samples, length)
  with _told_as_format():
    plain = quantize_params(m.params, param_info(abstract(m.config)), format)
  kept = Format.parse(format).name
  if rows is None:
    report = Report(kept, method, 0, 0, _untouched(plain, []))
    return dataclasses.replace(m, params=plain), report
  made, parts = _calibrated(m, plain, rows, _method(method, alpha))
  return dataclasses.replace(m, params=made), Report(kept, method, len(rows), rows.shape[1], parts)


def _method(name: str, alpha: float | None) -> Method:
  strength = STRENGTH if alpha is None else alpha
  smoothquant = functools.partial(by_smoothquant, strength=strength)
  return {"plain": plainly, "gptq": by_gptq, "awq": by_awq, "smoothquant": smoothquant}[name]


def _calibrated(m: "Model", plain: dict, rows: Any, method: Method) -> tuple[dict, list[Part]]:
  """(parameters, what became of matrices): the stacks one after the other."""
  from tqdm import tqdm  # Who does not calibrate may be without it.

  batches, made, parts = batches_of(m, rows), dict(plain), []
  walk, read = Walk(m.config, plain), [s for s in m.config.stacks if s in batches[0].inputs]
  total = sum(len(list(sets(m.config, name))) for name in read)
  with tqdm(total=total, unit="layer", disable=None, leave=False) as bar:
    for name in read:
      batches = [walk.begin(name, batch) for batch in batches]
      layers, batches, told = calibrated_stack(
        walk, name, m.params[name]["layers"], plain[name]["layers"], batches, method, bar.update
      )  # fmt: skip
      made[name] = {**plain[name], "layers": layers}
      batches, parts = [walk.end(name, batch) for batch in batches], parts + told
  return made, parts + _untouched(plain, read)


def check(
  format: str, method: str, alpha: float | None, text: bool, samples: int | None,
  length: int | None,
) -> None:  # fmt: skip
  """Raises an InputError for settings that no model could be calibrated with."""
  with _told_as_format():
    dynamic = Format.parse(format).dynamic
  if method not in METHODS:
    raise InputError(
      f"method={method!r} is not known: use one of {', '.join(METHODS)}.{nearest(method, METHODS)}"
    )
  if method != "plain" and dynamic != (method == "smoothquant"):
    fitting = [name for name in NAMES if name.endswith("_dynamic") == (method == "smoothquant")]
    raise InputError(
      f"method={method!r} does not fit format={format!r}: it is for {', '.join(fitting)}."
    )
  if alpha is not None and method != "smoothquant":
    raise InputError(f"alpha={alpha} has no effect on method={method!r}: leave it out.")
  if alpha is not None and not 0 <= alpha <= 1:
    raise InputError(f"alpha={alpha} must be between 0 and 1.")
  if method != "plain" and not text:
    raise InputError(f"method={method!r} needs text to calibrate with: give some (--data).")
  for name, value in (("samples", samples), ("length", length)):
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
      raise InputError(f"{name}={value!r} must be a whole number, at least 1.")
    if value is not None and not text:
      raise InputError(f"{name}={value} has no effect without text: give some (--data).")


@contextlib.contextmanager
def _told_as_format():
  """Names the setting as it is named here in what `model.quant` refuses."""
  try:
    yield
  except InputError as error:
    raise InputError(str(error).replace("quantize=", "format=")) from None


def _untouched(plain: dict, read: list[str]) -> list[Part]:
  """Matrices that met no text: those outside of the layers of the stacks that were read."""
  return [
    Part(".".join(map(str, path)), w.format.name, "plain", 0, None, None)
    for path, w in _quantized(plain)
    if not (path[0] in read and path[1] == "layers")
  ]


def _quantized(params: dict) -> Iterator[tuple[tuple[Any, ...], Quantized]]:
  leaves: Any = flatten_dict(params)
  yield from ((path, leaf) for path, leaf in leaves.items() if isinstance(leaf, Quantized))
